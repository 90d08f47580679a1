package channel

import (
	"slices"
	"testing"

	"github.com/sealmq/sealmq/identity"
)

func TestExpected(t *testing.T) {
	a, b := identity.Identifier{1}, identity.Identifier{2}
	for name, tt := range map[string]struct {
		policy Policy
		want   []identity.Identifier
		ok     bool
	}{
		"everyone":            {TrustEveryone, nil, false},
		"identifiers":         {TrustIdentifiers(b, a), []identity.Identifier{a, b}, true},
		"nobody":              {TrustIdentifiers(), []identity.Identifier{}, true},
		"credential":          {TrustCredential(nil, nil), nil, false},
		"and":                 {And(TrustEveryone, TrustIdentifiers(a)), []identity.Identifier{a}, true},
		"and of the unlisted": {And(TrustEveryone), nil, false},
		"or":                  {Or(TrustIdentifiers(b), TrustIdentifiers(a, b)), []identity.Identifier{a, b}, true},
		"or with everyone":    {Or(TrustIdentifiers(b), TrustEveryone), nil, false},
		"none":                {nil, nil, false},
	} {
		if got, ok := Expected(tt.policy); ok != tt.ok || !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, %v", name, got, ok)
		}
	}
}
