package device

import (
	"context"
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// EncodeString returns s as an Ockam String (BARE), the payload that a Rust String
// expects, which takes UTF-8 alone; s is not looked at. Message.Text reads it.
func EncodeString(s string) []byte { return bare.AppendString(nil, s) }

// OpenMailbox adds a mailbox to those of Config.Mailboxes, open to peers of secure
// channels only.
func (n *Node) OpenMailbox(address string) error {
	return n.failure(n.stopped, "opening a mailbox", n.local.OpenMailbox(address, Access{Channels: true}))
}

// Receive returns the next message at a mailbox, waiting for one until ctx ends.
// Several callers may wait; each message goes to one of them.
//
// Errors: ErrNoMailbox, also once the mailbox is removed; *LostError once in place of messages that did not fit;
// ErrTimeout or that of ctx; what stopped the node, after the messages that had
// arrived before.
func (n *Node) Receive(ctx context.Context, address string) (*Message, error) {
	joined, leave := n.join(ctx)
	defer leave(nil)
	m, err := n.local.Receive(joined, address)
	if err != nil {
		var lost *LostError
		if errors.As(err, &lost) {
			return nil, err
		}
		if errors.Is(err, node.ErrClosed) && n.Err() == nil {
			return nil, fmt.Errorf("%w any more: %q was removed", ErrNoMailbox, address)
		}
		return nil, n.failure(joined, fmt.Sprintf("nothing arrived at %q", address), err)
	}
	return m, nil
}

// HandleFunc calls fn for each message that peers of secure channels send to
// address, in order, on a goroutine of its own. fn may call anything and take its
// time; its ctx ends when the node is closed. Messages wait meanwhile, as many as a
// mailbox holds; what does not fit is dropped, and Message.Lost says how many.
func (n *Node) HandleFunc(address string, fn func(ctx context.Context, m *Message)) error {
	return n.Handle(address, Access{Channels: true}, fn)
}

// Handle is HandleFunc with a choice of who may reach the address. Access with
// Forwarders opens it to anybody at the hub, unauthenticated.
func (n *Node) Handle(address string, access Access, fn func(ctx context.Context, m *Message)) error {
	return n.failure(n.stopped, "handling", n.local.Handle(address, access, fn))
}

// Remove ends the mailbox or handler at an address, and reports whether there was
// one. Messages that wait there are dropped.
func (n *Node) Remove(address string) bool {
	n.mu.Lock()
	_, listening := n.listeners[address]
	n.mu.Unlock()
	return !listening && n.local.Remove(address)
}

// Send sends payload along a route, through a channel if the route begins with the
// address of one, else in plain: only the services of the hub should get that. It
// returns nil once the frame is in the outbox; payload may be used again then. When
// the outbox is full it waits until ctx ends. Flush waits for the hub, and says what it
// could not deliver.
func (n *Node) Send(ctx context.Context, to route.Route, payload []byte) error {
	if first, ok := to.First(); ok && first.IsLocal() {
		n.plain.add(first.Value)
	}
	return n.failure(ctx, "sending", n.sendJoined(ctx, route.Frame{Onward: to, Payload: payload}, route.Stored))
}

// sendJoined sends with a context that ends with the node too.
func (n *Node) sendJoined(ctx context.Context, f route.Frame, c route.Class) error {
	if err := n.Err(); err != nil {
		return err
	}
	if err := n.checkRoutes(f.Onward, f.Return); err != nil {
		return err
	}
	return n.send(ctx, f, c) // the outbox knows when the node ends
}

// Request sends payload along a route and waits for the answer, until ctx ends.
// The hub's word that nobody is there ends the wait at once.
//
// Errors: ErrUnknownAddress, ErrPeerOffline, ErrExpired, ErrTooLarge, ErrTimeout, or
// that of ctx.
func (n *Node) Request(ctx context.Context, to route.Route, payload []byte) (*Message, error) {
	return n.requested(ctx, to, func(ctx context.Context) (*Message, error) {
		return n.local.Request(ctx, to, payload, route.Stored)
	})
}

// requestHub is Request for a service of the hub itself; what anybody else sends is no
// answer.
func (n *Node) requestHub(ctx context.Context, service string, payload []byte) (*Message, error) {
	return n.requested(ctx, route.To(service), func(ctx context.Context) (*Message, error) {
		return n.local.RequestService(ctx, service, payload, route.Stored)
	})
}

func (n *Node) requested(ctx context.Context, to route.Route, ask func(context.Context) (*Message, error)) (*Message, error) {
	ctx, leave := n.join(ctx)
	defer leave(nil)
	ctx, c := n.calls.begin(ctx, false, nil)
	defer c.end()
	m, err := ask(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && n.Err() == nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
			return nil, callError("request to", to, cause, "")
		}
		return nil, n.failure(ctx, fmt.Sprintf("no answer from %s", to), err)
	}
	return m, nil
}

// Reply sends payload back to the sender of m: through the channel that m came
// through, or in plain if it came in plain.
func (n *Node) Reply(ctx context.Context, m *Message, payload []byte) error {
	if len(m.ReturnRoute) == 0 {
		return ErrNoReturnRoute
	}
	if err := n.Err(); err != nil {
		return err
	}
	if m.Origin.Via != node.Channel {
		return n.failure(ctx, "replying", n.local.Reply(ctx, m, payload))
	}
	// Through the channel or not at all: never in plain.
	if m.ReturnRoute[0] != route.Local(m.Origin.Encryptor) {
		return fmt.Errorf("%w through the channel that it came by", ErrNoReturnRoute)
	}
	f := route.Frame{Onward: m.ReturnRoute, Return: route.To(m.Address), Payload: payload}
	taken, err := n.endpoint.Forward(ctx, f)
	if !taken {
		return fmt.Errorf("%w: the one that the message came through has ended", ErrPeerClosed)
	}
	return n.failure(ctx, "replying", err)
}

// ReplyString is Reply with an Ockam String.
func (n *Node) ReplyString(ctx context.Context, m *Message, s string) error {
	return n.Reply(ctx, m, EncodeString(s))
}

// Known returns the latest verified identity of a peer that this node has met.
func (n *Node) Known(id identity.Identifier) (*identity.Identity, bool) {
	return n.cfg.Registry.Get(id)
}
