package bridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// TestChannelThroughForwarder walks spec routing 4.3: messages 1 to 3 and data.
func TestChannelThroughForwarder(t *testing.T) {
	b := newTestBridge(t, nil)
	alice, bob := attach(t, b, "alice", true), attach(t, b, "bob", true)
	m := strings.Repeat("ab", 16)
	fwd := bob.register(ServiceForwarding, "register", m)
	if !strings.HasPrefix(fwd, prefixDynamic) {
		t.Fatalf("forwarder %q", fwd)
	}
	a, c := alice.Port().Address(), bob.Port().Address()
	skip := len(bob.frames())

	alice.send(route.To(fwd), route.To("Di"), []byte("1"))
	got := bob.frames()[skip:]
	equal(t, "message 1", got, []route.Frame{{Onward: route.To(m), Return: route.To(a, "Di"), Payload: []byte("1")}})
	alice.send(route.To(fwd, "listener"), route.To("Di"), []byte("1"))
	equal(t, "message 1 with listener", bob.frames()[skip+1].Onward, route.To(m, "listener"))
	bob.send(route.To(a, "Di"), route.To("Dr"), []byte("2"))
	equal(t, "message 2", alice.frames(), []route.Frame{{Onward: route.To("Di"), Return: route.To(c, "Dr"), Payload: []byte("2")}})
	alice.send(route.To(c, "Dr"), route.To("Di"), []byte("3"))
	equal(t, "message 3", bob.frames()[skip+2], route.Frame{Onward: route.To("Dr"), Return: route.To(a, "Di"), Payload: []byte("3")})
	alice.send(route.To(c, "Dr"), nil, []byte("data"))
	equal(t, "data", bob.frames()[skip+3], route.Frame{Onward: route.To("Dr"), Return: route.To(a), Payload: []byte("data")})
	equal(t, "acks", alice.conn.acked(), []uint64{1, 2, 3, 4, 5})

	// The address survives reconnects and restarts of either side.
	equal(t, "again", bob.register(ServiceForwarding, "register", m), fwd)
	if other := bob.register(ServiceForwarding, "register", "other"); other == fwd {
		t.Error("two listeners, one address")
	}
	equal(t, "alice's", b.HubAddress("alice"), a)
}

func TestServices(t *testing.T) {
	b := newTestBridge(t, nil)
	for _, p := range []*peer{attach(t, b, "alice", true), stream(t, b, true)} {
		ask := func(to string, payload []byte) []byte {
			n := len(p.frames())
			p.send(route.To(to), route.To("reply"), payload)
			got := p.frames()[n:]
			if len(got) == 0 {
				return nil
			}
			equal(t, to+" onward", got[0].Onward, route.To("reply"))
			equal(t, to+" return", got[0].Return, route.To(to))
			return got[0].Payload
		}
		ping := []byte{0x1b, 0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77}
		equal(t, "echo", ask("echo", ping), ping)
		equal(t, "echo of nothing", ask("echo", nil), []byte{})
		hello := bare.AppendString(nil, "Hello Ockam!")
		equal(t, "echoer", ask("echoer", hello), hello)
		equal(t, "uppercase", ask("uppercase", hello), bare.AppendString(nil, "HELLO OCKAM!"))
		equal(t, "echoer without a String", ask("echoer", []byte{9, 1}), []byte(nil))
		fwd := p.register("forwarding", "register", "M")
		q := hubproto.LookupRequest{Address: fwd}
		body, _ := q.Marshal()
		ans, err := hubproto.ParseLookupAnswer(ask(ServiceLookup, body))
		if err != nil || ans.Record == nil || ans.Record.Address != fwd || !ans.Record.Online {
			t.Errorf("lookup: %+v, %v", ans, err)
		}
		q.Address = "FWD_nobody"
		body, _ = q.Marshal()
		if ans, err := hubproto.ParseLookupAnswer(ask(ServiceLookup, body)); err != nil || ans.Record != nil {
			t.Errorf("lookup of nothing: %+v, %v", ans, err)
		}
	}
}

