package bridge

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/route"
)

// more is number through ReceiveMore.
func (p *peer) more(to string, n int) {
	p.tok++
	_ = p.ReceiveMore(frame(route.To(to, "app"), nil, []byte{0, 0, byte(n >> 8), byte(n)}), route.Stored, p.conn, p.tok)
}

func TestRunIsDeliveredAtOnce(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	acked := len(a.conn.acked())
	for i := range 5 {
		a.more(d.Port().Address(), i)
	}
	equal(t, "before the flush", []int{len(d.numbers()), len(a.conn.acked()) - acked}, []int{0, 0})
	deliveries := d.conn.deliveries
	a.Flush()
	equal(t, "delivered", d.numbers(), seq(0, 5))
	equal(t, "at once", d.conn.deliveries-deliveries, 1)
	equal(t, "acked", a.conn.acked()[acked:], []uint64{2, 3, 4, 5, 6})
	a.Flush()
	equal(t, "once", len(d.numbers()), 5)

	// What goes another way, or is no frame, comes after what was put off.
	c := attach(t, b, "carol", false)
	a.more(d.Port().Address(), 5)
	a.more(c.Port().Address(), 6)
	equal(t, "bob's", d.numbers(), seq(0, 6))
	equal(t, "carol's", len(c.numbers()), 0)
	_ = a.Receive([]byte{1}, route.Stored, a.conn, 99)
	equal(t, "carol's", c.numbers(), []int{6})
	equal(t, "acked", a.conn.acked()[acked+5:], []uint64{7, 8, 99})
	a.more(d.Port().Address(), 7)
	a.Oversized(1<<20, a.conn, 100)
	equal(t, "acked", a.conn.acked()[acked+8:], []uint64{9, 100})
}

// What was put off by a connection that has ended meanwhile is not acknowledged: it comes
// again.
func TestRunOfAnEndedConnection(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	acked := len(a.conn.acked())
	for i := range 3 {
		a.more(d.Port().Address(), i)
	}
	again := attach(t, b, "alice", true)
	a.Flush()
	equal(t, "delivered", len(d.numbers()), 0)
	equal(t, "acked", len(a.conn.acked()), acked)
	equal(t, "abandoned", b.Counters().Dropped[DropAbandoned], 3)
	again.more(d.Port().Address(), 7)
	again.Flush()
	equal(t, "delivered", d.numbers(), []int{7})
}

// A run that is stored later is acknowledged packet by packet, in order.
func TestRunThatIsStoredLater(t *testing.T) {
	for _, all := range []bool{false, true} {
		b, tickets := slowBridge(t, nil)
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		acked := len(a.conn.acked())
		for i := range 5 {
			a.more(d.Port().Address(), i)
		}
		a.Flush()
		equal(t, "unanswered", []int64{a.waitPackets.Load(), int64(len(tickets))}, []int64{5, 1})
		ticket := <-tickets
		if all {
			DoneAll([]Ticket{ticket})
		} else {
			ticket.Done()
		}
		equal(t, "acked", a.conn.acked()[acked:], []uint64{2, 3, 4, 5, 6})
		equal(t, "unanswered", []int64{a.waitPackets.Load(), a.waitBytes.Load(), b.storing.Load()}, []int64{0, 0, 0})
	}
}

