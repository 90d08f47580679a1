package store

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// errDiscarded means that a queue was used after Discard.
var errDiscarded = errors.New("store: queue has been discarded")

// outbox is an outbox in memory whose stored frames are in the log too.
type outbox struct {
	bridge.Outbox // the frames, in memory
	s             *Store
	name          string
	id            uint32

	mu      sync.Mutex // guards Outbox and what follows; taken under the target's lock
	nameSeg uint64
	named   bool     // the name record is held
	recs    []record // of live frames, oldest first
	head    int      // recs before it are gone
	pending []bridge.Ticket
	first   int // pending before it have been answered

	done    uint64 // everything up to it is delivered
	written uint64 // as the log knows it
	queued  bool   // in Store.dirty
	scratch []byte
}

// record is one record of frames in the log that is still needed.
type record struct {
	last uint64 // the sequence of its last frame
	n    uint32 // frames that it was written with
	live uint32 // of them neither delivered nor dropped one by one
	seg  uint64
	size uint32
}

func (r *record) first() uint64 { return r.last - uint64(r.n) + 1 }

func (b *outbox) writeName() error {
	body := b.appendID(nil)
	body = append(body, b.name...)
	seg, err := b.s.log.Append(recName, true, nil, 0, body)
	if err != nil {
		return err
	}
	b.nameSeg, b.named = seg, true
	return nil
}

func (b *outbox) nameSize() int64 { return int64(4 + len(b.name)) }

func (b *outbox) appendID(dst []byte) []byte { return binary.BigEndian.AppendUint32(dst, b.id) }

// Append implements bridge.Outbox.
func (b *outbox) Append(p *bridge.Packet, t bridge.Ticket) (bytes int, stored bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.Class == route.Transient {
		return b.Outbox.Append(p, t)
	}
	if !b.named {
		return 0, false, errDiscarded
	}
	b.flushDone()
	seq := b.Outbox.Next()
	body := b.appendFrames(b.scratch[:0], p, seq)
	if cap(body) <= maxScratch {
		b.scratch = body
	}
	b.pending = append(b.pending, t)
	seg, err := b.s.log.Append(recFrames, true, b, 0, body)
	if err != nil {
		b.pending = b.pending[:len(b.pending)-1]
		return 0, false, err
	}
	n := p.Frames()
	b.push(record{last: seq + uint64(n) - 1, n: uint32(n), live: uint32(n), seg: seg, size: uint32(len(body))})
	bytes, _, err = b.Outbox.Append(p, t)
	return bytes, false, err
}

// maxScratch is the largest encoding buffer that an outbox keeps.
const maxScratch = 4 << 10

func (b *outbox) appendFrames(dst []byte, p *bridge.Packet, seq uint64) []byte {
	var flags byte
	if p.First {
		flags |= flagFirst
	}
	dst = b.frameHead(dst, seq, p.Arrival, flags, p.Hop, p.Frames())
	for i := range p.Frames() {
		dst = binary.AppendUvarint(dst, uint64(p.Size(i)))
		dst = p.AppendTo(dst, i)
	}
	return dst
}

func (b *outbox) frameHead(dst []byte, seq uint64, arrival int64, flags byte, hop []byte, n int) []byte {
	dst = b.appendID(dst)
	dst = binary.BigEndian.AppendUint64(dst, seq)
	dst = binary.BigEndian.AppendUint64(dst, uint64(arrival))
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, uint64(len(hop)))
	dst = append(dst, hop...)
	return binary.AppendUvarint(dst, uint64(n))
}

// Committed implements seglog.Waiter: the oldest packet in flight is stored.
func (b *outbox) Committed(uint64) {
	b.mu.Lock()
	t := b.pending[b.first]
	b.pending[b.first] = bridge.Ticket{}
	if b.first++; b.first == len(b.pending) {
		b.pending, b.first = b.pending[:0], 0
		if cap(b.pending) > maxPending {
			b.pending = nil
		}
	} else if b.first >= maxPending {
		b.pending = append(b.pending[:0], b.pending[b.first:]...)
		b.first = 0
	}
	b.mu.Unlock()
	t.Done()
}

// maxPending is how many slots an idle outbox keeps.
const maxPending = 64

// Read implements bridge.Outbox.
func (b *outbox) Read(from uint64, dst []bridge.Entry) []bridge.Entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Outbox.Read(from, dst)
}

// Settle implements bridge.Outbox.
func (b *outbox) Settle() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Outbox.Settle()
}

// Scan implements bridge.Outbox. What it shows stays valid, since only calls
// under the target's lock remove frames.
func (b *outbox) Scan(f func(*bridge.Item) bool) {
	// f may call Drop, so b.mu is not held; relocation only reads.
	b.Outbox.Scan(f)
}

// Drop implements bridge.Outbox.
func (b *outbox) Drop(seq uint64) (int, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	size, ok := b.Outbox.Drop(seq)
	if !ok || !b.dropped(seq) {
		return size, ok // a transient one leaves nothing on disk
	}
	body := binary.BigEndian.AppendUint64(b.appendID(b.scratch[:0]), seq)
	b.scratch = body
	if _, err := b.s.log.Append(recDrop, true, nil, 0, body); err != nil {
		b.s.logger.Error("cannot write a drop; the frame may come back after a restart", "err", err)
	}
	return size, ok
}

