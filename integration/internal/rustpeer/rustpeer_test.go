package rustpeer_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// through is a Rust hub with a relay service, Bob behind a relay on it and
// Alice connected to it.
type through struct {
	hub, bob, alice *rustpeer.Node
	bobID, aliceID  rustpeer.Identity
	relay           rustpeer.Relay
}

func newThrough(t *testing.T, listener rustpeer.ListenerConfig) *through {
	t.Helper()
	s := &through{hub: rustpeer.Start(t), bob: rustpeer.Start(t), alice: rustpeer.Start(t)}
	addr := s.hub.Listen("tcp")
	s.hub.RelayService("tcp")
	s.hub.Worker("echo", "echo", "tcp")

	s.bobID = s.bob.Identity("bob")
	s.bob.Connect("hub", addr)
	listener.Address, listener.Identity = "listener", "bob"
	listener.Open = append(listener.Open, "hub")
	s.bob.Listener(listener)
	s.bob.Worker("sink", "app", "listener")
	s.bob.Worker("echo", "echo", "listener")
	relay, err := s.bob.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	s.relay = relay

	s.aliceID = s.alice.Identity("alice")
	s.alice.Connect("hub", addr)
	return s
}

func (s *through) dial(name string) rustpeer.DialConfig {
	return rustpeer.DialConfig{Name: name, Identity: "alice", Route: []string{"@hub", s.relay.Address, "listener"}}
}

// What the helper itself promises, on three stock nodes: the baseline that the
// tests with our own nodes in one place or another are compared with.
func TestChannelBetweenStockNodes(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	ch, err := s.alice.Dial(s.dial("ch"))
	if err != nil {
		t.Fatal(err)
	}
	if ch.Peer != s.bobID.Identifier {
		t.Errorf("peer is %s, want %s", ch.Peer, s.bobID.Identifier)
	}

	run := rustpeer.Run{Seed: 7, Count: 200, Sizes: []int{0, 1, 64, 4096, 48 << 10, 200 << 10}}
	if err := s.alice.Flood([]string{"@ch", "app"}, nil, run); err != nil {
		t.Fatal(err)
	}
	for i := range run.Count {
		want, got := run.At(i), s.bob.MustNext("app")
		if got.N != i || got.Len != len(want) || got.SHA256 != rustpeer.Digest(want) {
			t.Fatalf("message %d arrived as %+v", i, got)
		}
		if got.From != s.aliceID.Identifier {
			t.Fatalf("message %d is from %q", i, got.From)
		}
	}
	if err := s.alice.Requests([]string{"@ch", "echo"}, run, 10*time.Second); err != nil {
		t.Fatal(err)
	}

	// Back along a return route, through the responder's encryptor.
	s.alice.Worker("sink", "answers", "ch")
	if err := s.alice.SendString([]string{"@ch", "app"}, []string{"answers"}, "Hello Ockam!"); err != nil {
		t.Fatal(err)
	}
	hello := s.bob.MustNext("app")
	if hello.Text != "Hello Ockam!" {
		t.Errorf("arrived: %+v", hello)
	}
	if err := s.bob.SendString(hello.Return, nil, "Hello Alice!"); err != nil {
		t.Fatal(err)
	}
	if got := s.alice.MustNext("answers"); got.Text != "Hello Alice!" || got.From != s.bobID.Identifier {
		t.Errorf("answer: %+v", got)
	}

	// Close from each side reaches the other.
	s.bob.WaitChannels("responder", 1)
	s.alice.Close("ch")
	s.bob.WaitChannels("", 0)
	if _, err := s.alice.Dial(s.dial("again")); err != nil {
		t.Fatal(err)
	}
	s.bob.CloseEncryptor(s.bob.WaitChannels("responder", 1)[0].Encryptor)
	s.alice.WaitChannels("", 0)
}

