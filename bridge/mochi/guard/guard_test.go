package guard

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/gorilla/websocket"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/internal/testcert"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// broker is a mochi server behind a guarded listener, open to everybody.
type broker struct {
	*mqtt.Server
	l     *Listener
	fixes *Fixes
	addr  string
	c     *Counters
}

func start(t testing.TB, change func(*Config, *FixesConfig, *mqtt.Options), hooks ...mqtt.Hook) *broker {
	t.Helper()
	opts := &mqtt.Options{Logger: slog.New(slog.DiscardHandler)}
	opts.Capabilities = mqtt.NewDefaultServerCapabilities()
	cfg := Config{ID: "t", Address: "127.0.0.1:0", PacketLimit: 1 << 20, Counters: new(Counters)}
	fcfg := FixesConfig{Counters: cfg.Counters}
	if change != nil {
		change(&cfg, &fcfg, opts)
	}
	opts.Capabilities.MaximumPacketSize = uint32(cfg.PacketLimit)
	s := mqtt.New(opts)
	l, err := NewListener(cfg)
	if err != nil {
		t.Fatal(err)
	}
	fixes, err := NewFixes(s, fcfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range append([]mqtt.Hook{new(auth.AllowHook), fixes}, hooks...) {
		if err := s.AddHook(h, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddListener(l); err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return &broker{Server: s, l: l, fixes: fixes, addr: l.Address(), c: cfg.Counters}
}

func (b *broker) dial(t testing.TB, v5 bool) *rawmqtt.Client {
	t.Helper()
	c, err := rawmqtt.Dial(b.addr, v5)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (b *broker) login(t testing.TB, v5 bool, o rawmqtt.Options) *rawmqtt.Client {
	t.Helper()
	c := b.dial(t, v5)
	if p, err := c.Login(o); err != nil || p.Code() != 0 {
		t.Fatalf("login as %s: code %d, %v", o.ID, p.Code(), err)
	}
	return c
}

func send(t testing.TB, c io.Writer, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, c *rawmqtt.Client, kind int, skip ...int) rawmqtt.Packet {
	t.Helper()
	p, err := c.Expect(kind, skip...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// eventually polls without sleeping on a fixed schedule of its own making.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatalf("timed out: %s", what)
		case <-tick.C:
		}
	}
}

func closedByPeer(t testing.TB, c *rawmqtt.Client) {
	t.Helper()
	for {
		if _, err := c.ReadPacket(); err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				t.Fatal("connection still open")
			}
			return
		}
	}
}

// tenBytes is the SUBSCRIBE that crashes mochi v2.7.9: a filter without options
// at the end of the packet, in MQTT 5.
var tenBytes = []byte{0x82, 0x08, 0x00, 0x01, 0x00, 0x00, 0x03, 'a', '/', 'b'}

func TestDecoderPanicIsSurvived(t *testing.T) {
	b := start(t, nil)
	watcher := b.login(t, false, rawmqtt.Options{ID: "watcher"})
	if _, err := watcher.Sub(1, 0, "gone"); err != nil {
		t.Fatal(err)
	}
	c := b.login(t, true, rawmqtt.Options{ID: "evil", Will: "gone", WillPayload: "evil"})
	if _, err := c.Sub(1, 0, "x/y"); err != nil {
		t.Fatal(err)
	}
	send(t, c, tenBytes)
	closedByPeer(t, c)
	if p := expect(t, watcher, rawmqtt.PUBLISH); string(p.Payload) != "evil" {
		t.Errorf("will: got %q", p.Payload)
	}
	eventually(t, "session of the lost client swept", func() bool { return b.c.Count(SessionSwept) == 1 })
	eventually(t, "client removed", func() bool { _, ok := b.Clients.Get("evil"); return !ok })
	if got := b.c.Count(Panicked); got != 1 {
		t.Errorf("panics counted: %d", got)
	}
	if subs := b.Topics.Subscribers("x/y").Subscriptions; len(subs) != 0 {
		t.Errorf("subscriptions left behind: %v", subs)
	}
}

func TestConnectDeadline(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.ConnectTimeout = 50 * time.Millisecond })
	silent := b.dial(t, false)
	slow := b.dial(t, false)
	send(t, slow, rawmqtt.Connect(false, rawmqtt.Options{ID: "slow"})[:5])
	closedByPeer(t, silent)
	closedByPeer(t, slow)
	eventually(t, "both counted", func() bool { return b.c.Count(ConnectTimeout) == 2 })

	// A client that has connected is not cut by that deadline.
	c := b.login(t, false, rawmqtt.Options{ID: "patient", KeepAlive: 30})
	probe := b.dial(t, false)
	closedByPeer(t, probe) // another full deadline has passed
	send(t, c, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	expect(t, c, rawmqtt.PINGRESP)
}

