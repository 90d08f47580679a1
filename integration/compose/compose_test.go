package compose

import (
	"context"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// load reads docker-compose.yml as docker compose would.
func load(t *testing.T) *types.Project {
	t.Helper()
	file := filepath.Join(peer.ModuleRoot(t), "docker-compose.yml")
	opts, err := cli.NewProjectOptions([]string{file}, cli.WithConsistency(true), cli.WithInterpolation(true))
	if err != nil {
		t.Fatal(err)
	}
	project, err := opts.LoadProject(t.Context())
	if err != nil {
		t.Fatalf("docker-compose.yml does not pass the compose schema: %v", err)
	}
	return project
}

func TestFile(t *testing.T) {
	project := load(t)
	for _, name := range []string{"hub", "bob", "alice", "observer"} {
		if _, ok := project.Services[name]; !ok {
			t.Errorf("there is no service %q", name)
		}
	}
	for name, s := range project.Services {
		if s.Privileged || s.NetworkMode == "host" || !slices.Equal(s.CapDrop, []string{"ALL"}) || !s.ReadOnly {
			t.Errorf("%s may do more than it needs", name)
		}
		if s.Build != nil && s.Build.Target != "demo" {
			t.Errorf("%s is built from stage %q", name, s.Build.Target)
		}
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeVolume || v.Target != "/data/"+v.Source {
				t.Errorf("%s mounts %s at %s, want it at /data/%[2]s", name, v.Source, v.Target)
			}
		}
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s publishes port %s to other machines", name, p.Published)
			}
		}
	}
	// Nobody but setup holds another's keys.
	for _, name := range []string{"hub", "bob", "alice", "observer"} {
		for _, v := range project.Services[name].Volumes {
			if v.Source != name {
				t.Errorf("%s mounts the volume of %s", name, v.Source)
			}
		}
	}
	if check := project.Services["hub"].HealthCheck; check == nil || len(check.Test) == 0 {
		t.Error("the hub has no health check")
	}
}

// host runs services as processes: volumes are folders, and the network is the
// loopback interface with free ports.
type host struct {
	t       *testing.T
	project *types.Project
	data    string // stands for /data
	path    string // PATH with our program in front
	mqtt    string // HOST:PORT of the hub
	http    string // HOST:PORT of its status pages
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, project: load(t), data: filepath.Join(t.TempDir(), "data"), mqtt: freePort(t), http: freePort(t)}
	for name := range h.project.Volumes {
		if err := os.MkdirAll(filepath.Join(h.data, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h.path = filepath.Dir(peer.Sealmq(t)) + string(os.PathListSeparator) + os.Getenv("PATH")
	t.Setenv("PATH", h.path)
	return h
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// translate turns what is true in a container into what is true here.
func (h *host) translate(text string) string {
	return strings.NewReplacer(
		"/data/", h.data+"/",
		"0.0.0.0:1883", h.mqtt,
		"hub:1883", h.mqtt,
		"127.0.0.1:8080", h.http,
	).Replace(text)
}

func (h *host) translateAll(list []string) []string {
	name, port, _ := net.SplitHostPort(h.mqtt)
	out := make([]string, len(list))
	for i, text := range list {
		out[i] = h.translate(text)
		switch { // mosquitto_sub takes them apart
		case i > 0 && list[i-1] == "-h" && text == "hub":
			out[i] = name
		case i > 0 && list[i-1] == "-p" && text == "1883":
			out[i] = port
		}
	}
	return out
}

// run is a service that was started.
type run struct {
	*peer.Process
	mu   sync.Mutex
	out  []string
	more chan struct{}
}

// start starts a service with its own entry point, command and environment.
func (h *host) start(name string) *run {
	h.t.Helper()
	s := h.project.Services[name]
	argv := slices.Concat(s.Entrypoint, s.Command)
	if s.Entrypoint == nil { // the image's own
		argv = slices.Concat([]string{"sealmq"}, s.Command)
	}
	var env []string
	for key, value := range s.Environment {
		env = append(env, key+"="+h.translate(*value))
	}
	// A service sees only the volumes that it mounts.
	for _, text := range slices.Concat(argv, env) {
		for volume := range h.project.Volumes {
			mounted := slices.ContainsFunc(s.Volumes, func(v types.ServiceVolumeConfig) bool { return v.Source == volume })
			if strings.Contains(text, "/data/"+volume) && !mounted {
				h.t.Errorf("%s uses /data/%s and does not mount it", name, volume)
			}
		}
	}
	r := &run{more: make(chan struct{})}
	argv = h.translateAll(argv)
	r.Process = peer.Start(h.t, peer.Options{Env: env, Dir: h.t.TempDir(), OnLine: r.line}, argv[0], argv[1:]...)
	return r
}

func (r *run) line(line []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.out = append(r.out, string(line))
	close(r.more)
	r.more = make(chan struct{})
}

func (r *run) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.out, "\n")
}

// wait waits for a line of stdout that want accepts.
func (r *run) wait(t *testing.T, what string, want func(string) bool) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		r.mu.Lock()
		more, found := r.more, slices.ContainsFunc(r.out, want)
		r.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-r.Exited():
			t.Fatalf("it ended before %s:\n%s\n%s", what, r.output(), r.Stderr())
		case <-timeout:
			t.Fatalf("no %s:\n%s\n%s", what, r.output(), r.Stderr())
		}
	}
}

