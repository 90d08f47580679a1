package api

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/tcp"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

type signer struct{ *identity.Private }

func (s signer) ChangeHistory() []byte                { return s.Identity().ChangeHistory() }
func (s signer) SignHello(msg []byte) ([]byte, error) { return s.Sign("test", msg) }

func create(t *testing.T) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	must(t, err)
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hub is a bridge with a TCP listener and the server under test.
type hub struct {
	t         *testing.T
	b         *bridge.Bridge
	s         *Server
	counts    *Counters
	id        *identity.Private
	authority *identity.Private
	addr      string
}

func newHub(t *testing.T, closed bool) *hub {
	t.Helper()
	return newHubWith(t, closed, nil)
}

func newHubWith(t *testing.T, closed bool, change func(*bridge.Config, *Config)) *hub {
	t.Helper()
	h := &hub{t: t, counts: new(Counters), id: create(t), authority: create(t)}
	var err error
	cfg := bridge.Config{Key: [32]byte{7}, Identity: signer{h.id}}
	own := Config{Identity: h.id, Authority: h.authority.Identity(), MembersOnly: closed, Counters: h.counts}
	if change != nil {
		change(&cfg, &own)
	}
	h.b, err = bridge.New(cfg)
	must(t, err)
	own.Bridge = h.b
	h.s, err = New(own)
	must(t, err)
	front, err := tcp.New(tcp.Config{Bridge: h.b, Closed: closed})
	must(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	h.addr = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- front.Serve(ln) }()
	t.Cleanup(func() {
		h.s.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		must(t, front.Close(ctx))
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve: %v", err)
		}
		if n := h.s.Members(); n != 0 {
			t.Errorf("%d members are left", n)
		}
		c := h.b.Counters()
		if n := c.Lost(); n != 0 {
			t.Errorf("%d frames without a fate: %+v", n, c)
		}
		must(t, h.b.Close())
	})
	return h
}

// peer is what a stock program is: a node with channels on one TCP connection.
type peer struct {
	t        *testing.T
	id       *identity.Private
	node     *node.Node
	endpoint *channel.Endpoint
	conn     net.Conn
	write    sync.Mutex
	api      *channel.Channel
}

// connect connects a peer that shows a credential with that relay attribute; none
// if relay is "-", one without the attribute if it is empty.
func (h *hub) connect(relay string) *peer {
	t := h.t
	t.Helper()
	return h.connectAs(create(t), relay)
}

func (h *hub) connectAs(id *identity.Private, relay string) *peer {
	t := h.t
	t.Helper()
	p := &peer{t: t, id: id}
	var credential []byte
	if relay != "-" {
		attrs := map[string]string{"x": "y"}
		if relay != "" {
			attrs["ockam-relay"] = relay
		}
		var err error
		credential, err = h.authority.IssueCredential(p.id.Identity(), attrs, 1, time.Hour)
		must(t, err)
	}
	p.open(h.addr, func() ([]byte, error) { return credential, nil })
	return p
}

func (p *peer) open(addr string, credential func() ([]byte, error)) {
	t := p.t
	t.Helper()
	var err error
	p.node, err = node.New(node.Config{Uplink: p})
	must(t, err)
	p.endpoint, err = channel.NewEndpoint(channel.Config{
		Identity: p.id, Registry: identity.NewMemoryRegistry(0), Router: p.node, Deliver: p.node.Deliver, Credential: credential,
	})
	must(t, err)
	p.conn, err = net.Dial("tcp", addr)
	must(t, err)
	_, err = p.conn.Write([]byte{route.Preamble})
	must(t, err)
	read := make(chan struct{})
	go p.pump(read)
	t.Cleanup(func() {
		p.endpoint.Close()
		p.node.Close()
		p.conn.Close()
		<-read
		<-p.node.Done()
	})
	must(t, p.node.OpenMailbox("app", node.Access{Channels: true}))
}

func (p *peer) Send(_ context.Context, f route.Frame, _ route.Class) error {
	body := route.AppendFrame(nil, &f)
	p.write.Lock()
	defer p.write.Unlock()
	_, err := p.conn.Write(append(route.AppendFrameHeader(nil, len(body)), body...))
	return err
}

