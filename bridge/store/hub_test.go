package store

import (
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

type signer struct{}

func (signer) Identifier() identity.Identifier      { return identity.Identifier{1} }
func (signer) ChangeHistory() []byte                { return nil }
func (signer) SignHello(msg []byte) ([]byte, error) { return make([]byte, 64), nil }

// client is a device's connection. Its manners decide when it acknowledges.
type client struct {
	manners manners

	mu    sync.Mutex
	cond  sync.Cond
	acked map[uint64]bool
	open  []uint64 // sequences taken and not acknowledged
	seen  []uint64 // numbers received, in order
	end   bool

	link  *bridge.Link
	slots chan struct{} // the sender's window
	done  chan struct{}
}

type manners int

const (
	polite manners = iota
	mute           // never acknowledges
	liar           // acknowledges what it was never sent
)

func (c *client) Deliver(entries []bridge.Entry) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(len(entries), 32-len(c.open))
	for _, e := range entries[:max(0, n)] {
		if f, err := route.ParseFrame(e.Frame, route.Limits{}); err == nil && len(f.Payload) >= 8 {
			c.seen = append(c.seen, binary.BigEndian.Uint64(f.Payload))
		}
		if e.Class == route.Stored {
			c.open = append(c.open, e.Seq)
		}
	}
	c.cond.Signal()
	return max(0, n)
}

func (c *client) Direct([]byte) bool     { return true }
func (c *client) Kick(bridge.KickReason) { c.stop() }

func (c *client) Acked(token uint64) {
	c.mu.Lock()
	c.acked[token] = true
	c.mu.Unlock()
	select {
	case <-c.slots:
	default: // this one keeps no window
	}
}

func (c *client) stop() {
	c.mu.Lock()
	c.end = true
	c.cond.Signal()
	c.mu.Unlock()
}

// run acknowledges as the manners say.
func (c *client) run() {
	defer close(c.done)
	for {
		c.mu.Lock()
		for len(c.open) == 0 && !c.end || c.manners == mute && !c.end {
			c.cond.Wait()
		}
		if c.end {
			c.mu.Unlock()
			return
		}
		seq := c.open[len(c.open)-1]
		c.open = c.open[:0]
		c.mu.Unlock()
		if c.manners == liar {
			seq += 1 << 40
		}
		c.link.Delivered(seq)
		c.link.Ready()
	}
}

// hubRun is one life of a hub on a folder.
type hubRun struct {
	t     *testing.T
	store *Store
	*bridge.Bridge
}

func startHub(t *testing.T, dir string) *hubRun {
	t.Helper()
	s, _, err := Open(dir, Options{Mode: SyncInterval, SegmentSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	b, err := bridge.New(bridge.Config{
		Key: [32]byte{1}, Identity: signer{}, Outboxes: s.Outbox, Journal: s,
		OutboxFrames: 100, OutboxBytes: 16 << 10, TotalFrames: 350, TotalBytes: 48 << 10, Window: 256, WindowBytes: 64 << 10,
	})
	if err != nil {
		t.Fatal(err)
	}
	st, err := s.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Restore(st); err != nil {
		t.Fatal(err)
	}
	return &hubRun{t, s, b}
}

func (h *hubRun) stop() {
	if err := h.Close(); err != nil {
		h.t.Error(err)
	}
	if err := h.store.Close(); err != nil {
		h.t.Error(err)
	}
}

func (h *hubRun) connect(name string, m manners) *client {
	h.t.Helper()
	c := &client{manners: m, acked: make(map[uint64]bool), slots: make(chan struct{}, 32), done: make(chan struct{})}
	c.cond.L = &c.mu
	link, err := h.ConnectDevice(bridge.Principal{ClientID: name, Role: bridge.RoleDevice}, c)
	if err != nil {
		h.t.Fatal(err)
	}
	c.link = link
	go c.run()
	link.Subscribed()
	link.Attach(false)
	return c
}

// quiet waits until every frame has a fate.
func (h *hubRun) quiet() {
	h.t.Helper()
	h.until("the sums agree", func() bool { c := h.Counters(); return c.Lost() == 0 })
}

func (h *hubRun) until(what string, f func() bool) {
	h.t.Helper()
	tick, end := time.NewTicker(time.Millisecond), time.After(20*time.Second)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-end:
			h.t.Fatalf("not within 20 s: %s: %+v", what, h.Counters())
		}
	}
}

