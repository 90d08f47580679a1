package device

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// knock takes the CONNECT of the next connection and answers it.
func (h *fakeHub) knock(code byte) (*fakeConn, *packets.ConnectPacket) {
	h.t.Helper()
	c := h.raw()
	connect, ok := c.read().(*packets.ConnectPacket)
	if !ok {
		h.t.Fatal("no CONNECT")
	}
	c.device = connect.ClientIdentifier
	ack := packets.NewControlPacket(packets.Connack).(*packets.ConnackPacket)
	ack.ReturnCode = code
	c.write(ack)
	return c, connect
}

// greeted takes SUBSCRIBE and hello.
func (h *fakeHub) greeted(c *fakeConn) *fakeConn {
	h.t.Helper()
	sub, ok := c.read().(*packets.SubscribePacket)
	if !ok || len(sub.Topics) != 1 || sub.Topics[0] != "sealmq/"+c.device+"/in" {
		h.t.Fatalf("not a SUBSCRIBE to the inbox: %v", sub)
	}
	ack := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
	ack.MessageID, ack.ReturnCodes = sub.MessageID, []byte{1}
	c.write(ack)
	pub := c.publish()
	c.helloF = c.frames(pub)[0]
	req, err := hubproto.ParseHelloRequest(c.helloF.Payload)
	if err != nil {
		h.t.Fatal(err)
	}
	c.hello = req
	c.puback(pub.MessageID)
	return c
}

// guest takes a guest's connection up to its hello.
func (h *fakeHub) guest() *fakeConn {
	h.t.Helper()
	c, connect := h.knock(packets.Accepted)
	if connect.Username != hubproto.GuestUser || len(connect.Password) != 0 || !hubproto.IsGuestName(connect.ClientIdentifier) {
		h.t.Fatalf("not a guest: %v as %q", connect.ClientIdentifier, connect.Username)
	}
	return h.greeted(c)
}

// shown takes a device's connection and checks its proof.
func (h *fakeHub) shown(hub *identity.Private, code byte) *fakeConn {
	h.t.Helper()
	c, connect := h.knock(code)
	if connect.Username != hubproto.ProofUser {
		h.t.Fatalf("user name %q", connect.Username)
	}
	p, err := hubproto.ParseProof(connect.Password)
	if err != nil {
		h.t.Fatal(err)
	}
	want := hubproto.ProofBinding{Hub: hub.Identifier(), ClientID: connect.ClientIdentifier}
	if _, err := p.Verify(testIdentity().Identity(), want, time.Now(), proofTestSkew); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// proofTestSkew spans from the bubble's clock, on which the hub reads the time, to
// whatever the identity was made at.
const proofTestSkew = 100 * 365 * 24 * time.Hour

// sign answers hello as hub, by its clock.
func (c *fakeConn) sign(hub *identity.Private, at time.Time) {
	c.t.Helper()
	sig, err := hub.Sign(hubproto.HelloContext, hubproto.HelloSigned(c.hello.Nonce, at, nil))
	if err != nil {
		c.t.Fatal(err)
	}
	c.post(&hubproto.HelloAnswer{
		Hub: hub.Identifier(), Time: at, FrameLimit: 64 << 10, Window: 64,
		Signature: sig, History: hub.Identity().ChangeHistory(),
	})
}

// proving is a configuration of a device that proves itself.
func (h *fakeHub) proving(hub *identity.Private) Config {
	cfg := h.config()
	cfg.InsecureProofWithoutTLS = true
	if hub != nil {
		cfg.Hub = hub.Identifier()
	}
	return cfg
}

func hubFor(t *testing.T) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// admitted waits for the node and ends it.
func admitted(t *testing.T, wait func() (*Node, error), c *fakeConn) {
	t.Helper()
	n, err := wait()
	if err != nil {
		t.Fatal(err)
	}
	go c.drain()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	_ = c.Close()
}

func TestIntroduction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, hub := newFakeHub(t), hubFor(t)
		wait := h.connect(t.Context(), h.proving(nil))
		g := h.guest()
		g.sign(hub, time.Now())
		g.drain()
		_ = g.Close()
		c := h.greeted(h.shown(hub, packets.Accepted))
		c.sign(hub, time.Now())
		admitted(t, wait, c)
	})
}

// TestPlainBroker: who takes no guests, or proves nothing, gets no proof.
func TestPlainBroker(t *testing.T) {
	for name, refuse := range map[string]func(*fakeHub){
		"refuses guests": func(h *fakeHub) { c, _ := h.knock(packets.ErrRefusedNotAuthorised); _ = c.Close() },
		"wants a password": func(h *fakeHub) {
			c, _ := h.knock(packets.ErrRefusedBadUsernameOrPassword)
			_ = c.Close()
		},
		"does not answer": func(h *fakeHub) { c := h.guest(); c.drain(); _ = c.Close() },
		"proves nothing": func(h *fakeHub) {
			c := h.guest()
			c.post(&hubproto.HelloAnswer{Time: time.Now()})
			c.drain()
			_ = c.Close()
		},
		"answers rubbish":  func(h *fakeHub) { c := h.guest(); c.helloF.Payload = nil; c.rubbish(); c.drain(); _ = c.Close() },
		"has a stolen key": func(h *fakeHub) { c := h.guest(); c.forge(hubFor(h.t)); c.drain(); _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				wait := h.connect(t.Context(), h.proving(nil))
				refuse(h)
				c, connect := h.knock(packets.Accepted)
				if connect.UsernameFlag || connect.PasswordFlag {
					t.Errorf("it got %q and %d bytes", connect.Username, len(connect.Password))
				}
				h.greeted(c).post(&hubproto.HelloAnswer{Time: time.Now(), Window: 8})
				admitted(t, wait, c)
			})
		})
	}
}

