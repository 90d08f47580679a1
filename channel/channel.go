package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

const (
	// maxOutFrames and maxOutBytes bound the queue of what local workers send to
	// the encryptor address.
	maxOutFrames = 256
	maxOutBytes  = 4 << 20
	// keepBuffer is the largest buffer kept between two sends.
	keepBuffer = 64 << 10
	// helloGrace is how long a peer known to say hello has for it.
	helloGrace = 10 * time.Second
	// helloAsk is after how long without a hello the peer is asked for one: a single
	// frame may be lost.
	helloAsk = helloGrace / 2
)

// Channel is one end of a secure channel. All methods are safe for concurrent
// use.
type Channel struct {
	e          *Endpoint
	initiator  bool
	listener   string
	peerID     identity.Identifier
	verifier   *verifier
	dr, enc    string           // our decryptor and encryptor addresses
	lineage    [lineageLen]byte // of an initiator; zero: none
	turnNumber uint64           // of an initiator
	src        *source          // of a responder
	own        *ofIdentity      // of a responder, once adopted; guarded by the endpoint's lock, as is
	removed    bool

	peer   atomic.Pointer[Peer]
	remote atomic.Pointer[route.Route] // never written through
	class  atomic.Uint32
	ctx    context.Context // ends with the channel, for what is sent on its own account
	cancel context.CancelFunc
	asked  bool // for a hello that is late; for missHello
	drops  drops
	sent   atomic.Uint64
	rcvd   atomic.Uint64
	given  atomic.Uint64
	lost   atomic.Uint64
	live   liveness

	// turn is held by whoever takes a nonce and sends the frame, so that frames
	// leave in nonce order. What follows belongs to the holder.
	turn   chan struct{}
	sealer *Sealer
	buf    []byte
	parked []byte // a sealed frame that the router had no room for in time
	burnt  int    // nonces in a row that the router refused to carry
	shown  []byte // the credential that the peer has seen last

	rx          sync.Mutex // guards what follows
	opener      *Opener
	order       order
	hand        func(*orderItem)
	lastNonce   uint64 // of the frame whose return route is in use
	classKnown  bool
	spoken      bool // something was handed on
	gapChecking bool
	gapLimit    *rate.Limiter
	refreshes   *rate.Limiter
	refreshing  bool
	refreshNext *message

	orderTimer *time.Timer
	graceTimer *time.Timer
	renewTimer *time.Timer
	life       atomic.Pointer[lifetime] // of the credential that the peer has seen last
	spoke      chan struct{}            // closed once something was handed on
	confirmed  chan struct{}            // closed once the peer has said hello
	greeting   atomic.Pointer[hello]

	outMu      sync.Mutex // guards what follows
	out        []outgoing
	outBytes   int
	outControl [helloBye + 1]bool // pings and pongs to send
	outRunning bool

	endMu sync.Mutex
	err   error
	done  chan struct{}
}

// outgoing is one plaintext to send.
type outgoing struct {
	plain       []byte // whole plaintext, or nil for a Payload of what follows
	onward, ret route.Route
	payload     []byte
	unanswered  bool // nothing has to come back for it
}

func (o *outgoing) len() int {
	if o.plain != nil {
		return len(o.plain)
	}
	return payloadLen(o.onward, o.ret, o.payload)
}

func (o *outgoing) append(dst []byte) []byte {
	if o.plain != nil {
		return append(dst, o.plain...)
	}
	return appendPayload(dst, o.onward, o.ret, o.payload)
}

type channelSetup struct {
	initiator bool
	listener  string
	dr        string
	remote    route.Route
	src       *source
	verifier  *verifier
	class     route.Class
	shown     []byte
	lineage   [lineageLen]byte
	turn      uint64
}

