package bridge

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

func TestStaticForwarder(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	equal(t, "address", d.register(ServiceStaticForwarding, "bobs.door-1", "M"), "forward_to_bobs.door-1")
	a.send(route.To("forward_to_bobs.door-1", "x"), route.To("r"), nil)
	equal(t, "forwarded", d.frames()[1].Onward, route.To("M", "x"))
	// Again from another listener: the same owner wins at once.
	d.register(ServiceStaticForwarding, "bobs.door-1", "N")
	a.send(route.To("forward_to_bobs.door-1"), route.To("r"), nil)
	equal(t, "moved", d.frames()[3].Onward, route.To("N"))
	// Somebody else is refused, and told.
	equal(t, "stolen", a.register(ServiceStaticForwarding, "bobs.door-1", "X"), "")
	n := a.conn.notices(t)
	if len(n) != 1 || n[0].Reason != hubproto.ReasonRefused || n[0].LastReturn != route.Local("X") {
		t.Errorf("%+v", n)
	}
	r := b.Forwarder("forward_to_bobs.door-1")
	equal(t, "record", []any{r.Kind, r.Owner, r.Proven, r.Device, r.Online}, []any{hubproto.Static, identifierOf("bob"), true, "bob", true})
	d.Close(false)
	equal(t, "stays reserved", a.register(ServiceStaticForwarding, "bobs.door-1", "X"), "")
	equal(t, "online", b.Forwarder("forward_to_bobs.door-1").Online, false)
}

func TestBadRegistrations(t *testing.T) {
	b := newTestBridge(t, nil)
	d := attach(t, b, "bob", true)
	for _, alias := range []string{"", "register", "a#b", "a b", "ä", "dev_x", "tcp_x", "FWD_1", "forward_to_x", "echo", "hello", strings.Repeat("a", 129), "a/b", "+"} {
		if got := d.register(ServiceStaticForwarding, alias, "M"); got != "" {
			t.Errorf("%q gave %q", alias, got)
		}
	}
	if got := d.register(ServiceForwarding, "alice", "M"); got != "" {
		t.Errorf("dynamic with a name gave %q", got)
	}
	d.send(route.To(ServiceForwarding), route.To("M"), []byte{200, 1, 2})                                                // not a String
	d.send(route.To(ServiceForwarding), nil, []byte("\x08register"))                                                     // nothing to answer to
	d.send(route.To(ServiceForwarding), route.To("M"), []byte("\x08registerx"))                                          // more than a String
	d.send(route.To(ServiceForwarding), route.Route{{Transport: route.TCP, Value: "1.2.3.4:5"}}, []byte("\x08register")) // not local
	d.send(route.To(ServiceForwarding), route.To(strings.Fields(strings.Repeat("h ", 20))...), []byte("\x08register"))   // too long
	equal(t, "forwarders", b.Counters().Forwarders, 0)
}

