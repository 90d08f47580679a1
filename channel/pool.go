package channel

import "sync"

// pool runs tasks on a fixed number of goroutines. Each half-open handshake and
// each channel has at most a few tasks in it at a time, so their limits bound
// the queue.
type pool struct {
	mu     sync.Mutex
	wake   *sync.Cond
	queue  []func()
	closed bool
	wg     sync.WaitGroup
}

func newPool(workers int) *pool {
	p := &pool{}
	p.wake = sync.NewCond(&p.mu)
	for range workers {
		p.wg.Go(p.run)
	}
	return p
}

// submit queues a task; after close it is dropped.
func (p *pool) submit(task func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.queue = append(p.queue, task)
	p.wake.Signal()
}

func (p *pool) run() {
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.closed {
			p.wake.Wait()
		}
		if p.closed {
			p.mu.Unlock()
			return
		}
		task := p.queue[0]
		p.queue[0] = nil
		if p.queue = p.queue[1:]; len(p.queue) == 0 {
			p.queue = nil // let the array go
		}
		p.mu.Unlock()
		task()
	}
}

// close drops what is queued and waits for what is running.
func (p *pool) close() {
	p.mu.Lock()
	p.closed, p.queue = true, nil
	p.mu.Unlock()
	p.wake.Broadcast()
	p.wg.Wait()
}
