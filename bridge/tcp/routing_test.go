package tcp

import (
	"regexp"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// TestLinks is spec routing 7.4: a connection address is reached once a forwarded
// message has linked both ends, and no longer when either is gone.
func TestLinks(t *testing.T) {
	h := newHub(t, options{})
	a, b := h.connect(), h.connect()
	to := b.dynamic("m")
	// The bare addresses, as b learns its own.
	b.send(route.To(to), route.To("self"), nil)
	ownB := b.next().Return[0].Value
	if !regexp.MustCompile(`^tcp_[0-9a-f]{32}$`).MatchString(ownB) {
		t.Fatalf("hub address %q", ownB)
	}

	a.send(route.To(ownB, "x"), nil, []byte("before"))
	if got := a.alive(); len(got) != 0 {
		t.Errorf("answered: %v", got)
	}
	h.wantDrops(bridge.DropForbidden, 1)

	// An empty return route gets exactly one element (spec routing 4.3).
	a.send(route.To(to, "listener"), nil, []byte("first"))
	f := b.next()
	if !f.Onward.Equal(route.To("m", "listener")) || len(f.Return) != 1 || string(f.Payload) != "first" {
		t.Fatalf("through the forwarder: %+v", f)
	}
	ownA := f.Return[0].Value
	a.send(route.To(ownB, "dr"), nil, []byte("data"))
	if f := b.next(); !f.Onward.Equal(route.To("dr")) || !f.Return.Equal(route.To(ownA)) || string(f.Payload) != "data" {
		t.Errorf("to the connection: %+v", f)
	}
	b.send(route.To(ownA, "di"), route.To("dr"), []byte("answer"))
	if f := a.next(); !f.Onward.Equal(route.To("di")) || !f.Return.Equal(route.To(ownB, "dr")) || string(f.Payload) != "answer" {
		t.Errorf("back: %+v", f)
	}

	// A third party has no part in that.
	c := h.connect()
	for _, addr := range []string{ownA, ownB} {
		c.send(route.To(addr, "x"), nil, nil)
	}
	c.alive()
	h.wantDrops(bridge.DropForbidden, 3)

	// A goes: what it was linked with is not inherited by its next connection.
	a.Close()
	h.counted(EndedByPeer, 1)
	again := h.connect()
	again.send(route.To(ownB, "x"), nil, nil)
	again.alive()
	b.send(route.To(ownA, "di"), nil, nil)
	b.alive()
	h.wantDrops(bridge.DropForbidden, 4)
	h.wantDrops(bridge.DropUnknown, 1)

	// B goes: its forwarder and address with it, the sender stays.
	again.send(route.To(to), route.To("me"), nil)
	b.next()
	b.Close()
	h.counted(EndedByPeer, 2)
	again.send(route.To(ownB, "x"), nil, nil)
	again.send(route.To(to, "x"), nil, nil)
	again.alive()
	h.wantDrops(bridge.DropUnknown, 3)
}

func TestRegistrations(t *testing.T) {
	h := newHub(t, options{})
	p := h.connect()
	one, two := p.dynamic("m1"), p.dynamic("m2")
	if one == two || !regexp.MustCompile(`^FWD_(\w+)$`).MatchString(one) {
		t.Errorf("dynamic forwarders %q and %q", one, two)
	}
	other := h.connect()
	for to, m := range map[string]string{one: "m1", two: "m2"} {
		other.send(route.To(to, "echoer"), route.To("i"), nil)
		if f := p.next(); !f.Onward.Equal(route.To(m, "echoer")) || len(f.Return) != 2 {
			t.Errorf("through %s: %v from %v", to, f.Onward, f.Return)
		}
	}
	for _, bad := range []struct{ service, text string }{
		{"static_forwarding_service", "alice"}, // switched off here
		{"static_forwarding_service", ""},
		{"static_forwarding_service", "a#b"},
		{"static_forwarding_service", "register"},
		{"forwarding_service", "alice"},
		{"forwarding_service", ""},
	} {
		if got := p.register(bad.service, bad.text, "m"); got != "" {
			t.Errorf("%s of %q gave %q", bad.service, bad.text, got)
		}
	}
	h.wantDrops(bridge.DropRefused, 1)
	h.wantDrops(bridge.DropAlias, 3)
	h.wantDrops(bridge.DropRequest, 2)
	// No string, no way back, and an alias beyond the frame limit.
	p.send(route.To("forwarding_service"), route.To("m"), []byte{0xff, 0xff})
	p.send(route.To("forwarding_service"), nil, bare.AppendString(nil, "register"))
	p.send(route.To("static_forwarding_service"), route.To("m"), bare.AppendString(nil, strings.Repeat("x", 1<<20)))
	if got := p.alive(); len(got) != 0 {
		t.Errorf("answered: %v", got)
	}
	h.counted(Oversized, 1)
	equal(t, "forwarders", h.b.Counters().Forwarders, 2)
}

func TestQuota(t *testing.T) {
	h := newHub(t, options{bridge: func(c *bridge.Config) { c.ForwardersPerPort = 3 }})
	p := h.connect()
	for range 3 {
		p.dynamic("m")
	}
	if got := p.register("forwarding_service", "register", "m"); got != "" {
		t.Errorf("beyond the quota: %q", got)
	}
	h.connect().dynamic("m")
	p.Close()
	h.counted(EndedByPeer, 1)
	h.connect().dynamic("m")
	equal(t, "forwarders", h.b.Counters().Forwarders, 2)
}

// TestStrangersLeaveRoom: plain peers together have a quarter of the forwarders.
func TestStrangersLeaveRoom(t *testing.T) {
	h := newHub(t, options{bridge: func(c *bridge.Config) { c.MaxForwarders = 8 }})
	a, b := h.connect(), h.connect()
	a.dynamic("m")
	b.dynamic("m")
	if got := h.connect().register("forwarding_service", "register", "m"); got != "" {
		t.Errorf("beyond their share: %q", got)
	}
	owner := bridge.Principal{Identity: identity.Identifier{9}, Proven: true}
	if _, err := h.b.Register(bridge.Registration{Owner: owner, Route: route.To("dev_x", "m")}); err != nil {
		t.Errorf("an identity: %v", err)
	}
	a.Close()
	h.counted(EndedByPeer, 1)
	h.connect().dynamic("m")
}

// TestAliases: with the switch the newest of plain peers has an alias, and none of
// them one that an identity owns.
func TestAliases(t *testing.T) {
	h := newHub(t, options{bridge: func(c *bridge.Config) { c.StaticOverStream = true }})
	a, b, c := h.connect(), h.connect(), h.connect()
	const to = "forward_to_alice"
	static := func(p *peer, alias string) string { return p.register("static_forwarding_service", alias, "m") }
	for _, p := range []*peer{a, b} { // the same owner on two connections, for all that the hub knows
		if got := static(p, "alice"); got != to {
			t.Fatalf("registered %q", got)
		}
	}
	c.send(route.To(to, "x"), nil, []byte("1"))
	if f := b.next(); string(f.Payload) != "1" {
		t.Errorf("got %+v", f)
	}
	if got := a.alive(); len(got) != 0 {
		t.Errorf("the first connection still gets %v", got)
	}
	a.Close() // the first goes afterwards: traffic stays with the second
	h.counted(EndedByPeer, 1)
	c.send(route.To(to, "x"), nil, []byte("2"))
	if f := b.next(); string(f.Payload) != "2" {
		t.Errorf("got %+v", f)
	}
	b.Close()
	h.counted(EndedByPeer, 2)
	c.send(route.To(to, "x"), nil, []byte("3"))
	c.alive()
	h.wantDrops(bridge.DropOffline, 1)
	if got := static(h.connect(), "alice"); got != to {
		t.Errorf("after both are gone: %q", got)
	}

	owner := bridge.Principal{Identity: identity.Identifier{9}, Proven: true}
	if _, err := h.b.Register(bridge.Registration{Owner: owner, Route: route.To("dev_x", "m"), Alias: "bob"}); err != nil {
		t.Fatal(err)
	}
	if got := static(c, "bob"); got != "" {
		t.Errorf("took the alias of an identity: %q", got)
	}
	if _, err := h.b.Register(bridge.Registration{Owner: owner, Route: route.To("dev_x", "m"), Alias: "alice"}); err != nil {
		t.Errorf("an identity against a plain peer: %v", err)
	}
	for _, bad := range []string{"a#b", "echo", "FWD_00", "tcp_00", "dev_00", "forward_to_x", "a b", "", "register"} {
		if got := static(c, bad); got != "" {
			t.Errorf("alias %q: %q", bad, got)
		}
	}
}

// TestLoops: neither relays that point at each other nor peers that bounce a frame
// keep the hub busy.
func TestLoops(t *testing.T) {
	h := newHub(t, options{})
	owner := bridge.Principal{Identity: identity.Identifier{9}, Proven: true}
	for alias, next := range map[string]string{"x": "forward_to_y", "y": "forward_to_x"} {
		if _, err := h.b.Register(bridge.Registration{Owner: owner, Route: route.To(next), Alias: alias}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := h.connect(), h.connect()
	a.send(route.To("forward_to_x", "w"), route.To("r"), nil)
	a.alive()
	h.wantDrops(bridge.DropLoop, 1)

	// A route that names relays again and again goes one relay at a time.
	toA, toB := a.dynamic("m"), b.dynamic("m")
	a.send(route.To(toB, toA, toB, toA, "end"), nil, nil)
	hops := 0
	for _, p := range []*peer{b, a, b, a} {
		f := p.next()
		hops = len(f.Return)
		p.send(f.Onward.Rest(), f.Return, nil)
	}
	equal(t, "hops", hops, 4)
	h.wantDrops(bridge.DropUnknown, 1) // "end" is no address of the hub
	// And a frame that two peers pass on for ever dies of its return route.
	ret := route.Route{}
	for n := 0; ; n++ {
		a.send(route.To(toB), ret, nil)
		a.alive()
		got := b.alive() // the answer to echo comes behind it
		if len(got) == 0 {
			equal(t, "hops", n, 65)
			break
		}
		ret = got[0].Return
		if n > 100 {
			t.Fatal("it lives for ever")
		}
	}
	h.wantDrops(bridge.DropRoute, 1)
}

// TestClosed: at a closed door a stranger reaches what is there for guests, and
// what answered him there.
func TestClosed(t *testing.T) {
	h := newHub(t, options{server: func(c *Config) { c.Closed = true }})
	node := bridge.NewLocal(h.b)
	t.Cleanup(node.Close)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	secret := make(chan string, 10)
	must(node.RegisterFor(bridge.ReachLocal, "encryptor", func(in bridge.Inbound) { secret <- string(in.Frame.Payload) }))
	must(node.Register("worker", false, func(in bridge.Inbound) {
		if err := node.Send(t.Context(), route.Frame{Onward: in.Frame.Return, Return: route.To("worker"), Payload: []byte("2")}, in.Class); err != nil {
			t.Error(err)
		}
	}))
	must(node.RegisterFor(bridge.ReachGuests, "api", func(in bridge.Inbound) {
		if err := node.Send(t.Context(), route.Frame{Onward: in.Frame.Return, Return: route.To("worker"), Payload: []byte("1")}, in.Class); err != nil {
			t.Error(err)
		}
	}))
	owner := bridge.Principal{Identity: identity.Identifier{9}, Proven: true}
	fwd, err := h.b.Register(bridge.Registration{Owner: owner, Route: route.To("encryptor", "m")})
	must(err)

	p := h.connect()
	for _, addr := range []string{"echo", "echoer", "lookup", "forwarding_service", "static_forwarding_service", "worker", "encryptor", fwd} {
		p.send(route.To(addr), route.To("r"), bare.AppendString(nil, "register"))
	}
	p.send(route.To("api"), route.To("r"), nil)
	if f := p.next(); string(f.Payload) != "1" || !f.Return.Equal(route.To("worker")) {
		t.Fatalf("api answers %+v", f)
	}
	h.wantDrops(bridge.DropForbidden, 8)
	p.send(route.To("worker"), route.To("r"), nil)
	if f := p.next(); string(f.Payload) != "2" {
		t.Errorf("who answered at api answers %+v", f)
	}

	// Elsewhere a forwarder leads to an address that is local to the hub, and its
	// name does not, not even for a device.
	c := &device{}
	link, err := h.b.ConnectDevice(bridge.Principal{ClientID: "d", Identity: identity.Identifier{8}, Role: bridge.RoleDevice, Proven: true}, c)
	must(err)
	defer link.Close(true)
	for _, addr := range []string{"encryptor", fwd} {
		body := route.AppendFrame(nil, &route.Frame{Onward: route.To(addr), Payload: []byte("to " + addr)})
		must(link.Receive(body, route.Stored, nil, 0))
	}
	equal(t, "what arrived", <-secret, "to "+fwd)
	h.wantDrops(bridge.DropForbidden, 9)
}

// device is an MQTT device's connection that takes everything.
type device struct{ got chan []byte }

func (d *device) Deliver(entries []bridge.Entry) int {
	if d.got == nil {
		return len(entries)
	}
	for i := range entries {
		d.got <- append([]byte(nil), entries[i].Frame...)
	}
	return len(entries)
}
func (*device) Direct([]byte) bool     { return true }
func (*device) Kick(bridge.KickReason) {}
