package crate

import (
	"errors"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

func TestHistoriesOfTheCrate(t *testing.T) {
	rust := rustpeer.Start(t)
	for _, tc := range []struct {
		name   string
		create func(string) rustpeer.Identity
	}{{"ed25519", rust.Identity}, {"p256", rust.IdentityP256}} {
		t.Run(tc.name, func(t *testing.T) {
			first := imported(t, tc.create(tc.name))
			second := imported(t, rust.Rotate(tc.name))
			third := imported(t, rust.Rotate(tc.name))
			if first.Identifier() != third.Identifier() {
				t.Error("a rotation changed the identifier")
			}
			for _, c := range []struct {
				a, b *identity.Identity
				want identity.Comparison
			}{{third, first, identity.Newer}, {second, third, identity.Older}, {second, second, identity.Equal}} {
				if got := c.a.Compare(c.b); got != c.want {
					t.Errorf("compared as %v, want %v", got, c.want)
				}
			}
		})
	}
}

func TestOurHistoriesAtTheCrate(t *testing.T) {
	rust := rustpeer.Start(t)
	ours := newIdentity(t)
	for range 3 {
		got, err := rust.Import(ours.Identity().ChangeHistory())
		if err != nil {
			t.Fatalf("the crate refuses our history: %v", err)
		}
		if got != ours.Identifier().String() {
			t.Fatalf("the crate says %s, we say %s", got, ours.Identifier())
		}
		if err := ours.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	broken := ours.Identity().ChangeHistory()
	broken[len(broken)/2] ^= 1
	if _, err := rust.Import(broken); err == nil {
		t.Error("the crate takes a history with a flipped bit")
	}
}

func TestCredentialsBothWays(t *testing.T) {
	rust := rustpeer.Start(t)
	authority, subject := rust.Identity("authority"), rust.Identity("subject")
	ours, stranger := newIdentity(t), newIdentity(t)
	attributes := map[string]string{"ockam-relay": "*", "site": "Zürich", "empty": ""}

	t.Run("issued by us", func(t *testing.T) {
		for name, issuer := range map[string]*identity.Private{"new": ours, "rotated": rotated(t)} {
			credential, err := issuer.IssueCredential(imported(t, subject), attributes, 7, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			got, err := rust.Verify(credential, subject.Identifier, issuer.Identity().ChangeHistory())
			if err != nil {
				t.Fatalf("%s: the crate refuses our credential: %v", name, err)
			}
			if got.Schema != 7 || got.Subject != subject.Identifier || len(got.Attributes) != len(attributes) {
				t.Errorf("%s: the crate reads %+v", name, got)
			}
			for k, v := range attributes {
				if got.Attributes[k] != v {
					t.Errorf("%s: attribute %s is %q, want %q", name, k, got.Attributes[k], v)
				}
			}
			if _, err := rust.Verify(credential, authority.Identifier, issuer.Identity().ChangeHistory()); err == nil {
				t.Errorf("%s: the crate takes it for another subject", name)
			}
			if _, err := rust.Verify(credential, subject.Identifier, stranger.Identity().ChangeHistory()); err == nil {
				t.Errorf("%s: the crate takes it from another authority", name)
			}
		}
	})
	t.Run("issued by the crate", func(t *testing.T) {
		credential := rust.Issue("authority", ours.Identity().ChangeHistory(), attributes, time.Hour)
		authorities := []*identity.Identity{imported(t, authority)}
		now := time.Now()
		got, err := identity.VerifyCredential(credential, ours.Identifier(), authorities, now)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Has(attributes) || got.Issuer.String() != authority.Identifier || got.Schema != 1 {
			t.Errorf("we read %+v", got)
		}
		for name, tc := range map[string]struct {
			subject     identity.Identifier
			authorities []*identity.Identity
			now         time.Time
			want        error
		}{
			"another subject":   {stranger.Identifier(), authorities, now, identity.ErrWrongSubject},
			"another authority": {ours.Identifier(), []*identity.Identity{stranger.Identity()}, now, identity.ErrUnknownAuthority},
			"expired":           {ours.Identifier(), authorities, now.Add(2 * time.Hour), identity.ErrExpired},
		} {
			if _, err := identity.VerifyCredential(credential, tc.subject, tc.authorities, tc.now); !errors.Is(err, tc.want) {
				t.Errorf("%s: %v, want %v", name, err, tc.want)
			}
		}
	})
}

func rotated(t *testing.T) *identity.Private {
	t.Helper()
	p := newIdentity(t)
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	return p
}
