package guard

import (
	"fmt"
	"sync"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// TestWillsAreBounded: wills are kept within a bound for one address, delayed ones of
// sessions that are away too, and counted out when they go.
func TestWillsAreBounded(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.QueuedBytes = willShare * 40 << 10 })
	try := func(v5 bool, id string, change func(*rawmqtt.Options)) (*rawmqtt.Client, byte) {
		t.Helper()
		c := b.dial(t, v5)
		o := rawmqtt.Options{ID: id, Will: "will", WillPayload: string(make([]byte, 4000))}
		if change != nil {
			change(&o)
		}
		p, err := c.Login(o)
		if err != nil {
			t.Fatal(err)
		}
		return c, p.Code()
	}
	kept := func(o *rawmqtt.Options) {
		o.Keep, o.Props = true, []byte{0x11, 0, 0, 1, 0}
		o.WillProps = []byte{0x18, 0, 0, 1, 0}
	}
	ok := func(code byte) {
		t.Helper()
		if code != 0 {
			t.Errorf("code %#x", code)
		}
	}
	one, code := try(true, "one", nil)
	ok(code)
	two, code := try(true, "two", kept)
	ok(code)
	_ = two.Close() // its will waits
	eventually(t, "two away", func() bool { cl, found := b.Clients.Get("two"); return found && cl.Closed() })
	if _, code := try(true, "three", nil); code != 0x97 {
		t.Errorf("a third: code %#x", code)
	}
	if _, code := try(false, "three", nil); code != 3 {
		t.Errorf("a third in MQTT 3.1.1: code %d", code)
	}
	two, code = try(true, "two", kept) // in place of its own
	ok(code)
	send(t, one, rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
	closedByPeer(t, one)
	three := func() bool { _, code = try(true, "three", nil); return code == 0 }
	eventually(t, "room for a third", three)
	send(t, two, rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
	closedByPeer(t, two)
	eventually(t, "one left", func() bool { n := b.fixes.WillBytes(); return n > 4000 && n < 8000 })
	if n := b.c.Count(WillRefused); n < 2 {
		t.Errorf("%d counted", n)
	}
	b.fixes.wills.mu.Lock()
	w := b.fixes.wills.of["three"]
	w.until = time.Now().Add(-time.Second) // sent, and its session was gone
	b.fixes.wills.of["three"] = w
	b.fixes.wills.mu.Unlock()
	if n := b.fixes.WillBytes(); n != 0 {
		t.Errorf("%d bytes left", n)
	}
}

// willFrom connects from 127.0.0.HOST with a will of about 2 KiB, and returns the code.
func (b *broker) willFrom(t *testing.T, host byte, id, user string) byte {
	t.Helper()
	_, code := b.loginFrom(t, host, rawmqtt.Options{ID: id, User: user, Will: "will", WillPayload: string(make([]byte, 2000-packetOverhead))})
	return code
}

// TestWillsLeaveRoomForOthers: who fills the room for wills of an address, or of a user
// name, leaves the rest to others.
func TestWillsLeaveRoomForOthers(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.QueuedBytes = 4 * 32 << 10 }) // four each, and sixteen
	fill := func(what string, room int, from func(i int) (host byte, user string)) {
		t.Helper()
		n := 0
		for i := range room + 2 {
			host, user := from(i)
			if b.willFrom(t, host, fmt.Sprint(what, i), user) == 0 {
				n++
			}
		}
		if n != room {
			t.Errorf("%s: %d wills, want %d", what, n, room)
		}
	}
	fill("one address, many names", 4, func(i int) (byte, string) { return 1, fmt.Sprint("user", i) })
	fill("one name, many addresses", 4, func(i int) (byte, string) { return byte(10 + i), "same" })
	fill("others", 8, func(i int) (byte, string) { return byte(20 + i), "" })
}

// meet is a hook behind Fixes that lets clients wait for each other in OnConnect.
type meet struct {
	mqtt.HookBase
	all sync.WaitGroup
}

func (*meet) ID() string           { return "meet" }
func (*meet) Provides(b byte) bool { return b == mqtt.OnConnect }

func (m *meet) OnConnect(*mqtt.Client, packets.Packet) error {
	m.all.Done()
	m.all.Wait()
	return nil
}

// TestWillsOfAMoment: clients who all log in at the same moment, so that there is room
// for the will of each, do not get more together than there is.
func TestWillsOfAMoment(t *testing.T) {
	const clients = 12
	m := new(meet)
	m.all.Add(clients)
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.QueuedBytes = 4 * 32 << 10 }, m)
	codes := make([]byte, clients)
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() { codes[i] = b.willFrom(t, 1, fmt.Sprint("c", i), "") })
	}
	all.Wait()
	in := 0
	for _, code := range codes {
		switch code {
		case 0:
			in++
		case packets.ErrQuotaExceeded.Code:
		default:
			t.Errorf("code %#x", code)
		}
	}
	if n := b.fixes.WillBytes(); in != 4 || n > 8<<10 {
		t.Errorf("%d clients with %d bytes of wills", in, n)
	}
	eventually(t, "the refused are gone", func() bool { return b.Clients.Len() == in })
	if n := b.c.Count(WillRefused); n != clients-4 {
		t.Errorf("%d counted", n)
	}
}
