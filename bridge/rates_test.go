package bridge

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// limited runs a test in a bubble with a bridge whose peers may send 10 frames
// and 10,000 bytes a second.
func limited(t *testing.T, f func(t *testing.T, b *Bridge)) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.FrameRate, c.ByteRate = 10, 10_000 })
		f(t, b)
		b.Close()
	})
}

func TestStoredBeyondTheRateIsAcknowledgedLater(t *testing.T) {
	limited(t, func(t *testing.T, b *Bridge) {
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		bob := d.Port().Address()
		before := len(a.conn.acked()) // hello took one of ten
		for i := range 29 {
			a.number(bob, i)
		}
		equal(t, "delivered at once", len(d.numbers()), 29)
		equal(t, "acknowledged at once", len(a.conn.acked())-before, 9)
		synctest.Wait()
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		equal(t, "after a second", len(a.conn.acked())-before, 19)
		time.Sleep(time.Second)
		synctest.Wait()
		acks := a.conn.acked()[before:]
		equal(t, "after two seconds", len(acks), 29)
		for i := 1; i < len(acks); i++ {
			if acks[i] <= acks[i-1] {
				t.Fatalf("acknowledged out of order: %v", acks)
			}
		}
		equal(t, "throttled", b.Counters().Throttled, uint64(20))
		equal(t, "unanswered", a.waitPackets.Load(), int64(0))
	})
}

func TestRateOfBytes(t *testing.T) {
	limited(t, func(t *testing.T, b *Bridge) {
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		before := len(a.conn.acked())
		a.send(route.To(d.Port().Address()), nil, make([]byte, 30_000)) // three seconds' worth in one packet
		a.number(d.Port().Address(), 1)
		equal(t, "acknowledged at once", len(a.conn.acked())-before, 0)
		time.Sleep(2*time.Second - 50*time.Millisecond)
		synctest.Wait()
		equal(t, "not yet", len(a.conn.acked())-before, 0)
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		equal(t, "paid for", len(a.conn.acked())-before, 2)
	})
}

func TestTransientBeyondTheRateIsDropped(t *testing.T) {
	limited(t, func(t *testing.T, b *Bridge) {
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		send := func(n int) {
			for i := range n {
				_ = a.Receive(frame(route.To(d.Port().Address()), nil, []byte{0, byte(i)}), route.Transient, nil, 0)
			}
		}
		send(30)
		c := b.Counters()
		if n := c.Dropped[DropThrottled]; n < 19 || n > 21 {
			t.Errorf("%d of 30 dropped, with 9 left of 10", n)
		}
		last := a.conn.notices(t)
		if len(last) == 0 || last[len(last)-1].Reason != hubproto.ReasonFull {
			t.Errorf("notices: %v", last)
		}
		time.Sleep(time.Second)
		send(5)
		equal(t, "dropped once paid", b.Counters().Dropped[DropThrottled], c.Dropped[DropThrottled])
	})
}

// A device cannot buy itself a new allowance with a new connection, and what is
// owed to a connection ends with it.
func TestRateOutlivesConnections(t *testing.T) {
	limited(t, func(t *testing.T, b *Bridge) {
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		for i := range 30 {
			a.number(d.Port().Address(), i)
		}
		first := len(a.conn.acked())
		again := attach(t, b, "alice", true)
		again.number(d.Port().Address(), 99)
		equal(t, "acknowledged to the second connection", len(again.conn.acked()), 0)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		equal(t, "acknowledged to the first", len(a.conn.acked()), first)
		if len(again.conn.acked()) == 0 {
			t.Error("never acknowledged to the second")
		}
	})
}

// A peer that goes on sending into withheld acknowledgements meets its window.
func TestRateAndWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(c *Config) { c.FrameRate, c.Window = 10, 20 })
		a, d := attach(t, b, "alice", true), attach(t, b, "bob", true)
		for i := range 100 {
			_ = a.Receive(frame(route.To(d.Port().Address()), nil, []byte{0, byte(i)}), route.Stored, a.conn, uint64(1000+i))
		}
		equal(t, "kicked", a.conn.kicked, KickWindow)
		if n := len(d.numbers()); n > 40 {
			t.Errorf("%d frames got through", n)
		}
		b.Close()
	})
}

// Malformed packets cost as much as others.
func TestMalformedPacketsAreCharged(t *testing.T) {
	limited(t, func(t *testing.T, b *Bridge) {
		a := attach(t, b, "alice", true)
		before := len(a.conn.acked())
		for i := range 20 {
			_ = a.Receive([]byte{0xff}, route.Stored, a.conn, uint64(i))
		}
		if n := len(a.conn.acked()) - before; n > 10 {
			t.Errorf("%d answered at once", n)
		}
	})
}

