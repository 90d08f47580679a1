package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/device"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sealmq": func() { os.Exit(program()) }})
}

// How long a script waits for something that happens on its own.
const patience = 20 * time.Second

// raceExit has the race detector not hold up the end of each process for a
// second.
const raceExit = "atexit_sleep_ms=10"

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("SEALMQ_HOME", filepath.Join(env.WorkDir, "vault"))
			env.Setenv("SEALMQ_HUB", "")
			env.Setenv("GORACE", raceExit)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":    exits,
			"hub":      startHub,
			"listener": startListener,
			"hears":    hears,
			"busyport": busyPort,
			"deadport": deadPort,
			"webport":  webPort,
			"oneline":  oneLine,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// exits CODE COMMAND… runs a command and wants its exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// oneline wants stderr to be one error line, with at most one hint line behind
// it.
func oneLine(ts *testscript.TestScript, neg bool, args []string) {
	text := ts.ReadFile("stderr")
	if !regexp.MustCompile(`^(sealmq: warning: .*\n)*sealmq: error: [^\n]+\n(sealmq: hint: [^\n]+\n)?$`).MatchString(text) {
		ts.Fatalf("stderr is not one clear line:\n%s", text)
	}
}

// hub [FLAG…] starts a hub in this process, open on the loopback interface or
// with the password file of its first argument, and sets HUB, HUBID and, with the
// argument tcp, TCPHUB.
func startHub(ts *testscript.TestScript, neg bool, args []string) {
	cfg := broker.Config{MQTT: []string{"127.0.0.1:0"}}
	for _, a := range args {
		switch a {
		case "small":
			cfg.Limits.Frame = 4 << 10
		case "tcp":
			cfg.TCP = "127.0.0.1:0"
		case "proven":
			cfg.Devices.AnyoneProven = true
		case "data":
			cfg.Data = ts.MkAbs("hubdata" + ts.Getenv("HUBNO"))
		default:
			if file, ok := strings.CutPrefix(a, "authority="); ok {
				cfg.Devices.Authorities = []string{ts.MkAbs(file)}
				cfg.Devices.Attributes = map[string]string{"role": "pump"}
				break
			}
			if file, ok := strings.CutPrefix(a, "api="); ok { // closed to strangers
				cfg.TCP, cfg.APIAuthority = "0.0.0.0:0", ts.MkAbs(file)
				break
			}
			if file, ok := strings.CutPrefix(a, "allow="); ok {
				cfg.Devices.AllowFile = ts.MkAbs(file)
				break
			}
			if file, ok := strings.CutPrefix(a, "passphrase="); ok {
				cfg.PassphraseFile = ts.MkAbs(file)
				break
			}
			if addr, ok := strings.CutPrefix(a, "at="); ok {
				cfg.MQTT = []string{strings.TrimPrefix(addr, "mqtt://")}
				break
			}
			cfg.PasswordFile = ts.MkAbs(a)
		}
	}
	end := func(h *broker.Hub) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := h.Shutdown(ctx); err != nil {
			ts.Logf("hub: %v", err)
		}
	}
	if old, ok := hubs.LoadAndDelete(strings.Join(cfg.MQTT, "")); ok {
		end(old.(*broker.Hub))
	}
	h, err := broker.New(cfg)
	ts.Check(err)
	ts.Check(h.Start(context.Background()))
	hubs.Store(h.MQTTAddr().String(), h)
	ts.Defer(func() { end(h) })
	ts.Setenv("HUB", h.MQTTURL())
	ts.Setenv("HUBADDR", h.MQTTAddr().String())
	ts.Setenv("HUBID", h.Identifier().String())
	ts.Setenv("TCPHUB", h.TCPURL())
}

// hubs are the hubs of all scripts, by address.
var hubs sync.Map

// heard is what a listener in this process has printed.
type heard struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
	ended   chan struct{}
}

var (
	listenersMu sync.Mutex
	listeners   = map[string]*heard{} // by script
)

func (h *heard) wait(re *regexp.Regexp) (string, bool) {
	deadline := time.After(patience)
	for {
		h.mu.Lock()
		text, changed := h.text.String(), h.changed
		h.mu.Unlock()
		if re.MatchString(text) {
			return text, true
		}
		select {
		case <-changed:
		case <-h.ended:
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.text.String(), re.MatchString(h.text.String())
		case <-deadline:
			return text, false
		}
	}
}

