package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/route"
)

// sent is what send prints with --json.
type sent struct {
	// To is the verified identifier of the peer.
	To string `json:"to"`
	// Receipt says that the peer's program has acknowledged the message.
	Receipt bool `json:"receipt"`
	// Guarantee is "peer" with a receipt; "hub": the hub has the message, no more.
	Guarantee string `json:"guarantee"`
	// Answer is what it answered.
	Answer string `json:"answer,omitempty"`
}

func (a *app) sendCommand() *cobra.Command {
	var p peerFlags
	var to, address string
	var timeout, wait time.Duration
	c := &cobra.Command{
		Use:   "send --to ADDRESS MESSAGE",
		Short: "Send a message through a secure channel (Alice)",
		Long: `Opens a secure channel to the device behind a forwarding address, checks who it
is, sends it a message, and waits until the peer's program has acknowledged it
("Delivered"). A stock Ockam node cannot do that, and --wait 0 does not ask for it:
then it waits until the hub has the message ("Sent").

ADDRESS is what listen printed. A stock Ockam node needs the name of its listener
too: "FWD_…=>listener". MESSAGE is text; "-" reads it from standard input.`,
		Example: `  sealmq send --to FWD_0123… --trust everyone 'Hello Ockam!'
  sealmq send --to forward_to_bob --trust I0123… --identity alice - < letter.txt
  sealmq send --to FWD_0123… --trust everyone --address echoer 'Is there an echo?'
  sealmq send --to forward_to_bob --trust I0123… --hub tcp://hub.example:4000 --api --credential alice.credential Hello`,
		Args: exactArgs("the message"),
		RunE: func(c *cobra.Command, args []string) error {
			policy, err := p.policy(a, to)
			if err != nil {
				return err
			}
			hops, err := parseTo(to)
			if err != nil {
				return err
			}
			if err := checkAddress("--address", address); err != nil {
				return err
			}
			if timeout <= 0 || wait < 0 {
				return usagef("for example --timeout 30s --wait 2s", "--timeout must be positive and --wait not negative")
			}
			text := args[0]
			if text == "-" {
				if text, err = a.readMessage(); err != nil {
					return err
				}
			}
			if !utf8.ValidString(text) {
				return coded(exitData, errors.New("the message is not text (UTF-8)"), "encode other bytes first, for example with base64")
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			return a.send(ctx, &p, policy, hops, address, text, wait)
		},
	}
	f := c.Flags()
	f.StringVar(&to, "to", "", "forwarding address of the peer, as listen printed it (required)")
	p.add(a, c)
	f.StringVar(&address, "address", appAddress, "address of the worker on the peer")
	f.DurationVar(&timeout, "timeout", 30*time.Second, "give up after this long")
	f.DurationVar(&wait, "wait", 30*time.Second, "how long to wait for the peer's acknowledgement, --timeout at most; 0 does without")
	return c
}

// parseTo reads --to.
func parseTo(text string) (route.Route, error) {
	const hint = "--to takes what `sealmq listen` printed behind \"Forwarding address:\", for example FWD_0123… or FWD_0123…=>listener"
	if text == "" {
		return nil, usagef(hint, "--to is missing: say where to send")
	}
	hops, err := route.Parse(text)
	if err != nil || len(hops) == 0 {
		return nil, usagef(hint, "--to: %.80q is not an address", text)
	}
	if err := (route.Limits{}).CheckRoute(hops); err != nil {
		return nil, usagef(hint, "--to: %s", message(err))
	}
	if !hops[0].IsLocal() {
		return nil, usagef(hint, "--to: the hub dials nobody, so the first address cannot be %s", hops[0])
	}
	return hops, nil
}

// checkAddress refuses what no worker can have as its address; what names it.
func checkAddress(what, address string) error {
	if address == "" {
		return usagef("for example app", "%s is empty", what)
	}
	if _, name, typed := strings.Cut(address, "#"); typed {
		return usagef("give the name alone, without the type before the #", "%s: %.80q is not a name, %.80q may be", what, address, name)
	}
	if err := (route.Limits{}).CheckRoute(route.To(address)); err != nil {
		return usagef("for example app", "%s: %s", what, message(err))
	}
	return nil
}

func (a *app) send(ctx context.Context, p *peerFlags, policy channel.Policy, to route.Route, address, text string, wait time.Duration) error {
	node, err := p.connect(ctx, a, device.Config{OneShot: true})
	if err != nil {
		return err
	}
	defer node.Close()
	opts := []device.DialOption{device.OnWaiting(func() {
		a.note("the peer is offline; the hub waits for it, 10 s at most")
	})}
	door, err := p.door(ctx, node)
	if err != nil {
		return err
	}
	if door != nil {
		opts = append(opts, device.DialThrough(door))
	}
	ch, err := node.Dial(ctx, to, policy, opts...)
	if err != nil {
		return p.mentionAPI(a, err)
	}
	out := sent{To: ch.Peer().Identifier.String()}
	if p.unknown {
		a.note("warning: %s is remembered behind this address from now on; that nobody was in between just now is not certain", out.To)
	}
	out.Guarantee = device.GuaranteeHub.String()
	if ch.Guarantee() == device.GuaranteePeer && wait > 0 {
		err = a.deliver(ctx, node, ch, address, text, wait, &out)
	} else if err = ch.SendString(ctx, address, text); err == nil {
		err = ch.Flush(ctx)
	}
	if err != nil {
		return err
	}
	// The peer need not wait for the channel to time out.
	if err := ch.Close(); err != nil {
		return err
	}
	return a.printSent(out)
}

// deliver sends the message and waits for the acknowledgement. What the peer answered
// before that is there by then: a channel keeps the order.
func (a *app) deliver(ctx context.Context, node *device.Node, ch *device.Channel, address, text string, wait time.Duration, out *sent) error {
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if err := ch.DeliverString(waiting, address, text); err != nil {
		return err
	}
	out.Receipt, out.Guarantee = true, device.GuaranteePeer.String()
	cancel() // only what has arrived
	if answer, err := node.Receive(waiting, device.DefaultMailbox); err == nil && answer.From == ch.Peer().Identifier {
		if s, err := answer.Text(); err == nil {
			out.Answer = s
		}
	}
	return nil
}

func (a *app) printSent(out sent) error {
	line := "Sent to " + out.To
	if out.Receipt {
		line = "Delivered to " + out.To
	}
	if out.Answer != "" {
		line += fmt.Sprintf("\nAnswer: %s", printable(out.Answer))
	}
	return a.result(out, line)
}
