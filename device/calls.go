package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// frameKey is what a notice echoes of the frame it is about.
type frameKey struct{ first, last route.Address }

// calls are the calls in progress that a notice may end. A notice that matches
// none is ignored: it can end a wait and do nothing else.
type calls struct {
	mu sync.Mutex
	of map[frameKey][]*call // guarded by mu
}

// call is a wait for an answer.
type call struct {
	calls     *calls
	cancel    context.CancelCauseFunc
	noWait    bool   // an offline peer ends the wait at once
	onWaiting func() // called once when the hub waits for the peer; must not block

	abandoned atomic.Bool  // its frames that are not sent yet need not be
	unsettled atomic.Int64 // its frames in the outbox: the hub has not acknowledged them

	// lost, unless nil, is all that the call is for: it is told that a frame sent with it
	// was given up. The link waits for it.
	lost func(error)

	keys   []frameKey // guarded by calls.mu
	waited time.Time  // guarded by calls.mu: since when the hub waits for the peer, as it said last
	ended  bool       // guarded by calls.mu
}

type callKey struct{}

// begin returns a context for a call: the first frames sent with it are those that
// a notice may be about. end must be called.
func (cs *calls) begin(ctx context.Context, noWait bool, onWaiting func()) (context.Context, *call) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{calls: cs, cancel: cancel, noWait: noWait, onWaiting: onWaiting}
	return context.WithValue(ctx, callKey{}, c), c
}

// withLost returns a context that has lost told of a frame which was sent with it and
// given up.
func withLost(ctx context.Context, lost func(error)) context.Context {
	return context.WithValue(ctx, callKey{}, &call{lost: lost})
}

func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// expect notes that a frame of the call is about to be sent.
func (c *call) expect(first, last route.Address) {
	key := frameKey{first, last}
	c.calls.mu.Lock()
	defer c.calls.mu.Unlock()
	if c.ended || slices.Contains(c.keys, key) {
		return
	}
	if c.calls.of == nil {
		c.calls.of = make(map[frameKey][]*call)
	}
	c.keys = append(c.keys, key)
	c.calls.of[key] = append(c.calls.of[key], c)
}

// abandon says that nobody wants an answer any more, so that first messages don't
// pile up in the outbox while there is no connection.
func (c *call) abandon() { c.abandoned.Store(true) }

// end ends the wait.
func (c *call) end() {
	cs := c.calls
	cs.mu.Lock()
	c.ended = true
	for _, key := range c.keys {
		left := slices.DeleteFunc(cs.of[key], func(o *call) bool { return o == c })
		if cs.of[key] = left; len(left) == 0 {
			delete(cs.of, key)
		}
	}
	c.keys = nil
	cs.mu.Unlock()
	c.cancel(nil)
}

// noticed takes a notice of the hub. It does not block.
func (n *Node) noticed(nt *hubproto.Notice) {
	if !nt.HasFirst {
		return
	}
	n.calls.noticed(nt)
	// The address of a connection ends with it.
	if nt.Reason == hubproto.ReasonUnknown || nt.Reason == hubproto.ReasonOffline && isConnection(nt.FirstHop.Value) {
		n.pathGone(nt.FirstHop)
	}
	if !nt.HasReturn { // else there was a call, which may have been given up since
		n.undelivered(nt)
	}
}

