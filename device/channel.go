package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Making a channel again: the first pause, the longest mean pause, and the time
// for one attempt.
const (
	firstRedial = 250 * time.Millisecond
	longRedial  = 10 * time.Second
	redialTime  = 30 * time.Second
	// stockRedialTime is redialTime where no hub says that nobody has an address: the
	// peer may be about to take it again.
	stockRedialTime = 5 * time.Second
)

// errPathGone is why a channel is made again whose frames cannot arrive any more.
var errPathGone = errors.New("device: the way to the peer is gone")

// DialOption changes how Dial works and what the channel does later.
type DialOption func(*dialOptions)

type dialOptions struct {
	channel   channel.DialOptions
	noWait    bool
	noHeal    bool
	onWaiting func()
	through   *Channel
	ours      bool // the peer is known to be one of sealmq
}

// NoWait makes Dial fail with ErrPeerOffline as soon as the hub says that the peer
// is offline, instead of waiting up to 10 s for it to come.
func NoWait() DialOption { return func(o *dialOptions) { o.noWait = true } }

// OnWaiting has fn called when the hub says that the peer is offline and that it
// waits for it. fn must not block.
func OnWaiting(fn func()) DialOption { return func(o *dialOptions) { o.onWaiting = fn } }

// Transient sends the channel's frames with QoS 0, both ways: cheaper, and lost
// with a connection. For traffic that has its own recovery.
func Transient() DialOption { return func(o *dialOptions) { o.channel.Class = route.Transient } }

// NoConfirm makes Dial return once the last handshake message is sent, without
// waiting for the peer to say that it accepts us. A refusal shows in Channel.Err.
func NoConfirm() DialOption { return func(o *dialOptions) { o.channel.NoConfirm = true } }

// NoHeal makes a channel end when it breaks, instead of being made again.
func NoHeal() DialOption { return func(o *dialOptions) { o.noHeal = true } }

// ShowNoCredential shows the peer none of our credentials.
func ShowNoCredential() DialOption { return func(o *dialOptions) { o.channel.HideCredential = true } }

// DialThrough dials through another channel that this node has dialled: the route begins
// at that channel's peer. Through one to the hub's own listener ("api") a device reaches
// the forwarders of a hub that keeps them from plain TCP peers. The channel is made again
// whenever the one that it goes through is, and ends with it.
func DialThrough(ch *Channel) DialOption { return func(o *dialOptions) { o.through = ch } }

// Channel is a secure channel to a peer that this node dialled. When it breaks
// (frames lost beyond repair, a peer that restarted or fell silent), it is made
// again with the same peer, with back-off and jitter, until that works, the peer
// refuses, or Close; what is sent meanwhile waits. Messages that were under way
// when it broke may be lost.
//
// A peer that closes it ends it. Once Deliver has been used it is only at rest then,
// because the peer's next process may be there soon: it is made again for what waits
// to be delivered, and until then Send and Request fail with ErrPeerClosed.
//
// All methods are safe for concurrent use.
type Channel struct {
	n      *Node
	to     route.Route
	policy channel.Policy
	opts   dialOptions
	mend   context.Context // ends with the channel
	cancel context.CancelFunc
	done   chan struct{} // closed when the channel has ended

	who     identity.Identifier // of a channel that is made on demand
	persist bool                // is made again whatever ended it, when an outbox wants it
	want    chan struct{}       // an outbox has something; for wanted

	confirmed atomic.Bool // the peer is known to acknowledge messages
	unknown   time.Time   // since when the hub has known nobody at the address; for watch
	missed    bool        // and the program knows; for watch
	mistaken  bool        // the program knows that somebody else is there; for watch

	// Guarded by deliveries.mu.
	streams map[string]*stream // outboxes, by address of the peer
	pipe    *pipe              // of the present channel; nil: none
	epoch   [16]byte           // of the peer behind it

	gone chan struct{} // the hub has said that the way to the peer is gone; room for one

	mu      sync.Mutex
	cur     *channel.Channel // guarded by mu; nil before the first one
	over    uint64           // guarded by mu: what cur was dialled over, see Node.under
	healing bool             // guarded by mu: cur is broken and another one is on its way
	resting bool             // guarded by mu: and is not, unless an outbox wants it: others don't wait for it
	changed chan struct{}    // guarded by mu: closed and replaced when any of these change
	err     error            // guarded by mu: why it ended
	restart uint64           // guarded by mu: times it was made again
	remade  chan struct{}    // guarded by mu: closed and replaced when it was made again
	lost    losses           // guarded by mu: for the next Flush
	failed  error            // guarded by mu: why the last attempt to make it again failed, until one works
}

