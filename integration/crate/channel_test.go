package crate

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// cell is one of our endpoints and one stock peer at a stock hub. One of them
// listens behind a relay; the other dials.
type cell struct {
	t         *testing.T
	weDial    bool
	hub, rust *rustpeer.Node
	rustID    rustpeer.Identity
	ours      *link

	// Set before up.
	config   channel.Config          // of our endpoint
	policy   channel.Policy          // ours, as listener or initiator
	listener rustpeer.ListenerConfig // of the crate, when it listens
	dialRust rustpeer.DialConfig     // of the crate, when it dials

	// Set by up.
	to          string // relay of whoever listens
	rustWorkers string // what the crate's workers have to be open to
}

// eachWay runs a test with the stock peer as listener and as initiator.
func eachWay(t *testing.T, test func(t *testing.T, c *cell)) {
	t.Helper()
	for name, weDial := range map[string]bool{"crate listens": true, "crate dials": false} {
		t.Run(name, func(t *testing.T) {
			c := &cell{t: t, weDial: weDial, hub: rustpeer.Start(t), rust: rustpeer.Start(t), policy: channel.TrustEveryone}
			c.rustID = c.rust.Identity("rust")
			c.config.Identity = newIdentity(t)
			c.listener = rustpeer.ListenerConfig{Address: "listener", Identity: "rust", Open: []string{"hub"}}
			c.dialRust = rustpeer.DialConfig{Name: "ch", Identity: "rust", Timeout: 20 * time.Second}
			test(t, c)
		})
	}
}

// up connects both to the hub and starts whoever listens.
func (c *cell) up() {
	c.t.Helper()
	addr := c.hub.Listen("tcp")
	c.hub.RelayService("tcp")
	c.rust.Connect("hub", addr)
	c.ours = connect(c.t, addr, c.config)
	if c.weDial {
		c.rust.Listener(c.listener)
		relay, err := c.rust.Relay("@hub", "")
		if err != nil {
			c.t.Fatal(err)
		}
		c.to, c.rustWorkers = relay.Address, "listener"
		return
	}
	if _, err := c.ours.endpoint.Listen("listener", c.policy, channel.ListenOptions{}); err != nil {
		c.t.Fatal(err)
	}
	c.to, c.rustWorkers = c.ours.relay(), "ch"
	c.dialRust.Route = []string{"@hub", c.to, "listener"}
}

// dial opens the channel from whichever side dials.
func (c *cell) dial() error {
	if c.weDial {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		_, err := c.ours.endpoint.Dial(ctx, route.To(c.to, "listener"), c.policy, channel.DialOptions{})
		return err
	}
	_, err := c.rust.Dial(c.dialRust)
	return err
}

func (c *cell) mustDial() {
	c.t.Helper()
	if err := c.dial(); err != nil {
		c.t.Fatalf("dial: %v", err)
	}
}

// channel waits for our end of the one channel.
func (c *cell) channel() *channel.Channel {
	c.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-tick.C {
		if all := c.ours.endpoint.Channels(); len(all) == 1 {
			return all[0]
		}
	}
	c.t.Fatalf("we have %d channels, want 1", len(c.ours.endpoint.Channels()))
	return nil
}

// rustEnd is the crate's end of the one channel.
func (c *cell) rustEnd() string {
	c.t.Helper()
	return c.rust.WaitChannels("", 1)[0].Encryptor
}

func (c *cell) send(ch *channel.Channel, to, answers string, payload []byte) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	var ret route.Route
	if answers != "" {
		ret = route.To(answers)
	}
	if err := ch.Send(ctx, route.To(to), ret, payload); err != nil {
		c.t.Fatalf("sending %d bytes: %v", len(payload), err)
	}
}

// pass sends a message each way and back, which shows that everything sent
// before on the channel has been handled.
func (c *cell) pass() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	to := route.To(c.channel().EncryptorAddress(), "echo")
	if got, err := c.ours.node.Request(ctx, to, []byte("there?"), route.Stored); err != nil || string(got.Payload) != "there?" {
		c.t.Fatalf("our request through the channel: %v", err)
	}
	if _, err := c.rust.Request([]string{c.rustEnd(), "echo"}, []byte("there?"), patience); err != nil {
		c.t.Fatalf("the crate's request through the channel: %v", err)
	}
}

