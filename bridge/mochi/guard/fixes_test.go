package guard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// sleeping connects a kept session, subscribes it to t with QoS 1, and has three
// messages delivered that it does not acknowledge.
func sleeping(t *testing.T, b *broker, v5 bool) (*rawmqtt.Client, rawmqtt.Options) {
	t.Helper()
	o := rawmqtt.Options{ID: "c", Keep: true}
	if v5 {
		o.Props = []byte{17, 0, 0, 1, 0} // Session Expiry Interval 256 s
	}
	c := b.login(t, v5, o)
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	for i := range uint16(3) {
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, []byte{byte(i)}))
		expect(t, pub, rawmqtt.PUBACK)
		if p := expect(t, c, rawmqtt.PUBLISH); p.ID != i+1 {
			t.Fatalf("delivery %d has id %d", i, p.ID)
		}
	}
	return c, o
}

func TestOwnPublishesDoNotDeleteDeliveries(t *testing.T) {
	for _, v5 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v5=%v", v5), func(t *testing.T) {
			b := start(t, nil)
			c, o := sleeping(t, b, v5)
			watcher := b.login(t, false, rawmqtt.Options{ID: "w"})
			if _, err := watcher.Sub(1, 2, "other"); err != nil {
				t.Fatal(err)
			}
			for id := uint16(1); id <= 3; id++ { // the identifiers of the deliveries
				send(t, c, rawmqtt.Publish(v5, 2, "other", id, nil))
				if p := expect(t, c, rawmqtt.PUBACK); p.ID != id {
					t.Errorf("PUBACK %d, want %d", p.ID, id)
				}
				expect(t, watcher, rawmqtt.PUBLISH)
				if p, err := c.Sub(id, 1, "unrelated"); err != nil || p.ID != id || p.Code() > 2 {
					t.Errorf("SUBACK %v %v", p, err)
				}
				send(t, c, rawmqtt.Publish(v5, 4, "other", id, []byte("twice?")))
				if p := expect(t, c, rawmqtt.PUBREC); p.ID != id || p.Code() != 0 {
					t.Errorf("PUBREC %d code %#x, want %d", p.ID, p.Code(), id)
				}
				expect(t, watcher, rawmqtt.PUBLISH)
				send(t, watcher, rawmqtt.Ack(rawmqtt.PUBREC, id+1))
				expect(t, watcher, rawmqtt.PUBREL)
				send(t, watcher, rawmqtt.Ack(rawmqtt.PUBCOMP, id+1))
			}
			_ = c.Close()
			eventually(t, "away", func() bool { cl, ok := b.Clients.Get("c"); return ok && cl.Closed() })
			c = b.login(t, v5, o)
			got := map[byte]bool{}
			recs := 0
			for len(got) < 3 || recs < 3 {
				p, err := c.ReadPacket()
				if err != nil {
					t.Fatal(got, recs, err)
				}
				switch p.Type() {
				case rawmqtt.PUBLISH:
					got[p.Payload[0]] = true
					send(t, c, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
				case rawmqtt.PUBREC: // mochi resends what it has in flight
					recs++
				}
			}
			// The QoS 2 flows go on where they were: not published again.
			for id := uint16(1); id <= 3; id++ {
				send(t, c, rawmqtt.Publish(v5, 4|8, "other", id, []byte("twice?")))
				if p := expect(t, c, rawmqtt.PUBREC); p.ID != id {
					t.Errorf("PUBREC %d, want %d", p.ID, id)
				}
				send(t, c, rawmqtt.Ack(rawmqtt.PUBREL, id))
				if p := expect(t, c, rawmqtt.PUBCOMP); p.ID != id {
					t.Errorf("PUBCOMP %d, want %d", p.ID, id)
				}
			}
			send(t, watcher, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
			expect(t, watcher, rawmqtt.PINGRESP)
		})
	}
}

