package device_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/api"
	"github.com/sealmq/sealmq/bridge/tcp"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// startClosedHub is a hub that lets plain TCP peers reach its listener "api" alone, and
// there those with a credential of the authority.
func startClosedHub(t *testing.T, id *identity.Private, authority *identity.Identity, addr string) (string, func()) {
	t.Helper()
	b, err := bridge.New(bridge.Config{Key: [32]byte{1}, Identity: bridge.IdentitySigner(id)})
	if err != nil {
		t.Fatal(err)
	}
	door, err := api.New(api.Config{Bridge: b, Identity: id, Authority: authority, MembersOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	front, err := tcp.New(tcp.Config{Bridge: b, Closed: true})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- front.Serve(ln) }()
	stop := sync.OnceFunc(func() {
		// As a hub that is killed: nobody is told.
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = front.Close(ctx)
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		door.Close()
		_ = b.Close()
	})
	t.Cleanup(stop)
	return ln.Addr().String(), stop
}

// newMember connects a device with a credential, for an alias if relay is one, and
// dials the hub's listener.
func newMember(t *testing.T, addr string, hub, authority *identity.Private, relay string) (*device.Node, *device.Channel) {
	t.Helper()
	id := newIdentity(t)
	attributes := map[string]string{"member": "yes"}
	if relay != "" {
		attributes["ockam-relay"] = relay
	}
	credential, err := authority.IssueCredential(id.Identity(), attributes, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	n := over(t, addr, device.Config{Identity: id, Credential: func() ([]byte, error) { return credential, nil }})
	door, err := n.Dial(soon(t), route.To("api"), channel.TrustIdentifiers(hub.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	return n, door
}

// TestClosedHub: with a credential a device uses a hub that is closed to strangers as a
// stock node does. It registers through its channel to the hub, is dialled there
// through another's, and both find each other again when the hub was restarted.
func TestClosedHub(t *testing.T) {
	hub, authority := newIdentity(t), newIdentity(t)
	addr, stop := startClosedHub(t, hub, authority.Identity(), "127.0.0.1:0")
	member := func(relay string) (*device.Node, *device.Channel) { return newMember(t, addr, hub, authority, relay) }
	bob, bobsDoor := member("bob")
	if _, err := bob.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	static, err := bob.CreateForwarder(soon(t), "listener", device.Alias("bob"), device.RegisterThrough(bobsDoor))
	if err != nil || static.Address() != "forward_to_bob" {
		t.Fatalf("static: %v", err)
	}
	dynamic, err := bob.CreateForwarder(soon(t), "listener", device.RegisterThrough(bobsDoor))
	if err != nil || !strings.HasPrefix(dynamic.Address(), "FWD_") {
		t.Fatalf("dynamic: %v", err)
	}
	alice, door := member("")
	var channels []*device.Channel
	for _, to := range []route.Route{
		route.To(static.Address()), route.To(static.Address(), "listener"), route.To(dynamic.Address()),
	} {
		ch, err := alice.Dial(soon(t), to, channel.TrustIdentifiers(bob.Identifier()), device.DialThrough(door))
		if err != nil {
			t.Fatalf("%v: %v", to, err)
		}
		exchange(t, ch, alice, bob)
		channels = append(channels, ch)
	}

	// Neither without the right to it, nor in plain.
	if _, err := alice.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	if _, err := alice.CreateForwarder(soon(t), "listener", device.Alias("bob"), device.RegisterThrough(door)); !errors.Is(err, device.ErrAliasRefused) {
		t.Errorf("an alias without a credential for it: %v", err)
	}
	if _, err := alice.CreateForwarder(soon(t), "listener", device.RegisterThrough(door)); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("a forwarder without a credential for it: %v", err)
	}
	if _, err := alice.Dial(soon(t), route.To("forward_to_nobody"), channel.TrustEveryone, device.DialThrough(door)); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("nobody dialled through the channel: %v", err)
	}
	if _, err := bob.CreateForwarder(soon(t), "listener", device.Alias("bob")); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("in plain: %v", err)
	}
	if _, err := alice.Dial(soon(t), route.To(static.Address()), channel.TrustEveryone); !errors.Is(err, device.ErrUnknownAddress) {
		t.Errorf("dialled in plain: %v", err)
	}

	stop()
	startClosedHub(t, hub, authority.Identity(), addr)
	for _, ch := range channels[:2] { // the dynamic address is another one now
		restored(t, ch)
		exchange(t, ch, alice, bob)
	}
	if door.Restarts() == 0 || bobsDoor.Restarts() == 0 {
		t.Error("the channels to the hub were not made again")
	}
	// What goes through a channel ends with it.
	if err := door.Close(); err != nil {
		t.Error(err)
	}
	for _, ch := range channels {
		select {
		case <-ch.Done():
		case <-soon(t).Done():
			t.Fatal("a channel outlives the one that it goes through")
		}
		if !errors.Is(ch.Err(), device.ErrClosed) {
			t.Errorf("it ended with: %v", ch.Err())
		}
	}
}

// TestReleaseThroughChannel: what was registered through a channel to the hub is given
// up through it, and then somebody else's to have.
func TestReleaseThroughChannel(t *testing.T) {
	hub, authority := newIdentity(t), newIdentity(t)
	addr, _ := startClosedHub(t, hub, authority.Identity(), "127.0.0.1:0")
	bob, bobsDoor := newMember(t, addr, hub, authority, "bob")
	heir, heirsDoor := newMember(t, addr, hub, authority, "bob")
	register := func(n *device.Node, door *device.Channel) *device.Forwarder {
		t.Helper()
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		f, err := n.CreateForwarder(soon(t), "listener", device.Alias("bob"), device.RegisterThrough(door))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if err := register(bob, bobsDoor).Release(soon(t)); err != nil {
		t.Fatal(err)
	}
	alias := register(heir, heirsDoor)
	ch, err := bob.Dial(soon(t), route.To(alias.Address()), channel.TrustIdentifiers(heir.Identifier()), device.DialThrough(bobsDoor))
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, ch, bob, heir)
}

// TestRefusedAtTheDoor: a stranger hears that he is refused, though the hub says right
// behind it that nobody is any more where he has sent his hello.
func TestRefusedAtTheDoor(t *testing.T) {
	hub, authority := newIdentity(t), newIdentity(t)
	addr, _ := startClosedHub(t, hub, authority.Identity(), "127.0.0.1:0")
	n := over(t, addr, device.Config{})
	for i := range 100 {
		if _, err := n.Dial(soon(t), route.To("api"), channel.TrustIdentifiers(hub.Identifier())); !errors.Is(err, device.ErrPeerRefused) {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
}

// TestNoticesInsideAChannel: only the hub's own count there, too.
func TestNoticesInsideAChannel(t *testing.T) {
	hub, authority := newIdentity(t), newIdentity(t)
	addr, _ := startClosedHub(t, hub, authority.Identity(), "127.0.0.1:0")
	alice, door := newMember(t, addr, hub, authority, "*")
	mallory, mallorysDoor := newMember(t, addr, hub, authority, "*")
	returns := make(chan route.Route, 1)
	if err := mallory.Handle("open", device.Access{Forwarders: true, Channels: true}, func(_ context.Context, m *device.Message) { returns <- m.ReturnRoute }); err != nil {
		t.Fatal(err)
	}
	forwarder := func(n *device.Node, door *device.Channel) *device.Forwarder {
		t.Helper()
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		f, err := n.CreateForwarder(soon(t), "listener", device.RegisterThrough(door))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	hers := forwarder(mallory, mallorysDoor)
	ch, err := mallory.Dial(soon(t), route.To(forwarder(alice, door).Address()), channel.TrustEveryone, device.DialThrough(mallorysDoor))
	if err != nil {
		t.Fatal(err)
	}
	// How the hub calls alice.
	if err := door.SendRoute(soon(t), route.To(hers.Address(), "open"), route.To("x"), nil); err != nil {
		t.Fatal(err)
	}
	back := <-returns

	frame, err := hubproto.NoticeFrame(&hubproto.Notice{Reason: hubproto.ReasonUnknown, Count: 1, HasFirst: true, FirstHop: route.Local(hers.Address())})
	if err != nil {
		t.Fatal(err)
	}
	f, err := route.ParseFrame(frame, route.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	before := alice.Stats()
	refused := func() (n uint64) {
		for _, drops := range alice.Stats().Local.Dropped {
			n += drops
		}
		for _, drops := range before.Local.Dropped {
			n -= drops
		}
		return n
	}
	// Through her channel with a peer, and through that with the hub.
	if err := ch.SendRoute(soon(t), f.Onward, f.Return, f.Payload); err != nil {
		t.Fatal(err)
	}
	if err := mallorysDoor.SendRoute(soon(t), route.To(back[1].Value).Append(f.Onward...), f.Return, f.Payload); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both are refused", func() bool { return refused() == 2 })
	if n := alice.Stats().Notices; n != before.Notices {
		t.Errorf("%d forged notices are believed", n-before.Notices)
	}
	if err := door.Send(soon(t), "nobody", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hub's own is believed", func() bool { return alice.Stats().Notices == before.Notices+1 })
}
