package store

import (
	"encoding/binary"
	"errors"
	"sync"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/seglog"
	"github.com/sealmq/sealmq/route"
)

// errDiscarded means that a queue was used after Discard.
var errDiscarded = errors.New("store: queue has been discarded")

// memory is what bridge.MemoryOutboxes makes.
type memory interface {
	bridge.Outbox
	Frame(seq uint64) []byte
	Skip(to uint64)
}

// outbox is an outbox in memory whose stored frames are in the log too.
type outbox struct {
	memory // the frames
	s      *Store
	name   string
	id     uint32

	mu      sync.Mutex // guards changes of memory and what follows; taken under the target's lock
	nameSeg uint64
	named   bool     // the name record is held
	recs    []record // of live frames, oldest first
	head    int      // recs before it are gone

	late    []late // what came while the disk refused writes
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
	seg, err := b.s.log.Append(recName, true, b.nameRecord(), nil)
	if err != nil {
		return err
	}
	b.nameSeg, b.named = seg, true
	return nil
}

func (b *outbox) nameRecord() []byte { return append(b.newRecord(nil), b.name...) }

func (b *outbox) nameSize() int64 { return int64(4 + len(b.name)) }

// newRecord appends what every record of a queue begins with.
func (b *outbox) newRecord(dst []byte) []byte {
	return binary.BigEndian.AppendUint32(newRecord(dst), b.id)
}

// Append implements bridge.Outbox.
func (b *outbox) Append(p *bridge.Packet, t bridge.Ticket) (bytes int, stored bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.Class == route.Transient {
		return b.memory.Append(p, t)
	}
	if !b.named {
		return 0, false, errDiscarded
	}
	seq, frames := b.Next(), p.Frames()
	if bytes, _, err = b.memory.Append(p, t); err != nil {
		return 0, false, err
	}
	w := wait{ticket: t, b: b, first: seq, last: seq + uint64(frames) - 1}
	if len(b.late) > 0 || b.s.log.Failing() {
		b.late = append(b.late, late{wait: w})
		b.mark()
		return bytes, false, nil
	}
	// Nearly always one record. A bundle of very many small frames can grow past
	// what one may hold, by what the hub puts in front of each.
	for end := seq + uint64(frames); seq < end; {
		if seq, err = b.write(p, &w, seq, end); err != nil {
			for ; frames > 0; frames-- {
				b.memory.Drop(end - uint64(frames))
			}
			return 0, false, err
		}
	}
	return bytes, false, nil
}

// maxBody is the length in bytes at which a record takes no further frame.
const maxBody = 1 << 20

// write appends a record with the frames of p from a sequence on, as many as it takes,
// and returns the sequence of the next one. who waits goes with the one before end.
func (b *outbox) write(p *bridge.Packet, who *wait, seq, end uint64) (next uint64, err error) {
	n, size := 1, 0
	for ; seq+uint64(n) < end; n++ {
		if size += len(b.Frame(seq + uint64(n) - 1)); size >= maxBody {
			break
		}
	}
	w := writers.Get().(*writer)
	defer w.put()
	w.record = b.frameHead(w.record[:0], seq, p, n)
	for next = seq; next < seq+uint64(n); next++ {
		frame := b.Frame(next)
		w.record = binary.AppendUvarint(w.record, uint64(len(frame)))
		w.record = append(w.record, frame...)
	}
	if next < end {
		who = nil
	}
	return next, b.log(w.record, who, record{last: next - 1, n: uint32(n), live: uint32(n)})
}

// log appends a record of frames that no record has. b.mu is held.
func (b *outbox) log(rec []byte, who *wait, r record) error {
	seg, err := b.s.log.Append(recFrames, true, rec, who)
	if err != nil {
		return err
	}
	r.seg, r.size = uint32(seg), uint32(len(rec)-seglog.Room)
	b.push(r)
	return nil
}

// writer is what a record is put together in.
type writer struct{ record []byte }

var writers = sync.Pool{New: func() any { return new(writer) }}

// maxScratch is the largest buffer that is kept.
const maxScratch = 64 << 10

func (w *writer) put() {
	if cap(w.record) <= maxScratch {
		writers.Put(w)
	}
}

