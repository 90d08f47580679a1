package identity

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// TestCredentialRules tries the rules of spec identity 11.3 one by one.
func TestCredentialRules(t *testing.T) {
	idSigner, keySigner, other := seeded(1), seeded(2), seeded(3)
	const from, until = 1_700_000_000, 1_700_100_000
	issuer := must(makeChange(nil, nil, idSigner, from, until, false))
	rotated := must(makeChange(issuer, idSigner, other, from, until, false))
	stranger := must(makeChange(nil, nil, other, from, until, false))
	subject := stranger.Identifier()
	now := time.Unix(from+500, 0)

	attestFor := func(a attestation, s Signer) []byte {
		return must(a.make(issuer, s))
	}
	att := attestation{purpose: purposeCredentials, signingKey: keySigner.PublicKey(), created: from + 10, expires: until - 10}
	goodAtt := attestFor(att, idSigner)
	base := credentialData{
		subject: subject, hasSubject: true, change: ChangeHash{7}, hasChange: true, schema: 1,
		attributes: map[string]string{"role": "x"}, created: from + 10, expires: from + 1000,
	}
	make := func(f func(*credentialData), att []byte, s Signer) []byte {
		d := base
		f(&d)
		return must(d.make(&credentialKey{signer: s, encoded: att}))
	}
	same := func(*credentialData) {}
	raw := func(version, typ uint64, data []byte) []byte {
		signed := envelope(version, typ, data)
		out := cbor.AppendArray(nil, 2)
		out = appendSigned(out, signed, must(sign(keySigner, sha256.Sum256(signed))))
		return append(out, goodAtt...)
	}
	expiredAtt := att
	expiredAtt.expires = from + 499
	channelAtt := attestation{purpose: purposeChannel, created: from + 10, expires: until - 10}

	tests := []struct {
		name        string
		b           []byte
		authorities []*Identity
		err         error
	}{
		{"good", make(same, goodAtt, keySigner), []*Identity{stranger, issuer}, nil},
		{"not CBOR", []byte{1}, []*Identity{issuer}, ErrMalformed},
		{"1: attestation signed by another", make(same, attestFor(att, other), keySigner), []*Identity{issuer}, ErrSignature},
		{"1: attestation expired", make(same, attestFor(expiredAtt, idSigner), keySigner), []*Identity{issuer}, ErrExpired},
		{"1: authority has rotated", make(same, goodAtt, keySigner), []*Identity{rotated}, ErrNotLatestKey},
		{"2: unknown authority", make(same, goodAtt, keySigner), []*Identity{stranger}, ErrUnknownAuthority},
		{"2: no authority", make(same, goodAtt, keySigner), nil, ErrUnknownAuthority},
		{"3: channel key", make(same, attestFor(channelAtt, idSigner), keySigner), []*Identity{issuer}, ErrWrongPurpose},
		{"4: signed by another", make(same, goodAtt, other), []*Identity{issuer}, ErrSignature},
		{"4: signed with the identity key", make(same, goodAtt, idSigner), []*Identity{issuer}, ErrSignature},
		{"5: version", raw(2, 3, base.append(nil)), []*Identity{issuer}, ErrVersion},
		{"5: data type", raw(1, 2, base.append(nil)), []*Identity{issuer}, ErrDataType},
		{"5: data", raw(1, 3, []byte{0x80}), []*Identity{issuer}, ErrMalformed},
		{"6: no subject", make(func(d *credentialData) { d.hasSubject = false }, goodAtt, keySigner), []*Identity{issuer}, ErrNoSubject},
		{"7: other subject", make(func(d *credentialData) { d.subject = Identifier{1} }, goodAtt, keySigner), []*Identity{issuer}, ErrWrongSubject},
		{"8: older than the key", make(func(d *credentialData) { d.created = from + 9 }, goodAtt, keySigner), []*Identity{issuer}, ErrOutsideAttestation},
		{"8: outlives the key", make(func(d *credentialData) { d.expires = until - 9 }, goodAtt, keySigner), []*Identity{issuer}, ErrOutsideAttestation},
		{"9: 61 s in the future", make(func(d *credentialData) { d.created = from + 561 }, goodAtt, keySigner), []*Identity{issuer}, ErrFromFuture},
		{"9: 60 s in the future", make(func(d *credentialData) { d.created = from + 560 }, goodAtt, keySigner), []*Identity{issuer}, nil},
		{"9: expired", make(func(d *credentialData) { d.expires = from + 499 }, goodAtt, keySigner), []*Identity{issuer}, ErrExpired},
		{"9: last second", make(func(d *credentialData) { d.expires = from + 500 }, goodAtt, keySigner), []*Identity{issuer}, nil},
		{"reserved schema", make(func(d *credentialData) { d.schema = SchemaConnectProof }, goodAtt, keySigner), []*Identity{issuer}, ErrReservedSchema},
		{"reserved range", make(func(d *credentialData) { d.schema = SchemaConnectProof + 99 }, goodAtt, keySigner), []*Identity{issuer}, ErrReservedSchema},
		// Not checked by Rust either.
		{"no change hash", make(func(d *credentialData) { d.hasChange = false }, goodAtt, keySigner), []*Identity{issuer}, nil},
		{"no attributes", make(func(d *credentialData) { d.attributes = nil }, goodAtt, keySigner), []*Identity{issuer}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := VerifyCredential(tt.b, subject, tt.authorities, now)
			if !errors.Is(err, tt.err) {
				t.Fatalf("%v, want %v", err, tt.err)
			}
			if err == nil && (c.Subject != subject || c.Issuer != issuer.Identifier()) {
				t.Errorf("%+v", c)
			}
			if err != nil && c != nil {
				t.Error("a credential beside the error")
			}
		})
	}
	if _, err := VerifyCredential(make(same, goodAtt, keySigner), Identifier{}, []*Identity{issuer}, now); err != nil {
		t.Errorf("any subject: %v", err)
	}
}