// listener ARG… runs "sealmq listen ARG…" in this process, waits for its
// forwarding address and sets FWD.
func startListener(ts *testscript.TestScript, neg bool, args []string) {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	h := &heard{changed: make(chan struct{}), ended: make(chan struct{})}
	env := func(name string) (string, bool) {
		v := ts.Getenv(name)
		return v, v != ""
	}
	var stderr bytes.Buffer
	go func() {
		defer close(h.ended)
		code := run(ctx, append([]string{"listen"}, args...), bytes.NewReader(nil), w, &stderr, env)
		if code != exitOK {
			h.mu.Lock()
			h.text.WriteString("exit code " + strconv.Itoa(code) + "\n" + stderr.String())
			h.mu.Unlock()
		}
		w.Close()
	}()
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		sc := bufio.NewScanner(r)
		for sc.Scan() {
			h.mu.Lock()
			h.text.WriteString(sc.Text() + "\n")
			close(h.changed)
			h.changed = make(chan struct{})
			h.mu.Unlock()
		}
	}()
	ts.Defer(func() {
		cancel()
		<-h.ended
		<-reading
	})
	address := regexp.MustCompile(`(?m)^Forwarding address: (\S+)$|"forwarding_address":"([^"]+)"`)
	text, ok := h.wait(address)
	if !ok {
		ts.Fatalf("no forwarding address:\n%s", text)
	}
	m := address.FindStringSubmatch(text)
	ts.Setenv("FWD", m[1]+m[2])
	listenersMu.Lock()
	listeners[ts.Getenv("WORK")] = h
	listenersMu.Unlock()
}

// hears REGEXP waits until the listener has printed something.
func hears(ts *testscript.TestScript, neg bool, args []string) {
	listenersMu.Lock()
	h := listeners[ts.Getenv("WORK")]
	listenersMu.Unlock()
	if h == nil || len(args) != 1 {
		ts.Fatalf("usage: hears REGEXP, after listener")
	}
	re := regexp.MustCompile("(?m)" + args[0])
	if neg {
		h.mu.Lock()
		defer h.mu.Unlock()
		if re.MatchString(h.text.String()) {
			ts.Fatalf("the listener printed it:\n%s", h.text.String())
		}
		return
	}
	if text, ok := h.wait(re); !ok {
		ts.Fatalf("the listener did not print it:\n%s", text)
	}
}

// busyport NAME sets NAME to the address of a port that something listens at.
func busyPort(ts *testscript.TestScript, neg bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	ts.Setenv(args[0], ln.Addr().String())
}

// webport NAME sets NAME to the address of an HTTP server.
func webPort(ts *testscript.TestScript, neg bool, args []string) {
	web := httptest.NewServer(http.NotFoundHandler())
	ts.Defer(web.Close)
	ts.Setenv(args[0], web.Listener.Addr().String())
}

// deadport NAME sets NAME to the address of a port where nothing listens.
func deadPort(ts *testscript.TestScript, neg bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Check(ln.Close())
	ts.Setenv(args[0], ln.Addr().String())
}

// What happens to the connection of listen is said, its return too, and nothing is
// when it is made for the first time.
func TestNoteEvents(t *testing.T) {
	var stderr bytes.Buffer
	note := (&app{stderr: &stderr}).noteEvents()
	for _, step := range []struct {
		event device.Event
		want  string
	}{
		{device.Event{Kind: device.EventOnline}, ""},
		{device.Event{Kind: device.EventOffline, Err: device.ErrHubAway}, "sealmq: warning: connection to the hub lost, trying again: cannot reach the hub\n"},
		{device.Event{Kind: device.EventOnline}, "sealmq: connected to the hub again\n"},
		{device.Event{Kind: device.EventOnline}, ""},
		{device.Event{Kind: device.EventSendFailed, Err: device.ErrFrameKills}, "sealmq: warning: a message was given up: each connection ended when it was sent\n"},
	} {
		stderr.Reset()
		if note(step.event); stderr.String() != step.want {
			t.Errorf("%v: %q, want %q", step.event.Kind, stderr.String(), step.want)
		}
	}
}

// No explanation stands behind a more general one that hides it.
func TestExplanations(t *testing.T) {
	for _, e := range explanations {
		if code, hint := explain(e.is); code != e.code || hint != e.hint {
			t.Errorf("%v: %d, %q; want %d, %q", e.is, code, hint, e.code, e.hint)
		}
	}
}
