package store

import (
	"encoding/binary"
	"errors"
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
}

// record is one record of frames in the log that is still needed. There is one for
// each packet that waits, so it is kept small.
type record struct {
	last uint64 // the sequence of its last frame
	n    uint32 // sequences that it covers
	live uint32 // of them neither delivered nor dropped one by one
	seg  uint32
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
	seq, frames := b.Outbox.Next(), p.Frames()
	if bytes, _, err = b.Outbox.Append(p, t); err != nil {
		return 0, false, err
	}
	// Nearly always one record. A bundle of very many small frames can grow past
	// what one may hold, by what the hub puts in front of each.
	for from := 0; from < frames; {
		to, size := from+1, p.Size(from)
		for to < frames && size < maxBody {
			size += p.Size(to)
			to++
		}
		ticket := t
		if to < frames {
			ticket = bridge.Ticket{}
		}
		if err := b.write(p, ticket, seq+uint64(from), from, to); err != nil {
			for i := range frames {
				b.Outbox.Drop(seq + uint64(i))
			}
			return 0, false, err
		}
		from = to
	}
	return bytes, false, nil
}

// maxBody is the length in bytes at which a record takes no further frame.
const maxBody = 1 << 20

// write appends one record with the frames from up to to, the first of which has
// sequence seq.
func (b *outbox) write(p *bridge.Packet, t bridge.Ticket, seq uint64, from, to int) error {
	var flags byte
	if p.First {
		flags |= flagFirst
	}
	buf := scratch.Get().(*[]byte)
	body := b.frameHead((*buf)[:0], seq, p.Arrival, flags, p.Hop, to-from)
	for i := from; i < to; i++ {
		body = binary.AppendUvarint(body, uint64(p.Size(i)))
		body = p.AppendTo(body, i)
	}
	b.pending = append(b.pending, t)
	seg, err := b.s.log.Append(recFrames, true, b, 0, body)
	if err != nil {
		b.pending = b.pending[:len(b.pending)-1]
	} else {
		n := uint32(to - from)
		b.push(record{last: seq + uint64(n) - 1, n: n, live: n, seg: uint32(seg), size: uint32(len(body))})
	}
	if cap(body) <= maxScratch {
		*buf = body
		scratch.Put(buf)
	}
	return err
}

// scratch holds buffers in which records are put together.
var scratch = sync.Pool{New: func() any { return new([]byte) }}

// maxScratch is the largest buffer that is kept.
const maxScratch = 64 << 10

func (b *outbox) frameHead(dst []byte, seq uint64, arrival int64, flags byte, hop []byte, n int) []byte {
	dst = b.appendID(dst)
	dst = binary.BigEndian.AppendUint64(dst, seq)
	dst = binary.BigEndian.AppendUint64(dst, uint64(arrival))
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, uint64(len(hop)))
	dst = append(dst, hop...)
	return binary.AppendUvarint(dst, uint64(n))
}

// Committed implements seglog.Waiter: the oldest packet in flight is stored. It is
// answered with everything else that the same write has stored.
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
	b.s.due = append(b.s.due, t)
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
	// Every copy of the frame comes before this record, and goes before it.
	var buf [12]byte
	body := binary.BigEndian.AppendUint64(b.appendID(buf[:0]), seq)
	if _, err := b.s.log.Append(recDrop, false, nil, 0, body); err != nil {
		b.s.logger.Error("cannot write a drop; the frame may come back after a restart", "err", err)
	}
	return size, ok
}

// dropped takes one frame off its record; false when seq is of transient class.
func (b *outbox) dropped(seq uint64) bool {
	i := b.find(seq)
	if i == len(b.recs) || seq < b.recs[i].first() || b.recs[i].live == 0 {
		return false
	}
	r := &b.recs[i]
	if r.live--; r.live == 0 {
		b.s.log.Release(uint64(r.seg), 1, int64(r.size))
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
	var free run
	for i := b.head; i < len(b.recs) && b.recs[i].first() <= upTo; i++ {
		r := &b.recs[i]
		if r.last > upTo { // part of a bundle: the rest, if any is left, needs the record
			b.done = max(b.done, upTo)
			if r.live > 0 {
				if r.live = b.liveUpTo(r.last); r.live == 0 {
					free.add(b.s, r)
				}
			}
			break
		}
		if r.live > 0 {
			r.live = 0
			free.add(b.s, r)
		}
		b.done = max(b.done, r.last)
	}
	free.end(b.s)
	b.trim()
	if b.done > b.written && !b.queued {
		b.queued = true
		b.s.markDone(b)
	}
}

// run gathers records of one segment that are no longer needed, so that they cost
// one call of the log.
type run struct {
	seg     uint32
	n, size int64
}

func (f *run) add(s *Store, r *record) {
	if r.seg != f.seg {
		f.end(s)
		f.seg = r.seg
	}
	f.n++
	f.size += int64(r.size)
}

func (f *run) end(s *Store) {
	if f.n > 0 {
		s.log.Release(uint64(f.seg), f.n, f.size)
	}
	*f = run{}
}

// liveUpTo returns the number of frames of stored class up to a sequence.
func (b *outbox) liveUpTo(seq uint64) (n uint32) {
	b.Outbox.Scan(func(it *bridge.Item) bool {
		if it.Seq <= seq && it.Class == route.Stored {
			n++
		}
		return it.Seq < seq
	})
	return n
}

// flushDone writes what has been delivered since the last time.
func (b *outbox) flushDone() {
	b.queued = false
	if b.done <= b.written || !b.named {
		return
	}
	var buf [12]byte
	body := binary.BigEndian.AppendUint64(b.appendID(buf[:0]), b.done)
	if _, err := b.s.log.Append(recDone, false, nil, 0, body); err == nil {
		b.written = b.done
	}
}

// Discard implements bridge.Outbox.
func (b *outbox) Discard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Outbox.Discard()
	var free run
	for i := b.head; i < len(b.recs); i++ {
		if r := &b.recs[i]; r.live > 0 {
			free.add(b.s, r)
		}
	}
	free.end(b.s)
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
