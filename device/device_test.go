package device_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// bobListens gives bob a listener and a forwarder.
func bobListens(t testing.TB, bob *device.Node, policy channel.Policy) *device.Forwarder {
	t.Helper()
	if _, err := bob.Listen("listener", policy); err != nil {
		t.Fatal(err)
	}
	f, err := bob.CreateForwarder(within(t), "listener")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func dial(t testing.TB, n *device.Node, to route.Route, opts ...device.DialOption) *device.Channel {
	t.Helper()
	ch, err := n.Dial(within(t), to, channel.TrustEveryone, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func receive(t testing.TB, n *device.Node, want string) *device.Message {
	t.Helper()
	m, err := n.Receive(within(t), "app")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.Text(); err != nil || got != want {
		t.Fatalf("received %q (%v), want %q", got, err, want)
	}
	return m
}

func TestHelloOckam(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustIdentifiers(alice.Identifier()))
	for name, to := range map[string]route.Route{
		"forwarding address alone": route.To(fwd.Address()),
		"with the listener":        route.To(fwd.Address(), "listener"),
	} {
		t.Run(name, func(t *testing.T) {
			ch, err := alice.Dial(within(t), to, channel.TrustIdentifiers(bob.Identifier()))
			if err != nil {
				t.Fatal(err)
			}
			if !ch.Confirmed() || ch.Peer().Identifier != bob.Identifier() {
				t.Errorf("confirmed %v, peer %v", ch.Confirmed(), ch.Peer().Identifier)
			}
			if err := ch.SendString(within(t), "app", "Hello Ockam!"); err != nil {
				t.Fatal(err)
			}
			m := receive(t, bob, "Hello Ockam!")
			if m.From != alice.Identifier() || m.ID.IsZero() || m.Redelivered || len(m.ReturnRoute) != 2 {
				t.Errorf("message: %+v", m)
			}
			if err := m.Ack(); err != nil {
				t.Error(err)
			}
			if err := bob.ReplyString(within(t), m, "Hello Alice!"); err != nil {
				t.Fatal(err)
			}
			if m := receive(t, alice, "Hello Alice!"); m.From != bob.Identifier() {
				t.Errorf("reply from %v", m.From)
			}
			if err := ch.Flush(within(t)); err != nil {
				t.Error(err)
			}
			if err := ch.Close(); err != nil {
				t.Error(err)
			}
			if err := ch.SendString(within(t), "app", "late"); !errors.Is(err, device.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
			eventually(t, "bob's end closed", func() bool { return bob.Stats().Channels.Channels == 0 })
			// Never in plain instead: the channel is gone.
			if err := bob.Reply(within(t), m, []byte("secret")); !errors.Is(err, device.ErrPeerClosed) {
				t.Errorf("reply through a closed channel: %v", err)
			}
			if err := bob.Send(within(t), m.ReturnRoute, []byte("secret")); !errors.Is(err, device.ErrPeerClosed) {
				t.Errorf("send through a closed channel: %v", err)
			}
		})
	}
}

func TestRequestReply(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	err := bob.HandleFunc("echoer", func(ctx context.Context, m *device.Message) {
		if err := bob.Reply(ctx, m, m.Payload); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	ch := dial(t, alice, route.To(fwd.Address()))
	for _, n := range []int{0, 1, 1000, 100 << 10} {
		payload := bytes.Repeat([]byte{9}, n)
		m, err := ch.Request(within(t), "echoer", payload)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.Payload, payload) || m.From != bob.Identifier() {
			t.Errorf("answer of %d bytes from %v", len(m.Payload), m.From)
		}
	}
	if s, err := ch.RequestString(within(t), "echoer", "again"); err != nil || s != "again" {
		t.Errorf("%q, %v", s, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := ch.Request(ctx, "nobody", nil); !errors.Is(err, device.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	if err := ch.Send(within(t), "app", make([]byte, 300<<10)); !errors.Is(err, device.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	// A request that waits ends with its channel.
	ended := make(chan error)
	go func() {
		_, err := ch.Request(within(t), "nobody", nil)
		ended <- err
	}()
	eventually(t, "the request is sent", func() bool { return alice.Stats().QueuedFrames == 0 })
	_ = ch.Close()
	if err := <-ended; !errors.Is(err, device.ErrClosed) {
		t.Errorf("request on a closed channel: %v", err)
	}
}

func TestHubServices(t *testing.T) {
	h := startHub(t, nil)
	n := connect(t, h.url(), device.Config{})
	m, err := n.Request(within(t), route.To("echo"), []byte("plain"))
	if err != nil || string(m.Payload) != "plain" {
		t.Fatalf("%v, %v", m, err)
	}
	if _, err := n.Request(within(t), route.To("no_such_service"), nil); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("unknown service: %v", err)
	}
	if id, ok := n.Hub(); !ok || id != h.id.Identifier() {
		t.Errorf("hub %v, proved %v", id, ok)
	}
}

func TestDialErrors(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{})
	var link network
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID, DialNetwork: link.dial})
	fwd := bobListens(t, bob, channel.TrustIdentifiers(identity.Identifier{1}))
	to := route.To(fwd.Address())
	fails := func(t *testing.T, want error, to route.Route, p channel.Policy, opts ...device.DialOption) {
		t.Helper()
		if _, err := alice.Dial(within(t), to, p, opts...); !errors.Is(err, want) {
			t.Errorf("error %v, want %v", err, want)
		}
	}
	t.Run("refused", func(t *testing.T) { fails(t, device.ErrPeerRefused, to, channel.TrustEveryone) })
	t.Run("wrong identity", func(t *testing.T) {
		fails(t, device.ErrWrongIdentity, to, channel.TrustIdentifiers(alice.Identifier()))
	})
	t.Run("unknown", func(t *testing.T) {
		fails(t, device.ErrUnknownAddress, route.To("FWD_0123456789abcdef"), channel.TrustEveryone)
	})
	t.Run("timeout", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_, err := alice.Dial(ctx, route.To(fwd.Address(), "nobody"), channel.TrustEveryone)
		if !errors.Is(err, device.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error: %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(20*time.Millisecond, cancel)
		if _, err := alice.Dial(ctx, route.To(fwd.Address(), "nobody"), channel.TrustEveryone); !errors.Is(err, context.Canceled) {
			t.Errorf("error: %v", err)
		}
	})
	link.cut(true)
	eventually(t, "bob is offline", func() bool { return bob.State() == device.Offline })
	t.Run("offline", func(t *testing.T) {
		waiting := make(chan struct{})
		fails(t, device.ErrPeerOffline, to, channel.TrustEveryone, device.OnWaiting(func() { close(waiting) }))
		select {
		case <-waiting:
		default:
			t.Error("waiting was not reported")
		}
	})
	t.Run("offline, and little time", func(t *testing.T) {
		// The context ends long before the hub would give up.
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		_, err := alice.Dial(ctx, to, channel.TrustEveryone, device.OnWaiting(func() { cancel(context.DeadlineExceeded) }))
		if !errors.Is(err, device.ErrPeerOffline) {
			t.Errorf("error: %v", err)
		}
	})
}

// What comes through a forwarder of an earlier process before the program listens again
// is not lost: who dials in that moment would wait for the whole of the handshake's time.
func TestDialledBeforeListen(t *testing.T) {
	h := startHub(t, nil)
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID})
	to := route.To(bobListens(t, bob, channel.TrustEveryone).Address())
	_ = bob.Close()
	bob = connect(t, h.url(), device.Config{Identity: bobID})
	before := bob.Stats().FramesReceived
	dialled := make(chan error, 1)
	alice := connect(t, h.url(), device.Config{})
	go func() {
		_, err := alice.Dial(within(t), to, channel.TrustIdentifiers(bobID.Identifier()))
		dialled <- err
	}()
	eventually(t, "the first message is there", func() bool { return bob.Stats().FramesReceived > before })
	bobListens(t, bob, channel.TrustEveryone)
	if err := <-dialled; err != nil {
		t.Error(err)
	}
	if d := bob.Stats().Local.Dropped; len(d) != 0 {
		t.Errorf("dropped: %v", d)
	}
}

// Who does not want to wait for an offline peer hears so however long the hub would.
func TestDialNoWait(t *testing.T) {
	h := startHub(t, nil, func(c *bridge.Config) { c.FirstContact = time.Hour })
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	_ = bob.Close()
	eventually(t, "bob is offline", func() bool { return h.bridge.Counters().Attached == 1 })
	if _, err := alice.Dial(within(t), route.To(fwd.Address()), channel.TrustEveryone, device.NoWait()); !errors.Is(err, device.ErrPeerOffline) {
		t.Errorf("error: %v", err)
	}
}

func TestPlainFramesReachOnlyWhatIsOpen(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	got := make(chan *device.Message, 1)
	if err := bob.Handle("open", device.Access{Forwarders: true}, func(_ context.Context, m *device.Message) { got <- m }); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"app", "open"} {
		if err := alice.Send(within(t), route.To(fwd.Address(), to), []byte("plain")); err != nil {
			t.Fatal(err)
		}
	}
	if m := <-got; string(m.Payload) != "plain" || !m.From.IsZero() {
		t.Errorf("message: %+v", m)
	}
	if d := bob.Stats().Local.Dropped; len(d) != 1 {
		t.Errorf("drops: %v", d)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if m, err := bob.Receive(ctx, "app"); !errors.Is(err, device.ErrTimeout) {
		t.Errorf("plain frame in the mailbox: %v, %v", m, err)
	}
	if _, err := bob.Receive(ctx, "open"); !errors.Is(err, device.ErrNoMailbox) {
		t.Errorf("receive where there is no mailbox: %v", err)
	}
}

func TestForwarders(t *testing.T) {
	h := startHub(t, nil)
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID})
	dynamic := bobListens(t, bob, channel.TrustEveryone)
	static, err := bob.CreateForwarder(within(t), "listener", device.Alias("bob"))
	if err != nil {
		t.Fatal(err)
	}
	if static.Address() != "forward_to_bob" || static.Alias() != "bob" || dynamic.Listener() != "listener" {
		t.Errorf("static address %q", static.Address())
	}
	if _, err := bob.Listen("other", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	other, err := bob.CreateForwarder(within(t), "other")
	if err != nil {
		t.Fatal(err)
	}
	if other.Address() == dynamic.Address() {
		t.Error("two listeners, one forwarding address")
	}
	if _, err := bob.CreateForwarder(within(t), "nobody"); err == nil {
		t.Error("forwarder without a listener")
	}
	alice := connect(t, h.url(), device.Config{})
	if _, err := alice.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	if _, err := alice.CreateForwarder(within(t), "listener", device.Alias("bob")); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("alias of another: %v", err)
	}
	if ch := dial(t, alice, route.To("forward_to_bob")); ch.Peer().Identifier != bob.Identifier() {
		t.Error("wrong peer behind the alias")
	}
	_ = bob.Close()

	// The same program started again has the same addresses.
	bob = connect(t, h.url(), device.Config{Identity: bobID})
	if again := bobListens(t, bob, channel.TrustEveryone); again.Address() != dynamic.Address() {
		t.Errorf("address after a restart: %q, before %q", again.Address(), dynamic.Address())
	}
}