func TestTakeoverStormLeavesNoGhost(t *testing.T) {
	for _, clean := range []bool{true, false} {
		t.Run(fmt.Sprintf("clean=%v", clean), func(t *testing.T) {
			b := start(t, nil)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for i := range 150 {
						c, err := rawmqtt.Dial(b.addr, false)
						if err != nil {
							t.Error(err)
							return
						}
						_, _ = c.Login(rawmqtt.Options{ID: "same", Keep: !clean})
						if i%3 == 0 {
							_, _ = c.Write(rawmqtt.Subscribe(false, 1, 1, "t"))
						}
						_ = c.Close()
					}
				})
			}
			wg.Wait()
			c := b.login(t, false, rawmqtt.Options{ID: "same", Keep: !clean})
			if _, err := c.Sub(1, 1, "t"); err != nil {
				t.Fatal(err)
			}
			pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
			send(t, pub, rawmqtt.Publish(false, 2, "t", 1, []byte("x")))
			expect(t, c, rawmqtt.PUBLISH)
			b.fixes.OnSysInfoTick(nil)
			for _, e := range []Event{GhostStopped, GateTimeout, HookPanicked, Panicked} {
				if n := b.c.Count(e); n != 0 {
					t.Errorf("%v: %d", e, n)
				}
			}
			_ = c.Close()
			_ = pub.Close()
			eventually(t, "all gates closed", func() bool {
				b.fixes.gates.mu.Lock()
				defer b.fixes.gates.mu.Unlock()
				return len(b.fixes.gates.m) == 0
			})
		})
	}
}

// cutOff is a hook that closes connections while mochi takes their sessions over.
type cutOff struct {
	mqtt.HookBase
	armed atomic.Bool
	id    string
	at    byte // mqtt.OnSessionEstablish: no CONNACK gets out; mqtt.OnQosPublish: nothing behind it
}

func (*cutOff) ID() string             { return "cut-off" }
func (c *cutOff) Provides(b byte) bool { return b == c.at }

func (c *cutOff) OnSessionEstablish(cl *mqtt.Client, _ packets.Packet) {
	if cl.ID == c.id && c.armed.Swap(false) {
		_ = cl.Net.Conn.Close()
	}
}

func (c *cutOff) OnQosPublish(cl *mqtt.Client, pk packets.Packet, _ int64, _ int) {
	c.OnSessionEstablish(cl, pk)
}

// TestConnectionThatEndsInATakeover: one on mochi's own listener that mochi gives up
// while it takes the session over keeps nobody out who comes with its client id.
func TestConnectionThatEndsInATakeover(t *testing.T) {
	for name, at := range map[string]byte{"CONNACK": mqtt.OnSessionEstablish, "redelivery": mqtt.OnQosPublish} {
		t.Run(name, func(t *testing.T) {
			cut := &cutOff{id: "c", at: at}
			b := start(t, func(_ *Config, _ *FixesConfig, o *mqtt.Options) { o.SysTopicResendInterval = 3600 }, cut)
			l := listeners.NewTCP(listeners.Config{ID: "own", Address: "127.0.0.1:0"})
			if err := b.AddListener(l); err != nil {
				t.Fatal(err)
			}
			b.Listeners.Serve("own", b.EstablishConnection)
			b.addr = l.Address()
			c, o := sleeping(t, b, true)
			_ = c.Close()
			eventually(t, "away", func() bool { cl, ok := b.Clients.Get("c"); return ok && cl.Closed() })

			fail := func(o rawmqtt.Options) {
				cut.armed.Store(true)
				c := b.dial(t, true)
				if _, err := c.Login(o); err == nil && at == mqtt.OnSessionEstablish {
					t.Fatal("it got in")
				}
				closedByPeer(t, c)
			}
			fail(o)
			c = b.login(t, true, o)
			for range 3 { // nothing is lost
				expect(t, c, rawmqtt.PUBLISH)
			}
			if n := b.c.Count(GateTimeout); n != 0 {
				t.Errorf("waited in vain %d times", n)
			}

			_ = c.Close()
			eventually(t, "away", func() bool { cl, ok := b.Clients.Get("c"); return ok && cl.Closed() })
			fail(o)
			if at == mqtt.OnSessionEstablish {
				fail(rawmqtt.Options{ID: "c"}) // ends with its connection
			}
			eventually(t, "cleaned up, not at once", func() bool {
				var last *mqtt.Client
				left := func() (n int) {
					g := &b.fixes.gates
					b.fixes.mu.Lock()
					defer b.fixes.mu.Unlock()
					g.mu.Lock()
					defer g.mu.Unlock()
					for cl := range b.fixes.live {
						if cl.ID == "c" {
							last = cl
							n++
						}
					}
					return n + len(g.m)
				}
				if left() != 2 || last.StopTime() == 0 {
					return false // the one before has not been forgotten yet
				}
				b.fixes.look(last.StopTime() + 1)
				if left() != 2 {
					t.Error("cleaned up while mochi may be at it")
				}
				b.fixes.look(last.StopTime() + 2)
				return left() == 0
			})
			if _, ok := b.Clients.Get("c"); ok != (at == mqtt.OnQosPublish) {
				t.Errorf("its session is there: %v", ok)
			}
		})
	}
}

