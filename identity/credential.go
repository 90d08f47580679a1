package identity

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// SchemaConnectProof is the schema number of the self-issued credential with
// which a device proves itself to a hub at CONNECT. It begins with the bytes
// "sealmq"; all 65,536 numbers that do are reserved, and VerifyCredential
// refuses them: a proof is never a credential. VerifyConnectProof takes it.
const SchemaConnectProof uint64 = 0x7365616c6d710001

// reservedSchema reports whether a schema number begins with "sealmq".
func reservedSchema(schema uint64) bool { return schema>>16 == SchemaConnectProof>>16 }

// Credential is what an authority says of a subject.
type Credential struct {
	Subject    Identifier        // zero when the credential names none (never after verification)
	Issuer     Identifier        // the authority
	Schema     uint64            // what the attributes mean, by agreement with the authority
	Attributes map[string]string // names and values are arbitrary bytes, in practice UTF-8
	CreatedAt  time.Time
	ExpiresAt  time.Time
}

// Has reports whether every required attribute is there with exactly that
// value.
func (c *Credential) Has(required map[string]string) bool {
	for k, want := range required {
		if got, ok := c.Attributes[k]; !ok || got != want {
			return false
		}
	}
	return true
}

// rawCredential is the outer decoding of a credential (spec identity 11.1):
//
//	CredentialAndPurposeKey = array(2) [ credential, purpose_key_attestation ]
//	Credential              = array(2) [ data: bytes, signature ]
type rawCredential struct {
	signed    []byte
	sig       signature
	attSigned []byte
	attSig    signature
}

func readCredential(r *cbor.Reader) (rawCredential, error) {
	var c rawCredential
	f, err := readFields(r)
	if err != nil {
		return c, err
	}
	if err := f.need(); err != nil {
		return c, err
	}
	if c.signed, c.sig, err = readSigned(r); err != nil {
		return c, err
	}
	if err := f.need(); err != nil {
		return c, err
	}
	if c.attSigned, c.attSig, err = readSigned(r); err != nil {
		return c, err
	}
	return c, f.end()
}

func parseCredential(b []byte) (rawCredential, error) {
	r := cbor.NewReader(b)
	c, err := readCredential(r)
	if err != nil {
		return c, malformed(err)
	}
	if r.Offset() > MaxCredential {
		return c, fmt.Errorf("%w: %d bytes at most", ErrTooLarge, MaxCredential)
	}
	return c, atEnd(r)
}

// credentialData is the signed part:
//
//	CredentialData = array(5) [ subject: bytes(32) / null,
//	    subject_latest_change_hash: bytes(32) / null, subject_attributes,
//	    created_at: uint, expires_at: uint ]
//	Attributes     = array(2) [ schema: uint, map: { bytes => bytes } ]
type credentialData struct {
	subject          Identifier
	hasSubject       bool
	change           ChangeHash
	hasChange        bool
	schema           uint64
	attributes       map[string]string
	created, expires uint64
}

func openCredential(signed []byte) (credentialData, error) {
	data, err := readEnvelope(signed, typeCredential)
	if err != nil {
		return credentialData{}, err
	}
	var d credentialData
	if err := d.read(cbor.NewReader(data)); err != nil {
		return credentialData{}, malformed(err)
	}
	return d, nil
}

func (d *credentialData) read(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return err
	}
	subject, present, err := f.optionalHash()
	if err != nil {
		return err
	}
	d.subject, d.hasSubject = subject, present
	change, present, err := f.optionalHash()
	if err != nil {
		return err
	}
	d.change, d.hasChange = change, present
	if err := f.need(); err != nil {
		return err
	}
	if err := d.readAttributes(r); err != nil {
		return err
	}
	if d.created, err = f.uint(); err != nil {
		return err
	}
	if d.expires, err = f.uint(); err != nil {
		return err
	}
	return f.end()
}

func (d *credentialData) readAttributes(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return err
	}
	if d.schema, err = f.uint(); err != nil {
		return err
	}
	if err := f.need(); err != nil {
		return err
	}
	l, err := r.Map()
	if err != nil {
		return err
	}
	d.attributes = make(map[string]string)
	for n := 0; ; n++ {
		more, err := l.Next()
		if err != nil {
			return err
		}
		if !more {
			return f.end()
		}
		if n == MaxAttributes {
			return fmt.Errorf("%w: %d attributes at most", ErrTooLarge, MaxAttributes)
		}
		k, err := r.Bytes()
		if err != nil {
			return err
		}
		v, err := r.Bytes()
		if err != nil {
			return err
		}
		d.attributes[string(k)] = string(v) // the last of equal names wins
	}
}

func (d *credentialData) append(dst []byte) []byte {
	dst = cbor.AppendArray(dst, 5)
	dst = appendOptionalHash(dst, d.subject, d.hasSubject)
	dst = appendOptionalHash(dst, d.change, d.hasChange)
	dst = cbor.AppendArray(dst, 2)
	dst = cbor.AppendUint(dst, d.schema)
	dst = cbor.AppendMap(dst, len(d.attributes))
	for _, k := range slices.Sorted(maps.Keys(d.attributes)) { // bytewise
		dst = cbor.AppendBytesString(dst, k)
		dst = cbor.AppendBytesString(dst, d.attributes[k])
	}
	dst = cbor.AppendUint(dst, d.created)
	return cbor.AppendUint(dst, d.expires)
}

