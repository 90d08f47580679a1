package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// slowOutbox stores later, on another goroutine, as one on disk does.
type slowOutbox struct {
	Outbox
	tickets chan Ticket
}

func (s *slowOutbox) Append(p *Packet, t Ticket) (int, bool, error) {
	n, _, err := s.Outbox.Append(p, t)
	s.tickets <- t
	return n, false, err
}

func TestOutboxThatStoresLater(t *testing.T) {
	tickets := make(chan Ticket, 100)
	memory := newMemoryOutboxes()
	b := newTestBridge(t, func(c *Config) {
		c.OutboxFrames, c.Window = 8, 12
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			if name != "bob" {
				return box, err
			}
			return &slowOutbox{box, tickets}, err
		}
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	for i := range 12 {
		a.number(d.Port().Address(), i)
	}
	// Delivered before it is stored, acknowledged only after.
	equal(t, "delivered", d.numbers(), seq(0, 8))
	equal(t, "acked", a.conn.acked(), []uint64{1})
	equal(t, "window", a.waitPackets.Load(), 12)
	for range 8 {
		(<-tickets).Done()
	}
	d.conn.ack()
	for range 4 {
		(<-tickets).Done()
	}
	equal(t, "acked", a.conn.acked(), []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13})
	equal(t, "window", []int64{a.waitPackets.Load(), a.waitBytes.Load()}, []int64{0, 0})
	d.conn.ack()
}

var errDisk = errors.New("disk full")

type brokenOutbox struct{ Outbox }

func (brokenOutbox) Append(*Packet, Ticket) (int, bool, error) { return 0, false, errDisk }

func TestOutboxThatFails(t *testing.T) {
	memory := newMemoryOutboxes()
	var log bytes.Buffer
	b := newTestBridge(t, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			switch name {
			case "bob":
				return brokenOutbox{box}, err
			case "carol":
				return nil, errDisk
			}
			return box, err
		}
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	a.number(d.Port().Address(), 1)
	c := b.Counters()
	equal(t, "counted", []uint64{c.Dropped[DropStorage], uint64(c.Queued)}, []uint64{1, 0})
	if _, err := b.ConnectDevice(device("carol"), newFakeConn(true)); !errors.Is(err, errDisk) {
		t.Error(err)
	}
	equal(t, "ports", b.Counters().Ports, 2)

	// A flood of such frames is no flood of lines.
	b.lines.SetLimit(0)
	b.lines.SetBurst(0)
	for range 20 {
		a.number(d.Port().Address(), 1)
	}
	equal(t, "counted", b.Counters().Dropped[DropStorage], 21)
	b.lines.SetLimit(rate.Inf)
	a.number(d.Port().Address(), 1)
	var unlogged []string
	for line := range strings.Lines(log.String()) {
		if _, n, _ := strings.Cut(strings.TrimSpace(line), " unlogged="); strings.Contains(line, "cannot store") {
			unlogged = append(unlogged, n)
		}
	}
	equal(t, "lines", unlogged, []string{"", "20"})
}

// failingOutbox is on a disk that breaks in mid-run.
type failingOutbox struct {
	Outbox
	broken *atomic.Bool
}

func (o failingOutbox) Append(p *Packet, t Ticket) (int, bool, error) {
	if o.broken.Load() {
		return 0, false, errDisk
	}
	return o.Outbox.Append(p, t)
}

