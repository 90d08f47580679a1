package identity

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// Lifetimes and tolerances (spec identity 13).
const (
	// KeyLifetime is how long a new identity key may attest.
	KeyLifetime = 10 * 365 * 24 * time.Hour
	// PurposeKeyLifetime is how long a new purpose key is attested for.
	PurposeKeyLifetime = 5 * 365 * 24 * time.Hour
	// ClockTolerance is how far in the future attestations and credentials
	// may have been made.
	ClockTolerance = 60 * time.Second
	// CredentialTTL is the usual lifetime of a credential.
	CredentialTTL = 30 * 24 * time.Hour
)

// purpose is the variant of PurposePublicKey.
type purpose uint8

const (
	purposeChannel     purpose = 0 // X25519
	purposeCredentials purpose = 1 // signs credentials
)

// attestation is a decoded attestation (spec identity 10.2):
//
//	PurposeKeyAttestation     = array(2) [ data: bytes, signature ]
//	PurposeKeyAttestationData = array(5) [ subject: bytes(32),
//	    subject_latest_change_hash: bytes(32), public_key: PurposePublicKey,
//	    created_at: uint, expires_at: uint ]
type attestation struct {
	digest           [HashSize]byte
	sig              signature
	subject          Identifier
	change           ChangeHash
	purpose          purpose
	channelKey       [KeySize]byte // for purposeChannel
	signingKey       PublicKey     // for purposeCredentials
	created, expires uint64        // Unix seconds
}

// readSigned reads the outer array of an attestation or credential.
func readSigned(r *cbor.Reader) (data []byte, sig signature, err error) {
	f, err := readFields(r)
	if err != nil {
		return nil, signature{}, err
	}
	if data, err = f.bytes(); err != nil {
		return nil, signature{}, err
	}
	if err := f.need(); err != nil {
		return nil, signature{}, err
	}
	if sig, err = readSignature(r); err != nil {
		return nil, signature{}, err
	}
	return data, sig, f.end()
}

// parseAttestation decodes an attestation whole, its envelope included.
func parseAttestation(b []byte) (attestation, error) {
	r := cbor.NewReader(b)
	signed, sig, err := readSigned(r)
	if err != nil {
		return attestation{}, malformed(err)
	}
	if err := atEnd(r); err != nil {
		return attestation{}, err
	}
	return openAttestation(signed, sig)
}

// openAttestation decodes the signed part (rule 1 of spec identity 10.3).
func openAttestation(signed []byte, sig signature) (attestation, error) {
	if len(signed) > MaxAttestation {
		return attestation{}, fmt.Errorf("%w: %d bytes at most", ErrTooLarge, MaxAttestation)
	}
	a := attestation{digest: sha256.Sum256(signed), sig: sig}
	data, err := readEnvelope(signed, typeAttestation)
	if err != nil {
		return attestation{}, err
	}
	if err := a.readData(cbor.NewReader(data)); err != nil {
		return attestation{}, malformed(err)
	}
	return a, nil
}

func (a *attestation) readData(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return err
	}
	if a.subject, err = f.hash(); err != nil {
		return err
	}
	if a.change, err = f.hash(); err != nil {
		return err
	}
	if err := f.need(); err != nil {
		return err
	}
	if err := a.readKey(r); err != nil {
		return err
	}
	if a.created, err = f.uint(); err != nil {
		return err
	}
	if a.expires, err = f.uint(); err != nil {
		return err
	}
	return f.end()
}

// readKey reads PurposePublicKey.
func (a *attestation) readKey(r *cbor.Reader) error {
	idx, f, err := readVariant(r)
	if err != nil {
		return err
	}
	a.purpose = purpose(idx)
	if a.purpose == purposeChannel {
		b, err := f.bytes()
		if err != nil {
			return err
		}
		if len(b) != KeySize {
			return errLength
		}
		a.channelKey = [KeySize]byte(b)
		return f.end()
	}
	if err := f.need(); err != nil {
		return err
	}
	if a.signingKey, err = readKey(r); err != nil {
		return err
	}
	return f.end()
}

// instant is the time that objects are checked against, in wire seconds.
type instant struct {
	now  uint64
	past uint64 // how long after its end an object still counts, seconds
	skew uint64 // how far in the future it may have been made, seconds
}

func at(now time.Time) instant {
	return instant{now: wireTime(now), skew: uint64(ClockTolerance / time.Second)}
}

// check applies the last two rules on times of spec identity 10.3 and 11.3.
func (t instant) check(created, expires uint64) error {
	if created > addSeconds(t.now, t.skew) {
		return fmt.Errorf("%w: made %v, here it is %v", ErrFromFuture, rfc3339(created), rfc3339(t.now))
	}
	if addSeconds(expires, t.past) < t.now {
		return fmt.Errorf("%w at %v, here it is %v", ErrExpired, rfc3339(expires), rfc3339(t.now))
	}
	return nil
}

func rfc3339(s uint64) string { return unixTime(s).Format(time.RFC3339) }

// verify applies rules 2 to 9 of spec identity 10.3 in their order. The history
// of subject has been verified when it was imported.
func (a *attestation) verify(subject *Identity, t instant) error {
	if a.subject != subject.Identifier() {
		return fmt.Errorf("%w: about %v, not %v", ErrWrongSubject, a.subject, subject.Identifier())
	}
	latest := subject.latest()
	if a.change != latest.hash {
		return ErrNotLatestKey
	}
	if a.expires > latest.until {
		return fmt.Errorf("%w: expires %v, the key at %v", ErrOutlivesKey, rfc3339(a.expires), rfc3339(latest.until))
	}
	if a.created < latest.from {
		return fmt.Errorf("%w: made %v, the key at %v", ErrPredatesKey, rfc3339(a.created), rfc3339(latest.from))
	}
	if err := t.check(a.created, a.expires); err != nil {
		return err
	}
	return latest.key.verify(&a.digest, &a.sig)
}