func TestGhostIsSentAway(t *testing.T) {
	b := start(t, nil)
	c := b.login(t, false, rawmqtt.Options{ID: "c"})
	b.Clients.Delete("c") // what mochi does in a race
	b.fixes.OnSysInfoTick(nil)
	closedByPeer(t, c)
	if n := b.c.Count(GhostStopped); n != 1 {
		t.Errorf("counted %d", n)
	}
}

func TestReceiveMaximumLosesNothing(t *testing.T) {
	b := start(t, nil)
	c := b.login(t, true, rawmqtt.Options{ID: "c", Props: []byte{33, 0, 5}})
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	for i := range uint16(40) {
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, []byte{byte(i)}))
		expect(t, pub, rawmqtt.PUBACK)
	}
	for i := range byte(40) {
		p := expect(t, c, rawmqtt.PUBLISH)
		if p.Payload[0] != i {
			t.Fatalf("got %d, want %d", p.Payload[0], i)
		}
		send(t, c, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	}
}

func TestRedeliveryWithTopicAliasMaximum(t *testing.T) {
	b := start(t, nil)
	o := rawmqtt.Options{ID: "c", Keep: true, Props: []byte{34, 0, 9, 17, 0, 0, 1, 0}}
	c := b.login(t, true, o)
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	for range 2 {
		send(t, pub, rawmqtt.Publish(false, 2, "t", 1, []byte("x")))
		expect(t, pub, rawmqtt.PUBACK)
		expect(t, c, rawmqtt.PUBLISH)
	}
	_ = c.Close()
	eventually(t, "away", func() bool { cl, ok := b.Clients.Get("c"); return ok && cl.Closed() })
	c = b.login(t, true, o)
	for range 2 {
		if p := expect(t, c, rawmqtt.PUBLISH); p.Topic != "t" {
			t.Errorf("topic %q", p.Topic)
		}
	}
}

// sought notes the topics that mochi has looked up in its tree.
type sought struct {
	mqtt.HookBase
	mu     sync.Mutex
	topics []string
}

func (*sought) ID() string           { return "sought" }
func (*sought) Provides(b byte) bool { return b == mqtt.OnPublished }
func (s *sought) OnPublished(_ *mqtt.Client, pk packets.Packet) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.topics = append(s.topics, pk.TopicName)
}