func (p *peer) pump(done chan struct{}) {
	defer close(done)
	r := route.NewReader(p.conn, route.Limits{Frame: 1 << 20})
	for {
		body, err := r.Next()
		if err != nil {
			return
		}
		f, err := route.ParseFrame(slices.Clone(body), route.Limits{Frame: 1 << 20})
		if err != nil {
			p.t.Error(err)
			return
		}
		p.node.Inject(node.Origin{Via: node.Forwarded}, f, route.Stored)
	}
}

func (p *peer) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	p.t.Cleanup(cancel)
	return ctx
}

// join opens the channel to the hub.
func (p *peer) join(h *hub) error {
	var err error
	p.api, err = p.endpoint.Dial(p.ctx(), route.To("api"), channel.TrustIdentifiers(h.id.Identifier()), channel.DialOptions{})
	return err
}

// ask sends to a service through the channel and returns the answer.
func (p *peer) ask(ctx context.Context, service string, payload []byte) (*node.Message, error) {
	return p.node.Request(ctx, route.To(p.api.EncryptorAddress(), service), payload, route.Stored)
}

// register asks for a forwarder through the channel and returns its address, "" if
// there is no answer before the one of echo, which comes after it.
func (p *peer) register(service, text string) string {
	p.t.Helper()
	got := make(chan string, 1)
	box := "m" + text + service
	must(p.t, p.node.RegisterFunc(box, node.Access{Channels: true}, func(f route.Frame, _ route.Class, _ node.Origin) {
		if last, ok := f.Return.Last(); ok {
			got <- last.Value
		}
	}))
	defer p.node.Remove(box)
	must(p.t, p.api.Send(p.ctx(), route.To(service), route.To(box), bare.AppendString(nil, text)))
	if _, err := p.ask(p.ctx(), "echo", nil); err != nil {
		p.t.Fatal(err)
	}
	select {
	case a := <-got:
		return a
	default:
		return ""
	}
}

func TestServicesThroughTheChannel(t *testing.T) {
	h := newHub(t, false)
	p := h.connect("-") // services are for everybody
	must(t, p.join(h))
	if got := p.api.Peer().Identifier; got != h.id.Identifier() {
		t.Errorf("the hub is %v", got)
	}
	for _, tt := range []struct{ service, in, out string }{
		{"echo", "\x1b\x00\x11", "\x1b\x00\x11"}, {"echoer", "\x05hello", "\x05hello"}, {"uppercase", "\x05hello", "\x05HELLO"},
	} {
		m, err := p.ask(p.ctx(), tt.service, []byte(tt.in))
		if err != nil || string(m.Payload) != tt.out || m.From != h.id.Identifier() {
			t.Errorf("%s: %v, %v", tt.service, m, err)
		}
	}
	for _, size := range []int{0, 1000, 200 << 10} {
		m, err := p.ask(p.ctx(), "echo", make([]byte, size))
		if err != nil || len(m.Payload) != size {
			t.Errorf("echo of %d bytes: %v", size, err)
		}
	}
	must(t, p.api.Close())
}

// TestRegistration: the credential decides.
func TestRegistration(t *testing.T) {
	h := newHub(t, false)
	refused := uint64(0)
	for _, tt := range []struct {
		relay, service, text, want string
	}{
		{"*", "static_forwarding_service", "any", "forward_to_any"},
		{"gate", "static_forwarding_service", "gate", "forward_to_gate"},
		{"gate", "static_forwarding_service", "other", ""},
		{"gate", "static_forwarding", "other", ""},
		{"", "static_forwarding_service", "other", ""},
		{"-", "static_forwarding_service", "other", ""},
		{"-", "forwarding_service", "register", ""},
		{"", "forwarding_service", "register", ""},
		{"*", "forwarding_service", "register", "FWD_"},
		{"gate", "forwarding_service", "register", "FWD_"},
	} {
		p := h.connect(tt.relay)
		must(t, p.join(h))
		got := p.register(tt.service, tt.text)
		if len(got) < len(tt.want) || got[:len(tt.want)] != tt.want || tt.want == "" && got != "" {
			t.Errorf("%q registers %s %q: %q", tt.relay, tt.service, tt.text, got)
		}
		if tt.want == "" {
			refused++
		}
	}
	if n := h.counts.Count(RefusedRelay); n != refused {
		t.Errorf("%d refusals counted, want %d", n, refused)
	}
	// Another member with any right does not get an alias that an identity owns.
	p := h.connect("*")
	must(t, p.join(h))
	if got := p.register("static_forwarding_service", "gate"); got != "" {
		t.Errorf("took over %q", got)
	}
	r := h.b.Forwarder("forward_to_gate")
	if r == nil || r.Owner == p.id.Identifier() || !r.Proven {
		t.Errorf("record %+v", r)
	}
}

