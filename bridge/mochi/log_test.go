package mochibridge

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// logged is a log that is read while it is written.
type logged struct {
	mu  sync.Mutex
	out bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.Write(b)
}

// lines returns those that have all the words.
func (l *logged) lines(words ...string) (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for line := range strings.Lines(l.out.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		out = append(out, line)
	}
	return out
}

// TestLogSaysWhoCameAndWent: and why they went, and what was refused to whom.
func TestLogSaysWhoCameAndWent(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		l := new(logged)
		h := newHub(t, change, func(s *setup) { s.hook.Logger = slog.New(slog.NewTextHandler(l, nil)) })
		wait := func(words ...string) {
			t.Helper()
			eventually(t, strings.Join(words, " "), func() bool { return len(l.lines(words...)) == 1 })
		}
		first := h.device(t, "alice", false)
		wait("msg=connected", "client=alice", "role=device", "peer=127.0.0.1:", "listener=t")
		second := h.device(t, "alice", true)
		closedByPeer(t, first.Client)
		wait("msg=disconnected", "client=alice", "role=device", "after=", "session takeover")
		send(t, second, rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
		wait("msg=disconnected", "client=alice", "the client said so")

		u := h.login(t, true, rawmqtt.Options{ID: "u", User: "user"})
		wait("msg=connected", "client=u", "role=user")
		if p, err := u.Sub(1, 0, "sealmq/alice/in", "sealmq/"+strings.Repeat("x", 1000)); err != nil || p.Code() != 0x87 {
			t.Fatal(p, err)
		}
		wait("msg=refused", "what=subscription", "topic=sealmq/alice/in", "client=u", "peer=127.0.0.1:")
		wait("msg=refused", "topic=sealmq/"+strings.Repeat("x", 249)+"…")
		send(t, u, rawmqtt.Publish(true, 2, "sealmq/alice/out", 2, []byte("secret")))
		expect(t, u, rawmqtt.PUBACK)
		wait("msg=refused", "what=publish", "topic=sealmq/alice/out", "client=u")
		_ = u.Close()
		wait("msg=disconnected", "client=u", "without a word")
		if got := l.lines("secret"); got != nil {
			t.Error(got)
		}
		if got := l.lines("unlogged"); got != nil {
			t.Error(got)
		}

		// Many at once are no flood.
		h.hook.moves.SetLimit(0)
		h.hook.moves.SetBurst(0)
		h.hook.lines.SetLimit(0)
		h.hook.lines.SetBurst(0)
		lines := len(l.lines())
		for range 20 {
			c := h.login(t, false, rawmqtt.Options{ID: "storm", User: "user"})
			if p, err := c.Sub(1, 0, "sealmq/#"); err != nil || p.Code() != 0x80 {
				t.Fatal(p, err)
			}
			_ = c.Close()
			eventually(t, "it is gone", func() bool { return h.Clients.Len() == 0 })
		}
		if n := len(l.lines()) - lines; n != 0 {
			t.Errorf("%d lines", n)
		}
		h.hook.moves.SetBurst(1)
		h.hook.moves.SetLimit(1e9)
		h.login(t, false, rawmqtt.Options{ID: "last", User: "user"})
		wait("msg=connected", "client=last", "unlogged=40")
	})
}
