package delivery

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Version is the only version of the messages.
const Version = 1

// Limits of the messages.
const (
	// MaxAddress bounds Data.To, in bytes.
	MaxAddress = 255
	// MaxWindow bounds the messages of an outbox between the oldest that is not
	// acknowledged and the newest sent.
	MaxWindow = 4096
	// Overhead is what a Data message adds to its payload and its address, in
	// bytes, at most.
	Overhead = 96
	// maxControl bounds every message but Data, in bytes.
	maxControl = 4 << 10
	// maxBitmap is the length of a bitmap over the largest window.
	maxBitmap = MaxWindow / 8
)

// OutboxID names an outbox: 16 random bytes.
type OutboxID [16]byte

// String returns the id in hexadecimal.
func (id OutboxID) String() string { return hex.EncodeToString(id[:]) }

// Kind tells the messages apart.
type Kind uint8

// Kinds of messages.
const (
	KindData   Kind = iota // a message of the program, or the place of one that was withdrawn
	KindAsk                // asks for a State
	KindState              // what the receiver has and has acknowledged
	KindSettle             // says that the sender knows of all acknowledgements
)

// Refusal is why a receiver does not take the message that is due.
type Refusal uint8

// Refusals.
const (
	RefusalNone    Refusal = iota
	RefusalUnknown         // no worker at the address takes acknowledged messages from this peer
	RefusalFull            // a limit of the receiver is reached
)

// String returns the refusal's name.
func (r Refusal) String() string {
	switch r {
	case RefusalNone:
		return "none"
	case RefusalUnknown:
		return "unknown"
	case RefusalFull:
		return "full"
	}
	return fmt.Sprintf("refusal %d", uint8(r))
}

// Header begins every message.
type Header struct {
	Outbox OutboxID
	// Session numbers the channels that the outbox has been sent on.
	Session uint64
	// Serial numbers the transmissions of a session, from 1. In a State it is the
	// highest seen.
	Serial uint64
	// Base is the lowest count that is not acknowledged: as the sender knows, and
	// in a State as the receiver knows.
	Base uint64
}

// Data carries one message.
type Data struct {
	Header
	Count uint64
	// Redelivered: an earlier process of the receiver may have seen it.
	Redelivered bool
	// Void: the sender has withdrawn it; it has neither address nor payload.
	Void    bool
	To      string
	Payload []byte
}

// Ask asks for a State.
type Ask struct {
	Header
	// Last is the highest count that the sender has; Base-1 when all are
	// acknowledged.
	Last uint64
}

// Settle says that every count before Base is acknowledged and the sender knows,
// while it has nothing else to say. It is not answered.
type Settle struct{ Header }

// State is a receiver's answer.
type State struct {
	Header
	// Next is the lowest count that has not been handed on.
	Next uint64
	// Acked has a bit for each count from Base on that the program has
	// acknowledged; the lowest bit of the first byte is Base's.
	Acked []byte
	// Held is the same for counts from Next on that have been received.
	Held []byte
	// Messages and Bytes are the window: how many messages, from Base on, and how
	// many bytes of payload may be without acknowledgement. One message is always
	// admitted.
	Messages, Bytes uint64
	// Refusal is why the message at Next was not taken.
	Refusal Refusal
}

// Message is *Data, *Ask, *State or *Settle.
type Message interface {
	head() *Header
	// Append appends the encoding to dst.
	Append(dst []byte) []byte
}

func (h *Header) head() *Header { return h }

// wire is the one CBOR map of all messages.
type wire struct {
	Version  uint64 `cbor:"0,keyasint"`
	Kind     uint64 `cbor:"1,keyasint"`
	Outbox   []byte `cbor:"2,keyasint"`
	Session  uint64 `cbor:"3,keyasint"`
	Serial   uint64 `cbor:"4,keyasint"`
	Base     uint64 `cbor:"5,keyasint"`
	Count    uint64 `cbor:"6,keyasint,omitempty"`
	Flags    uint64 `cbor:"7,keyasint,omitempty"`
	To       string `cbor:"8,keyasint,omitempty"`
	Payload  []byte `cbor:"9,keyasint,omitempty"`
	Next     uint64 `cbor:"10,keyasint,omitempty"`
	Acked    []byte `cbor:"11,keyasint,omitempty"`
	Held     []byte `cbor:"12,keyasint,omitempty"`
	Messages uint64 `cbor:"13,keyasint,omitempty"`
	Bytes    uint64 `cbor:"14,keyasint,omitempty"`
	Refusal  uint64 `cbor:"15,keyasint,omitempty"`
}

// Bits of wire.Flags.
const (
	flagRedelivered = 1 << 0
	flagVoid        = 1 << 1
)

var (
	encMode = must(cbor.CoreDetEncOptions().EncMode())
	decMode = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		MaxNestedLevels:  8,
		MaxArrayElements: 1024,
		MaxMapPairs:      64,
	}.DecMode())
)

func must[M any](m M, err error) M {
	if err != nil {
		panic("delivery: cbor options: " + err.Error())
	}
	return m
}

