package bridge

import (
	"runtime"
	"sync"
)

// drains delivers long backlogs, one batch of each in turn, on a few goroutines.
// Thousands of devices that come back at once would else be as many goroutines
// that what is live stands in line behind.
type drains struct {
	b *Bridge

	mu     sync.Mutex // leaf, except that Bridge.mu may be held
	queue  []*Port
	head   int
	active int
}

// add has a port that is pumping delivered to; false when the bridge is closed.
// The caller holds no lock.
func (d *drains) add(p *Port) bool {
	d.mu.Lock()
	d.queue = append(d.queue, p)
	more := d.active < max(1, runtime.GOMAXPROCS(0)/2)
	if more {
		d.active++
	}
	d.mu.Unlock()
	if !more || d.b.spawn(d.run) {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.active--
	for i := d.head; i < len(d.queue); i++ {
		if d.queue[i] == p {
			d.queue = append(d.queue[:i], d.queue[i+1:]...)
			return false
		}
	}
	return true // another one has it
}

// next returns the port whose turn it is; nil ends the goroutine.
func (d *drains) next() *Port {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.head == len(d.queue) {
		d.queue, d.head = nil, 0
		d.active--
		return nil
	}
	p := d.queue[d.head]
	d.queue[d.head] = nil
	if d.head++; d.head > 1024 && d.head > len(d.queue)/2 {
		d.queue = d.queue[:copy(d.queue, d.queue[d.head:])]
		d.head = 0
	}
	return p
}

func (d *drains) run() {
	for p := d.next(); p != nil; p = d.next() {
		p.mu.Lock()
		p.deliver(1)
		runtime.Gosched() // what is live goes first
	}
}
