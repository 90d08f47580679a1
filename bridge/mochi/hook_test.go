package mochibridge

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

var someIdentity = identity.Identifier{5, 5, 5}.String()

func TestDevicesExchangeFrames(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		for _, v5 := range []bool{false, true} {
			t.Run(fmt.Sprintf("v5=%v", v5), func(t *testing.T) {
				h := newHub(t, change)
				alice, bob := h.device(t, "alice", v5), h.device(t, "bob", v5)
				for i, n := range []int{0, 1, 23, 24, 300, 5000, 70_000, 250_000} {
					body := strings.Repeat(string(rune('a'+i)), n)
					alice.to("bob", body)
					p := bob.recv()
					f := bob.frame(p.Payload)
					if string(f.Payload) != body || p.QoS() != 1 || p.Dup() || p.Retain() {
						t.Fatalf("%d bytes: %#x", n, p.First)
					}
					if len(f.Return) != 1 || f.Return[0].Value != h.b.HubAddress("alice") {
						t.Fatalf("return route %v", f.Return)
					}
				}
				// Transient.
				alice.publish(0, &route.Frame{Onward: route.To(h.b.HubAddress("bob"), "app"), Payload: []byte("q0")})
				if p := bob.recv(); p.QoS() != 0 || payloads(t, p)[0] != "q0" {
					t.Errorf("transient frame: %v", p)
				}
				alice.quiet()
				eventually(t, "everything acknowledged", func() bool { return h.b.Counters().Queued == 0 })
				cl, _ := h.Clients.Get("bob")
				if n := cl.State.Inflight.Len(); n != 0 {
					t.Errorf("mochi has %d in flight", n)
				}
				if n := len(h.Topics.Subscribers("sealmq/bob/in").Subscriptions); n != 0 {
					t.Errorf("mochi has %d subscribers of the inbox", n)
				}
			})
		}
	})
}

func TestAnswersOfConnect(t *testing.T) {
	h := newHub(t)
	device := someIdentity
	for _, tc := range []struct {
		name   string
		o      rawmqtt.Options
		v3, v5 byte
		event  Event
	}{
		{"bad proof", rawmqtt.Options{ID: "a", User: "bad"}, 4, 0x86, RefusedBadCredentials},
		{"not allowed", rawmqtt.Options{ID: "a", User: "forbidden"}, 5, 0x87, RefusedNotAllowed},
		{"full", rawmqtt.Options{ID: "a", User: "full"}, 3, 0x97, RefusedFull},
		{"other error", rawmqtt.Options{ID: "a", User: "error"}, 5, 0x87, RefusedNotAllowed},
		{"other client id", rawmqtt.Options{ID: "a", User: "liar"}, 2, 0x85, RefusedClientID},
		{"empty client id", rawmqtt.Options{ID: "", User: "device"}, 2, 0x85, RefusedClientID},
		{"reserved name", rawmqtt.Options{ID: "hub", User: "device"}, 2, 0x85, RefusedClientID},
		{"slash in name", rawmqtt.Options{ID: "a/b", User: "device"}, 2, 0x85, RefusedClientID},
		{"device's id, not ours", rawmqtt.Options{ID: device}, 5, 0x87, RefusedClientID},
		{"device's id with suffix", rawmqtt.Options{ID: device + "-x"}, 5, 0x87, RefusedClientID},
		{"device's id, user", rawmqtt.Options{ID: device, User: "user"}, 5, 0x87, RefusedClientID},
		{"device's id, observer", rawmqtt.Options{ID: device, User: "observer"}, 5, 0x87, RefusedClientID},
		{"will under the root", rawmqtt.Options{ID: "a", Will: "sealmq/b/in", WillPayload: "x"}, 5, 0x87, RefusedWill},
		{"will at the root", rawmqtt.Options{ID: "a", Will: "sealmq", WillPayload: "x"}, 5, 0x87, RefusedWill},
		{"will of a device", rawmqtt.Options{ID: "a", User: "device", Will: "sealmq/a/out", WillPayload: "x"}, 5, 0x87, RefusedWill},
		{"retained will", rawmqtt.Options{ID: "a", Will: "sealmq/a/status", WillPayload: "x", WillRetain: true}, 5, 0x87, RefusedWill},
		{"will with wildcard", rawmqtt.Options{ID: "a", Will: "+/b/in", WillPayload: "x"}, 5, 0x87, RefusedWill},
	} {
		for _, v5 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s v5=%v", tc.name, v5), func(t *testing.T) {
				before := h.hook.Counters().Count(tc.event)
				c := h.dial(t, v5)
				p, err := c.Login(tc.o)
				if err != nil {
					t.Fatal(err)
				}
				want := tc.v3
				if v5 {
					want = tc.v5
				}
				if p.Code() != want {
					t.Errorf("code %#x, want %#x", p.Code(), want)
				}
				if bytes.Contains(p.Body, []byte("secret")) {
					t.Errorf("the answer tells too much: %q", p.Body)
				}
				closedByPeer(t, c)
				if got := h.hook.Counters().Count(tc.event) - before; got != 1 {
					t.Errorf("%v counted %d times", tc.event, got)
				}
			})
		}
	}
	if n := h.b.Counters().Ports; n != 0 {
		t.Errorf("%d ports left", n)
	}
}

