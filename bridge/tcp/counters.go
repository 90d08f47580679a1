package tcp

import "sync/atomic"

// Event names what became of a connection.
type Event uint8

// The events.
const (
	Accepted        Event = iota // connections taken over from the network
	RefusedTotal                 // refused: as many connections as allowed
	RefusedAddress               // refused: as many connections of one address as allowed
	RefusedPending               // refused: as many silent connections as allowed
	RefusedBridge                // refused: the bridge has no room for another peer
	AcceptFailed                 // errors of accept that the server waited out
	PreambleTimeout              // closed: no preamble in time
	PreambleWrong                // closed: another protocol
	FirstFrame                   // closed: never sent a frame
	Displaced                    // closed: had not sent a frame yet when others needed its place
	FrameTimeout                 // closed: a frame arrived too slowly
	Idle                         // closed: nothing received for IdleTimeout
	Framing                      // closed: a length of 0 or above 16 MiB
	Malformed                    // closed: a body that is not a frame
	CutShort                     // ended by the peer inside a frame
	InputFull                    // closed: TotalInput reached while a long frame arrived
	Oversized                    // frames above the limit, read past and dropped
	Stalled                      // closed: takes no data
	Kicked                       // closed by the bridge
	EndedByPeer                  // ended by the peer between frames
	NetworkError                 // ended by an error of the network

	events
)

var eventNames = [events]string{
	"accepted", "refused-total", "refused-address", "refused-pending", "refused-bridge", "accept-failed",
	"preamble-timeout", "preamble-wrong", "first-frame-timeout", "displaced", "frame-timeout", "idle", "framing",
	"malformed", "cut-short", "input-full", "oversized", "stalled", "kicked", "ended-by-peer", "network-error",
}

// String returns the event's stable name, fit for a metric's label.
func (e Event) String() string {
	if e < events {
		return eventNames[e]
	}
	return "unknown"
}

// Counters counts events. The zero value is ready, a nil *Counters counts
// nothing, and one may be shared by any number of servers.
type Counters struct {
	n [events]atomic.Uint64
}

// Count returns how often e has happened.
func (c *Counters) Count(e Event) uint64 {
	if c == nil || e >= events {
		return 0
	}
	return c.n[e].Load()
}

// Each calls f for every event in a fixed order, those at zero included.
func (c *Counters) Each(f func(e Event, n uint64)) {
	for e := range events {
		f(e, c.Count(e))
	}
}

func (c *Counters) add(e Event) {
	if c != nil {
		c.n[e].Add(1)
	}
}
