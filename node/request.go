package node

import (
	"context"
	"fmt"

	"github.com/sealmq/sealmq/route"
)

// Request sends payload along to and waits for the answer until ctx ends. It takes
// a fresh random address for the return route, which exists for this one call and
// is open only to where the answer has to come from: when the first hop of to is a
// channel of this node, to that channel, else to plain frames.
func (n *Node) Request(ctx context.Context, to route.Route, payload []byte, c route.Class) (*Message, error) {
	first, ok := to.First()
	if !ok {
		return nil, fmt.Errorf("%w: nowhere to send the request", ErrNoRoute)
	}
	access := Access{Forwarders: true}
	if w, _ := n.lookup(first.Value); w != nil && first.IsLocal() {
		access = Access{Encryptors: []string{first.Value}}
	}
	return n.request(ctx, to, payload, c, access)
}

// RequestService is Request for a service of the hub, and takes the answer from nobody
// else: what others send to the address is refused, counted, and ends no wait.
func (n *Node) RequestService(ctx context.Context, service string, payload []byte, c route.Class) (*Message, error) {
	return n.request(ctx, route.To(service), payload, c, Access{service: service})
}

func (n *Node) request(ctx context.Context, to route.Route, payload []byte, c route.Class, access Access) (*Message, error) {
	addr := RandomAddress()
	w := &worker{addr: addr, access: access, box: newMailbox(&n.cfg, &n.stats)}
	if err := n.add(w); err != nil {
		return nil, err
	}
	defer n.remove(addr, w)
	f := route.Frame{Onward: to, Return: route.To(addr), Payload: payload}
	if err := n.Send(ctx, f, c); err != nil {
		return nil, err
	}
	m, _, err := w.box.next(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("node: no answer from %s: %w", to, err)
	}
	return m, nil
}

// Reply sends payload back along the return route of m, with the address at which m
// arrived as the answer's return route, in m's class. The answer leaves the way the
// message came: through the same channel, or, for a plain frame, to the uplink and
// never to a worker of this node, whatever the foreign route says; else a forged
// return route could make local workers talk to each other or into a channel.
func (n *Node) Reply(ctx context.Context, m *Message, payload []byte) error {
	first, ok := m.ReturnRoute.First()
	if !ok {
		return fmt.Errorf("%w: the sender left no way to answer", ErrNoRoute)
	}
	f := route.Frame{Onward: m.ReturnRoute, Return: route.To(m.Address), Payload: payload}
	switch {
	case m.Origin.Via == Forwarded:
		if !first.IsLocal() || n.Has(first.Value) {
			n.stats.drop(DropRefused, 1)
			return fmt.Errorf("%w: return route %s of a frame from outside", ErrRefused, m.ReturnRoute)
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		return n.sendUp(ctx, f, m.Class)
	case m.Origin.Via == Channel && first != route.Local(m.Origin.Encryptor):
		n.stats.drop(DropRefused, 1)
		return fmt.Errorf("%w: return route %s does not lead through the channel", ErrRefused, m.ReturnRoute)
	case m.Origin.Via == Channel:
		// Through the channel or not at all: never to the uplink in plain.
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if w, _ := n.lookup(first.Value); w == nil {
			n.stats.drop(DropUnknown, 1)
			return fmt.Errorf("%w: the channel that the message came through has ended", ErrUnknownAddress)
		}
	}
	return n.Send(ctx, f, m.Class)
}
