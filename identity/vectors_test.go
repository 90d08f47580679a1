package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
	"github.com/sealmq/sealmq/internal/vectors"
)

type hexBytes = vectors.Hex

type upstreamFile struct {
	Histories []struct {
		Name    string
		History hexBytes `json:"change_history"`
		ID      string   `json:"identifier"`
		Secret  hexBytes `json:"secret_key_ed25519_seed"`
		First   struct {
			Signed hexBytes `json:"signed_versioned_data"`
			Data   hexBytes `json:"change_data"`
			SHA    hexBytes `json:"sha256_of_versioned_data"`
			Kind   string   `json:"key_type"`
			Key    hexBytes `json:"public_key"`
			Revoke bool     `json:"revoke_all_purpose_keys"`
			From   uint64   `json:"attestations_valid_from"`
			Until  uint64   `json:"attestations_valid_until"`
			Sig    hexBytes `json:"self_signature"`
		} `json:"decoded_first_change"`
	} `json:"histories"`
	Legacy struct {
		Identity hexBytes `json:"identity"`
		ID       string   `json:"identifier"`
	} `json:"legacy_negative"`
}

type derivedChange struct {
	From     uint64   `json:"attestations_valid_from"`
	Until    uint64   `json:"attestations_valid_until"`
	Encoded  hexBytes `json:"change_cbor"`
	Data     hexBytes `json:"change_data_cbor"`
	Hash     hexBytes `json:"change_hash"`
	Previous hexBytes `json:"previous_change_hash"`
	PrevSig  hexBytes `json:"previous_signature"`
	Key      hexBytes `json:"public_key"`
	Revoke   bool     `json:"revoke_all_purpose_keys"`
	Sig      hexBytes `json:"self_signature"`
	Signed   hexBytes `json:"versioned_data_cbor_signed_preimage"`
}

type derivedIdentity struct {
	History hexBytes        `json:"change_history_cbor"`
	Changes []derivedChange `json:"changes"`
	ID      string          `json:"identifier"`
	Seed    hexBytes        `json:"secret_key_seed"`
	Second  hexBytes        `json:"second_secret_seed_ed25519"`
	Third   hexBytes        `json:"third_secret_p256"`
}

type derivedAttestation struct {
	V struct {
		Encoded hexBytes `json:"attestation_cbor"`
		Data    hexBytes `json:"attestation_data_cbor"`
		Created uint64   `json:"created_at"`
		Expires uint64   `json:"expires_at"`
		SHA     hexBytes `json:"sha256"`
		Sig     hexBytes `json:"signature"`
		Signed  hexBytes `json:"versioned_data_cbor_signed_preimage"`
	} `json:"v"`
	Private       hexBytes `json:"x25519_private"`
	Public        hexBytes `json:"x25519_public"`
	CredentialKey hexBytes `json:"credential_public_key"`
	Seed          hexBytes `json:"credential_key_seed_ed25519"`
}

type derivedCredential struct {
	Attributes map[string]string `json:"attributes"`
	Created    uint64            `json:"created_at"`
	Expires    uint64            `json:"expires_at"`
	Full       hexBytes          `json:"credential_and_purpose_key_cbor"`
	Encoded    hexBytes          `json:"credential_cbor"`
	Data       hexBytes          `json:"credential_data_cbor"`
	Schema     uint64            `json:"schema"`
	SHA        hexBytes          `json:"sha256"`
	Sig        hexBytes          `json:"signature"`
	Signed     hexBytes          `json:"versioned_data_cbor_signed_preimage"`
}

func derivedMap(t testing.TB) map[string]json.RawMessage {
	return vectors.Load[map[string]json.RawMessage](t, "identity_derived.json")
}

