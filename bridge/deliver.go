package bridge

import (
	"errors"
	"io/fs"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

const (
	// pumpBatch is how many entries one Deliver is offered: a full bundle.
	pumpBatch = route.MaxBundleFrames
	// pumpRounds is how often a sender's goroutine delivers to one target before
	// a goroutine of the bridge goes on.
	pumpRounds = 2
	// hubSlack is how many frames past its limit an outbox takes of what the
	// hub's own services answer, which nobody could hold back.
	hubSlack = 256
	// fairFrames and fairBytes are what every outbox may hold as long as the hub
	// has any room at all.
	fairFrames = 64
	fairBytes  = 64 << 10
	// liveShare is the part of the hub's room (a 16th) that no backlog gets: it is
	// for devices that have taken everything so far. livePart is what one packet may
	// take of what is left of it (a 64th of the bytes).
	liveShare = 16
	livePart  = 64
)

var batches = sync.Pool{New: func() any { return new([pumpBatch]Entry) }}

// full reports whether the outbox may not take a packet, of so many bytes. p.mu is
// held.
func (p *Port) full(bytes int) bool {
	return p.frames >= p.b.cfg.OutboxFrames || p.bytes >= p.b.cfg.OutboxBytes ||
		p.b.totalFull() && !p.keepsUp(bytes) || p.crowded() ||
		p.kind == portDevice && !p.oneShot && p.storingFull(bytes)
}

// keepsUp reports whether a packet of so many bytes may go where no backlog may: its
// target is attached and owes no acknowledgement. So those who read go on, a packet at
// a time, while the queues of those who don't have filled the hub. p.mu is held.
func (p *Port) keepsUp(bytes int) bool {
	b := p.b
	return p.attached && p.frames == 0 && b.hasRoom() && livePart*int64(bytes) <= b.cfg.TotalBytes-b.queued.bytes.Load()
}

// storingFull reports whether there is no room for a packet of so many bytes among what
// a store has not written yet. There, too, the last part is for targets that keep up.
// p.mu is held.
func (p *Port) storingFull(bytes int) bool {
	n, most, all := p.b.storingRoom()
	return n > most && (n > all || !p.keepsUp(bytes))
}

// storingRoom returns how much a store has not written yet, how much that may be, and how
// much with what is for targets that keep up.
func (b *Bridge) storingRoom() (n, most, all int64) {
	most = b.cfg.WaitingBytes / 4
	return b.storing.Load(), most, most + most/liveShare
}

// crowded reports whether the outbox holds more than its part of what the hub has
// left: a quarter of it. So however many targets don't read, there is room for
// others. p.mu is held.
func (p *Port) crowded() bool {
	if p.frames < fairFrames && p.bytes < fairBytes {
		return false
	}
	b := p.b
	return 4*int64(p.frames) > b.cfg.TotalFrames-b.queued.frames.Load() || 4*int64(p.bytes) > b.cfg.TotalBytes-b.queued.bytes.Load()
}

// mayAnswer reports whether the outbox takes an answer of a service though it is
// full. p.mu is held.
func (p *Port) mayAnswer() bool {
	cfg := &p.b.cfg
	return p.frames < cfg.OutboxFrames+hubSlack && p.bytes < cfg.OutboxBytes+cfg.Limits.Frame && !p.b.totalFull() && !p.crowded()
}

// hasRoom reports whether the hub has room, be it for those who keep up only.
func (b *Bridge) hasRoom() bool {
	return b.queued.frames.Load() < b.cfg.TotalFrames && b.queued.bytes.Load() < b.cfg.TotalBytes
}

// totalFull reports whether the hub has no room for more of a backlog.
func (b *Bridge) totalFull() bool {
	frames, bytes := b.left()
	return frames <= 0 || bytes <= 0
}

// left returns the room that the hub has for more of a backlog.
func (b *Bridge) left() (frames, bytes int64) {
	frames, bytes = b.cfg.TotalFrames, b.cfg.TotalBytes
	return frames - frames/liveShare - b.queued.frames.Load(), bytes - bytes/liveShare - b.queued.bytes.Load()
}

// inbound is where a packet came from and who hears of its fate.
type inbound struct {
	link   *Link
	ticket Ticket
	hub    bool // answer of a service: counted as originated, never waits
	more   bool // may wait for others that go the same way, see run
}

// enqueue puts a routed packet into the port's outbox, or lets it wait, or drops
// it. The caller holds no lock; in.link's reader is the usual caller.
func (p *Port) enqueue(in *inbound, pk *Packet) {
	n := pk.Frames()
	p.mu.Lock()
	switch {
	case p.gone || p.box == nil:
		p.mu.Unlock()
		p.b.undeliverable(in, pk, DropUnknown)
		return
	case p.kind == portStream && p.tooLong(pk):
		p.mu.Unlock()
		p.b.undeliverable(in, pk, DropOutgrown)
		return
	case in.link.dead.Load():
		p.mu.Unlock()
		in.link.port.stripe.drop(DropAbandoned, n)
		return
	case pk.Class == route.Transient && !p.attached:
		p.mu.Unlock()
		p.b.undeliverable(in, pk, DropOffline)
		return
	case pk.First && !p.attached:
		p.hold(in, pk, n)
		return
	case len(p.parked) > 0 || p.full(in.ticket.bytes):
		if in.hub && pk.Class == route.Stored && p.mayAnswer() {
			break
		}
		if in.hub || pk.Class == route.Transient {
			p.mu.Unlock()
			p.b.undeliverable(in, pk, DropFull)
			return
		}
		before := p.frames
		p.park(in, pk, n)
		moved := p.frames != before
		p.unlockAndAck()
		if moved {
			p.pump()
		}
		return
	}
	stored, err := p.store(pk, in.ticket, n)
	if err != nil {
		p.mu.Unlock()
		if p.b.withholds(err) && in.ticket.ack != nil {
			in.link.port.stripe.drop(DropStorage, n)
			return
		}
		p.notStored(err)
		p.b.undeliverable(in, pk, DropStorage)
		return
	}
	p.accepted(in, stored)
}

// accepted goes on with what is in the outbox now: acknowledges it if it is stored, and
// delivers. p.mu is held and released.
func (p *Port) accepted(in *inbound, stored bool) {
	fire := stored && in.ticket.ack != nil
	if fire && (p.acking || len(p.acks) > 0) {
		p.acks = append(p.acks, in.ticket)
		fire = false
	}
	p.unlockAndAck()
	if fire {
		in.ticket.fire()
	}
	p.pump()
}

// withholds reports whether a packet that was not stored is not acknowledged either: its
// sender has it, and sends it again to the hub that comes next. That is so when the store
// has been closed before the bridge, which is said once.
func (b *Bridge) withholds(err error) bool {
	if !errors.Is(err, fs.ErrClosed) {
		return false
	}
	b.storeClosed.Do(func() {
		b.cfg.Logger.Error("the store was closed before the bridge: what comes now is not acknowledged", "err", err)
	})
	return true
}

// notStored says in the log that the outbox has not taken a packet.
func (p *Port) notStored(err error) {
	if unlogged, ok := p.b.mayLog(); ok {
		p.b.cfg.Logger.Error("cannot store a frame", "device", p.clientID, "err", err, "unlogged", unlogged)
	}
}

// tooLong reports whether a frame has grown past what a stream carries (spec routing
// 3.2) by what the hub put in front.
func (p *Port) tooLong(pk *Packet) bool {
	for i := range pk.Frames() {
		if pk.Size(i) > route.MaxFrame {
			return true
		}
	}
	return false
}

// store appends a packet to the outbox. p.mu is held.
func (p *Port) store(pk *Packet, t Ticket, n int) (stored bool, err error) {
	// A stream has no acknowledgement to wait for, and is not held up by a disk.
	t.paid = t.link != nil && t.link.port.kind == portStream
	size, stored, err := p.box.Append(pk, t)
	if err != nil {
		return false, err
	}
	if t.link != nil {
		p.join(pk, t.link.port)
	}
	if !stored && t.link != nil {
		// Charged until Done, which may have come already.
		p.b.storing.Add(int64(t.bytes))
		if !t.paid {
			t.link.waitPackets.Add(int64(t.more) + 1)
			t.link.waitBytes.Add(int64(t.bytes))
		}
	}
	stored = stored || t.paid
	p.frames += n
	p.bytes += size
	switch {
	case pk.First:
		p.lastFirst = p.box.Next() - 1
	case pk.Class == route.Transient:
		p.lastTransient = p.box.Next() - 1
	}
	p.b.queued.add(n, size)
	if p.frames == n {
		p.wakeBy(pk.Arrival + int64(p.b.cfg.MaxAge))
	}
	return stored, nil
}

// join lets a stream that is at either end of a packet reach the other end by name
// (spec routing 7.4): the target what it sees in front of the return route, the
// sender what its frames came to through a forwarder. p.mu is held.
func (p *Port) join(pk *Packet, src *Port) {
	if p.kind == portStream {
		from := src.addr
		if from == "" { // a worker inside the hub
			from = pk.returnHop()
		}
		p.allow(from)
	}
	if pk.First && src.kind == portStream {
		src.allow(p.addr)
	}
}

// park lets a packet wait for a full outbox, unless room has come meanwhile. p.mu is
// held.
func (p *Port) park(in *inbound, pk *Packet, n int) {
	w := &waiting{ticket: in.ticket, packet: pk.freeze(), frames: n}
	if in.link.port.kind == portStream {
		w.deadline = pk.Arrival + int64(p.b.cfg.StreamWait)
	}
	if !p.await(w) {
		return
	}
	p.stripe.withheld.Add(1)
	p.parked = append(p.parked, w)
	p.parkedFrames += n
	if w.deadline != 0 {
		p.wakeBy(w.deadline)
	}
	p.unpark()
}

// hold lets a first contact wait for a device. p.mu is held and released.
func (p *Port) hold(in *inbound, pk *Packet, n int) {
	w := &waiting{ticket: in.ticket, packet: pk.freeze(), frames: n}
	w.bytes = len(w.packet.raw)
	w.deadline = pk.Arrival + int64(p.b.cfg.FirstContact)
	cfg := &p.b.cfg
	full := p.b.waiting.bytes.Load() > cfg.WaitingBytes
	var ns notes
	for !full && (p.heldFrames+n > cfg.FirstContactFrames && p.heldFrames > 0 || p.heldBytes+w.bytes > cfg.FirstContactBytes) {
		full = !p.displace(w, &ns)
	}
	held := !full && p.await(w)
	if held {
		p.held = append(p.held, w)
		p.heldFrames += n
		p.heldBytes += w.bytes
		p.wakeBy(w.deadline)
	}
	p.unlockAndAck()
	p.b.send(ns)
	switch {
	case full:
		p.b.undeliverable(in, pk, DropFull)
	case held:
		in.link.notify(hubproto.ReasonWaiting, &pk.views[0], n)
	}
}

// heldBy tells apart who has first contacts waiting. What comes from one node inside the
// hub is one sender's, over whatever links.
type heldBy struct {
	from uint64
	node *Port
}

func (w *waiting) by() heldBy {
	l := w.ticket.link
	if l.from != 0 {
		return heldBy{from: l.from}
	}
	return heldBy{node: l.port}
}

// displace ends the newest first contact of the sender who has most of the room for them,
// as long as that is more than what w's would have with w. p.mu is held.
func (p *Port) displace(w *waiting, ns *notes) bool {
	cfg := &p.b.cfg
	room := make(map[heldBy]int) // frames and bytes, as parts of their limits
	charge := func(w *waiting) { room[w.by()] += w.frames*cfg.FirstContactBytes + w.bytes*cfg.FirstContactFrames }
	charge(w)
	for _, o := range p.held {
		charge(o)
	}
	last := -1
	for i, o := range p.held {
		if m := room[o.by()]; m > room[w.by()] && (last < 0 || m >= room[p.held[last].by()]) {
			last = i
		}
	}
	if last < 0 {
		return false
	}
	o := p.held[last]
	p.held = slices.Delete(p.held, last, last+1)
	p.heldFrames -= o.frames
	p.heldBytes -= o.bytes
	reason, _ := DropFull.reason()
	ns.add(p.b.noteForPacket(&o.packet, p.addr, reason))
	p.settle(o, DropFull)
	return true
}

// await charges a waiting packet to its connection. It returns false, and the
// packet is abandoned, when the connection has ended. p.mu is held.
func (p *Port) await(w *waiting) bool {
	l := w.ticket.link
	w.bytes = len(w.packet.raw)
	l.mu.Lock()
	if l.dead.Load() {
		l.mu.Unlock()
		p.stripe.drop(DropAbandoned, w.frames)
		return false
	}
	if l.waitAt == nil {
		l.waitAt = make(map[*Port]int)
	}
	l.waitAt[p]++
	l.mu.Unlock()
	l.waitPackets.Add(1)
	l.waitBytes.Add(int64(w.ticket.bytes))
	p.b.waiting.add(w.frames, w.bytes)
	return true
}

// release takes a packet off its connection's window and the hub's totals.
// p.mu is held.
func (p *Port) release(w *waiting) {
	l := w.ticket.link
	l.mu.Lock()
	if l.waitAt != nil {
		if l.waitAt[p]--; l.waitAt[p] <= 0 {
			delete(l.waitAt, p)
		}
	}
	l.mu.Unlock()
	l.answered(w.ticket.bytes)
	p.b.waiting.add(-w.frames, -w.bytes)
}

// settle ends a waiting packet that is not stored: counted, acknowledged.
// p.mu is held.
func (p *Port) settle(w *waiting, why Drop) {
	p.release(w)
	p.stripe.drop(why, w.frames)
	p.acks = append(p.acks, w.ticket)
}

// admit stores a waiting packet; p.mu is held.
func (p *Port) admit(w *waiting) {
	p.release(w)
	stored, err := p.store(&w.packet, w.ticket, w.frames)
	switch {
	case err != nil && p.b.withholds(err):
		p.stripe.drop(DropStorage, w.frames)
	case err != nil:
		p.notStored(err)
		reason, _ := DropStorage.reason()
		p.bad.add(p.b.noteForPacket(&w.packet, p.addr, reason))
		p.stripe.drop(DropStorage, w.frames)
		p.acks = append(p.acks, w.ticket)
	case stored:
		p.acks = append(p.acks, w.ticket)
	}
}

// unpark stores waiting packets while there is room; p.mu is held.
func (p *Port) unpark() {
	for {
		i := 0
		for ; i < len(p.parked) && !p.full(p.parked[i].ticket.bytes); i++ {
			w := p.parked[i]
			p.parked[i] = nil
			p.parkedFrames -= w.frames
			p.admit(w)
		}
		if i == len(p.parked) {
			p.parked = nil
			return
		}
		if i > 0 {
			p.madeRoom = p.b.now()
		}
		p.parked = p.parked[i:]
		if p.frames >= p.b.cfg.OutboxFrames || p.bytes >= p.b.cfg.OutboxBytes {
			return
		}
		// Room here, but not in the hub. What came there before starve woke nobody.
		p.b.starve(p)
		if p.full(p.parked[0].ticket.bytes) {
			return
		}
	}
}

// admitHeld queues the first contacts that waited for the device; p.mu is held.
// They are bounded, so they may exceed the outbox's limits.
func (p *Port) admitHeld() {
	for _, w := range p.held {
		p.admit(w)
	}
	p.held, p.heldFrames, p.heldBytes = nil, 0, 0
}

// unlockAndAck fires what acknowledgements are due, in order, one goroutine at a
// time, each after the notice that it makes due. p.mu is held and released.
func (p *Port) unlockAndAck() {
	if len(p.acks) == 0 || p.acking {
		p.mu.Unlock()
		return
	}
	p.acking = true
	for len(p.acks) > 0 {
		due, bad := p.acks, p.bad
		p.acks, p.bad = nil, notes{}
		p.mu.Unlock()
		p.b.send(bad)
		for _, t := range due {
			t.fire()
		}
		p.mu.Lock()
	}
	p.acking = false
	p.mu.Unlock()
}

// pump delivers to the attached connection until it has everything or takes no
// more. One goroutine at a time; the caller holds no lock.
func (p *Port) pump() {
	p.mu.Lock()
	if p.pumping || p.blocked || !p.attached || p.box.Next() <= p.cursor {
		p.mu.Unlock()
		return
	}
	p.pumping = true
	if p.frames > pumpBatch && p.box.Next()-p.cursor > pumpBatch {
		p.deliver(0) // in turn with other backlogs
		return
	}
	p.deliver(pumpRounds)
}

// deliver is pump with p.mu and p.pumping held; both are released.
func (p *Port) deliver(rounds int) {
	buf := batches.Get().(*[pumpBatch]Entry)
	for !p.blocked && p.attached {
		batch := p.box.Read(p.cursor, buf[:0])
		if len(batch) == 0 {
			p.box.Settle()
			p.cursor = p.box.Next()
			break
		}
		if rounds--; rounds < 0 {
			p.box.Settle()
			clear(batch)
			p.mu.Unlock() // Bridge.mu comes before it
			if p.b.drains.add(p) {
				batches.Put(buf)
				return
			}
			p.mu.Lock()
			break
		}
		for i := range batch {
			batch[i].Redelivered = batch[i].Seq <= p.everOffered
		}
		l, seen, before := p.link, p.readied, p.offered
		p.offered = max(p.offered, batch[len(batch)-1].Seq)
		p.mu.Unlock()
		n := l.conn.Deliver(batch)
		n = max(0, min(n, len(batch)))
		p.b.sawDelivery(p, batch[:n])
		p.mu.Lock()
		p.handed(l, batch[:n], before)
		if n < len(batch) && p.link == l && p.readied == seen {
			p.blocked = true
		}
		p.box.Settle()
		clear(batch)
		p.unpark()
		if len(p.acks) > 0 && !p.acking {
			p.unlockAndAck()
			p.mu.Lock()
		}
	}
	p.pumping = false
	p.mu.Unlock()
	batches.Put(buf)
}

// handed notes what a connection took. p.mu is held.
func (p *Port) handed(l *Link, took []Entry, before uint64) {
	last := before
	for i := range took {
		e := &took[i]
		last = e.Seq
		if e.Class == route.Transient {
			if size, ok := p.box.Drop(e.Seq); ok {
				p.taken(1, size)
				p.stripe.delivered.Add(1)
			}
		}
	}
	if p.link != l || !p.attached {
		p.everOffered = max(p.everOffered, last)
		return
	}
	p.offered = last
	p.cursor = max(p.cursor, last+1)
}
