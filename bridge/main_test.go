package bridge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type testSigner struct{}

func (testSigner) Identifier() identity.Identifier { return identity.Identifier{1, 2, 3} }
func (testSigner) ChangeHistory() []byte           { return []byte("history") }
func (testSigner) SignHello(msg []byte) ([]byte, error) {
	return append([]byte("signed:"), msg...), nil
}

// newTestBridge returns a bridge that is closed, and whose sums are checked, at
// the end of the test.
func newTestBridge(t testing.TB, change func(*Config)) *Bridge {
	t.Helper()
	cfg := Config{Key: [32]byte{7}, Identity: testSigner{}}
	if change != nil {
		change(&cfg)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		checkSums(t, b)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		checkSums(t, b)
	})
	return b
}

// checkSums holds the bridge to its books, and the books to what is there.
func checkSums(t testing.TB, b *Bridge) {
	t.Helper()
	ports := quietPorts(t, b)
	c := b.Counters()
	if n := c.Lost(); n != 0 {
		t.Errorf("%d frames without a fate: %+v", n, c)
	}
	var frames, size, waits, waitBytes int
	for _, p := range ports {
		p.mu.Lock()
		n, sz := 0, 0
		if p.box != nil {
			p.box.Scan(func(it *Item) bool { n++; sz += len(it.Frame); return true })
		}
		if n != p.frames || sz != p.bytes {
			t.Errorf("port %s thinks it has %d frames, %d bytes; has %d, %d", p.addr, p.frames, p.bytes, n, sz)
		}
		frames += n
		size += sz
		for _, list := range [][]*waiting{p.parked, p.held} {
			for _, w := range list {
				waits += w.frames
				waitBytes += w.bytes
			}
		}
		p.mu.Unlock()
	}
	if c.Queued != int64(frames) || c.QueuedBytes != int64(size) {
		t.Errorf("queued %d frames, %d bytes; ports have %d, %d", c.Queued, c.QueuedBytes, frames, size)
	}
	if c.Waiting != int64(waits) || c.WaitingBytes != int64(waitBytes) {
		t.Errorf("waiting %d frames, %d bytes; ports have %d, %d", c.Waiting, c.WaitingBytes, waits, waitBytes)
	}
}

// quietPorts returns the ports once the bridge's own goroutines deliver to none of them.
func quietPorts(t testing.TB, b *Bridge) (ports []*Port) {
	t.Helper()
	b.mu.Lock()
	for _, p := range b.devices {
		ports = append(ports, p)
	}
	for p := range b.streams {
		ports = append(ports, p)
	}
	b.mu.Unlock()
	pumping := func(p *Port) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.pumping
	}
	for end := time.Now().Add(20 * time.Second); slices.ContainsFunc(ports, pumping); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("a delivery does not end")
		}
	}
	return ports
}

// fakeConn is a front's connection in memory.
type fakeConn struct {
	mu         sync.Mutex
	link       *Link
	window     int  // entries that are taken without an acknowledgement
	auto       bool // acknowledge on delivery
	got        []Entry
	unacked    int
	direct     [][]byte
	noDirect   bool
	deliveries int
	kicked     KickReason
	acks       []uint64
	changed    chan struct{} // closed and replaced on each change
	exporter   []byte
	addr       net.Addr
}

func newFakeConn(auto bool) *fakeConn {
	return &fakeConn{window: 1 << 30, auto: auto, changed: make(chan struct{})}
}

func (c *fakeConn) ExporterValue() []byte { return c.exporter }
func (c *fakeConn) RemoteAddr() net.Addr  { return c.addr }

func (c *fakeConn) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *fakeConn) Deliver(entries []Entry) int {
	c.mu.Lock()
	c.deliveries++
	n := 0
	for _, e := range entries {
		if e.Class == route.Stored {
			if c.unacked >= c.window {
				break
			}
			if !c.auto {
				c.unacked++
			}
		}
		e.Frame = bytes.Clone(e.Frame)
		c.got = append(c.got, e)
		n++
	}
	l := c.link
	c.change()
	c.mu.Unlock()
	if c.auto && n > 0 && l != nil {
		l.Delivered(entries[n-1].Seq)
	}
	return n
}

func (c *fakeConn) Direct(frame []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noDirect {
		return false
	}
	c.direct = append(c.direct, bytes.Clone(frame))
	c.change()
	return true
}

func (c *fakeConn) Kick(r KickReason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kicked = r
	c.change()
}

func (c *fakeConn) Acked(token uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acks = append(c.acks, token)
	c.change()
}

// wait waits until f, called with the connection locked, holds.
func (c *fakeConn) wait(t testing.TB, what string, f func() bool) {
	t.Helper()
	end := time.After(30 * time.Second)
	for {
		c.mu.Lock()
		ok, ch := f(), c.changed
		c.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-ch:
		case <-end:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func (c *fakeConn) entries() []Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Entry(nil), c.got...)
}

func (c *fakeConn) acked() []uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]uint64(nil), c.acks...)
}

// ack acknowledges everything that was delivered.
func (c *fakeConn) ack() {
	c.mu.Lock()
	c.unacked = 0
	l, n := c.link, len(c.got)
	var last uint64
	if n > 0 {
		last = c.got[n-1].Seq
	}
	c.mu.Unlock()
	l.Delivered(last)
}

