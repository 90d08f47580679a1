package identity

import (
	"fmt"
	"log/slog"
)

// secretText stands in for every secret, in every format.
const secretText = "[secret key]"

// hidden holds secret bytes in a closure. Formatting the unexported field of a
// parent struct calls no method of the field's type, and with a verb that does
// not fit, such as %s, fmt even follows one pointer; nothing sees into a
// closure, reflection included.
type hidden func() []byte

// hide keeps b, which the caller must not use any more.
func hide(b []byte) hidden { return func() []byte { return b } }

// redacted is embedded in types that hold secrets, so that no formatting verb
// and no logger shows anything of them.
type redacted struct{}

// Format implements fmt.Formatter for every verb.
func (redacted) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(secretText)) }

// String implements fmt.Stringer.
func (redacted) String() string { return secretText }

// GoString implements fmt.GoStringer.
func (redacted) GoString() string { return secretText }

// LogValue implements slog.LogValuer.
func (redacted) LogValue() slog.Value { return slog.StringValue(secretText) }