func (r *run) succeed(t *testing.T, name string) {
	t.Helper()
	if err := r.end(); err != nil {
		t.Fatalf("%s: %v\n%s\n%s", name, err, r.output(), r.Stderr())
	}
}

func (r *run) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return r.Wait(ctx)
}

// healthy runs the hub's health check until it succeeds.
func (h *host) healthy(hub *run) {
	h.t.Helper()
	argv := h.translateAll(h.project.Services["hub"].HealthCheck.Test[1:]) // after CMD
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		out, err := exec.CommandContext(h.t.Context(), argv[0], argv[1:]...).CombinedOutput()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-hub.Exited():
			h.t.Fatalf("the hub has ended:\n%s", hub.Stderr())
		case <-deadline:
			h.t.Fatalf("the hub is not healthy: %v\n%s\n%s", err, out, hub.Stderr())
		}
	}
}

func TestCommandsOfTheFile(t *testing.T) {
	h := newHost(t)
	h.start("setup").succeed(t, "setup")
	h.start("setup").succeed(t, "setup, the second time")
	err := filepath.WalkDir(h.data, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			err = fmt.Errorf("%s has mode %v", strings.TrimPrefix(path, h.data), info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	hub := h.start("hub")
	h.healthy(hub)
	observer := h.start("observer")
	bob := h.start("bob")
	bob.wait(t, "forwarding address", func(line string) bool {
		return line == "Forwarding address: forward_to_bob"
	})

	// restart: on-failure:10
	var alice error
	for range 10 {
		if alice = h.start("alice").end(); alice == nil {
			break
		}
	}
	if alice != nil {
		t.Fatalf("alice: %v\nhub: %s", alice, hub.Stderr())
	}
	bob.wait(t, "message of Alice", func(line string) bool { return strings.Contains(line, "Hello Ockam!") })

	observer.wait(t, "frame to Bob", func(line string) bool {
		topic, payload, ok := strings.Cut(line, " ")
		return ok && strings.HasPrefix(topic, "sealmq/I") && strings.HasSuffix(topic, "/in") && payload != ""
	})
	seen := observer.output()
	for _, plain := range []string{"Hello Ockam!", hex.EncodeToString([]byte("Hello Ockam!"))} {
		if strings.Contains(seen, plain) {
			t.Errorf("the observer saw %q in the clear", plain)
		}
		if strings.Contains(hub.Stderr()+hub.output(), plain) {
			t.Errorf("the hub's log has %q", plain)
		}
	}
}
