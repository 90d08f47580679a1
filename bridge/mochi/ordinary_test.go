package mochibridge

import (
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/storage"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/internal/testcert"
	"github.com/sealmq/sealmq/route"
)

func wait(t testing.TB, tok paho.Token) {
	t.Helper()
	if !tok.WaitTimeout(10 * time.Second) {
		t.Fatal("timed out")
	}
	if err := tok.Error(); err != nil {
		t.Fatal(err)
	}
}

func pahoClient(t testing.TB, h *hub, id string, change func(*paho.ClientOptions)) paho.Client {
	t.Helper()
	o := paho.NewClientOptions().AddBroker("tcp://" + h.addr).SetClientID(id).SetProtocolVersion(4).SetAutoReconnect(false)
	if change != nil {
		change(o)
	}
	c := paho.NewClient(o)
	wait(t, c.Connect())
	t.Cleanup(func() { c.Disconnect(0) })
	return c
}

// TestOrdinaryClientsNoticeNothing: QoS 0 to 2, retained messages, wills, kept
// sessions, overlapping and shared subscriptions, with devices at work beside
// them and a root that everybody's "#" covers.
func TestOrdinaryClientsNoticeNothing(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		type msg struct {
			topic, payload string
			qos            byte
			retained       bool
		}
		got := make(chan msg, 100)
		on := func(_ paho.Client, m paho.Message) {
			got <- msg{m.Topic(), string(m.Payload()), m.Qos(), m.Retained()}
		}
		want := func(m msg) {
			t.Helper()
			select {
			case g := <-got:
				if g != m {
					t.Fatalf("got %+v, want %+v", g, m)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("%+v did not come", m)
			}
		}
		pub := pahoClient(t, h, "pub", nil)
		wait(t, pub.Publish("keep/it", 1, true, "kept"))
		// mochi acknowledges before it hands on: with the next answer it has done so.
		wait(t, pub.Subscribe("answer/to/pub", 0, nil))
		sub := pahoClient(t, h, "sub", nil)
		wait(t, sub.Subscribe("#", 2, on))
		want(msg{"keep/it", "kept", 1, true})
		alice.to("bob", "not for them")
		bob.want("not for them")
		for qos := range byte(3) {
			wait(t, pub.Publish("a/b", qos, false, fmt.Sprint(qos)))
			want(msg{"a/b", fmt.Sprint(qos), qos, false})
		}
		wait(t, pub.Publish("keep/it", 1, true, ""))
		want(msg{"keep/it", "", 1, false})

		willing := h.login(t, false, rawmqtt.Options{ID: "willing", Will: "last/word", WillPayload: "bye"})
		_ = willing.Close()
		want(msg{"last/word", "bye", 0, false})

		kept := func(o *paho.ClientOptions) { o.SetCleanSession(false).SetDefaultPublishHandler(on) }
		wait(t, sub.Unsubscribe("#"))
		k := pahoClient(t, h, "kept", kept)
		wait(t, k.Subscribe("q/+", 2, nil))
		k.Disconnect(10)
		eventually(t, "away", func() bool { cl, ok := h.Clients.Get("kept"); return ok && cl.Closed() })
		wait(t, pub.Publish("q/1", 1, false, "one"))
		wait(t, pub.Publish("q/2", 2, false, "two"))
		pahoClient(t, h, "kept", kept)
		both := map[msg]bool{}
		for range 2 { // mochi's order after a reconnect is random
			select {
			case m := <-got:
				both[m] = true
			case <-time.After(20 * time.Second):
				t.Fatal("kept session")
			}
		}
		if !both[msg{"q/1", "one", 1, false}] || !both[msg{"q/2", "two", 2, false}] {
			t.Errorf("kept session: %v", both)
		}

		shared := make(chan int, 20)
		for i := range 2 {
			c := pahoClient(t, h, nth("worker", i), nil)
			wait(t, c.Subscribe("$share/g/jobs", 1, func(paho.Client, paho.Message) { shared <- i }))
		}
		for range 10 {
			wait(t, pub.Publish("jobs", 1, false, "job"))
		}
		for range 10 {
			select {
			case <-shared:
			case <-time.After(20 * time.Second):
				t.Fatal("job lost")
			}
		}
		alice.quiet()
		bob.quiet()
		count(t, h, PublishRefused, 0)
	})
}