// newChannel makes a channel whose turn is taken: its hello goes first.
func newChannel(e *Endpoint, res Result, s channelSetup) *Channel {
	c := &Channel{
		e: e, initiator: s.initiator, listener: s.listener, peerID: res.Peer.Identifier,
		lineage: s.lineage, turnNumber: s.turn,
		verifier: s.verifier, dr: s.dr, enc: e.cfg.hooks.address(), src: s.src,
		turn: make(chan struct{}, 1), sealer: res.Sealer, opener: res.Opener, shown: s.shown,
		gapLimit: rate.NewLimiter(2, 2), refreshes: rate.NewLimiter(1, 4),
		spoke: make(chan struct{}), confirmed: make(chan struct{}), done: make(chan struct{}),
	}
	c.ctx, c.cancel = context.WithCancel(e.ctx)
	c.turn <- struct{}{}
	c.drops.parent = &e.drops
	peer := res.Peer.clone()
	c.peer.Store(&peer)
	c.remote.Store(&s.remote)
	c.class.Store(uint32(s.class))
	c.hand = c.handOn
	c.live.born = time.Now()
	c.live.last.Store(1)
	c.live.timer = e.idleTimer(func() { c.live.check(c) })
	c.orderTimer = e.idleTimer(c.expireHeld)
	c.graceTimer = e.idleTimer(c.missHello)
	c.renewTimer = e.idleTimer(c.renew)
	return c
}

// idleTimer makes a timer that waits for its first Reset.
func (e *Endpoint) idleTimer(f func()) *time.Timer {
	t := e.after(time.Hour, f)
	t.Stop()
	return t
}

