package guard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// want is what the filters that mochi holds ought to be counted as.
func (b *broker) wantFilterBytes() int64 {
	q := filters{paths: newPaths(), of: make(map[string]*holder)}
	for id, cl := range b.Clients.GetAll() {
		for f := range cl.State.Subscriptions.GetAll() {
			q.add(id, owner{}, f, -1)
		}
	}
	return q.other + q.paths.bytes()
}

// TestFiltersAreCharged: filters cost what their levels take, for one client and for
// all; what goes is counted out.
func TestFiltersAreCharged(t *testing.T) {
	const total = 64 << 10
	deep := func(n int) string { return fmt.Sprint(n) + strings.Repeat("/x", 19) } // 13,485 bytes or so
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.FilterBytes = total })
	v5 := b.login(t, true, rawmqtt.Options{ID: "v5"})
	if p, err := v5.Sub(1, 0, deep(1), deep(1), deep(2)); err != nil || !bytes.HasSuffix(p.Body, []byte{0, 0, 0x97}) {
		t.Errorf("%v %v", p, err)
	}
	if p, err := v5.Sub(1, 0, deep(1), "#/x", "flat"); err != nil || !bytes.HasSuffix(p.Body, []byte{0, 0x8f, 0}) {
		t.Errorf("%v %v", p, err)
	}
	v3 := b.login(t, false, rawmqtt.Options{ID: "v3"})
	if p, err := v3.Sub(1, 0, deep(1), deep(2)); err != nil || !bytes.HasSuffix(p.Body, []byte{0, 0x80}) {
		t.Errorf("%v %v", p, err)
	}
	// Nodes that exist are not charged again: others may have many filters like these.
	for n := range 40 {
		c, _ := b.loginFrom(t, byte(100+n), rawmqtt.Options{ID: fmt.Sprint("same", n)}) // one address has half
		if p, err := c.Sub(1, 0, deep(1)); err != nil || p.Code() != 0 {
			t.Errorf("client %d: %v %v", n, p, err)
		}
	}
	full := false
	for n := range 10 {
		c := b.login(t, true, rawmqtt.Options{ID: fmt.Sprint("more", n)})
		p, err := c.Sub(1, 0, deep(10+n))
		full = err == nil && p.Code() == 0x97
	}
	if !full || b.fixes.FilterBytes() > total {
		t.Errorf("full %v with %d bytes", full, b.fixes.FilterBytes())
	}
	if got, want := b.fixes.FilterBytes(), b.wantFilterBytes(); got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
	if b.c.Count(SubscriptionsFull) < 3 {
		t.Error("not counted")
	}
}

// TestFilterCountHolds: whatever clients do, what is counted is what mochi holds.
func TestFilterCountHolds(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.FilterBytes = 200 << 10 })
	rnd := rand.New(rand.NewPCG(1, 2))
	filter := func() string {
		return []string{"", "$share/g/", "a/", "a/b/c/"}[rnd.IntN(4)] + fmt.Sprint(rnd.IntN(20)) + strings.Repeat("/+", rnd.IntN(30)) + []string{"", "/#", "#"}[rnd.IntN(3)]
	}
	clients := make(map[int]*rawmqtt.Client)
	for range 1500 {
		n := rnd.IntN(6)
		c := clients[n]
		switch op := rnd.IntN(10); {
		case c == nil || op == 0: // the last two keep their sessions
			clients[n] = b.login(t, n%2 == 0, rawmqtt.Options{ID: fmt.Sprint("c", n), Keep: n > 3 && op < 5})
		case op == 1:
			_ = c.Close()
			delete(clients, n)
		case op < 5:
			send(t, c, rawmqtt.Unsubscribe(c.V5, 1, filter(), filter()))
			expect(t, c, rawmqtt.UNSUBACK)
		default:
			f := filter()
			if _, err := c.Sub(1, 0, f, filter(), f); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "the count to fit", func() bool { return b.fixes.FilterBytes() == b.wantFilterBytes() })
	if b.c.Count(SubscriptionsFull) == 0 {
		t.Error("no limit was met")
	}
	for _, c := range clients {
		_ = c.Close()
	}
	for n := range 6 {
		c := b.login(t, false, rawmqtt.Options{ID: fmt.Sprint("c", n)}) // ends what was kept
		_ = c.Close()
	}
	eventually(t, "nothing to be counted", func() bool { return b.fixes.FilterBytes() == 0 })
}

// TestFilterCostIsTrue: what is charged is about what mochi takes.
func TestFilterCostIsTrue(t *testing.T) {
	for _, levels := range []int{5, 32} {
		b := start(t, nil)
		clients := make([]*rawmqtt.Client, 4)
		for i := range clients {
			clients[i] = b.login(t, false, rawmqtt.Options{ID: fmt.Sprint("c", i)})
		}
		heap := func() int64 {
			var m runtime.MemStats
			runtime.GC() // what pools hold outlives the first
			runtime.GC()
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc)
		}
		before := heap()
		for n := range 1400 {
			f := fmt.Sprint(n) + strings.Repeat("/x", levels-1)
			if p, err := clients[n%len(clients)].Sub(1, 0, f); err != nil || p.Code() != 0 {
				t.Fatal(p, err)
			}
		}
		took, counted := heap()-before, b.fixes.FilterBytes()
		if counted < took/2 || counted > 2*took {
			t.Errorf("%d levels: %d bytes counted, %d taken", levels, counted, took)
		}
		for _, c := range clients {
			_ = c.Close()
		}
	}
}

