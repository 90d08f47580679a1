package channel

import (
	"errors"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// countingRegistry knows nobody and counts what is written.
type countingRegistry struct{ updates int }

func newCountingRegistry() *countingRegistry { return &countingRegistry{} }

func (r *countingRegistry) Update(*identity.Identity) error { r.updates++; return nil }

func (*countingRegistry) Get(identity.Identifier) (*identity.Identity, bool) { return nil, false }

func TestPolicies(t *testing.T) {
	a, b := identity.Identifier{1}, identity.Identifier{2}
	authority := newIdentity(t).Identity()
	member := Peer{Identifier: a, Credentials: []identity.Credential{{
		Subject: a, Issuer: authority.Identifier(), Attributes: map[string]string{"role": "x", "site": "y"},
	}}}
	stolen := member
	stolen.Identifier = b
	plain := Peer{Identifier: a}
	for name, c := range map[string]struct {
		policy Policy
		peer   Peer
		ok     bool
	}{
		"everyone":              {TrustEveryone, plain, true},
		"named":                 {TrustIdentifiers(b, a), plain, true},
		"not named":             {TrustIdentifiers(b), plain, false},
		"nobody":                {TrustIdentifiers(), plain, false},
		"credential":            {TrustCredential(authority, map[string]string{"role": "x"}), member, true},
		"any credential":        {TrustCredential(authority, nil), member, true},
		"wrong value":           {TrustCredential(authority, map[string]string{"role": "z"}), member, false},
		"missing name":          {TrustCredential(authority, map[string]string{"role": "x", "more": ""}), member, false},
		"no credential":         {TrustCredential(authority, nil), plain, false},
		"another's credential":  {TrustCredential(authority, nil), stolen, false},
		"another authority":     {TrustCredential(newIdentity(t).Identity(), nil), member, false},
		"no authority":          {TrustCredential(nil, nil), member, false},
		"and":                   {And(TrustEveryone, TrustIdentifiers(a)), plain, true},
		"and, one refuses":      {And(TrustEveryone, TrustIdentifiers(b)), plain, false},
		"and of nothing":        {And(), plain, false},
		"and with nil":          {And(TrustEveryone, nil), plain, false},
		"or":                    {Or(TrustIdentifiers(b), TrustIdentifiers(a)), plain, true},
		"or, all refuse":        {Or(TrustIdentifiers(b), TrustIdentifiers()), plain, false},
		"or of nothing":         {Or(), plain, false},
		"or with nil":           {Or(nil, TrustEveryone), plain, true},
		"credential within and": {And(TrustIdentifiers(a), Or(TrustCredential(authority, nil))), member, true},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.policy.Check(c.peer); (err == nil) != c.ok {
				t.Errorf("%v, accepted should be %v", err, c.ok)
			}
		})
	}
	nested := And(TrustEveryone, Or(TrustCredential(authority, nil), TrustIdentifiers(a)))
	if got := authoritiesOf([]Policy{nested}); len(got) != 1 || got[0] != authority {
		t.Errorf("authorities %v", got)
	}
}

func TestLimitsValidate(t *testing.T) {
	for name, l := range map[string]Limits{
		"negative": {HalfOpen: -1}, "small frame": {Frame: 100}, "huge frame": {Frame: 1 << 30},
		"dead before probe": {Probe: 30, Dead: 20}, "rate": {Rate: -1},
	} {
		if l.Validate() == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if err := (Limits{Dead: -1, Idle: -1}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	if !errors.Is(&MessageError{2, errDecrypt}, ErrHandshake) || !errors.Is(&MessageError{2, errDecrypt}, errDecrypt) {
		t.Error("MessageError hides what it is")
	}
	seen := map[string]bool{}
	Drops{}.Each(func(r DropReason, _ uint64) {
		if r.String() == "" || seen[r.String()] {
			t.Errorf("reason %d has no name of its own", r)
		}
		seen[r.String()] = true
	})
}

// keeping is a registry that notes whom it was told to keep.
type keeping struct {
	identity.Registry
	kept []identity.Identifier
}

func (k *keeping) Keep(id identity.Identifier) error {
	k.kept = append(k.kept, id)
	return nil
}

// A peer that a policy chose is never forgotten for a stranger's sake; one that
// merely came may be.
func TestChosenPeersAreKept(t *testing.T) {
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	key, err := p.ChannelKey()
	if err != nil {
		t.Fatal(err)
	}
	shown := key.AppendPresentation(nil)
	for _, c := range []struct {
		policy Policy
		kept   int
	}{{TrustEveryone, 0}, {TrustIdentifiers(p.Identifier()), 1}, {TrustIdentifiers(), 0}} {
		reg := &keeping{Registry: identity.NewMemoryRegistry(4)}
		v := &verifier{registry: reg, policy: c.policy, now: time.Now}
		_, err := v.check(shown, key.Public())
		if refused := (*refusedError)(nil); err != nil && !errors.As(err, &refused) {
			t.Fatal(err)
		}
		if len(reg.kept) != c.kept {
			t.Errorf("%v: kept %v", c.policy, reg.kept)
		}
	}
}
