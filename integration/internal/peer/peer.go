// Package peer runs other people's programs for the integration tests: it
// finds them, starts them, reads what they print and makes sure that none
// outlives its test.
//
// A peer that cannot be had fails the test where it is required (CI=true or
// SEALMQ_REQUIRE_PEERS=1) and skips it elsewhere, loudly: see [Missing].
package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Required reports whether a missing peer is a failure: in CI, and wherever
// SEALMQ_REQUIRE_PEERS is set to 1.
func Required() bool {
	return os.Getenv("CI") == "true" || os.Getenv("SEALMQ_REQUIRE_PEERS") == "1"
}

// Missing ends a test whose peer cannot be had: it fails where peers are
// required and skips elsewhere. how says what to do to get the peer.
func Missing(t testing.TB, what, how string) {
	t.Helper()
	if Required() {
		t.Fatalf("%s is missing and this run requires its peers: %s", what, how)
	}
	t.Skipf("NOT TESTED: %s is missing: %s (SEALMQ_REQUIRE_PEERS=1 makes this a failure)", what, how)
}

// ModuleRoot returns the folder of the module's go.mod, searched upwards from
// the folder that the test runs in.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "LICENSE")); err == nil {
			if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
				return dir
			}
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the test's folder")
		}
		dir = parent
	}
}

// Options are the optional parts of a process.
type Options struct {
	Env    []string          // added to the test's own environment
	Dir    string            // working folder; the test's own when empty
	OnLine func(line []byte) // called in order for each line of stdout, without its line end; owns line
}

// Process is a running peer. Its methods are safe for concurrent use.
type Process struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stderr tail
	exited chan struct{} // closed once the process is gone and all its output was read
	err    error         // of cmd.Wait; written before exited is closed
}

// Start runs a program until the test ends, at the latest. When the test
// failed, the end of the program's stderr goes into the test's log.
func Start(t testing.TB, opts Options, program string, args ...string) *Process {
	t.Helper()
	p := &Process{
		name:   filepath.Base(program),
		cmd:    exec.Command(program, args...),
		exited: make(chan struct{}),
	}
	p.cmd.Dir = opts.Dir
	p.cmd.Env = append(os.Environ(), opts.Env...)
	p.cmd.Stderr = &p.stderr
	p.cmd.WaitDelay = 5 * time.Second
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdin = stdin
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("starting %s: %v", p.name, err)
	}
	go p.read(stdout, opts.OnLine)
	t.Cleanup(func() {
		p.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("%s %v: stderr ends with:\n%s", p.name, args, p.Stderr())
		}
	})
	return p
}

func (p *Process) read(stdout io.Reader, onLine func([]byte)) {
	defer close(p.exited)
	r := bufio.NewReaderSize(stdout, 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if n := len(line); n > 0 && line[n-1] == '\n' {
			line = line[:n-1]
		}
		if onLine != nil && (err == nil || len(line) > 0) {
			onLine(line)
		}
		if err != nil {
			break
		}
	}
	p.err = p.cmd.Wait()
}

// Stdin is the process's standard input.
func (p *Process) Stdin() io.WriteCloser { return p.stdin }

// Signal sends a signal; one to a process that is gone is no error.
func (p *Process) Signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signalling %s: %w", p.name, err)
	}
	return nil
}

// Kill ends the process without warning it.
func (p *Process) Kill() {
	p.cmd.Process.Kill() //nolint:errcheck // the only error is that it is gone already
}

// Exited is closed once the process is gone and all that it printed was read.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Wait waits for the end of the process and returns how it ended: nil for exit
// code 0, else an [*exec.ExitError].
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.exited:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s to end: %w", p.name, ctx.Err())
	}
}

// PeakMemory returns the most memory, in bytes, that the process has had resident so
// far, as Linux counts it.
func (p *Process) PeakMemory() (int64, error) { return p.memory("VmHWM") }

// Memory returns how much memory, in bytes, the process has resident now.
func (p *Process) Memory() (int64, error) { return p.memory("VmRSS") }

func (p *Process) memory(field string) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		var kib int64
		if _, err := fmt.Sscanf(line, field+": %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s: the system does not say how much memory it has", p.name)
}

// Stderr returns the last 64 KiB that the process wrote to its stderr.
func (p *Process) Stderr() string { return p.stderr.String() }

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 64 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
