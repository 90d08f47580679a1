package device

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/sealmq/sealmq/route"
)

// A frame that ends connections, because the hub or something before it cannot
// stand it, would otherwise be sent for ever and let nothing else through. But
// connections end for other reasons, too, and a frame whose acknowledgement the hub
// withholds is there each time. So a frame that ended maxStrikes in a row is sent
// alone; if that ends, too, it is sent alone on connections that have lasted for some
// time without it, and given up if it ends maxTrials of those in a row. Before that
// time it is held back, and its flow with it. A connection that ends meanwhile speaks
// for it; one that ends when nothing was just sent speaks for all frames.
const (
	// killTime is how soon after a frame was sent a connection must end for the
	// frame to be suspected.
	killTime = 2 * time.Second
	// steadyTime is how long a connection must have lasted, and up to as much again at
	// random, so that it hardly ever ends by itself just then.
	steadyTime = 15 * time.Second
	maxStrikes = 3
	maxTrials  = 3
	// maxEnded is how many connections in a row a frame that is given up has ended.
	maxEnded = maxStrikes + 1 + maxTrials
)

// suspect is a frame that is sent by itself, or with those behind it that are suspected
// as well: the more, the more of them nothing has happened to. Where something does,
// fewer are sent the next time.
type suspect struct {
	flow *flow
	seq  uint64
	last uint64 // of what was sent with it; 0: it was not sent
}

// held reports whether the frame is sent on steady connections only.
func (e *entry) held() bool { return e.strikes > maxStrikes }

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
// frame that has ended too many.
func (o *outbox) strikeLocked(now time.Time) {
	alone := o.alone
	o.endAloneLocked()
	blamed := false
	for _, fl := range o.flights {
		soon := now.Sub(fl.at) < killTime
		for i := fl.flow.index(fl.first); i < len(fl.flow.entries) && fl.flow.entries[i].seq <= fl.last; i++ {
			e := &fl.flow.entries[i]
			switch {
			case e.state != entrySent:
				continue
			case !soon:
				e.strikes = 0
				continue
			case alone != nil && alone.seq == e.seq && fl.first == fl.last:
				e.strikes++
			case e.strikes < maxStrikes:
				e.strikes++
			}
			blamed = true
			if e.strikes >= maxEnded {
				o.failLocked(fl.flow, e)
			}
		}
	}
	if alone != nil && alone.last != 0 {
		return
	}
	for _, f := range o.flows {
		for i := range f.entries {
			switch e := &f.entries[i]; {
			case !blamed:
				e.strikes = 0
			case e.held(): // so it was not sent
				e.strikes--
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

// suspectLocked begins to send the oldest suspect alone, if there is one whose time has
// come.
func (o *outbox) suspectLocked() {
	if o.gen == 0 {
		return
	}
	wait := time.Until(o.steadyAt)
	held := false
	for _, f := range o.flows {
		for i := range f.entries {
			e := &f.entries[i]
			if e.strikes < maxStrikes || e.state == entryDone {
				continue
			}
			if e.held() && wait > 0 {
				held = true
			} else if o.alone == nil || e.seq < o.alone.seq {
				o.alone = &suspect{flow: f, seq: e.seq}
			}
			break // those behind it come after it
		}
	}
	if held && o.alone == nil {
		gen := o.gen
		o.aloneTimer = time.AfterFunc(wait, func() { o.steady(gen) })
	}
}

// steady begins with the suspects that were held back, now that the connection has lasted.
func (o *outbox) steady(gen uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen == gen && o.alone == nil {
		o.endAloneLocked()
		o.suspectLocked()
		o.signal()
	}
}

// takeAloneLocked returns the next packet of the suspect's flow: what is before it, or
// itself, with nothing else under way that a loss of the connection could be put down
// to. What was sent longer ago does not count: its acknowledgement may be withheld for as
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
	if before := i - f.next; before > 0 {
		return o.packLocked(f, min(before, bundleFrames)), true
	}
	gen, seq := o.gen, o.alone.seq
	if wait := o.settledIn(time.Now()); wait > 0 {
		if o.aloneTimer == nil {
			o.aloneTimer = time.AfterFunc(wait, func() { o.settled(gen) })
		}
		return packet{}, false
	}
	if o.aloneTimer != nil {
		o.aloneTimer.Stop()
	}
	most := o.together
	if f.entries[i].held() {
		most = 1
	}
	p := o.packLocked(f, most)
	o.alone.last = f.entries[f.next-1].seq
	o.aloneTimer = time.AfterFunc(killTime, func() { o.acquit(gen, seq) })
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

// acquit ends the test of suspects that the connection has survived.
func (o *outbox) acquit(gen, seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gen != gen || o.alone == nil || o.alone.seq != seq {
		return
	}
	f := o.alone.flow
	for i := f.index(seq); i < len(f.entries) && f.entries[i].seq <= o.alone.last; i++ {
		f.entries[i].strikes = 0
	}
	o.together = min(2*o.together, bundleFrames)
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
