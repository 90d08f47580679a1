package channel

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

const (
	// closeWait bounds how long closing waits for its Close frame to be taken.
	closeWait = 2 * time.Second
	// sendWait bounds how long a frame that nobody waits for may wait.
	sendWait = 10 * time.Second
	// idleEvict is how long a channel must have been idle to give way.
	idleEvict = 10 * time.Minute
	// maxRemembered bounds the identities remembered as saying hello.
	maxRemembered = 8192
)

// Endpoint is the secure channels of one identity on one node: it listens, it
// dials, and it carries messages once a channel stands. All methods are safe for
// concurrent use. Close it to end everything it started.
type Endpoint struct {
	cfg    Config
	limits Limits
	log    *slog.Logger
	epoch  [epochLen]byte

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	pool   *pool          // does handshakes
	slow   *pool          // verifies long histories, and what peers show anew
	wg     sync.WaitGroup // goroutines and running timer functions

	frameLimit atomic.Int64
	online     atomic.Bool
	drops      drops
	accepted   atomic.Uint64
	dialled    atomic.Uint64
	refused    atomic.Uint64
	failed     atomic.Uint64
	gaps       atomic.Uint64
	silent     atomic.Uint64
	downgrades atomic.Uint64
	turns      atomic.Uint64 // channels dialled, in order
	earlyBytes atomic.Int64  // held by half-open handshakes

	mu         sync.Mutex // guards what follows
	closed     bool
	listeners  map[string]*Listener
	halfOpen   map[*halfOpen]struct{}
	firsts     firsts
	sources    *sources
	channels   map[*Channel]struct{}
	identities map[identity.Identifier]*ofIdentity
	crowd      crowd
	encryptors map[string]*Channel
	dials      int
	helloers   map[identity.Identifier]struct{}
}

// NewEndpoint checks cfg and starts an endpoint. It has no listener yet.
func NewEndpoint(cfg Config) (*Endpoint, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	e := &Endpoint{
		cfg:        cfg,
		limits:     cfg.Limits.withDefaults(),
		log:        cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)),
		epoch:      cfg.Epoch,
		listeners:  make(map[string]*Listener),
		halfOpen:   make(map[*halfOpen]struct{}),
		firsts:     newFirsts(),
		channels:   make(map[*Channel]struct{}),
		identities: make(map[identity.Identifier]*ofIdentity),
		encryptors: make(map[string]*Channel),
		helloers:   make(map[identity.Identifier]struct{}),
	}
	e.cfg.Authorities = slices.Clone(cfg.Authorities)
	if e.cfg.Clock == nil {
		e.cfg.Clock = time.Now
	}
	if e.epoch == [epochLen]byte{} {
		if _, err := rand.Read(e.epoch[:]); err != nil {
			return nil, err
		}
	}
	e.cfg.hooks = e.cfg.hooks.withDefaults(cfg.Identity)
	e.sources = newSources(e.limits)
	e.frameLimit.Store(int64(e.limits.Frame))
	e.online.Store(true)
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.pool = newPool(e.limits.Workers)
	e.slow = newPool(1)
	return e, nil
}

func (h hooks) withDefaults(id *identity.Private) hooks {
	if h.ephemeral == nil {
		h.ephemeral = newEphemeral
	}
	if h.side == nil {
		h.side = func(credential []byte) (local, error) { return localSide(id, credential) }
	}
	if h.address == nil {
		h.address = randomAddress
	}
	return h
}

// randomAddress is a fresh local address as stock peers make them (spec routing
// 2.3): 32 hexadecimal digits that nobody can guess.
func randomAddress() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// Epoch returns the epoch that this endpoint announces.
func (e *Endpoint) Epoch() [16]byte { return e.epoch }

// SetFrameLimit changes the longest frame body sent, in bytes, for when the hub
// says what it takes. Values out of the range of Limits.Frame are ignored.
func (e *Endpoint) SetFrameLimit(n int) {
	if n >= minFrame && n <= route.MaxFrame {
		e.frameLimit.Store(int64(n))
	}
}

// SetOnline tells the endpoint whether its own way out is up. While it is not,
// the silence of peers is not held against them. An endpoint starts online.
func (e *Endpoint) SetOnline(up bool) {
	if e.online.Swap(up) != up && up {
		for _, c := range e.openChannels() {
			c.live.forgive(c)
		}
	}
}

