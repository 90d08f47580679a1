package identity

import (
	"errors"
	"fmt"
)

// Errors about received bytes. They come wrapped in a *VerifyError that names
// the object; test for them with errors.Is. Each names one rule of spec
// identity 7, 10.3 or 11.3.
var (
	// ErrMalformed means that the bytes are not the CBOR of the object.
	ErrMalformed = errors.New("not well-formed")
	// ErrTooLarge means that the object is beyond the limits of this package.
	ErrTooLarge = errors.New("larger than any honest one")
	// ErrVersion means that a signed envelope has another version than 1.
	ErrVersion = errors.New("unknown version of the signed envelope")
	// ErrDataType means that a signed envelope holds another kind of data.
	ErrDataType = errors.New("signed envelope holds another kind of data")
	// ErrSignature means that a signature does not verify.
	ErrSignature = errors.New("signature does not verify")
	// ErrKeyKind means that key and signature are of different kinds.
	ErrKeyKind = errors.New("key and signature are of different kinds")

	// ErrEmptyHistory means that a change history has no change.
	ErrEmptyHistory = errors.New("holds no change")
	// ErrNotFirst means that the first change names a previous one.
	ErrNotFirst = errors.New("first change names a previous change")
	// ErrBrokenChain means that a change does not name the one before it.
	ErrBrokenChain = errors.New("change does not follow the one before it")
	// ErrBackdated means that a change is valid from an earlier time than the
	// change before it.
	ErrBackdated = errors.New("change is valid earlier than the one before it")
	// ErrNoPreviousSignature means that a later change is not signed with the
	// key of the change before it.
	ErrNoPreviousSignature = errors.New("change is not signed with the key before it")
	// ErrWrongIdentifier means that a history is another identity's than
	// the one expected.
	ErrWrongIdentifier = errors.New("belongs to another identifier than expected")

	// ErrWrongSubject means that an attestation or credential is about
	// another identity than the one expected.
	ErrWrongSubject = errors.New("is about another identity than expected")
	// ErrNotLatestKey means that an attestation was made under a change that is
	// not the latest known one of its subject.
	ErrNotLatestKey = errors.New("made under a key that is not the latest known one")
	// ErrOutlivesKey means that an attestation expires after the key that
	// made it.
	ErrOutlivesKey = errors.New("expires later than the identity key that made it")
	// ErrPredatesKey means that an attestation is older than the key that
	// made it.
	ErrPredatesKey = errors.New("older than the identity key that made it")
	// ErrFromFuture means that an object was made more than a minute from now:
	// one of the two clocks is wrong.
	ErrFromFuture = errors.New("made in the future: check the clocks of both sides")
	// ErrExpired means that an object is no longer valid.
	ErrExpired = errors.New("expired")
	// ErrWrongPurpose means that an attested key is for another purpose.
	ErrWrongPurpose = errors.New("attested key is for another purpose")

	// ErrUnknownAuthority means that a credential was issued by nobody in the
	// list of authorities.
	ErrUnknownAuthority = errors.New("issued by an unknown authority")
	// ErrNoSubject means that a credential names no subject.
	ErrNoSubject = errors.New("names no subject")
	// ErrOutsideAttestation means that a credential's validity is not inside
	// that of the key that signed it.
	ErrOutsideAttestation = errors.New("validity is not inside that of the issuer's key")
	// ErrReservedSchema means that a credential has a schema number with a
	// meaning of its own, such as SchemaConnectProof, and so is none.
	ErrReservedSchema = errors.New("schema is reserved, this is no credential")
)

// Errors of a Registry.
var (
	// ErrOlder means that a history is shorter than the one already known: the
	// peer shows a key that it has rotated away, or somebody replays it.
	ErrOlder = errors.New("identity: change history is older than the one already known")
	// ErrConflict means that a history forks from the one already known.
	ErrConflict = errors.New("identity: change history contradicts the one already known")
	// ErrRegistryFull means that a registry holds as many identities as it may
	// and none of them can be forgotten.
	ErrRegistryFull = errors.New("identity: registry is full of identities that must be kept; raise its limit or remove some")
)

// Errors about the caller's own keys.
var (
	// ErrWrongKey means that a secret key is not that of the identity's latest
	// change.
	ErrWrongKey = errors.New("identity: secret key is not the one of the identity's latest change")
	// ErrKeyExpired means that the identity's key may sign nothing any more, or
	// not for as long as asked for. Rotate it.
	ErrKeyExpired = errors.New("identity: identity key is expired or expires too soon; rotate the identity")
	// ErrNotExportable means that a secret key lives outside this process and
	// cannot be written down.
	ErrNotExportable = errors.New("identity: secret key cannot leave its device")
	// ErrLowOrder means that a peer's X25519 key has no security.
	ErrLowOrder = errors.New("identity: peer's X25519 key is of low order")
)

// VerifyError says which object was refused and why. Err is, or wraps, one of
// the sentinels of this package.
type VerifyError struct {
	Object string // "change history", "attestation", "credential" or "record"
	Change int    // for a change history: index of the offending change, else -1
	Err    error  // the reason
}

func (e *VerifyError) Error() string {
	if e.Change >= 0 {
		return fmt.Sprintf("identity: %s: change %d: %v", e.Object, e.Change, e.Err)
	}
	return fmt.Sprintf("identity: %s: %v", e.Object, e.Err)
}

func (e *VerifyError) Unwrap() error { return e.Err }

const (
	objHistory      = "change history"
	objAttestation  = "attestation"
	objCredential   = "credential"
	objPresentation = "presentation"
	objRecord       = "record"
)

func refuse(object string, err error) error { return &VerifyError{object, -1, err} }

func refuseChange(i int, err error) error { return &VerifyError{objHistory, i, err} }

// malformed joins ErrMalformed with what the parser found.
func malformed(err error) error { return fmt.Errorf("%w: %w", ErrMalformed, err) }