func TestAuthenticatorPanicRefuses(t *testing.T) {
	h := newHub(t)
	c := h.dial(t, false)
	send(t, c, rawmqtt.Connect(false, rawmqtt.Options{ID: "a", User: "panic"}))
	closedByPeer(t, c)
	count(t, h, HookPanicked, 1)
	h.hook.Counters().n[HookPanicked].Store(0)
	h.device(t, "b", false)
}

func TestNamesakeOfALiveDeviceIsRefused(t *testing.T) {
	h := newHub(t)
	bob := h.device(t, "bob", false)
	c := h.dial(t, false)
	if p, err := c.Login(rawmqtt.Options{ID: "bob"}); err != nil || p.Code() != 5 {
		t.Fatal(p, err)
	}
	bob.quiet()
	// A claim does not displace a proof.
	c = h.dial(t, false)
	if p, err := c.Login(rawmqtt.Options{ID: "bob", User: "unproven"}); err != nil || p.Code() != 5 {
		t.Fatal(p, err)
	}
	bob.quiet()
}

func TestTooManyPorts(t *testing.T) {
	h := newHub(t, func(s *setup) { s.bridge.MaxPorts = 1 })
	h.device(t, "one", false)
	c := h.dial(t, true)
	if p, err := c.Login(rawmqtt.Options{ID: "two", User: "device"}); err != nil || p.Code() != 0x97 {
		t.Fatal(p, err)
	}
	count(t, h, RefusedFull, 1)
}

func TestStrangersCannotPublishUnderTheRoot(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		bob := h.device(t, "bob", false)
		frame := route.AppendFrame(nil, &route.Frame{Onward: route.To("app"), Payload: []byte("forged")})
		topics := []string{"sealmq/bob/in", "sealmq/bob/out", "sealmq/mallory/out", "sealmq/bob/status", "sealmq/hub/forwarders/x", "sealmq/hub/trace", "sealmq", "sealmq/x/y/z"}
		for _, user := range []string{"", "user", "observer", "device", "guest"} {
			for _, topic := range topics {
				if topic == "sealmq/mallory/out" && (user == "device" || user == "guest") {
					continue // its own
				}
				c := h.login(t, false, rawmqtt.Options{ID: "mallory", User: user})
				for _, flags := range []byte{0, 1} { // QoS 0, retained
					send(t, c, rawmqtt.Publish(false, flags, topic, 0, frame))
				}
				silent(t, c)
				for _, flags := range []byte{2, 3, 4, 5} {
					c := h.login(t, false, rawmqtt.Options{ID: "mallory", User: user})
					send(t, c, rawmqtt.Publish(false, flags, topic, 7, frame))
					closedByPeer(t, c)
				}
				c = h.login(t, true, rawmqtt.Options{ID: "mallory", User: user})
				for _, flags := range []byte{2, 3} {
					send(t, c, rawmqtt.Publish(true, flags, topic, 7, frame))
					if p := expect(t, c, rawmqtt.PUBACK); p.Code() != 0x87 || p.ID != 7 {
						t.Errorf("%s %q: PUBACK %d code %#x", user, topic, p.ID, p.Code())
					}
				}
				send(t, c, rawmqtt.Publish(true, 4, topic, 7, frame))
				if p := expect(t, c, rawmqtt.PUBREC); p.Code() != 0x87 || p.ID != 7 {
					t.Errorf("%s %q: PUBREC %d code %#x", user, topic, p.ID, p.Code())
				}
				// A topic alias for it.
				send(t, c, rawmqtt.Publish(true, 0, "harmless", 0, nil, 35, 0, 1))
				send(t, c, rawmqtt.Publish(true, 0, topic, 0, frame, 35, 0, 1))
				send(t, c, rawmqtt.Publish(true, 0, "", 0, frame, 35, 0, 1))
				closedByPeer(t, c)
			}
		}
		bob.quiet()
		for topic := range h.Topics.Retained.GetAll() {
			if strings.HasPrefix(topic, "sealmq") {
				t.Errorf("%s is retained", topic)
			}
		}
		count(t, h, PublishLate, 0)
	})
}

