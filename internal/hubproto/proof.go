package hubproto

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// MQTT user names of devices. No account can have them.
const (
	// ProofUser has a Proof as its password.
	ProofUser = "sealmq-proof-1"
	// GuestUser has none: it may say hello, to learn which hub this is.
	GuestUser = "sealmq-guest"
)

// Limits of a proof.
const (
	// MaxProof bounds a proof, in bytes: an identity with some sixty rotations
	// and a few credentials fit.
	MaxProof = 16 << 10
	// MaxProofCredentials is how many credentials a proof may carry.
	MaxProofCredentials = 8
	// ProofTTL is how long a proof is valid from when it was made; one that
	// claims more is refused.
	ProofTTL = 60 * time.Second
)

// Names of the attributes in a proof's self-issued credential. Others are
// ignored.
const (
	attrAudience = "audience"     // the hub's identifier, text form
	attrClientID = "client id"    // the MQTT client id
	attrNonce    = "nonce"        // 16 random bytes
	attrExporter = "tls exporter" // RFC 9266, 32 bytes; absent without TLS
)

// exporterLen is the length of a TLS exporter value (RFC 9266).
const exporterLen = 32

// Reasons why a proof of good form is refused. An error of Proof.Verify wraps
// one of them or one of package identity's.
var (
	// ErrAudience means that the proof was made for another hub.
	ErrAudience = errors.New("hubproto: proof was made for another hub")
	// ErrProofClientID means that it was made for another client id, or that the
	// client id does not begin with the identifier.
	ErrProofClientID = errors.New("hubproto: proof was made for another client id")
	// ErrExporter means that it was made for another TLS connection, or for one
	// without TLS, or that TLS ends before the hub.
	ErrExporter = errors.New("hubproto: proof was made for another TLS connection")
	// ErrLifetime means that it claims to be valid for longer than ProofTTL.
	ErrLifetime = errors.New("hubproto: proof is valid for too long")
)

// Proof is what a device shows at CONNECT, as the password of ProofUser.
//
//	{0: 1, 1: change history bstr, 2: credential bstr, 3: [credential bstr]}
//
// Key 2 is a credential with identity.SchemaConnectProof that the device issued
// about itself (ProofBinding says what is in it); key 3, which may be absent,
// holds credentials that authorities issued for the device.
type Proof struct {
	History     []byte
	Credential  []byte
	Credentials [][]byte
}

type proofWire struct {
	Version     uint64   `cbor:"0,keyasint"`
	History     []byte   `cbor:"1,keyasint"`
	Credential  []byte   `cbor:"2,keyasint"`
	Credentials [][]byte `cbor:"3,keyasint,omitempty"`
}

// Marshal returns the encoded proof.
func (p *Proof) Marshal() ([]byte, error) {
	if len(p.Credentials) > MaxProofCredentials {
		return nil, fmt.Errorf("%w: %d credentials at most", ErrTooLarge, MaxProofCredentials)
	}
	return encodeUpTo(proofWire{Version, nonNil(p.History), nonNil(p.Credential), p.Credentials}, MaxProof)
}

// ParseProof reads a proof. Nothing in it is verified.
func ParseProof(b []byte) (*Proof, error) {
	var w proofWire
	if err := decodeUpTo(b, &w, MaxProof); err != nil {
		return nil, err
	}
	switch {
	case len(w.History) == 0 || len(w.Credential) == 0:
		return nil, fmt.Errorf("%w: proof without history or credential", ErrMalformed)
	case len(w.Credentials) > MaxProofCredentials:
		return nil, fmt.Errorf("%w: %d credentials at most", ErrTooLarge, MaxProofCredentials)
	}
	p := &Proof{History: w.History, Credential: w.Credential}
	for _, c := range w.Credentials {
		if len(c) == 0 {
			return nil, fmt.Errorf("%w: empty credential", ErrMalformed)
		}
		p.Credentials = append(p.Credentials, c)
	}
	return p, nil
}

// ProofBinding is what a proof is bound to.
type ProofBinding struct {
	// Hub is the identifier of the hub it is for.
	Hub identity.Identifier
	// ClientID is the MQTT client id of the connection: the device's
	// identifier, alone or with "-" and a suffix.
	ClientID string
	// Exporter is the exporter value of the TLS connection (RFC 9266); empty
	// without TLS.
	Exporter []byte
}

