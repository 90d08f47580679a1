package cbor

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"testing"

	"github.com/sealmq/sealmq/internal/vectors"
)

func TestHeads(t *testing.T) {
	for _, c := range []struct {
		arg uint64
		hex string
	}{
		{0, "00"}, {23, "17"}, {24, "1818"}, {255, "18ff"}, {256, "190100"}, {65535, "19ffff"},
		{65536, "1a00010000"}, {math.MaxUint32, "1affffffff"}, {math.MaxUint32 + 1, "1b0000000100000000"},
		{math.MaxUint64, "1bffffffffffffffff"},
	} {
		b := AppendUint(nil, c.arg)
		if hex.EncodeToString(b) != c.hex || HeadLen(c.arg) != len(b) {
			t.Errorf("%d is %x, want %s", c.arg, b, c.hex)
		}
		if got, err := NewReader(b).Uint(); err != nil || got != c.arg {
			t.Errorf("%x is %d, %v", b, got, err)
		}
		for n := range b {
			if _, err := NewReader(b[:n]).Uint(); !errors.Is(err, ErrTruncated) {
				t.Errorf("%x cut at %d: %v", b, n, err)
			}
		}
	}
}

// The reader takes what a stock peer's decoder takes (spec identity 1).
func TestLeniency(t *testing.T) {
	items := func(r *Reader) (n int, err error) {
		l, err := r.Array()
		for err == nil {
			var more bool
			if more, err = l.Next(); err != nil || !more {
				break
			}
			n++
			err = r.Skip()
		}
		return n, err
	}
	for _, c := range []struct {
		name, hex string
		n         int
		ok        bool
	}{
		{"definite", "83010203", 3, true},
		{"long head", "98030102f6", 3, true},
		{"indefinite", "9f0102ff", 2, true},
		{"indefinite, no break", "9f0102", 0, false},
		{"count beyond the input", "9bffffffffffffffff", 0, false},
		{"map is no array", "a10102", 0, false},
		{"tag is no array", "c18101", 0, false},
		{"reserved head", "9c", 0, false},
		{"nested", "82818101a1614101", 2, true},
		{"indefinite string inside", "817f6161ff", 1, true},
		{"break as item", "81ff", 0, false},
		{"float and simple", "82f93c00f7", 2, true},
	} {
		b, err := hex.DecodeString(c.hex)
		if err != nil {
			t.Fatal(err)
		}
		n, err := items(NewReader(b))
		if (err == nil) != c.ok || c.ok && n != c.n {
			t.Errorf("%s: %d items, %v", c.name, n, err)
		}
	}
	for _, c := range []struct{ name, hex string }{
		{"indefinite", "5f4101ff"}, {"text", "6161"}, {"cut short", "4201"}, {"longer than memory", "5bffffffffffffffff"}, {"null", "f6"},
	} {
		b, _ := hex.DecodeString(c.hex)
		r := NewReader(b)
		if got, err := r.Bytes(); err == nil || r.Offset() != 0 {
			t.Errorf("byte string, %s: %x, at %d", c.name, got, r.Offset())
		}
	}
	deep := bytes.Repeat([]byte{0x81}, 100)
	if err := NewReader(deep).Skip(); !errors.Is(err, ErrDepth) {
		t.Errorf("deep nesting: %v", err)
	}
}

func TestValues(t *testing.T) {
	b := AppendBytesString(AppendText(AppendBool(AppendNull(AppendMap(nil, 1)), true), "x"), "yz")
	b = AppendBytes(AppendArray(AppendBool(b, false), 0), []byte{9})
	r := NewReader(b)
	m, err := r.Map()
	if n, definite := m.Count(); err != nil || n != 1 || !definite {
		t.Fatal(n, definite, err)
	}
	if _, err := r.Bool(); err == nil || !r.Null() {
		t.Fatal("no null")
	}
	yes, err1 := r.Bool()
	text, err2 := r.Text()
	raw, err3 := r.Bytes()
	no, err4 := r.Bool()
	l, err5 := r.Array()
	if err := errors.Join(err1, err2, err3, err4, err5, l.SkipRest()); err != nil {
		t.Fatal(err)
	}
	if !yes || no || string(text) != "x" || string(raw) != "yz" || string(r.Rest()) != "A\x09" {
		t.Fatalf("%v %q %q %v, rest %x", yes, text, raw, no, r.Rest())
	}
}

// Every item that Skip accepts lies in the input, and reading never allocates.
func FuzzSkip(f *testing.F) {
	type history struct {
		Histories []struct {
			ChangeHistory vectors.Hex `json:"change_history"`
		}
	}
	seeds := vectors.Load[history](f, "identity_upstream.json")
	if len(seeds.Histories) == 0 {
		f.Fatal("no seeds")
	}
	for _, s := range seeds.Histories {
		f.Add([]byte(s.ChangeHistory))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReader(b)
		if r.Skip() != nil {
			return
		}
		if r.Offset() == 0 || r.Offset() > len(b) || !bytes.Equal(r.Since(0), b[:r.Offset()]) {
			t.Fatalf("read %d of %d bytes", r.Offset(), len(b))
		}
		again := NewReader(b[:r.Offset()])
		if err := again.Skip(); err != nil || again.Len() != 0 {
			t.Fatalf("the item alone: %v", err)
		}
	})
}
