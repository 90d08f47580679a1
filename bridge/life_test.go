package bridge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// status returns the device's status record.
func status(b *Bridge, name string) string {
	for _, r := range b.Records() {
		if r.Kind == RecordStatus && r.Name == name {
			if bytes.Contains(r.JSON, []byte(`"status":"online"`)) {
				return "online"
			}
			return "offline"
		}
	}
	return ""
}

func TestHelloAnswer(t *testing.T) {
	b := newTestBridge(t, nil)
	d := connect(t, b, device("bob"), true)
	d.conn.exporter = []byte("exporter value")
	a := d.sayHello(true, 1)
	if a == nil {
		t.Fatal("no answer")
	}
	want := append([]byte("signed:"), hubproto.HelloSigned([16]byte{9}, a.Time, d.conn.exporter)...)
	if !bytes.Equal(a.Signature, want) {
		t.Errorf("signature over %x", a.Signature)
	}
	equal(t, "answer", []any{a.Hub, a.FrameLimit, a.Window, a.Forwarders, string(a.History)},
		[]any{testSigner{}.Identifier(), 256 << 10, 1024, []string{}, "history"})
	fwd := d.register(ServiceForwarding, "register", "M")
	a = d.sayHello(false, 1)
	equal(t, "forwarders", a.Forwarders, []string{fwd})
	equal(t, "entries in the outbox", b.Counters().Queued, 0)
	for range 10 {
		d.sayHello(false, 1)
	}
	if n := b.Counters().Dropped[DropThrottled]; n < 7 {
		t.Errorf("%d hellos refused", n)
	}
}

func TestGuest(t *testing.T) {
	b := newTestBridge(t, nil)
	c := newFakeConn(true)
	l, err := b.ConnectDevice(Principal{Role: RoleGuest, ClientID: "whatever"}, c)
	if err != nil {
		t.Fatal(err)
	}
	g := &peer{t: t, Link: l, conn: c}
	l.Subscribed()
	if a := g.sayHello(true, 1); a == nil || len(a.Signature) == 0 {
		t.Fatalf("guest's hello: %+v", a)
	}
	dev := attach(t, b, "bob", true)
	alias := dev.register(ServiceStaticForwarding, "bob", "m")
	got := len(dev.conn.entries())
	// What answers guests along their return routes is not there for one that has no
	// hub address: it would speak for the hub wherever the guest points it to.
	if err := b.RegisterServiceFor(ReachGuests, "api", func(r *Request) { r.Reply([]byte("2")) }); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"echo", ServiceForwarding, ServiceLookup, dev.Port().Address(), alias, "api"} {
		g.send(route.To(to), route.To(alias), []byte("x"))
	}
	cnt := b.Counters()
	equal(t, "refused", []uint64{cnt.Dropped[DropForbidden], uint64(cnt.Ports)}, []uint64{6, 2})
	equal(t, "sent on", len(dev.conn.entries())-got, 0)
	equal(t, "status", status(b, "whatever"), "")
	l.Close(true)
	equal(t, "ports", b.Counters().Ports, 1)
}

// TestGuestsOfOneNetworkLeaveHelloToOthers: guests from one network, however many they
// are, do not use up what the hub answers to all.
func TestGuestsOfOneNetworkLeaveHelloToOthers(t *testing.T) {
	var now atomic.Int64
	now.Store(1000e9)
	b := newTestBridge(t, func(c *Config) {
		c.Now = func() time.Time { return time.Unix(0, now.Load()) }
		c.GuestRate, c.GuestBurst, c.GuestTotalRate, c.GuestTotalBurst = 10, 20, 100, 50
	})
	answered := func(ip string, n int, stream bool) (yes int) {
		for range n {
			c := newFakeConn(true)
			c.addr = &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}
			connect := b.ConnectDevice
			if stream {
				connect = b.ConnectStream
			}
			l, err := connect(Principal{Role: RoleGuest, ClientID: "guest"}, c)
			if err != nil {
				t.Fatal(err)
			}
			if (&peer{t: t, Link: l, conn: c}).sayHello(true, 1) != nil {
				yes++
			}
			l.Close(true)
		}
		return yes
	}
	equal(t, "one address", answered("192.0.2.1", 30, false), 20)
	equal(t, "another one", answered("192.0.2.2", 10, false), 10)
	equal(t, "a stream of the first", answered("192.0.2.1", 1, true), 0)
	equal(t, "one network", []int{answered("2001:db8::1", 15, true), answered("2001:db8::2", 15, true)}, []int{15, 5})
	equal(t, "all together", answered("192.0.2.3", 1, false), 0)
	now.Add(1e9)
	equal(t, "a second later", answered("192.0.2.1", 30, false), 10)
	equal(t, "counted", b.Counters().Dropped[DropThrottled], uint64(10+1+10+1+20))
}