// TestRequestThatIsNoWebSocket: the deadline is not over with an answer in HTTP.
func TestRequestThatIsNoWebSocket(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.WebSocket = true })
	c := b.dial(t, false)
	send(t, c, []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer, err := io.ReadAll(c)
	if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestFirstPacket(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.ConnectSize = 1000 })
	for name, tc := range map[string]struct {
		bytes []byte
		event Event
	}{
		"http":    {[]byte("GET / HTTP/1.1\r\n\r\n"), ConnectMalformed},
		"publish": {rawmqtt.Publish(false, 0, "a", 0, nil), ConnectMalformed},
		"large":   {rawmqtt.Connect(false, rawmqtt.Options{ID: strings.Repeat("x", 2000)}), ConnectTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			before := b.c.Count(tc.event)
			c := b.dial(t, false)
			send(t, c, tc.bytes)
			closedByPeer(t, c)
			if got := b.c.Count(tc.event) - before; got != 1 {
				t.Errorf("%v counted %d times", tc.event, got)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	for name, tc := range map[string]struct {
		limits *Limits
		event  Event
	}{
		"total":   {&Limits{Conns: 2}, RefusedTotal},
		"address": {&Limits{PerAddress: 2}, RefusedAddress},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.Limits = tc.limits })
			one := b.login(t, false, rawmqtt.Options{ID: "one"})
			b.login(t, false, rawmqtt.Options{ID: "two"})
			three := b.dial(t, false)
			closedByPeer(t, three)
			if got := b.c.Count(tc.event); got != 1 {
				t.Errorf("refusals counted: %d", got)
			}
			_ = one.Close()
			eventually(t, "place given back", func() bool { n, _ := tc.limits.Open(); return n == 1 })
			b.login(t, false, rawmqtt.Options{ID: "four"})
		})
	}
	t.Run("pending", func(t *testing.T) {
		limits := &Limits{Pending: 2}
		b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.Limits = limits })
		for i := range 5 { // accepted clients don't count
			b.login(t, false, rawmqtt.Options{ID: fmt.Sprint("c", i)})
		}
		b.dial(t, false)
		b.dial(t, false)
		eventually(t, "two pending", func() bool { _, n := limits.Open(); return n == 2 })
		closedByPeer(t, b.dial(t, false))
		if got := b.c.Count(RefusedPending); got != 1 {
			t.Errorf("refusals counted: %d", got)
		}
	})
}

func TestStalledReaderIsClosedAndDisturbsNobody(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.PacketLimit = 64 << 10 })
	stalled := b.login(t, false, rawmqtt.Options{ID: "stalled"})
	good := b.login(t, false, rawmqtt.Options{ID: "good"})
	for _, c := range []*rawmqtt.Client{stalled, good} {
		if _, err := c.Sub(1, 1, "t"); err != nil {
			t.Fatal(err)
		}
	}
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	payload := bytes.Repeat([]byte{'p'}, 32<<10)
	for i := range uint16(400) { // 12.5 MiB: more than the kernel's buffers and ours
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, payload))
		expect(t, pub, rawmqtt.PUBACK)
		p := expect(t, good, rawmqtt.PUBLISH)
		send(t, good, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	}
	if got := b.c.Count(SlowConsumer); got != 1 {
		t.Errorf("slow consumers counted: %d", got)
	}
	eventually(t, "stalled client gone", func() bool { _, ok := b.Clients.Get("stalled"); return !ok })
}

