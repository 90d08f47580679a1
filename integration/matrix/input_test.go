package matrix

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

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
	return route.ParseFrame(bytes.Clone(body), route.Limits{Frame: 1 << 20})
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
	const early = 60
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
		// All that a handshake keeps are frames within the window.
		held := early - c["sealmq_api_dropped_total{reason=early}"] - c["sealmq_api_dropped_total{reason=handshake}"]
		if c["sealmq_api_dropped_total{reason=short}"] == 2 && held <= channel.Window+1 && c["sealmq_api_handshakes_open"] == 1 {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("counters %v", c)
		}
	}
}