func TestOwnership(t *testing.T) {
	proven := func(n string) Principal { return Principal{Identity: identifierOf(n), ClientID: n, Proven: true} }
	claimed := func(n string) Principal { p := proven(n); p.Proven = false; return p }
	tcp := Principal{}
	for _, tt := range []struct {
		name     string
		old, now Principal
		want     bool
	}{
		{"same, proven", proven("a"), proven("a"), true},
		{"same from another connection", proven("a"), Principal{Identity: identifierOf("a"), ClientID: "a-2", Proven: true}, true},
		{"same, not proven any more", proven("a"), claimed("a"), false},
		{"other, proven", proven("a"), proven("b"), false},
		{"tcp against proven", proven("a"), tcp, false},
		{"same, claimed", claimed("a"), claimed("a"), true},
		{"other, claimed", claimed("a"), claimed("b"), false},
		{"proven against claimed", claimed("a"), proven("b"), true},
		{"tcp against claimed", claimed("a"), tcp, false},
		{"tcp against tcp", tcp, tcp, true},
		{"claimed against tcp", tcp, claimed("a"), true},
		{"proven against tcp", tcp, proven("a"), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newTestBridge(t, func(c *Config) { c.StaticOverStream = true })
			if _, err := b.Register(Registration{tt.old, route.To("x", "M"), "door"}); err != nil {
				t.Fatal(err)
			}
			_, err := b.Register(Registration{tt.now, route.To("y", "M"), "door"})
			if (err == nil) != tt.want || err != nil && !errors.Is(err, ErrAliasOwned) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestStaticOverStreamIsASwitch(t *testing.T) {
	b := newTestBridge(t, nil)
	equal(t, "off", stream(t, b, true).register(ServiceStaticForwarding, "door", "M"), "")
	on := newTestBridge(t, func(c *Config) { c.StaticOverStream = true })
	s1, s2, a := stream(t, on, true), stream(t, on, true), attach(t, on, "alice", true)
	equal(t, "on", s1.register(ServiceStaticForwarding, "door", "M1"), "forward_to_door")
	equal(t, "newest wins", s2.register(ServiceStaticForwarding, "door", "M2"), "forward_to_door")
	s1.Close(false)
	a.send(route.To("forward_to_door"), nil, nil)
	equal(t, "to the second", s2.frames()[1].Onward, route.To("M2"))
	s2.Close(false)
	a.send(route.To("forward_to_door"), nil, nil)
	equal(t, "reserved, leads nowhere", on.Counters().Dropped[DropOffline], 1)
	equal(t, "notice", a.conn.notices(t)[0].Reason, hubproto.ReasonOffline)
	// Dynamic ones are random, and go with their connection.
	s3 := stream(t, on, true)
	f1, f2 := s3.register(ServiceForwarding, "register", "M"), s3.register(ServiceForwarding, "register", "M")
	if f1 == f2 || !strings.HasPrefix(f1, prefixDynamic) {
		t.Errorf("%q, %q", f1, f2)
	}
	equal(t, "forwarders", on.Counters().Forwarders, 3)
	s3.Close(false)
	equal(t, "forwarders", on.Counters().Forwarders, 1)
}

func TestQuotas(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.ForwardersPerPort, c.ForwardersPerIdentity = 2, 3 })
	d := attach(t, b, "bob", true)
	two := connect(t, b, Principal{Identity: identifierOf("bob"), ClientID: "bob-2", Role: RoleDevice, Proven: true}, true)
	two.sayHello(false, 1)
	ok := func(p *peer, m string) bool { return p.register(ServiceForwarding, "register", m) != "" }
	equal(t, "port", []bool{ok(d, "1"), ok(d, "2"), ok(d, "3"), ok(d, "1")}, []bool{true, true, false, true})
	equal(t, "identity", []bool{ok(two, "1"), ok(two, "2")}, []bool{true, false})
	equal(t, "others", ok(attach(t, b, "alice", true), "1"), true)
	c := b.Counters()
	equal(t, "count", c.Forwarders, 4)
	equal(t, "dropped", []any{c.Dropped[DropQuota], DropQuota}, []any{2, "quota"})
	for name, p := range map[string]*peer{"port": d, "identity": two} {
		if n := p.conn.notices(t); len(n) != 1 || n[0].Reason != hubproto.ReasonRefused || n[0].FirstHop != route.Local(ServiceForwarding) {
			t.Errorf("%s: told %+v", name, n)
		}
	}
}

func TestForwardersExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, nil)
		live, away, a := attach(t, b, "live", true), attach(t, b, "away", true), attach(t, b, "alice", true)
		live.register(ServiceStaticForwarding, "live", "M")
		away.register(ServiceStaticForwarding, "away", "M")
		time.Sleep(20 * time.Hour)
		away.Close(true)
		time.Sleep(20 * time.Hour)
		synctest.Wait()
		equal(t, "still its own", a.register(ServiceStaticForwarding, "away", "M"), "")
		time.Sleep(5 * time.Hour)
		synctest.Wait()
		equal(t, "free again", a.register(ServiceStaticForwarding, "away", "M"), "forward_to_away")
		equal(t, "of one who stayed", a.register(ServiceStaticForwarding, "live", "M"), "")
	})
}

type testJournal struct {
	states map[string]ForwarderState
	ports  map[string]PortState
}

func (j *testJournal) Port(s PortState)     { j.ports[s.Principal.ClientID] = s }
func (j *testJournal) PortGone(name string) { delete(j.ports, name) }