// TestIdleDevicesMakeRoom: where the hub has as many peers as it may, those that are away
// with nothing waiting and no forwarder give their place up, longest away first.
func TestIdleDevicesMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.MaxPorts = 5 })
		owner := attach(t, b, "owner", true)
		fwd := owner.register(ServiceForwarding, "register", "M")
		owner.Close(true)
		target := attach(t, b, "target", true)
		addr := target.Port().Address()
		target.Close(true)
		sender := attach(t, b, "sender", true)
		sender.send(route.To(addr, "x"), route.To("me"), []byte("waits"))
		attach(t, b, "first", true).Close(true)
		time.Sleep(time.Second)
		attach(t, b, "second", true).Close(true)

		there := func(names ...string) (yes []bool) {
			for _, n := range names {
				yes = append(yes, b.devices[n] != nil)
			}
			return yes
		}
		attach(t, b, "third", true)
		equal(t, "first gone, second not", there("first", "second"), []bool{false, true})
		equal(t, "status", []string{status(b, "first"), status(b, "second")}, []string{"", "offline"})
		stream(t, b, true)
		equal(t, "second gone too", there("second"), []bool{false})
		if _, err := b.ConnectDevice(device("fourth"), newFakeConn(true)); !errors.Is(err, ErrTooManyPorts) {
			t.Errorf("in the place of one that others wait for: %v", err)
		}
		equal(t, "the others", there("owner", "target", "sender", "third"), []bool{true, true, true, true})
		equal(t, "its forwarder", b.Forwarder(fwd) != nil, true)
		equal(t, "counted", b.Counters().Displaced, uint64(2))
		equal(t, "delivered", len(attach(t, b, "target", true).frames()), 1)
	})
}

func TestConnectErrors(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.MaxPorts = 1 })
	for _, tt := range []struct {
		p    Principal
		want error
	}{
		{Principal{Role: RoleObserver, ClientID: "x"}, ErrRole},
		{Principal{Role: RoleUser, ClientID: "x"}, ErrRole},
		{Principal{Role: RoleDevice, ClientID: ""}, ErrClientID},
		{Principal{Role: RoleDevice, ClientID: "hub"}, ErrClientID},
		{Principal{Role: RoleDevice, ClientID: "a/b"}, ErrClientID},
	} {
		if _, err := b.ConnectDevice(tt.p, newFakeConn(true)); !errors.Is(err, tt.want) {
			t.Errorf("%+v: %v", tt.p, err)
		}
	}
	connect(t, b, device("a"), true)
	if _, err := b.ConnectDevice(device("b"), newFakeConn(true)); !errors.Is(err, ErrTooManyPorts) {
		t.Error(err)
	}
	if _, err := b.ConnectStream(Principal{}, newFakeConn(true)); !errors.Is(err, ErrTooManyPorts) {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ConnectDevice(device("a"), newFakeConn(true)); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "Key") {
		t.Error(err)
	}
	if _, err := New(Config{Key: [32]byte{1}, Identity: testSigner{}, Window: -1}); err == nil || !strings.Contains(err.Error(), "Window") {
		t.Error(err)
	}
}

// TestHelloAttaches: no frame but the answer before hello, or five seconds.
func TestHelloAttaches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, nil)
		a := attach(t, b, "alice", true)
		c := newFakeConn(true)
		l, err := b.ConnectDevice(device("bob"), c)
		if err != nil {
			t.Fatal(err)
		}
		c.link = l
		d := &peer{t: t, Link: l, conn: c}
		a.number(b.HubAddress("bob"), 1)
		equal(t, "status", status(b, "bob"), "")
		// Hello before SUBSCRIBE is answered, but nothing is delivered yet.
		d.sayHello(false, 1)
		equal(t, "before", d.numbers(), []int(nil))
		l.Subscribed()
		equal(t, "after", d.numbers(), []int{1})
		equal(t, "status", status(b, "bob"), "online")

		silent := connect(t, b, device("carol"), true)
		a.number(b.HubAddress("carol"), 2)
		time.Sleep(4900 * time.Millisecond)
		synctest.Wait()
		equal(t, "before five seconds", silent.numbers(), []int(nil))
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		equal(t, "resumed", silent.numbers(), []int{2})
		equal(t, "status", status(b, "carol"), "online")
	})
}

