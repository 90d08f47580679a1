package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// hello is what Alice says.
const hello = "Hello Ockam!"

func (a *app) demoCommand() *cobra.Command {
	var root string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "demo",
		Short: "See it work: hub, Bob, Alice and an observer in one process",
		Long: `Starts a hub on a free local port, and Bob and Alice, who can reach nothing but
that hub. Alice sends Bob a message through a secure channel. Beside it an
ordinary MQTT client watches everything that the broker passes on, and the demo
prints what it saw. Exits 0 once the message has arrived.`,
		Example: "  sealmq demo\n  sealmq demo --json",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := topics.ParseRoot(root)
			if err != nil {
				return coded(exitUsage, err, "for example --root sealmq")
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			return (&demo{app: a, root: r}).run(ctx)
		},
	}
	c.Flags().StringVar(&root, "root", string(topics.DefaultRoot), "topic root")
	c.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "give up after this long")
	return c
}

// demo is one run of the demonstration.
type demo struct {
	*app
	root topics.Root
}

// step is one line of the story; what is not in its words is there with --json.
type step struct {
	Who        string `json:"who"`
	What       string `json:"what"`
	URL        string `json:"url,omitempty"`
	Identifier string `json:"identifier,omitempty"` // of who or, once they talk, of the peer
	Address    string `json:"address,omitempty"`
	Text       string `json:"text,omitempty"`
}

func (d *demo) say(s step) error { return d.result(s, fmt.Sprintf("%-6s %s", s.Who, s.What)) }

func (d *demo) run(ctx context.Context) (err error) {
	log := d.quiet()
	hub, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}, Root: string(d.root), Logger: log})
	if err != nil {
		return err
	}
	if err := hub.Start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hub.Shutdown(context.WithoutCancel(ctx))) }()
	url := hub.MQTTURL()
	if err := d.say(step{Who: "hub", What: "listens at " + url, URL: url}); err != nil {
		return err
	}
	w, err := watch(ctx, url, "observer", d.root)
	if err != nil {
		return err
	}
	defer w.close()

	bob, fwd, err := d.startBob(ctx, url, log)
	if err != nil {
		return err
	}
	defer bob.Close()
	me := bob.Identifier().String()
	if err := d.say(step{Who: "bob", What: "is " + short(me) + "; Forwarding address: " + fwd, Identifier: me, Address: fwd}); err != nil {
		return err
	}
	alice, err := d.connect(ctx, url, log)
	if err != nil {
		return err
	}
	defer alice.Close()
	me = alice.Identifier().String()
	if err := d.say(step{Who: "alice", What: "is " + short(me) + " and dials " + fwd + ", trusting nobody but Bob", Identifier: me, Address: fwd}); err != nil {
		return err
	}
	if err := d.talk(ctx, alice, bob, fwd); err != nil {
		return err
	}
	for _, n := range []*device.Node{alice, bob} {
		if err := n.Flush(ctx); err != nil {
			return err
		}
	}
	all, err := w.until(ctx, d.everything(fwd, alice, bob))
	if err != nil {
		return err
	}
	return d.report(all, [2]string{alice.ClientID(), bob.ClientID()}, fwd)
}

func (d *demo) connect(ctx context.Context, url string, log *slog.Logger) (*device.Node, error) {
	id, err := identity.Create()
	if err != nil {
		return nil, err
	}
	return device.Connect(ctx, url, device.Config{Identity: id, Root: d.root, Logger: log})
}

func (d *demo) startBob(ctx context.Context, url string, log *slog.Logger) (*device.Node, string, error) {
	bob, err := d.connect(ctx, url, log)
	if err != nil {
		return nil, "", err
	}
	if _, err := bob.Listen("listener", channel.TrustEveryone); err != nil {
		_ = bob.Close()
		return nil, "", err
	}
	fwd, err := bob.CreateForwarder(ctx, "listener")
	if err != nil {
		_ = bob.Close()
		return nil, "", err
	}
	return bob, fwd.Address(), nil
}

