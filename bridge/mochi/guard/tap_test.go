package guard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// keeper takes every PUBLISH, keeps what it was given until flush, and looks at it then.
type keeper struct {
	mqtt.HookBase
	t *testing.T

	mu    sync.Mutex
	seen  map[string]int // bytes, by client
	most  int            // packets that one flush found
	wrong int

	flushed chan struct{} // told of each flush of something; may be nil
}

func (*keeper) ID() string           { return "keeper" }
func (*keeper) Provides(b byte) bool { return b == mqtt.OnConnect }

func (k *keeper) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	var kept, copies [][]byte
	var pooled *[]byte
	conn := cl.Net.Conn.(*Conn)
	conn.SetTap(func(first byte, body []byte) (bool, error) {
		if first>>4 != packets.Publish {
			return false, nil
		}
		kept, copies, pooled = append(kept, body), append(copies, bytes.Clone(body)), conn.tap.pool
		return true, nil
	}, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.most = max(k.most, len(kept))
		for i, body := range kept {
			if !bytes.Equal(body, copies[i]) {
				k.wrong++
			}
			k.seen[cl.ID] += len(body)
		}
		if len(kept) > 0 && pooled != conn.tap.pool {
			k.wrong++ // given back
		}
		if len(kept) > 0 && k.flushed != nil {
			k.flushed <- struct{}{}
		}
		kept, copies = nil, nil
	}, nil)
	return nil
}

// TestFlushComesBeforeMemoryIsUsedAgain: what a tap was given stays as it is until flush,
// and nothing that mochi gets comes before.
func TestFlushComesBeforeMemoryIsUsedAgain(t *testing.T) {
	k := &keeper{t: t, seen: make(map[string]int)}
	b := start(t, nil, k)
	var wg sync.WaitGroup
	for i := range 8 {
		id := fmt.Sprint("c", i)
		c := b.login(t, false, rawmqtt.Options{ID: id})
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			sent := 0
			for range 40 {
				var burst []byte
				for range 1 + r.IntN(40) {
					payload := bytes.Repeat([]byte{byte(r.IntN(256))}, 1+r.IntN(3000))
					packet := rawmqtt.Publish(false, 0, "t", 0, payload)
					sent += len(payload) + 3
					burst = append(burst, packet...)
				}
				ping := []byte{packets.Pingreq << 4, 0}
				alone := r.IntN(2) == 0 // so that the burst ends with what was read
				if !alone {
					burst = append(burst, ping...)
				}
				for len(burst) > 0 { // in pieces, as a network has them arrive
					n := min(len(burst), 1+r.IntN(20_000))
					if _, err := c.Write(burst[:n]); err != nil {
						t.Error(err)
						return
					}
					if burst = burst[n:]; len(burst) == 0 && alone {
						burst, alone = ping, false
					}
				}
				if p, err := c.ReadPacket(); err != nil || p.Type() != rawmqtt.PINGRESP {
					t.Errorf("%v, %v for a ping", p, err)
					return
				}
				k.mu.Lock()
				if got := k.seen[id]; got != sent {
					t.Errorf("%d bytes were flushed before mochi got the ping, not %d", got, sent)
				}
				k.mu.Unlock()
			}
		})
	}
	wg.Wait()
	if k.wrong > 0 || k.most < 10 {
		t.Errorf("%d packets changed before the flush; %d at once at most", k.wrong, k.most)
	}
}

// TestFlushComesBeforeThePoolGetsItsMemory: a short read ends with the last of several
// packets, behind one whose beginning had to be kept.
func TestFlushComesBeforeThePoolGetsItsMemory(t *testing.T) {
	k := &keeper{t: t, seen: make(map[string]int), flushed: make(chan struct{}, 10)}
	b := start(t, nil, k)
	c := b.login(t, false, rawmqtt.Options{ID: "c"})
	packet := rawmqtt.Publish(false, 0, "t", 0, bytes.Repeat([]byte{7}, 100))
	for range 5 {
		// The answer says that the half has been read, too.
		send(t, c, append([]byte{packets.Pingreq << 4, 0}, packet[:50]...))
		expect(t, c, rawmqtt.PINGRESP)
		send(t, c, append(bytes.Clone(packet[50:]), packet...))
		select {
		case <-k.flushed:
		case <-time.After(20 * time.Second):
			t.Fatal("nothing was flushed")
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wrong > 0 || k.seen["c"] != 10*(len(packet)-2) {
		t.Errorf("%d flushes came when the memory was given back; %d bytes", k.wrong, k.seen["c"])
	}
}
