package identity

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// HashSize is the length in bytes of an Identifier and of a ChangeHash.
const HashSize = 32

// Identifier names an identity for its whole life: it is the SHA-256 of the
// first change's signed data (spec identity 5), so it never changes when keys
// rotate. The zero value names nobody. Identifiers are comparable and can be
// map keys.
type Identifier [HashSize]byte

// ChangeHash names one change of a history: the SHA-256 of its signed data.
type ChangeHash [HashSize]byte

// ErrIdentifier means that a text is no identifier.
var ErrIdentifier = errors.New("identity: not an identifier: want I and 64 hexadecimal digits")

// ParseIdentifier reads the text form, "I" and 64 hexadecimal digits. White
// space around it is ignored and digits may be upper-case, as Rust peers do
// (spec identity 5).
func ParseIdentifier(s string) (Identifier, error) {
	var id Identifier
	t := strings.TrimSpace(s)
	if len(t) != 1+2*HashSize || t[0] != 'I' {
		return Identifier{}, ErrIdentifier
	}
	if _, err := hex.Decode(id[:], []byte(t[1:])); err != nil {
		return Identifier{}, ErrIdentifier
	}
	return id, nil
}

// String returns the text form.
func (id Identifier) String() string {
	var b [1 + 2*HashSize]byte
	b[0] = 'I'
	hex.Encode(b[1:], id[:])
	return string(b[:])
}

// IsZero reports whether id is the zero value, which names nobody.
func (id Identifier) IsZero() bool { return id == Identifier{} }

// Compare orders identifiers bytewise, for sorted lists.
func (id Identifier) Compare(other Identifier) int {
	return strings.Compare(string(id[:]), string(other[:]))
}

// MarshalText implements encoding.TextMarshaler. The zero value is the empty
// text.
func (id Identifier) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return []byte{}, nil
	}
	return []byte(id.String()), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *Identifier) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = Identifier{}
		return nil
	}
	v, err := ParseIdentifier(string(text))
	if err != nil {
		return fmt.Errorf("%w (got %d bytes)", err, len(text))
	}
	*id = v
	return nil
}

// String returns 64 hexadecimal digits.
func (h ChangeHash) String() string { return hex.EncodeToString(h[:]) }
