package bridge

import (
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// MemoryOutboxes returns the default OutboxFactory, for stores that serve from
// memory what they keep elsewhere. Its outboxes have two further methods,
//
//	Frame(seq uint64) []byte
//	Skip(to uint64)
//
// The first returns the frame with a sequence, nil when it is not there: so who stores
// it elsewhere needs not encode it a second time. The bytes are valid until the next
// change. The second makes the next sequence to, for a store that restores a queue.
func MemoryOutboxes() OutboxFactory { return newMemoryOutboxes() }

// RoutedPacket returns a packet of frames, one at least, that are routed and stamped
// already, as an Outbox returned them before a restart. One frame is not copied.
func RoutedPacket(class route.Class, arrival int64, first bool, hop, frame []byte, more ...[]byte) *Packet {
	p := &Packet{Class: class, Arrival: arrival, First: first, Hop: hop, raw: frame}
	if len(more) > 0 {
		p.ends = []int{len(frame)}
		p.raw = append([]byte(nil), frame...)
		for _, f := range more {
			p.raw = append(p.raw, f...)
			p.ends = append(p.ends, len(p.raw))
		}
	}
	return p
}

// NewTicket returns the ticket of a packet that no connection sent: ack hears when
// it is stored. For those who try out an Outbox.
func NewTicket(ack Acker, token uint64) Ticket { return Ticket{ack: ack, token: token} }

// Acker returns who hears of the ticket.
func (t Ticket) Acker() Acker { return t.ack }

// Frame returns the frame with a sequence, nil when it is not there, until the next
// change.
func (m *memoryOutbox) Frame(seq uint64) []byte {
	if s := m.live(seq); s != nil {
		return m.frame(s)
	}
	return nil
}

// Skip makes the next sequence to, unless it is higher already. The oldest and the
// next must stay less than 1<<31 apart.
func (m *memoryOutbox) Skip(to uint64) {
	if m.n == 0 || to-m.seq(m.at(0)) < maxSpan {
		m.next = max(m.next, to)
	}
}

// Oversized says that the front reads past a frame of so many bytes above the frame
// limit, which is all that is known of it: counted as received and dropped, and taken
// off what the peer may send a second, as a packet of stored class that Receive was
// given. One goroutine at a time calls this or Receive.
func (l *Link) Oversized(bytes int, ack Acker, token uint64) {
	l.Flush()
	s := l.port.stripe
	s.received.Add(1)
	s.drop(DropTooLarge, 1)
	l.notify(hubproto.ReasonTooLarge, nil, 1)
	t := Ticket{link: l, ack: ack, token: token, bytes: bytes}
	t.due, _ = l.charge(route.Stored, 1, bytes, l.port.b.now())
	t.fire()
}
