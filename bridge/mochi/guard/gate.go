package guard

import (
	"sync"
	"sync/atomic"
	"time"
)

// gateTimeout bounds the wait for another connection of the same client id, which is
// looked after each gateLook: it may be gone without a word.
const (
	gateTimeout = 5 * time.Second
	gateLook    = 10 * time.Millisecond
)

// gates serialise, for each client id, the taking over of a session and the
// cleaning up behind a connection. mochi does both without a lock: an old
// connection's clean-up can remove the new client from the server, and two new
// connections can both take over the same old one. Either leaves a client that
// is connected and deaf.
type gates struct {
	mu sync.Mutex
	m  map[string]*gate
}

type gate struct {
	users int           // under gates.mu
	turn  chan struct{} // holds one token: whoever took it is inside

	inside atomic.Pointer[session] // who that is
}

// enter waits for the turn of s. It calls stuck with whom it waits for, who may have
// been left inside. leave must be called once if it reports true.
func (g *gates) enter(s *session, stuck func(*session)) bool {
	id := s.cl.ID
	g.mu.Lock()
	if g.m == nil {
		g.m = make(map[string]*gate)
	}
	e := g.m[id]
	if e == nil {
		e = &gate{turn: make(chan struct{}, 1)}
		g.m[id] = e
	}
	e.users++
	g.mu.Unlock()
	select {
	case e.turn <- struct{}{}:
		e.inside.Store(s)
		return true
	default:
	}
	t := time.NewTimer(gateTimeout)
	defer t.Stop()
	look := time.NewTicker(gateLook)
	defer look.Stop()
	for {
		if in := e.inside.Load(); in != nil {
			stuck(in)
		}
		select {
		case e.turn <- struct{}{}:
			e.inside.Store(s)
			return true
		case <-look.C:
		case <-t.C:
			g.drop(id, e)
			return false
		}
	}
}

func (g *gates) leave(id string) {
	g.mu.Lock()
	e := g.m[id]
	g.mu.Unlock()
	if e == nil {
		return
	}
	e.inside.Store(nil)
	<-e.turn
	g.drop(id, e)
}

func (g *gates) drop(id string, e *gate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(g.m, id)
	}
}
