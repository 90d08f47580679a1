package device

import (
	"sync/atomic"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/node"
)

// dropReason enumerates why a frame came to nothing at this device.
type dropReason uint8

const (
	dropNoConnection dropReason = iota // transient, and no connection
	dropClosed                         // the node was closed before it was sent
	dropMalformed                      // a message of the hub that is no bundle of frames
	dropHeartbeat                      // no onward route
	dropForeignHop                     // first hop is not of this node
	dropNotFromHub                     // at an address that only the hub may use
	dropUnexpected                     // an answer that nobody waits for
	dropAbandoned                      // nobody waits any more for what it would bring
	dropKills                          // it ended every connection that it was sent on
	dropThrough                        // from outside, to be sent on through a channel
	dropReasons
)

var dropNames = [dropReasons]string{
	dropNoConnection: "no-connection",
	dropClosed:       "closed",
	dropMalformed:    "malformed",
	dropHeartbeat:    "heartbeat",
	dropForeignHop:   "foreign-hop",
	dropNotFromHub:   "not-from-hub",
	dropUnexpected:   "unexpected",
	dropAbandoned:    "abandoned",
	dropKills:        "kills-connections",
	dropThrough:      "through-channel",
}

func (r dropReason) String() string { return dropNames[r] }

// inbound counts what arrives from the hub.
type inbound struct {
	packets, frames, notices atomic.Uint64
	dropped                  [dropReasons]atomic.Uint64
}

// Stats are counters since Connect, and a few present values.
type Stats struct {
	// State is the present state of the connection to the hub.
	State State
	// Connects counts connections that came about.
	Connects uint64

	// FramesSent counts frames written to the hub, Resent those of them that were
	// sent again after a lost connection, and Acknowledged those that the hub has
	// taken responsibility for. PacketsSent counts the messages that carried them.
	FramesSent, Resent, Acknowledged, PacketsSent uint64
	// QueuedFrames and QueuedBytes are in the outbox now: not yet acknowledged.
	QueuedFrames, QueuedBytes int

	// FramesReceived counts frames from the hub, in PacketsReceived messages, and
	// Notices those of them in which the hub told what became of one of ours.
	FramesReceived, PacketsReceived, Notices uint64

	// Dropped counts frames that came to nothing here, by reason.
	Dropped map[string]uint64
	// EventsDropped counts events that Config.OnEvent was too slow for.
	EventsDropped uint64

	// Delivery counts acknowledged messages.
	Delivery DeliveryStats

	// Local counts what happened at the addresses of this node, and Channels what
	// its secure channels did.
	Local    node.Stats
	Channels channel.EndpointStats
}

// DeliveryStats are about messages of Deliver and Outbox, sent and received.
type DeliveryStats struct {
	// Waiting messages, and bytes of their payloads, of this node's that the peers'
	// programs have not acknowledged.
	Waiting, WaitingBytes int
	// Handed counts messages of peers given to the program, Unacknowledged those
	// received that it has not acknowledged now, with UnacknowledgedBytes in all.
	Handed                              uint64
	Unacknowledged, UnacknowledgedBytes int
	// Repeated counts what came again although it was there, Stale what came through
	// a channel that was left, and Refused what was not taken: nobody at the address,
	// or a limit.
	Repeated, Stale, Refused uint64
	// Outboxes of peers that are remembered.
	Outboxes int
}

func (ds *deliveries) stats() DeliveryStats {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	c := ds.recv.Counters()
	s := DeliveryStats{
		Handed: c.Handed, Unacknowledged: c.Unacked, UnacknowledgedBytes: c.TotalBytes,
		Repeated: c.Repeated, Stale: c.Stale, Refused: c.Refused, Outboxes: c.Outboxes,
	}
	for _, st := range ds.streams {
		messages, bytes := st.snd.Waiting()
		s.Waiting += messages
		s.WaitingBytes += bytes
	}
	return s
}

// addStats adds the outbox's part.
func (o *outbox) addStats(s *Stats) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s.FramesSent, s.Resent, s.Acknowledged, s.PacketsSent = o.sent, o.resent, o.acked, o.packets
	s.QueuedFrames, s.QueuedBytes = o.frames, o.bytes
	for r, n := range o.dropped {
		s.Dropped[r.String()] += n
	}
}

func (in *inbound) addStats(s *Stats) {
	s.PacketsReceived, s.FramesReceived, s.Notices = in.packets.Load(), in.frames.Load(), in.notices.Load()
	for r := range dropReasons {
		if n := in.dropped[r].Load(); n > 0 {
			s.Dropped[r.String()] += n
		}
	}
}