// Dial opens a secure channel to the listener at the end of a route. A forwarding
// address alone is a complete route to a sealmq peer's listener; towards a stock
// Ockam peer name the listener too, "FWD_…=>listener". policy says who may be at
// the other end.
//
// Without NoWait an offline peer is waited for as long as the hub does, 10 s. One that
// is there and does not answer, because its program is just starting or has too many
// callers, is asked again until ctx or Config.ChannelLimits.Handshake (30 s) ends, unless
// it may be a stock one: where the route names a listener. ctx bounds the whole.
//
// Errors: ErrUnknownAddress and ErrPeerOffline as soon as the hub says so, or once
// ctx ends while the hub waits for the peer; ErrPeerRefused, ErrWrongIdentity,
// channel.ErrUndecided, ErrTimeout, ErrBusy, that of ctx, or what stopped the node.
func (n *Node) Dial(ctx context.Context, to route.Route, policy channel.Policy, opts ...DialOption) (*Channel, error) {
	switch {
	case len(to) == 0:
		return nil, errors.New("device: dial: the route is empty")
	case policy == nil:
		return nil, errors.New("device: dial: no trust policy given: pass channel.TrustEveryone to accept any identity")
	}
	if err := n.checkRoutes(to); err != nil {
		return nil, err
	}
	c := &Channel{
		n: n, to: to.Clone(), policy: policy,
		want: make(chan struct{}, 1), gone: make(chan struct{}, 1),
		done: make(chan struct{}), changed: make(chan struct{}), remade: make(chan struct{}),
	}
	for _, opt := range opts {
		opt(&c.opts)
	}
	c.opts.channel.Lineage = n.takeLineage(c.to)
	over := n.under(&c.opts)
	cur, err := n.dialOwner(ctx, c.to, policy, &c.opts)
	if err != nil {
		n.freeLineage(c.opts.channel.Lineage)
		return nil, err
	}
	c.cur, c.over = cur, over
	c.mend, c.cancel = context.WithCancel(context.Background())
	n.mu.Lock()
	closed := n.closed
	if !closed {
		n.channels[c] = struct{}{}
		n.tasks.Go(c.watch)
	}
	n.mu.Unlock()
	if closed {
		_ = cur.Close()
		return nil, ErrClosed
	}
	return c, nil
}

// dial makes one attempt.
func (n *Node) dial(ctx context.Context, to route.Route, policy channel.Policy, opts *dialOptions) (*channel.Channel, error) {
	if err := n.Err(); err != nil {
		return nil, err
	}
	ctx, leave := n.join(ctx)
	defer leave(nil)
	ctx, call := n.calls.begin(ctx, opts.noWait, opts.onWaiting)
	defer call.end()
	asked, confirmed := to, n.link.ours
	if opts.through != nil {
		outer, err := opts.through.present(ctx)
		if err != nil {
			return nil, err
		}
		confirmed = outer.Confirmed
		to = route.To(outer.EncryptorAddress()).Append(to...)
		var unhook func()
		ctx, unhook = opts.through.untilEnd(ctx)
		defer unhook()
	}
	acks := !n.overStream && opts.through == nil
	handshake := opts.channel
	handshake.Repeat = func() bool { return call.mayRepeat(opts.ours || len(asked) == 1 && confirmed(), acks) }
	cur, err := n.endpoint.Dial(ctx, to, policy, handshake)
	if err == nil {
		return cur, nil
	}
	call.abandon()
	cause := context.Cause(ctx)
	waited, waiting := call.waiting(acks)
	late := errors.Is(err, channel.ErrTimeout) && cause == nil || errors.Is(cause, context.DeadlineExceeded)
	switch {
	case n.Err() != nil:
		return nil, n.Err()
	case errors.Is(err, channel.ErrRefused): // who has said so leaves, which the hub then says
		return nil, callError("dialling", to, ErrPeerRefused, "its trust policy does not accept "+n.Identifier().String())
	case errors.Is(cause, ErrUnknownAddress):
		return nil, callError("dialling", to, cause, "ask the peer for its present forwarding address")
	case errors.Is(cause, ErrPeerOffline):
		return nil, callError("dialling", to, cause, "it is not connected to the hub; try again when it is")
	case errors.Is(err, channel.ErrWrongIdentity):
		return nil, &wrongIdentityError{to: to, err: err}
	case errors.Is(err, channel.ErrBusy):
		return nil, fmt.Errorf("%w: %w; Config.ChannelLimits.Dials bounds what this device dials at once", ErrBusy, err)
	case late && waiting:
		return nil, callError("dialling", to, ErrPeerOffline, "it did not connect to the hub in time; try again when it is there")
	case late && (errors.Is(err, identity.ErrOlder) || errors.Is(err, identity.ErrConflict)):
		// Whoever is in between can send a public history that is older, too.
		return nil, callError("no answer to the handshake through", to, ErrTimeout,
			"an answer came, with a change history that an identity seen before has rotated away or contradicts; it was not accepted")
	case late && waited:
		return nil, callError("no answer to the handshake through", to, ErrTimeout,
			"the peer was offline when it was dialled, and the hub has not said that it stayed so: "+silentListener(asked))
	case late:
		return nil, callError("no answer to the handshake through", to, ErrTimeout, n.silenceHint(asked))
	case errors.Is(cause, context.Canceled):
		return nil, ctxError(ctx, fmt.Sprintf("dialling %s", to))
	case cause != nil:
		return nil, callError("dialling", to, cause, "")
	default:
		return nil, fmt.Errorf("device: dialling %s: %w", to, err)
	}
}

