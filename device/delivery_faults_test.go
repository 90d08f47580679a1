package device_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// faultyPeer is a device that a test cuts off and restarts.
type faultyPeer struct {
	t    *testing.T
	cfg  device.Config
	node *device.Node
	net  *network
}

// start connects, trying until the hub is there.
func (p *faultyPeer) start(url string) {
	p.t.Helper()
	p.net = new(network)
	p.cfg.DialNetwork, p.cfg.KeepTrying = p.net.dial, true
	n, err := device.Connect(within(p.t), url, p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	p.node = n
}

// kill ends the node so that nobody hears of it.
func (p *faultyPeer) kill() {
	p.net.cut(true)
	_ = p.node.Close()
}

// Numbered messages through an outbox on disk, while connections are cut and both
// devices and the hub restart: each is taken once, in order and unaltered.
func TestDeliveryUnderFaults(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	h := startHub(t, nil)
	url := h.url()
	dir := filepath.Join(t.TempDir(), "outbox")
	limits := channel.Limits{Probe: 100 * time.Millisecond, Dead: 400 * time.Millisecond, Handshake: 2 * time.Second}
	alice := &faultyPeer{t: t, cfg: device.Config{Identity: newIdentity(t), OutboxDir: dir, ChannelLimits: limits}}
	bob := &faultyPeer{t: t, cfg: device.Config{Identity: newIdentity(t), ChannelLimits: limits}}

	var mu sync.Mutex
	taken := make(map[device.MessageID]bool)
	next := uint64(1)
	var again, repeated int
	receiver := func(n *device.Node) {
		live := make(map[device.MessageID]bool)
		for {
			m, err := n.Receive(context.Background(), "app")
			if err != nil {
				return
			}
			mu.Lock()
			if live[m.ID] {
				t.Errorf("%v handed on twice by one process", m.ID)
			}
			live[m.ID] = true
			if m.Redelivered {
				again++
			}
			switch {
			case taken[m.ID]:
				repeated++
			case len(m.Payload) < 12 || crc32.ChecksumIEEE(m.Payload[4:]) != binary.BigEndian.Uint32(m.Payload):
				t.Errorf("%v altered", m.ID)
			case binary.BigEndian.Uint64(m.Payload[4:]) != next:
				t.Errorf("%v is message %d, expected %d", m.ID, binary.BigEndian.Uint64(m.Payload[4:]), next)
			default:
				taken[m.ID] = true
				next++
			}
			mu.Unlock()
			_ = m.Ack()
		}
	}
	var address string
	receivers := new(sync.WaitGroup)
	startBob := func() {
		bob.start(url)
		n := bob.node
		receivers.Go(func() { receiver(n) })
		address = bobListens(t, n, channel.TrustIdentifiers(alice.cfg.Identity.Identifier())).Address()
	}
	startBob()
	posted := uint64(0)
	var stop func()
	senders := new(sync.WaitGroup)
	startAlice := func() {
		alice.start(url)
		o := outboxTo(t, alice.node, bob.cfg.Identity.Identifier(), address)
		posted = o.Last().Count     // what the outbox has taken, however the last process ended
		quit := make(chan struct{}) // asked between posts: one whose context ends is withdrawn
		stop = sync.OnceFunc(func() { close(quit) })
		senders.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				b := make([]byte, 12, 300)
				binary.BigEndian.PutUint64(b[4:], posted+1)
				b = append(b, make([]byte, posted%256)...)
				binary.BigEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
				if _, err := o.Post(context.Background(), b); err != nil {
					if !errors.Is(err, device.ErrClosed) {
						t.Error(err)
					}
					return
				}
				posted++
			}
		})
	}
	startAlice()
	killAlice := func() {
		alice.kill()
		stop()
		senders.Wait()
	}
	faults := make(map[string]int)
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	rounds := 40
	if testing.Short() {
		rounds = 15
	}
	for range rounds {
		<-tick.C
		switch rng.IntN(8) {
		case 0, 1:
			faults["sender's connection cut"]++
			alice.net.cut(false)
		case 2, 3:
			faults["receiver's connection cut"]++
			bob.net.cut(false)
		case 4:
			faults["sender restarted"]++
			killAlice()
			startAlice()
		case 5:
			faults["receiver restarted"]++
			bob.kill()
			startBob()
		case 6:
			faults["hub restarted without memory"]++
			h.stop()
			h = startHub(t, h)
		}
	}
	// Quiet: what was posted has to arrive.
	stop()
	senders.Wait()
	o := outboxTo(t, alice.node, bob.cfg.Identity.Identifier(), address)
	last := o.Last().Count
	deadline := time.Now().Add(60 * time.Second)
	for {
		if n, _ := o.Pending(); n == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d messages are still pending: %+v", n, alice.node.Stats())
		}
		<-tick.C
	}
	alice.kill()
	_ = bob.node.Close()
	receivers.Wait()
	t.Logf("%d messages, %d marked as redelivered, %d of them taken before; faults %v", last, again, repeated, faults)
	if uint64(len(taken)) != last {
		t.Errorf("%d taken of %d", len(taken), last)
	}
}

