package channel

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sealmq/sealmq/route"
)

// firstMemory is how long a message 1 is remembered, so that a repeated one is
// not taken for another dial.
const firstMemory = 30 * time.Second

const (
	// maxFirsts bounds the messages 1 remembered.
	maxFirsts = 4096
	// maxResends bounds the messages 2 sent for one message 1.
	maxResends = 8
	// halfOpenEvict is the age from which an unfinished handshake gives way when
	// there is no room.
	halfOpenEvict = 2 * time.Second
)

// ListenOptions change how a listener answers. The zero value is fine.
type ListenOptions struct {
	// HideCredential shows peers no credential of ours.
	HideCredential bool
	// Class is how handshake messages and, until the peer's first frame shows
	// its own choice, frames are sent. It is Stored unless set otherwise.
	Class route.Class
}

// Listener answers handshakes at one address.
type Listener struct {
	e        *Endpoint
	name     string
	verifier *verifier
	opts     ListenOptions

	mu      sync.Mutex
	aliases map[string]struct{}
	closed  bool
}

// Listen answers handshakes at the local address name. Channels that peers open
// there outlive the listener.
func (e *Endpoint) Listen(name string, policy Policy, opts ListenOptions) (*Listener, error) {
	switch {
	case name == "":
		return nil, errors.New("channel: listen: no name given")
	case policy == nil:
		return nil, errNoPolicy
	}
	ln := &Listener{
		e: e, name: name, opts: opts, aliases: make(map[string]struct{}),
		verifier: newVerifier(e.cfg.Registry, policy, e.cfg.Authorities, e.cfg.Clock),
	}
	e.mu.Lock()
	_, taken := e.listeners[name]
	closed := e.closed
	if !taken && !closed {
		e.listeners[name] = ln
	}
	e.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case taken:
		return nil, fmt.Errorf("channel: listen: there is a listener %q already", name)
	}
	if err := e.cfg.Router.Register(name, ln.Handle); err != nil {
		e.forget(ln)
		return nil, fmt.Errorf("channel: listen: %w", err)
	}
	return ln, nil
}

func (e *Endpoint) forget(ln *Listener) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.listeners[ln.name] == ln {
		delete(e.listeners, ln.name)
	}
}

// Name returns the listener's address.
func (ln *Listener) Name() string { return ln.name }

// Alias makes the listener answer at addr as well.
func (ln *Listener) Alias(addr string) error {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.closed {
		return ErrClosed
	}
	if _, ok := ln.aliases[addr]; ok {
		return nil
	}
	if err := ln.e.cfg.Router.Register(addr, ln.Handle); err != nil {
		return fmt.Errorf("channel: alias of listener %q: %w", ln.name, err)
	}
	ln.aliases[addr] = struct{}{}
	return nil
}

// Close stops answering new handshakes. Those that have begun go on.
func (ln *Listener) Close() error {
	ln.e.forget(ln)
	ln.unregister()
	return nil
}

func (ln *Listener) unregister() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.closed {
		return
	}
	ln.closed = true
	ln.e.cfg.Router.Unregister(ln.name)
	for addr := range ln.aliases {
		ln.e.cfg.Router.Unregister(addr)
	}
}

// Handle takes a message 1, as the handler registered for the listener does. It
// never blocks: what costs time is left to the endpoint's workers. Further hops
// behind the listener's own are ignored, as a stock listener does.
func (ln *Listener) Handle(in Inbound) {
	e := ln.e
	drop := e.drops.add
	msg, ret := in.Frame.Payload, in.Frame.Return
	switch {
	case in.FromHub:
		drop(DropFromHub)
		return
	case len(msg) < message1Min || len(msg) > MaxHandshakeMessage:
		drop(DropShort)
		return
	case len(ret) == 0:
		drop(DropNoRoute)
		return
	}
	h, reason, ok := ln.admit(&in, firstKey(&in))
	switch {
	case h == nil:
		drop(reason)
		return
	case !ok: // a repeat that waits for message 3
		drop(DropFirstRepeat)
		h.again()
		return
	}
	if err := e.cfg.Router.Register(h.dr, h.receive); err != nil {
		e.log.Warn("handshake address not registered", "err", err)
		h.stop()
		return
	}
	h.arm()
	e.pool.submit(h.src, func() { h.answer(msg) })
}

// admit decides, before anything costs much, whether a message 1 becomes a
// handshake: nil and a reason if not, and false with a handshake that is under
// way for the same message.
func (ln *Listener) admit(in *Inbound, key [32]byte) (h *halfOpen, why DropReason, fresh bool) {
	e := ln.e
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, DropEnded, false
	}
	if h, repeat := e.firsts.find(key, now); repeat {
		return h, DropFirstRepeat, false
	}
	src := e.sources.get(in.source(), now)
	switch {
	case !src.bucket.AllowN(now, 1):
		return nil, DropRate, false
	case src.halfOpen >= e.limits.HalfOpenPerSource:
		return nil, DropHalfOpen, false
	case src.channels >= e.limits.ChannelsPerSource && !e.evictIdleLocked(now, src):
		return nil, DropChannels, false
	case len(e.channels) >= e.limits.Channels && !e.evictChannelLocked(now, src):
		return nil, DropChannels, false
	case len(e.halfOpen) >= e.limits.HalfOpen && !e.evictHalfOpenLocked(now, src):
		return nil, DropHalfOpen, false
	}
	h = &halfOpen{
		e: e, ln: ln, src: src, key: key, begun: now,
		dr: e.cfg.hooks.address(), reply: in.Frame.Return.Clone(),
	}
	src.halfOpen++
	e.halfOpen[h] = struct{}{}
	e.firsts.add(key, h, now)
	return h, 0, true
}