// TestFates has one packet for each thing that can be wrong with one.
func TestFates(t *testing.T) {
	mixed := append(frame(route.To("echo"), nil, nil), frame(route.To("echoer"), nil, nil)...)
	tcp := route.Route{{Transport: route.TCP, Value: "127.0.0.1:1"}}
	for _, tt := range []struct {
		name   string
		packet []byte
		why    Drop
		reason hubproto.Reason // 0: no notice
		err    error
	}{
		{"empty", nil, DropMalformed, hubproto.ReasonMalformed, ErrMalformed},
		{"not cbor", []byte{0xff, 1, 2}, DropMalformed, hubproto.ReasonMalformed, ErrMalformed},
		{"cut", frame(route.To("echo"), nil, nil)[:5], DropMalformed, hubproto.ReasonMalformed, ErrMalformed},
		{"mixed bundle", mixed, DropMalformed, hubproto.ReasonMalformed, ErrMalformed},
		{"second frame bad", append(frame(route.To("echo"), nil, nil), 0), DropMalformed, hubproto.ReasonMalformed, ErrMalformed},
		{"too large", frame(route.To("echo"), route.To("r"), make([]byte, 300<<10)), DropTooLarge, hubproto.ReasonTooLarge, nil},
		{"too many hops", frame(route.To(strings.Fields(strings.Repeat("x ", 65))...), nil, nil), DropRoute, hubproto.ReasonTooLarge, nil},
		{"address too long", frame(route.To(strings.Repeat("x", 256)), nil, nil), DropRoute, hubproto.ReasonTooLarge, nil},
		{"heartbeat", frame(nil, nil, nil), DropHeartbeat, 0, nil},
		{"unknown", frame(route.To("nobody", "x"), route.To("r"), nil), DropUnknown, hubproto.ReasonUnknown, nil},
		{"unknown hub address", frame(route.To("dev_00112233445566778899aabbccddeeff"), nil, nil), DropUnknown, hubproto.ReasonUnknown, nil},
		{"never dials", frame(tcp, route.To("r"), nil), DropForeign, hubproto.ReasonUnknown, nil},
		{"to where notices come from", frame(route.To("notice"), route.To("sealmq.notice"), nil), DropNotice, 0, nil},
		{"hello that is none", frame(route.To("hello"), route.To("r"), []byte{1}), DropRequest, hubproto.ReasonMalformed, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newTestBridge(t, nil)
			a := attach(t, b, "alice", true)
			acks := len(a.conn.acked())
			err := a.Receive(tt.packet, route.Stored, a.conn, 77)
			if !errors.Is(err, tt.err) {
				t.Errorf("error %v", err)
			}
			c := b.Counters()
			if c.Dropped[tt.why] != 1 {
				t.Errorf("dropped %v", c.Dropped)
			}
			equal(t, "acks", a.conn.acked()[acks:], []uint64{77})
			got := a.conn.notices(t)
			if tt.reason == 0 {
				equal(t, "notices", len(got), 0)
			} else if len(got) != 1 || got[0].Reason != tt.reason {
				t.Errorf("notices %+v", got)
			}
			// The peer goes on.
			a.send(route.To("echo"), route.To("r"), nil)
			equal(t, "afterwards", len(a.frames()), 1)
		})
	}
}

// TestUnknownInOneRoundTrip: the notice names the hops as the sender wrote them.
func TestUnknownInOneRoundTrip(t *testing.T) {
	b := newTestBridge(t, nil)
	a := attach(t, b, "alice", true)
	bundle := append(frame(route.To("FWD_x", "l"), route.To("a", "Di"), nil), frame(route.To("FWD_x"), nil, nil)...)
	_ = a.Receive(bundle, route.Stored, a.conn, 5)
	got := a.conn.notices(t)
	if len(got) != 1 || got[0].Reason != hubproto.ReasonUnknown || got[0].FirstHop != route.Local("FWD_x") ||
		!got[0].HasReturn || got[0].LastReturn != route.Local("Di") || got[0].Count != 2 {
		t.Errorf("%+v", got)
	}
	equal(t, "dropped", b.Counters().Dropped[DropUnknown], 2)
	// Without hello no notice.
	q := connect(t, b, device("quiet"), true)
	q.send(route.To("FWD_x"), nil, nil)
	equal(t, "notices", len(q.conn.notices(t)), 0)
}

