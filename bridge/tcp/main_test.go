package tcp

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/testpipe"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noDeadline takes a deadline away.
var noDeadline time.Time

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

type testSigner struct{}

func (testSigner) Identifier() identity.Identifier { return identity.Identifier{1, 2, 3} }
func (testSigner) ChangeHistory() []byte           { return []byte("history") }
func (testSigner) SignHello(msg []byte) ([]byte, error) {
	return append([]byte("signed:"), msg...), nil
}

// hub is a bridge with this front, reached over loopback TCP, or over pipes that
// need no file descriptors and work inside synctest.
type hub struct {
	t      testing.TB
	b      *bridge.Bridge
	s      *Server
	counts *Counters
	dial   func() (net.Conn, error)
	stop   func()
}

type options struct {
	pipes  bool
	fails  int // of pipes: how often accept fails first
	bridge func(*bridge.Config)
	server func(*Config)
}

func newHub(t testing.TB, o options) *hub {
	t.Helper()
	bc := bridge.Config{Key: [32]byte{7}, Identity: testSigner{}}
	if o.bridge != nil {
		o.bridge(&bc)
	}
	b, err := bridge.New(bc)
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{t: t, b: b, counts: new(Counters)}
	sc := Config{Bridge: b, Frames: bc.Limits, Counters: h.counts}
	if o.server != nil {
		o.server(&sc)
	}
	if h.s, err = New(sc); err != nil {
		t.Fatal(err)
	}
	var ln net.Listener
	if o.pipes {
		p := testpipe.Listen()
		p.Fails = o.fails
		ln, h.dial = p, p.Dial
	} else {
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		h.dial = func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) }
	}
	served := make(chan error, 1)
	go func() { served <- h.s.Serve(ln) }()
	h.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := h.s.Close(ctx); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve: %v", err)
		}
		if n := h.s.Conns(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		if n := h.s.Buffered(); n != 0 {
			t.Errorf("%d bytes of output are left", n)
		}
		c := b.Counters()
		if n := c.Lost(); n != 0 {
			t.Errorf("%d frames without a fate: %+v", n, c)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

// peer is a client that does only what it is told.
type peer struct {
	net.Conn
	t testing.TB
	r *route.Reader
}

// raw connects and sends nothing.
func (h *hub) raw() *peer {
	h.t.Helper()
	c, err := h.dial()
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return &peer{Conn: c, t: h.t, r: route.NewReader(c, route.Limits{Frame: route.MaxFrame})}
}

// connect connects and sends the preamble.
func (h *hub) connect() *peer {
	h.t.Helper()
	p := h.raw()
	p.write([]byte{route.Preamble})
	return p
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	p.SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.Write(b); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

// body sends a body behind its length.
func (p *peer) body(b []byte) {
	p.t.Helper()
	p.write(framed(b))
}

func framed(body []byte) []byte {
	return append(route.AppendFrameHeader(nil, len(body)), body...)
}

func (p *peer) send(onward, ret route.Route, payload []byte) {
	p.t.Helper()
	p.body(route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload}))
}

// next returns the next frame.
func (p *peer) next() route.Frame {
	p.t.Helper()
	p.SetReadDeadline(time.Now().Add(patience))
	body, err := p.r.Next()
	if err != nil {
		p.t.Fatalf("waiting for a frame: %v", err)
	}
	f, err := route.ParseFrame(bytes.Clone(body), route.Limits{Frame: route.MaxFrame, Hops: 1000})
	if err != nil {
		p.t.Fatal(err)
	}
	return f
}

// alive asks echo, and returns the frames that came before its answer.
func (p *peer) alive() (before []route.Frame) {
	p.t.Helper()
	p.send(route.To("echo"), route.To("alive"), []byte("there?"))
	for {
		f := p.next()
		if f.Onward.Equal(route.To("alive")) && f.Return.Equal(route.To("echo")) {
			return before
		}
		before = append(before, f)
	}
}

// closed waits for the hub to end the connection.
func (p *peer) closed() {
	p.t.Helper()
	p.SetReadDeadline(time.Now().Add(patience))
	rest, err := io.ReadAll(p.Conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Error("the hub keeps the connection open")
	}
	for _, b := range rest {
		if b != route.Preamble {
			p.t.Errorf("the hub sent %x before it closed", rest)
			break
		}
	}
}

// register asks for a forwarder and returns its address, "" when refused.
func (p *peer) register(service, text, m string) string {
	p.t.Helper()
	p.send(route.To(service), route.To(m), bare.AppendString(nil, text))
	for _, f := range p.alive() {
		if !f.Onward.Equal(route.To(m)) || len(f.Return) != 1 {
			continue
		}
		if s, err := bare.StringExact(f.Payload); err != nil || s != f.Return[0].Value {
			p.t.Errorf("the answer %q comes from %v (%v)", f.Payload, f.Return, err)
		}
		return f.Return[0].Value
	}
	return ""
}

func (p *peer) dynamic(m string) string {
	p.t.Helper()
	addr := p.register("forwarding_service", "register", m)
	if !strings.HasPrefix(addr, "FWD_") {
		p.t.Fatalf("dynamic forwarder %q", addr)
	}
	return addr
}

// counted waits until an event has been counted so often.
func (h *hub) counted(e Event, want uint64) {
	h.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); h.counts.Count(e) != want && time.Now().Before(end); {
		<-tick.C
	}
	if n := h.counts.Count(e); n != want {
		h.t.Errorf("%v counted %d times, want %d", e, n, want)
	}
}

func (h *hub) dropped(d bridge.Drop) uint64 {
	c := h.b.Counters()
	return c.Dropped[d]
}

// wantDrops waits until so many frames were dropped for a reason.
func (h *hub) wantDrops(d bridge.Drop, want uint64) {
	h.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); h.dropped(d) != want && time.Now().Before(end); {
		<-tick.C
	}
	if n := h.dropped(d); n != want {
		h.t.Errorf("%d frames dropped as %v, want %d", n, d, want)
	}
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}
