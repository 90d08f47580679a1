package identity

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// attest signs an attestation over data, with everything as given.
func attest(version, typ uint64, data []byte, s Signer) []byte {
	signed := envelope(version, typ, data)
	return appendSigned(nil, signed, must(sign(s, sha256.Sum256(signed))))
}

type rawAttestation struct {
	subject, change []byte
	key             []byte // encoded PurposePublicKey
	created, expire uint64
}

func (a rawAttestation) data() []byte {
	b := cbor.AppendArray(nil, 5)
	b = cbor.AppendBytes(b, a.subject)
	b = cbor.AppendBytes(b, a.change)
	b = append(b, a.key...)
	b = cbor.AppendUint(b, a.created)
	return cbor.AppendUint(b, a.expire)
}

// TestAttestationRules tries the nine rules of spec identity 10.3, each with its
// own error, and that an earlier rule wins over all later ones.
func TestAttestationRules(t *testing.T) {
	s1, s2 := seeded(1), seeded(2)
	const from, until = 1_700_000_000, 1_700_100_000
	before := must(makeChange(nil, nil, s1, from-1000, until, false))
	id := must(makeChange(before, s1, s2, from, until, false))
	self, latest, older := id.Identifier(), id.LatestChange(), before.LatestChange()
	now := time.Unix(from+500, 0)

	x := (&attestation{purpose: purposeChannel, channelKey: [32]byte{9}}).appendPurposeKey(nil)
	good := rawAttestation{self[:], latest[:], x, from, until}
	with := func(f func(*rawAttestation)) []byte { a := good; f(&a); return a.data() }
	stranger := make([]byte, 32)

	tests := []struct {
		name string
		b    []byte
		err  error
	}{
		{"good", attest(1, 2, good.data(), s2), nil},
		{"1: not CBOR", []byte{0x00}, ErrMalformed},
		{"1: version", attest(2, 2, good.data(), s2), ErrVersion},
		{"1: data type", attest(1, 3, good.data(), s2), ErrDataType},
		{"1: unknown purpose", attest(1, 2, with(func(a *rawAttestation) {
			a.key = cbor.AppendBytes(appendVariant(nil, 2), make([]byte, 32))
		}), s2), ErrMalformed},
		{"1: short key", attest(1, 2, with(func(a *rawAttestation) {
			a.key = cbor.AppendBytes(appendVariant(nil, 0), make([]byte, 31))
		}), s2), ErrMalformed},
		{"2: subject", attest(1, 2, with(func(a *rawAttestation) { a.subject, a.change = stranger, stranger }), s2), ErrWrongSubject},
		{"4: earlier change, signed with its key", attest(1, 2, with(func(a *rawAttestation) { a.change, a.expire = older[:], until+9 }), s1), ErrNotLatestKey},
		{"5: outlives the key", attest(1, 2, with(func(a *rawAttestation) { a.expire, a.created = until+1, from-1 }), s2), ErrOutlivesKey},
		{"5: to the key's last second", attest(1, 2, with(func(a *rawAttestation) { a.expire = until }), s2), nil},
		{"6: one second before the key", attest(1, 2, with(func(a *rawAttestation) { a.created, a.expire = from-1, from }), s2), ErrPredatesKey},
		{"7: 75 s in the future", attest(1, 2, with(func(a *rawAttestation) { a.created, a.expire = from+575, from }), s2), ErrFromFuture},
		{"7: 60 s in the future", attest(1, 2, with(func(a *rawAttestation) { a.created = from + 560 }), s2), nil},
		{"7: 61 s in the future", attest(1, 2, with(func(a *rawAttestation) { a.created = from + 561 }), s2), ErrFromFuture},
		{"8: expired a second ago", attest(1, 2, with(func(a *rawAttestation) { a.expire = from + 499 }), s1), ErrExpired},
		{"8: in its last second", attest(1, 2, with(func(a *rawAttestation) { a.expire = from + 500 }), s2), nil},
		{"9: signed with another key", attest(1, 2, good.data(), s1), ErrSignature},
		{"10: key for credentials", attest(1, 2, with(func(a *rawAttestation) {
			a.key = (&attestation{purpose: purposeCredentials, signingKey: s1.PublicKey()}).appendPurposeKey(nil)
		}), s2), ErrWrongPurpose},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			key, err := VerifyChannelAttestation(tt.b, id, now)
			if !errors.Is(err, tt.err) {
				t.Fatalf("%v, want %v", err, tt.err)
			}
			if err != nil {
				if key != [32]byte{} {
					t.Error("a key beside the error")
				}
				var v *VerifyError
				if !errors.As(err, &v) || v.Object != objAttestation {
					t.Errorf("%#v", err)
				}
			} else if key != [32]byte{9} {
				t.Errorf("%x", key)
			}
		})
	}
}

