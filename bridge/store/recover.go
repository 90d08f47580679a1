package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/seglog"
	"github.com/sealmq/sealmq/route"
)

// recovery rebuilds the queues and tables from the log, record by record.
type recovery struct {
	s     *Store
	dir   string
	boxes map[uint32]*recovered
	now   int64 // unix nanoseconds
}

// recovered is one name's queue while the log is read. Frames may come twice and
// out of order where records were moved.
type recovered struct {
	first  seglog.Place // of its first record that is left
	name   string
	seg    uint64
	named  bool
	floor  uint64 // everything up to it is gone
	top    uint64 // the highest sequence seen
	frames map[uint64]*frame
}

type frame struct {
	rec     *source // the newest that holds it
	arrival int64
	first   bool
	hop     []byte
	body    []byte
}

// source is a record of frames.
type source struct {
	seg  uint64
	size int
}

func (rc *recovery) box(id uint32, at seglog.Place) *recovered {
	b := rc.boxes[id]
	if b == nil {
		b = &recovered{first: at, frames: make(map[uint64]*frame)}
		rc.boxes[id] = b
	}
	return b
}

// record takes one record of the log.
func (rc *recovery) record(at seglog.Place, kind byte, body []byte) error {
	d := decoder{b: body}
	if kind == recTable {
		key, value := string(d.bytes()), d.b
		if d.bad {
			return fmt.Errorf("%w: table entry", errRecord)
		}
		if len(value) == 0 {
			delete(rc.s.tables, key)
			return nil
		}
		rc.s.tables[key] = &entry{seg: at.Segment, size: int64(len(body)), value: append([]byte(nil), value...)}
		return nil
	}
	id := d.u32()
	switch kind {
	case recName:
		b := rc.box(id, at)
		b.name, b.seg, b.named = string(d.b), at.Segment, true
		rc.s.nextID = max(rc.s.nextID, id+1)
	case recFrames:
		rc.frames(rc.box(id, at), at.Segment, len(body), &d)
	case recDone:
		seq := d.seq()
		rc.box(id, at).deliveredUpTo(seq)
	case recDrop:
		b, seq := rc.box(id, at), d.seq()
		delete(b.frames, seq)
		b.top = max(b.top, seq)
	case recDiscard:
		delete(rc.boxes, id)
	default:
		return fmt.Errorf("%w: kind %d", errRecord, kind)
	}
	if d.bad {
		return fmt.Errorf("%w: kind %d is cut short", errRecord, kind)
	}
	return nil
}

func (rc *recovery) frames(b *recovered, seg uint64, size int, d *decoder) {
	seq, arrival, flags, hop, n := d.seq(), int64(d.u64()), d.byte(), d.bytes(), d.uvarint()
	if d.bad || n == 0 || n > uint64(len(d.b)) {
		d.bad = true
		return
	}
	arrival = min(arrival, rc.now) // the clock may have been set back since
	hop = bytes.Clone(hop)
	d.b = bytes.Clone(d.b)
	src := &source{seg, size}
	for i := range n {
		body := d.bytes()
		if d.bad {
			return
		}
		if len(body) == 0 || seq+i <= b.floor {
			continue // dropped or delivered before the record was moved
		}
		b.frames[seq+i] = &frame{rec: src, arrival: arrival, first: flags&flagFirst != 0, hop: hop, body: body}
	}
	b.top = max(b.top, seq+n-1)
}

// check holds what was read to what a whole log holds.
func (rc *recovery) check() error {
	names := make(map[string]bool, len(rc.boxes))
	for _, r := range rc.boxes {
		switch {
		case !r.named:
			return r.first.Corrupt(rc.dir, "frames of a queue without a name: a file before this one is missing, or another folder's")
		case names[r.name]:
			return r.first.Corrupt(rc.dir, "two queues of one name")
		}
		names[r.name] = true
	}
	return nil
}

// finish turns what was read into outboxes and holds what is live.
func (rc *recovery) finish(rep *Report) error {
	s := rc.s
	for _, e := range s.tables {
		s.log.Hold(e.seg, 1, e.size)
	}
	for id, r := range rc.boxes {
		mem, err := s.memory(r.name, true)
		if err != nil {
			return err
		}
		b := &outbox{
			memory: mem.(memory), s: s, name: r.name, id: id, nameSeg: r.seg, named: true, done: r.floor, written: r.floor,
		}
		s.log.Hold(b.nameSeg, 1, b.nameSize())
		if err := b.fill(r); err != nil {
			return err
		}
		rep.Frames += len(r.frames)
		for _, f := range r.frames {
			rep.FrameBytes += int64(len(f.body))
		}
		s.byName[r.name], s.byID[id] = b, b
	}
	return nil
}

// deliveredUpTo forgets what was delivered.
func (r *recovered) deliveredUpTo(seq uint64) {
	if seq <= r.floor {
		return
	}
	if seq-r.floor > uint64(len(r.frames)) {
		for n := range r.frames {
			if n <= seq {
				delete(r.frames, n)
			}
		}
	} else {
		for n := r.floor + 1; n <= seq; n++ {
			delete(r.frames, n)
		}
	}
	r.floor, r.top = seq, max(r.top, seq)
}

// fill puts the recovered frames into the outbox, each at its sequence.
func (b *outbox) fill(r *recovered) error {
	seqs := slices.Sorted(maps.Keys(r.frames))
	if n := len(seqs); n > 0 && r.top-seqs[0] >= maxSpan {
		return fmt.Errorf("%w: frames %d and %d in one queue", errRecord, seqs[0], r.top)
	}
	b.Skip(r.floor + 1)
	var last *source
	for _, seq := range seqs {
		f := r.frames[seq]
		b.Skip(seq)
		if _, _, err := b.memory.Append(bridge.RoutedPacket(route.Stored, f.arrival, f.first, f.hop, f.body), bridge.Ticket{}); err != nil {
			return err
		}
		// One for each run of frames of one record: where a record was moved, what
		// is left of the old one must not be taken for what the new one holds.
		if f.rec != last {
			last = f.rec
			b.push(record{last: seq, n: 1, live: 1, seg: uint32(last.seg), size: uint32(last.size)})
			b.s.log.Hold(last.seg, 1, int64(last.size))
			continue
		}
		rec := &b.recs[len(b.recs)-1]
		rec.n += uint32(seq - rec.last)
		rec.last = seq
		rec.live++
	}
	b.Skip(r.top + 1)
	return nil
}

const (
	// maxSpan is how far the oldest and the newest frame of a queue may be apart.
	maxSpan = 1 << 31
	// maxSeq bounds sequences: no hub counts so far.
	maxSeq = 1 << 62
)

// decoder reads a record's fields; bad says that one was not there.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n uint64) []byte {
	if d.bad || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) u32() uint32 {
	if v := d.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if v := d.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func (d *decoder) seq() uint64 {
	n := d.u64()
	if n > maxSeq {
		d.bad = true
		return 0
	}
	return n
}

func (d *decoder) byte() byte {
	if v := d.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.bad = true
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bytes() []byte { return d.take(d.uvarint()) }
