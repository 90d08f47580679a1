package bridge

import (
	"strconv"
	"sync/atomic"

	"github.com/sealmq/sealmq/internal/hubproto"
)

// Drop says why a frame was dropped.
type Drop uint8

const (
	// DropUnknown: no worker has the first hop.
	DropUnknown Drop = iota
	// DropForeign: the first hop's transport is not local. A hub dials nobody.
	DropForeign
	// DropForbidden: the first hop's worker is none that the sender may name (spec
	// routing 7.4). The sender is told the same as with DropUnknown.
	DropForbidden
	// DropMalformed: the packet is not a sequence of frames for one first hop.
	DropMalformed
	// DropRequest: a service does not understand the payload.
	DropRequest
	// DropTooLarge: a frame is beyond a limit in bytes.
	DropTooLarge
	// DropRoute: a route has too many hops, or an address is too long.
	DropRoute
	// DropOutgrown: with what the hub puts in front, the frame is longer than its
	// target's transport carries.
	DropOutgrown
	// DropOffline: the target is not attached and the frame may not wait.
	DropOffline
	// DropFull: no room, and the frame could not be withheld.
	DropFull
	// DropExpired: the age limit ended it.
	DropExpired
	// DropRefused: the sender's role may not send it; at a forwarding service the
	// alias is somebody else's or nobody's to have.
	DropRefused
	// DropAlias: at a forwarding service, a text that cannot be an alias.
	DropAlias
	// DropQuota: at a forwarding service, more forwarders than the sender may have.
	DropQuota
	// DropFresh: the target started anew and said that its keys are gone.
	DropFresh
	// DropAbandoned: the sender's connection ended before the frame was
	// acknowledged; the sender still has it.
	DropAbandoned
	// DropGone: the target's name or connection ended with the frame queued.
	DropGone
	// DropLoop: more passes from forwarder to forwarder than allowed.
	DropLoop
	// DropHeartbeat: the onward route is empty (spec routing 3.5).
	DropHeartbeat
	// DropNotice: addressed to where notices come from; never answered.
	DropNotice
	// DropMailbox: a program inside the hub did not keep up.
	DropMailbox
	// DropStorage: the outbox could not store it.
	DropStorage
	// DropThrottled: transient, or a request to a service, beyond what the
	// sender may send a second.
	DropThrottled

	// NumDrops is the number of reasons.
	NumDrops
)

var dropNames = [NumDrops]string{
	DropUnknown: "unknown", DropForeign: "foreign-hop", DropForbidden: "forbidden",
	DropMalformed: "malformed", DropRequest: "bad-request", DropTooLarge: "too-large", DropRoute: "route-limit",
	DropOutgrown: "outgrown", DropOffline: "offline", DropFull: "full", DropExpired: "expired",
	DropRefused: "refused", DropAlias: "bad-alias", DropQuota: "quota", DropFresh: "fresh",
	DropAbandoned: "abandoned", DropGone: "gone", DropLoop: "loop", DropHeartbeat: "heartbeat",
	DropNotice: "notice", DropMailbox: "mailbox", DropStorage: "storage",
	DropThrottled: "throttled",
}

// String returns the reason as it appears in metrics and logs.
func (d Drop) String() string {
	if d < NumDrops {
		return dropNames[d]
	}
	return "drop(" + strconv.Itoa(int(d)) + ")"
}

// reason returns what the sender is told, and false when it is told nothing.
func (d Drop) reason() (hubproto.Reason, bool) {
	switch d {
	case DropUnknown, DropForeign, DropForbidden, DropLoop:
		return hubproto.ReasonUnknown, true
	case DropMalformed, DropRequest:
		return hubproto.ReasonMalformed, true
	case DropTooLarge, DropRoute, DropOutgrown:
		return hubproto.ReasonTooLarge, true
	case DropOffline, DropGone, DropFresh:
		return hubproto.ReasonOffline, true
	case DropFull, DropMailbox, DropStorage, DropThrottled:
		return hubproto.ReasonFull, true
	case DropExpired:
		return hubproto.ReasonExpired, true
	case DropRefused, DropAlias, DropQuota:
		return hubproto.ReasonRefused, true
	}
	return 0, false
}