func benchmarkNodes(b *testing.B) (alice, bob *device.Node, address string, peer identity.Identifier) {
	h := startHub(b, nil)
	alice, bob = connect(b, h.url(), device.Config{}), connect(b, h.url(), device.Config{})
	return alice, bob, bobListens(b, bob, channel.TrustEveryone).Address(), bob.Identifier()
}

// BenchmarkDeliver shows what acknowledgement costs beside Send and Flush: one at a
// time (latency), and as many as there is room for (throughput).
func BenchmarkDeliver(b *testing.B) {
	payload := make([]byte, 64)
	b.Run("send/each flushed", func(b *testing.B) {
		alice, bob, address, _ := benchmarkNodes(b)
		go func() {
			for {
				if _, err := bob.Receive(context.Background(), "app"); err != nil && !errors.As(err, new(*device.LostError)) {
					return
				}
			}
		}()
		ch := dial(b, alice, route.To(address))
		b.ReportAllocs()
		for b.Loop() {
			if err := errors.Join(ch.Send(context.Background(), "app", payload), ch.Flush(context.Background())); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("send/pipelined", func(b *testing.B) {
		alice, bob, address, _ := benchmarkNodes(b)
		go func() {
			for {
				if _, err := bob.Receive(context.Background(), "app"); err != nil && !errors.As(err, new(*device.LostError)) {
					return
				}
			}
		}()
		ch := dial(b, alice, route.To(address))
		b.ReportAllocs()
		for b.Loop() {
			if err := ch.Send(context.Background(), "app", payload); err != nil {
				b.Fatal(err)
			}
		}
		if err := ch.Flush(context.Background()); err != nil {
			b.Fatal(err)
		}
	})
	b.Run("deliver/each", func(b *testing.B) {
		alice, bob, address, _ := benchmarkNodes(b)
		serve(b, bob, nil)
		ch := dial(b, alice, route.To(address))
		b.ReportAllocs()
		for b.Loop() {
			if err := ch.Deliver(context.Background(), "app", payload); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, disk := range []bool{false, true} {
		b.Run(fmt.Sprintf("post/pipelined/disk=%v", disk), func(b *testing.B) {
			h := startHub(b, nil)
			cfg := device.Config{}
			if disk {
				cfg.OutboxDir = filepath.Join(b.TempDir(), "outbox")
			}
			alice, bob := connect(b, h.url(), cfg), connect(b, h.url(), device.Config{})
			serve(b, bob, nil)
			o, err := alice.Outbox(device.Destination{
				Route: route.To(bobListens(b, bob, channel.TrustEveryone).Address()), Peer: bob.Identifier(),
			}, "app")
			if err != nil {
				b.Fatal(err)
			}
			if err := o.Deliver(context.Background(), payload); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.SetParallelism(64)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := o.Post(context.Background(), payload); err != nil {
						b.Error(err)
						return
					}
				}
			})
			r, err := o.Post(context.Background(), payload)
			if err != nil {
				b.Fatal(err)
			}
			if err := r.Wait(context.Background()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
