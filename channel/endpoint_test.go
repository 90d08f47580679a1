package channel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

func TestDialSendReply(t *testing.T) {
	n := newTestNet()
	a, b, ab, ba := pair(t, n)
	if !ab.Confirmed() {
		t.Error("dial returned unconfirmed")
	}
	if got := ab.Peer().Identifier; got != b.id.Identifier() {
		t.Errorf("alice talks to %v", got)
	}
	if got := ba.Peer().Identifier; got != a.id.Identifier() {
		t.Errorf("bob talks to %v", got)
	}
	send(t, ab, "Hello Ockam!")
	d := b.next(t)
	if string(d.Frame.Payload) != "Hello Ockam!" || !d.Frame.Onward.Equal(route.To("app")) {
		t.Errorf("delivered %v %q", d.Frame.Onward, d.Frame.Payload)
	}
	if d.Channel != ba || d.Listener != "listener" {
		t.Errorf("channel %p listener %q", d.Channel, d.Listener)
	}
	if !d.Frame.Return.Equal(route.To(ba.EncryptorAddress(), "back")) {
		t.Errorf("return route %v", d.Frame.Return)
	}
	// An answer along the return route goes through the encryptor's worker.
	if err := b.Send(t.Context(), route.Frame{Onward: d.Frame.Return, Return: route.To("app"), Payload: []byte("hi")}, route.Stored); err != nil {
		t.Fatal(err)
	}
	d = a.next(t)
	if string(d.Frame.Payload) != "hi" || !d.Frame.Onward.Equal(route.To("back")) ||
		!d.Frame.Return.Equal(route.To(ab.EncryptorAddress(), "app")) || d.Listener != "" {
		t.Errorf("answer: %+v", d.Frame)
	}
	ok, err := a.ep.Forward(t.Context(), route.Frame{Onward: d.Frame.Return, Payload: []byte("again")})
	if !ok || err != nil {
		t.Errorf("forward: %v, %v", ok, err)
	}
	if d := b.next(t); string(d.Frame.Payload) != "again" {
		t.Errorf("forwarded %q", d.Frame.Payload)
	}
}

// TestRoutes checks each hop of spec secure-channel 6 and 12 on the wire.
func TestRoutes(t *testing.T) {
	n := newTestNet()
	_, b, ab, ba := pair(t, n)
	send(t, ab, "one")
	b.next(t)
	if err := ba.Send(t.Context(), route.To("x"), nil, []byte("two")); err != nil {
		t.Fatal(err)
	}
	m1, m3 := n.seen("alice")[0], n.seen("alice")[1]
	m2 := n.seen("bob")[0]
	last := func(r route.Route) string { a, _ := r.Last(); return a.Value }
	idr, rdr := last(m1.frame.Return), last(m2.frame.Return)
	for what, c := range map[string]struct {
		p           packet
		onward, ret route.Route
	}{
		"message 1": {m1, route.To("listener"), route.To("alice", idr)},
		"message 2": {m2, route.To(idr), route.To("bob", rdr)},
		"message 3": {m3, route.To(rdr), route.To("alice", idr)},
		"data":      {n.seen("alice")[3], route.To(rdr), route.To("alice")},
		"data back": {n.seen("bob")[2], route.To(idr), route.To("bob")},
	} {
		if !c.p.frame.Onward.Equal(c.onward) || !c.p.frame.Return.Equal(c.ret) {
			t.Errorf("%s: onward %v return %v, want %v and %v", what, c.p.frame.Onward, c.p.frame.Return, c.onward, c.ret)
		}
	}
	for _, a := range []string{idr, rdr, ab.EncryptorAddress(), ba.EncryptorAddress()} {
		if len(a) != 32 || strings.Trim(a, "0123456789abcdef") != "" {
			t.Errorf("address %q is not 32 hexadecimal digits", a)
		}
	}
	if !ab.RemoteRoute().Equal(route.To("bob", rdr)) || !ba.RemoteRoute().Equal(route.To("alice", idr)) {
		t.Errorf("remote routes %v, %v", ab.RemoteRoute(), ba.RemoteRoute())
	}
}

