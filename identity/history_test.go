package identity

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// TestHistoryRules tries each rule of spec identity 7, and what is deliberately
// not a rule.
func TestHistoryRules(t *testing.T) {
	s1, s2 := seeded(1), seeded(2)
	p256 := p256Signer(t, bytes.Repeat([]byte{7}, 32))
	first := newRawChange(s1)
	second := newRawChange(s2)
	second.previous, second.prev = first.hash(), s1

	edit := func(c rawChange, f func(*rawChange)) []byte { f(&c); return c.encode() }
	firstWith := func(f func(*rawChange)) []byte { return history(edit(first, f)) }
	secondWith := func(f func(*rawChange)) []byte { return history(first.encode(), edit(second, f)) }

	tests := []struct {
		name   string
		bytes  []byte
		err    error
		change int
	}{
		{"one change", history(first.encode()), nil, -1},
		{"two changes", history(first.encode(), second.encode()), nil, -1},
		{"P-256", history(newRawChange(p256).encode()), nil, -1},
		{"Ed25519, then P-256", secondWith(func(c *rawChange) { c.key, c.sign = p256.PublicKey(), p256 }), nil, -1},
		{"bytes after it", append(history(first.encode()), 0x00), ErrMalformed, -1},
		{"fewer changes than bytes", append([]byte{0x81}, history(first.encode(), second.encode())[1:]...), ErrMalformed, -1},
		{"empty", history(), ErrEmptyHistory, -1},
		{"nothing", nil, ErrMalformed, -1},
		{"not an array", []byte{0xa1, 0x00, 0x00}, ErrMalformed, -1},

		{"7.1: version 2", firstWith(func(c *rawChange) { c.version = 2 }), ErrVersion, 0},
		{"7.1: version 256", firstWith(func(c *rawChange) { c.version = 256 }), ErrMalformed, 0},
		{"7.1: data type 2", firstWith(func(c *rawChange) { c.typ = 2 }), ErrDataType, 0},
		{"7.2: first names a previous one", firstWith(func(c *rawChange) { c.previous = make([]byte, 32) }), ErrNotFirst, 0},
		{"7.3: second names none", secondWith(func(c *rawChange) { c.previous = nil }), ErrBrokenChain, 1},
		{"7.3: second names another", secondWith(func(c *rawChange) { c.previous = make([]byte, 32) }), ErrBrokenChain, 1},
		{"7.3: short hash", secondWith(func(c *rawChange) { c.previous = make([]byte, 20) }), ErrMalformed, 1},
		{"7.3: valid from earlier", secondWith(func(c *rawChange) { c.from = 99 }), ErrBackdated, 1},
		{"7.4: no previous signature", secondWith(func(c *rawChange) { c.prev = nil }), ErrNoPreviousSignature, 1},
		{"7.4: previous signature by another", secondWith(func(c *rawChange) { c.prev = s2 }), ErrSignature, 1},
		{"7.5: signed by another", firstWith(func(c *rawChange) { c.sign = s2 }), ErrSignature, 0},
		{"7.5: second signed by the first", secondWith(func(c *rawChange) { c.sign = s1 }), ErrSignature, 1},
		{"6: signature of another kind", firstWith(func(c *rawChange) { c.signKind, c.forceKind = P256, true }), ErrKeyKind, 0},
		{"6: P-256 key that is no point", firstWith(func(c *rawChange) {
			c.key, c.sign = must(NewPublicKey(P256, append([]byte{4}, make([]byte, 64)...))), p256
		}), ErrSignature, 0},

		// Deliberately not checked.
		{"valid until before from", firstWith(func(c *rawChange) { c.until = 1 }), nil, -1},
		{"second key after the first expired", secondWith(func(c *rawChange) { c.from, c.until = 1000, 2000 }), nil, -1},
		{"stray previous signature on the first", firstWith(func(c *rawChange) { c.prev = s2 }), nil, -1},
		{"the same key again", secondWith(func(c *rawChange) { c.key, c.sign = s1.PublicKey(), s1 }), nil, -1},
		{"revoking", secondWith(func(c *rawChange) { c.revoke = true }), nil, -1},
		{"times at the end of u64", firstWith(func(c *rawChange) { c.from, c.until = 1<<64-1, 1<<64-1 }), nil, -1},

		// minicbor's leniency (spec identity 1).
		{"unknown further elements", firstWith(func(c *rawChange) { c.tail, c.tailItems = []byte{0x01, 0xa1, 0x00, 0x80}, 2 }), nil, -1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id, err := Import(tt.bytes)
			if !errors.Is(err, tt.err) {
				t.Fatalf("%v, want %v", err, tt.err)
			}
			if err != nil {
				var v *VerifyError
				if !errors.As(err, &v) || v.Object != objHistory || v.Change != tt.change {
					t.Errorf("%#v, want change %d", v, tt.change)
				}
				if !strings.HasPrefix(err.Error(), "identity: change history: ") {
					t.Error(err)
				}
				return
			}
			if id == nil {
				t.Fatal("no identity")
			}
			again, err := Import(id.ChangeHistory())
			if err != nil || again.Compare(id) != Equal || !bytes.HasPrefix(tt.bytes, again.history) {
				t.Errorf("does not import again: %v", err)
			}
			if _, err := json.Marshal(id.Changes()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHistoryLenient holds encodings other than ours that a Rust peer takes.
func TestHistoryLenient(t *testing.T) {
	s := seeded(1)
	c := newRawChange(s)
	encoded := c.encode()
	body := encoded[1:] // after array(2)
	cat := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	null := []byte{cbor.Null}
	unknown := cbor.AppendBytes(appendVariant(nil, 2), make([]byte, 64)) // signature variant 2

	tests := []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"indefinite outer array", cat([]byte{0x9f}, encoded, []byte{0xff}), true},
		{"indefinite change", cat([]byte{0x81, 0x9f}, body, []byte{0xff}), true},
		{"long heads", cat([]byte{0x98, 0x01, 0x99, 0x00, 0x02}, body), true},
		{"null previous signature", cat([]byte{0x81, 0x83}, body, null), true},
		{"more elements", cat([]byte{0x81, 0x85}, body, null, []byte{0x01, 0x62, 'h', 'i'}), true},
		{"previous signature of unknown variant", cat([]byte{0x81, 0x83}, body, unknown), true},
		{"previous signature malformed", cat([]byte{0x81, 0x83}, body, []byte{0x01}), false},
		{"data missing", []byte{0x81, 0x80}, false},
		{"signature missing", cat([]byte{0x81, 0x81}, body[:2+int(body[1])]), false},
		{"signature null", cat([]byte{0x81, 0x82}, body[:2+int(body[1])], null), false},
		{"signature of unknown variant", cat([]byte{0x81, 0x82}, body[:2+int(body[1])], unknown), false},
		{"break missing", cat([]byte{0x9f}, encoded), false},
		{"data as text", cat([]byte{0x81, 0x82, 0x78}, body[1:]), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id, err := Import(tt.b)
			if (err == nil) != tt.ok {
				t.Fatalf("%v", err)
			}
			if err != nil {
				return
			}
			if !bytes.Equal(id.ChangeHistory(), tt.b) {
				t.Error("bytes were changed")
			}
			// It can be rotated whatever its form.
			next, err := makeChange(id, s, seeded(2), 100, 200, false)
			if err != nil || next.Compare(id) != Newer {
				t.Errorf("rotating: %v", err)
			}
		})
	}
}

func TestHistoryLimits(t *testing.T) {
	s := seeded(1)
	c := newRawChange(s)
	huge := cbor.AppendArray(nil, 2)
	huge = cbor.AppendBytes(huge, make([]byte, MaxHistory+1))
	huge = appendSignature(huge, signature{})
	many := slices.Repeat([][]byte{c.encode()}, MaxChanges+1)
	indefinite := slices.Concat([]byte{0x9f}, slices.Concat(many...), []byte{0xff})
	for name, b := range map[string][]byte{
		"bytes": history(huge), "changes": history(many...), "indefinite": indefinite,
	} {
		if _, err := Import(b); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A head that promises more than there is allocates nothing.
	lie := []byte{0x9a, 0xff, 0xff, 0xff, 0xff}
	if n := testing.AllocsPerRun(10, func() { _, _ = Import(lie) }); n > 10 {
		t.Errorf("%v allocations for a lying head", n)
	}
}

func TestImportCopies(t *testing.T) {
	b := history(newRawChange(seeded(1)).encode())
	id := must(Import(b))
	want := id.ChangeHistory()
	clear(b)
	if !bytes.Equal(id.ChangeHistory(), want) || !bytes.Equal(id.changes[0].data, want[4:4+0x37-10]) && len(id.changes[0].data) == 0 {
		t.Error("the identity aliases its input")
	}
	id.ChangeHistory()[0] = 0
	if id.history[0] != 0x81 {
		t.Error("the history given out is the identity's own")
	}
}

func TestImportAs(t *testing.T) {
	b := history(newRawChange(seeded(1)).encode())
	if _, err := ImportAs(Identifier{1}, b); !errors.Is(err, ErrWrongIdentifier) {
		t.Error(err)
	}
	// Whose it is, is looked at first: verifying a long history takes long.
	want := must(Import(b)).Identifier()
	b[len(b)-1] ^= 1
	if id, err := IdentifierOf(b); err != nil || id != want {
		t.Errorf("%v, %v, want %v", id, err, want)
	}
	if _, err := ImportAs(Identifier{1}, b); !errors.Is(err, ErrWrongIdentifier) {
		t.Error(err)
	}
	if _, err := ImportAs(want, b); err == nil || errors.Is(err, ErrWrongIdentifier) {
		t.Errorf("with a wrong signature: %v", err)
	}
	for n := range b {
		if _, err := IdentifierOf(b[:n]); err == nil {
			t.Errorf("cut at %d it is somebody's", n)
		}
	}
}

// TestHighS: P-256 signatures verify with either root (spec identity 6).
func TestHighS(t *testing.T) {
	s := p256Signer(t, bytes.Repeat([]byte{9}, 32))
	c := newRawChange(s)
	signed := c.signed()
	flipped := flipS{s}
	c.sign = flipped
	if a, b := must(s.Sign(signed)), must(flipped.Sign(signed)); a == b {
		t.Fatal("nothing was flipped")
	}
	if _, err := Import(history(c.encode())); err != nil {
		t.Error(err)
	}
}

func TestIdentifierText(t *testing.T) {
	id := Identifier{1, 2, 0xab}
	text := must(id.MarshalText())
	var back Identifier
	if err := back.UnmarshalText(text); err != nil || back != id {
		t.Error(back, err)
	}
	if err := back.UnmarshalText(nil); err != nil || !back.IsZero() {
		t.Error("empty text is the zero value")
	}
	for _, s := range []string{
		"", "I", "i" + string(text[1:]), string(text[:40]), string(text) + "0", "J" + string(text[1:]),
		string(text[1:]), "I" + strings.Repeat("g", 64), "I 2" + string(text[3:]),
	} {
		if got, err := ParseIdentifier(s); err == nil {
			t.Errorf("%q accepted as %v", s, got)
		}
	}
	if (Identifier{1}).Compare(Identifier{2}) >= 0 {
		t.Error("order")
	}
}

func TestUnixTime(t *testing.T) {
	if got := unixTime(1<<64 - 1); got.Year() != 9999 {
		t.Error(got)
	}
	if wireTime(time.Unix(-5, 0)) != 0 {
		t.Error("before 1970")
	}
	if addSeconds(1<<64-2, 5) != 1<<64-1 {
		t.Error("wraps around")
	}
}
