// Package examples runs the example programs.
package examples

import (
	"bufio"
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/broker"
)

// Bob and Alice, as programs of their own, at a hub.
func TestBobAndAlice(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", dir, "./bob", "./alice").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	hub, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := hub.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hub.Shutdown(context.Background()) }()

	bob := exec.CommandContext(ctx, filepath.Join(dir, "bob"), hub.MQTTURL())
	stdout, err := bob.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := bob.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	lines.Scan()
	address, ok := strings.CutPrefix(lines.Text(), "Forwarding address: ")
	if !ok {
		t.Fatalf("Bob printed %q", lines.Text())
	}
	if out, err := exec.CommandContext(ctx, filepath.Join(dir, "alice"), address, hub.MQTTURL()).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("Alice: %v\n%s", err, out)
	}
	lines.Scan()
	if got, want := lines.Text(), "Bob Received: Hello Ockam! from Alice via secure channel"; got != want {
		t.Errorf("Bob printed %q, want %q", got, want)
	}
	if err := bob.Wait(); err != nil {
		t.Errorf("Bob: %v", err)
	}
}
