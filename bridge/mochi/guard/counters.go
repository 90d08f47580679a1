package guard

import "sync/atomic"

// Event names what a listener, a connection or the fixes did or refused. Every
// connection that is refused or cut, and every packet that is refused, counts
// under exactly one event.
type Event uint8

// The events.
const (
	Accepted          Event = iota // connections taken over from the network
	RefusedTotal                   // connections refused: Limits.Conns reached
	RefusedAddress                 // connections refused: Limits.PerAddress reached
	RefusedPending                 // connections refused: Limits.Pending reached
	Displaced                      // closed: silent, and without a complete CONNECT, when others needed its place
	AcceptFailed                   // errors of accept that the listener waited out
	HandshakeFailed                // TLS handshakes and WebSocket upgrades that failed, or never came
	ConnectTimeout                 // no complete CONNECT within Config.ConnectTimeout
	ConnectMalformed               // first packet was not CONNECT
	ConnectTooLarge                // CONNECT longer than Config.ConnectSize
	SlowConsumer                   // closed: output buffer full
	WriteStalled                   // closed: no byte accepted by the peer for Config.StallTimeout
	Panicked                       // panics recovered on a connection's goroutine
	HookPanicked                   // panics recovered inside a method of Fixes
	SessionSwept                   // sessions that mochi left behind after a panic or a failed CONNACK
	GhostStopped                   // connected clients that the server had lost, disconnected
	GateTimeout                    // waits for the previous connection of a client id given up
	TopicRefused                   // PUBLISH with a topic too long or too deep: connection closed
	FilterRefused                  // filters refused: too long or too deep
	SubscriptionsFull              // filters refused: FixesConfig.Subscriptions reached
	WillRefused                    // CONNECT refused for its will
	QoSRefused                     // PUBLISH above the server's maximum QoS: connection closed
	RetainedFull                   // retain flags dropped: retained store full
	SessionsFull                   // CONNECT refused: FixesConfig.Sessions reached, and the client wants its session kept
	QueuedFull                     // messages not kept for a client: FixesConfig.QueuedBytes reached
	InputFull                      // closed: Limits.Input reached while a long packet arrived
	PacketTooLarge                 // closed: packet longer than Config.PacketLimit, or the server's limit, which no LongTap read past

	events
)

var eventNames = [events]string{
	"accepted", "refused-total", "refused-address", "refused-pending", "displaced", "accept-failed",
	"handshake-failed", "connect-timeout", "connect-malformed", "connect-too-large",
	"slow-consumer", "write-stalled", "panicked", "hook-panicked", "session-swept",
	"ghost-stopped", "gate-timeout", "topic-refused", "filter-refused",
	"subscriptions-full", "will-refused", "qos-refused", "retained-full",
	"sessions-full", "queued-full", "input-full", "packet-too-large",
}

// String returns the event's stable name, fit for a metric's label.
func (e Event) String() string {
	if e < events {
		return eventNames[e]
	}
	return "unknown"
}

// Counters counts events. The zero value is ready; one may be shared by any
// number of listeners and hooks. A nil *Counters counts nothing.
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