func TestStrangersCannotReadUnderTheRoot(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		narrow := []string{"sealmq/#", "sealmq/bob/in", "sealmq/+/in", "sealmq/bob/out", "sealmq/bob/status", "sealmq/hub/#", "$share/g/sealmq/bob/in", "$SHARE/g/sealmq/#", "sealmq"}
		wide := []string{"#", "+/#", "+/bob/in", "$share/g/#", "/+"}
		for _, user := range []string{"", "user", "device", "guest"} {
			for _, v5 := range []bool{false, true} {
				c := h.login(t, v5, rawmqtt.Options{ID: "mallory" + user + fmt.Sprint(v5), User: user})
				p, err := c.Sub(1, 1, append(narrow, wide...)...)
				if err != nil {
					t.Fatal(err)
				}
				codes := p.Body[len(p.Body)-len(narrow)-len(wide):]
				refused := byte(0x80)
				if v5 {
					refused = 0x87
				}
				for i, f := range narrow {
					if codes[i] != refused {
						t.Errorf("%q %v: %q gets %#x", user, v5, f, codes[i])
					}
				}
				for i, f := range wide {
					if codes[len(narrow)+i] > 1 {
						t.Errorf("%q %v: %q gets %#x", user, v5, f, codes[len(narrow)+i])
					}
				}
				alice.to("bob", "for bob only")
				bob.want("for bob only")
				// What lies outside comes; only that.
				pub := h.login(t, false, rawmqtt.Options{ID: "pub"})
				send(t, pub, rawmqtt.Publish(false, 0, "outside/x", 0, []byte("o")))
				if p := expect(t, c, rawmqtt.PUBLISH); p.Topic != "outside/x" {
					t.Errorf("%q %v: read %q", user, v5, p.Topic)
				}
				_ = c.Close()
			}
		}
	})
}

func TestInlineAndWillFences(t *testing.T) {
	h := newHub(t, func(s *setup) { s.server.InlineClient = true })
	bob := h.device(t, "bob", false)
	for _, retain := range []bool{false, true} {
		for qos := range byte(3) {
			if err := h.Publish("sealmq/bob/in", []byte("x"), retain, qos); err != nil {
				t.Fatal(err)
			}
		}
	}
	bob.quiet()
	count(t, h, PublishInline, 6)
	if _, ok := h.Topics.Retained.Get("sealmq/bob/in"); ok {
		t.Error("retained")
	}
}

func TestTopicAliasOfADevice(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice, bob := h.device(t, "alice", true), h.device(t, "bob", false)
		watcher := h.login(t, false, rawmqtt.Options{ID: "w"})
		if _, err := watcher.Sub(1, 0, "outside"); err != nil {
			t.Fatal(err)
		}
		frame := func(s string) []byte {
			return route.AppendFrame(nil, &route.Frame{Onward: route.To(h.b.HubAddress("bob")), Payload: []byte(s)})
		}
		alias := []byte{35, 0, 3}
		send(t, alice, rawmqtt.Publish(true, 0, "outside", 0, []byte("a"), alias...))
		send(t, alice, rawmqtt.Publish(true, 0, "", 0, []byte("b"), alias...))
		send(t, alice, rawmqtt.Publish(true, 2, "sealmq/alice/out", 100, frame("1"), alias...))
		send(t, alice, rawmqtt.Publish(true, 2, "", 101, frame("2"), alias...))
		send(t, alice, rawmqtt.Publish(true, 2, "sealmq/alice/out", 102, frame("3")))
		send(t, alice, rawmqtt.Publish(true, 0, "outside", 0, []byte("c"), alias...))
		send(t, alice, rawmqtt.Publish(true, 0, "", 0, []byte("d"), alias...))
		for _, id := range []uint16{100, 101, 102} {
			if p := expect(t, alice.Client, rawmqtt.PUBACK); p.ID != id || p.Code() != 0 {
				t.Fatalf("PUBACK %d code %#x", p.ID, p.Code())
			}
		}
		for got := ""; got != "123"; got += strings.Join(payloads(t, bob.recv()), "") {
			if !strings.HasPrefix("123", got) {
				t.Fatal(got)
			}
		}
		for _, want := range []string{"a", "b", "c", "d"} {
			if p := expect(t, watcher, rawmqtt.PUBLISH); string(p.Payload) != want {
				t.Fatalf("outside: %q, want %q", p.Payload, want)
			}
		}
	})
}

