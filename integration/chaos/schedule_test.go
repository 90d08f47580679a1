package chaos

import (
	"context"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"
)

// kind is a kind of fault: how often it comes, and how long it lasts.
type kind struct {
	name      string
	weight    int
	low, high time.Duration
	strike    func(c *chaos, ctx context.Context, d *child, lasts time.Duration)
}

// ofHub begins the names of the kinds that end the hub.
const ofHub = "hub "

var kinds = []kind{
	{ofHub + "killed", 2, 0, time.Second, func(c *chaos, ctx context.Context, _ *child, lasts time.Duration) {
		c.restartHub(ctx, syscall.SIGKILL, lasts)
	}},
	{ofHub + "terminated", 1, 0, time.Second, func(c *chaos, ctx context.Context, _ *child, lasts time.Duration) {
		c.restartHub(ctx, syscall.SIGTERM, lasts)
	}},
	{"killed", 3, 0, time.Second, func(_ *chaos, ctx context.Context, d *child, lasts time.Duration) {
		d.end(syscall.SIGKILL)
		pause(ctx, lasts)
		d.start()
	}},
	{"terminated", 1, 0, 0, func(_ *chaos, _ context.Context, d *child, _ time.Duration) {
		d.end(syscall.SIGTERM)
		d.start()
	}},
	{"connection cut", 6, 0, 0, func(_ *chaos, _ context.Context, d *child, _ time.Duration) { d.proxy.cut() }},
	{"connection stalled", 3, 100 * time.Millisecond, 3 * time.Second, func(_ *chaos, ctx context.Context, d *child, lasts time.Duration) {
		resume := d.proxy.stall()
		pause(ctx, lasts)
		resume()
	}},
	// It comes back while its hub still holds the connection of the process before, and
	// takes the session over. The proxy counts that.
	{"killed and replaced", 2, time.Second, 2 * time.Second, func(_ *chaos, ctx context.Context, d *child, lasts time.Duration) {
		release := d.proxy.hold()
		d.end(syscall.SIGKILL)
		d.start()
		pause(ctx, lasts)
		release()
	}},
	// Its queue fills meanwhile.
	{"stopped", 2, 500 * time.Millisecond, 3 * time.Second, func(_ *chaos, ctx context.Context, d *child, lasts time.Duration) {
		_ = d.process.Signal(syscall.SIGSTOP)
		pause(ctx, lasts)
		_ = d.process.Signal(syscall.SIGCONT)
	}},
}

// fault is one fault of a run.
type fault struct {
	kind  int // in kinds
	child int
	lasts time.Duration
	then  time.Duration // until the next one
}

// schedule makes the faults of a run. They follow from the seed alone, whatever the run
// does with them.
type schedule struct {
	rnd      *rand.Rand
	children int
	every    time.Duration // between two faults, on average
}

func newSchedule(seed uint64, children int, every time.Duration) *schedule {
	return &schedule{rnd: rand.New(rand.NewPCG(seed, 1)), children: children, every: every}
}

func (s *schedule) next() fault {
	var f fault
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	for at := s.rnd.IntN(total); at >= kinds[f.kind].weight; f.kind++ {
		at -= kinds[f.kind].weight
	}
	f.child = s.rnd.IntN(s.children)
	k := &kinds[f.kind]
	f.lasts = k.low + time.Duration(s.rnd.Float64()*float64(k.high-k.low))
	f.then = s.every/8 + time.Duration(s.rnd.Float64()*float64(2*s.every-s.every/4))
	return f
}

// TestScheduleFollowsFromSeed: and has every kind.
func TestScheduleFollowsFromSeed(t *testing.T) {
	list := func(seed uint64) (all []fault) {
		s := newSchedule(seed, senders+receivers, time.Second)
		for range 500 {
			all = append(all, s.next())
		}
		return all
	}
	a := list(7)
	if !slices.Equal(a, list(7)) || slices.Equal(a, list(8)) {
		t.Error("the faults do not follow from the seed")
	}
	var sum time.Duration
	count, of := make([]int, len(kinds)), make([]int, senders+receivers)
	for _, f := range a {
		count[f.kind]++
		of[f.child]++
		sum += f.then
		if k := &kinds[f.kind]; f.lasts < k.low || f.lasts > k.high {
			t.Fatalf("%s lasts %v", k.name, f.lasts)
		}
	}
	if slices.Min(count) < 5 || slices.Min(of) < 50 {
		t.Errorf("of the kinds there are %v, of the processes %v", count, of)
	}
	if mean := sum / time.Duration(len(a)); mean < 900*time.Millisecond || mean > 1100*time.Millisecond {
		t.Errorf("a fault every %v", mean)
	}
}
