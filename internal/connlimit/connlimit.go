// Package connlimit bounds open connections, in all and for each address, and
// those that have not shown yet that they are worth a place. The hub's fronts
// share it.
package connlimit

import (
	"net"
	"net/netip"
	"sync"
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
	// protocol above yet.
	Pending int

	mu      sync.Mutex
	conns   int
	pending int
	from    map[netip.Prefix]int
}

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
	l       *Limits
	from    netip.Prefix
	pending bool // under l.mu
	gone    bool // under l.mu
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
	defer l.mu.Unlock()
	switch {
	case !within(l.conns, l.Conns, DefaultConns):
		return nil, RefusedTotal
	case !within(l.from[t.from], l.PerAddress, DefaultPerAddress):
		return nil, RefusedAddress
	case !within(l.pending, l.Pending, DefaultPending):
		return nil, RefusedPending
	}
	if l.from == nil {
		l.from = make(map[netip.Prefix]int)
	}
	l.conns++
	l.pending++
	l.from[t.from]++
	return t, Admitted
}

// Settle says that the connection is no longer pending.
func (t *Ticket) Settle() {
	if t == nil {
		return
	}
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	if t.pending && !t.gone {
		t.pending = false
		t.l.pending--
	}
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
	t.l.conns--
	if t.pending {
		t.l.pending--
	}
	if t.l.from[t.from]--; t.l.from[t.from] <= 0 {
		delete(t.l.from, t.from)
	}
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
