package identity

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/vectors"
)

// seeds are all objects of one kind in the vector files; none is a failure.
type seeds struct{ histories, attestations, credentials [][]byte }

func loadSeeds(f *testing.F) seeds {
	f.Helper()
	var s seeds
	up := vectors.Load[upstreamFile](f, "identity_upstream.json")
	for _, v := range up.Histories {
		s.histories = append(s.histories, v.History)
	}
	s.histories = append(s.histories, up.Legacy.Identity)
	for _, name := range derivedNames {
		s.histories = append(s.histories, derived[derivedIdentity](f, name).History)
	}
	for _, name := range []string{"alice_secure_channel_attestation", "bob_secure_channel_attestation", "authority_credential_attestation"} {
		s.attestations = append(s.attestations, derived[derivedAttestation](f, name).V.Encoded)
	}
	s.credentials = append(s.credentials, derived[derivedCredential](f, "alice_credential").Full)
	live := liveVectors(f)
	for _, v := range live.Rust.Identities {
		s.histories = append(s.histories, v.First, v.History)
		s.attestations = append(s.attestations, v.ChannelAtt, v.CredentialAtt)
	}
	for _, v := range live.Rust.Credentials {
		s.credentials = append(s.credentials, v.Credential)
	}
	for what, list := range map[string][][]byte{"histories": s.histories, "attestations": s.attestations, "credentials": s.credentials} {
		if len(list) == 0 {
			f.Fatalf("no %s in the vectors", what)
		}
		for i, b := range list {
			if len(b) == 0 {
				f.Fatalf("%s: vector %d is empty", what, i)
			}
		}
	}
	return s
}

// refusedWell fails unless err is one of ours.
func refusedWell(t *testing.T, err error) {
	t.Helper()
	var v *VerifyError
	if !errors.As(err, &v) {
		t.Fatalf("refused with %T: %v", err, err)
	}
}

// FuzzHistory: what is accepted keeps its bytes, imports again as equal, and can
// be carried in a presentation.
func FuzzHistory(f *testing.F) {
	s := loadSeeds(f)
	for _, b := range s.histories {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := Import(b)
		if err != nil {
			refusedWell(t, err)
			return
		}
		if len(b) > MaxHistory || len(id.changes) > MaxChanges || !bytes.Equal(id.history, b) {
			t.Fatal("limits or bytes")
		}
		again, err := Import(id.ChangeHistory())
		if err != nil || again.Compare(id) != Equal || again.Identifier() != id.Identifier() {
			t.Fatal(err)
		}
		p, err := ParsePresentation(Presentation{id.history, s.attestations[0], nil}.Append(nil))
		if err != nil || !bytes.Equal(p.History, b) {
			t.Fatalf("in a presentation: %v", err)
		}
		h, _, err := ParseRefresh(AppendRefresh(nil, id.history))
		if err != nil || !bytes.Equal(h, b) {
			t.Fatalf("in a refresh: %v", err)
		}
	})
}

// FuzzAttestation: what decodes and verifies says the same when it is made into
// canonical bytes, and nothing that changes the signed bytes verifies.
func FuzzAttestation(f *testing.F) {
	s := loadSeeds(f)
	owners := []*Identity{}
	for _, h := range s.histories {
		if id, err := Import(h); err == nil {
			owners = append(owners, id)
		}
	}
	for _, b := range s.attestations {
		f.Add(b)
	}
	genuine := map[[HashSize]byte]bool{}
	for _, b := range s.attestations {
		genuine[must(parseAttestation(b)).digest] = true
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAttestation(b)
		if _, inspectErr := InspectAttestation(b); (inspectErr == nil) != (err == nil) {
			t.Fatal(err, inspectErr)
		} else if inspectErr != nil {
			refusedWell(t, inspectErr)
			return
		}
		for _, id := range owners {
			for _, now := range []time.Time{time.Unix(1700000100, 0), recorded} {
				if err := a.verify(id, at(now)); err == nil && !genuine[a.digest] {
					t.Fatal("a forged attestation verifies")
				}
				if _, err := VerifyChannelAttestation(b, id, now); err != nil {
					refusedWell(t, err)
				}
			}
		}
		p, err := ParsePresentation(Presentation{s.histories[0], b, nil}.Append(nil))
		if err != nil || !bytes.Equal(p.Attestation, b) {
			t.Fatalf("in a presentation: %v", err)
		}
	})
}

