package channel

import (
	"errors"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/route"
)

// gapGrace is how long a proved gap has to close by itself: late arrivals may
// still bring the window up to the frame that proved it.
const gapGrace = 200 * time.Millisecond

// receive takes a transport frame at our decryptor address. It never blocks.
func (c *Channel) receive(in Inbound) {
	c.rx.Lock()
	defer c.rx.Unlock()
	frame := in.Frame.Payload
	switch {
	case c.hasEnded():
		c.drops.add(DropEnded)
		return
	case len(frame) < Overhead:
		c.drops.add(DropShort)
		return
	}
	plain, n, err := c.opener.Open(frame[nonceLen:nonceLen], frame)
	if err != nil {
		c.notOpened(frame, err)
		return
	}
	c.rcvd.Add(1)
	c.live.received()
	it := orderItem{nonce: n, arrived: time.Now(), in: in}
	if it.msg, err = parseMessage(plain); err != nil {
		c.drops.add(DropUndecodable)
		it.skip = true // its nonce is used all the same
	}
	c.follow(&it)
	before := c.order.skipped
	if !c.order.push(it, c.opener.Highest(), c.hand) {
		c.drops.add(DropLate)
	}
	c.lost.Add(c.order.skipped - before)
	if len(c.order.held) > 0 {
		c.armOrder()
	}
}

func (c *Channel) armOrder() {
	if wait := c.order.wait(time.Now()); wait > 0 && !c.hasEnded() {
		c.orderTimer.Reset(wait)
	}
}

// expireHeld goes on without what has not come in time.
func (c *Channel) expireHeld() {
	c.rx.Lock()
	defer c.rx.Unlock()
	before := c.order.skipped
	wait := c.order.expire(time.Now(), c.hand)
	c.lost.Add(c.order.skipped - before)
	if wait > 0 && !c.hasEnded() {
		c.orderTimer.Reset(wait)
	}
}

// dropHeld counts what a channel that has ended still held back.
func (c *Channel) dropHeld() {
	c.rx.Lock()
	defer c.rx.Unlock()
	for range c.order.held {
		c.drops.add(DropEnded)
	}
	c.order.held = nil
}

// follow is what the frame itself tells, whenever its message is handed on: the
// class to answer in, and to a responder the way back to an initiator that has
// moved (spec secure-channel 12). Only newer data moves it.
func (c *Channel) follow(it *orderItem) {
	if c.initiator {
		return
	}
	if !c.classKnown {
		c.classKnown = true
		c.class.Store(uint32(it.in.Class))
	}
	if it.skip || it.msg.variant != variantPayload || it.nonce <= c.lastNonce {
		return
	}
	c.lastNonce = it.nonce
	old := *c.remote.Load()
	via := it.in.Frame.Return
	if len(old) == len(via)+1 && old[:len(via)].Equal(via) {
		return
	}
	last, _ := old.Last()
	moved := via.Append(last)
	c.remote.Store(&moved)
}

var openDrops = []struct {
	err    error
	reason DropReason
}{
	{ErrReplayed, DropReplayed}, {ErrTooOld, DropTooOld}, {ErrBeyondWindow, DropBeyond}, {ErrForged, DropForged},
}

// notOpened counts a frame that the opener refused, and looks for a gap.
func (c *Channel) notOpened(frame []byte, err error) {
	reason := DropShort
	for _, d := range openDrops {
		if errors.Is(err, d.err) {
			reason = d.reason
		}
	}
	c.drops.add(reason)
	if reason != DropBeyond || c.gapChecking || !c.gapLimit.Allow() {
		return
	}
	// Whoever can send us frames can make up one with any nonce, so the proof is
	// rationed, and a worker does it.
	c.gapChecking = true
	proof := c.opener.gapProof()
	c.e.pool.submit(c.who(), func() { c.checkGap(proof, frame) })
}

// checkGap ends the channel when a frame beyond the window is genuine and the
// window does not reach it soon.
func (c *Channel) checkGap(proof gapProof, frame []byte) {
	n, _ := FrameNonce(frame)
	if !proof.proves(frame) {
		c.rx.Lock()
		c.gapChecking = false
		c.rx.Unlock()
		return
	}
	c.e.after(gapGrace, func() {
		c.rx.Lock()
		c.gapChecking = false
		highest := c.opener.Highest()
		c.rx.Unlock()
		if n > highest && n-highest > Window && !c.hasEnded() {
			c.e.gaps.Add(1)
			c.e.log.Warn("channel lost more frames than it can bridge", "peer", c.peerID, "lost", n-highest-1)
			c.end(fmt.Errorf("%w: %d are missing", ErrGap, n-highest-1), byeGap)
		}
	})
}

// handOn brings an item to its destination. Items come in nonce order.
func (c *Channel) handOn(it *orderItem) {
	if c.hasEnded() {
		c.drops.add(DropEnded)
		return
	}
	if it.skip {
		c.speak()
		return
	}
	m := &it.msg
	switch m.variant {
	case variantClose:
		c.peerClosed(it.nonce)
		return
	case variantRefresh:
		c.refresh(it)
	default:
		c.payload(it)
	}
	c.speak()
}

