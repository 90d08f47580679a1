package bridge

import (
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// What other tests leave at its default is what the configuration says, too.

func TestConfiguredTimes(t *testing.T) {
	for name, is := range map[string]func(t *testing.T, b *Bridge) (over func() bool){
		"FirstContact": func(t *testing.T, b *Bridge) func() bool {
			a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
			fwd := d.register(ServiceForwarding, "register", "M")
			d.Close(true)
			a.send(route.To(fwd, "l"), route.To("Di"), nil)
			return func() bool { return b.Counters().Dropped[DropOffline] == 1 }
		},
		"StreamWait": func(t *testing.T, b *Bridge) func() bool {
			s, d := stream(t, b, true), attach(t, b, "bob", false)
			d.conn.limit(0)
			s.Port().allow(d.Port().Address())
			s.send(route.To(d.Port().Address(), "x"), nil, nil)
			s.send(route.To(d.Port().Address(), "x"), nil, nil)
			return func() bool { return b.Counters().Dropped[DropFull] == 1 }
		},
		"HelloWait": func(t *testing.T, b *Bridge) func() bool {
			connect(t, b, device("bob"), true)
			return func() bool { return b.Counters().Attached == 1 }
		},
		"OneShotClean": func(t *testing.T, b *Bridge) func() bool {
			attach(t, b, hubproto.OneShotName("bob"), true).Close(true)
			return func() bool { return b.Counters().Ports == 0 }
		},
		"OneShotLost": func(t *testing.T, b *Bridge) func() bool {
			attach(t, b, hubproto.OneShotName("bob"), true).Close(false)
			return func() bool { return b.Counters().Ports == 0 }
		},
		"MaxAge": func(t *testing.T, b *Bridge) func() bool {
			a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
			d.Close(true)
			a.number(d.Port().Address(), 1)
			return func() bool { return b.Counters().Dropped[DropExpired] == 1 }
		},
		"ForwarderTTL": func(t *testing.T, b *Bridge) func() bool {
			d := attach(t, b, "bob", true)
			d.register(ServiceForwarding, "register", "M")
			d.Close(true)
			return func() bool { return b.Counters().Forwarders == 0 }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const long = 1000 * time.Hour
				b := newTestBridge(t, func(c *Config) {
					c.OutboxFrames = 1
					c.FirstContact, c.StreamWait, c.HelloWait, c.OneShotClean, c.OneShotLost, c.MaxAge, c.ForwarderTTL = long, long, long, long, long, long, long
					*map[string]*time.Duration{
						"FirstContact": &c.FirstContact, "StreamWait": &c.StreamWait, "HelloWait": &c.HelloWait, "OneShotClean": &c.OneShotClean,
						"OneShotLost": &c.OneShotLost, "MaxAge": &c.MaxAge, "ForwarderTTL": &c.ForwarderTTL,
					}[name] = 3 * time.Minute
				})
				over := is(t, b)
				time.Sleep(3*time.Minute - time.Second)
				synctest.Wait()
				if over() {
					t.Error("too early")
				}
				time.Sleep(time.Minute) // some are looked after now and then
				synctest.Wait()
				if !over() {
					t.Error("never")
				}
			})
		})
	}
}

func TestConfiguredRates(t *testing.T) {
	var now atomic.Int64
	now.Store(1000e9)
	b := newTestBridge(t, func(c *Config) {
		c.Now = func() time.Time { return time.Unix(0, now.Load()) }
		c.HelloRate, c.HelloBurst, c.RegistrationRate, c.RegistrationBurst = 1, 1, 0.5, 1
		c.GuestRate, c.GuestBurst, c.GuestTotalRate, c.GuestTotalBurst = 1e6, 1e6, 0.25, 1
	})
	var d *peer
	hello := func() bool { // one connection may not say it that often, at whatever rate
		d = connect(t, b, device("bob"), true)
		return d.sayHello(true, 1) != nil
	}
	register := func() bool { return d.register(ServiceForwarding, "register", "M") != "" }
	guest := func() bool {
		c := newFakeConn(true)
		c.addr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
		l, err := b.ConnectDevice(Principal{Role: RoleGuest, ClientID: "guest"}, c)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close(true)
		return (&peer{t: t, Link: l, conn: c}).sayHello(true, 1) != nil
	}
	for i, want := range []struct{ hello, registered, guest bool }{
		{true, true, true}, {}, {hello: true}, {}, {hello: true, registered: true}, {}, {hello: true}, {}, {true, true, true},
	} {
		equal(t, "at "+(time.Duration(i)*500*time.Millisecond).String(), []bool{hello(), register(), guest()}, []bool{want.hello, want.registered, want.guest})
		now.Add(int64(501 * time.Millisecond))
	}
}

func TestConfiguredNumbers(t *testing.T) {
	b := newTestBridge(t, func(c *Config) {
		c.Limits = route.Limits{Frame: 4096, Hops: 10}
		c.MaxForwarders, c.FirstContactBytes = 2, 20*4096
		c.RingBytes, c.Trace, c.TraceRate = 1000, true, 1e-6
	})
	a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
	hops := route.To("echo", "2", "3", "4", "5", "6", "7", "8", "9", "10")
	a.send(hops, nil, nil)
	equal(t, "ten hops", b.Counters().Dropped[DropRoute], uint64(0))
	a.send(append(hops, route.Local("11")), nil, nil)
	equal(t, "eleven hops", b.Counters().Dropped[DropRoute], uint64(1))

	fwd := a.register(ServiceForwarding, "register", "M")
	equal(t, "forwarders", []bool{fwd != "", d.register(ServiceForwarding, "register", "M") != "", d.register(ServiceForwarding, "register", "N") != ""}, []bool{true, true, false})

	a.Close(true)
	for range 30 {
		d.send(route.To(fwd), nil, make([]byte, 4000))
	}
	if n := b.Counters().Waiting; n < 15 || n > 20 {
		t.Errorf("%d frames of 4,000 bytes wait for who is away", n)
	}

	o := newTestObserver()
	o.gate = make(chan struct{})
	defer b.Observe(o)()
	for i := range 100 {
		d.number(d.Port().Address(), i)
	}
	if n := b.Counters().CopiesDropped; n < 100 {
		t.Errorf("%d copies dropped", n)
	}
	close(o.gate)
	o.wait(t, "a trace line", func() bool { return len(o.lines) > 0 })
	d.number(d.Port().Address(), 1)
	o.wait(t, "another copy", func() bool {
		equal(t, "trace lines", len(o.lines), 1)
		return len(o.copies) > 0 && string(o.copies[len(o.copies)-1].Payload) != ""
	})
}