// frameHead appends what stands before the n frames of a record.
func (b *outbox) frameHead(dst []byte, seq uint64, p *bridge.Packet, n int) []byte {
	var flags byte
	if p.First {
		flags |= flagFirst
	}
	dst = b.newRecord(dst)
	dst = binary.BigEndian.AppendUint64(dst, seq)
	dst = binary.BigEndian.AppendUint64(dst, uint64(p.Arrival+b.s.ahead.Load()))
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, uint64(len(p.Hop)))
	dst = append(dst, p.Hop...)
	return binary.AppendUvarint(dst, uint64(n))
}

// maxPending is how many slots an idle outbox keeps.
const maxPending = 64

// Read, Settle, Scan, Next and Oldest are those of the memory: they are called under
// the target's lock, as is all that changes it, and relocation, which holds b.mu alone,
// only scans.

// Drop implements bridge.Outbox.
func (b *outbox) Drop(seq uint64) (int, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	size, ok := b.memory.Drop(seq)
	if !ok || !b.dropped(seq) {
		b.droppedLate(seq)
		return size, ok // a transient one leaves nothing on disk
	}
	// Every copy of the frame comes before this record, and goes before it.
	var buf [seglog.Room + 12]byte
	record := binary.BigEndian.AppendUint64(b.newRecord(buf[:0]), seq)
	if _, err := b.s.log.Append(recDrop, false, record, nil); err != nil {
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
	frames, bytes = b.memory.Release(upTo)
	b.released(upTo)
	b.releasedLate(upTo)
	return frames, bytes
}

// released notes that everything up to a sequence is delivered.
func (b *outbox) released(upTo uint64) {
	if upTo = min(upTo, b.Next()-1); upTo <= b.done { // acknowledgements may overtake each other
		return
	}
	var free run
	for i := b.head; i < len(b.recs) && b.recs[i].first() <= upTo; i++ {
		r := &b.recs[i]
		if r.last > upTo { // part of a record: the rest, if any is left, needs it
			if left := r.last - max(b.done, r.first()-1); uint64(r.live) == left { // none was dropped
				r.live = uint32(r.last - upTo)
			} else if r.live > 0 {
				if r.live = b.liveUpTo(r.last); r.live == 0 {
					free.add(b.s, r)
				}
			}
			b.done = max(b.done, upTo)
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
	if b.done > b.written {
		b.mark()
	}
}

// mark has flush called soon.
func (b *outbox) mark() {
	if !b.queued {
		b.queued = true
		b.s.mark(b)
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
	b.Scan(func(it *bridge.Item) bool {
		if it.Seq <= seq && it.Class == route.Stored {
			n++
		}
		return it.Seq < seq
	})
	return n
}

// flush writes what the disk has not taken yet, and what has been delivered since the last
// time; as long as the disk refuses, it has itself called again.
func (b *outbox) flush() {
	b.queued = false
	switch {
	case b.s.log.Failing():
		if len(b.late) > 0 || b.done > b.written {
			b.mark()
		}
		return
	case len(b.late) > 0:
		b.tellLate()
		b.writeLate()
	}
	if b.done <= b.written || !b.named {
		return
	}
	var buf [seglog.Room + 12]byte
	record := binary.BigEndian.AppendUint64(b.newRecord(buf[:0]), b.done)
	if _, err := b.s.log.Append(recDone, false, record, nil); err == nil {
		b.written = b.done
	}
}

// Discard implements bridge.Outbox.
func (b *outbox) Discard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.memory.Discard()
	for _, l := range b.late {
		b.s.answer(l.ticket)
	}
	b.late = nil
	var free run
	for i := b.head; i < len(b.recs); i++ {
		if r := &b.recs[i]; r.live > 0 {
			free.add(b.s, r)
		}
	}
	free.end(b.s)
	b.recs, b.head = nil, 0
	b.done = b.Next() - 1
	b.written = b.done
	if !b.named {
		return
	}
	if _, err := b.s.log.Append(recDiscard, false, b.newRecord(nil), nil); err != nil {
		b.s.logger.Error("cannot write that a queue is gone; it may come back after a restart", "err", err)
	}
	b.s.log.Release(b.nameSeg, 1, b.nameSize())
	b.named = false
	b.s.forget(b)
}
