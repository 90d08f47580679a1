package bridge

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/sealmq/sealmq/route"
)

// Bounds of the mailbox of a worker inside the hub.
const (
	mailboxFrames = 1024
	mailboxBytes  = 4 << 20
)

// Bounds of what Local.Send has the hub keep for one target that it has not taken yet:
// 256 KiB, or 64 frames, as each counts with leastBytes at least.
const (
	targetBytes = 256 << 10
	leastBytes  = targetBytes / 64
)

// Inbound is one frame for a worker inside the hub. The worker owns it.
type Inbound struct {
	Frame route.Frame
	Class route.Class
	// From is who sent it, Source the hub address in front of its return route;
	// both zero from inside the hub.
	From   Principal
	Source string

	link *Link
}

// Network is the IP address, or IPv6 network of 64 bits, that the sender is connected
// from; invalid from inside the hub and where the front does not say.
func (in *Inbound) Network() netip.Prefix {
	if in.link == nil {
		return netip.Prefix{}
	}
	return in.link.network()
}

// Local is a node inside the hub: workers with mailboxes, such as the endpoints
// of secure channels with the hub's own identity. It is what a channel endpoint
// needs of its router: Register, Unregister and a Send that waits for room.
type Local struct {
	b      *Bridge
	port   *Port
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu      sync.Mutex
	workers map[string]*localWorker
	targets map[route.Address]*localTarget // of the calls of Send that are under way
	closed  bool
	wg      sync.WaitGroup
}

// localTarget is where calls of Send send to.
type localTarget struct {
	room  *semaphore.Weighted // of targetBytes
	calls int                 // guarded by Local.mu
}

type localWorker struct {
	handler func(Inbound)

	mu    sync.Mutex
	wake  chan struct{}
	queue []letter
	bytes int
	quit  bool
}

// letter is a frame in a mailbox.
type letter struct {
	Inbound
	release func() // its sender waits for that; nil: it does not
}

