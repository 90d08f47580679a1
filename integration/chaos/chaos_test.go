package chaos

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	// queue is how many frames the hub keeps for a receiver, and enough how many messages
	// of a sender fill that for certain.
	queue  = 64
	enough = 1000
)

// settings are what makes a run.
type settings struct {
	seed    uint64
	plain   bool          // ordinary MQTT sessions with a hub that does not forward, instead
	sync    string        // the hub's durability
	n       uint64        // messages of each stream
	streams int           // of each sender
	perTick int           // messages of each stream, every 10 ms; 0: as fast as it goes
	every   time.Duration // between two faults, on average
}

// modes are those that a seed chooses from. With memory the hub forgets its queues and
// forwarders whenever it ends.
var modes = []string{"interval", "always", "interval", "memory"}

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
	if n, ok := number("SEALMQ_CHAOS_PLAIN"); ok {
		s.plain = n != 0
	}
	s.sync = cmp.Or(os.Getenv("SEALMQ_CHAOS_SYNC"), modes[s.seed%uint64(len(modes))])
	return s
}

// String says what makes the run again.
func (s *settings) String() string {
	what := "sealmq, durability " + s.sync
	if s.plain {
		what = "plain MQTT sessions"
	}
	return fmt.Sprintf("seed %d, %s, %d messages, a fault every %v", s.seed, what, s.total(), s.every)
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
	// The race detector would have each process wait a second before it ends.
	env := []string{envRole + "=" + string(text), "GORACE=atexit_sleep_ms=0"}
	p := peer.Start(c.t, peer.Options{Env: env, OnLine: c.line}, exe)
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

// taken is the state file of a receiver.
func (c *child) taken() string { return filepath.Join(c.role.Home, "taken") }

// rest waits until receivers have taken nothing for d.
func rest(t *testing.T, takers []*child, d time.Duration) {
	t.Helper()
	last := int64(-1)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(d) {
		var size int64
		for _, c := range takers {
			info, err := os.Stat(c.taken())
			if err != nil {
				t.Fatal(err)
			}
			size += info.Size()
		}
		if size == last {
			return
		}
		last = size
	}
	t.Fatal("messages without end")
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
	pages   string // host:port of the status pages
	args    []string
	env     []string // set: the test binary plays the hub
	process *peer.Process
}

func newHub(t *testing.T, set *settings) *hub {
	h := &hub{t: t}
	for _, addr := range []*string{&h.addr, &h.pages} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }() // both are held until both are known
		*addr = ln.Addr().String()
	}
	if set.plain {
		text, err := json.Marshal(role{Name: "hub", Kind: "plain-hub", Hub: h.addr})
		if err != nil {
			t.Fatal(err)
		}
		h.env = []string{envRole + "=" + string(text)}
		return h
	}
	// Queues so small that they are full whenever a receiver is not there.
	config := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "limits:\n  outbox_frames: %d\n", queue), 0o600); err != nil {
		t.Fatal(err)
	}
	h.args = []string{"hub", "--config", config, "--mqtt", h.addr, "--http", h.pages, "--data", filepath.Join(t.TempDir(), "data"), "--durability", set.sync}
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
	plan     *schedule
	hub      *hub
	children []*child
	count    map[string]int
	books    books
}

func (c *chaos) run(ctx context.Context) {
	for _, d := range c.children {
		d.proxy.setMangle(true)
	}
	c.fill(ctx)
	for ctx.Err() == nil {
		f := c.plan.next()
		k, d := &kinds[f.kind], c.children[f.child]
		name := k.name
		if !strings.HasPrefix(name, ofHub) {
			name = d.role.part() + " " + name
		}
		c.count[name]++
		k.strike(c, ctx, d, f.lasts)
		pause(ctx, f.then)
	}
	for _, d := range c.children {
		d.proxy.setMangle(false)
	}
}

