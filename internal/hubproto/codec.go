package hubproto

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// MaxMessage bounds every message of this package, in bytes.
const MaxMessage = 4 << 10

// Version is the version that this package writes and the only one it reads.
const Version = 1

var (
	// ErrTooLarge means that a message is longer than MaxMessage, or, for the few
	// kinds that have one, than its own limit.
	ErrTooLarge = errors.New("hubproto: message is too long")
	// ErrVersion means that a message has a version this package does not
	// know; one side of the connection is to be updated.
	ErrVersion = errors.New("hubproto: unknown message version")
	// ErrMalformed means that the bytes are not the message asked for.
	ErrMalformed = errors.New("hubproto: malformed message")
)

var (
	encMode = must(cbor.CoreDetEncOptions().EncMode())
	decMode = must(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   8,
		MaxArrayElements:  1024,
		MaxMapPairs:       1024,
		UTF8:              cbor.UTF8RejectInvalid,
		ExtraReturnErrors: cbor.ExtraDecErrorNone,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // the options above are constants
	}
	return v
}

// encode writes v, which is one of the wire structs of this package.
func encode(v any) ([]byte, error) { return encodeUpTo(v, MaxMessage) }

func encodeUpTo(v any, limit int) ([]byte, error) {
	b, err := encMode.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("hubproto: %w", err)
	}
	if len(b) > limit {
		return nil, fmt.Errorf("%w: %d bytes at most", ErrTooLarge, limit)
	}
	return b, nil
}

// header reads the version of any message, whatever its other keys hold.
type header struct {
	Version *uint64 `cbor:"0,keyasint"`
}

// decode reads b into v after checking size, form and version.
func decode(b []byte, v any) error { return decodeUpTo(b, v, MaxMessage) }

func decodeUpTo(b []byte, v any, limit int) error {
	if len(b) > limit {
		return fmt.Errorf("%w: %d bytes at most", ErrTooLarge, limit)
	}
	// A map head first: the decoder would take null or an array for a struct.
	if len(b) == 0 || b[0]&0xe0 != 0xa0 {
		return fmt.Errorf("%w: not a map", ErrMalformed)
	}
	var h header
	if err := decMode.Unmarshal(b, &h); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if h.Version == nil {
		return fmt.Errorf("%w: no version", ErrMalformed)
	}
	if *h.Version != Version {
		return fmt.Errorf("%w: %d, this side speaks %d", ErrVersion, *h.Version, Version)
	}
	if err := decMode.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

// fixed copies b into an array, or says that its length is wrong.
func fixed[A [16]byte | [32]byte](what string, b []byte) (a A, err error) {
	dst := fixedSlice(&a)
	if len(b) != len(dst) {
		return a, fmt.Errorf("%w: %s has %d bytes, not %d", ErrMalformed, what, len(b), len(dst))
	}
	copy(dst, b)
	return a, nil
}

func fixedSlice[A [16]byte | [32]byte](a *A) []byte {
	switch p := any(a).(type) {
	case *[16]byte:
		return p[:]
	case *[32]byte:
		return p[:]
	}
	return nil
}
