package bridge

import (
	"errors"
	"math/bits"
	"sort"
	"sync"

	"github.com/sealmq/sealmq/route"
)

// The outbox in memory keeps frames back to back in chunks, and for each a slot
// of 24 bytes without a pointer, so that a million queued frames are a few
// thousand objects for the collector.
const (
	smallChunk = 1 << 10  // the first of an empty outbox
	largeChunk = 16 << 10 // the usual one
	hugeChunk  = 1 << 20  // the largest that is kept for reuse
	minRing    = 8
	keptRing   = 16      // slots that an empty outbox keeps
	pooledRing = 1 << 12 // the largest ring that is kept for reuse
)

type chunk struct {
	b    []byte // len is what is used
	live int    // entries in it that are still there
}

type slot struct {
	arrival int64
	seq     uint32 // the lower half
	chunk   uint32 // number of the chunk
	place   uint32 // offset of the hop in the chunk; in the lowest 8 bits its length
	sized   uint32 // length of the frame, which follows the hop; in the highest 4 bits flags
}

func (s *slot) off() int  { return int(s.place >> 8) }
func (s *slot) hop() int  { return int(s.place & 0xff) }
func (s *slot) size() int { return int(s.sized &^ (0xf << 28)) }

func (s *slot) is(flag uint32) bool { return s.sized&flag != 0 }

const (
	slotTransient = 1 << (28 + iota)
	slotFirst
	slotDropped
)

const (
	maxOffset = 1 << 24 // offsets in a chunk are below it
	// maxSpan is how far the oldest and the newest sequence may be apart, so
	// that their lower halves tell them apart.
	maxSpan = 1 << 31
	// keptDropped is how many slots of dropped frames an outbox keeps in any case.
	keptDropped = 64
)

// errSpan means that a peer took over two thousand million frames without
// acknowledging the first.
var errSpan = errors.New("bridge: the oldest frame has waited for too many others")

// chunkPools keeps chunks for reuse, by the binary logarithm of their size.
type chunkPools [21]sync.Pool

func (c *chunkPools) get(size int) *chunk {
	if size > hugeChunk {
		return &chunk{b: make([]byte, 0, size)}
	}
	if c, ok := c[bits.Len(uint(size-1))].Get().(*chunk); ok {
		return c
	}
	return &chunk{b: make([]byte, 0, size)}
}

func (c *chunkPools) put(old *chunk) {
	if size := cap(old.b); size <= hugeChunk {
		old.b = old.b[:0]
		c[bits.Len(uint(size-1))].Put(old)
	}
}

// ringPools keeps rings for reuse, by the binary logarithm of their length: the
// outbox of a device that reads is empty every few frames, and full again.
type ringPools [13]sync.Pool

// get returns a ring of size slots, a power of two, with any content.
func (r *ringPools) get(size int) *[]slot {
	if size <= pooledRing {
		if ring, ok := r[bits.Len(uint(size-1))].Get().(*[]slot); ok {
			return ring
		}
	}
	ring := make([]slot, size)
	return &ring
}

func (r *ringPools) put(ring *[]slot) {
	if ring != nil && len(*ring) <= pooledRing {
		r[bits.Len(uint(len(*ring)-1))].Put(ring)
	}
}

func newMemoryOutboxes() OutboxFactory {
	pools, rings := new(chunkPools), new(ringPools)
	return func(string, bool) (Outbox, error) { return &memoryOutbox{pools: pools, rings: rings, next: 1}, nil }
}

// memoryOutbox implements Outbox. Its owner's lock guards it.
type memoryOutbox struct {
	pools *chunkPools
	rings *ringPools

	ring []slot  // power of two; in order of sequence; the first is not a dropped one
	own  *[]slot // where the pool keeps it
	head int
	n    int
	dead int    // of them dropped
	next uint64 // the sequence of the next frame

	chunks  []*chunk // nil once recycled
	base    uint32   // number of chunks[0]
	limbo   []*chunk // to recycle once nobody reads
	reading bool
}

// at returns slot number i, the oldest being 0.
func (m *memoryOutbox) at(i int) *slot { return &m.ring[(m.head+i)&(len(m.ring)-1)] }

// seq returns a slot's sequence.
func (m *memoryOutbox) seq(s *slot) uint64 { return m.next - uint64(uint32(m.next)-s.seq) }