func TestAttestationLenient(t *testing.T) {
	s := seeded(1)
	id := must(makeChange(nil, nil, s, 100, 1000, false))
	self, latest := id.Identifier(), id.LatestChange()
	x := (&attestation{purpose: purposeChannel, channelKey: [32]byte{9}}).appendPurposeKey(nil)
	data := rawAttestation{self[:], latest[:], x, 100, 1000}.data()
	data[0]++ // a sixth element
	data = append(data, 0x61, 'x')
	b := attest(1, 2, data, s)
	b[0]++ // a third
	b = append(b, cbor.Null)
	if _, err := VerifyChannelAttestation(b, id, time.Unix(500, 0)); err != nil {
		t.Error(err)
	}
	if _, err := VerifyChannelAttestation(append(b, 0), id, time.Unix(500, 0)); !errors.Is(err, ErrMalformed) {
		t.Errorf("bytes after it: %v", err)
	}
	large := attest(1, 2, make([]byte, MaxAttestation), s)
	if _, err := VerifyChannelAttestation(large, id, time.Unix(500, 0)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestInspectAttestation(t *testing.T) {
	p := must(Create(newClock().option()))
	k := must(p.ChannelKey())
	a, err := InspectAttestation(k.Attestation())
	if err != nil || a.Subject != p.Identifier() || a.Change != p.Identity().LatestChange() ||
		!a.ForChannel || a.ChannelKey != k.Public() || a.ExpiresAt.Sub(a.CreatedAt) != PurposeKeyLifetime {
		t.Errorf("%+v, %v", a, err)
	}
	if !a.ExpiresAt.Equal(k.ExpiresAt()) || k.PublicKey() != k.Public() {
		t.Error("accessors disagree")
	}
	if _, err := InspectAttestation([]byte{1}); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

func TestPresentation(t *testing.T) {
	p := must(Create())
	k := must(p.ChannelKey())
	cred := must(p.IssueCredential(p.Identity(), map[string]string{"a": "b"}, 1, time.Hour))
	for _, creds := range [][][]byte{nil, {cred}, {cred, cred}} {
		b := k.AppendPresentation([]byte("x"), creds...)[1:]
		if len(creds) == 0 && len(b) != 323 {
			t.Errorf("%d bytes, want 323", len(b)) // spec secure-channel 4
		}
		got, err := ParsePresentation(append(b, 0xff))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Append(nil), b) || len(got.Credentials) != len(creds) {
			t.Error("comes back differently")
		}
		if !bytes.Equal(got.History, k.Identity().ChangeHistory()) || !bytes.Equal(got.Attestation, k.Attestation()) {
			t.Error("parts differ")
		}
		for n := range b {
			if _, err := ParsePresentation(b[:n]); !errors.Is(err, ErrMalformed) {
				t.Fatalf("cut at %d: %v", n, err)
			}
		}
	}
	// A credential that does not decode fails it all, as at a Rust peer.
	bad := Presentation{k.Identity().ChangeHistory(), k.Attestation(), [][]byte{{0x01}}}.Append(nil)
	if _, err := ParsePresentation(bad); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
	many := make([][]byte, MaxCredentials+1)
	for i := range many {
		many[i] = cred
	}
	if _, err := ParsePresentation(k.AppendPresentation(nil, many...)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	// A refresh has no attestation.
	b := AppendRefresh(nil, p.Identity().ChangeHistory(), cred)
	h, creds, err := ParseRefresh(b)
	if err != nil || len(creds) != 1 || !bytes.Equal(creds[0], cred) || !bytes.Equal(h, p.Identity().ChangeHistory()) {
		t.Error(err)
	}
	for n := range b {
		if _, _, err := ParseRefresh(b[:n]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
}