// adopt registers a new channel; h is the handshake it comes from, or nil.
func (e *Endpoint) adopt(c *Channel, h *halfOpen) error {
	register := e.cfg.Router.Register
	if r, ok := e.cfg.Router.(LocalRouter); ok {
		register = r.RegisterLocal
	}
	if err := register(c.enc, c.forward); err != nil {
		c.cancel()
		return fmt.Errorf("channel: encryptor address: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		c.cancel()
		e.cfg.Router.Unregister(c.enc)
		return ErrClosed
	}
	e.channels[c] = struct{}{}
	e.encryptors[c.enc] = c
	if h != nil {
		e.releaseLocked(h)
		c.src.channels++
		if c.own = e.identities[c.peerID]; c.own == nil {
			c.own = &ofIdentity{}
			e.identities[c.peerID] = c.own
		}
		c.own.channels++
	}
	return nil
}

// removeLocked takes a channel out of the endpoint.
func (e *Endpoint) removeLocked(c *Channel) {
	if c.removed {
		return
	}
	c.removed = true
	delete(e.channels, c)
	delete(e.encryptors, c.enc)
	if c.own != nil {
		c.src.channels--
		if c.own.channels--; c.own.channels == 0 {
			delete(e.identities, c.peerID)
		}
	}
}

// start sends the hello and gives the turn free.
func (c *Channel) start() {
	c.graceTimer.Reset(helloAsk)
	c.e.spawn(func() {
		ctx, cancel := context.WithTimeout(c.ctx, sendWait)
		defer cancel()
		c.greet(ctx)
	})
}

// greet sends the hello; the turn is held when it is called and free afterwards.
func (c *Channel) greet(ctx context.Context) {
	defer c.release()
	c.watchCredential(c.shown)
	if c.e.cfg.hooks.noHello {
		return
	}
	if err := c.transmit(ctx, c.helloMessage(helloGreeting, 0)); err != nil {
		c.e.log.Debug("hello not sent", "peer", c.peerID, "err", err)
	}
}

func (c *Channel) helloMessage(kind helloKind, reason byeReason) outgoing {
	h := hello{
		Version: helloVersion, Epoch: c.e.epoch[:], Features: c.e.cfg.HelloFeatures, Kind: kind, Reason: reason,
	}
	if c.lineage != [lineageLen]byte{} { // in each, since the first may be lost
		h.Lineage, h.Turn = c.lineage[:], c.turnNumber
	}
	return outgoing{onward: route.To(HelloAddress), payload: h.encode(), unanswered: kind != helloPing}
}

// Peer returns who is at the other end. The credentials are those shown last.
func (c *Channel) Peer() Peer { return c.peer.Load().clone() }

// Listener returns the name of the listener that the peer dialled; empty when
// the channel was dialled from here.
func (c *Channel) Listener() string { return c.listener }

// Initiator reports whether the channel was dialled from here.
func (c *Channel) Initiator() bool { return c.initiator }

// EncryptorAddress returns the local address that sends what reaches it through
// the channel. It stands first in the return route of everything delivered.
func (c *Channel) EncryptorAddress() string { return c.enc }

// DecryptorAddress returns the local address that the peer's frames come to.
func (c *Channel) DecryptorAddress() string { return c.dr }

// Confirmed reports whether the peer has said hello: it is a sealmq peer and has
// accepted us. A stock peer never does.
func (c *Channel) Confirmed() bool { return c.greeting.Load() != nil }

// Greeted is closed once the peer has said hello, see Confirmed.
func (c *Channel) Greeted() <-chan struct{} { return c.confirmed }

// HelloExpected reports whether the peer has said hello in an earlier channel. As
// long as this one is not Confirmed its hello is late, or somebody keeps it back.
func (c *Channel) HelloExpected() bool { return c.e.hasSaidHello(c.peerID) }

// Features returns what the peer announced; 0 until it has said hello.
func (c *Channel) Features() Features {
	if h := c.greeting.Load(); h != nil {
		return h.Features
	}
	return 0
}

// PeerEpoch returns what tells one start of the peer's process from another, and
// false until it has said hello.
func (c *Channel) PeerEpoch() (epoch [16]byte, ok bool) {
	if h := c.greeting.Load(); h != nil {
		return [16]byte(h.Epoch), true
	}
	return epoch, false
}

// Class returns how the channel's frames are sent. A responder takes the class
// of the first frame it gets.
func (c *Channel) Class() route.Class { return route.Class(c.class.Load()) }

// RemoteRoute returns the route that frames take to the peer.
func (c *Channel) RemoteRoute() route.Route { return c.remote.Load().Clone() }

// UpdateRoute sends frames over another route from now on: via, then the peer's
// own address. For initiators, whose peer has a new hub address; a responder
// follows its initiator by itself (spec secure-channel 12).
func (c *Channel) UpdateRoute(via route.Route) {
	last, _ := c.remote.Load().Last()
	r := via.Append(last)
	c.remote.Store(&r)
}

// Done is closed when the channel has ended.
func (c *Channel) Done() <-chan struct{} { return c.done }

// Err returns why the channel has ended: ErrClosed, ErrPeerClosed, ErrRefused,
// ErrGap, ErrSilent, ErrSuperseded or ErrNonceExhausted. nil while it lives.
func (c *Channel) Err() error {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	return c.err
}

func (c *Channel) hasEnded() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Stats returns the counters of the channel.
func (c *Channel) Stats() ChannelStats {
	return ChannelStats{
		Sent: c.sent.Load(), Received: c.rcvd.Load(), Delivered: c.given.Load(), Skipped: c.lost.Load(),
		Dropped: c.drops.load(),
	}
}

// Send encrypts one message for the peer and gives it to the router. onward is
// the way inside the peer's node, ret the way back to here without the
// encryptor's address; both travel encrypted. payload is copied.
//
// Messages of concurrent calls leave one after the other. When ctx ends while
// Send waits for its turn, nothing was sent. When it ends while the router has no
// room, the error wraps ctx's too, and the message goes out before the next one
// all the same: leaving out its nonce would cost the peer, and using it again
// would break the cipher.
func (c *Channel) Send(ctx context.Context, onward, ret route.Route, payload []byte) error {
	return c.sendTurn(ctx, outgoing{onward: onward, ret: ret, payload: payload})
}

func (c *Channel) sendTurn(ctx context.Context, o outgoing) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	return c.transmit(ctx, o)
}

