package device

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Addresses of a node are random. Inputs have these in their place, which are as long.
var (
	atListener  = strings.Repeat("L", 32) // where the forwarder leads
	atChannel   = strings.Repeat("C", 32) // of an open channel
	atHandshake = strings.Repeat("H", 32) // of a handshake that waits for message 3
)

// receiver is a node whose hub is the fuzz target, with a listener, a forwarder, an open
// channel and a handshake under way.
type receiver struct {
	node   *Node
	conn   net.Conn
	seal   *channel.Sealer
	places *strings.Replacer
	said   uint64 // messages through the channel

	wmu   sync.Mutex
	next  uint16
	up    chan route.Frame // frames for the peer
	acked chan uint16      // by the node
	over  chan struct{}    // closed when the connection has ended
}

// fuzzPeer is where the node finds its peer.
const fuzzPeer = "dev_00000000000000000000000000000000"

func newReceiver(t testing.TB, id *identity.Private) *receiver {
	t.Helper()
	r := &receiver{up: make(chan route.Frame, 64), acked: make(chan uint16, 64), over: make(chan struct{})}
	client, server := net.Pipe()
	r.conn = server
	greeted := make(chan error, 1)
	go r.serve(greeted)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dialled := false
	var err error
	r.node, err = Connect(ctx, "mqtt://hub.test", Config{
		Identity: id, MailboxMessages: 1 << 16,
		ChannelLimits: channel.Limits{Rate: 1e6, Burst: 1e6},
		DialNetwork: func(context.Context, string, string) (net.Conn, error) {
			if dialled {
				return nil, errors.New("once only")
			}
			dialled = true
			return client, nil
		},
	})
	must(err)
	must(<-greeted)
	_, err = r.node.Listen("listener", channel.TrustEveryone)
	must(err)
	fwd, err := r.node.CreateForwarder(ctx, "listener")
	must(err)

	peer, err := identity.Create()
	must(err)
	begin := func(back string) (*channel.Handshake, route.Frame) {
		hs, err := channel.NewInitiator(channel.HandshakeConfig{Identity: peer, Registry: identity.NewMemoryRegistry(0), Policy: channel.TrustEveryone})
		must(err)
		msg1, err := hs.Start()
		must(err)
		r.deliver(t, frameBody(route.To(fwd.m), route.To(fuzzPeer, back), msg1))
		for {
			select {
			case f := <-r.up:
				if len(f.Onward) == 2 && f.Onward[1].Value == back {
					return hs, f
				}
			case <-ctx.Done():
				t.Fatal("no message 2")
			}
		}
	}
	_, waiting := begin("h")
	hs, reply := begin("c")
	msg3, err := hs.ReadReply(reply.Payload)
	must(err)
	res, err := hs.Result()
	must(err)
	r.seal = res.Sealer
	ours := reply.Return[0].Value
	r.deliver(t, frameBody(route.To(ours), route.To(fuzzPeer, "c"), msg3))
	r.places = strings.NewReplacer(atListener, fwd.m, atChannel, ours, atHandshake, waiting.Return[0].Value)
	if !r.works(t) {
		t.Fatal("the connection has ended")
	}
	return r
}

func frameBody(onward, ret route.Route, payload []byte) []byte {
	return route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload})
}

// serve plays an honest hub as far as the node's own packets go.
func (r *receiver) serve(greeted chan<- error) {
	defer close(r.over)
	defer close(r.acked)
	defer r.conn.Close()
	answer := func(p packets.ControlPacket) { r.write(p) }
	for {
		p, err := packets.ReadPacket(r.conn)
		if err != nil {
			return
		}
		switch p := p.(type) {
		case *packets.ConnectPacket:
			answer(packets.NewControlPacket(packets.Connack))
		case *packets.SubscribePacket:
			ack := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
			ack.MessageID, ack.ReturnCodes = p.MessageID, []byte{1}
			answer(ack)
		case *packets.PingreqPacket:
			answer(packets.NewControlPacket(packets.Pingresp))
		case *packets.PubackPacket:
			r.acked <- p.MessageID
		case *packets.PublishPacket:
			ack := packets.NewControlPacket(packets.Puback).(*packets.PubackPacket)
			ack.MessageID = p.MessageID
			answer(ack)
			views, err := route.ParseBundle(p.Payload, route.Limits{}, nil)
			if err != nil {
				continue
			}
			for i := range views {
				r.asked(p, views[i].Frame(), greeted)
			}
		}
	}
}

// asked answers what the node asks its hub.
func (r *receiver) asked(p *packets.PublishPacket, f route.Frame, greeted chan<- error) {
	inbox := strings.TrimSuffix(p.TopicName, "/out") + "/in"
	tell := func(payload []byte, from string) {
		pub := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
		pub.TopicName, pub.Payload = inbox, frameBody(f.Return, route.To(from), payload)
		r.write(pub)
	}
	switch f.Onward[0].Value {
	case "hello":
		a := hubproto.HelloAnswer{Time: time.Now(), FrameLimit: 64 << 10, Window: 1024}
		body, err := a.Marshal()
		tell(body, "hello")
		greeted <- err
	case "forwarding_service":
		tell(bare.AppendString(nil, "FWD_1"), "FWD_1")
	case fuzzPeer:
		select {
		case r.up <- f:
		default:
		}
	}
}