// TestBusyHubIsAskedAgain: a hub that has no time for a guest, and wants a proof, is
// asked again, and not taken for a plain broker for good.
func TestBusyHubIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, hub := newFakeHub(t), hubFor(t)
		cfg := h.proving(nil)
		cfg.KeepTrying = true
		wait := h.connect(t.Context(), cfg)
		for range 3 {
			g := h.guest()
			g.drain()
			_ = g.Close()
			c, connect := h.knock(packets.ErrRefusedNotAuthorised)
			if connect.UsernameFlag || connect.PasswordFlag {
				t.Errorf("it got %q and %d bytes", connect.Username, len(connect.Password))
			}
			_ = c.Close()
		}
		g := h.guest()
		g.sign(hub, time.Now())
		g.drain()
		_ = g.Close()
		c := h.greeted(h.shown(hub, packets.Accepted))
		c.sign(hub, time.Now())
		admitted(t, wait, c)
	})
}

// TestPasswordInTheClear: a password goes to another machine over TLS, or when that is
// asked for by name.
func TestPasswordInTheClear(t *testing.T) {
	for _, c := range []struct {
		url      string
		insecure bool
		refused  bool
	}{
		{"mqtt://user:secret@hub.example", false, true},
		{"ws://user:secret@192.0.2.1:80", false, true},
		{"mqtt://user:secret@hub.example", true, false},
		{"mqtts://user:secret@hub.example", false, false},
		{"wss://user:secret@hub.example", false, false},
		{"mqtt://user:secret@127.0.0.1:1883", false, false},
		{"mqtt://user:secret@localhost", false, false},
		{"mqtt://user@hub.example", false, false},
	} {
		dialled := errors.New("dialled")
		_, err := Connect(t.Context(), c.url, Config{
			Identity: testIdentity(), InsecurePasswordWithoutTLS: c.insecure,
			DialNetwork: func(context.Context, string, string) (net.Conn, error) { return nil, dialled },
		})
		if errors.Is(err, ErrClearPassword) != c.refused || errors.Is(err, ErrHubAway) == c.refused {
			t.Errorf("%s, insecure %v: %v", c.url, c.insecure, err)
		}
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", c.url, err)
		}
	}
}

// rubbish answers hello with what is no answer.
func (c *fakeConn) rubbish() {
	f := c.helloF
	f.Onward, f.Return, f.Payload = f.Return, f.Onward, []byte{0xff}
	c.write(inboxPublish(c.device, 1, route.AppendFrame(nil, &f)))
}

// post answers hello and does not wait for the acknowledgement: a guest leaves as
// soon as it has its answer.
func (c *fakeConn) post(a *hubproto.HelloAnswer) {
	c.t.Helper()
	body, err := a.Marshal()
	if err != nil {
		c.t.Fatal(err)
	}
	f := route.Frame{Onward: c.helloF.Return, Return: route.To("hello"), Payload: body}
	c.write(inboxPublish(c.device, 1, route.AppendFrame(nil, &f)))
}

// forge answers hello as hub, signed for another nonce.
func (c *fakeConn) forge(hub *identity.Private) {
	c.hello.Nonce[0] ^= 1
	c.sign(hub, time.Now())
}

// Check says what Connect would without connecting, and before there is an identity.
func TestCheck(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "known_hubs")
	if err := os.WriteFile(bad, []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		url  string
		cfg  Config
		good bool
		is   error
	}{
		{url: "mqtt://192.0.2.1", good: true},
		{url: "192.0.2.1", is: ErrURL},
		{url: "mqtt://192.0.2.1", cfg: Config{Password: "secret"}, is: ErrClearPassword},
		{url: "mqtts://u:secret@192.0.2.1", good: true},
		{url: "mqtt://u:secret@192.0.2.1", is: ErrClearPassword},
		{url: "mqtt://192.0.2.1", cfg: Config{KeepAlive: time.Second}},
		{url: "mqtt://192.0.2.1", cfg: Config{KnownHubs: bad}},
	} {
		if err := Check(c.url, c.cfg); (err == nil) != c.good || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s, %+v: %v", c.url, c.cfg, err)
		}
	}
	if _, err := Connect(t.Context(), "mqtt://127.0.0.1:1", Config{}); err == nil || errors.Is(err, ErrHubAway) {
		t.Errorf("without an identity: %v", err)
	}
}