func TestTopicAliasesOutsideTheRoot(t *testing.T) {
	h := newHub(t)
	sub := h.login(t, true, rawmqtt.Options{ID: "s", Props: []byte{34, 0, 10}}) // Topic Alias Maximum 10
	if _, err := sub.Sub(1, 0, "#"); err != nil {
		t.Fatal(err)
	}
	pub := h.login(t, true, rawmqtt.Options{ID: "p"})
	send(t, pub, rawmqtt.Publish(true, 0, "a/b", 0, []byte("1"), 35, 0, 1))
	send(t, pub, rawmqtt.Publish(true, 0, "", 0, []byte("2"), 35, 0, 1))
	for _, want := range []string{"1", "2"} {
		if p := expect(t, sub, rawmqtt.PUBLISH); p.Topic != "a/b" || string(p.Payload) != want {
			t.Fatalf("%q %q", p.Topic, p.Payload)
		}
	}
}

func TestRolesOutsideTheRoot(t *testing.T) {
	h := newHub(t, func(s *setup) {
		s.hook.Outside = func(p bridge.Principal, topic string, write bool) bool {
			return topic == "open" && p.Role == bridge.RoleUser
		}
	})
	// AllowHook is there too, so all this shows is that Outside does not get
	// in its way; what it decides alone is tested by asking the hook.
	u := h.login(t, false, rawmqtt.Options{ID: "u", User: "user"})
	if p, err := u.Sub(1, 1, "open"); err != nil || p.Code() != 1 {
		t.Fatal(p, err)
	}
	cl, _ := h.Clients.Get("u")
	for topic, want := range map[string]bool{"open": true, "closed": false, "sealmq/u/in": false} {
		if got := h.hook.OnACLCheck(cl, topic, true); got != want {
			t.Errorf("%s: %v", topic, got)
		}
	}
	// mochi asks nobody about wills, so Outside decides.
	for topic, want := range map[string]byte{"open": 0, "closed": 5, "$foo/x": 5} {
		c, err := rawmqtt.Dial(h.addr, false)
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.Login(rawmqtt.Options{ID: "w", User: "user", Will: topic, WillPayload: "x"})
		if err != nil && want == 0 || p.Code() != want {
			t.Errorf("a will at %s: %v, %v", topic, p, err)
		}
		_ = c.Close()
	}
}

func TestObservers(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.bridge.Trace = true })
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		for _, filter := range []string{"sealmq/#", "#", "+/+/+"} {
			for _, v5 := range []bool{false, true} {
				o := h.login(t, v5, rawmqtt.Options{ID: "o", User: "observer"})
				p, err := o.Sub(1, 1, filter, "$share/g/sealmq/#")
				if err != nil {
					t.Fatal(err)
				}
				codes := p.Body[len(p.Body)-2:]
				if codes[0] > 1 || codes[1] < 0x80 {
					t.Fatalf("%s: codes % x", filter, codes)
				}
				records := map[string]bool{}
				for len(records) < 2 {
					p := expect(t, o, rawmqtt.PUBLISH)
					if p.Topic == "sealmq/carol/status" {
						continue
					}
					if !p.Retain() || p.QoS() != 0 || !strings.HasSuffix(p.Topic, "/status") || !strings.Contains(string(p.Payload), "online") {
						t.Fatalf("%s: record %s %#x", filter, p.Topic, p.First)
					}
					records[p.Topic] = true
				}
				alice.to("bob", "seen")
				bob.want("seen")
				seen := map[string]bool{}
				for len(seen) < 2 || filter == "sealmq/#" && len(seen) < 3 {
					p := expect(t, o, rawmqtt.PUBLISH)
					if p.Topic == "sealmq/carol/status" {
						continue
					}
					if p.Retain() || p.QoS() != 0 {
						t.Fatalf("copy %s %#x", p.Topic, p.First)
					}
					seen[p.Topic] = true
					if p.Topic == "sealmq/alice/out" || p.Topic == "sealmq/bob/in" {
						if got := payloads(t, p); len(got) != 1 || got[0] != "seen" {
							t.Errorf("%s: %q", p.Topic, got)
						}
					}
				}
				carol := h.device(t, "carol", false)
				for {
					if p := expect(t, o, rawmqtt.PUBLISH); p.Topic == "sealmq/carol/status" && !p.Retain() {
						break
					}
				}
				_ = carol.Close()
				eventually(t, "carol away", func() bool { return h.b.Counters().Attached == 2 })
				// Nothing of it is in mochi, and what lies outside comes too.
				for _, topic := range []string{"sealmq/bob/in", "sealmq/bob/status"} {
					if _, ok := h.Topics.Retained.Get(topic); ok {
						t.Errorf("%s is retained by mochi", topic)
					}
				}
				_ = o.Close()
				eventually(t, "observer gone", func() bool { h.hook.watchMu.Lock(); defer h.hook.watchMu.Unlock(); return h.hook.unobserve == nil })
			}
		}
		count(t, h, ObserverDropped, 0)
	})
}