// FuzzCredential: the contents that decode encode again to an equal meaning, and
// nothing forged verifies.
func FuzzCredential(f *testing.F) {
	s := loadSeeds(f)
	var authorities []*Identity
	for _, h := range s.histories {
		if id, err := Import(h); err == nil {
			authorities = append(authorities, id)
		}
	}
	genuine := map[string]bool{}
	for _, b := range s.credentials {
		f.Add(b)
		genuine[string(must(parseCredential(b)).signed)] = true
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, now := range []time.Time{time.Unix(1700000100, 0), recorded} {
			if _, err := VerifyCredential(b, Identifier{}, authorities, now); err != nil {
				refusedWell(t, err)
			} else if !genuine[string(must(parseCredential(b)).signed)] {
				t.Fatal("a forged credential verifies")
			}
		}
		c, err := InspectCredential(b)
		if err != nil {
			refusedWell(t, err)
			return
		}
		if len(c.Attributes) > MaxAttributes || len(b) > MaxCredential {
			t.Fatal("limits")
		}
		raw := must(parseCredential(b))
		d := must(openCredential(raw.signed))
		again, err := openCredential(appendEnvelope(nil, typeCredential, d.append(nil)))
		if err != nil || !bytes.Equal(again.append(nil), d.append(nil)) {
			t.Fatalf("encoded again: %v", err)
		}
		p, err := ParsePresentation(Presentation{s.histories[0], s.attestations[0], [][]byte{b}}.Append(nil))
		if err != nil || len(p.Credentials) != 1 || !bytes.Equal(p.Credentials[0], b) {
			t.Fatalf("in a presentation: %v", err)
		}
	})
}

// FuzzPresentation: what is split joins to something that splits the same.
func FuzzPresentation(f *testing.F) {
	s := loadSeeds(f)
	for i, h := range s.histories {
		p := Presentation{History: h, Attestation: s.attestations[i%len(s.attestations)]}
		f.Add(p.Append(nil))
		p.Credentials = s.credentials[:i%3]
		f.Add(p.Append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePresentation(b)
		if err != nil {
			refusedWell(t, err)
		} else {
			joined := p.Append(nil)
			again, err := ParsePresentation(joined)
			if err != nil || !bytes.Equal(again.Append(nil), joined) || len(p.Credentials) > MaxCredentials {
				t.Fatal(err)
			}
		}
		h, c, err := ParseRefresh(b)
		if err != nil {
			refusedWell(t, err)
			return
		}
		joined := AppendRefresh(nil, h, c...)
		h2, c2, err := ParseRefresh(joined)
		if err != nil || !bytes.Equal(AppendRefresh(nil, h2, c2...), joined) {
			t.Fatal(err)
		}
	})
}

// FuzzIdentityFile: what opens is written again to something that opens the
// same.
func FuzzIdentityFile(f *testing.F) {
	p := must(Create())
	must(p.IssueConnectProof(nil, time.Minute))
	f.Add(must(p.p.state.marshal(Protection{}, nil)))
	pass := cheap(f, "x")
	f.Add(must(p.p.state.marshal(pass, nil)))
	o := must(collect(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, _, err := unmarshalState(b, Protection{}, &o) // no key is derived
		if err != nil {
			return
		}
		again, _, err := unmarshalState(must(st.marshal(Protection{}, nil)), Protection{}, &o)
		if err != nil || again.identity.Compare(st.identity) != Equal {
			t.Fatal(err)
		}
	})
}
