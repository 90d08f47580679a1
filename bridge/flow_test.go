package bridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

func TestFullOutboxWithholds(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 4 })
	a, other := attach(t, b, "alice", true), attach(t, b, "carol", true)
	d := attach(t, b, "bob", false)
	bob := d.Port().Address()
	d.conn.limit(2)
	for i := range 10 {
		a.number(bob, i)
	}
	// Four stored, of which two were offered; six wait. Hello was token 1.
	equal(t, "acked", a.conn.acked(), []uint64{1, 2, 3, 4, 5})
	equal(t, "delivered", d.numbers(), seq(0, 2))
	equal(t, "waiting", b.Counters().Waiting, 6)
	equal(t, "withheld", b.Counters().Withheld, 6)
	// Another sender waits behind them; other targets are not stalled.
	other.number(bob, 100)
	other.number(a.Port().Address(), 7)
	equal(t, "elsewhere", a.numbers(), []int{7})
	equal(t, "carol's acks", other.conn.acked(), []uint64{1, 3})
	a.number(other.Port().Address(), 8)
	equal(t, "the sender's other frames", other.numbers(), []int{8})
	// Transient frames are dropped, never parked.
	_ = a.Receive(frame(route.To(bob, "x"), nil, nil), route.Transient, a.conn, 99)
	equal(t, "dropped", b.Counters().Dropped[DropFull], 1)
	checkSums(t, b)
	for range 10 {
		d.conn.ack()
	}
	equal(t, "all in order", d.numbers(), append(seq(0, 10), 100))
	equal(t, "alice's acks", a.conn.acked(), []uint64{1, 2, 3, 4, 5, 12, 6, 7, 8, 9, 10, 11})
	equal(t, "carol's acks", other.conn.acked(), []uint64{1, 3, 2})
	equal(t, "withheld", b.Counters().Withheld, 7)
}

func TestBytesLimit(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxBytes = 1000 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	d.conn.limit(0)
	// An empty outbox takes any packet.
	a.send(route.To(d.Port().Address(), "x"), nil, make([]byte, 100_000))
	a.send(route.To(d.Port().Address(), "x"), nil, make([]byte, 10))
	equal(t, "acks", a.conn.acked(), []uint64{1, 2})
	equal(t, "waiting", b.Counters().Waiting, 1)
}

func TestTotalLimit(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.TotalFrames = 3 })
	a := attach(t, b, "alice", true)
	d1, d2 := attach(t, b, "bob", false), attach(t, b, "carol", false)
	d1.conn.limit(100)
	d2.conn.limit(100)
	for i := range 3 {
		a.number(d1.Port().Address(), i)
	}
	for i := range 3 {
		a.number(d2.Port().Address(), i)
	}
	equal(t, "carol", d2.numbers(), []int(nil))
	d1.conn.ack() // room in the hub: what waits for carol comes in
	equal(t, "carol", d2.numbers(), seq(0, 3))
	equal(t, "acks", a.conn.acked(), []uint64{1, 2, 3, 4, 5, 6, 7})
}

// TestTotalBytes is the same limit in bytes.
func TestTotalBytes(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.TotalBytes = 4000 })
	a := attach(t, b, "alice", true)
	d1, d2 := attach(t, b, "bob", false), attach(t, b, "carol", false)
	d1.conn.limit(100)
	d2.conn.limit(100)
	before := len(a.conn.acked())
	for _, d := range []*peer{d1, d2} {
		for range 10 {
			a.send(route.To(d.Port().Address(), "x"), nil, make([]byte, 300))
		}
	}
	c := b.Counters()
	if c.Waiting == 0 || c.QueuedBytes < 3000 || c.QueuedBytes > 4400 || len(a.conn.acked())-before != int(c.Queued) {
		t.Errorf("%d frames of %d bytes queued, %d waiting, %d acknowledged", c.Queued, c.QueuedBytes, c.Waiting, len(a.conn.acked())-before)
	}
	for range 20 {
		d1.conn.ack()
		d2.conn.ack()
	}
	equal(t, "acknowledged once there is room", len(a.conn.acked())-before, 20)
	equal(t, "delivered", len(d1.frames())+len(d2.frames()), 20)
}

