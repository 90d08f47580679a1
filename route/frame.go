package route

import (
	"slices"

	"github.com/sealmq/sealmq/internal/cbor"
)

// Frame is one routed message. An endpoint makes and reads frames; a hop that
// merely passes them on uses View.
type Frame struct {
	// Onward is where the frame is to go, the next hop first. Empty makes it a
	// heartbeat that every receiver ignores.
	Onward Route
	// Return is the way back to the origin, which is its last hop. Often empty.
	Return Route
	// Payload is opaque to routing.
	Payload []byte
}

// ParseFrame reads one body like ParseView and copies its routes; Payload aliases
// body.
func ParseFrame(body []byte, lim Limits) (Frame, error) {
	v, err := ParseView(body, lim)
	if err != nil {
		return Frame{}, err
	}
	return v.Frame(), nil
}

// EncodedLen returns the length of what AppendFrame appends.
func (f *Frame) EncodedLen() int {
	return bodyLen(len(f.Onward), routeBytes(f.Onward), len(f.Return), routeBytes(f.Return), len(f.Payload))
}

// AppendFrame appends the canonical body of f, without any length in front.
func AppendFrame(dst []byte, f *Frame) []byte {
	dst = append(slices.Grow(dst, f.EncodedLen()), bodyHead)
	dst = AppendRoute(dst, f.Onward)
	dst = AppendRoute(dst, f.Return)
	return append(cbor.AppendBytes(dst, f.Payload), cbor.Null)
}

// AppendRoute appends the CBOR form of a route, as it stands in a body and in the
// plaintext of a secure channel: an array of addresses.
func AppendRoute(dst []byte, r Route) []byte {
	return appendAddresses(cbor.AppendArray(dst, len(r)), r)
}

// ParseRoute reads one route as AppendRoute writes it, as leniently as the routes
// of a frame, and returns the bytes behind it. The route shares no memory with b.
func ParseRoute(b []byte, lim Limits) (r Route, rest []byte, err error) {
	lim = lim.WithDefaults()
	var raw rawRoute
	n, ferr := raw.scan(b, 0, &lim)
	if ferr != nil {
		return nil, nil, ferr
	}
	return raw.route(), b[n:], nil
}

func appendAddresses(dst []byte, r Route) []byte {
	for _, a := range r {
		dst = cbor.AppendUint(append(dst, addressHead), uint64(a.Transport))
		dst = cbor.AppendBytesString(dst, a.Value)
	}
	return dst
}

func routeBytes(r Route) int {
	n := 0
	for _, a := range r {
		n += hopLen(uint64(a.Transport), len(a.Value))
	}
	return n
}

// Hops is a route encoded once for use with many frames. It is immutable and
// comparable; the zero Hops is the empty route.
type Hops struct {
	n   int
	enc string
}

// EncodeHops encodes r.
func EncodeHops(r Route) Hops {
	if len(r) == 0 {
		return Hops{}
	}
	return Hops{n: len(r), enc: string(appendAddresses(make([]byte, 0, routeBytes(r)), r))}
}

// Len returns the number of hops.
func (h Hops) Len() int { return h.n }

// Bytes returns how many bytes the hops add to a frame, apart from a possible
// growth of the array head.
func (h Hops) Bytes() int { return len(h.enc) }

// AppendEncoded appends the canonical body of a frame whose routes are encoded
// already, as AppendFrame would.
func AppendEncoded(dst []byte, onward, ret Hops, payload []byte) []byte {
	dst = append(slices.Grow(dst, bodyLen(onward.n, len(onward.enc), ret.n, len(ret.enc), len(payload))), bodyHead)
	dst = append(cbor.AppendArray(dst, onward.n), onward.enc...)
	dst = append(cbor.AppendArray(dst, ret.n), ret.enc...)
	return append(cbor.AppendBytes(dst, payload), cbor.Null)
}

// Route returns the hops as a fresh Route.
func (h Hops) Route() Route {
	raw := rawRoute{b: []byte(h.enc), n: h.n}
	return raw.route()
}