// Devices that behave, one that never acknowledges, one that acknowledges what it
// was never sent, and queues that reach every limit at once, over several lives of
// a hub: the sums agree, and of a polite sender's frames to a polite device none is
// missing that was acknowledged.
func TestEverythingAtOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	acked, seen := make(map[uint64]bool), make(map[uint64]bool)
	var number uint64
	for life := range 6 {
		rnd := rand.New(rand.NewPCG(seed, uint64(life)))
		h := startHub(t, dir)
		clients := map[string]*client{
			"mute": h.connect("mute", mute), "liar": h.connect("liar", liar), "bob": h.connect("bob", polite),
			"alice": h.connect("alice", polite), "flood": h.connect("flood", polite),
		}
		targets := []string{"mute", "liar", "away", "alice", "flood"}
		away := h.connect("away", polite)
		away.link.Close(true)
		away.stop()
		<-away.done
		var wg sync.WaitGroup
		wg.Go(func() { // fills what never empties
			c := clients["flood"]
			for i := range 600 {
				f := route.Frame{Onward: route.To(h.HubAddress(targets[rnd.IntN(len(targets))]), "app"), Payload: make([]byte, rnd.IntN(2000))}
				class := route.Class(rnd.IntN(4) / 3)
				if c.link.Receive(route.AppendFrame(nil, &f), class, c, uint64(i)) != nil {
					return // it ignored its window
				}
			}
		})
		alice := clients["alice"]
		stalled := time.After(300 * time.Millisecond) // the hub as a whole may be full
	polite:
		for range 400 {
			select {
			case alice.slots <- struct{}{}:
			case <-stalled:
				break polite
			}
			f := route.Frame{Onward: route.To(h.HubAddress("bob"), "app"), Payload: binary.BigEndian.AppendUint64(nil, number)}
			if err := alice.link.Receive(route.AppendFrame(nil, &f), route.Stored, alice, number); err != nil {
				t.Fatal("a polite sender was cut off:", err)
			}
			number++
		}
		wg.Wait()
		h.quiet()
		h.stop()
		for name, c := range clients {
			c.stop()
			<-c.done
			c.mu.Lock()
			switch name {
			case "bob":
				for _, n := range c.seen {
					seen[n] = true
				}
			case "alice":
				maps.Copy(acked, c.acked)
			}
			c.mu.Unlock()
		}
	}
	missing := 0
	for n := range acked {
		if !seen[n] {
			missing++
		}
	}
	// What the last life left queued is in the store, not lost.
	h := startHub(t, dir)
	defer h.stop()
	bob := h.connect("bob", polite)
	h.until("bob's queue is empty", func() bool {
		bob.mu.Lock()
		defer bob.mu.Unlock()
		for n := range acked {
			if !seen[n] && !slices.Contains(bob.seen, n) {
				return false
			}
		}
		return true
	})
	h.quiet()
	bob.link.Close(true)
	bob.stop()
	<-bob.done
	bob.mu.Lock()
	defer bob.mu.Unlock()
	for _, n := range bob.seen {
		if acked[n] && !seen[n] {
			missing--
			seen[n] = true
		}
	}
	if missing > 0 {
		t.Fatalf("%d of %d acknowledged frames are missing", missing, len(acked))
	}
	if len(acked) == 0 {
		t.Fatal("nothing was acknowledged")
	}
	t.Logf("%d of %d were acknowledged", len(acked), number)
}
