package mochibridge

import "sync/atomic"

// Event names what the hook refused or noticed.
type Event uint8

// The events.
const (
	RefusedNotAllowed     Event = iota // CONNECT refused: not allowed
	RefusedBadCredentials              // CONNECT refused: bad user name, password or proof
	RefusedFull                        // CONNECT refused: no room
	RefusedClientID                    // CONNECT refused: client id belongs to a device or another user, or is not a device name
	RefusedWill                        // CONNECT refused: will under the root
	Wrapped                            // connections of other listeners whose output the hook guards
	PublishRefused                     // PUBLISH under the root by somebody else than that device
	PublishQoS2                        // PUBLISH with QoS 2 on a device's own topic: connection closed
	PublishInline                      // PUBLISH under the root by the embedding program, dropped
	PublishLate                        // PUBLISH under the root that reached mochi past the first check, dropped
	WillSuppressed                     // wills under the root of stored sessions, dropped
	RetainedPurged                     // retained messages under the root that a store brought back, removed
	SubscribeGranted                   // filters under the root granted
	SubscribeRefused                   // filters under the root refused
	ObserversFull                      // filters refused: too many observers, or filters of one
	InboxGivenUp                       // connections closed because the device unsubscribed from its inbox
	BadAck                             // PUBACK for what was not sent
	TooLargeForPeer                    // frames longer than the device's Maximum Packet Size
	ObserverDropped                    // copies, records and trace lines not written to a slow observer
	Revoked                            // connections ended because they are no longer allowed
	GuestEnded                         // guests that stayed too long: connection closed
	HookPanicked                       // panics recovered in the hook

	events
)

var eventNames = [events]string{
	"refused-not-allowed", "refused-bad-credentials", "refused-full", "refused-client-id", "refused-will",
	"wrapped", "publish-refused", "publish-qos2", "publish-inline", "publish-late", "will-suppressed",
	"retained-purged", "subscribe-granted", "subscribe-refused", "observers-full", "inbox-given-up", "bad-ack",
	"too-large-for-peer", "observer-dropped", "revoked", "guest-ended", "hook-panicked",
}

// String returns the event's stable name, fit for a metric's label.
func (e Event) String() string {
	if e < events {
		return eventNames[e]
	}
	return "unknown"
}

// Counters counts events. The zero value is ready.
type Counters struct {
	n [events]atomic.Uint64
}

// Count returns how often e has happened.
func (c *Counters) Count(e Event) uint64 {
	if e >= events {
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

func (c *Counters) add(e Event) { c.n[e].Add(1) }
