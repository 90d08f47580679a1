// Package connlimit bounds open connections, in all and for each address, and
// those that have not shown yet that they are worth a place. The hub's fronts
// share it.
package connlimit

import (
	"cmp"
	"container/list"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of Limits.
const (
	DefaultConns      = 65_536
	DefaultPerAddress = 16_384
	DefaultPending    = 4_096
)

// Limits bounds open connections. One value may be shared by several listeners,
// which then share the bounds. Zero fields mean the defaults, negative ones no
// limit; they must not be changed once a listener uses the value. The zero value
// is ready for use; all methods are safe for concurrent use.
type Limits struct {
	// Conns is the number of connections in all.
	Conns int
	// PerAddress is the number of connections from one IP address, or from one
	// /64 network in IPv6. Behind a reverse proxy every client has the proxy's
	// address.
	PerAddress int
	// Pending is the number of connections that have not been accepted by the
	// protocol above yet. A quarter of them is kept for others than the address that
	// has most. Where it, or another limit, is reached a newcomer takes the place of the
	// connection that has been silent longest, if one yields (Ticket.Yield).
	Pending int

	mu       sync.Mutex
	conns    int
	pending  int
	from     map[netip.Prefix]counts
	yielding list.List // of the *Tickets that yield now, longest silent first
}

// grace is how long a pending connection may be silent and keep its place whoever
// comes, so that many who come at once don't end each other.
const grace = time.Second

// maxUnread is how many connections with something unread are passed over in search of
// a silent one.
const maxUnread = 64

// counts are the connections of one address.
type counts struct{ conns, pending int }

// Verdict says whether a connection may come in.
type Verdict uint8

// The verdicts: admitted, or the limit that refuses.
const (
	Admitted Verdict = iota
	RefusedTotal
	RefusedAddress
	RefusedPending
)

// Open returns the number of open connections and how many of them are pending.
func (l *Limits) Open() (conns, pending int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns, l.pending
}

// Ticket is one connection's place under the limits. A nil Ticket does nothing.
type Ticket struct {
	l      *Limits
	from   netip.Prefix
	yields atomic.Bool // end is not nil

	// Under l.mu:
	pending   bool
	gone      bool
	displaced bool
	end       func()        // nil: it does not yield
	quiet     func() bool   // nil: nothing ever waits to be read
	since     time.Time     // when it came into l.yielding
	place     *list.Element // there; nil: it keeps its place for now
}

func within(n, limit, def int) bool {
	if limit == 0 {
		limit = def
	}
	return limit < 0 || n < limit
}

// Take admits a connection from addr as pending, or says which limit refuses it;
// the Ticket is nil then.
func (l *Limits) Take(addr net.Addr) (*Ticket, Verdict) {
	t := &Ticket{l: l, from: Network(addr), pending: true}
	l.mu.Lock()
	end, verdict := l.take(t)
	l.mu.Unlock()
	if verdict != Admitted {
		return nil, verdict
	}
	if end != nil {
		end()
	}
	return t, Admitted
}

// take counts t in, and returns what ends the connection whose place it takes, if it
// takes one; l.mu is held.
func (l *Limits) take(t *Ticket) (end func(), _ Verdict) {
	from := l.from[t.from]
	var refused Verdict
	switch {
	case !within(l.conns, l.Conns, DefaultConns):
		refused = RefusedTotal
	case !within(from.conns, l.PerAddress, DefaultPerAddress):
		refused = RefusedAddress
	case !within(from.pending, l.share(), 0), !within(l.pending, l.Pending, DefaultPending):
		refused = RefusedPending
	default:
		l.count(t)
		return nil, Admitted
	}
	same := !within(from.conns, l.PerAddress, DefaultPerAddress) || !within(from.pending, l.share(), 0)
	displaced := l.silent(t, same)
	if displaced == nil {
		return nil, refused
	}
	end = displaced.end
	displaced.displaced = true
	displaced.settle()
	l.count(t)
	return end, Admitted
}

// silent returns the connection that has been silent longest, and for long, of t's
// address alone or of all; nil if there is none. l.mu is held.
func (l *Limits) silent(t *Ticket, same bool) *Ticket {
	now := time.Now()
	unread := 0
	for e := l.yielding.Front(); e != nil && unread < maxUnread; e = e.Next() {
		o := e.Value.(*Ticket)
		switch {
		case now.Sub(o.since) < grace:
			return nil
		case same && o.from != t.from:
		case o.quiet == nil || o.quiet():
			return o
		default:
			unread++ // it is we who are slow
		}
	}
	return nil
}

// count counts t in; l.mu is held.
func (l *Limits) count(t *Ticket) {
	if l.from == nil {
		l.from = make(map[netip.Prefix]counts)
	}
	l.add(t.from, 1, 1)
}

// share is how many pending connections one address may have; negative: any number.
func (l *Limits) share() int {
	n := cmp.Or(l.Pending, DefaultPending)
	return n - n/4
}

// add counts connections of an address in or out; l.mu is held.
func (l *Limits) add(from netip.Prefix, conns, pending int) {
	l.conns += conns
	l.pending += pending
	c := l.from[from]
	c.conns += conns
	c.pending += pending
	if c.conns <= 0 {
		delete(l.from, from)
		return
	}
	l.from[from] = c
}

// Settle says that the connection is no longer pending.
func (t *Ticket) Settle() {
	if t == nil {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	t.settle()
}

// settle is Settle with l.mu held.
func (t *Ticket) settle() {
	if !t.pending {
		return
	}
	t.pending = false
	t.l.add(t.from, 0, -1)
	t.stay()
}

// leave takes the connection out of those that yield now; l.mu is held.
func (t *Ticket) leave() {
	if t.place != nil {
		t.l.yielding.Remove(t.place)
		t.place = nil
	}
}

// Yield lets a newcomer have the place of this connection while it is pending and its
// peer is silent: from now on, but for the time between Heard and Wait. end, which is
// called once at most and without a lock held, has to close the connection. quiet, if
// it is not nil, reports that nothing has come that is not read yet, as Quiet does.
func (t *Ticket) Yield(end func(), quiet func() bool) {
	if t == nil {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	if t.pending {
		t.end, t.quiet = end, quiet
		t.yields.Store(true)
		t.enter()
	}
}

// Wait says that something of the peer is waited for. It costs nothing once the
// connection keeps its place.
func (t *Ticket) Wait() {
	if t == nil || !t.yields.Load() {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	t.enter()
}

// enter has the connection yield from now on, if it ever does; l.mu is held.
func (t *Ticket) enter() {
	if t.end != nil && t.place == nil {
		t.since = time.Now()
		t.place = t.l.yielding.PushBack(t)
	}
}

// Heard says that something has come, at as little cost.
func (t *Ticket) Heard() {
	if t == nil || !t.yields.Load() {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	t.leave()
}

// Stay ends what Yield has begun: the connection is still pending, and keeps its
// place.
func (t *Ticket) Stay() {
	if t == nil {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	t.stay()
}

// stay is Stay with l.mu held.
func (t *Ticket) stay() {
	t.yields.Store(false)
	t.end, t.quiet = nil, nil
	t.leave()
}

// Displaced reports whether a newcomer has taken the place.
func (t *Ticket) Displaced() bool {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	return t.displaced
}

// Release gives the place back, once.
func (t *Ticket) Release() {
	if t == nil {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	if t.gone {
		return
	}
	t.gone = true
	t.settle()
	t.l.add(t.from, -1, 0)
}

// Network is the address or IPv6 network that a peer's connections are counted
// under. Peers without an IP address (Unix sockets) share one place.
func Network(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() || ip.IsLoopback() {
		bits = ip.BitLen()
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
