package identity

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
)

func TestRecords(t *testing.T) {
	p := must(Create())
	id := p.Identity()
	msg := []byte("what is said")
	sig := must(p.Sign("hello/1", msg))
	if err := id.Verify("hello/1", msg, sig); err != nil {
		t.Fatal(err)
	}
	other := must(Create())
	for name, err := range map[string]error{
		"context":  id.Verify("hello/2", msg, sig),
		"message":  id.Verify("hello/1", msg[1:], sig),
		"boundary": id.Verify("hello/", append([]byte("1"), msg...), sig),
		"signer":   other.Identity().Verify("hello/1", msg, sig),
		"short":    id.Verify("hello/1", msg, sig[:63]),
		"empty":    id.Verify("hello/1", msg, nil),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, context := range []string{"", string(make([]byte, 256))} {
		if _, err := p.Sign(context, msg); err == nil {
			t.Errorf("context of %d bytes accepted", len(context))
		}
		if err := id.Verify(context, msg, sig); err == nil {
			t.Errorf("context of %d bytes accepted", len(context))
		}
	}
	// A rotation ends what the old key signed.
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := p.Identity().Verify("hello/1", msg, sig); !errors.Is(err, ErrSignature) {
		t.Error(err)
	}
	if err := id.Verify("hello/1", msg, must(p.Sign("hello/1", msg))); !errors.Is(err, ErrSignature) {
		t.Errorf("verified with a key not known yet: %v", err)
	}
	// P-256 identities sign records too.
	ec := must(Create(WithSigner(p256Signer(t, bytes.Repeat([]byte{3}, 32)))))
	if err := ec.Identity().Verify("c", msg, must(ec.Sign("c", msg))); err != nil {
		t.Error(err)
	}
}

// TestRecordVector pins the format of docs/protocol.md.
func TestRecordVector(t *testing.T) {
	s := seeded(0x11)
	id := must(makeChange(nil, nil, s, 1_700_000_000, 2_015_360_000, false))
	if got := id.String(); got != "I7249dce9f684595e89bd299a1a755d46515f6d7f89a8ebfe45b6d3ddd434d8d3" {
		t.Error(got)
	}
	digest := recordDigest(id, "hello/1", []byte("abc"))
	if got := hex.EncodeToString(digest[:]); got != "d7a765bd0ed7dcb1e17dee8641d0b7c08ff3ab64764fc023fd8b19433159637f" {
		t.Error(got)
	}
	sig := must(sign(s, digest))
	if got := hex.EncodeToString(sig.raw[:]); got != "beda6a997680f18867bdce8bbd60ae5c9571328bc2065fcc90901bc0d79abdd7"+
		"edb6db9fd55b5c62e4c8f929d8c306660d33d3659a5c0656ca8e4b02031a8907" {
		t.Error(got)
	}
}
