package matrix

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// atOnce is how long Deliver may take to say that a stock node acknowledges nothing.
// It takes it some microseconds; waiting for a hello would take 10 s.
const atOnce = time.Second

// TestDeliverToRust: a stock node cannot acknowledge messages. The API says so before
// anything is sent, and plain messages arrive.
func TestDeliverToRust(t *testing.T) {
	h := startOurHub(t)
	n := rustpeer.Start(t)
	stock := n.Identity(me)
	n.Connect("hub", h.tcp())
	n.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: me, Open: []string{"hub"}})
	relay, err := n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	peer, err := identity.ParseIdentifier(stock.Identifier)
	if err != nil {
		t.Fatal(err)
	}
	to := route.To(relay.Address, "listener")
	for name, start := range map[string]func(*testing.T) party{"on MQTT": goOnMQTT, "on TCP": goOnTCP} {
		t.Run(name, func(t *testing.T) {
			sink := strings.ReplaceAll(name, " ", "_")
			n.Worker("sink", sink, "listener")
			t.Parallel()
			p := start(t).(*goParty)
			p.connect(h)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			ch, err := p.node.Dial(ctx, to, channel.TrustIdentifiers(peer))
			if err != nil {
				t.Fatal(err)
			}
			says := func(when string) {
				t.Helper()
				if g := ch.Guarantee(); g != device.GuaranteeHub || g.String() != "hub" {
					t.Errorf("%s: the guarantee is %v", when, g)
				}
				began := time.Now()
				if err := ch.Deliver(ctx, sink, []byte("never sent")); !errors.Is(err, device.ErrNoDelivery) {
					t.Errorf("%s: Deliver: %v", when, err)
				}
				if took := time.Since(began); took > atOnce {
					t.Errorf("%s: Deliver took %v to refuse", when, took)
				}
			}
			says("before the first message")
			for _, text := range []string{"one", "two"} {
				if err := errors.Join(ch.Send(ctx, sink, []byte(text)), ch.Flush(ctx)); err != nil {
					t.Fatal(err)
				}
				m, err := n.Next(ctx, sink)
				if err != nil || m.SHA256 != rustpeer.Digest([]byte(text)) || m.From != p.identifier() {
					t.Errorf("%q arrived as %+v, %v", text, m, err)
				}
				says("after " + text)
			}
			// An outbox is for peers that may sleep, and gives them time to say hello.
			box, err := p.node.Outbox(device.Destination{Route: to, Peer: peer}, sink)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := box.Post(ctx, []byte("never sent either")); err != nil {
				t.Fatal(err)
			}
			if err := box.Deliver(ctx, []byte("never sent")); !errors.Is(err, device.ErrNoDelivery) {
				t.Errorf("Deliver through an outbox: %v", err)
			}
			// What was posted stays, and the channel without a hello does not: its other
			// half may never have come up.
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for limit := time.After(patience); p.node.Stats().Channels.Dialled < 3; {
				select {
				case <-tick.C:
				case <-limit:
					t.Fatal("the outbox never dialled again")
				}
			}
			if messages, _ := box.Pending(); messages == 0 { // the withdrawn one counts too
				t.Error("what was posted is gone")
			}
			if n := n.Pending(sink); n != 0 {
				t.Errorf("%d messages of Deliver arrived", n)
			}
		})
	}
}
