package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/route"
)

// sent is what send prints with --json.
type sent struct {
	// To is the verified identifier of the peer.
	To string `json:"to"`
	// Receipt says that the peer's program answered.
	Receipt bool `json:"receipt"`
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
is, sends it a message, and waits until the hub has taken it. Where the peer is a
sealmq program, it also waits for its receipt, for as long as --wait says.

ADDRESS is what listen printed. A stock Ockam node needs the name of its listener
too: "FWD_…=>listener". MESSAGE is text; "-" reads it from standard input.`,
		Example: `  sealmq send --to FWD_0123… --trust everyone 'Hello Ockam!'
  sealmq send --to forward_to_bob --trust I0123… --identity alice - < letter.txt
  sealmq send --to FWD_0123… --trust everyone --address echoer 'Is there an echo?'`,
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
			if timeout <= 0 || wait < 0 {
				return usagef("for example --timeout 30s --wait 2s", "--timeout must be positive and --wait not negative")
			}
			text := args[0]
			if text == "-" {
				if text, err = a.readMessage(); err != nil {
					return err
				}
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
	f.DurationVar(&wait, "wait", 2*time.Second, "how long to wait for the peer's receipt")
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
		return nil, usagef(hint, "--to: %q is not an address", text)
	}
	return hops, nil
}

func (a *app) send(ctx context.Context, p *peerFlags, policy channel.Policy, to route.Route, address, text string, wait time.Duration) error {
	node, err := p.connect(ctx, a, device.Config{OneShot: true})
	if err != nil {
		return err
	}
	defer node.Close()
	ch, err := node.Dial(ctx, to, policy)
	if err != nil {
		return err
	}
	out := sent{To: ch.Peer().Identifier.String()}
	if p.unknown {
		a.note("warning: %s is remembered behind this address from now on; that nobody was in between just now is not certain", out.To)
	}
	if ch.Confirmed() && wait > 0 {
		if err := a.sendAndWait(ctx, ch, address, text, wait, &out); err != nil {
			return err
		}
	} else if err := ch.SendString(ctx, address, text); err != nil {
		return err
	}
	if err := ch.Flush(ctx); err != nil {
		return err
	}
	return a.printSent(out)
}

// sendAndWait sends the message so that the peer can answer, and gives it some
// time to do so. No answer is no error: the hub has the message.
func (a *app) sendAndWait(ctx context.Context, ch *device.Channel, address, text string, wait time.Duration, out *sent) error {
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	answer, err := ch.Request(waiting, address, device.EncodeString(text))
	switch {
	case err == nil:
		out.Receipt = true
		if s, terr := answer.Text(); terr == nil {
			out.Answer = s
		}
		return nil
	case ctx.Err() == nil && errors.Is(err, device.ErrTimeout):
		return nil
	}
	return err
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
