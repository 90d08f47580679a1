package channel

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// HelloAddress is the address inside a channel at which two sealmq peers speak
// about the channel itself. A stock peer has no worker there and ignores it.
const HelloAddress = "sealmq.hello"

// DeliveryAddress is the address inside a channel reserved for the delivery
// layer. Messages to it are handed on like any other.
const DeliveryAddress = "sealmq.delivery"

// helloVersion is the only version of the messages below.
const helloVersion = 1

// maxHello bounds one of our own messages, in bytes.
const maxHello = 4 << 10

// epochLen is the length of a process epoch in bytes.
const epochLen = 16

// Features is a set of what a sealmq peer offers beyond Ockam, one bit each.
// Bits that a receiver does not know have no meaning to it.
type Features uint64

// FeatureDelivery says that the peer takes acknowledged messages at
// DeliveryAddress.
const FeatureDelivery Features = 1 << 0

// helloKind tells the messages at HelloAddress apart.
type helloKind uint64

const (
	helloGreeting helloKind = 0 // sent by both right after the handshake
	helloPing     helloKind = 1 // asks for a pong
	helloPong     helloKind = 2 // answers a ping
	helloBye      helloKind = 3 // says why the Close that follows comes
)

// byeReason is the reason of a bye.
type byeReason uint64

const (
	byeOther  byeReason = 0
	byeGap    byeReason = 1 // frames beyond the window
	byeSilent byeReason = 2 // no answer to pings
)

// hello is a message at HelloAddress: a deterministic CBOR map with integer
// keys. Unknown keys are ignored and an unknown version is refused.
type hello struct {
	Version  uint64    `cbor:"0,keyasint"`
	Epoch    []byte    `cbor:"1,keyasint"`           // 16 bytes, fresh for each start of the process
	Features Features  `cbor:"2,keyasint,omitempty"` // see Features
	Kind     helloKind `cbor:"3,keyasint,omitempty"`
	Reason   byeReason `cbor:"4,keyasint,omitempty"` // of a bye
	Lineage  []byte    `cbor:"5,keyasint,omitempty"` // of an initiator: see DialOptions.Lineage
	Turn     uint64    `cbor:"6,keyasint,omitempty"` // rises with each channel of a lineage
}

var (
	helloEnc = mustMode(cbor.CoreDetEncOptions().EncMode())
	helloDec = mustMode(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		MaxNestedLevels:  8,
		MaxArrayElements: 1024,
		MaxMapPairs:      64,
	}.DecMode())

	errHelloVersion = errors.New("unknown version")
	errHelloEpoch   = errors.New("epoch is not 16 bytes")
	errHelloLong    = errors.New("longer than 4 KiB")
	errHelloLineage = errors.New("lineage is not 16 bytes")
)

func mustMode[M any](m M, err error) M {
	if err != nil {
		panic("channel: cbor options: " + err.Error())
	}
	return m
}

func (h *hello) encode() []byte {
	b, err := helloEnc.Marshal(h)
	if err != nil {
		panic("channel: encode hello: " + err.Error()) // the type has no value that fails
	}
	return b
}

func parseHello(b []byte) (h hello, err error) {
	switch {
	case len(b) > maxHello:
		err = errHelloLong
	default:
		err = helloDec.Unmarshal(b, &h)
	}
	if err == nil && h.Version != helloVersion {
		err = errHelloVersion
	}
	if err == nil && len(h.Epoch) != epochLen {
		err = errHelloEpoch
	}
	if err == nil && len(h.Lineage) != 0 && len(h.Lineage) != lineageLen {
		err = errHelloLineage
	}
	if err != nil {
		return hello{}, fmt.Errorf("channel: hello: %w", err)
	}
	return h, nil
}
