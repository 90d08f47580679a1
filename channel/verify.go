package channel

import (
	"errors"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// maxVerifiedCredentials bounds how many credentials of one message cost
// signature checks. A stock peer shows one at most.
const maxVerifiedCredentials = 4

var (
	errStaticKey     = errors.New("the attested key is not the key of the handshake")
	errManyCreds     = errors.New("too many credentials")
	errOtherIdentity = errors.New("a history of another identity")
)

// refusedError marks a policy's refusal: final, unlike a message that may be
// forged.
type refusedError struct{ err error }

func (e *refusedError) Error() string { return e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }

// verifier judges what a peer shows.
type verifier struct {
	registry    identity.Registry
	policy      Policy
	authorities []*identity.Identity
	now         func() time.Time
}

// check processes a handshake payload in the order of spec secure-channel 4:
// decode, history against what is known, attestation, attested key against the
// Noise static key, trust. Two things differ from a stock peer, neither visible
// outside: the registry is written last, so that nobody who fails a later step
// leaves a trace in it, and credentials are looked at before the policy, which
// may want to see them. A bad credential never fails the handshake; one that
// does not even decode does.
func (v *verifier) check(payload []byte, static [keyLen]byte) (Peer, error) {
	p, err := identity.ParsePresentation(payload)
	if err != nil {
		return Peer{}, err
	}
	if len(p.Credentials) > maxCredentials {
		return Peer{}, errManyCreds
	}
	id, err := v.history(p.History)
	if err != nil {
		return Peer{}, err
	}
	attested, err := identity.VerifyChannelAttestation(p.Attestation, id, v.now())
	if err != nil {
		return Peer{}, err
	}
	if attested != static {
		return Peer{}, errStaticKey
	}
	peer := Peer{Identifier: id.Identifier(), Credentials: v.credentials(p.Credentials, id)}
	if err := checkPolicy(v.policy, peer.clone()); err != nil {
		return peer, &refusedError{err}
	}
	if err := v.registry.Update(id); err != nil {
		return Peer{}, err
	}
	if err := v.keep(peer.Identifier); err != nil {
		return Peer{}, err
	}
	return peer, nil
}

// keep tells the registry whom it must not forget: who was chosen by a policy, in
// contrast to whoever came.
func (v *verifier) keep(id identity.Identifier) error {
	k, ok := v.registry.(identity.Keeper)
	if _, anybody := v.policy.(everyone); !ok || anybody {
		return nil
	}
	return k.Keep(id)
}

// history verifies a change history, and that it does not contradict the one
// known for the identity.
func (v *verifier) history(b []byte) (*identity.Identity, error) {
	importing := identity.Import
	if r, ok := v.registry.(identity.Importer); ok {
		importing = r.Import // verifies nothing twice
	}
	id, err := importing(b)
	if err != nil {
		return nil, err
	}
	known, ok := v.registry.Get(id.Identifier())
	if !ok {
		return id, nil
	}
	switch id.Compare(known) {
	case identity.Older:
		return nil, identity.ErrOlder
	case identity.Conflict:
		return nil, identity.ErrConflict
	}
	return id, nil
}

// credentials returns the good ones among those shown.
func (v *verifier) credentials(shown [][]byte, subject *identity.Identity) []identity.Credential {
	if len(v.authorities) == 0 {
		return nil
	}
	var good []identity.Credential
	for _, b := range shown[:min(len(shown), maxVerifiedCredentials)] {
		c, err := identity.VerifyCredential(b, subject.Identifier(), v.authorities, v.now())
		if err == nil {
			good = append(good, *c)
		}
	}
	return good
}

// refresh processes a RefreshCredentials of the channel's peer (spec
// secure-channel 13). It returns no credentials when none is good: then the ones
// known stay.
func (v *verifier) refresh(m *message, peer identity.Identifier) ([]identity.Credential, error) {
	if len(m.credentials) > maxCredentials {
		return nil, errManyCreds
	}
	// First, as it costs next to nothing: a long history takes tens of milliseconds.
	switch whose, err := identity.IdentifierOf(m.history); {
	case err != nil:
		return nil, err
	case whose != peer:
		return nil, errOtherIdentity
	}
	id, err := v.history(m.history)
	if err != nil {
		return nil, err
	}
	if err := v.registry.Update(id); err != nil {
		return nil, err
	}
	return v.credentials(m.credentials, id), nil
}
