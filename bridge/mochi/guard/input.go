package guard

import (
	"cmp"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"github.com/sealmq/sealmq/internal/connlimit"
)

const (
	// smallPacket is the longest packet that is not counted while it arrives.
	smallPacket = 16 << 10
	// packetTime is how long a longer packet may take from its header to its end.
	packetTime = time.Minute
	// strangersShare is the part of Limits.Input, one in so many, for all connections
	// together of whom the server does not know yet who they are.
	strangersShare = 4
	// inputLook is how many connections are looked at for the one that has most.
	inputLook = 256
)

// ErrInputFull ends a connection that has most of what long packets under way hold,
// when they hold more than Limits.Input allows.
var ErrInputFull = &closedError{"guard: too many long packets under way; connection closed"}

// input is what the long packets under way hold, and who has how much of it.
type input struct {
	mu        sync.Mutex
	total     tally
	strangers tally
	networks  map[netip.Prefix]*tally
	users     map[uint64]*tally
	holders   map[*Conn]struct{}
}

// tally is what the connections of one network, or of one user, hold together.
type tally struct {
	bytes int64
	conns int
}

// arriving is one connection's part. The tallies are set while it has one.
type arriving struct {
	bytes         int64
	network, user *tally // user: nil where there is none
	stranger      bool
	cut           bool // others needed its room
}

// Arriving returns how many bytes are held of long packets that have begun to
// arrive.
func (l *Limits) Arriving() int64 {
	l.input.mu.Lock()
	defer l.input.mu.Unlock()
	return l.input.total.bytes
}

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
	c.charged = n
	victims, ok := c.cfg.Limits.charge(c, int64(n))
	for _, v := range victims {
		v.mu.Lock()
		v.fail(ErrInputFull, InputFull)
		v.mu.Unlock()
	}
	if !ok {
		c.cfg.Counters.add(InputFull)
		return ErrInputFull
	}
	return nil
}

// charge has c hold n bytes. Where that is too much, those who hold most are to be
// closed; it is not ok when c is one of them.
func (l *Limits) charge(c *Conn, n int64) (victims []*Conn, ok bool) {
	in, most := &l.input, cmp.Or(l.Input, DefaultInput)
	in.mu.Lock()
	defer in.mu.Unlock()
	a := &c.arriving
	if a.cut { // and counted
		return nil, true
	}
	grows := n > a.bytes
	in.set(c, n)
	for most >= 0 && grows {
		among := in.over(a, most)
		if among == nil {
			break
		}
		v := in.worst(c, among)
		in.set(v, 0)
		v.arriving.cut = true
		if v == c {
			return victims, false
		}
		victims = append(victims, v)
	}
	return victims, true
}

// set changes what c holds; in.mu is held.
func (in *input) set(c *Conn, n int64) {
	a := &c.arriving
	if a.bytes == 0 && n > 0 {
		if in.holders == nil {
			in.holders = make(map[*Conn]struct{})
			in.networks, in.users = make(map[netip.Prefix]*tally), make(map[uint64]*tally)
		}
		in.holders[c] = struct{}{}
		a.network = count(in.networks, connlimit.Network(c.nc.RemoteAddr()))
		if c.user != 0 {
			a.user = count(in.users, c.user)
		}
		in.total.conns++
		if a.stranger = c.stranger || !c.settled.Load(); a.stranger {
			in.strangers.conns++
		}
	}
	more := n - a.bytes
	a.bytes = n
	in.total.bytes += more
	if a.network == nil {
		return
	}
	a.network.bytes += more
	if a.user != nil {
		a.user.bytes += more
	}
	if a.stranger {
		in.strangers.bytes += more
	}
	if n > 0 {
		return
	}
	delete(in.holders, c)
	in.total.conns--
	if a.stranger {
		in.strangers.conns--
	}
	discount(in.networks, connlimit.Network(c.nc.RemoteAddr()), a.network)
	if a.user != nil {
		discount(in.users, c.user, a.user)
	}
	a.network, a.user = nil, nil
}

func count[K comparable](m map[K]*tally, k K) *tally {
	t := m[k]
	if t == nil {
		t = new(tally)
		m[k] = t
	}
	t.conns++
	return t
}

func discount[K comparable](m map[K]*tally, k K, t *tally) {
	if t.conns--; t.conns == 0 {
		delete(m, k)
	}
}

// over returns what decides whether a connection is among those who have too much
// together, one of which is a's; nil: nobody has. One connection alone may have more
// than its share. in.mu is held.
func (in *input) over(a *arriving, most int64) (among func(*arriving) bool) {
	exceeds := func(t *tally, most int64) bool { return t.bytes > most && t.conns > 1 }
	switch {
	case a.stranger && exceeds(&in.strangers, most/strangersShare):
		return func(o *arriving) bool { return o.stranger }
	case exceeds(a.network, most/2):
		return func(o *arriving) bool { return o.network == a.network }
	case a.user != nil && exceeds(a.user, most/2):
		return func(o *arriving) bool { return o.user == a.user }
	case in.total.bytes > most:
		return func(*arriving) bool { return true }
	}
	return nil
}

// worst returns whose network has most, or else whose user, or else who; c, if nobody
// of a number chosen at random has more. in.mu is held.
func (in *input) worst(c *Conn, among func(*arriving) bool) *Conn {
	worst, looked := c, 0
	for o := range in.holders {
		if o != worst && among(&o.arriving) && o.arriving.compare(&worst.arriving) > 0 {
			worst = o
		}
		if looked++; looked == inputLook {
			break
		}
	}
	return worst
}

func (a *arriving) compare(o *arriving) int {
	mine, others := a.bytes, o.bytes
	if a.user != nil {
		mine = a.user.bytes
	}
	if o.user != nil {
		others = o.user.bytes
	}
	return cmp.Or(cmp.Compare(a.network.bytes, o.network.bytes), cmp.Compare(mine, others), cmp.Compare(a.bytes, o.bytes))
}
