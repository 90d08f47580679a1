package bridge

import (
	"sync/atomic"
	"time"
)

// clock measures ages with the monotonic clock, so that setting the wall clock
// neither expires everything at once nor keeps it for ever. Its own time is that of
// the wall when it was made and what has passed since; what is shown, signed or
// stored is the wall's.
type clock struct {
	wall  func() time.Time
	mono  func() time.Duration // since the clock was made
	start int64
	skew  atomic.Int64 // by how much the wall was set since, as last looked at
}

// stepped is the least by which a wall clock is taken to be set, not slewed.
const stepped = int64(time.Second)

// init takes the clocks to use; nil is the system's.
func (c *clock) init(now func() time.Time, mono func() time.Duration) {
	if c.wall = now; now == nil {
		c.wall = time.Now
	}
	start := c.wall()
	c.start = start.UnixNano()
	switch {
	case mono != nil:
		c.mono = mono
	case now != nil:
		c.mono = func() time.Duration { return now().Sub(start) }
	default:
		c.mono = func() time.Duration { return time.Since(start) }
	}
}

// now is the clock's own time in unix nanoseconds.
func (c *clock) now() int64 { return c.start + int64(c.mono()) }

// look notes whether the wall clock was set, and returns by how much since the last
// time.
func (c *clock) look() time.Duration {
	skew := c.wall().UnixNano() - c.now()
	was := c.skew.Load()
	if d := skew - was; d > stepped || d < -stepped {
		c.skew.Store(skew)
		return time.Duration(d)
	}
	return 0
}

// toWall and fromWall turn a time of the clock's own into one of the wall, and back.
// One that is yet to come, because the wall was set back between two processes, is
// taken for now.
func (c *clock) toWall(ns int64) time.Time { return time.Unix(0, ns+c.skew.Load()) }

func (c *clock) fromWall(t time.Time) int64 { return min(t.UnixNano()-c.skew.Load(), c.now()) }

// now returns the time of the bridge's clock in unix nanoseconds.
func (b *Bridge) now() int64 { return b.clock.now() }

// lookAtClock follows a wall clock that was set.
func (b *Bridge) lookAtClock() {
	by := b.clock.look()
	if by == 0 {
		return
	}
	b.cfg.Logger.Warn("the wall clock was set; ages go by the time that really passed", "by", by)
	if j, ok := b.cfg.Journal.(ClockJournal); ok {
		j.ClockSet(time.Duration(b.clock.skew.Load()))
	}
}
