package matrix

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// mallory is a peer on bare TCP who makes up frames.
type mallory struct {
	t     *testing.T
	conn  net.Conn
	r     *route.Reader
	write sync.Mutex
}

func newMallory(t *testing.T, h hub) *mallory {
	t.Helper()
	conn, err := net.Dial("tcp", h.tcp())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write([]byte{route.Preamble}); err != nil {
		t.Fatal(err)
	}
	return &mallory{t: t, conn: conn, r: route.NewReader(conn, route.Limits{Frame: 1 << 20})}
}

func (m *mallory) send(onward, ret route.Route, payload []byte) {
	m.t.Helper()
	body := route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload})
	m.write.Lock()
	defer m.write.Unlock()
	if _, err := m.conn.Write(append(route.AppendFrameHeader(nil, len(body)), body...)); err != nil && !errors.Is(err, net.ErrClosed) {
		m.t.Error(err)
	}
}

func (m *mallory) read() (route.Frame, error) {
	body, err := m.r.Next()
	if err != nil {
		return route.Frame{}, err
	}
	return route.ParseFrame(bytes.Clone(body), route.Limits{Frame: 1 << 20, Hops: 100})
}

func (m *mallory) next() route.Frame {
	m.t.Helper()
	_ = m.conn.SetReadDeadline(time.Now().Add(patience))
	f, err := m.read()
	if err != nil {
		m.t.Fatal(err)
	}
	return f
}