// VerifyChannelAttestation verifies that subject attests an X25519 key for
// secure channels, by the nine rules of spec identity 10.3 in their order, and
// returns that key. The caller still compares it with the key that the peer
// holds (spec secure-channel 4). Bytes after the attestation are refused, as by
// Import. Errors are *VerifyError.
func VerifyChannelAttestation(att []byte, subject *Identity, now time.Time) ([KeySize]byte, error) {
	a, err := parseAttestation(att)
	if err != nil {
		return [KeySize]byte{}, refuse(objAttestation, err)
	}
	if err := a.verify(subject, at(now)); err != nil {
		return [KeySize]byte{}, refuse(objAttestation, err)
	}
	if a.purpose != purposeChannel {
		return [KeySize]byte{}, refuse(objAttestation, ErrWrongPurpose)
	}
	return a.channelKey, nil
}

// Attestation describes a purpose key attestation, verified or not.
type Attestation struct {
	Subject    Identifier // whose key it is, and who attests it
	Change     ChangeHash // the change whose key signed
	ForChannel bool       // an X25519 key for secure channels; else a key that signs credentials
	ChannelKey [KeySize]byte
	SigningKey PublicKey // zero when ForChannel
	CreatedAt  time.Time
	ExpiresAt  time.Time
}

func (a *attestation) public() Attestation {
	return Attestation{
		Subject: a.subject, Change: a.change, ForChannel: a.purpose == purposeChannel,
		ChannelKey: a.channelKey, SigningKey: a.signingKey,
		CreatedAt: unixTime(a.created), ExpiresAt: unixTime(a.expires),
	}
}

// InspectAttestation decodes an attestation without trusting it: nothing is
// verified.
func InspectAttestation(att []byte) (Attestation, error) {
	a, err := parseAttestation(att)
	if err != nil {
		return Attestation{}, refuse(objAttestation, err)
	}
	return a.public(), nil
}

// appendPurposeKey encodes PurposePublicKey.
func (a *attestation) appendPurposeKey(dst []byte) []byte {
	dst = appendVariant(dst, uint64(a.purpose))
	if a.purpose == purposeChannel {
		return cbor.AppendBytes(dst, a.channelKey[:])
	}
	return appendKey(dst, a.signingKey)
}

// make signs the attestation with the key of the identity's latest change and
// returns its encoding.
func (a *attestation) make(id *Identity, signer Signer) ([]byte, error) {
	a.subject, a.change = id.Identifier(), id.LatestChange()
	data := cbor.AppendArray(nil, 5)
	data = cbor.AppendBytes(data, a.subject[:])
	data = cbor.AppendBytes(data, a.change[:])
	data = a.appendPurposeKey(data)
	data = cbor.AppendUint(data, a.created)
	data = cbor.AppendUint(data, a.expires)
	signed := appendEnvelope(nil, typeAttestation, data)
	a.digest = sha256.Sum256(signed)
	sig, err := sign(signer, a.digest)
	if err != nil {
		return nil, err
	}
	a.sig = sig
	return appendSigned(nil, signed, sig), nil
}

func appendSigned(dst, signed []byte, sig signature) []byte {
	dst = cbor.AppendArray(dst, 2)
	dst = cbor.AppendBytes(dst, signed)
	return appendSignature(dst, sig)
}

// ChannelKey is an identity's X25519 purpose key with its attestation: the
// static key of its secure channels. It is immutable and safe for concurrent
// use; the secret never prints.
type ChannelKey struct{ k *channelKey }

type channelKey struct {
	redacted
	owner        *Identity // whose latest change attests the key
	exchanger    Exchanger
	att          attestation
	encoded      []byte
	presentation []byte // without credentials
}

func newChannelKey(owner *Identity, x Exchanger, att attestation, encoded []byte) *channelKey {
	k := &channelKey{owner: owner, exchanger: x, att: att, encoded: encoded}
	k.presentation = Presentation{History: owner.history, Attestation: encoded}.Append(nil)
	return k
}

// Identity returns the owner as it was when the key was attested. In a handshake
// show this history beside the attestation, not a newer one.
func (c *ChannelKey) Identity() *Identity { return c.k.owner }

// PublicKey returns the public X25519 key.
func (c *ChannelKey) PublicKey() [KeySize]byte { return c.k.att.channelKey }

// Public is PublicKey.
func (c *ChannelKey) Public() [KeySize]byte { return c.k.att.channelKey }

// Attestation returns a copy of the encoded attestation.
func (c *ChannelKey) Attestation() []byte { return bytes.Clone(c.k.encoded) }

// ExpiresAt returns the time at which peers begin to refuse the key.
func (c *ChannelKey) ExpiresAt() time.Time { return unixTime(c.k.att.expires) }

// DH returns the shared secret with a peer's public key, 32 bytes that belong
// to the caller.
func (c *ChannelKey) DH(peer []byte) ([]byte, error) { return c.k.exchanger.DH(peer) }

// AppendPresentation appends what the owner shows in a handshake: history,
// attestation and the given credentials, each encoded as IssueCredential
// returns it (spec secure-channel 4). Without credentials it only copies.
func (c *ChannelKey) AppendPresentation(dst []byte, credentials ...[]byte) []byte {
	if len(credentials) == 0 {
		return append(dst, c.k.presentation...)
	}
	return Presentation{c.k.owner.history, c.k.encoded, credentials}.Append(dst)
}
