package mochibridge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// TestAnyChunking: frames, pings and ordinary publishes, cut into pieces of any
// size, come out whole and in order.
func TestAnyChunking(t *testing.T) {
	ways(t, func(t *testing.T, change func(*setup)) {
		for _, v5 := range []bool{false, true} {
			h := newHub(t, change)
			alice, bob := h.device(t, "alice", v5), h.device(t, "bob", false)
			watcher := h.login(t, false, rawmqtt.Options{ID: "w"})
			if _, err := watcher.Sub(1, 0, "outside"); err != nil {
				t.Fatal(err)
			}
			seed := uint64(time.Now().UnixNano())
			rnd := rand.New(rand.NewPCG(seed, 1))
			t.Logf("seed %d", seed)
			var stream bytes.Buffer
			const n = 300
			sizes := []int{0, 1, 64, 1000, 2040, 5000, 70_000, 200_000}
			pings, foreign := 0, 0
			for i := range n {
				size := sizes[rnd.IntN(6)]
				if i%50 == 0 {
					size = sizes[6+i/50%2]
				}
				body := append(binary.BigEndian.AppendUint32(nil, uint32(i)), make([]byte, size)...)
				frame := route.AppendFrame(nil, &route.Frame{Onward: route.To(h.b.HubAddress("bob"), "app"), Payload: body})
				stream.Write(rawmqtt.Publish(v5, 2, "sealmq/alice/out", uint16(i+100), frame))
				switch rnd.IntN(6) {
				case 0:
					stream.Write(rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
					pings++
				case 1:
					stream.Write(rawmqtt.Publish(v5, 0, "outside", 0, binary.BigEndian.AppendUint32(nil, uint32(foreign))))
					foreign++
				case 2:
					stream.Write(rawmqtt.Ack(rawmqtt.PUBACK, uint16(rnd.Uint32())))
				}
			}
			go func() {
				for stream.Len() > 0 {
					k := 1 + rnd.IntN(3)
					switch rnd.IntN(3) {
					case 0:
						k = 1 + rnd.IntN(3000)
					case 1:
						k = 1 + rnd.IntN(100_000)
					}
					if _, err := alice.Write(stream.Next(k)); err != nil {
						t.Error(err)
						return
					}
				}
			}()
			done := make(chan error, 2)
			go func() {
				for acks, pongs := 0, 0; acks < n || pongs < pings; {
					p, err := alice.ReadPacket()
					if err != nil {
						done <- fmt.Errorf("%d of %d acks, %d of %d pings: %w", acks, n, pongs, pings, err)
						return
					}
					switch p.Type() {
					case rawmqtt.PUBACK:
						if int(p.ID) != acks+100 {
							done <- fmt.Errorf("PUBACK %d, want %d", p.ID, acks+100)
							return
						}
						acks++
					case rawmqtt.PINGRESP:
						pongs++
					}
				}
				done <- nil
			}()
			go func() {
				for i := range foreign {
					p, err := watcher.ReadPacket()
					if err != nil || binary.BigEndian.Uint32(p.Payload) != uint32(i) {
						done <- fmt.Errorf("ordinary publish %d: %w", i, err)
						return
					}
				}
				done <- nil
			}()
			for i := 0; i < n; {
				for _, b := range payloads(t, bob.recv()) {
					if got := binary.BigEndian.Uint32([]byte(b)); got != uint32(i) {
						t.Fatalf("frame %d, want %d", got, i)
					}
					i++
				}
			}
			for range 2 {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// TestKeepAlive: what passes mochi by keeps a connection alive too, and silence
// ends it.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	for _, noTap := range []bool{false, true} {
		t.Run(fmt.Sprintf("tap=%v", !noTap), func(t *testing.T) {
			t.Parallel()
			h := newHub(t, func(s *setup) { s.hook.noTap = noTap })
			d := &device{Client: h.login(t, false, rawmqtt.Options{ID: "d", User: "device", KeepAlive: 1}), t: t, h: h, name: "d", auto: true}
			d.attach(true)
			tick := time.NewTicker(300 * time.Millisecond)
			defer tick.Stop()
			for range 6 { // past one and a half times the interval
				<-tick.C
				d.publish(2, &route.Frame{Onward: route.To("echo"), Payload: []byte("x")})
				d.puback()
			}
			closedByPeer(t, d.Client)
		})
	}
}

// A packet above the packet limit costs its sender nothing but the packet, or in MQTT 5
// the connection, and nobody else anything.
func TestOversizedPackets(t *testing.T) {
	for _, v5 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v5=%v", v5), func(t *testing.T) {
			h := newHub(t)
			alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
			big := h.device(t, "big", v5)
			drops := func() uint64 { return h.b.Counters().Dropped[bridge.DropTooLarge] }
			notice := func() {
				t.Helper()
				if n, err := hubproto.ParseNotice(big.frame(big.recv().Payload).Payload); err != nil || n.Reason != hubproto.ReasonTooLarge {
					t.Fatal(n, err)
				}
			}
			sent := uint64(0)
			for _, size := range []int{320 << 10, 320<<10 + 1, 1 << 20, route.MaxFrame} {
				for _, flags := range []byte{0, 2, 0xa} {
					packet := rawmqtt.Publish(v5, flags, "sealmq/big/out", big.next(), make([]byte, size))
					// What comes right behind it is taken, too.
					frame := route.AppendFrame(nil, &route.Frame{Onward: route.To(h.b.HubAddress("bob"), "app"), Payload: []byte("behind")})
					packet = append(packet, rawmqtt.Publish(v5, 0, "sealmq/big/out", 0, frame)...)
					send(t, big, packet)
					sent++
					if v5 {
						notice()
						if p, err := big.ReadPacket(); err != nil || p.Type() != rawmqtt.DISCONNECT || p.Code() != 0x95 {
							t.Fatal(p, err)
						}
						closedByPeer(t, big.Client)
						big = h.device(t, "big", v5)
						continue
					}
					if flags != 0 {
						big.puback()
					}
					notice()
					bob.want("behind")
				}
			}
			if n := drops(); n != sent {
				t.Errorf("%d dropped, want %d", n, sent)
			}
			if n := h.c.Count(guard.PacketTooLarge); v5 && n != sent || !v5 && n != 0 {
				t.Errorf("%d connections closed", n)
			}
			alice.to("bob", "fine")
			bob.want("fine")
			eventually(t, "all accounted for", func() bool { c := h.b.Counters(); return c.Lost() == 0 })
		})
	}
}

// What cannot be read past closes the connection, and is counted.
func TestOversizedPacketsThatEndTheConnection(t *testing.T) {
	long := make([]byte, 400<<10)
	for name, packet := range map[string][]byte{
		"longer than any frame": {0x32, 0xff, 0xff, 0xff, 0x7f, 0, 15, 's', 'e', 'a', 'l', 'm', 'q', '/', 'e', 'v', 'i', 'l', '/', 'o', 'u', 't', 0, 1},
		"another topic":         rawmqtt.Publish(false, 2, "sealmq/bob/out", 9, long),
		"ordinary topic":        rawmqtt.Publish(false, 2, "x", 9, long),
		"QoS 2":                 rawmqtt.Publish(false, 4, "sealmq/evil/out", 9, long),
		"no packet id":          rawmqtt.Publish(false, 2, "sealmq/evil/out", 0, long),
		"SUBSCRIBE":             append([]byte{0x82}, rawmqtt.Publish(false, 0, "x", 9, long)[1:]...),
		"PUBACK":                append([]byte{0x40}, rawmqtt.Publish(false, 0, "x", 9, long)[1:]...),
	} {
		t.Run(name, func(t *testing.T) {
			ways(t, func(t *testing.T, change func(*setup)) {
				h := newHub(t, change, func(s *setup) { s.hook.Guard.Counters = s.listener.Counters })
				alice, bob := h.device(t, "alice", false), h.device(t, "bob", false)
				evil := h.device(t, "evil", false)
				if name == "longer than any frame" {
					packet = append(packet, make([]byte, 600)...)
				}
				_, _ = evil.Write(packet)
				closedByPeer(t, evil.Client)
				eventually(t, "it is counted", func() bool { return h.c.Count(guard.PacketTooLarge) > 0 })
				alice.to("bob", "fine")
				bob.want("fine")
				if n := h.c.Count(guard.PacketTooLarge); n != 1 {
					t.Errorf("counted %d times", n)
				}
			})
		})
	}
}

func TestBundle(t *testing.T) {
	f := func(hop string, n int) []byte {
		return route.AppendFrame(nil, &route.Frame{Onward: route.To(hop, "x"), Payload: make([]byte, n)})
	}
	for _, hop := range []string{"", "a", "twenty-three-bytes-long", "twenty-four-bytes-long--", string(make([]byte, 255))} {
		frame := f(hop, 10)
		if got := firstHop(frame); !bytes.Contains(frame, got) || !bytes.HasSuffix(got, []byte(hop)) || len(got) < 3+len(hop) {
			t.Errorf("first hop of %d bytes: % x", len(hop), got)
		}
	}
	for n := range len(f("hop", 3)) {
		_ = firstHop(f("hop", 3)[:n]) // no panic
	}
	for _, bad := range [][]byte{nil, {0x83}, {0x84, 0x80, 0x80, 0x40, 0xf6, 0, 0, 0}, {0x9f, 0x81, 0x82, 0, 0x41, 'a', 0xff}} {
		if firstHop(bad) != nil {
			t.Errorf("% x has a first hop", bad)
		}
	}
}

func TestWindow(t *testing.T) {
	var w window
	if !w.admits(1<<30, 1, 1) {
		t.Error("one packet must always be admitted")
	}
	ids := make(map[uint16]uint64)
	var out []uint16
	seq, released := uint64(0), uint64(0)
	for round := range 100_000 {
		for w.admits(10, 256, 1<<20) && len(out) < 1+round%300 {
			seq++
			id := w.push(seq, 10)
			if id < firstID || ids[id] != 0 {
				t.Fatalf("id %#x", id)
			}
			ids[id] = seq
			out = append(out, id)
		}
		if len(out) > 256 {
			t.Fatal("window exceeded")
		}
		k := (round * 7) % len(out) // out of order
		id := out[k]
		got, ok := w.ack(id)
		if !ok || got != 0 && got <= released {
			t.Fatal(got, ok, released)
		}
		if got != 0 {
			released = got
		}
		if _, again := w.ack(id); again {
			t.Fatal("acknowledged twice")
		}
		delete(ids, id)
		out = append(out[:k], out[k+1:]...)
	}
	if _, ok := w.ack(out[0] & idMask); ok {
		t.Error("an identifier below 0x8000 was taken")
	}
}
