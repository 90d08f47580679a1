package guard

import (
	"net"
	"sync"
)

const (
	segmentSize = 16 << 10 // bytes in one pooled segment: one TLS record, a handful of them one writev
	refSize     = 4 << 10  // payloads from this size on are queued by reference, not copied
)

// segment is a piece of pooled output memory; b[:n] is in use.
type segment struct {
	n int
	b [segmentSize]byte
}

var segments = sync.Pool{New: func() any { return new(segment) }}

// batch is output in order, the unit that the flusher takes and writes. Its
// buffers are parts of segs or, from refSize on, the callers' own immutable
// bytes.
type batch struct {
	bufs net.Buffers
	segs []*segment
	size int
	open bool // the last buffer is the tail of the last segment and may grow

	out net.Buffers // what is left to write; a field so that writing does not allocate
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// space returns the unused bytes of the last segment, at least one of them, and
// makes the last buffer end where they begin.
func (b *batch) space() *segment {
	var s *segment
	if n := len(b.segs); n > 0 && b.segs[n-1].n < segmentSize {
		s = b.segs[n-1]
	} else {
		s = segments.Get().(*segment)
		s.n = 0
		b.segs = append(b.segs, s)
		b.open = false
	}
	if !b.open {
		b.bufs = append(b.bufs, s.b[s.n:s.n])
		b.open = true
	}
	return s
}

// copy appends a copy of p.
func (b *batch) copy(p []byte) {
	b.size += len(p)
	for len(p) > 0 {
		s := b.space()
		n := copy(s.b[s.n:], p)
		s.n += n
		last := &b.bufs[len(b.bufs)-1]
		*last = (*last)[:len(*last)+n]
		p = p[n:]
	}
}

// copyString appends a copy of p.
func (b *batch) copyString(p string) {
	b.size += len(p)
	for len(p) > 0 {
		s := b.space()
		n := copy(s.b[s.n:], p)
		s.n += n
		last := &b.bufs[len(b.bufs)-1]
		*last = (*last)[:len(*last)+n]
		p = p[n:]
	}
}

// refer appends p itself, which nobody may change any more.
func (b *batch) refer(p []byte) {
	b.size += len(p)
	b.bufs = append(b.bufs, p)
	b.open = false
}

// free gives the memory back.
func (b *batch) free() {
	for i, s := range b.segs {
		segments.Put(s)
		b.segs[i] = nil
	}
	clear(b.bufs[:cap(b.bufs)])
	if cap(b.bufs) > 256 {
		b.bufs = nil
	}
	b.bufs, b.segs, b.out = b.bufs[:0], b.segs[:0], nil
	b.size, b.open = 0, false
	batches.Put(b)
}
