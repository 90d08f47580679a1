package node

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"strconv"
	"sync/atomic"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// MessageID names a message. Those of the delivery layer are made by the sender
// and outlive channels and processes. Other messages get one from the receiving
// node: the verified sender if any, the node's random 16 bytes of this process, and
// a count; it is unique but means nothing to the sender.
type MessageID struct {
	Sender identity.Identifier
	Outbox [16]byte
	Count  uint64
}

// IsZero reports whether the id is unset.
func (id MessageID) IsZero() bool { return id == MessageID{} }

// String returns the three parts with "/" between them.
func (id MessageID) String() string {
	sender := "-"
	if !id.Sender.IsZero() {
		sender = id.Sender.String()
	}
	return sender + "/" + hex.EncodeToString(id.Outbox[:]) + "/" + strconv.FormatUint(id.Count, 10)
}

// Message is what a worker receives. It belongs to its receiver, who may keep and
// change it.
type Message struct {
	// Payload is the message itself.
	Payload []byte
	// From is the verified identifier of the channel's peer; zero when the message
	// did not come through a secure channel.
	From identity.Identifier
	// Address is where the message arrived on this node.
	Address string
	// Onward is what the sender's route names behind Address; usually empty.
	Onward route.Route
	// ReturnRoute is the way back to the sender; empty when it wants no answer. Of
	// a message through a channel it begins with the channel's address, so that
	// the answer goes through the channel.
	ReturnRoute route.Route
	// Class is how the message was carried; Reply uses the same.
	Class route.Class
	// Origin says more about where the message came from.
	Origin Origin
	// ID names the message.
	ID MessageID
	// Redelivered says that an earlier receiver process may have seen the message:
	// the delivery layer gives it the same ID again.
	Redelivered bool
	// Lost counts the messages for this address that were dropped just before this
	// one because the queue was full. Callbacks find it here; Receive reports it as
	// a *LostError instead and leaves it 0.
	Lost uint64

	ack     *ackState
	bounded bool   // somebody else bounds how many there are
	dropped func() // or nil
}

// ackState is shared by copies of a message.
type ackState struct {
	fn   func() error
	done atomic.Bool
}

// Ack says that the program has taken the message, after which the delivery layer
// tells the sender and does not bring it again. It may be called from any
// goroutine. Only the first call acts; for messages that nobody waits for it does
// nothing and returns nil.
func (m *Message) Ack() error {
	if m.ack == nil || m.ack.done.Swap(true) {
		return nil
	}
	if err := m.ack.fn(); err != nil {
		m.ack.done.Store(false)
		return fmt.Errorf("node: acknowledge: %w", err)
	}
	return nil
}

// Text decodes the payload as Ockam's String (BARE, spec routing 5), which must use
// it up.
func (m *Message) Text() (string, error) {
	s, err := bare.StringExact(m.Payload)
	if err != nil {
		return "", fmt.Errorf("node: payload is not an Ockam string: %w", err)
	}
	return s, nil
}

// String returns the text of the payload, or, when it is not an Ockam String, the
// quoted bytes. It is for showing a message to its reader; a slog logger gets no
// payload (see LogValue).
func (m *Message) String() string {
	if s, err := m.Text(); err == nil {
		return s
	}
	return strconv.QuoteToASCII(string(m.Payload))
}

// LogValue implements slog.LogValuer without the payload.
func (m *Message) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("address", m.Address),
		slog.String("via", m.Origin.Via.String()),
		slog.String("peer", m.From.String()),
		slog.Int("bytes", len(m.Payload)),
	)
}