func TestFreshDiscards(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.OutboxFrames = 3 })
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	bob := d.Port().Address()
	fwd := d.register(ServiceForwarding, "register", "M")
	d.Close(false)
	for i := range 5 {
		a.number(bob, i)
	}
	a.number(fwd, 100)
	equal(t, "acked", len(a.conn.acked()), 1+3)
	again := connect(t, b, device("bob"), true)
	again.sayHello(true, 2)
	// The first contact is for no key in particular, so it stays.
	equal(t, "left", again.numbers(), []int{100})
	c := b.Counters()
	equal(t, "dropped", []uint64{c.Dropped[DropFresh], uint64(c.Queued), uint64(c.Waiting)}, []uint64{5, 0, 0})
	equal(t, "acked", len(a.conn.acked()), 7)
	// The hub had acknowledged three of them, and does the others now, so alice hears of all.
	told := uint64(0)
	for _, n := range a.conn.notices(t) {
		if n.FirstHop == route.Local(bob) && n.Reason == hubproto.ReasonOffline {
			told += n.Count
		}
	}
	equal(t, "told", told, 5)
	// The same process says it again on its next connection: nothing is lost.
	again.Close(false)
	a.number(bob, 7)
	third := connect(t, b, device("bob"), true)
	third.sayHello(true, 2)
	equal(t, "kept", third.numbers(), []int{7})
}

func TestTakeover(t *testing.T) {
	b := newTestBridge(t, nil)
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
	for i := range 5 {
		a.number(d.Port().Address(), i)
	}
	d.Delivered(d.conn.entries()[1].Seq)
	d2 := connect(t, b, device("bob"), true)
	equal(t, "kicked", d.conn.kicked, KickTakenOver)
	n := d.conn.notices(t)
	if len(n) != 1 || n[0].Reason != hubproto.ReasonTakenOver {
		t.Errorf("%+v", n)
	}
	equal(t, "a live device never looks offline", status(b, "bob"), "online")
	// The old connection is dead, whatever it still says.
	d.Delivered(1 << 40)
	d.Ready()
	if err := d.Receive(frame(route.To("echo"), route.To("x"), nil), route.Stored, d.conn, 9); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	equal(t, "nothing before hello", d2.numbers(), []int(nil))
	d2.sayHello(false, 1)
	d.Close(false)
	equal(t, "from the first unacknowledged", d2.numbers(), seq(2, 5))
	for _, e := range d2.conn.entries() {
		if !e.Redelivered {
			t.Errorf("%d without the mark", e.Seq)
		}
	}
	equal(t, "status", status(b, "bob"), "online")
	d2.Close(true)
	equal(t, "status", status(b, "bob"), "offline")
	// A proven owner's name is not for who only claims it.
	claim := device("bob")
	claim.Proven = false
	if _, err := b.ConnectDevice(claim, newFakeConn(true)); !errors.Is(err, ErrNotProven) {
		t.Error(err)
	}
}

func TestTakeoverWithoutHelloGoesOffline(t *testing.T) {
	b := newTestBridge(t, nil)
	attach(t, b, "bob", true)
	d2 := connect(t, b, device("bob"), true)
	d2.Close(false)
	equal(t, "status", status(b, "bob"), "offline")
}

