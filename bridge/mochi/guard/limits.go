package guard

import (
	"cmp"
	"net"
	"sync"
	"sync/atomic"

	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/underway"
)

// Defaults of [Limits].
const (
	DefaultConns      = connlimit.DefaultConns
	DefaultPerAddress = connlimit.DefaultPerAddress
	DefaultPending    = connlimit.DefaultPending
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
	// server yet: TLS handshake, WebSocket upgrade and CONNECT. A quarter of them is
	// kept for others than the address that has most. Where it, or one of the limits
	// above, is reached a newcomer takes the place of the connection whose next bytes
	// are waited for longest, if that is more than a second.
	Pending int
	// Output is how many bytes of output may be buffered for all connections
	// together. When it is reached, connections with more than 64 KiB waiting
	// count as slow: they are closed when more is written to them.
	Output int64

	// Input is how many bytes may be held of the packets longer than 16 KiB that have
	// begun to arrive, and must arrive within a minute each. Those of one network, and
	// those of one user, may have half of it, and those of whom the server has not
	// accepted yet, all together, a quarter. Who has most when there is too much is
	// closed.
	Input int64

	output atomic.Int64
	input  underway.Room

	once  sync.Once
	conns connlimit.Limits // of the three above
}

func (l *Limits) connections() *connlimit.Limits {
	l.once.Do(func() { l.conns.Conns, l.conns.PerAddress, l.conns.Pending = l.Conns, l.PerAddress, l.Pending })
	return &l.conns
}

// Open returns the number of open connections and how many of them have not
// been accepted by the server yet.
func (l *Limits) Open() (conns, pending int) { return l.connections().Open() }

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
type ticket = connlimit.Ticket

// take admits a connection from addr, or says which limit refuses it.
func (l *Limits) take(addr net.Addr) (*ticket, Event) {
	t, verdict := l.connections().Take(addr)
	switch verdict {
	case connlimit.RefusedTotal:
		return nil, RefusedTotal
	case connlimit.RefusedAddress:
		return nil, RefusedAddress
	case connlimit.RefusedPending:
		return nil, RefusedPending
	}
	return t, Accepted
}