// acquire waits for the turn.
func (c *Channel) acquire(ctx context.Context) error {
	if c.hasEnded() {
		return c.sendError(c.Err())
	}
	select {
	case c.turn <- struct{}{}:
	default:
		select {
		case c.turn <- struct{}{}:
		case <-ctx.Done():
			return c.sendError(context.Cause(ctx))
		case <-c.done:
			return c.sendError(c.Err())
		}
	}
	if c.hasEnded() {
		c.release()
		return c.sendError(c.Err())
	}
	return nil
}

func (c *Channel) release() { <-c.turn }

func (c *Channel) sendError(err error) error { return fmt.Errorf("channel: send: %w", err) }

// transmit seals and sends. The caller holds the turn.
func (c *Channel) transmit(ctx context.Context, o outgoing) error {
	if c.parked != nil {
		err := c.carry(ctx, c.parked)
		if err != nil && ctx.Err() != nil {
			return c.sendError(err)
		}
		if c.parked = nil; err != nil { // it will never be carried: go on without it
			c.refusedFrame(err)
			return c.sendError(err)
		}
	}
	remote := *c.remote.Load()
	size := o.len()
	// Onward, return, payload and null, each with its head.
	if body := 3 + routeLen(remote) + 5 + Overhead + size; int64(body) > c.e.frameLimit.Load() {
		return fmt.Errorf("%w: %d bytes with routes, %d are allowed", ErrTooLarge, body, c.e.frameLimit.Load())
	}
	var room [nonceLen]byte
	buf := append(slices.Grow(c.buf[:0], Overhead+size), room[:]...)
	buf = o.append(buf)
	frame, err := c.sealer.Seal(buf[:0], buf[nonceLen:])
	if err != nil {
		c.end(err, byeOther)
		return c.sendError(err)
	}
	if c.buf = frame[:0]; cap(frame) > keepBuffer {
		c.buf = nil
	}
	if err := c.carry(ctx, frame); err != nil {
		c.notCarried(ctx, frame, err)
		return c.sendError(err)
	}
	c.burnt = 0
	if !o.unanswered {
		c.live.sent(c)
	}
	return nil
}

// carry gives a sealed frame to the router. The outer return route is empty at
// its origin (spec secure-channel 12).
func (c *Channel) carry(ctx context.Context, frame []byte) error {
	f := route.Frame{Onward: *c.remote.Load(), Payload: frame}
	if err := c.e.cfg.Router.Send(ctx, f, c.Class()); err != nil {
		return err
	}
	c.sent.Add(1)
	return nil
}

// notCarried sees to a frame that has a nonce and was not sent.
func (c *Channel) notCarried(ctx context.Context, frame []byte, err error) {
	if ctx.Err() != nil {
		c.parked = bytes.Clone(frame) // the buffer is used again
		return
	}
	c.refusedFrame(err)
}

// refusedFrame counts a nonce that the peer will never see. As many in a row as
// the window holds end the channel.
func (c *Channel) refusedFrame(err error) {
	c.drops.add(DropUnsent)
	if c.burnt++; c.burnt >= Window {
		c.e.gaps.Add(1)
		c.end(fmt.Errorf("%w: the router refused %d frames: %w", ErrGap, c.burnt, err), byeGap)
	}
}

// forward is the worker at the encryptor address: what reaches it goes to the
// peer. It never blocks; when too much waits, the newest is dropped.
func (c *Channel) forward(in Inbound) {
	first, ok := in.Frame.Onward.First()
	if !ok || !first.IsLocal() || first.Value != c.enc {
		c.drops.add(DropNoRoute)
		return
	}
	c.queue(outgoing{onward: in.Frame.Onward.Rest(), ret: in.Frame.Return, payload: in.Frame.Payload})
}

func (c *Channel) queue(o outgoing) {
	if c.hasEnded() {
		c.drops.add(DropEnded)
		return
	}
	c.outMu.Lock()
	defer c.outMu.Unlock()
	size := o.len()
	if len(c.out) >= maxOutFrames || (c.outBytes > 0 && c.outBytes+size > maxOutBytes) {
		c.drops.add(DropQueue)
		return
	}
	c.out = append(c.out, o)
	c.outBytes += size
	c.wakeOutLocked()
}

