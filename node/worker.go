package node

import (
	"context"
	"sync"

	"github.com/sealmq/sealmq/route"
)

// worker is what stands at an address. Exactly one of box, direct and target is
// set.
type worker struct {
	addr   string
	access Access // guarded by Node.mu

	box     *mailbox // mailbox, callback, pending request
	receive bool     // box may be read with Receive
	direct  *direct  // registered function
	target  string   // alias
	leaving bool     // guarded by Node.mu: somebody removes it
	channel bool     // guarded by Node.mu: the encryptor of a secure channel

	run    func()             // goroutine of a callback, started when the worker is added
	cancel context.CancelFunc // of a callback's context
}

// stop has the worker take nothing more, and drops what waits in its queue. The
// address is still taken.
func (w *worker) stop() {
	if w.cancel != nil {
		w.cancel()
	}
	switch {
	case w.box != nil:
		w.box.close()
	case w.direct != nil:
		w.direct.close()
	}
}

// gone tells the readers, once the address is free.
func (w *worker) gone() {
	if w.box != nil {
		close(w.box.gone)
	}
}

// perMessage is what a queued message counts beside its payload, in bytes.
const perMessage = 256

// mailbox is a bounded queue of messages in order of arrival.
type mailbox struct {
	maxMessages, maxBytes int
	stats                 *counters

	mu     sync.Mutex
	queue  []*Message // guarded by mu; head is the next to be taken
	head   int        // guarded by mu
	count  int        // guarded by mu: messages in queue that the limits are for
	bytes  int        // guarded by mu: of those
	lost   uint64     // guarded by mu: dropped since the last message was put
	closed bool       // guarded by mu
	wake   chan struct{}
	gone   chan struct{} // closed once closed, and the address is free
}

func newMailbox(cfg *Config, stats *counters) *mailbox {
	return &mailbox{
		maxMessages: cfg.MailboxMessages,
		maxBytes:    cfg.MailboxBytes,
		stats:       stats,
		wake:        make(chan struct{}, 1),
		gone:        make(chan struct{}),
	}
}

// put appends a message, or drops it and says why.
func (b *mailbox) put(m *Message) Drop {
	size := len(m.Payload) + perMessage
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.count
	switch {
	case b.closed:
		return DropUnknown
	case m.bounded:
	case n > 0 && (n >= b.maxMessages || b.bytes+size > b.maxBytes):
		b.lost++
		b.signal()
		return DropFull
	}
	m.Lost, b.lost = b.lost, 0
	if b.head > 0 && len(b.queue) == cap(b.queue) {
		k := copy(b.queue, b.queue[b.head:])
		clear(b.queue[k:])
		b.queue, b.head = b.queue[:k], 0
	}
	b.queue = append(b.queue, m)
	if !m.bounded {
		b.count++
		b.bytes += size
	}
	b.signal()
	return 0
}

// signal wakes one waiting reader.
func (b *mailbox) signal() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take returns the next message; nil when there is none. With report set a loss
// comes first, alone, in its place in the order.
func (b *mailbox) take(report bool) (m *Message, lost uint64, closed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, 0, true
	}
	if b.head == len(b.queue) {
		if report {
			lost, b.lost = b.lost, 0
		}
		return nil, lost, false
	}
	m = b.queue[b.head]
	if report && m.Lost > 0 {
		lost, m.Lost = m.Lost, 0
		b.signal()
		return nil, lost, false
	}
	b.queue[b.head] = nil
	b.head++
	if !m.bounded {
		b.count--
		b.bytes -= len(m.Payload) + perMessage
	}
	if b.head == len(b.queue) {
		b.queue, b.head = b.queue[:0], 0
		if cap(b.queue) > 64 {
			b.queue = nil // an idle mailbox holds no memory
		}
	}
	if b.head < len(b.queue) || b.lost > 0 {
		b.signal() // for another reader
	}
	return m, 0, false
}

// next waits for a message.
func (b *mailbox) next(ctx context.Context, report bool) (*Message, uint64, error) {
	for {
		m, lost, closed := b.take(report)
		switch {
		case closed:
			<-b.gone
			return nil, 0, ErrClosed
		case m != nil || lost > 0:
			return m, lost, nil
		}
		select {
		case <-b.wake:
		case <-b.gone:
			return nil, 0, ErrClosed
		case <-ctx.Done():
			// The wake-up may have raced with ctx: pass it on.
			b.signal()
			return nil, 0, context.Cause(ctx)
		}
	}
}

func (b *mailbox) close() {
	b.mu.Lock()
	b.closed = true
	rest := b.queue[b.head:]
	b.stats.drop(DropClosed, uint64(len(rest)))
	b.queue, b.head, b.bytes, b.count = nil, 0, 0, 0
	b.mu.Unlock()
	for _, m := range rest {
		if m.dropped != nil {
			m.dropped()
		}
	}
}

// arrival is a frame on its way to a registered function.
type arrival struct {
	frame  route.Frame
	class  route.Class
	origin Origin
}

// direct calls a function for one frame after the other, without a goroutine of
// its own: whoever brings a frame calls the function, unless a call is going on;
// then the frame waits in a bounded queue for the one who is calling. After
// directBatch frames of others a goroutine takes over, so that nobody is kept.
type direct struct {
	fn                    func(arrival)
	maxMessages, maxBytes int
	stats                 *counters
	start                 func(func()) bool

	mu     sync.Mutex
	busy   bool      // guarded by mu: somebody is calling fn
	queue  []arrival // guarded by mu
	bytes  int       // guarded by mu
	closed bool      // guarded by mu
}

const directBatch = 32

// put calls the function with a, now or soon. The frame is the function's.
func (d *direct) put(a arrival) Drop {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return DropUnknown
	}
	if d.busy {
		defer d.mu.Unlock()
		size := len(a.frame.Payload) + perMessage
		if n := len(d.queue); n > 0 && (n >= d.maxMessages || d.bytes+size > d.maxBytes) {
			return DropFull
		}
		d.queue = append(d.queue, a)
		d.bytes += size
		return 0
	}
	d.busy = true
	d.mu.Unlock()
	d.fn(a)
	d.drain(directBatch)
	return 0
}

// drain calls fn for waiting frames, at most limit of them, and hands what is left
// to a goroutine.
func (d *direct) drain(limit int) {
	for done := 0; ; {
		d.mu.Lock()
		batch := d.queue
		d.queue, d.bytes = nil, 0
		if len(batch) == 0 || d.closed {
			d.busy = false
			d.stats.drop(DropClosed, uint64(len(batch)))
			d.mu.Unlock()
			return
		}
		if done+len(batch) > limit {
			d.queue = batch
			for i := range batch {
				d.bytes += len(batch[i].frame.Payload) + perMessage
			}
			d.mu.Unlock()
			if !d.start(func() { d.drain(int(^uint(0) >> 1)) }) {
				d.close() // the node is closing
				d.mu.Lock()
				d.busy = false
				d.mu.Unlock()
			}
			return
		}
		d.mu.Unlock()
		for i := range batch {
			d.fn(batch[i])
		}
		done += len(batch)
	}
}

func (d *direct) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	d.closed = true
	d.stats.drop(DropClosed, uint64(len(d.queue)))
	d.queue, d.bytes = nil, 0
}