// meddle is a hook behind Fixes that does something while a client subscribes, or gives
// filters up.
type meddle struct {
	mqtt.HookBase
	on     byte // mqtt.OnSubscribe or OnUnsubscribe
	during func(cl *mqtt.Client)
}

func (m *meddle) ID() string           { return "meddle" }
func (m *meddle) Provides(b byte) bool { return b == m.on }

func (m *meddle) OnSubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	m.during(cl)
	return pk
}

func (m *meddle) OnUnsubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	return m.OnSubscribe(cl, pk)
}

// meetAtGate has what a client does go on once a newcomer waits for it, or waits for
// nothing: done is closed by who logs in as the newcomer.
func meetAtGate(on byte, b **broker) (m *meddle, began, done chan struct{}) {
	began, done = make(chan struct{}), make(chan struct{})
	return &meddle{on: on, during: func(cl *mqtt.Client) {
		select {
		case <-began:
			return // it is not the first
		default:
			close(began)
		}
		for waits := false; !waits; runtime.Gosched() {
			select {
			case <-done: // the newcomer has not waited
				return
			default:
			}
			g := &(*b).fixes.gates
			g.mu.Lock()
			waits = g.m[cl.ID] != nil && g.m[cl.ID].users == 2
			g.mu.Unlock()
		}
	}}, began, done
}

// TestUnsubscribeDuringATakeover: a session that is taken over while it gives a filter
// up does not take it from the count twice, nor from the newcomer.
func TestUnsubscribeDuringATakeover(t *testing.T) {
	var b *broker
	m, began, done := meetAtGate(mqtt.OnUnsubscribe, &b)
	b = start(t, nil, m)
	old := b.login(t, false, rawmqtt.Options{ID: "x", Keep: true})
	if p, err := old.Sub(1, 0, "given/up"); err != nil || p.Code() != 0 {
		t.Fatal(p, err)
	}
	send(t, old, rawmqtt.Unsubscribe(false, 2, "given/up"))
	<-began
	c := b.login(t, false, rawmqtt.Options{ID: "x", Keep: true})
	close(done)
	closedByPeer(t, old)
	if p, err := c.Sub(3, 0, "given/up"); err != nil || p.Code() != 0 {
		t.Fatal(p, err)
	}
	eventually(t, "it is counted", func() bool { return b.fixes.FilterBytes() == b.wantFilterBytes() })
	if len(b.Topics.Subscribers("given/up").Subscriptions) != 1 {
		t.Error("the newcomer has lost its filter")
	}
}

// TestNoFilterOutlivesATakeover: a session that is taken over while it subscribes leaves
// no filter behind in mochi's tree, whose messages the next one would get.
func TestNoFilterOutlivesATakeover(t *testing.T) {
	for name, keep := range map[string]bool{"clean": false, "kept": true} {
		t.Run(name, func(t *testing.T) {
			var b *broker
			m, began, done := meetAtGate(mqtt.OnSubscribe, &b)
			b = start(t, nil, m)
			old := b.login(t, false, rawmqtt.Options{ID: "x", Keep: keep})
			send(t, old, rawmqtt.Subscribe(false, 1, 0, "left/behind"))
			<-began
			c := b.login(t, false, rawmqtt.Options{ID: "x", Keep: keep})
			close(done)
			closedByPeer(t, old)
			if keep {
				send(t, c, rawmqtt.Unsubscribe(false, 2, "left/behind")) // it was granted, and is the session's
				expect(t, c, rawmqtt.UNSUBACK)
			}
			eventually(t, "no filter", func() bool { return len(b.Topics.Subscribers("left/behind").Subscriptions) == 0 })
			if n := b.fixes.FilterBytes(); n != 0 {
				t.Errorf("%d bytes are counted", n)
			}
		})
	}
}

// TestFiltersDuringTakeovers has connections with one client id subscribe while they
// take each other over.
func TestFiltersDuringTakeovers(t *testing.T) {
	b := start(t, nil)
	const filters = 8
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			for i := range 30 {
				c, err := rawmqtt.Dial(b.addr, n%2 == 0)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Login(rawmqtt.Options{ID: "x", Keep: n == 3 && i%2 == 0}); err == nil {
					for f := range filters {
						p := rawmqtt.Subscribe(c.V5, uint16(f+1), 0, fmt.Sprint("f", f))
						if (i+f)%3 == 0 {
							p = rawmqtt.Unsubscribe(c.V5, uint16(f+1), fmt.Sprint("f", f-1))
						}
						if _, err := c.Write(p); err != nil {
							break
						}
					}
				}
				_ = c.Close()
			}
		})
	}
	all.Wait()
	_ = b.login(t, false, rawmqtt.Options{ID: "x"}).Close() // ends what was kept
	eventually(t, "everybody gone", func() bool { return b.Clients.Len() == 0 })
	for f := range filters {
		if n := len(b.Topics.Subscribers(fmt.Sprint("f", f)).Subscriptions); n != 0 {
			t.Errorf("filter %d is left behind", f)
		}
	}
	if n := b.fixes.FilterBytes(); n != 0 {
		t.Errorf("%d bytes are counted", n)
	}
	if n := b.c.Count(GateTimeout); n != 0 {
		t.Errorf("%d have waited in vain", n)
	}
}