// What the rate of notices does not allow is told in one notice once it does, and what
// a peer cannot be told while it is away once it is back.
func TestNoticesAreRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.NoticeRate, c.NoticeBurst, c.MaxAge = 1, 3, time.Minute })
		a, bob := attach(t, b, "alice", true), attach(t, b, "bob", true)
		bob.Close(false)
		for range 10 {
			a.send(route.To("nobody"), nil, nil)
		}
		said := func() (out []string) {
			synctest.Wait()
			for _, n := range a.conn.notices(t) {
				out = append(out, fmt.Sprint(n.Reason, " ", n.FirstHop.Value, " ", n.Count))
			}
			return out
		}
		want := slices.Repeat([]string{"unknown nobody 1"}, 3)
		equal(t, "at once", said(), want)
		for i := range maxUnsaid + 3 {
			a.send(route.To(fmt.Sprint("no", i)), nil, nil)
		}
		c := b.Counters()
		equal(t, "counted", []uint64{c.Notices, c.NoticesHeld}, []uint64{3, 4})
		time.Sleep(1100 * time.Millisecond)
		want = append(want, "unknown nobody 7")
		equal(t, "after a second", said(), want)
		time.Sleep(maxUnsaid * time.Second)
		for i := range maxUnsaid - 1 {
			want = append(want, fmt.Sprint("unknown no", i, " 1"))
		}
		equal(t, "after the others", said(), want)

		for i := range 500 {
			a.number(bob.Port().Address(), i)
		}
		a.Close(false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		equal(t, "expired", b.Counters().Dropped[DropExpired], 500)
		a = attach(t, b, "alice", true)
		equal(t, "when back", said(), []string{"expired " + bob.Port().Address() + " 500"})
		equal(t, "held", b.Counters().NoticesHeld, 4)

		// One that the connection refuses is offered again, ten times at most.
		a.conn.refuse(true)
		a.send(route.To("late"), nil, nil)
		time.Sleep(3 * time.Second)
		a.conn.refuse(false)
		time.Sleep(2 * time.Second)
		equal(t, "once it takes it", said()[1:], []string{"unknown late 1"})
		a.conn.refuse(true)
		a.send(route.To("never"), nil, nil)
		time.Sleep(20 * time.Second)
		a.conn.refuse(false)
		time.Sleep(2 * time.Second)
		equal(t, "too late", len(said()), 2)
		equal(t, "held in the end", b.Counters().NoticesHeld, 5)
	})
}

// TestStreamLinks is spec routing 7.4 and test 17 of 11.5.
func TestStreamLinks(t *testing.T) {
	b := newTestBridge(t, nil)
	s1, s2, dev := stream(t, b, true), stream(t, b, true), attach(t, b, "dev", true)
	a1, a2, ad := s1.Port().Address(), s2.Port().Address(), dev.Port().Address()
	s1.send(route.To(a2, "x"), nil, []byte("no"))
	s1.send(route.To(ad, "x"), nil, []byte("no"))
	equal(t, "before any link", b.Counters().Dropped[DropForbidden], 2)
	fwd := s2.register(ServiceForwarding, "register", "M")
	s1.send(route.To(fwd, "x"), route.To("I"), []byte("hi"))
	s1.send(route.To(a2, "x"), nil, []byte("direct"))
	s2.send(route.To(a1, "I"), nil, []byte("back"))
	got := s2.frames()
	equal(t, "forwarded", got[len(got)-2], route.Frame{Onward: route.To("M", "x"), Return: route.To(a1, "I"), Payload: []byte("hi")})
	equal(t, "direct", got[len(got)-1], route.Frame{Onward: route.To("x"), Return: route.To(a1), Payload: []byte("direct")})
	equal(t, "back", s1.frames()[0].Payload, []byte("back"))
	// A device may address a stream it knows; its frame links the way back.
	dev.send(route.To(a1, "x"), nil, []byte("from mqtt"))
	s1.send(route.To(ad, "y"), nil, []byte("to mqtt"))
	equal(t, "to mqtt", dev.frames()[0].Payload, []byte("to mqtt"))
	equal(t, "drops", b.Counters().Dropped[DropForbidden], 2)

	// The connection's addresses end with it.
	s2.Close(false)
	s1.send(route.To(a2, "x"), nil, nil)
	s1.send(route.To(fwd), nil, nil)
	equal(t, "after close", b.Counters().Dropped[DropUnknown], 2)
}