// TestFullHubServesWhoReads: when the backlogs of those who don't read have filled the
// hub, in frames or in bytes, those who read go on, and get no backlog of their own.
func TestFullHubServesWhoReads(t *testing.T) {
	for name, payload := range map[string]int{"frames": 4, "bytes": 1000} {
		t.Run(name, func(t *testing.T) {
			b := newTestBridge(t, func(c *Config) { c.TotalFrames, c.TotalBytes = 640, 1<<20; c.Window, c.WindowBytes = 4096, 16<<20 })
			a, reader := attach(t, b, "alice", true), attach(t, b, "bob", true)
			m := attach(t, b, "mallory", true)
			var deaf []*peer
			for i := range 20 {
				deaf = append(deaf, attach(t, b, fmt.Sprint("deaf", i), false))
				for range 100 {
					m.send(route.To(deaf[i].Port().Address(), "x"), nil, make([]byte, payload))
				}
			}
			full := b.Counters()
			equal(t, "full", b.totalFull(), true)
			acks := len(m.conn.acked())
			if full.Queued > 600+64 && payload < 100 || full.Waiting == 0 {
				t.Errorf("%d queued, %d wait", full.Queued, full.Waiting)
			}
			for i := range 200 {
				a.number(reader.Port().Address(), i)
			}
			equal(t, "who reads has", reader.numbers(), seq(0, 200))
			equal(t, "acknowledged", len(a.conn.acked()), 201)
			equal(t, "of the others' backlog", b.Counters().Queued, full.Queued)
			// Who stops reading gets one packet of what is left.
			reader.conn.limit(0)
			reader.conn.mu.Lock()
			reader.conn.auto = false
			reader.conn.mu.Unlock()
			a.number(reader.Port().Address(), 200)
			a.number(reader.Port().Address(), 201)
			equal(t, "acknowledged", len(a.conn.acked()), 202)
			// Too large a part of it is nobody's.
			large := attach(t, b, "carol", true)
			a.send(route.To(large.Port().Address(), "x"), nil, make([]byte, 20_000))
			equal(t, "large ones", len(large.conn.entries()), 0)
			reader.conn.limit(1 << 30)
			reader.Ready()
			reader.conn.ack()
			equal(t, "who reads again has", reader.numbers(), seq(0, 202))
			reader.conn.ack()
			equal(t, "acknowledged, but for the large one", len(a.conn.acked()), 203)
			equal(t, "of the backlog's senders", len(m.conn.acked()), acks)
			for range 10 { // each queue has at most two fills left to come
				for _, d := range deaf {
					d.conn.ack()
				}
			}
			equal(t, "everything comes", len(large.conn.entries()), 1)
			c := b.Counters()
			equal(t, "left", []int64{c.Queued, c.Waiting}, []int64{0, 0})
		})
	}
}

func TestWindowExceeded(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames, c.Window = 1, 10 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	d.conn.limit(1)
	bob := d.Port().Address()
	for i := range 11 {
		a.number(bob, i)
	}
	equal(t, "kicked", a.conn.kicked, KickReason(0))
	equal(t, "waiting", b.Counters().Waiting, 10)
	if err := a.Receive(frame(route.To(bob, "x"), nil, nil), route.Stored, a.conn, 50); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	equal(t, "kicked", a.conn.kicked, KickWindow)
	// Nothing more of this connection is stored, not even for others.
	if err := a.Receive(frame(route.To("echo"), route.To("x"), nil), route.Stored, a.conn, 51); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	c := b.Counters()
	equal(t, "counted", []uint64{c.Kicked[KickWindow], c.Dropped[DropAbandoned], uint64(c.Waiting)}, []uint64{1, 12, 0})
	// It comes back and sends again what was not answered.
	again := attach(t, b, "alice", true)
	d.conn.limit(100)
	d.conn.ack()
	for i := 1; i < 11; i++ {
		again.number(bob, i)
		d.conn.ack()
	}
	equal(t, "in order", d.numbers(), seq(0, 11))
}

func TestWindowBytes(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames, c.WindowBytes = 1, 1 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	d.conn.limit(1)
	big := make([]byte, 250<<10)
	for range 3 { // one stored, and two packets always fit
		a.send(route.To(d.Port().Address(), "x"), nil, big)
	}
	equal(t, "kicked", a.conn.kicked, KickReason(0))
	a.send(route.To(d.Port().Address(), "x"), nil, big)
	equal(t, "kicked", a.conn.kicked, KickWindow)
}

// TestTwoFlooders: two devices that fill each other's queues come free as soon
// as either reads.
func TestTwoFlooders(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 4; c.Window = 100_000 })
	const n = 5000
	x, y := attach(t, b, "alice", false), attach(t, b, "bob", false)
	x.conn.limit(4)
	y.conn.limit(4)
	var wg sync.WaitGroup
	flood := func(from, to *peer) {
		for i := range n {
			from.number(to.Port().Address(), i)
		}
	}
	wg.Go(func() { flood(x, y) })
	wg.Go(func() { flood(y, x) })
	wg.Wait()
	if w := b.Counters().Waiting; w < n {
		t.Errorf("only %d wait", w)
	}
	read := func(p *peer) {
		for {
			p.conn.ack()
			p.conn.mu.Lock()
			done := len(p.conn.got) == n
			p.conn.mu.Unlock()
			if done {
				return
			}
		}
	}
	wg.Go(func() { read(x) })
	wg.Go(func() { read(y) })
	wg.Wait()
	for _, p := range []*peer{x, y} {
		if !slices.Equal(p.numbers(), seq(0, n)) {
			t.Error("not all, or not in order")
		}
		if acks := p.conn.acked(); len(acks) != n+1 || !slices.IsSorted(acks) {
			t.Errorf("%d acks, or not in order", len(acks))
		}
		p.conn.ack()
	}
}

