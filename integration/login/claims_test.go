package login

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

func forwarder(t testing.TB, n *device.Node, opts ...device.ForwarderOption) *device.Forwarder {
	t.Helper()
	if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	f, err := n.CreateForwarder(within(t), "listener", opts...)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestClaims(t *testing.T) {
	data := dataDir(t)
	h := startHub(t, broker.Config{Data: data})
	addr := h.MQTTAddr().String()
	bobID := newIdentity(t)
	bob, alice := connect(t, h.MQTTURL(), device.Config{Identity: bobID}), connect(t, h.MQTTURL(), device.Config{})
	dynamic := forwarder(t, bob)
	static, err := bob.CreateForwarder(within(t), "listener", device.Alias("bob"))
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range []*device.Forwarder{dynamic, static} {
		o, err := alice.Lookup(within(t), f.Address())
		if err != nil || !o.Signed || o.FirstUse != (i == 0) || o.Owner != bob.Identifier() || o.Number == 0 || !o.Online ||
			time.Until(o.Until) < hubproto.ClaimTTL-time.Hour || o.Device != bob.ClientID() {
			t.Errorf("%+v, %v", o, err)
		}
		ch, err := alice.Dial(within(t), route.To(f.Address()), channel.TrustIdentifiers(bob.Identifier()))
		if err != nil {
			t.Fatal(err)
		}
		_ = ch.Close()
		if o, err = alice.Lookup(within(t), f.Address()); err != nil || o.FirstUse {
			t.Errorf("after the handshake: %+v, %v", o, err)
		}
	}
	if _, err := alice.Lookup(within(t), "FWD_0123"); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("unknown: %v", err)
	}
	_, err = alice.Dial(within(t), route.To(static.Address()), channel.TrustIdentifiers(identity.Identifier{1}))
	if !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("claimed by somebody else: %v", err)
	}

	// A rotated key signs them again by itself, with a newer number; and they survive
	// the hub.
	newer := func(f *device.Forwarder, than uint64) {
		t.Helper()
		eventually(t, "a newer claim", func() bool {
			r := h.Bridge().Forwarder(f.Address())
			if r == nil || len(r.Claim) == 0 {
				return false
			}
			c, err := hubproto.ParseClaim(r.Claim)
			return err == nil && c.Number > than
		})
	}
	number := func(f *device.Forwarder) uint64 {
		t.Helper()
		o, err := alice.Lookup(within(t), f.Address())
		if err != nil || !o.Signed {
			t.Fatalf("%+v, %v", o, err)
		}
		return o.Number
	}
	before := map[*device.Forwarder]uint64{static: number(static), dynamic: number(dynamic)}
	if err := bobID.Rotate(); err != nil {
		t.Fatal(err)
	}
	for f, n := range before {
		newer(f, n)
	}
	n := number(static)
	if err := bobID.Rotate(); err != nil {
		t.Fatal(err)
	}
	stopHub(t, h)
	h = startHub(t, broker.Config{Data: data, MQTT: []string{addr}})
	newer(static, n)
	if now := number(static); now <= n {
		t.Errorf("number %d after %d", now, n)
	}

	// Given up, an alias is free for others at once.
	carol := connect(t, h.MQTTURL(), device.Config{})
	if _, err := carol.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	if _, err := carol.CreateForwarder(within(t), "listener", device.Alias("bob")); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("somebody else's alias: %v", err)
	}
	if err := static.Release(within(t)); err != nil {
		t.Error(err)
	}
	if _, err := alice.Lookup(within(t), static.Address()); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("released: %v", err)
	}
	if _, err := carol.CreateForwarder(within(t), "listener", device.Alias("bob")); err != nil {
		t.Error(err)
	}
	if o, err := alice.Lookup(within(t), static.Address()); err != nil || o.Owner != carol.Identifier() || !o.Signed {
		t.Errorf("taken by another: %+v, %v", o, err)
	}
	if err := static.Release(within(t)); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("released what is another's: %v", err)
	}
}

