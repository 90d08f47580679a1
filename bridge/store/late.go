package store

import (
	"cmp"
	"slices"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// While the disk refuses writes, what comes is kept in memory alone: it takes none of the
// room in which the log cleans itself up. Its sender hears nothing until the disk has it,
// or until nobody needs it any more: so those whose targets read go on.

// wait is who waits for a record.
type wait struct {
	ticket      bridge.Ticket
	b           *outbox // whose frames; nil: it is not of frames
	first, last uint64  // the sequences of the packet's frames
}

// late is a packet that the disk refused, or that came while it refused others.
type late struct {
	wait
	logged bool // it is in the log, which has yet to write it
}

// committed answers those who waited for records that are written.
func (s *Store) committed(done []wait) {
	for i := range done {
		s.told = append(s.told, done[i].ticket)
	}
	bridge.DoneAll(s.told)
	clear(s.told)
	s.told = s.told[:0]
}

// withheld takes those who wait for frames that the disk refuses.
func (s *Store) withheld(waits []wait) (rest []wait) {
	rest = waits[:0]
	for _, w := range waits {
		if w.b == nil {
			rest = append(rest, w)
		} else {
			w.b.withheld(w)
		}
	}
	return rest
}

func (b *outbox) withheld(w wait) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gone(w) {
		b.s.answer(w.ticket)
		return
	}
	i, _ := b.findLate(w.last)
	b.late = slices.Insert(b.late, i, late{wait: w, logged: true})
	b.mark()
}

// gone reports whether nobody needs the frames any more. b.mu is held.
func (b *outbox) gone(w wait) bool {
	for seq := w.first; seq <= w.last; seq++ {
		if b.Frame(seq) != nil {
			return false
		}
	}
	return true
}

// findLate returns the number of the late packet that has or would have a sequence.
func (b *outbox) findLate(seq uint64) (i int, ok bool) {
	i, _ = slices.BinarySearchFunc(b.late, seq, func(l late, seq uint64) int { return cmp.Compare(l.last, seq) })
	return i, i < len(b.late) && seq >= b.late[i].first
}

// releasedLate answers what the target has taken before the disk did. b.mu is held.
func (b *outbox) releasedLate(upTo uint64) {
	n := 0
	for ; n < len(b.late) && b.late[n].last <= upTo; n++ {
		b.s.answer(b.late[n].ticket)
	}
	b.forgetLate(n)
}

func (b *outbox) forgetLate(n int) {
	if b.late = slices.Delete(b.late, 0, n); len(b.late) == 0 {
		b.late = nil
	}
}

// droppedLate answers the packet of a frame that was dropped if that was the last of its
// frames. b.mu is held.
func (b *outbox) droppedLate(seq uint64) {
	if i, ok := b.findLate(seq); ok && b.gone(b.late[i].wait) {
		b.s.answer(b.late[i].ticket)
		b.late = slices.Delete(b.late, i, i+1)
	}
}

// tellLate has those answered whose packets the log has by now: as soon as it has written
// what it is given now. b.mu is held.
func (b *outbox) tellLate() {
	var due later
	for len(due) < len(b.late) && b.late[len(due)].logged {
		due = append(due, b.late[len(due)].ticket)
	}
	if len(due) == 0 {
		return
	}
	w := wait{ticket: bridge.NewTicket(due, 0)}
	if _, err := b.s.log.Append(recTable, false, appendTable(nil, "", nil), &w); err == nil {
		b.forgetLate(len(due))
	}
}

// later are tickets that are done once another is.
type later []bridge.Ticket

// Acked implements bridge.Acker.
func (l later) Acked(uint64) { bridge.DoneAll(l) }

// writeLate appends to the log what is not there yet. b.mu is held.
func (b *outbox) writeLate() {
	due := b.late
	b.late = nil
	c := copying{b: b}
	end := func() {
		if c.n == 0 {
			b.s.answer(due[0].ticket) // there is nothing left of it
		} else {
			_ = c.log(&due[0].wait) // an error: the store is closed, and they hear nothing
		}
		due = due[1:]
	}
	b.Scan(func(it *bridge.Item) bool {
		for len(due) > 0 && it.Seq > due[0].last {
			end()
		}
		if len(due) == 0 {
			return false
		}
		if it.Seq < due[0].first || it.Class != route.Stored {
			return true
		}
		if len(c.frames) >= maxBody && c.n > 0 {
			_ = c.log(nil)
		}
		c.add(it)
		return true
	})
	for len(due) > 0 {
		end()
	}
}
