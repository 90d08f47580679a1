package node

import (
	"context"
	"errors"
	"testing"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// What goes to a channel that has ended must not leave in plain instead.
func TestEndedChannelNeverFallsToUplink(t *testing.T) {
	ctx := context.Background()
	n, err := New(Config{Uplink: UplinkFunc(func(_ context.Context, f route.Frame, _ route.Class) error {
		t.Errorf("left in plain: %v", f.Onward)
		return nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.OpenMailbox("app", Access{Channels: true}); err != nil {
		t.Fatal(err)
	}
	for name, register := range map[string]func(string, func(channel.Inbound)) error{
		"registered as local":  n.RegisterLocal,
		"guarded when used":    n.Register,
		"registered elsewhere": func(string, func(channel.Inbound)) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			enc := RandomAddress()
			if err := register(enc, func(channel.Inbound) {}); err != nil {
				t.Fatal(err)
			}
			o := Origin{Via: Channel, Peer: identity.Identifier{1}, Encryptor: enc}
			if d := n.Inject(o, route.Frame{Onward: route.To("app"), Return: route.To(enc, "peer")}, route.Stored); d != 0 {
				t.Fatal(d)
			}
			m, err := n.Receive(ctx, "app")
			if err != nil {
				t.Fatal(err)
			}
			n.Unregister(enc)
			if err := n.Reply(ctx, m, []byte("secret")); !errors.Is(err, ErrUnknownAddress) {
				t.Errorf("reply: %v", err)
			}
			if name == "registered elsewhere" {
				return
			}
			if err := n.Send(ctx, route.Frame{Onward: m.ReturnRoute, Payload: []byte("secret")}, route.Stored); !errors.Is(err, ErrUnknownAddress) {
				t.Errorf("send: %v", err)
			}
		})
	}
}

// Messages that somebody else bounds fit beside a full mailbox's own, and whoever
// handed them over hears when they are dropped.
func TestBoundedMessages(t *testing.T) {
	n, err := New(Config{MailboxMessages: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.OpenMailbox("app", Access{Channels: true}); err != nil {
		t.Fatal(err)
	}
	o := Origin{Via: Channel, Peer: identity.Identifier{1}}
	var dropped []int
	put := func(meta Meta) Drop {
		return n.InjectMessage(o, route.Frame{Onward: route.To("app")}, route.Stored, meta)
	}
	for i := range 3 {
		if d := put(Meta{Bounded: true, Dropped: func() { dropped = append(dropped, i) }, Ack: func() error { return nil }}); d != 0 {
			t.Fatalf("message %d: %v", i, d)
		}
	}
	if d := put(Meta{}); d != 0 {
		t.Errorf("the mailbox has room for one of its own: %v", d)
	}
	if d := put(Meta{}); d != DropFull {
		t.Errorf("and not for two: %v", d)
	}
	if _, err := n.Receive(context.Background(), "app"); err != nil {
		t.Fatal(err)
	}
	n.Remove("app")
	if len(dropped) != 2 || dropped[0] != 1 || dropped[1] != 2 {
		t.Errorf("dropped %v", dropped)
	}
	if err := n.RegisterFunc("direct", Access{Channels: true}, func(route.Frame, route.Class, Origin) {}); err != nil {
		t.Fatal(err)
	}
	d := n.InjectMessage(o, route.Frame{Onward: route.To("direct")}, route.Stored, Meta{Ack: func() error { return nil }})
	if d != DropRefused {
		t.Errorf("a function that cannot acknowledge: %v", d)
	}
}

// Who removes a mailbox has told all that was in it before another worker takes the
// address: nothing that came later is handed on before it.
func TestAddressIsFreeOnceAllIsDropped(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.OpenMailbox("app", Access{Channels: true}))
	o := Origin{Via: Channel, Peer: identity.Identifier{1}}
	put := func(meta Meta) Drop {
		return n.InjectMessage(o, route.Frame{Onward: route.To("app")}, route.Stored, meta)
	}
	heard := 0
	for range 3 {
		if d := put(Meta{Bounded: true, Dropped: func() {
			heard++
			if err := n.OpenMailbox("app", Access{Channels: true}); !errors.Is(err, ErrAddressInUse) {
				t.Errorf("opened again: %v", err)
			}
			if d := put(Meta{Bounded: true}); d != DropUnknown {
				t.Errorf("a later message: %v", d)
			}
			if n.Remove("app") {
				t.Error("removed twice")
			}
		}}); d != 0 {
			t.Fatal(d)
		}
	}
	if !n.Remove("app") || heard != 3 {
		t.Errorf("%d heard of it", heard)
	}
	must(t, n.OpenMailbox("app", Access{Channels: true}))
}
