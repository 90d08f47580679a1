package node

import (
	"bytes"
	"context"
	"fmt"

	"github.com/sealmq/sealmq/route"
)

// maxAliases bounds how many aliases a frame may pass through.
const maxAliases = 8

// Meta is what a delivery layer knows about a message; the zero Meta is an ordinary
// message.
type Meta struct {
	ID          MessageID
	Redelivered bool
	// Ack is called when the program acknowledges the message; nil when nobody
	// waits for that. An error is handed to the program, which may try again.
	Ack func() error
	// Bounded says that the caller bounds how many such messages wait: they don't
	// count against the limits of the queue and always fit.
	Bounded bool
	// Dropped is called when the message was taken and will nevertheless not reach
	// the program, because its queue was closed. It must not block nor call the
	// node.
	Dropped func()
}

// Inject hands a frame that came from outside to the worker at its first onward
// hop, if that is open to the frame's origin, and never to the uplink. It returns 0
// when the worker took it, else the reason, which is counted. It never blocks: no
// worker is waited for, and registered functions don't block.
//
// The frame is given away: neither its payload nor its routes may be used or
// changed afterwards. Queued messages hold copies of their payloads, so that a few
// bytes do not keep a whole packet in memory.
//
// The address in o.Encryptor is closed to frames from outside, for good: this is
// when local code first learns it and may pass it on in return routes, and whoever
// outside could reach it would speak in the channel as if he were this node.
func (n *Node) Inject(o Origin, f route.Frame, c route.Class) Drop {
	return n.InjectMessage(o, f, c, Meta{})
}

// InjectMessage is Inject for a delivery layer, with what it knows about the
// message. Registered functions don't see meta.
func (n *Node) InjectMessage(o Origin, f route.Frame, c route.Class, meta Meta) Drop {
	if o.Via == Local {
		o.Via = 0 // what is local is sent, not injected
	}
	if o.Encryptor != "" {
		n.guard(o.Encryptor)
	}
	w, d := n.resolve(&o, &f)
	if w == nil && d == 0 {
		d = DropUnknown
	}
	if d == 0 {
		d = n.hand(w, o, f, c, meta)
	}
	n.stats.drop(d, 1)
	return d
}

// guard closes the address of an encryptor.
func (n *Node) guard(addr string) {
	n.mu.RLock()
	w := n.workers[addr]
	done := w == nil || w.channel && w.access.closed()
	n.mu.RUnlock()
	if done {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.workers[addr]; w != nil {
		w.access, w.channel = Access{}, true
	}
}

// ended reports whether addr was that of a channel.
func (n *Node) ended(addr string) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.graves.Has(addr)
}

// resolve finds the worker that f is for. Aliases are followed and taken out of the
// onward route. It returns nil and 0 when there is no worker at the first hop.
func (n *Node) resolve(o *Origin, f *route.Frame) (*worker, Drop) {
	vouched := false // an alias opens its target
	for range maxAliases {
		if len(f.Onward) == 0 {
			return nil, DropHeartbeat
		}
		hop := f.Onward[0]
		if !hop.IsLocal() {
			return nil, DropTransport
		}
		w, access := n.lookup(hop.Value)
		switch {
		case w == nil:
			return nil, 0
		case !vouched && !access.admits(o):
			return nil, DropRefused
		case w.target == "":
			return w, 0
		case len(f.Onward) > 1:
			f.Onward, vouched = f.Onward.Rest(), false
		default:
			f.Onward, vouched = route.To(w.target), true
		}
	}
	return nil, DropLoop
}

// hand gives f to the worker.
func (n *Node) hand(w *worker, o Origin, f route.Frame, c route.Class, meta Meta) Drop {
	var d Drop
	switch {
	case w.direct != nil && meta.Ack != nil:
		d = DropRefused // a registered function acknowledges nothing
	case w.direct != nil:
		d = w.direct.put(arrival{f, c, o})
	default:
		d = w.box.put(n.message(w.addr, o, f, c, meta))
	}
	if d == 0 {
		n.stats.delivered.Add(1)
	}
	return d
}

func (n *Node) message(addr string, o Origin, f route.Frame, c route.Class, meta Meta) *Message {
	m := &Message{
		Payload:     append(make([]byte, 0, len(f.Payload)), f.Payload...),
		From:        o.Peer,
		Address:     addr,
		Onward:      f.Onward.Rest(),
		ReturnRoute: f.Return,
		Class:       c,
		Origin:      o,
		ID:          meta.ID,
		Redelivered: meta.Redelivered,
		bounded:     meta.Bounded,
		dropped:     meta.Dropped,
	}
	if m.ID.IsZero() {
		m.ID = MessageID{Sender: o.Peer, Outbox: n.epoch, Count: n.count.Add(1)}
	}
	if meta.Ack != nil {
		m.ack = &ackState{fn: meta.Ack}
	}
	return m
}

// Send sends a frame of local code by its first onward hop: to the worker of this
// node at that address, else to the uplink, waiting for room there until ctx ends.
// It fails with ErrNoRoute, ErrUnknownAddress, ErrRefused (a first hop that is not
// local: a node does not dial what a route names), ErrFull when the worker's queue
// is full, or the uplink's error. What is addressed to a channel that has ended
// fails with ErrUnknownAddress: it would leave in plain. The payload may be reused after it has returned;
// the routes must not be changed any more.
func (n *Node) Send(ctx context.Context, f route.Frame, c route.Class) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	o := Origin{Via: Local}
	w, d := n.resolve(&o, &f)
	switch {
	case d != 0:
	case w == nil && n.ended(f.Onward[0].Value):
		d = DropUnknown
	case w == nil:
		return n.sendUp(ctx, f, c)
	default:
		if w.direct != nil {
			f.Payload = bytes.Clone(f.Payload) // the function owns what it gets
		}
		d = n.hand(w, o, f, c, Meta{})
	}
	n.stats.drop(d, 1)
	return sendError(d, f.Onward)
}

func sendError(d Drop, onward route.Route) error {
	switch d {
	case 0:
		return nil
	case DropHeartbeat:
		return fmt.Errorf("%w: nothing to send along", ErrNoRoute)
	case DropTransport:
		return fmt.Errorf("%w: first hop %s is not a local address", ErrRefused, onward[0])
	case DropFull:
		return fmt.Errorf("%w: %s", ErrFull, onward[0])
	case DropUnknown, DropClosed:
		return fmt.Errorf("%w: %s", ErrUnknownAddress, onward[0])
	default:
		return fmt.Errorf("%w: %s", ErrRefused, d)
	}
}

func (n *Node) sendUp(ctx context.Context, f route.Frame, c route.Class) error {
	n.mu.RLock()
	up, closed := n.uplink, n.closed
	n.mu.RUnlock()
	switch {
	case closed:
		return ErrClosed
	case up == nil:
		n.stats.drop(DropUnknown, 1)
		return fmt.Errorf("%w: %s", ErrUnknownAddress, f.Onward[0])
	}
	if err := up.Send(ctx, f, c); err != nil {
		return err
	}
	n.stats.sent.Add(1)
	return nil
}