func TestClockError(t *testing.T) {
	for _, off := range []time.Duration{time.Hour, -2 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			h, hub := newFakeHub(t), hubFor(t)
			cfg := h.proving(hub)
			refused := func() {
				c := h.shown(hub, packets.ErrRefusedBadUsernameOrPassword)
				_ = c.Close()
				g := h.guest()
				g.sign(hub, time.Now().Add(off))
				g.drain()
				_ = g.Close()
			}
			wait := h.connect(t.Context(), cfg)
			refused()
			_, err := wait()
			var clock *ClockError
			if !errors.Is(err, ErrClock) || !errors.Is(err, ErrHubRefused) || !errors.As(err, &clock) || clock.Ahead != -off {
				t.Errorf("%v", err)
			}
			// A device that goes on trying gets in once somebody has set a clock.
			cfg.KeepTrying = true
			wait = h.connect(t.Context(), cfg)
			refused()
			c := h.greeted(h.shown(hub, packets.Accepted))
			c.sign(hub, time.Now())
			admitted(t, wait, c)
		})
	}
}

// TestProofOnceMore: a refusal that neither hub nor clock explains is tried once
// more, a second later, and is then final.
func TestProofOnceMore(t *testing.T) {
	for _, accepted := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			h, hub := newFakeHub(t), hubFor(t)
			wait := h.connect(t.Context(), h.proving(hub))
			c := h.shown(hub, packets.ErrRefusedBadUsernameOrPassword)
			_ = c.Close()
			g := h.guest()
			g.sign(hub, time.Now())
			g.drain()
			_ = g.Close()
			begun := time.Now()
			if accepted {
				c = h.greeted(h.shown(hub, packets.Accepted))
				c.sign(hub, time.Now())
				admitted(t, wait, c)
			} else {
				c = h.shown(hub, packets.ErrRefusedBadUsernameOrPassword)
				_ = c.Close()
				if _, err := wait(); !errors.Is(err, ErrBadProof) || !isPermanent(err) {
					t.Errorf("%v", err)
				}
			}
			if d := time.Since(begun); d < time.Second {
				t.Errorf("after %v", d)
			}
		})
	}
}

// TestCredentialHasEnded: who is not let in with a credential that has ended is told so.
func TestCredentialHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, hub, authority := newFakeHub(t), hubFor(t), hubFor(t)
		shown, err := authority.IssueCredential(testIdentity().Identity(), map[string]string{"role": "pump"}, 1, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		cfg := h.proving(hub)
		cfg.HubCredential = func() ([]byte, error) { return shown, nil }
		for _, ended := range []bool{false, true} {
			wait := h.connect(t.Context(), cfg)
			_ = h.shown(hub, packets.ErrRefusedNotAuthorised).Close()
			if _, err := wait(); !errors.Is(err, ErrNotAllowed) || strings.Contains(err.Error(), "2000-01-01T00:01:00Z") != ended {
				t.Errorf("ended %v: %v", ended, err)
			}
			time.Sleep(2 * time.Minute)
		}
	})
}

// TestAnotherHubRefuses: the refusal comes from a hub that is not the pinned one.
func TestAnotherHubRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, hub, other := newFakeHub(t), hubFor(t), hubFor(t)
		wait := h.connect(t.Context(), h.proving(hub))
		c := h.shown(hub, packets.ErrRefusedBadUsernameOrPassword)
		_ = c.Close()
		g := h.guest()
		g.sign(other, time.Now())
		g.drain()
		_ = g.Close()
		var mismatch *HubMismatchError
		if _, err := wait(); !errors.As(err, &mismatch) || mismatch.Got != other.Identifier() || !isPermanent(err) {
			t.Errorf("%v", err)
		}
	})
}

// TestHubShowsAnOldKey: a hub's key that was rotated away proves nothing any more.
func TestHubShowsAnOldKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, hub := newFakeHub(t), hubFor(t)
		old := hub.Identity()
		cfg := h.proving(hub)
		cfg.Registry = identity.NewMemoryRegistry(0)
		if err := hub.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := cfg.Registry.Update(hub.Identity()); err != nil {
			t.Fatal(err)
		}
		known := hubIdentity{pin: hub.Identifier(), seen: cfg.Registry}
		g := newGreeting()
		sig, err := hub.Sign(hubproto.HelloContext, hubproto.HelloSigned(g.nonce, time.Now(), nil))
		if err != nil {
			t.Fatal(err)
		}
		a := &hubproto.HelloAnswer{Hub: hub.Identifier(), Time: time.Now(), Signature: sig, History: hub.Identity().ChangeHistory()}
		if err := known.verify(&g, a, nil); err != nil {
			t.Errorf("the new key: %v", err)
		}
		a.History = old.ChangeHistory()
		fresh := hubIdentity{pin: hub.Identifier(), seen: cfg.Registry}
		if err := fresh.verify(&g, a, nil); !errors.Is(err, ErrWrongHub) {
			t.Errorf("the old history: %v", err)
		}
	})
}