// evictHalfOpenLocked ends the oldest unfinished handshake if it is old enough, or else
// the oldest of the source that has most, if that has more than src will have.
func (e *Endpoint) evictHalfOpenLocked(now time.Time, src *source) bool {
	var oldest, most *halfOpen
	for h := range e.halfOpen {
		if oldest == nil || h.begun.Before(oldest.begun) {
			oldest = h
		}
		if most == nil || h.src.halfOpen > most.src.halfOpen ||
			h.src.halfOpen == most.src.halfOpen && h.begun.Before(most.begun) {
			most = h
		}
	}
	switch {
	case oldest == nil:
		return false
	case now.Sub(oldest.begun) >= halfOpenEvict:
	case most.src.halfOpen > src.halfOpen+1:
		oldest = most
	default:
		return false
	}
	e.releaseLocked(oldest)
	e.failed.Add(1)
	e.spawnLocked(func() { oldest.stop() })
	return true
}

// evictIdleLocked ends the channel of a peer of one source that has been idle longest. A
// sealmq peer is never idle for so long: it answers pings. A stock peer that has gone
// without a word leaves its channel behind.
func (e *Endpoint) evictIdleLocked(now time.Time, of *source) bool {
	var idlest *Channel
	var since time.Time
	for c := range e.channels {
		if c.src != of {
			continue
		}
		if last := c.live.lastTime(); idlest == nil || last.Before(since) {
			idlest, since = c, last
		}
	}
	if idlest == nil || now.Sub(since) < idleEvict {
		return false
	}
	e.makeRoomLocked(idlest)
	return true
}

// ofIdentity counts the channels that peers of one identity have opened.
type ofIdentity struct{ channels int }

// share is how many channels the source, or the identity, of c has, whichever has more.
func (c *Channel) share() int { return max(c.src.channels, c.own.channels) }

// crowd remembers for a moment that nobody has many channels, so that looking for who
// has costs little when there are many first messages.
type crowd struct {
	most  int // share that the largest had
	until time.Time
}

// crowdMemory is that moment.
const crowdMemory = 100 * time.Millisecond

// evictChannelLocked makes room for a channel of src: it ends the one of all that has
// been idle longest, if that is long, or else that of the source or identity that has
// most, if it has more than src will have. So nobody keeps newcomers out.
func (e *Endpoint) evictChannelLocked(now time.Time, src *source) bool {
	if now.Before(e.crowd.until) && e.crowd.most <= src.channels+1 {
		return false
	}
	type idle struct {
		c     *Channel
		since time.Time
	}
	var idlest, most idle
	for c := range e.channels {
		if c.own == nil {
			continue // dialled from here
		}
		last := c.live.lastTime()
		if idlest.c == nil || last.Before(idlest.since) {
			idlest = idle{c, last}
		}
		if most.c == nil || c.share() > most.c.share() || c.share() == most.c.share() && last.Before(most.since) {
			most = idle{c, last}
		}
	}
	switch {
	case idlest.c == nil:
		return false
	case now.Sub(idlest.since) >= idleEvict:
		e.makeRoomLocked(idlest.c)
	case most.c.share() > src.channels+1:
		e.makeRoomLocked(most.c)
	default:
		e.crowd = crowd{most.c.share(), now.Add(crowdMemory)}
		return false
	}
	return true
}

// makeRoomLocked ends a channel for the sake of others.
func (e *Endpoint) makeRoomLocked(c *Channel) {
	e.removeLocked(c)
	e.spawnLocked(func() { c.end(fmt.Errorf("%w: made room for others", ErrClosed), byeOther) })
}

// firstKey identifies a message 1: the same bytes from the same source.
func firstKey(in *Inbound) [32]byte {
	h := sha256.New()
	buf := route.AppendRoute(make([]byte, 0, 128), in.Frame.Return)
	h.Write(append(buf, in.Source...))
	h.Write([]byte{0})
	h.Write(in.Frame.Payload)
	return [32]byte(h.Sum(nil))
}

// firsts remembers messages 1 for a while. The endpoint's lock guards it.
type firsts struct {
	byKey map[[32]byte]*halfOpen // nil: the handshake is over
	queue []firstSeen            // oldest first
}

type firstSeen struct {
	key  [32]byte
	when time.Time
}

func newFirsts() firsts { return firsts{byKey: make(map[[32]byte]*halfOpen)} }

func (f *firsts) find(key [32]byte, now time.Time) (*halfOpen, bool) {
	f.expire(now)
	h, ok := f.byKey[key]
	return h, ok
}

func (f *firsts) add(key [32]byte, h *halfOpen, now time.Time) {
	f.expire(now)
	for len(f.queue) >= maxFirsts {
		f.pop()
	}
	f.byKey[key] = h
	f.queue = append(f.queue, firstSeen{key, now})
}

// over keeps the memory of a message 1 and drops the handshake.
func (f *firsts) over(key [32]byte, h *halfOpen) {
	if f.byKey[key] == h {
		f.byKey[key] = nil
	}
}

func (f *firsts) expire(now time.Time) {
	for len(f.queue) > 0 && now.Sub(f.queue[0].when) >= firstMemory {
		f.pop()
	}
}

func (f *firsts) pop() {
	delete(f.byKey, f.queue[0].key)
	if f.queue = f.queue[1:]; len(f.queue) == 0 {
		f.queue = nil
	}
}
