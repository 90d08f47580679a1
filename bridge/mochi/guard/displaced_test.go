package guard

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/internal/testcert"
	"github.com/sealmq/sealmq/internal/testpipe"
)

// knock connects to a listener in memory, all of whose peers share one address.
func knock(t *testing.T, l *testpipe.Listener) net.Conn {
	t.Helper()
	c, err := l.Dial()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// slowLogin lets nobody in before it is told to.
type slowLogin struct {
	mqtt.HookBase
	let chan struct{}
}

func (*slowLogin) ID() string           { return "slow" }
func (*slowLogin) Provides(b byte) bool { return b == mqtt.OnConnect }
func (s *slowLogin) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	if cl.ID == "slow" {
		<-s.let
	}
	return nil
}

// TestNewcomerTakesASilentPlace: where all places of those who have not sent their
// CONNECT are taken, a newcomer gets that of who has been silent longest, on every
// kind of listener; who waits to be let in keeps the own.
func TestNewcomerTakesASilentPlace(t *testing.T) {
	cert, _ := testcert.Loopback(t)
	client := &tls.Config{InsecureSkipVerify: true} // no certificate is valid in synthetic time
	for _, tt := range []struct {
		name        string
		secure, web bool
		first       []byte // what the silent ones say
	}{
		{"tcp", false, false, nil},
		{"part of a CONNECT", false, false, rawmqtt.Connect(false, rawmqtt.Options{ID: "part"})[:9]},
		{"tls", true, false, nil},
		{"part of a TLS handshake", true, false, []byte{22, 3, 1}},
		{"websocket", false, true, nil},
		{"part of a request", false, true, []byte("GET / HTTP/1.1\r\n")},
		{"websocket tls", true, true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, limits := testpipe.Listen(), &Limits{Pending: 4} // three of one address
				login := &slowLogin{let: make(chan struct{})}
				b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) {
					c.Inherited, c.Limits, c.WebSocket = p, limits, tt.web
					if tt.secure {
						c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
					}
				}, login)
				dial := func() *rawmqtt.Client {
					c := knock(t, p)
					if tt.secure {
						c = tls.Client(c, client)
					}
					if tt.web {
						d := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return c, nil }}
						ws, _, err := d.Dial("ws://pipe/", nil)
						if err != nil {
							t.Fatal(err)
						}
						c = &wsConn{Conn: ws.NetConn(), ws: ws}
					}
					return rawmqtt.New(c, false)
				}
				silent := func() net.Conn {
					c := knock(t, p)
					if _, err := c.Write(tt.first); err != nil {
						t.Fatal(err)
					}
					return c
				}
				slow := dial()
				send(t, slow, rawmqtt.Connect(false, rawmqtt.Options{ID: "slow"}))
				time.Sleep(time.Second) // synthetic
				first := silent()
				time.Sleep(time.Second) // synthetic
				second := silent()
				synctest.Wait()
				if _, n := limits.Open(); n != 3 {
					t.Fatalf("%d pending", n)
				}
				c := dial()
				if ack, err := c.Login(rawmqtt.Options{ID: "newcomer"}); err != nil || ack.Code() != 0 {
					t.Fatalf("a newcomer is kept out: %v, %v", ack, err)
				}
				if _, err := first.Read(make([]byte, 64)); err == nil {
					t.Error("the one that was silent longest is still there")
				}
				synctest.Wait()
				if conns, n := limits.Open(); conns != 3 || n != 2 {
					t.Errorf("%d open, %d pending", conns, n)
				}
				close(login.let)
				if ack, err := slow.Expect(rawmqtt.CONNACK); err != nil || ack.Code() != 0 {
					t.Errorf("who waited to be let in: %v, %v", ack, err)
				}
				for e, want := range map[Event]uint64{Accepted: 4, Displaced: 1, HandshakeFailed: 0, ConnectTimeout: 0, RefusedPending: 0} {
					if got := b.c.Count(e); got != want {
						t.Errorf("%s: %d, want %d", e, got, want)
					}
				}
				for _, c := range []net.Conn{slow, second, c} {
					_ = c.Close()
				}
				synctest.Wait()
				if conns, n := limits.Open(); conns != 0 || n != 0 {
					t.Errorf("left: %d open, %d pending", conns, n)
				}
			})
		})
	}
}