// TestResponderFollows: newer data moves the way back, older and replayed data
// does not, and neither do refresh and close.
func TestResponderFollows(t *testing.T) {
	n := newTestNet()
	_, b, ab, ba := pair(t, n)
	var via string
	n.onPacket(func(p packet) []packet {
		if p.from == "alice" {
			p.frame.Return = route.To(via)
		}
		return []packet{p}
	})
	idr, _ := ba.RemoteRoute().Last()
	for _, via = range []string{"moved", "again"} {
		send(t, ab, "m")
		b.next(t)
		if want := route.To(via, idr.Value); !ba.RemoteRoute().Equal(want) {
			t.Errorf("remote route %v, want %v", ba.RemoteRoute(), want)
		}
	}
	ab.UpdateRoute(route.To("elsewhere"))
	if r := ab.RemoteRoute(); len(r) != 2 || r[0] != route.Local("elsewhere") {
		t.Errorf("initiator's route %v", r)
	}
}

// undecided is a policy that cannot read what it goes by.
type undecided struct{}

func (undecided) Check(Peer) error { return fmt.Errorf("%w: no list", ErrUndecided) }

func TestRefusals(t *testing.T) {
	nobody := TrustIdentifiers()
	t.Run("our policy", func(t *testing.T) {
		n := newTestNet()
		a, b := n.party(t, "alice"), n.party(t, "bob")
		if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), nobody, DialOptions{})
		if !errors.Is(err, ErrWrongIdentity) {
			t.Errorf("%v, want ErrWrongIdentity", err)
		}
		if got := len(n.seen("alice")); got != 1 {
			t.Errorf("alice sent %d messages; the peer may not learn who she is", got)
		}
		if a.registered() != 0 {
			t.Error("addresses are left")
		}
		if _, known := a.reg.Get(b.id.Identifier()); known {
			t.Error("a refused peer is in the registry")
		}
	})
	t.Run("the peer's policy", func(t *testing.T) {
		n := newTestNet()
		a, b := n.party(t, "alice"), n.party(t, "bob")
		if _, err := b.ep.Listen("listener", nobody, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: wait})
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%v, want ErrRefused", err)
		}
		// He forgets the handshake once he has said no.
		waitFor(t, func() bool { return b.ep.Stats().HalfOpen == 0 })
		if s := b.ep.Stats(); s.Refused != 1 || s.Channels != 0 {
			t.Errorf("bob's stats %+v", s)
		}
	})
	t.Run("the peer's policy, in order", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newTestNet()
			a, b := n.party(t, "alice"), n.party(t, "bob")
			if _, err := b.ep.Listen("listener", nobody, ListenOptions{}); err != nil {
				t.Fatal(err)
			}
			var unblock func()
			n.onPacket(func(p packet) []packet {
				if p.from == "bob" && unblock == nil {
					unblock = b.block() // message 2 is through: the refusal waits
				}
				return []packet{p}
			})
			refused := make(chan error, 1)
			go func() {
				_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{})
				refused <- err
			}()
			synctest.Wait()
			// Where nobody is at an address any more, a hub says so.
			if s := b.ep.Stats(); b.registered() != 2 || s.HalfOpen != 0 || s.Refused != 1 {
				t.Errorf("%d addresses before alice hears that she is refused, %+v", b.registered(), s)
			}
			unblock()
			if err := <-refused; !errors.Is(err, ErrRefused) {
				t.Error(err)
			}
			synctest.Wait()
			if b.registered() != 1 {
				t.Errorf("%d addresses are left", b.registered())
			}
		})
	})
	t.Run("our policy cannot decide", func(t *testing.T) {
		var broken Policy = undecided{}
		for name, policy := range map[string]Policy{"alone": broken, "and": And(TrustEveryone, broken), "or": Or(nobody, broken)} {
			n := newTestNet()
			a, b := n.party(t, "alice"), n.party(t, "bob")
			if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
				t.Fatal(err)
			}
			_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), policy, DialOptions{})
			if !errors.Is(err, ErrUndecided) || errors.Is(err, ErrWrongIdentity) || !strings.Contains(err.Error(), b.id.Identifier().String()) {
				t.Errorf("%s: %v", name, err)
			}
			if s := a.ep.Stats(); s.Refused != 0 || s.Failed != 1 || len(n.seen("alice")) != 1 {
				t.Errorf("%s: %+v, %d messages", name, s, len(n.seen("alice")))
			}
		}
		n := newTestNet()
		a, b := n.party(t, "alice"), n.party(t, "bob")
		if _, err := b.ep.Listen("listener", broken, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: wait}); !errors.Is(err, ErrRefused) {
			t.Errorf("of the listener: %v", err)
		}
		waitFor(t, func() bool { return b.ep.Stats().HalfOpen == 0 })
		if s := b.ep.Stats(); s.Refused != 0 || s.Failed != 1 {
			t.Errorf("bob's stats %+v", s)
		}
	})
	t.Run("no answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a := newTestNet().party(t, "alice")
			start := time.Now()
			_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{})
			if !errors.Is(err, ErrTimeout) || time.Since(start) != 30*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := a.ep.Dial(ctx, route.To("bob", "x"), TrustEveryone, DialOptions{}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want the context's error", err)
			}
		})
	})
	t.Run("nonsense", func(t *testing.T) {
		a := newTestNet().party(t, "alice")
		if _, err := a.ep.Dial(t.Context(), nil, TrustEveryone, DialOptions{}); err == nil {
			t.Error("an empty route is accepted")
		}
		if _, err := a.ep.Dial(t.Context(), route.To("b"), nil, DialOptions{}); !errors.Is(err, errNoPolicy) {
			t.Errorf("no policy: %v", err)
		}
		if _, err := a.ep.Listen("x", nil, ListenOptions{}); !errors.Is(err, errNoPolicy) {
			t.Errorf("no policy: %v", err)
		}
		if _, err := NewEndpoint(Config{}); err == nil {
			t.Error("an empty config is accepted")
		}
	})
}