// TestRefreshedCredential: the right to register comes with a credential shown
// later, too.
func TestRefreshedCredential(t *testing.T) {
	h := newHub(t, false)
	p := h.connect("")
	must(t, p.join(h))
	if got := p.register("static_forwarding_service", "late"); got != "" {
		t.Errorf("registered %q", got)
	}
	credential, err := h.authority.IssueCredential(p.id.Identity(), map[string]string{"ockam-relay": "late"}, 1, time.Hour)
	must(t, err)
	must(t, p.api.RefreshCredentials(p.ctx(), credential))
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	got := ""
	for end := time.Now().Add(patience); got == "" && time.Now().Before(end); <-tick.C {
		got = p.register("static_forwarding_service", "late")
	}
	if got != "forward_to_late" {
		t.Errorf("registered %q", got)
	}
}

// TestChannelThroughTheRelay: a peer listens behind an alias that it registered
// through the hub's channel; another dials it there, and both talk. Nobody but the
// hub's own forwarder and those it linked reaches the way in.
func TestChannelThroughTheRelay(t *testing.T) {
	h := newHub(t, false)
	bob := h.connect("bob")
	must(t, bob.join(h))
	if got := bob.register("static_forwarding_service", "bob"); got != "forward_to_bob" {
		t.Fatalf("registered %q", got)
	}
	// A stock client's M, here an alias of the listener, as registered above.
	_, err := bob.endpoint.Listen("listener", channel.TrustEveryone, channel.ListenOptions{})
	must(t, err)
	must(t, bob.node.Alias("mbobstatic_forwarding_service", "nobody", node.Access{Channels: true}))

	alice := h.connect("-")
	ch, err := alice.endpoint.Dial(alice.ctx(), route.To("forward_to_bob", "listener"), channel.TrustIdentifiers(bob.id.Identifier()), channel.DialOptions{})
	must(t, err)
	for i, size := range []int{0, 10, 200 << 10, 5} {
		payload := make([]byte, size)
		if size > 0 {
			payload[0] = byte(i)
		}
		must(t, ch.Send(alice.ctx(), route.To("app"), route.To("app"), payload))
		m, err := bob.node.Receive(bob.ctx(), "app")
		if err != nil || !slices.Equal(m.Payload, payload) || m.From != alice.id.Identifier() {
			t.Fatalf("message %d: %v", i, err)
		}
		must(t, bob.node.Reply(bob.ctx(), m, payload))
		m, err = alice.node.Receive(alice.ctx(), "app")
		if err != nil || !slices.Equal(m.Payload, payload) || m.From != bob.id.Identifier() {
			t.Fatalf("answer %d: %v", i, err)
		}
	}

	// A third party that knows every address involved.
	mallory := h.connect("-")
	var known []string
	for _, c := range h.s.endpoint.Channels() {
		known = append(known, c.EncryptorAddress())
	}
	via, _ := ch.RemoteRoute().First()
	known = append(known, via.Value)
	before := h.b.Counters().Dropped[bridge.DropForbidden]
	for _, addr := range known {
		must(t, mallory.Send(t.Context(), route.Frame{Onward: route.To(addr, "app"), Payload: []byte("forged")}, route.Stored))
	}
	if _, err := mallory.node.Request(mallory.ctx(), route.To("echo"), nil, route.Stored); err != nil {
		t.Fatal(err)
	}
	if n := h.b.Counters().Dropped[bridge.DropForbidden] - before; n != uint64(len(known)) || len(known) < 2 {
		t.Errorf("%d of %d frames were refused", n, len(known))
	}
	// Nor does a device that names an encryptor.
	d := &quiet{}
	link, err := h.b.ConnectDevice(bridge.Principal{ClientID: "d", Role: bridge.RoleDevice}, d)
	must(t, err)
	defer link.Close(true)
	must(t, link.Receive(route.AppendFrame(nil, &route.Frame{Onward: route.To(known[0], "app")}), route.Stored, nil, 0))
	if n := h.b.Counters().Dropped[bridge.DropForbidden] - before; n != uint64(len(known))+1 {
		t.Error("a device reached an encryptor")
	}

	// The peer leaves: its port goes with the channel.
	must(t, bob.api.Close())
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); h.s.Members() > 0 && time.Now().Before(end); <-tick.C {
	}
	if r := h.b.Forwarder("forward_to_bob"); r == nil || r.Online {
		t.Errorf("record %+v", r)
	}
}

