package bare

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Spec routing 5 and 11.1: lengths as ULEB128.
func TestUvarint(t *testing.T) {
	for _, c := range []struct {
		v   uint64
		hex string
	}{
		{0, "00"}, {127, "7f"}, {128, "8001"}, {200, "c801"}, {300, "ac02"}, {16384, "808001"},
		{math.MaxUint64, "ffffffffffffffffff01"},
	} {
		if got := AppendUvarint(nil, c.v); !bytes.Equal(got, unhex(t, c.hex)) {
			t.Errorf("%d is %x, want %s", c.v, got, c.hex)
		}
		v, rest, err := Uvarint(append(unhex(t, c.hex), 0xaa))
		if err != nil || v != c.v || !bytes.Equal(rest, []byte{0xaa}) {
			t.Errorf("%s is %d, rest %x, %v", c.hex, v, rest, err)
		}
		for n := range unhex(t, c.hex) {
			if _, _, err := Uvarint(unhex(t, c.hex)[:n]); !errors.Is(err, ErrTruncated) {
				t.Errorf("%s cut at %d: %v", c.hex, n, err)
			}
		}
	}
	if v, _, err := Uvarint(unhex(t, "8500")); err != nil || v != 5 {
		t.Errorf("over-long 5: %d, %v", v, err)
	}
	for _, s := range []string{"ffffffffffffffffff02", "8080808080808080808001", "80808080808080808080"} {
		if _, _, err := Uvarint(unhex(t, s)); err == nil {
			t.Errorf("%s accepted", s)
		}
	}
}

func TestString(t *testing.T) {
	hello := unhex(t, "0c 48 65 6c 6c 6f 20 4f 63 6b 61 6d 21")
	if got := AppendString(nil, "Hello Ockam!"); !bytes.Equal(got, hello) {
		t.Errorf("got %x", got)
	}
	for n := range hello {
		if s, err := String(hello[:n]); err == nil {
			t.Errorf("cut at %d: %q", n, s)
		}
	}
	if s, err := String(append(hello, 1, 2)); err != nil || s != "Hello Ockam!" {
		t.Errorf("with a tail: %q, %v", s, err)
	}
	if _, err := StringExact(append(hello, 1)); !errors.Is(err, ErrTrailing) {
		t.Errorf("exact with a tail: %v", err)
	}
	if _, err := String([]byte{1, 0xff}); !errors.Is(err, ErrNotUTF8) {
		t.Errorf("not UTF-8: %v", err)
	}
	if _, err := StringExact([]byte{1, 0xff}); !errors.Is(err, ErrNotUTF8) {
		t.Errorf("exact, not UTF-8: %v", err)
	}
	if _, err := String(unhex(t, "ffffffffffffffffff01")); !errors.Is(err, ErrTruncated) {
		t.Errorf("a length beyond memory: %v", err)
	}
}

func FuzzBytes(f *testing.F) {
	f.Add([]byte{0})
	f.Add([]byte("\x0cHello Ockam!tail"))
	f.Add([]byte{0x85, 0, 1, 2, 3, 4, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		v, rest, err := Bytes(b)
		if err != nil {
			return
		}
		if len(v)+len(rest) >= len(b) || !bytes.HasSuffix(b, append(bytes.Clone(v), rest...)) {
			t.Fatalf("%x gives %x and %x", b, v, rest)
		}
		again, _, err := Bytes(AppendString(nil, string(v)))
		if err != nil || !bytes.Equal(again, v) {
			t.Fatalf("%x does not come back: %v", v, err)
		}
	})
}