func TestQoS2OnOwnTopicIsRefused(t *testing.T) {
	h := newHub(t)
	for _, v5 := range []bool{false, true} {
		d := h.device(t, "d", v5)
		send(t, d, rawmqtt.Publish(v5, 4, "sealmq/d/out", 9, []byte{1}))
		if v5 {
			if p := expect(t, d.Client, rawmqtt.DISCONNECT); p.Code() != 0x9b {
				t.Errorf("code %#x", p.Code())
			}
		}
		closedByPeer(t, d.Client)
	}
	count(t, h, PublishQoS2, 2)
}

func TestInboxNeedsQoS1(t *testing.T) {
	h := newHub(t)
	c := h.login(t, false, rawmqtt.Options{ID: "d", User: "device"})
	if p, err := c.Sub(1, 0, "sealmq/d/in"); err != nil || p.Code() != 0x80 {
		t.Fatal(p, err)
	}
}

func TestGivingUpTheInboxEndsTheConnection(t *testing.T) {
	h := newHub(t)
	d := h.device(t, "d", true)
	send(t, d, rawmqtt.Frame(rawmqtt.UNSUBSCRIBE<<4|2, append([]byte{0, 9, 0, 0, 11}, "sealmq/d/in"...)))
	closedByPeer(t, d.Client)
	count(t, h, InboxGivenUp, 1)
}

func TestHelloAttaches(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		bob := h.device(t, "bob", false)
		_ = bob.Close()
		eventually(t, "bob away", func() bool { return h.b.Counters().Attached == 1 })
		alice.to("bob", "waiting")
		bob = &device{Client: h.login(t, false, rawmqtt.Options{ID: "bob", User: "device"}), t: t, h: h, name: "bob", auto: true}
		if _, err := bob.Sub(1, 1, "sealmq/bob/in"); err != nil {
			t.Fatal(err)
		}
		bob.quiet() // nothing before hello
		bob.hello(false)
		if f := bob.frame(bob.recv().Payload); f.Return[0].Value != "hello" {
			t.Fatal(f)
		}
		bob.want("waiting")
	})
}

func TestNoHelloMeansResuming(t *testing.T) {
	h := newHub(t, func(s *setup) { s.bridge.HelloWait = 1 })
	alice := h.device(t, "alice", false)
	c := h.login(t, false, rawmqtt.Options{ID: "bob", User: "device"})
	if _, err := c.Sub(1, 1, "sealmq/bob/in"); err != nil {
		t.Fatal(err)
	}
	alice.to("bob", "hi")
	bob := &device{Client: c, t: t, h: h, name: "bob", auto: true}
	bob.want("hi")
}

func TestGuestReachesHelloOnly(t *testing.T) {
	h := newHub(t)
	h.device(t, "bob", false)
	g := &device{Client: h.login(t, false, rawmqtt.Options{ID: "g", User: "guest"}), t: t, h: h, name: "g"}
	if p, err := g.Sub(1, 1, "sealmq/g/in"); err != nil || p.Code() != 1 {
		t.Fatal(p, err)
	}
	g.hello(true)
	f := g.frame(g.recv().Payload)
	if a, err := hubproto.ParseHelloAnswer(f.Payload); err != nil || a.Hub != (signer{}).Identifier() {
		t.Fatal(a, err)
	}
	g.to("bob", "no")
	if err := h.b.RegisterServiceFor(bridge.ReachGuests, "api", func(*bridge.Request) { t.Error("a guest reaches api") }); err != nil {
		t.Fatal(err)
	}
	g.publish(2, &route.Frame{Onward: route.To("api"), Return: route.To(h.b.HubAddress("bob"))})
	g.puback()
	if n := h.b.Counters().Dropped[bridge.DropForbidden]; n != 2 {
		t.Errorf("forbidden: %d", n)
	}
}

// TestGuestsDoNotStay: what a guest is there for takes a round trip.
func TestGuestsDoNotStay(t *testing.T) {
	h := newHub(t, func(s *setup) { s.hook.guestTime = 50 * time.Millisecond })
	g := h.login(t, false, rawmqtt.Options{ID: "g", User: "guest", NoKeepAlive: true})
	bob := h.device(t, "bob", false)
	if p, err := g.ReadPacket(); err == nil {
		t.Errorf("it got %+v", p)
	}
	eventually(t, "counted", func() bool { return h.hook.o.Counters.Count(GuestEnded) == 1 })
	bob.to("bob", "stays")
	bob.want("stays")
}