func TestCredentialLenient(t *testing.T) {
	s, key := seeded(1), seeded(2)
	issuer := must(makeChange(nil, nil, s, 100, 1000, false))
	a := attestation{purpose: purposeCredentials, signingKey: key.PublicKey(), created: 100, expires: 1000}
	att := must(a.make(issuer, s))
	build := func(attributes []byte) []byte {
		data := cbor.AppendArray(nil, 5)
		data = cbor.AppendBytes(data, make([]byte, 32))
		data = cbor.AppendNull(data)
		data = append(data, attributes...)
		data = cbor.AppendUint(data, 100)
		data = cbor.AppendUint(data, 1000)
		signed := envelope(1, 3, data)
		out := cbor.AppendArray(nil, 2)
		out = appendSigned(out, signed, must(sign(key, sha256.Sum256(signed))))
		return append(out, att...)
	}
	pairs := func(kv ...string) (b []byte) {
		for _, s := range kv {
			b = cbor.AppendBytesString(b, s)
		}
		return b
	}
	for name, tt := range map[string]struct {
		attributes []byte
		want       map[string]string
	}{
		"out of order": {append([]byte{0x82, 0x01, 0xa2}, pairs("b", "1", "a", "2")...), map[string]string{"a": "2", "b": "1"}},
		"duplicate":    {append([]byte{0x82, 0x01, 0xa2}, pairs("a", "1", "a", "2")...), map[string]string{"a": "2"}},
		"indefinite":   {append(append([]byte{0x82, 0x01, 0xbf}, pairs("a", "1")...), 0xff), map[string]string{"a": "1"}},
		"further":      {append(append([]byte{0x83, 0x01, 0xa1}, pairs("", "\xff\x00")...), 0x00), map[string]string{"": "\xff\x00"}},
		"schema u64":   {append([]byte{0x82, 0x1b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xa0}, pairs()...), map[string]string{}},
	} {
		c, err := VerifyCredential(build(tt.attributes), Identifier{}, []*Identity{issuer}, time.Unix(500, 0))
		if name == "schema u64" {
			if err != nil || c.Schema != 1<<64-1 {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		// A subject of 32 zero bytes is a subject.
		if err != nil || fmt.Sprint(c.Attributes) != fmt.Sprint(tt.want) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	for name, attributes := range map[string][]byte{
		"text keys": {0x82, 0x01, 0xa1, 0x61, 'a', 0x41, 'b'},
		"no map":    {0x81, 0x01},
		"null":      {cbor.Null},
		"negative":  {0x82, 0x20, 0xa0},
	} {
		if _, err := InspectCredential(build(attributes)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	many := cbor.AppendMap([]byte{0x82, 0x01}, MaxAttributes+1)
	for i := range MaxAttributes + 1 {
		many = append(many, pairs(fmt.Sprint(i), "")...)
	}
	if _, err := InspectCredential(build(many)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if _, err := InspectCredential(build(append([]byte{0x82, 0x01, 0xa1}, pairs("a", string(make([]byte, MaxCredential)))...))); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestIssueCredential(t *testing.T) {
	clock := newClock()
	authority := must(Create(clock.option()))
	subject := must(Create(clock.option())).Identity()
	attrs := map[string]string{"b": "2", "aa": "1", "a": "3", "\xff": ""}

	first := must(authority.IssueCredential(subject, attrs, 1, CredentialTTL))
	c, err := VerifyCredential(first, subject.Identifier(), []*Identity{authority.Identity()}, clock.now)
	if err != nil || c.ExpiresAt.Sub(c.CreatedAt) != CredentialTTL || !c.Has(attrs) || c.Has(map[string]string{"a": "4"}) || c.Has(map[string]string{"z": ""}) {
		t.Fatalf("%+v, %v", c, err)
	}
	in := must(InspectCredential(first))
	if in.SubjectChange != subject.LatestChange() || in.IssuerKey.ForChannel || in.Subject != subject.Identifier() {
		t.Errorf("%+v", in)
	}
	// Bytewise order of names, not the length-first one.
	raw := must(parseCredential(first))
	if i, j := bytes.Index(raw.signed, []byte{0x41, 'a'}), bytes.Index(raw.signed, []byte{0x42, 'a', 'a'}); i < 0 || j < i || bytes.Index(raw.signed, []byte{0x41, 'b'}) < j {
		t.Errorf("%x", raw.signed)
	}
	// The same purpose key signs while it lives long enough.
	second := must(InspectCredential(must(authority.IssueCredential(subject, nil, 1, CredentialTTL))))
	if second.IssuerKey.SigningKey != in.IssuerKey.SigningKey {
		t.Error("a new purpose key for each credential")
	}
	// It is renewed when it has less left than the ttl.
	clock.advance(PurposeKeyLifetime - CredentialTTL)
	atEdge := must(InspectCredential(must(authority.IssueCredential(subject, nil, 1, CredentialTTL))))
	if atEdge.IssuerKey.SigningKey != in.IssuerKey.SigningKey {
		t.Error("renewed although it suffices")
	}
	clock.advance(time.Second)
	b := must(authority.IssueCredential(subject, nil, 1, CredentialTTL))
	if must(InspectCredential(b)).IssuerKey.SigningKey == in.IssuerKey.SigningKey {
		t.Error("not renewed")
	}
	if _, err := VerifyCredential(b, subject.Identifier(), []*Identity{authority.Identity()}, clock.now.Add(CredentialTTL)); err != nil {
		t.Errorf("in its last second: %v", err)
	}
	// A ttl beyond the usual life of a purpose key works within the identity key's.
	if b, err := authority.IssueCredential(subject, nil, 1, PurposeKeyLifetime); err != nil {
		t.Error(err)
	} else if in := must(InspectCredential(b)); in.ExpiresAt.Sub(in.CreatedAt) != PurposeKeyLifetime {
		t.Errorf("%+v", in)
	}
	if _, err := authority.IssueCredential(subject, nil, 1, KeyLifetime); !errors.Is(err, ErrKeyExpired) {
		t.Errorf("beyond the identity key: %v", err)
	}
	for _, ttl := range []time.Duration{0, -time.Hour, time.Millisecond} {
		if _, err := authority.IssueCredential(subject, nil, 1, ttl); err == nil {
			t.Errorf("ttl %v accepted", ttl)
		}
	}
	if _, err := authority.IssueCredential(subject, nil, SchemaConnectProof, time.Hour); !errors.Is(err, ErrReservedSchema) {
		t.Error(err)
	}
	if _, err := authority.IssueCredential(subject, map[string]string{"a": string(make([]byte, MaxCredential))}, 1, time.Hour); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestConnectProof(t *testing.T) {
	clock := newClock()
	p := must(Create(clock.option()))
	attrs := map[string]string{"audience": "hub", "nonce": "\x00\x01"}
	proof := must(p.IssueConnectProof(attrs, time.Minute))
	id := p.Identity()

	c, err := VerifyConnectProof(proof, id, clock.now, 0)
	if err != nil || c.Subject != id.Identifier() || c.Issuer != id.Identifier() || !c.Has(attrs) {
		t.Fatalf("%+v, %v", c, err)
	}
	// A peer never takes it for a credential, although its issuer is trusted.
	if _, err := VerifyCredential(proof, id.Identifier(), []*Identity{id}, clock.now); !errors.Is(err, ErrReservedSchema) {
		t.Error(err)
	}
	// Nor is a credential a proof.
	cred := must(p.IssueCredential(id, attrs, 1, time.Minute))
	if _, err := VerifyConnectProof(cred, id, clock.now, 0); !errors.Is(err, ErrReservedSchema) {
		t.Error(err)
	}
	other := must(Create(clock.option()))
	if _, err := VerifyConnectProof(proof, other.Identity(), clock.now, 0); !errors.Is(err, ErrUnknownAuthority) {
		t.Error(err)
	}
	for _, tt := range []struct {
		at, skew time.Duration
		err      error
	}{
		{61 * time.Second, 0, ErrExpired},
		{61 * time.Second, time.Minute, nil},
		{121 * time.Second, time.Minute, ErrExpired},
		{-60 * time.Second, 0, nil},
		{-61 * time.Second, 0, ErrFromFuture},
		{-5 * time.Minute, 5 * time.Minute, nil}, // the attestation is as young
		{-301 * time.Second, 5 * time.Minute, ErrFromFuture},
	} {
		if _, err := VerifyConnectProof(proof, id, clock.now.Add(tt.at), tt.skew); !errors.Is(err, tt.err) {
			t.Errorf("%v with skew %v: %v, want %v", tt.at, tt.skew, err, tt.err)
		}
	}
	// Signed by a key that was rotated away since.
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyConnectProof(proof, p.Identity(), clock.now, 0); !errors.Is(err, ErrNotLatestKey) {
		t.Error(err)
	}
}
