// Package node is the local half of Ockam routing: workers by address inside one
// process, and the rules about who may reach them. A device runs one node; its
// link to the hub hands arriving frames to [Node.Inject], its secure channels hand
// decrypted ones to [Node.Inject] or [Node.Deliver] with the verified identifier of
// the peer, and programs receive, handle, send and ask.
//
// # Workers
//
// An address is one of these:
//
//   - a mailbox ([Node.OpenMailbox]), read with [Node.Receive];
//   - a callback ([Node.Handle]), called for each message in order on a goroutine
//     of its own; it may call anything, Close included;
//   - a registered function ([Node.Register]), called in place for each frame:
//     secure channels use it;
//   - an alias ([Node.Alias]) of another address.
//
// Mailboxes and callbacks queue at most 1,024 messages or 4 MiB by default. When
// full they drop the newest, count it and say so to the reader. So a worker that
// nobody reads holds up nobody else.
//
// # Who may reach what
//
// Local code reaches every address. Everybody else reaches only what has been
// opened to them with an [Access]: plain frames, which anybody who can send through
// the hub can make, and secure channels, all of them or only those that named
// listeners accepted. Everything is closed by default. Only the first hop is
// checked, as in Ockam (spec routing 7.1). A frame from outside never leaves the
// node again by itself: only frames of local code go to the uplink.
//
// # Concurrency
//
// All methods are safe for concurrent use. Inject never blocks and never waits for
// a worker. A node starts one goroutine for each callback and, for short times, one
// for a registered function that is busy; all end with Close.
package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/sealmq/sealmq/internal/recent"
	"github.com/sealmq/sealmq/route"
)

// Defaults of Config.
const (
	DefaultMailboxMessages = 1024
	DefaultMailboxBytes    = 4 << 20
	DefaultMaxWorkers      = 64 << 10
)

// Uplink carries frames off the node, to the hub. Send may wait for room until ctx
// ends and keeps nothing of f after it has returned.
type Uplink interface {
	Send(ctx context.Context, f route.Frame, c route.Class) error
}

// UplinkFunc makes a function an Uplink.
type UplinkFunc func(ctx context.Context, f route.Frame, c route.Class) error

// Send implements Uplink.
func (fn UplinkFunc) Send(ctx context.Context, f route.Frame, c route.Class) error {
	return fn(ctx, f, c)
}

// Config sets up a Node; the zero value is ready for use.
type Config struct {
	// Uplink takes the frames of local code whose first hop is not on this node.
	// Without one they fail with ErrUnknownAddress. SetUplink changes it later.
	Uplink Uplink
	// MailboxMessages and MailboxBytes bound each mailbox and each callback's
	// queue; bytes count payloads and a fixed share for each message. Defaults
	// 1,024 and 4 MiB. One message is always accepted by an empty mailbox.
	MailboxMessages int
	MailboxBytes    int
	// MaxWorkers bounds the addresses of the node. Default 65,536.
	MaxWorkers int
	// Logger gets what an operator should see; nil discards. Payloads are never
	// logged.
	Logger *slog.Logger
}

var (
	// ErrClosed means that the node has been closed.
	ErrClosed = errors.New("node: closed")
	// ErrUnknownAddress means that the first hop is not a worker of this node, and
	// there is no uplink to send the frame to.
	ErrUnknownAddress = errors.New("node: no worker at this address and no uplink")
	// ErrNotMailbox means that Receive was called for an address that is not a
	// mailbox; open it first with OpenMailbox.
	ErrNotMailbox = errors.New("node: not a mailbox of this node: open it before receiving")
	// ErrAddressInUse means that another worker has the address.
	ErrAddressInUse = errors.New("node: address is in use")
	// ErrBadAddress means that an address for a worker is empty or too long.
	ErrBadAddress = errors.New("node: worker address must have 1 to 255 bytes")
	// ErrTooManyWorkers means that the node has MaxWorkers addresses.
	ErrTooManyWorkers = errors.New("node: too many workers")
	// ErrNoRoute means that a frame has no onward route, or a message no return
	// route to answer along.
	ErrNoRoute = errors.New("node: empty route")
	// ErrRefused means that a frame may not go where its route leads.
	ErrRefused = errors.New("node: route not allowed")
	// ErrFull means that the local worker's queue is full; the frame was dropped.
	ErrFull = errors.New("node: worker's queue is full")
)

// maxGraves bounds the addresses remembered as once those of channels.
const maxGraves = 16 << 10

// Node is a set of workers. Make one with New.
type Node struct {
	cfg   Config
	log   *slog.Logger
	epoch [16]byte // random, of this process: begins the ids of plain messages

	mu      sync.RWMutex
	workers map[string]*worker // guarded by mu
	uplink  Uplink             // guarded by mu
	closed  bool               // guarded by mu
	// graves are the addresses of channels that have ended. What is sent along an old
	// return route would leave in plain towards the hub, since its first hop is no worker
	// of the node any more.
	graves *recent.Set // guarded by mu

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	active sync.WaitGroup // goroutines; Add only under mu while not closed
	done   chan struct{}  // closed when active has drained after Close
	count  atomic.Uint64  // plain messages so far
	stats  counters
}

