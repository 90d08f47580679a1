package device_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// serve acknowledges what arrives at "app" and hands it to got, until the node ends.
func serve(t testing.TB, n *device.Node, got func(*device.Message)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := n.Receive(context.Background(), "app")
			if err != nil {
				return
			}
			if got != nil {
				got(m)
			}
			if err := m.Ack(); err != nil && n.Err() == nil {
				t.Error(err)
			}
		}
	}()
	t.Cleanup(func() {
		_ = n.Close()
		<-done
	})
}

// log keeps what a receiver took.
type takenLog struct {
	mu      sync.Mutex
	ids     map[device.MessageID]bool
	texts   []string
	again   int
	changed chan struct{}
}

func newTakenLog() *takenLog {
	return &takenLog{ids: make(map[device.MessageID]bool), changed: make(chan struct{}, 1)}
}

// take keeps the message with its id, once.
func (l *takenLog) take(m *device.Message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.Redelivered {
		l.again++
	}
	if l.ids[m.ID] {
		return
	}
	l.ids[m.ID] = true
	text, _ := m.Text()
	l.texts = append(l.texts, text)
}

func (l *takenLog) check(t testing.TB, n int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.texts) != n {
		t.Fatalf("%d messages taken, want %d", len(l.texts), n)
	}
	for i, s := range l.texts {
		if s != fmt.Sprint(i) {
			t.Fatalf("message %d is %q", i, s)
		}
	}
}

func (l *takenLog) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.texts)
}