func (d *credentialData) public(issuer Identifier) *Credential {
	return &Credential{
		Subject: d.subject, Issuer: issuer, Schema: d.schema, Attributes: d.attributes,
		CreatedAt: unixTime(d.created), ExpiresAt: unixTime(d.expires),
	}
}

// make signs the credential with an attested purpose key.
func (d *credentialData) make(key *credentialKey) ([]byte, error) {
	signed := appendEnvelope(nil, typeCredential, d.append(nil))
	sig, err := sign(key.signer, sha256.Sum256(signed))
	if err != nil {
		return nil, err
	}
	out := cbor.AppendArray(nil, 2)
	out = appendSigned(out, signed, sig)
	return append(out, key.encoded...), nil
}

// VerifyCredential verifies a credential by the rules of spec identity 11.3 in
// their order: its issuer must be one of authorities, and its subject must be
// subject; a zero subject accepts any. Reserved schema numbers are refused.
// The change hash of the subject inside is not compared with anything, as with
// Rust peers. Bytes after the credential are refused, as by Import. Errors are
// *VerifyError.
func VerifyCredential(b []byte, subject Identifier, authorities []*Identity, now time.Time) (*Credential, error) {
	c, err := verifyCredential(b, subject, authorities, at(now))
	if err == nil && reservedSchema(c.Schema) {
		err = fmt.Errorf("%w (%#x)", ErrReservedSchema, c.Schema)
	}
	if err != nil {
		return nil, refuse(objCredential, err)
	}
	return c, nil
}

// VerifyConnectProof verifies a credential with schema SchemaConnectProof that
// subject has issued about itself. skew is how far the clocks of the two sides
// may be apart, ClockTolerance at least. What the attributes say, how long the
// proof may be valid and whether it has been used before is the caller's to
// check. Errors are *VerifyError.
func VerifyConnectProof(b []byte, subject *Identity, now time.Time, skew time.Duration) (*Credential, error) {
	t := at(now)
	t.past = uint64(max(skew, 0) / time.Second)
	t.skew = max(t.skew, t.past)
	c, err := verifyCredential(b, subject.Identifier(), []*Identity{subject}, t)
	if err == nil && c.Schema != SchemaConnectProof {
		err = fmt.Errorf("%w: schema %#x is not that of a proof", ErrReservedSchema, c.Schema)
	}
	if err != nil {
		return nil, refuse(objCredential, err)
	}
	return c, nil
}

func verifyCredential(b []byte, subject Identifier, authorities []*Identity, t instant) (*Credential, error) {
	raw, err := parseCredential(b)
	if err != nil {
		return nil, err
	}
	// 1 and 2: the attestation, whose subject is the issuer.
	a, err := openAttestation(raw.attSigned, raw.attSig)
	if err != nil {
		return nil, fmt.Errorf("issuer's key: %w", err)
	}
	i := slices.IndexFunc(authorities, func(x *Identity) bool { return x.Identifier() == a.subject })
	if i < 0 {
		return nil, fmt.Errorf("%w: %v", ErrUnknownAuthority, a.subject)
	}
	if err := a.verify(authorities[i], t); err != nil {
		return nil, fmt.Errorf("issuer's key: %w", err)
	}
	// 3 and 4: it signs credentials, and has signed this one.
	if a.purpose != purposeCredentials {
		return nil, fmt.Errorf("issuer's key: %w", ErrWrongPurpose)
	}
	digest := sha256.Sum256(raw.signed)
	if err := a.signingKey.verify(&digest, &raw.sig); err != nil {
		return nil, err
	}
	// 5 to 9: what it says.
	d, err := openCredential(raw.signed)
	if err != nil {
		return nil, err
	}
	if !d.hasSubject {
		return nil, ErrNoSubject
	}
	if !subject.IsZero() && d.subject != subject {
		return nil, fmt.Errorf("%w: about %v, not %v", ErrWrongSubject, d.subject, subject)
	}
	if d.created < a.created || d.expires > a.expires {
		return nil, ErrOutsideAttestation
	}
	if err := t.check(d.created, d.expires); err != nil {
		return nil, err
	}
	return d.public(a.subject), nil
}

// Inspection is what a credential says, whether true or not.
type Inspection struct {
	Credential
	SubjectChange ChangeHash  // the subject's latest change when it was issued; zero when absent
	IssuerKey     Attestation // the key that signed, as the issuer attests it
}

// InspectCredential decodes a credential without trusting it: no signature, time
// or issuer is verified.
func InspectCredential(b []byte) (*Inspection, error) {
	raw, err := parseCredential(b)
	if err != nil {
		return nil, refuse(objCredential, err)
	}
	a, err := openAttestation(raw.attSigned, raw.attSig)
	if err != nil {
		return nil, refuse(objCredential, fmt.Errorf("issuer's key: %w", err))
	}
	d, err := openCredential(raw.signed)
	if err != nil {
		return nil, refuse(objCredential, err)
	}
	return &Inspection{*d.public(a.subject), d.change, a.public()}, nil
}