// Topics and filters that are too long never get to mochi's tree, which takes seconds
// for them.
func TestLimitsOfTopicsAndSubscriptions(t *testing.T) {
	var found sought
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) {
		f.Subscriptions, f.TopicBytes, f.TopicLevels = 10, 100, 5
	}, &found)
	c := b.login(t, false, rawmqtt.Options{ID: "c"})
	for _, f := range []string{strings.Repeat("/", 65_000), strings.Repeat("x", 2000), "$share/g/" + strings.Repeat("+/", 40)} {
		if p, err := c.Sub(1, 1, f); err != nil || p.Code() != 0x80 {
			t.Errorf("filter of %d bytes: %v %v", len(f), p, err)
		}
	}
	for i := range 12 {
		p, err := c.Sub(1, 1, fmt.Sprint("f", i))
		if want := byte(1); err != nil || (p.Code() == want) != (i < 10) {
			t.Errorf("subscription %d: %v %v", i, p, err)
		}
	}
	if n := atomic.LoadInt64(&b.Info.Subscriptions); n != 10 {
		t.Errorf("%d filters are in the tree", n)
	}
	if p, err := c.Sub(1, 0, "f3"); err != nil || p.Code() != 0 {
		t.Errorf("one that is held already: %v %v", p, err)
	}
	for _, limit := range []string{strings.Repeat("x", 100), "1/2/3/4/5"} {
		if p, err := c.Sub(1, 1, limit); err != nil || p.Code() != 0x80 { // there are ten
			t.Errorf("filter: %v %v", p, err)
		}
		if p, err := c.Sub(1, 1, limit+"/x"); err != nil || p.Code() != 0x80 {
			t.Errorf("filter: %v %v", p, err)
		}
	}
	send(t, c, rawmqtt.Publish(false, 2, "fine", 1, []byte("x")))
	send(t, c, rawmqtt.Publish(false, 1, strings.Repeat("/", 65_000), 0, []byte("x")))
	expect(t, c, rawmqtt.PUBACK)
	closedByPeer(t, c)
	v5 := b.login(t, true, rawmqtt.Options{ID: "c5"})
	send(t, v5, rawmqtt.Publish(true, 1, strings.Repeat("/", 65_000), 0, []byte("x")))
	if p := expect(t, v5, rawmqtt.DISCONNECT); p.Code() != 0x90 {
		t.Errorf("code %#x", p.Code())
	}
	found.mu.Lock()
	if !slices.Equal(found.topics, []string{"fine"}) {
		t.Errorf("%d topics were looked up", len(found.topics))
	}
	found.mu.Unlock()
	for e, want := range map[Event]uint64{FilterRefused: 3 + 2, SubscriptionsFull: 2 + 2, TopicRefused: 2} {
		if got := b.c.Count(e); got != want {
			t.Errorf("%v: %d, want %d", e, got, want)
		}
	}
}

func TestRetainedLimits(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.Retained, f.RetainedBytes = 2*3, 3*nodeCost+130 }) // one owner has half
	c := b.login(t, false, rawmqtt.Options{ID: "c", Will: "will", WillPayload: "x", WillRetain: true})
	put := func(topic string, n int) {
		send(t, c, rawmqtt.Publish(false, 3, topic, 1, make([]byte, n)))
		expect(t, c, rawmqtt.PUBACK)
	}
	held := func(topic string) bool { _, ok := b.Topics.Retained.Get(topic); return ok }
	put("a", 50)
	put("b", nodeCost+81)
	put("c", 10)
	put("d", 10)
	put("e", 10)
	if !held("a") || held("b") || !held("c") || !held("d") || held("e") {
		t.Error("after filling up")
	}
	put("a", 0)
	put("c", 80)
	put("e", 10)
	if held("a") || !held("c") || !held("e") {
		t.Error("after making room")
	}
	_ = c.Close()
	eventually(t, "gone", func() bool { _, ok := b.Clients.Get("c"); return !ok })
	if held("will") || b.c.Count(RetainedFull) != 3 {
		t.Errorf("will retained %v, counted %d", held("will"), b.c.Count(RetainedFull))
	}
}

