package channel

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// TestCredentialIsRenewed: both ends show a newer credential on the open channel
// before the one that the peer has seen ends, and go on asking for one.
func TestCredentialIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const ttl = 20 * time.Minute
		authority := newIdentity(t)
		n := newTestNet()
		var supply atomic.Bool
		var asked [2]atomic.Int64
		parties := make(map[int]*party)
		var issued [2]atomic.Pointer[[]byte]
		issue := func(i int) {
			c, err := authority.IssueCredential(parties[i].id.Identity(), nil, 1, ttl)
			if err != nil {
				t.Error(err)
			}
			issued[i].Store(&c)
		}
		for i, name := range []string{"alice", "bob"} {
			parties[i] = n.party(t, name, func(c *Config) {
				c.Authorities = []*identity.Identity{authority.Identity()}
				c.Limits.Idle = -1
				c.Credential = func() ([]byte, error) {
					switch asked[i].Add(1); {
					case supply.Load():
						issue(i)
					case asked[i].Load() == 3:
						return nil, errors.New("the file is away")
					}
					return *issued[i].Load(), nil
				}
			})
			issue(i)
		}
		a, b := parties[0], parties[1]
		if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		ab := dial(t, a, "bob", DialOptions{})
		ba := only(t, b)
		ends := func(c *Channel) time.Time {
			creds := c.Peer().Credentials
			if len(creds) != 1 {
				t.Fatalf("%d credentials", len(creds))
			}
			return creds[0].ExpiresAt
		}
		frames := func() int { return len(n.seen("alice")) + len(n.seen("bob")) }
		first := [2]time.Time{ends(ab), ends(ba)}
		synctest.Wait()
		sent := frames()

		time.Sleep(ttl*3/4 - time.Minute)
		synctest.Wait()
		if asked[0].Load() != 1 || asked[1].Load() != 1 {
			t.Fatalf("asked %d and %d times before anything is due", asked[0].Load(), asked[1].Load())
		}
		time.Sleep(3 * time.Minute) // due, and there is none yet
		synctest.Wait()
		if asked[0].Load() < 5 || asked[1].Load() < 5 || frames() != sent {
			t.Fatalf("asked %d and %d times, %d frames sent", asked[0].Load(), asked[1].Load(), frames()-sent)
		}
		supply.Store(true)
		time.Sleep(time.Minute)
		synctest.Wait()
		for i, c := range []*Channel{ab, ba} {
			if at := ends(c); !at.After(first[i]) {
				t.Errorf("end %d sees a credential until %v, at first until %v", i, at, first[i])
			}
		}
		for range 100 { // and so on; never one that has ended
			time.Sleep(7 * time.Minute)
			synctest.Wait()
			for i, c := range []*Channel{ab, ba} {
				if at := ends(c); !at.After(time.Now()) {
					t.Fatalf("end %d sees a credential until %v, now is %v", i, at, time.Now())
				}
			}
		}
		if sent = frames() - sent; sent > 2*100 {
			t.Errorf("%d frames", sent)
		}

		hidden := dial(t, a, "bob", DialOptions{HideCredential: true})
		was := asked[0].Load()
		_ = ab.Close()
		time.Sleep(10 * ttl)
		synctest.Wait()
		if asked[0].Load() != was || hidden.Peer().Identifier != b.id.Identifier() {
			t.Error("a credential is asked for where none was shown, or after the end")
		}
	})
}
