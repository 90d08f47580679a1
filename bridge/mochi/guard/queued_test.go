package guard

import (
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// away leaves a kept session behind that holds t with QoS 1.
func away(t *testing.T, b *broker, id string) rawmqtt.Options {
	t.Helper()
	o := rawmqtt.Options{ID: id, Keep: true}
	c := b.login(t, false, o)
	if _, err := c.Sub(1, 1, "t"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	eventually(t, id+" gone", func() bool {
		cl, ok := b.Clients.Get(id)
		return ok && cl.Closed() && cl.StopTime() > 0
	})
	return o
}

func TestMessagesKeptForClientsAreBounded(t *testing.T) {
	const size, limit = 10_000, 100_000
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.QueuedBytes = 2 * limit }) // one owner has half
	o := away(t, b, "away")
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	for i := range uint16(50) {
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, append([]byte{byte(i)}, make([]byte, size)...)))
		expect(t, pub, rawmqtt.PUBACK)
	}
	if n := b.fixes.Queued(); n > limit || n < limit-2*size {
		t.Errorf("%d bytes kept", n)
	}
	// Nine fit. mochi acknowledges before it queues.
	eventually(t, "41 not kept", func() bool { return b.c.Count(QueuedFull) == 41 })
	back := b.login(t, false, o)
	for i := range 9 {
		p := expect(t, back, rawmqtt.PUBLISH)
		send(t, back, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
		if i == 0 && len(p.Payload) != size+1 {
			t.Errorf("payload of %d bytes", len(p.Payload))
		}
	}
	eventually(t, "all acknowledged", func() bool { return b.fixes.Queued() == 0 })

	// A client that reads, but never acknowledges, gets everything once.
	for i := range uint16(30) {
		send(t, pub, rawmqtt.Publish(false, 2, "t", i+1, make([]byte, size)))
		expect(t, pub, rawmqtt.PUBACK)
	}
	for range 30 {
		expect(t, back, rawmqtt.PUBLISH)
	}
	if n := b.fixes.Queued(); n > limit {
		t.Errorf("%d bytes kept", n)
	}
	clean := o
	clean.Keep = false
	b.login(t, false, clean)
	eventually(t, "gone with the session", func() bool { return b.fixes.Queued() == 0 })
}

// What mochi drops without a word to its hooks is found again.
func TestMessagesDroppedSilentlyAreCountedOut(t *testing.T) {
	b := start(t, nil)
	away(t, b, "away")
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	send(t, pub, rawmqtt.Publish(false, 2, "t", 1, make([]byte, 5000)))
	expect(t, pub, rawmqtt.PUBACK)
	// mochi acknowledges before it queues.
	eventually(t, "counted in", func() bool { return b.fixes.Queued() >= 5000 })
	cl, _ := b.Clients.Get("away")
	for _, pk := range cl.State.Inflight.GetAll(false) {
		cl.State.Inflight.Delete(pk.PacketID)
	}
	b.fixes.queued.checked = time.Time{}
	if !b.fixes.queued.add(cl, owner{}, 77, 10, 5000) || b.fixes.Queued() != 10 {
		t.Errorf("%d bytes after the check", b.fixes.Queued())
	}
}

func TestKeptSessionsAreBounded(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.Sessions = 2 * 3 }) // one owner has half
	o := away(t, b, "a")
	away(t, b, "b")
	away(t, b, "c")
	for _, v5 := range []bool{false, true} {
		c := b.dial(t, v5)
		more := rawmqtt.Options{ID: "d", Keep: true}
		want := byte(3)
		if v5 {
			more.Props, want = []byte{17, 0, 0, 1, 0}, 0x97
		}
		if p, err := c.Login(more); err != nil || p.Code() != want {
			t.Errorf("v5 %v: %v %v", v5, p, err)
		}
	}
	b.login(t, false, o)                        // has one
	b.login(t, false, rawmqtt.Options{ID: "e"}) // wants none
	b.login(t, true, rawmqtt.Options{ID: "e5"}) // nor does this one
	if n := b.c.Count(SessionsFull); n != 2 {
		t.Errorf("refused %d", n)
	}
}
