package device_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// lossy is a way to the hub that can lose what the hub delivers, although it
// acknowledges it.
type lossy struct{ loses atomic.Bool }

func (l *lossy) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &lossyConn{Conn: c, way: l}, nil
}

type lossyConn struct {
	net.Conn
	way  *lossy
	rest bytes.Buffer // of the packet that is being read

	mu sync.Mutex // whole packets are written at a time
}

func (c *lossyConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *lossyConn) Read(p []byte) (int, error) {
	for c.rest.Len() == 0 {
		pk, err := packets.ReadPacket(c.Conn)
		if err != nil {
			return 0, err
		}
		if pub, ok := pk.(*packets.PublishPacket); ok && c.way.loses.Load() {
			if pub.Qos == 1 {
				if _, err := c.Write(rawmqtt.Ack(rawmqtt.PUBACK, pub.MessageID)); err != nil {
					return 0, err
				}
			}
			continue
		}
		if err := pk.Write(&c.rest); err != nil {
			return 0, err
		}
	}
	return c.rest.Read(p)
}

// TestGapHeals: more frames are lost than a channel bridges. Both sides notice
// with the next frame and say so, long before they would ask a peer that is silent, and the device that dialled makes
// the channel again.
func TestGapHeals(t *testing.T) {
	h := startHub(t, nil)
	events := make(chan device.Event, 64)
	var way lossy
	alice := connect(t, h.url(), device.Config{OnEvent: func(e device.Event) { events <- e }})
	bob := connect(t, h.url(), device.Config{DialNetwork: way.dial})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	ch := dial(t, alice, route.To(fwd.Address()))
	if err := ch.SendString(within(t), "app", "before"); err != nil {
		t.Fatal(err)
	}
	receive(t, bob, "before")

	way.loses.Store(true)
	for i := range 3 * channel.Window {
		if err := ch.SendString(within(t), "app", fmt.Sprint("lost ", i)); err != nil {
			t.Fatal(err)
		}
		if err := ch.Flush(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the hub has delivered everything", func() bool { return h.bridge.Counters().Queued == 0 })
	way.loses.Store(false)
	if err := ch.SendString(within(t), "app", "proves the gap"); err != nil {
		t.Fatal(err)
	}
	for lost := false; !lost; {
		select {
		case e := <-events:
			if lost = e.Kind == device.EventChannelLost; lost && !errors.Is(e.Err, channel.ErrGap) {
				t.Errorf("alice hears %v", e.Err)
			}
		case <-time.After(limit):
			t.Fatal("alice does not hear of the gap")
		}
	}
	if s := bob.Stats(); s.Channels.Gaps != 1 {
		t.Errorf("bob counts %d gaps", s.Channels.Gaps)
	}

	if err := ch.SendString(within(t), "app", "after"); err != nil {
		t.Fatal(err)
	}
	receive(t, bob, "after")
	if ch.Restarts() != 1 {
		t.Errorf("made again %d times", ch.Restarts())
	}
}

// TestFloodedListener: one device floods a listener with first messages, through
// the hub, as fast as the hub takes them; others still get through.
func TestFloodedListener(t *testing.T) {
	h := startHub(t, nil)
	bob := connect(t, h.url(), device.Config{})
	fwd := bobListens(t, bob, channel.TrustEveryone)
	alice := connect(t, h.url(), device.Config{})

	eve, err := rawmqtt.Dial(h.addr, false)
	if err != nil {
		t.Fatal(err)
	}
	eveID := newIdentity(t).Identifier().String()
	if _, err := eve.Login(rawmqtt.Options{ID: eveID}); err != nil {
		t.Fatal(err)
	}
	const ahead = 256 // publishes that eve has under way
	room := make(chan struct{}, ahead)
	var flood sync.WaitGroup
	var sent atomic.Int64
	flooding, enough := make(chan struct{}), make(chan struct{})
	flood.Go(func() { // takes the acknowledgements
		for {
			if _, err := eve.Expect(rawmqtt.PUBACK); err != nil {
				return
			}
			<-room
		}
	})
	flood.Go(func() {
		key := make([]byte, 32)
		for id := uint16(1); ; id = id%60000 + 1 {
			select {
			case room <- struct{}{}:
			case <-enough:
				return
			}
			_, _ = rand.Read(key)
			frame := route.AppendFrame(nil, &route.Frame{Onward: route.To(fwd.Address()), Return: route.To("dr"), Payload: key})
			if _, err := eve.Write(rawmqtt.Publish(false, 2, "sealmq/"+eveID+"/out", id, frame)); err != nil {
				return
			}
			if sent.Add(1) == 1000 {
				close(flooding)
			}
		}
	})
	select {
	case <-flooding:
	case <-time.After(limit):
		t.Fatal("eve cannot flood")
	}
	for range 3 {
		ch := dial(t, alice, route.To(fwd.Address()))
		if err := ch.SendString(within(t), "app", "through"); err != nil {
			t.Fatal(err)
		}
		receive(t, bob, "through")
	}
	close(enough)
	_ = eve.Close()
	flood.Wait()
	s := bob.Stats()
	if s.Channels.HalfOpen > 16 || s.Channels.Dropped.Of(channel.DropRate) == 0 {
		t.Errorf("after %d first messages: %+v", sent.Load(), s.Channels)
	}
}