func (j *testJournal) Forwarder(s ForwarderState) { j.states[s.Address] = s }
func (j *testJournal) ForwarderGone(a string)     { delete(j.states, a) }

// slowJournal is a journal whose disk takes its time.
type slowJournal struct {
	testJournal
	asked []func()
}

func (j *slowJournal) Settled(done func()) { j.asked = append(j.asked, done) }

// Who registers, claims or releases is answered once that is stored: an alias that
// was promised is not somebody else's after a crash.
func TestAnswersWaitForTheJournal(t *testing.T) {
	j := &slowJournal{testJournal: testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}}
	b := newTestBridge(t, func(c *Config) { c.Journal = j })
	p := attach(t, b, "bob", true)
	equal(t, "answered before it is stored", p.register(ServiceStaticForwarding, "door", "M"), "")
	if b.Forwarder("forward_to_door") == nil || len(j.asked) != 1 {
		t.Fatalf("not registered, or the journal was not asked: %d", len(j.asked))
	}
	before := len(p.conn.entries())
	j.asked[0]()
	if got := p.frames()[before:]; len(got) != 1 || got[0].Return[0].Value != "forward_to_door" {
		t.Errorf("answer: %v", got)
	}
	body, err := (&hubproto.ReleaseRequest{Address: "forward_to_door"}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	p.send(route.To(ServiceRelease), route.To("M"), body)
	equal(t, "frames", len(p.frames()), before+1)
	equal(t, "owns one", b.HasForwarder(identifierOf("bob")), false)
	j.asked[1]()
	equal(t, "frames", len(p.frames()), before+2)
}

func TestRestore(t *testing.T) {
	j := &testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}
	b := newTestBridge(t, func(c *Config) { c.Journal = j })
	d := attach(t, b, "bob", true)
	fwd := d.register(ServiceForwarding, "register", "M")
	d.register(ServiceStaticForwarding, "door", "M")
	stream(t, b, true).register(ServiceForwarding, "register", "M")
	st := b.State()
	equal(t, "state", []int{len(st.Ports), len(st.Forwarders), len(j.states), len(j.ports)}, []int{1, 2, 2, 1})

	after := newTestBridge(t, nil)
	if err := after.Restore(st); err != nil {
		t.Fatal(err)
	}
	equal(t, "who owns one", []bool{b.HasForwarder(identifierOf("bob")), after.HasForwarder(identifierOf("bob")), after.HasForwarder(identifierOf("alice"))},
		[]bool{true, true, false})
	a := attach(t, after, "alice", true)
	equal(t, "not to be had", a.register(ServiceStaticForwarding, "door", "X"), "")
	a.send(route.To(fwd), route.To("Di"), nil)
	equal(t, "waits for the owner", a.conn.notices(t)[1].Reason, hubproto.ReasonWaiting)
	a.number(d.Port().Address(), 5) // the hub address is the same
	again := attach(t, after, "bob", true)
	equal(t, "delivered", len(again.frames()), 2)
	equal(t, "same address", again.register(ServiceForwarding, "register", "M"), fwd)

	other := newTestBridge(t, func(c *Config) { c.Key[0]++ })
	if err := other.Restore(st); !errors.Is(err, ErrRoute) {
		t.Error(err)
	}
}

// TestAddressesAreSeparate: no device reaches another's forwarding address by
// choosing what follows its name.
func TestAddressesAreSeparate(t *testing.T) {
	b := newTestBridge(t, nil)
	x, y := attach(t, b, "ab", true), attach(t, b, "abc", true)
	if x.register(ServiceForwarding, "register", "cM") == y.register(ServiceForwarding, "register", "M") {
		t.Error("two devices, one address")
	}
	var zero identity.Identifier
	equal(t, "owner", b.Forwarder(x.register(ServiceForwarding, "register", "cM")).Owner == zero, false)
}