func (h *Header) wire(k Kind) wire {
	return wire{
		Version: Version, Kind: uint64(k), Outbox: h.Outbox[:],
		Session: h.Session, Serial: h.Serial, Base: h.Base,
	}
}

func (w *wire) append(dst []byte) []byte {
	b, err := encMode.Marshal(w)
	if err != nil {
		panic("delivery: encode: " + err.Error()) // the type has no value that fails
	}
	if dst == nil {
		return b
	}
	return append(dst, b...)
}

// Append implements Message.
func (d *Data) Append(dst []byte) []byte {
	w := d.wire(KindData)
	w.Count, w.To, w.Payload = d.Count, d.To, d.Payload
	if d.Redelivered {
		w.Flags |= flagRedelivered
	}
	if d.Void {
		w.Flags |= flagVoid
	}
	return w.append(dst)
}

// Append implements Message.
func (a *Ask) Append(dst []byte) []byte {
	w := a.wire(KindAsk)
	w.Count = a.Last
	return w.append(dst)
}

// Append implements Message.
func (s *Settle) Append(dst []byte) []byte {
	w := s.wire(KindSettle)
	return w.append(dst)
}

// Append implements Message.
func (s *State) Append(dst []byte) []byte {
	w := s.wire(KindState)
	w.Next, w.Acked, w.Held = s.Next, s.Acked, s.Held
	w.Messages, w.Bytes, w.Refusal = s.Messages, s.Bytes, uint64(s.Refusal)
	return w.append(dst)
}

// ErrMessage means that bytes are not a message of this protocol.
var ErrMessage = errors.New("delivery: not a message")

// Parse reads one message. Keys that it does not know are ignored. The message
// owns its memory.
func Parse(b []byte) (Message, error) {
	var w wire
	if err := decMode.Unmarshal(b, &w); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMessage, err)
	}
	if why := w.check(len(b)); why != "" {
		return nil, fmt.Errorf("%w: %s", ErrMessage, why)
	}
	h := Header{Outbox: OutboxID(w.Outbox), Session: w.Session, Serial: w.Serial, Base: w.Base}
	switch Kind(w.Kind) {
	case KindData:
		return &Data{
			Header: h, Count: w.Count, To: w.To, Payload: w.Payload,
			Redelivered: w.Flags&flagRedelivered != 0, Void: w.Flags&flagVoid != 0,
		}, nil
	case KindAsk:
		return &Ask{Header: h, Last: w.Count}, nil
	case KindState:
		return &State{
			Header: h, Next: w.Next, Acked: w.Acked, Held: w.Held,
			Messages: w.Messages, Bytes: w.Bytes, Refusal: Refusal(w.Refusal),
		}, nil
	default:
		return &Settle{Header: h}, nil
	}
}

// maxNumber bounds counts, sessions and serials, so that arithmetic on them does
// not wrap.
const maxNumber = 1 << 62

// check returns what is wrong with a message of n bytes.
func (w *wire) check(n int) string {
	switch {
	case w.Version != Version:
		return "unknown version"
	case w.Kind > uint64(KindSettle):
		return "unknown kind"
	case len(w.Outbox) != len(OutboxID{}):
		return "outbox id is not 16 bytes"
	case w.Base == 0 || w.Base > maxNumber || w.Session > maxNumber || w.Serial > maxNumber || w.Count > maxNumber || w.Next > maxNumber:
		return "number out of range"
	case Kind(w.Kind) != KindData && n > maxControl:
		return "longer than 4 KiB"
	}
	switch Kind(w.Kind) {
	case KindData:
		void := w.Flags&flagVoid != 0
		switch {
		case w.Session == 0 || w.Serial == 0:
			return "session or serial is 0"
		case w.Count < w.Base || w.Count-w.Base >= MaxWindow:
			return "count is outside of any window"
		case void && (w.To != "" || len(w.Payload) > 0):
			return "withdrawn message with contents"
		case !void && (w.To == "" || len(w.To) > MaxAddress):
			return "address is empty or too long"
		}
	case KindAsk:
		switch {
		case w.Session == 0 || w.Serial == 0:
			return "session or serial is 0"
		case w.Count < w.Base-1:
			return "last count is before base"
		}
	case KindState:
		switch {
		case w.Next < w.Base || w.Next-w.Base > MaxWindow:
			return "next is outside of any window"
		case len(w.Acked) > maxBitmap || len(w.Held) > maxBitmap:
			return "bitmap is longer than any window"
		case w.Refusal > 255:
			return "refusal out of range"
		}
	case KindSettle:
	}
	return ""
}

// bitmap helpers: bit i is bit i%8 of byte i/8.

func bit(b []byte, i uint64) bool {
	return i/8 < uint64(len(b)) && b[i/8]&(1<<(i%8)) != 0
}

func setBit(b []byte, i uint64) []byte {
	for uint64(len(b)) <= i/8 {
		b = append(b, 0)
	}
	b[i/8] |= 1 << (i % 8)
	return b
}
