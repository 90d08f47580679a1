package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
)

// Addresses that listen serves.
const (
	appAddress    = "app"
	echoerAddress = "echoer"
)

// received is a message as listen prints it with --json.
type received struct {
	From    string    `json:"from"`
	Message string    `json:"message"`
	Time    time.Time `json:"time"`
}

// forwarding is the forwarding address as listen prints it with --json.
type forwarding struct {
	Address    string `json:"forwarding_address"`
	Identifier string `json:"identifier"`
	Listener   string `json:"listener"`
}

func (a *app) listenCommand() *cobra.Command {
	var p peerFlags
	var alias, listener string
	var count int
	var hide bool
	c := &cobra.Command{
		Use:   "listen",
		Short: "Wait for messages (Bob)",
		Long: `Connects to a hub, prints this device's forwarding address alone on a line, and
then one line for each message that arrives at "app" through a secure channel.
The sender's identifier in front of it is verified. "echoer" sends back what it
gets. Ends at INT or TERM.`,
		Example: `  sealmq listen --trust everyone
  sealmq listen --identity bob --trust I0123… --hub mqtts://hub.example:8883
  sealmq listen --trust everyone --alias bob   # the address is forward_to_bob
  sealmq listen --trust everyone --alias bob --hub tcp://hub.example:4000 --api --credential bob.credential`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			policy, err := p.policy(a, "")
			if err != nil {
				return err
			}
			if count < 0 {
				return usagef("leave it away to listen for ever", "--count is negative")
			}
			if err := checkListener(listener); err != nil {
				return err
			}
			if alias != "" && !bridge.ValidAlias(alias) {
				return usagef("use letters, digits, '_', '.' and '-', 128 at most, and no name that begins as an address of the hub's does",
					"--alias: %.80q cannot be an alias", alias)
			}
			var opts []device.ListenOption
			if hide {
				if p.credential == "" {
					return usagef("leave it away, or add --credential FILE", "--hide-credential: there is none to hide")
				}
				opts = append(opts, device.HideCredential())
			}
			return a.listen(c.Context(), &p, policy, listener, alias, count, opts)
		},
	}
	p.add(a, c)
	f := c.Flags()
	f.StringVar(&alias, "alias", "", "register forward_to_ALIAS instead of an address made up by the hub")
	f.StringVar(&listener, "listener", "listener", "name of the secure channel listener")
	f.BoolVar(&hide, "hide-credential", false, "show --credential to the hub alone, and not to peers that dial")
	f.IntVar(&count, "count", 0, "end after this many messages (default: never)")
	return c
}

// checkListener refuses names that are taken on a listening device.
func checkListener(name string) error {
	if name == appAddress || name == echoerAddress || strings.HasPrefix(name, "sealmq.") {
		return usagef("leave --listener away", "--listener: %q is an address that listen uses itself", name)
	}
	return checkAddress("--listener", name)
}

func (a *app) listen(ctx context.Context, p *peerFlags, policy channel.Policy, listener, alias string, count int, listening []device.ListenOption) error {
	node, err := p.connect(ctx, a, device.Config{OnEvent: a.noteEvents()})
	if err != nil {
		return err
	}
	defer node.Close()
	if err := node.HandleFunc(echoerAddress, func(ctx context.Context, m *device.Message) {
		if err := node.Reply(ctx, m, m.Payload); err != nil && !errors.Is(err, device.ErrNoReturnRoute) {
			a.note("warning: cannot answer at echoer: %s", printable(message(err)))
			return
		}
		if err := m.Ack(); err != nil && ctx.Err() == nil {
			a.note("warning: cannot acknowledge at echoer: %s", printable(message(err)))
		}
	}); err != nil {
		return err
	}
	if _, err := node.Listen(listener, policy, listening...); err != nil {
		return err
	}
	door, err := p.door(ctx, node)
	if err != nil {
		return err
	}
	var opts []device.ForwarderOption
	if door != nil {
		opts = append(opts, device.RegisterThrough(door))
	}
	if alias != "" {
		opts = append(opts, device.Alias(alias))
	}
	fwd, err := node.CreateForwarder(ctx, listener, opts...)
	switch {
	case door != nil && errors.Is(err, device.ErrHubRefused):
		return coded(exitNoPerm, err, apiHint)
	case door != nil && errors.Is(err, device.ErrTimeout):
		return coded(exitNoPerm, fmt.Errorf("the hub does not register it, and says nothing where it refuses: %w", err), apiHint)
	case err != nil:
		return p.mentionAPI(a, err)
	}
	if _, ours := node.Hub(); !ours && strings.HasPrefix(p.hubURL(a), "tcp://") {
		a.note("this hub is none of sealmq's: peers send with --to '%s=>%s'", printable(fwd.Address()), listener)
	}
	info := forwarding{Address: fwd.Address(), Identifier: node.Identifier().String(), Listener: listener}
	if err := a.result(info, "Forwarding address: "+printable(fwd.Address())); err != nil {
		return err
	}
	for n := 0; count == 0 || n < count; n++ {
		m, err := node.Receive(ctx, appAddress)
		if lost := (*device.LostError)(nil); errors.As(err, &lost) {
			a.note("warning: %s", printable(message(err)))
			n--
			continue
		}
		switch {
		case err != nil && ctx.Err() != nil:
			return nil // asked to end
		case err != nil:
			return err
		}
		if err := a.printMessage(m); err != nil {
			return err
		}
		// Only now: what was not printed is to come again.
		if err := m.Ack(); err != nil && ctx.Err() == nil {
			a.note("warning: the sender gets no acknowledgement: %s", printable(message(err)))
		}
	}
	return node.Flush(ctx)
}

// printMessage writes one line for a message.
func (a *app) printMessage(m *device.Message) error {
	r := received{From: m.From.String(), Message: m.String(), Time: time.Now().UTC()}
	return a.result(r, r.From+": "+printable(r.Message))
}

// noteEvents returns what tells the person at the terminal what happens to the
// connection. Events come one after the other.
func (a *app) noteEvents() func(device.Event) {
	lost := false
	return func(e device.Event) {
		switch e.Kind {
		case device.EventOnline:
			if lost {
				a.note("connected to the hub again")
			}
			lost = false
		case device.EventOffline:
			lost = true
			a.note("warning: connection to the hub lost, trying again: %s", printable(message(e.Err)))
		case device.EventForwarderChanged:
			a.note("warning: the hub gave another forwarding address: %s", printable(e.Forwarder.Address()))
		case device.EventForwarderFailed:
			a.note("warning: the hub did not take the forwarder again: %s", printable(message(e.Err)))
		case device.EventUndelivered, device.EventSendFailed:
			a.note("warning: %s", printable(message(e.Err)))
		}
	}
}

// readMessage reads the whole of standard input as the message.
func (a *app) readMessage() (string, error) {
	const limit = 16 << 20
	text, err := io.ReadAll(io.LimitReader(a.stdin, limit+1))
	if err != nil {
		return "", coded(exitIO, fmt.Errorf("read the message: %w", err), "")
	}
	if len(text) > limit {
		return "", coded(exitData, errors.New("the message on standard input is larger than 16 MiB"), "send it in pieces")
	}
	return string(text), nil
}