func TestKeptSessionWithALongBacklogDrains(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.PacketLimit = 64 << 10 })
	o := rawmqtt.Options{ID: "sleeper", Keep: true}
	c := b.login(t, false, o)
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	eventually(t, "asleep", func() bool { cl, ok := b.Clients.Get("sleeper"); return ok && cl.Closed() })
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	const n = 200 // 6 MiB, six times the output buffer
	for i := range uint16(n) {
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, make([]byte, 32<<10)))
		expect(t, pub, rawmqtt.PUBACK)
	}
	// mochi acknowledges before it stores.
	eventually(t, "all stored", func() bool { cl, ok := b.Clients.Get("sleeper"); return ok && cl.State.Inflight.Len() == n })
	c = b.login(t, false, o)
	for i := range n {
		p, err := c.Expect(rawmqtt.PUBLISH)
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		send(t, c, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	}
}

// pair runs a short conversation over one kind of transport.
func pair(t *testing.T, dial func() *rawmqtt.Client) {
	sub, pub := dial(), dial()
	for i, c := range []*rawmqtt.Client{sub, pub} {
		if p, err := c.Login(rawmqtt.Options{ID: fmt.Sprint("peer", i)}); err != nil || p.Code() != 0 {
			t.Fatal(p, err)
		}
	}
	if _, err := sub.Sub(1, 1, "t/#"); err != nil {
		t.Fatal(err)
	}
	for i, n := range []int{0, 1, 100, 5000, 20_000, 70_000, 900_000} {
		want := bytes.Repeat([]byte{byte(i + 1)}, n)
		send(t, pub, rawmqtt.Publish(false, 2, "t/x", uint16(i+1), want))
		expect(t, pub, rawmqtt.PUBACK)
		p := expect(t, sub, rawmqtt.PUBLISH)
		if !bytes.Equal(p.Payload, want) {
			t.Fatalf("payload of %d bytes came as %d others", n, len(p.Payload))
		}
		send(t, sub, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	}
}

func TestTransports(t *testing.T) {
	cert, roots := testcert.Loopback(t)
	server, client := &tls.Config{Certificates: []tls.Certificate{cert}}, &tls.Config{RootCAs: roots}
	check := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	seen := func(t *testing.T, b *broker, want bool) {
		t.Helper()
		cl, ok := b.Clients.Get("peer0")
		if !ok {
			t.Fatal("no client")
		}
		st := cl.Net.Conn.(*Conn).TLS()
		if (st != nil) != want {
			t.Fatalf("TLS state: %v", st)
		}
		if want {
			if _, err := st.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32); err != nil {
				t.Error(err)
			}
		}
	}
	t.Run("tcp", func(t *testing.T) {
		b := start(t, nil)
		pair(t, func() *rawmqtt.Client { return b.dial(t, false) })
		seen(t, b, false)
	})
	t.Run("tls", func(t *testing.T) {
		b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.TLS = server })
		pair(t, func() *rawmqtt.Client {
			c, err := tls.Dial("tcp", b.addr, client)
			check(t, err)
			t.Cleanup(func() { _ = c.Close() })
			return rawmqtt.New(c, false)
		})
		seen(t, b, true)
		c, err := net.Dial("tcp", b.addr)
		check(t, err)
		_, err = c.Write([]byte("not TLS at all"))
		check(t, err)
		eventually(t, "handshake failure counted", func() bool { return b.c.Count(HandshakeFailed) == 1 })
		_ = c.Close()
	})
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("websocket tls=%v", secure), func(t *testing.T) {
			scheme := "ws://"
			b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) {
				c.WebSocket = true
				c.Path = "/mqtt"
				if secure {
					c.TLS, scheme = server, "wss://"
				}
			})
			d := websocket.Dialer{TLSClientConfig: client, Subprotocols: []string{"mqtt"}}
			pair(t, func() *rawmqtt.Client {
				ws, _, err := d.Dial(scheme+b.addr+"/mqtt", nil)
				check(t, err)
				t.Cleanup(func() { _ = ws.Close() })
				return rawmqtt.New(&wsConn{Conn: ws.NetConn(), ws: ws}, false)
			})
			seen(t, b, secure)
			_, r, err := d.Dial(scheme+b.addr+"/other", nil)
			if err == nil || r.StatusCode != http.StatusNotFound {
				t.Errorf("other path: %v", err)
			}
			_, r, err = d.Dial(scheme+b.addr+"/mqtt", http.Header{"Origin": {"https://evil.example"}})
			if err == nil || r.StatusCode != http.StatusForbidden {
				t.Errorf("foreign origin: %v", err)
			}
			// One that never upgrades is released too.
			c, err := net.Dial("tcp", b.addr)
			check(t, err)
			_ = c.Close()
			eventually(t, "only two left", func() bool { n, _ := b.l.cfg.Limits.Open(); return n == 2 })
		})
	}
}