// numStripes spreads the counters so that ports on different cores rarely write
// one cache line. A power of two.
const numStripes = 8

type stripe struct {
	received, originated, restored, delivered, served atomic.Uint64

	dropped [NumDrops]atomic.Uint64

	notices, noticesHeld, badAcks, throttled, withheld atomic.Uint64

	_ [64]byte
}

func (s *stripe) drop(d Drop, n int) { s.dropped[d].Add(uint64(n)) }

// Counters is a moment's totals since the start. Reading them stops nothing, so
// the equation in the package comment holds only when nothing moves.
type Counters struct {
	// Received and Originated count frames from peers and from the hub itself.
	// A packet that cannot be parsed counts as one frame. Restored counts frames
	// that the hub's last process left in its store.
	Received, Originated, Restored uint64
	// Delivered counts frames that a peer acknowledged, or, of transient
	// class, that its connection took. Served counts frames taken by services.
	Delivered, Served uint64
	// Dropped counts frames by reason.
	Dropped [NumDrops]uint64

	// Queued and QueuedBytes are what lies in outboxes now; Waiting and
	// WaitingBytes what is received, but neither stored nor acknowledged.
	Queued, QueuedBytes, Waiting, WaitingBytes int64

	// Notices counts notices written; NoticesHeld those that were not and will not
	// be: too many different ones at once, or to a peer that never said hello.
	Notices, NoticesHeld uint64
	// BadAcks counts acknowledgements of what was never sent.
	BadAcks uint64
	// Throttled counts packets whose acknowledgement was withheld because of
	// the sender's rate.
	Throttled uint64
	// Withheld counts packets whose acknowledgement waited for room in a full queue,
	// or is waiting.
	Withheld uint64
	// Kicked counts connections ended by the bridge, by KickReason.
	Kicked [KickClosing + 1]uint64
	// Displaced counts devices that were away and forgotten before their time, to make
	// room for others.
	Displaced uint64
	// Copies counts copies and trace lines handed to observers, CopiesDropped
	// those that the ring had no room for.
	Copies, CopiesDropped uint64

	// Ports, Attached and Forwarders are numbers of now.
	Ports, Attached, Forwarders int
}

// Lost returns the number of frames without a fate: 0 at any quiet moment.
func (c *Counters) Lost() int64 {
	n := int64(c.Received + c.Originated + c.Restored - c.Delivered - c.Served)
	n -= c.Queued + c.Waiting
	for _, d := range c.Dropped {
		n -= int64(d)
	}
	return n
}

// Counters returns the totals.
func (b *Bridge) Counters() Counters {
	var c Counters
	for i := range b.stripes {
		s := &b.stripes[i]
		c.Received += s.received.Load()
		c.Originated += s.originated.Load()
		c.Restored += s.restored.Load()
		c.Delivered += s.delivered.Load()
		c.Served += s.served.Load()
		for d := range s.dropped {
			c.Dropped[d] += s.dropped[d].Load()
		}
		c.Notices += s.notices.Load()
		c.NoticesHeld += s.noticesHeld.Load()
		c.BadAcks += s.badAcks.Load()
		c.Throttled += s.throttled.Load()
		c.Withheld += s.withheld.Load()
	}
	for k := range b.kicked {
		c.Kicked[k] = b.kicked[k].Load()
	}
	c.Queued, c.QueuedBytes = b.queued.frames.Load(), b.queued.bytes.Load()
	c.Waiting, c.WaitingBytes = b.waiting.frames.Load(), b.waiting.bytes.Load()
	c.Displaced = b.displaced.Load()
	c.Copies, c.CopiesDropped = b.ring.handed.Load(), b.ring.lost.Load()
	c.Ports, c.Attached = int(b.ports.Load()), int(b.attached.Load())
	c.Forwarders = b.registry.count()
	return c
}

// level is how much of something there is now.
type level struct {
	frames, bytes atomic.Int64
}

func (l *level) add(frames, bytes int) {
	l.frames.Add(int64(frames))
	l.bytes.Add(int64(bytes))
}