// TestBusyServerEndsNobody: a peer that the server itself keeps waiting in the TLS
// handshake is not silent, and keeps its place.
func TestBusyServerEndsNobody(t *testing.T) {
	cert, _ := testcert.Loopback(t)
	for name, web := range map[string]bool{"tls": false, "websocket tls": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, limits, busy := testpipe.Listen(), &Limits{Pending: 1}, make(chan struct{})
				b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) {
					c.Inherited, c.Limits, c.WebSocket = p, limits, web
					c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
						<-busy
						return nil, nil
					}}
				})
				secure := tls.Client(knock(t, p), &tls.Config{InsecureSkipVerify: true}) // no certificate is valid in synthetic time
				defer secure.Close()
				shaken := make(chan error, 1)
				go func() { shaken <- secure.HandshakeContext(context.Background()) }()
				time.Sleep(5 * time.Second) // synthetic
				if _, err := knock(t, p).Read(make([]byte, 1)); err == nil {
					t.Error("a newcomer is let in")
				}
				close(busy)
				if err := <-shaken; err != nil {
					t.Errorf("who had to wait for the server: %v", err)
				}
				time.Sleep(2 * time.Second) // synthetic
				_ = knock(t, p).Close()     // now it is the peer who is silent
				synctest.Wait()
				if n := b.c.Count(Displaced); n != 1 {
					t.Errorf("%d had to go", n)
				}
				if n := b.c.Count(RefusedPending); n != 1 {
					t.Errorf("%d were refused", n)
				}
			})
		})
	}
}

// TestUpgradeThatFailsGivesItsPlaceBack: also one that fails after the connection
// has left the HTTP server.
func TestUpgradeThatFailsGivesItsPlaceBack(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.WebSocket = true })
	const request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	for i, tt := range []struct{ name, say string }{
		{"data before the answer", request + "too early"},
		{"no WebSocket", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"no HTTP", "\x10\x00\r\n\r\n"},
		{"nothing", ""},
	} {
		c := b.dial(t, false)
		send(t, c, []byte(tt.say))
		if tt.say == "" {
			_ = c.Close()
		}
		eventually(t, tt.name+" is counted", func() bool { return b.c.Count(HandshakeFailed) == uint64(i+1) })
		eventually(t, tt.name+" gives its place back", func() bool { conns, _ := b.l.cfg.Limits.Open(); return conns == 0 })
	}
	b.l.mu.Lock()
	defer b.l.mu.Unlock()
	if n := len(b.l.opening); n != 0 {
		t.Errorf("%d are still opening", n)
	}
}

// TestAcceptFails: without a file for the next connection a listener of any kind tries
// again, more and more seldom, says so once, and counts.
func TestAcceptFails(t *testing.T) {
	for name, web := range map[string]bool{"tcp": false, "websocket": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				p := testpipe.Listen()
				p.Fails = 10
				begin := time.Now()
				b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) {
					c.Inherited, c.WebSocket, c.Logger = p, web, slog.New(slog.NewTextHandler(&log, nil))
				})
				_ = knock(t, p).Close()
				if d, want := time.Since(begin), (2*1000+5+10+20+40+80+160+320+640)*time.Millisecond; d != want {
					t.Errorf("let in after %v, want %v", d, want)
				}
				synctest.Wait()
				if n := b.c.Count(AcceptFailed); n != 10 {
					t.Errorf("counted %d times", n)
				}
				if n := strings.Count(log.String(), "accept failed"); n != 1 {
					t.Errorf("%d lines", n)
				}
			})
		})
	}
}