// TestPropertiesAreCharged: what user properties hold counts, wherever a packet is
// kept.
func TestPropertiesAreCharged(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.RetainedBytes, f.QueuedBytes = 4<<10, 8<<10 })
	property := append([]byte{0x26, 0, 1, 'k', 0x1f, 0x40}, make([]byte, 8000)...) // of 8,000 bytes
	for i := range property[6:] {
		property[6+i] = 'v'
	}
	publish := func(flags byte, topic string, id uint16) []byte {
		body := binary.BigEndian.AppendUint16(nil, uint16(len(topic)))
		body = binary.BigEndian.AppendUint16(append(body, topic...), id)
		body = binary.AppendUvarint(body, uint64(len(property)))
		return rawmqtt.Frame(rawmqtt.PUBLISH<<4|flags, append(append(body, property...), 'x'))
	}
	c := b.login(t, true, rawmqtt.Options{ID: "c"})
	send(t, c, publish(3, "kept", 1))
	expect(t, c, rawmqtt.PUBACK)
	if _, ok := b.Topics.Retained.Get("kept"); ok || b.c.Count(RetainedFull) != 1 {
		t.Errorf("retained %v, counted %d", ok, b.c.Count(RetainedFull))
	}
	away := b.login(t, true, rawmqtt.Options{ID: "away", Props: append([]byte{0x11, 0, 0, 1, 0}, property...)})
	if _, err := away.Sub(1, 1, "queue"); err != nil {
		t.Fatal(err)
	}
	cl, ok := b.Clients.Get("away")
	if !ok || cl.Properties.Props.User != nil {
		t.Error("the properties of a CONNECT stay for the session")
	}
	_ = away.Close()
	eventually(t, "it is away", func() bool { return cl.Closed() })
	id := uint16(2)
	eventually(t, "it is queued for", func() bool { // mochi may not have seen to the end yet
		send(t, c, publish(2, "queue", id))
		expect(t, c, rawmqtt.PUBACK)
		id++
		return b.c.Count(QueuedFull) > 0
	})
	if n := b.fixes.Queued(); n != 0 {
		t.Errorf("%d bytes queued", n)
	}
}

func TestWillsAreChecked(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) {
		f.AllowWill = func(cl *mqtt.Client, topic string) bool { return topic == "w/"+cl.ID }
	})
	for topic, ok := range map[string]bool{"w/c": true, "w/d": false, "$SYS/broker/version": false, "w/#": false, "+": false} {
		for _, v5 := range []bool{false, true} {
			c := b.dial(t, v5)
			p, err := c.Login(rawmqtt.Options{ID: "c", Will: topic, WillPayload: "x"})
			want := byte(0)
			if !ok {
				want = 5
				if v5 {
					want = 0x87
				}
			}
			if err != nil || p.Code() != want {
				t.Errorf("%s v5=%v: code %#x, %v", topic, v5, p.Code(), err)
			}
		}
	}
}

func TestQoSAboveTheMaximum(t *testing.T) {
	b := start(t, func(_ *Config, _ *FixesConfig, o *mqtt.Options) { o.Capabilities.MaximumQos = 1 })
	for _, v5 := range []bool{false, true} {
		c := b.login(t, v5, rawmqtt.Options{ID: "c"})
		send(t, c, rawmqtt.Publish(v5, 4, "t", 1, nil))
		if v5 {
			if p := expect(t, c, rawmqtt.DISCONNECT); p.Code() != 0x9b {
				t.Errorf("code %#x", p.Code())
			}
		}
		closedByPeer(t, c)
	}
}

func TestExpiredSessionLeavesNoSubscription(t *testing.T) {
	b := start(t, nil)
	c := b.login(t, false, rawmqtt.Options{ID: "c", Keep: true})
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	eventually(t, "away", func() bool { cl, ok := b.Clients.Get("c"); return ok && cl.Closed() })
	cl, _ := b.Clients.Get("c")
	b.fixes.OnClientExpired(cl)
	if n := len(b.Topics.Subscribers("t").Subscriptions); n != 0 {
		t.Errorf("%d subscriptions left", n)
	}
}

func TestRedactKeepsPacketsOutOfLogs(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(Redact(slog.NewTextHandler(&out, nil)))
	log.With("will", "w-secret", "hook", "h").WithGroup("g").Error("packet", "packet", packets.Packet{Payload: []byte("secret")}, "pk", "secret", "client", "c")
	if s := out.String(); strings.Contains(s, "secret") || !strings.Contains(s, "client=c") || !strings.Contains(s, "hook=h") {
		t.Error(s)
	}
}

