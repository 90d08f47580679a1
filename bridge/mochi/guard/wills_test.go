package guard

import (
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// TestWillsAreBounded: wills are kept within a bound for all sessions, delayed ones of
// sessions that are away too, and counted out when they go.
func TestWillsAreBounded(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.QueuedBytes = 40 << 10 })
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
