package channel

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

func TestHelloLineage(t *testing.T) {
	h := hello{Version: helloVersion, Epoch: make([]byte, epochLen), Lineage: make([]byte, lineageLen), Turn: 3}
	got, err := parseHello(h.encode())
	if err != nil || len(got.Lineage) != lineageLen || got.Turn != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	h.Lineage = h.Lineage[:8]
	if _, err := parseHello(h.encode()); !errors.Is(err, errHelloLineage) {
		t.Errorf("short lineage: %v", err)
	}
}

// A responder keeps one channel of a lineage, and any number of others.
func TestLineageLeavesOneChannel(t *testing.T) {
	n := newTestNet()
	a, b := n.party(t, "alice"), n.party(t, "bob")
	if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	// Another process of the same identity, and a stranger.
	again := n.party(t, "alice2", func(c *Config) { c.Identity = a.id })
	stranger := n.party(t, "eve")
	at := map[*Channel]*Channel{} // bob's ends
	dialled := func(p *party, l byte) *Channel {
		t.Helper()
		var o DialOptions
		o.Lineage[0] = l
		c := dial(t, p, "bob", o)
		for _, e := range b.ep.Channels() {
			known := false
			for _, k := range at {
				known = known || k == e
			}
			if !known {
				at[c] = e
			}
		}
		return c
	}
	plain, other := dialled(a, 0), dialled(a, 2)
	eve := dialled(stranger, 1)
	first := dialled(a, 1)
	second := dialled(a, 1)
	ended(t, at[first], ErrSuperseded)
	third := dialled(again, 1)
	ended(t, at[second], ErrSuperseded)
	for name, c := range map[string]*Channel{"without lineage": plain, "of another lineage": other, "of another identity": eve, "the last": third} {
		if err := at[c].Err(); err != nil {
			t.Errorf("channel %s: %v", name, err)
		}
	}
	// The earlier channel's end says nothing to the one who has left it.
	if err := third.Send(t.Context(), nil, nil, nil); err != nil {
		t.Error(err)
	}

	// A hello of the lineage that was held up until after the next one.
	late, ok := at[third], false
	h := hello{Epoch: third.e.epoch[:], Lineage: third.lineage[:], Turn: third.turnNumber + 1}
	for _, e := range b.ep.Channels() {
		if e == at[plain] {
			e.greeting.Store(&h)
			ok = true
		}
	}
	if !ok {
		t.Fatal("no channel to compare with")
	}
	b.ep.supersede(late, late.greeting.Load())
	ended(t, late, ErrSuperseded)
}

// TestLostHello: the initiator's hello is lost. What it does next says who it is, and its
// channel is found to be dead, or gives way, like any other.
func TestLostHello(t *testing.T) {
	begin := func(t *testing.T) (a, b *party, n *testNet, first *Channel) {
		n = newTestNet()
		a, b = n.party(t, "alice"), n.party(t, "bob")
		if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		sent := 0
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" {
				if sent++; sent == 3 { // after messages 1 and 3
					return nil
				}
			}
			return []packet{p}
		})
		first = dial(t, a, "bob", DialOptions{Lineage: [16]byte{1}})
		synctest.Wait()
		at := b.ep.Channels()
		if len(at) != 1 || at[0].Confirmed() || !first.Confirmed() {
			t.Fatal("the hello was not lost")
		}
		return a, b, n, at[0]
	}
	deliver := func(t *testing.T, c *Channel) {
		t.Helper()
		if err := c.Send(t.Context(), route.To(DeliveryAddress), nil, []byte("data")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
	}
	t.Run("asked for again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b, _, at := begin(t)
			deliver(t, a.ep.Channels()[0])
			time.Sleep(helloAsk)
			synctest.Wait()
			if !at.Confirmed() || at.Err() != nil {
				t.Fatalf("confirmed %v, %v", at.Confirmed(), at.Err())
			}
			dial(t, a, "bob", DialOptions{Lineage: [16]byte{1}})
			ended(t, at, ErrSuperseded)
			synctest.Wait()
			if n := len(b.ep.Channels()); n != 1 {
				t.Errorf("%d channels", n)
			}
		})
	})
	t.Run("silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, _, n, at := begin(t)
			deliver(t, a.ep.Channels()[0])
			n.onPacket(func(packet) []packet { return nil })
			start := time.Now()
			ended(t, at, ErrSilent)
			if d := time.Since(start); d > 2*time.Minute+20*time.Second {
				t.Errorf("after %v", d)
			}
		})
	})
	for name, wait := range map[string]time.Duration{"never used, then another": helloGrace, "another soon": time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, n, at := begin(t)
				again := n.party(t, "alice2", func(c *Config) { c.Identity = a.id })
				n.onPacket(func(p packet) []packet {
					if p.from == "alice" { // her process is gone
						return nil
					}
					return []packet{p}
				})
				time.Sleep(wait)
				dial(t, again, "bob", DialOptions{Lineage: [16]byte{2}})
				ended(t, at, ErrSuperseded)
				synctest.Wait()
				if len(b.ep.Channels()) != 1 {
					t.Errorf("%d channels", len(b.ep.Channels()))
				}
			})
		})
	}
	t.Run("used as by a stock peer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, _, n, at := begin(t)
			if err := a.ep.Channels()[0].Send(t.Context(), route.To("app"), nil, []byte("data")); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			again := n.party(t, "alice2", func(c *Config) { c.Identity = a.id })
			n.onPacket(func(p packet) []packet {
				if p.from == "alice" {
					return nil // a stock peer would answer no ping, either
				}
				return []packet{p}
			})
			time.Sleep(time.Minute)
			dial(t, again, "bob", DialOptions{Lineage: [16]byte{2}})
			time.Sleep(time.Hour)
			if err := at.Err(); err != nil {
				t.Error(err)
			}
		})
	})
}