// find returns the number of the first slot from a sequence on.
func (m *memoryOutbox) find(seq uint64) int {
	if m.n == 0 {
		return 0
	}
	first := m.seq(m.at(0))
	if seq <= first {
		return 0
	}
	end := m.n
	if d := seq - first; d < uint64(m.n) { // no slot is further from the first than its sequence
		if m.at(int(d)).seq == uint32(seq) {
			return int(d)
		}
		end = int(d)
	}
	return sort.Search(end, func(i int) bool { return m.seq(m.at(i)) >= seq })
}

// live returns the slot of a frame that is there; nil when it is not.
func (m *memoryOutbox) live(seq uint64) *slot {
	if i := m.find(seq); i < m.n {
		if s := m.at(i); m.seq(s) == seq && !s.is(slotDropped) {
			return s
		}
	}
	return nil
}

func (m *memoryOutbox) Next() uint64 { return m.next }

func (m *memoryOutbox) Append(p *Packet, _ Ticket) (bytes int, stored bool, err error) {
	if m.n > 0 && m.next+uint64(p.Frames())-m.seq(m.at(0)) > maxSpan {
		return 0, false, errSpan
	}
	var flags uint32
	if p.Class == route.Transient {
		flags |= slotTransient
	}
	if p.First {
		flags |= slotFirst
	}
	hop := p.Hop
	if len(hop) > 255 {
		hop = nil
	}
	for i := range p.Frames() {
		size := p.Size(i)
		c, num := m.room(len(hop) + size)
		off := len(c.b)
		c.b = p.AppendTo(append(c.b, hop...), i)
		c.live++
		if m.n == len(m.ring) {
			m.grow()
		}
		size = len(c.b) - off - len(hop)
		m.ring[(m.head+m.n)&(len(m.ring)-1)] = slot{
			arrival: p.Arrival, seq: uint32(m.next), chunk: num, place: uint32(off<<8 | len(hop)), sized: uint32(size) | flags,
		}
		bytes += size
		m.next++
		m.n++
	}
	return bytes, true, nil
}

// room returns the last chunk if it has n bytes left, or a new one.
func (m *memoryOutbox) room(n int) (*chunk, uint32) {
	if k := len(m.chunks); k > 0 {
		if c := m.chunks[k-1]; c != nil && cap(c.b)-len(c.b) >= n && len(c.b) < maxOffset {
			return c, m.base + uint32(k-1)
		}
	}
	size := largeChunk
	switch {
	case n <= smallChunk && m.n == 0:
		size = smallChunk
	case n > hugeChunk:
		size = n
	case n > largeChunk:
		size = 1 << bits.Len(uint(n-1))
	}
	c := m.pools.get(size)
	if k := len(m.chunks); k > 0 && m.chunks[k-1] != nil && m.chunks[k-1].live == 0 {
		// The last chunk was kept for appending; it is full and empty now.
		m.recycle(m.base + uint32(k-1))
	}
	m.chunks = append(m.chunks, c)
	return c, m.base + uint32(len(m.chunks)-1)
}

// recycle gives a chunk without entries back, once nobody reads.
func (m *memoryOutbox) recycle(num uint32) {
	i := int(num - m.base)
	c := m.chunks[i]
	m.chunks[i] = nil
	if m.reading {
		m.limbo = append(m.limbo, c)
	} else {
		m.pools.put(c)
	}
	for i = 0; i < len(m.chunks) && m.chunks[i] == nil; i++ {
	}
	if i > 0 {
		m.base += uint32(i)
		m.chunks = m.chunks[:copy(m.chunks, m.chunks[i:])]
	}
}

func (m *memoryOutbox) grow() {
	m.resize(max(minRing, 2*len(m.ring)))
}

// resize moves the slots to a ring of another length.
func (m *memoryOutbox) resize(size int) {
	ring := m.rings.get(size)
	n := copy(*ring, m.ring[m.head:min(m.head+m.n, len(m.ring))])
	copy((*ring)[n:], m.ring[:m.n-n])
	m.rings.put(m.own)
	m.own, m.ring, m.head = ring, *ring, 0
}

func (m *memoryOutbox) frame(s *slot) []byte {
	start := s.off() + s.hop()
	end := start + s.size()
	return m.chunks[s.chunk-m.base].b[start:end:end]
}

