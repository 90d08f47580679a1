package hubproto

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

var update = flag.Bool("update", false, "write the vectors of signed messages anew, with fresh keys")

const signedFile = "testdata/signed.json"

// signedVectors are proofs and claims as a device makes them, with what they are
// bound to. Each also says what it is refused with at a given moment.
type signedVectors struct {
	Comment string        `json:"comment"`
	Proofs  []proofVector `json:"proofs"`
	Claims  []claimVector `json:"claims"`
}

type proofVector struct {
	Name     string `json:"name"`
	Hub      string `json:"hub"`
	ClientID string `json:"client_id"`
	Exporter string `json:"exporter,omitempty"` // hex
	Now      int64  `json:"now"`                // unix seconds
	Skew     int64  `json:"skew,omitempty"`     // seconds
	Proof    string `json:"proof"`              // hex
	Refused  string `json:"refused,omitempty"`  // class; empty: accepted
}

type claimVector struct {
	Name    string `json:"name"`
	Known   string `json:"known,omitempty"` // hex, a history seen before
	Now     int64  `json:"now"`
	Claim   string `json:"claim"`
	Refused string `json:"refused,omitempty"`
}

// classes name the errors in the vectors.
var classes = map[string]error{
	"audience": ErrAudience, "client-id": ErrProofClientID, "exporter": ErrExporter, "lifetime": ErrLifetime,
	"malformed": ErrMalformed, "expired": identity.ErrExpired, "from-future": identity.ErrFromFuture,
	"signature": identity.ErrSignature, "not-latest-key": identity.ErrNotLatestKey, "schema": identity.ErrReservedSchema,
	"claim-expired": ErrClaimExpired, "older": identity.ErrOlder, "no-history": ErrClaimHistory,
	"wrong-identifier": identity.ErrWrongIdentifier,
}

func is(t *testing.T, err error, class string) {
	t.Helper()
	switch want := classes[class]; {
	case class == "" && err != nil:
		t.Errorf("refused: %v", err)
	case class != "" && want == nil:
		t.Errorf("no such class: %s", class)
	case class != "" && !errors.Is(err, want):
		t.Errorf("%v, want %s", err, class)
	}
}

