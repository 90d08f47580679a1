package mochibridge

import (
	"sync"

	mqtt "github.com/mochi-mqtt/server/v2"
)

// accounts knows which user name each ordinary client id is used by while
// connections of it live: from their login on, before mochi knows the client.
// Who connects with the id of another gets that one's session and what waits in
// it, also when both log in for the first time at the same moment.
type accounts struct {
	mu     sync.Mutex
	claims map[string]*claim // by client id
}

type claim struct {
	user  string
	conns int
}

// take claims a client id for a user name, and reports false when another one
// has it: a live connection or a kept session of clients.
func (a *accounts) take(clients *mqtt.Clients, id, user string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.claims[id]
	if c != nil && c.user != user {
		return false
	}
	if old, ok := clients.Get(id); ok && string(old.Properties.Username) != user {
		return false
	}
	if c == nil {
		if a.claims == nil {
			a.claims = make(map[string]*claim)
		}
		c = &claim{user: user}
		a.claims[id] = c
	}
	c.conns++
	return true
}

// drop takes one connection's claim back, once mochi is done with it: what is
// left of it then is a kept session, or nothing.
func (a *accounts) drop(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.claims[id]
	if c.conns--; c.conns == 0 {
		delete(a.claims, id)
	}
}
