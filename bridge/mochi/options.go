package mochibridge

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/loglimit"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// DefaultObservers is how many observers may watch at one time.
const DefaultObservers = 64

// logLines is how many refusals are logged a second, and how many of those who come and
// go.
const logLines = 10

// observerFilters is how many filters under the root one observer may have.
const observerFilters = 64

// PacketHeadroom is what an MQTT packet may be longer than the frame limit.
const PacketHeadroom = 64 << 10

// Options configure a Hook.
type Options struct {
	// Server is the server that the hook is added to. Required.
	Server *mqtt.Server
	// Bridge is the forwarder. Required; the hook does not close it.
	Bridge *bridge.Bridge
	// Root is the topic root; empty means topics.DefaultRoot.
	Root topics.Root
	// FrameLimit is the bridge's frame limit in bytes; 0 means the default of
	// package route. It only serves to check the server's packet limit.
	FrameLimit int

	// Authenticate says who a connecting client is. Required. It runs on the
	// connection's own goroutine, before anything else about the client is
	// believed, and may take its time (a password hash), but should not wait
	// for the network.
	//
	// It returns a principal, whose ClientID must be the one of the CONNECT, or
	//   - ErrNotOurs: the client has nothing to do with the root; whether it
	//     may connect is up to the server's other hooks;
	//   - a *Refusal, which picks the CONNACK code;
	//   - any other error, which refuses as NotAllowed.
	Authenticate func(ConnectInfo) (bridge.Principal, error)

	// Allowed reports whether a principal that Authenticate let in may stay; see
	// Hook.Recheck. It must not block. Nil: everybody may.
	Allowed func(bridge.Principal) bool

	// Outside decides what a principal may do outside the root; nil leaves it
	// to the server's other hooks. For subscriptions topic is the filter first,
	// and then each topic. A will whose topic it refuses is refused at CONNECT, since
	// mochi asks no hook about wills. It never widens anything under the root.
	Outside func(p bridge.Principal, topic string, write bool) bool

	// OneAccount has a client id of an observer or user belong to the account
	// that uses it, which is Principal.Account, or else the user name: while a connection or a kept session of it lives, another
	// account is refused. Without it, who knows a client id gets its session,
	// unless Authenticate sees to it.
	OneAccount bool

	// Observers bounds the observers with filters under the root at one time,
	// 0: DefaultObservers. Further filters are refused.
	Observers int

	// Guard configures the connections that other listeners accepted: its
	// PacketLimit, Buffer, StallTimeout, Linger, Counters and Logger are used.
	Guard guard.Config

	// Counters counts, nil: the hook has its own.
	Counters *Counters
	// Logger hears who comes and goes, what is refused, and of recovered panics; nil
	// discards. It never gets payloads, passwords or packets, and 10 lines a second
	// at most of refusals, and of those who come and go, with bursts of 100.
	Logger *slog.Logger

	guestTime time.Duration // tests shorten guestTime

	noTap bool // for tests and comparisons: all packets go through mochi's decoder
}

// ConnectInfo is what a client says in CONNECT and how it came.
type ConnectInfo struct {
	// ClientID is empty when the server made one up.
	ClientID string
	// Username and Password are valid during the call; Username is nil when
	// there was none.
	Username, Password []byte
	RemoteAddr         net.Addr
	Listener           string
	// TLS is nil without TLS.
	TLS             *tls.ConnectionState
	Clean           bool
	KeepAlive       uint16 // seconds
	ProtocolVersion byte   // 3, 4 or 5
	Will            *Will  // nil without a will
}

// Will is a client's last will, without its payload.
type Will struct {
	Topic  string
	QoS    byte
	Retain bool
}

// exporterLabel is the label of RFC 9266, channel bindings for TLS 1.3.
const exporterLabel = "EXPORTER-Channel-Binding"

// Exporter returns the exporter value of the TLS connection (RFC 9266), nil
// when there is none: no TLS, or TLS 1.2 without extended master secret.
func (c *ConnectInfo) Exporter() []byte { return exporter(c.TLS) }

func exporter(st *tls.ConnectionState) []byte {
	if st == nil {
		return nil
	}
	v, err := st.ExportKeyingMaterial(exporterLabel, nil, 32)
	if err != nil {
		return nil
	}
	return v
}

// ErrNotOurs is returned by an authenticator for clients that are the business
// of the server's other hooks.
var ErrNotOurs = errors.New("mochibridge: not a client of the root")

// RefusalCode picks the answer to a refused CONNECT.
type RefusalCode uint8

// The codes, with what is written in MQTT 3.1.1 and 5.
const (
	NotAllowed     RefusalCode = iota // 5, 0x87
	BadCredentials                    // 4, 0x86
	Full                              // 3, 0x97
	BadClientID                       // 2, 0x85
)

func (c RefusalCode) connack(v5 bool) byte {
	v3, code := byte(5), byte(0x87)
	switch c {
	case BadCredentials:
		v3, code = 4, 0x86
	case Full:
		v3, code = 3, 0x97
	case BadClientID:
		v3, code = 2, 0x85
	}
	if v5 {
		return code
	}
	return v3
}

// Refusal is an error of an authenticator.
type Refusal struct {
	Code RefusalCode
	// Reason is shown to MQTT 5 clients: a constant, nothing secret.
	Reason string
	// Err is for the log only.
	Err error
}

// Error implements error.
func (r *Refusal) Error() string {
	if r.Err != nil {
		return fmt.Sprintf("mochibridge: refused: %s: %v", r.Reason, r.Err)
	}
	return "mochibridge: refused: " + r.Reason
}

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

// New checks the options and returns a hook for server.AddHook. Other hooks may
// come before or after it, guard.Fixes included.
func New(o Options) (*Hook, error) {
	switch {
	case o.Server == nil:
		return nil, errors.New("mochibridge: Options.Server is required")
	case o.Bridge == nil:
		return nil, errors.New("mochibridge: Options.Bridge is required")
	case o.Authenticate == nil:
		return nil, errors.New("mochibridge: Options.Authenticate is required: there is no default for who is who")
	}
	if o.Root == "" {
		o.Root = topics.DefaultRoot
	}
	if _, err := topics.ParseRoot(string(o.Root)); err != nil {
		return nil, fmt.Errorf("mochibridge: %w", err)
	}
	frame := route.Limits{Frame: o.FrameLimit}.WithDefaults().Frame
	if size := int(o.Server.Options.Capabilities.MaximumPacketSize); size != 0 && size < frame+PacketHeadroom {
		return nil, fmt.Errorf("mochibridge: the server's MaximumPacketSize of %d bytes is too small for frames of %d: set it to at least %d",
			size, frame, frame+PacketHeadroom)
	}
	if o.Guard.PacketLimit == 0 {
		o.Guard.PacketLimit = frame + PacketHeadroom
	}
	switch {
	case o.Observers < 0:
		return nil, errors.New("mochibridge: Options.Observers is negative")
	case o.Observers == 0:
		o.Observers = DefaultObservers
	}
	if o.Guard.Limits == nil {
		o.Guard.Limits = new(guard.Limits)
	}
	if o.Counters == nil {
		o.Counters = new(Counters)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Hook{
		o:         o,
		lines:     loglimit.New(logLines),
		moves:     loglimit.New(logLines),
		live:      make(map[string]*session),
		sessions:  make(map[*session]struct{}),
		observers: make(map[*session]struct{}),
	}, nil
}