// TestWaitingThatCannotBeStored: what waited, for room or for its device, and then cannot
// be stored is acknowledged, and so its sender is told.
func TestWaitingThatCannotBeStored(t *testing.T) {
	memory := newMemoryOutboxes()
	var broken atomic.Bool
	b := newTestBridge(t, func(c *Config) {
		c.OutboxFrames = 1
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			return failingOutbox{box, &broken}, err
		}
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	bob := d.Port().Address()
	away := attach(t, b, "carol", false)
	awayFwd := away.register(ServiceForwarding, "register", "M")
	away.Close(false)
	d.conn.ack()
	for i := range 3 {
		a.number(bob, i) // two wait for room
	}
	a.number(awayFwd, 3)
	acked := len(a.conn.acked())
	told := len(a.conn.notices(t)) // that the last waits
	broken.Store(true)
	d.conn.ack()
	equal(t, "acknowledged", len(a.conn.acked())-acked, 2)
	connect(t, b, device("carol"), true).sayHello(true, 2)
	equal(t, "acknowledged", len(a.conn.acked())-acked, 3)
	got := make(map[string]uint64)
	for _, n := range a.conn.notices(t)[told:] {
		equal(t, "reason", n.Reason, hubproto.ReasonFull)
		got[n.FirstHop.Value] += n.Count
	}
	equal(t, "told", got, map[string]uint64{bob: 2, awayFwd: 1})
	c := b.Counters()
	equal(t, "counted", []uint64{c.Dropped[DropStorage], uint64(c.Queued), uint64(c.Waiting)}, []uint64{3, 0, 0})
}

// TestStress has devices and streams come, go, register, flood, read slowly and
// send rubbish, all at once; the books agree afterwards.
func TestStress(t *testing.T) {
	b := newTestBridge(t, func(c *Config) {
		c.OutboxFrames, c.TotalFrames, c.Window, c.FirstContactFrames = 8, 60, 40, 4
		c.Trace, c.StaticOverStream, c.ForwardersPerPort = true, true, 8
		c.HelloBurst = 1 << 20
	})
	o := newTestObserver()
	defer b.Observe(o)()
	var addrs []string
	for i := range 6 {
		addrs = append(addrs, b.HubAddress(fmt.Sprint("dev", i)))
	}
	addrs = append(addrs, "echo", "uppercase", "forward_to_a0", "forward_to_a1", "nobody", ServiceLookup)
	var mu sync.Mutex
	var wg sync.WaitGroup
	var open []*peer
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 5))
			var p *peer
			join := func() {
				if i < 6 {
					p = attach(t, b, fmt.Sprint("dev", i), r.IntN(2) == 0)
				} else {
					p = stream(t, b, r.IntN(2) == 0)
				}
				p.conn.limit(1 + r.IntN(10))
				mu.Lock()
				addrs = append(addrs[:12:12], p.Port().Address())
				mu.Unlock()
			}
			join()
			for n := range 1500 {
				mu.Lock()
				to := addrs[r.IntN(len(addrs))]
				mu.Unlock()
				var class route.Class
				if r.IntN(4) == 0 {
					class = route.Transient
				}
				switch op := r.IntN(30); {
				case op < 10:
					_ = p.Receive(frame(route.To(to, "x"), route.To("r"), make([]byte, r.IntN(300))), class, p.conn, uint64(n))
				case op < 20:
					for range 1 + r.IntN(4) {
						_ = p.ReceiveMore(frame(route.To(to, "x"), route.To("r"), make([]byte, r.IntN(300))), class, p.conn, uint64(n))
						n++
					}
					if r.IntN(2) == 0 {
						p.Flush()
					}
				case op < 21:
					_ = p.Receive([]byte{1, 2}, class, p.conn, uint64(n))
				case op < 22:
					_ = p.Receive(frame(route.To(ServiceStaticForwarding), route.To("M"), []byte("\x02a"+fmt.Sprint(i%2))), class, p.conn, uint64(n))
				case op < 24:
					p.conn.ack()
				case op < 26:
					p.Ready()
				case op < 27:
					p.Delivered(uint64(n))
				case op < 28:
					p.Close(r.IntN(2) == 0)
					p.Flush() // as its reader does at the end
					join()
				case op < 29 && i < 6:
					old := p
					join() // takes over
					old.Flush()
				default:
					b.Counters()
					b.State()
				}
				p.conn.mu.Lock()
				kicked := p.conn.kicked != 0
				p.conn.mu.Unlock()
				if kicked {
					p.Flush()
					p.Close(false)
					join()
				}
			}
			p.Flush()
			mu.Lock()
			open = append(open, p)
			mu.Unlock()
		})
	}
	wg.Wait()
	checkSums(t, b)
	// When everybody reads, everything that waits gets through.
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); runtime.Gosched() {
		for _, p := range open {
			p.conn.limit(1000)
			p.Ready()
			p.conn.ack()
		}
		if c := b.Counters(); c.Queued+c.Waiting == 0 {
			break
		}
	}
	c := b.Counters()
	if c.Queued+c.Waiting != 0 {
		t.Errorf("left: %+v", c)
	}
	if slices.Max(c.Dropped[:]) == 0 || c.Delivered == 0 {
		t.Errorf("nothing happened: %+v", c)
	}
}

// closedOutbox is of a store that is closed in mid-run.
type closedOutbox struct {
	Outbox
	closed *atomic.Bool
}

func (o closedOutbox) Append(p *Packet, t Ticket) (int, bool, error) {
	if o.closed.Load() {
		return 0, false, fmt.Errorf("store: %w", fs.ErrClosed)
	}
	return o.Outbox.Append(p, t)
}

// TestStoreClosedBeforeTheBridge: what can no longer be stored is neither acknowledged nor
// reported to its sender, who has it still; nor does each get a line.
func TestStoreClosedBeforeTheBridge(t *testing.T) {
	memory := newMemoryOutboxes()
	var log bytes.Buffer
	var closed atomic.Bool
	b := newTestBridge(t, func(c *Config) {
		c.OutboxFrames = 1
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.Outboxes = func(name string, durable bool) (Outbox, error) {
			box, err := memory(name, durable)
			return closedOutbox{box, &closed}, err
		}
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	was := len(a.conn.acked())
	a.number(d.Port().Address(), 1)
	a.number(d.Port().Address(), 2) // waits for room
	equal(t, "acknowledged", len(a.conn.acked())-was, 1)
	told := len(a.conn.entries())
	closed.Store(true)
	d.conn.ack() // there is room
	for range 20 {
		a.number(d.Port().Address(), 3)
	}
	c := b.Counters()
	equal(t, "counted", []uint64{c.Dropped[DropStorage], uint64(c.Queued), uint64(c.Waiting)}, []uint64{21, 0, 0})
	equal(t, "acknowledged", len(a.conn.acked())-was, 1)
	equal(t, "told", len(a.conn.entries()), told)
	equal(t, "lines", strings.Count(log.String(), "\n"), 1)
	if !strings.Contains(log.String(), "closed before the bridge") {
		t.Error(log.String())
	}
}