func TestDeliver(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	if ch.Guarantee() != device.GuaranteePeer {
		t.Errorf("guarantee %v", ch.Guarantee())
	}
	done := make(chan error, 1)
	go func() { done <- ch.DeliverString(within(t), "app", "0") }()
	m := receive(t, bob, "0")
	select {
	case err := <-done:
		t.Fatalf("returned before the acknowledgement: %v", err)
	default:
	}
	if m.From != alice.Identifier() || m.ID.Sender != alice.Identifier() || m.ID.Count != 1 || m.Redelivered {
		t.Errorf("message %+v", m)
	}
	if err := bob.ReplyString(within(t), m, "pong"); err != nil {
		t.Fatal(err)
	}
	if err := m.Ack(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	receive(t, alice, "pong")

	// Concurrent calls, and large messages.
	taken := newTakenLog()
	serve(t, bob, taken.take)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := ch.Deliver(within(t), "app", make([]byte, 100<<10)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if taken.count() != 100 {
		t.Errorf("%d taken", taken.count())
	}
	if s := bob.Stats().Delivery; s.Handed != 101 || s.Unacknowledged != 0 || s.Outboxes != 1 {
		t.Errorf("bob's counters: %+v", s)
	}
	if s := alice.Stats().Delivery; s.Waiting != 0 || s.WaitingBytes != 0 {
		t.Errorf("alice's counters: %+v", s)
	}
	if err := ch.Deliver(within(t), "app", make([]byte, 256<<10)); !errors.Is(err, device.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if err := ch.Deliver(within(t), "nobody", nil); !errors.Is(err, device.ErrNoWorker) {
		t.Errorf("nobody there: %v", err)
	}
}

func TestDeliverWithdraws(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	ctx, cancel := context.WithCancel(within(t))
	done := make(chan error, 1)
	go func() { done <- ch.DeliverString(ctx, "app", "first") }()
	m := receive(t, bob, "first")
	cancel()
	if err := <-done; !errors.Is(err, device.ErrUnacknowledged) || !errors.Is(err, context.Canceled) {
		t.Fatalf("withdrawn: %v", err)
	}
	if err := m.Ack(); err != nil { // too late, and no harm
		t.Fatal(err)
	}
	serve(t, bob, nil)
	if err := ch.DeliverString(within(t), "app", "second"); err != nil {
		t.Fatal(err)
	}
	if err := ch.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ch.DeliverString(within(t), "app", "x"); !errors.Is(err, device.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// What was handed on and not acknowledged when the hub and all connections went away
// is settled afterwards, without being sent again.
func TestDeliverOverReconnects(t *testing.T) {
	h := startHub(t, nil)
	var net network
	bob := connect(t, h.url(), device.Config{})
	alice := connect(t, h.url(), device.Config{DialNetwork: net.dial})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	taken := newTakenLog()
	serve(t, bob, taken.take)
	const messages = 200
	for i := range messages {
		if i%80 == 20 {
			net.cut(false)
		}
		if err := ch.DeliverString(within(t), "app", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	taken.check(t, messages)
	if taken.again != 0 {
		t.Errorf("%d marked as redelivered", taken.again)
	}
}

// fastChannels notices broken channels soon.
var fastChannels = channel.Limits{Probe: 100 * time.Millisecond, Dead: 400 * time.Millisecond}

// The receiving process ends without a word and starts again: what it had not
// acknowledged comes again with the same id, and only that.
func TestDeliverToRestartedReceiver(t *testing.T) {
	h := startHub(t, nil)
	bobID := newIdentity(t)
	var net network
	bob := connect(t, h.url(), device.Config{Identity: bobID, DialNetwork: net.dial})
	alice := connect(t, h.url(), device.Config{ChannelLimits: fastChannels})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	const messages = 10
	errs := make(chan error, messages)
	var old []*device.Message
	for i := range messages {
		go func() {
			errs <- ch.DeliverString(within(t), "app", fmt.Sprint(i))
		}()
		m := receive(t, bob, fmt.Sprint(i))
		if i < 4 {
			if err := m.Ack(); err != nil {
				t.Fatal(err)
			}
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
			continue
		}
		old = append(old, m)
	}
	net.cut(true)
	_ = bob.Close()
	again := connect(t, h.url(), device.Config{Identity: bobID})
	taken := newTakenLog()
	for i := range 4 {
		taken.texts = append(taken.texts, fmt.Sprint(i))
	}
	serve(t, again, taken.take)
	if f := bobListens(t, again, channel.TrustEveryone); f.Address() != fwd.Address() {
		t.Fatal("another address")
	}
	for range messages - 4 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	taken.check(t, messages)
	if taken.again != messages-4 {
		t.Errorf("%d marked as redelivered, want %d", taken.again, messages-4)
	}
	// Who still holds one of the first process's learns that its word counts no more.
	for _, m := range old {
		if err := m.Ack(); !errors.Is(err, device.ErrClosed) {
			t.Errorf("acknowledging what was redelivered: %v", err)
		}
	}
	if ch.Restarts() == 0 {
		t.Error("the channel was never made again")
	}
}

// outboxTo opens alice's outbox to bob.
func outboxTo(t testing.TB, n *device.Node, peer identity.Identifier, fwd string) *device.Outbox {
	t.Helper()
	o, err := n.Outbox(device.Destination{Route: route.To(fwd), Peer: peer}, "app")
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// A sending process is killed and started again: what was posted arrives.
func TestOutboxSurvivesProcess(t *testing.T) {
	h := startHub(t, nil)
	dir := filepath.Join(t.TempDir(), "outbox")
	aliceID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	taken := newTakenLog()

	var net network
	alice := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir, DialNetwork: net.dial})
	o := outboxTo(t, alice, bob.Identifier(), fwd.Address())
	net.cut(true) // nothing gets out
	for i := range 20 {
		if _, err := o.Post(within(t), device.EncodeString(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if n, _ := o.Pending(); n != 20 || o.Last().Count != 20 {
		t.Errorf("%d pending, last %v", n, o.Last())
	}
	_ = alice.Close()

	if _, err := device.Connect(within(t), h.url(), device.Config{Identity: newIdentity(t), OutboxDir: dir}); !errors.Is(err, device.ErrOutboxIdentity) {
		t.Errorf("another identity: %v", err)
	}
	serve(t, bob, taken.take)
	again := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir})
	if _, err := device.Connect(within(t), h.url(), device.Config{Identity: aliceID, Suffix: "2", OutboxDir: dir}); !errors.Is(err, device.ErrOutboxInUse) {
		t.Errorf("second process: %v", err)
	}
	// Nothing needs to be called for them to arrive.
	eventually(t, "all have arrived", func() bool { return taken.count() == 20 })
	o = outboxTo(t, again, bob.Identifier(), fwd.Address())
	if o.Last().Count != 20 {
		t.Errorf("last %v", o.Last())
	}
	if err := o.Deliver(within(t), device.EncodeString("20")); err != nil {
		t.Fatal(err)
	}
	taken.check(t, 21)
	if n, _ := o.Pending(); n != 0 || len(again.Outboxes()) != 1 {
		t.Errorf("%d pending, %d outboxes", n, len(again.Outboxes()))
	}
	_ = again.Close()

	third := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir})
	o = outboxTo(t, third, bob.Identifier(), fwd.Address())
	if n, _ := o.Pending(); n != 0 || o.Last().Count != 21 {
		t.Errorf("%d pending, last %v", n, o.Last())
	}
	if err := o.Forget(); err != nil {
		t.Fatal(err)
	}
	_ = third.Close()
	fourth := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir})
	if len(fourth.Outboxes()) != 0 {
		t.Error("forgotten outbox came back")
	}
}

// Of what an earlier process has posted nobody has a receipt. Where this one gives it up, an
// event says so: once, and no other message is lost.
func TestToldOfWhatAnEarlierProcessPosted(t *testing.T) {
	h := startHub(t, nil)
	dir := filepath.Join(t.TempDir(), "outbox")
	aliceID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	var net network
	alice := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir, DialNetwork: net.dial})
	o := outboxTo(t, alice, bob.Identifier(), fwd.Address())
	net.cut(true)
	for _, size := range []int{200_000, 10, 200_000} {
		if _, err := o.Post(within(t), make([]byte, size)); err != nil {
			t.Fatal(err)
		}
	}
	_ = alice.Close()
	h.stop()
	startHub(t, h, func(c *bridge.Config) { c.Limits.Frame = 16 << 10 }) // an operator lowers the limit

	events := make(chan device.Event, 64)
	again := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir, OnEvent: func(e device.Event) {
		if e.Kind == device.EventSendFailed {
			events <- e
		}
	}})
	taken := newTakenLog()
	serve(t, bob, taken.take)
	o = outboxTo(t, again, bob.Identifier(), fwd.Address())
	if err := o.Deliver(within(t), device.EncodeString("0")); err != nil {
		t.Fatal(err)
	}
	if n, _ := o.Pending(); n != 0 || taken.count() != 2 {
		t.Errorf("%d messages wait, %d have arrived", n, taken.count())
	}
	_ = again.Close() // and all events are out
	close(events)
	var told []string
	for e := range events {
		if !errors.Is(e.Err, device.ErrTooLarge) || e.Outbox != o {
			t.Errorf("event: %+v", e)
		}
		told = append(told, e.Err.Error())
	}
	if len(told) != 2 || !strings.Contains(told[0], "message 1 ") || !strings.Contains(told[1], "message 3 ") {
		t.Errorf("told %q", told)
	}
}