// TestFirstContact: waiting at once, offline after ten seconds, memory only.
func TestFirstContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.FirstContactFrames = 3 })
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		fwd := d.register(ServiceForwarding, "register", "M")
		got := len(d.frames())
		d.Close(true)
		tok := a.send(route.To(fwd, "l"), route.To("Di"), []byte("1"))
		n := a.conn.notices(t)
		if len(n) != 1 || n[0].Reason != hubproto.ReasonWaiting || n[0].FirstHop != route.Local(fwd) || n[0].LastReturn != route.Local("Di") {
			t.Fatalf("%+v", n)
		}
		if slices.Contains(a.conn.acked(), tok) {
			t.Error("acknowledged what it has not stored")
		}
		time.Sleep(9 * time.Second)
		late := a.send(route.To(fwd, "l"), route.To("Di"), []byte("2"))
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		n = a.conn.notices(t)
		if len(n) != 3 || n[2].Reason != hubproto.ReasonOffline || n[2].FirstHop != route.Local(fwd) || n[2].LastReturn != route.Local("Di") {
			t.Fatalf("%+v", n)
		}
		if acks := a.conn.acked(); !slices.Contains(acks, tok) || slices.Contains(acks, late) {
			t.Errorf("acks %v", acks)
		}
		// Who comes back in time gets it; it is acknowledged then.
		d2 := attach(t, b, "bob", true)
		equal(t, "frames", len(d2.frames()), 1)
		equal(t, "frame", d2.frames()[0], route.Frame{Onward: route.To("M", "l"), Return: route.To(a.Port().Address(), "Di"), Payload: []byte("2")})
		if !slices.Contains(a.conn.acked(), late) {
			t.Error("not acknowledged")
		}
		equal(t, "old frames", got, 1)
		d2.Close(true)
		for range 5 {
			a.send(route.To(fwd), nil, nil)
		}
		c := b.Counters()
		equal(t, "bounded", []uint64{uint64(c.Waiting), c.Dropped[DropFull], c.Dropped[DropOffline]}, []uint64{3, 2, 1})
		// A sender that goes takes its frames along.
		a.Close(false)
		c = b.Counters()
		equal(t, "after it went", []uint64{uint64(c.Waiting), c.Dropped[DropAbandoned]}, []uint64{0, 3})
	})
}

// TestFirstContactQueuedThenOffline: one that was queued for an attached device
// does not lie in the queue when that goes.
func TestFirstContactQueuedThenOffline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, nil)
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", false)
		fwd := d.register(ServiceForwarding, "register", "M")
		d.conn.ack()
		a.number(fwd, 1)
		a.number(d.Port().Address(), 2)
		d.Close(false)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		c := b.Counters()
		equal(t, "dropped", []uint64{c.Dropped[DropOffline], uint64(c.Queued)}, []uint64{1, 1})
		n := a.conn.notices(t)
		if len(n) != 1 || n[0].Reason != hubproto.ReasonOffline || n[0].FirstHop != route.Local(fwd) {
			t.Errorf("%+v", n)
		}
		equal(t, "left", attach(t, b, "bob", true).numbers(), []int{2})
	})
}

func TestOneShotNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, nil)
		a := attach(t, b, "alice", true)
		clean, lost := hubproto.OneShotName("bob"), hubproto.OneShotName("carol")
		keep := "dave-gateway"
		for _, name := range []string{clean, lost, keep} {
			d := attach(t, b, name, false)
			d.register(ServiceForwarding, "register", "M")
			d.conn.ack()
			d.Close(name == clean)
			a.number(b.HubAddress(name), 1)
		}
		left := func() (out []string) {
			for _, name := range []string{clean, lost, keep} {
				if status(b, name) != "" {
					out = append(out, name)
				}
			}
			return out
		}
		time.Sleep(9 * time.Second)
		synctest.Wait()
		equal(t, "at 9 s", left(), []string{clean, lost, keep})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		equal(t, "at 11 s", left(), []string{lost, keep})
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		equal(t, "at 10 min", left(), []string{keep})
		c := b.Counters()
		equal(t, "dropped", []uint64{c.Dropped[DropGone], uint64(c.Queued), uint64(c.Ports), uint64(c.Forwarders)}, []uint64{2, 1, 2, 1})
		equal(t, "notices", len(a.conn.notices(t)), 2)
		a.number(b.HubAddress(clean), 1)
		equal(t, "unknown now", b.Counters().Dropped[DropUnknown], 1)
		// The name can come back.
		again := attach(t, b, clean, true)
		a.number(again.Port().Address(), 3)
		equal(t, "back", again.numbers(), []int{3})
	})
}