// limit sets how many entries are taken without an acknowledgement.
func (c *fakeConn) limit(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.window = n
}

// refuse has Direct refuse everything, or nothing.
func (c *fakeConn) refuse(all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noDirect = all
}

// notices returns the reasons noticed so far.
func (c *fakeConn) notices(t testing.TB) []hubproto.Notice {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []hubproto.Notice
	for _, raw := range c.direct {
		f, err := route.ParseFrame(raw, route.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if !f.Onward.Equal(route.To(hubproto.NoticeTarget)) {
			continue
		}
		if !f.Return.Equal(route.To(hubproto.NoticeSource)) {
			t.Fatalf("notice from %v", f.Return)
		}
		n, err := hubproto.ParseNotice(f.Payload)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, *n)
	}
	return out
}

func identifierOf(name string) (id identity.Identifier) {
	copy(id[:], name)
	return id
}

func device(name string) Principal {
	return Principal{Identity: identifierOf(name), ClientID: name, Role: RoleDevice, Proven: true}
}

type peer struct {
	t testing.TB
	*Link
	conn *fakeConn
	tok  uint64
}

// connect connects a device that has subscribed, but not said hello.
func connect(t testing.TB, b *Bridge, who Principal, auto bool) *peer {
	t.Helper()
	c := newFakeConn(auto)
	l, err := b.ConnectDevice(who, c)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	c.link = l
	c.mu.Unlock()
	l.Subscribed()
	return &peer{t: t, Link: l, conn: c}
}

// attach connects a device and has it say hello.
func attach(t testing.TB, b *Bridge, name string, auto bool) *peer {
	t.Helper()
	p := connect(t, b, device(name), auto)
	p.sayHello(false, 1)
	return p
}

func stream(t testing.TB, b *Bridge, auto bool) *peer {
	t.Helper()
	c := newFakeConn(auto)
	l, err := b.ConnectStream(Principal{Role: RoleDevice}, c)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	c.link = l
	c.mu.Unlock()
	return &peer{t: t, Link: l, conn: c}
}

func (p *peer) sayHello(fresh bool, epoch byte) *hubproto.HelloAnswer {
	p.t.Helper()
	req := hubproto.HelloRequest{Fresh: fresh, Epoch: [16]byte{epoch}, Nonce: [16]byte{9}}
	body, err := req.Marshal()
	if err != nil {
		p.t.Fatal(err)
	}
	p.conn.mu.Lock()
	before := len(p.conn.direct)
	p.conn.mu.Unlock()
	p.send(route.To(ServiceHello), route.To("me"), body)
	p.conn.mu.Lock()
	defer p.conn.mu.Unlock()
	for _, raw := range p.conn.direct[before:] {
		f, err := route.ParseFrame(raw, route.Limits{})
		if err != nil {
			p.t.Fatal(err)
		}
		if !f.Return.Equal(route.To(ServiceHello)) {
			continue
		}
		if !f.Onward.Equal(route.To("me")) {
			p.t.Fatalf("answer to hello goes to %v", f.Onward)
		}
		a, err := hubproto.ParseHelloAnswer(f.Payload)
		if err != nil {
			p.t.Fatal(err)
		}
		return a
	}
	return nil
}

func frame(onward, ret route.Route, payload []byte) []byte {
	return route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload})
}

// send sends one stored frame and returns its token.
func (p *peer) send(onward, ret route.Route, payload []byte) uint64 {
	p.tok++
	_ = p.Receive(frame(onward, ret, payload), route.Stored, p.conn, p.tok)
	return p.tok
}

// number sends a frame whose payload is a number.
func (p *peer) number(to string, n int) uint64 {
	return p.send(route.To(to, "app"), nil, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

// numbers returns the numbers delivered to the peer.
func (p *peer) numbers() []int {
	var out []int
	for _, e := range p.conn.entries() {
		f, err := route.ParseFrame(e.Frame, route.Limits{})
		if err != nil {
			p.t.Fatal(err)
		}
		if len(f.Payload) == 4 {
			out = append(out, int(binary.BigEndian.Uint32(f.Payload)))
		}
	}
	return out
}

// frames returns the frames delivered to the peer.
func (p *peer) frames() []route.Frame {
	var out []route.Frame
	for _, e := range p.conn.entries() {
		f, err := route.ParseFrame(e.Frame, route.Limits{})
		if err != nil {
			p.t.Fatal(err)
		}
		out = append(out, f)
	}
	return out
}

// register registers a forwarder and returns its address, "" when refused.
func (p *peer) register(service, payload, m string) string {
	p.t.Helper()
	before := len(p.conn.entries())
	p.send(route.To(service), route.To(m), bare.AppendString(nil, payload))
	for _, f := range p.frames()[before:] {
		if !f.Onward.Equal(route.To(m)) || len(f.Return) != 1 {
			continue
		}
		s, err := bare.StringExact(f.Payload)
		if err != nil {
			p.t.Fatal(err)
		}
		if s != f.Return[0].Value {
			p.t.Fatalf("answer %q from %v", s, f.Return)
		}
		return s
	}
	return ""
}

func seq(from, to int) []int {
	out := make([]int, 0, to-from)
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}

func equal(t testing.TB, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: got %s, want %s", what, g, w)
	}
}
