package broker

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge/tcp"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

func TestTCPConfig(t *testing.T) {
	const authority = "authority.hex"
	for _, tt := range []struct {
		name   string
		cfg    Config
		key    string // of the error; empty: fine
		names  []string
		closed bool
	}{
		{"loopback", Config{TCP: "127.0.0.1:4000"}, "", nil, false},
		{"localhost", Config{TCP: "localhost:4000"}, "", nil, false},
		{"loopback with aliases", Config{TCP: "[::1]:0", TCPAliases: true}, "", nil, false},
		{"everywhere, unsaid", Config{TCP: "0.0.0.0:4000"}, "tcp", []string{"--tcp-open", "--api-authority"}, false},
		{"no host, unsaid", Config{TCP: ":4000"}, "tcp", []string{"--tcp-open", "--api-authority"}, false},
		{"everywhere, open", Config{TCP: "0.0.0.0:4000", TCPOpen: true}, "", nil, false},
		{"everywhere, with an authority", Config{TCP: ":4000", APIAuthority: authority}, "", nil, true},
		{"everywhere, both", Config{TCP: ":4000", TCPOpen: true, APIAuthority: authority, TCPAliases: true}, "", nil, false},
		{"aliases at a closed door", Config{TCP: ":4000", APIAuthority: authority, TCPAliases: true}, "tcp_aliases", []string{"--tcp-open"}, false},
		{"no port", Config{TCP: "127.0.0.1"}, "tcp", nil, false},
		{"no number", Config{TCP: "127.0.0.1:http"}, "tcp", nil, false},
		{"a URL", Config{TCP: "tcp://127.0.0.1:4000"}, "tcp", nil, false},
		{"open without a port", Config{TCPOpen: true}, "tcp", []string{"--tcp"}, false},
		{"only the listener", Config{APIAuthority: authority}, "", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.cfg.Validate()
			var ce *ConfigError
			switch {
			case tt.key == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.key != "" && (!errors.As(err, &ce) || ce.Key != tt.key):
				t.Errorf("error %v, want one about %s", err, tt.key)
			}
			for _, name := range tt.names {
				if ce == nil || !strings.Contains(ce.Fix, name) {
					t.Errorf("the hint does not name %s: %v", name, err)
				}
			}
			if tt.key == "" && tt.cfg.TCP != "" && tt.cfg.tcpClosed() != tt.closed {
				t.Errorf("closed: %v", tt.cfg.tcpClosed())
			}
		})
	}
	if err := Check(Config{APIAuthority: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an authority without a file: %v", err)
	}
}

// TestTCPPort: a hub serves Ockam peers beside MQTT, counts them, and ends them in
// good order.
func TestTCPPort(t *testing.T) {
	authority, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "authority.hex")
	if err := os.WriteFile(file, []byte(hex.EncodeToString(authority.Identity().ChangeHistory())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := New(Config{MQTT: []string{"127.0.0.1:0"}, TCP: "127.0.0.1:0", TCPAliases: true, APIAuthority: file})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if h.TCPAddr() != nil || h.TCPURL() != "" {
		t.Error("an address before the start")
	}
	if err := h.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	}()
	if want := "tcp://" + h.TCPAddr().String(); h.TCPURL() != want || h.Status().TCP != want {
		t.Errorf("URL %q, in the status %q, want %q", h.TCPURL(), h.Status().TCP, want)
	}
	c, err := net.Dial("tcp", h.TCPAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	send := func(f route.Frame) {
		body := route.AppendFrame(nil, &f)
		if _, err := c.Write(append(route.AppendFrameHeader(nil, len(body)), body...)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Write([]byte{route.Preamble}); err != nil {
		t.Fatal(err)
	}
	r := route.NewReader(c, route.Limits{})
	next := func() route.Frame {
		body, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		f, err := route.ParseFrame(bytes.Clone(body), route.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	send(route.Frame{Onward: route.To("static_forwarding_service"), Return: route.To("m"), Payload: bare.AppendString(nil, "alice")})
	if f := next(); !f.Return.Equal(route.To("forward_to_alice")) {
		t.Errorf("registered %v", f.Return)
	}
	if h.bridge.Forwarder("forward_to_alice") == nil {
		t.Error("the router does not know the alias")
	}
	s := h.Status()
	if s.Counters["sealmq_tcp_connections"] != 1 || s.Counters["sealmq_tcp_events_total{event=accepted}"] != 1 {
		t.Errorf("counters %v", s.Counters)
	}
	if err := h.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if _, err := r.Next(); err == nil {
		t.Error("the connection outlives the hub")
	}
	if n := h.ockam.frontCounts.Count(tcp.Kicked); n != 1 {
		t.Errorf("%d connections ended by the hub", n)
	}
	var le *ListenError
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	if _, err := New(Config{MQTT: anyPort, TCP: busy.Addr().String()}); !errors.As(err, &le) || le.Key != "tcp" {
		t.Errorf("a port in use: %v", err)
	}
}

// TestTCPLimits meets each time limit of the port once.
func TestTCPLimits(t *testing.T) {
	const short = 50 * time.Millisecond
	frame := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("r")})
	frame = append(route.AppendFrameHeader([]byte{route.Preamble}, len(frame)), frame...)
	for _, tt := range []struct {
		limits Limits
		send   []byte
		event  string
	}{
		{Limits{TCPFirstByte: short}, nil, "preamble-timeout"},
		{Limits{TCPFirstFrame: short}, frame[:1], "first-frame-timeout"},
		{Limits{TCPFrame: short}, frame[:7], "frame-timeout"},
		{Limits{TCPIdle: short}, frame, "idle"},
	} {
		t.Run(tt.event, func(t *testing.T) {
			h := start(t, Config{TCP: "127.0.0.1:0", Limits: tt.limits})
			c, err := net.Dial("tcp", h.TCPAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Write(tt.send); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the connection stays open")
			}
			key := "sealmq_tcp_events_total{event=" + tt.event + "}"
			for limit := time.Now().Add(20 * time.Second); h.Status().Counters[key] != 1; runtime.Gosched() {
				if time.Now().After(limit) {
					t.Fatalf("%s is %v", key, h.Status().Counters[key])
				}
			}
		})
	}
	for _, l := range []Limits{{TCPIdle: -1}, {TCPFirstByte: -1}, {TCPFirstFrame: -1}, {TCPFrame: -1}, {TCPStall: -1}, {TCPWindow: -1}, {TCPOutput: -1}} {
		var ce *ConfigError
		if err := (&Config{Limits: l}).Validate(); !errors.As(err, &ce) || !strings.HasPrefix(ce.Key, "limits.tcp_") {
			t.Errorf("%+v: %v", l, err)
		}
	}
}