// TestChurn has many senders, and a receiver that keeps losing its connection:
// nothing acknowledged is lost, nothing is out of order.
func TestChurn(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 16 })
	const senders, n = 4, 500
	bob := b.HubAddress("bob")
	first := attach(t, b, "bob", false)
	first.conn.limit(8)
	var wg sync.WaitGroup
	for s := range senders {
		p := attach(t, b, "sender"+string(rune('a'+s)), true)
		wg.Go(func() {
			for i := range n {
				tok := p.number(bob, s*n+i)
				p.conn.wait(t, "an acknowledgement", func() bool { return len(p.conn.acks) > 0 && p.conn.acks[len(p.conn.acks)-1] == tok })
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	got := map[int]int{}
	last := map[int]int{}
	cur := first
	collect := func(p *peer) {
		p.conn.mu.Lock()
		entries := slices.Clone(p.conn.got)
		p.conn.mu.Unlock()
		for _, e := range entries {
			f, _ := route.ParseFrame(e.Frame, route.Limits{})
			v := int(binary.BigEndian.Uint32(f.Payload))
			if got[v]++; got[v] == 1 {
				if l, ok := last[v/n]; ok && v != l+1 {
					t.Errorf("%d after %d", v, l)
				}
				last[v/n] = v
			} else if !e.Redelivered {
				t.Errorf("%d again without the mark", v)
			}
		}
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		cur.conn.ack()
		if len(cur.conn.entries()) > 20 || !running {
			old := cur
			if len(got)%3 == 0 {
				old.Close(false)
			}
			cur = attach(t, b, "bob", false) // takes over where it is still there
			cur.conn.limit(8)
			collect(old)
		}
	}
	for b.Counters().Queued > 0 {
		cur.conn.ack()
	}
	collect(cur)
	if len(got) != senders*n {
		t.Errorf("%d of %d", len(got), senders*n)
	}
}

func TestReadyAndPartialDelivery(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	d.conn.limit(3)
	for i := range 10 {
		a.number(d.Port().Address(), i)
	}
	equal(t, "taken", d.numbers(), seq(0, 3))
	d.conn.limit(5)
	d.Ready()
	equal(t, "taken", d.numbers(), seq(0, 5))
	// An acknowledgement of what was never sent is one of what was.
	d.Delivered(1000)
	c := b.Counters()
	equal(t, "counted", []uint64{c.BadAcks, c.Delivered, uint64(c.Queued)}, []uint64{1, 5, 5})
	d.conn.ack()
	d.conn.ack()
	equal(t, "taken", d.numbers(), seq(0, 10))
}

func TestUndeliverable(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	for i := range 3 {
		a.number(d.Port().Address(), i)
	}
	d.Undeliverable(d.conn.entries()[1].Seq)
	c := b.Counters()
	equal(t, "counted", []uint64{c.Dropped[DropTooLarge], uint64(c.Queued)}, []uint64{1, 2})
	equal(t, "notice", a.conn.notices(t)[0].Reason, hubproto.ReasonTooLarge)
	d.conn.ack()
}

func TestTransientKeepsItsPlace(t *testing.T) {
	b := newTestBridge(t, nil)
	a := attach(t, b, "alice", true)
	d := attach(t, b, "bob", false)
	d.conn.limit(0)
	bob := d.Port().Address()
	for i := range 6 {
		class := route.Stored
		if i%2 == 1 {
			class = route.Transient
		}
		_ = a.Receive(frame(route.To(bob, "x"), nil, binary.BigEndian.AppendUint32(nil, uint32(i))), class, a.conn, 1)
	}
	d.conn.limit(100)
	d.Ready()
	equal(t, "in their places", d.numbers(), seq(0, 6))
	equal(t, "taken transients count", b.Counters().Delivered, 3)
	d.conn.ack()
	equal(t, "all", b.Counters().Delivered, 6)

	// At a device that is away they are dropped; those queued go with the link.
	d.conn.limit(0)
	send := func(c route.Class) { _ = a.Receive(frame(route.To(bob, "x"), nil, nil), c, a.conn, 1) }
	send(route.Stored)
	send(route.Transient)
	d.Close(true)
	send(route.Transient)
	c := b.Counters()
	equal(t, "dropped", []uint64{c.Dropped[DropOffline], uint64(c.Queued)}, []uint64{2, 1})
	d2 := attach(t, b, "bob", true)
	equal(t, "stored one", len(d2.conn.entries()), 1)
	equal(t, "redelivered", d2.conn.entries()[0].Redelivered, false)
}

func TestStreamWaitsThenDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 1 })
		s, d := stream(t, b, true), attach(t, b, "bob", false)
		d.conn.limit(0)
		m := attach(t, b, "alice", true)
		fwd := func(p *peer) { p.send(route.To(d.Port().Address(), "x"), nil, nil) }
		s.Port().allow(d.Port().Address())
		fwd(s)
		fwd(s)
		fwd(m)
		equal(t, "acks", s.conn.acked(), []uint64{1})
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		equal(t, "acks", s.conn.acked(), []uint64{1, 2})
		c := b.Counters()
		equal(t, "dropped", []uint64{c.Dropped[DropFull], uint64(c.Waiting)}, []uint64{1, 1})
	})
}

