package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// packet is a frame between two nodes of a testNet.
type packet struct {
	from, to string
	frame    route.Frame // onward without the hub's hop, return stamped
	class    route.Class
}

func (p packet) clone() packet {
	p.frame.Onward, p.frame.Return = p.frame.Onward.Clone(), p.frame.Return.Clone()
	p.frame.Payload = bytes.Clone(p.frame.Payload)
	return p
}

// testNet is a hub between nodes. A node's name is its hub address.
type testNet struct {
	mu     sync.Mutex
	nodes  map[string]*testNode
	mangle func(packet) []packet // nil passes everything on
	log    []packet
}

func newTestNet() *testNet { return &testNet{nodes: map[string]*testNode{}} }

// onPacket sees every packet and says what is delivered in its place.
func (n *testNet) onPacket(f func(packet) []packet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mangle = f
}

func (n *testNet) pass(p packet) {
	n.mu.Lock()
	n.log = append(n.log, p.clone())
	out := []packet{p}
	if n.mangle != nil {
		out = n.mangle(p)
	}
	n.mu.Unlock()
	for _, p := range out {
		n.inject(p)
	}
}

// inject delivers a packet as it is.
func (n *testNet) inject(p packet) {
	n.mu.Lock()
	to := n.nodes[p.to]
	n.mu.Unlock()
	if to != nil {
		to.arrive(p.clone())
	}
}

// seen returns the packets that went from a node, as they were sent.
func (n *testNet) seen(from string) (out []packet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.log {
		if p.from == from {
			out = append(out, p.clone())
		}
	}
	return out
}

// testNode is a Router with one dispatching goroutine.
type testNode struct {
	net     *testNet
	name    string
	mayWait bool // set before anything arrives

	mu       sync.Mutex
	handlers map[string]func(Inbound)
	full     chan struct{} // while set, Send waits for it
	failing  error

	inbox chan Inbound
	quit  chan struct{}
	done  chan struct{}
}

func (n *testNet) node(t testing.TB, name string) *testNode {
	node := &testNode{
		net: n, name: name, handlers: map[string]func(Inbound){},
		inbox: make(chan Inbound, 65536), quit: make(chan struct{}), done: make(chan struct{}),
	}
	n.mu.Lock()
	n.nodes[name] = node
	n.mu.Unlock()
	go node.run()
	t.Cleanup(node.stop)
	return node
}

func (n *testNode) stop() {
	select {
	case <-n.quit:
	default:
		close(n.quit)
	}
	<-n.done
}

func (n *testNode) run() {
	defer close(n.done)
	for {
		select {
		case in := <-n.inbox:
			first, _ := in.Frame.Onward.First()
			n.mu.Lock()
			h := n.handlers[first.Value]
			n.mu.Unlock()
			if h != nil {
				h(in)
			}
		case <-n.quit:
			return
		}
	}
}

func (n *testNode) arrive(p packet) {
	source, _ := p.frame.Return.First()
	n.inbox <- Inbound{Frame: p.frame, Class: p.class, Source: source.Value, MayWait: n.mayWait}
}

func (n *testNode) Register(addr string, h func(Inbound)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.handlers[addr] != nil {
		return fmt.Errorf("test node: %q is taken", addr)
	}
	n.handlers[addr] = h
	return nil
}

func (n *testNode) Unregister(addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.handlers, addr)
}

func (n *testNode) registered() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.handlers)
}

// block makes Send wait until the returned function is called.
func (n *testNode) block() (unblock func()) {
	gate := make(chan struct{})
	n.mu.Lock()
	n.full = gate
	n.mu.Unlock()
	return func() {
		n.mu.Lock()
		n.full = nil
		n.mu.Unlock()
		close(gate)
	}
}

func (n *testNode) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failing = err
}

func (n *testNode) Send(ctx context.Context, f route.Frame, c route.Class) error {
	n.mu.Lock()
	gate, failing := n.full, n.failing
	first, _ := f.Onward.First()
	local := n.handlers[first.Value] != nil
	n.mu.Unlock()
	if failing != nil {
		return failing
	}
	if local {
		p := packet{frame: f, class: c}.clone()
		n.inbox <- Inbound{Frame: p.frame, Class: c}
		return nil
	}
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	p := packet{from: n.name, to: first.Value, class: c, frame: f}.clone()
	p.frame.Onward = p.frame.Onward.Rest()
	p.frame.Return = p.frame.Return.Prepend(route.Local(n.name))
	n.net.pass(p)
	return nil
}

// party is a node with an endpoint, and what was delivered to it.
type party struct {
	*testNode
	id  *identity.Private
	reg *identity.MemoryRegistry
	ep  *Endpoint

	got chan Delivery
}

func newIdentity(t testing.TB) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (n *testNet) party(t testing.TB, name string, change ...func(*Config)) *party {
	t.Helper()
	p := &party{
		testNode: n.node(t, name), id: newIdentity(t), reg: identity.NewMemoryRegistry(0),
		got: make(chan Delivery, 65536),
	}
	cfg := Config{Identity: p.id, Registry: p.reg, Router: p.testNode}
	cfg.Deliver = func(d Delivery) {
		// As a node does: what is for a local worker goes to it.
		first, _ := d.Frame.Onward.First()
		p.mu.Lock()
		h := p.handlers[first.Value]
		p.mu.Unlock()
		if h != nil {
			p.inbox <- Inbound{Frame: d.Frame, Class: d.Class}
			return
		}
		p.got <- d
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if p.ep, err = NewEndpoint(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.ep.Close(); err != nil {
			t.Errorf("close %s: %v", name, err)
		}
		p.stop()
	})
	return p
}

const wait = 20 * time.Second

func (p *party) next(t testing.TB) Delivery {
	t.Helper()
	select {
	case d := <-p.got:
		return d
	case <-time.After(wait):
		t.Fatal("nothing was delivered")
		panic("unreachable")
	}
}

func (p *party) nothing(t testing.TB) {
	t.Helper()
	select {
	case d := <-p.got:
		t.Errorf("delivered %q", d.Frame.Payload)
	default:
	}
}

// pair is two parties with a channel from a to b.
func pair(t testing.TB, n *testNet, change ...func(*Config)) (a, b *party, ab, ba *Channel) {
	t.Helper()
	a, b = n.party(t, "alice", change...), n.party(t, "bob", change...)
	if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	ab = dial(t, a, "bob", DialOptions{})
	return a, b, ab, only(t, b)
}

func dial(t testing.TB, p *party, to string, opts DialOptions) *Channel {
	t.Helper()
	c, err := p.ep.Dial(t.Context(), route.To(to, "listener"), TrustEveryone, opts)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// only returns the one channel of a party.
func only(t testing.TB, p *party) *Channel {
	t.Helper()
	all := p.ep.Channels()
	if len(all) != 1 {
		t.Fatalf("%d channels", len(all))
	}
	return all[0]
}

func send(t testing.TB, c *Channel, text string) {
	t.Helper()
	if err := c.Send(t.Context(), route.To("app"), route.To("back"), []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func ended(t testing.TB, c *Channel, want error) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(10 * time.Minute): // virtual time, mostly
		t.Fatal("channel did not end")
	}
	if !errors.Is(c.Err(), want) {
		t.Errorf("ended with %v, want %v", c.Err(), want)
	}
}
