package hubproto

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// Sizes of the fixed fields.
const (
	NonceLen = 16
	EpochLen = 16
)

// HelloContext is the domain of the signature in a HelloAnswer.
const HelloContext = "sealmq hello/1"

// Features is a bit set. A side ignores the bits that it does not know.
type Features uint64

// HelloRequest is what a device sends to the service `hello` once on each
// connection, after it subscribed to its inbox.
//
//	{0: 1, 1: epoch bstr 16, 2: fresh bool, 3: nonce bstr 16, 4: features uint}
type HelloRequest struct {
	// Epoch is random for each process start.
	Epoch [EpochLen]byte
	// Fresh means that the keys of earlier channels are gone: what is queued
	// for them is to be discarded. Otherwise the device resumes.
	Fresh bool
	// Nonce is random for each request; the answer is signed over it.
	Nonce    [NonceLen]byte
	Features Features
}

type helloRequestWire struct {
	Version  uint64 `cbor:"0,keyasint"`
	Epoch    []byte `cbor:"1,keyasint"`
	Fresh    bool   `cbor:"2,keyasint"`
	Nonce    []byte `cbor:"3,keyasint"`
	Features uint64 `cbor:"4,keyasint"`
}

// Marshal returns the encoded request.
func (r *HelloRequest) Marshal() ([]byte, error) {
	return encode(helloRequestWire{Version, r.Epoch[:], r.Fresh, r.Nonce[:], uint64(r.Features)})
}

// ParseHelloRequest reads a request. The result owns its memory.
func ParseHelloRequest(b []byte) (*HelloRequest, error) {
	var w helloRequestWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	r := &HelloRequest{Fresh: w.Fresh, Features: Features(w.Features)}
	var err error
	if r.Epoch, err = fixed[[EpochLen]byte]("epoch", w.Epoch); err != nil {
		return nil, err
	}
	if r.Nonce, err = fixed[[NonceLen]byte]("nonce", w.Nonce); err != nil {
		return nil, err
	}
	return r, nil
}

// HelloAnswer is the hub's answer.
//
//	{0: 1, 1: identifier bstr 32, 2: epoch bstr 16, 3: time uint (unix ms),
//	 4: frame limit uint, 5: bundle limit uint, 6: window uint,
//	 7: forwarders [tstr], 8: features uint, 9: signature bstr,
//	 10: change history bstr, 11: forwarder count uint}
type HelloAnswer struct {
	// Hub is the hub's identifier, which the device has pinned or pins now.
	Hub identity.Identifier
	// Epoch is random for each start of the hub.
	Epoch [EpochLen]byte
	// Time is the hub's clock, in milliseconds.
	Time time.Time
	// FrameLimit is the longest frame body that the hub takes, in bytes.
	FrameLimit uint64
	// BundleLimit is the longest packet of several frames, in bytes.
	BundleLimit uint64
	// Window is how many unanswered publishes the hub allows before it closes
	// the connection.
	Window uint64
	// Forwarders are addresses that the hub holds for this device: the first
	// ones that fit, of ForwarderCount in all.
	Forwarders     []string
	ForwarderCount uint64
	Features       Features
	// Signature is the hub's, in HelloContext, over HelloSigned.
	Signature []byte
	// History is the hub's exported change history, for the first contact.
	// It is empty when it does not fit; the pinned one serves then.
	History []byte
}

type helloAnswerWire struct {
	Version        uint64   `cbor:"0,keyasint"`
	Hub            []byte   `cbor:"1,keyasint"`
	Epoch          []byte   `cbor:"2,keyasint"`
	Time           uint64   `cbor:"3,keyasint"`
	FrameLimit     uint64   `cbor:"4,keyasint"`
	BundleLimit    uint64   `cbor:"5,keyasint"`
	Window         uint64   `cbor:"6,keyasint"`
	Forwarders     []string `cbor:"7,keyasint"`
	Features       uint64   `cbor:"8,keyasint"`
	Signature      []byte   `cbor:"9,keyasint"`
	History        []byte   `cbor:"10,keyasint"`
	ForwarderCount uint64   `cbor:"11,keyasint"`
}

// Marshal returns the encoded answer. Forwarders that do not fit into
// MaxMessage are left out from the end.
func (a *HelloAnswer) Marshal() ([]byte, error) {
	w := helloAnswerWire{
		Version: Version, Hub: a.Hub[:], Epoch: a.Epoch[:], Time: uint64(max(a.Time.UnixMilli(), 0)),
		FrameLimit: a.FrameLimit, BundleLimit: a.BundleLimit, Window: a.Window,
		Forwarders: []string{}, Features: uint64(a.Features),
		Signature: nonNil(a.Signature), History: nonNil(a.History),
		ForwarderCount: max(a.ForwarderCount, uint64(len(a.Forwarders))),
	}
	b, err := encode(w)
	if err != nil {
		return nil, err
	}
	// The list's head grows by two bytes at most.
	room := MaxMessage - len(b) - 2
	n := 0
	for _, f := range a.Forwarders {
		// A text head of three bytes covers every address that fits.
		if room -= len(f) + 3; room < 0 {
			break
		}
		n++
	}
	if n == 0 {
		return b, nil
	}
	w.Forwarders = a.Forwarders[:n]
	return encode(w)
}

// ParseHelloAnswer reads an answer. The result owns its memory; its signature
// is not verified.
func ParseHelloAnswer(b []byte) (*HelloAnswer, error) {
	var w helloAnswerWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	if w.Time > maxMilli {
		return nil, fmt.Errorf("%w: time out of range", ErrMalformed)
	}
	a := &HelloAnswer{
		Time: time.UnixMilli(int64(w.Time)), FrameLimit: w.FrameLimit, BundleLimit: w.BundleLimit,
		Window: w.Window, Forwarders: w.Forwarders, ForwarderCount: w.ForwarderCount,
		Features: Features(w.Features), Signature: w.Signature, History: w.History,
	}
	hub, err := fixed[[32]byte]("identifier", w.Hub)
	if err != nil {
		return nil, err
	}
	a.Hub = identity.Identifier(hub)
	if a.Epoch, err = fixed[[EpochLen]byte]("epoch", w.Epoch); err != nil {
		return nil, err
	}
	return a, nil
}

// HelloSigned returns the bytes that the hub signs: the device's nonce, the
// hub's time in unix milliseconds (8 bytes, big endian) and, over TLS, the
// exporter value of the connection (RFC 9266); exporter is empty otherwise.
func HelloSigned(nonce [NonceLen]byte, t time.Time, exporter []byte) []byte {
	b := make([]byte, 0, NonceLen+8+len(exporter))
	b = append(b, nonce[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(max(t.UnixMilli(), 0)))
	return append(b, exporter...)
}

// maxMilli is the end of the year 9999, past which JSON cannot go.
const maxMilli = 253402300799999

func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