// mayRepeat reports whether a first message may be sent again. The one before must have
// reached the peer, or be lost: none lies in this device's outbox, which may have no
// connection, and none waits at the hub, for a peer that is offline or takes nothing. And
// the peer must be one of sealmq (ours), which takes a repeat for what it is: one that the
// hub has waited for is, since that is a device on MQTT.
func (c *call) mayRepeat(ours, acks bool) bool {
	waited, waiting := c.waiting(acks)
	return (ours || waited) && !waiting && c.unsettled.Load() == 0
}

// watch makes the channel again whenever it breaks. It is the only one to end the
// present channel.
func (c *Channel) watch() {
	defer c.finish()
	for {
		c.mu.Lock()
		cur, over := c.cur, c.over
		c.mu.Unlock()
		if cur == nil {
			if !c.redial(true) {
				return
			}
			if c.missed || c.mistaken {
				c.n.events.emit(Event{Kind: EventChannelRestored, Channel: c})
			}
			continue
		}
		c.n.deliveries.follow(c, cur)
		var why error
		select {
		case <-cur.Done():
			why = cur.Err()
		case <-c.moved(over):
			why = errPathGone
		case <-c.gone:
			why = errPathGone
		case <-c.outerDone():
			_ = cur.Close()
			c.end(c.opts.through.Err())
			return
		case <-c.mend.Done():
			c.n.deliveries.farewell(c, cur)
			_ = cur.Close()
			return
		case <-c.n.stopped.Done():
			c.end(c.n.Err())
			return
		}
		_ = cur.Close() // of a path that is gone
		if c.mend.Err() != nil {
			return
		}
		rests := c.confirmed.Load() && errors.Is(why, channel.ErrPeerClosed)
		if !c.persist && (c.opts.noHeal || !heals(why) && !rests) {
			c.end(channelError(why))
			return
		}
		c.update(func() { c.healing, c.resting = true, rests })
		c.n.log.Info("channel broke; making it again", "peer", c.Peer().Identifier, "err", why, "when_wanted", rests || c.persist)
		c.n.events.emit(Event{Kind: EventChannelLost, Channel: c, Err: why})
		if !c.redial(rests || c.persist) {
			return
		}
		c.n.events.emit(Event{Kind: EventChannelRestored, Channel: c})
		c.n.reregister(c)
	}
}

// heals reports whether a channel that ended for that reason is made again: when
// nobody wanted it to end.
func heals(err error) bool {
	return errors.Is(err, channel.ErrGap) || errors.Is(err, channel.ErrSilent) || errors.Is(err, channel.ErrNonceExhausted) ||
		errors.Is(err, errPathGone)
}

// outerDone is closed when the channel that this one goes through has ended.
func (c *Channel) outerDone() <-chan struct{} {
	if c.opts.through == nil {
		return nil
	}
	return c.opts.through.done
}

