package bridge

import (
	"math/bits"
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
	keptRing   = 16 // slots that an empty outbox keeps
)

type chunk struct {
	b    []byte // len is what is used
	live int    // entries in it that are still there
}

type slot struct {
	arrival int64
	chunk   uint32 // number of the chunk
	off     uint32 // of the hop; the frame follows it
	size    uint32 // of the frame
	hop     uint8  // length of the hop
	flags   uint8
}

const (
	slotTransient = 1 << iota
	slotFirst
	slotDropped
)

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

func newMemoryOutboxes() OutboxFactory {
	pools := new(chunkPools)
	return func(string, bool) (Outbox, error) { return &memoryOutbox{pools: pools, first: 1}, nil }
}

// memoryOutbox implements Outbox. Its owner's lock guards it.
type memoryOutbox struct {
	pools *chunkPools

	ring  []slot // power of two
	head  int
	n     int
	first uint64 // sequence of ring[head]

	chunks  []*chunk // nil once recycled
	base    uint32   // number of chunks[0]
	limbo   []*chunk // to recycle once nobody reads
	reading bool
}

func (m *memoryOutbox) at(seq uint64) *slot {
	return &m.ring[(m.head+int(seq-m.first))&(len(m.ring)-1)]
}

func (m *memoryOutbox) Next() uint64 { return m.first + uint64(m.n) }

func (m *memoryOutbox) Append(p *Packet, _ Ticket) (bytes int, stored bool, err error) {
	var flags uint8
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
		m.ring[(m.head+m.n)&(len(m.ring)-1)] = slot{
			arrival: p.Arrival, chunk: num, off: uint32(off), size: uint32(len(c.b) - off - len(hop)),
			hop: uint8(len(hop)), flags: flags,
		}
		bytes += len(c.b) - off - len(hop)
		m.n++
	}
	return bytes, true, nil
}

// room returns the last chunk if it has n bytes left, or a new one.
func (m *memoryOutbox) room(n int) (*chunk, uint32) {
	if k := len(m.chunks); k > 0 {
		if c := m.chunks[k-1]; c != nil && cap(c.b)-len(c.b) >= n {
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
	ring := make([]slot, max(minRing, 2*len(m.ring)))
	for i := range m.n {
		ring[i] = m.ring[(m.head+i)&(len(m.ring)-1)]
	}
	m.ring, m.head = ring, 0
}

func (m *memoryOutbox) entry(seq uint64, s *slot) Entry {
	c := m.chunks[s.chunk-m.base]
	start := int(s.off) + int(s.hop)
	e := Entry{Seq: seq, Frame: c.b[start : start+int(s.size) : start+int(s.size)]}
	if s.flags&slotTransient != 0 {
		e.Class = route.Transient
	}
	return e
}

func (m *memoryOutbox) Read(from uint64, dst []Entry) []Entry {
	m.reading = true
	end := m.Next()
	for seq := max(from, m.first); seq < end && len(dst) < cap(dst); seq++ {
		if s := m.at(seq); s.flags&slotDropped == 0 {
			dst = append(dst, m.entry(seq, s))
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
	for seq := m.first; seq < m.Next(); seq = max(seq+1, m.first) {
		s := m.at(seq)
		if s.flags&slotDropped != 0 {
			continue
		}
		hop := m.chunks[s.chunk-m.base].b[s.off : s.off+uint32(s.hop)]
		it = Item{Entry: m.entry(seq, s), Arrival: s.arrival, First: s.flags&slotFirst != 0, Hop: hop}
		if !f(&it) {
			return
		}
	}
}

func (m *memoryOutbox) Drop(seq uint64) (int, bool) {
	if seq < m.first || seq >= m.Next() {
		return 0, false
	}
	s := m.at(seq)
	if s.flags&slotDropped != 0 {
		return 0, false
	}
	m.take(s)
	for m.n > 0 && m.ring[m.head].flags&slotDropped != 0 {
		m.pop()
	}
	m.shrink()
	return int(s.size), true
}

// take marks a slot as gone and lets its chunk go when it was the last in it.
func (m *memoryOutbox) take(s *slot) {
	s.flags |= slotDropped
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
	m.first++
	m.n--
}

func (m *memoryOutbox) Release(upTo uint64) (frames, bytes int) {
	for m.n > 0 && m.first <= upTo {
		if s := &m.ring[m.head]; s.flags&slotDropped == 0 {
			frames++
			bytes += int(s.size)
			m.take(s)
		}
		m.pop()
	}
	for m.n > 0 && m.ring[m.head].flags&slotDropped != 0 {
		m.pop()
	}
	m.shrink()
	return frames, bytes
}

// shrink lets the memory of a past backlog go once the outbox is empty.
func (m *memoryOutbox) shrink() {
	if m.n > 0 {
		if len(m.ring) > keptRing && m.n < len(m.ring)/8 {
			ring := make([]slot, 1<<bits.Len(uint(2*m.n)))
			for i := range m.n {
				ring[i] = m.ring[(m.head+i)&(len(m.ring)-1)]
			}
			m.ring, m.head = ring, 0
		}
		return
	}
	if len(m.ring) > keptRing {
		m.ring, m.head = nil, 0
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
	m.Release(m.Next())
	m.ring, m.head = nil, 0
}
