package channel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/route"
)

// confirmWait is the least time that Dial gives a peer to say hello.
const confirmWait = 250 * time.Millisecond

// The mean pause before message 1 is sent again for the first time, and the longest. Each
// is twice the one before, and varied by half.
const (
	firstRepeat = time.Second
	longRepeat  = 8 * time.Second
)

// DialOptions change how Dial works. The zero value is fine.
type DialOptions struct {
	// Class is how the channel's frames are sent, for its whole life; the
	// responder answers in it. Handshake messages are always Stored.
	Class route.Class
	// Timeout bounds the wait for message 2. Default: the endpoint's limit for
	// handshakes. The context may end it earlier.
	Timeout time.Duration
	// HideCredential shows the peer no credential of ours.
	HideCredential bool
	// Lineage names the row of channels that this one continues: a sealmq peer that
	// has an earlier one of it ends that with ErrSuperseded. Of two channels of one
	// process the later dialled stays, of different processes the later to arrive.
	// The zero Lineage continues nothing.
	Lineage [16]byte
	// Repeat, unless nil, is asked whether message 1 may be sent again, byte for byte,
	// while nothing comes back: after a second, then after pauses of twice as much, up to
	// 8 s, all varied by half; the pause stays as it is while the answer is no. A sealmq
	// listener that was too busy for it, or not there yet, answers a repeat, and one that
	// has answered sends the same answer again. A stock one begins another handshake
	// each time, which nobody ends. It is called on Dial's goroutine and must not block.
	Repeat func() bool
	// NoConfirm returns as soon as message 3 is sent, without waiting for the
	// peer's hello, as a stock initiator does. A refusal then shows in
	// Channel.Err.
	NoConfirm bool
}

// dialling takes what arrives at the address of a handshake begun here.
type dialling struct {
	e       *Endpoint
	replies chan Inbound
	ch      atomic.Pointer[Channel]
}

func (d *dialling) receive(in Inbound) {
	if c := d.ch.Load(); c != nil {
		c.receive(in)
		return
	}
	select {
	case d.replies <- in:
	default:
		d.e.drops.add(DropHandshake)
	}
}

// Dial opens a channel to the listener at the end of to, for as long as ctx and
// the options allow.
//
// It returns once the peer has confirmed that it accepts us, or has been given
// the longer of 250 ms and twice the round trip of the handshake to do so: a stock
// peer never confirms, so Confirmed is then false, and the channel is usable
// unless the peer refused us.
//
// Errors: ErrTimeout (nobody answered), ErrWrongIdentity (our policy refused the
// peer), ErrUndecided (it could not judge), ErrRefused (the peer refused us),
// ErrHandshake (answers that do not verify), ErrBusy, ErrClosed, and ctx's own.
func (e *Endpoint) Dial(ctx context.Context, to route.Route, policy Policy, opts DialOptions) (*Channel, error) {
	switch {
	case len(to) == 0:
		return nil, errors.New("channel: dial: the route is empty")
	case policy == nil:
		return nil, errNoPolicy
	case opts.Timeout < 0:
		return nil, errors.New("channel: dial: the timeout is negative")
	}
	if err := e.beginDial(); err != nil {
		return nil, fmt.Errorf("channel: dial: %w", err)
	}
	defer e.endDial()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(e.ctx, func() { cancel(ErrClosed) })()
	set(&opts.Timeout, e.limits.Handshake)

	c, trip, err := e.handshake(ctx, to, policy, opts)
	if err != nil {
		if !errors.Is(err, ErrClosed) {
			e.failed.Add(1)
		}
		return nil, err
	}
	e.dialled.Add(1)
	if opts.NoConfirm {
		return c, nil
	}
	if err := c.awaitHello(ctx, max(confirmWait, 2*trip)); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (e *Endpoint) beginDial() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return ErrClosed
	case e.dials >= e.limits.Dials:
		return ErrBusy
	}
	e.dials++
	e.wg.Add(1)
	return nil
}

func (e *Endpoint) endDial() {
	e.mu.Lock()
	e.dials--
	e.mu.Unlock()
	e.wg.Done()
}

