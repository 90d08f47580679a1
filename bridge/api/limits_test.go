package api

import (
	"bytes"
	"crypto/rand"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}

// TestStrangersOfOneAddressShareItsLimits: another connection gives a stranger no more
// handshakes, and takes none from who is elsewhere.
func TestStrangersOfOneAddressShareItsLimits(t *testing.T) {
	h := newHubWith(t, true, func(_ *bridge.Config, c *Config) {
		c.Channels = channel.Limits{Rate: 1e-6, Burst: 6, HalfOpen: 12}
	})
	first := func(host byte) { // a first message on a connection of its own
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}}
		c, err := d.DialContext(t.Context(), "tcp", h.addr)
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		f := route.Frame{Onward: route.To("api"), Return: route.To("me"), Payload: make([]byte, 32)}
		_, _ = rand.Read(f.Payload)
		body := route.AppendFrame(nil, &f)
		_, err = c.Write(append(route.AppendFrameHeader([]byte{route.Preamble}, len(body)), body...))
		must(t, err)
	}
	for range 8 {
		first(1)
	}
	dropped := func(r channel.DropReason) uint64 { return h.s.Stats().Dropped.Of(r) }
	eventually(t, "three half open, three beyond a quarter, two beyond the rate", func() bool {
		return h.s.Stats().HalfOpen == 3 && dropped(channel.DropHalfOpen) == 3 && dropped(channel.DropRate) == 2
	})
	first(2)
	eventually(t, "that from another address", func() bool { return h.s.Stats().HalfOpen == 4 })
}

// TestChannelsOfOneIdentityAreLimited, whatever connections they are on.
func TestChannelsOfOneIdentityAreLimited(t *testing.T) {
	h := newHubWith(t, false, func(_ *bridge.Config, c *Config) { c.PerIdentity = 2 })
	id := create(t)
	var open []*peer
	for range 2 {
		p := h.connectAs(id, "*")
		must(t, p.join(h))
		if _, err := p.ask(p.ctx(), "echo", nil); err != nil {
			t.Fatal(err)
		}
		open = append(open, p)
	}
	third := h.connectAs(id, "*")
	must(t, third.join(h))
	must(t, third.api.Send(third.ctx(), route.To("echo"), route.To("me"), nil))
	select {
	case <-third.api.Done():
	case <-time.After(patience):
		t.Fatal("a third channel stays open")
	}
	if n := h.counts.Count(RefusedIdentity); n != 1 || h.s.Members() != 2 {
		t.Errorf("%d counted, %d members", n, h.s.Members())
	}
	other := h.connect("*")
	must(t, other.join(h))
	if _, err := other.ask(other.ctx(), "echo", nil); err != nil {
		t.Errorf("another identity: %v", err)
	}
	must(t, open[0].api.Close())
	eventually(t, "two members", func() bool { return h.s.Members() == 2 })
	must(t, third.join(h))
	if _, err := third.ask(third.ctx(), "echo", nil); err != nil {
		t.Errorf("in place of another: %v", err)
	}
}

// TestStrangersDoNotPushMembersOut: a member's rotation is remembered, however many
// strangers come with identities that they have rotated.
func TestStrangersDoNotPushMembersOut(t *testing.T) {
	h := newHubWith(t, false, func(_ *bridge.Config, c *Config) { c.Registry = identity.NewMemoryRegistry(3) })
	vault := func() *identity.Vault {
		v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
		must(t, err)
		return v
	}
	v := vault()
	bob, err := v.Create("bob")
	must(t, err)
	backup, err := v.Export("bob", identity.Protection{})
	must(t, err)
	stolen, err := vault().Import("bob", backup, identity.Protection{})
	must(t, err)
	must(t, bob.Rotate())
	p := h.connectAs(bob, "*")
	must(t, p.join(h))
	if _, err := p.ask(p.ctx(), "echo", nil); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		id := create(t)
		must(t, id.Rotate())
		s := h.connectAs(id, "-")
		must(t, s.join(h))
		if _, err := s.ask(s.ctx(), "echo", nil); err != nil {
			t.Fatal(err)
		}
	}
	thief := h.connectAs(stolen, "*")
	failed := h.s.Stats().Failed
	if thief.join(h) == nil { // without a word from the hub a dial succeeds
		_ = thief.api.Send(thief.ctx(), route.To("echo"), route.To("me"), nil)
	}
	eventually(t, "the old key is refused", func() bool { return h.s.Stats().Failed == failed+1 })
}

// TestFullQueueStopsNobodyElse: what the hub's listener has for a device that takes
// nothing waits there, a little of it, and is in nobody else's way.
func TestFullQueueStopsNobodyElse(t *testing.T) {
	h := newHubWith(t, false, func(b *bridge.Config, c *Config) { b.OutboxFrames, b.Window = 16, 64 })
	honest := h.connect("*")
	must(t, honest.join(h))
	if _, err := honest.ask(honest.ctx(), "echo", nil); err != nil {
		t.Fatal(err)
	}
	d := &gated{}
	link, err := h.b.ConnectDevice(bridge.Principal{ClientID: "d", Role: bridge.RoleDevice, Proven: true}, d)
	must(t, err)
	defer link.Close(true)
	link.Subscribed()
	link.Attach(false)
	send := func(onward string, payload []byte) {
		t.Helper()
		f := route.Frame{Onward: route.To(onward), Return: route.To("x"), Payload: payload}
		must(t, link.Receive(route.AppendFrame(nil, &f), route.Stored, nil, 0))
	}
	for range 16 {
		send(link.Port().Address(), nil)
	}
	for range 70 { // each is answered into the full queue
		first := make([]byte, 32)
		_, _ = rand.Read(first)
		send("api", first)
	}
	eventually(t, "answers that wait", func() bool { return h.b.Counters().Waiting == 64 })
	eventually(t, "all handshakes", func() bool { return h.s.Stats().HalfOpen == 70 })
	if _, err := honest.ask(honest.ctx(), "echo", nil); err != nil {
		t.Errorf("a peer: %v", err)
	}
	must(t, h.connect("*").join(h))
}

// TestRefusalsInTheLogAreBounded, and those left out are counted there.
func TestRefusalsInTheLogAreBounded(t *testing.T) {
	var out bytes.Buffer
	h := newHubWith(t, false, func(_ *bridge.Config, c *Config) { c.Logger = slog.New(slog.NewTextHandler(&out, nil)) })
	h.s.lines.SetLimit(0)
	who := create(t).Identifier()
	for range 10*refusalLines + 7 {
		h.s.refused("of no use", who)
	}
	h.s.lines.SetLimit(rate.Inf)
	h.s.refused("of no use", who)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	last := lines[len(lines)-1]
	if len(lines) != 10*refusalLines+1 || !strings.Contains(last, "unlogged=7") || strings.Contains(lines[0], "unlogged") {
		t.Errorf("%d lines, the first %q, the last %q", len(lines), lines[0], last)
	}
}