// under returns the number of what a channel is dialled over: of the connection to the
// hub, or of the channel that it goes through.
func (n *Node) under(opts *dialOptions) uint64 {
	if opts.through != nil {
		return opts.through.Restarts()
	}
	return n.link.connects.Load()
}

// moved returns what is closed once the channel that this one goes through was made
// again since, or the node has another connection to its hub than the one with that
// number, where that ends the channel's path: on TCP this node's hub address is
// another one then, and nothing links it with the peer's (spec routing 7.4). Over
// MQTT nothing changes: nil.
func (c *Channel) moved(over uint64) <-chan struct{} {
	n := c.n
	if t := c.opts.through; t != nil && !c.opts.noHeal {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.restart == over {
			return t.remade
		}
		return closedChan
	}
	if !n.overStream || c.opts.noHeal || n.leadsInside(c.to) {
		return nil
	}
	n.mu.Lock()
	online := n.online
	n.mu.Unlock()
	if n.link.connects.Load() > max(over, 1) {
		return closedChan
	}
	return online
}

var closedChan = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// leadsInside reports whether a route leads through a channel of this node.
func (n *Node) leadsInside(to route.Route) bool {
	return slices.ContainsFunc(n.endpoint.Channels(), func(ch *channel.Channel) bool {
		return to[0] == route.Local(ch.EncryptorAddress())
	})
}

// pathGone takes the hub's word that nobody has an address. A peer that answers pings
// shows itself whether that is so: it is asked where the address is that of a TCP
// connection, which never comes back, as a device's on MQTT does. A stock peer is not
// asked.
func (n *Node) pathGone(hop route.Address) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.channels {
		c.mu.Lock()
		cur := c.cur
		c.mu.Unlock()
		if cur == nil || c.opts.noHeal {
			continue
		}
		first, ok := cur.RemoteRoute().First()
		switch {
		case !ok || first != hop:
		case !cur.Confirmed() && !cur.HelloExpected():
			select {
			case c.gone <- struct{}{}:
			default:
			}
		case isConnection(hop.Value):
			cur.Suspect()
		}
	}
}

// channelError is the error of this package for the end of a channel.
func channelError(err error) error {
	switch {
	case errors.Is(err, channel.ErrRefused):
		return fmt.Errorf("%w: %w", ErrPeerRefused, err)
	case errors.Is(err, channel.ErrPeerClosed):
		return ErrPeerClosed
	case errors.Is(err, channel.ErrClosed):
		return ErrClosed
	default:
		return fmt.Errorf("device: %w", err)
	}
}

// redial tries until a channel with the same peer stands; false when the end has
// come. With onDemand it does so only while an outbox has something.
func (c *Channel) redial(onDemand bool) bool {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval = firstRedial, longRedial
	pauses.Multiplier, pauses.RandomizationFactor = 2, 0.5
	c.unknown, c.missed, c.mistaken = time.Time{}, false, false
	who := c.Peer().Identifier
	policy := channel.And(channel.TrustIdentifiers(who), c.policy)
	opts := c.opts
	opts.onWaiting, opts.ours = nil, c.confirmed.Load()
	for {
		if onDemand && !c.wanted() {
			return false
		}
		if !c.awaitOnline(pauses) {
			return false
		}
		timer := time.NewTimer(pauses.NextBackOff())
		select {
		case <-timer.C:
		case <-c.mend.Done():
			timer.Stop()
			return false
		case <-c.outerDone():
			timer.Stop()
			c.end(c.opts.through.Err())
			return false
		case <-c.n.stopped.Done():
			timer.Stop()
			c.end(c.n.Err())
			return false
		}
		if c.n.State() != Online {
			continue
		}
		limit := redialTime
		if c.n.link.stock.Load() || opts.through != nil {
			limit = stockRedialTime
		}
		select {
		case c.n.redials <- struct{}{}:
		case <-c.mend.Done():
			return false
		case <-c.n.stopped.Done():
			continue
		}
		over := c.n.under(&opts)
		ctx, cancel := context.WithTimeout(c.mend, limit)
		cur, err := c.n.dialAgain(ctx, c.to, policy, opts)
		cancel()
		<-c.n.redials
		switch {
		case err == nil:
			select {
			case <-c.gone: // of the one before
			default:
			}
			c.update(func() {
				c.cur, c.over, c.healing, c.resting, c.failed = cur, over, false, false, nil
				c.restart++
				close(c.remade)
				c.remade = make(chan struct{})
			})
			return true
		case errors.Is(err, ErrPeerRefused) && !c.persist:
			c.end(err)
			return false
		case errors.Is(err, ErrPeerRefused):
			c.n.deliveries.refuse(c, err)
		case opts.through != nil && opts.through.Err() != nil:
			c.end(opts.through.Err())
			return false
		}
		// A wrong identity is no reason to stop: whoever carries our frames can make
		// it appear, and must not be able to end the channel.
		c.n.log.Debug("channel not yet made again", "peer", who, "err", err)
		if c.mend.Err() == nil {
			c.mu.Lock()
			c.failed = err
			c.mu.Unlock()
		}
		c.miss(err)
	}
}

