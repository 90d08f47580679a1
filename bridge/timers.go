package bridge

import (
	"container/heap"
	"sync"
	"time"
)

// timers wakes ports that have something to expire. One goroutine, one heap.
type timers struct {
	mu   sync.Mutex
	heap wakeHeap
	kick chan struct{} // the earliest time has become earlier
}

type wakeHeap []*Port

func (h wakeHeap) Len() int           { return len(h) }
func (h wakeHeap) Less(i, j int) bool { return h[i].wake.Load() < h[j].wake.Load() }
func (h wakeHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].timerIdx, h[j].timerIdx = i, j
}
func (h *wakeHeap) Push(x any) {
	p := x.(*Port)
	p.timerIdx = len(*h)
	*h = append(*h, p)
}
func (h *wakeHeap) Pop() any {
	old := *h
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	p.timerIdx = -1
	return p
}

// wakeBy has the port expire no later than at a time (unix nanoseconds; 0: never).
// The usual case, that it is going to be woken earlier anyway, takes no lock.
func (p *Port) wakeBy(at int64) {
	if w := p.wake.Load(); at == 0 || w != 0 && w <= at {
		return
	}
	t := &p.b.timers
	t.mu.Lock()
	defer t.mu.Unlock()
	if w := p.wake.Load(); w != 0 && w <= at {
		return
	}
	p.wake.Store(at)
	if p.timerIdx < 0 {
		heap.Push(&t.heap, p)
	} else {
		heap.Fix(&t.heap, p.timerIdx)
	}
	if t.heap[0] == p {
		select {
		case t.kick <- struct{}{}:
		default:
		}
	}
}

func (t *timers) remove(p *Port) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.timerIdx >= 0 {
		heap.Remove(&t.heap, p.timerIdx)
	}
	p.wake.Store(0)
}

// due takes the ports whose time has come off the heap.
func (t *timers) due(now int64) (ports []*Port) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.heap) > 0 {
		p := t.heap[0]
		if p.wake.Load() > now {
			break
		}
		heap.Pop(&t.heap)
		p.wake.Store(0)
		ports = append(ports, p)
	}
	return ports
}

// next returns how long it is until a port's time comes; negative: never.
func (t *timers) next(now int64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.heap) == 0 {
		return -1
	}
	return max(0, time.Duration(t.heap[0].wake.Load()-now))
}

// sweepEvery is how often forwarders are checked for expiry.
const sweepEvery = time.Minute

// runTimers is the bridge's timer goroutine.
func (b *Bridge) runTimers() {
	every := min(sweepEvery, max(b.cfg.ForwarderTTL/4, time.Second))
	sweep := time.NewTicker(every)
	defer sweep.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-b.done:
			return
		case <-sweep.C:
			b.lookAtClock()
			b.registry.sweep()
			b.relieve()
			continue
		case <-b.timers.kick:
		case <-timer.C:
		}
		for _, p := range b.timers.due(b.now()) {
			p.expire()
		}
		if wait := b.timers.next(b.now()); wait >= 0 {
			// Never spin, whatever an injected clock says.
			timer.Reset(max(wait, time.Millisecond))
		} else {
			timer.Stop()
		}
	}
}

// nextWake returns when the port has something to expire next; 0: never. p.mu is
// held.
func (p *Port) nextWake() int64 {
	cfg := &p.b.cfg
	next := int64(0)
	at := func(t int64) {
		if t != 0 && (next == 0 || t < next) {
			next = t
		}
	}
	at(p.helloBy)
	at(p.sayAt())
	for _, w := range p.held {
		at(w.deadline)
	}
	for _, w := range p.parked {
		at(p.parkedUntil(w))
	}
	if p.box != nil {
		if arrival, ok := p.box.Oldest(); ok {
			at(arrival + int64(cfg.MaxAge))
		}
	}
	if p.kind == portDevice && p.link == nil {
		at(p.endsAt())
		if p.frames > 0 && p.lastFirst > p.acked {
			p.box.Scan(func(it *Item) bool {
				if it.First {
					at(max(it.Arrival, p.offlineSince) + int64(cfg.FirstContact))
				}
				return !it.First
			})
		}
	}
	return next
}

// endsAt is when the name of a device without a connection is forgotten, if
// nothing else keeps it. p.mu is held.
func (p *Port) endsAt() int64 {
	cfg := &p.b.cfg
	keep := cfg.ForwarderTTL
	switch {
	case p.oneShot && p.cleanEnd:
		keep = cfg.OneShotClean
	case p.oneShot:
		keep = cfg.OneShotLost
	}
	return p.offlineSince + int64(keep)
}

