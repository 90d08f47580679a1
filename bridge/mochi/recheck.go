package mochibridge

import (
	"github.com/mochi-mqtt/server/v2/packets"
)

// Recheck asks Options.Allowed about every live connection and ends those that
// it no longer allows, and returns how many. A connection that is being let in
// meanwhile is asked about too. What waits for a device stays until its age
// limit, as after any end of a connection. Without Options.Allowed it does
// nothing.
func (h *Hook) Recheck() (ended int) {
	if h.o.Allowed == nil {
		return 0
	}
	h.rechecks.Add(1) // before the look: see enter
	h.mu.Lock()
	all := make([]*session, 0, len(h.sessions))
	for s := range h.sessions {
		all = append(all, s)
	}
	h.mu.Unlock()
	for _, s := range all {
		if !h.o.Allowed(s.who) && s.revoke() {
			ended++
		}
	}
	return ended
}

// enter makes a session known to Recheck until its connection ends. before is
// h.rechecks from before the authenticator was asked; false means that its answer
// does not hold any more.
func (h *Hook) enter(s *session, before uint64) bool {
	if h.o.Allowed == nil {
		return true
	}
	h.mu.Lock()
	h.sessions[s] = struct{}{}
	h.mu.Unlock()
	s.conn.AtEnd(func() {
		h.mu.Lock()
		delete(h.sessions, s)
		h.mu.Unlock()
	})
	return h.rechecks.Load() == before || h.o.Allowed(s.who)
}

// revoke ends the connection of a principal that may not stay, and reports
// whether it had not ended before.
func (s *session) revoke() bool {
	if s.kicked.Swap(true) {
		return false
	}
	s.h.o.Counters.add(Revoked)
	s.h.o.Logger.Info("connection ended: it is no longer allowed", "client", s.cl.ID, "peer", s.cl.Net.Remote, "role", s.who.Role.String())
	s.bye(packets.ErrNotAuthorized)
	return true
}

// Recheck is the hook's, see [Hook.Recheck].
func (s *Server) Recheck() (ended int) { return s.hook.Recheck() }