// TestReplaysAreMerged: an observer that asks again and again while the records it has
// asked for wait to be sent gets them once.
func TestReplaysAreMerged(t *testing.T) {
	h := newHub(t)
	h.device(t, "alice", false)
	o := h.login(t, false, rawmqtt.Options{ID: "o", User: "observer"})
	if _, err := o.Sub(1, 0, "sealmq/+/status"); err != nil {
		t.Fatal(err)
	}
	expect(t, o, rawmqtt.PUBLISH)
	gate := make(chan struct{})
	h.b.Replay(func() func(bridge.Record) { <-gate; return nil })
	for range 100 {
		for _, f := range []string{"sealmq/+/status", "sealmq/alice/status"} {
			if _, err := o.Sub(1, 0, f); err != nil {
				t.Fatal(err)
			}
		}
	}
	send(t, o, rawmqtt.Unsubscribe(false, 1, "sealmq/alice/status"))
	expect(t, o, rawmqtt.UNSUBACK)
	close(gate)
	if p := expect(t, o, rawmqtt.PUBLISH); !p.Retain() || p.Topic != "sealmq/alice/status" {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	h.device(t, "bob", false)
	if p := expect(t, o, rawmqtt.PUBLISH); p.Retain() || p.Topic != "sealmq/bob/status" {
		t.Errorf("after the records: %s %s", p.Topic, p.Payload)
	}
}

func TestStalledObserverLosesCopiesOnly(t *testing.T) {
	h := newHub(t)
	alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
	o := h.login(t, false, rawmqtt.Options{ID: "o", User: "observer"})
	if _, err := o.Sub(1, 0, "sealmq/#"); err != nil {
		t.Fatal(err)
	}
	body := strings.Repeat("x", 100<<10)
	for range 150 { // 30 MB of copies
		alice.to("bob", body)
		bob.want(body)
	}
	eventually(t, "drops counted", func() bool { return h.hook.Counters().Count(ObserverDropped) > 0 })
	if n := len(h.Clients.GetAll()); n != 3 {
		t.Errorf("%d clients", n)
	}
}

func TestManyRecordsReachAnObserver(t *testing.T) {
	h := newHub(t)
	const n = 300
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range n / 4 {
				c, err := rawmqtt.Dial(h.addr, false)
				if err != nil {
					t.Error(err)
					return
				}
				name := fmt.Sprintf("d%d-%d", w, i)
				if _, err := c.Login(rawmqtt.Options{ID: name, User: "device"}); err != nil {
					t.Error(err)
				}
				if _, err := c.Sub(1, 1, "sealmq/"+name+"/in"); err != nil {
					t.Error(err)
				}
				d := &device{Client: c, t: t, h: h, name: name}
				d.hello(true)
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	o := h.login(t, false, rawmqtt.Options{ID: "o", User: "observer"})
	if _, err := o.Sub(1, 0, "sealmq/+/status"); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for len(seen) < n {
		seen[expect(t, o, rawmqtt.PUBLISH).Topic] = true
	}
}

// restored is a storage hook with what an earlier server left behind.
type restored struct{ mqtt.HookBase }

func (*restored) ID() string { return "restored" }
func (*restored) Provides(b byte) bool {
	return b == mqtt.StoredClients || b == mqtt.StoredSubscriptions || b == mqtt.StoredRetainedMessages
}
func (*restored) StoredClients() ([]storage.Client, error) {
	return []storage.Client{{ID: "spy", Username: []byte("x"), ProtocolVersion: 4}}, nil
}
func (*restored) StoredSubscriptions() ([]storage.Subscription, error) {
	return []storage.Subscription{{Client: "spy", Filter: "sealmq/#", Qos: 1}, {Client: "spy", Filter: "#", Qos: 1}, {Client: "spy", Filter: "", Qos: 1}, {Client: "spy", Filter: unstored, Qos: 1}}, nil
}
func (*restored) StoredRetainedMessages() ([]storage.Message, error) {
	return []storage.Message{
		{TopicName: "sealmq/bob/in", Payload: []byte("old"), FixedHeader: packets.FixedHeader{Type: packets.Publish, Retain: true}, Created: time.Now().Unix()},
		{TopicName: "mine", Payload: []byte("kept"), FixedHeader: packets.FixedHeader{Type: packets.Publish, Retain: true}, Created: time.Now().Unix()},
	}, nil
}

func TestStoredSessionsSeeNothingUnderTheRoot(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.hooks = []mqtt.Hook{new(restored)} })
		count(t, h, RetainedPurged, 1)
		if _, ok := h.Topics.Retained.Get("mine"); !ok {
			t.Error("a message outside the root was purged")
		}
		spy := h.dial(t, false)
		if p, err := spy.Login(rawmqtt.Options{ID: "spy", Keep: true}); err != nil || p.Body[0] != 1 {
			t.Fatal("session not kept", p, err)
		}
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		alice.to("bob", "secret")
		bob.want("secret")
		pub := h.login(t, false, rawmqtt.Options{ID: "pub"})
		send(t, pub, rawmqtt.Publish(false, 2, "end", 1, []byte("end")))
		if p := expect(t, spy, rawmqtt.PUBLISH); p.Topic != "end" {
			t.Fatalf("read %s", p.Topic)
		}
	})
}