// gated is a device that takes nothing until it is opened, and everything then.
type gated struct {
	quiet
	open atomic.Bool
	link *bridge.Link
	got  chan byte
}

func (g *gated) Deliver(entries []bridge.Entry) int {
	if !g.open.Load() {
		return 0
	}
	last := entries[len(entries)-1]
	for i := range entries {
		g.got <- entries[i].Frame[len(entries[i].Frame)-2] // the payload's last byte, before null
	}
	g.link.Delivered(last.Seq)
	return len(entries)
}

// TestHoldsBack: a peer that sends through its channel to a target that takes nothing
// is not read from, and loses nothing; others go on, through channels of their own.
func TestHoldsBack(t *testing.T) {
	h := newHubWith(t, false, func(c *bridge.Config, _ *Config) { c.OutboxFrames, c.StreamWait = 4, time.Hour })
	const frames = 2000
	d := &gated{got: make(chan byte, frames)}
	who := bridge.Principal{ClientID: "d", Role: bridge.RoleDevice, Proven: true}
	link, err := h.b.ConnectDevice(who, d)
	must(t, err)
	defer link.Close(true)
	d.link = link
	link.Subscribed()
	link.Attach(false)
	to, err := h.b.Register(bridge.Registration{Owner: who, Route: route.To(link.Port().Address(), "m")})
	must(t, err)

	alice, carol := h.connect("-"), h.connect("-")
	must(t, alice.join(h))
	must(t, carol.join(h))
	sent := make(chan error, 1)
	go func() {
		for i := range frames {
			payload := append(make([]byte, 8<<10), byte(i))
			if err := alice.api.Send(alice.ctx(), route.To(to, "w"), nil, payload); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); h.b.Counters().Waiting < readWindow && time.Now().Before(end); <-tick.C {
	}
	for range 100 {
		if _, err := carol.ask(carol.ctx(), "echo", []byte("there?")); err != nil {
			t.Fatal(err)
		}
	}
	c := h.b.Counters()
	for end := time.Now().Add(patience); c.Queued != 4 && time.Now().Before(end); <-tick.C {
		c = h.b.Counters() // the last frame to carol may be on its way
	}
	if c.Waiting != readWindow || c.Queued != 4 {
		t.Errorf("%d frames wait and %d are queued", c.Waiting, c.Queued)
	}
	d.open.Store(true)
	link.Ready()
	for i := range frames {
		select {
		case got := <-d.got:
			if got != byte(i) {
				t.Fatalf("frame %d carries %d", i, got)
			}
		case <-time.After(patience):
			t.Fatalf("frame %d does not come: %v", i, h.b.Counters().Dropped)
		}
	}
	must(t, <-sent)
	if n := h.counts.Count(Overrun); n != 0 {
		t.Errorf("%d frames were dropped", n)
	}
	if d := h.b.Counters().Dropped; d != [bridge.NumDrops]uint64{} {
		t.Errorf("dropped %v", d)
	}
}

type quiet struct{}

func (quiet) Deliver(e []bridge.Entry) int { return len(e) }
func (quiet) Direct([]byte) bool           { return true }
func (quiet) Kick(bridge.KickReason)       {}

// TestMembersOnly: at a closed door only a credential of the authority opens, and
// a member reaches forwarders through the hub's channel.
func TestMembersOnly(t *testing.T) {
	h := newHub(t, true)
	stranger := h.connect("-")
	if err := stranger.join(h); !errors.Is(err, channel.ErrRefused) {
		t.Errorf("a stranger at a closed door: %v", err)
	}
	bob := h.connect("*")
	must(t, bob.join(h))
	fwd := bob.register("forwarding_service", "register")
	_, err := bob.endpoint.Listen("listener", channel.TrustEveryone, channel.ListenOptions{})
	must(t, err)
	must(t, bob.node.Alias("mregisterforwarding_service", "nobody", node.Access{Channels: true}))

	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := stranger.endpoint.Dial(ctx, route.To(fwd, "listener"), channel.TrustEveryone, channel.DialOptions{}); err == nil {
		t.Error("a stranger reached a forwarder")
	}
	alice := h.connect("")
	must(t, alice.join(h))
	ch, err := alice.endpoint.Dial(alice.ctx(), route.To(alice.api.EncryptorAddress(), fwd, "listener"),
		channel.TrustIdentifiers(bob.id.Identifier()), channel.DialOptions{})
	must(t, err)
	must(t, ch.Send(alice.ctx(), route.To("app"), nil, []byte("hello")))
	if m, err := bob.node.Receive(bob.ctx(), "app"); err != nil || string(m.Payload) != "hello" {
		t.Errorf("%v, %v", m, err)
	}
}

func TestConfig(t *testing.T) {
	h := newHub(t, false)
	for name, c := range map[string]Config{
		"nothing":                      {},
		"members without an authority": {Bridge: h.b, Identity: h.id, Address: "x", MembersOnly: true},
		"bad limits":                   {Bridge: h.b, Identity: h.id, Address: "x", Limits: route.Limits{Frame: -1}},
		"negative quota":               {Bridge: h.b, Identity: h.id, Address: "x", PerIdentity: -1},
		"address taken":                {Bridge: h.b, Identity: h.id, Address: "echo"},
	} {
		if s, err := New(c); err == nil {
			s.Close()
			t.Errorf("%s accepted", name)
		}
	}
	seen := make(map[string]bool)
	h.counts.Each(func(e Event, _ uint64) {
		if s := e.String(); s == "unknown" || seen[s] {
			t.Errorf("event %d is called %q", e, s)
		}
		seen[e.String()] = true
	})
}

// TestOwnerTwice: the same identity on a second connection has its alias at once,
// while the first is still up and after that has gone; nobody else ever has.
func TestOwnerTwice(t *testing.T) {
	h := newHub(t, false)
	first := h.connect("bob")
	must(t, first.join(h))
	credential, err := h.authority.IssueCredential(first.id.Identity(), map[string]string{"ockam-relay": "bob"}, 1, time.Hour)
	must(t, err)
	second := &peer{t: t, id: first.id}
	second.open(h.addr, func() ([]byte, error) { return credential, nil })
	must(t, second.join(h))
	alice := h.connect("*")
	must(t, alice.join(h))
	const m = "mbobstatic_forwarding_service" // as register names it
	for _, p := range []*peer{first, second, first, second} {
		if got := p.register("static_forwarding_service", "bob"); got != "forward_to_bob" {
			t.Fatalf("registered %q", got)
		}
		if got := alice.register("static_forwarding_service", "bob"); got != "" {
			t.Errorf("somebody else has %q", got)
		}
		got := make(chan string, 1)
		must(t, p.node.RegisterFunc(m, node.Access{Channels: true}, func(f route.Frame, _ route.Class, _ node.Origin) { got <- string(f.Payload) }))
		must(t, alice.Send(t.Context(), route.Frame{Onward: route.To("forward_to_bob", "x"), Payload: []byte("hello")}, route.Stored))
		select {
		case <-got:
		case <-time.After(patience):
			t.Fatal("the traffic does not go to who registered last")
		}
		p.node.Remove(m)
	}
	must(t, first.api.Close())
	if r := h.b.Forwarder("forward_to_bob"); r == nil || !r.Online {
		t.Errorf("the first channel took the alias along: %+v", r)
	}
}

// TestBurstBehindTheHandshake: a peer that sends as soon as it has sent its last
// handshake message is held back until the hub has verified that, and loses nothing.
func TestBurstBehindTheHandshake(t *testing.T) {
	verify := make(chan struct{})
	h := newHubWith(t, false, func(_ *bridge.Config, c *Config) {
		c.Clock = func() time.Time { <-verify; return time.Now() }
	})
	p := h.connect("-")
	var err error
	p.api, err = p.endpoint.Dial(p.ctx(), route.To("api"), channel.TrustIdentifiers(h.id.Identifier()), channel.DialOptions{NoConfirm: true})
	must(t, err)
	const frames = 60 // of 100 KiB: more than is kept
	sent := make(chan error, 1)
	go func() {
		for range frames {
			if err := p.api.Send(p.ctx(), route.To("echo"), nil, make([]byte, 100<<10)); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	time.AfterFunc(100*time.Millisecond, func() { close(verify) })
	must(t, <-sent)
	if _, err := p.ask(p.ctx(), "echo", nil); err != nil {
		t.Fatal(err)
	}
	if n := h.s.Stats().Dropped.Of(channel.DropEarly); n != 0 {
		t.Errorf("%d frames were dropped", n)
	}
}