func loadSigned(t testing.TB) signedVectors {
	t.Helper()
	b, err := os.ReadFile(signedFile)
	if err != nil {
		t.Fatal(err)
	}
	var v signedVectors
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Proofs) == 0 || len(v.Claims) == 0 {
		t.Fatal("no vectors")
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var made = time.Unix(1_800_000_000, 0)

func device(t testing.TB) *identity.Private {
	t.Helper()
	p, err := identity.Create(identity.WithClock(func() time.Time { return made }))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// verifyProof does what a hub does with a proof, but for its memory.
func verifyProof(b []byte, want ProofBinding, now time.Time, skew time.Duration) (*ProofFacts, error) {
	p, err := ParseProof(b)
	if err != nil {
		return nil, err
	}
	who, err := identity.Import(p.History)
	if err != nil {
		return nil, err
	}
	if id, err := p.Check(want); err != nil {
		return nil, err
	} else if id != who.Identifier() {
		return nil, identity.ErrWrongIdentifier
	}
	return p.Verify(who, want, now, skew)
}

func TestSignedVectors(t *testing.T) {
	if *update {
		writeSigned(t)
	}
	v := loadSigned(t)
	for _, tt := range v.Proofs {
		t.Run("proof/"+tt.Name, func(t *testing.T) {
			hub, err := identity.ParseIdentifier(tt.Hub)
			if err != nil {
				t.Fatal(err)
			}
			raw := unhex(t, tt.Proof)
			want := ProofBinding{Hub: hub, ClientID: tt.ClientID, Exporter: unhex(t, tt.Exporter)}
			f, err := verifyProof(raw, want, time.Unix(tt.Now, 0), time.Duration(tt.Skew)*time.Second)
			is(t, err, tt.Refused)
			if err == nil && f.ExpiresAt.Sub(f.CreatedAt) != ProofTTL {
				t.Errorf("valid for %v", f.ExpiresAt.Sub(f.CreatedAt))
			}
			if p, err := ParseProof(raw); err == nil {
				if again, err := p.Marshal(); err != nil || !bytes.Equal(again, raw) {
					t.Errorf("encoded again: %x, %v", again, err)
				}
			}
		})
	}
	for _, tt := range v.Claims {
		t.Run("claim/"+tt.Name, func(t *testing.T) {
			raw := unhex(t, tt.Claim)
			c, err := ParseClaim(raw)
			if err != nil {
				t.Fatal(err)
			}
			var known *identity.Identity
			if tt.Known != "" {
				if known, err = identity.Import(unhex(t, tt.Known)); err != nil {
					t.Fatal(err)
				}
			}
			_, err = c.Verify(known, time.Unix(tt.Now, 0))
			is(t, err, tt.Refused)
			if again, err := c.Marshal(); err != nil || !bytes.Equal(again, raw) {
				t.Errorf("encoded again: %x, %v", again, err)
			}
		})
	}
}

func writeSigned(t *testing.T) {
	p, hub := device(t), device(t).Identifier()
	id := p.Identifier().String()
	exporter := bytes.Repeat([]byte{0x5a}, 32)
	now := made.Unix() + 5
	make1 := func(b ProofBinding) string {
		raw, err := MakeProof(p, b)
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(raw)
	}
	plain := make1(ProofBinding{Hub: hub, ClientID: id + "-pump"})
	tls := make1(ProofBinding{Hub: hub, ClientID: id, Exporter: exporter})
	other := device(t).Identifier().String()
	v := signedVectors{Comment: "Proofs at CONNECT and claims to forwarding addresses, made with keys that were thrown away. Times are unix seconds."}
	add := func(name, proof, hub, client string, exporter []byte, now, skew int64, refused string) {
		v.Proofs = append(v.Proofs, proofVector{name, hub, client, hex.EncodeToString(exporter), now, skew, proof, refused})
	}
	add("without TLS", plain, hub.String(), id+"-pump", nil, now, 60, "")
	add("over TLS", tls, hub.String(), id, exporter, now, 60, "")
	add("in its last second", plain, hub.String(), id+"-pump", nil, made.Unix()+60, 0, "")
	add("within the skew", plain, hub.String(), id+"-pump", nil, made.Unix()+120, 60, "")
	add("expired", plain, hub.String(), id+"-pump", nil, made.Unix()+121, 60, "expired")
	add("from the future", plain, hub.String(), id+"-pump", nil, made.Unix()-121, 120, "from-future")
	add("for another hub", plain, other, id+"-pump", nil, now, 60, "audience")
	add("for another client id", plain, hub.String(), id, nil, now, 60, "client-id")
	add("relayed over another TLS connection", tls, hub.String(), id, bytes.Repeat([]byte{0xa5}, 32), now, 60, "exporter")
	add("without TLS shown over TLS", plain, hub.String(), id+"-pump", exporter, now, 60, "exporter")
	add("TLS ends before the hub", tls, hub.String(), id, nil, now, 60, "exporter")

	claim := func(n uint64) (string, *Claim) {
		c, err := MakeClaim(p, "FWD_0123456789abcdef", n, made.Add(ClaimTTL))
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(b), c
	}
	first, c := claim(7)
	old := p.Identity().ChangeHistory()
	forged := *c
	forged.Number++
	bad, err := forged.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	bare := *c
	bare.History = nil
	short, err := bare.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	rotated := hex.EncodeToString(p.Identity().ChangeHistory())
	second, _ := claim(8)
	until := made.Add(ClaimTTL).Unix()
	v.Claims = []claimVector{
		{"seen first", "", now, first, ""},
		{"known", hex.EncodeToString(old), now, first, ""},
		{"without history, known", hex.EncodeToString(old), now, hex.EncodeToString(short), ""},
		{"without history", "", now, hex.EncodeToString(short), "no-history"},
		{"in its last second", "", until - 1, first, ""},
		{"expired", "", until, first, "claim-expired"},
		{"reaches too far", "", until - int64((MaxClaimTTL+2*time.Minute)/time.Second), first, "claim-expired"},
		{"with another number", "", now, hex.EncodeToString(bad), "signature"},
		{"with a key rotated away", rotated, now, first, "older"},
		{"after a rotation", hex.EncodeToString(old), now, second, ""},
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(signedFile), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(signedFile, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestProofForged: no byte of a proof can be changed, and none left out.
func TestProofForged(t *testing.T) {
	v := loadSigned(t).Proofs[0]
	hub, _ := identity.ParseIdentifier(v.Hub)
	raw := unhex(t, v.Proof)
	want := ProofBinding{Hub: hub, ClientID: v.ClientID}
	for i := range raw {
		for _, bit := range []byte{0x01, 0x80} {
			forged := bytes.Clone(raw)
			forged[i] ^= bit
			if _, err := verifyProof(forged, want, made, 0); err == nil {
				// The one thing that may differ is how a length is written.
				if p, perr := ParseProof(forged); perr != nil || !sameProof(t, p, raw) {
					t.Fatalf("byte %d xor %#x accepted", i, bit)
				}
			}
		}
	}
	for n := range raw {
		if _, err := ParseProof(raw[:n]); err == nil {
			t.Fatalf("cut at %d accepted", n)
		}
	}
}

func sameProof(t *testing.T, p *Proof, raw []byte) bool {
	q, err := ParseProof(raw)
	if err != nil {
		t.Fatal(err)
	}
	return reflect.DeepEqual(p, q)
}

func TestProofLimits(t *testing.T) {
	p := device(t)
	b := ProofBinding{Hub: identity.Identifier{1}, ClientID: p.Identifier().String()}
	good, err := MakeProof(p, b)
	if err != nil {
		t.Fatal(err)
	}
	if len(good) > 1024 {
		t.Errorf("%d bytes", len(good))
	}
	if _, err := MakeProof(p, b, make([][]byte, MaxProofCredentials+1)...); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many credentials: %v", err)
	}
	if _, err := MakeProof(p, b, make([]byte, MaxProof)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := ParseProof(make([]byte, MaxProof+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	many, err := encodeUpTo(proofWire{Version, []byte{1}, []byte{1}, make([][]byte, MaxProofCredentials+1)}, MaxProof)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseProof(many); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many credentials: %v", err)
	}
	// A proof that would be good for an hour, one that ends before it begins, and
	// a self-issued credential of another kind.
	for name, tt := range map[string]struct {
		attrs map[string]string
		ttl   time.Duration
		class string
	}{
		"an hour":         {map[string]string{attrAudience: b.Hub.String(), attrClientID: b.ClientID, attrNonce: strings.Repeat("n", 16)}, time.Hour, "lifetime"},
		"no nonce":        {map[string]string{attrAudience: b.Hub.String(), attrClientID: b.ClientID}, ProofTTL, "malformed"},
		"no audience":     {map[string]string{attrClientID: b.ClientID, attrNonce: strings.Repeat("n", 16)}, ProofTTL, "malformed"},
		"a short binding": {map[string]string{attrAudience: b.Hub.String(), attrClientID: b.ClientID, attrNonce: strings.Repeat("n", 16), attrExporter: "x"}, ProofTTL, "malformed"},
	} {
		c, err := p.IssueConnectProof(tt.attrs, tt.ttl)
		if err != nil {
			t.Fatal(err)
		}
		q := Proof{History: p.Identity().ChangeHistory(), Credential: c}
		if _, err := q.Verify(p.Identity(), b, made, 0); !errors.Is(err, classes[tt.class]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ordinary, err := p.IssueCredential(p.Identity(), map[string]string{attrAudience: b.Hub.String(), attrClientID: b.ClientID, attrNonce: strings.Repeat("n", 16)}, 1, ProofTTL)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (&Proof{Credential: ordinary}).Verify(p.Identity(), b, made, 0); !errors.Is(err, identity.ErrReservedSchema) {
		t.Errorf("an ordinary credential: %v", err)
	}
	// Somebody else's client id.
	b.ClientID = device(t).Identifier().String()
	if raw, err := MakeProof(p, b); err != nil {
		t.Error(err)
	} else if _, err := verifyProof(raw, b, made, 0); !errors.Is(err, ErrProofClientID) {
		t.Errorf("another's client id: %v", err)
	}
}

func TestClaimWithLongHistory(t *testing.T) {
	p := device(t)
	for range 12 {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	c, err := MakeClaim(p, "forward_to_"+strings.Repeat("x", 128), 1, made.Add(ClaimTTL))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.History) != 0 {
		t.Errorf("history of %d bytes", len(c.History))
	}
	if _, err := c.Verify(p.Identity(), made); err != nil {
		t.Error(err)
	}
	// The longest claim fits into the answer of lookup.
	r := ForwarderRecord{Address: c.Address, Device: strings.Repeat("d", 128), Since: when, Claim: make([]byte, MaxClaim)}
	if _, err := (&LookupAnswer{Address: c.Address, Record: &r}).Marshal(); err != nil {
		t.Error(err)
	}
}

func TestGuestNames(t *testing.T) {
	a := GuestName()
	if !IsGuestName(a) || a == GuestName() || IsOneShot(a) {
		t.Error(a)
	}
	for _, s := range []string{"", "guest-", a[1:], a + "0", strings.ToUpper(a), "guest-" + strings.Repeat("g", 32)} {
		if IsGuestName(s) {
			t.Errorf("%q is a guest's", s)
		}
	}
}

func FuzzProof(f *testing.F) {
	for _, v := range loadSigned(f).Proofs {
		f.Add(unhex(f, v.Proof))
	}
	want := ProofBinding{Hub: identity.Identifier{1}, ClientID: "I00"}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseProof(b)
		if err != nil {
			return
		}
		if len(b) > MaxProof || len(p.Credentials) > MaxProofCredentials {
			t.Fatal("too large and accepted")
		}
		if _, err := p.Check(want); err == nil {
			t.Fatal("bound to a client id that is no identifier")
		}
		once, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseProof(once); err != nil || !reflect.DeepEqual(again, p) {
			t.Fatalf("%+v then %+v, %v", p, again, err)
		}
	})
}

func FuzzClaim(f *testing.F) {
	for _, v := range loadSigned(f).Claims {
		f.Add(unhex(f, v.Claim))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseClaim(b)
		if err != nil {
			return
		}
		once, err := c.Marshal()
		if errors.Is(err, ErrTooLarge) {
			return // unknown keys make room for longer lengths than ours
		}
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseClaim(once); err != nil || !reflect.DeepEqual(again, c) {
			t.Fatalf("%+v then %+v, %v", c, again, err)
		}
		_, _ = c.Verify(nil, made)
	})
}