// maxWaits bounds the first messages of attempts to make channels again that wait at the
// hub for peers which are offline: each has a place in the window of what the hub has not
// acknowledged, which others need.
const maxWaits = 32

// redialShares returns how many attempts that no call waits for may go on at once, so that
// they leave the calls half of what may be dialled, and how many of those may wait at the hub.
func redialShares(l channel.Limits) (all, waits int) {
	dials := l.Dials
	if dials <= 0 { // what cannot be is refused elsewhere
		dials = channel.DefaultDials
	}
	all = max(dials/2, 1)
	return all, min(maxWaits, all/2)
}

// dialAgain is dial for an attempt that no call waits for. Where too many such attempts
// wait for their peers already, the hub is asked first whether this one is there.
func (n *Node) dialAgain(ctx context.Context, to route.Route, policy channel.Policy, opts dialOptions) (*channel.Channel, error) {
	select {
	case n.waits <- struct{}{}:
		defer func() { <-n.waits }()
		opts.noWait = false // the program has said so for its own call
		return n.dial(ctx, to, policy, &opts)
	default:
	}
	opts.noWait = true
	if address, ok := forwarding(to); ok && opts.through == nil && n.link.ours() {
		looking, cancel := context.WithTimeout(ctx, lookupTime)
		r, err := n.record(looking, (&hubproto.LookupRequest{Address: address}).Marshal, lookupService)
		cancel()
		if err == nil && r != nil && !r.Online {
			return nil, callError("dialling", to, ErrPeerOffline, "it is not connected to the hub")
		}
	}
	return n.dial(ctx, to, policy, &opts)
}

// because adds to what ended a wait why the channel is not there, if it is not.
func (c *Channel) because(err error) error {
	c.mu.Lock()
	failed := c.failed
	c.mu.Unlock()
	if failed == nil {
		return err
	}
	return fmt.Errorf("%w; the last attempt to reach the peer: %w", err, failed)
}

// unknownTime is how long the hub must know nobody at an address for that to be more than
// a peer, or a hub, that has just been restarted.
const unknownTime = time.Minute

// miss tells the program, once, of a peer that the hub has not known for too long: none of
// the attempts finds one whose address has changed. And once of somebody else who is there.
func (c *Channel) miss(err error) {
	what := "Channel.Close and Dial there"
	if c.persist {
		what = "Outbox.Forget and an outbox there; what waited is to be posted again"
	}
	who := c.Peer().Identifier
	if errors.Is(err, ErrWrongIdentity) && !c.mistaken {
		c.mistaken = true
		c.tell(EventWrongPeer, fmt.Errorf("%w; it was to be %v; if that has another address now, %s", err, who, what))
	}
	switch {
	case !errors.Is(err, ErrUnknownAddress):
		c.unknown = time.Time{}
		return
	case c.unknown.IsZero():
		c.unknown = time.Now()
		return
	case c.missed || time.Since(c.unknown) < unknownTime:
		return
	}
	c.missed = true
	c.tell(EventPeerLost, fmt.Errorf("%w: %s, where %v was to be, for %v; its address may have changed, as with a hub that was set up anew, "+
		"or it was away for longer than the hub keeps it: ask for its present one, then %s",
		ErrUnknownAddress, c.to, who, time.Since(c.unknown).Round(time.Second), what))
}