func (r *receiver) write(p packets.ControlPacket) {
	r.wmu.Lock()
	defer r.wmu.Unlock()
	_ = p.Write(r.conn) // its reader sees the end
}

// deliver publishes bytes to the node's inbox and waits for its acknowledgement; false
// when the connection has ended.
func (r *receiver) deliver(t testing.TB, b []byte) bool {
	t.Helper()
	if r.next++; r.next == 0 {
		r.next++
	}
	r.write(inboxPublish(r.node.ClientID(), r.next, b))
	limit := time.After(10 * time.Second)
	for {
		select {
		case id, open := <-r.acked:
			if !open || id == r.next {
				return open
			}
		case <-limit:
			t.Fatal("the node does not acknowledge")
		}
	}
}

// works sends a genuine message through the channel, which is the next one that the
// program gets; false when the connection has ended.
func (r *receiver) works(t testing.TB) bool {
	t.Helper()
	r.said++
	text := binary.BigEndian.AppendUint64(nil, r.said)
	// A message of a channel (spec secure-channel 9.2).
	plain := route.AppendRoute([]byte{0x82, 0x82, 0, 0x81, 0x83}, route.To(DefaultMailbox))
	plain = append(append(route.AppendRoute(plain, nil), 0x48), text...)
	sealed, err := r.seal.Seal(nil, append(plain, 0x40))
	if err != nil {
		t.Fatal(err)
	}
	if !r.deliver(t, frameBody(route.To(r.places.Replace(atChannel)), route.To(fuzzPeer), sealed)) {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	m, err := r.node.Receive(ctx, DefaultMailbox)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Payload, text) {
		t.Fatalf("the program got %x, and the peer said %x", m.Payload, text)
	}
	return true
}

func (r *receiver) close() {
	_ = r.node.Close()
	<-r.over
}

// FuzzFrames: whatever a hub puts into a device's inbox, the device acknowledges it, the
// program gets what a peer has sent through a channel and nothing else, and open channels
// go on. Only the hub's own word that another connection took over ends the node.
func FuzzFrames(f *testing.F) {
	to := func(at string) route.Route { return route.To(at) }
	notice := func(r hubproto.Reason) []byte {
		n := hubproto.Notice{Reason: r, FirstHop: route.Local(fuzzPeer), HasFirst: true, Count: 1}
		b, err := n.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	peer := route.To(fuzzPeer, "p")
	for _, b := range [][]byte{
		nil, {0}, []byte("no frame"), frameBody(nil, nil, nil), frameBody(to(DefaultMailbox), peer, []byte("forged")),
		frameBody(to(atListener), peer, make([]byte, 32)), frameBody(to("listener"), peer, make([]byte, 100)),
		frameBody(to(atListener), route.To("FWD_2"), bare.AppendString(nil, "FWD_2")), frameBody(route.To(atListener, DefaultMailbox), peer, []byte("forged")),
		frameBody(to(atChannel), peer, make([]byte, 40)), frameBody(to(atChannel), nil, []byte("\x00\x00\x00\x00\x00\x00\x00\x05forged")),
		frameBody(to(atHandshake), peer, make([]byte, 200)), frameBody(route.To(atHandshake, atChannel), peer, bytes.Repeat([]byte{0xff}, 64)),
		frameBody(to(hubproto.NoticeTarget), route.To(hubproto.NoticeSource), notice(hubproto.ReasonUnknown)),
		frameBody(to(hubproto.NoticeTarget), route.To(hubproto.NoticeSource), notice(hubproto.ReasonTakenOver)),
		frameBody(to(hubproto.NoticeTarget), peer, notice(hubproto.ReasonTakenOver)),
		frameBody(to("sealmq.hello"), peer, []byte{0xa1, 0, 1}), frameBody(to("sealmq.delivery"), peer, []byte{0xa1, 0, 1}),
		slices.Concat(frameBody(to(atChannel), peer, make([]byte, 40)), frameBody(to(atChannel), peer, make([]byte, 41))),
		append(frameBody(to(DefaultMailbox), peer, []byte("forged")), 0xff),
	} {
		f.Add(b)
	}
	id, err := identity.Create() // testIdentity may be of a bubble's year 2000
	if err != nil {
		f.Fatal(err)
	}
	var r *receiver
	f.Cleanup(func() {
		if r != nil {
			r.close()
		}
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r == nil {
			r = newReceiver(t, id)
		}
		b = []byte(r.places.Replace(string(b)))
		if len(b) > 256<<10 {
			return // the guard has a target of its own
		}
		// Twice, since some have another effect then.
		open := r.deliver(t, b)
		if open = open && r.deliver(t, b); open && r.works(t) {
			return
		}
		select {
		case <-r.node.Done():
		case <-time.After(10 * time.Second):
			t.Fatal("the device has ended the connection")
		}
		if err := r.node.Err(); !errors.Is(err, ErrTakenOver) {
			t.Errorf("the node has stopped: %v", err)
		}
		r.close()
		r = nil
	})
}