// TestDroppedFramesLinkNothing: only a frame that goes out lets the two ends reach
// each other by name (spec routing 7.4), whether it goes at once or later.
func TestDroppedFramesLinkNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 1 })
		linked := func(what string, a, b *peer, want bool) {
			t.Helper()
			for _, p := range [][2]*peer{{a, b}, {b, a}} {
				if p[0].Port().kind == portStream && p[0].Port().allowed([]byte(p[1].Port().Address())) != want {
					t.Errorf("%s: %s reaches %s: %v", what, p[0].Port().Address(), p[1].Port().Address(), !want)
				}
			}
		}
		first, full, slow := stream(t, b, true), stream(t, b, true), stream(t, b, true)
		target, away := stream(t, b, true), attach(t, b, "away", true)
		fwd, offline := target.register(ServiceForwarding, "register", "m"), away.register(ServiceForwarding, "register", "m")
		target.conn.limit(0)
		first.send(route.To(fwd), nil, nil)
		linked("the one that is queued", first, target, true)
		full.send(route.To(fwd), nil, nil)
		linked("one that waits for room", full, target, false)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		equal(t, "dropped", b.Counters().Dropped[DropFull], 1)
		linked("one that found none", full, target, false)
		slow.send(route.To(fwd), nil, nil)
		target.conn.limit(100)
		target.Ready()
		linked("one that waited for room", slow, target, true)

		away.Close(false)
		slow.send(route.To(offline), nil, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		equal(t, "dropped", b.Counters().Dropped[DropOffline], 1)
		linked("one that waited for a device in vain", slow, away, false)
		slow.send(route.To(offline), nil, nil)
		again := attach(t, b, "away", true)
		linked("one that waited for a device", slow, again, true)
	})
}

// TestLinksAreBounded: a stream that many others have sent to forgets addresses
// that are gone before it forgets one that lives.
func TestLinksAreBounded(t *testing.T) {
	b := newTestBridge(t, nil)
	live, s := stream(t, b, true), stream(t, b, true)
	p := s.Port()
	p.allow(live.Port().Address())
	for range maxLinks + 2000 {
		p.allow(randomAddress(prefixStream))
	}
	if !p.allowed([]byte(live.Port().Address())) {
		t.Error("a live link gave way to dead ones")
	}
	p.linksMu.Lock()
	defer p.linksMu.Unlock()
	equal(t, "links", len(p.links), maxLinks)
}

// TestClaimedIdentitiesUseNothingUpOfProvenOnes: on an open hub anybody may say that he
// is somebody, and leaves room for who can prove it.
func TestClaimedIdentitiesUseNothingUpOfProvenOnes(t *testing.T) {
	b := newTestBridge(t, func(c *Config) {
		c.ForwardersPerPort, c.ForwardersPerIdentity, c.PortsPerIdentity, c.RegistrationBurst = 2, 3, 3, 8
	})
	victim := identifierOf("victim")
	who := func(k int, proven bool) Principal {
		return Principal{Identity: victim, ClientID: fmt.Sprint("victim-", k), Role: RoleDevice, Proven: proven}
	}
	arrive := func(k int, proven bool) *peer {
		p := connect(t, b, who(k, proven), true)
		p.sayHello(false, 1)
		return p
	}
	ok := func(p *peer, m string) bool { return p.register(ServiceForwarding, "register", m) != "" }
	refused := func(k int, proven bool) {
		t.Helper()
		if _, err := b.ConnectDevice(who(k, proven), newFakeConn(true)); !errors.Is(err, ErrPortQuota) {
			t.Errorf("client id %d: %v", k, err)
		}
	}
	x, y, z := arrive(1, false), arrive(2, false), arrive(3, false)
	refused(4, false)
	equal(t, "claimed", []bool{ok(x, "1"), ok(x, "2"), ok(y, "1"), ok(z, "1")}, []bool{true, true, true, false})
	// The owner comes under a new client id, and under those that are used already.
	own := []*peer{arrive(5, true), arrive(1, true), arrive(2, true)}
	refused(3, true)
	refused(6, true)
	equal(t, "proven", []bool{ok(own[0], "1"), ok(own[1], "3"), ok(own[1], "4"), ok(own[1], "5"), ok(own[2], "1")},
		[]bool{true, true, true, false, false})
	equal(t, "forwarders", b.Counters().Forwarders, 4) // and the one of the second client id
	// Room for what was claimed is free again, once the owner has taken it over.
	arrive(6, false)
	arrive(7, false)
	refused(8, false)
}