// speak notes that the peer has said something.
func (c *Channel) speak() {
	if !c.spoken {
		c.spoken = true
		close(c.spoke)
	}
}

func (c *Channel) payload(it *orderItem) {
	first, ok := it.msg.onward.First()
	if !ok {
		c.drops.add(DropNoRoute)
		return
	}
	if first == route.Local(HelloAddress) {
		c.gotHello(it)
		return
	}
	if c.greeting.Load() == nil && first == route.Local(DeliveryAddress) {
		c.live.start(c) // no stock peer speaks to that: its hello is lost, and a ping asks for another
	}
	c.given.Add(1)
	c.e.cfg.Deliver(Delivery{
		Channel: c, Listener: c.listener, Nonce: it.nonce, Class: it.in.Class,
		Frame: route.Frame{
			Onward:  it.msg.onward,
			Return:  prepend(route.Local(c.enc), it.msg.ret),
			Payload: it.msg.payload,
		},
	})
}

// prepend puts a in front of r, in r's own array where there is room.
func prepend(a route.Address, r route.Route) route.Route {
	if cap(r) == len(r) {
		return r.Prepend(a)
	}
	r = r[:len(r)+1]
	copy(r[1:], r)
	r[0] = a
	return r
}

func (c *Channel) gotHello(it *orderItem) {
	h, err := parseHello(it.msg.payload)
	if err != nil {
		c.drops.add(DropUndecodable)
		return
	}
	if c.greeting.Load() == nil {
		h.Epoch = append([]byte(nil), h.Epoch...)
		h.Lineage = append([]byte(nil), h.Lineage...)
		c.greeting.Store(&h)
		c.e.supersede(c, &h)
		c.graceTimer.Stop()
		c.e.saysHello(c.peerID)
		c.live.start(c)
		close(c.confirmed)
	}
	switch h.Kind {
	case helloPing:
		c.control(helloPong)
	case helloBye:
		c.saidBye(h.Reason)
	}
}

// saidBye ends the channel for a reason that the peer gave.
func (c *Channel) saidBye(why byeReason) {
	switch why {
	case byeGap:
		c.e.gaps.Add(1)
		c.finish(fmt.Errorf("%w: noticed by the peer", ErrGap))
	case byeSilent:
		c.e.silent.Add(1)
		c.finish(fmt.Errorf("%w: it heard nothing from us either", ErrSilent))
	default:
		c.finish(ErrPeerClosed)
	}
}

// peerClosed ends the channel without an answer (spec secure-channel 13). A
// Close that is the very first frame of a responder is its refusal.
func (c *Channel) peerClosed(nonce uint64) {
	if c.initiator && nonce == 0 {
		c.finish(ErrRefused)
		return
	}
	c.finish(ErrPeerClosed)
}

// missHello asks a peer for its hello, which may be lost; a stock peer ignores that. Later
// it reports a sealmq peer that did not say hello this time.
func (c *Channel) missHello() {
	switch {
	case c.hasEnded() || c.Confirmed():
		return
	case !c.asked:
		c.asked = true
		c.graceTimer.Reset(helloGrace - helloAsk)
		if !c.e.cfg.hooks.noHello {
			c.control(helloPing)
		}
		return
	}
	if c.unused() && c.e.followed(c) {
		c.finish(ErrSuperseded)
		return
	}
	if !c.e.hasSaidHello(c.peerID) {
		return
	}
	c.e.downgrades.Add(1)
	c.e.log.Warn("peer said hello in an earlier channel but not in this one", "peer", c.peerID)
	if c.e.cfg.OnDowngrade != nil {
		c.e.cfg.OnDowngrade(Downgrade{Channel: c, Peer: c.peerID})
	}
}

// refresh has a worker look at credentials that the peer shows anew, one message
// at a time; of those that come meanwhile the newest counts. It is none of those that
// handshakes need.
func (c *Channel) refresh(it *orderItem) {
	if !c.refreshes.Allow() {
		c.drops.add(DropRefresh)
		return
	}
	if c.refreshNext != nil {
		c.drops.add(DropRefresh)
	}
	c.refreshNext = &it.msg
	if !c.refreshing {
		c.refreshing = true
		c.e.slow.submit(c.who(), c.runRefresh)
	}
}

// who is for whom the workers do what c costs.
func (c *Channel) who() any {
	if c.src != nil {
		return c.src
	}
	return c // dialled from here
}

func (c *Channel) runRefresh() {
	c.rx.Lock()
	defer c.rx.Unlock()
	for c.refreshNext != nil {
		m := c.refreshNext
		c.refreshNext = nil
		c.rx.Unlock()
		creds, err := c.verifier.refresh(m, c.peerID)
		c.rx.Lock()
		switch {
		case err != nil:
			c.drops.add(DropRefresh)
			c.e.log.Info("peer's new credentials not accepted", "peer", c.peerID, "err", err)
		case len(creds) > 0:
			c.peer.Store(&Peer{Identifier: c.peerID, Credentials: creds})
		}
	}
	c.refreshing = false
}
