package mochibridge

import (
	"sync/atomic"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// A login that an old policy has let in does not get past a new one.
func TestRecheckDuringLogin(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	var revoked atomic.Bool
	h := newHub(t, func(s *setup) {
		s.hook.Authenticate = func(c ConnectInfo) (bridge.Principal, error) {
			asked <- struct{}{}
			<-answer
			return byUserName(c)
		}
		s.hook.Allowed = func(p bridge.Principal) bool { return !revoked.Load() }
	})
	login := func(id string) <-chan byte {
		code := make(chan byte, 1)
		c, err := rawmqtt.Dial(h.addr, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		go func() {
			ack, err := c.Login(rawmqtt.Options{ID: id, User: "user"})
			if err != nil {
				t.Error(err)
				code <- 0xff
				return
			}
			code <- ack.Code()
		}()
		<-asked
		return code
	}
	for _, c := range []struct {
		id       string
		revoke   bool
		want     byte
		sessions int
	}{{"first", false, 0, 1}, {"second", true, 5, 0}} {
		code := login(c.id)
		revoked.Store(c.revoke)
		h.hook.Recheck()
		answer <- struct{}{}
		if got := <-code; got != c.want {
			t.Errorf("%s: CONNACK %d, want %d", c.id, got, c.want)
		}
		eventually(t, "the ended connections to be forgotten", func() bool {
			h.hook.mu.Lock()
			defer h.hook.mu.Unlock()
			return len(h.hook.sessions) == c.sessions
		})
	}
	if n := h.hook.o.Counters.Count(Revoked); n != 2 {
		t.Errorf("%d connections counted as revoked, want the first and the second", n)
	}
}
