package guard

import (
	"bytes"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// A header that announces a long packet costs memory, so many of them must not
// cost without bound.
func TestLongPacketsUnderWayAreBounded(t *testing.T) {
	const packet = 200 << 10
	limits := &Limits{Input: 3 * packet}
	b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.Limits = limits })
	whole := rawmqtt.Publish(false, 2, "t", 1, make([]byte, packet-100))
	var begun []*rawmqtt.Client
	for i := range 3 {
		c := b.login(t, false, rawmqtt.Options{ID: string(rune('a' + i))})
		send(t, c, whole[:10])
		begun = append(begun, c)
	}
	eventually(t, "three under way", func() bool { return limits.Arriving() > 2*packet })
	fourth := b.login(t, false, rawmqtt.Options{ID: "d"})
	send(t, fourth, whole[:10])
	closedByPeer(t, fourth)
	if n := b.c.Count(InputFull); n != 1 {
		t.Errorf("counted %d", n)
	}
	// Short ones are not held up, and what has begun may end.
	small := b.login(t, false, rawmqtt.Options{ID: "e"})
	send(t, small, rawmqtt.Publish(false, 2, "t", 1, bytes.Repeat([]byte{1}, 10_000)))
	expect(t, small, rawmqtt.PUBACK)
	send(t, begun[0], whole[10:])
	expect(t, begun[0], rawmqtt.PUBACK)
	_ = begun[1].Close()
	eventually(t, "one under way", func() bool { return limits.Arriving() < packet })
	send(t, begun[2], whole[10:])
	expect(t, begun[2], rawmqtt.PUBACK)
	eventually(t, "none under way", func() bool { return limits.Arriving() == 0 })
}

// A packet above the limit ends the connection of its sender once what it had sent
// before has been processed, and in MQTT 5 the sender hears why.
func TestPacketAboveTheLimit(t *testing.T) {
	for _, v5 := range []bool{false, true} {
		b := start(t, nil)
		c := b.login(t, v5, rawmqtt.Options{ID: "big"})
		small := rawmqtt.Publish(v5, 2, "t", 1, []byte("x"))
		send(t, c, append(small, rawmqtt.Publish(v5, 2, "t", 2, make([]byte, 1<<20))[:1000]...))
		expect(t, c, rawmqtt.PUBACK)
		if v5 {
			if p := expect(t, c, rawmqtt.DISCONNECT); p.Code() != 0x95 {
				t.Errorf("reason %#x", p.Code())
			}
		}
		closedByPeer(t, c)
		if n := b.c.Count(PacketTooLarge); n != 1 {
			t.Errorf("counted %d", n)
		}
	}
}

// wrapper wraps the connections of other listeners, as a hook of somebody else's may.
type wrapper struct {
	mqtt.HookBase
	cfg Config
}

func (*wrapper) ID() string { return "wrapper" }
func (*wrapper) Provides(b byte) bool {
	return b == mqtt.OnConnect || b == mqtt.OnDisconnect
}

func (w *wrapper) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	if _, ours := cl.Net.Conn.(*Conn); ours {
		return nil
	}
	c, err := Wrap(cl.Net.Conn, w.cfg)
	cl.Net.Conn = c
	return err
}

func (w *wrapper) OnDisconnect(cl *mqtt.Client, err error, _ bool) { cl.Net.Conn.(*Conn).Ended(err) }

// TestPacketAboveTheLimitOfAnotherListener: there mochi ends the connection, and it is
// counted once, wrapped or not.
func TestPacketAboveTheLimitOfAnotherListener(t *testing.T) {
	for name, wrapped := range map[string]bool{"plain": false, "wrapped": true} {
		t.Run(name, func(t *testing.T) {
			w := new(wrapper)
			var hooks []mqtt.Hook
			if wrapped {
				hooks = append(hooks, w)
			}
			b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { w.cfg = Config{Counters: c.Counters} }, hooks...)
			l := listeners.NewTCP(listeners.Config{ID: "own", Address: "127.0.0.1:0"})
			if err := b.AddListener(l); err != nil {
				t.Fatal(err)
			}
			b.Listeners.Serve("own", b.EstablishConnection)
			c, err := rawmqtt.Dial(l.Address(), false)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if p, err := c.Login(rawmqtt.Options{ID: "big"}); err != nil || p.Code() != 0 {
				t.Fatal(p, err)
			}
			send(t, c, rawmqtt.Publish(false, 2, "t", 1, make([]byte, 1<<20))[:1000])
			closedByPeer(t, c)
			eventually(t, "the client is gone", func() bool { return b.Clients.Len() == 0 })
			if n := b.c.Count(PacketTooLarge); n != 1 {
				t.Errorf("counted %d times", n)
			}
		})
	}
}