// Beyond its rate a peer's packets are still acknowledged in their order.
func TestRunAndRate(t *testing.T) {
	now := time.Now()
	b := newTestBridge(t, func(c *Config) {
		c.FrameRate = 4
		c.Now = func() time.Time { return now }
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	acked := len(a.conn.acked())
	for i := range 8 {
		a.more(d.Port().Address(), i)
	}
	a.Flush()
	equal(t, "delivered", d.numbers(), seq(0, 8))
	got := a.conn.acked()[acked:]
	if len(got) == 0 || len(got) == 8 || !slices.IsSorted(got) {
		t.Errorf("acknowledged at once: %v", got)
	}
}

// TestRunsAgainstSingles has the same packets come one by one at one bridge and in runs
// at another: what is delivered, acknowledged, told and counted is the same.
func TestRunsAgainstSingles(t *testing.T) {
	for seed := range uint64(16) {
		r := rand.New(rand.NewPCG(seed, 11))
		// A hub that is full as a whole gives room to any of the targets that wait for it.
		frames, size, total, one := 3+r.IntN(40), 4000, 1<<20, seed%4 == 0
		if one {
			frames, size, total = 1<<20, 1<<20, 30+r.IntN(300)
		}
		var hubs [2]*Bridge
		var peers [2][]*peer
		auto := r.IntN(2) == 0
		for h := range hubs {
			hubs[h] = newTestBridge(t, func(c *Config) {
				c.OutboxFrames, c.OutboxBytes, c.TotalFrames, c.Window = frames, size, int64(total), 40
				c.TotalBytes, c.FirstContactFrames, c.StaticOverStream = int64(total)*150, 4, true
			})
			for i := range 4 {
				peers[h] = append(peers[h], attach(t, hubs[h], fmt.Sprint("dev", i), auto))
			}
			peers[h][1].register(ServiceStaticForwarding, "a", "m")
		}
		to := []string{"forward_to_a", "forward_to_a", "nobody", "echo"}
		for i := range 4 {
			to = append(to, hubs[0].HubAddress(fmt.Sprint("dev", i)))
		}
		if one {
			to = to[2:5]
		}
		for range 80 {
			from, target, burst := r.IntN(4), to[r.IntN(len(to))], 1+r.IntN(12)
			switch r.IntN(12) {
			case 0: // comes again
				for h := range hubs {
					peers[h][from] = attach(t, hubs[h], fmt.Sprint("dev", from), auto)
				}
			case 1:
				for h := range hubs {
					peers[h][from].Close(false)
				}
			case 2:
				n := 1 + r.IntN(8)
				for h := range hubs {
					peers[h][from].conn.limit(n)
				}
			case 3, 4:
				for h := range hubs {
					peers[h][from].conn.ack()
					peers[h][from].Ready()
				}
			}
			for k := range burst {
				class := route.Stored
				if r.IntN(20) == 0 {
					class = route.Transient
				}
				if r.IntN(8) == 0 {
					target = to[r.IntN(len(to))]
				}
				step := uint64(1 + r.IntN(16)/15)
				body := frame(route.To(target, "x"), route.To("r"), make([]byte, r.IntN(300)))
				if r.IntN(6) == 0 {
					body = append(body, frame(route.To(target, "y"), nil, []byte{byte(k)})...)
				}
				if r.IntN(40) == 0 {
					body = body[:len(body)/2]
				}
				for h, receive := range []func(*Link, []byte, route.Class, Acker, uint64) error{(*Link).Receive, (*Link).ReceiveMore} {
					p := peers[h][from]
					p.tok += step
					_ = receive(p.Link, slices.Clone(body), class, p.conn, p.tok)
				}
			}
			peers[1][from].Flush()
			var saw [2]any
			for h := range hubs {
				quietPorts(t, hubs[h])
				c := hubs[h].Counters()
				all := []any{c.Received, c.Delivered, c.Served, c.Dropped, c.Queued, c.QueuedBytes, c.Waiting, c.Withheld, c.Kicked}
				for _, p := range peers[h] {
					entries := p.conn.entries()
					all = append(all, p.conn.acked(), len(entries), p.waitPackets.Load(), p.waitBytes.Load(), len(p.conn.notices(t)))
					for _, e := range entries {
						all = append(all, fmt.Sprintf("%d %v %v %x", e.Seq, e.Class, e.Redelivered, e.Frame))
					}
				}
				saw[h] = all
			}
			if !reflect.DeepEqual(saw[0], saw[1]) {
				t.Fatalf("seed %d: one by one\n%v\nin runs\n%v", seed, saw[0], saw[1])
			}
		}
	}
}

// A connection with nothing unanswered is always admitted: what ReceiveMore has put off
// is answered as soon as Receive, or Flush, is called, so a front that waits for its Acker
// while Admits says no would wait for ever.
func TestAdmitsWithARunPutOff(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.Window = 4 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	for i := range 4 {
		a.more(d.Port().Address(), i)
	}
	equal(t, "unanswered", a.waitPackets.Load(), 0)
	if !a.Admits(10) {
		t.Error("Admits says that a packet is more than the window allows")
	}
	a.more(d.Port().Address(), 4)
	a.Flush()
	equal(t, "kicked", a.conn.kicked, KickReason(0))
	equal(t, "delivered", d.numbers(), seq(0, 5))
}

// Receive is called by one goroutine at a time, all other methods by any.
func TestAdmitsBesideReceiveMore(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				a.Admits(10)
			}
		}
	})
	for i := range 1000 {
		a.more(d.Port().Address(), i)
		if i%10 == 9 {
			a.Flush()
		}
	}
	close(stop)
	wg.Wait()
}