// Stats returns the counters of the endpoint.
func (e *Endpoint) Stats() EndpointStats {
	e.mu.Lock()
	channels, half := len(e.channels), len(e.halfOpen)
	e.mu.Unlock()
	return EndpointStats{
		Channels: channels, HalfOpen: half,
		Accepted: e.accepted.Load(), Dialled: e.dialled.Load(),
		Refused: e.refused.Load(), Failed: e.failed.Load(),
		Gaps: e.gaps.Load(), Silent: e.silent.Load(), Downgrade: e.downgrades.Load(),
		Dropped: e.drops.load(),
	}
}

// Channels returns the channels open now, in no order.
func (e *Endpoint) Channels() []*Channel { return e.openChannels() }

func (e *Endpoint) openChannels() []*Channel {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*Channel, 0, len(e.channels))
	for c := range e.channels {
		all = append(all, c)
	}
	return all
}

// Forward sends f through the channel whose encryptor address is its first
// onward hop, waiting for room as Channel.Send does; false when there is no such
// channel. A node that routes frames of its own programs gains back-pressure by
// asking here before it uses the worker registered at that address, which can
// only drop.
func (e *Endpoint) Forward(ctx context.Context, f route.Frame) (bool, error) {
	first, ok := f.Onward.First()
	if !ok || !first.IsLocal() {
		return false, nil
	}
	e.mu.Lock()
	c := e.encryptors[first.Value]
	e.mu.Unlock()
	if c == nil {
		return false, nil
	}
	return true, c.Send(ctx, f.Onward.Rest(), f.Return, f.Payload)
}

// Close ends the endpoint: listeners stop, handshakes fail with ErrClosed, and
// every channel sends its Close, for which it waits two seconds at most. When it
// returns, all goroutines have ended. Closing again returns at once.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	listeners, half := e.listeners, e.halfOpen
	e.listeners, e.halfOpen = map[string]*Listener{}, map[*halfOpen]struct{}{}
	e.mu.Unlock()

	for _, ln := range listeners {
		ln.unregister()
	}
	for h := range half {
		h.stop()
	}
	var closing sync.WaitGroup
	for _, c := range e.openChannels() {
		closing.Go(func() { _ = c.Close() })
	}
	closing.Wait()
	e.cancel()
	e.pool.close()
	e.slow.close()
	e.wg.Wait()
	return nil
}

// enter lets a goroutine or timer function run that Close waits for; false when
// the endpoint is closed. e.wg.Done ends it.
func (e *Endpoint) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.wg.Add(1)
	return true
}

// spawn runs f on a goroutine of its own. The number of them is bounded by the
// half-open handshakes and channels that start them.
func (e *Endpoint) spawn(f func()) {
	if !e.enter() {
		return
	}
	go func() {
		defer e.wg.Done()
		f()
	}()
}

// spawnLocked is spawn for who holds the lock and has seen that e is open.
func (e *Endpoint) spawnLocked(f func()) {
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		f()
	}()
}

// after runs f once d has passed, unless the endpoint is closed by then.
func (e *Endpoint) after(d time.Duration, f func()) *time.Timer {
	return time.AfterFunc(d, func() {
		if !e.enter() {
			return
		}
		defer e.wg.Done()
		f()
	})
}

// send gives the router a frame that nobody waits for.
func (e *Endpoint) send(f route.Frame) {
	ctx, cancel := context.WithTimeout(e.ctx, sendWait)
	defer cancel()
	if err := e.cfg.Router.Send(ctx, f, route.Stored); err != nil {
		e.drops.add(DropUnsent)
		e.log.Debug("handshake message not sent", "err", err)
	}
}

// credential returns what to show to a peer.
func (e *Endpoint) credential(hide bool) ([]byte, error) {
	if hide || e.cfg.Credential == nil {
		return nil, nil
	}
	return e.cfg.Credential()
}

// saysHello remembers an identity as one of sealmq, in this process.
func (e *Endpoint) saysHello(id identity.Identifier) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.helloers) >= maxRemembered {
		for other := range e.helloers { // any one
			delete(e.helloers, other)
			break
		}
	}
	e.helloers[id] = struct{}{}
}

// hasSaidHello reports whether a downgrade is possible.
func (e *Endpoint) hasSaidHello(id identity.Identifier) bool {
	e.mu.Lock()
	_, ok := e.helloers[id]
	e.mu.Unlock()
	return ok || (e.cfg.KnownHello != nil && e.cfg.KnownHello(id))
}

// firstSource is the name under which an inbound frame is counted.
func (in *Inbound) source() string {
	if in.Source != "" {
		return in.Source
	}
	first, _ := in.Frame.Return.First()
	return first.Value
}
