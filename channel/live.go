package channel

import (
	"sync/atomic"
	"time"
)

// liveness notices a sealmq peer that no longer answers. Times are nanoseconds
// since the channel began, plus one so that 0 means never.
type liveness struct {
	born    time.Time
	last    atomic.Int64 // something authentic came
	waiting atomic.Int64 // since when something sent is without any answer
	suspect atomic.Int64 // when it was said that the peer has gone; 0: not, or it has answered
	due     atomic.Int64 // when the timer fires; 0 while it is off
	timer   *time.Timer
}

// suspectWait is how long a peer has to answer that is said to have gone.
const suspectWait = 2 * time.Second

func (l *liveness) now() int64 { return int64(time.Since(l.born)) + 1 }

func (l *liveness) lastTime() time.Time { return l.born.Add(time.Duration(l.last.Load())) }

func (l *liveness) received() {
	l.last.Store(l.now())
	l.waiting.Store(0)
}

// sent notes that an answer may be expected, and sees to it that its absence is
// noticed.
func (l *liveness) sent(c *Channel) {
	if l.waiting.Load() != 0 {
		return
	}
	now := l.now()
	if !l.waiting.CompareAndSwap(0, now) {
		return
	}
	probe := int64(c.e.limits.Probe)
	if due := l.due.Load(); due > now+probe && l.due.CompareAndSwap(due, now+probe) {
		l.timer.Reset(time.Duration(probe))
	}
}

// Suspect says that the peer may have gone. One that answers pings is asked, and given
// up as one that stopped answering (ErrSilent) where nothing comes from it for 2 s. It
// does nothing to a channel that is not Confirmed.
func (c *Channel) Suspect() {
	l := &c.live
	due := l.due.Load()
	if due == 0 {
		return
	}
	now := l.now()
	if !l.suspect.CompareAndSwap(0, now) {
		return
	}
	c.control(helloPing)
	if at := now + int64(suspectWait); due > at && l.due.CompareAndSwap(due, at) {
		l.timer.Reset(suspectWait)
	}
}

// forgive starts the wait anew.
func (l *liveness) forgive(c *Channel) {
	l.suspect.Store(0)
	if w := l.waiting.Load(); w != 0 {
		l.waiting.CompareAndSwap(w, l.now())
	}
}

// start begins to watch a peer that has said hello.
func (l *liveness) start(c *Channel) {
	if c.e.limits.Dead < 0 {
		return
	}
	d := int64(c.e.limits.Probe)
	if l.due.CompareAndSwap(0, l.now()+d) {
		l.timer.Reset(time.Duration(d))
	}
}

// check is the timer's function.
func (l *liveness) check(c *Channel) {
	if c.hasEnded() {
		return
	}
	lim := &c.e.limits
	now := l.now()
	next := time.Duration(1<<62 - 1)
	suspect := l.suspect.Load()
	late := suspect != 0 && now-suspect >= int64(suspectWait)
	if suspect != 0 && (l.last.Load() >= suspect || !c.e.online.Load() || late && l.waiting.Load() == 0) {
		l.suspect.CompareAndSwap(suspect, 0) // it has answered, or was not asked
		suspect, late = 0, false
	}
	switch waiting := l.waiting.Load(); {
	case !c.e.online.Load():
		next = lim.Probe
	case waiting != 0:
		quiet := time.Duration(now - waiting)
		if quiet >= lim.Dead || late {
			c.e.silent.Add(1)
			c.e.log.Info("peer stopped answering", "peer", c.peerID, "after", quiet)
			c.end(ErrSilent, byeSilent)
			return
		}
		next = lim.Probe - quiet
		if next <= 0 {
			c.control(helloPing)
			next = min(lim.Probe, lim.Dead-quiet)
		}
	case lim.Idle > 0:
		next = lim.Idle - time.Duration(now-l.last.Load())
		if next <= 0 {
			c.control(helloPing)
			next = lim.Probe
		}
	}
	if suspect != 0 {
		next = min(next, time.Duration(suspect-now)+suspectWait)
	}
	l.due.Store(now + int64(min(next, 1<<61)))
	l.timer.Reset(next)
	soonest := next // of what was sent or said meanwhile
	if l.waiting.Load() != 0 {
		soonest = min(soonest, lim.Probe)
	}
	if l.suspect.Load() != 0 {
		soonest = min(soonest, suspectWait)
	}
	if soonest < next {
		l.due.Store(now + int64(soonest))
		l.timer.Reset(soonest)
	}
	if c.hasEnded() {
		l.timer.Stop()
	}
}
