package route

import (
	"errors"
	"fmt"
)

var (
	// ErrMalformed means that bytes are not a frame at all. On a TCP stream the
	// connection cannot go on; over MQTT the message is dropped.
	ErrMalformed = errors.New("route: not a frame")
	// ErrLimit means that a frame exceeds one of the receiver's limits. It is
	// dropped; the connection stays usable.
	ErrLimit = errors.New("route: frame exceeds a limit")
	// ErrTooLarge is the ErrLimit of a body longer than Limits.Frame.
	ErrTooLarge = errors.New("route: frame is too large")
	// ErrTooManyHops is the ErrLimit of a route longer than Limits.Hops.
	ErrTooManyHops = errors.New("route: route has too many hops")
	// ErrAddressTooLong is the ErrLimit of an address longer than Limits.Address.
	ErrAddressTooLong = errors.New("route: address is too long")
	// ErrMixed means that the frames of a bundle have different first hops. The
	// bundle is refused whole.
	ErrMixed = errors.New("route: bundle mixes first hops")
)

// Reason says what is wrong with a frame.
type Reason uint8

// Reasons. Up to ReasonTransport they are of the class ErrMalformed.
const (
	ReasonTruncated   Reason = iota + 1 // input ends inside the frame; an empty body too
	ReasonHead                          // a CBOR head that is not well-formed
	ReasonNotArray                      // outer item is not an array (a map, a tag, ...)
	ReasonTooFew                        // fewer than three elements
	ReasonRoute                         // onward or return route is not an array
	ReasonAddress                       // an address is not [type, byte string]
	ReasonPayload                       // payload is not a definite byte string
	ReasonTracing                       // tracing context is neither definite text nor null
	ReasonDepth                         // ignored elements nest too deeply
	ReasonTransport                     // transport type above 255
	ReasonFrameLength                   // ErrTooLarge
	ReasonHops                          // ErrTooManyHops
	ReasonValueLength                   // ErrAddressTooLong
	ReasonFrames                        // bundle of more than MaxReceivedFrames
)

var reasonTexts = [...]string{
	ReasonTruncated:   "input ends inside the frame",
	ReasonHead:        "malformed CBOR head",
	ReasonNotArray:    "not an array",
	ReasonTooFew:      "fewer than three elements",
	ReasonRoute:       "route is not an array",
	ReasonAddress:     "address is not a transport type and a byte string",
	ReasonPayload:     "payload is not a byte string",
	ReasonTracing:     "tracing context is neither text nor null",
	ReasonDepth:       "extra elements nest too deeply",
	ReasonTransport:   "transport type above 255",
	ReasonFrameLength: "frame is longer than the limit",
	ReasonHops:        "route has more hops than the limit",
	ReasonValueLength: "address is longer than the limit",
	ReasonFrames:      "bundle has more frames than the limit",
}

// String describes the reason in a few words.
func (r Reason) String() string {
	if int(r) < len(reasonTexts) && r > 0 {
		return reasonTexts[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// FrameError says why bytes were refused as a frame. errors.Is finds ErrMalformed,
// or ErrLimit and the limit's own sentinel.
type FrameError struct {
	Reason Reason
	// Offset is where in the body the offending item begins, in bytes; for a
	// frame of a bundle it counts from the start of the bundle.
	Offset int
}

func (e *FrameError) Error() string {
	kind := "malformed frame"
	if e.Reason >= ReasonFrameLength {
		kind = "frame over a limit"
	}
	return fmt.Sprintf("route: %s at byte %d: %s", kind, e.Offset, e.Reason)
}

// Is implements errors.Is for the sentinels of this package.
func (e *FrameError) Is(target error) bool {
	switch target {
	case ErrMalformed:
		return e.Reason < ReasonFrameLength
	case ErrLimit:
		return e.Reason >= ReasonFrameLength
	case ErrTooLarge:
		return e.Reason == ReasonFrameLength
	case ErrTooManyHops:
		return e.Reason == ReasonHops
	case ErrAddressTooLong:
		return e.Reason == ReasonValueLength
	default:
		return false
	}
}
