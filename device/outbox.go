package device

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/sealmq/sealmq/route"
)

// Bundles (a sender puts frames with the same first hop into one publish when it
// has a backlog, and never waits for more).
const (
	bundleBytes  = 16 << 10
	bundleFrames = 256
)

// windowBytes bounds what is in flight besides the number of packets: a hub
// closes a publisher with more than 8 MiB unanswered.
const windowBytes = 4 << 20

// entryState is where an entry of the outbox stands.
type entryState uint8

const (
	entryQueued entryState = iota
	entrySent              // handed to the present connection
	entryDone              // the hub has it, or it was dropped
)

// entry is one encoded frame.
type entry struct {
	seq     uint64
	class   route.Class
	state   entryState
	strikes uint8 // connections in a row that ended soon after it was sent, see suspect
	body    []byte
	call    *call // of the call that it begins; nil for most
}

// flow is what is queued for one first hop, in order.
type flow struct {
	key      string
	entries  []entry // all not done, except some in the middle
	next     int     // index of the first entry not yet sent
	bytes    int
	inFlight int  // packets
	airborne int  // bytes of those
	listed   bool // in outbox.ready
	waiting  int  // putters
}

// flight is a stored packet that the hub has not acknowledged.
type flight struct {
	flow        *flow
	first, last uint64 // sequence numbers of its entries, which are neighbours
	size        int    // bytes
	at          time.Time
}

// putter is a sender that waits for room.
type putter struct {
	key     string
	class   route.Class
	body    []byte
	call    *call
	granted chan struct{} // closed once it is in, or never will be (err)
	err     error
}

// flusher waits until everything up to a sequence number is done.
type flusher struct {
	upTo uint64
	left int
	done chan struct{}
	err  error
}

// outbox is the device's one ordered queue towards its hub: bounded, above the
// link, and independent of connections. Stored frames leave it when the hub has
// acknowledged them; on a new connection everything unacknowledged is sent again,
// in order. Transient frames leave it when they are sent, and are dropped while
// there is no connection.
//
// Frames with the same first hop keep their order; different first hops take
// turns, and none has more than a quarter of the window, so that a target whose
// acknowledgements the hub withholds stalls nobody else. For the same reason one
// first hop may fill only as much of the outbox as is still free.
type outbox struct {
	maxFrames, maxBytes int // limits of what is held

	mu       sync.Mutex
	closed   error
	seq      uint64
	frames   int
	bytes    int
	flows    map[string]*flow
	ready    []*flow // flows that may have something to send, in turn
	putters  []*putter
	flushers []*flusher

	gen      uint64 // of the present connection, 0 without
	lastGen  uint64
	window   int // packets
	bundle   int // bytes a bundle may have
	token    uint64
	flights  map[uint64]flight
	airborne int // bytes in flight

	steadyAt   time.Time // the present connection has lasted long enough for suspects that are held
	alone      *suspect  // sent by itself at present; nil: none
	aloneTimer *time.Timer
	together   int         // suspects that may be sent at once
	failed     error       // of a frame that was given up, for the next flush
	onFail     func(error) // told of each; must not block; may be nil
	lost       []func()    // tell calls of such frames; to be called without mu

	wake chan struct{} // something may be ready to send

	sent, acked, resent, packets uint64
	dropped                      map[dropReason]uint64
}

func newOutbox(maxFrames, maxBytes int) *outbox {
	return &outbox{
		maxFrames: maxFrames, maxBytes: maxBytes,
		flows: make(map[string]*flow), flights: make(map[uint64]flight),
		dropped: make(map[dropReason]uint64), wake: make(chan struct{}, 1),
	}
}

