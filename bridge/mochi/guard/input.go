package guard

import (
	"cmp"
	"errors"
	"time"
)

const (
	// smallPacket is the longest packet that is not counted while it arrives.
	smallPacket = 16 << 10
	// packetTime is how long a longer packet may take from its header to its end.
	packetTime = time.Minute
)

// ErrInputFull ends a connection that sends a long packet while as many bytes of
// such packets are under way as Limits.Input allows.
var ErrInputFull = errors.New("guard: too many long packets under way")

// Arriving returns how many bytes the long packets have that have begun to
// arrive.
func (l *Limits) Arriving() int64 { return l.input.Load() }

// underway notes the length of the packet whose rest is still to come; 0: there
// is none. mochi makes room for the whole of a packet when it has read the
// header, so that a few bytes from each of many connections could take all
// memory. It is called on the reader goroutine.
func (c *Conn) underway(n int) error {
	if n <= smallPacket {
		n = 0
	}
	if n == c.announced {
		return nil
	}
	l := c.cfg.Limits
	total := l.input.Add(int64(n - c.announced))
	c.announced = n
	if n == 0 {
		if c.interval.Load() == 0 && c.settled.Load() { // no keepalive
			c.want.Store(0)
			if !c.lazy {
				_ = c.nc.SetReadDeadline(time.Time{})
			}
		}
		return nil
	}
	if most := cmp.Or(l.Input, DefaultInput); most >= 0 && total > most {
		c.cfg.Counters.add(InputFull)
		return ErrInputFull
	}
	end := time.Now().Add(packetTime)
	if want := c.want.Load(); want == 0 || want > ticks(end) {
		c.want.Store(ticks(end))
		c.armed.Store(ticks(end))
		_ = c.nc.SetReadDeadline(end)
	}
	return nil
}
