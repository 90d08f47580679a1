package identity

import (
	"errors"
	"testing"
	"time"
)

// tamperCase is an object and how a receiver takes it.
type tamperCase struct {
	name   string
	bytes  []byte
	accept func([]byte) error
}

func tamperCases(t testing.TB) []tamperCase {
	t.Helper()
	now := time.Unix(1700000100, 0)
	var out []tamperCase
	for _, name := range derivedNames {
		v := derived[derivedIdentity](t, name)
		want := must(ParseIdentifier(v.ID))
		out = append(out, tamperCase{"history " + name, v.History, func(b []byte) error {
			id, err := ImportAs(want, b)
			if err == nil && id.Compare(must(Import(v.History))) != Equal {
				return ErrConflict
			}
			return err
		}})
	}
	alice := must(Import(derived[derivedIdentity](t, "alice").History))
	att := derived[derivedAttestation](t, "alice_secure_channel_attestation")
	out = append(out, tamperCase{"attestation", att.V.Encoded, func(b []byte) error {
		_, err := VerifyChannelAttestation(b, alice, now)
		return err
	}})
	authority := must(Import(derived[derivedIdentity](t, "authority").History))
	cred := derived[derivedCredential](t, "alice_credential")
	out = append(out, tamperCase{"credential", cred.Full, func(b []byte) error {
		_, err := VerifyCredential(b, alice.Identifier(), []*Identity{authority}, now)
		return err
	}})
	for _, v := range liveVectors(t).Rust.Identities {
		id := must(Import(v.History))
		out = append(out, tamperCase{"live attestation " + v.Name, v.ChannelAtt, func(b []byte) error {
			_, err := VerifyChannelAttestation(b, id, recorded)
			return err
		}})
	}
	p, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	sig := must(p.Sign("test", []byte("message")))
	return append(out, tamperCase{"record", sig, func(b []byte) error {
		return p.Identity().Verify("test", []byte("message"), b)
	}})
}

// TestTampered cuts every object at each length and flips bits of each byte.
func TestTampered(t *testing.T) {
	for _, c := range tamperCases(t) {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if err := c.accept(c.bytes); err != nil {
				t.Fatalf("as it is: %v", err)
			}
			check := func(what string, n int, b []byte) {
				err := c.accept(b)
				var v *VerifyError
				if err == nil || !errors.As(err, &v) {
					t.Errorf("%s at %d: %v", what, n, err)
				}
			}
			for n := range c.bytes {
				check("cut", n, c.bytes[:n:n])
			}
			b := append([]byte(nil), c.bytes...)
			for n := range b {
				for _, mask := range []byte{0x01, 0x04, 0x20, 0x80, 0xff} {
					b[n] ^= mask
					check("flipped", n, b)
					b[n] ^= mask
				}
			}
		})
	}
}