// flipped is b with one bit changed.
func flipped(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// TestMadeUpFrames has somebody between two of our devices who adds to their
// handshake forged messages 2 and 3 and data before message 3, and to their data
// outer return routes. They have their channel all the same, and count it.
func TestMadeUpFrames(t *testing.T) {
	for name, start := range map[string]struct{ left, right func(*testing.T) party }{
		"on MQTT": {goOnMQTT, goOnMQTT}, "on TCP": {goOnTCP, goOnTCP},
	} {
		t.Run(name, func(t *testing.T) { madeUpFrames(t, start.left(t).(*goParty), start.right(t).(*goParty)) })
	}
}

func madeUpFrames(t *testing.T, bob, alice *goParty) {
	h := startOurHub(t)
	bob.connect(h)
	alice.connect(h)
	to := route.To(bob.listen(trust{alice.identifier()}, "")...)
	m := newMallory(t, h)
	m.send(route.To("forwarding_service"), route.To("m"), bare.AppendString(nil, "register"))
	own, _ := m.next().Return.Last()

	dialled := make(chan error, 1)
	go func() { dialled <- alice.dial([]string{own.Value, "listener"}, trust{bob.identifier()}) }()
	first := m.next()
	toAlice := first.Return
	m.send(to, route.To("from-bob"), first.Payload)
	second := m.next()
	toBob := second.Return
	m.send(toBob, route.To("x", "y"), rustpeer.Content(1, 1, 200)) // data before message 3
	m.send(toBob, nil, make([]byte, 5))
	for i := range 3 {
		m.send(toAlice, route.To("from-alice"), flipped(second.Payload, 40*i))
	}
	m.send(toAlice, route.To("from-alice"), second.Payload)
	third := m.next()
	m.send(toBob, nil, flipped(third.Payload, 60))
	m.send(toBob, route.To("from-bob"), third.Payload)
	m.send(toBob, route.To("from-bob"), third.Payload) // and again, as data

	_ = m.conn.SetReadDeadline(time.Time{})
	passed := make(chan struct{})
	defer func() { _ = m.conn.Close(); <-passed }()
	go func() {
		defer close(passed)
		for {
			f, err := m.read()
			switch hop, _ := f.Onward.First(); {
			case errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed):
				return
			case err != nil:
				t.Error(err)
				return
			case hop.Value == "from-alice":
				m.send(toBob, route.To("from-bob", "more", "hops"), f.Payload)
			default:
				m.send(toAlice, route.To("elsewhere"), f.Payload)
			}
		}
	}()
	if err := <-dialled; err != nil {
		t.Fatalf("dial: %v", err)
	}
	alice.up()
	bob.up()
	for _, p := range []*goParty{alice, bob, alice} {
		for _, size := range []int{0, 7, 70_000} {
			if err := p.request(rustpeer.Content(1, uint64(size), size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !alice.nothing() || !bob.nothing() {
		t.Error("something made up was delivered")
	}
	a, b := alice.node.Stats().Channels.Dropped, bob.node.Stats().Channels.Dropped
	if a.Of(channel.DropHandshake) != 3 {
		t.Errorf("who dialled counts %v", a)
	}
	if b.Of(channel.DropShort) != 1 || b.Total() != 4 {
		t.Errorf("who listens counts %v", b)
	}
}

// TestMadeUpFramesAtTheHub has them at the hub's own listener, where a device talks
// to it meanwhile.
func TestMadeUpFramesAtTheHub(t *testing.T) {
	h, _ := apiHub(t)
	p := goOnTCP(t).(*goParty)
	p.connect(h)
	p.must(p.dial([]string{"api"}, trust{h.h.Identifier().String()}))
	p.up()
	m := newMallory(t, h)
	m.send(route.To("api"), route.To("m"), make([]byte, 5)) // no message 1
	m.send(route.To("api"), route.To("m"), rustpeer.Content(2, 1, 32))
	second := m.next()
	// What a handshake keeps of what comes before message 3 is bounded.
	const early, kept = 5000, 4096 + 1 // one of them in hand
	for range early {
		m.send(second.Return, route.To("x", "y"), rustpeer.Content(1, 1, 200))
	}
	m.send(second.Return, nil, make([]byte, 5))
	m.send(route.To("echo"), route.To("m"), nil)
	m.next()

	if err := p.request([]byte("there?")); err != nil {
		t.Error(err)
	}
	if err := p.node.Close(); err != nil {
		t.Error(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(patience); ; <-tick.C {
		c := h.h.Status().Counters
		held := early - c["sealmq_api_dropped_total{reason=early}"] - c["sealmq_api_dropped_total{reason=handshake}"]
		if c["sealmq_api_dropped_total{reason=short}"] == 2 && held <= kept && c["sealmq_api_handshakes_open"] == 1 {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("counters %v", c)
		}
	}
}

// talk has p ask its peer's echo again and again until stop is called, which returns
// how often it had an answer. None may be missing, or late.
func talk(t *testing.T, p party) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	rounds := make(chan int, 1)
	go func() {
		n := 0
		defer func() { rounds <- n }()
		for ; ctx.Err() == nil; n++ {
			begin := time.Now()
			if err := p.request(rustpeer.Content(3, uint64(n), n%5000)); err != nil {
				t.Errorf("round %d: %v", n, err)
				return
			}
			if took := time.Since(begin); took > 20*time.Second { // even on a machine with much else to do
				t.Errorf("round %d took %v", n, took)
			}
		}
	}()
	return func() int { cancel(); return <-rounds }
}

// TestBadInputAtThePort sends a hub's TCP port everything that is none of the
// protocol's, and what is and leads nowhere, while a device on MQTT and one on TCP
// talk: nothing of theirs is lost or late, and each input is counted.
func TestBadInputAtThePort(t *testing.T) {
	h := startOurHub(t).(*ourHub)
	bob, alice := goOnMQTT(t).(*goParty), goOnTCP(t).(*goParty)
	bob.connect(h)
	alice.connect(h)
	bob.must(alice.dial(bob.listen(nil, ""), trust{bob.identifier()}))
	alice.up()
	bob.up()
	before := h.heap()

	stop := talk(t, alice)

	const hop, reply = "\x82\x00\x44echo", "\x82\x00\x41r"
	ends := func(first string, pieces ...string) { // closed by the hub or by us
		c, err := net.Dial("tcp", h.tcp())
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for _, b := range append([]string{first}, pieces...) {
			if _, err := io.WriteString(c, b); err != nil {
				return
			}
		}
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.CloseWrite()
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%x stays open", first)
		}
	}
	frame := func(body string) string { return string(route.AppendFrameHeader(nil, len(body))) + body }
	for range 20 {
		ends("\x00")
		ends("GET / HTTP/1.1\r\n\r\n")
		ends("\x01", "\x00\x00\x00\x00")
		ends("\x01", "\x01\x00\x00\x01")
		ends("\x01", "\x00\x00\x00\x41\x84")
		for _, body := range []string{
			"\xff", "\x80", "\x82\x81" + hop + "\x81" + reply, "\x84\x81" + hop + "\x81" + reply + "\xf6\xf6", "\xd8\x18\x84",
			"\x84\x81\x82\x00\x64echo\x81" + reply + "\x41x\xf6", "\x84\x81\x82\x19\x01\x00\x44echo\x81" + reply + "\x41x\xf6",
			"\x84\x81" + hop + "\x81" + reply + "\x5f\x41x\xff\xf6", "\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
		} {
			ends("\x01", frame(body))
		}
	}
	ends("\x01", "\x01\x00\x00\x00", string(make([]byte, route.MaxFrame)))
	m := newMallory(t, h)
	byTCP := route.Address{Transport: route.TCP, Value: h.tcp()}
	m.send(route.Route{byTCP, route.Local("x")}, route.To("r"), nil)
	m.send(nil, nil, nil)
	m.send(route.To("nobody"), route.To("r"), nil)
	m.send(route.To("forwarding_service"), route.To("r"), []byte{0xff}) // no string
	for _, alias := range []string{"a#b", "", "echo"} {
		m.send(route.To("static_forwarding_service"), route.To("r"), bare.AppendString(nil, alias))
	}
	m.send(route.To("forwarding_service"), route.To("m"), bare.AppendString(nil, "register"))
	own, _ := m.next().Return.Last()
	// Relays of the hub that lead to each other, and a peer that sends again what
	// comes through its own.
	for alias, next := range map[string]string{"x": "forward_to_y", "y": "forward_to_x"} {
		owner := bridge.Principal{Identity: bob.id.Identifier(), Proven: true}
		_, err := h.h.Bridge().Register(bridge.Registration{Owner: owner, Route: route.To(next), Alias: alias})
		bob.must(err)
	}
	m.send(route.To("forward_to_x", "w"), route.To("r"), nil)
	var ret route.Route
	for hops := 0; ; hops++ {
		m.send(route.To(own.Value, own.Value), ret, nil)
		m.send(route.To("echo"), route.To("alive"), nil)
		f := m.next()
		if f.Onward.Equal(route.To("alive")) {
			break
		}
		ret = f.Return
		if m.next(); hops > 100 {
			t.Fatal("a frame goes round for ever")
		}
	}
	for range 100 { // never read
		m.send(route.To("echo"), route.To("r"), make([]byte, 100<<10))
		m.send(route.To(own.Value, own.Value, own.Value), nil, make([]byte, 100<<10))
	}
	var silent []net.Conn
	for range 500 {
		c, err := net.Dial("tcp", h.tcp())
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	after := h.heap()
	for _, c := range silent {
		_ = c.Close()
	}
	rounds := stop()
	t.Logf("%d round trips meanwhile; heap from %d to %d KiB", rounds, before>>10, after>>10)
	if rounds == 0 || after > before+64<<20 {
		t.Errorf("%d round trips, heap from %d to %d bytes", rounds, before, after)
	}
	for key, want := range map[string]float64{
		"sealmq_tcp_events_total{event=preamble-wrong}":   40,
		"sealmq_tcp_events_total{event=framing}":          40,
		"sealmq_tcp_events_total{event=cut-short}":        20,
		"sealmq_tcp_events_total{event=malformed}":        180,
		"sealmq_tcp_events_total{event=oversized}":        1,
		"sealmq_frames_dropped_total{reason=too-large}":   1,
		"sealmq_frames_dropped_total{reason=malformed}":   180,
		"sealmq_frames_dropped_total{reason=unknown}":     1,
		"sealmq_frames_dropped_total{reason=foreign-hop}": 1,
		"sealmq_frames_dropped_total{reason=heartbeat}":   1,
		"sealmq_frames_dropped_total{reason=bad-request}": 1,
		"sealmq_frames_dropped_total{reason=bad-alias}":   3,
		"sealmq_frames_dropped_total{reason=loop}":        1,
		"sealmq_frames_dropped_total{reason=route-limit}": 1,
	} {
		tick := time.NewTicker(time.Millisecond)
		for limit := time.Now().Add(patience); h.h.Status().Counters[key] != want && time.Now().Before(limit); <-tick.C {
		}
		tick.Stop()
		if n := h.h.Status().Counters[key]; n != want {
			t.Errorf("%s is %v, want %v", key, n, want)
		}
	}
}

// heap is what the process, and so the hub, has on its heap.
func (h *ourHub) heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
