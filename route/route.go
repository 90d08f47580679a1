// Package route holds the addresses, routes and frames of the Ockam wire (spec
// routing 2 to 4) and their encodings: the CBOR body of a frame, the bundle of
// frames that an MQTT message carries, and the length-prefixed stream of TCP.
//
// Programs that merely name a destination need [To] and [Parse]. Endpoints work
// with [Frame] ([ParseFrame], [AppendFrame]). Whatever passes frames on works
// with [View], which reads a frame in place and writes its forwarded form into
// the caller's buffer without allocating.
//
// Decoding is as lenient as a stock Rust peer and no more (spec routing 3.4);
// encoding is always canonical: four elements, definite lengths, shortest heads,
// null tracing context. Limits are checked before anything is allocated. Bytes
// that are refused as a frame give a [*FrameError], which tells a malformed frame
// (ErrMalformed: on TCP the connection ends) from one that exceeds a limit
// (ErrLimit: the frame is dropped, the connection stays).
//
// The package is pure: it opens no sockets and starts no goroutines. Values are
// safe to share as long as nobody writes to the bytes that they alias.
package route

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Transport is the transport type of an address (spec routing 2.1).
type Transport uint8

// Transport types. On the wire a resolved route holds only Local addresses; the
// others name hops that a node would have to dial, which a hub never does.
const (
	LocalTransport Transport = 0
	TCP            Transport = 1
	UDP            Transport = 2
	WebSocket      Transport = 3
	BLE            Transport = 4
	Unix           Transport = 5
)

// Address is one hop: a transport type and its inner value, which is normally
// ASCII text but may hold any bytes. Addresses are equal when both parts are,
// byte for byte, so they can be compared with == and used as map keys.
type Address struct {
	Transport Transport
	Value     string
}

// Local returns the address of the worker called value in the receiving node.
// The value is taken as it is: "#" and "=>" have no meaning in it.
func Local(value string) Address { return Address{Value: value} }

// IsLocal reports whether the address is of the local transport type.
func (a Address) IsLocal() bool { return a.Transport == LocalTransport }

// ErrSyntax is wrapped by every error of ParseAddress and Parse.
var ErrSyntax = errors.New("route: cannot read as a route")

// ParseAddress reads the text form of an address (spec routing 2.2): "name" is
// local, "type#value" has a decimal transport type. More than one "#", a type
// above 255 and an empty value are errors.
func ParseAddress(text string) (Address, error) {
	fail := func(why string) (Address, error) {
		return Address{}, fmt.Errorf("%w: address %q %s", ErrSyntax, text, why)
	}
	head, value, typed := strings.Cut(text, "#")
	if !typed {
		if text == "" {
			return fail("is empty")
		}
		return Local(text), nil
	}
	if strings.Contains(value, "#") {
		return fail("has more than one #")
	}
	tt, err := strconv.ParseUint(head, 10, 8)
	if err != nil {
		return fail("has no transport type of 0 to 255 before the #")
	}
	if value == "" {
		return fail("has no value after the #")
	}
	return Address{Transport: Transport(tt), Value: value}, nil
}

// String returns the text form "type#value". A value that is not printable UTF-8
// is quoted, so that it cannot forge a line of a log; such a text does not parse
// back.
func (a Address) String() string {
	v := a.Value
	if !utf8.ValidString(v) || strings.ContainsFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) {
		v = strconv.QuoteToASCII(v)
	}
	return strconv.Itoa(int(a.Transport)) + "#" + v
}

// Route is a list of addresses, the next hop first. The empty route is legal.
// Methods never change the route they are called on and never share memory with
// it, except Rest.
type Route []Address

// To returns a route of local hops, each value taken as it is (see Local).
func To(hops ...string) Route {
	r := make(Route, len(hops))
	for i, h := range hops {
		r[i] = Local(h)
	}
	return r
}

// hopSeparator stands between the addresses of a route's text form.
const hopSeparator = "=>"

// Parse reads the text form of a route (spec routing 2.2): addresses with "=>"
// between them, blanks around them ignored. There must be at least one.
func Parse(text string) (Route, error) {
	parts := strings.Split(text, hopSeparator)
	r := make(Route, 0, len(parts))
	for _, p := range parts {
		a, err := ParseAddress(strings.TrimSpace(p))
		if err != nil {
			return nil, err
		}
		r = append(r, a)
	}
	return r, nil
}

// String returns the addresses' text forms with " => " between them; the empty
// route is the empty string.
func (r Route) String() string {
	var b strings.Builder
	for i, a := range r {
		if i > 0 {
			b.WriteString(" " + hopSeparator + " ")
		}
		b.WriteString(a.String())
	}
	return b.String()
}

// Clone returns a copy.
func (r Route) Clone() Route { return slices.Clone(r) }

// Equal reports whether both routes have the same addresses in the same order;
// nil and empty are equal.
func (r Route) Equal(other Route) bool { return slices.Equal(r, other) }

// First returns the first address, and false when the route is empty.
func (r Route) First() (Address, bool) {
	if len(r) == 0 {
		return Address{}, false
	}
	return r[0], true
}

// Last returns the last address, and false when the route is empty.
func (r Route) Last() (Address, bool) {
	if len(r) == 0 {
		return Address{}, false
	}
	return r[len(r)-1], true
}

// Rest returns the route without its first address; it shares memory with r but
// appending to it does not touch r. The rest of an empty route is empty.
func (r Route) Rest() Route {
	if len(r) == 0 {
		return nil
	}
	return r[1:len(r):len(r)]
}

// Append returns a fresh route of r followed by hops.
func (r Route) Append(hops ...Address) Route {
	return append(append(make(Route, 0, len(r)+len(hops)), r...), hops...)
}

// Prepend returns a fresh route of hops followed by r.
func (r Route) Prepend(hops ...Address) Route {
	return append(append(make(Route, 0, len(r)+len(hops)), hops...), r...)
}

// Class says how a frame is carried where the carrier has a choice.
type Class uint8

const (
	// Stored frames are kept until the next party has acknowledged them (MQTT
	// QoS 1).
	Stored Class = 0
	// Transient frames are kept in memory at most, for traffic that has its own
	// recovery (MQTT QoS 0).
	Transient Class = 1
)

// String returns "stored" or "transient".
func (c Class) String() string {
	switch c {
	case Stored:
		return "stored"
	case Transient:
		return "transient"
	default:
		return "class(" + strconv.Itoa(int(c)) + ")"
	}
}