// tell says that the peer is not found, for each outbox that waits for it.
func (c *Channel) tell(kind EventKind, err error) {
	c.n.log.Warn("peer not found", "err", err)
	ev := Event{Kind: kind, Channel: c, Err: err}
	boxes := c.n.outboxes.through(c)
	for _, ev.Outbox = range boxes {
		c.n.events.emit(ev)
	}
	if len(boxes) == 0 {
		c.n.events.emit(ev)
	}
}

// awaitOnline waits while the node has no connection to its hub, so that no first
// message waits to be sent; false when the end has come. After a wait the pauses
// start over.
func (c *Channel) awaitOnline(pauses *backoff.ExponentialBackOff) bool {
	for {
		c.n.mu.Lock()
		online := c.n.online
		c.n.mu.Unlock()
		if c.n.State() == Online {
			return true
		}
		select {
		case <-online:
			pauses.Reset()
		case <-c.mend.Done():
			return false
		case <-c.n.stopped.Done():
			c.end(c.n.Err())
			return false
		}
	}
}

// update changes the channel's state and tells whoever waits for that.
func (c *Channel) update(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	close(c.changed)
	c.changed = make(chan struct{})
}

// end ends the channel for good; the first reason stays.
func (c *Channel) end(err error) {
	c.update(func() {
		if c.err == nil {
			c.err = err
		}
	})
	c.cancel()
}

// finish is the last thing watch does.
func (c *Channel) finish() {
	c.end(ErrClosed)
	n := c.n
	n.deliveries.ended(c, c.Err())
	n.freeLineage(c.opts.channel.Lineage)
	close(c.done)
	n.mu.Lock()
	delete(n.channels, c)
	n.mu.Unlock()
	n.events.emit(Event{Kind: EventChannelEnded, Channel: c, Err: c.Err()})
}

// present returns the channel to send through, waiting for one while it is being
// made again.
func (c *Channel) present(ctx context.Context) (*channel.Channel, error) {
	for {
		c.mu.Lock()
		cur, healing, changed, err := c.cur, c.healing, c.changed, c.err
		if err == nil && c.resting {
			err = errResting
		}
		c.mu.Unlock()
		switch {
		case err != nil:
			return nil, err
		case !healing && !ended(cur):
			return cur, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, c.because(ctxError(ctx, "waiting for the channel to be made again"))
		}
	}
}

// errResting is what a channel says that the peer has closed and that is made again
// for an outbox alone.
var errResting = fmt.Errorf("%w; it is made again when there is something to deliver", ErrPeerClosed)

// rest says that an outbox has to want the channel for it to be made again. Until it is,
// it rests, whether one does or not.
func (c *Channel) rest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.resting {
		c.resting = true
		close(c.changed)
		c.changed = make(chan struct{})
	}
}

func ended(c *channel.Channel) bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}

// Peer returns who is at the other end, with the credentials shown last.
func (c *Channel) Peer() channel.Peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur == nil {
		return channel.Peer{Identifier: c.who}
	}
	return c.cur.Peer()
}

// Confirmed reports whether the peer is a sealmq peer that has said that it
// accepts us. A stock Ockam peer never does.
func (c *Channel) Confirmed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cur != nil && c.cur.Confirmed()
}

// Restarts counts how often the channel was made again.
func (c *Channel) Restarts() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.restart
}

// Address returns the channel's address on this node: what is sent or dialled along
// a route that begins with it goes through the channel. It is another one after the
// channel has been made again.
func (c *Channel) Address() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cur.EncryptorAddress()
}

// Route returns the route that was dialled.
func (c *Channel) Route() route.Route { return c.to.Clone() }

// Send sends payload to a worker of the peer, such as its mailbox "app". The peer
// sees this node's first mailbox as the way to answer. nil means: sealed, and in
// this device's outbox; payload may be used again. Flush waits for the hub.
//
// When the outbox is full or the channel is being made again, Send waits until ctx
// ends. Errors: ErrTooLarge, ErrPeerClosed, ErrPeerRefused, ErrClosed, ErrTimeout,
// that of ctx, or what stopped the node.
func (c *Channel) Send(ctx context.Context, address string, payload []byte) error {
	return c.SendRoute(ctx, route.To(address), c.n.answers(), payload)
}

// SendString is Send with an Ockam String, as a Rust program expects it.
func (c *Channel) SendString(ctx context.Context, address, s string) error {
	return c.Send(ctx, address, EncodeString(s))
}

