package mochibridge

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// The hook's log says who came, who went and why, and what was refused to whom. Of each
// there is a bounded number of lines a second: devices that all come back at once are no
// flood of lines.

// came logs a connection that is established.
func (s *session) came() {
	s.since = time.Now()
	unlogged, ok := s.h.moves.Next()
	if !ok {
		return
	}
	log := s.h.o.Logger
	if s.who.Account != "" {
		log = log.With("account", s.who.Account)
	}
	log.Info("connected", "client", clip(s.cl.ID), "role", s.who.Role.String(), "peer", s.cl.Net.Remote, "listener", s.cl.Net.Listener,
		"unlogged", unlogged)
}

// went logs its end. err is what mochi says ended it.
func (s *session) went(err error) {
	if s.since.IsZero() {
		return
	}
	if unlogged, ok := s.h.moves.Next(); ok {
		s.h.o.Logger.Info("disconnected", "client", clip(s.cl.ID), "role", s.who.Role.String(), "peer", s.cl.Net.Remote,
			"after", time.Since(s.since).Round(time.Millisecond), "why", s.why(err), "unlogged", unlogged)
	}
}

// why says what ended a connection.
func (s *session) why(err error) string {
	if cause := s.conn.Cause(); cause != nil { // the listener ended it
		err = cause
	} else if cause := s.cl.StopCause(); cause != nil { // so did somebody, before mochi noticed
		err = cause
	}
	var ours packets.Code
	switch {
	case errors.Is(err, packets.CodeDisconnect):
		return "the client said so"
	case errors.As(err, &ours):
		return ours.Reason
	case err == nil:
		return "closed"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "silent for longer than its keep alive"
	case errors.Is(err, io.EOF):
		return "closed by the client without a word"
	}
	return err.Error()
}

// denied logs a refused subscription or publish.
func (h *Hook) denied(cl *mqtt.Client, what, topic string) {
	if unlogged, ok := h.lines.Next(); ok {
		h.o.Logger.Info("refused", "what", what, "topic", clip(topic), "client", clip(cl.ID), "peer", cl.Net.Remote, "unlogged", unlogged)
	}
}

// clip shortens what a client has written, for the log.
func clip(s string) string {
	const most = 256
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