func TestTrustRefusals(t *testing.T) {
	stranger := rustpeer.Start(t).Identity("stranger")
	s := newThrough(t, rustpeer.ListenerConfig{Trust: []string{stranger.Identifier}})

	t.Run("by the initiator", func(t *testing.T) {
		d := s.dial("initiator")
		d.Trust, d.Timeout = []string{stranger.Identifier}, 500*time.Millisecond
		var refused *rustpeer.CallError
		if _, err := s.alice.Dial(d); !errors.As(err, &refused) {
			t.Errorf("dial: %v, want the crate's time-out", err)
		}
	})
	t.Run("by the responder", func(t *testing.T) {
		// The initiator believes in the channel; nothing arrives.
		if _, err := s.alice.Dial(s.dial("responder")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.alice.RequestString([]string{"@responder", "echo"}, "anybody?", 500*time.Millisecond); err == nil {
			t.Error("a refused peer got an answer")
		}
		s.bob.WaitChannels("", 0)
	})
}

func TestCredentials(t *testing.T) {
	authority := rustpeer.Start(t)
	issuer := authority.Identity("authority")
	s := newThrough(t, rustpeer.ListenerConfig{Authority: issuer.History})
	issue := func(role string) []byte {
		return authority.Issue("authority", s.aliceID.History, map[string]string{"role": role}, time.Hour)
	}

	first := issue("sensor")
	v, err := s.bob.Verify(first, s.aliceID.Identifier, issuer.History)
	if err != nil {
		t.Fatal(err)
	}
	if v.Attributes["role"] != "sensor" || v.Subject != s.aliceID.Identifier || v.Schema != 1 {
		t.Errorf("verified: %+v", v)
	}
	if _, err := s.bob.Verify(first, s.aliceID.Identifier, s.bobID.History); err == nil {
		t.Error("a credential passed as another authority's")
	}

	s.alice.FillSlot("mine", first)
	d := s.dial("ch")
	d.Credential = "mine"
	if _, err := s.alice.Dial(d); err != nil {
		t.Fatal(err)
	}
	s.bob.WaitChannels("responder", 1)
	if got := s.bob.Attributes(s.aliceID.Identifier, issuer.Identifier); got["role"] != "sensor" {
		t.Errorf("attributes after the handshake: %v", got)
	}

	if n := s.alice.FillSlot("mine", issue("gateway")); n != 1 {
		t.Errorf("%d channels refreshed, want 1", n)
	}
	// The refresh is ahead of this request on the channel.
	if _, err := s.alice.Request([]string{"@ch", "echo"}, nil, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if got := s.bob.Attributes(s.aliceID.Identifier, issuer.Identifier); got["role"] != "gateway" {
		t.Errorf("attributes after the refresh: %v", got)
	}
}

func TestRotatedAndOtherKeys(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	rotated := s.alice.Rotate("alice")
	if rotated.Identifier != s.aliceID.Identifier {
		t.Fatal("a rotation changed the identifier")
	}
	if len(rotated.History) <= len(s.aliceID.History) {
		t.Error("a rotation did not lengthen the history")
	}
	s.alice.IdentityP256("carol")
	for _, name := range []string{"alice", "carol"} {
		d := s.dial(name)
		d.Identity = name
		if _, err := s.alice.Dial(d); err != nil {
			t.Fatalf("as %s: %v", name, err)
		}
		if _, err := s.alice.Request([]string{"@" + name, "echo"}, []byte("x"), 10*time.Second); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
}

func TestNestedChannels(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	s.bob.Listener(rustpeer.ListenerConfig{Address: "inner", Identity: "bob", Open: []string{"listener"}})
	s.bob.Worker("echo", "deep", "inner")
	if _, err := s.alice.Dial(s.dial("outer")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.alice.Dial(rustpeer.DialConfig{Name: "inner", Identity: "alice", Route: []string{"@outer", "inner"}}); err != nil {
		t.Fatal(err)
	}
	run := rustpeer.Run{Seed: 3, Count: 70, Sizes: []int{10, 1000}}
	if err := s.alice.Requests([]string{"@inner", "deep"}, run, 10*time.Second); err != nil {
		t.Error(err)
	}
}

func TestReroute(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	if _, err := s.alice.Dial(s.dial("ch")); err != nil {
		t.Fatal(err)
	}
	second, err := s.bob.Relay("@hub", "bob")
	if err != nil {
		t.Fatal(err)
	}
	if second.Address != "forward_to_bob" {
		t.Errorf("static relay at %q", second.Address)
	}
	if err := s.alice.Reroute("ch", "@hub", second.Address); err != nil {
		t.Fatal(err)
	}
	if _, err := s.alice.Request([]string{"@ch", "echo"}, []byte("moved"), 10*time.Second); err != nil {
		t.Error(err)
	}
}

func TestEndsOfANode(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	if _, err := s.alice.Dial(s.dial("ch")); err != nil {
		t.Fatal(err)
	}
	s.bob.WaitChannels("responder", 1)
	s.alice.Close("ch") // the Close that Quit sends may not get out in time
	s.bob.WaitChannels("", 0)
	s.alice.Quit()
	s.hub.Kill()
	if err := s.hub.Call(t.Context(), "channels", nil, nil); !errors.Is(err, rustpeer.ErrGone) {
		t.Errorf("a call to a killed node: %v", err)
	}
}

func TestServices(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	for _, kind := range []string{"echoer", "uppercase", "digest"} {
		s.hub.Worker(kind, kind, "tcp")
	}
	raw := []byte{0xff, 0, 1} // no BARE string
	got, err := s.alice.Request([]string{"@hub", "echo"}, raw, 10*time.Second)
	if err != nil || got.SHA256 != rustpeer.Digest(raw) {
		t.Errorf("echo: %+v, %v", got, err)
	}
	for kind, want := range map[string]string{
		"echoer":    "Hello Ockam!",
		"uppercase": "HELLO OCKAM!",
		"digest":    "13 " + rustpeer.Digest([]byte("\x0cHello Ockam!")),
	} {
		got, err := s.alice.RequestString([]string{"@hub", kind}, "Hello Ockam!", 10*time.Second)
		if err != nil || got.Text != want {
			t.Errorf("%s: %+v, %v", kind, got, err)
		}
	}
	// Nothing is open that was not opened.
	s.hub.Worker("echo", "closed")
	if _, err := s.alice.Request([]string{"@hub", "closed"}, raw, 300*time.Millisecond); err == nil {
		t.Error("a closed worker answered")
	}
}

func TestPortal(t *testing.T) {
	s := newThrough(t, rustpeer.ListenerConfig{})
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	s.bob.Outlet("outlet", target.Addr().String(), "listener")
	if _, err := s.alice.Dial(s.dial("ch")); err != nil {
		t.Fatal(err)
	}
	inlet := s.alice.Inlet("@ch", "outlet")

	conn, err := net.Dial("tcp", inlet)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	served, err := target.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	sent := rustpeer.Content(1, 0, 300<<10)
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		written <- err
	}()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(served, got); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil || !bytes.Equal(got, sent) {
		t.Errorf("300 KiB through a portal: altered or %v", err)
	}
}