// fill stops a receiver until its queue at the hub is full, which the faults that follow
// may or may not bring about again. Plain sessions have no queue that withholds.
func (c *chaos) fill(ctx context.Context) {
	if c.hub.env != nil {
		return
	}
	d := c.children[0]
	ctx, cancel := context.WithTimeout(ctx, startup)
	defer cancel()
	until := func(f func() bool) {
		for !f() && ctx.Err() == nil {
			pause(ctx, 10*time.Millisecond)
		}
	}
	until(func() bool { // what is stopped before it has a channel gets nothing
		info, err := os.Stat(d.taken())
		return err == nil && info.Size() > 0
	})
	_ = d.process.Signal(syscall.SIGSTOP)
	until(func() bool { return c.hub.withheld() > 0 })
	_ = d.process.Signal(syscall.SIGCONT)
	c.count[d.role.part()+" stopped until its queue was full"]++
}

func (c *chaos) restartHub(ctx context.Context, sig syscall.Signal, lasts time.Duration) {
	if n, err := c.hub.counters(); err == nil {
		c.books.note(n)
	}
	c.hub.end(sig)
	pause(ctx, lasts)
	c.hub.start()
}

// verdict is what became of the messages of a run.
type verdict struct{ lost, twice, unordered uint64 }

// TestChaos is the run of sealmq, or with SEALMQ_CHAOS_PLAIN=1 that of plain sessions.
func TestChaos(t *testing.T) {
	set := readSettings(t)
	switch v := chaosRun(t, set); {
	case set.plain && v.lost == 0:
		t.Error("the harness found no loss where there is some; give it more messages")
	case !set.plain && v != verdict{}:
		t.Fail()
	}
}

// TestHarnessFindsLoss is a short run of plain sessions: a harness that finds nothing there
// would prove nothing elsewhere. Its seed is one that hardly can but lose.
func TestHarnessFindsLoss(t *testing.T) {
	set := settings{plain: true, seed: rand.Uint64(), n: 800, streams: 2, perTick: 2, every: 375 * time.Millisecond}
	for range 3 {
		for set.seed++; !set.mustLose(); {
			set.seed++
		}
		if v := chaosRun(t, set); v.lost > 0 {
			return
		}
	}
	t.Error("the harness found no loss where there is some")
}

// mustLose reports whether the hub soon ends while messages wait there for a receiver that
// has just been started again.
func (s *settings) mustLose() bool {
	plan := newSchedule(s.seed, senders+receivers, s.every)
	away := false // a receiver is, and will not be back yet
	for at := time.Duration(0); at < 3*time.Second; {
		f := plan.next()
		name := kinds[f.kind].name
		if away && strings.HasPrefix(name, ofHub) {
			return true
		}
		away = at > time.Second && f.child < receivers && name == "killed" && f.lasts > 300*time.Millisecond && f.then < 80*time.Millisecond
		at += f.lasts + f.then
	}
	return false
}

