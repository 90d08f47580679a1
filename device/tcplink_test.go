package device_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/tcp"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// tcpHub is a sealmq hub's TCP front.
type tcpHub struct {
	bridge *bridge.Bridge
	addr   string
	stop   func()
}

func startTCPHub(t *testing.T, id *identity.Private, addr string, change func(*bridge.Config)) *tcpHub {
	t.Helper()
	cfg := bridge.Config{Key: [32]byte{1}, Identity: bridge.IdentitySigner(id)}
	if change != nil {
		change(&cfg)
	}
	b, err := bridge.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	front, err := tcp.New(tcp.Config{Bridge: b})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- front.Serve(ln) }()
	h := &tcpHub{bridge: b, addr: ln.Addr().String()}
	h.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = front.Close(ctx)
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		_ = b.Close()
	})
	t.Cleanup(h.stop)
	return h
}

// stockHub stands for a relay service that is none of ours: it answers no hello,
// its addresses are 32 hex digits, and it keeps the route of a registration without
// the last hop (stripped), or whole (spec routing 6.4).
type stockHub struct {
	t    *testing.T
	ln   net.Listener
	full bool
	wg   sync.WaitGroup

	mu     sync.Mutex
	conns  map[string]net.Conn
	relays map[string]route.Route
}

func startStockHub(t *testing.T, addr string, full bool) *stockHub {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	h := &stockHub{t: t, ln: ln, full: full, conns: make(map[string]net.Conn), relays: make(map[string]route.Route)}
	h.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			h.wg.Go(func() { h.serve(c) })
		}
	})
	t.Cleanup(h.stop)
	return h
}

func (h *stockHub) stop() {
	h.ln.Close()
	h.cut()
	h.wg.Wait()
}

// cut ends every connection.
func (h *stockHub) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		c.Close()
	}
}

func hex32() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func (h *stockHub) serve(c net.Conn) {
	own := hex32()
	h.mu.Lock()
	h.conns[own] = c
	_, _ = c.Write([]byte{1})
	h.mu.Unlock()
	defer func() {
		c.Close()
		h.mu.Lock()
		delete(h.conns, own)
		h.mu.Unlock()
	}()
	r := route.NewReader(c, route.Limits{Frame: 1 << 20})
	for {
		body, err := r.Next()
		if err != nil {
			return
		}
		f, err := route.ParseFrame(bytes.Clone(body), route.Limits{Frame: 1 << 20})
		if err != nil {
			return
		}
		f.Return = f.Return.Prepend(route.Local(own))
		h.mu.Lock()
		h.route(f)
		h.mu.Unlock()
	}
}

func (h *stockHub) route(f route.Frame) {
	if len(f.Onward) == 0 {
		return
	}
	first := f.Onward[0].Value
	switch relay, ok := h.relays[first]; {
	case first == "forwarding_service" || first == "static_forwarding_service":
		name, err := bare.String(f.Payload)
		if err != nil {
			return
		}
		addr := "forward_to_" + name
		if name == "register" {
			addr = hex32()
		}
		h.relays[addr] = f.Return
		if !h.full {
			h.relays[addr] = f.Return[:len(f.Return)-1]
		}
		h.route(route.Frame{Onward: f.Return, Return: route.To(addr), Payload: bare.AppendString(nil, addr)})
	case ok:
		f.Onward = relay.Append(f.Onward.Rest()...)
		h.route(f)
	default:
		if c := h.conns[first]; c != nil {
			f.Onward = f.Onward.Rest()
			body := route.AppendFrame(nil, &f)
			_, _ = c.Write(append(route.AppendFrameHeader(nil, len(body)), body...))
		}
	}
}

