package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// masks hide what differs from run to run.
var masks = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`FWD_[0-9a-f]{32}`), "FWD_*"},
	{regexp.MustCompile(`[0-9a-f]{4}…[0-9a-f]{4}`), "*"},
	{regexp.MustCompile(`[0-9a-f]{32}…`), "*"},
	{regexp.MustCompile(`[0-9A-Za-z+/]{16}…`), "*"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`), "*"},
	{regexp.MustCompile(`(?m)^\d+ frames went on`), "* frames went on"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:*"},
}

func masked(text string) string {
	for _, m := range masks {
		text = m.re.ReplaceAllString(text, m.with)
	}
	// Alice asks for the owner of the address beside her handshake: when is chance.
	if lookup := regexp.MustCompile(`(?m)^  to lookup .*\n`).FindString(text); lookup != "" {
		text = strings.Replace(text, lookup, "", 1) + lookup
	}
	return strings.TrimSpace(text)
}

func noEnv(string) (string, bool) { return "", false }

// runHere runs a command line in this process.
func runHere(t *testing.T, env func(string) (string, bool), args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	code = run(ctx, args, strings.NewReader(""), &out, &errs, env)
	return code, out.String(), errs.String()
}

// The README shows what the demo prints.
func TestDemoTranscript(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(readme), "```text\n")
	want, _, ok2 := strings.Cut(rest, "```\n")
	if !ok || !ok2 {
		t.Fatal("README.md has no text block")
	}
	code, stdout, stderr := runHere(t, noEnv, "demo")
	if code != exitOK || stderr != "" {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	if masked(stdout) != masked(want) {
		t.Errorf("the demo prints\n%s\nand README.md shows\n%s", masked(stdout), masked(want))
	}
}

func TestDemoJSON(t *testing.T) {
	code, stdout, stderr := runHere(t, noEnv, "demo", "--json", "--root", "site/7")
	if code != exitOK || stderr != "" {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	for line := range strings.Lines(stdout) {
		if !strings.HasPrefix(line, "{") {
			t.Errorf("not JSON: %s", line)
		}
	}
}

// The three terminals of the README, on a free port.
func TestThreeTerminals(t *testing.T) {
	home := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	hub := ""
	env := func(name string) (string, bool) {
		switch name {
		case envHome:
			return home, true
		case envHub:
			return hub, hub != ""
		}
		return "", false
	}
	done := make(chan int, 2)
	background := func(args ...string) func(*regexp.Regexp) string {
		r, w := io.Pipe()
		go func() {
			var stderr bytes.Buffer
			code := run(ctx, args, strings.NewReader(""), w, &stderr, env)
			w.Close()
			done <- code
		}()
		var text []byte
		return func(re *regexp.Regexp) string {
			for !re.Match(text) {
				b := make([]byte, 4096)
				n, err := r.Read(b)
				if err != nil {
					t.Errorf("%v printed %q", args, text)
					return ""
				}
				text = append(text, b[:n]...)
			}
			m := re.FindSubmatch(text)
			return string(m[len(m)-1])
		}
	}
	// The rest of what a background command prints must be read, or it blocks.
	hubSays := background("hub", "--mqtt", "127.0.0.1:0", "--json")
	hub = hubSays(regexp.MustCompile(`"mqtt":\["([^"]+)"`))
	bobSays := background("listen", "--trust", "everyone")
	address := bobSays(regexp.MustCompile(`(?m)^Forwarding address: (FWD_\w+)$`))
	sent := make(chan struct{})
	go func() { // until bob's line has been read he acknowledges nothing
		defer close(sent)
		code, stdout, stderr := runHere(t, env, "send", "--to", address, "--trust", "everyone", "Hello Ockam!")
		if code != exitOK {
			t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
		}
	}()
	bobSays(regexp.MustCompile(`(?m)^I[0-9a-f]{64}: (Hello Ockam!)$`))
	<-sent
	cancel()
	for range 2 {
		select {
		case code := <-done:
			if code != exitOK {
				t.Errorf("a command that was asked to end exits %d", code)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a command does not end")
		}
	}
}

// Every setting that has a flag can be overridden by it.
func TestHubFlagsOverride(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(file, []byte("root: a\nmqtt: [127.0.0.1:1]\nhttp: 127.0.0.1:2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--root", "b/#"}, {"--mqtt", "x"}, {"--http", "x"}, {"--mqtt", "0.0.0.0:1"}} {
		code, _, _ := runHere(t, noEnv, append([]string{"hub", "--check", "--config", file}, args...)...)
		if code != exitConfig {
			t.Errorf("%v: exit code %d", args, code)
		}
	}
	if code, _, stderr := runHere(t, noEnv, "hub", "--check", "--config", file); code != exitOK {
		t.Errorf("the file alone: exit code %d\n%s", code, stderr)
	}
}