// TestClaimsRefused: what the hub does not keep.
func TestClaimsRefused(t *testing.T) {
	h := startHub(t, broker.Config{})
	bobID, eveID := newIdentity(t), newIdentity(t)
	bob, eve := connect(t, h.MQTTURL(), device.Config{Identity: bobID}), connect(t, h.MQTTURL(), device.Config{Identity: eveID})
	f := forwarder(t, bob)
	kept := h.Bridge().Forwarder(f.Address()).Claim
	make1 := func(by *identity.Private, address string, number uint64, until time.Duration) []byte {
		t.Helper()
		c, err := hubproto.MakeClaim(by, address, number, time.Now().Add(until))
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const high = 1 << 62
	forged := make1(bobID, f.Address(), high, time.Hour)
	i := slices.Index(forged, 0x1b) // the number's head
	forged[i+8] ^= 1
	for name, tt := range map[string]struct {
		by    *device.Node
		claim []byte
	}{
		"another's address":          {eve, make1(eveID, f.Address(), high, time.Hour)},
		"another's claim":            {eve, make1(bobID, f.Address(), high, time.Hour)},
		"an older number":            {bob, make1(bobID, f.Address(), 1, time.Hour)},
		"an ended one":               {bob, make1(bobID, f.Address(), high, -time.Hour)},
		"a very long one":            {bob, make1(bobID, f.Address(), high, 10*hubproto.MaxClaimTTL)},
		"an address that is nowhere": {bob, make1(bobID, "FWD_00", high, time.Hour)},
		"a forged one":               {bob, forged},
	} {
		if _, err := tt.by.Request(within(t), route.To(hubproto.ServiceClaim), tt.claim); !errors.Is(err, device.ErrHubRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := bob.Request(within(t), route.To(hubproto.ServiceClaim), []byte("?")); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("rubbish: %v", err)
	}
	if now := h.Bridge().Forwarder(f.Address()).Claim; !slices.Equal(now, kept) {
		t.Error("the claim has changed")
	}
	release, err := (&hubproto.ReleaseRequest{Address: f.Address()}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := eve.Request(within(t), route.To(hubproto.ServiceRelease), release); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("release of another's: %v", err)
	}
	// Another program with the same identity may.
	tool := connect(t, h.MQTTURL(), device.Config{Identity: bobID, OneShot: true})
	if _, err := tool.Request(within(t), route.To(hubproto.ServiceRelease), release); err != nil {
		t.Errorf("release by another program of the owner: %v", err)
	}
	if h.Bridge().Forwarder(f.Address()) != nil {
		t.Error("it is still there")
	}
}

// TestStockRegistrationIsUnsigned: a forwarder of somebody who cannot sign claims
// can be dialled, and is not signed.
func TestStockRegistrationIsUnsigned(t *testing.T) {
	h := startHub(t, broker.Config{})
	bob, alice := connect(t, h.MQTTURL(), device.Config{}), connect(t, h.MQTTURL(), device.Config{})
	if _, err := bob.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	addr, err := h.Bridge().Register(bridge.Registration{Route: route.To(h.Bridge().HubAddress(bob.ClientID()), "listener")})
	if err != nil {
		t.Fatal(err)
	}
	if o, err := alice.Lookup(within(t), addr); err != nil || o.Signed || !o.Owner.IsZero() {
		t.Errorf("%+v, %v", o, err)
	}
	ch, err := alice.Dial(within(t), route.To(addr), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	_ = ch.Close()
}

// TestLyingHub: a hub that shows other claims than it got.
func TestLyingHub(t *testing.T) {
	h := startHub(t, broker.Config{})
	bobID, eveID := newIdentity(t), newIdentity(t)
	bob := connect(t, h.MQTTURL(), device.Config{Identity: bobID})
	f := forwarder(t, bob)
	claim := func(by *identity.Private, address string, number uint64) []byte {
		t.Helper()
		c, err := hubproto.MakeClaim(by, address, number, time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var shown atomic.Pointer[hubproto.ForwarderRecord]
	h.Bridge().UnregisterService(bridge.ServiceLookup)
	err := h.Bridge().RegisterService(bridge.ServiceLookup, true, func(r *bridge.Request) {
		body, err := (&hubproto.LookupAnswer{Address: f.Address(), Record: shown.Load()}).Marshal()
		if err != nil {
			t.Error(err)
		}
		r.Reply(body)
	})
	if err != nil {
		t.Fatal(err)
	}
	honest := h.Bridge().Forwarder(f.Address())
	past, err := hubproto.MakeClaim(bobID, f.Address(), 9, time.Now().Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	ended, err := past.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	forged := slices.Clone(honest.Claim)
	forged[len(forged)-1] ^= 1
	for _, tt := range []struct {
		name  string
		owner identity.Identifier
		claim []byte
		err   error
	}{
		{"the honest record", honest.Owner, honest.Claim, nil},
		{"no claim", honest.Owner, nil, nil},
		{"a claim that has ended", honest.Owner, ended, nil}, // and proves nothing, see below
		{"a forged claim", honest.Owner, forged, device.ErrBadClaim},
		{"rubbish", honest.Owner, []byte{1, 2, 3}, device.ErrBadClaim},
		{"another address's claim", honest.Owner, claim(bobID, "FWD_00", 9), device.ErrBadClaim},
		{"another's claim under the owner's name", honest.Owner, claim(eveID, f.Address(), 9), device.ErrBadClaim},
		{"another's claim", eveID.Identifier(), claim(eveID, f.Address(), 9), device.ErrWrongIdentity},
	} {
		// Each with a device that has seen nothing yet.
		alice := connect(t, h.MQTTURL(), device.Config{})
		r := *honest
		r.Owner, r.Claim = tt.owner, tt.claim
		shown.Store(&r)
		if o, err := alice.Lookup(within(t), f.Address()); err == nil && o.Signed != (tt.name == "the honest record") && tt.err == nil {
			t.Errorf("%s counts as signed: %t", tt.name, o.Signed)
		}
		ch, err := alice.Dial(within(t), route.To(f.Address()), channel.TrustIdentifiers(bob.Identifier()))
		if !errors.Is(err, tt.err) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.err)
		}
		if err == nil {
			_ = ch.Close()
		}
	}

	// An older claim than one seen before, in this process and in the next.
	known := filepath.Join(t.TempDir(), "known_peers")
	peers, err := device.OpenKnownPeers(known)
	if err != nil {
		t.Fatal(err)
	}
	alice := connect(t, h.MQTTURL(), device.Config{KnownPeers: peers})
	dial := func(n *device.Node) error {
		ch, err := n.Dial(within(t), route.To(f.Address()), peers.Policy(f.Address(), true))
		if err == nil {
			_ = ch.Close()
		}
		return err
	}
	show := func(number uint64) { r := *honest; r.Claim = claim(bobID, f.Address(), number); shown.Store(&r) }
	show(5)
	if err := dial(alice); err != nil { // remembers bob
		t.Fatal(err)
	}
	show(7)
	if err := dial(alice); err != nil {
		t.Fatal(err)
	}
	show(6)
	if err := dial(alice); !errors.Is(err, device.ErrBadClaim) {
		t.Errorf("an older claim: %v", err)
	}
	again := connect(t, h.MQTTURL(), device.Config{KnownPeers: peers})
	if err := dial(again); !errors.Is(err, device.ErrBadClaim) {
		t.Errorf("an older claim, in a new process: %v", err)
	}
	show(7)
	if err := dial(again); err != nil {
		t.Errorf("the same claim: %v", err)
	}

	// By the key before the last: it proves nothing, and the handshake decides; with an
	// older number the hub hides something.
	newest, older := claim(bobID, f.Address(), 7), claim(bobID, f.Address(), 6)
	if err := bobID.Rotate(); err != nil {
		t.Fatal(err)
	}
	for _, alice := range []*device.Node{alice, again} {
		show := func(claim []byte) { r := *honest; r.Claim = claim; shown.Store(&r) }
		show(nil)
		if err := dial(alice); err != nil { // meets the new key
			t.Fatal(err)
		}
		show(newest)
		if o, err := alice.Lookup(within(t), f.Address()); err != nil || o.Signed {
			t.Errorf("a claim by the key before: %+v, %v", o, err)
		}
		if err := dial(alice); err != nil {
			t.Errorf("a claim by the key before: %v", err)
		}
		show(older)
		if err := dial(alice); !errors.Is(err, device.ErrBadClaim) {
			t.Errorf("an older claim by the key before: %v", err)
		}
	}
}

func TestKnownPeers(t *testing.T) {
	h := startHub(t, broker.Config{})
	bob, alice := connect(t, h.MQTTURL(), device.Config{}), connect(t, h.MQTTURL(), device.Config{})
	f := forwarder(t, bob, device.Alias("bob"))
	known := filepath.Join(t.TempDir(), "known_peers")
	peers, err := device.OpenKnownPeers(known)
	if err != nil {
		t.Fatal(err)
	}
	dial := func(firstUse bool) error {
		ch, err := alice.Dial(within(t), route.To(f.Address()), peers.Policy(f.Address(), firstUse))
		if err == nil {
			_ = ch.Close()
		}
		return err
	}
	if err := dial(false); !errors.Is(err, device.ErrWrongIdentity) || !errors.Is(err, device.ErrUnknownPeer) {
		t.Errorf("nobody is known: %v", err)
	}
	if err := dial(true); err != nil {
		t.Fatal(err)
	}
	if err := dial(false); err != nil {
		t.Errorf("known: %v", err)
	}
	if id, ok, err := peers.Lookup(f.Address()); err != nil || !ok || id != bob.Identifier() {
		t.Errorf("%v, %v, %v", id, ok, err)
	}
	// Somebody else behind the same name.
	if err := f.Release(within(t)); err != nil {
		t.Fatal(err)
	}
	carol := connect(t, h.MQTTURL(), device.Config{})
	forwarder(t, carol, device.Alias("bob"))
	for _, first := range []bool{false, true} {
		if err := dial(first); !errors.Is(err, device.ErrWrongIdentity) {
			t.Errorf("changed: %v", err)
		}
	}
	// Also where no claim tells it early.
	ch, err := alice.Dial(within(t), route.To(f.Address()), channel.And(channel.TrustEveryone, only{peers.Policy(f.Address(), true)}))
	var changed *device.PeerChangedError
	if !errors.As(err, &changed) || changed.File != known || changed.Have != bob.Identifier() || changed.Got != carol.Identifier() || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("changed: %v, %v", ch, err)
	}
	if err := peers.Forget(f.Address()); err != nil {
		t.Fatal(err)
	}
	if err := dial(true); err != nil {
		t.Errorf("after it was removed: %v", err)
	}
}

// only hides everything of a policy but Check.
type only struct{ channel.Policy }

// TestAnswerOfAnotherDevice: what another device sends is no answer of the hub.
func TestAnswerOfAnotherDevice(t *testing.T) {
	h := startHub(t, broker.Config{})
	alice, eve := connect(t, h.MQTTURL(), device.Config{}), connect(t, h.MQTTURL(), device.Config{})
	f := forwarder(t, eve)
	// Eve answers at her forwarder as the hub's lookup would.
	body, err := (&hubproto.LookupAnswer{Address: f.Address()}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := eve.Send(within(t), route.To(h.Bridge().HubAddress(alice.ClientID()), "0123456789abcdef0123456789abcdef"), body); err != nil {
		t.Fatal(err)
	}
	if err := eve.Send(within(t), route.To(hubproto.ServiceClaim), bare.AppendString(nil, "x")); err != nil {
		t.Fatal(err)
	}
	if o, err := alice.Lookup(within(t), f.Address()); err != nil || o.Owner != eve.Identifier() {
		t.Errorf("%+v, %v", o, err)
	}
}