func (m *memoryOutbox) entry(s *slot) Entry {
	e := Entry{Seq: m.seq(s), Frame: m.frame(s)}
	if s.is(slotTransient) {
		e.Class = route.Transient
	}
	return e
}

func (m *memoryOutbox) Read(from uint64, dst []Entry) []Entry {
	m.reading = true
	for i := m.find(from); i < m.n && len(dst) < cap(dst); i++ {
		if s := m.at(i); !s.is(slotDropped) {
			dst = append(dst, m.entry(s))
		}
	}
	return dst
}

func (m *memoryOutbox) Settle() {
	m.reading = false
	for i, c := range m.limbo {
		m.pools.put(c)
		m.limbo[i] = nil
	}
	m.limbo = m.limbo[:0]
}

func (m *memoryOutbox) Scan(f func(*Item) bool) {
	var it Item
	for seq := uint64(0); ; seq = it.Seq + 1 {
		i := m.find(seq)
		for i < m.n && m.at(i).is(slotDropped) {
			i++
		}
		if i >= m.n {
			return
		}
		s := m.at(i)
		hop := m.chunks[s.chunk-m.base].b[s.off() : s.off()+s.hop()]
		it = Item{Entry: m.entry(s), Arrival: s.arrival, First: s.is(slotFirst), Hop: hop}
		if !f(&it) {
			return
		}
	}
}

func (m *memoryOutbox) Drop(seq uint64) (int, bool) {
	s := m.live(seq)
	if s == nil {
		return 0, false
	}
	size := s.size()
	m.take(s)
	m.dead++
	m.popDropped()
	if m.dead > keptDropped && m.dead > m.n/2 {
		m.compact()
	}
	m.shrink()
	return size, true
}

// compact forgets the slots of dropped frames: behind one that is never
// acknowledged there may come and go any number of transient ones.
func (m *memoryOutbox) compact() {
	n := 0
	for i := range m.n {
		if s := m.at(i); !s.is(slotDropped) {
			*m.at(n) = *s
			n++
		}
	}
	m.n, m.dead = n, 0
}

// take marks a slot as gone and lets its chunk go when it was the last in it.
func (m *memoryOutbox) take(s *slot) {
	s.sized |= slotDropped
	c := m.chunks[s.chunk-m.base]
	if c.live--; c.live > 0 {
		return
	}
	if last := m.base + uint32(len(m.chunks)-1); s.chunk != last {
		m.recycle(s.chunk)
	} else if !m.reading {
		c.b = c.b[:0] // the one being filled: from the start again
	}
}

func (m *memoryOutbox) pop() {
	m.head = (m.head + 1) & (len(m.ring) - 1)
	m.n--
}

func (m *memoryOutbox) popDropped() {
	for m.n > 0 && m.ring[m.head].is(slotDropped) {
		m.pop()
		m.dead--
	}
}

func (m *memoryOutbox) Release(upTo uint64) (frames, bytes int) {
	for m.n > 0 && m.seq(&m.ring[m.head]) <= upTo {
		s := &m.ring[m.head]
		frames++
		bytes += s.size()
		m.take(s)
		m.pop()
		m.popDropped()
	}
	m.shrink()
	return frames, bytes
}

// shrink lets the memory of a past backlog go once the outbox is empty.
func (m *memoryOutbox) shrink() {
	if m.n > 0 {
		if len(m.ring) > keptRing && m.n < len(m.ring)/8 {
			m.resize(1 << bits.Len(uint(2*m.n)))
		}
		return
	}
	if len(m.ring) > keptRing {
		m.freeRing()
	}
	// An idle outbox holds no chunk: there may be very many of them.
	if k := len(m.chunks); k > 0 && m.chunks[k-1] != nil {
		m.recycle(m.base + uint32(k-1))
	}
}

func (m *memoryOutbox) Oldest() (int64, bool) {
	if m.n == 0 {
		return 0, false
	}
	return m.ring[m.head].arrival, true
}

func (m *memoryOutbox) Discard() {
	m.Release(m.next)
	m.freeRing()
}

func (m *memoryOutbox) freeRing() {
	m.rings.put(m.own)
	m.own, m.ring, m.head = nil, nil, 0
}
