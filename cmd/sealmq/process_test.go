package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a sealmq that runs as a program of its own.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	ended  chan struct{}
	stdout says
	stderr says
}

// says is what a process has written so far.
type says struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed and replaced with each write
}

func (s *says) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.more != nil {
		close(s.more)
	}
	s.more = make(chan struct{})
	return s.text.Write(p)
}

func (s *says) now() (string, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.more == nil {
		s.more = make(chan struct{})
	}
	return s.text.String(), s.more
}

// start runs "sealmq args…" with the environment settings, until the test ends.
func start(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	return startCommand(t, env, "sealmq", args...)
}

// startCommand does so with another program.
func startCommand(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(name, args...), ended: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), "GORACE="+raceExit), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// wait returns what the last group of re matched, once s has it.
func (p *process) wait(s *says, re string) string {
	p.t.Helper()
	r := regexp.MustCompile(re)
	deadline := time.After(patience)
	for {
		text, more := s.now()
		if m := r.FindStringSubmatch(text); m != nil {
			return m[len(m)-1]
		}
		select {
		case <-more:
		case <-p.ended:
			if text, _ := s.now(); r.MatchString(text) {
				continue
			}
			p.t.Fatalf("%v has ended without %q:\n%s", p.cmd.Args, re, text)
		case <-deadline:
			p.t.Fatalf("%v does not write %q:\n%s", p.cmd.Args, re, text)
		}
	}
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// exits wants the process to end with the code, and returns what it wrote to
// stderr.
func (p *process) exits(code int) string {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(2 * patience):
		p.t.Fatalf("%v does not end", p.cmd.Args)
	}
	text, _ := p.stderr.now()
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("%v: exit code %d, want %d\n%s", p.cmd.Args, got, code, text)
	}
	return text
}

// hubProcess starts a hub on a free port and returns the environment for its
// clients.
func hubProcess(t *testing.T, args ...string) (hub *process, env []string) {
	t.Helper()
	home := "SEALMQ_HOME=" + t.TempDir()
	hub = start(t, []string{home}, append([]string{"hub", "--mqtt", "127.0.0.1:0"}, args...)...)
	url := hub.wait(&hub.stdout, `(?m)^Listening at (\S+)$`)
	hub.wait(&hub.stdout, `(?m)^Hub identity I`)
	return hub, []string{home, "SEALMQ_HUB=" + url}
}

var errorLine = regexp.MustCompile(`(?m)^sealmq: error: .+\n(sealmq: hint: .+\n)?\z`)

// HUP has the hub read its accounts again, or keep what it has; TERM ends hub
// and listener, in order and without an error.
func TestSignals(t *testing.T) {
	t.Parallel()
	accounts := filepath.Join(t.TempDir(), "accounts")
	account := func(user string, flags ...string) string {
		t.Helper()
		cmd := exec.Command("sealmq", append([]string{"passwd", user, "--cost", "4"}, flags...)...)
		cmd.Stdin = strings.NewReader("secret")
		line, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(line)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(accounts, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(account("watcher", "--role", "observer"))
	hub, env := hubProcess(t, "--password-file", accounts)
	env = append(env, "SEALMQ_USER=bob", "SEALMQ_PASSWORD=secret")
	created := start(t, env, "identity", "create", "default")
	created.exits(exitOK)
	id := created.wait(&created.stdout, `(I[0-9a-f]{64})`)
	if text := start(t, env, "listen", "--trust", "everyone").exits(exitNoPerm); !errorLine.MatchString(text) {
		t.Errorf("not one clear line:\n%s", text)
	}

	write("not an account\n")
	hub.signal(syscall.SIGHUP)
	hub.wait(&hub.stderr, `(?m)^.*WARN.*what was in force stays.*$`)
	write(account("bob", "--role", "device", "--identifier", id))
	hub.signal(syscall.SIGHUP)
	hub.wait(&hub.stderr, `password file was read again`)
	bob := start(t, env, "listen", "--trust", "everyone")
	bob.wait(&bob.stdout, `(?m)^Forwarding address: (FWD_\w+)$`)

	bob.signal(syscall.SIGTERM)
	bob.exits(exitOK)
	hub.signal(syscall.SIGTERM)
	hub.exits(exitOK)
}

// A listener that is gone, and then a hub that is gone too, while send runs: one
// clear line each, and the code that says to try again.
func TestSendWhilePeersDie(t *testing.T) {
	t.Parallel()
	hub, env := hubProcess(t)
	start(t, env, "identity", "create", "default").exits(exitOK)
	bob := start(t, env, "listen", "--trust", "everyone")
	address := bob.wait(&bob.stdout, `(?m)^Forwarding address: (FWD_\w+)$`)
	bob.signal(syscall.SIGKILL)
	<-bob.ended

	offline := start(t, env, "send", "--to", address, "--trust", "everyone", "hello")
	if text := offline.exits(exitTempFail); !errorLine.MatchString(text) || !strings.Contains(text, "the hub waits for it") {
		t.Errorf("to an offline peer:\n%s", text)
	}

	// An interrupt ends a send that waits, with a code of its own.
	interrupted := start(t, env, "send", "--verbose", "--to", address, "--trust", "everyone", "hello")
	interrupted.wait(&interrupted.stderr, `connected to the hub`)
	interrupted.signal(os.Interrupt)
	if text := interrupted.exits(exitInterrupted); !errorLine.MatchString(text) {
		t.Errorf("interrupted:\n%s", text)
	}

	away := start(t, env, "send", "--verbose", "--to", address, "--trust", "everyone", "--timeout", "3s", "hello")
	away.wait(&away.stderr, `connected to the hub`)
	hub.signal(syscall.SIGKILL)
	if text := away.exits(exitTempFail); !errorLine.MatchString(text) {
		t.Errorf("from a hub that was killed:\n%s", text)
	}
}