// dropped takes one frame off its record; false when seq is of transient class.
func (b *outbox) dropped(seq uint64) bool {
	live := b.recs[b.head:]
	i, _ := slices.BinarySearchFunc(live, seq, func(r record, seq uint64) int { return cmp.Compare(r.last, seq) })
	if i == len(live) || seq < live[i].first() || live[i].live == 0 {
		return false
	}
	if live[i].live--; live[i].live == 0 {
		b.s.log.Release(live[i].seg, 1, int64(live[i].size))
	}
	b.trim()
	return true
}

func (b *outbox) push(r record) {
	if b.head > 0 && len(b.recs) == cap(b.recs) && 2*b.head >= len(b.recs) {
		b.recs = b.recs[:copy(b.recs, b.recs[b.head:])]
		b.head = 0
	}
	b.recs = append(b.recs, r)
}

// trim forgets records that nothing is left of.
func (b *outbox) trim() {
	for b.head < len(b.recs) && b.recs[b.head].live == 0 {
		b.head++
	}
	if b.head == len(b.recs) {
		b.recs, b.head = b.recs[:0], 0
		if cap(b.recs) > maxPending {
			b.recs = nil
		}
	}
}

// Release implements bridge.Outbox.
func (b *outbox) Release(upTo uint64) (frames, bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	frames, bytes = b.Outbox.Release(upTo)
	b.released(upTo)
	return frames, bytes
}

// released notes that everything up to a sequence is delivered.
func (b *outbox) released(upTo uint64) {
	upTo = min(upTo, b.Outbox.Next()-1)
	for i := b.head; i < len(b.recs) && b.recs[i].first() <= upTo; i++ {
		r := &b.recs[i]
		if r.last > upTo {
			break // part of a bundle: the rest needs the record
		}
		if r.live > 0 {
			r.live = 0
			b.s.log.Release(r.seg, 1, int64(r.size))
		}
		b.done = max(b.done, r.last)
	}
	b.trim()
	if b.head < len(b.recs) && b.recs[b.head].first() <= upTo {
		b.done = max(b.done, upTo)
	}
	if b.done > b.written && !b.queued {
		b.queued = true
		b.s.markDone(b)
	}
}

// flushDone writes what has been delivered since the last time.
func (b *outbox) flushDone() {
	b.queued = false
	if b.done <= b.written || !b.named {
		return
	}
	b.scratch = binary.BigEndian.AppendUint64(b.appendID(b.scratch[:0]), b.done)
	if _, err := b.s.log.Append(recDone, false, nil, 0, b.scratch); err == nil {
		b.written = b.done
	}
}

// Discard implements bridge.Outbox.
func (b *outbox) Discard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Outbox.Discard()
	for i := b.head; i < len(b.recs); i++ {
		if r := &b.recs[i]; r.live > 0 {
			b.s.log.Release(r.seg, 1, int64(r.size))
		}
	}
	b.recs, b.head = nil, 0
	b.done = b.Outbox.Next() - 1
	b.written = b.done
	if !b.named {
		return
	}
	if _, err := b.s.log.Append(recDiscard, false, nil, 0, b.appendID(nil)); err != nil {
		b.s.logger.Error("cannot write that a queue is gone; it may come back after a restart", "err", err)
	}
	b.s.log.Release(b.nameSeg, 1, b.nameSize())
	b.named = false
	b.s.forget(b)
}

// relocate appends what is live of a segment again. b.mu is held.
func (b *outbox) relocate(seg uint64) {
	if b.named && b.nameSeg == seg {
		body := append(b.appendID(nil), b.name...)
		if n, err := b.s.log.Append(recName, true, &moved{b.s.log, seg, b.nameSize()}, 0, body); err == nil {
			b.nameSeg = n
		}
	}
	for i := b.head; i < len(b.recs); i++ {
		if b.recs[i].seg == seg && b.recs[i].live > 0 {
			b.moveRecord(&b.recs[i])
		}
	}
}

// moveRecord appends the live frames of one record again.
func (b *outbox) moveRecord(r *record) {
	var (
		n           int
		start       uint64
		frames, hop []byte
		head        bridge.Item
	)
	b.Outbox.Scan(func(it *bridge.Item) bool {
		if it.Seq > r.last {
			return false
		}
		if it.Seq < r.first() || it.Class == route.Transient {
			return true
		}
		if n == 0 {
			head, start, hop = *it, it.Seq, append(hop[:0], it.Hop...)
		}
		// A dropped frame in the middle keeps its place, empty: see recovery.
		for ; start+uint64(n) < it.Seq; n++ {
			frames = binary.AppendUvarint(frames, 0)
		}
		frames = binary.AppendUvarint(frames, uint64(len(it.Frame)))
		frames = append(frames, it.Frame...)
		n++
		return true
	})
	if n == 0 {
		return
	}
	var flags byte
	if head.First {
		flags |= flagFirst
	}
	body := append(b.frameHead(nil, start, head.Arrival, flags, hop, n), frames...)
	if seg, err := b.s.log.Append(recFrames, true, &moved{b.s.log, r.seg, int64(r.size)}, 0, body); err == nil {
		r.seg, r.size = seg, uint32(len(body))
	}
}
