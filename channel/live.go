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
	due     atomic.Int64 // when the timer fires; 0 while it is off
	timer   *time.Timer
}

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

// forgive starts the wait anew.
func (l *liveness) forgive(c *Channel) {
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
	switch waiting := l.waiting.Load(); {
	case !c.e.online.Load():
		next = lim.Probe
	case waiting != 0:
		quiet := time.Duration(now - waiting)
		if quiet >= lim.Dead {
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
	l.due.Store(now + int64(min(next, 1<<61)))
	l.timer.Reset(next)
	if l.waiting.Load() != 0 && next > lim.Probe { // sent meanwhile
		l.due.Store(now + int64(lim.Probe))
		l.timer.Reset(lim.Probe)
	}
	if c.hasEnded() {
		l.timer.Stop()
	}
}
