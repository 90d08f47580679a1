package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

const (
	senders   = 3
	receivers = 2
	// patience is how long the run may take to come to rest once the faults have
	// ended; startup is how long a process may take to be ready.
	patience = 90 * time.Second
	startup  = 60 * time.Second
)

// settings are the size of a run.
type settings struct {
	seed    uint64
	n       uint64        // messages of each stream
	streams int           // of each sender
	perTick int           // messages of each stream, every 10 ms; 0: as fast as it goes
	every   time.Duration // between two faults, on average
}

func readSettings(t *testing.T) settings {
	t.Helper()
	s := settings{seed: rand.Uint64(), n: 2000, streams: 2, perTick: 1, every: 375 * time.Millisecond}
	number := func(name string) (uint64, bool) {
		text := os.Getenv(name)
		if text == "" {
			return 0, false
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n, true
	}
	if n, ok := number("SEALMQ_CHAOS_SEED"); ok {
		s.seed = n
	}
	if n, ok := number("SEALMQ_CHAOS_N"); ok {
		// Many streams, since each waits for the disk with every message.
		s.streams, s.perTick = 32, 0
		s.n = (n + senders*32 - 1) / (senders * 32)
	}
	if n, ok := number("SEALMQ_CHAOS_EVERY"); ok {
		s.every = time.Duration(n) * time.Millisecond
	}
	t.Logf("seed %d, %d messages, a fault every %v: SEALMQ_CHAOS_SEED=%d repeats it", s.seed, s.total(), s.every, s.seed)
	return s
}

func (s *settings) total() uint64 { return senders * uint64(s.streams) * s.n }

// child is a device, run by one process after the other.
type child struct {
	t     *testing.T
	role  role
	proxy *proxy

	mu      sync.Mutex
	process *peer.Process
	lines   chan line
	posted  chan struct{} // closed once it has posted everything
	done    chan struct{} // closed once everything was acknowledged
	faults  []line        // violations
}

func newChild(t *testing.T, r role, hub string, seed uint64) *child {
	c := &child{
		t: t, role: r, proxy: newProxy(t, hub, seed), lines: make(chan line, 16),
		posted: make(chan struct{}), done: make(chan struct{}),
	}
	c.role.Hub = "mqtt://" + c.proxy.addr()
	c.role.Home = filepath.Join(t.TempDir(), r.Name)
	return c
}

// start starts a process; it does not wait until that is ready.
func (c *child) start() {
	c.t.Helper()
	text, err := json.Marshal(c.role)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.MkdirAll(c.role.Home, 0o700); err != nil {
		c.t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	p := peer.Start(c.t, peer.Options{Env: []string{envRole + "=" + string(text)}, OnLine: c.line}, exe)
	c.mu.Lock()
	c.process = p
	c.mu.Unlock()
}

func (c *child) line(text []byte) {
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		return // the race detector's own words, perhaps
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch l.Event {
	case "ready":
		select {
		case c.lines <- l:
		default:
		}
	case "posted":
		closeOnce(c.posted)
	case "done":
		closeOnce(c.posted)
		closeOnce(c.done)
	case "violation":
		c.faults = append(c.faults, l)
	}
}

func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

func (c *child) ready() line {
	c.t.Helper()
	select {
	case l := <-c.lines:
		return l
	case <-time.After(startup):
		c.t.Fatalf("%s is not ready:\n%s", c.role.Name, c.process.Stderr())
		return line{}
	}
}

// end ends the process and waits until it is gone.
func (c *child) end(sig syscall.Signal) {
	c.t.Helper()
	if err := c.process.Signal(sig); err != nil {
		c.t.Fatal(err)
	}
	select {
	case <-c.process.Exited():
	case <-time.After(startup):
		c.t.Fatalf("%s does not end:\n%s", c.role.Name, c.process.Stderr())
	}
}

// hub is the hub's process, at one address with one data folder.
type hub struct {
	t       *testing.T
	addr    string
	args    []string
	env     []string // set: the test binary plays the hub
	process *peer.Process
}

func newHub(t *testing.T) *hub {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{t: t, addr: ln.Addr().String()}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	// Queues so small that they are full whenever a receiver is not there.
	config := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(config, []byte("limits:\n  outbox_frames: 64\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.args = []string{"hub", "--config", config, "--mqtt", h.addr, "--data", filepath.Join(t.TempDir(), "data")}
	return h
}

func (h *hub) start() {
	h.t.Helper()
	up := make(chan struct{})
	program := os.Args[0]
	if h.env == nil {
		program = peer.Sealmq(h.t)
	}
	h.process = peer.Start(h.t, peer.Options{Env: h.env, OnLine: func([]byte) { closeOnce(up) }}, program, h.args...)
	select {
	case <-up:
	case <-h.process.Exited():
		h.t.Fatalf("the hub ended:\n%s", h.process.Stderr())
	case <-time.After(startup):
		h.t.Fatalf("the hub does not start:\n%s", h.process.Stderr())
	}
}

func (h *hub) end(sig syscall.Signal) {
	h.t.Helper()
	if err := h.process.Signal(sig); err != nil {
		h.t.Fatal(err)
	}
	select {
	case <-h.process.Exited():
	case <-time.After(startup):
		h.t.Fatalf("the hub does not end:\n%s", h.process.Stderr())
	}
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// chaos makes one fault after the other until ctx ends, and heals the last.
type chaos struct {
	rnd      *rand.Rand
	hub      *hub
	children []*child
	every    time.Duration // between two faults, on average
	count    map[string]int
}

func (c *chaos) any() *child { return c.children[c.rnd.IntN(len(c.children))] }

func (c *chaos) between(low, high time.Duration) time.Duration {
	return low + time.Duration(c.rnd.Int64N(int64(high-low)))
}

func (c *chaos) run(ctx context.Context) {
	for _, d := range c.children {
		d.proxy.setMangle(true)
	}
	for ctx.Err() == nil {
		c.fault(ctx)
		pause(ctx, c.between(c.every/8, 2*c.every-c.every/8))
	}
	for _, d := range c.children {
		d.proxy.setMangle(false)
	}
}

func (c *chaos) fault(ctx context.Context) {
	d := c.any()
	switch kind := c.rnd.IntN(20); {
	case kind < 2:
		c.count["hub killed"]++
		c.hub.end(syscall.SIGKILL)
		pause(ctx, c.between(0, time.Second))
		c.hub.start()
	case kind < 3:
		c.count["hub terminated"]++
		c.hub.end(syscall.SIGTERM)
		pause(ctx, c.between(0, time.Second))
		c.hub.start()
	case kind < 6:
		c.count[d.role.Kind+" killed"]++
		d.end(syscall.SIGKILL)
		pause(ctx, c.between(0, time.Second))
		d.start()
	case kind < 7:
		c.count[d.role.Kind+" terminated"]++
		d.end(syscall.SIGTERM)
		d.start()
	case kind < 13:
		c.count["connection cut"]++
		d.proxy.cut()
	case kind < 16:
		c.count["connection stalled"]++
		resume := d.proxy.stall()
		pause(ctx, c.between(100*time.Millisecond, 3*time.Second))
		resume()
	case kind < 18:
		// It comes back while its hub still holds the connection of the process before,
		// and takes the session over. The proxy counts that.
		c.count[d.role.Kind+" killed"]++
		release := d.proxy.hold()
		d.end(syscall.SIGKILL)
		d.start()
		pause(ctx, c.between(time.Second, 2*time.Second))
		release()
	default:
		// Its queue fills meanwhile.
		c.count["process stopped"]++
		_ = d.process.Signal(syscall.SIGSTOP)
		pause(ctx, c.between(500*time.Millisecond, 3*time.Second))
		_ = d.process.Signal(syscall.SIGCONT)
	}
}

func TestChaos(t *testing.T) {
	set := readSettings(t)
	rnd := rand.New(rand.NewPCG(set.seed, 1))
	h := newHub(t)
	h.start()
	c := &chaos{rnd: rnd, hub: h, every: set.every, count: make(map[string]int)}
	var takers, givers []*child
	for i := range receivers {
		d := newChild(t, role{Name: fmt.Sprintf("receiver%d", i), Kind: "receiver", Streams: set.streams}, h.addr, set.seed+uint64(i))
		d.start()
		takers = append(takers, d)
	}
	for i := range senders {
		to := takers[i%receivers]
		l := to.ready()
		to.lines <- l // for the next sender
		r := role{Name: fmt.Sprintf("sender%d", i), Kind: "sender", To: l.Address, Peer: l.ID, Streams: set.streams, N: set.n, PerTick: set.perTick}
		d := newChild(t, r, h.addr, set.seed+100+uint64(i))
		d.start()
		givers = append(givers, d)
	}
	c.children = append(append(c.children, takers...), givers...)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for _, d := range givers {
			select {
			case <-d.posted:
			case <-ctx.Done():
			}
		}
		cancel()
	}()
	began := time.Now()
	c.run(ctx)
	deadline := time.After(patience + time.Since(began))
	for _, d := range givers {
		select {
		case <-d.done:
		case <-deadline:
			t.Fatalf("%s still waits for acknowledgements:\n%s", d.role.Name, d.process.Stderr())
		}
	}
	took := time.Since(began)

	for _, d := range c.children {
		d.mu.Lock()
		for _, l := range d.faults {
			t.Errorf("%s: message %d of %s came %s", d.role.Name, l.N, l.ID, l.Text)
		}
		d.mu.Unlock()
		d.proxy.mu.Lock()
		c.count["packets repeated"] += d.proxy.count.repeated
		c.count["packets reordered"] += d.proxy.count.reordered
		if n := d.proxy.count.takenOver; n > 0 {
			c.count["session taken over"] += n
		}
		d.proxy.mu.Unlock()
		d.end(syscall.SIGTERM)
	}
	var lost, twice, unordered uint64
	for i, d := range takers {
		last := make(map[string]uint64)
		err := eachTaken(filepath.Join(d.role.Home, "taken"), func(from string, n uint64, _ string) error {
			switch want := last[from] + 1; {
			case n < want:
				twice++
			case n > want:
				unordered++
			}
			last[from] = max(last[from], n)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for k, g := range givers {
			if k%receivers == i {
				for s := range set.streams {
					lost += set.n - last[streamName(g.role.Name, s)]
				}
			}
		}
	}
	t.Logf("%d messages in %v; faults: %v; lost %d, twice %d, out of order %d",
		set.total(), took.Round(time.Second), c.count, lost, twice, unordered)
	if lost+twice+unordered != 0 {
		t.Fail()
	}
	if set.perTick > 0 && len(c.count) < 5 {
		t.Errorf("only these faults in a paced run: %v", c.count)
	}
}
