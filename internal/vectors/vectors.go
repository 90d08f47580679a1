// Package vectors holds the test vectors of the Ockam wire as data: some taken
// from upstream's own tests, some derived by independent computation, some
// captured from a live Rust node (crate ockam 0.150.0) with the private keys
// of our side, so that every byte can be checked offline. Each file says where
// it comes from. Tests of every wire package read them from here; a missing or
// empty file is a failure, never a skip.
package vectors

import (
	"embed"
	"encoding/hex"
	"encoding/json"
	"testing"
)

//go:embed *.json
var files embed.FS

// Load decodes the named file into a value of type T, and fails the test when
// the file is missing or does not fit.
func Load[T any](t testing.TB, name string) T {
	t.Helper()
	var v T
	b, err := files.ReadFile(name)
	if err != nil {
		t.Fatalf("vectors: %v", err)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("vectors: %s: %v", name, err)
	}
	return v
}

// Hex is a byte string written as hexadecimal digits in a vector file.
type Hex []byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	*h = b
	return err
}