func TestPahoOverWebSocket(t *testing.T) {
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.WebSocket = true })
	c := paho.NewClient(paho.NewClientOptions().AddBroker("ws://" + b.addr).SetClientID("p").SetProtocolVersion(4))
	if tok := c.Connect(); tok.Wait() && tok.Error() != nil {
		t.Fatal(tok.Error())
	}
	defer c.Disconnect(10)
	got := make(chan string, 1)
	if tok := c.Subscribe("a", 2, func(_ paho.Client, m paho.Message) { got <- string(m.Payload()) }); tok.Wait() && tok.Error() != nil {
		t.Fatal(tok.Error())
	}
	if tok := c.Publish("a", 2, false, "hello"); tok.Wait() && tok.Error() != nil {
		t.Fatal(tok.Error())
	}
	select {
	case s := <-got:
		if s != "hello" {
			t.Errorf("got %q", s)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came")
	}
}

func TestCloseEndsEverything(t *testing.T) {
	b := start(t, nil)
	b.dial(t, false) // never says CONNECT
	v5 := b.login(t, true, rawmqtt.Options{ID: "v5"})
	stalled := b.login(t, false, rawmqtt.Options{ID: "stalled"})
	if _, err := stalled.Sub(1, 0, "#"); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { b.l.Close(nil); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("Close hangs")
	}
	closedByPeer(t, v5)
	b.l.Close(nil)
}

func TestGoodbyeReachesTheClient(t *testing.T) {
	b := start(t, nil)
	c := b.login(t, true, rawmqtt.Options{ID: "c"})
	go b.l.Close(nil)
	if p := expect(t, c, rawmqtt.DISCONNECT); p.Code() != 0x8b {
		t.Errorf("code %#x", p.Code())
	}
}

func TestWritesOfSeveralGoroutinesDoNotInterleave(t *testing.T) {
	client, server := net.Pipe()
	c, err := Wrap(server, Config{PacketLimit: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	const writers, each = 8, 200
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				size := (i * 37) % 9000
				p := Publish{Topic: "t", QoS: 1, PacketID: uint16(w*each + i + 1)}
				payload := bytes.Repeat([]byte{byte(w)}, size)
				switch i % 3 {
				case 0:
					b := c.Begin()
					_ = b.Publish(&p, payload[:size/2], payload[size/2:])
					b.End()
				case 1:
					b := c.Begin()
					_ = b.PublishShared(&p, payload)
					_ = b.Puback(7)
					b.End()
				default:
					_, _ = c.Write(rawmqtt.Publish(false, 2, "t", p.PacketID, payload))
				}
			}
		})
	}
	r := rawmqtt.New(client, false)
	seen := make(map[uint16]bool)
	for len(seen) < writers*each {
		p := expect(t, r, rawmqtt.PUBLISH, rawmqtt.PUBACK)
		w, i := int(p.ID-1)/each, int(p.ID-1)%each
		if len(p.Payload) != (i*37)%9000 || len(bytes.Trim(p.Payload, string(rune(w)))) != 0 {
			t.Fatalf("packet %d is damaged", p.ID)
		}
		seen[p.ID] = true
	}
	wg.Wait()
	_ = c.Close()
	<-c.Gone()
	_ = client.Close()
}

