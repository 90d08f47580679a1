package mochibridge

import (
	"encoding/binary"

	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

func TestTakeover(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		for _, v5 := range []bool{false, true} {
			h := newHub(t, change)
			alice, old := h.device(t, "alice", v5), h.device(t, "bob", v5)
			old.auto = false
			alice.to("bob", "1")
			p := old.recv()
			bob := h.device(t, "bob", v5)
			// The old connection is told, past its outbox, and closed.
			f := old.frame(expect(t, old.Client, rawmqtt.PUBLISH).Payload)
			if n, err := hubproto.ParseNotice(f.Payload); err != nil || n.Reason != hubproto.ReasonTakenOver {
				t.Fatal(n, err)
			}
			if v5 {
				if p := expect(t, old.Client, rawmqtt.DISCONNECT); p.Code() != 0x8e {
					t.Errorf("code %#x", p.Code())
				}
			}
			closedByPeer(t, old.Client)
			q := bob.recv()
			if string(q.Payload) != string(p.Payload) || !q.Dup() {
				t.Errorf("not redelivered: %v", q)
			}
			alice.to("bob", "2")
			bob.want("2")
			bob.quiet()
			if n := h.b.Counters().Kicked[bridge.KickTakenOver]; n != 1 {
				t.Errorf("kicked %d", n)
			}
		}
	})
}

// A connection that takes nothing holds up nobody who takes it over: its stall would
// be over long after the client has given up waiting for the CONNACK.
func TestTakeoverOfAStalledConnectionIsQuick(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		stalled := h.device(t, "bob", false)
		_ = stalled // never reads again
		const n = 200
		body := make([]byte, 60<<10)
		for i := range n {
			binary.BigEndian.PutUint32(body, uint32(i))
			alice.to("bob", string(body))
		}
		bob := h.device(t, "bob", false)
		for i := range n {
			if got := payloads(t, bob.recv()); len(got) != 1 || binary.BigEndian.Uint32([]byte(got[0])) != uint32(i) {
				t.Fatalf("frame %d", i)
			}
		}
		if n := h.c.Count(guard.Accepted); n < 3 && h.hook.Counters().Count(Wrapped) == 0 {
			t.Errorf("accepted %d", n)
		}
	})
}

// sink counts numbered messages at a device whose link is cut and taken over all
// the time.
type sink struct {
	next  uint32 // the number expected first
	dups  int
	count int
}

func (s *sink) take(t *testing.T, n uint32) {
	switch {
	case n == s.next:
		s.next++
		s.count++
	case n < s.next:
		s.dups++
	default:
		t.Errorf("got %d, want %d", n, s.next)
		s.next = n + 1
	}
}

// TestChurn: every acknowledged message arrives, in order, while devices
// reconnect and take themselves over.
func TestChurn(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.bridge.OutboxFrames = 50 })
		const devices, each = 4, 3000
		var wg sync.WaitGroup
		for i := range devices {
			name, v5 := nth("bob", i), i%2 == 1
			var acked atomic.Uint32
			h.device(t, name, v5)
			wg.Go(func() { // the publisher
				a := h.device(t, nth("alice", i), false)
				sent := uint32(0)
				to := route.To(h.b.HubAddress(name), "app")
				for acked.Load() < each {
					for sent < each && sent < acked.Load()+20 {
						a.publish(2, &route.Frame{Onward: to, Payload: binary.BigEndian.AppendUint32(nil, sent)})
						sent++
					}
					for len(a.acks) == 0 {
						a.pump()
						if t.Failed() {
							return
						}
					}
					if id := a.acks[0].ID; id != uint16(acked.Load()+2) {
						t.Errorf("%s: PUBACK %d, want %d", a.name, id, acked.Load()+2)
						return
					}
					a.acks = a.acks[1:]
					acked.Add(1)
				}
			})
			wg.Go(func() { // the receiver
				var s sink
				for round := 0; s.count < each && !t.Failed(); round++ {
					d := &device{Client: h.login(t, v5, rawmqtt.Options{ID: name, User: "device"}), t: t, h: h, name: name, auto: true}
					d.attach(false)
					for k := 0; s.count < each && k < 20+round%50; k++ {
						for _, b := range payloads(t, d.recv()) {
							s.take(t, binary.BigEndian.Uint32([]byte(b)))
						}
					}
					if round%2 == 0 {
						_ = d.Close()
					}
				}
				if s.count != each {
					t.Errorf("%s: %d of %d", name, s.count, each)
				}
			})
		}
		wg.Wait()
		eventually(t, "quiet", func() bool { c := h.b.Counters(); return c.Queued == 0 || c.Attached < 2*devices })
	})
}