// put queues one encoded frame under its first hop and keeps body. It waits for
// room, first come first served for each first hop, until ctx ends. A transient
// frame without a connection is dropped and counted.
func (o *outbox) put(ctx context.Context, key string, body []byte, class route.Class) error {
	if len(body) > o.maxBytes {
		return ErrTooLarge
	}
	if ctx.Err() != nil {
		return ctxError(ctx, "sending")
	}
	o.mu.Lock()
	switch f := o.flows[key]; {
	case o.closed != nil:
		defer o.mu.Unlock()
		return o.closed
	case class == route.Transient && o.gen == 0:
		o.dropped[dropNoConnection]++
		o.mu.Unlock()
		return nil
	case (f == nil || f.waiting == 0) && o.roomLocked(f, len(body)):
		o.insertLocked(key, body, class, callOf(ctx))
		o.mu.Unlock()
		return nil
	}
	p := &putter{key: key, class: class, body: body, call: callOf(ctx), granted: make(chan struct{})}
	o.flowLocked(key).waiting++
	o.putters = append(o.putters, p)
	o.mu.Unlock()

	select {
	case <-p.granted:
		return p.err
	case <-ctx.Done():
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.Index(o.putters, p)
	if i < 0 { // granted in the same moment
		return p.err
	}
	o.putters = slices.Delete(o.putters, i, i+1)
	f := o.flows[key]
	f.waiting--
	o.dropFlowLocked(f)
	o.grantLocked() // those behind may fit
	return ctxError(ctx, "waiting for room in the outbox")
}

// roomLocked reports whether a frame of n bytes fits; f may be nil.
func (o *outbox) roomLocked(f *flow, n int) bool {
	if o.frames == 0 {
		return true
	}
	if o.frames >= o.maxFrames || o.bytes+n > o.maxBytes {
		return false
	}
	return f == nil || len(f.entries) == 0 ||
		(len(f.entries) < o.maxFrames-o.frames && f.bytes+n <= o.maxBytes-o.bytes)
}

func (o *outbox) flowLocked(key string) *flow {
	f := o.flows[key]
	if f == nil {
		f = &flow{key: key}
		o.flows[key] = f
	}
	return f
}

// dropFlowLocked forgets a flow that holds nothing.
func (o *outbox) dropFlowLocked(f *flow) {
	if len(f.entries) == 0 && f.waiting == 0 && f.inFlight == 0 && !f.listed {
		delete(o.flows, f.key)
	}
}

func (o *outbox) insertLocked(key string, body []byte, class route.Class, c *call) {
	o.seq++
	if c != nil {
		c.unsettled.Add(1)
	}
	f := o.flowLocked(key)
	f.entries = append(f.entries, entry{seq: o.seq, class: class, body: body, call: c})
	f.bytes += len(body)
	o.frames++
	o.bytes += len(body)
	o.listLocked(f)
}

// listLocked puts the flow into the rotation if it has something to send.
func (o *outbox) listLocked(f *flow) {
	if !f.listed && f.next < len(f.entries) {
		f.listed = true
		o.ready = append(o.ready, f)
		o.signal()
	}
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// grantLocked lets in the waiting senders that fit now, in order for each flow.
func (o *outbox) grantLocked() {
	if len(o.putters) == 0 {
		return
	}
	blocked := make(map[string]bool)
	rest := o.putters[:0]
	for _, p := range o.putters {
		f := o.flowLocked(p.key)
		switch {
		case p.class == route.Transient && o.gen == 0:
			o.dropped[dropNoConnection]++
		case blocked[p.key] || !o.roomLocked(f, len(p.body)):
			blocked[p.key] = true
			rest = append(rest, p)
			continue
		default:
			o.insertLocked(p.key, p.body, p.class, p.call)
		}
		f.waiting--
		close(p.granted)
	}
	clear(o.putters[len(rest):])
	o.putters = rest
}

// attach starts a connection: everything unacknowledged is to be sent (again).
// The generation it returns names the connection. window counts packets, bundle
// bytes.
func (o *outbox) attach(window, bundle int) (gen uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lastGen++
	o.gen = o.lastGen
	o.window, o.bundle = max(window, 1), bundle
	o.steadyAt, o.together = time.Now().Add(steadyTime+rand.N(steadyTime)), 1 //nolint:gosec // nobody has to guess it
	for _, f := range o.flows {
		o.listLocked(f)
	}
	// The oldest first, whatever order the map had.
	slices.SortFunc(o.ready, func(a, b *flow) int {
		switch {
		case a.entries[a.next].seq < b.entries[b.next].seq:
			return -1
		default:
			return 1
		}
	})
	o.suspectLocked()
	o.signal()
	return o.gen
}

// detach ends the connection of that generation. What it left unacknowledged
// counts as unsent; transient frames are dropped. The calls of frames that are given up
// have heard of it when it returns.
func (o *outbox) detach(gen uint64) {
	for _, tell := range o.detached(gen) {
		tell()
	}
}

// detached is detach, and returns what is left to be done without the lock.
func (o *outbox) detached(gen uint64) (lost []func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen != gen {
		return nil
	}
	o.gen = 0
	o.strikeLocked(time.Now())
	clear(o.flights)
	o.airborne = 0
	o.ready = o.ready[:0]
	for _, f := range o.flows {
		f.inFlight, f.airborne, f.next, f.listed = 0, 0, 0, false
		keep := f.entries[:0]
		for _, e := range f.entries {
			switch {
			case e.state == entryDone:
				continue
			case e.class == route.Transient:
				o.dropped[dropNoConnection]++
				o.leaveLocked(f, &e)
				continue
			case e.state == entrySent:
				o.resent++
				e.state = entryQueued
			}
			keep = append(keep, e)
		}
		clear(f.entries[len(keep):])
		f.entries = keep
		o.dropFlowLocked(f)
	}
	o.grantLocked()
	lost, o.lost = o.lost, nil
	return lost
}

// leaveLocked accounts for an entry that leaves the outbox.
func (o *outbox) leaveLocked(f *flow, e *entry) {
	n := len(e.body)
	f.bytes -= n
	o.bytes -= n
	o.frames--
	e.state, e.body = entryDone, nil
	if e.call != nil {
		e.call.unsettled.Add(-1)
	}
	for i := 0; i < len(o.flushers); i++ {
		w := o.flushers[i]
		if e.seq > w.upTo {
			continue
		}
		if w.left--; w.left == 0 {
			close(w.done)
			o.flushers = slices.Delete(o.flushers, i, i+1)
			i--
		}
	}
}

// trimLocked forgets the done entries at the head of a flow.
func (o *outbox) trimLocked(f *flow) {
	n := 0
	for n < len(f.entries) && f.entries[n].state == entryDone {
		n++
	}
	if n == 0 {
		return
	}
	f.next = max(f.next-n, 0)
	if n == len(f.entries) && cap(f.entries) <= bundleFrames {
		f.entries = f.entries[:0]
	} else {
		f.entries = f.entries[n:]
	}
}

// take returns the next packet for the connection, or false when there is
// nothing to send for now: then wake tells when to ask again.
func (o *outbox) take(gen uint64) (packet, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen != gen || gen == 0 {
		return packet{}, false
	}
	if o.alone != nil {
		return o.takeAloneLocked()
	}
	for turns := len(o.ready); turns > 0; turns-- {
		f := o.ready[0]
		o.ready = o.ready[1:]
		f.listed = false
		o.skipLocked(f)
		if f.next >= len(f.entries) {
			o.dropFlowLocked(f)
			continue
		}
		if f.entries[f.next].held() {
			continue // steady goes on with it
		}
		// Stored packets wait for their share of the window. An acknowledgement
		// lists the flow again.
		if head := &f.entries[f.next]; head.class == route.Stored && !o.mayFlyLocked(f, len(head.body)) {
			if f.inFlight == 0 {
				o.ready = append(o.ready, f)
				f.listed = true
			}
			continue
		}
		p := o.packLocked(f, bundleFrames)
		o.listLocked(f)
		if len(o.ready) > 0 {
			o.signal()
		}
		return p, true
	}
	return packet{}, false
}

// mayFlyLocked reports whether the window lets another stored packet of the flow
// out. It always admits one.
func (o *outbox) mayFlyLocked(f *flow, n int) bool {
	if len(o.flights) == 0 {
		return true
	}
	if len(o.flights) >= o.window || o.airborne+n > windowBytes {
		return false
	}
	return f.inFlight == 0 || (f.inFlight < max(o.window/4, 1) && f.airborne+n <= windowBytes/4)
}

// packLocked makes a packet of the flow's next entries, most of them at most.
func (o *outbox) packLocked(f *flow, most int) packet {
	head := &f.entries[f.next]
	p := packet{class: head.class}
	first, last := head.seq, head.seq
	for f.next < len(f.entries) {
		e := &f.entries[f.next]
		if e.class != p.class || len(p.frames) == most || (e.unwanted() || e.held()) && len(p.frames) > 0 ||
			(len(p.frames) > 0 && p.size+len(e.body) > o.bundle) {
			break
		}
		p.frames = append(p.frames, e.body)
		p.size += len(e.body)
		last = e.seq
		e.state = entrySent
		f.next++
		if e.class == route.Transient {
			o.leaveLocked(f, e)
		}
	}
	o.packets++
	o.sent += uint64(len(p.frames))
	if p.class == route.Transient {
		o.trimLocked(f)
		o.grantLocked()
		return p
	}
	o.token++
	p.token = o.token
	o.flights[p.token] = flight{flow: f, first: first, last: last, size: p.size, at: time.Now()}
	f.inFlight++
	f.airborne += p.size
	o.airborne += p.size
	return p
}

// ack notes that the hub has taken responsibility for a packet of that
// connection. Tokens that are not in flight are ignored.
func (o *outbox) ack(gen, token uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	fl, ok := o.flights[token]
	if !ok || o.gen != gen {
		return
	}
	delete(o.flights, token)
	f := fl.flow
	f.inFlight--
	f.airborne -= fl.size
	o.airborne -= fl.size
	i, _ := slices.BinarySearchFunc(f.entries, fl.first, func(e entry, seq uint64) int {
		switch {
		case e.seq < seq:
			return -1
		case e.seq > seq:
			return 1
		}
		return 0
	})
	for ; i < len(f.entries) && f.entries[i].seq <= fl.last; i++ {
		if e := &f.entries[i]; e.state == entrySent {
			o.acked++
			o.leaveLocked(f, e)
		}
	}
	o.trimLocked(f)
	o.clearLocked(f, fl.first, fl.last)
	o.listLocked(f)
	o.dropFlowLocked(f)
	o.grantLocked()
	if len(o.ready) > 0 || o.alone != nil {
		o.signal() // the window has opened
	}
}

// flush waits until the hub has everything that was put before.
func (o *outbox) flush(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctxError(ctx, "flushing")
	}
	o.mu.Lock()
	if err := o.failed; err != nil {
		o.failed = nil
		o.mu.Unlock()
		return err
	}
	if o.frames == 0 || o.closed != nil {
		defer o.mu.Unlock()
		if o.frames == 0 {
			return nil
		}
		return o.closed
	}
	w := &flusher{upTo: o.seq, left: o.frames, done: make(chan struct{})}
	o.flushers = append(o.flushers, w)
	o.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if i := slices.Index(o.flushers, w); i >= 0 {
		o.flushers = slices.Delete(o.flushers, i, i+1)
		return ctxError(ctx, "waiting for the hub to acknowledge")
	}
	return w.err
}

// close ends all waiting with err; nothing is sent any more.
func (o *outbox) close(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed != nil {
		return
	}
	o.closed = err
	o.endAloneLocked()
	for _, p := range o.putters {
		p.err = err
		close(p.granted)
	}
	for _, w := range o.flushers {
		w.err = err
		close(w.done)
	}
	o.putters, o.flushers = nil, nil
	o.dropped[dropClosed] += uint64(o.frames)
	o.signal()
}
