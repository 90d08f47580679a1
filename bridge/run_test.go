package bridge

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
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
	tickets := make(chan Ticket, 100)
	memory := newMemoryOutboxes()
	for _, all := range []bool{false, true} {
		b := newTestBridge(t, func(c *Config) {
			c.Outboxes = func(name string, durable bool) (Outbox, error) {
				box, err := memory(name, durable)
				if name != "bob" {
					return box, err
				}
				return &slowOutbox{box, tickets}, err
			}
		})
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
