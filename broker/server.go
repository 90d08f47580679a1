package broker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// What the hub's own MQTT server allows; see mochi's Capabilities.
const (
	sessionExpiry  = 24 * 60 * 60 // seconds an ordinary client's session outlives its connection
	messageExpiry  = 24 * 60 * 60 // seconds a message waits in such a session
	writesPending  = 128          // packets that wait for one ordinary client
	sessionsQueue  = 8192         // packets in flight to one ordinary client
	sysTopicsEvery = 30           // seconds between $SYS messages
	maximumQoS     = 1            // mochi's QoS 2 is not safe (packet identifiers of both directions share one map)
)

// guestUser is the MQTT user name of a device that has not pinned its hub.
const guestUser = hubproto.GuestUser

// loginTimeout bounds how long a login may wait for its turn.
const loginTimeout = 8 * time.Second

// mqttServer is what the hub needs of its MQTT server.
type mqttServer interface {
	Serve() error
	Close() error
}

// newServer makes the MQTT server on ports that are open, one for each
// endpoint. Nothing but the guarded listeners ever reaches it.
func (h *Hub) newServer(open []net.Listener) (mqttServer, error) {
	frame := route.Limits{Frame: int(h.cfg.Limits.Frame)}.WithDefaults().Frame
	packet := frame + mochibridge.PacketHeadroom
	logger := slog.New(guard.Redact(atLeastWarn{h.logger.With("part", "mqtt").Handler()}))

	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumPacketSize = uint32(packet) // at most 16 MiB and 64 KiB
	caps.MaximumClients = int64(cmp.Or(h.cfg.Limits.Connections, guard.DefaultConns))
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

	fixes, err := guard.NewFixes(server, guard.FixesConfig{Counters: h.guarded, Logger: logger})
	if err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	hook, err := mochibridge.New(mochibridge.Options{
		Server: server, Bridge: h.bridge, Root: h.root, FrameLimit: frame,
		Authenticate: func(c mochibridge.ConnectInfo) (bridge.Principal, error) { return h.authenticate(server, c) },
		Outside:      outside,
		Counters:     &h.hooked,
		Logger:       h.logger.With("part", "mqtt"),
	})
	if err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	if err := server.AddHook(fixes, nil); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	if err := server.AddHook(hook, nil); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	for i, e := range h.endpoints {
		ln, err := guard.NewListener(guard.Config{
			ID: fmt.Sprintf("%s-%d", e.scheme, i), Inherited: open[i], TLS: h.tlsFor(e), WebSocket: e.web(),
			PacketLimit: packet, Limits: h.limits, Counters: h.guarded, Logger: logger,
		})
		if err != nil {
			return nil, fmt.Errorf("broker: %w", err)
		}
		if err := server.AddListener(ln); err != nil {
			return nil, fmt.Errorf("broker: %w", err)
		}
	}
	return server, nil
}

// authenticate says who a connecting client is.
func (h *Hub) authenticate(server *mqtt.Server, c mochibridge.ConnectInfo) (bridge.Principal, error) {
	p, result, err := h.principal(server, c)
	h.logins[result].Add(1)
	if err != nil {
		return bridge.Principal{}, err
	}
	if p.Role == bridge.RoleDevice && c.Will != nil {
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a device has no will"}
	}
	return p, nil
}

func (h *Hub) principal(server *mqtt.Server, c mochibridge.ConnectInfo) (bridge.Principal, loginResult, error) {
	p := bridge.Principal{ClientID: c.ClientID}
	switch string(c.Username) {
	case hubproto.ProofUser:
		p, err := h.deviceLogin(c)
		if err != nil {
			return p, loginProof, err
		}
		return p, loginOK, nil
	case hubproto.GuestUser:
		p, err := guestLogin(c)
		if err != nil {
			return p, loginBad, err
		}
		return p, loginGuest, nil
	}
	if h.gate == nil {
		p = openPrincipal(p)
		switch {
		case p.Role == bridge.RoleDevice && h.cfg.Devices.set():
			return p, loginBad, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a device proves its identity here"}
		case !h.cfg.MQTTOpen && (h.cfg.Devices.set() || !fromLoopback(c.RemoteAddr)):
			return p, loginBad, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "not open to everybody"}
		}
		return p, loginOpen, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), loginTimeout)
	defer cancel()
	a, err := h.gate.login(ctx, c.ClientID, string(c.Username), c.Password)
	if err == nil && a.Role != bridge.RoleDevice && heldByAnother(server, c) {
		err = ErrClientID
	}
	if err != nil {
		return p, resultOf(err), refusal(err)
	}
	// The operator vouches for the identity by its line in the password file.
	p.Role, p.Identity, p.Proven = a.Role, a.Identity, a.Role == bridge.RoleDevice
	return p, loginOK, nil
}

// openPrincipal believes what a client says about itself. Who does not claim to
// be a device may observe.
func openPrincipal(p bridge.Principal) bridge.Principal {
	if id, ok := deviceOf(p.ClientID); ok {
		p.Role, p.Identity = bridge.RoleDevice, id
		return p
	}
	p.Role = bridge.RoleObserver
	return p
}

// heldByAnother reports whether another account's session has the client id:
// whoever connects with it would get that session and what is queued in it.
func heldByAnother(server *mqtt.Server, c mochibridge.ConnectInfo) bool {
	if c.ClientID == "" {
		return false
	}
	cl, ok := server.Clients.Get(c.ClientID)
	return ok && !bytes.Equal(cl.Properties.Username, c.Username)
}

// refusal picks the answer to a login that failed.
func refusal(err error) error {
	r := &mochibridge.Refusal{Code: mochibridge.BadCredentials, Reason: "wrong user name or password", Err: err}
	switch {
	case errors.Is(err, ErrClientID):
		r.Code, r.Reason = mochibridge.NotAllowed, "this account may not use this client id"
	case errors.Is(err, ErrLoginBusy):
		r.Code, r.Reason = mochibridge.Full, "too many logins at once, try again"
	}
	return r
}

// outside decides about topics that are not under the root: ordinary clients
// may use all of them, except that nobody writes to $ topics; devices and guests
// none.
func outside(p bridge.Principal, topic string, write bool) bool {
	switch p.Role {
	case bridge.RoleUser, bridge.RoleObserver:
		return !write || !strings.HasPrefix(topic, "$")
	}
	return false
}

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