// New returns a node without workers. It fails for negative limits only.
func New(cfg Config) (*Node, error) {
	if cfg.MailboxMessages < 0 || cfg.MailboxBytes < 0 || cfg.MaxWorkers < 0 {
		return nil, errors.New("node: limits must not be negative")
	}
	if cfg.MailboxMessages == 0 {
		cfg.MailboxMessages = DefaultMailboxMessages
	}
	if cfg.MailboxBytes == 0 {
		cfg.MailboxBytes = DefaultMailboxBytes
	}
	if cfg.MaxWorkers == 0 {
		cfg.MaxWorkers = DefaultMaxWorkers
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	n := &Node{
		cfg:     cfg,
		log:     cfg.Logger,
		workers: make(map[string]*worker),
		uplink:  cfg.Uplink,
		graves:  recent.New(maxGraves),
		done:    make(chan struct{}),
	}
	rand.Read(n.epoch[:]) // never fails (crypto/rand)
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n, nil
}

// SetUplink replaces the uplink; nil takes it away.
func (n *Node) SetUplink(u Uplink) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.uplink = u
}

// RandomAddress returns a fresh unguessable address: 16 random bytes as 32
// lower-case hexadecimal digits (spec routing 2.3).
func RandomAddress() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Close ends the node: waiting calls return ErrClosed, queued messages are
// dropped and counted, the contexts of callbacks end, and nothing is accepted any
// more. It does not wait for callbacks that are running, so it may be called from
// one; Done tells when the last goroutine has ended. Further calls do nothing.
func (n *Node) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	workers := n.workers
	n.workers = nil
	n.mu.Unlock()
	n.cancel()
	for _, w := range workers {
		w.stop()
		if !w.leaving { // else remove tells
			w.gone()
		}
	}
	// Nothing adds to active any more. This goroutine ends with the last of them.
	go func() {
		n.active.Wait()
		close(n.done)
	}()
	return nil
}

// Done returns a channel that is closed when Close has been called and every
// goroutine of the node has ended.
func (n *Node) Done() <-chan struct{} { return n.done }

// Shutdown closes the node and waits for its goroutines, callbacks included, or
// for ctx to end. Don't call it from a callback, which it would wait for.
func (n *Node) Shutdown(ctx context.Context) error {
	_ = n.Close()
	select {
	case <-n.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("node: callbacks still running: %w", context.Cause(ctx))
	}
}

// start runs fn on a goroutine that Done waits for; false once the node is closed.
func (n *Node) start(fn func()) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.closed {
		return false
	}
	n.active.Go(fn)
	return true
}

// add puts a worker at its address.
func (n *Node) add(w *worker) error {
	if len(w.addr) == 0 || len(w.addr) > route.DefaultAddress {
		return fmt.Errorf("%w, %q has %d", ErrBadAddress, w.addr, len(w.addr))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.closed:
		return ErrClosed
	case n.workers[w.addr] != nil:
		return fmt.Errorf("%w: %q", ErrAddressInUse, w.addr)
	case len(n.workers) >= n.cfg.MaxWorkers:
		return fmt.Errorf("%w: limit %d", ErrTooManyWorkers, n.cfg.MaxWorkers)
	}
	n.workers[w.addr] = w
	if w.run != nil {
		n.active.Go(w.run)
	}
	return nil
}

// lookup returns the worker at addr, or nil, and its access at this moment.
func (n *Node) lookup(addr string) (w *worker, a Access) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if w = n.workers[addr]; w != nil {
		a = w.access
	}
	return w, a
}

// remove takes the worker away and stops it; only this very one when w is given.
func (n *Node) remove(addr string, only *worker) bool {
	n.mu.Lock()
	w := n.workers[addr]
	if w == nil || w.leaving || only != nil && w != only {
		n.mu.Unlock()
		return false
	}
	w.leaving = true
	if w.channel {
		n.graves.Add(addr)
	}
	n.mu.Unlock()
	// A later worker at the address must not be handed anything before a delivery layer
	// has heard of all that this one has dropped: it would come before that, and again.
	w.stop()
	n.mu.Lock()
	delete(n.workers, addr)
	n.mu.Unlock()
	w.gone()
	return true
}

// Remove ends the worker at addr, of whatever kind, and reports whether there was
// one. Messages in its queue are dropped and counted; Receive at it fails. A
// callback that is running is not waited for.
func (n *Node) Remove(addr string) bool { return n.remove(addr, nil) }

// Has reports whether there is a worker at addr.
func (n *Node) Has(addr string) bool {
	w, _ := n.lookup(addr)
	return w != nil
}

// SetAccess replaces the access of the worker at addr, and reports whether there is
// one.
func (n *Node) SetAccess(addr string, a Access) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.workers[addr]
	if w == nil {
		return false
	}
	w.access = a.clone()
	return true
}
