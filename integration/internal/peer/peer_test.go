package peer_test

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestProcessReadsLinesAndEnds(t *testing.T) {
	var lines []string
	p := peer.Start(t, peer.Options{
		Env:    []string{"WORD=three"},
		OnLine: func(line []byte) { lines = append(lines, string(line)) },
	}, "sh", "-c", `echo one; echo; echo oops >&2; read line; echo "$line"; printf $WORD; exit 3`)
	if _, err := p.Stdin().Write([]byte("two\n")); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := p.Wait(t.Context()); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("it ended with %v", err)
	}
	if got := strings.Join(lines, "|"); got != "one||two|three" {
		t.Errorf("lines: %q", got)
	}
	if p.Stderr() != "oops\n" {
		t.Errorf("stderr: %q", p.Stderr())
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("a signal to a process that is gone: %v", err)
	}
}

func TestProcessIsKilledAtTheEnd(t *testing.T) {
	var p *peer.Process
	t.Run("inner", func(t *testing.T) {
		p = peer.Start(t, peer.Options{}, "sh", "-c", "exec sleep 600")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting too short a time: %v", err)
		}
	})
	select {
	case <-p.Exited():
	default:
		t.Error("it outlived its test")
	}
}

// recorder is a test that notes how it would have ended.
type recorder struct {
	testing.TB
	failed, skipped string
}

func (r *recorder) Helper()                           {}
func (r *recorder) Fatalf(format string, args ...any) { r.failed = format; panic(r) }
func (r *recorder) Skipf(format string, args ...any)  { r.skipped = format; panic(r) }

func TestMissing(t *testing.T) {
	for _, tc := range []struct {
		name, ci, require string
		fails             bool
	}{
		{"at home", "", "", false},
		{"in CI", "true", "", true},
		{"asked for", "", "1", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("CI", tc.ci)
			t.Setenv("SEALMQ_REQUIRE_PEERS", tc.require)
			r := &recorder{TB: t}
			func() {
				defer func() { _ = recover() }()
				peer.Missing(r, "a peer", "get it")
			}()
			if (r.failed != "") != tc.fails || (r.skipped != "") == tc.fails {
				t.Errorf("failed with %q, skipped with %q", r.failed, r.skipped)
			}
		})
	}
}
