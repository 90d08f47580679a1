package matrix

import (
	"context"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// TestCommandLineAtAStockRelay: the programs work with a hub that is none of ours.
func TestCommandLineAtAStockRelay(t *testing.T) {
	h := startRustHub(t)
	program := peer.Sealmq(t)
	home := "SEALMQ_HOME=" + filepath.Join(t.TempDir(), "vault")
	lines := make(chan string, 100)
	listening := peer.Start(t, peer.Options{Env: []string{home}, OnLine: func(b []byte) { lines <- string(b) }},
		program, "listen", "--hub", "tcp://"+h.tcp(), "--trust", "everyone", "--alias", "bob", "--count", "1")
	next := func() string {
		t.Helper()
		select {
		case l := <-lines:
			return l
		case <-listening.Exited():
			select {
			case l := <-lines: // what it printed last
				return l
			default:
				t.Fatalf("listen has ended: %s", listening.Stderr())
			}
		case <-time.After(patience):
			t.Fatal("listen prints nothing")
		}
		return ""
	}
	if l := next(); l != "Forwarding address: forward_to_bob" {
		t.Fatalf("listen prints %q", l)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	sending := peer.Start(t, peer.Options{Env: []string{home}}, program, "send", "--hub", "tcp://"+h.tcp(),
		"--to", "forward_to_bob=>listener", "--trust", "everyone", "Hello Ockam!")
	if err := sending.Wait(ctx); err != nil {
		t.Fatalf("send: %v: %s", err, sending.Stderr())
	}
	if l := next(); !regexp.MustCompile(`^I[0-9a-f]{64}: Hello Ockam!$`).MatchString(l) {
		t.Errorf("listen prints %q", l)
	}
	if err := listening.Wait(ctx); err != nil {
		t.Errorf("listen: %v", err)
	}
	if note := listening.Stderr(); !strings.Contains(note, "'forward_to_bob=>listener'") {
		t.Errorf("listen does not say how it is reached: %q", note)
	}
}
