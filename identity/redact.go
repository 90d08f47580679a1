package identity

import (
	"fmt"
	"log/slog"
)

// secretText stands in for every secret, in every format.
const secretText = "[secret key]"

// redacted is embedded in types that hold secrets, so that no formatting verb
// and no logger shows them. The secrets themselves also lie behind a pointer:
// formatting the unexported field of a parent struct calls no method.
type redacted struct{}

// Format implements fmt.Formatter for every verb.
func (redacted) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(secretText)) }

// String implements fmt.Stringer.
func (redacted) String() string { return secretText }

// GoString implements fmt.GoStringer.
func (redacted) GoString() string { return secretText }

// LogValue implements slog.LogValuer.
func (redacted) LogValue() slog.Value { return slog.StringValue(secretText) }