// 1,000 messages each way of 0 bytes to 200 KiB, which crosses 31 rekeys.
func TestMessagesBothWays(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.up()
		c.mustDial()
		c.rust.Worker("sink", "app", c.rustWorkers)
		c.rust.Worker("echo", "echo", c.rustWorkers)
		ch, rustEnd := c.channel(), c.rustEnd()
		if got := ch.Peer().Identifier.String(); got != c.rustID.Identifier {
			t.Fatalf("the peer is %s, want %s", got, c.rustID.Identifier)
		}
		run := rustpeer.Run{Seed: 4, Count: 1000, Sizes: []int{0, 1, 15, 16, 64, 1000, 4096, 32<<10 + 7, 200 << 10}}

		for i := range run.Count {
			c.send(ch, "app", "", run.At(i))
		}
		for i := range run.Count {
			got, want := c.rust.MustNext("app"), run.At(i)
			if got.Len != len(want) || got.SHA256 != rustpeer.Digest(want) || got.From != c.ours.id.Identifier().String() {
				t.Fatalf("message %d (%d bytes) arrived as %+v", i, len(want), got)
			}
		}

		if err := c.rust.Flood([]string{rustEnd, "app"}, nil, run); err != nil {
			t.Fatal(err)
		}
		for i := range run.Count {
			got, want := c.ours.receive("app"), run.At(i)
			if !bytes.Equal(got.Payload, want) || got.From.String() != c.rustID.Identifier {
				t.Fatalf("message %d (%d bytes) arrived with %d bytes from %v", i, len(want), len(got.Payload), got.From)
			}
		}

		// Answers along return routes, both ways.
		c.pass()
		if err := c.rust.Requests([]string{rustEnd, "echo"}, rustpeer.Run{Seed: 5, Count: 100, Sizes: []int{0, 100, 70_000}}, patience); err != nil {
			t.Error(err)
		}
		c.send(ch, "app", "app", bare.AppendString(nil, "Hello Ockam!"))
		hello := c.rust.MustNext("app")
		if hello.Text != "Hello Ockam!" {
			t.Errorf("the string arrived as %+v", hello)
		}
		if err := c.rust.SendString(hello.Return, nil, "Hello Go!"); err != nil {
			t.Fatal(err)
		}
		if got, err := c.ours.receive("app").Text(); got != "Hello Go!" {
			t.Errorf("the answer is %q, %v", got, err)
		}
	})
}

func TestCloseFromEachSide(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.up()
		c.mustDial()
		ch := c.channel()
		c.rustEnd()
		if err := ch.Close(); err != nil {
			t.Error(err)
		}
		c.rust.WaitChannels("", 0)

		c.mustDial()
		c.rust.Worker("echo", "echo", c.rustWorkers)
		c.pass() // a Close before any other word would mean that we are refused
		ch = c.channel()
		c.rust.CloseEncryptor(c.rustEnd())
		select {
		case <-ch.Done():
		case <-time.After(patience):
			t.Fatal("our end is still up")
		}
		if !errors.Is(ch.Err(), channel.ErrPeerClosed) {
			t.Errorf("our end says %v", ch.Err())
		}
	})
}

func TestWeRefuseTheCrate(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.policy = channel.TrustIdentifiers(newIdentity(t).Identifier())
		c.up()
		err := c.dial()
		if c.weDial {
			if !errors.Is(err, channel.ErrWrongIdentity) {
				t.Errorf("dial: %v", err)
			}
		} else if err != nil {
			t.Errorf("the crate's dial, which ends before we have seen who it is: %v", err)
		}
		c.rust.WaitChannels("", 0) // a dialler has got our Close
		if n := len(c.ours.endpoint.Channels()); n != 0 {
			t.Errorf("we have %d channels with a peer that we refused", n)
		}
	})
}

func TestTheCrateRefusesUs(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		nobody := []string{newIdentity(t).Identifier().String()}
		c.listener.Trust, c.dialRust.Trust = nobody, nobody
		c.dialRust.Timeout = time.Second
		c.up()
		err := c.dial()
		if !c.weDial {
			if err == nil {
				t.Error("the crate dialled somebody that it does not trust")
			}
			return
		}
		// A stock responder tells nobody: we look connected and get no answer.
		if err != nil {
			t.Fatalf("dial: %v", err)
		}
		c.rust.Worker("echo", "echo", c.rustWorkers)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		to := route.To(c.channel().EncryptorAddress(), "echo")
		if _, err := c.ours.node.Request(ctx, to, nil, route.Stored); err == nil {
			t.Error("somebody that refused us answers")
		}
	})
}

