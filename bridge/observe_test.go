package bridge

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/route"
)

type testObserver struct {
	mu      sync.Mutex
	copies  []Copy
	records map[string]string
	lines   []string
	gate    chan struct{} // when set, Copy waits for it
	changed chan struct{}
}

func newTestObserver() *testObserver {
	return &testObserver{records: map[string]string{}, changed: make(chan struct{}, 1)}
}

func (o *testObserver) note() {
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

func (o *testObserver) Copy(c Copy) {
	if o.gate != nil {
		<-o.gate
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.copies = append(o.copies, c)
	o.note()
}

func (o *testObserver) Record(r Record) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.records[r.Name] = string(r.JSON)
	o.note()
}

func (o *testObserver) Trace(line []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lines = append(o.lines, string(line))
	o.note()
}

func (o *testObserver) wait(t *testing.T, what string, f func() bool) {
	t.Helper()
	end := time.After(30 * time.Second)
	for {
		o.mu.Lock()
		ok := f()
		o.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-o.changed:
		case <-end:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func TestObserver(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.Trace = true })
	early := attach(t, b, "early", true)
	o := newTestObserver()
	cancel := b.Observe(o)
	b.Replay(func() func(Record) { return o.Record })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	fwd := d.register(ServiceForwarding, "register", "M")
	a.send(route.To(fwd, "x"), route.To("r"), []byte("secret?"))
	early.Close(true)
	o.wait(t, "records", func() bool {
		return strings.Contains(o.records["early"], "offline") && strings.Contains(o.records["alice"], "online") &&
			strings.Contains(o.records[fwd], `"kind":"dynamic"`)
	})
	sent := frame(route.To(fwd, "x"), route.To("r"), []byte("secret?"))
	got := d.conn.entries()[1].Frame
	o.wait(t, "copies", func() bool {
		var out, in bool
		for _, c := range o.copies {
			out = out || c.Direction == FromDevice && c.Device == "alice" && string(c.Payload) == string(sent)
			in = in || c.Direction == ToDevice && c.Device == "bob" && string(c.Payload) == string(got)
		}
		return out && in
	})
	want := fmt.Sprintf(`{"from":"alice","to":"bob","hops":2,"bytes":%d}`, len(sent))
	o.wait(t, "trace", func() bool {
		for _, l := range o.lines {
			if strings.Contains(l, "secret") {
				t.Error("payload in a trace line")
			}
			if l == want {
				return true
			}
		}
		return false
	})
	if strings.Contains(o.records[fwd], "dev_") {
		t.Error("hub address in a record")
	}
	// Each frame of a bundle has its line.
	bundle := frame(route.To(fwd, "x", "y"), route.To("r"), []byte("12"))
	first := len(bundle)
	bundle = append(bundle, frame(route.To(fwd), nil, nil)...)
	_ = a.Receive(bundle, route.Stored, a.conn, 99)
	var lines []string
	for hops, size := range map[int]int{3: first, 1: len(bundle) - first} {
		lines = append(lines, fmt.Sprintf(`{"from":"alice","to":"bob","hops":%d,"bytes":%d}`, hops, size))
	}
	o.wait(t, "trace of a bundle", func() bool {
		return slices.Contains(o.lines, lines[0]) && slices.Contains(o.lines, lines[1])
	})
	cancel()
	cancel()
	n := b.Counters().Copies
	a.send(route.To("echo"), route.To("r"), nil)
	equal(t, "after cancel", b.Counters().Copies, n)
}

// TestReplaysEndWithTheObserver: what waits is not done for nobody, nor at the end.
func TestReplaysEndWithTheObserver(t *testing.T) {
	b := newTestBridge(t, nil)
	attach(t, b, "alice", true)
	attach(t, b, "bob", true)
	o := newTestObserver()
	cancel := b.Observe(o)
	started, gate, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	begun, records := 0, 0
	for range 100 {
		b.Replay(func() func(Record) {
			if begun++; begun == 1 {
				close(started)
				<-gate
			}
			return func(Record) { records++ }
		})
	}
	<-started
	cancel()
	close(gate)
	go func() { defer close(ended); _ = b.Close() }() // waits for the observers' goroutine
	<-ended
	equal(t, "replays begun", begun, 1)
	equal(t, "records", records, 0)
}

func TestSlowObserverLosesCopies(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.RingItems = 4 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	o := newTestObserver()
	o.gate = make(chan struct{})
	defer b.Observe(o)()
	for i := range 100 {
		a.number(d.Port().Address(), i)
	}
	equal(t, "no frame waits for it", d.numbers(), seq(0, 100))
	if lost := b.Counters().CopiesDropped; lost < 190 {
		t.Errorf("%d copies dropped", lost)
	}
	d.Close(true)
	close(o.gate)
	// Records are never lost, however far behind an observer is.
	o.wait(t, "status", func() bool { return strings.Contains(o.records["bob"], "offline") })
}

func TestLocal(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames, c.Window = 2, 4*mailboxFrames })
	node := NewLocal(b)
	defer node.Close()
	got := make(chan Inbound, 10)
	if err := node.Register("api", true, func(in Inbound) { got <- in }); err != nil {
		t.Fatal(err)
	}
	if err := node.Register("api", true, nil); !errors.Is(err, ErrAddressTaken) {
		t.Error(err)
	}
	s, d := stream(t, b, true), attach(t, b, "bob", false)
	d.conn.limit(1)
	s.send(route.To("api", "x"), route.To("Di"), []byte("1"))
	in := <-got
	equal(t, "frame", in.Frame, route.Frame{Onward: route.To("api", "x"), Return: route.To(s.Port().Address(), "Di"), Payload: []byte("1")})
	equal(t, "source", in.Source, s.Port().Address())
	ctx := t.Context()
	answer := route.Frame{Onward: in.Frame.Return, Return: route.To("api"), Payload: []byte("2")}
	if err := node.Send(ctx, answer, route.Stored); err != nil {
		t.Fatal(err)
	}
	equal(t, "answer", s.frames()[0], route.Frame{Onward: route.To("Di"), Return: route.To("api"), Payload: []byte("2")})
	if err := node.Send(ctx, route.Frame{Onward: in.Frame.Return, Return: route.To("someone")}, route.Stored); !errors.Is(err, ErrReturnRoute) {
		t.Error(err)
	}

	// A full target: Send waits, and gives up with its context; then nothing is sent.
	to := route.Frame{Onward: route.To(d.Port().Address(), "x"), Return: route.To("api")}
	for range 2 {
		if err := node.Send(ctx, to, route.Stored); err != nil {
			t.Fatal(err)
		}
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := node.Send(short, to, route.Stored); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	equal(t, "waiting", b.Counters().Waiting, 0)
	done := make(chan error)
	go func() { done <- node.Send(ctx, to, route.Stored) }()
	for b.Counters().Waiting < 1 {
		runtime.Gosched()
	}
	d.conn.limit(100)
	d.conn.ack()
	d.conn.ack()
	if err := <-done; err != nil {
		t.Error(err)
	}
	equal(t, "all", len(d.frames()), 3)

	// A worker that does not keep up holds back who sends to it, and loses the newest
	// of who goes on, counted.
	hold := make(chan struct{})
	if err := node.Register("slow", false, func(Inbound) { <-hold }); err != nil {
		t.Fatal(err)
	}
	for range 3 * mailboxFrames {
		d.send(route.To("slow"), nil, nil)
	}
	c := b.Counters()
	if n := c.Dropped[DropMailbox]; n < mailboxFrames || n > 2*mailboxFrames {
		t.Errorf("%d dropped", n)
	}
	// What a bundle holds is acknowledged together, once the last has been handled, or
	// will not be.
	bundle := append(frame(route.To("slow"), nil, nil), frame(route.To("slow"), nil, nil)...)
	unanswered := d.waitPackets.Load()
	if unanswered < mailboxFrames {
		t.Errorf("%d unanswered", unanswered)
	}
	acks := len(d.conn.acked())
	close(hold)
	for d.waitPackets.Load() > 0 {
		runtime.Gosched()
	}
	equal(t, "acknowledged", len(d.conn.acked())-acks, unanswered)
	hold = make(chan struct{})
	_ = d.Receive(bundle, route.Stored, d.conn, 9000)
	_ = d.Receive(bundle, route.Stored, d.conn, 9001)
	node.Unregister("slow")
	close(hold)
	for d.waitPackets.Load() > 0 {
		runtime.Gosched()
	}
	equal(t, "acknowledged", len(d.conn.acked())-acks, int(unanswered)+2)
	node.Unregister("api")
	s.send(route.To("api"), nil, nil)
	equal(t, "gone", b.Counters().Dropped[DropUnknown], 1)
}
