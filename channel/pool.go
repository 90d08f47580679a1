package channel

import "sync"

// pool runs tasks on a fixed number of goroutines. Those for whom there are any take
// turns, so that nobody's many tasks keep another's waiting. Each half-open handshake
// and each channel has at most a few tasks in it at a time, so their limits bound the
// queues.
type pool struct {
	mu     sync.Mutex
	wake   *sync.Cond
	queues map[any]*tasks
	turns  []*tasks // each of queues, once
	closed bool
	wg     sync.WaitGroup
}

// tasks are what waits to be done for somebody: one at least.
type tasks struct {
	who   any
	queue []func()
}

func newPool(workers int) *pool {
	p := &pool{queues: make(map[any]*tasks)}
	p.wake = sync.NewCond(&p.mu)
	for range workers {
		p.wg.Go(p.run)
	}
	return p
}

// submit queues a task behind those of who, which is comparable; after close it is
// dropped.
func (p *pool) submit(who any, task func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	t := p.queues[who]
	if t == nil {
		t = &tasks{who: who}
		p.queues[who] = t
		p.turns = append(p.turns, t)
	}
	t.queue = append(t.queue, task)
	p.wake.Signal()
}

func (p *pool) run() {
	for {
		p.mu.Lock()
		for len(p.turns) == 0 && !p.closed {
			p.wake.Wait()
		}
		if p.closed {
			p.mu.Unlock()
			return
		}
		task := p.nextLocked()
		p.mu.Unlock()
		task()
	}
}

// nextLocked takes the first task of whose turn it is.
func (p *pool) nextLocked() func() {
	t := p.turns[0]
	p.turns[0] = nil
	if p.turns = p.turns[1:]; len(p.turns) == 0 {
		p.turns = nil // let the array go
	}
	task := t.queue[0]
	t.queue[0] = nil
	if t.queue = t.queue[1:]; len(t.queue) > 0 {
		p.turns = append(p.turns, t)
	} else {
		delete(p.queues, t.who)
	}
	return task
}

// close drops what is queued and waits for what is running.
func (p *pool) close() {
	p.mu.Lock()
	p.closed, p.queues, p.turns = true, nil, nil
	p.mu.Unlock()
	p.wake.Broadcast()
	p.wg.Wait()
}
