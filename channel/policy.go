package channel

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/sealmq/sealmq/identity"
)

// Peer is the other end of a channel, as proved in the handshake.
type Peer struct {
	// Identifier is verified: the peer holds the keys of this identity.
	Identifier identity.Identifier
	// Credentials are those that the peer showed and an accepted authority
	// issued for it. Each was valid when it was shown; look at ExpiresAt before
	// relying on one later.
	Credentials []identity.Credential
}

func (p Peer) clone() Peer {
	p.Credentials = slices.Clone(p.Credentials)
	return p
}

// Policy decides whether a peer may have a channel. Check returns nil to accept;
// its error is for our own logs, which name the peer in front of it, and never shown
// to the peer. One that is ErrUndecided is the policy's fault and not the peer's.
// Check is called once for each handshake, from several goroutines, and should not
// block.
//
// There is no default: everything that makes channels takes a policy, and nil is
// an error.
type Policy interface {
	Check(Peer) error
}

// AuthorityPolicy is a Policy that looks at credentials. The handshake verifies
// what the peer shows against these authorities too, beside those of the
// endpoint's Config.
type AuthorityPolicy interface {
	Policy
	Authorities() []*identity.Identity
}

// TrustEveryone accepts any peer that proves an identity, whichever it is. Use
// it where the identity is looked at later, or does not matter.
var TrustEveryone Policy = everyone{}

type everyone struct{}

func (everyone) Check(Peer) error { return nil }

// TrustIdentifiers accepts the peers named. Without any it accepts nobody.
func TrustIdentifiers(ids ...identity.Identifier) Policy {
	set := make(identifiers, len(ids))
	for _, id := range ids {
		set[id] = struct{}{}
	}
	return set
}

type identifiers map[identity.Identifier]struct{}

func (s identifiers) Check(p Peer) error {
	if _, ok := s[p.Identifier]; !ok {
		return fmt.Errorf("none of the identifiers that are trusted (%d)", len(s))
	}
	return nil
}

// TrustCredential accepts a peer that shows a credential which authority issued
// for it and which has all of attrs, with these very values; nil asks for any
// credential of that authority.
func TrustCredential(authority *identity.Identity, attrs map[string]string) Policy {
	return credentialOf{authority, maps.Clone(attrs)}
}

type credentialOf struct {
	authority *identity.Identity
	attrs     map[string]string
}

func (c credentialOf) Check(p Peer) error {
	if c.authority == nil {
		return errors.New("the credential policy has no authority")
	}
	for _, have := range p.Credentials {
		if have.Issuer == c.authority.Identifier() && have.Subject == p.Identifier && have.Has(c.attrs) {
			return nil
		}
	}
	return fmt.Errorf("no credential of authority %v with the required attributes", c.authority.Identifier())
}

func (c credentialOf) Authorities() []*identity.Identity {
	if c.authority == nil {
		return nil
	}
	return []*identity.Identity{c.authority}
}

// And accepts a peer that all policies accept; the first refusal decides.
// Without policies it accepts nobody.
func And(policies ...Policy) Policy { return and(slices.Clone(policies)) }

type and []Policy

func (a and) Check(p Peer) error {
	if len(a) == 0 {
		return errors.New("the policy is an empty list")
	}
	for _, policy := range a {
		if err := checkPolicy(policy, p); err != nil {
			return err
		}
	}
	return nil
}

func (a and) Authorities() []*identity.Identity { return authoritiesOf(a) }

// Or accepts a peer that any of the policies accepts. Without policies it
// accepts nobody.
func Or(policies ...Policy) Policy { return or(slices.Clone(policies)) }

type or []Policy

func (o or) Check(p Peer) error {
	var all error
	for _, policy := range o {
		switch err := checkPolicy(policy, p); {
		case err == nil:
			return nil
		case all == nil:
			all = err
		default:
			all = fmt.Errorf("%w, and %w", all, err) // on one line
		}
	}
	if all == nil {
		return errors.New("the policy is an empty list")
	}
	return all
}

func (o or) Authorities() []*identity.Identity { return authoritiesOf(o) }

func checkPolicy(policy Policy, p Peer) error {
	if policy == nil {
		return errNoPolicy
	}
	return policy.Check(p)
}

func authoritiesOf(policies []Policy) (all []*identity.Identity) {
	for _, policy := range policies {
		if a, ok := policy.(AuthorityPolicy); ok {
			all = append(all, a.Authorities()...)
		}
	}
	return all
}

var errNoPolicy = errors.New("channel: no trust policy given: pass channel.TrustEveryone to accept any identity")
