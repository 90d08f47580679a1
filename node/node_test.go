package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newNode returns a node that is shut down at the end of the test.
func newNode(t testing.TB, cfg Config) *Node {
	t.Helper()
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := n.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return n
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// peer is a verified identifier; the node does not look into it.
var peer = identity.Identifier{1, 2, 3}

var (
	fromForwarder = Origin{Via: Forwarded, Source: "dev_1"}
	fromChannel   = Origin{Via: Channel, Peer: peer, Listener: "listener", Encryptor: "enc1"}
	fromDialled   = Origin{Via: Channel, Peer: peer, Encryptor: "enc2"}
)

func frame(to, payload string) route.Frame {
	return route.Frame{Onward: route.To(to), Return: route.To("dev_1", "reply"), Payload: []byte(payload)}
}

func receive(t testing.TB, n *Node, addr string) *Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	m, err := n.Receive(ctx, addr)
	must(t, err)
	return m
}

func TestMailbox(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.OpenMailbox("app", Access{Channels: true}))
	payload := []byte("\x0cHello Ockam!")
	f := route.Frame{Onward: route.To("app", "more"), Return: route.To("enc1", "x"), Payload: payload}
	if d := n.Inject(fromChannel, f, route.Transient); d != 0 {
		t.Fatalf("dropped: %v", d)
	}
	payload[1] = 'X' // queued messages hold copies
	m := receive(t, n, "app")
	if text, err := m.Text(); err != nil || text != "Hello Ockam!" || m.String() != text {
		t.Errorf("text %q, %v", text, err)
	}
	if m.From != peer || m.Address != "app" || !m.Onward.Equal(route.To("more")) ||
		!m.ReturnRoute.Equal(route.To("enc1", "x")) || m.Class != route.Transient || m.Origin.Listener != "listener" {
		t.Errorf("message %+v", m)
	}
	if m.ID.IsZero() || m.ID.Sender != peer || m.Redelivered || m.Ack() != nil || m.Ack() != nil {
		t.Errorf("id %v", m.ID)
	}
	must(t, n.Send(t.Context(), route.Frame{Onward: route.To("app"), Payload: []byte{0xff}}, route.Stored))
	l := receive(t, n, "app")
	if l.Origin.Via != Local || !l.From.IsZero() || l.ID == m.ID {
		t.Errorf("local message %+v", l)
	}
	if _, err := l.Text(); err == nil || l.String() != `"\xff"` {
		t.Errorf("text of a broken string: %q, %v", l, err)
	}
	if s := fmt.Sprint(l.LogValue()); strings.Contains(s, "xff") || !strings.Contains(s, "app") {
		t.Errorf("log value %s", s)
	}
}

// TestReceiveErrors: an address that is not a mailbox is an error, not an opening.
func TestReceiveErrors(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.Handle("cb", Access{}, func(context.Context, *Message) {}))
	must(t, n.OpenMailbox("app", Access{}))
	for _, addr := range []string{"nobody", "cb", ""} {
		if _, err := n.Receive(t.Context(), addr); !errors.Is(err, ErrNotMailbox) {
			t.Errorf("%q: %v", addr, err)
		}
	}
	if n.Has("nobody") {
		t.Error("receiving opened an address")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := n.Receive(ctx, "app"); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
	for addr, want := range map[string]error{"app": ErrAddressInUse, "": ErrBadAddress, strings.Repeat("x", 256): ErrBadAddress} {
		if err := n.OpenMailbox(addr, Access{}); !errors.Is(err, want) {
			t.Errorf("open %q: %v", addr, err)
		}
		if err := n.Handle(addr, Access{}, func(context.Context, *Message) {}); !errors.Is(err, want) {
			t.Errorf("handle %q: %v", addr, err)
		}
	}
	if err := n.Alias("me", "me", Access{}); !errors.Is(err, ErrBadAddress) {
		t.Errorf("alias of itself: %v", err)
	}
	if _, err := New(Config{MaxWorkers: -1}); err == nil {
		t.Error("negative limit accepted")
	}
	small := newNode(t, Config{MaxWorkers: 1})
	must(t, small.OpenMailbox("a", Access{}))
	if err := small.OpenMailbox("b", Access{}); !errors.Is(err, ErrTooManyWorkers) {
		t.Errorf("too many workers: %v", err)
	}
}