// An outbox folder that is put back from a backup knows less than the peer: that is
// said at once, and another outbox works.
func TestOutboxFromOldBackup(t *testing.T) {
	h := startHub(t, nil)
	dir := filepath.Join(t.TempDir(), "outbox")
	backup := filepath.Join(t.TempDir(), "backup")
	aliceID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	taken := newTakenLog()
	serve(t, bob, taken.take)
	run := func(n int, then func()) {
		t.Helper()
		alice := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir})
		for range n {
			if err := outboxTo(t, alice, bob.Identifier(), fwd.Address()).Deliver(within(t), device.EncodeString(fmt.Sprint(taken.count()))); err != nil {
				t.Fatal(err)
			}
		}
		_ = alice.Close()
		then()
	}
	run(1, func() {
		if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	})
	run(2, func() {
		if err := errors.Join(os.RemoveAll(dir), os.Rename(backup, dir), os.Chmod(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
		files, err := os.ReadDir(dir)
		for _, f := range files {
			err = errors.Join(err, os.Chmod(filepath.Join(dir, f.Name()), 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
	})

	events := make(chan device.Event, 64)
	alice := connect(t, h.url(), device.Config{Identity: aliceID, OutboxDir: dir, OnEvent: func(e device.Event) { events <- e }})
	o := outboxTo(t, alice, bob.Identifier(), fwd.Address())
	if err := o.Deliver(within(t), device.EncodeString("a count that was used")); !errors.Is(err, device.ErrOutboxBehind) {
		t.Fatalf("Deliver: %v", err)
	}
	if _, err := o.Post(within(t), nil); !errors.Is(err, device.ErrOutboxBehind) {
		t.Errorf("Post: %v", err)
	}
	for e := range events {
		if e.Kind == device.EventOutboxEnded {
			if e.Outbox != o || !errors.Is(e.Err, device.ErrOutboxBehind) {
				t.Errorf("event: %+v", e)
			}
			break
		}
	}
	if err := o.Forget(); err != nil {
		t.Fatal(err)
	}
	if err := outboxTo(t, alice, bob.Identifier(), fwd.Address()).Deliver(within(t), device.EncodeString("3")); err != nil {
		t.Fatal(err)
	}
	taken.check(t, 4)
}

func TestOutboxFolderIsPrivate(t *testing.T) {
	h := startHub(t, nil)
	dir := t.TempDir() // 0755 or wider
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := device.Connect(within(t), h.url(), device.Config{Identity: newIdentity(t), OutboxDir: dir}); !errors.Is(err, device.ErrOutboxOpen) {
		t.Errorf("wide folder: %v", err)
	}
}

// The outbox waits for a peer that is not there, with one first message at a time.
func TestOutboxWaitsForSleeper(t *testing.T) {
	h := startHub(t, nil)
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	_ = bob.Close()
	alice := connect(t, h.url(), device.Config{})
	o := outboxTo(t, alice, bobID.Identifier(), fwd.Address())
	r, err := o.Post(within(t), device.EncodeString("0"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "some tries have failed", func() bool { return alice.Stats().Channels.Failed >= 2 })
	if q := alice.Stats().QueuedFrames; q > 1 {
		t.Errorf("%d frames wait", q)
	}
	bob = connect(t, h.url(), device.Config{Identity: bobID})
	taken := newTakenLog()
	serve(t, bob, taken.take)
	bobListens(t, bob, channel.TrustEveryone)
	if err := r.Wait(within(t)); err != nil {
		t.Fatal(err)
	}
	if r.Err() != nil || r.ID().Count != 1 {
		t.Errorf("receipt %v, %v", r.ID(), r.Err())
	}
	taken.check(t, 1)
	if n := bob.Stats().Channels.Accepted; n != 1 {
		t.Errorf("%d channels accepted", n)
	}
}

// Against a peer that cannot acknowledge, Deliver says so at once and Send works.
func TestDeliverNeedsTheFeature(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{})
	bob := connect(t, h.url(), device.Config{}.WithoutDelivery())
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	if ch.Guarantee() != device.GuaranteeHub || ch.Guarantee().String() != "hub" {
		t.Errorf("guarantee %v", ch.Guarantee())
	}
	if err := ch.DeliverString(within(t), "app", "x"); !errors.Is(err, device.ErrNoDelivery) {
		t.Errorf("deliver: %v", err)
	}
	to := device.Destination{Route: route.To(fwd.Address()), Peer: bob.Identifier()}
	if err := alice.Deliver(within(t), to, "app", nil); !errors.Is(err, device.ErrNoDelivery) {
		t.Errorf("deliver through an outbox: %v", err)
	}
	if err := errors.Join(ch.SendString(within(t), "app", "plain"), ch.Flush(within(t))); err != nil {
		t.Fatal(err)
	}
	receive(t, bob, "plain")
}

// Two devices fill each other's queues at the hub, with messages and with the
// acknowledgements of the other's: neither waits for the other, and all of it arrives.
func TestTwoDevicesFillEachOthersQueues(t *testing.T) {
	const messages = 500
	h := startHub(t, nil, func(c *bridge.Config) { c.OutboxFrames = 1 })
	var nodes [2]*device.Node
	var addresses [2]string
	var took [2]*takenLog
	for i := range nodes {
		nodes[i] = connect(t, h.url(), device.Config{})
		addresses[i] = bobListens(t, nodes[i], channel.TrustEveryone).Address()
		took[i] = newTakenLog()
		serve(t, nodes[i], took[i].take)
	}
	var senders sync.WaitGroup
	for i, n := range nodes {
		o := outboxTo(t, n, nodes[1-i].Identifier(), addresses[1-i])
		senders.Go(func() {
			for k := range messages {
				if _, err := o.Post(within(t), device.EncodeString(fmt.Sprint(k))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	full := false // a queue was, and acknowledgements were withheld
	eventually(t, "all have arrived", func() bool {
		full = full || h.bridge.Counters().Waiting > 0
		return took[0].count() == messages && took[1].count() == messages
	})
	senders.Wait()
	took[0].check(t, messages)
	took[1].check(t, messages)
	if !full {
		t.Error("no queue was ever full")
	}
}

// A peer whose program reads nothing slows its sender, and fills no queue of the hub.
func TestPeerThatDoesNotReadSlowsItsSender(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{OutboxMessages: 1000}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	o := outboxTo(t, alice, bob.Identifier(), fwd.Address())
	for range 1000 {
		if _, err := o.Post(t.Context(), make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	const window = 512
	eventually(t, "a window is there", func() bool { return bob.Stats().Delivery.Unacknowledged == window })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := o.Post(ctx, nil); !errors.Is(err, device.ErrTimeout) {
		t.Errorf("posted into a full outbox: %v", err)
	}
	eventually(t, "the hub holds nothing", func() bool { return h.bridge.Counters().Queued == 0 })
	if n := bob.Stats().Delivery.Unacknowledged; n != window {
		t.Errorf("the peer holds %d messages, the window is %d", n, window)
	}
	serve(t, bob, nil)
	eventually(t, "all taken", func() bool { n, _ := o.Pending(); return n == 0 })
}