// An Acker may be of any type, one that cannot be compared among them.
type ackFunc func(uint64)

func (f ackFunc) Acked(token uint64) { f(token) }

func TestRunWithAnAckerThatCannotBeCompared(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	var acked []uint64
	ack := ackFunc(func(token uint64) { acked = append(acked, token) })
	for i := range 3 {
		body := frame(route.To(d.Port().Address(), "app"), nil, []byte{0, 0, 0, byte(i)})
		_ = a.ReceiveMore(body, route.Stored, ack, uint64(i+1))
	}
	a.Flush()
	equal(t, "acked", acked, []uint64{1, 2, 3})
}

// The Acker is optional for stored packets: nobody hears of those that have none.
func TestDoneAllOfAPacketWithoutAcker(t *testing.T) {
	b, tickets := slowBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	conn := &batchConn{fakeConn: a.conn}
	acked := len(a.conn.acked())
	body := frame(route.To(d.Port().Address(), "app"), nil, []byte{0, 0, 0, 1})
	_ = a.Receive(body, route.Stored, conn, 5)
	_ = a.Receive(body, route.Stored, nil, 0)
	DoneAll([]Ticket{<-tickets, <-tickets})
	equal(t, "acked", a.conn.acked()[acked:], []uint64{5})
	equal(t, "unanswered", a.waitPackets.Load(), 0)
}