// talk is the conversation.
func (d *demo) talk(ctx context.Context, alice, bob *device.Node, fwd string) error {
	ch, err := alice.Dial(ctx, route.To(fwd), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		return err
	}
	peer := ch.Peer().Identifier.String()
	if err := d.say(step{Who: "alice", What: "has a secure channel with " + short(peer), Identifier: peer}); err != nil {
		return err
	}
	if err := ch.SendString(ctx, appAddress, hello); err != nil {
		return err
	}
	if err := d.say(step{Who: "alice", What: fmt.Sprintf("sends %q to %s", hello, appAddress), Address: appAddress, Text: hello}); err != nil {
		return err
	}
	m, err := bob.Receive(ctx, appAddress)
	if err != nil {
		return err
	}
	text, err := m.Text()
	if err != nil || text != hello || m.From != alice.Identifier() {
		return coded(exitSoftware, fmt.Errorf("what arrived is %s from %v", m, m.From), "please report this")
	}
	from := m.From.String()
	return d.say(step{Who: "bob", What: fmt.Sprintf("received %q from %s, verified", text, short(from)), Identifier: from, Text: text})
}

// everything says that the observer has seen each frame that the devices have sent
// (those of the outbox, and one greeting for each connection) and received, and what
// the hub says of them.
func (d *demo) everything(fwd string, nodes ...*device.Node) func([]seen) bool {
	return func(all []seen) bool {
		for _, n := range nodes {
			stats := n.Stats()
			out, err := framesOn(all, d.root.Out(n.ClientID()))
			if err != nil || uint64(len(out)) < stats.FramesSent+stats.Connects {
				return false
			}
			in, err := framesOn(all, d.root.In(n.ClientID()))
			if err != nil || uint64(len(in))+stats.Connects < stats.FramesReceived { // the answer to the greeting is not copied
				return false
			}
			if lastOn(all, d.root.Status(n.ClientID())) == nil {
				return false
			}
		}
		return lastOn(all, d.root.Forwarder(fwd)) != nil
	}
}

// sight is one frame that the observer saw, with --json.
type sight struct {
	Topic   string `json:"topic"`
	To      string `json:"to"`
	Back    string `json:"back"`
	Bytes   int    `json:"bytes"`
	Payload string `json:"payload"`
}

// note is one retained record that the observer saw, with --json.
type note struct {
	Topic  string          `json:"topic"`
	Record json.RawMessage `json:"record"`
}

// report prints what the observer saw.
func (d *demo) report(all []seen, names [2]string, fwd string) error {
	for _, s := range all {
		if bytes.Contains(s.payload, []byte(hello)) {
			return coded(exitSoftware, errors.New("the observer saw the message in the clear"), "please report this")
		}
	}
	d.story("\nAn observer of the whole broker saw this, and cannot tell which frame says %q:\n", hello)
	total, passed := 0, 0
	for i, who := range [2]string{"alice", "bob"} {
		d.story("\n%s (%s)\n", d.root.Out(short(names[i])), who)
		out, err := d.frames(all, d.root.Out(names[i]), true)
		if err != nil {
			return err
		}
		in, err := d.frames(all, d.root.In(names[i]), d.json)
		if err != nil {
			return err
		}
		total += out
		passed += in
	}
	d.story("\n%d frames went on to %s and %s, with the way back in front;\nand the hub's records:\n\n",
		passed, d.root.In(short(names[0])), d.root.In(short(names[1])))
	for _, at := range [][2]string{
		{d.root.Status(names[0]), d.root.Status(short(names[0]))}, {d.root.Status(names[1]), d.root.Status(short(names[1]))},
		{d.root.Forwarder(fwd), d.root.Forwarder(fwd)},
	} {
		record := lastOn(all, at[0])
		if err := d.result(note{at[0], record}, at[1]+"\n  "+shortWords(string(record))); err != nil {
			return err
		}
	}
	d.story("\nIn all %d frames sent, and never a byte of the message.\n", total)
	return nil
}

// story prints what is not said with --json.
func (d *demo) story(format string, args ...any) {
	if !d.json {
		fmt.Fprintf(d.stdout, format, args...)
	}
}

// frames counts the frames that the observer saw on a topic, and prints them if show
// is set.
func (d *demo) frames(all []seen, topic string, show bool) (n int, err error) {
	frames, err := framesOn(all, topic)
	if err != nil {
		return 0, coded(exitSoftware, err, "please report this")
	}
	for _, f := range frames {
		if !show {
			break
		}
		s := sight{topic, f.onward.String(), f.back.String(), len(f.payload), fmt.Sprintf("%x", f.payload)}
		line := fmt.Sprintf("  to %-28s %5d bytes  %s", shortRoute(f.onward), len(f.payload), shortHex(f.payload))
		if err := d.result(s, line); err != nil {
			return 0, err
		}
	}
	return len(frames), nil
}
