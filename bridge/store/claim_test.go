package store

import (
	"errors"
	"testing"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// A store is the hub's that claimed it first; its address key may change while nothing is in
// the store that names an address.
func TestClaim(t *testing.T) {
	mine, other := identity.Identifier{1}, identity.Identifier{2}
	key, newKey := [32]byte{3}, [32]byte{4}
	dir := t.TempDir()
	claim := func(id identity.Identifier, key [32]byte, fill bool) error {
		t.Helper()
		s, _ := openStore(t, dir, Options{})
		defer s.Close()
		if fill {
			add(t, box(t, s, "bob"), route.Stored, "one for bob")
		}
		return s.Claim(id, key)
	}
	for i, c := range []struct {
		id   identity.Identifier
		key  [32]byte
		fill bool
		want error
	}{
		{mine, key, false, nil},
		{other, key, false, ErrIdentity},
		{mine, newKey, false, nil},
		{mine, newKey, true, nil},
		{mine, key, false, ErrKey},
		{other, newKey, false, ErrIdentity},
		{mine, newKey, false, nil},
	} {
		if err := claim(c.id, c.key, c.fill); !errors.Is(err, c.want) {
			t.Errorf("%d: %v", i, err)
		}
	}
}