// Nobody is told of acknowledgements that there are none of.
func TestRunWhoseAcknowledgementsAreAllOwed(t *testing.T) {
	var now atomic.Pointer[time.Time]
	begin := time.Now()
	now.Store(&begin)
	b := newTestBridge(t, func(c *Config) {
		c.FrameRate = 4
		c.Now = func() time.Time { return *now.Load() }
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	conn := &batchConn{fakeConn: a.conn}
	body := func(i int) []byte { return frame(route.To(d.Port().Address(), "app"), nil, []byte{0, 0, 0, byte(i)}) }
	for i := range 8 { // beyond the rate: owed
		_ = a.Receive(body(i), route.Stored, conn, uint64(100+i))
	}
	later := begin.Add(time.Minute)
	now.Store(&later)
	for i := range 3 {
		_ = a.ReceiveMore(body(i), route.Stored, conn, uint64(200+i))
	}
	a.Flush()
	equal(t, "calls without tokens", conn.empty, 0)
}

// batchConn is a connection that takes acknowledgements together.
type batchConn struct {
	*fakeConn
	empty int
}

func (c *batchConn) AckedAll(tokens []uint64) {
	if len(tokens) == 0 {
		c.empty++
	}
	for _, token := range tokens {
		c.Acked(token)
	}
}

// slowBridge has an outbox for bob that stores later.
func slowBridge(t *testing.T, change func(*Config)) (*Bridge, chan Ticket) {
	tickets := make(chan Ticket, 100)
	memory := newMemoryOutboxes()
	return newTestBridge(t, func(c *Config) {
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			if name != "bob" {
				return box, err
			}
			return &slowOutbox{box, tickets}, err
		}
		if change != nil {
			change(c)
		}
	}), tickets
}

// What is put off in a run is answered all at once, in order, and leaves the window empty.
func TestRunIsAnsweredAtOnce(t *testing.T) {
	b, tickets := slowBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	conn := &batchConn{fakeConn: a.conn}
	acked := len(a.conn.acked())
	body := frame(route.To(d.Port().Address(), "app"), nil, []byte{0, 0, 0, 1})
	token := uint64(10)
	run := func() {
		for range 5 {
			_ = a.ReceiveMore(body, route.Stored, conn, token)
			token++
		}
		a.Flush()
	}
	run()
	run()
	DoneAll([]Ticket{<-tickets, <-tickets})
	equal(t, "acked", a.conn.acked()[acked:], []uint64{10, 11, 12, 13, 14, 15, 16, 17, 18, 19})
	equal(t, "unanswered", []int64{a.waitPackets.Load(), a.waitBytes.Load(), b.storing.Load()}, []int64{0, 0, 0})
	run()
	a.Close(false)
	DoneAll([]Ticket{<-tickets})
	equal(t, "acked after the end", len(a.conn.acked())-acked, 10)
	equal(t, "unanswered", []int64{a.waitPackets.Load(), a.waitBytes.Load(), b.storing.Load()}, []int64{0, 0, 0})
	if conn.empty > 0 {
		t.Errorf("%d calls without tokens", conn.empty)
	}
}

// A run that comes behind acknowledgements which are withheld is answered behind them.
func TestRunBehindWithheldAcknowledgements(t *testing.T) {
	for _, all := range []bool{false, true} {
		now := time.Now()
		b, tickets := slowBridge(t, func(c *Config) {
			c.FrameRate = 10
			c.Now = func() time.Time { return now }
		})
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		conn := &batchConn{fakeConn: a.conn}
		acked := len(a.conn.acked())
		for i := range 3 { // within the rate
			_ = a.ReceiveMore(frame(route.To(d.Port().Address(), "app"), nil, []byte{0, 0, 0, 1}), route.Stored, conn, uint64(10+i))
		}
		a.Flush()
		for i := range 20 { // beyond it
			_ = a.Receive(frame(route.To("nobody"), nil, nil), route.Stored, conn, uint64(20+i))
		}
		before := a.conn.acked()[acked:]
		if all {
			DoneAll([]Ticket{<-tickets})
		} else {
			(<-tickets).Done()
		}
		equal(t, "acked", a.conn.acked()[acked:], before)
	}
}

func TestRunThatCannotBeStored(t *testing.T) {
	memory := newMemoryOutboxes()
	b := newTestBridge(t, func(c *Config) {
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			if name == "bob" {
				return brokenOutbox{box}, err
			}
			return box, err
		}
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	acked := len(a.conn.acked())
	for i := range 3 {
		a.more(d.Port().Address(), i)
	}
	a.Flush()
	equal(t, "counted", b.Counters().Dropped[DropStorage], 3)
	equal(t, "acked", a.conn.acked()[acked:], []uint64{2, 3, 4})
	told := 0
	for _, n := range a.conn.notices(t) {
		if reason, _ := DropStorage.reason(); n.Reason == reason {
			told += int(n.Count)
		}
	}
	if told == 0 {
		t.Error("no notice")
	}
}

// A run is charged like its packets one by one.
func TestRunWithinTheRate(t *testing.T) {
	now := time.Now()
	b := newTestBridge(t, func(c *Config) {
		c.FrameRate = 20
		c.Now = func() time.Time { return now }
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	for i := range 15 {
		a.more(d.Port().Address(), i)
	}
	a.Flush()
	equal(t, "throttled", b.Counters().Throttled, 0)
}

// What is put off counts for the window in bytes, as what is not does.
func TestRunAndWindowInBytes(t *testing.T) {
	taken := func(receive func(*Link, []byte, route.Class, Acker, uint64) error) int {
		b, _ := slowBridge(t, func(c *Config) { c.WindowBytes = 1 })
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		body := frame(route.To(d.Port().Address(), "app"), nil, make([]byte, 30_000))
		n := 0
		for ; n < 100 && receive(a.Link, body, route.Stored, a.conn, uint64(100+n)) == nil; n++ {
		}
		a.Flush()
		equal(t, "kicked", a.conn.kicked, KickWindow)
		return n
	}
	equal(t, "taken", taken((*Link).ReceiveMore), taken((*Link).Receive))
}

func TestRunIsTraced(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.Trace = true })
	o := newTestObserver()
	defer b.Observe(o)()
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	lines := func() int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.lines)
	}
	for i := range 3 {
		a.more(d.Port().Address(), i)
	}
	a.Flush()
	for end := time.Now().Add(5 * time.Second); lines() < 5 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	equal(t, "lines", lines(), 5) // two hellos
}

// A run does not overtake what waits for room, though there is some by now.
func TestRunBehindWhatWaits(t *testing.T) {
	b := newTestBridge(t, nil)
	a, c, d := attach(t, b, "alice", true), attach(t, b, "carol", true), attach(t, b, "bob", true)
	b.storing.Add(b.cfg.WaitingBytes)
	c.number(d.Port().Address(), 0)
	a.number(d.Port().Address(), 1)
	equal(t, "waiting", b.Counters().Waiting, 2)
	b.storing.Add(-b.cfg.WaitingBytes) // nobody has been told yet
	for i := range 3 {
		a.more(d.Port().Address(), 2+i)
	}
	a.Flush()
	equal(t, "delivered", d.numbers(), seq(0, 5))
}
