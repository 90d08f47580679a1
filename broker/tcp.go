package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/sealmq/sealmq/bridge/api"
	"github.com/sealmq/sealmq/bridge/tcp"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/route"
)

// ockam is what a hub has for peers that speak the Ockam TCP transport, and for
// those that dial its own secure channel listener.
type ockam struct {
	authority *identity.Identity // whose credentials count at the listener; nil: none
	limits    *connlimit.Limits
	front     atomic.Pointer[tcp.Server] // nil without a port or before Start
	api       atomic.Pointer[api.Server] // nil without a port and an authority or before Start
	addr      net.Addr                   // of the port; guarded by Hub.mu
	url       string                     // likewise

	frontCounts tcp.Counters
	apiCounts   api.Counters
}

// tcpClosed reports whether strangers reach nothing but the hub's own secure
// channel listener at the TCP port.
func (c *Config) tcpClosed() bool { return !loopback(c.TCP) && !c.TCPOpen }

func (c *Config) checkTCP() error {
	if c.TCP == "" {
		if c.TCPOpen || c.TCPAliases {
			return &ConfigError{Key: "tcp", Problem: "tcp_open or tcp_aliases is set, and there is no TCP port", Fix: "set tcp (--tcp), for example 127.0.0.1:4000"}
		}
		return nil
	}
	host, port, err := net.SplitHostPort(c.TCP)
	if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || strings.ContainsAny(host, "/ ") {
		return &ConfigError{Key: "tcp", Problem: fmt.Sprintf("%q is not a host and port", c.TCP), Fix: "write for example 127.0.0.1:4000"}
	}
	switch {
	case c.tcpClosed() && c.APIAuthority == "":
		return &ConfigError{Key: "tcp", Problem: fmt.Sprintf("%s can be reached from other machines, and nothing says who may use the hub there", c.TCP),
			Fix: "set api_authority (--api-authority) to let in peers with its credential, through the listener \"api\" alone, or tcp_open (--tcp-open) to let anybody register forwarders"}
	case c.tcpClosed() && c.TCPAliases:
		return &ConfigError{Key: "tcp_aliases", Problem: fmt.Sprintf("nobody registers in plain at %s", c.TCP),
			Fix: "set tcp_open (--tcp-open), or remove tcp_aliases: through the listener \"api\" aliases always work"}
	}
	return nil
}

// loadOckam reads the files of the settings for Ockam peers.
func (c *Config) loadOckam() (*ockam, error) {
	o := &ockam{limits: &connlimit.Limits{
		Conns: c.Limits.Connections, PerAddress: c.Limits.ConnectionsPerAddress, Pending: c.Limits.ConnectionsPending,
	}}
	if c.APIAuthority == "" {
		return o, nil
	}
	var err error
	o.authority, err = LoadAuthority(c.APIAuthority)
	return o, err
}

// openOckam starts what the hub has for Ockam peers; ln may be nil. h.mu is held.
func (h *Hub) openOckam(ln net.Listener) error {
	o := h.ockam
	if ln == nil && o.authority == nil {
		return nil
	}
	frames := route.Limits{Frame: int(h.cfg.Limits.Frame), Hops: h.cfg.Limits.Hops}
	closed := ln != nil && h.cfg.tcpClosed()
	listener, err := api.New(api.Config{
		Bridge: h.bridge, Identity: h.identity, Authority: o.authority, MembersOnly: closed, Limits: frames,
		Registry: peerRegistry{h.proofs.registry, identity.NewMemoryRegistry(0)},
		Channels: h.cfg.Limits.api(), PerIdentity: h.cfg.Limits.APIChannelsPerIdentity,
		Counters: &o.apiCounts, Logger: h.logger.With("part", "api"),
	})
	if err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	o.api.Store(listener)
	if ln == nil {
		return nil
	}
	front, err := tcp.New(tcp.Config{
		Bridge: h.bridge, Frames: frames, Closed: closed, Limits: o.limits, TotalOutput: int64(h.cfg.Limits.OutputBytes),
		TotalInput:      int64(h.cfg.Limits.ArrivingBytes),
		PreambleTimeout: h.cfg.Limits.TCPFirstByte, FirstFrame: h.cfg.Limits.TCPFirstFrame,
		IdleTimeout: h.cfg.Limits.TCPIdle, FrameTimeout: h.cfg.Limits.TCPFrame, StallTimeout: h.cfg.Limits.TCPStall,
		OutputBytes: int(h.cfg.Limits.TCPOutput), ReadWindow: h.cfg.Limits.TCPWindow,
		Counters: &o.frontCounts, Logger: h.logger.With("part", "tcp"),
	})
	if err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	o.front.Store(front)
	o.addr, o.url = ln.Addr(), "tcp://"+shown(h.cfg.TCP, ln.Addr())
	go func() {
		// A hub that stops closes its ports first.
		if err := front.Serve(ln); err != nil && !errors.Is(err, net.ErrClosed) {
			h.failed <- fmt.Errorf("broker: %w", err)
		}
	}()
	return nil
}