func TestHandshakesOfOneDeviceAreLimited(t *testing.T) {
	var now atomic.Int64
	now.Store(time.Now().UnixNano())
	b := newTestBridge(t, func(c *Config) {
		c.HelloRate, c.HelloBurst, c.RegistrationRate, c.RegistrationBurst = 1, 3, 1, 2
		c.Now = func() time.Time { return time.Unix(0, now.Load()) }
	})
	for range 3 {
		attach(t, b, "alice", true).Close(true)
	}
	a := connect(t, b, device("alice"), true)
	refused := b.Counters().Dropped[DropThrottled]
	body, err := (&hubproto.HelloRequest{}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	a.send(route.To("hello"), route.To("h"), body)
	equal(t, "fourth hello refused, whatever connection it comes on", b.Counters().Dropped[DropThrottled]-refused, uint64(1))
	now.Add(int64(2 * time.Second))
	d := attach(t, b, "alice", true)
	for i := range 3 {
		d.send(route.To(ServiceForwarding), route.To(string(rune('M'+i))), []byte("\x08register"))
	}
	c := b.Counters()
	equal(t, "registrations, and hello and registration refused", []uint64{uint64(c.Forwarders), c.Dropped[DropThrottled] - refused}, []uint64{2, 2})
}

// TestClaimsOfOneIdentityAreLimited: who claims without end neither takes the hub's time
// from others nor fills its log.
func TestClaimsOfOneIdentityAreLimited(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	b := newTestBridge(t, func(c *Config) {
		c.RegistrationRate, c.RegistrationBurst = 1e-6, 3
		c.Logger = slog.New(slog.NewTextHandler(&locked{&mu, &log}, nil))
	})
	owner := func(name string) (*peer, *identity.Private, string) {
		id, err := identity.Create()
		if err != nil {
			t.Fatal(err)
		}
		p := connect(t, b, Principal{Identity: id.Identifier(), ClientID: name, Role: RoleDevice, Proven: true}, true)
		p.sayHello(true, 1)
		return p, id, p.register(ServiceForwarding, "register", "M")
	}
	claim := func(p *peer, id *identity.Private, address string, number uint64) {
		t.Helper()
		c, err := hubproto.MakeClaim(id, address, number, time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		body, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		p.send(route.To(ServiceClaim), route.To("me"), body)
	}
	number := func(address string) uint64 {
		c, err := hubproto.ParseClaim(b.Forwarder(address).Claim)
		if err != nil {
			t.Fatal(err)
		}
		return c.Number
	}
	mallory, mallorys, door := owner("mallory")
	for n := range uint64(10) {
		claim(mallory, mallorys, door, n+1)
	}
	equal(t, "kept, and throttled", []uint64{number(door), b.Counters().Dropped[DropThrottled]}, []uint64{3, 7})
	alice, alices, window := owner("alice")
	claim(alice, alices, window, 9)
	equal(t, "another's", number(window), uint64(9))

	stranger := stream(t, b, true)
	for range 50 {
		claim(stranger, mallorys, door, 99)
	}
	equal(t, "refused, and throttled", []uint64{b.Counters().Dropped[DropRefused], b.Counters().Dropped[DropThrottled]}, []uint64{3, 54})
	mu.Lock()
	defer mu.Unlock()
	equal(t, "lines", strings.Count(log.String(), "claim refused"), 3)
}

// locked is a writer for several goroutines.
type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func TestPortsOfOneIdentityAreLimited(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.PortsPerIdentity = 2 })
	who := device("alice")
	join := func(suffix string) (*Link, error) {
		p := who
		p.ClientID += suffix
		return b.ConnectDevice(p, newFakeConn(true))
	}
	for _, s := range []string{"", "-b", "-b"} { // the third takes over
		if _, err := join(s); err != nil {
			t.Fatal(s, err)
		}
	}
	if _, err := join("-c"); !errors.Is(err, ErrPortQuota) {
		t.Errorf("third client id: %v", err)
	}
	if _, err := b.ConnectDevice(device("bob"), newFakeConn(true)); err != nil {
		t.Errorf("another identity: %v", err)
	}
}

// However many targets don't read, there is room for a bystander's.
func TestStalledTargetsLeaveRoomForOthers(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.TotalFrames, c.Window = 4000, 4000 })
	a, carol := attach(t, b, "alice", true), attach(t, b, "carol", true)
	for i := range 8 {
		stalled := attach(t, b, string(rune('k'+i)), false)
		flooder := attach(t, b, string(rune('K'+i)), true)
		for n := range 2000 {
			flooder.number(stalled.Port().Address(), n)
		}
		for range 300 {
			stalled.send(route.To("echo"), route.To("x"), []byte("an answer that nobody can hold back"))
		}
	}
	c := b.Counters()
	if c.Queued >= 4000 {
		t.Errorf("%d frames queued: none left", c.Queued)
	}
	before := len(a.conn.acked())
	for i := range 500 {
		a.number(carol.Port().Address(), i)
	}
	equal(t, "acknowledged", len(a.conn.acked())-before, 500)
	equal(t, "delivered", len(carol.numbers()), 500)
}
