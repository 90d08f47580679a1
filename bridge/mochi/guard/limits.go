package guard

import (
	"cmp"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// Defaults of [Limits].
const (
	DefaultConns      = 65_536
	DefaultPerAddress = 16_384
	DefaultPending    = 4_096
	DefaultOutput     = 1 << 30
	DefaultInput      = 256 << 20
)

// fairOutput is what every connection may buffer even when Limits.Output is
// reached.
const fairOutput = 64 << 10

// Limits bounds open connections. One value may be shared by several listeners,
// which then share the bounds. Zero fields mean the defaults, negative ones no
// limit; they must not be changed once a listener uses the value.
type Limits struct {
	// Conns is the number of connections in all.
	Conns int
	// PerAddress is the number of connections from one IP address, or from one
	// /64 network in IPv6. Behind a reverse proxy every client has the proxy's
	// address.
	PerAddress int
	// Pending is the number of connections that have not been accepted by the
	// server yet: TLS handshake, WebSocket upgrade and CONNECT.
	Pending int
	// Output is how many bytes of output may be buffered for all connections
	// together. When it is reached, connections with more than 64 KiB waiting
	// count as slow: they are closed when more is written to them.
	Output int64

	// Input is how many bytes the packets longer than 16 KiB may have together
	// that have begun to arrive, and must arrive within a minute each. A packet
	// beyond it ends its connection.
	Input int64

	output, input atomic.Int64

	mu      sync.Mutex
	conns   int
	pending int
	from    map[netip.Prefix]int
}

// Open returns the number of open connections and how many of them have not
// been accepted by the server yet.
func (l *Limits) Open() (conns, pending int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns, l.pending
}

// Buffered returns how many bytes of output are buffered.
func (l *Limits) Buffered() int64 { return l.output.Load() }

// buffer returns how much a connection with that limit of its own may have
// waiting now.
func (l *Limits) buffer(limit int) int {
	if most := cmp.Or(l.Output, DefaultOutput); most >= 0 && l.output.Load() >= most {
		return min(limit, fairOutput)
	}
	return limit
}

// ticket is one connection's place under the limits.
type ticket struct {
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

// take admits a connection from addr, or says which limit refuses it.
func (l *Limits) take(addr net.Addr) (*ticket, Event) {
	t := &ticket{l: l, from: network(addr), pending: true}
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
	return t, Accepted
}

// settled says that the server has accepted the connection.
func (t *ticket) settled() {
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

// release gives the place back, once.
func (t *ticket) release() {
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

// network is the address or IPv6 network that a peer's connections are counted
// under. Peers without an IP address (Unix sockets) share one place.
func network(addr net.Addr) netip.Prefix {
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
