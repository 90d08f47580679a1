package identity

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// recordDomain begins what a signed record signs. No envelope of spec identity
// 3 begins with it, so a record is never taken for a change, attestation or
// credential.
const recordDomain = "sealmq signed record/1\x00"

// recordDigest is SHA-256 of
//
//	"sealmq signed record/1" 00 ‖ identifier (32) ‖ latest change hash (32) ‖
//	length of context (2, big-endian) ‖ context ‖ message
//
// so a record is bound to who signs, with which key, and for what.
func recordDigest(id *Identity, context string, message []byte) [HashSize]byte {
	h := sha256.New()
	h.Write([]byte(recordDomain))
	self, latest := id.Identifier(), id.LatestChange()
	h.Write(self[:])
	h.Write(latest[:])
	h.Write(binary.BigEndian.AppendUint16(nil, uint16(len(context))))
	h.Write([]byte(context))
	h.Write(message)
	return [HashSize]byte(h.Sum(nil))
}

// maxContext is the longest context in bytes.
const maxContext = 255

var errContext = errors.New("identity: a record's context has 1 to 255 bytes and names what is signed")

// Sign signs a record of ours, 64 bytes, with the key of the latest change.
// context names what is signed, such as "hello/1"; a signature for one context
// never verifies in another. Identity.Verify checks it.
func (p *Private) Sign(context string, message []byte) ([]byte, error) {
	if len(context) == 0 || len(context) > maxContext {
		return nil, errContext
	}
	p.p.mu.Lock()
	_ = p.p.refresh()
	st := p.p.state
	p.p.mu.Unlock()
	s, err := sign(st.signer, recordDigest(st.identity, context, message))
	if err != nil {
		return nil, err
	}
	return s.raw[:], nil
}

// Verify checks a signature made by Private.Sign with the key of the latest
// change that id knows; one made with another key, since rotated away or newer
// than id, does not verify. Errors are *VerifyError.
func (id *Identity) Verify(context string, message, sig []byte) error {
	if len(context) == 0 || len(context) > maxContext {
		return errContext
	}
	if len(sig) != SignatureSize {
		return refuse(objRecord, fmt.Errorf("%w: a signature has %d bytes, not %d", ErrSignature, SignatureSize, len(sig)))
	}
	digest := recordDigest(id, context, message)
	s := signature{id.PublicKey().kind, [SignatureSize]byte(sig)}
	if err := id.PublicKey().verify(&digest, &s); err != nil {
		return refuse(objRecord, err)
	}
	return nil
}