// TestRefusalOutweighsTheContext: who has been refused hears so, whatever else ends the wait
// in that moment, as a hub's word that nobody is there any more.
func TestRefusalOutweighsTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := &Channel{confirmed: make(chan struct{}), spoke: make(chan struct{}), done: make(chan struct{}), err: ErrRefused}
	close(c.done)
	for range 50 {
		if err := c.awaitHello(ctx, time.Hour); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
	}
}

// TestStockPeer: a peer without hello is a usable, unconfirmed channel after
// 250 ms, or at once when it speaks.
func TestStockPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b := n.party(t, "alice"), n.party(t, "bob")
		if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		bobSends := 0
		n.onPacket(func(p packet) []packet {
			if p.from == "bob" {
				if bobSends++; bobSends == 2 {
					return nil // his hello
				}
			}
			return []packet{p}
		})
		start := time.Now()
		c := dial(t, a, "bob", DialOptions{})
		if c.Confirmed() || time.Since(start) != confirmWait {
			t.Errorf("confirmed %v after %v", c.Confirmed(), time.Since(start))
		}
		send(t, c, "works")
		if d := b.next(t); string(d.Frame.Payload) != "works" {
			t.Errorf("%q", d.Frame.Payload)
		}
		start = time.Now()
		dial(t, a, "bob", DialOptions{NoConfirm: true})
		if time.Since(start) != 0 {
			t.Errorf("without confirmation it took %v", time.Since(start))
		}
	})
}

func TestDowngradeIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		var reports []Downgrade
		var mu sync.Mutex
		a := n.party(t, "alice", func(c *Config) {
			c.OnDowngrade = func(d Downgrade) {
				mu.Lock()
				defer mu.Unlock()
				reports = append(reports, d)
			}
		})
		b := n.party(t, "bob")
		if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		if c := dial(t, a, "bob", DialOptions{}); !c.Confirmed() {
			t.Fatal("not confirmed")
		}
		count := 0
		n.onPacket(func(p packet) []packet {
			if p.from == "bob" {
				if count++; count > 1 {
					return nil
				}
			}
			return []packet{p}
		})
		c := dial(t, a, "bob", DialOptions{})
		time.Sleep(helloGrace + time.Second)
		mu.Lock()
		defer mu.Unlock()
		if len(reports) != 1 || reports[0].Channel != c || reports[0].Peer != b.id.Identifier() {
			t.Errorf("reports: %v", reports)
		}
		if a.ep.Stats().Downgrade != 1 {
			t.Error("not counted")
		}
	})
}

func TestCloseReachesThePeer(t *testing.T) {
	for _, initiator := range []bool{true, false} {
		t.Run(fmt.Sprintf("initiator=%v", initiator), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b, ab, ba := pair(t, n)
				closing, other := ab, ba
				if !initiator {
					closing, other = ba, ab
				}
				if err := closing.Close(); err != nil {
					t.Fatal(err)
				}
				ended(t, closing, ErrClosed)
				ended(t, other, ErrPeerClosed)
				if err := closing.Send(t.Context(), route.To("x"), nil, nil); !errors.Is(err, ErrClosed) {
					t.Errorf("send on closed: %v", err)
				}
				if err := other.Send(t.Context(), route.To("x"), nil, nil); !errors.Is(err, ErrPeerClosed) {
					t.Errorf("send on closed by the peer: %v", err)
				}
				if err := closing.Close(); err != nil {
					t.Errorf("closing again: %v", err)
				}
				synctest.Wait()
				sent := len(n.seen("alice")) + len(n.seen("bob"))
				if want := 3 + 2 + 1; sent != want { // handshake, hellos, one Close
					t.Errorf("%d packets, want %d: no Close in reply to Close", sent, want)
				}
				if x, y := a.registered(), b.registered(); x != 0 || y != 1 {
					t.Errorf("addresses left: %d, %d", x, y)
				}
			})
		})
	}
}