// TestSlowTargetSlowsAStream: a target that takes a frame now and then loses none.
func TestSlowTargetSlowsAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 1 })
		s, d := stream(t, b, true), attach(t, b, "bob", false)
		s.Port().allow(d.Port().Address())
		const n = 6
		for range n {
			s.send(route.To(d.Port().Address(), "x"), nil, nil)
		}
		for i := range n {
			time.Sleep(900 * time.Millisecond)
			synctest.Wait()
			got := d.conn.entries()
			equal(t, "delivered", len(got), i+1)
			d.Delivered(got[i].Seq)
		}
		c := b.Counters()
		equal(t, "dropped and waiting", []uint64{c.Dropped[DropFull], uint64(c.Waiting)}, []uint64{0, 0})
	})
}

// TestAgeLimitMakesRoom: what waited is delivered without another event.
func TestAgeLimitMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.MaxAge = time.Hour; c.OutboxFrames = 2 })
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
		for i := range 4 {
			if i == 2 {
				time.Sleep(30 * time.Minute)
			}
			a.number(d.Port().Address(), i)
		}
		equal(t, "before", d.numbers(), seq(0, 2))
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		equal(t, "after", d.numbers(), seq(0, 4))
		c := b.Counters()
		equal(t, "fates", []uint64{c.Dropped[DropExpired], uint64(c.Queued), uint64(c.Waiting)}, []uint64{2, 2, 0})
		equal(t, "acks", a.conn.acked(), []uint64{1, 2, 3, 4, 5})
	})
}

func TestAgeLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.MaxAge = time.Hour; c.OutboxFrames = 2 })
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
		d.Close(true)
		bob := d.Port().Address()
		a.send(route.To(bob, "x"), route.To("me"), nil)
		time.Sleep(30 * time.Minute)
		a.number(bob, 1)
		a.number(bob, 2) // waits
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		c := b.Counters()
		equal(t, "expired", []uint64{c.Dropped[DropExpired], uint64(c.Queued), uint64(c.Waiting)}, []uint64{1, 2, 0})
		n := a.conn.notices(t)
		if len(n) != 1 || n[0].Reason != hubproto.ReasonExpired || n[0].FirstHop != route.Local(bob) || n[0].LastReturn != route.Local("me") {
			t.Errorf("%+v", n)
		}
	})
}

// TestRoomThatComesBeforeSomebodyWaitsForIt: a packet that has found the hub full, and
// is not noted as waiting yet when there is room again, is let in all the same.
func TestRoomThatComesBeforeSomebodyWaitsForIt(t *testing.T) {
	for range 5 {
		b := newTestBridge(t, func(c *Config) { c.TotalFrames, c.OutboxFrames = 64, 1000 })
		full := attach(t, b, "full", false)
		away := attach(t, b, "away", true)
		target := away.Port()
		away.Close(true)
		sender, late := attach(t, b, "sender", true), attach(t, b, "late", true)
		for i := range 60 {
			sender.number(full.Port().Address(), i)
		}
		late.mu.Lock() // await stands here, between full and starve
		sent := make(chan uint64)
		go func() { sent <- late.number(target.Address(), 1) }()
		for target.mu.TryLock() {
			target.mu.Unlock()
			runtime.Gosched()
		}
		for range 100 {
			runtime.Gosched()
		}
		full.conn.ack() // the hub is empty again
		late.mu.Unlock()
		token := <-sent
		equal(t, "waiting", b.Counters().Waiting, 0)
		equal(t, "acknowledged", late.conn.acked()[1:], []uint64{token}) // the first is the hello's
	}
}