func over(t *testing.T, addr string, cfg device.Config) *device.Node {
	t.Helper()
	if cfg.Identity == nil {
		cfg.Identity = newIdentity(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	n, err := device.Connect(ctx, "tcp://"+addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	return n
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// talk has alice dial bob and both say something.
func talk(t *testing.T, alice, bob *device.Node, to route.Route) *device.Channel {
	t.Helper()
	ch, err := alice.Dial(soon(t), to, channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, ch, alice, bob)
	return ch
}

func exchange(t *testing.T, ch *device.Channel, alice, bob *device.Node) {
	t.Helper()
	for _, size := range []int{0, 5, 100_000} {
		payload := bytes.Repeat([]byte{byte(size)}, size)
		if err := ch.Send(soon(t), "app", payload); err != nil {
			t.Fatal(err)
		}
		m, err := bob.Receive(soon(t), "app")
		if err != nil || !bytes.Equal(m.Payload, payload) || m.From != alice.Identifier() {
			t.Fatalf("bob got %v, %v", m, err)
		}
		if err := bob.Reply(soon(t), m, payload); err != nil {
			t.Fatal(err)
		}
		if m, err = alice.Receive(soon(t), "app"); err != nil || !bytes.Equal(m.Payload, payload) || m.From != bob.Identifier() {
			t.Fatalf("alice got %v, %v", m, err)
		}
	}
}

func listening(t *testing.T, n *device.Node, opts ...device.ForwarderOption) *device.Forwarder {
	t.Helper()
	if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	f, err := n.CreateForwarder(soon(t), "listener", opts...)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestTCPOnOurHub(t *testing.T) {
	id := newIdentity(t)
	h := startTCPHub(t, id, "127.0.0.1:0", func(c *bridge.Config) { c.StaticOverStream = true })
	bob, alice := over(t, h.addr, device.Config{}), over(t, h.addr, device.Config{Hub: id.Identifier()})
	if got, ok := bob.Hub(); !ok || got != id.Identifier() {
		t.Errorf("the hub proved %v", got)
	}
	f := listening(t, bob)
	if !strings.HasPrefix(f.Address(), "FWD_") {
		t.Errorf("forwarder %q", f.Address())
	}
	// The address alone is a complete route, as on MQTT, and so is the longer form.
	for _, to := range []route.Route{route.To(f.Address()), route.To(f.Address(), "listener")} {
		ch := talk(t, alice, bob, to)
		if !ch.Confirmed() {
			t.Error("not confirmed")
		}
		if err := ch.Flush(soon(t)); err != nil {
			t.Error(err)
		}
		if err := ch.Close(); err != nil {
			t.Error(err)
		}
	}
	static, err := bob.CreateForwarder(soon(t), "listener", device.Alias("bob"))
	if err != nil || static.Address() != "forward_to_bob" {
		t.Fatalf("static forwarder: %v", err)
	}
	talk(t, alice, bob, route.To("forward_to_bob"))
	// What the hub says of our frames ends a wait at once.
	if _, err := alice.Dial(soon(t), route.To("FWD_00112233445566778899aabbccddeeff"), channel.TrustEveryone); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("dialling nobody: %v", err)
	}
	if _, err := bob.CreateForwarder(soon(t), "listener", device.Alias("echo")); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("a service's name as alias: %v", err)
	}
	if m, err := alice.Request(soon(t), route.To("echo"), []byte("there?")); err != nil || string(m.Payload) != "there?" {
		t.Errorf("echo: %v", err)
	}
}

// TestTCPOnAStockHub: without hello, notices and addresses of our form.
func TestTCPOnAStockHub(t *testing.T) {
	for name, full := range map[string]bool{"stripped": false, "full": true} {
		t.Run(name, func(t *testing.T) {
			h := startStockHub(t, "127.0.0.1:0", full)
			cfg := device.Config{HelloTimeout: 50 * time.Millisecond}
			bob, alice := over(t, h.ln.Addr().String(), cfg), over(t, h.ln.Addr().String(), cfg)
			f := listening(t, bob)
			if len(f.Address()) != 32 {
				t.Errorf("relay %q", f.Address())
			}
			talk(t, alice, bob, route.To(f.Address(), "listener"))
			static, err := bob.CreateForwarder(soon(t), "listener", device.Alias("bob"))
			if err != nil || static.Address() != "forward_to_bob" {
				t.Fatalf("static relay: %v", err)
			}
			talk(t, over(t, h.ln.Addr().String(), cfg), bob, route.To("forward_to_bob", "listener"))
			if full { // with M on the way the relay's address is enough
				talk(t, alice, bob, route.To(f.Address()))
			}
			short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if _, err := alice.Dial(short, route.To("nobody", "listener"), channel.TrustEveryone); !errors.Is(err, device.ErrTimeout) {
				t.Errorf("dialling nobody: %v", err)
			}
		})
	}
}

// TestTCPReconnect: the node comes back by itself, registers again and says where
// it is to be found; a channel that it dialled is made again through the same alias.
func TestTCPReconnect(t *testing.T) {
	for name, ours := range map[string]bool{"our hub": true, "stock hub": false} {
		t.Run(name, func(t *testing.T) {
			var addr string
			var restart func()
			id := newIdentity(t)
			if ours {
				static := func(c *bridge.Config) { c.StaticOverStream = true }
				h := startTCPHub(t, id, "127.0.0.1:0", static)
				addr = h.addr
				restart = func() { h.stop(); startTCPHub(t, id, addr, static) }
			} else {
				h := startStockHub(t, "127.0.0.1:0", false)
				addr = h.ln.Addr().String()
				restart = func() { h.stop(); startStockHub(t, addr, false) }
			}
			events := make(chan device.Event, 100)
			bob := over(t, addr, device.Config{HelloTimeout: time.Second, OnEvent: func(e device.Event) { events <- e }})
			alice := over(t, addr, device.Config{HelloTimeout: time.Second})
			f := listening(t, bob)
			static, err := bob.CreateForwarder(soon(t), "listener", device.Alias("bob"))
			if err != nil {
				t.Fatal(err)
			}
			ch := talk(t, alice, bob, route.To(static.Address(), "listener"))
			before := f.Address()
			restart()
			for ctx := soon(t); ; {
				var e device.Event
				select {
				case e = <-events:
				case <-ctx.Done():
					t.Fatal("no word of the new address")
				}
				if e.Kind == device.EventForwarderChanged && e.Forwarder == f {
					break
				}
			}
			if after := f.Address(); after == before {
				t.Errorf("the address %s survived", after)
			}
			restored(t, ch)
			exchange(t, ch, alice, bob)
			if n := len(bob.Accepted()); n != 1 {
				t.Errorf("bob has %d channels", n)
			}
			talk(t, alice, bob, route.To(f.Address(), "listener"))
			if s := alice.Stats(); s.Connects != 2 {
				t.Errorf("%d connections", s.Connects)
			}
		})
	}
}

// restored waits until a channel has been made again.
func restored(t *testing.T, ch *device.Channel) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx := soon(t); ch.Restarts() == 0; <-tick.C {
		if ctx.Err() != nil || ch.Err() != nil {
			t.Fatalf("the channel is not made again: %v", ch.Err())
		}
	}
}

func TestTCPErrors(t *testing.T) {
	connect := func(addr string, cfg device.Config) error {
		cfg.Identity = newIdentity(t)
		n, err := device.Connect(soon(t), "tcp://"+addr, cfg)
		if err == nil {
			n.Close()
		}
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer ln.Close()
	say := make(chan []byte, 10)
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if b := <-say; b != nil {
					_, _ = c.Write(b)
				}
				_, _ = io.Copy(io.Discard, c) // until the device has gone
			})
		}
	})
	addr := ln.Addr().String()
	say <- []byte("HTTP/1.1 400 Bad Request\r\n")
	if err := connect(addr, device.Config{}); !errors.Is(err, device.ErrHubAway) || !strings.Contains(err.Error(), "HTTP server") {
		t.Errorf("another protocol: %v", err)
	}
	say <- nil
	if err := connect(addr, device.Config{ConnectTimeout: 50 * time.Millisecond}); !errors.Is(err, device.ErrHubAway) {
		t.Errorf("nothing said: %v", err)
	}
	say <- []byte{1, 0, 0, 0, 0}
	if err := connect(addr, device.Config{}); !errors.Is(err, device.ErrHubAway) {
		t.Errorf("a broken stream: %v", err)
	}
	say <- []byte{1}
	if err := connect(addr, device.Config{Hub: newIdentity(t).Identifier(), HelloTimeout: 50 * time.Millisecond}); !errors.Is(err, device.ErrWrongHub) {
		t.Errorf("a pinned hub that proves nothing: %v", err)
	}
	h := startTCPHub(t, newIdentity(t), "127.0.0.1:0", nil)
	if err := connect(h.addr, device.Config{Hub: newIdentity(t).Identifier()}); !errors.Is(err, device.ErrWrongHub) {
		t.Errorf("another hub than the pinned: %v", err)
	}
}