// NewLocal returns a node without workers. Close it before the bridge.
func NewLocal(b *Bridge) *Local {
	l := &Local{b: b, workers: make(map[string]*localWorker), targets: make(map[route.Address]*localTarget)}
	l.port = &Port{b: b, kind: portLocal, stripe: &b.stripes[b.portSeq.Add(1)&(numStripes-1)]}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Register starts a worker. Its handler is called in order of arrival, one call
// at a time, on a goroutine of its own. A stored frame is acknowledged once the
// handler has returned, so a handler that blocks holds back who sends to it. When
// more waits than a mailbox holds (1,024 frames or 4 MiB) the newest are dropped,
// counted, and noticed to their senders. open lets TCP peers reach the worker that no frame has linked with it.
func (l *Local) Register(addr string, open bool, handler func(Inbound)) error {
	return l.RegisterFor(reachOf(open), addr, handler)
}

// RegisterFor is Register with a choice of who may name the worker.
func (l *Local) RegisterFor(r Reach, addr string, handler func(Inbound)) error {
	w := &localWorker{handler: handler, wake: make(chan struct{}, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return ErrClosed
	}
	if err := l.b.RegisterServiceFor(r, addr, w.take); err != nil {
		return err
	}
	l.workers[addr] = w
	l.wg.Go(w.run)
	return nil
}

// Unregister stops a worker. A call of its handler may still be under way; what
// its mailbox holds is forgotten.
func (l *Local) Unregister(addr string) {
	l.mu.Lock()
	w := l.workers[addr]
	delete(l.workers, addr)
	l.mu.Unlock()
	if w != nil {
		l.b.UnregisterService(addr)
		w.stop()
	}
}

// Close stops all workers, has calls of Send return, and waits for both.
func (l *Local) Close() {
	l.mu.Lock()
	l.closed = true
	all := l.workers
	l.workers = make(map[string]*localWorker)
	l.mu.Unlock()
	for addr, w := range all {
		l.b.UnregisterService(addr)
		w.stop()
	}
	l.cancel()
	l.wg.Wait()
}

// Send routes a frame by its first onward hop and waits until the hub has taken
// responsibility for it or knows that nobody can. A stored frame whose target
// has no room waits until ctx ends, and then is not sent, unless the hub was about to
// take it. The hub keeps 64 such frames, or 256 KiB, for one target; more wait in their
// calls. So frames for one target never keep those for another. The return route
// must satisfy Bridge.Send.
func (l *Local) Send(ctx context.Context, f route.Frame, class route.Class) error {
	if err := l.b.ownReturn(f.Return); err != nil {
		return err
	}
	t, err := l.enter(&f)
	if err != nil {
		return err
	}
	defer l.leave(&f, t)
	// A link for each call: what waits can be withdrawn by itself.
	link := &Link{port: l.port}
	in := inbound{link: link, ticket: Ticket{link: link, bytes: len(f.Payload)}}
	if class == route.Transient {
		l.b.sendFrom(&in, &f, class)
		return nil
	}
	size := int64(min(max(len(f.Payload), leastBytes), targetBytes))
	if err := l.acquire(ctx, t, size); err != nil {
		return err
	}
	defer t.room.Release(size)
	done := make(acked)
	in.ticket.ack = done
	l.b.sendFrom(&in, &f, class)
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	case <-l.ctx.Done():
	}
	link.end()
	select {
	case <-done: // both at once
		return nil
	default:
		return l.gaveUp(ctx)
	}
}

// enter notes a call of Send, which leave ends.
func (l *Local) enter(f *route.Frame) (*localTarget, error) {
	first, _ := f.Onward.First()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	t := l.targets[first]
	if t == nil {
		t = &localTarget{room: semaphore.NewWeighted(targetBytes)}
		l.targets[first] = t
	}
	t.calls++
	l.wg.Add(1)
	return t, nil
}

func (l *Local) leave(f *route.Frame, t *localTarget) {
	first, _ := f.Onward.First()
	l.mu.Lock()
	if t.calls--; t.calls == 0 {
		delete(l.targets, first)
	}
	l.mu.Unlock()
	l.wg.Done()
}

// acquire waits for a place among the frames for a target.
func (l *Local) acquire(ctx context.Context, t *localTarget, size int64) error {
	if t.room.TryAcquire(size) {
		return nil
	}
	either, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ctx, cancel)()
	if t.room.Acquire(either, size) != nil {
		return l.gaveUp(ctx)
	}
	return nil
}

// gaveUp is why Send returns without having sent.
func (l *Local) gaveUp(ctx context.Context) error {
	if l.ctx.Err() != nil {
		return ErrClosed
	}
	return fmt.Errorf("bridge: waiting for room: %w", context.Cause(ctx))
}

type acked chan struct{}

func (a acked) Acked(uint64) { close(a) }

// take is the worker's service handler.
func (w *localWorker) take(r *Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(r.Frame.Payload)
	if w.quit || len(w.queue) >= mailboxFrames || w.bytes+n > mailboxBytes && len(w.queue) > 0 {
		r.Drop(DropMailbox)
		return
	}
	m := letter{Inbound{Frame: r.Frame, Class: r.Class, From: r.From, Source: r.Source, link: r.link}, r.hold()}
	m.Frame.Payload = slices.Clone(m.Frame.Payload)
	w.queue = append(w.queue, m)
	w.bytes += n
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *localWorker) run() {
	for range w.wake {
		w.mu.Lock()
		queue := w.queue
		w.queue, w.bytes = nil, 0
		w.mu.Unlock()
		for i := range queue {
			w.mu.Lock()
			quit := w.quit
			w.mu.Unlock()
			if !quit {
				w.handler(queue[i].Inbound)
			}
			queue[i].done()
		}
	}
}

func (w *localWorker) stop() {
	w.mu.Lock()
	left := w.queue
	if !w.quit {
		w.quit = true
		w.queue = nil
		close(w.wake)
	}
	w.mu.Unlock()
	for i := range left {
		left[i].done()
	}
}

// done lets go of a frame, whatever came of it. The caller holds no lock.
func (l *letter) done() {
	if l.release != nil {
		l.release()
	}
	*l = letter{}
}