func TestClassOfTheChannel(t *testing.T) {
	n := newTestNet()
	a, b := n.party(t, "alice"), n.party(t, "bob")
	if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	c := dial(t, a, "bob", DialOptions{Class: route.Transient})
	send(t, c, "m")
	d := b.next(t)
	if err := d.Channel.Send(t.Context(), route.To("x"), nil, nil); err != nil {
		t.Fatal(err)
	}
	a.next(t)
	for i, p := range n.seen("alice") {
		if want := route.Class(min(i/2, 1)); p.class != want { // messages 1 and 3 are stored
			t.Errorf("alice's packet %d is %v", i, p.class)
		}
	}
	if d.Channel.Class() != route.Transient || d.Class != route.Transient {
		t.Errorf("bob answers %v, got %v", d.Channel.Class(), d.Class)
	}
}

// TestNested: a channel in a channel, three deep.
func TestNested(t *testing.T) {
	n := newTestNet()
	a, b, outer, _ := pair(t, n)
	for range 2 {
		c, err := a.ep.Dial(t.Context(), route.To(outer.EncryptorAddress(), "listener"), TrustIdentifiers(b.id.Identifier()), DialOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !c.Confirmed() {
			t.Error("not confirmed")
		}
		outer = c
	}
	send(t, outer, "deep")
	d := b.next(t)
	if string(d.Frame.Payload) != "deep" {
		t.Errorf("%q", d.Frame.Payload)
	}
	if err := b.Send(t.Context(), route.Frame{Onward: d.Frame.Return, Payload: []byte("up")}, route.Stored); err != nil {
		t.Fatal(err)
	}
	if d := a.next(t); string(d.Frame.Payload) != "up" || d.Channel != outer {
		t.Errorf("answer %q", d.Frame.Payload)
	}
}

func TestCredentials(t *testing.T) {
	authority, stranger := newIdentity(t), newIdentity(t)
	issue := func(by *identity.Private, to *identity.Private, role string) []byte {
		c, err := by.IssueCredential(to.Identity(), map[string]string{"role": role}, 1, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	n := newTestNet()
	b := n.party(t, "bob")
	policy := TrustCredential(authority.Identity(), map[string]string{"role": "sensor"})
	if _, err := b.ep.Listen("listener", policy, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	var shown []byte
	a := n.party(t, "alice", func(c *Config) {
		c.Credential = func() ([]byte, error) { return shown, nil }
	})
	other := newIdentity(t)
	for name, c := range map[string]struct {
		credential []byte
		hide       bool
		want       error
	}{
		"good":            {issue(authority, a.id, "sensor"), false, nil},
		"hidden":          {issue(authority, a.id, "sensor"), true, ErrRefused},
		"none":            {nil, false, ErrRefused},
		"other role":      {issue(authority, a.id, "admin"), false, ErrRefused},
		"other subject":   {issue(authority, other, "sensor"), false, ErrRefused},
		"other authority": {issue(stranger, a.id, "sensor"), false, ErrRefused},
	} {
		t.Run(name, func(t *testing.T) {
			shown = c.credential
			ch, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{HideCredential: c.hide, Timeout: wait})
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if err == nil {
				_ = ch.Close()
			}
		})
	}
	t.Run("refresh", func(t *testing.T) {
		shown = issue(authority, a.id, "sensor")
		ch := dial(t, a, "bob", DialOptions{})
		send(t, ch, "m")
		bobs := b.next(t).Channel
		role := func() string {
			creds := bobs.Peer().Credentials
			if len(creds) != 1 {
				return ""
			}
			return creds[0].Attributes["role"]
		}
		refresh := func(c []byte) {
			t.Helper()
			before := len(n.seen("alice"))
			if err := ch.RefreshCredentials(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			if len(n.seen("alice")) == before {
				t.Fatal("nothing sent")
			}
		}
		if role() != "sensor" {
			t.Fatalf("role %q", role())
		}
		refresh(issue(authority, a.id, "second"))
		waitFor(t, func() bool { return role() == "second" })
		refresh(issue(stranger, a.id, "forged"))
		refresh(issue(authority, a.id, "third")) // in order: the stranger's left no trace
		waitFor(t, func() bool { return role() == "third" })
		before := len(n.seen("alice"))
		c := issue(authority, a.id, "third again")
		refresh(c)
		if err := ch.RefreshCredentials(t.Context(), c); err != nil || len(n.seen("alice")) != before+1 {
			t.Errorf("the same credential was sent again, or %v", err)
		}
		if err := ch.RefreshCredentials(t.Context(), []byte{1}); err == nil {
			t.Error("nonsense is accepted as a credential")
		}
	})
}

// waitFor polls without sleeping: the scheduler runs whatever is due.
func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatal("condition did not come true")
		}
	}
}

func TestEndpointCloseEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, ba := pair(t, n)
		dialled := make(chan error, 1)
		go func() {
			_, err := a.ep.Dial(context.Background(), route.To("nobody", "x"), TrustEveryone, DialOptions{})
			dialled <- err
		}()
		synctest.Wait()
		if err := a.ep.Close(); err != nil {
			t.Fatal(err)
		}
		ended(t, ab, ErrClosed)
		ended(t, ba, ErrPeerClosed)
		if err := <-dialled; !errors.Is(err, ErrClosed) {
			t.Errorf("dial: %v", err)
		}
		if _, err := a.ep.Listen("x", TrustEveryone, ListenOptions{}); !errors.Is(err, ErrClosed) {
			t.Errorf("listen: %v", err)
		}
		if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{}); !errors.Is(err, ErrClosed) {
			t.Errorf("dial: %v", err)
		}
		if a.registered() != 0 || b.registered() != 1 {
			t.Errorf("addresses left: %d, %d", a.registered(), b.registered())
		}
	})
}