// SendRoute is Send along a longer route inside the peer's node, with a return
// route of the caller's choice inside this one; both travel encrypted.
func (c *Channel) SendRoute(ctx context.Context, onward, ret route.Route, payload []byte) error {
	if len(onward) == 0 {
		return errors.New("device: send: the route inside the peer is empty")
	}
	if err := c.n.checkRoutes(onward, ret); err != nil {
		return err
	}
	for {
		cur, err := c.present(ctx)
		if err != nil {
			return err
		}
		err = cur.Send(ctx, onward, ret, payload)
		switch {
		case err == nil:
			return nil
		case ctx.Err() == nil && ended(cur):
			continue // it was not sent; another channel comes, or the end
		default:
			return c.n.failure(ctx, "sending", err)
		}
	}
}

// answers is the return route of messages that name none: the first mailbox.
func (n *Node) answers() route.Route {
	if len(n.cfg.Mailboxes) == 0 {
		return nil
	}
	return route.To(n.cfg.Mailboxes[0])
}

// Request sends payload to a worker of the peer and waits for its answer, until ctx
// ends. Errors as for Send, and ErrInterrupted.
func (c *Channel) Request(ctx context.Context, address string, payload []byte) (*Message, error) {
	if err := c.n.checkRoutes(route.To(address)); err != nil {
		return nil, err
	}
	joined, leave := c.n.join(ctx)
	defer leave(nil)
	for {
		cur, err := c.present(joined)
		if err != nil {
			return nil, err
		}
		m, sent, err := c.n.requestThrough(joined, cur, address, payload)
		switch {
		case err == nil:
			return m, nil
		case joined.Err() != nil || !ended(cur):
			return nil, c.n.failure(joined, fmt.Sprintf("no answer from the peer's %q", address), err)
		case sent:
			if err := c.Err(); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("%w from the peer's %q; it may have been handled or not", ErrInterrupted, address)
		}
	}
}

// requestThrough asks once, through cur. The end of cur ends the wait: the answer
// could not come any more.
func (n *Node) requestThrough(ctx context.Context, cur *channel.Channel, address string, payload []byte) (m *Message, sent bool, err error) {
	box := randomAddress()
	if err := n.local.OpenMailbox(box, Access{Encryptors: []string{cur.EncryptorAddress()}}); err != nil {
		return nil, false, err
	}
	defer n.local.Remove(box)
	if err := cur.Send(ctx, route.To(address), route.To(box), payload); err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-cur.Done():
			cancel(ErrInterrupted)
		case <-ctx.Done():
		}
	}()
	m, err = n.local.Receive(ctx, box)
	return m, true, err
}

// RequestString is Request with an Ockam String, and one as the answer.
func (c *Channel) RequestString(ctx context.Context, address, s string) (string, error) {
	m, err := c.Request(ctx, address, EncodeString(s))
	if err != nil {
		return "", err
	}
	return m.Text()
}

// Flush waits until the hub has acknowledged everything that this node sent
// before. It says nothing about the peer.
//
// Errors: those of Node.Flush; *UndeliveredError once, when the hub has said since
// the last Flush that it could not deliver what was sent through the channel: one for
// each reason, joined where there are more.
func (c *Channel) Flush(ctx context.Context) error {
	if err := c.n.out.flush(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost.take()
}

// leadsTo reports whether a hop is where the channel's frames go first.
func (c *Channel) leadsTo(hop route.Address) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur == nil {
		return false
	}
	first, ok := c.cur.RemoteRoute().First()
	return ok && first == hop
}

// RefreshCredentials shows the peer a new credential of ours.
func (c *Channel) RefreshCredentials(ctx context.Context, credential []byte) error {
	cur, err := c.present(ctx)
	if err != nil {
		return err
	}
	return c.n.failure(ctx, "refreshing credentials", cur.RefreshCredentials(ctx, credential))
}

// Close ends the channel and tells the peer, for which it waits two seconds at most
// where the outbox has no room.
func (c *Channel) Close() error {
	c.end(ErrClosed)
	<-c.done
	return nil
}

// Done is closed when the channel has ended for good; Err says why.
func (c *Channel) Done() <-chan struct{} { return c.done }

// Err returns nil while the channel works or is being made again, and afterwards
// why it ended: ErrClosed, ErrPeerClosed, ErrPeerRefused, or what stopped the node.
func (c *Channel) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
