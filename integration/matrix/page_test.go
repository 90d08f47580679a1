package matrix

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/peer"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

// TestRustPage runs the two programs of docs/rust.md as the page does.
func TestRustPage(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(peer.ModuleRoot(t), "docs", "rust.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bob", "alice"} {
		source, err := os.ReadFile(filepath.Join(peer.ModuleRoot(t), "integration", "rust", "src", "bin", name+".rs"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(page), "```rust\n"+string(source)+"```\n") {
			t.Errorf("docs/rust.md does not show %s.rs as it is", name)
		}
	}
	h := startOurHub(t)
	env := []string{"SEALMQ_HOME=" + filepath.Join(t.TempDir(), "vault")}
	program := peer.Sealmq(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	start := func(name string, args ...string) (*peer.Process, func(pattern string) string) {
		lines := make(chan string, 100)
		p := peer.Start(t, peer.Options{Env: env, OnLine: func(b []byte) { lines <- string(b) }}, name, args...)
		return p, func(pattern string) string {
			t.Helper()
			for limit := time.After(patience); ; {
				select {
				case l := <-lines:
					if m := regexp.MustCompile(pattern).FindStringSubmatch(l); m != nil {
						return m[len(m)-1]
					}
				case <-limit:
					t.Fatalf("%s prints nothing like %s: %s", name, pattern, p.Stderr())
				}
			}
		}
	}
	done := func(p *peer.Process) {
		t.Helper()
		if err := p.Wait(ctx); err != nil {
			t.Errorf("%v: %s", err, p.Stderr())
		}
	}

	bob, prints := start(rustpeer.Program(t, "bob"), h.tcp())
	forwarder := prints(`^Forwarding address: (FWD_\w+)$`)
	sending, _ := start(program, "send", "--hub", h.mqtt(), "--to", forwarder+"=>listener", "--trust", "everyone", "Hello Ockam!")
	done(sending)
	prints(`^Hello Ockam!$`)
	done(bob)

	_, prints = start(program, "identity", "create", "bob")
	identifier := prints(`I[0-9a-f]{64}`)
	_, prints = start(program, "listen", "--hub", h.mqtt(), "--identity", "bob", "--trust", "everyone")
	forwarder = prints(`^Forwarding address: (FWD_\w+)$`)
	alice, answer := start(rustpeer.Program(t, "alice"), h.tcp(), forwarder, identifier)
	prints(`^I[0-9a-f]{64}: Hello Ockam!$`)
	answer(`^Hello Ockam!$`)
	done(alice)
}