// TestTakeoverStorm: many connections with one client id at once leave exactly
// one that works.
func TestTakeoverStorm(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		alice := h.device(t, "alice", false)
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for range 50 {
					c, err := rawmqtt.Dial(h.addr, w%2 == 0)
					if err != nil {
						t.Error(err)
						return
					}
					defer c.Close()
					if _, err := c.Login(rawmqtt.Options{ID: "bob", User: "device"}); err != nil {
						continue // taken over before its CONNACK
					}
					_, _ = c.Sub(1, 1, "sealmq/bob/in")
				}
			})
		}
		wg.Wait()
		bob := h.device(t, "bob", false)
		alice.to("bob", "still there")
		bob.want("still there")
		eventually(t, "two attached", func() bool { return h.b.Counters().Attached == 2 })
		if n := h.c.Count(guard.GateTimeout); n != 0 {
			t.Errorf("%d waits given up", n)
		}
	})
}

// TestMutualFloodDoesNotDeadlock: two devices that fill each other's outboxes
// come free, because no reader ever blocks.
func TestMutualFloodDoesNotDeadlock(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.bridge.OutboxFrames = 4 })
		const n = 3000
		pair := []*device{h.device(t, "a", false), h.device(t, "b", false)}
		var wg sync.WaitGroup
		for i, d := range pair {
			to := route.To(h.b.HubAddress(pair[1-i].name), "app")
			window := make(chan struct{}, 200)
			var mu sync.Mutex // of the writing side
			wg.Go(func() {
				for k := range n {
					window <- struct{}{}
					b := rawmqtt.Publish(false, 2, "sealmq/"+d.name+"/out", uint16(k+100), route.AppendFrame(nil, &route.Frame{Onward: to, Payload: binary.BigEndian.AppendUint32(nil, uint32(k))}))
					mu.Lock()
					_, err := d.Write(b)
					mu.Unlock()
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
			wg.Go(func() {
				got, acks := uint32(0), 0
				for got < n || acks < n {
					p, err := d.ReadPacket()
					if err != nil {
						t.Errorf("%s: got %d, acks %d: %v", d.name, got, acks, err)
						return
					}
					if p.Type() == rawmqtt.PUBACK {
						if int(p.ID) != acks+100 {
							t.Errorf("PUBACK %d, want %d", p.ID, acks+100)
							return
						}
						acks++
						<-window
						continue
					}
					mu.Lock()
					_, err = d.Write(rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
					mu.Unlock()
					if err != nil {
						t.Error(err)
						return
					}
					for _, b := range payloads(t, p) {
						if binary.BigEndian.Uint32([]byte(b)) != got {
							t.Errorf("%s: out of order", d.name)
							return
						}
						got++
					}
				}
			})
		}
		wg.Wait()
	})
}

// TestPublisherThatIgnoresItsWindow is disconnected.
func TestPublisherThatIgnoresItsWindow(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change, func(s *setup) { s.bridge.OutboxFrames, s.bridge.Window = 4, 16 })
		alice, bob := h.device(t, "alice", true), h.device(t, "bob", false)
		bob.auto = false
		to := route.To(h.b.HubAddress("bob"), "app")
		for i := range 50 {
			b := rawmqtt.Publish(true, 2, "sealmq/alice/out", uint16(i+10), route.AppendFrame(nil, &route.Frame{Onward: to, Payload: []byte("x")}))
			if _, err := alice.Write(b); err != nil {
				break
			}
		}
		for {
			p, err := alice.ReadPacket()
			if err != nil {
				t.Fatal(err)
			}
			if p.Type() == rawmqtt.DISCONNECT {
				if p.Code() != 0x93 {
					t.Errorf("code %#x", p.Code())
				}
				break
			}
		}
		closedByPeer(t, alice.Client)
		if n := h.b.Counters().Kicked[bridge.KickWindow]; n != 1 {
			t.Errorf("kicked %d", n)
		}
	})
}

