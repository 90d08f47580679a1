package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

type signer struct{}

func (signer) Identifier() identity.Identifier      { return identity.Identifier{1} }
func (signer) ChangeHistory() []byte                { return nil }
func (signer) SignHello(msg []byte) ([]byte, error) { return make([]byte, 64), nil }

// client is a device's connection. Its manners decide when it acknowledges.
type client struct {
	h       *hubRun
	manners manners
	link    *bridge.Link
	done    chan struct{}

	mu      sync.Mutex
	cond    sync.Cond
	acked   []uint64 // numbers of its own that were acknowledged
	open    []uint64 // sequences taken and not acknowledged
	seen    []uint64 // numbers received, in order
	noticed []hubproto.Reason
	kicked  bridge.KickReason
	end     bool
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
	n := max(0, min(len(entries), 32-len(c.open)))
	for _, e := range entries[:n] {
		if f, err := route.ParseFrame(e.Frame, route.Limits{}); err == nil && len(f.Payload) >= 8 {
			c.seen = append(c.seen, binary.BigEndian.Uint64(f.Payload))
		}
		if e.Class == route.Stored {
			c.open = append(c.open, e.Seq)
		}
	}
	c.cond.Signal()
	return n
}

func (c *client) Direct(frame []byte) bool {
	f, err := route.ParseFrame(frame, route.Limits{})
	if err != nil || !f.Onward.Equal(route.To(hubproto.NoticeTarget)) {
		return true
	}
	if n, err := hubproto.ParseNotice(f.Payload); err == nil {
		c.mu.Lock()
		c.noticed = append(c.noticed, n.Reason)
		c.mu.Unlock()
	}
	return true
}

func (c *client) Kick(r bridge.KickReason) {
	c.mu.Lock()
	c.kicked = r
	c.mu.Unlock()
	c.stop()
}

func (c *client) Acked(token uint64) {
	c.mu.Lock()
	c.acked = append(c.acked, token)
	c.mu.Unlock()
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
		for (len(c.open) == 0 || c.manners == mute) && !c.end {
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

// acks, took and told return how many frames were acknowledged, how many were received,
// and what was noticed.
func (c *client) acks() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.acked)
}

func (c *client) took() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seen)
}

func (c *client) told() []hubproto.Reason {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.noticed)
}

// ended says why the connection was ended.
func (c *client) ended() bridge.KickReason {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kicked
}

// Limits of the hub under test.
const (
	outboxFrames, outboxBytes = 100, 64 << 10
	totalFrames, totalBytes   = 960, 512 << 10
	window, windowBytes       = 64, 1 << 20
	maxAge                    = time.Minute
	// What is kept for devices that keep up is no backlog's.
	backlogFrames, backlogBytes = totalFrames - totalFrames/16, totalBytes - totalBytes/16
)

// hubRun is one life of a hub on a folder.
type hubRun struct {
	t     *testing.T
	store *Store
	*bridge.Bridge
	books   *books
	clients map[string]*client
}

// books are what the senders were told and what the targets have seen, over all lives.
type books struct {
	next  uint64
	to    map[uint64]string   // where a number went
	acked map[uint64]bool     // its sender was told that the hub has it
	seen  map[string][]uint64 // by target, in order
}