// TestIdlePortIsForgotten: a device that nobody has seen for a day, and that has
// no backlog, leaves nothing behind.
func TestIdlePortIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, nil)
		a := attach(t, b, "alice", true)
		for _, n := range []string{"idle", "backlog"} {
			d := attach(t, b, n, true)
			d.register(ServiceForwarding, "register", "M")
			d.Close(true)
		}
		a.number(b.HubAddress("backlog"), 1)
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		c := b.Counters()
		equal(t, "left", []int{c.Ports, c.Forwarders, int(c.Queued)}, []int{2, 0, 1})
		equal(t, "records", len(b.Records()), 2)
		time.Sleep(8 * 24 * time.Hour)
		synctest.Wait()
		c = b.Counters()
		equal(t, "left", []int{c.Ports, c.Forwarders, int(c.Queued)}, []int{1, 0, 0})
	})
}

func TestCloseKicks(t *testing.T) {
	b := newTestBridge(t, nil)
	d, s := attach(t, b, "bob", true), stream(t, b, true)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	equal(t, "kicked", []KickReason{d.conn.kicked, s.conn.kicked}, []KickReason{KickClosing, KickClosing})
	if err := d.Receive(nil, route.Stored, d.conn, 1); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	d.Close(false)
}

// TestFirstContactsOfOneSenderLeaveRoomForOthers: who has most dials waiting for a device
// that is away gives up the newest of them for somebody who has fewer.
func TestFirstContactsOfOneSenderLeaveRoomForOthers(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.FirstContactFrames = 4 })
	bob := attach(t, b, "bob", true)
	fwd := bob.register(ServiceForwarding, "register", "M")
	bob.Close(true)
	mallory, alice, carol := attach(t, b, "mallory", true), attach(t, b, "alice", true), attach(t, b, "carol", true)
	second := connect(t, b, Principal{Identity: identifierOf("mallory"), ClientID: "mallory-2", Role: RoleDevice, Proven: true}, true)
	second.sayHello(false, 1)
	n := 0
	dial := func(p *peer, want hubproto.Reason) {
		t.Helper()
		n++
		p.send(route.To(fwd), route.To("Di"), binary.BigEndian.AppendUint32(nil, uint32(n)))
		said := p.conn.notices(t)
		equal(t, fmt.Sprint("dial ", n), said[len(said)-1].Reason, want)
	}
	gaveWay := func(p *peer, times int) {
		t.Helper()
		full := 0
		for _, n := range p.conn.notices(t) {
			if n.Reason == hubproto.ReasonFull {
				full++
			}
		}
		equal(t, "answered full", full, times)
	}
	const waiting, full = hubproto.ReasonWaiting, hubproto.ReasonFull
	dial(mallory, waiting)
	dial(mallory, waiting)
	dial(mallory, waiting)
	dial(mallory, waiting)
	dial(mallory, full)
	dial(second, full) // it is one sender
	dial(alice, waiting)
	gaveWay(mallory, 2)
	dial(carol, waiting)
	gaveWay(mallory, 3)
	dial(alice, full)                                          // she would have as many then
	equal(t, "acknowledged", len(mallory.conn.acked()), 1+1+2) // hello, refused, given up
	equal(t, "dropped", b.Counters().Dropped[DropFull], uint64(2+2+1))
	equal(t, "what is delivered, in order", attach(t, b, "bob", true).numbers(), []int{1, 2, 7, 8})
}

// TestFirstContactsFromInsideTheHubLeaveRoomForOthers: though each has a link of its own.
func TestFirstContactsFromInsideTheHubLeaveRoomForOthers(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.FirstContactFrames = 4 })
	bob, alice := attach(t, b, "bob", true), attach(t, b, "alice", true)
	fwd := bob.register(ServiceForwarding, "register", "M")
	bob.Close(true)
	node := NewLocal(b)
	defer node.Close()
	sent := make(chan error)
	for range 4 {
		go func() { sent <- node.Send(t.Context(), route.Frame{Onward: route.To(fwd)}, route.Stored) }()
	}
	for b.Counters().Waiting < 4 {
		time.Sleep(time.Millisecond)
	}
	alice.send(route.To(fwd), route.To("Di"), nil)
	equal(t, "alice's dial", alice.conn.notices(t)[0].Reason, hubproto.ReasonWaiting)
	if err := <-sent; err != nil {
		t.Error(err)
	}
	equal(t, "gave way", b.Counters().Dropped[DropFull], uint64(1))
	attach(t, b, "bob", true)
	for range 3 {
		if err := <-sent; err != nil {
			t.Error(err)
		}
	}
}