// chaosRun lets the processes exchange their messages under the seed's faults and says
// what became of them.
func chaosRun(t *testing.T, set settings) verdict {
	t.Helper()
	t.Logf("%v: SEALMQ_CHAOS_SEED=%d repeats it", &set, set.seed)
	h := newHub(t, &set)
	h.start()
	c := &chaos{plan: newSchedule(set.seed, senders+receivers, set.every), hub: h, count: make(map[string]int),
		books: books{dropped: make(map[string]float64)}}
	as := func(kind string) string {
		if set.plain {
			return plainPrefix + kind
		}
		return kind
	}
	var takers, givers []*child
	for i := range receivers {
		d := newChild(t, role{Name: fmt.Sprintf("receiver%d", i), Kind: as("receiver"), Streams: set.streams}, h.addr, set.seed+uint64(i))
		d.start()
		takers = append(takers, d)
	}
	for i := range senders {
		to := takers[i%receivers]
		l := to.ready()
		to.lines <- l // for the next sender
		r := role{Name: fmt.Sprintf("sender%d", i), Kind: as("sender"), To: l.Address, Peer: l.ID, Streams: set.streams, N: set.n, PerTick: set.perTick}
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
	defer progress(t, takers, set.total())()
	c.run(ctx)
	deadline := time.After(patience + time.Since(began))
	for _, d := range givers {
		select {
		case <-d.done:
		case <-deadline:
			t.Fatalf("%s still waits for acknowledgements:\n%s", d.role.Name, d.process.Stderr())
		}
	}
	if set.plain {
		// Acknowledged is not arrived: what still comes may come.
		rest(t, takers, plainRest)
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
			c.count["sessions taken over"] += n
		}
		d.proxy.mu.Unlock()
		d.end(syscall.SIGTERM)
	}
	if !set.plain {
		c.books.close(t, h, set.n*uint64(set.streams) >= enough)
	}
	var v verdict
	for i, d := range takers {
		want := make(map[string]uint64)
		for k := i; k < senders; k += receivers {
			for s := range set.streams {
				want[streamName(givers[k].role.Name, s)] = set.n
			}
		}
		if err := v.judge(d.taken(), want); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%v: took %v; faults: %v; lost %d, twice %d, out of order %d",
		&set, took.Round(time.Second), c.count, v.lost, v.twice, v.unordered)
	if !set.plain && set.perTick > 0 && len(c.count) < 5 {
		t.Errorf("only these faults in a paced run: %v", c.count)
	}
	return v
}

// progress says every minute how many messages the receivers have taken, until the function
// that it returns is called.
func progress(t *testing.T, takers []*child, of uint64) (stop func()) {
	done, over := make(chan struct{}), make(chan struct{})
	began := time.Now()
	read := make(map[*child]int64) // bytes of its state file
	lines := 0
	count := func(d *child) {
		f, err := os.Open(d.taken())
		if err != nil {
			return
		}
		defer func() { _ = f.Close() }()
		buf := make([]byte, 1<<20)
		for {
			n, err := f.ReadAt(buf, read[d])
			read[d] += int64(n)
			lines += bytes.Count(buf[:n], []byte{'\n'})
			if err != nil {
				return
			}
		}
	}
	go func() {
		defer close(over)
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			for _, d := range takers {
				count(d)
			}
			t.Logf("%v: %d of %d messages taken", time.Since(began).Round(time.Second), lines, of)
		}
	}()
	return func() {
		close(done)
		<-over
	}
}

// judge adds what a receiver's state file says of the streams that it should have all the
// messages of.
func (v *verdict) judge(path string, want map[string]uint64) error {
	seen, last := make(map[string][]bool), make(map[string]uint64)
	for from, n := range want {
		seen[from] = make([]bool, n+1)
	}
	err := eachTaken(path, func(from string, n uint64, _ string) error {
		switch s := seen[from]; {
		case n == 0 || n >= uint64(len(s)):
			return fmt.Errorf("message %d of %q, which there is not", n, from)
		case s[n]:
			v.twice++
			return nil
		case n < last[from]:
			v.unordered++
		}
		seen[from][n] = true
		last[from] = max(last[from], n)
		return nil
	})
	for _, s := range seen {
		for _, there := range s[1:] {
			if !there {
				v.lost++
			}
		}
	}
	return err
}

// TestVerdict: each kind of failure is seen.
func TestVerdict(t *testing.T) {
	path := filepath.Join(t.TempDir(), "taken")
	st, err := openState(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint64{1, 2, 4, 3, 3, 7} {
		if err := st.take("a", n, "-"); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.f.Close(); err != nil {
		t.Fatal(err)
	}
	var v verdict
	if err := v.judge(path, map[string]uint64{"a": 8, "b": 5}); err != nil || v != (verdict{lost: 3 + 5, twice: 1, unordered: 1}) {
		t.Errorf("%+v, %v", v, err)
	}
	if err := v.judge(path, map[string]uint64{"a": 6}); err == nil {
		t.Error("a message that was never sent is fine")
	}
}