func startHub(t *testing.T, dir string, mode Mode, bk *books) *hubRun {
	t.Helper()
	s, _, err := Open(dir, Options{Mode: mode, SegmentSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	b, err := bridge.New(bridge.Config{
		Key: [32]byte{1}, Identity: signer{}, Outboxes: s.Outbox, Journal: s, MaxAge: maxAge,
		OutboxFrames: outboxFrames, OutboxBytes: outboxBytes, TotalFrames: totalFrames, TotalBytes: totalBytes,
		Window: window, WindowBytes: windowBytes,
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
	return &hubRun{t, s, b, bk, make(map[string]*client)}
}

// stop ends this life and writes down what came of it.
func (h *hubRun) stop() {
	h.t.Helper()
	synctest.Wait()
	if c := h.Counters(); c.Lost() != 0 {
		h.t.Errorf("%d frames without a fate: %+v", c.Lost(), c)
	}
	h.end()
	for name, c := range h.clients {
		h.books.seen[name] = append(h.books.seen[name], c.seen...)
		for _, n := range c.acked {
			h.books.acked[n] = true
		}
	}
}

// end ends this life. A second call does nothing.
func (h *hubRun) end() {
	h.t.Helper()
	if err := h.Close(); err != nil {
		h.t.Error(err)
	}
	if err := h.store.Close(); err != nil {
		h.t.Error(err)
	}
	for _, c := range h.clients {
		c.stop()
		<-c.done
	}
}

func (h *hubRun) connect(name string, m manners) *client {
	h.t.Helper()
	c := &client{h: h, manners: m, done: make(chan struct{})}
	c.cond.L = &c.mu
	link, err := h.ConnectDevice(bridge.Principal{ClientID: name, Role: bridge.RoleDevice}, c)
	if err != nil {
		h.t.Fatal(err)
	}
	c.link = link
	h.clients[name] = c
	go c.run()
	link.Subscribed()
	// Notices go to those who said hello.
	body, err := (&hubproto.HelloRequest{Epoch: [hubproto.EpochLen]byte{1}}).Marshal()
	if err != nil {
		h.t.Fatal(err)
	}
	hello := route.Frame{Onward: route.To(bridge.ServiceHello), Return: route.To("h"), Payload: body}
	if err := link.Receive(route.AppendFrame(nil, &hello), route.Stored, nil, 0); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// send sends one packet of numbered frames, of size bytes each.
func (c *client) send(to string, class route.Class, frames, size int) error {
	bk := c.h.books
	var body []byte
	first := bk.next
	for range frames {
		f := route.Frame{
			Onward: route.To(c.h.HubAddress(to), "app"), Return: route.To("me"),
			Payload: append(binary.BigEndian.AppendUint64(nil, bk.next), make([]byte, max(8, size)-8)...),
		}
		body = route.AppendFrame(body, &f)
		if class == route.Stored {
			bk.to[bk.next] = to
		}
		bk.next++
	}
	// A token says of a bundle which number was its last, and how many it had.
	ack := acks{c, first, frames}
	return c.link.Receive(body, class, ack, 0)
}

// acks hears of the acknowledgement of a packet.
type acks struct {
	c     *client
	first uint64
	n     int
}

func (a acks) Acked(uint64) {
	for i := range a.n {
		a.c.Acked(a.first + uint64(i))
	}
}

// TestEverythingAtOnce holds a hub with a store to its promises while queues are at
// every limit at once: frames and bytes of one target, frames and bytes of all, age and
// window, beside a device that never acknowledges, one that acknowledges what it was
// never sent, and a flood. Whoever may not go on has acknowledgements withheld, or is
// told; who ignores that is cut off and counted; two bystanders notice nothing; and over
// several lives of the hub nothing is missing that was acknowledged.
func TestEverythingAtOnce(t *testing.T) {
	for name, mode := range map[string]Mode{"interval": SyncInterval, "always": SyncAlways} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { everythingAtOnce(t, mode) }) })
	}
}

func everythingAtOnce(t *testing.T, mode Mode) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	bk := &books{to: make(map[uint64]string), acked: make(map[uint64]bool), seen: make(map[string][]uint64)}
	h := startHub(t, dir, mode, bk)
	defer func() { h.end() }()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// bystanders exchange messages one way and the other, each acknowledged and taken.
	bystanders := func(when string) {
		t.Helper()
		for _, pair := range [][2]string{{"alice", "bob"}, {"bob", "alice"}} {
			from, to := h.clients[pair[0]], h.clients[pair[1]]
			acks, seen := from.acks(), to.took()
			for range 50 {
				must(from.send(pair[1], route.Stored, 1, 100))
			}
			synctest.Wait()
			if a, s := from.acks()-acks, to.took()-seen; a != 50 || s != 50 {
				t.Errorf("%s: of 50 messages from %s to %s %d were acknowledged and %d arrived", when, pair[0], pair[1], a, s)
			}
		}
	}
	connect := func(m manners, names ...string) {
		for _, name := range names {
			h.connect(name, m)
		}
	}
	// fill sends packets of one frame until some are withheld.
	fill := func(from, to string, size int) (stored int) {
		t.Helper()
		c := h.clients[from]
		acks, waiting := c.acks(), h.Counters().Waiting
		sent := 0
		for h.Counters().Waiting < waiting+5 {
			must(c.send(to, route.Stored, 1, size))
			if sent++; sent%(window/2) == 0 {
				synctest.Wait() // it keeps to its window
			}
		}
		synctest.Wait()
		if stored = c.acks() - acks; stored != sent-5 {
			t.Errorf("of %d packets to %s %d were acknowledged, and 5 wait", sent, to, stored)
		}
		return stored
	}
	connect(polite, "alice", "bob", "ager", "framer", "byter", "totaler", "flood", "rude", "large", "away", "old")
	connect(mute, "deaf")
	connect(liar, "liar")
	var many []string
	for i := range 16 {
		many = append(many, fmt.Sprint("many", i))
	}
	connect(mute, many...)
	for _, name := range []string{"away", "old"} {
		h.clients[name].link.Close(true)
	}
	bystanders("with nothing full")

	// Age: what is to pass its limit while all else is full.
	for range 10 {
		must(h.clients["ager"].send("old", route.Stored, 1, 20))
	}
	time.Sleep(maxAge / 2)

	// One target's limits, at one that is connected and at one that is away.
	if n := fill("framer", "deaf", 20); n != outboxFrames || h.Counters().Withheld != 5 {
		t.Errorf("%d frames were acknowledged for a target that may have %d, %d withheld", n, outboxFrames, h.Counters().Withheld)
	}
	bystanders("with a queue at its limit in frames")
	before := h.Counters()
	fill("byter", "away", 4000)
	c := h.Counters()
	if n := c.QueuedBytes - before.QueuedBytes; n < outboxBytes || n > outboxBytes+5000 || c.Queued-before.Queued >= outboxFrames {
		t.Errorf("%d bytes in %d frames were acknowledged for a target that may have %d", n, c.Queued-before.Queued, outboxBytes)
	}
	bystanders("with a queue at its limit in bytes")

	// Acknowledgements of what was never sent.
	for range 50 {
		must(h.clients["totaler"].send("liar", route.Stored, 1, 20))
	}
	synctest.Wait()
	if c := h.Counters(); c.BadAcks == 0 {
		t.Error("false acknowledgements are not counted")
	}

	// The limits of all queues together: both at once, by the last packet.
	total := h.clients["totaler"]
	for i := 0; ; i++ {
		c := h.Counters()
		frames, size := backlogFrames-c.Queued, backlogBytes-c.QueuedBytes
		if frames <= 30 || size <= 45_000 {
			must(total.send(many[15], route.Stored, int(frames)+1, int(size/(frames+1))))
			break
		}
		must(total.send(many[i%15], route.Stored, 1, int((size-40_000)/(frames-20))-80))
		if i%(window/2) == 0 {
			synctest.Wait()
		}
	}
	synctest.Wait()
	c = h.Counters()
	if c.Queued < backlogFrames || c.Queued > totalFrames || c.QueuedBytes < backlogBytes || c.QueuedBytes > totalBytes {
		t.Fatalf("%d frames and %d bytes are queued, the limits are %d to %d and %d to %d",
			c.Queued, c.QueuedBytes, backlogFrames, totalFrames, backlogBytes, totalBytes)
	}
	acks, waiting := total.acks(), c.Waiting
	for _, to := range many[:10] { // each has room of its own
		must(total.send(to, route.Stored, 1, 20))
	}
	synctest.Wait()
	if n, w := total.acks()-acks, h.Counters().Waiting-waiting; n != 0 || w != 10 {
		t.Errorf("of 10 packets for a full hub %d were acknowledged, %d wait", n, w)
	}
	bystanders("with the hub at its limits")

	// The window, in packets and in bytes, and by a flood of everything to everybody.
	cut := func(name string, send func(c *client) error, least, most int) {
		t.Helper()
		c, kicked := h.clients[name], h.Counters().Kicked[bridge.KickWindow]
		n := 0
		for err := error(nil); err == nil; {
			if err = send(c); err != nil && !errors.Is(err, bridge.ErrClosed) {
				t.Fatal(err)
			}
			if n++; n > 10*window {
				t.Fatalf("%s goes on", name)
			}
		}
		if n < least || n > most {
			t.Errorf("%s was cut off after %d packets", name, n)
		}
		if c.ended() != bridge.KickWindow || h.Counters().Kicked[bridge.KickWindow] != kicked+1 {
			t.Errorf("%s: %v, %d counted", name, c.ended(), h.Counters().Kicked[bridge.KickWindow]-kicked)
		}
		if err := c.send("bob", route.Stored, 1, 20); !errors.Is(err, bridge.ErrClosed) {
			t.Errorf("%s sends after its end: %v", name, err)
		}
		bystanders("when " + name + " was cut off")
	}
	cut("rude", func(c *client) error { return c.send("deaf", route.Stored, 1, 20) }, window+1, window+1)
	cut("large", func(c *client) error { return c.send("away", route.Stored, 1, 100_000) }, 11, 11)
	targets := append([]string{"deaf", "liar", "away", "old", "flood"}, many...)
	cut("flood", func(c *client) error {
		class := route.Stored
		if rnd.IntN(4) == 0 {
			class = route.Transient
		}
		return c.send(targets[rnd.IntN(len(targets))], class, 1+rnd.IntN(3), rnd.IntN(2000))
	}, window+1, 10*window)

	// Age, at last.
	ager := h.clients["ager"]
	if c := h.Counters(); c.Dropped[bridge.DropExpired] != 0 || ager.acks() != 10 || len(ager.told()) != 0 {
		t.Errorf("%d expired, %d acknowledged, %v noticed", c.Dropped[bridge.DropExpired], ager.acks(), ager.told())
	}
	time.Sleep(maxAge/2 + time.Second)
	synctest.Wait()
	if c := h.Counters(); c.Dropped[bridge.DropExpired] != 10 || !slices.Contains(ager.told(), hubproto.ReasonExpired) {
		t.Errorf("%d expired, %v noticed", c.Dropped[bridge.DropExpired], ager.told())
	}
	for n, to := range bk.to {
		if to == "old" {
			delete(bk.to, n) // its sender knows
		}
	}
	if c := h.Counters(); c.Waiting == 0 || c.Dropped[bridge.DropStorage] != 0 {
		t.Errorf("%+v", c)
	}
	bystanders("before the hub ends")
	left := h.Counters().Queued
	h.stop()

	// The next life begins at the limits.
	h = startHub(t, dir, mode, bk)
	if c := h.Counters(); c.Queued != left || int64(c.Restored) != left {
		t.Errorf("%d of %d frames came back", c.Queued, left)
	}
	connect(polite, "alice", "bob", "framer", "byter")
	connect(mute, "deaf")
	for from, to := range map[string]string{"framer": "deaf", "byter": "away"} {
		if n := fill(from, to, 20); n != 0 {
			t.Errorf("%d frames were acknowledged for a target whose queue is full", n)
		}
	}
	bystanders("in the second life")
	h.stop()

	// In the third everybody reads.
	h = startHub(t, dir, mode, bk)
	connect(polite, append(targets, "alice", "bob")...)
	synctest.Wait()
	c = h.Counters()
	if c.Queued+c.Waiting != 0 {
		t.Errorf("left: %+v", c)
	}
	bystanders("in the third life")
	h.stop()
	missing := make(map[string]int)
	for n, to := range bk.to {
		if bk.acked[n] && !slices.Contains(bk.seen[to], n) {
			missing[to]++
		}
	}
	if len(missing) > 0 {
		t.Errorf("acknowledged and missing: %v", missing)
	}
	for to, seen := range bk.seen { // but for the repeats of a new connection in order
		last := make(map[uint64]bool)
		high := uint64(0)
		for _, n := range seen {
			if n < high && !last[n] {
				t.Errorf("%s got %d after %d", to, n, high)
				break
			}
			last[n] = true
			high = max(high, n)
		}
	}
	t.Logf("%d of %d frames were acknowledged", len(bk.acked), bk.next)
}
