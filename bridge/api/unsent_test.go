package api

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// device is a peer at a device's place in the hub, which can stop taking frames: its
// node's uplink and its front.
type device struct {
	*peer
	link *bridge.Link

	sending sync.Mutex
	mu      sync.Mutex // guards what follows
	deaf    bool
	notices []hubproto.Notice
	acks    int
}

func (h *hub) device() *device {
	t := h.t
	t.Helper()
	d := &device{peer: &peer{t: t, id: create(t)}}
	var err error
	d.node, err = node.New(node.Config{Uplink: d})
	must(t, err)
	d.endpoint, err = channel.NewEndpoint(channel.Config{
		Identity: d.id, Registry: identity.NewMemoryRegistry(0), Router: d.node, Deliver: d.node.Deliver,
	})
	must(t, err)
	who := bridge.Principal{Identity: d.id.Identifier(), ClientID: d.id.Identifier().String(), Role: bridge.RoleDevice, Proven: true}
	d.link, err = h.b.ConnectDevice(who, d)
	must(t, err)
	t.Cleanup(func() {
		_ = d.endpoint.Close()
		d.node.Close()
		<-d.node.Done()
		d.link.Close(true)
	})
	d.link.TakesNotices()
	d.link.Subscribed()
	d.link.Attach(false)
	return d
}

// Send implements node.Uplink.
func (d *device) Send(_ context.Context, f route.Frame, c route.Class) error {
	d.sending.Lock()
	defer d.sending.Unlock()
	return d.link.Receive(route.AppendFrame(nil, &f), c, d, 0)
}

// Deliver implements bridge.Conn. What comes is acknowledged at once.
func (d *device) Deliver(entries []bridge.Entry) int {
	d.mu.Lock()
	deaf := d.deaf
	d.mu.Unlock()
	if deaf {
		return 0
	}
	for i := range entries {
		f, err := route.ParseFrame(bytes.Clone(entries[i].Frame), wide)
		if err != nil {
			d.t.Error(err)
			continue
		}
		d.node.Inject(node.Origin{Via: node.Forwarded}, f, entries[i].Class)
	}
	d.link.Delivered(entries[len(entries)-1].Seq)
	return len(entries)
}

func (d *device) Direct(frame []byte) bool {
	f, err := route.ParseFrame(bytes.Clone(frame), wide)
	if err != nil {
		d.t.Error(err)
		return true
	}
	if n, err := hubproto.ParseNotice(f.Payload); err == nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.notices = append(d.notices, *n)
	}
	return true
}

func (d *device) Kick(bridge.KickReason) {}

func (d *device) Acked(uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.acks++
}

func (d *device) acked() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.acks
}

// told returns the reasons of the notices so far.
func (d *device) told() (all []hubproto.Reason) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.notices {
		all = append(all, n.Reason)
	}
	return all
}

func (d *device) send(onward route.Route) {
	d.t.Helper()
	must(d.t, d.Send(d.t.Context(), route.Frame{Onward: onward, Return: route.To("me")}, route.Stored))
}

// TestWhatWaitsEndsWithItsChannel: a frame that has been sealed, and one behind it, for
// a peer that takes nothing and then closes its channel.
func TestWhatWaitsEndsWithItsChannel(t *testing.T) {
	h := newHubWith(t, false, func(b *bridge.Config, _ *Config) { b.OutboxFrames = 8 })
	p, sender := h.device(), h.device()
	must(t, p.join(h))
	if _, err := p.ask(p.ctx(), "echo", nil); err != nil {
		t.Fatal(err)
	}
	to, err := h.b.Register(bridge.Registration{
		Owner: bridge.Principal{Identity: p.id.Identifier(), Role: bridge.RoleDevice, Proven: true},
		Route: route.To(h.memberOf(t).link.Port().Address(), "m"),
	})
	must(t, err)
	eventually(t, "an empty queue", func() bool { return h.b.Counters().Queued == 0 })
	p.mu.Lock()
	p.deaf = true
	p.mu.Unlock()
	for range 8 {
		p.send(route.To(p.link.Port().Address(), "x"))
	}
	before := h.b.Counters()
	for range 2 {
		sender.send(route.To(to, "y"))
	}
	eventually(t, "one that waits for the device", func() bool { return h.b.Counters().Waiting == 1 })
	must(t, p.api.Close())
	eventually(t, "no port of the peer", func() bool { return h.s.Members() == 0 })
	eventually(t, "nothing that waits", func() bool { return h.b.Counters().Waiting == 0 })
	after := h.b.Counters()
	if after.Delivered != before.Delivered || after.Dropped[bridge.DropGone] != before.Dropped[bridge.DropGone]+2 {
		t.Errorf("%d delivered, %d gone", after.Delivered-before.Delivered, after.Dropped[bridge.DropGone])
	}
}

// memberOf returns the only member.
func (h *hub) memberOf(t *testing.T) *member {
	t.Helper()
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for _, m := range h.s.members {
		return m
	}
	t.Fatal("nobody has a port")
	return nil
}

// TestUnsentIsNotDelivered: a frame that the channel does not take stays the bridge's,
// to be dropped with the port; its sender is told.
func TestUnsentIsNotDelivered(t *testing.T) {
	h := newHub(t, false)
	p, sender := h.device(), h.device()
	must(t, p.join(h))
	ch := h.s.endpoint.Channels()[0] // no message yet: it has no port
	must(t, p.api.Close())
	<-ch.Done()
	who := bridge.Principal{Identity: p.id.Identifier(), Role: bridge.RoleDevice, Proven: true}
	m := &member{s: h.s, ch: ch, who: p.id.Identifier(), ctx: t.Context()}
	var err error
	m.link, err = h.b.ConnectStream(who, m)
	must(t, err)
	to, err := h.b.Register(bridge.Registration{Owner: who, Route: route.To(m.link.Port().Address(), "m")})
	must(t, err)
	acks := sender.acked()
	for range 3 {
		sender.send(route.To(to, "y"))
	}
	eventually(t, "all acknowledged", func() bool { return sender.acked() == acks+3 })
	eventually(t, "one that the channel refused", func() bool { return h.counts.Count(Unsent) >= 1 })
	m.link.Close(true)
	if n := h.b.Counters().Dropped[bridge.DropGone]; n != 3 {
		t.Errorf("%d dropped as gone", n)
	}
	if got := sender.told(); !slices.Equal(got, []hubproto.Reason{hubproto.ReasonOffline}) {
		t.Errorf("the sender heard %v", got)
	}
}
