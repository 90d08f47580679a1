package bridge

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// after is a bridge that goes on with what a journal heard.
func (j *testJournal) after(t *testing.T, change func(*Config)) *Bridge {
	t.Helper()
	var st State
	for _, p := range j.ports {
		st.Ports = append(st.Ports, p)
	}
	for _, f := range j.states {
		st.Forwarders = append(st.Forwarders, f)
	}
	b := newTestBridge(t, change)
	if err := b.Restore(st); err != nil {
		t.Fatal(err)
	}
	return b
}

// A device that was attached for longer than its names outlive it has been seen
// until the hub was killed, whenever it came.
func TestKilledHubSawItsDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}
		b := newTestBridge(t, func(c *Config) { c.Journal = j })
		live, away := attach(t, b, "live", true), attach(t, b, "away", true)
		door := live.register(ServiceStaticForwarding, "door", "M")
		away.register(ServiceStaticForwarding, "gate", "M")
		away.Close(true)
		time.Sleep(23 * time.Hour)
		attach(t, b, "late", true)
		// Killed: the journal hears nothing more.
		killed := &testJournal{states: j.states, ports: j.ports}
		b.cfg.Journal = nil

		after := killed.after(t, func(c *Config) { c.Journal = killed })
		equal(t, "status", len(after.Records()), 5)
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if after.Forwarder(door) == nil {
			t.Error("the forwarder of a device that was there is gone")
		}
		if after.Forwarder("forward_to_gate") != nil {
			t.Error("the forwarder of a device that was long gone is there")
		}
		equal(t, "devices", after.Counters().Ports, 2)
		// A second start does not count them as seen again.
		again := killed.after(t, nil)
		time.Sleep(22*time.Hour + time.Minute)
		synctest.Wait()
		equal(t, "forwarders", again.Counters().Forwarders, 0)
		equal(t, "devices", again.Counters().Ports, 0)
	})
}

// What a restart finds queued is counted once, goes on to age from its arrival,
// and first contacts among it do not wait for a sleeper.
func TestRestoredQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}
		j.Port(PortState{Principal: device("bob"), Seen: time.Now()})
		start := time.Now().UnixNano()
		factory := func(string, bool) (Outbox, error) {
			box, err := newMemoryOutboxes()("", true)
			if err != nil {
				return nil, err
			}
			body := frame(route.To("x"), route.To("y"), []byte("payload"))
			for i := range 3 {
				_, _, err = box.Append(RoutedPacket(route.Stored, start+int64(i)*int64(time.Hour), i == 1, nil, body), Ticket{})
			}
			return box, err
		}
		time.Sleep(4 * time.Hour)
		b := j.after(t, func(c *Config) { c.Outboxes, c.MaxAge = factory, 6*time.Hour })
		synctest.Wait()
		c := b.Counters()
		equal(t, "restored", []int64{int64(c.Restored), c.Lost()}, []int64{3, 0})
		equal(t, "first contact", // its time was over before the restart
			[]int64{int64(c.Dropped[DropOffline]), c.Queued, c.Lost()}, []int64{1, 2, 0})
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		c = b.Counters()
		equal(t, "expired", []int64{int64(c.Dropped[DropExpired]), c.Queued, c.Lost()}, []int64{1, 1, 0})
	})
}

// While a store does not write, streams go on, and what waits for it in memory is
// bounded: then packets are withheld, and those of a stream dropped.
func TestStoreThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := &slowOutbox{tickets: make(chan Ticket, 1000)}
		b := newTestBridge(t, func(c *Config) {
			c.WaitingBytes = 16 << 10
			c.OneShot = func(name string) bool { return name == "carol" }
			c.Outboxes = func(name string, durable bool) (Outbox, error) {
				box, err := newMemoryOutboxes()(name, durable)
				if name != "bob" || err != nil {
					return box, err
				}
				slow.Outbox = box
				return slow, nil
			}
		})
		bob, carol, s := attach(t, b, "bob", true), attach(t, b, "carol", true), stream(t, b, true)
		door := bob.register(ServiceStaticForwarding, "door", "M")
		for range 30 {
			s.send(route.To(door), route.To("app"), make([]byte, 200))
		}
		synctest.Wait()
		taken := len(s.conn.acked())
		if c := b.Counters(); taken < 15 || taken == 30 || int(c.Waiting) != 30-taken {
			t.Fatalf("%d of 30 taken, %d wait", taken, c.Waiting)
		}
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		equal(t, "dropped", int(b.Counters().Dropped[DropFull]), 30-taken)
		a := attach(t, b, "alice", true)
		a.number(bob.Port().Address(), 1)
		a.number(carol.Port().Address(), 2)
		synctest.Wait()
		equal(t, "to carol", carol.numbers(), []int{2})
		equal(t, "to bob", int(b.Counters().Waiting), 1)
		n := len(slow.tickets)
		for range n {
			(<-slow.tickets).Done()
		}
		synctest.Wait()
		equal(t, "waiting after the store wrote", int(b.Counters().Waiting), 0)
		(<-slow.tickets).Done()
		synctest.Wait()
		equal(t, "still being stored", b.storing.Load(), 0)
		if got := bob.numbers(); len(got) == 0 || got[len(got)-1] != 1 {
			t.Errorf("bob got %v", got)
		}
		for _, n := range bob.conn.notices(t) {
			if n.Reason == hubproto.ReasonFull {
				t.Error("bob was told that he is full")
			}
		}
	})
}

// countingJournal counts what it hears of forwarders.
type countingJournal struct {
	testJournal
	n int
}

func (j *countingJournal) Forwarder(s ForwarderState) { j.n++; j.testJournal.Forwarder(s) }

