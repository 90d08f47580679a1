package bridge

import (
	"errors"
	"reflect"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

const (
	// maxPasses bounds how often one frame goes from forwarder to forwarder.
	maxPasses = 8
	// keptViews is the longest scratch list that a connection keeps.
	keptViews = 64
	// maxHopValue is the longest address that anything at the hub has.
	maxHopValue = 255
)

// Receive takes one packet from the peer: over MQTT a CBOR sequence of frames
// with one first hop, on a stream one frame body. payload is only read during
// the call. It never blocks on another peer.
//
// ack, which is nil for transient packets and optional for stored ones, hears
// once when the hub has taken responsibility for the packet, or found that
// nobody ever can; see Acker. The error is ErrMalformed for a packet that was
// refused whole, or ErrClosed once the connection has ended; it changes nothing
// about ack.
func (l *Link) Receive(payload []byte, class route.Class, ack Acker, token uint64) error {
	return l.receive(payload, class, ack, token, false)
}

// ReceiveMore is Receive for a front that has more of its peer's packets at hand:
// those that come one behind the other for one device are queued and delivered
// together. payload must stay as it is until Flush, which the front calls before it
// waits for the peer, or for its Acker, or reuses that memory. Only packets with the same
// Acker go together, if it can be compared, and with tokens that follow each other.
func (l *Link) ReceiveMore(payload []byte, class route.Class, ack Acker, token uint64) error {
	return l.receive(payload, class, ack, token, true)
}

func (l *Link) receive(payload []byte, class route.Class, ack Acker, token uint64, more bool) error {
	p := l.port
	b := p.b
	if !more || !l.run.takes(class, ack, token, len(payload)) {
		l.Flush()
	}
	if l.dead.Load() {
		l.Flush()
		p.stripe.received.Add(1)
		p.stripe.drop(DropAbandoned, 1)
		return ErrClosed
	}
	in := inbound{link: l, ticket: Ticket{link: l, ack: ack, token: token, bytes: len(payload)}}
	if class == route.Transient {
		in.ticket.ack = nil
	} else if l.overWindow(len(l.run.parts), l.run.bytes+len(payload)) && (l.run.port == nil || l.overWindowFlushed(len(payload))) {
		p.stripe.received.Add(1)
		p.stripe.drop(DropAbandoned, 1)
		l.overrun()
		return ErrClosed
	}
	b.sawPacket(p, payload)
	before := len(l.views)
	views, err := l.parse(payload)
	if err != nil {
		l.Flush()
		return l.refuse(&in, payload, err)
	}
	l.views = views
	p.stripe.received.Add(uint64(len(views) - before))
	pk := &l.packet
	joins := before > 0 && l.run.leadsTo(views[before].FirstHop())
	arrival := pk.Arrival
	if !joins {
		arrival = b.now()
	}
	due, ok := l.charge(class, len(views)-before, len(payload), arrival)
	if joins && ok && due == 0 {
		pk.views = views[before:]
		b.trace(&in, l.run.port.addr, pk)
		l.run.add(len(pk.views), len(payload))
		return nil
	}
	if before > 0 {
		l.flush(before)
	}
	*pk = Packet{Class: class, Arrival: arrival, pop: 1, stamp: p.stamp}
	pk.views = l.views
	if ok {
		in.ticket.due = due
		in.more = more && due == 0 && class == route.Stored
		b.dispatch(&in, pk)
	} else {
		b.undeliverable(&in, pk, DropThrottled)
	}
	if l.run.port == nil {
		l.forget(len(l.views))
	}
	return nil
}

// overWindowFlushed is overWindow once what was put off has been queued, and answered
// where it can be.
func (l *Link) overWindowFlushed(bytes int) bool {
	l.Flush()
	return l.overWindow(0, bytes)
}

// overWindow reports whether one more packet is more than the peer may have
// unanswered, or than the hub has room to keep unanswered. before is how many packets
// have been put off; their bytes are among bytes.
func (l *Link) overWindow(before, bytes int) bool {
	n := l.waitPackets.Load() + int64(before)
	if n <= 0 {
		return false
	}
	cfg := &l.port.b.cfg
	mine := l.waitBytes.Load() + int64(bytes)
	if n >= int64(cfg.Window) || mine > int64(cfg.WindowBytes) {
		return true
	}
	// Who has most unanswered goes first when the hub runs out of room.
	left := cfg.WaitingBytes - l.port.b.waiting.bytes.Load()
	return left < 0 || mine > fairBytes && 4*mine > left
}

// Admits reports whether Receive would take one more stored packet of that many
// bytes now. A packet more than the window allows ends the connection, so a
// front that can hold its peer back asks first, and again when the Acker has been
// called. A connection with nothing unanswered is always admitted.
func (l *Link) Admits(bytes int) bool { return !l.overWindow(0, bytes) }

// overrun ends a connection that ignores its window. Nothing more of it is
// stored: what it resends later would be out of order.
func (l *Link) overrun() {
	b := l.port.b
	b.kicked[KickWindow].Add(1)
	if unlogged, ok := b.mayLog(); ok {
		b.cfg.Logger.Warn("peer ignores its window", "device", l.port.clientID, "address", l.port.addr, "unlogged", unlogged)
	}
	l.end()
	l.conn.Kick(KickWindow)
}

// parse appends the packet's frames to the connection's scratch list.
func (l *Link) parse(payload []byte) ([]route.View, error) {
	lim := l.port.b.cfg.Limits
	if l.port.kind == portStream {
		v, err := route.ParseView(payload, lim)
		if err != nil {
			return nil, err
		}
		return append(l.views, v), nil
	}
	views, err := route.ParseBundle(payload, lim, l.views)
	if err != nil {
		return nil, err
	}
	return views, nil
}

// refuse ends a packet that is not frames, or frames beyond a limit.
func (l *Link) refuse(in *inbound, payload []byte, err error) error {
	p := l.port
	why, ret := DropMalformed, ErrMalformed
	switch {
	case errors.Is(err, route.ErrTooManyHops), errors.Is(err, route.ErrAddressTooLong):
		why, ret = DropRoute, nil
	case errors.Is(err, route.ErrLimit):
		why, ret = DropTooLarge, nil
	}
	p.stripe.received.Add(1)
	p.stripe.drop(why, 1)
	in.ticket.due, _ = l.charge(route.Stored, 1, len(payload), p.b.now())
	// The hops help the sender to match the notice, if they can be read at all.
	wide := route.Limits{Frame: route.MaxFrame, Hops: 4096, Address: 64 << 10}
	v, _, perr := route.NextView(payload, wide)
	reason, _ := why.reason()
	if perr != nil {
		l.notify(reason, nil, 1)
	} else {
		l.notify(reason, &v, 1)
	}
	in.ticket.fire()
	return ret
}

// undeliverable ends a packet that can never be delivered: counted,
// acknowledged, noticed. The caller holds no lock.
func (b *Bridge) undeliverable(in *inbound, pk *Packet, why Drop) {
	n := pk.Frames()
	in.link.port.stripe.drop(why, n)
	if reason, ok := why.reason(); ok {
		in.link.notify(reason, &pk.views[0], n)
	}
	in.ticket.fire()
}

// dispatch routes one packet by the first hop of its frames (spec routing 4.4).
func (b *Bridge) dispatch(in *inbound, pk *Packet) {
	v := &pk.views[0]
	hop := v.FirstHop()
	if v.IsHeartbeat() {
		b.undeliverable(in, pk, DropHeartbeat)
		return
	}
	if hop.Transport != route.LocalTransport {
		b.undeliverable(in, pk, DropForeign)
		return
	}
	if len(hop.Value) > maxHopValue {
		b.undeliverable(in, pk, DropUnknown)
		return
	}
	src := in.link.port
	w := b.table.get(hop.Value)
	if w != nil && !src.mayReach(w, hop.Value) {
		b.undeliverable(in, pk, DropForbidden)
		return
	}
	for pass := 0; ; pass++ {
		switch {
		case w == nil && pass > 0:
			b.undeliverable(in, pk, DropOffline)
			return
		case w == nil:
			if string(hop.Value) == hubproto.NoticeSource {
				b.undeliverable(in, pk, DropNotice)
			} else {
				b.undeliverable(in, pk, DropUnknown)
			}
			return
		case w.port != nil:
			b.trace(in, w.port.addr, pk)
			if in.more && w.port.kind == portDevice && reflect.ValueOf(in.ticket.ack).Comparable() {
				in.link.run.begin(w.port, hop, in, pk)
			} else {
				w.port.enqueue(in, pk)
			}
			return
		case w.service != nil:
			b.trace(in, w.service.addr, pk)
			b.serve(in, pk, w.service)
			return
		}
		if pass == maxPasses {
			b.undeliverable(in, pk, DropLoop)
			return
		}
		r := w.fwd.route.Load()
		pk.First = true
		if pass == 0 {
			pk.Hop = hop.Value
			pk.front = r.rest
		} else {
			pk.front = route.EncodeHops(r.rest.Route().Append(pk.front.Route()...))
		}
		w = b.table.lookup(r.next)
	}
}

// mayReach reports whether a peer may name the worker as its first hop: a stream
// needs a link to a hub address or an unopened worker (spec routing 7.4), and as
// a guest to everything but what is there for guests. A guest without a stream
// reaches hello alone: no hub address goes in front of its return routes, so an
// answer along one would go wherever the guest likes. To a device, holding an address is
// the right, except that what is local to the hub is nobody's to name.
func (p *Port) mayReach(w *worker, addr []byte) bool {
	s := w.service
	switch {
	case p.kind == portLocal:
		return true
	case s != nil && s.reach == ReachLocal:
		return false
	case p.kind == portDevice:
		return true
	case p.kind == portGuest:
		return s != nil && s.addr == ServiceHello
	case s != nil && s.reach == ReachGuests:
		return true
	}
	return !p.guest && (w.fwd != nil || s != nil && s.reach == ReachOpen) || p.allowed(addr)
}