// close ends every channel and connection; what was buffered leaves until ctx ends.
func (o *ockam) close(ctx context.Context) {
	if listener := o.api.Load(); listener != nil {
		listener.Close()
	}
	if front := o.front.Load(); front != nil {
		_ = front.Close(ctx) // never fails
	}
}

// samples reads the counters and gauges.
func (o *ockam) samples() []sample {
	conns, pending := o.limits.Open()
	all := []sample{
		{name: "sealmq_tcp_connections", help: "Open Ockam TCP connections.", gauge: true, n: float64(conns)},
		{name: "sealmq_tcp_connections_pending", help: "Ockam TCP connections that have not sent a frame yet.", gauge: true, n: float64(pending)},
	}
	if front := o.front.Load(); front != nil {
		all = append(all,
			sample{name: "sealmq_tcp_output_bytes", help: "Output that Ockam TCP peers have yet to take.", gauge: true, n: float64(front.Buffered())},
			sample{name: "sealmq_tcp_arriving_bytes", help: "Long frames of Ockam TCP peers that have begun to arrive.", gauge: true, n: float64(front.Arriving())})
	}
	o.frontCounts.Each(func(e tcp.Event, n uint64) {
		all = append(all, sample{name: "sealmq_tcp_events_total", help: "What became of Ockam TCP connections and their frames, by event.",
			label: "event", value: e.String(), n: float64(n)})
	})
	o.apiCounts.Each(func(e api.Event, n uint64) {
		all = append(all, sample{name: "sealmq_api_events_total", help: "What happened at the hub's own secure channel listener, by event.",
			label: "event", value: e.String(), n: float64(n)})
	})
	listener := o.api.Load()
	if listener == nil {
		return all
	}
	ch := listener.Stats()
	all = append(all,
		sample{name: "sealmq_api_channels", help: "Channels with the hub's own secure channel listener.", gauge: true, n: float64(ch.Channels)},
		sample{name: "sealmq_api_handshakes_open", help: "Handshakes there that are not finished.", gauge: true, n: float64(ch.HalfOpen)},
		sample{name: "sealmq_api_refused_total", help: "Peers refused there.", n: float64(ch.Refused)},
		sample{name: "sealmq_api_failed_total", help: "Other handshakes there that did not complete.", n: float64(ch.Failed)},
	)
	ch.Dropped.Each(func(r channel.DropReason, n uint64) {
		all = append(all, sample{name: "sealmq_api_dropped_total", help: "Frames for handshakes and channels there that came to nothing, by reason.",
			label: "reason", value: r.String(), n: float64(n)})
	})
	return all
}

// TCPAddr is the address of the Ockam TCP listener; nil without one or before
// Start.
func (h *Hub) TCPAddr() net.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ockam.addr
}

// TCPURL is the URL of the Ockam TCP listener; "" without one or before Start.
func (h *Hub) TCPURL() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ockam.url
}

// peerRegistry is what the hub's own secure channel listener remembers of its peers.
// Devices, and members whom it keeps, are the hub's to remember, so that a key that one of
// them has rotated away is refused here too, and after a restart; strangers are in memory.
type peerRegistry struct {
	devices   registry
	strangers *identity.MemoryRegistry
}

var (
	_ identity.Importer = peerRegistry{}
	_ identity.Keeper   = peerRegistry{}
)

// Get implements identity.Registry.
func (r peerRegistry) Get(id identity.Identifier) (*identity.Identity, bool) {
	if who, ok := r.devices.Get(id); ok {
		return who, true
	}
	return r.strangers.Get(id)
}

// Update implements identity.Registry.
func (r peerRegistry) Update(who *identity.Identity) error {
	if _, ok := r.devices.Get(who.Identifier()); ok {
		return r.devices.Update(who)
	}
	return r.strangers.Update(who)
}

// Keep implements identity.Keeper.
func (r peerRegistry) Keep(id identity.Identifier) error {
	if who, ok := r.strangers.Get(id); ok {
		if err := r.devices.Update(who); err != nil {
			return err
		}
	}
	return r.devices.Keep(id)
}

// Import implements identity.Importer.
func (r peerRegistry) Import(history []byte) (*identity.Identity, error) {
	return r.devices.Import(history)
}