func TestListenerAliasAndClose(t *testing.T) {
	n := newTestNet()
	a, b := n.party(t, "alice"), n.party(t, "bob")
	ln, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err == nil {
		t.Error("the same name twice is accepted")
	}
	if err := ln.Alias("m"); err != nil {
		t.Fatal(err)
	}
	c, err := a.ep.Dial(t.Context(), route.To("bob", "m", "ignored"), TrustEveryone, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	send(t, c, "the channel outlives its listener")
	b.next(t)
	if _, err := a.ep.Dial(t.Context(), route.To("bob", "m"), TrustEveryone, DialOptions{Timeout: 50 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("%v, want ErrTimeout", err)
	}
	if err := ln.Alias("n"); !errors.Is(err, ErrClosed) {
		t.Errorf("alias of a closed listener: %v", err)
	}
}

// A listener shows its credential, unless it is told not to.
func TestListenerHidesCredential(t *testing.T) {
	authority := newIdentity(t)
	n := newTestNet()
	var shown []byte
	b := n.party(t, "bob", func(c *Config) { c.Credential = func() ([]byte, error) { return shown, nil } })
	var err error
	if shown, err = authority.IssueCredential(b.id.Identity(), map[string]string{"role": "pump"}, 1, time.Hour); err != nil {
		t.Fatal(err)
	}
	for addr, hide := range map[string]bool{"shows": false, "hides": true} {
		if _, err := b.ep.Listen(addr, TrustEveryone, ListenOptions{HideCredential: hide}); err != nil {
			t.Fatal(err)
		}
	}
	a := n.party(t, "alice")
	pump := TrustCredential(authority.Identity(), map[string]string{"role": "pump"})
	ch, err := a.ep.Dial(t.Context(), route.To("bob", "shows"), pump, DialOptions{Timeout: wait})
	if err != nil {
		t.Fatal(err)
	}
	if c := ch.Peer().Credentials; len(c) != 1 || c[0].Attributes["role"] != "pump" {
		t.Errorf("shown: %v", c)
	}
	if _, err := a.ep.Dial(t.Context(), route.To("bob", "hides"), pump, DialOptions{Timeout: wait}); err == nil {
		t.Error("a hidden credential was seen")
	}
	if _, err = a.ep.Dial(t.Context(), route.To("bob", "hides"), TrustEveryone, DialOptions{Timeout: wait}); err != nil {
		t.Error(err)
	}
}
