package store

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/seglog"
	"github.com/sealmq/sealmq/route"
)

const (
	// moveBytes and moveRecords are how much is moved at once, of one queue or of many.
	// The next part waits until the one before is committed, so that what arrives
	// meanwhile never stands behind more than about that.
	moveBytes   = 256 << 10
	moveRecords = 512
)

// mover moves what is live of one segment to the head of the log.
type mover struct {
	s   *Store
	seg uint64

	mu     sync.Mutex
	moving int           // records appended and not committed
	bytes  int           // appended since moving was 0
	idle   chan struct{} // told when moving is 0 again
}

// Acked implements bridge.Acker: a copy is stored, the old record may go.
func (m *mover) Acked(size uint64) {
	m.s.log.Release(m.seg, 1, int64(size))
	m.mu.Lock()
	m.moving--
	idle := m.moving == 0
	if idle {
		m.bytes = 0
	}
	m.mu.Unlock()
	if idle {
		select {
		case m.idle <- struct{}{}:
		default:
		}
	}
}

// moved reports whether a mover waits: what it has moved makes room.
func moved(w wait) bool {
	_, ok := w.ticket.Acker().(*mover)
	return ok
}

// append writes a copy of a record whose body had size bytes.
func (m *mover) append(kind byte, size int64, record []byte) (seg uint64, ok bool) {
	m.mu.Lock()
	m.moving++
	m.bytes += len(record)
	m.mu.Unlock()
	seg, err := m.s.log.Append(kind, true, record, &wait{ticket: bridge.NewTicket(m, uint64(size))})
	if err != nil { // closed
		m.mu.Lock()
		m.moving--
		m.mu.Unlock()
	}
	return seg, err == nil
}

// wait returns when everything appended is committed; false when the store closes
// first.
func (m *mover) wait() bool {
	for {
		m.mu.Lock()
		n := m.moving
		m.mu.Unlock()
		if n == 0 {
			return true
		}
		select {
		case <-m.idle:
		case <-m.s.stop:
			return false
		}
	}
}

// pause waits if as much is underway as may be; false when the store closes first.
func (m *mover) pause() bool {
	m.mu.Lock()
	full := m.moving >= moveRecords || m.bytes >= moveBytes
	m.mu.Unlock()
	return !full || m.wait()
}

// relocate is told by the log, on its goroutine, which segment to clear. What it
// said before and nobody has begun with has become free by itself.
func (s *Store) relocate(seg uint64) {
	for {
		select {
		case s.moves <- seg:
			return
		default:
		}
		select {
		case <-s.moves:
		default:
		}
	}
}

// runMoves clears segments, one at a time.
func (s *Store) runMoves() {
	defer close(s.moved)
	for {
		select {
		case seg := <-s.moves:
			m := &mover{s: s, seg: seg, idle: make(chan struct{}, 1)}
			if !m.run() {
				return
			}
		case <-s.stop:
			return
		}
	}
}

func (m *mover) run() bool {
	s := m.s
	for more := true; more; {
		if more = m.tables(); !m.pause() {
			return false
		}
	}
	s.mu.Lock()
	boxes := make([]*outbox, 0, len(s.byID))
	for _, b := range s.byID {
		boxes = append(boxes, b)
	}
	s.mu.Unlock()
	for _, b := range boxes {
		for more := true; more; {
			if more = b.move(m); !m.pause() {
				return false
			}
		}
	}
	return m.wait()
}

// tables moves some entries and reports whether there are more.
func (m *mover) tables() (more bool) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for key, e := range s.tables {
		if e.seg != m.seg {
			continue
		}
		if n++; n > moveRecords {
			return true
		}
		seg, ok := m.append(recTable, e.size, appendTable(nil, key, e.value))
		if !ok {
			return false
		}
		e.seg = seg
	}
	return false
}

// move appends some of what the segment holds of the queue again, and reports
// whether there is more.
func (b *outbox) move(m *mover) (more bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.named && b.nameSeg == m.seg {
		seg, ok := m.append(recName, b.nameSize(), b.nameRecord())
		if !ok {
			return false
		}
		b.nameSeg = seg
	}
	var due []int
	size := 0
	for i := b.head; i < len(b.recs); i++ {
		r := &b.recs[i]
		if uint64(r.seg) != m.seg || r.live == 0 {
			continue
		}
		if len(due) == moveRecords || size > moveBytes {
			more = true
			break
		}
		due = append(due, i)
		size += int(r.size)
	}
	if len(due) > 0 {
		b.moveRecords(m, due)
	}
	return more
}

// moveRecords appends the live frames of the records, whose numbers ascend.
func (b *outbox) moveRecords(m *mover, due []int) {
	c := copying{b: b}
	b.Scan(func(it *bridge.Item) bool {
		for it.Seq > b.recs[due[0]].last {
			c.end(m, due[0])
			if due = due[1:]; len(due) == 0 {
				return false
			}
		}
		if it.Seq >= b.recs[due[0]].first() && it.Class == route.Stored {
			c.add(it)
		}
		return true
	})
	if len(due) > 0 {
		c.end(m, due[0])
	}
}

// copying is one record as it is written again.
type copying struct {
	b      *outbox
	n      int
	live   uint32 // of them frames
	start  uint64
	packet bridge.Packet // what stands before the frames
	frames []byte
}

func (c *copying) add(it *bridge.Item) {
	if c.n == 0 {
		c.start, c.live, c.frames = it.Seq, 0, c.frames[:0]
		c.packet.Arrival, c.packet.First = it.Arrival, it.First
		c.packet.Hop = append(c.packet.Hop[:0], it.Hop...)
	}
	// A dropped frame in the middle keeps its place, empty: see recovery.
	for ; c.start+uint64(c.n) < it.Seq; c.n++ {
		c.frames = binary.AppendUvarint(c.frames, 0)
	}
	c.frames = binary.AppendUvarint(c.frames, uint64(len(it.Frame)))
	c.frames = append(c.frames, it.Frame...)
	c.n++
	c.live++
}

func (c *copying) record() []byte {
	return append(c.b.frameHead(nil, c.start, &c.packet, c.n), c.frames...)
}

// log appends what was added as a new record.
func (c *copying) log(who *wait) error {
	rec, r := c.record(), record{last: c.start + uint64(c.n) - 1, n: uint32(c.n), live: c.live}
	c.n = 0
	return c.b.log(rec, who, r)
}

// end writes what was added, in the place of record number i.
func (c *copying) end(m *mover, i int) {
	if c.n == 0 {
		return
	}
	r := &c.b.recs[i]
	rec := c.record()
	if seg, ok := m.append(recFrames, int64(r.size), rec); ok {
		r.seg, r.size = uint32(seg), uint32(len(rec)-seglog.Room)
	}
	c.n = 0
}

// find returns the number of the record, from head on, that has or would have a
// sequence.
func (b *outbox) find(seq uint64) int {
	i, _ := slices.BinarySearchFunc(b.recs[b.head:], seq, func(r record, seq uint64) int { return cmp.Compare(r.last, seq) })
	return b.head + i
}