// TestAccepted: a program reaches the channels that its peers dialled.
func TestAccepted(t *testing.T) {
	h := startTCPHub(t, newIdentity(t), "127.0.0.1:0", nil)
	bob, alice := over(t, h.addr, device.Config{}), over(t, h.addr, device.Config{})
	f := listening(t, bob)
	if got := bob.Accepted(); len(got) != 0 {
		t.Fatalf("%d channels before anybody dialled", len(got))
	}
	ch := talk(t, alice, bob, route.To(f.Address()))
	if err := alice.HandleFunc("double", func(ctx context.Context, m *device.Message) {
		_ = alice.Reply(ctx, m, append(m.Payload, m.Payload...))
	}); err != nil {
		t.Fatal(err)
	}
	all := bob.Accepted()
	if len(all) != 1 || len(alice.Accepted()) != 0 {
		t.Fatalf("%d channels accepted", len(all))
	}
	a := all[0]
	if a.Peer().Identifier != alice.Identifier() || a.Listener() != "listener" || a.Address() == "" || a.Err() != nil {
		t.Errorf("accepted %v at %q: %v", a.Peer(), a.Listener(), a.Err())
	}
	if m, err := a.Request(soon(t), "double", []byte("ab")); err != nil || string(m.Payload) != "abab" {
		t.Errorf("request: %v, %v", m, err)
	}
	if err := a.Send(soon(t), "app", make([]byte, 1<<20)); !errors.Is(err, device.ErrTooLarge) {
		t.Errorf("a message beyond the limit: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.Request(short, "nobody", nil); !errors.Is(err, device.ErrTimeout) {
		t.Errorf("nobody answers: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	<-a.Done()
	<-ch.Done()
	if !errors.Is(ch.Err(), device.ErrPeerClosed) || !errors.Is(a.Err(), device.ErrClosed) {
		t.Errorf("ended as %v and %v", ch.Err(), a.Err())
	}
	if err := a.Send(soon(t), "app", nil); !errors.Is(err, device.ErrClosed) {
		t.Errorf("sending afterwards: %v", err)
	}
}

// TestNoticeHealsChannel: a peer on TCP whose connection was cut has another address
// at the hub; who dialled its alias from MQTT learns that from the hub's notice, long
// before the peer's silence would tell.
func TestNoticeHealsChannel(t *testing.T) {
	t.Parallel() // it waits more than it works
	h := startHub(t, nil, func(c *bridge.Config) { c.StaticOverStream = true })
	front, err := tcp.New(tcp.Config{Bridge: h.bridge})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- front.Serve(ln) }()
	t.Cleanup(func() {
		_ = front.Close(soon(t))
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	conns := make(chan net.Conn, 10)
	bob := over(t, ln.Addr().String(), device.Config{DialNetwork: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			conns <- c
		}
		return c, err
	}})
	alias := listening(t, bob, device.Alias("bob"))
	patient := channel.Limits{Probe: time.Hour, Dead: 2 * time.Hour}
	alice, err := device.Connect(soon(t), h.url(), device.Config{Identity: newIdentity(t), ChannelLimits: patient})
	if err != nil {
		t.Fatal(err)
	}
	defer alice.Close()
	ch := talk(t, alice, bob, route.To(alias.Address()))
	(<-conns).Close()
	eventually(t, "bob is back", func() bool { return len(conns) == 1 && bob.State() == device.Online })
	if err := ch.Send(soon(t), "app", []byte("to where bob was")); err != nil {
		t.Fatal(err)
	}
	restored(t, ch)
	exchange(t, ch, alice, bob)
}
