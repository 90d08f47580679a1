package channel

import (
	"slices"
	"time"
)

// The hand-over order: a frame that arrives before its predecessors is held, and
// so are those behind it, for at most this many frames and this long.
const (
	maxHeld  = 32
	holdTime = 50 * time.Millisecond
)

// orderItem is an opened frame on its way to its destination.
type orderItem struct {
	nonce   uint64
	arrived time.Time
	in      Inbound
	msg     message
	skip    bool // takes its place and is nothing else
}

// order hands items on in nonce order. What is older than something handed on is
// dropped; so each nonce is handed on at most once and never after a newer one.
type order struct {
	next    uint64      // the nonce due
	held    []orderItem // ahead of next, by nonce
	skipped uint64      // nonces given up
}

// push takes an item, hands on what is due, and reports false when the item came
// too late. highest is the highest nonce received: what the window no longer
// admits is not waited for.
func (o *order) push(it orderItem, highest uint64, hand func(*orderItem)) bool {
	switch {
	case it.nonce < o.next:
		return false
	case it.nonce == o.next && len(o.held) == 0:
		o.next++
		hand(&it)
		return true
	}
	at, _ := slices.BinarySearchFunc(o.held, it.nonce, func(h orderItem, n uint64) int {
		switch {
		case h.nonce < n:
			return -1
		case h.nonce > n:
			return 1
		}
		return 0
	})
	o.held = slices.Insert(o.held, at, it)
	if highest > Window && o.next < highest-Window {
		o.advance(highest-Window, hand)
	}
	o.drain(hand)
	for len(o.held) > maxHeld {
		o.advance(o.held[0].nonce, hand)
		o.drain(hand)
	}
	return true
}

// advance gives up the nonces before n and hands on those held among them.
func (o *order) advance(n uint64, hand func(*orderItem)) {
	for len(o.held) > 0 && o.held[0].nonce < n {
		o.skipped += o.held[0].nonce - o.next
		o.next = o.held[0].nonce
		o.pop(hand)
	}
	if o.next < n {
		o.skipped += n - o.next
		o.next = n
	}
}

func (o *order) drain(hand func(*orderItem)) {
	for len(o.held) > 0 && o.held[0].nonce == o.next {
		o.pop(hand)
	}
}

// pop hands on the first held item, which is due.
func (o *order) pop(hand func(*orderItem)) {
	it := o.held[0]
	o.held = slices.Delete(o.held, 0, 1)
	o.next++
	hand(&it)
}

// expire hands on what has been held long enough, with all before it, and
// returns how long the next one may wait; 0 when nothing is held.
func (o *order) expire(now time.Time, hand func(*orderItem)) time.Duration {
	for i := len(o.held) - 1; i >= 0; i-- {
		if now.Sub(o.held[i].arrived) >= holdTime {
			o.advance(o.held[i].nonce, hand)
			o.drain(hand)
			break
		}
	}
	return o.wait(now)
}

// wait returns how long the item held longest may still wait; 0 when nothing is
// held.
func (o *order) wait(now time.Time) time.Duration {
	var least time.Duration
	for i := range o.held {
		left := max(holdTime-now.Sub(o.held[i].arrived), time.Microsecond)
		if least == 0 || left < least {
			least = left
		}
	}
	return least
}
