package channel

import (
	"fmt"
	"sync/atomic"
)

// DropReason says why a frame was dropped. Every drop is counted under one.
type DropReason uint8

// Reasons for which frames are dropped.
const (
	DropShort       DropReason = iota // shorter than a frame can be, or longer
	DropForged                        // does not authenticate
	DropReplayed                      // received before
	DropTooOld                        // behind the window
	DropBeyond                        // ahead of the window
	DropUndecodable                   // authenticates, but is not a message
	DropLate                          // newer messages have been handed on
	DropNoRoute                       // no route inside, or no way to answer
	DropEnded                         // the channel has ended
	DropFirstRepeat                   // a message 1 that has been dealt with
	DropRate                          // a source's first messages come too fast
	DropHalfOpen                      // too many unfinished handshakes
	DropChannels                      // too many channels
	DropHandshake                     // not the handshake message that is due
	DropEarly                         // too much ahead of message 3
	DropQueue                         // queue of the encryptor address is full
	DropRefresh                       // credentials refreshed too often, or wrongly
	DropFromHub                       // the hub itself, where a peer is expected
	DropUnsent                        // the router refused it
	dropReasons
)

var dropNames = [dropReasons]string{
	"short", "forged", "replayed", "too-old", "beyond-window", "undecodable", "late", "no-route", "ended",
	"first-repeat", "rate", "half-open", "channels", "handshake", "early", "queue", "refresh", "from-hub", "unsent",
}

// String returns a short name fit for a metric's label.
func (r DropReason) String() string {
	if r < dropReasons {
		return dropNames[r]
	}
	return fmt.Sprintf("reason-%d", uint8(r))
}

// Drops counts dropped frames by reason.
type Drops [dropReasons]uint64

// Of returns the count for one reason.
func (d Drops) Of(r DropReason) uint64 {
	if int(r) >= len(d) {
		return 0
	}
	return d[r]
}

// Total returns the sum over all reasons.
func (d Drops) Total() (n uint64) {
	for _, v := range d {
		n += v
	}
	return n
}

// Each calls f for every reason, those never seen included.
func (d Drops) Each(f func(DropReason, uint64)) {
	for r, n := range d {
		f(DropReason(r), n)
	}
}

// ChannelStats are the counters of one channel.
type ChannelStats struct {
	Sent      uint64 // frames sealed and given to the router, our own included
	Received  uint64 // frames that authenticated
	Delivered uint64 // messages handed to Config.Deliver
	Skipped   uint64 // nonces given up as lost
	Dropped   Drops  // frames for this channel
}

// EndpointStats are the counters of an endpoint.
type EndpointStats struct {
	Channels  int    // open now
	HalfOpen  int    // handshakes of peers not finished
	Accepted  uint64 // channels that peers have opened
	Dialled   uint64 // channels opened from here
	Refused   uint64 // peers that our policy refused
	Failed    uint64 // other handshakes that did not complete
	Gaps      uint64 // channels ended by a gap
	Silent    uint64 // channels ended by silence
	Downgrade uint64 // downgrades reported
	Dropped   Drops  // all frames, those of channels included
}

// drops is the live form of Drops. parent, if any, counts along.
type drops struct {
	n      [dropReasons]atomic.Uint64
	parent *drops
}

func (d *drops) add(r DropReason) {
	d.n[r].Add(1)
	if d.parent != nil {
		d.parent.n[r].Add(1)
	}
}

func (d *drops) load() (out Drops) {
	for i := range d.n {
		out[i] = d.n[i].Load()
	}
	return out
}
