package chaos

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// envRole makes the test binary play a device instead.
const envRole = "SEALMQ_CHAOS_ROLE"

func TestMain(m *testing.M) {
	if text := os.Getenv(envRole); text != "" {
		if err := play(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// role is what a child process is told.
type role struct {
	Name    string // its own
	Kind    string // receiver or sender, plain-hub, plain-receiver or plain-sender
	Hub     string // URL
	Home    string // folder of its own
	To      string // sender: the forwarding address, or the topic of the plain receiver
	Peer    string // sender: the identifier to expect
	Streams int    // how many addresses of each receiver take messages of each sender
	N       uint64 // sender: how many messages on each stream
	PerTick int    // sender: messages on each stream each 10 ms; 0: as fast as it goes
}

// part is what the role plays, whatever it plays it with.
func (r *role) part() string { return strings.TrimPrefix(r.Kind, plainPrefix) }

// line is one line of a child's output.
type line struct {
	Event   string // ready, posted, done, violation
	Address string `json:",omitempty"`
	ID      string `json:",omitempty"`
	Text    string `json:",omitempty"`
	N       uint64 `json:",omitempty"`
}

func say(l line) {
	b, err := json.Marshal(l)
	if err != nil {
		panic(err) // a struct of strings and numbers
	}
	_, _ = os.Stdout.Write(append(b, '\n')) // the parent may have gone
}

func play(text string) error {
	var r role
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch r.Kind {
	case "receiver":
		return r.receive(ctx)
	case "sender":
		return r.send(ctx)
	case "plain-hub":
		return r.plainHub(ctx)
	case "plain-receiver":
		return r.plainReceive(ctx)
	case "plain-sender":
		return r.plainSend(ctx)
	}
	return fmt.Errorf("no role %q", r.Kind)
}

// connect connects the role's device.
func (r *role) connect(ctx context.Context) (*device.Node, error) {
	v, err := identity.OpenVault(filepath.Join(r.Home, "vault"))
	if err != nil {
		return nil, err
	}
	id, err := v.Load("me")
	if errors.Is(err, identity.ErrNotFound) {
		id, err = v.Create("me")
	}
	if err != nil {
		return nil, err
	}
	registry, err := identity.OpenRegistry(filepath.Join(r.Home, "peers"), 0)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(r.Home, "log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	cfg := device.Config{
		Identity: id, Registry: registry, KeepTrying: true,
		Logger:    slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		OutboxDir: filepath.Join(r.Home, "outbox"), KnownHubs: filepath.Join(r.Home, "hubs"),
	}
	return device.Connect(ctx, r.Hub, cfg)
}

// content is message n of a sender: who, number, padding that follows from both,
// checksum.
func content(from string, n uint64) []byte {
	b := make([]byte, 0, 128)
	b = append(b, byte(len(from)))
	b = append(b, from...)
	b = binary.BigEndian.AppendUint64(b, n)
	for i := range n % 97 {
		b = append(b, byte(i*n))
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// parseContent checks a message and says whose it is.
func parseContent(b []byte) (from string, n uint64, err error) {
	body := len(b) - sha256.Size
	if body < 9 || len(b) < int(b[0])+9 {
		return "", 0, errors.New("too short")
	}
	if sum := sha256.Sum256(b[:body]); string(sum[:]) != string(b[body:]) {
		return "", 0, errors.New("altered: the checksum does not match")
	}
	from = string(b[1 : 1+b[0]])
	return from, binary.BigEndian.Uint64(b[1+len(from):]), nil
}

// state is what a receiver keeps on disk: one line for each message that it took,
// written before it is acknowledged.
type state struct {
	f *os.File

	mu   sync.Mutex
	last map[string]taken // by stream
}

// taken is the last message of a stream and the outbox that it came from.
type taken struct {
	n      uint64
	outbox string
}

func openState(path string) (*state, error) {
	s := &state{last: make(map[string]taken)}
	err := eachTaken(path, func(from string, n uint64, outbox string) error {
		s.last[from] = taken{n, outbox}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.f, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	return s, err
}

// eachTaken reads the lines of a state file. A line that a kill cut short is none.
func eachTaken(path string, visit func(from string, n uint64, outbox string) error) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	in := bufio.NewScanner(f)
	for in.Scan() {
		var from, outbox string
		var n uint64
		if _, err := fmt.Sscanf(in.Text(), "%s %s %d.", &from, &outbox, &n); err != nil {
			return fmt.Errorf("%s: %q: %w", path, in.Text(), err)
		}
		if err := visit(from, n, outbox); err != nil {
			return err
		}
	}
	return in.Err()
}

func (s *state) take(from string, n uint64, outbox string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last[from] = taken{max(n, s.last[from].n), outbox}
	_, err := fmt.Fprintf(s.f, "%s %s %d.\n", from, outbox, n) // one write: a kill leaves it whole
	return err
}

func (s *state) of(from string) taken {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last[from]
}

// streamName says whose the messages of a sender's stream are, and app where they go.
func streamName(sender string, stream int) string { return fmt.Sprintf("%s/%d", sender, stream) }
func app(stream int) string                       { return fmt.Sprintf("app%d", stream) }

// receive takes messages and acknowledges each once it is on disk.
func (r *role) receive(ctx context.Context) error {
	st, err := openState(filepath.Join(r.Home, "taken"))
	if err != nil {
		return err
	}
	node, err := r.connect(ctx)
	if err != nil {
		return err
	}
	for i := range r.Streams {
		if err := node.OpenMailbox(app(i)); err != nil {
			return err
		}
	}
	if _, err := node.Listen("listener", channel.TrustEveryone); err != nil {
		return err
	}
	fwd, err := node.CreateForwarder(ctx, "listener")
	if err != nil {
		return err
	}
	say(line{Event: "ready", Address: fwd.Address(), ID: node.Identifier().String()})
	ended := make(chan error, r.Streams)
	for i := range r.Streams {
		go func() { ended <- r.takeAll(ctx, node, app(i), st) }()
	}
	for range r.Streams {
		if err := <-ended; err != nil && ctx.Err() == nil {
			return err
		}
	}
	return node.Close()
}

// takeAll takes what comes to one address, until ctx ends.
func (r *role) takeAll(ctx context.Context, node *device.Node, at string, st *state) error {
	own := make(map[string]uint64) // the last of each stream that this process was given
	for {
		m, err := node.Receive(ctx, at)
		if err != nil {
			return err
		}
		from, n, err := parseContent(m.Payload)
		if err != nil {
			say(line{Event: "violation", Text: "altered", ID: err.Error()})
			continue
		}
		last, outbox := st.of(from), fmt.Sprintf("%v/%x", m.ID.Sender, m.ID.Outbox)
		if m.ID.Count != n || last.n > 0 && outbox != last.outbox {
			say(line{Event: "violation", Text: "named " + m.ID.String() + " after " + last.outbox, ID: from, N: n})
		}
		if n > last.n || n <= own[from] || !m.Redelivered { // the verdict says whether that is right
			if err := st.take(from, n, outbox); err != nil {
				return err
			}
		} // else taken by an earlier process, which ended before the sender heard of it
		own[from] = max(own[from], n)
		if err := m.Ack(); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "ack:", err)
		}
	}
}

// send posts the messages of its streams and is done when the peer's program has
// acknowledged all of them.
func (r *role) send(ctx context.Context) error {
	peer, err := identity.ParseIdentifier(r.Peer)
	if err != nil {
		return err
	}
	node, err := r.connect(ctx)
	if err != nil {
		return err
	}
	boxes := make([]*device.Outbox, r.Streams)
	for i := range boxes {
		if boxes[i], err = node.Outbox(device.Destination{Route: route.To(r.To), Peer: peer}, app(i)); err != nil {
			return err
		}
	}
	say(line{Event: "ready"})
	posted := make(chan error, len(boxes))
	for i, box := range boxes {
		go func() { posted <- r.post(ctx, box, streamName(r.Name, i)) }()
	}
	for range boxes {
		select {
		case err := <-posted:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	say(line{Event: "posted"})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for _, box := range boxes {
		for {
			if n, _ := box.Pending(); n == 0 {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	say(line{Event: "done"})
	<-ctx.Done()
	return node.Close()
}

// post posts the messages of one stream, from where an earlier process ended. It takes
// no notice of ctx within Post: a message whose Post is given up is withdrawn, and its
// count, which here is its number, is not used again. Who is told to end leaves Post at
// it, as a kill does.
func (r *role) post(ctx context.Context, box *device.Outbox, from string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := box.Last().Count + 1; n <= r.N; n++ {
		if _, err := box.Post(context.WithoutCancel(ctx), content(from, n)); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if r.PerTick > 0 && n%uint64(r.PerTick) == 0 {
			<-tick.C
		}
	}
	return nil
}
