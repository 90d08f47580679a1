package channel

import (
	"slices"

	"github.com/sealmq/sealmq/identity"
)

// ExpectingPolicy is a Policy that knows beforehand whom it may accept.
type ExpectingPolicy interface {
	Policy
	// Expected returns the identifiers that Check may accept, and false when they
	// cannot be listed. The slice is the caller's to keep.
	Expected() ([]identity.Identifier, bool)
}

// Expected returns the identifiers that a policy may accept, as far as they can
// be listed: those of TrustIdentifiers, of an Or whose parts all can be, and of
// an And of which one part can be. It says nothing about whether the policy will.
func Expected(p Policy) ([]identity.Identifier, bool) {
	e, ok := p.(ExpectingPolicy)
	if !ok {
		return nil, false
	}
	return e.Expected()
}

// Expected implements ExpectingPolicy.
func (s identifiers) Expected() ([]identity.Identifier, bool) {
	ids := make([]identity.Identifier, 0, len(s))
	for id := range s {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, identity.Identifier.Compare)
	return ids, true
}

// Expected implements ExpectingPolicy.
func (a and) Expected() ([]identity.Identifier, bool) {
	for _, p := range a {
		if ids, ok := Expected(p); ok {
			return ids, true
		}
	}
	return nil, false
}

// Expected implements ExpectingPolicy.
func (o or) Expected() ([]identity.Identifier, bool) {
	var all []identity.Identifier
	for _, p := range o {
		ids, ok := Expected(p)
		if !ok {
			return nil, false
		}
		all = append(all, ids...)
	}
	slices.SortFunc(all, identity.Identifier.Compare)
	return slices.Compact(all), true
}
