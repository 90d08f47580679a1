package tcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/underway"
	"github.com/sealmq/sealmq/route"
)

// Defaults of Config.
const (
	DefaultPreambleTimeout = 10 * time.Second
	DefaultFirstFrame      = 10 * time.Minute
	DefaultFrameTimeout    = 30 * time.Second
	DefaultStallTimeout    = 30 * time.Second
	DefaultReadWindow      = 128
	DefaultTotalOutput     = 1 << 30
	DefaultTotalInput      = 256 << 20
	keepAliveIdle          = 60 * time.Second
	keepAliveInterval      = 15 * time.Second
	keepAliveCount         = 4
)

// slowest is the least rate, in bytes a second, at which a frame must arrive once
// FrameTimeout is over.
const slowest = 16 << 10

// Config of a Server. The zero values of all but Bridge mean the defaults.
type Config struct {
	// Bridge is the router. Required.
	Bridge *bridge.Bridge
	// Frames bounds frames as received; give the bridge's limits.
	Frames route.Limits
	// Closed makes every peer a guest: it reaches the services that are there for
	// guests (hello, the hub's own secure channel listener), and what they linked
	// it with, but no forwarder and no other service.
	Closed bool
	// Limits bounds connections; several listeners may share one. Nil: limits of
	// the server's own, with the defaults.
	Limits *connlimit.Limits
	// PreambleTimeout is how long a peer may take to send its first byte.
	PreambleTimeout time.Duration
	// FirstFrame is how long a peer may be silent after the preamble before its
	// first frame. It loses its place sooner when there is none for others.
	FirstFrame time.Duration
	// IdleTimeout closes a connection on which nothing was received for so long.
	// 0: never, since stock peers send no heartbeat; dead peers are found by TCP
	// keepalive.
	IdleTimeout time.Duration
	// FrameTimeout is how long a frame may take to arrive once it has begun; a
	// long one has as much again for each 512 KiB or so (16 KiB a second).
	FrameTimeout time.Duration
	// StallTimeout closes a connection that takes no byte for so long while there
	// is output.
	StallTimeout time.Duration
	// OutputBytes bounds the output buffer of a connection. Default: 1 MiB, or
	// twice the frame limit if that is more. One frame always fits.
	OutputBytes int
	// TotalOutput bounds the output buffers of all connections together: when it is
	// reached, a connection with more than 64 KiB takes no more until it has been
	// read. Default 1 GiB.
	TotalOutput int64
	// TotalInput bounds what the frames above 16 KiB that have begun to arrive, and
	// the buffers grown for such, hold in all connections together: where it would be
	// more, the connection that has most is closed. Those of one IP address (IPv6: a
	// network of 64 bits) may have half of it. Default 256 MiB.
	TotalInput int64
	// ReadWindow is how many frames of a connection may wait for an acknowledgement
	// before the server stops reading from it; the bridge's own window, in frames
	// and bytes, holds besides. Default 128.
	ReadWindow int
	// Counters takes the events; nil counts nothing.
	Counters *Counters
	// Logger hears of connections that are cut; nil discards.
	Logger *slog.Logger
}

func (c Config) complete() (Config, error) {
	if c.Bridge == nil {
		return c, errors.New("tcp: Config.Bridge is required")
	}
	if err := c.Frames.Validate(); err != nil {
		return c, fmt.Errorf("tcp: %w", err)
	}
	c.Frames = c.Frames.WithDefaults()
	for _, d := range []struct {
		name string
		v    *time.Duration
		def  time.Duration
	}{
		{"PreambleTimeout", &c.PreambleTimeout, DefaultPreambleTimeout},
		{"FirstFrame", &c.FirstFrame, DefaultFirstFrame},
		{"IdleTimeout", &c.IdleTimeout, 0},
		{"FrameTimeout", &c.FrameTimeout, DefaultFrameTimeout},
		{"StallTimeout", &c.StallTimeout, DefaultStallTimeout},
	} {
		if *d.v < 0 {
			return c, fmt.Errorf("tcp: Config.%s is negative", d.name)
		}
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if c.OutputBytes < 0 || c.ReadWindow < 0 || c.TotalOutput < 0 || c.TotalInput < 0 {
		return c, errors.New("tcp: Config.OutputBytes, TotalOutput, TotalInput and ReadWindow must not be negative")
	}
	if c.TotalInput == 0 {
		c.TotalInput = DefaultTotalInput
	}
	if c.TotalOutput == 0 {
		c.TotalOutput = DefaultTotalOutput
	}
	if c.OutputBytes == 0 {
		c.OutputBytes = max(1<<20, 2*c.Frames.Frame)
	}
	if c.ReadWindow == 0 {
		c.ReadWindow = DefaultReadWindow
	}
	if c.Limits == nil {
		c.Limits = &connlimit.Limits{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Server accepts Ockam TCP connections for a bridge. Make one with New. Its
// methods are safe for concurrent use.
type Server struct {
	cfg    Config
	output atomic.Int64  // bytes buffered for all connections
	input  underway.Room // what TotalInput bounds

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	closed    bool
	closing   chan struct{} // closed by Close
	wg        sync.WaitGroup
}

// New returns a server that listens nowhere yet.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, listeners: make(map[net.Listener]struct{}), conns: make(map[*conn]struct{}), closing: make(chan struct{})}, nil
}

// Serve accepts connections from ln until Close, and then returns nil, or until
// ln fails for good. It closes ln.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errors.Join(net.ErrClosed, ln.Close())
	}
	s.listeners[ln] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	defer ln.Close()
	pause := time.Duration(0)
	for {
		nc, err := ln.Accept()
		if err == nil {
			pause = 0
			s.admit(nc)
			continue
		}
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		var temporary interface{ Temporary() bool }
		switch {
		case closed:
			return nil
		case !errors.As(err, &temporary) || !temporary.Temporary():
			return fmt.Errorf("tcp: accept: %w", err)
		}
		// Out of file descriptors, most likely.
		s.cfg.Counters.add(AcceptFailed)
		if pause == 0 {
			s.cfg.Logger.Warn("accept failed; trying again", "err", err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-s.closing:
			timer.Stop()
		}
	}
}

// admit starts a connection, or refuses it.
func (s *Server) admit(nc net.Conn) {
	ticket, verdict := s.cfg.Limits.Take(nc.RemoteAddr())
	if verdict != connlimit.Admitted {
		s.cfg.Counters.add(RefusedTotal + Event(verdict-connlimit.RefusedTotal))
		_ = nc.Close()
		return
	}
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetNoDelay(true)
		_ = t.SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount,
		})
	}
	c := newConn(s, nc, ticket)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		ticket.Release()
		_ = nc.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	s.cfg.Counters.add(Accepted)
	ticket.Yield(func() { c.end(Displaced) }, connlimit.Quiet(nc))
	go c.run()
}

// Arriving returns what TotalInput bounds.
func (s *Server) Arriving() int64 { return s.input.Bytes() }

// Buffered returns how many bytes of output are buffered.
func (s *Server) Buffered() int64 { return s.output.Load() }

// Conns returns the number of open connections.
func (s *Server) Conns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Close stops listening, lets what is buffered leave until ctx ends, closes every
// connection and waits for the server's goroutines. The bridge is to be closed
// afterwards.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	for ln := range s.listeners {
		_ = ln.Close()
	}
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.finish(Kicked)
	}
	stop := context.AfterFunc(ctx, func() {
		for _, c := range conns {
			_ = c.nc.Close()
		}
	})
	defer stop()
	s.wg.Wait()
	return nil
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}
