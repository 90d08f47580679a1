package main

import (
	"bytes"
	"context"
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

// step is one line of the story with --json.
type step struct {
	Who  string `json:"who"`
	What string `json:"what"`
}

func (d *demo) say(who, format string, args ...any) error {
	s := step{who, fmt.Sprintf(format, args...)}
	return d.result(s, fmt.Sprintf("%-6s %s", who, s.What))
}

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
	if err := d.say("hub", "listens at %s", url); err != nil {
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
	if err := d.say("bob", "is %s; Forwarding address: %s", short(bob.Identifier().String()), fwd); err != nil {
		return err
	}
	alice, err := d.connect(ctx, url, log)
	if err != nil {
		return err
	}
	defer alice.Close()
	if err := d.say("alice", "is %s and dials %s, trusting nobody but Bob", short(alice.Identifier().String()), fwd); err != nil {
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
	all, err := w.until(ctx, d.everything(alice, bob))
	if err != nil {
		return err
	}
	names := [2]string{alice.ClientID(), bob.ClientID()}
	return d.report(all, names)
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
	if err := d.say("alice", "has a secure channel with %s", short(ch.Peer().Identifier.String())); err != nil {
		return err
	}
	if err := ch.SendString(ctx, appAddress, hello); err != nil {
		return err
	}
	if err := d.say("alice", "sends %q to %s", hello, appAddress); err != nil {
		return err
	}
	m, err := bob.Receive(ctx, appAddress)
	if err != nil {
		return err
	}
	if text, err := m.Text(); err != nil || text != hello || m.From != alice.Identifier() {
		return coded(exitSoftware, fmt.Errorf("what arrived is %s from %v", m, m.From), "please report this")
	}
	return d.say("bob", "received %q from %s, verified", m.String(), short(m.From.String()))
}

// everything says that the observer has seen each frame that the devices have
// sent: those of the outbox, and one greeting for each connection.
func (d *demo) everything(nodes ...*device.Node) func([]seen) bool {
	return func(all []seen) bool {
		for _, n := range nodes {
			stats := n.Stats()
			frames, err := framesOn(all, d.root.Out(n.ClientID()))
			if err != nil || uint64(len(frames)) < stats.FramesSent+stats.Connects {
				return false
			}
		}
		return true
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

// report prints what the observer saw.
func (d *demo) report(all []seen, names [2]string) error {
	for _, s := range all {
		if bytes.Contains(s.payload, []byte(hello)) {
			return coded(exitSoftware, errors.New("the observer saw the message in the clear"), "please report this")
		}
	}
	if !d.json {
		fmt.Fprintf(d.stdout, "\nAn observer of the whole broker saw this, and cannot tell which frame says %q:\n", hello)
	}
	total := 0
	for i, who := range [2]string{"alice", "bob"} {
		topic := d.root.Out(names[i])
		frames, err := framesOn(all, topic)
		if err != nil {
			return coded(exitSoftware, err, "please report this")
		}
		total += len(frames)
		if !d.json {
			fmt.Fprintf(d.stdout, "\n%s (%s)\n", d.root.Out(short(names[i])), who)
		}
		for _, f := range frames {
			s := sight{topic, f.onward.String(), f.back.String(), len(f.payload), fmt.Sprintf("%x", f.payload)}
			line := fmt.Sprintf("  to %-28s %5d bytes  %s", shortRoute(f.onward), len(f.payload), shortHex(f.payload))
			if err := d.result(s, line); err != nil {
				return err
			}
		}
	}
	if d.json {
		return nil
	}
	return d.result(nil, fmt.Sprintf("\nIn all %d frames, and never a byte of the message.", total))
}
