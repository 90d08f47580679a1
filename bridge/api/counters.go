package api

import "sync/atomic"

// Event names what became of a peer or a frame.
type Event uint8

// The events.
const (
	Joined          Event = iota // peers that got a port
	RefusedBridge                // refused: the bridge has no room for another peer
	RefusedIdentity              // channels closed: their identity has as many as it may
	RefusedRelay                 // registrations without the credential for them
	Overrun                      // frames dropped: many came at once, out of order, and too much waits for room
	TooLarge                     // frames dropped: too long once sealed
	Unsent                       // frames not sent, and with them what was queued: their channel has ended

	events
)

var eventNames = [events]string{"joined", "refused-bridge", "refused-identity", "refused-relay", "overrun", "too-large", "unsent"}

// String returns the event's stable name, fit for a metric's label.
func (e Event) String() string {
	if e < events {
		return eventNames[e]
	}
	return "unknown"
}

// Counters counts events. The zero value is ready, and a nil *Counters counts
// nothing.
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