// expire drops what has outlived its time.
func (p *Port) expire() {
	b := p.b
	now := b.now()
	var ns notes
	p.mu.Lock()
	if p.gone {
		p.mu.Unlock()
		return
	}
	link := p.link
	attach := p.helloBy != 0 && p.helloBy <= now && !p.attached
	if attach {
		p.helloBy = 0
	}
	p.held = p.expireWaiting(p.held, now, DropOffline, &ns, (*waiting).until, func(w *waiting) {
		p.heldFrames -= w.frames
		p.heldBytes -= w.bytes
	})
	p.parked = p.expireWaiting(p.parked, now, DropFull, &ns, p.parkedUntil, func(w *waiting) { p.parkedFrames -= w.frames })
	if p.box != nil && p.frames > 0 {
		p.expireQueued(now, &ns)
	}
	p.unpark()
	if p.kind == portDevice && p.link == nil && p.endsAt() <= now {
		if p.oneShot || p.idle() {
			p.end(ns)
			return
		}
		// Its backlog keeps it until the age limit.
		p.offlineSince = now
	}
	p.wakeBy(p.nextWake())
	p.unlockAndAck()
	b.send(ns)
	if link != nil {
		link.pay(now)
		link.say()
	}
	if attach && link != nil {
		link.attach(false)
	}
	p.pump() // what waited for the room that is there now
	b.relieve()
}

// idle reports whether a device is away and nothing waits for it. p.mu is held.
func (p *Port) idle() bool {
	return p.kind == portDevice && p.link == nil && p.frames == 0 && len(p.parked)+len(p.held) == 0
}

// end forgets a device that is away, and sends ns. p.mu is held, and released.
func (p *Port) end(ns notes) {
	b := p.b
	p.gone = true
	for i := range p.unsaid {
		p.unkeep(&p.unsaid[i])
	}
	p.unsaid = nil
	for _, n := range p.empty(DropGone).list {
		ns.add(n)
	}
	b.records.set(RecordStatus, p.clientID, nil)
	p.unlockAndAck()
	b.forget(p)
	b.send(ns)
	b.relieve()
}

func (w *waiting) until() int64 { return w.deadline }

// parkedUntil returns when a packet has waited too long for a full outbox; 0: never.
// A stream's has as long again whenever the target has made room: a slow target
// slows its senders, and only one that takes nothing loses their frames. p.mu is
// held.
func (p *Port) parkedUntil(w *waiting) int64 {
	if w.deadline == 0 {
		return 0
	}
	return max(w.deadline, p.madeRoom+int64(p.b.cfg.StreamWait))
}

// expireWaiting ends waiting packets whose deadline has passed; p.mu is held.
func (p *Port) expireWaiting(list []*waiting, now int64, why Drop, ns *notes,
	until func(*waiting) int64, out func(*waiting)) []*waiting {
	keep := list[:0]
	reason, _ := why.reason()
	for _, w := range list {
		if end := until(w); end == 0 || end > now {
			keep = append(keep, w)
			continue
		}
		ns.add(p.b.noteForPacket(&w.packet, p.addr, reason))
		out(w)
		p.settle(w, why)
	}
	clear(list[len(keep):])
	return keep
}

// expireQueued drops entries beyond the age limit and, at a device that is away,
// first contacts that nobody waits for any more. p.mu is held.
func (p *Port) expireQueued(now int64, ns *notes) {
	cfg := &p.b.cfg
	away := p.kind == portDevice && !p.attached && p.lastFirst > p.acked
	type end struct {
		seq uint64
		why Drop
	}
	var ends []end
	p.box.Scan(func(it *Item) bool {
		var e end
		switch {
		case it.Arrival+int64(cfg.MaxAge) <= now:
			e = end{it.Seq, DropExpired}
		case away && it.First && max(it.Arrival, p.offlineSince)+int64(cfg.FirstContact) <= now:
			e = end{it.Seq, DropOffline}
		default:
			return away // entries are in order of arrival
		}
		ends = append(ends, e)
		reason, _ := e.why.reason()
		ns.add(p.b.noteFor(it.Frame, it.Hop, p.addr, reason))
		return true
	})
	for _, e := range ends {
		p.dropEntry(e.seq, e.why)
	}
}

// starve remembers a port whose packets wait for room in the hub as a whole.
// p.mu is held.
func (b *Bridge) starve(p *Port) {
	if p.starved {
		return
	}
	p.starved = true
	b.starved.mu.Lock()
	b.starved.m[p] = struct{}{}
	b.starved.n.Store(int32(len(b.starved.m)))
	b.starved.mu.Unlock()
}

func (b *Bridge) unstarve(p *Port) {
	b.starved.mu.Lock()
	delete(b.starved.m, p)
	b.starved.n.Store(int32(len(b.starved.m)))
	b.starved.mu.Unlock()
}

// relieve lets packets in that waited for room in the hub. The caller holds no
// lock.
func (b *Bridge) relieve() {
	const tries = 4 // ports that still have no room
	for misses := 0; misses < tries && b.starved.n.Load() > 0 && b.hasRoom(); {
		if n, _, all := b.storingRoom(); n > all {
			return
		}
		var p *Port
		b.starved.mu.Lock()
		for p = range b.starved.m {
			delete(b.starved.m, p)
			break
		}
		b.starved.n.Store(int32(len(b.starved.m)))
		b.starved.mu.Unlock()
		if p == nil {
			return
		}
		p.mu.Lock()
		p.starved = false
		if p.gone {
			p.mu.Unlock()
			continue
		}
		p.unpark()
		if len(p.parked) > 0 && p.frames < b.cfg.OutboxFrames && p.bytes < b.cfg.OutboxBytes {
			b.starve(p)
			misses++
		}
		p.unlockAndAck()
		p.pump()
	}
}
