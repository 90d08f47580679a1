package bridge

import "github.com/sealmq/sealmq/route"

const (
	// maxRun and maxRunBytes are how much of one peer's for one device is queued at
	// once.
	maxRun      = 64
	maxRunBytes = 64 << 10
	// growth is by how much the heads of a frame's routes may grow.
	growth = 16
)

// run is what ReceiveMore has put off: stored packets of one connection for one device,
// which took the same way there. Their frames are in Link.views, what goes with them in
// Link.packet. The goroutine in Receive owns it.
type run struct {
	port  *Port // nil: there is nothing
	hop   route.Hop
	ack   Acker
	token uint64 // of the first packet; the others have those that follow
	bytes int
	parts []part
}

// part is one packet of a run.
type part struct{ frames, bytes int }

// takes reports whether a packet may join the run, if it goes the same way.
func (r *run) takes(class route.Class, ack Acker, token uint64, bytes int) bool {
	return r.port != nil && class == route.Stored && ack == r.ack && token == r.token+uint64(len(r.parts)) &&
		len(r.parts) < maxRun && r.bytes+bytes <= maxRunBytes
}

// leadsTo reports whether frames with that first hop go the way of the run.
func (r *run) leadsTo(hop route.Hop) bool {
	return hop.Transport == r.hop.Transport && string(hop.Value) == string(r.hop.Value)
}

// begin makes a packet on its way to a port the first of the run.
func (r *run) begin(to *Port, hop route.Hop, in *inbound, pk *Packet) {
	r.port, r.hop, r.ack, r.token, r.bytes = to, hop, in.ticket.ack, in.ticket.token, 0
	r.add(len(pk.views), in.ticket.bytes)
}

func (r *run) add(frames, bytes int) {
	r.parts = append(r.parts, part{frames, bytes})
	r.bytes += bytes
}

// Flush queues what ReceiveMore has put off. The goroutine that calls Receive calls it,
// too.
func (l *Link) Flush() {
	if l.run.port != nil {
		l.flush(len(l.views))
	}
}

// flush queues the run, whose frames are the first ones of l.views, and forgets those.
func (l *Link) flush(frames int) {
	r, pk := &l.run, &l.packet
	in := inbound{link: l, ticket: Ticket{link: l, ack: r.ack, token: r.token, more: len(r.parts) - 1, bytes: r.bytes}}
	pk.views = l.views[:frames]
	if len(r.parts) == 1 || !r.port.enqueueRun(&in, pk) {
		in.ticket.more = 0
		whole, from := *pk, 0
		for _, one := range r.parts {
			*pk = whole
			pk.views = whole.views[from : from+one.frames]
			from += one.frames
			in.ticket.bytes = one.bytes
			r.port.enqueue(&in, pk)
			in.ticket.token++
		}
	}
	*r = run{parts: r.parts[:0]}
	l.forget(frames)
}

// forget takes the first of the views off the list, and the packet off what they lie in.
func (l *Link) forget(frames int) {
	l.packet.views, l.packet.Hop = nil, nil
	rest := copy(l.views, l.views[frames:])
	clear(l.views[rest:])
	if l.views = l.views[:rest]; cap(l.views) > keptViews && rest == 0 {
		l.views = nil
	}
}

// enqueueRun is enqueue for packets that come one behind the other, whose tickets in has
// joined; false, and nothing was done, where they have to be taken one by one. The
// caller holds no lock.
func (p *Port) enqueueRun(in *inbound, pk *Packet) bool {
	n := pk.Frames()
	p.mu.Lock()
	if p.gone || p.box == nil || in.link.dead.Load() || !p.attached || len(p.parked) > 0 || !p.fits(n, pk) {
		p.mu.Unlock()
		return false
	}
	stored, err := p.store(pk, in.ticket, n)
	if err != nil {
		p.mu.Unlock()
		return false
	}
	p.accepted(in, stored)
	return true
}

// fits reports whether that many frames fit with something to spare, so that one packet
// after the other would be taken. p.mu is held.
func (p *Port) fits(n int, pk *Packet) bool {
	b := p.b
	size := 0
	for i := range pk.views {
		size += pk.views[i].Len()
	}
	size += n * (pk.front.Bytes() + pk.stamp.Bytes() + growth)
	frames, bytes := int64(p.frames+n), int64(p.bytes+size)
	leftFrames, leftBytes := b.left()
	return frames <= int64(b.cfg.OutboxFrames) && bytes <= int64(b.cfg.OutboxBytes) &&
		4*frames <= leftFrames-int64(n) && 4*bytes <= leftBytes-int64(size) && 8*b.storing.Load() <= b.cfg.WaitingBytes
}