// TestHostilePackets: the hub survives each of them and serves on.
func TestHostilePackets(t *testing.T) {
	h := newHub(t)
	alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
	for i, b := range [][]byte{
		{0x82, 0x08, 0x00, 0x01, 0x00, 0x00, 0x03, 'a', '/', 'b'}, // ends within a filter's options: crashes mochi
		{0x30, 0x00},
		{0x32, 0x02, 0xff, 0xff},
		{0x32, 0x04, 0x00, 0x01, 'a', 0x00},
		{0x36, 0x04, 0x00, 0x01, 'a', 0x00},
		{0x40, 0x00},
		{0x40, 0x01, 0x80},
		{0x4f, 0x02, 0x80, 0x00},
		{0x30, 0xff, 0xff, 0xff, 0xff, 0x7f},
		{0x30, 0x80, 0x80, 0x80, 0x80, 0x00},
		{0x38, 0x02, 0x00, 0x00},
		{0x00, 0x00},
		{0xf0, 0x00},
		{0x10, 0x00},
		append([]byte{0x30, 0xff, 0xff, 0xff, 0x7f}, make([]byte, 100)...),
		rawmqtt.Publish(true, 2, "sealmq/evil/out", 0, []byte("no id")),
		rawmqtt.Publish(true, 0, "", 0, []byte("unknown alias"), 35, 0, 9),
		rawmqtt.Publish(true, 0, "sealmq/evil/out", 0, []byte("alias 0"), 35, 0, 0),
	} {
		for _, user := range []string{"device", ""} {
			c := h.dial(t, true)
			c.Timeout = 300 * time.Millisecond
			if _, err := c.Login(rawmqtt.Options{ID: "evil", User: user}); err != nil {
				t.Fatal(i, err)
			}
			_, _ = c.Write(b)
			_, _ = c.Write(rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
			for {
				p, err := c.ReadPacket()
				if err != nil || p.Type() == rawmqtt.PINGRESP {
					break
				}
			}
			_ = c.Close()
		}
	}
	alice.to("bob", "still serving")
	bob.want("still serving")
}

// TestTakeoversNeverShowALiveDeviceOffline: whoever watches sees a device that is
// taken over again and again, by itself, as online throughout; nobody else writes
// its status.
func TestTakeoversNeverShowALiveDeviceOffline(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		h := newHub(t, change)
		watch := h.login(t, true, rawmqtt.Options{ID: "w", User: "observer"})
		if _, err := watch.Sub(1, 0, "sealmq/+/status"); err != nil {
			t.Fatal(err)
		}
		bob := h.device(t, "bob", false)
		mallory := h.device(t, "mallory", true)
		for i := range 40 {
			next := h.device(t, "bob", i%2 == 0)
			_ = bob.Close()
			bob = next
			send(t, mallory, rawmqtt.Publish(true, 1, "sealmq/bob/status", 0, []byte(`{"status":"offline"}`)))
			send(t, watch, rawmqtt.Publish(true, 1, "sealmq/bob/status", 0, []byte(`{"status":"offline"}`)))
		}
		mallory.to("bob", "there")
		bob.want("there")
		_ = mallory.Close() // its own status ends what the watcher has to read
		// The retained record may come beside the change that it shows already.
		online := make(map[string]bool)
		for {
			p := expect(t, watch, rawmqtt.PUBLISH)
			offline := strings.Contains(string(p.Payload), `"offline"`)
			switch {
			case p.Topic == "sealmq/mallory/status" && offline:
				if len(online) != 1 {
					t.Errorf("bob went online more than once: %v", online)
				}
				return
			case p.Topic == "sealmq/bob/status" && offline:
				t.Fatalf("shown as offline: %s", p.Payload)
			case p.Topic == "sealmq/bob/status":
				online[string(p.Payload)] = true
			}
		}
	})
}