// MakeProof makes a fresh proof, good for one connection within ProofTTL.
// credentials are those of authorities that the hub may ask for.
func MakeProof(p *identity.Private, b ProofBinding, credentials ...[]byte) ([]byte, error) {
	var nonce [NonceLen]byte
	_, _ = rand.Read(nonce[:]) // never fails (crypto/rand)
	attrs := map[string]string{attrAudience: b.Hub.String(), attrClientID: b.ClientID, attrNonce: string(nonce[:])}
	if len(b.Exporter) > 0 {
		attrs[attrExporter] = string(b.Exporter)
	}
	credential, err := p.IssueConnectProof(attrs, ProofTTL)
	if err != nil {
		return nil, err
	}
	proof := Proof{History: p.Identity().ChangeHistory(), Credential: credential, Credentials: credentials}
	return proof.Marshal()
}

// ProofFacts is what a verified proof says.
type ProofFacts struct {
	Nonce     [NonceLen]byte
	CreatedAt time.Time
	ExpiresAt time.Time
}

// Check compares what the proof claims with what it has to be bound to, without
// verifying a signature: it refuses what is not worth the work. It returns the
// identifier that the proof claims.
func (p *Proof) Check(want ProofBinding) (identity.Identifier, error) {
	c, err := identity.InspectCredential(p.Credential)
	if err != nil {
		return identity.Identifier{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if _, err := bound(&c.Credential, want); err != nil {
		return identity.Identifier{}, err
	}
	return c.Subject, nil
}

// Verify checks that subject, imported from the proof's history, made the proof
// for want at about now. skew is how far the two clocks may be apart. That the
// proof has not been used before and that the history is the latest one is the
// caller's to check.
func (p *Proof) Verify(subject *identity.Identity, want ProofBinding, now time.Time, skew time.Duration) (*ProofFacts, error) {
	c, err := identity.VerifyConnectProof(p.Credential, subject, now, skew)
	if err != nil {
		return nil, err
	}
	return bound(c, want)
}

// bound checks the attributes of a proof.
func bound(c *identity.Credential, want ProofBinding) (*ProofFacts, error) {
	f := &ProofFacts{CreatedAt: c.CreatedAt, ExpiresAt: c.ExpiresAt}
	hub, err := identity.ParseIdentifier(c.Attributes[attrAudience])
	if err != nil {
		return nil, fmt.Errorf("%w: proof without audience", ErrMalformed)
	}
	if len(c.Attributes[attrNonce]) != NonceLen {
		return nil, fmt.Errorf("%w: proof's nonce has %d bytes, not %d", ErrMalformed, len(c.Attributes[attrNonce]), NonceLen)
	}
	copy(f.Nonce[:], c.Attributes[attrNonce])
	exporter := c.Attributes[attrExporter]
	if n := len(exporter); n != 0 && n != exporterLen {
		return nil, fmt.Errorf("%w: proof's exporter value has %d bytes, not %d", ErrMalformed, n, exporterLen)
	}
	name, _, _ := strings.Cut(want.ClientID, "-")
	switch id := c.Attributes[attrClientID]; {
	case hub != want.Hub:
		return nil, fmt.Errorf("%w: %v", ErrAudience, hub)
	case id != want.ClientID:
		return nil, fmt.Errorf("%w: %q", ErrProofClientID, id)
	case name != c.Subject.String():
		return nil, fmt.Errorf("%w: it does not begin with %v", ErrProofClientID, c.Subject)
	case exporter == "" && len(want.Exporter) > 0:
		return nil, fmt.Errorf("%w: it is bound to none", ErrExporter)
	case exporter != "" && len(want.Exporter) == 0:
		return nil, fmt.Errorf("%w: there is none here; does TLS end before the hub?", ErrExporter)
	case exporter != string(want.Exporter):
		return nil, ErrExporter
	}
	if life := c.ExpiresAt.Sub(c.CreatedAt); life <= 0 || life > ProofTTL {
		return nil, fmt.Errorf("%w: %v", ErrLifetime, life)
	}
	return f, nil
}

// guestPrefix begins the client ids of guests, which say nothing about who they
// are.
const guestPrefix = "guest-"

// GuestName returns a fresh client id for a guest.
func GuestName() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return guestPrefix + hex.EncodeToString(b[:])
}

// IsGuestName reports whether a client id has the form that GuestName makes, so
// that no guest can take the place of anybody else.
func IsGuestName(clientID string) bool {
	rest, ok := strings.CutPrefix(clientID, guestPrefix)
	if !ok || len(rest) != 32 {
		return false
	}
	for _, c := range []byte(rest) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// What a hub says of itself in HelloAnswer.Features.
const (
	// FeatureEphemeral: the hub's identity ends with its process, so there is no
	// use in remembering it. It is not signed: whoever could add it could as well
	// be a hub of its own at the first contact, and a hub that is remembered is
	// held to its identity whatever it says.
	FeatureEphemeral Features = 1 << 0
	// FeatureClaims: the hub keeps signed claims to forwarding addresses
	// (services claim and release).
	FeatureClaims Features = 1 << 1
)