func TestTooLargeFrameKeepsTheConnection(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		h.device(t, "bob", false)
		alice.publish(2, &route.Frame{Onward: route.To(h.b.HubAddress("bob")), Payload: make([]byte, 257<<10)})
		alice.puback()
		f := alice.frame(alice.recv().Payload)
		if n, err := hubproto.ParseNotice(f.Payload); err != nil || n.Reason != hubproto.ReasonTooLarge {
			t.Fatal(n, err)
		}
		alice.quiet()
	})
}

func TestMalformedFramesKeepTheConnection(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		for _, body := range [][]byte{nil, {0}, {0xff}, []byte("hello"), {0x84, 0x80}} {
			id := alice.next()
			send(t, alice, rawmqtt.Publish(false, 2, "sealmq/alice/out", id, body))
			alice.puback()
		}
		if n := h.b.Counters().Dropped[bridge.DropMalformed]; n != 5 {
			t.Errorf("malformed: %d", n)
		}
	})
}

func TestBadAcks(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		bob.auto = false
		for _, id := range []uint16{0, 1, 0x7fff, 0x8000, 0x8001, 0xffff} {
			send(t, bob, rawmqtt.Ack(rawmqtt.PUBACK, id))
		}
		bob.quiet()
		count(t, h, BadAck, 6)
		var ids []uint16
		for i := range 4 {
			alice.to("bob", nth("m", i))
			ids = append(ids, bob.recv().ID)
		}
		for _, i := range []int{2, 2, 1, 3} { // out of order, and one twice
			send(t, bob, rawmqtt.Ack(rawmqtt.PUBACK, ids[i]))
		}
		bob.quiet()
		if n := h.b.Counters().Queued; n != 4 {
			t.Errorf("queued %d before the first is acknowledged", n)
		}
		send(t, bob, rawmqtt.Ack(rawmqtt.PUBACK, ids[0]))
		eventually(t, "all released", func() bool { return h.b.Counters().Queued == 0 })
		count(t, h, BadAck, 7)
	})
}

func TestWindowAndReceiveMaximum(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		bob := h.device(t, "bob", true, 33, 0, 5) // Receive Maximum 5
		bob.auto = false
		const n = 40
		for i := range n {
			// Different first hops, so that each frame is a packet.
			alice.publish(2, &route.Frame{Onward: route.To(h.b.HubAddress("bob"), nth("w", i)), Payload: []byte(nth("m", i))})
			alice.puback()
		}
		var ids []uint16
		for i := range n {
			if len(ids) == 5 {
				bob.quiet() // not one more
				send(t, bob, rawmqtt.Ack(rawmqtt.PUBACK, ids[0]))
				ids = ids[1:]
			}
			p := bob.recv()
			if got := payloads(t, p); len(got) != 1 || got[0] != nth("m", i) {
				t.Fatal(got, i)
			}
			ids = append(ids, p.ID)
		}
	})
}

func TestMaximumPacketSizeOfTheDevice(t *testing.T) {
	h := newHub(t)
	alice := h.device(t, "alice", false)
	bob := h.device(t, "bob", true, 39, 0, 0, 4, 0) // 1 KiB
	alice.publish(2, &route.Frame{Onward: route.To(h.b.HubAddress("bob"), "app"), Return: route.To("me"), Payload: make([]byte, 2000)})
	alice.puback()
	f := alice.frame(alice.recv().Payload)
	if n, err := hubproto.ParseNotice(f.Payload); err != nil || n.Reason != hubproto.ReasonTooLarge {
		t.Fatal(n, err)
	}
	alice.to("bob", "small")
	bob.want("small")
	count(t, h, TooLargeForPeer, 1)
}

func TestBacklogComesInBundlesAndInOrder(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		_ = bob.Close()
		eventually(t, "bob away", func() bool { return h.b.Counters().Attached == 1 })
		const n = 2000
		for i := range n {
			alice.to("bob", nth("m", i))
		}
		bob = h.device(t, "bob", false)
		packets := 0
		for i := 0; i < n; packets++ {
			for _, got := range payloads(t, bob.recv()) {
				if got != nth("m", i) {
					t.Fatalf("got %q, want %q", got, nth("m", i))
				}
				i++
			}
		}
		if packets > n/10 {
			t.Errorf("%d packets for %d frames", packets, n)
		}
		// What was taken but not acknowledged comes again, marked.
		bob.auto = false
		alice.to("bob", "again")
		first := bob.recv()
		_ = bob.Close()
		eventually(t, "bob away", func() bool { return h.b.Counters().Attached == 1 })
		bob = h.device(t, "bob", false)
		if p := bob.recv(); !p.Dup() || !bytes.Equal(p.Payload, first.Payload) || first.Dup() {
			t.Errorf("redelivery: dup %v", p.Dup())
		}
	})
}
