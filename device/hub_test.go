package device_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/testcert"
)

// hub is a mochi server with the forwarder hook.
type hub struct {
	t      testing.TB
	server *mqtt.Server
	bridge *bridge.Bridge
	id     *identity.Private
	addr   string // plain
	tls    string // TLS
	ws     string // WebSocket
	wss    string // WebSocket over TLS
	roots  *x509.CertPool
	closed bool
}

func newIdentity(t testing.TB) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// startHub starts a hub on free ports, or on those of an earlier one.
func startHub(t testing.TB, before *hub, changes ...func(*bridge.Config)) *hub {
	t.Helper()
	h := &hub{t: t, addr: "127.0.0.1:0"}
	if before != nil {
		h.id, h.addr = before.id, before.addr
	} else {
		h.id = newIdentity(t)
	}
	cfg := bridge.Config{Key: [32]byte{1, 2, 3}, Identity: bridge.IdentitySigner(h.id), FirstContact: 200 * time.Millisecond}
	for _, change := range changes {
		change(&cfg)
	}
	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumPacketSize = 256<<10 + mochibridge.PacketHeadroom
	h.server = mqtt.New(&mqtt.Options{Capabilities: caps, Logger: slog.New(slog.DiscardHandler)})
	var err error
	if h.bridge, err = bridge.New(cfg); err != nil {
		t.Fatal(err)
	}
	counters := new(guard.Counters)
	hook, err := mochibridge.New(mochibridge.Options{Server: h.server, Bridge: h.bridge, Authenticate: authenticate})
	if err != nil {
		t.Fatal(err)
	}
	fixes, err := guard.NewFixes(h.server, guard.FixesConfig{Counters: counters})
	if err != nil {
		t.Fatal(err)
	}
	for _, hook := range []mqtt.Hook{hook, fixes} {
		if err := h.server.AddHook(hook, nil); err != nil {
			t.Fatal(err)
		}
	}
	cert, roots := testcert.Loopback(t)
	h.roots = roots
	listen := func(id, addr string, secure, web bool) string {
		c := guard.Config{ID: id, Address: addr, PacketLimit: int(caps.MaximumPacketSize), Counters: counters, WebSocket: web}
		if secure {
			c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
		}
		l, err := guard.NewListener(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.server.AddListener(l); err != nil {
			t.Fatal(err)
		}
		return l.Address()
	}
	h.addr = listen("plain", h.addr, false, false)
	if before == nil {
		h.tls = listen("tls", "127.0.0.1:0", true, false)
		h.ws = listen("ws", "127.0.0.1:0", false, true)
		h.wss = listen("wss", "127.0.0.1:0", true, true)
	}
	if err := h.server.Serve(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !h.closed {
			h.left()
		}
		h.stop()
	})
	return h
}

func (h *hub) stop() {
	if h.closed {
		return
	}
	h.closed = true
	_ = h.server.Close()
	if err := h.bridge.Close(); err != nil {
		h.t.Error(err)
	}
}

// left waits until every device has gone. mochi's Close can deadlock with a client
// that is leaving: it takes a read lock twice (Clients.GetByListener).
func (h *hub) left() {
	h.t.Helper()
	eventually(h.t, "the devices have left", func() bool { return h.server.Clients.Len() == 0 })
}

func (h *hub) url() string { return "mqtt://" + h.addr }

func authenticate(c mochibridge.ConnectInfo) (bridge.Principal, error) {
	switch string(c.Username) {
	case "wrong":
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.BadCredentials}
	case "stranger":
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.NotAllowed}
	}
	name, _, _ := strings.Cut(c.ClientID, "-")
	id, err := identity.ParseIdentifier(name)
	return bridge.Principal{Identity: id, ClientID: c.ClientID, Role: bridge.RoleDevice, Proven: true}, err
}

// network is a device's way to the hub, which a test can cut.
type network struct {
	mu    sync.Mutex
	conns []net.Conn
	down  bool
}

var errDown = errors.New("the network is down")

func (n *network) dial(ctx context.Context, network, address string) (net.Conn, error) {
	n.mu.Lock()
	down := n.down
	n.mu.Unlock()
	if down {
		return nil, errDown
	}
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns = append(n.conns, c)
	return c, nil
}

// cut breaks the present connections; down keeps new ones from being made.
func (n *network) cut(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
	for _, c := range n.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
	}
	n.conns = nil
}

// limit bounds every step of a test.
const limit = time.Minute

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func connect(t testing.TB, url string, cfg device.Config) *device.Node {
	t.Helper()
	if cfg.Identity == nil {
		cfg.Identity = newIdentity(t)
	}
	n, err := device.Connect(within(t), url, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	return n
}

// eventually waits for a change that has no signal of its own.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("still not: %s", what)
		}
	}
}