func TestCredentialsInChannels(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		theirs := rustpeer.Start(t)
		rustAuthority := theirs.Identity("authority")
		ourAuthority := newIdentity(t)
		show := func(role string) []byte {
			return theirs.Issue("authority", c.config.Identity.Identity().ChangeHistory(), map[string]string{"role": role}, time.Hour)
		}
		ask := func(role string) []byte {
			credential, err := ourAuthority.IssueCredential(imported(t, c.rustID), map[string]string{"role": role}, 1, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			return credential
		}
		// We show a credential of the crate's authority, the crate one of ours.
		var mine atomic.Pointer[[]byte]
		first := show("gateway")
		mine.Store(&first)
		c.config.Credential = func() ([]byte, error) { return *mine.Load(), nil }
		c.config.Authorities = []*identity.Identity{ourAuthority.Identity()}
		c.policy = channel.TrustCredential(ourAuthority.Identity(), map[string]string{"role": "sensor"})
		c.listener.Authority, c.dialRust.Authority = rustAuthority.History, rustAuthority.History
		c.rust.FillSlot("mine", ask("sensor"))
		c.listener.Credential, c.dialRust.Credential = "mine", "mine"
		c.up()
		c.mustDial()
		c.rust.Worker("echo", "echo", c.rustWorkers)
		c.pass()

		us := c.config.Identity.Identifier().String()
		if got := c.rust.Attributes(us, rustAuthority.Identifier); got["role"] != "gateway" {
			t.Errorf("the crate knows of us: %v", got)
		}
		roleOfRust := func() string {
			for _, cr := range c.channel().Peer().Credentials {
				if cr.Issuer == ourAuthority.Identifier() {
					return cr.Attributes["role"]
				}
			}
			return ""
		}
		if got := roleOfRust(); got != "sensor" {
			t.Errorf("we know of the crate: %q", got)
		}

		// RefreshCredentials both ways.
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		second := show("hub")
		mine.Store(&second)
		if err := c.channel().RefreshCredentials(ctx, second); err != nil {
			t.Fatal(err)
		}
		if n := c.rust.FillSlot("mine", ask("camera")); n != 1 {
			t.Errorf("the crate refreshes %d channels, want 1", n)
		}
		c.pass()
		if got := c.rust.Attributes(us, rustAuthority.Identifier); got["role"] != "hub" {
			t.Errorf("after the refresh the crate knows of us: %v", got)
		}
		// The crate refreshes on a task of its own, perhaps after its next message.
		for limit := time.Now().Add(patience); roleOfRust() != "camera"; c.pass() {
			if time.Now().After(limit) {
				t.Fatalf("after the refresh we know of the crate: %q", roleOfRust())
			}
		}
	})
}

func TestRotatedIdentities(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.config.Identity = rotated(t)
		c.rust.Rotate("rust")
		c.up()
		c.mustDial()
		c.rust.Worker("echo", "echo", c.rustWorkers)
		c.pass()

		// A key rotated between two channels: both sides take the longer history.
		if err := c.channel().Close(); err != nil {
			t.Error(err)
		}
		c.rust.WaitChannels("", 0)
		if err := c.config.Identity.Rotate(); err != nil {
			t.Fatal(err)
		}
		c.rust.Rotate("rust")
		c.mustDial()
		c.rust.Stop("echo") // it was open to the first channel alone where the crate dials
		c.rust.Worker("echo", "echo", c.rustWorkers)
		c.pass()
	})
}

func TestNestedChannels(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.up()
		c.mustDial()
		outer := c.channel()
		c.rustEnd()
		run := rustpeer.Run{Seed: 6, Count: 100, Sizes: []int{3, 5000}}
		if c.weDial {
			c.rust.Listener(rustpeer.ListenerConfig{Address: "inner", Identity: "rust", Open: []string{"listener"}})
			c.rust.Worker("sink", "deep", "inner")
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			inner, err := c.ours.endpoint.Dial(ctx, route.To(outer.EncryptorAddress(), "inner"), channel.TrustEveryone, channel.DialOptions{})
			if err != nil {
				t.Fatalf("the inner channel: %v", err)
			}
			for i := range run.Count {
				c.send(inner, "deep", "", run.At(i))
				if got := c.rust.MustNext("deep"); got.SHA256 != rustpeer.Digest(run.At(i)) {
					t.Fatalf("message %d arrived as %+v", i, got)
				}
			}
			return
		}
		if _, err := c.ours.endpoint.Listen("inner", channel.TrustEveryone, channel.ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.rust.Dial(rustpeer.DialConfig{Name: "inner", Identity: "rust", Route: []string{"@ch", "inner"}}); err != nil {
			t.Fatalf("the inner channel: %v", err)
		}
		if err := c.rust.Requests([]string{"@inner", "echo"}, run, patience); err != nil {
			t.Error(err)
		}
	})
}

// The initiator may move to another route, here another relay, and the
// responder answers there from the next message on (spec secure-channel 12).
func TestInitiatorMoves(t *testing.T) {
	eachWay(t, func(t *testing.T, c *cell) {
		c.up()
		c.mustDial()
		c.rust.Worker("echo", "echo", c.rustWorkers)
		c.pass()
		if c.weDial {
			second, err := c.rust.Relay("@hub", "second")
			if err != nil {
				t.Fatal(err)
			}
			c.hub.Stop(c.to)
			c.channel().UpdateRoute(route.To(second.Address))
		} else {
			second := c.ours.relay()
			c.hub.Stop(c.to)
			if err := c.rust.Reroute("ch", "@hub", second); err != nil {
				t.Fatal(err)
			}
		}
		c.pass()
	})
}