// TestForwardersOfOneListener: each has its own address, is released alone, and has the
// same address in the next process.
func TestForwardersOfOneListener(t *testing.T) {
	h := startHub(t, nil)
	bobID := newIdentity(t)
	var link network
	bob := connect(t, h.url(), device.Config{Identity: bobID, DialNetwork: link.dial})
	create := func(opts ...device.ForwarderOption) *device.Forwarder {
		t.Helper()
		f, err := bob.CreateForwarder(within(t), "listener", opts...)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	all := []*device.Forwarder{bobListens(t, bob, channel.TrustEveryone), create(), create()}
	alice := connect(t, h.url(), device.Config{})
	reached := func(which ...bool) {
		t.Helper()
		for i, want := range which {
			ch, err := alice.Dial(within(t), route.To(all[i].Address()), channel.TrustIdentifiers(bobID.Identifier()))
			switch {
			case want && err != nil, !want && !errors.Is(err, device.ErrUnknownAddress):
				t.Errorf("forwarder %d, %s: %v", i, all[i].Address(), err)
			case want:
				if o, err := alice.Lookup(within(t), all[i].Address()); err != nil || !o.Signed {
					t.Errorf("forwarder %d: %+v, %v", i, o, err)
				}
				_ = ch.Close()
			}
		}
	}
	reached(true, true, true)
	if all[0].Address() == all[1].Address() || all[1].Address() == all[2].Address() || all[0].Address() == all[2].Address() {
		t.Fatalf("addresses %s, %s, %s", all[0].Address(), all[1].Address(), all[2].Address())
	}
	if err := all[1].Release(within(t)); err != nil {
		t.Fatal(err)
	}
	reached(true, false, true)
	link.cut(false) // what is registered again are those two
	eventually(t, "back at the hub", func() bool { return bob.Stats().Connects == 2 && bob.State() == device.Online })
	reached(true, false, true)
	// The places of closed ones are given again, the first before the second.
	all[0].Close()
	for i := range 2 {
		if a := create().Address(); a != all[i].Address() {
			t.Errorf("place %d has %s now, had %s", i, a, all[i].Address())
		}
	}

	static := create(device.Alias("bob"))
	if _, err := bob.Listen("other", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	for _, listener := range []string{"listener", "other"} {
		if f, err := bob.CreateForwarder(within(t), listener, device.Alias("bob")); err == nil || !strings.Contains(err.Error(), `"listener"`) {
			t.Errorf("one alias twice: %v, %v", f, err)
		}
	}
	static.Close()
	create(device.Alias("bob"))
	_ = bob.Close()

	bob = connect(t, h.url(), device.Config{Identity: bobID})
	for i, f := range []*device.Forwarder{bobListens(t, bob, channel.TrustEveryone), create(), create()} {
		if f.Address() != all[i].Address() {
			t.Errorf("forwarder %d is at %s after a restart, before at %s", i, f.Address(), all[i].Address())
		}
	}
	reached(true, true, true)
}

// Messages sent across lost connections and a restart of the hub all arrive, in
// order, through the same channel.
func TestConnectionsComeAndGo(t *testing.T) {
	h := startHub(t, nil)
	var aliceLink, bobLink network
	quick := channel.Limits{Probe: 10 * time.Second, Dead: 60 * time.Second}
	alice := connect(t, h.url(), device.Config{DialNetwork: aliceLink.dial, ChannelLimits: quick})
	bob := connect(t, h.url(), device.Config{DialNetwork: bobLink.dial, ChannelLimits: quick})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	address := fwd.Address()
	ch := dial(t, alice, route.To(address))
	const total = 1500
	sent := make(chan error, 1)
	go func() {
		for i := range total {
			if err := ch.SendString(context.Background(), "app", fmt.Sprint(i)); err != nil {
				sent <- err
				return
			}
			if i%300 == 150 {
				aliceLink.cut(false)
			}
		}
		sent <- nil
	}()
	for i := range total {
		receive(t, bob, fmt.Sprint(i))
		if i%400 == 200 {
			bobLink.cut(false)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if fwd.Address() != address || ch.Restarts() != 0 {
		t.Errorf("address %s, then %s; channel made again %d times", address, fwd.Address(), ch.Restarts())
	}
	if s := alice.Stats(); s.Connects < 2 {
		t.Errorf("alice connected %d times", s.Connects)
	}
}

func TestHubRestart(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	address := fwd.Address()
	ch := dial(t, alice, route.To(address))
	if err := ch.Flush(within(t)); err != nil {
		t.Fatal(err)
	}
	h.stop()
	eventually(t, "both are offline", func() bool { return alice.State() == device.Offline && bob.State() == device.Offline })
	if err := ch.SendString(within(t), "app", "while it was away"); err != nil {
		t.Fatal(err)
	}
	startHub(t, h)
	eventually(t, "both are online", func() bool { return alice.State() == device.Online && bob.State() == device.Online })
	// The restarted hub knows neither; the channel is kept by the key that hub
	// addresses are made of, and the forwarder by registering again.
	eventually(t, "bob is reachable again", func() bool {
		c, err := alice.Dial(within(t), route.To(address), channel.TrustEveryone)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	if fwd.Address() != address {
		t.Errorf("address %s, before %s", fwd.Address(), address)
	}
	_, _ = alice.Close(), bob.Close() // before the second hub
}

// A peer whose process died and came back gets a new channel, with the identity
// that was met first.
func TestChannelHeals(t *testing.T) {
	h := startHub(t, nil)
	events := make(chan device.Event, 64)
	limits := channel.Limits{Probe: 50 * time.Millisecond, Dead: 200 * time.Millisecond}
	alice := connect(t, h.url(), device.Config{ChannelLimits: limits, OnEvent: func(e device.Event) { events <- e }})
	var link network
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID, DialNetwork: link.dial})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	link.cut(true) // as a crash: no Close, no good-bye
	_ = bob.Close()

	bob = connect(t, h.url(), device.Config{Identity: bobID})
	if again := bobListens(t, bob, channel.TrustEveryone); again.Address() != fwd.Address() {
		t.Fatalf("another address")
	}
	if err := ch.SendString(within(t), "app", "lost with the old process"); err != nil {
		t.Fatal(err)
	}
	wait := func(kind device.EventKind) device.Event {
		t.Helper()
		for {
			select {
			case e := <-events:
				if e.Kind == kind {
					return e
				}
			case <-time.After(limit):
				t.Fatalf("no event %v", kind)
			}
		}
	}
	if e := wait(device.EventChannelLost); e.Channel != ch || e.Err == nil {
		t.Errorf("event: %+v", e)
	}
	if err := ch.SendString(within(t), "app", "waits"); err != nil {
		t.Fatal(err)
	}
	wait(device.EventChannelRestored)
	receive(t, bob, "waits")
	if ch.Restarts() != 1 || ch.Peer().Identifier != bob.Identifier() {
		t.Errorf("made again %d times", ch.Restarts())
	}
	// An orderly end of the peer is an end.
	_ = bob.Close()
	if e := wait(device.EventChannelEnded); !errors.Is(e.Err, device.ErrPeerClosed) {
		t.Errorf("event: %+v", e)
	}
	if err := ch.SendString(within(t), "app", "x"); !errors.Is(err, device.ErrPeerClosed) {
		t.Errorf("send: %v", err)
	}
}

// A peer ends in good order and is started again: what Deliver has taken goes on.
func TestDeliverOutlivesThePeersClose(t *testing.T) {
	h := startHub(t, nil)
	lost := make(chan error, 64)
	alice := connect(t, h.url(), device.Config{OnEvent: func(e device.Event) {
		if e.Kind == device.EventChannelLost {
			lost <- e.Err
		}
	}})
	bobID := newIdentity(t)
	bob := connect(t, h.url(), device.Config{Identity: bobID})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	deliver := func(text string) <-chan error {
		done := make(chan error, 1)
		go func() { done <- ch.DeliverString(within(t), "app", text) }()
		return done
	}
	take := func(text string) {
		t.Helper()
		if err := receive(t, bob, text).Ack(); err != nil {
			t.Error(err)
		}
	}
	first := deliver("first")
	take("first")
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	// One that the program has not taken, and one that is posted while nobody is there.
	second := deliver("second")
	eventually(t, "it is sent", func() bool { return bob.Stats().Delivery.Handed == 2 })
	_ = bob.Close()
	if err := <-lost; !errors.Is(err, channel.ErrPeerClosed) {
		t.Errorf("the channel broke for %v", err)
	}
	third := deliver("third")
	bob = connect(t, h.url(), device.Config{Identity: bobID})
	bobListens(t, bob, channel.TrustEveryone)
	take("second")
	take("third")
	for _, done := range []<-chan error{second, third} {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	// With nothing to deliver the channel rests.
	_ = bob.Close()
	eventually(t, "the peer's end is an end for Send", func() bool {
		return errors.Is(ch.SendString(within(t), "app", "x"), device.ErrPeerClosed)
	})
	fourth := deliver("fourth")
	bob = connect(t, h.url(), device.Config{Identity: bobID})
	bobListens(t, bob, channel.TrustEveryone)
	take("fourth")
	if err := <-fourth; err != nil {
		t.Error(err)
	}
	if ch.Restarts() != 2 || ch.Err() != nil {
		t.Errorf("made again %d times, %v", ch.Restarts(), ch.Err())
	}
}

func TestTwoProgramsWithOneIdentity(t *testing.T) {
	h := startHub(t, nil)
	id := newIdentity(t)
	first := connect(t, h.url(), device.Config{Identity: id})
	once := connect(t, h.url(), device.Config{Identity: id, OneShot: true})
	named := connect(t, h.url(), device.Config{Identity: id, Suffix: "gateway"})
	for _, n := range []*device.Node{first, once, named} {
		if _, err := n.Request(within(t), route.To("echo"), nil); err != nil {
			t.Errorf("%s: %v", n.ClientID(), err)
		}
	}
	second := connect(t, h.url(), device.Config{Identity: id})
	select {
	case <-first.Done():
	case <-time.After(limit):
		t.Fatal("the first program was not told")
	}
	if !errors.Is(first.Err(), device.ErrTakenOver) {
		t.Errorf("first: %v", first.Err())
	}
	if _, err := second.Request(within(t), route.To("echo"), nil); err != nil || second.Stats().Connects != 1 {
		t.Errorf("second: %v after %d connections", err, second.Stats().Connects)
	}
}

func TestURLs(t *testing.T) {
	h := startHub(t, nil)
	trust := &tls.Config{RootCAs: h.roots}
	for _, tc := range []struct {
		name, url string
		cfg       device.Config
		want      error
	}{
		{"mqtt", "mqtt://" + h.addr, device.Config{}, nil},
		{"mqtts", "mqtts://" + h.tls, device.Config{TLS: trust}, nil},
		{"ws", "ws://" + h.ws, device.Config{}, nil},
		{"ws with path", "ws://" + h.ws + "/mqtt", device.Config{}, nil},
		{"wss", "wss://" + h.wss, device.Config{TLS: trust}, nil},
		{"pinned", "mqtt://" + h.addr + "?hub=" + h.id.Identifier().String(), device.Config{}, nil},
		{"pinned, TLS", "mqtts://" + h.tls + "?hub=" + h.id.Identifier().String(), device.Config{TLS: trust}, nil},
		{"pinned, wss", "wss://" + h.wss + "?hub=" + h.id.Identifier().String(), device.Config{TLS: trust}, nil},
		{"wrong pin", "mqtt://" + h.addr + "?hub=" + newIdentity(t).Identifier().String(), device.Config{}, device.ErrWrongHub},
		{"untrusted", "mqtts://" + h.tls, device.Config{}, nil},
		{"TLS to a plain port", "mqtts://" + h.addr, device.Config{TLS: trust}, device.ErrHubAway},
		{"bad password", "mqtt://wrong:x@" + h.addr, device.Config{}, device.ErrBadCredentials},
		{"not allowed", "mqtt://" + h.addr, device.Config{Username: "stranger"}, device.ErrHubRefused},
		{"nobody there", "mqtt://127.0.0.1:1", device.Config{}, device.ErrHubAway},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cfg.Identity = newIdentity(t)
			n, err := device.Connect(within(t), tc.url, tc.cfg)
			if tc.name == "untrusted" {
				var bad *tls.CertificateVerificationError
				if !errors.As(err, &bad) {
					t.Errorf("error: %v", err)
				}
				return
			}
			if !errors.Is(err, tc.want) {
				t.Fatalf("error %v, want %v", err, tc.want)
			}
			if err != nil {
				return
			}
			defer n.Close()
			if _, proved := n.Hub(); !proved {
				t.Error("the hub did not prove its identity")
			}
			if _, err := n.Request(within(t), route.To("echo"), make([]byte, 100<<10)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBadURLsAndConfigurations(t *testing.T) {
	id := newIdentity(t)
	for _, url := range []string{
		"", "hub", "hub:1883", "127.0.0.1:1883", "user:secret@127.0.0.1:1883", "mqtt://hub:99999", "mqtt://hub:0", "http://hub", "mqtt://", "mqtt:hub", "mqtt://hub/path", "mqtt://hub?x=1", "mqtt://hub?hub=I12",
		"mqtt://hub#x", "mqtt://user:secret@hub:port", "mqtt://hub?hub=I1&hub=I2", "mqtt://hub?hub=" + identity.Identifier{}.String(),
	} {
		_, err := device.Connect(t.Context(), url, device.Config{Identity: id})
		if !errors.Is(err, device.ErrURL) {
			t.Errorf("%q: %v", url, err)
		}
		if err != nil && bytes.Contains([]byte(err.Error()), []byte("secret")) {
			t.Errorf("the error shows the password: %v", err)
		}
	}
	for name, cfg := range map[string]device.Config{
		"no identity":     {},
		"bad suffix":      {Identity: id, Suffix: "a/b"},
		"random suffix":   {Identity: id, Suffix: "0123456789abcdef"},
		"two suffixes":    {Identity: id, Suffix: "a", OneShot: true},
		"root":            {Identity: id, Root: "a/#"},
		"keep-alive":      {Identity: id, KeepAlive: time.Millisecond},
		"short pause":     {Identity: id, MaxReconnectPause: time.Second - 1},
		"long pause":      {Identity: id, MaxReconnectPause: time.Hour + 1},
		"negative pause":  {Identity: id, MaxReconnectPause: -time.Minute},
		"frame limit":     {Identity: id, Limits: route.Limits{Frame: 1}},
		"outbox":          {Identity: id, QueuedBytes: 1},
		"mailbox":         {Identity: id, Mailboxes: []string{""}},
		"same mailbox":    {Identity: id, Mailboxes: []string{"a", "a"}},
		"mailbox limits":  {Identity: id, MailboxMessages: -1},
		"channel limits":  {Identity: id, ChannelLimits: channel.Limits{Rate: -1}},
		"negative outbox": {Identity: id, QueuedFrames: -1},
	} {
		if _, err := device.Connect(t.Context(), "mqtt://127.0.0.1:1", cfg); err == nil || errors.Is(err, device.ErrHubAway) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A route that the hub or the peer would refuse is refused here, and nothing is sent.
func TestImpossibleRoutes(t *testing.T) {
	h := startHub(t, nil, func(c *bridge.Config) { c.Limits.Frame = 4 << 10 })
	bob := connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	alice := connect(t, h.url(), device.Config{})
	ch := dial(t, alice, route.To(fwd.Address()))
	if err := ch.Flush(within(t)); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 256)
	many := slices.Repeat(route.To("x"), 65)
	big := slices.Repeat(route.To(strings.Repeat("x", 200)), 30)
	ctx := within(t)
	dialled := func(r route.Route) error {
		_, err := alice.Dial(ctx, r, channel.TrustEveryone)
		return err
	}
	requested := func(_ *device.Message, err error) error { return err }
	before := h.bridge.Counters().Received
	for name, tc := range map[string]struct{ err, want error }{
		"dial, hops":       {dialled(many), route.ErrTooManyHops},
		"dial, address":    {dialled(route.To(fwd.Address(), long)), route.ErrAddressTooLong},
		"dial, frame":      {dialled(big), device.ErrTooLarge},
		"send, hops":       {alice.Send(ctx, many, nil), route.ErrTooManyHops},
		"send, address":    {alice.Send(ctx, route.To(long), nil), route.ErrAddressTooLong},
		"send, frame":      {alice.Send(ctx, big, nil), device.ErrTooLarge},
		"send by address":  {alice.Send(ctx, route.To(ch.Address(), long), nil), route.ErrAddressTooLong},
		"request, address": {requested(alice.Request(ctx, route.To(long), nil)), route.ErrAddressTooLong},
		"channel, address": {ch.Send(ctx, long, nil), route.ErrAddressTooLong},
		"channel, hops":    {ch.SendRoute(ctx, many, nil, nil), route.ErrTooManyHops},
		"channel, return":  {ch.SendRoute(ctx, route.To("app"), many, nil), route.ErrTooManyHops},
		"channel, frame":   {ch.SendRoute(ctx, big, nil, nil), device.ErrTooLarge},
		"channel, empty":   {ch.Send(ctx, "", nil), device.ErrRoute},
		"dial, empty":      {dialled(route.To(fwd.Address(), "")), device.ErrRoute},
		"channel, request": {requested(ch.Request(ctx, long, nil)), route.ErrAddressTooLong},
	} {
		if !errors.Is(tc.err, tc.want) || tc.want != device.ErrTooLarge && !errors.Is(tc.err, device.ErrRoute) {
			t.Errorf("%s: %v, want %v", name, tc.err, tc.want)
		}
	}
	if _, err := bob.Listen(long, channel.TrustEveryone); !errors.Is(err, route.ErrAddressTooLong) {
		t.Errorf("listen: %v", err)
	}
	if n := h.bridge.Counters().Received; n != before {
		t.Errorf("%d frames were sent", n-before)
	}
	if err := ch.SendString(ctx, "app", "fine"); err != nil {
		t.Error(err)
	}
}

func TestFullMailboxSaysWhatItLost(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{})
	bob := connect(t, h.url(), device.Config{MailboxMessages: 4})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	for i := range 10 {
		if err := ch.SendString(within(t), "app", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all have arrived", func() bool { return bob.Stats().Local.Dropped[5] == 6 })
	for i := range 4 {
		receive(t, bob, fmt.Sprint(i))
	}
	var lost *device.LostError
	if _, err := bob.Receive(within(t), "app"); !errors.As(err, &lost) || lost.Count != 6 {
		t.Errorf("error: %v", err)
	}
}

func TestTransientChannel(t *testing.T) {
	h := startHub(t, nil)
	alice, bob := connect(t, h.url(), device.Config{}), connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()), device.Transient())
	if err := ch.SendString(within(t), "app", "quick"); err != nil {
		t.Fatal(err)
	}
	m := receive(t, bob, "quick")
	if m.Class != route.Transient {
		t.Errorf("class %v", m.Class)
	}
	if err := bob.ReplyString(within(t), m, "answer"); err != nil {
		t.Fatal(err)
	}
	if m := receive(t, alice, "answer"); m.Class != route.Transient {
		t.Errorf("answered in class %v", m.Class)
	}
}

func TestCloseFromACallback(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{})
	closed := make(chan error, 1)
	var bob *device.Node
	ready := make(chan struct{})
	bob = connect(t, h.url(), device.Config{OnEvent: func(e device.Event) {
		if e.Kind == device.EventStopped {
			close(ready)
		}
	}})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	if err := bob.HandleFunc("stop", func(context.Context, *device.Message) { closed <- bob.Close() }); err != nil {
		t.Fatal(err)
	}
	ch := dial(t, alice, route.To(fwd.Address()))
	if err := ch.Send(within(t), "stop", nil); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	<-ready
	<-ch.Done()
	if !errors.Is(ch.Err(), device.ErrPeerClosed) {
		t.Errorf("alice's end: %v", ch.Err())
	}
	if err := bob.Close(); err != nil {
		t.Error(err)
	}
}

// With withheld acknowledgements (a peer that is away and a full outbox at the
// hub) the device keeps what it could not hand over, and others are served.
func TestPeerAwayWithFullOutbox(t *testing.T) {
	h := startHub(t, nil, func(c *bridge.Config) { c.OutboxFrames = 8 })
	var link network
	alice := connect(t, h.url(), device.Config{})
	bob := connect(t, h.url(), device.Config{DialNetwork: link.dial, ChannelLimits: channel.Limits{Dead: -1}})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	if err := ch.Flush(within(t)); err != nil {
		t.Fatal(err)
	}
	link.cut(true)
	eventually(t, "bob is offline", func() bool { return bob.State() == device.Offline })
	total := 0
	send := func() {
		t.Helper()
		if err := ch.SendString(within(t), "app", fmt.Sprint(total)); err != nil {
			t.Fatal(err)
		}
		total++
	}
	for withheld := false; !withheld; {
		if total > 50 {
			t.Fatal("the hub takes more than its outbox holds")
		}
		send()
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		withheld = errors.Is(ch.Flush(ctx), device.ErrTimeout)
		cancel()
	}
	for range 500 {
		send()
	}
	if _, err := alice.Request(within(t), route.To("echo"), nil); err != nil {
		t.Fatal(err)
	}
	link.cut(false)
	for i := range total {
		receive(t, bob, fmt.Sprint(i))
	}
	if err := ch.Flush(within(t)); err != nil {
		t.Error(err)
	}
}
