// Package rustpeer drives stock Rust Ockam nodes (crate ockam 0.150.0) from
// Go tests. The program is integration/rust; its README lists the commands.
//
// A test starts a node with [Start] and tells it what to be:
//
//	bob := rustpeer.Start(t)
//	id := bob.Identity("bob")
//	bob.Connect("hub", hubAddr)
//	bob.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: "bob", Open: []string{"hub"}})
//	bob.Worker("sink", "app", "listener")
//	relay, err := bob.Relay("@hub", "")
//
// Names are the test's own: identities, connections, TCP listeners, channels
// and slots each have one. A route is a list of local addresses; "@NAME" in it
// stands for a connection or channel of that node. Open lists from whom what
// is started can be reached: the names of connections, TCP listeners, channels
// and, by their address, channel listeners. Nothing is open by default.
//
// Methods that set something up fail the test when they cannot, so they belong
// on the test's goroutine. Those whose failure is a possible outcome return an
// error; they and [Node.Call] may be used from any goroutine.
package rustpeer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// Version is the version of the ockam crate that the nodes run on.
const Version = "0.150.0"

// callTimeout bounds a command whose own time-out, if it has one, failed.
const callTimeout = 2 * time.Minute

// ErrGone says that the node's process ended before it answered.
var ErrGone = errors.New("rustpeer: the node's process has ended")

// CallError is a command's own answer that it failed, in the crate's words.
type CallError struct {
	Command string
	Message string
}

func (e *CallError) Error() string { return "rustpeer: " + e.Command + ": " + e.Message }

var build struct {
	once   sync.Once
	binary string
	err    error
}

// Binary returns the path of the node's program, built if need be. The first
// build takes minutes, later ones a moment: cargo keeps its output in the folder
// CARGO_TARGET_DIR, by default sealmq/rust in the user's cache folder. Without
// cargo the test ends as [peer.Missing] says; a build that fails is always a
// failure.
func Binary(t testing.TB) string {
	t.Helper()
	cargo, err := exec.LookPath("cargo")
	if err != nil {
		peer.Missing(t, "cargo (Rust 1.85 or later)", "install Rust, then run `make rust-peers`")
	}
	dir := filepath.Join(peer.ModuleRoot(t), "integration", "rust")
	build.once.Do(func() {
		target := os.Getenv("CARGO_TARGET_DIR")
		if target == "" {
			cache, err := os.UserCacheDir()
			if err != nil {
				build.err = fmt.Errorf("no folder to build the Rust node in, set CARGO_TARGET_DIR: %w", err)
				return
			}
			target = filepath.Join(cache, "sealmq", "rust")
		}
		cmd := exec.Command(cargo, "build", "--release", "--locked", "--quiet", "--target-dir", target)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("cargo build in integration/rust: %w\n%s", err, out)
			return
		}
		build.binary = filepath.Join(target, "release", "peer")
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.binary
}

// Program returns the path of another program of the crate, built as [Binary]'s.
func Program(t testing.TB, name string) string {
	t.Helper()
	return filepath.Join(filepath.Dir(Binary(t)), name)
}

// Node is a running Rust node.
type Node struct {
	t       testing.TB
	process *peer.Process
	next    atomic.Uint64

	write sync.Mutex // one line at a time on stdin

	mu     sync.Mutex
	calls  map[uint64]chan answer
	inbox  map[string][]Message // by the worker's address, oldest first
	arrive chan struct{}        // closed and replaced when inbox grows
	ready  chan struct{}        // closed by the first event
}

type answer struct {
	Ok    json.RawMessage
	Error string
}

// Start runs a node until the test ends. Its log is at level warn, or at what
// OCKAM_LOG_LEVEL says, and is shown when the test fails.
func Start(t testing.TB) *Node {
	t.Helper()
	n := &Node{
		t:      t,
		calls:  make(map[uint64]chan answer),
		inbox:  make(map[string][]Message),
		arrive: make(chan struct{}),
		ready:  make(chan struct{}),
	}
	n.process = peer.Start(t, peer.Options{Env: []string{"OCKAM_SQLITE_IN_MEMORY=true"}, OnLine: n.line}, Binary(t))
	select {
	case <-n.ready:
	case <-n.process.Exited():
		t.Fatalf("the Rust node ended at once:\n%s", n.process.Stderr())
	case <-time.After(callTimeout):
		t.Fatal("the Rust node does not start")
	}
	return n
}

// line takes one line of the node's output.
func (n *Node) line(line []byte) {
	var msg struct {
		ID    uint64
		Ok    json.RawMessage
		Error string
		Event string
		Message
	}
	if err := json.Unmarshal(line, &msg); err != nil {
		fmt.Fprintf(os.Stderr, "rustpeer: not JSON: %s\n", line)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case msg.Event == "ready":
		close(n.ready)
	case msg.Event == "message":
		n.inbox[msg.At] = append(n.inbox[msg.At], msg.Message)
		close(n.arrive)
		n.arrive = make(chan struct{})
	case msg.ID != 0:
		if c, ok := n.calls[msg.ID]; ok {
			delete(n.calls, msg.ID)
			c <- answer{msg.Ok, msg.Error} // has room for its one answer
		}
	}
}

// Args are the fields of a command.
type Args map[string]any

// Call runs any command and decodes its answer into out unless that is nil.
// The node runs commands side by side; a test that wants an order waits for
// each answer. The error is a [*CallError], [ErrGone] or the context's.
func (n *Node) Call(ctx context.Context, command string, args Args, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	id := n.next.Add(1)
	fields := Args{"id": id, "cmd": command}
	for k, v := range args {
		fields[k] = v
	}
	line, err := json.Marshal(fields)
	if err != nil {
		return fmt.Errorf("rustpeer: %s: %w", command, err)
	}
	c := make(chan answer, 1)
	n.mu.Lock()
	n.calls[id] = c
	n.mu.Unlock()
	n.write.Lock()
	_, err = n.process.Stdin().Write(append(line, '\n'))
	n.write.Unlock()
	if err != nil {
		return fmt.Errorf("rustpeer: %s: %w", command, ErrGone)
	}
	select {
	case a := <-c:
		return a.decode(command, out)
	case <-ctx.Done():
		return fmt.Errorf("rustpeer: %s: %w", command, ctx.Err())
	case <-n.process.Exited():
		select {
		case a := <-c: // its last words
			return a.decode(command, out)
		default:
			return fmt.Errorf("rustpeer: %s: %w", command, ErrGone)
		}
	}
}

func (a answer) decode(command string, out any) error {
	if a.Error != "" {
		return &CallError{Command: command, Message: a.Error}
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(bytes.NewReader(a.Ok)).Decode(out); err != nil {
		return fmt.Errorf("rustpeer: answer to %s: %w", command, err)
	}
	return nil
}

// must runs a command that has to work.
func (n *Node) must(command string, args Args, out any) {
	n.t.Helper()
	if err := n.Call(context.Background(), command, args, out); err != nil {
		n.t.Fatal(err)
	}
}

// Quit shuts the node down in good order, and waits for the end of its process.
// The node sends Close on every live channel, but on a busy machine its own end
// outruns them: call Close first where it matters.
func (n *Node) Quit() {
	n.t.Helper()
	n.must("quit", nil, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := n.process.Wait(ctx); err != nil {
		n.t.Fatal(err)
	}
}

// Kill ends the process as a crash would: nobody is told.
func (n *Node) Kill() {
	n.process.Kill()
	<-n.process.Exited()
}

// Process is the node's process, for its log and its end.
func (n *Node) Process() *peer.Process { return n.process }