// control sends a ping or pong soon; several of one kind become one.
func (c *Channel) control(kind helloKind) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	c.outControl[kind] = true
	c.wakeOutLocked()
}

func (c *Channel) wakeOutLocked() {
	if !c.outRunning {
		c.outRunning = true
		c.e.spawn(c.runOut)
	}
}

// runOut sends what is queued and ends when there is nothing left, or the channel ends:
// a frame that waits for room then gives the turn to the Close.
func (c *Channel) runOut() {
	for {
		o, ok := c.nextOut()
		if !ok {
			return
		}
		if err := c.sendTurn(c.ctx, o); err != nil && !c.hasEnded() {
			c.e.log.Debug("queued message not sent", "peer", c.peerID, "err", err)
		}
	}
}

func (c *Channel) nextOut() (o outgoing, ok bool) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	if c.hasEnded() {
		for range c.out {
			c.drops.add(DropEnded)
		}
		c.out, c.outRunning = nil, false
		return o, false
	}
	for kind := range c.outControl {
		if c.outControl[kind] {
			c.outControl[kind] = false
			return c.helloMessage(helloKind(kind), 0), true
		}
	}
	if len(c.out) == 0 {
		c.out, c.outRunning = nil, false
		return o, false
	}
	o = c.out[0]
	c.out[0] = outgoing{}
	c.out = c.out[1:]
	c.outBytes -= o.len()
	return o, true
}

// RefreshCredentials shows the peer another credential of ours, with our current
// change history. The one it has seen last is not sent again. Where Config.Credential
// has a newer one before it ends, that is done by itself.
func (c *Channel) RefreshCredentials(ctx context.Context, credential []byte) error {
	if _, err := identity.InspectCredential(credential); err != nil {
		return fmt.Errorf("channel: refresh: %w", err)
	}
	if c.e.cfg.Identity == nil {
		return errors.New("channel: refresh: the endpoint has no identity of its own")
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	if bytes.Equal(credential, c.shown) {
		return nil
	}
	history := c.e.cfg.Identity.Identity().ChangeHistory()
	if err := c.transmit(ctx, outgoing{plain: appendRefresh(nil, history, credential)}); err != nil {
		return err
	}
	c.shown = bytes.Clone(credential)
	c.watchCredential(c.shown)
	return nil
}

// Close ends the channel and tells the peer; it waits up to two seconds for the
// router to take that frame. It is fine to close a channel that has ended.
func (c *Channel) Close() error {
	if c.finish(ErrClosed) {
		c.sayClose(byeOther)
	}
	return nil
}

// end ends the channel for a reason of ours and tells the peer in the
// background.
func (c *Channel) end(err error, why byeReason) {
	if c.finish(err) {
		c.e.spawn(func() { c.sayClose(why) })
	}
}

// finish makes the channel end, without a word to the peer; false when it had
// ended.
func (c *Channel) finish(err error) bool {
	c.endMu.Lock()
	if c.err != nil {
		c.endMu.Unlock()
		return false
	}
	c.err = err
	close(c.done)
	c.endMu.Unlock()
	c.cancel()
	for _, t := range []*time.Timer{c.orderTimer, c.graceTimer, c.renewTimer, c.live.timer} {
		t.Stop()
	}
	c.e.cfg.Router.Unregister(c.dr)
	c.e.cfg.Router.Unregister(c.enc)
	c.e.mu.Lock()
	c.e.removeLocked(c)
	c.e.mu.Unlock()
	c.e.spawn(c.dropHeld) // on its own: the caller may be handing on
	return true
}

// sayClose sends the Close, and before it, to a sealmq peer, the reason.
func (c *Channel) sayClose(why byeReason) {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer c.release()
	if why != byeOther && c.Confirmed() {
		_ = c.transmit(ctx, c.helloMessage(helloBye, why))
	}
	if err := c.transmit(ctx, outgoing{plain: closePlaintext}); err != nil {
		c.e.log.Debug("close not sent", "peer", c.peerID, "err", err)
	}
}