func derived[T any](t testing.TB, name string) T {
	t.Helper()
	raw, ok := derivedMap(t)[name]
	if !ok {
		t.Fatalf("identity_derived.json has no %q", name)
	}
	var v T
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

var derivedNames = []string{"alice", "alice_rotated_once", "alice_rotated_twice", "authority", "bob", "p256"}

type liveFile struct {
	Origin struct {
		RecordedAt string   `json:"recorded_at"`
		Subject    hexBytes `json:"subject_change_history"`
		SubjectID  string   `json:"subject_identifier"`
	} `json:"origin"`
	Rust struct {
		Identities []struct {
			Name          string
			ID            string     `json:"identifier"`
			Secrets       []hexBytes `json:"secrets"`
			First         hexBytes   `json:"first_history"`
			History       hexBytes   `json:"change_history"`
			Latest        string     `json:"latest_change_hash"`
			ChannelAtt    hexBytes   `json:"secure_channel_attestation"`
			ChannelKey    hexBytes   `json:"secure_channel_public_key"`
			CredentialAtt hexBytes   `json:"credential_key_attestation"`
		} `json:"identities"`
		Credentials []struct {
			Issuer     string   `json:"issuer"`
			Subject    string   `json:"subject"`
			Credential hexBytes `json:"credential"`
		} `json:"credentials"`
	} `json:"rust"`
}

func liveVectors(t testing.TB) liveFile {
	t.Helper()
	f := vectors.Load[liveFile](t, "live_identities.json")
	if len(f.Rust.Identities) != 4 || len(f.Rust.Credentials) != 4 {
		t.Fatal("live_identities.json lacks vectors")
	}
	return f
}

// recorded is the time at which the live vectors were made.
var recorded = time.Unix(1795389990, 0)

func TestUpstreamHistories(t *testing.T) {
	f := vectors.Load[upstreamFile](t, "identity_upstream.json")
	if len(f.Histories) != 10 {
		t.Fatalf("%d histories, want 10", len(f.Histories))
	}
	resigned := 0
	for _, v := range f.Histories {
		t.Run(v.Name, func(t *testing.T) {
			id, err := ImportAs(must(ParseIdentifier(v.ID)), v.History)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(id.ChangeHistory(), v.History) {
				t.Error("history comes back differently")
			}
			c := id.changes[0]
			if !bytes.Equal(c.data, v.First.Signed) || !bytes.Equal(c.hash[:], v.First.SHA) {
				t.Error("signed data or hash differ")
			}
			if got, want := c.key.kind == P256, v.First.Kind == "ECDSASHA256CurveP256"; got != want {
				t.Errorf("key kind %v, want %v", c.key.kind, v.First.Kind)
			}
			if !bytes.Equal(c.key.Bytes(), v.First.Key) || c.revokeAll != v.First.Revoke ||
				c.from != v.First.From || c.until != v.First.Until || !bytes.Equal(c.sig.raw[:], v.First.Sig) {
				t.Error("fields differ")
			}
			if len(v.Secret) == 0 {
				return
			}
			// Ed25519 is deterministic: the same history comes out.
			resigned++
			again, err := makeChange(nil, nil, must(NewEd25519Signer(v.Secret)), c.from, c.until, c.revokeAll)
			if err != nil || !bytes.Equal(again.history, v.History) {
				t.Errorf("made again it differs (%v)", err)
			}
		})
	}
	if resigned != 4 {
		t.Errorf("%d histories with a known seed, want 4", resigned)
	}
}

func TestUpstreamLegacyFormatRefused(t *testing.T) {
	f := vectors.Load[upstreamFile](t, "identity_upstream.json")
	if len(f.Legacy.Identity) == 0 {
		t.Fatal("no legacy vector")
	}
	if id, err := Import(f.Legacy.Identity); !errors.Is(err, ErrMalformed) {
		t.Errorf("legacy history: %v, %v", id, err)
	}
	if _, err := ParseIdentifier(f.Legacy.ID); !errors.Is(err, ErrIdentifier) {
		t.Errorf("legacy identifier %s: %v", f.Legacy.ID, err)
	}
}

func TestDerivedHistories(t *testing.T) {
	for _, name := range derivedNames {
		t.Run(name, func(t *testing.T) {
			v := derived[derivedIdentity](t, name)
			id, err := ImportAs(must(ParseIdentifier(v.ID)), v.History)
			if err != nil {
				t.Fatal(err)
			}
			if len(id.changes) != len(v.Changes) {
				t.Fatalf("%d changes, want %d", len(id.changes), len(v.Changes))
			}
			for i, want := range v.Changes {
				c := id.changes[i]
				if !bytes.Equal(c.data, want.Signed) || !bytes.Equal(c.hash[:], want.Hash) ||
					!bytes.Equal(c.key.Bytes(), want.Key) || c.revokeAll != want.Revoke ||
					c.from != want.From || c.until != want.Until || !bytes.Equal(c.sig.raw[:], want.Sig) {
					t.Errorf("change %d differs", i)
				}
				if i > 0 && (!bytes.Equal(c.previous[:], want.Previous) || !bytes.Equal(c.prevSig.raw[:], want.PrevSig)) {
					t.Errorf("change %d: link differs", i)
				}
				if data := must(readEnvelope(c.data, typeChange)); !bytes.Equal(data, want.Data) {
					t.Errorf("change %d: data differs", i)
				}
			}
		})
	}
}

// TestDerivedMade makes the derived identities again from their seeds.
func TestDerivedMade(t *testing.T) {
	want := derived[derivedIdentity](t, "alice_rotated_twice")
	first := derived[derivedIdentity](t, "alice")
	second := derived[derivedIdentity](t, "alice_rotated_once")
	s1 := must(NewEd25519Signer(first.Seed))
	s2 := must(NewEd25519Signer(second.Second))
	s3 := p256Signer(t, want.Third)

	id := must(makeChange(nil, nil, s1, want.Changes[0].From, want.Changes[0].Until, false))
	if !bytes.Equal(id.history, first.History) {
		t.Error("first change differs")
	}
	id = must(makeChange(id, s1, s2, want.Changes[1].From, want.Changes[1].Until, false))
	if !bytes.Equal(id.history, second.History) {
		t.Error("second change differs")
	}
	id = must(makeChange(id, s2, s3, want.Changes[2].From, want.Changes[2].Until, true))
	if !bytes.Equal(id.latest().data, want.Changes[2].Signed) {
		t.Error("third change: signed data differs")
	}
	if !bytes.Equal(id.latest().prevSig.raw[:], want.Changes[2].PrevSig) {
		t.Error("third change: previous signature differs")
	}

	p := derived[derivedIdentity](t, "p256")
	id = must(makeChange(nil, nil, p256Signer(t, p.Seed), p.Changes[0].From, p.Changes[0].Until, false))
	if id.String() != p.ID {
		t.Errorf("P-256 identifier %v, want %v", id, p.ID)
	}
}

func TestDerivedComparison(t *testing.T) {
	type row struct {
		Known, Received, Result string
		Encoded                 hexBytes `json:"received_cbor"`
	}
	rows := derived[[]row](t, "comparison")
	if len(rows) == 0 {
		t.Fatal("no rows")
	}
	seen := map[string]bool{}
	for _, r := range rows {
		t.Run(r.Received+" to "+r.Known, func(t *testing.T) {
			load := func(name string) []byte { return derived[derivedIdentity](t, name).History }
			if len(r.Encoded) == 0 {
				r.Encoded = load(r.Received)
			}
			if got := must(Import(r.Encoded)).Compare(must(Import(load(r.Known)))).String(); got != r.Result {
				t.Errorf("%s, want %s", got, r.Result)
			}
			seen[r.Result] = true
		})
	}
	for _, want := range []Comparison{Equal, Newer, Older, Conflict} {
		if !seen[want.String()] {
			t.Errorf("no row with %v", want)
		}
	}
}

func TestDerivedChannelAttestations(t *testing.T) {
	for _, name := range []string{"alice", "bob"} {
		t.Run(name, func(t *testing.T) {
			owner := derived[derivedIdentity](t, name)
			v := derived[derivedAttestation](t, name+"_secure_channel_attestation")
			id := must(Import(owner.History))
			key, err := VerifyChannelAttestation(v.V.Encoded, id, time.Unix(1700000100, 0))
			if err != nil || !bytes.Equal(key[:], v.Public) {
				t.Fatalf("%x, %v", key, err)
			}
			x := must(newSoftExchanger(v.Private))
			if x.pub != key {
				t.Error("private key does not fit")
			}
			a := attestation{purpose: purposeChannel, channelKey: x.pub, created: v.V.Created, expires: v.V.Expires}
			again, err := a.make(id, must(NewEd25519Signer(owner.Seed)))
			if err != nil || !bytes.Equal(again, v.V.Encoded) {
				t.Errorf("made again it differs (%v)", err)
			}
			if !bytes.Equal(a.digest[:], v.V.SHA) {
				t.Error("digest differs")
			}
		})
	}
}

func TestDerivedCredential(t *testing.T) {
	now := time.Unix(1700000100, 0)
	authority := derived[derivedIdentity](t, "authority")
	att := derived[derivedAttestation](t, "authority_credential_attestation")
	v := derived[derivedCredential](t, "alice_credential")
	alice := must(Import(derived[derivedIdentity](t, "alice").History))
	issuer := must(Import(authority.History))

	c, err := VerifyCredential(v.Full, alice.Identifier(), []*Identity{alice, issuer}, now)
	if err != nil {
		t.Fatal(err)
	}
	if c.Issuer != issuer.Identifier() || c.Schema != v.Schema || !c.Has(v.Attributes) || len(c.Attributes) != len(v.Attributes) ||
		c.CreatedAt.Unix() != int64(v.Created) || c.ExpiresAt.Unix() != int64(v.Expires) {
		t.Errorf("%+v", c)
	}
	// And made again.
	signer := must(NewEd25519Signer(att.Seed))
	a := attestation{purpose: purposeCredentials, signingKey: signer.PublicKey(), created: att.V.Created, expires: att.V.Expires}
	encoded, err := a.make(issuer, must(NewEd25519Signer(authority.Seed)))
	if err != nil || !bytes.Equal(encoded, att.V.Encoded) {
		t.Errorf("attestation made again differs (%v)", err)
	}
	d := credentialData{
		subject: alice.Identifier(), hasSubject: true, change: alice.LatestChange(), hasChange: true,
		schema: v.Schema, attributes: v.Attributes, created: v.Created, expires: v.Expires,
	}
	if got := d.append(nil); !bytes.Equal(got, v.Data) {
		t.Errorf("data differs:\n%x\n%x", got, v.Data)
	}
	again, err := d.make(&credentialKey{signer: signer, att: a, encoded: encoded})
	if err != nil || !bytes.Equal(again, v.Full) {
		t.Errorf("credential made again differs (%v)", err)
	}
}

func TestLiveIdentities(t *testing.T) {
	f := liveVectors(t)
	authorities := map[string]*Identity{}
	for _, v := range f.Rust.Identities {
		t.Run(v.Name, func(t *testing.T) {
			id, err := ImportAs(must(ParseIdentifier(v.ID)), v.History)
			if err != nil {
				t.Fatal(err)
			}
			authorities[v.ID] = id
			if id.LatestChange().String() != v.Latest {
				t.Error("latest change differs")
			}
			first := must(Import(v.First))
			if first.Identifier() != id.Identifier() {
				t.Error("identifier changed")
			}
			want := Newer
			if len(id.changes) == 1 {
				want = Equal
			}
			if got := id.Compare(first); got != want {
				t.Errorf("compared with its beginning: %v", got)
			}
			key, err := VerifyChannelAttestation(v.ChannelAtt, id, recorded)
			if err != nil || !bytes.Equal(key[:], v.ChannelKey) {
				t.Errorf("attestation: %v", err)
			}
			if _, err := VerifyChannelAttestation(v.CredentialAtt, id, recorded); !errors.Is(err, ErrWrongPurpose) {
				t.Errorf("credential key taken for a channel key: %v", err)
			}
			if len(id.changes) > 1 {
				if _, err := VerifyChannelAttestation(v.ChannelAtt, first, recorded); !errors.Is(err, ErrNotLatestKey) {
					t.Errorf("attestation under a change not known: %v", err)
				}
			}
			remake(t, id, v.Secrets, v.History)
		})
	}
	subject := must(ImportAs(must(ParseIdentifier(f.Origin.SubjectID)), f.Origin.Subject))
	for _, v := range f.Rust.Credentials {
		t.Run("credential of "+v.Issuer[:9], func(t *testing.T) {
			issuer := authorities[v.Issuer]
			c, err := VerifyCredential(v.Credential, subject.Identifier(), []*Identity{issuer}, recorded)
			if err != nil {
				t.Fatal(err)
			}
			if !c.Has(map[string]string{"ockam-relay": "*", "role": "tester"}) || c.Schema != 1 ||
				c.ExpiresAt.Sub(c.CreatedAt) != CredentialTTL || c.Subject.String() != v.Subject {
				t.Errorf("%+v", c)
			}
		})
	}
}

// remake signs a live history again with its known secrets.
func remake(t *testing.T, id *Identity, secrets []hexBytes, want []byte) {
	t.Helper()
	var prev Signer
	var again *Identity
	for i, c := range id.changes {
		var s Signer
		if c.key.kind == Ed25519 {
			s = must(NewEd25519Signer(secrets[i]))
		} else {
			s = p256Signer(t, secrets[i])
		}
		var err error
		if again, err = makeChange(again, prev, s, c.from, c.until, c.revokeAll); err != nil {
			t.Fatal(err)
		}
		prev = s
	}
	if !bytes.Equal(again.history, want) {
		t.Errorf("made again it differs:\n%x\n%x", again.history, want)
	}
}

func TestUpstreamRefreshCredentials(t *testing.T) {
	type file struct {
		Refresh struct {
			Plaintext hexBytes `json:"plaintext"`
			Decoded   struct {
				Presenter  string   `json:"presenter_identifier"`
				Key        hexBytes `json:"presenter_key_ed25519"`
				Credential struct {
					Subject    hexBytes    `json:"subject"`
					Change     hexBytes    `json:"subject_latest_change_hash"`
					Schema     uint64      `json:"schema"`
					Attributes [][2]string `json:"attributes_in_order"`
					Created    int64       `json:"created_at"`
					Expires    int64       `json:"expires_at"`
				} `json:"credential"`
				Attestation struct {
					Subject hexBytes `json:"subject"`
					Key     hexBytes `json:"public_key"`
					Created int64    `json:"created_at"`
					Expires int64    `json:"expires_at"`
				} `json:"purpose_key_attestation"`
			} `json:"decoded"`
		} `json:"refresh_credentials"`
	}
	v := vectors.Load[file](t, "secure_channel_messages_upstream.json").Refresh
	// 82 82 01 81 <RefreshCredentialsMessage> 40
	r := cbor.NewReader(v.Plaintext[4:])
	if err := r.Skip(); err != nil {
		t.Fatal(err)
	}
	message := r.Since(0)
	history, credentials, err := ParseRefresh(message)
	if err != nil || len(credentials) != 1 {
		t.Fatal(err)
	}
	if !bytes.Equal(AppendRefresh(nil, history, credentials...), message) {
		t.Error("encoded again it differs")
	}
	id := must(Import(history))
	if id.String() != v.Decoded.Presenter || !bytes.Equal(id.PublicKey().Bytes(), v.Decoded.Key) {
		t.Error("presenter differs")
	}
	c, err := InspectCredential(credentials[0])
	if err != nil {
		t.Fatal(err)
	}
	want := v.Decoded.Credential
	if !bytes.Equal(c.Subject[:], want.Subject) || !bytes.Equal(c.SubjectChange[:], want.Change) || c.Schema != want.Schema ||
		c.CreatedAt.Unix() != want.Created || c.ExpiresAt.Unix() != want.Expires || len(c.Attributes) != len(want.Attributes) {
		t.Errorf("%+v", c)
	}
	for _, kv := range want.Attributes {
		if c.Attributes[kv[0]] != kv[1] {
			t.Errorf("%s = %q", kv[0], c.Attributes[kv[0]])
		}
	}
	att := v.Decoded.Attestation
	if !bytes.Equal(c.Issuer[:], att.Subject) || !bytes.Equal(c.IssuerKey.SigningKey.Bytes(), att.Key) || c.IssuerKey.ForChannel ||
		c.IssuerKey.CreatedAt.Unix() != att.Created || c.IssuerKey.ExpiresAt.Unix() != att.Expires {
		t.Errorf("%+v", c.IssuerKey)
	}
	// The issuer's history is not in the vector, but its key's signature is.
	raw := must(parseCredential(credentials[0]))
	digest := sha256.Sum256(raw.signed)
	if err := c.IssuerKey.SigningKey.verify(&digest, &raw.sig); err != nil {
		t.Error(err)
	}
	d := must(openCredential(raw.signed))
	if again := appendEnvelope(nil, typeCredential, d.append(nil)); !bytes.Equal(again, raw.signed) {
		t.Error("signed data encoded again differs")
	}
}

// TestWorkedBytes follows spec identity 15 by hand.
func TestWorkedBytes(t *testing.T) {
	const want = "I923829d0397a06fa862be5a87b7966959b8ef99ab6455b843ca9131a747b4819"
	f := vectors.Load[upstreamFile](t, "identity_upstream.json")
	h := f.Histories[0].History
	if hex.EncodeToString(h[:8]) != "8182583783010158" {
		t.Fatalf("%x", h[:8])
	}
	sum := sha256.Sum256(h[4 : 4+0x37])
	if got := "I" + hex.EncodeToString(sum[:]); got != want || must(Import(h)).String() != want {
		t.Error(got)
	}
	if id := must(ParseIdentifier(" I" + strings.ToUpper(want[1:]) + "\n")); id.String() != want {
		t.Error(id)
	}
}
