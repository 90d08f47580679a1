package device_test

import (
	"errors"
	"testing"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/route"
)

// What was sent in plain to nobody is told by the node's own Flush, once.
func TestUndeliveredInPlain(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{})
	for range 2 {
		if err := alice.Send(within(t), route.To("FWD_0123456789abcdef"), []byte("to nobody")); err != nil {
			t.Fatal(err)
		}
		err := alice.Flush(within(t))
		var lost *device.UndeliveredError
		if !errors.As(err, &lost) || !errors.Is(err, device.ErrUnknownAddress) || lost.To.Value != "FWD_0123456789abcdef" {
			t.Fatalf("Flush: %v", err)
		}
		if err := alice.Flush(within(t)); err != nil {
			t.Errorf("the second Flush: %v", err)
		}
	}
	if err := alice.Send(within(t), route.To("echo"), []byte("to somebody")); err != nil {
		t.Fatal(err)
	}
	if err := alice.Flush(within(t)); err != nil {
		t.Error(err)
	}
}

// A hub that has lost its memory acknowledges frames for a peer that it does not
// know any more. Whoever sent them is told so.
func TestUndelivered(t *testing.T) {
	h := startHub(t, nil)
	var link network
	events := make(chan device.Event, 64)
	alice := connect(t, h.url(), device.Config{OnEvent: func(e device.Event) { events <- e }})
	bob := connect(t, h.url(), device.Config{DialNetwork: link.dial})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch, other := dial(t, alice, route.To(fwd.Address())), dial(t, alice, route.To(fwd.Address()))
	if err := ch.Flush(within(t)); err != nil {
		t.Fatal(err)
	}
	link.cut(true)
	h.stop()
	startHub(t, h)

	if err := ch.SendString(within(t), "app", "to nobody"); err != nil {
		t.Fatal(err)
	}
	err := ch.Flush(within(t))
	var lost *device.UndeliveredError
	if !errors.As(err, &lost) || !errors.Is(err, device.ErrUnknownAddress) {
		t.Fatalf("Flush: %v", err)
	}
	if lost.Peer != bob.Identifier() || lost.Count == 0 || lost.Reason != "unknown" {
		t.Errorf("it says %+v", lost)
	}
	told := make(map[*device.Channel]bool)
	for len(told) < 2 {
		select {
		case e := <-events:
			if e.Kind == device.EventUndelivered {
				if !errors.As(e.Err, &lost) || lost.Peer != bob.Identifier() {
					t.Errorf("event: %+v", e)
				}
				told[e.Channel] = true
			}
		case <-within(t).Done():
			t.Fatal("no event")
		}
	}
	if !told[ch] || !told[other] {
		t.Errorf("told of %v", told)
	}
	if err := ch.Flush(within(t)); err != nil {
		t.Errorf("the second Flush: %v", err)
	}
	_, _ = alice.Close(), bob.Close() // before the second hub
}
