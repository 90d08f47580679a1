package hostile

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"runtime/metrics"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// What the endpoints may take under any attack: goroutines of a test, which has those
// of its devices and of the switchboard, its own deliveries and itself, and the heap
// in use of the whole process, with the hub and all tests that run at the time. A
// stock node is a process of its own.
const (
	goroutinesPerEnd = 40
	goroutinesOfTest = 80
	heapPerEnd       = 4 << 20
	heapOfAll        = 40 << 20
	stockMemory      = 160 << 20
)

// growth watches all tests that have an end of the switchboard.
var growth struct {
	sync.Mutex
	of   map[*testing.T]*watch
	most int64 // heap in use
}

type watch struct {
	ends  int
	extra int64  // heap that the test may take beyond others
	grown string // what was wrong, the first time
}

// watchGrowth begins with the first end of a test, whose goroutines are told apart from
// then on by a label that those they start inherit.
func watchGrowth(t *testing.T) {
	growth.Lock()
	defer growth.Unlock()
	w := growth.of[t]
	if w == nil {
		w = &watch{}
		growth.of[t] = w
		pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels("test", t.Name())))
		t.Cleanup(func() { endWatch(t, w) })
	}
	w.ends++
}

func endWatch(t *testing.T, w *watch) {
	if w.extra > 0 {
		runtime.GC() // the heap counted is that of the last collection
	}
	growth.Lock()
	defer growth.Unlock()
	delete(growth.of, t)
	if w.grown != "" {
		t.Error(w.grown)
	}
}

// allowHeap lets a test take more, because its attack is about large frames.
func allowHeap(t *testing.T, bytes int64) {
	growth.Lock()
	defer growth.Unlock()
	growth.of[t].extra = bytes
}

// sampleHeap looks at the heap until the end.
func sampleHeap(stop <-chan struct{}) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		growth.Lock()
		used, allowed := metric("/gc/heap/live:bytes"), int64(heapOfAll)
		growth.most = max(growth.most, used)
		for _, w := range growth.of {
			allowed += int64(w.ends)*heapPerEnd + w.extra
		}
		for _, w := range growth.of {
			if used > allowed && w.grown == "" {
				w.grown = fmt.Sprintf("the heap in use has %.1f MiB, %d allowed for all %d tests that run", float64(used)/(1<<20), allowed>>20, len(growth.of))
			}
		}
		growth.Unlock()
	}
}

// checkGoroutines counts those of a test, its devices and their links.
func checkGoroutines(t *testing.T) {
	t.Helper()
	growth.Lock()
	defer growth.Unlock()
	w := growth.of[t]
	allowed := goroutinesOfTest + w.ends*goroutinesPerEnd
	if n := goroutinesOf(t.Name()); n > allowed && w.grown == "" {
		w.grown = fmt.Sprintf("%d goroutines, %d allowed with %d ends", n, allowed, w.ends)
	}
}

// goroutinesOf counts by label; the profile has a line with the total, and one paragraph
// for all goroutines with the same stack and labels.
func goroutinesOf(test string) (n int) {
	var b bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&b, 1) // a buffer takes all
	_, groups, _ := bytes.Cut(b.Bytes(), []byte("\n"))
	for group := range bytes.SplitSeq(groups, []byte("\n\n")) {
		var count int
		if _, err := fmt.Sscanf(string(group), "%d @", &count); err == nil && bytes.Contains(group, fmt.Appendf(nil, "\n# labels: {%q:%q}\n", "test", test)) {
			n += count
		}
	}
	return n
}

// heapBytes is what objects take on the heap, dead ones that are not collected yet
// included.
func heapBytes() int64 { return metric("/memory/classes/heap/objects:bytes") }

func metric(name string) int64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64())
}

// collected is what objects take that are in use.
func collected() int64 {
	runtime.GC()
	runtime.GC() // what the first one finalized
	return heapBytes()
}

// peakOf returns how far the heap has grown at most while f ran, and how far once it is
// over. It is about the whole process: nothing else may run meanwhile.
func peakOf(f func()) (most, after int64) {
	before := collected()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, heapBytes()-before)
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	f()
	close(stop)
	wg.Wait()
	return most, collected() - before
}

// checkStockMemory looks at all that a stock node has ever taken.
func checkStockMemory(t *testing.T, n *rustpeer.Node) {
	t.Helper()
	most, err := n.Process().PeakMemory()
	switch {
	case err != nil:
		t.Error(err)
	case most > stockMemory:
		t.Errorf("the stock node has taken %.1f MiB, %d allowed", float64(most)/(1<<20), stockMemory>>20)
	}
}

// TestDataGrowth runs the attacks of TestData with large messages in both directions,
// alone, one after the other, in one conversation. After each the heap is where it was.
func TestDataGrowth(t *testing.T) {
	const (
		messages = 40
		size     = 24 << 10
		may      = messages * size * 3 / 4 // of what each side says; connections' buffers have 1 MiB at most
	)
	c := converse(t, false)
	e := c.alice.end
	allowHeap(t, 8*messages*size)
	content := rustpeer.Content(seed, 0, size)
	ctx := within(t)
	say := func(send func(context.Context, string, []byte) error) (said int) {
		for i := range messages {
			m := content
			if i < 4 { // the first frames are what some attacks try every length and byte of
				m = content[:40]
			}
			// The channel may end, and alice make another one.
			if send(ctx, plain, m) == nil {
				said++
			}
		}
		return said
	}
	round := func(t *testing.T, a attack, ended func()) {
		t.Helper()
		_ = c.ch.Close() // what one attack leaves behind, such as rations, does not bear on the next
		c.ch = c.alice.dial(c.bob)
		acc := c.bob.accepted(t)
		e.set(a)
		var want [2]int
		var both sync.WaitGroup
		both.Go(func() { want[up] = say(c.ch.Send) })
		both.Go(func() { want[down] = say(acc.Send) })
		both.Wait()
		e.await("the messages", func([2][]route.Frame, [2][]route.Frame) bool {
			return e.count[up] >= want[up] && e.count[down] >= want[down]
		})
		if ended != nil {
			ended()
		}
		e.set(nil)
		c.settle(t)
		for _, p := range []*person{c.alice, c.bob} {
			p.forget()
		}
	}
	round(t, asIs, nil)
	first := collected()
	before := first
	for name, made := range dataAttacks {
		t.Run(name, func(t *testing.T) {
			was := e.passed()
			a, ended := made(e)
			round(t, a, ended)
			after := collected()
			grown, passed := after-before, e.passed()-was
			before = after
			t.Logf("after %.1f MiB in frames the heap has grown by %.2f MiB", float64(passed)/(1<<20), float64(grown)/(1<<20))
			if passed < messages*size {
				t.Errorf("only %d bytes have come", passed)
			}
			if grown > may {
				t.Errorf("after %d bytes in frames the heap has grown by %d", passed, grown)
			}
		})
	}
	if grown := before - first; grown > 2*may {
		t.Errorf("after all attacks the heap has grown by %d bytes", grown)
	}
}

// forget drops what the test itself keeps.
func (p *person) forget() {
	p.mu.Lock()
	clear(p.got)
	clear(p.from)
	p.mu.Unlock()
	p.end.mu.Lock()
	p.end.tape, p.end.told = [2][]route.Frame{}, [2][]route.Frame{}
	p.end.mu.Unlock()
}

// passed is how many bytes in frames have come to an end or were sent on by it.
func (e *end) passed() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.bytes
}
