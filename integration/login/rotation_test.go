package login

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// stolenFrom is what somebody has who took a backup of an identity: the key of that time,
// and one that he has rotated it to himself.
type stolenFrom struct{ old, forked *identity.Private }

// backedUp returns an identity of a vault and a stolen backup of it.
func backedUp(t *testing.T) (*identity.Private, stolenFrom) {
	t.Helper()
	vault := func() *identity.Vault {
		v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	v := vault()
	own, err := v.Create("device")
	if err != nil {
		t.Fatal(err)
	}
	backup, err := v.Export("device", identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	restore := func() *identity.Private {
		p, err := vault().Import("device", backup, identity.Protection{})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	stolen := stolenFrom{restore(), restore()}
	if err := stolen.forked.Rotate(); err != nil {
		t.Fatal(err)
	}
	return own, stolen
}

// TestRotationUnderAnOpenChannel: keys are rotated while a channel is up. It goes on,
// over a lost connection too; channels made afterwards, and the channel itself when it
// has to be made again, show the grown history; and the old key, or one that grew out of
// it elsewhere, is worth nothing any more at the hub nor at the peers.
func TestRotationUnderAnOpenChannel(t *testing.T) {
	t.Parallel()
	h := startHub(t, broker.Config{Devices: broker.Devices{AnyoneProven: true}})
	aliceID, stolenAlice := backedUp(t)
	bobID, stolenBob := backedUp(t)
	var aliceWire, bobWire cable
	seen := map[*identity.Private]identity.Registry{aliceID: identity.NewMemoryRegistry(0), bobID: identity.NewMemoryRegistry(0)}
	alice := connect(t, h.MQTTURL(), device.Config{Identity: aliceID, Registry: seen[aliceID], DialNetwork: aliceWire.dial})
	join := func() (*device.Node, *device.Forwarder) {
		t.Helper()
		bob := connect(t, h.MQTTURL(), device.Config{Identity: bobID, Registry: seen[bobID], DialNetwork: bobWire.dial})
		if _, err := bob.Listen("listener", channel.TrustIdentifiers(aliceID.Identifier())); err != nil {
			t.Fatal(err)
		}
		f, err := bob.CreateForwarder(within(t), "listener")
		if err != nil {
			t.Fatal(err)
		}
		return bob, f
	}
	bob, f := join()
	dial := func() *device.Channel {
		t.Helper()
		ch, err := alice.Dial(within(t), route.To(f.Address()), channel.TrustIdentifiers(bobID.Identifier()))
		if err != nil {
			t.Fatal(err)
		}
		return ch
	}
	take := func(n *device.Node, want string, from identity.Identifier) *device.Message {
		t.Helper()
		m, err := n.Receive(within(t), "app")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := m.Text(); err != nil || got != want || m.From != from {
			t.Fatalf("received %q from %v (%v), want %q", got, m.From, err, want)
		}
		return m
	}
	talk := func(ch *device.Channel, text string) {
		t.Helper()
		if err := ch.SendString(within(t), "app", text); err != nil {
			t.Fatal(err)
		}
		m := take(bob, text, aliceID.Identifier())
		if err := bob.ReplyString(within(t), m, text); err != nil {
			t.Fatal(err)
		}
		take(alice, text, bobID.Identifier())
	}
	deliver := func(ch *device.Channel, text string) <-chan error {
		done := make(chan error, 1)
		go func() { done <- ch.DeliverString(within(t), "app", text) }()
		return done
	}
	ack := func(done <-chan error, text string) {
		t.Helper()
		if err := take(bob, text, aliceID.Identifier()).Ack(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	ch := dial()
	talk(ch, "before")
	ack(deliver(ch, "delivered before"), "delivered before")

	for _, p := range []*identity.Private{aliceID, bobID} {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	talk(ch, "after")
	ack(deliver(ch, "delivered after"), "delivered after")
	second := dial()
	talk(second, "through a new channel")
	for _, k := range []struct {
		at *device.Node
		of *identity.Private
	}{{alice, bobID}, {bob, aliceID}} {
		if id, ok := k.at.Known(k.of.Identifier()); !ok || id.Compare(k.of.Identity()) != identity.Equal {
			t.Errorf("%v does not know the new key of %v", k.at.Identifier(), k.of.Identifier())
		}
	}
	// New connections prove the new keys to the hub; the channels live on.
	before := count(h, "sealmq_proofs_total{result=ok}")
	for _, w := range []*cable{&aliceWire, &bobWire} {
		w.cut(true)
		w.cut(false)
	}
	eventually(t, "both have proved the new key", func() bool { return count(h, "sealmq_proofs_total{result=ok}") == before+2 })
	talk(ch, "after a new connection")
	talk(second, "there, too")
	if ch.Restarts() != 0 || second.Restarts() != 0 {
		t.Errorf("made again %d and %d times", ch.Restarts(), second.Restarts())
	}

	// What has to be made again is made with the newest keys.
	_ = bob.Close()
	delivered := deliver(ch, "to the next process")
	bob, f = join()
	ack(delivered, "to the next process")
	if ch.Restarts() != 1 {
		t.Errorf("made again %d times", ch.Restarts())
	}
	talk(ch, "after that")

	// The hub refuses the old keys, and those that a thief rotates them to.
	var wg sync.WaitGroup
	for name, p := range map[string]*identity.Private{
		"alice's old": stolenAlice.old, "alice's forked": stolenAlice.forked, "bob's old": stolenBob.old,
	} {
		wg.Go(func() {
			if _, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: p}); !errors.Is(err, device.ErrBadProof) {
				t.Errorf("%s key at the hub: %v", name, err)
			}
		})
	}
	wg.Wait()
	// Each tries once more, in case the hub has just started.
	proofs(t, h, "rotated", 4)
	proofs(t, h, "forked", 2)
	talk(ch, "undisturbed")

	// So do the peers, at hubs that know nothing of it.
	for name, thief := range map[string][2]*identity.Private{
		"old": {stolenAlice.old, stolenBob.old}, "forked": {stolenAlice.forked, stolenBob.forked},
	} {
		hub := startHub(t, broker.Config{})
		door := forwarder(t, connect(t, hub.MQTTURL(), device.Config{Identity: thief[1]}))
		victim := connect(t, hub.MQTTURL(), device.Config{Identity: aliceID, Registry: seen[aliceID]})
		// A better answer may come, so the call goes on to its end, which is now.
		ctx, over := context.WithCancelCause(within(t))
		dialled := make(chan error, 1)
		go func() {
			_, err := victim.Dial(ctx, route.To(door.Address()), channel.TrustEveryone)
			dialled <- err
		}()
		eventually(t, "the answer is dropped", func() bool { return victim.Stats().Channels.Dropped.Of(channel.DropHandshake) > 0 })
		over(context.DeadlineExceeded)
		if err := <-dialled; !errors.Is(err, device.ErrTimeout) || !strings.Contains(err.Error(), "rotated away") {
			t.Errorf("alice dials bob's %s key: %v", name, err)
		}
		hub = startHub(t, broker.Config{})
		door = forwarder(t, connect(t, hub.MQTTURL(), device.Config{Identity: bobID, Registry: seen[bobID]}))
		caller := connect(t, hub.MQTTURL(), device.Config{Identity: thief[0]})
		if _, err := caller.Dial(within(t), route.To(door.Address()), channel.TrustEveryone); !errors.Is(err, device.ErrPeerRefused) {
			t.Errorf("bob is dialled by alice's %s key: %v", name, err)
		}
	}
}