// twice publishes a device's will under the root through a hook's back door.
type rewriter struct{ mqtt.HookBase }

func (*rewriter) ID() string           { return "rewriter" }
func (*rewriter) Provides(b byte) bool { return b == mqtt.OnPacketRead }
func (*rewriter) OnPacketRead(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if pk.TopicName == "detour" {
		pk.TopicName = "sealmq/bob/in"
	}
	return pk, nil
}

func TestLateFence(t *testing.T) {
	h := newHub(t, func(s *setup) { s.hooks = []mqtt.Hook{new(rewriter)} })
	bob := h.device(t, "bob", false)
	c := h.login(t, false, rawmqtt.Options{ID: "c"})
	send(t, c, rawmqtt.Publish(false, 3, "detour", 1, []byte("x")))
	expect(t, c, rawmqtt.PUBACK)
	bob.quiet()
	count(t, h, PublishLate, 1)
	if _, ok := h.Topics.Retained.Get("sealmq/bob/in"); ok {
		t.Error("retained")
	}
}

func TestExporterReachesAuthenticator(t *testing.T) {
	cert, roots := testcert.Loopback(t)
	server, client := &tls.Config{Certificates: []tls.Certificate{cert}}, &tls.Config{RootCAs: roots}
	seen := make(chan ConnectInfo, 1)
	h := newHub(t, func(s *setup) {
		s.listener.TLS = server
		s.hook.Authenticate = func(c ConnectInfo) (bridge.Principal, error) {
			seen <- c
			return bridge.Principal{ClientID: c.ClientID}, nil
		}
	})
	c, err := tls.Dial("tcp", h.addr, client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := rawmqtt.New(c, false)
	if p, err := r.Login(rawmqtt.Options{ID: "d", User: "u", Password: "p", KeepAlive: 33}); err != nil || p.Code() != 0 {
		t.Fatal(p, err)
	}
	info := <-seen
	st := c.ConnectionState()
	want, err := st.ExportKeyingMaterial(exporterLabel, nil, 32)
	if err != nil || string(info.Exporter()) != string(want) {
		t.Errorf("exporter values differ (%v)", err)
	}
	if info.ClientID != "d" || string(info.Username) != "u" || string(info.Password) != "p" || !info.Clean ||
		info.KeepAlive != 33 || info.ProtocolVersion != 4 || info.Will != nil || info.RemoteAddr == nil || info.Listener != "t" {
		t.Errorf("%+v", info)
	}
	d := &device{Client: r, t: t, h: h, name: "d", auto: true}
	d.attach(true)
	_ = route.Stored
}

func TestNewRefusesNonsense(t *testing.T) {
	server := mqtt.New(&mqtt.Options{})
	b, err := bridge.New(bridge.Config{Key: [32]byte{1}, Identity: signer{}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	good := Options{Server: server, Bridge: b, Authenticate: byUserName}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no server":        func(o *Options) { o.Server = nil },
		"no bridge":        func(o *Options) { o.Bridge = nil },
		"no authenticator": func(o *Options) { o.Authenticate = nil },
		"bad root":         func(o *Options) { o.Root = "a/#" },
		"packet limit":     func(o *Options) { o.FrameLimit = 1 << 20; o.Server.Options.Capabilities.MaximumPacketSize = 1 << 20 },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestObserversAreBounded(t *testing.T) {
	h := newHub(t, func(s *setup) { s.hook.Observers = 1 })
	one := h.login(t, false, rawmqtt.Options{ID: "one", User: "observer"})
	if p, err := one.Sub(1, 0, "sealmq/#"); err != nil || p.Code() != 0 {
		t.Fatal(p, err)
	}
	two := h.login(t, false, rawmqtt.Options{ID: "two", User: "observer"})
	if p, err := two.Sub(1, 0, "sealmq/#"); err != nil || p.Code() != 0x80 {
		t.Fatal(p, err)
	}
	for i := range 200 {
		if _, err := one.Sub(1, 0, nth("sealmq/x/", i)); err != nil {
			t.Fatal(err)
		}
	}
	h.hook.watchMu.Lock()
	for s := range h.hook.observers {
		if len(s.filters) > observerFilters {
			t.Errorf("%d filters", len(s.filters))
		}
	}
	h.hook.watchMu.Unlock()
	_ = one.Close()
	eventually(t, "place given back", func() bool {
		p, err := two.Sub(1, 0, "sealmq/#")
		return err == nil && p.Code() == 0
	})
}

// TestObserverComesBack: an observer whose session was kept sees on with the filters of
// that session, and is not left in the belief that it does when it cannot.
func TestObserverComesBack(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.hook.Observers = 1 })
		h.device(t, "always", false)
		for _, v5 := range []bool{false, true} {
			o := rawmqtt.Options{ID: nth("o", len(h.Clients.GetAll())), User: "observer", Keep: true}
			if v5 {
				o.Props = []byte{17, 0, 0, 1, 0} // Session Expiry Interval 256 s
			}
			c := h.login(t, v5, o)
			if _, err := c.Sub(1, 0, "sealmq/+/status", "sealmq/x/in", "x/#"); err != nil {
				t.Fatal(err)
			}
			send(t, c, rawmqtt.Unsubscribe(v5, 1, "sealmq/x/in"))
			expect(t, c, rawmqtt.UNSUBACK, rawmqtt.PUBLISH)
			alive := c
			present := func(want byte) {
				t.Helper()
				c = h.dial(t, v5)
				if p, err := c.Login(o); err != nil || p.Code() != 0 || p.Body[0] != want {
					t.Fatalf("session present % x, %v, want %d", p.Body, err, want)
				}
			}
			for round := range 3 {
				if round == 1 { // else the old connection is still there
					_ = alive.Close()
					h.unobserved(t)
				}
				present(1)
				alive = c
				// The records as they are now, and then what happens.
				for p := expect(t, c, rawmqtt.PUBLISH); !p.Retain() || p.Topic != "sealmq/always/status"; {
					p = expect(t, c, rawmqtt.PUBLISH)
				}
				h.device(t, nth("alice", round), v5).Close()
				for p := expect(t, c, rawmqtt.PUBLISH); p.Retain() || p.Topic != nth("sealmq/alice", round)+"/status"; {
					p = expect(t, c, rawmqtt.PUBLISH)
				}
			}
			h.hook.watchMu.Lock()
			for s := range h.hook.observers {
				if got := strings.Join(s.filters, " "); got != "sealmq/+/status x/#" && got != "sealmq/+/status" {
					t.Errorf("filters %s", got)
				}
			}
			h.hook.watchMu.Unlock()

			_ = c.Close()
			h.unobserved(t)
			other := h.login(t, false, rawmqtt.Options{ID: "other", User: "observer"})
			if _, err := other.Sub(1, 0, "sealmq/#"); err != nil {
				t.Fatal(err)
			}
			present(1)
			closedByPeer(t, c) // there is no place for it
			_ = other.Close()
			h.unobserved(t)

			o.Keep, o.Props = false, nil
			present(0)
			h.device(t, "bob", false)
			silent(t, c)
			_ = c.Close()
		}
	})
}

func (h *hub) unobserved(t *testing.T) {
	t.Helper()
	eventually(t, "nobody observes", func() bool { h.hook.watchMu.Lock(); defer h.hook.watchMu.Unlock(); return h.hook.unobserve == nil })
}

// TestLargeFramesWaitForRoom: frames that fill more than half of the output
// buffer are delivered one at a time.
func TestLargeFramesWaitForRoom(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) {
			s.bridge.Limits.Frame = 2 << 20
			s.hook.FrameLimit = 2 << 20
			s.server.Capabilities.MaximumPacketSize = 3 << 20
			s.listener.PacketLimit = 3 << 20
		})
		alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
		const n = 7
		for i := range n {
			alice.to("bob", strings.Repeat(nth("", i), 2_000_000))
		}
		for i := range n {
			if got := payloads(t, bob.recv()); len(got) != 1 || got[0][0] != nth("", i)[0] || len(got[0]) != 2_000_000 {
				t.Fatalf("frame %d", i)
			}
		}
	})
}
