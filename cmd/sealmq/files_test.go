package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/internal/pinfile"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// A hub that may open fewer files than its limits of connections need says so, lets no
// more in than there are files for, and so never runs out of them: it goes on
// accepting, answering, and opening files.
func TestFewFiles(t *testing.T) {
	t.Parallel()
	const files, room = 200, 50 // of which half are kept, and the ports share the others
	accounts := filepath.Join(t.TempDir(), "accounts")
	passwd := exec.Command("sealmq", "passwd", "u", "--cost", "4")
	passwd.Stdin = strings.NewReader("secret")
	line, err := passwd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(accounts, line, 0o600); err != nil {
		t.Fatal(err)
	}
	hub := startCommand(t, []string{"SEALMQ_HOME=" + t.TempDir()}, "sh", "-c", fmt.Sprintf(`ulimit -n %d; exec sealmq "$@"`, files), "hub",
		"hub", "--mqtt", "127.0.0.1:0", "--tcp", "127.0.0.1:0", "--http", "127.0.0.1:0", "--password-file", accounts, "--data", t.TempDir(), "--max-connections", "100")
	mqtt := hub.wait(&hub.stdout, `(?m)^Listening at mqtt://(\S+)$`)
	tcp := hub.wait(&hub.stdout, `(?m)^Listening at tcp://(\S+)$`)
	web := hub.wait(&hub.stdout, `(?m)^Status at (\S+)$`)
	hub.wait(&hub.stderr, fmt.Sprintf(`level=WARN msg="the limit of open files .* files=%d needed=328 connections=%d configured=100`, files, room))

	// dial connects from one of four addresses.
	dial := func(addr string, i int) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%4))}, Timeout: patience}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
		return c
	}
	echo := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("x"), Payload: []byte("x")})
	in, silent := map[string]int{}, make([]net.Conn, files)
	for i := range files {
		silent[i] = dial(strings.TrimPrefix(web, "http://"), i)
		if p, err := rawmqtt.New(dial(mqtt, i), false).Login(rawmqtt.Options{ID: fmt.Sprint("c", i), User: "u", Password: "secret"}); err == nil && p.Code() == 0 {
			in["mqtt"]++
		}
		c := dial(tcp, i)
		_, _ = c.Write(append(append([]byte{route.Preamble}, route.AppendFrameHeader(nil, len(echo))...), echo...)) // fails where it was refused
		if n, _ := io.ReadFull(c, make([]byte, 10)); n == 10 {
			in["tcp"]++
		}
	}
	for name, n := range in {
		if n != room {
			t.Errorf("%s: %d are let in, want %d", name, n, room)
		}
	}
	hub.signal(syscall.SIGHUP)
	hub.wait(&hub.stderr, `password file was read again`)
	for _, c := range silent {
		_ = c.Close()
	}
	var r *http.Response
	for deadline := time.Now().Add(patience); ; { // until the hub has seen that
		if r, err = http.Get(web + "/status"); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	defer r.Body.Close()
	var status struct{ Counters map[string]int }
	if err := json.NewDecoder(r.Body).Decode(&status); err != nil {
		t.Fatal(err)
	}
	for _, front := range []string{"mqtt", "tcp"} {
		for event, want := range map[string]int{"accept-failed": 0, "refused-total": files - room, "accepted": room} {
			if got := status.Counters[fmt.Sprintf("sealmq_%s_events_total{event=%s}", front, event)]; got != want {
				t.Errorf("%s: %s %d times, want %d", front, event, got, want)
			}
		}
	}
	hub.signal(syscall.SIGTERM)
	hub.exits(exitOK)
}

// TestKnownFiles: which exit code a file of known hubs or peers has that cannot be used.
func TestKnownFiles(t *testing.T) {
	for _, c := range []struct {
		op   string
		err  error
		code int
		hint string
	}{
		{"write", syscall.EACCES, exitCantCreate, "--known-peers; --trust IDENTIFIER"},
		{"write", syscall.EROFS, exitCantCreate, "--known-peers; --trust IDENTIFIER"},
		{"write", syscall.ENOSPC, exitIO, "free some space"},
		{"write", pinfile.ErrName, exitUsage, "--trust IDENTIFIER"},
		{"write", &pinfile.PermissionError{File: "f"}, exitNoPerm, "chmod 600 f"},
		{"write", &pinfile.SyntaxError{File: "f", Line: 1}, exitConfig, ""},
		{"read", syscall.EACCES, exitIO, "let this user read it"},
	} {
		err := fmt.Errorf("device: dialling: %w", &device.KnownFileError{What: "known peers", Op: c.op, File: "f", Err: fmt.Errorf("pinfile: %w", c.err)})
		if code, hint := codeOf(t.Context(), err), hintOf(err); code != c.code || !strings.Contains(hint, c.hint) {
			t.Errorf("%s: %v: code %d, hint %q", c.op, c.err, code, hint)
		}
	}
}