// TestRedactBoundsAFlood: what peers cause as often as they like is not logged as often.
func TestRedactBoundsAFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := slog.New(Redact(slog.NewTextHandler(&out, nil)))
		for range 1000 {
			log.With("listener", "l").Warn("keepalive", "client", strings.Repeat("x", 60_000))
		}
		if n := strings.Count(out.String(), "\n"); n != 50 || out.Len() > 50*(maxLogged+200) {
			t.Errorf("%d lines, %d bytes", n, out.Len())
		}
		log.Error("an error passes")
		if s := out.String(); !strings.Contains(s, "an error passes") || !strings.Contains(s, "unlogged=950") {
			t.Error(s[len(s)-300:])
		}
		time.Sleep(time.Second)
		out.Reset()
		for range 1000 {
			log.Warn("again")
		}
		if n := strings.Count(out.String(), "\n"); n != 10 {
			t.Errorf("%d lines after a second", n)
		}
	})
}

// panicking panics where it is told to, on the client's reader.
type panicking struct {
	mqtt.HookBase
	at byte
}

func (*panicking) ID() string             { return "panicking" }
func (p *panicking) Provides(b byte) bool { return b == p.at }
func (p *panicking) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	return p.boom(cl)
}
func (p *panicking) OnSessionEstablish(cl *mqtt.Client, _ packets.Packet)   { _ = p.boom(cl) }
func (p *panicking) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) { _ = p.boom(cl) }
func (p *panicking) OnDisconnect(cl *mqtt.Client, _ error, _ bool)          { _ = p.boom(cl) }
func (p *panicking) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	return pk, p.boom(cl)
}

func (p *panicking) boom(cl *mqtt.Client) error {
	if strings.HasPrefix(cl.ID, "evil") {
		panic("boom")
	}
	return nil
}

func TestPanicsOfHooksAreSurvived(t *testing.T) {
	for name, at := range map[string]byte{
		"OnConnect": mqtt.OnConnect, "OnSessionEstablish": mqtt.OnSessionEstablish,
		"OnSessionEstablished": mqtt.OnSessionEstablished, "OnPublish": mqtt.OnPublish, "OnDisconnect": mqtt.OnDisconnect,
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, nil, &panicking{at: at})
			for i := range 3 { // the third takes over what the others left
				c := b.dial(t, false)
				c.Timeout = 200 * time.Millisecond
				_, _ = c.Login(rawmqtt.Options{ID: "evil"})
				_, _ = c.Write(rawmqtt.Publish(false, 2, "t", 1, nil))
				_, _ = c.ReadPacket()
				_ = c.Close()
				eventually(t, "panic counted", func() bool { return b.c.Count(Panicked) == uint64(i+1) })
			}
			eventually(t, "swept", func() bool { _, ok := b.Clients.Get("evil"); return !ok || at == mqtt.OnDisconnect })
			c := b.login(t, false, rawmqtt.Options{ID: "good"})
			if _, err := c.Sub(1, 1, "x"); err != nil {
				t.Fatal(err)
			}
			if n := b.c.Count(GateTimeout); n != 0 {
				t.Errorf("%d waits given up", n)
			}
		})
	}
}

// TestDelayedWillEndsWithItsSession: a will is not delayed beyond a session that ends
// with its connection.
func TestDelayedWillEndsWithItsSession(t *testing.T) {
	b := start(t, nil)
	watch := b.login(t, true, rawmqtt.Options{ID: "watch"})
	if _, err := watch.Sub(1, 0, "will"); err != nil {
		t.Fatal(err)
	}
	delay := []byte{0x18, 0xff, 0xff, 0xff, 0xff} // Will Delay Interval, 136 years
	c := b.login(t, true, rawmqtt.Options{ID: "c", Will: "will", WillPayload: "x", WillProps: delay})
	_ = c.Close()
	expect(t, watch, rawmqtt.PUBLISH)
}