// TestAccess: an address is reached only by what it has been opened to.
func TestAccess(t *testing.T) {
	unknown := Origin{Via: 9}
	for _, c := range []struct {
		name   string
		access Access
		open   []Origin
		closed []Origin
	}{
		{"closed", Access{}, nil, []Origin{fromForwarder, fromChannel, fromDialled, {}, unknown}},
		{"forwarders", Access{Forwarders: true}, []Origin{fromForwarder}, []Origin{fromChannel, fromDialled, {}, unknown}},
		{"channels", Access{Channels: true}, []Origin{fromChannel, fromDialled}, []Origin{fromForwarder, {}, unknown}},
		{
			"one listener", Access{Listeners: []string{"listener"}},
			[]Origin{fromChannel},
			[]Origin{fromForwarder, fromDialled, {Via: Channel, Listener: "other"}, {Via: Forwarded, Listener: "listener"}, {}},
		},
		{"no listener's name", Access{Listeners: []string{""}, Encryptors: []string{""}}, nil, []Origin{fromDialled, {Via: Channel}, fromChannel}},
		{"one channel", Access{Encryptors: []string{"enc2"}}, []Origin{fromDialled}, []Origin{fromForwarder, fromChannel, {}}},
		{"all", Access{Forwarders: true, Channels: true}, []Origin{fromForwarder, fromChannel, fromDialled}, []Origin{{}, unknown}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, Config{Uplink: UplinkFunc(func(context.Context, route.Frame, route.Class) error {
				t.Error("a frame from outside left the node")
				return nil
			})})
			must(t, n.OpenMailbox("app", c.access))
			for _, o := range c.open {
				if d := n.Inject(o, frame("app", "x"), 0); d != 0 {
					t.Errorf("%+v refused: %v", o, d)
				}
			}
			for _, o := range append(c.closed, Origin{Via: Local}) {
				if d := n.Inject(o, frame("app", "x"), 0); d != DropRefused {
					t.Errorf("%+v: %v, want refused", o, d)
				}
			}
			for _, o := range append(c.open, c.closed...) {
				if d := n.Inject(o, frame("elsewhere", "x"), 0); d != DropUnknown {
					t.Errorf("%+v to an unknown address: %v", o, d)
				}
			}
			must(t, n.Send(t.Context(), frame("app", "local"), 0))
			if !n.SetAccess("app", Access{Forwarders: true}) || n.Inject(fromForwarder, frame("app", "x"), 0) != 0 {
				t.Error("opening later has no effect")
			}
			if !n.SetAccess("app", Access{}) || n.Inject(fromForwarder, frame("app", "x"), 0) != DropRefused {
				t.Error("closing later has no effect")
			}
			if n.SetAccess("nobody", Access{}) {
				t.Error("access of nobody")
			}
			if got, want := n.Stats().Dropped[DropRefused], uint64(len(c.closed)+2); got != want {
				t.Errorf("%d refused, want %d", got, want)
			}
		})
	}
}

// TestEncryptorIsClosed: what could be sealed as our own words is never reached from
// outside, although it was registered like everything else of a channel.
func TestEncryptorIsClosed(t *testing.T) {
	n := newNode(t, Config{})
	calls := 0
	must(t, n.RegisterFunc("enc1", Access{Forwarders: true, Channels: true}, func(route.Frame, route.Class, Origin) { calls++ }))
	must(t, n.OpenMailbox("app", Access{Channels: true}))
	if d := n.Inject(fromChannel, frame("app", "x"), 0); d != 0 {
		t.Fatal(d)
	}
	for _, o := range []Origin{fromForwarder, fromChannel, fromDialled} {
		if d := n.Inject(o, frame("enc1", "forged"), 0); d != DropRefused {
			t.Errorf("%v: %v", o.Via, d)
		}
	}
	must(t, n.Send(t.Context(), frame("enc1", "own"), 0))
	if calls != 1 {
		t.Errorf("%d frames reached the encryptor", calls)
	}
}

