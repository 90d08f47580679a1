package guard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// tapper taps every connection, and leaves every packet to mochi.
type tapper struct{ mqtt.HookBase }

func (*tapper) ID() string           { return "tapper" }
func (*tapper) Provides(b byte) bool { return b == mqtt.OnConnect }

func (*tapper) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	cl.Net.Conn.(*Conn).SetTap(func(byte, []byte) (bool, error) { return false, nil }, func() {}, nil)
	return nil
}

// withInput runs f with a limit of long packets, on plain and on tapped connections.
func withInput(t *testing.T, input int64, f func(t *testing.T, b *broker, l *Limits)) {
	for name, hooks := range map[string][]mqtt.Hook{"plain": nil, "tapped": {new(tapper)}} {
		t.Run(name, func(t *testing.T) {
			limits := &Limits{Input: input}
			b := start(t, func(c *Config, _ *FixesConfig, _ *mqtt.Options) { c.Limits = limits }, hooks...)
			f(t, b, limits)
			b.Listeners.CloseAll(func(string) {})
			if n := limits.Arriving(); n != 0 {
				t.Errorf("%d bytes are held still", n)
			}
		})
	}
}

const longPacket = 200 << 10

var whole = rawmqtt.Publish(true, 2, "t", 1, make([]byte, longPacket))

// arrive has a client publish a long packet in pieces, as a network does.
func arrive(t *testing.T, c *rawmqtt.Client) {
	t.Helper()
	for p := range slices.Chunk(whole, 50_000) {
		send(t, c, p)
	}
	expect(t, c, rawmqtt.PUBACK)
}

// TestAnnouncedPacketsCostNothing: the header of a long packet takes no room from those
// who send theirs.
func TestAnnouncedPacketsCostNothing(t *testing.T) {
	withInput(t, 4*longPacket, func(t *testing.T, b *broker, l *Limits) {
		for i := range 16 {
			c, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: fmt.Sprint("publish", i)})
			send(t, c, whole[:1000])
			c, _ = b.loginFrom(t, 1, rawmqtt.Options{ID: fmt.Sprint("subscribe", i)}) // mochi's, tapped or not
			send(t, c, []byte{rawmqtt.SUBSCRIBE<<4 | 2, 0x80, 0x80, 0x08, 0, 1})
			send(t, b.dial(t, false), []byte{rawmqtt.CONNECT << 4, 0xff, 0xff, 0x01})
		}
		c, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "whole"})
		arrive(t, c)
		if n, held := b.c.Count(InputFull), l.Arriving(); n > 0 || held > 0 {
			t.Errorf("%d closed, %d bytes held", n, held)
		}
	})
}

// TestLongPacketsUnderWayAreBounded: who holds most makes room for who holds less.
func TestLongPacketsUnderWayAreBounded(t *testing.T) {
	withInput(t, 4*longPacket+4096, func(t *testing.T, b *broker, l *Limits) {
		// begin has one more packet almost there; held is how many there are then.
		begin := func(host byte, id, user string, held int64) {
			t.Helper()
			c, _ := b.loginFrom(t, host, rawmqtt.Options{ID: id, User: user})
			send(t, c, whole[:len(whole)-1])
			eventually(t, id+" is under way", func() bool { return l.Arriving()/longPacket == held })
		}
		closed := func(want uint64) {
			t.Helper()
			eventually(t, "closed", func() bool { return b.c.Count(InputFull) == want })
		}
		begin(1, "a", "u", 1)
		begin(1, "b", "u", 2)
		c, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "c", User: "v"})
		arrive(t, c) // one network has half
		closed(1)
		d, _ := b.loginFrom(t, 2, rawmqtt.Options{ID: "d", User: "u"})
		begin(3, "e", "u", 2)
		arrive(t, d) // one user has half
		closed(2)
		begin(4, "f", "w", 2)
		begin(4, "g", "x", 3)
		begin(5, "h", "y", 4)
		i, _ := b.loginFrom(t, 6, rawmqtt.Options{ID: "i", User: "z"})
		arrive(t, i) // all is in use, most of it by the network of two
		closed(3)
		begin(7, "j", "z", 4)
		if n := b.Clients.Len(); n != 3+4 {
			t.Errorf("%d clients are left", n)
		}
	})
}

// TestLongConnectsLeaveRoomForClients: who has not said who it is has part of the room.
func TestLongConnectsLeaveRoomForClients(t *testing.T) {
	withInput(t, 12*(30<<10), func(t *testing.T, b *broker, l *Limits) {
		connect := rawmqtt.Connect(true, rawmqtt.Options{ID: "s", User: strings.Repeat("u", 29<<10)})
		for range 8 {
			send(t, b.dial(t, true), connect[:len(connect)-1])
		}
		eventually(t, "five are closed", func() bool { return b.c.Count(InputFull) == 5 })
		c, _ := b.loginFrom(t, 2, rawmqtt.Options{ID: "c"})
		arrive(t, c)
		if n := b.c.Count(InputFull); n != 5 {
			t.Errorf("%d closed", n)
		}
		// One whole is let in.
		s := b.dial(t, true)
		if p, err := s.Login(rawmqtt.Options{ID: "s", User: strings.Repeat("u", 15<<10)}); err != nil || p.Code() != 0 {
			t.Error(p, err)
		}
	})
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

// TestPacketsComeWhole: however a stream of short and long packets is cut, its headers too.
func TestPacketsComeWhole(t *testing.T) {
	withInput(t, 0, func(t *testing.T, b *broker, _ *Limits) {
		sub, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "sub"})
		if p, err := sub.Sub(1, 0, "t"); err != nil || p.Code() != 0 {
			t.Fatal(p, err)
		}
		random := rand.New(rand.NewPCG(1, 2))
		var want [][]byte
		for _, most := range []int{3, 4000, 100_000} {
			// From the first byte on, so that some of it is there before the tap.
			stream := rawmqtt.Connect(true, rawmqtt.Options{ID: fmt.Sprint("pub", most)})
			for _, n := range []int{0, smallPacket - 20, 1, smallPacket, 100_000, smallPacket + 20, 2, 3 * smallPacket, 0} {
				if most == 3 {
					n = min(n, smallPacket+20)
				}
				body := make([]byte, n)
				for i := range body {
					body[i] = byte(random.Uint32())
				}
				want = append(want, body)
				stream = append(stream, rawmqtt.Publish(true, 0, "t", 0, body)...)
			}
			c := b.dial(t, true)
			for len(stream) > 0 {
				n := min(len(stream), 1+random.IntN(most))
				send(t, c, stream[:n])
				stream = stream[n:]
			}
			expect(t, c, rawmqtt.CONNACK)
			for len(want) > 0 {
				if p := expect(t, sub, rawmqtt.PUBLISH); !bytes.Equal(p.Payload, want[0]) {
					t.Fatalf("%d bytes, want %d", len(p.Payload), len(want[0]))
				}
				want = want[1:]
			}
		}
	})
}
