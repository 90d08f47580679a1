package mochibridge

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/route"
)

// What a server of NewServer allows; see mochi's Capabilities.
const (
	sessionExpiry  = 24 * 60 * 60 // seconds an ordinary client's session outlives its connection
	messageExpiry  = 24 * 60 * 60 // seconds a message waits in such a session
	writesPending  = 128          // packets that wait for one ordinary client
	sessionsQueue  = 8192         // packets in flight to one ordinary client
	sysTopicsEvery = 30           // seconds between $SYS messages
	maximumQoS     = 1            // mochi's QoS 2 is not safe (packet identifiers of both directions share one map)
)

// ServerConfig is what NewServer needs.
type ServerConfig struct {
	// Options are the hook's. Server is made here and must be nil.
	Options
	// Listeners are where clients connect, each with an ID of its own. A zero
	// PacketLimit, and nil Limits, Counters and Logger, are those of the server.
	Listeners []guard.Config
	// Limits bounds the connections of all listeners together; nil: the
	// defaults.
	Limits *guard.Limits
	// Fixes bounds what ordinary clients may do. Nil Counters and Logger are
	// those of the server.
	Fixes guard.FixesConfig
	// Guarded counts what listeners and fixes do, nil: the server has its own.
	Guarded *guard.Counters
}

// Server is a whole MQTT server with the forwarder in it: nothing reaches it but
// through guarded listeners, and its clients get QoS 0 and 1. It is for programs
// that have no mochi server of their own. Serve is for one call.
type Server struct {
	server *mqtt.Server
	hook   *Hook
	close  func() error // mochi's, which panics when it is called again
}

// NewServer checks the configuration and makes a server that listens where it
// was told to; it serves from Serve on. mochi's own log is kept from warnings
// up, without packets.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Server != nil {
		return nil, fmt.Errorf("mochibridge: ServerConfig.Server is not for the caller to set: use New with a server of your own")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Limits == nil {
		cfg.Limits = new(guard.Limits)
	}
	if cfg.Guarded == nil {
		cfg.Guarded = new(guard.Counters)
	}
	logger := slog.New(guard.Redact(atLeastWarn{cfg.Logger.Handler()}))
	packet := route.Limits{Frame: cfg.FrameLimit}.WithDefaults().Frame + PacketHeadroom

	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumPacketSize = uint32(packet) // at most 16 MiB and 64 KiB
	caps.MaximumClients = int64(guard.DefaultConns)
	if cfg.Limits.Conns != 0 {
		caps.MaximumClients = int64(cfg.Limits.Conns)
	}
	caps.MaximumQos = maximumQoS
	caps.TopicAliasMaximum = 0
	caps.MaximumSessionExpiryInterval = sessionExpiry
	caps.MaximumMessageExpiryInterval = messageExpiry
	caps.MaximumClientWritesPending = writesPending
	caps.MaximumInflight = sessionsQueue
	server := mqtt.New(&mqtt.Options{
		Capabilities:           caps,
		SysTopicResendInterval: sysTopicsEvery,
		Logger:                 logger,
	})

	if cfg.Fixes.Counters == nil {
		cfg.Fixes.Counters = cfg.Guarded
	}
	if cfg.Fixes.Logger == nil {
		cfg.Fixes.Logger = logger
	}
	fixes, err := guard.NewFixes(server, cfg.Fixes)
	if err != nil {
		return nil, fmt.Errorf("mochibridge: %w", err)
	}
	cfg.Server = server
	hook, err := New(cfg.Options)
	if err != nil {
		return nil, err
	}
	if err := server.AddHook(fixes, nil); err != nil {
		return nil, fmt.Errorf("mochibridge: %w", err)
	}
	if err := server.AddHook(hook, nil); err != nil {
		return nil, fmt.Errorf("mochibridge: %w", err)
	}
	for _, l := range cfg.Listeners {
		if l.PacketLimit == 0 {
			l.PacketLimit = packet
		}
		if l.Limits == nil {
			l.Limits = cfg.Limits
		}
		if l.Counters == nil {
			l.Counters = cfg.Guarded
		}
		if l.Logger == nil {
			l.Logger = logger
		}
		ln, err := guard.NewListener(l)
		if err != nil {
			return nil, fmt.Errorf("mochibridge: listener %q: %w", l.ID, err)
		}
		if err := server.AddListener(ln); err != nil {
			return nil, fmt.Errorf("mochibridge: listener %q: %w", l.ID, err)
		}
	}
	return &Server{server, hook, sync.OnceValue(server.Close)}, nil
}

// Serve starts serving and returns at once.
func (s *Server) Serve() error { return s.server.Serve() }

// Close closes the listeners, ends every connection and stops the hooks. The
// bridge stays open. A second Close waits for the first, and returns what it did.
func (s *Server) Close() error { return s.close() }

// atLeastWarn drops what mochi logs below a warning.
type atLeastWarn struct{ slog.Handler }

func (h atLeastWarn) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && h.Handler.Enabled(ctx, l)
}

func (h atLeastWarn) WithAttrs(attrs []slog.Attr) slog.Handler {
	return atLeastWarn{h.Handler.WithAttrs(attrs)}
}

func (h atLeastWarn) WithGroup(name string) slog.Handler {
	return atLeastWarn{h.Handler.WithGroup(name)}
}