func TestDropReasons(t *testing.T) {
	n := newNode(t, Config{MailboxMessages: 1})
	must(t, n.OpenMailbox("app", Access{Forwarders: true}))
	must(t, n.Alias("l1", "l2", Access{Forwarders: true}))
	must(t, n.Alias("l2", "l1", Access{Forwarders: true}))
	for _, c := range []struct {
		f    route.Frame
		want Drop
		err  error
	}{
		{route.Frame{}, DropHeartbeat, ErrNoRoute},
		{route.Frame{Onward: route.Route{{Transport: route.TCP, Value: "host:1"}}}, DropTransport, ErrRefused},
		{frame("nobody", ""), DropUnknown, ErrUnknownAddress},
		{frame("app", ""), 0, nil},
		{frame("app", ""), DropFull, ErrFull},
		{frame("l1", ""), DropLoop, ErrRefused},
	} {
		if d := n.Inject(fromForwarder, c.f, 0); d != c.want {
			t.Errorf("inject %v: %v, want %v", c.f.Onward, d, c.want)
		}
		if c.want == 0 {
			continue
		}
		if err := n.Send(t.Context(), c.f, 0); !errors.Is(err, c.err) {
			t.Errorf("send %v: %v, want %v", c.f.Onward, err, c.err)
		}
	}
	s := n.Stats()
	for _, d := range []Drop{DropHeartbeat, DropTransport, DropUnknown, DropFull, DropLoop} {
		if s.Dropped[d] != 2 {
			t.Errorf("%v counted %d times, want 2", d, s.Dropped[d])
		}
	}
	if s.Delivered != 1 || s.Workers != 3 {
		t.Errorf("stats %+v", s)
	}
	seen := map[string]bool{}
	for d := DropHeartbeat; d <= drops; d++ {
		if d.String() == "" || seen[d.String()] {
			t.Errorf("drop %d is %q", d, d)
		}
		seen[d.String()] = true
	}
}

// TestOverflow: the newest is dropped, counted, and reported in its place.
func TestOverflow(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		size int
		fit  int
	}{
		{"messages", Config{MailboxMessages: 3}, 10, 3},
		{"bytes", Config{MailboxBytes: 3000}, 999 - perMessage, 3},
		{"one too large", Config{MailboxBytes: 1000}, 5000, 1},
		{"defaults, messages", Config{}, 0, 1024},
		{"defaults, bytes", Config{}, 1 << 20, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, c.cfg)
			must(t, n.OpenMailbox("app", Access{Forwarders: true}))
			put := func(tag byte) Drop {
				f := frame("app", "")
				f.Payload = make([]byte, c.size+1)
				f.Payload[0] = tag
				return n.Inject(fromForwarder, f, 0)
			}
			for i := range c.fit {
				if d := put(byte(i)); d != 0 {
					t.Fatalf("message %d: %v", i, d)
				}
			}
			for range 5 {
				if d := put(0xee); d != DropFull {
					t.Fatalf("full mailbox: %v", d)
				}
			}
			if m := receive(t, n, "app"); m.Payload[0] != 0 {
				t.Errorf("first is %d", m.Payload[0])
			}
			if d := put(0xaa); d != 0 {
				t.Fatalf("after reading one: %v", d)
			}
			for i := 1; i < c.fit; i++ {
				if m := receive(t, n, "app"); m.Payload[0] != byte(i) {
					t.Fatalf("message %d is %d", i, m.Payload[0])
				}
			}
			var lost *LostError
			if m, err := n.Receive(t.Context(), "app"); !errors.As(err, &lost) || lost.Count != 5 || lost.Address != "app" || m != nil {
				t.Errorf("loss reported as %v", err)
			}
			if m := receive(t, n, "app"); m.Payload[0] != 0xaa || m.Lost != 0 {
				t.Errorf("after the loss: %d", m.Payload[0])
			}
			if n.Stats().Dropped[DropFull] != 5 {
				t.Errorf("counted %d", n.Stats().Dropped[DropFull])
			}
		})
	}
}