// undelivered tells the program of frames that nobody waits for an answer to. It
// changes nothing else: whoever carries our frames can say anything.
func (n *Node) undelivered(nt *hubproto.Notice) {
	err := noticeError(nt.Reason)
	if nt.Reason == hubproto.ReasonWaiting || err == nil {
		return
	}
	e := &UndeliveredError{To: nt.FirstHop, Count: nt.Count, Reason: nt.Reason.String(), Err: err}
	for _, ch := range n.endpoint.Channels() {
		if first, ok := ch.RemoteRoute().First(); ok && first == nt.FirstHop {
			e.Peer = ch.Peer().Identifier
			break
		}
	}
	n.log.Warn("the hub could not deliver what it had acknowledged", "to", e.To, "peer", e.Peer, "frames", e.Count, "reason", e.Reason)
	n.mu.Lock()
	var through []*Channel
	for c := range n.channels {
		if c.leadsTo(nt.FirstHop) {
			through = append(through, c)
		}
	}
	if len(through) == 0 && n.plain.has(nt.FirstHop.Value) {
		n.lost.add(e)
	}
	n.mu.Unlock()
	if len(through) == 0 {
		n.events.emit(Event{Kind: EventUndelivered, Err: e})
	}
	for _, c := range through {
		c.mu.Lock()
		c.lost.add(e)
		c.mu.Unlock()
		n.events.emit(Event{Kind: EventUndelivered, Err: e, Channel: c})
	}
}

// losses are what the next Flush has to say: one error for each address and reason.
type losses []UndeliveredError

// maxLosses bounds what a program that never flushes has to hear.
const maxLosses = 64

// add notes that the hub could not deliver frames. Beyond maxLosses the last error takes the
// counts of others, so that the sum is that of all frames.
func (ls *losses) add(e *UndeliveredError) {
	i := slices.IndexFunc(*ls, func(l UndeliveredError) bool { return l.To == e.To && l.Reason == e.Reason })
	switch {
	case i >= 0:
	case len(*ls) < maxLosses:
		*ls = append(*ls, *e)
		return
	default:
		i = maxLosses - 1
	}
	(*ls)[i].Count += e.Count
}

// take returns what there is to say, joined where that is more than one error, and forgets
// it.
func (ls *losses) take() error {
	var errs []error
	for i := range *ls {
		errs = append(errs, &(*ls)[i])
	}
	*ls = nil
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// noticed ends the calls that a notice is about.
func (cs *calls) noticed(n *hubproto.Notice) {
	cs.mu.Lock()
	waiting := slices.Clone(cs.of[frameKey{n.FirstHop, n.LastReturn}])
	cs.mu.Unlock()
	for _, c := range waiting {
		c.noticed(n)
	}
}

func (c *call) noticed(n *hubproto.Notice) {
	if n.Reason != hubproto.ReasonWaiting {
		if err := noticeError(n.Reason); err != nil {
			c.cancel(err)
		}
		return
	}
	if c.noWait {
		c.cancel(ErrPeerOffline)
		return
	}
	c.calls.mu.Lock()
	first := c.waited.IsZero() && !c.ended
	c.waited = time.Now()
	c.calls.mu.Unlock()
	if first && c.onWaiting != nil {
		c.onWaiting()
	}
}

// firstContact is how long a hub waits for a peer, by default, before it says that the
// peer is offline.
const firstContact = 10 * time.Second

// waiting reports whether the hub has ever said that it waits for the peer, and whether it
// does so still, as far as can be told: where it acknowledges frames (acks), it does that
// when the peer is there, or with word that the peer stays away.
func (c *call) waiting(acks bool) (ever, still bool) {
	c.calls.mu.Lock()
	waited := c.waited
	c.calls.mu.Unlock()
	switch {
	case waited.IsZero():
		return false, false
	case acks:
		return true, c.unsettled.Load() > 0
	default:
		return true, time.Since(waited) <= firstContact+time.Second
	}
}

// noticeError is the error of a call that the notice ends; nil for reasons that
// say nothing about a call.
func noticeError(r hubproto.Reason) error {
	switch r {
	case hubproto.ReasonUnknown:
		return ErrUnknownAddress
	case hubproto.ReasonOffline:
		return ErrPeerOffline
	case hubproto.ReasonExpired:
		return ErrExpired
	case hubproto.ReasonRefused:
		return ErrHubRefused
	case hubproto.ReasonTooLarge:
		return ErrTooLarge
	case hubproto.ReasonFull:
		return fmt.Errorf("%w: the hub's queue for this address is full", ErrBusy)
	case hubproto.ReasonMalformed:
		return fmt.Errorf("%w: it could not read the frame", ErrHubRefused)
	default:
		return nil
	}
}
