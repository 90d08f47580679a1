package guard

import (
	"cmp"
	"hash/maphash"
	"time"

	"github.com/sealmq/sealmq/internal/connlimit"
)

const (
	// smallPacket is the longest packet that is not counted while it arrives.
	smallPacket = 16 << 10
	// packetTime is how long a longer packet may take from its header to its end.
	packetTime = time.Minute
)

// ErrInputFull ends a connection that has most of what long packets under way hold,
// when they hold more than Limits.Input allows.
var ErrInputFull = &closedError{"guard: too many long packets under way; connection closed"}

// Arriving returns how many bytes are held of long packets that have begun to
// arrive.
func (l *Limits) Arriving() int64 { return l.input.Bytes() }

// SetUser says who the client is: one user's connections share a part of Limits.Input.
// An empty name makes it one of the strangers, who share less. Where it is not called
// Fixes takes the user name of the CONNECT. It must be called on the connection's reader
// goroutine, in a hook.
func (c *Conn) SetUser(name string) {
	c.known = true
	if c.user, c.stranger = 0, name == ""; !c.stranger {
		c.user = max(1, maphash.String(ownerSeed, name))
	}
}

// underway notes the length of the packet whose rest is still to come; 0: there
// is none, and nothing is held for it. It is called on the reader goroutine.
func (c *Conn) underway(n int) {
	if n <= smallPacket {
		n = 0
		_ = c.charge(0) // no error
	}
	if n == c.announced {
		return
	}
	c.announced = n
	if n == 0 {
		if c.interval.Load() == 0 && c.settled.Load() { // no keepalive
			c.want.Store(0)
			if !c.lazy {
				_ = c.nc.SetReadDeadline(time.Time{})
			}
		}
		return
	}
	end := time.Now().Add(packetTime)
	if want := c.want.Load(); want == 0 || want > ticks(end) {
		c.want.Store(ticks(end))
		c.armed.Store(ticks(end))
		_ = c.nc.SetReadDeadline(end)
	}
}

// charge notes how many bytes of memory are held for a long packet that is arriving.
// It is called on the reader goroutine, before the memory is read into.
func (c *Conn) charge(n int) error {
	if n <= smallPacket {
		n = 0
	}
	if n == c.charged {
		return nil
	}
	l, h := c.cfg.Limits, &c.arriving
	if h.End == nil {
		h.Network, h.End = connlimit.Network(c.nc.RemoteAddr()), c.noRoom
	}
	if c.charged == 0 {
		h.User, h.Stranger = c.user, c.stranger || !c.settled.Load()
	}
	c.charged = n
	if !l.input.Hold(h, int64(n), cmp.Or(l.Input, DefaultInput)) {
		c.cfg.Counters.add(InputFull)
		return ErrInputFull
	}
	return nil
}

// noRoom closes the connection for others that hold less.
func (c *Conn) noRoom() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail(ErrInputFull, InputFull)
}
