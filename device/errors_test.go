package device

import (
	"errors"
	"fmt"
	"testing"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// TestWrongIdentityError: whatever policy has refused the peer, it is said once that one
// has, and who was there.
func TestWrongIdentityError(t *testing.T) {
	peer := channel.Peer{Identifier: testIdentity().Identifier()}
	no := channel.TrustIdentifiers(identity.Identifier{1})
	known, err := OpenKnownPeers("")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		policy channel.Policy
		why    string
	}{
		{no, "none of the identifiers that are trusted (1)"},
		{channel.Or(no, channel.TrustIdentifiers()), "none of the identifiers that are trusted (1), and none of the identifiers that are trusted (0)"},
		{known.Policy("FWD_1", false), "nobody is remembered at this address: FWD_1"},
	} {
		err := &wrongIdentityError{
			to:  route.To("FWD_1"),
			err: fmt.Errorf("%w: %v: %w", channel.ErrWrongIdentity, peer.Identifier, c.policy.Check(peer)),
		}
		if !errors.Is(err, ErrWrongIdentity) || !errors.Is(err, channel.ErrWrongIdentity) {
			t.Errorf("%v: not the errors it is", err)
		}
		want := fmt.Sprintf("device: the peer is not an identity that the trust policy accepts: dialling 0#FWD_1: %v: %s", peer.Identifier, c.why)
		if err.Error() != want {
			t.Errorf("%q\nwant %q", err, want)
		}
	}
}
