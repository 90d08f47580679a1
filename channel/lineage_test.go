package channel

import (
	"errors"
	"testing"
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
