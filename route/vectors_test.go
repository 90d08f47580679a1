package route

import (
	"testing"

	"github.com/sealmq/sealmq/internal/vectors"
)

// liveSession is one captured TCP connection between a stock Rust node and an
// independent Go peer.
type liveSession struct {
	Name     string
	RustToGo vectors.Hex `json:"rust_to_go"`
	GoToRust vectors.Hex `json:"go_to_rust"`
	Frames   []struct {
		Dir    string
		Wire   vectors.Hex // length and body, or the preamble
		Note   string
		Onward string
		Return string
	}
}

// liveFiles are the vector files that hold whole TCP streams.
var liveFiles = []string{
	"live_tcp_echo.json",
	"live_relay_registration.json",
	"live_portal.json",
	"live_handshake_go_initiator.json",
	"live_handshake_go_responder.json",
}

// liveSessions loads every captured connection, and fails when a file has none.
func liveSessions(t testing.TB) []liveSession {
	t.Helper()
	var all []liveSession
	for _, name := range liveFiles {
		file := vectors.Load[struct{ Sessions []liveSession }](t, name)
		if len(file.Sessions) == 0 {
			t.Fatalf("%s holds no sessions", name)
		}
		for _, s := range file.Sessions {
			if len(s.Frames) == 0 || len(s.RustToGo) == 0 || len(s.GoToRust) == 0 {
				t.Fatalf("%s: session %s is empty", name, s.Name)
			}
			s.Name = name + "/" + s.Name
			all = append(all, s)
		}
	}
	return all
}

// liveBodies returns the bodies of all captured frames.
func liveBodies(t testing.TB) [][]byte {
	t.Helper()
	var bodies [][]byte
	for _, s := range liveSessions(t) {
		for _, f := range s.Frames {
			if f.Note != "preamble" {
				bodies = append(bodies, f.Wire[FrameHeaderLen:])
			}
		}
	}
	if len(bodies) < 50 {
		t.Fatalf("only %d captured frames found", len(bodies))
	}
	return bodies
}
