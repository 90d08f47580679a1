package mochibridge

import (
	"sync"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// Two accounts that say the same client id: the one that has it keeps it, also
// when both log in for the first time at the same moment.
func TestOneAccountForEachClientID(t *testing.T) {
	var both sync.WaitGroup
	h := newHub(t, func(s *setup) {
		s.hook.OneAccount = true
		s.hook.Authenticate = func(c ConnectInfo) (bridge.Principal, error) {
			if c.ClientID == "raced" {
				both.Done()
				both.Wait() // neither is known to mochi yet
			}
			return bridge.Principal{ClientID: c.ClientID, Role: bridge.RoleUser}, nil
		}
	})
	login := func(id, user string, keep bool) (*rawmqtt.Client, byte) {
		t.Helper()
		c, err := rawmqtt.Dial(h.addr, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		ack, err := c.Login(rawmqtt.Options{ID: id, User: user, Keep: keep})
		if err != nil {
			t.Fatal(err)
		}
		return c, ack.Code()
	}

	for range 20 {
		both.Add(2)
		codes := make(chan byte, 2)
		clients := make(chan *rawmqtt.Client, 2)
		for _, user := range []string{"ann", "ben"} {
			go func() {
				c, err := rawmqtt.Dial(h.addr, false)
				if err != nil {
					t.Error(err)
					both.Done()
					codes <- 0xff
					return
				}
				clients <- c
				ack, err := c.Login(rawmqtt.Options{ID: "raced", User: user})
				if err != nil {
					t.Error(err)
				}
				codes <- ack.Code()
			}()
		}
		if a, b := <-codes, <-codes; min(a, b) != 0 || max(a, b) != 5 {
			t.Fatalf("two accounts with one client id at the same moment: CONNACK %d and %d", a, b)
		}
		_ = (<-clients).Close()
		_ = (<-clients).Close()
		eventually(t, "both to be gone", func() bool {
			h.hook.users.mu.Lock()
			defer h.hook.users.mu.Unlock()
			_, known := h.Clients.Get("raced")
			return len(h.hook.users.claims) == 0 && !known
		})
	}

	// A kept session is its account's, with and without a connection.
	c, code := login("kept", "ann", true)
	if code != 0 {
		t.Fatalf("first login: CONNACK %d", code)
	}
	if _, code := login("kept", "ben", true); code != 5 {
		t.Errorf("while it is connected: CONNACK %d", code)
	}
	_ = c.Close()
	eventually(t, "the connection to be gone", func() bool {
		h.hook.users.mu.Lock()
		defer h.hook.users.mu.Unlock()
		return len(h.hook.users.claims) == 0
	})
	if _, code := login("kept", "ben", false); code != 5 {
		t.Errorf("of a session without a connection: CONNACK %d", code)
	}
	if _, code := login("kept", "ann", false); code != 0 {
		t.Errorf("the owner comes back: CONNACK %d", code)
	}
}
