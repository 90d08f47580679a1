package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/route"
)

// Bounds of the mailbox of a worker inside the hub.
const (
	mailboxFrames = 1024
	mailboxBytes  = 4 << 20
)

// ErrNotSent means that the hub had no room for a frame of a program inside it
// and that too many wait already.
var ErrNotSent = errors.New("bridge: too many frames wait for room")

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
	b    *Bridge
	link Link

	mu      sync.Mutex
	workers map[string]*localWorker
	closed  bool
	wg      sync.WaitGroup
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
	l := &Local{b: b, workers: make(map[string]*localWorker)}
	l.link.port = &Port{b: b, kind: portLocal, stripe: &b.stripes[b.portSeq.Add(1)&(numStripes-1)]}
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

// Close stops all workers and waits for their handlers.
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
	l.link.end()
	l.wg.Wait()
}

// Send routes a frame by its first onward hop and waits until the hub has taken
// responsibility for it or knows that nobody can. A stored frame whose target
// has no room waits until ctx ends; it may be sent even so. The return route
// must satisfy Bridge.Send.
func (l *Local) Send(ctx context.Context, f route.Frame, class route.Class) error {
	if err := l.b.ownReturn(f.Return); err != nil {
		return err
	}
	if l.link.dead.Load() {
		return ErrClosed
	}
	if l.link.overWindow(len(f.Payload)) {
		return ErrNotSent
	}
	in := inbound{link: &l.link, ticket: Ticket{link: &l.link, bytes: len(f.Payload)}}
	if class == route.Transient {
		l.b.sendFrom(&in, &f, class)
		return nil
	}
	done := make(acked)
	in.ticket.ack = done
	l.b.sendFrom(&in, &f, class)
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("bridge: waiting for room: %w", context.Cause(ctx))
	}
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
