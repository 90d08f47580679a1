package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
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

// TestFileThatCannotBeWritten: where a peer or hub cannot be remembered, that is said of the
// file, and nothing of who it was.
func TestFileThatCannotBeWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known")
	if err := os.Mkdir(file+".lock", 0o700); err != nil { // where the lock of the file is to be
		t.Fatal(err)
	}
	known, err := OpenKnownPeers(file)
	if err != nil {
		t.Fatal(err)
	}
	peer := channel.Peer{Identifier: testIdentity().Identifier()}
	cfg := Config{KnownHubs: file}
	for what, err := range map[string]error{
		"known peers": known.Policy("FWD_1", true).Check(peer),
		"known hubs":  cfg.hubMemory(hubURL{address: "hub.example:1883"}).proved(&hubproto.HelloAnswer{Hub: peer.Identifier}),
	} {
		var e *KnownFileError
		if !errors.As(err, &e) || e.What != what || e.Op != "write" || e.File != file || !errors.Is(err, syscall.EISDIR) {
			t.Errorf("%s: %v", what, err)
		}
		if !errors.Is(err, channel.ErrUndecided) || errors.Is(err, ErrWrongIdentity) || errors.Is(err, ErrWrongHub) {
			t.Errorf("%s: not the errors it is: %v", what, err)
		}
	}
	if err := known.Policy("FWD_1", false).Check(peer); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("nobody is remembered: %v", err)
	}
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	var e *KnownFileError
	if err := known.Policy("FWD_1", false).Check(peer); !errors.As(err, &e) || e.Op != "read" {
		t.Errorf("a folder in its place: %v", err)
	}
}

// TestToldOfAllThatIsUndelivered: the counts that Flush tells are those of all frames, also
// where the hub says so in more than one notice, and of more addresses than are kept apart.
func TestToldOfAllThatIsUndelivered(t *testing.T) {
	n := &Node{out: newOutbox(1, 1)}
	c := &Channel{n: n}
	first := &UndeliveredError{To: route.Local("a"), Count: 84, Reason: "expired", Err: ErrExpired}
	for _, ls := range []*losses{&n.lost, &c.lost} {
		ls.add(first)
		ls.add(&UndeliveredError{To: route.Local("a"), Count: 216, Reason: "expired", Err: ErrExpired})
	}
	for name, flush := range map[string]func(context.Context) error{"node": n.Flush, "channel": c.Flush} {
		var u *UndeliveredError
		if err := flush(t.Context()); !errors.As(err, &u) || u.Count != 300 || !errors.Is(err, ErrExpired) {
			t.Errorf("%s: told %v", name, err)
		}
		if err := flush(t.Context()); err != nil {
			t.Errorf("%s: told again: %v", name, err)
		}
	}
	if first.Count != 84 { // an event has it
		t.Errorf("the first error has become one of %d frames", first.Count)
	}

	const addresses = 2 * maxLosses
	for i := range addresses {
		n.lost.add(&UndeliveredError{To: route.Local(fmt.Sprint(i)), Count: 3, Reason: "unknown", Err: ErrUnknownAddress})
	}
	joined, ok := n.Flush(t.Context()).(interface{ Unwrap() []error })
	if !ok {
		t.Fatal("not more than one error")
	}
	told := uint64(0)
	for _, err := range joined.Unwrap() {
		var u *UndeliveredError
		if !errors.As(err, &u) || !errors.Is(err, ErrUnknownAddress) {
			t.Fatalf("told %v", err)
		}
		told += u.Count
	}
	if told != 3*addresses || len(joined.Unwrap()) != maxLosses {
		t.Errorf("told of %d of %d frames, in %d errors", told, 3*addresses, len(joined.Unwrap()))
	}
}
