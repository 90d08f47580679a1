package channel

import (
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/cbor"
	"github.com/sealmq/sealmq/route"
)

// Variants of a SecureChannelMessage (spec secure-channel 9.2).
const (
	variantPayload = 0
	variantRefresh = 1
	variantClose   = 2
)

// Limits of the routes inside a channel, as for frames outside.
const (
	maxInnerHops    = route.DefaultHops
	maxInnerAddress = route.DefaultAddress
)

// maxCredentials bounds how many credentials of one message are looked at.
const maxCredentials = 8

var (
	errVariant     = errors.New("unknown kind of message")
	errHops        = errors.New("route has too many hops")
	errAddressLong = errors.New("address is too long")
	errTransport   = errors.New("transport type above 255")
	errFields      = errors.New("fewer fields than the structure has")
	errEnum        = errors.New("enum is not an array of two")
)

// closePlaintext is the whole plaintext of a Close.
var closePlaintext = []byte{0x82, 0x82, variantClose, 0x80, 0x40}

// message is a decoded plaintext. Its byte slices alias the plaintext.
type message struct {
	variant     uint64
	onward, ret route.Route // Payload
	payload     []byte      // Payload
	history     []byte      // RefreshCredentials
	credentials [][]byte    // RefreshCredentials
}

func routeLen(r route.Route) int {
	n := cbor.HeadLen(uint64(len(r)))
	for i := range r {
		n += 1 + cbor.HeadLen(uint64(r[i].Transport)) + cbor.HeadLen(uint64(len(r[i].Value))) + len(r[i].Value)
	}
	return n
}

// payloadLen is the length of what appendPayload appends.
func payloadLen(onward, ret route.Route, payload []byte) int {
	return 5 + routeLen(onward) + routeLen(ret) + cbor.HeadLen(uint64(len(payload))) + len(payload) + 1
}

// appendPayload appends the plaintext of a Payload message: the wrapper is
// written around the payload, which is copied once.
func appendPayload(dst []byte, onward, ret route.Route, payload []byte) []byte {
	dst = append(dst, 0x82, 0x82, variantPayload, 0x81, 0x83)
	dst = route.AppendRoute(dst, onward)
	dst = route.AppendRoute(dst, ret)
	dst = cbor.AppendBytes(dst, payload)
	return append(dst, 0x40) // the padding element, always empty
}

// appendRefresh appends the plaintext of a RefreshCredentials message.
func appendRefresh(dst, history []byte, credentials ...[]byte) []byte {
	dst = append(dst, 0x82, 0x82, variantRefresh, 0x81)
	return append(identity.AppendRefresh(dst, history, credentials...), 0x40)
}

// parseMessage decodes a plaintext as leniently as a stock peer: any padding,
// further elements and bytes after the whole are ignored.
func parseMessage(b []byte) (message, error) {
	m, err := parsePadded(cbor.NewReader(b))
	if err != nil {
		return message{}, fmt.Errorf("channel: plaintext: %w", err)
	}
	return m, nil
}

// next reads the head position of the next field of a struct.
func nextField(l *cbor.List) error {
	more, err := l.Next()
	if err == nil && !more {
		err = errFields
	}
	return err
}

func parsePadded(r *cbor.Reader) (message, error) {
	outer, err := r.Array()
	if err != nil {
		return message{}, err
	}
	if err := nextField(&outer); err != nil {
		return message{}, err
	}
	m, err := parseVariant(r)
	if err != nil {
		return message{}, err
	}
	if err := nextField(&outer); err != nil {
		return message{}, err
	}
	if _, err := r.Bytes(); err != nil { // padding, whatever it holds
		return message{}, err
	}
	return m, outer.SkipRest()
}

func parseVariant(r *cbor.Reader) (m message, err error) {
	enum, err := r.Array()
	if err != nil {
		return m, err
	}
	if n, definite := enum.Count(); !definite || n != 2 {
		return m, errEnum
	}
	if m.variant, err = r.Uint(); err != nil {
		return m, err
	}
	fields, err := r.Array()
	if err != nil {
		return m, err
	}
	switch m.variant {
	case variantPayload:
		if err = nextField(&fields); err == nil {
			err = m.parsePayload(r)
		}
	case variantRefresh:
		if err = nextField(&fields); err == nil {
			err = m.parseRefresh(r)
		}
	case variantClose:
	default:
		err = errVariant
	}
	if err != nil {
		return m, err
	}
	return m, fields.SkipRest()
}

func (m *message) parsePayload(r *cbor.Reader) error {
	body, err := r.Array()
	if err != nil {
		return err
	}
	for _, dst := range []*route.Route{&m.onward, &m.ret} {
		if err := nextField(&body); err != nil {
			return err
		}
		if *dst, err = parseRoute(r); err != nil {
			return err
		}
	}
	if err := nextField(&body); err != nil {
		return err
	}
	if m.payload, err = r.Bytes(); err != nil {
		return err
	}
	return body.SkipRest()
}

func (m *message) parseRefresh(r *cbor.Reader) error {
	body, err := r.Array()
	if err != nil {
		return err
	}
	if err := nextField(&body); err != nil {
		return err
	}
	if m.history, err = span(r); err != nil {
		return err
	}
	if err := nextField(&body); err != nil {
		return err
	}
	if m.credentials, err = parseSpans(r); err != nil {
		return err
	}
	return body.SkipRest()
}

func parseRoute(r *cbor.Reader) (route.Route, error) {
	list, err := r.Array()
	if err != nil {
		return nil, err
	}
	var out route.Route
	if n, definite := list.Count(); definite && n > 0 {
		if n > maxInnerHops {
			return nil, errHops
		}
		// One more than there are: the encryptor's address goes in front of a
		// return route.
		out = make(route.Route, 0, n+1)
	}
	for {
		more, err := list.Next()
		if err != nil || !more {
			return out, err
		}
		if len(out) == maxInnerHops {
			return nil, errHops
		}
		a, err := parseAddress(r)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
}

func parseAddress(r *cbor.Reader) (route.Address, error) {
	pair, err := r.Array()
	if err != nil {
		return route.Address{}, err
	}
	if err := nextField(&pair); err != nil {
		return route.Address{}, err
	}
	tt, err := r.Uint()
	if err != nil {
		return route.Address{}, err
	}
	if tt > 255 {
		return route.Address{}, errTransport
	}
	if err := nextField(&pair); err != nil {
		return route.Address{}, err
	}
	value, err := r.Bytes()
	if err != nil {
		return route.Address{}, err
	}
	if len(value) > maxInnerAddress {
		return route.Address{}, errAddressLong
	}
	return route.Address{Transport: route.Transport(tt), Value: string(value)}, pair.SkipRest()
}

// span reads one item of any kind and returns its bytes.
func span(r *cbor.Reader) ([]byte, error) {
	start := r.Offset()
	if err := r.Skip(); err != nil {
		return nil, err
	}
	return r.Since(start), nil
}

// parseSpans reads an array of items of any kind.
func parseSpans(r *cbor.Reader) ([][]byte, error) {
	list, err := r.Array()
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for {
		more, err := list.Next()
		if err != nil || !more {
			return out, err
		}
		b, err := span(r)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
}