func TestClosedWorkers(t *testing.T) {
	b := newTestBridge(t, nil)
	var got []string
	if err := b.RegisterService("inner", false, func(r *Request) { got = append(got, string(r.Frame.Payload)) }); err != nil {
		t.Fatal(err)
	}
	s, d := stream(t, b, true), attach(t, b, "dev", true)
	s.send(route.To("inner"), nil, []byte("stream"))
	d.send(route.To("inner"), nil, []byte("device"))
	if err := b.Send(route.Frame{Onward: route.To(s.Port().Address(), "x"), Return: route.To("inner")}, route.Stored); err != nil {
		t.Fatal(err)
	}
	s.send(route.To("inner"), nil, []byte("linked"))
	equal(t, "served", got, []string{"device", "linked"})
	for _, bad := range []string{"", "dev_1", "tcp_1", "FWD_1", "forward_to_x", "notice", strings.Repeat("x", 256)} {
		if err := b.RegisterService(bad, true, nil); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, bad := range []string{"inner2", "dev_1", "FWD_1", "forward_to_x"} {
		if err := b.RegisterServiceFor(ReachPeer, bad, nil); !errors.Is(err, ErrAddress) {
			t.Errorf("%q for a peer: %v", bad, err)
		}
	}
	if err := b.RegisterServiceFor(ReachPeer, s.Port().Address(), nil); !errors.Is(err, ErrAddressTaken) {
		t.Error(err)
	}
	if err := b.RegisterService("echo", true, nil); !errors.Is(err, ErrAddressTaken) {
		t.Error(err)
	}
	for _, ret := range []route.Route{route.To("echo", "inner"), route.To("nobody"), route.To(d.Port().Address())} {
		if err := b.Send(route.Frame{Onward: route.To("x"), Return: ret}, route.Stored); !errors.Is(err, ErrReturnRoute) {
			t.Errorf("%v: %v", ret, err)
		}
	}
}

func TestForwarderLoop(t *testing.T) {
	b := newTestBridge(t, nil)
	a := attach(t, b, "alice", true)
	own := Principal{Identity: identifierOf("hub"), Proven: true}
	for _, g := range []Registration{
		{own, route.To("forward_to_two", "x"), "one"},
		{own, route.To("forward_to_one", "y"), "two"},
		{own, route.To(a.Port().Address(), "M"), "end"},
		{own, route.To("forward_to_end", "N"), "chain"},
		{own, route.To("echo"), "echoing"},
	} {
		if _, err := b.Register(g); err != nil {
			t.Fatal(err)
		}
	}
	a.send(route.To("forward_to_one", "z"), nil, nil)
	equal(t, "loop", b.Counters().Dropped[DropLoop], 1)
	a.send(route.To("forward_to_chain", "z"), route.To("r"), []byte("c"))
	equal(t, "chain", a.frames()[0].Onward, route.To("M", "N", "z"))
	a.send(route.To("forward_to_echoing"), route.To("r"), []byte("e"))
	equal(t, "service behind a forwarder", a.frames()[1], route.Frame{Onward: route.To("r"), Return: route.To("echo"), Payload: []byte("e")})
}

func TestBundle(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	var bundle []byte
	for i := range 200 {
		bundle = append(bundle, frame(route.To(d.Port().Address(), "x"), nil, binary.BigEndian.AppendUint32(nil, uint32(i)))...)
	}
	_ = a.Receive(bundle, route.Stored, a.conn, 9)
	equal(t, "numbers", d.numbers(), seq(0, 200))
	equal(t, "acks", a.conn.acked(), []uint64{1, 9})
}

func FuzzReceive(f *testing.F) {
	f.Add(frame(route.To("echo"), route.To("r"), []byte("x")), true)
	f.Add(frame(route.To("FWD_x", "y"), nil, nil), false)
	f.Add(frame(route.To("forwarding_service"), route.To("M"), bare.AppendString(nil, "register")), true)
	f.Add(frame(route.To("static_forwarding_service"), route.To("M"), bare.AppendString(nil, "alice")), true)
	req := hubproto.HelloRequest{Fresh: true}
	body, _ := req.Marshal()
	f.Add(frame(route.To("hello"), route.To("me"), body), true)
	f.Add(append(frame(route.To("echo"), nil, nil), frame(route.To("echo"), nil, nil)...), false)
	f.Fuzz(func(t *testing.T, packet []byte, stored bool) {
		b := newTestBridge(t, func(c *Config) { c.StaticOverStream = true })
		d, s := attach(t, b, "alice", true), stream(t, b, true)
		class := route.Stored
		if !stored {
			class = route.Transient
		}
		acks := len(d.conn.acked())
		for _, p := range []*peer{d, s} {
			for _, to := range []string{"", d.Port().Address(), s.Port().Address()} {
				pk := packet
				if to != "" {
					pk = frame(route.To(to, "x"), nil, packet)
				}
				_ = p.Receive(pk, class, p.conn, 1)
			}
		}
		if n := len(d.conn.acked()) - acks; stored && n != 3 {
			t.Errorf("3 stored packets, %d answers", n)
		}
		if d.conn.kicked != 0 || s.conn.kicked != 0 {
			t.Error("kicked")
		}
	})
}