func TestOutputOfAllConnectionsIsBounded(t *testing.T) {
	limits := &Limits{Output: 1 << 20}
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.Limits, c.Buffer = limits, 8<<20 })
	for i := range 4 {
		c := b.login(t, false, rawmqtt.Options{ID: fmt.Sprint("stalled", i)})
		if _, err := c.Sub(1, 0, "t"); err != nil {
			t.Fatal(err)
		}
	}
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	for i := range uint16(300) { // more than the kernel's buffers take
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, make([]byte, 64<<10)))
		expect(t, pub, rawmqtt.PUBACK)
		if n := limits.Buffered(); n > 2<<20 {
			t.Fatalf("%d bytes buffered", n)
		}
	}
	if b.c.Count(SlowConsumer) == 0 {
		t.Error("nobody was closed")
	}
	eventually(t, "all closed or drained", func() bool { return limits.Buffered() <= 1<<20 })
}

// TestNotifyDrained: whoever waits for room is told, whatever size it needs.
func TestNotifyDrained(t *testing.T) {
	client, server := net.Pipe()
	defer client.Close()
	c, err := Wrap(server, Config{})
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan struct{}, 1)
	c.OnDrained(func() { told <- struct{}{} })
	w := c.Begin()
	if w.NotifyDrained(0) {
		t.Error("told to wait for an empty buffer")
	}
	if err := w.Raw(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	if !w.NotifyDrained(0) {
		t.Error("not told to wait")
	}
	w.End()
	select {
	case <-told:
		t.Error("told too early")
	default:
	}
	if _, err := io.ReadFull(client, make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	<-told
	_ = c.Close()
	<-c.Gone()
	w = c.Begin()
	if w.Raw([]byte{1}) == nil || w.NotifyDrained(0) {
		t.Error("a closed connection takes output")
	}
	w.End()
}

// TestStalledPeerIsCut: a peer that takes no byte for too long is closed.
func TestStalledPeerIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		counters := new(Counters)
		const stall = 7 * time.Second
		c, err := Wrap(server, Config{StallTimeout: stall, Counters: counters})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := c.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		<-c.Gone()
		if d := time.Since(begin); d < stall || d > 2*stall {
			t.Errorf("cut after %v", d)
		}
		if !errors.Is(c.Cause(), ErrStalled) || counters.Count(WriteStalled) != 1 {
			t.Errorf("cause %v, counted %d", c.Cause(), counters.Count(WriteStalled))
		}
		if _, err := c.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after that: %v", err)
		}
	})
}

// TestLingerCountsFromTheWrite: what was written before Close leaves, however late the
// goroutine that has to do it comes to it.
func TestLingerCountsFromTheWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		c, err := Wrap(server, Config{})
		if err != nil {
			t.Fatal(err)
		}
		late := make(chan struct{})
		c.OnDrained(func() { <-late })
		w := c.Begin()
		if err := w.Raw([]byte("first")); err != nil || !w.NotifyDrained(0) {
			t.Fatal(err)
		}
		w.End()
		read := func(want string) {
			t.Helper()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(client, got); err != nil || string(got) != want {
				t.Errorf("%q, %v; want %q", got, err, want)
			}
		}
		read("first")
		synctest.Wait() // the flusher is busy with something else
		if _, err := c.Write([]byte("refused")); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		time.Sleep(10 * time.Second)
		close(late)
		read("refused")
		<-c.Gone()
	})
}

// TestOutputOfOneConnectionIsBounded: what goes past the buffer ends the connection, and
// what is in it has some time to leave then.
func TestOutputOfOneConnectionIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		counters := new(Counters)
		const most, linger = 100 << 10, 3 * time.Second
		c, err := Wrap(server, Config{Buffer: most, Linger: linger, Counters: counters})
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n+10<<10 <= most; n += 10 << 10 {
			if _, err := c.Write(make([]byte, 10<<10)); err != nil {
				t.Fatalf("after %d bytes: %v", n, err)
			}
		}
		if _, err := c.Write(make([]byte, 20<<10)); err == nil {
			t.Error("the buffer takes more than it may")
		}
		if n := counters.Count(SlowConsumer); n != 1 {
			t.Errorf("counted %d times", n)
		}
		<-c.Gone()

		client, server = net.Pipe()
		defer client.Close()
		c, err = Wrap(server, Config{Linger: linger, Counters: counters})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, 10<<10)); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		_ = c.Close()
		<-c.Gone()
		if d := time.Since(begin); d != linger {
			t.Errorf("gone after %v", d)
		}
	})
}