// TestOverflowAtTheEnd: a loss behind the last message is reported at once.
func TestOverflowAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Config{MailboxMessages: 1})
		must(t, n.OpenMailbox("app", Access{Forwarders: true}))
		for range 3 {
			n.Inject(fromForwarder, frame("app", "x"), 0)
		}
		receive(t, n, "app")
		var lost *LostError
		if _, err := n.Receive(t.Context(), "app"); !errors.As(err, &lost) || lost.Count != 2 {
			t.Fatalf("%v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Receive(ctx, "app"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("reported again: %v", err)
		}
	})
}

// TestUnreadMailboxBlocksNobody: one worker that nobody reads and one that never
// returns leave the others alone.
func TestUnreadMailboxBlocksNobody(t *testing.T) {
	n := newNode(t, Config{MailboxMessages: 10})
	release := make(chan struct{})
	got := make(chan string, 1000)
	must(t, n.OpenMailbox("unread", Access{Forwarders: true}))
	must(t, n.Handle("stuck", Access{Forwarders: true}, func(context.Context, *Message) { <-release }))
	must(t, n.Handle("fine", Access{Forwarders: true}, func(_ context.Context, m *Message) { got <- string(m.Payload) }))
	for i := range 500 {
		for _, to := range []string{"unread", "stuck"} {
			n.Inject(fromForwarder, frame(to, "x"), 0)
		}
		want := fmt.Sprint(i)
		if d := n.Inject(fromForwarder, frame("fine", want), 0); d != 0 {
			t.Fatal(d)
		}
		if s := <-got; s != want {
			t.Fatalf("got %s, want %s", s, want)
		}
	}
	close(release)
	if d := n.Stats().Dropped[DropFull]; d < 900 {
		t.Errorf("%d dropped", d)
	}
}

// TestConcurrentReceivers: each message goes to one of several readers.
func TestConcurrentReceivers(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.OpenMailbox("app", Access{Forwarders: true}))
	const readers, messages = 8, 800
	var mu sync.Mutex
	seen := make(map[string]int)
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range readers {
		wg.Go(func() {
			for range messages / readers {
				m, err := n.Receive(ctx, "app")
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen[string(m.Payload)]++
				mu.Unlock()
			}
		})
	}
	for i := range messages {
		if d := n.Inject(fromForwarder, frame("app", fmt.Sprint(i)), 0); d != 0 {
			t.Fatal(d)
		}
	}
	wg.Wait()
	if len(seen) != messages {
		t.Errorf("%d different messages", len(seen))
	}
}

func TestAck(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.OpenMailbox("app", Access{Channels: true}))
	id := MessageID{Sender: peer, Outbox: [16]byte{1}, Count: 7}
	acks, fail := 0, errors.New("channel is down")
	meta := Meta{ID: id, Redelivered: true, Ack: func() error {
		acks++
		if acks == 1 {
			return fail
		}
		return nil
	}}
	if d := n.InjectMessage(fromChannel, frame("app", "x"), 0, meta); d != 0 {
		t.Fatal(d)
	}
	m := receive(t, n, "app")
	if m.ID != id || !m.Redelivered {
		t.Errorf("message %v %v", m.ID, m.Redelivered)
	}
	if err := m.Ack(); !errors.Is(err, fail) {
		t.Errorf("failed ack: %v", err)
	}
	again := *m
	for _, x := range []*Message{m, m, &again} {
		must(t, x.Ack())
	}
	if acks != 2 {
		t.Errorf("%d acknowledgements", acks)
	}
	if s := id.String(); !strings.HasSuffix(s, "/01000000000000000000000000000000/7") || !strings.HasPrefix(s, peer.String()) {
		t.Errorf("id prints as %s", s)
	}
	if s := (MessageID{Count: 1}).String(); !strings.HasPrefix(s, "-/") {
		t.Errorf("id prints as %s", s)
	}
}