// handshake runs the initiator's side, on the caller's goroutine. trip is the
// time between message 1 and the message 2 that was good.
func (e *Endpoint) handshake(ctx context.Context, to route.Route, policy Policy, opts DialOptions) (c *Channel, trip time.Duration, err error) {
	credential, err := e.credential(opts.HideCredential)
	if err != nil {
		return nil, 0, fmt.Errorf("channel: dial: own credential: %w", err)
	}
	own, err := e.cfg.hooks.side(credential)
	if err != nil {
		return nil, 0, err
	}
	verify := newVerifier(e.cfg.Registry, policy, e.cfg.Authorities, e.cfg.Clock)
	hs := startHandshake(PhaseStart, own, verify.check, e.cfg.hooks.ephemeral)
	msg1, err := hs.Start()
	if err != nil {
		return nil, 0, err
	}
	turn := e.turns.Add(1)
	dr := e.cfg.hooks.address()
	d := &dialling{e: e, replies: make(chan Inbound, maxTries)}
	if err := e.cfg.Router.Register(dr, d.receive); err != nil {
		return nil, 0, fmt.Errorf("channel: dial: %w", err)
	}
	defer func() {
		if c == nil {
			e.cfg.Router.Unregister(dr)
		}
	}()
	timeout := time.NewTimer(opts.Timeout)
	defer timeout.Stop()
	sending, cancel := context.WithTimeoutCause(ctx, opts.Timeout, ErrTimeout)
	defer cancel()
	begun := time.Now()
	first := route.Frame{Onward: to, Return: route.To(dr), Payload: msg1}
	if err := e.cfg.Router.Send(sending, first, route.Stored); err != nil {
		return nil, 0, dialError(sending, err)
	}
	repeats := newRepeats(opts.Repeat)
	defer repeats.timer.Stop()
	var reply Inbound
	var msg3 []byte
	for msg3 == nil {
		select {
		case reply = <-d.replies:
		case <-repeats.timer.C:
			if repeats.due() {
				if err := e.cfg.Router.Send(sending, first, route.Stored); err != nil {
					return nil, 0, dialError(sending, err)
				}
			}
			continue
		case <-timeout.C:
			return nil, 0, fmt.Errorf("channel: dial: %w", errors.Join(ErrTimeout, hs.lastTry))
		case <-ctx.Done():
			return nil, 0, dialError(ctx, errors.Join(context.Cause(ctx), hs.lastTry))
		}
		trip = time.Since(begun)
		if msg3, err = e.readReply(hs, &reply); hs.Phase() == PhaseDead {
			return nil, 0, err
		}
	}
	c, err = e.opened(sending, hs, reply, channelSetup{
		initiator: true, dr: dr, remote: reply.Frame.Return.Clone(), verifier: verify,
		class: opts.Class, shown: own.shown, lineage: opts.Lineage, turn: turn,
	}, d, msg3)
	return c, trip, err
}

// repeats says when message 1 is sent again.
type repeats struct {
	may   func() bool
	pause time.Duration
	timer *time.Timer
}

func newRepeats(may func() bool) *repeats {
	r := &repeats{may: may, pause: firstRepeat}
	r.timer = time.NewTimer(r.next())
	if may == nil {
		r.timer.Stop()
	}
	return r
}

// due reports whether message 1 is to be sent now, and sets the timer.
func (r *repeats) due() bool {
	yes := r.may()
	if yes {
		r.pause = min(2*r.pause, longRepeat)
	}
	r.timer.Reset(r.next())
	return yes
}

func (r *repeats) next() time.Duration { return r.pause/2 + rand.N(r.pause) } //nolint:gosec // nobody has to guess it

// readReply tries what arrived as message 2; nil means to wait for another.
func (e *Endpoint) readReply(hs *Handshake, in *Inbound) ([]byte, error) {
	if in.FromHub || len(in.Frame.Return) == 0 {
		e.drops.add(DropNoRoute)
		return nil, nil
	}
	msg3, err := hs.ReadReply(in.Frame.Payload)
	if err != nil {
		e.drops.add(DropHandshake)
		e.log.Debug("message 2 not accepted", "err", err)
		if errors.Is(err, ErrWrongIdentity) {
			e.refused.Add(1)
		}
		return nil, err
	}
	return msg3, nil
}

// opened makes the channel, and only then sends message 3: the peer's first
// frames find it in place.
func (e *Endpoint) opened(ctx context.Context, hs *Handshake, reply Inbound, s channelSetup, d *dialling, msg3 []byte) (*Channel, error) {
	res, err := hs.Result()
	if err != nil {
		return nil, err
	}
	c := newChannel(e, res, s)
	if err := e.adopt(c, nil); err != nil {
		return nil, err
	}
	d.ch.Store(c)
	f := route.Frame{Onward: s.remote, Return: route.To(s.dr), Payload: msg3}
	if err := e.cfg.Router.Send(ctx, f, route.Stored); err != nil {
		c.release()
		c.finish(ErrClosed) // the peer knows nothing of it yet
		return nil, dialError(ctx, err)
	}
	c.graceTimer.Reset(helloAsk)
	c.greet(ctx)
	return c, nil
}

// awaitHello waits for the peer's word on whether it accepts us.
func (c *Channel) awaitHello(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-c.confirmed:
	case <-c.spoke: // whoever speaks has accepted us
	case <-c.done:
		return fmt.Errorf("channel: dial: %w", c.Err())
	case <-timer.C:
	case <-ctx.Done():
		if c.hasEnded() { // whatever ended ctx, the peer's word counts
			return fmt.Errorf("channel: dial: %w", c.Err())
		}
		return dialError(ctx, context.Cause(ctx))
	}
	return nil
}

// dialError says why a step of a dial did not happen.
func dialError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = errors.Join(cause, err)
	}
	return fmt.Errorf("channel: dial: %w", err)
}
