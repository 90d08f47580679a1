package device

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/sealmq/sealmq/route"
)

// A frame that ends connections, because the hub or something before it cannot
// stand it, would otherwise be sent for ever and let nothing else through.
const (
	// killTime is how soon after a frame was sent a connection must end for the
	// frame to be suspected.
	killTime = 5 * time.Second
	// maxStrikes is how many connections in a row it may end before it is sent
	// alone.
	maxStrikes = 3
)

// suspect is a frame that is sent by itself.
type suspect struct {
	flow *flow
	seq  uint64
}

// unwanted reports whether whoever sent the frame has given up waiting for what it
// would bring.
func (e *entry) unwanted() bool {
	return e.call != nil && e.state == entryQueued && e.call.abandoned.Load()
}

// skipLocked drops the unwanted frames that would be next.
func (o *outbox) skipLocked(f *flow) {
	if f.next >= len(f.entries) || !f.entries[f.next].unwanted() {
		return
	}
	for f.next < len(f.entries) && f.entries[f.next].unwanted() {
		o.dropped[dropAbandoned]++
		o.leaveLocked(f, &f.entries[f.next])
		f.next++
	}
	o.trimLocked(f)
	o.grantLocked()
}

// index returns where the entry with that number is, or would be.
func (f *flow) index(seq uint64) int {
	i, _ := slices.BinarySearchFunc(f.entries, seq, func(e entry, seq uint64) int { return cmp.Compare(e.seq, seq) })
	return i
}

// strikeLocked notes what was in flight when the connection ended, and gives up a
// frame that ended it alone.
func (o *outbox) strikeLocked(now time.Time) {
	alone := o.alone
	o.endAloneLocked()
	for _, fl := range o.flights {
		soon := now.Sub(fl.at) < killTime
		for i := fl.flow.index(fl.first); i < len(fl.flow.entries) && fl.flow.entries[i].seq <= fl.last; i++ {
			e := &fl.flow.entries[i]
			switch {
			case e.state != entrySent:
			case !soon:
				e.strikes = 0
			case alone != nil && alone.seq == e.seq && e.strikes >= maxStrikes:
				o.failLocked(fl.flow, e)
			default:
				e.strikes = min(e.strikes+1, maxStrikes)
			}
		}
	}
}

// failLocked gives a frame up. Whom o.lost is for is told by detach.
func (o *outbox) failLocked(f *flow, e *entry) {
	err := fmt.Errorf("%w: %d bytes for %s", ErrFrameKills, len(e.body), route.Local(f.key))
	o.dropped[dropKills]++
	told := false
	for i := 0; i < len(o.flushers); i++ {
		if w := o.flushers[i]; e.seq <= w.upTo {
			told, w.err = true, err
			close(w.done)
			o.flushers = slices.Delete(o.flushers, i, i+1)
			i--
		}
	}
	switch {
	case e.call == nil:
	case e.call.lost != nil:
		lost := e.call.lost
		o.lost = append(o.lost, func() { lost(err) })
		told = true
	default:
		e.call.cancel(err)
		told = true
	}
	if !told {
		o.failed = err
	}
	if o.onFail != nil {
		o.onFail(err)
	}
	o.leaveLocked(f, e)
}

// suspectLocked begins to send the oldest suspect alone, if there is one.
func (o *outbox) suspectLocked() {
	if o.gen == 0 {
		return
	}
	for _, f := range o.flows {
		for i := range f.entries {
			e := &f.entries[i]
			if e.strikes >= maxStrikes && e.state != entryDone && (o.alone == nil || e.seq < o.alone.seq) {
				o.alone = &suspect{f, e.seq}
			}
		}
	}
}

// takeAloneLocked returns the next packet of the suspect's flow: one frame, with
// nothing else under way that a loss of the connection could be put down to. What
// was sent longer ago does not count: its acknowledgement may be withheld for as
// long as its target's queue is full.
func (o *outbox) takeAloneLocked() (packet, bool) {
	f := o.alone.flow
	o.skipLocked(f)
	i := f.index(o.alone.seq)
	if i >= len(f.entries) || f.entries[i].seq != o.alone.seq || f.entries[i].state == entryDone {
		o.releaseLocked() // it has left
		return packet{}, false
	}
	if f.entries[i].state == entrySent {
		return packet{}, false // its acknowledgement, or acquit, goes on
	}
	if wait := o.settledIn(time.Now()); wait > 0 {
		if o.aloneTimer == nil {
			gen := o.gen
			o.aloneTimer = time.AfterFunc(wait, func() { o.settled(gen) })
		}
		return packet{}, false
	}
	if o.aloneTimer != nil {
		o.aloneTimer.Stop()
		o.aloneTimer = nil
	}
	seq := f.entries[f.next].seq
	p := o.packLocked(f, 1)
	if seq == o.alone.seq {
		gen := o.gen
		o.aloneTimer = time.AfterFunc(killTime, func() { o.acquit(gen, seq) })
	}
	return p, true
}

// settledIn returns how long it takes until everything in flight has been there
// for killTime.
func (o *outbox) settledIn(now time.Time) time.Duration {
	var wait time.Duration
	for _, fl := range o.flights {
		wait = max(wait, killTime-now.Sub(fl.at))
	}
	return wait
}

// settled asks for the suspect's turn.
func (o *outbox) settled(gen uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen == gen {
		o.aloneTimer = nil
		o.signal()
	}
}

// acquit ends the test of a suspect that the connection has survived.
func (o *outbox) acquit(gen, seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen != gen || o.alone == nil || o.alone.seq != seq {
		return
	}
	if f := o.alone.flow; f.index(seq) < len(f.entries) && f.entries[f.index(seq)].seq == seq {
		f.entries[f.index(seq)].strikes = 0
	}
	o.releaseLocked()
}

// clearLocked notes acknowledged frames of a flow.
func (o *outbox) clearLocked(f *flow, first, last uint64) {
	if o.alone != nil && o.alone.flow == f && first <= o.alone.seq && o.alone.seq <= last {
		o.releaseLocked()
	}
}

// releaseLocked goes on with the next suspect, or with everything.
func (o *outbox) releaseLocked() {
	o.endAloneLocked()
	o.suspectLocked()
	if o.alone == nil {
		for _, f := range o.flows {
			o.listLocked(f)
		}
	}
	o.signal()
}

func (o *outbox) endAloneLocked() {
	o.alone = nil
	if o.aloneTimer != nil {
		o.aloneTimer.Stop()
		o.aloneTimer = nil
	}
}