// TestConnectionsThatSayNothingWriteNothing: who connects and goes, as often as he likes,
// has the forwarders of the device written once a minute, and when it really comes or goes.
func TestConnectionsThatSayNothingWriteNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &countingJournal{testJournal: testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}}
		b := newTestBridge(t, func(c *Config) { c.Journal = j })
		m := attach(t, b, "mallory", true)
		for i := range 4 {
			m.register(ServiceForwarding, "register", fmt.Sprint("m", i))
		}
		wrote := func(what string, want int, f func()) {
			before := j.n
			f()
			equal(t, what, j.n-before, want)
		}
		nothing := func() {
			l, err := b.ConnectDevice(device("mallory"), newFakeConn(true)) // no SUBSCRIBE, no hello
			if err != nil {
				t.Fatal(err)
			}
			l.Close(true)
		}
		wrote("it goes", 4, func() { m.Close(true) })
		wrote("a hundred that say nothing", 0, func() {
			for range 100 {
				nothing()
			}
		})
		time.Sleep(2 * time.Minute)
		wrote("ten, later", 4, func() {
			for range 10 {
				nothing()
			}
		})
		for _, f := range j.states {
			if !f.Seen.Equal(time.Now()) || f.Online {
				t.Errorf("%+v", f)
			}
		}
		wrote("it comes", 4, func() { m = attach(t, b, "mallory", true) })
		wrote("it says hello again", 0, func() { m.sayHello(false, 1) })
		wrote("it is taken over and goes", 4, func() { attach(t, b, "mallory", true).Close(true) })
	})
}

// TestForwardersOfStreamsEndWithTheProcess: however it ends, and they are not written.
func TestForwardersOfStreamsEndWithTheProcess(t *testing.T) {
	j := &countingJournal{testJournal: testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}}
	b := newTestBridge(t, func(c *Config) { c.Journal, c.StaticOverStream = j, true })
	s := stream(t, b, true)
	if s.register(ServiceForwarding, "register", "m") == "" {
		t.Fatal("not registered")
	}
	equal(t, "written", j.n, 0)
	gate := s.register(ServiceStaticForwarding, "gate", "m")
	equal(t, "what an alias leads to is kept", j.n, 1)
	killed := j.after(t, nil)
	equal(t, "forwarders", killed.Counters().Forwarders, 1)
	if killed.Forwarder(gate) == nil {
		t.Error("the alias is gone")
	}
	s.Close(true)
	equal(t, "journaled in the end", len(j.states), 1)
}

// noticeJournal keeps notices, too.
type noticeJournal struct {
	testJournal
	mu     sync.Mutex
	unsaid map[string][]hubproto.Notice
}

func newNoticeJournal() *noticeJournal {
	return &noticeJournal{
		testJournal: testJournal{map[string]ForwarderState{}, map[string]PortState{}}, unsaid: map[string][]hubproto.Notice{},
	}
}

func (j *noticeJournal) Notice(name string, n hubproto.Notice) {
	j.NoticeGone(name, n)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsaid[name] = append(j.unsaid[name], n)
}

func (j *noticeJournal) NoticeGone(name string, n hubproto.Notice) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsaid[name] = slices.DeleteFunc(j.unsaid[name], func(o hubproto.Notice) bool { return same(&o, &n) })
}

// copy is the journal as it is now, for another bridge.
func (j *noticeJournal) copy() *noticeJournal {
	c := newNoticeJournal()
	for name, p := range j.ports {
		p.Unsaid = j.unsaid[name]
		c.ports[name] = p
		c.unsaid[name] = slices.Clone(j.unsaid[name])
	}
	return c
}

// What became of frames whose sender is away is told to it when it is back, also by a hub
// that was started in between, and not once more by the next; nor is it kept for a name that
// has ended. What expires only after that start is told as well.
func TestNoticesOutliveTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		age := func(c *Config) { c.MaxAge = time.Minute }
		j := newNoticeJournal()
		b := newTestBridge(t, func(c *Config) { age(c); c.Journal = j })
		a, bob := attach(t, b, "alice", true), attach(t, b, "bob", true)
		bob.Close(false)
		for i := range 5 {
			a.number(bob.Port().Address(), i)
		}
		time.Sleep(30 * time.Second)
		a.number(bob.Port().Address(), 5)
		a.Close(false)
		time.Sleep(40 * time.Second) // five have expired
		time.Sleep(time.Minute)      // and the sixth
		synctest.Wait()
		kept := func(j *noticeJournal) (out []uint64) {
			j.mu.Lock()
			defer j.mu.Unlock()
			for _, n := range j.unsaid["alice"] {
				out = append(out, n.Count)
			}
			return out
		}
		equal(t, "kept", kept(j), []uint64{6})

		k := j.copy()
		after := k.after(t, func(c *Config) { age(c); c.Journal = k })
		carol := attach(t, after, "carol", true)
		equal(t, "before it is back", len(kept(k)), 1)
		carol.number(after.HubAddress("bob"), 0)
		again := attach(t, after, "alice", true)
		synctest.Wait()
		n := again.conn.notices(t)
		if len(n) != 1 || n[0].Reason != hubproto.ReasonExpired || n[0].Count != 6 {
			t.Fatalf("told %+v", n)
		}
		equal(t, "kept once said", len(kept(k)), 0)
		again.Close(false)

		// A sender that this process has not seen.
		l := k.copy()
		later := l.after(t, func(c *Config) { age(c); c.Journal = l })
		later.mu.Lock()
		alice := later.devices["alice"]
		later.mu.Unlock()
		alice.tell(&n[0])
		equal(t, "kept for one that is not back yet", kept(l), []uint64{6})
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		equal(t, "kept for a name that has ended", len(kept(l)), 0)
	})
}
