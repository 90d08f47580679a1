package device

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// fakeHub is the other end of a device's connections, played by a test step by
// step. It is for what a real hub does not do.
type fakeHub struct {
	t     *testing.T
	conns chan net.Conn
}

func newFakeHub(t *testing.T) *fakeHub { return &fakeHub{t: t, conns: make(chan net.Conn)} }

// dial stands in for the network.
func (h *fakeHub) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case h.conns <- server:
		return client, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fakeConn is one connection of a device.
type fakeConn struct {
	net.Conn
	t      *testing.T
	device string
	hello  *hubproto.HelloRequest
	helloF route.Frame
	nextID uint16
	early  []packets.ControlPacket // read while waiting for something else
}

// raw accepts a connection and says nothing.
func (h *fakeHub) raw() *fakeConn {
	h.t.Helper()
	select {
	case c := <-h.conns:
		return &fakeConn{Conn: c, t: h.t}
	case <-time.After(time.Hour): // of the bubble's time
		h.t.Fatal("the device did not connect")
		return nil
	}
}

// connected accepts a connection, and answers CONNECT.
func (h *fakeHub) connected(code byte) *fakeConn {
	h.t.Helper()
	c := h.raw()
	connect, ok := c.read().(*packets.ConnectPacket)
	if !ok {
		h.t.Fatal("no CONNECT")
	}
	if !connect.CleanSession || connect.ProtocolVersion != 4 {
		h.t.Errorf("CONNECT with clean session %v and protocol %d", connect.CleanSession, connect.ProtocolVersion)
	}
	c.device = connect.ClientIdentifier
	ack := packets.NewControlPacket(packets.Connack).(*packets.ConnackPacket)
	ack.ReturnCode = code
	c.write(ack)
	return c
}

// subscribed also answers SUBSCRIBE, and takes the hello.
func (h *fakeHub) subscribed() *fakeConn {
	h.t.Helper()
	c := h.connected(packets.Accepted)
	sub, ok := c.read().(*packets.SubscribePacket)
	if !ok || len(sub.Topics) != 1 || sub.Topics[0] != "sealmq/"+c.device+"/in" || sub.Qoss[0] != 1 {
		h.t.Fatalf("not a SUBSCRIBE to the inbox: %v", sub)
	}
	ack := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
	ack.MessageID, ack.ReturnCodes = sub.MessageID, []byte{1}
	c.write(ack)
	pub := c.publish()
	c.helloF = c.frames(pub)[0]
	if c.helloF.Onward.String() != "0#hello" {
		h.t.Fatalf("first frame goes to %v", c.helloF.Onward)
	}
	req, err := hubproto.ParseHelloRequest(c.helloF.Payload)
	if err != nil {
		h.t.Fatal(err)
	}
	c.hello = req
	c.puback(pub.MessageID)
	return c
}

// ready also answers hello, without proof.
func (h *fakeHub) ready(window uint64) *fakeConn {
	h.t.Helper()
	c := h.subscribed()
	c.answer(&hubproto.HelloAnswer{Time: time.Now(), FrameLimit: 64 << 10, Window: window})
	return c
}

func (c *fakeConn) answer(a *hubproto.HelloAnswer) {
	c.t.Helper()
	body, err := a.Marshal()
	if err != nil {
		c.t.Fatal(err)
	}
	c.deliver(route.Frame{Onward: c.helloF.Return, Return: route.To("hello"), Payload: body})
}

// deliver sends a frame to the device's inbox and takes its PUBACK.
func (c *fakeConn) deliver(f route.Frame) {
	c.t.Helper()
	c.deliverBody(route.AppendFrame(nil, &f))
}

// deliverBody is deliver for the payload of a packet.
func (c *fakeConn) deliverBody(body []byte) {
	c.t.Helper()
	c.nextID++
	id := c.nextID
	c.write(inboxPublish(c.device, id, body))
	// What the frame sets off may come before its acknowledgement.
	for {
		p := c.receive()
		if ack, ok := p.(*packets.PubackPacket); ok && ack.MessageID == id {
			return
		}
		c.early = append(c.early, p)
	}
}

func inboxPublish(device string, id uint16, payload []byte) *packets.PublishPacket {
	p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	p.TopicName, p.Qos, p.MessageID, p.Payload = "sealmq/"+device+"/in", 1, id, payload
	return p
}

// notice says what became of a frame that went to an address.
func (c *fakeConn) notice(r hubproto.Reason, to string) {
	c.t.Helper()
	body, err := (&hubproto.Notice{Reason: r, Count: 1, FirstHop: route.Local(to), HasFirst: true}).Marshal()
	if err != nil {
		c.t.Fatal(err)
	}
	f := route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To(hubproto.NoticeSource), Payload: body}
	p := inboxPublish(c.device, 0, route.AppendFrame(nil, &f))
	p.Qos = 0
	c.write(p)
}

func (c *fakeConn) write(p packets.ControlPacket) {
	c.t.Helper()
	if err := p.Write(c.Conn); err != nil {
		c.t.Fatalf("write %T: %v", p, err)
	}
}

// read returns the next packet that is no ping; pings are answered.
func (c *fakeConn) read() packets.ControlPacket {
	c.t.Helper()
	if len(c.early) > 0 {
		p := c.early[0]
		c.early = c.early[1:]
		return p
	}
	return c.receive()
}

func (c *fakeConn) receive() packets.ControlPacket {
	c.t.Helper()
	for {
		p, err := packets.ReadPacket(c.Conn)
		if err != nil {
			c.t.Fatalf("read: %v", err)
		}
		if _, ping := p.(*packets.PingreqPacket); !ping {
			return p
		}
		c.write(packets.NewControlPacket(packets.Pingresp))
	}
}

func (c *fakeConn) publish() *packets.PublishPacket {
	c.t.Helper()
	p := c.read()
	pub, ok := p.(*packets.PublishPacket)
	if !ok {
		c.t.Fatalf("%T instead of a publish", p)
	}
	if pub.TopicName != "sealmq/"+c.device+"/out" {
		c.t.Fatalf("publish to %s", pub.TopicName)
	}
	return pub
}

func (c *fakeConn) frames(p *packets.PublishPacket) []route.Frame {
	c.t.Helper()
	views, err := route.ParseBundle(p.Payload, route.Limits{}, nil)
	if err != nil {
		c.t.Fatalf("bundle: %v", err)
	}
	out := make([]route.Frame, len(views))
	for i := range views {
		out[i] = views[i].Frame()
	}
	return out
}

func (c *fakeConn) puback(id uint16) {
	c.t.Helper()
	ack := packets.NewControlPacket(packets.Puback).(*packets.PubackPacket)
	ack.MessageID = id
	c.write(ack)
}

// drain reads until the device ends the connection, and returns what it said.
func (c *fakeConn) drain() (said []packets.ControlPacket) {
	for {
		p, err := packets.ReadPacket(c.Conn)
		if err != nil {
			return said
		}
		said = append(said, p)
	}
}

// serve acknowledges everything until the connection ends.
func (c *fakeConn) serve(got func(route.Frame)) {
	for {
		p, err := packets.ReadPacket(c.Conn)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
				c.t.Errorf("read: %v", err)
			}
			return
		}
		switch p := p.(type) {
		case *packets.PublishPacket:
			for _, f := range c.frames(p) {
				if got != nil {
					got(f)
				}
			}
			ack := packets.NewControlPacket(packets.Puback).(*packets.PubackPacket)
			ack.MessageID = p.MessageID
			_ = ack.Write(c.Conn)
		case *packets.PingreqPacket:
			_ = packets.NewControlPacket(packets.Pingresp).Write(c.Conn)
		}
	}
}

var testIdentity = sync.OnceValue(func() *identity.Private {
	id, err := identity.Create()
	if err != nil {
		panic(err)
	}
	return id
})

// eventLog keeps events in order.
type eventLog struct {
	mu  sync.Mutex
	got []Event
}

func (l *eventLog) add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.got = append(l.got, e)
}

func (l *eventLog) kinds() []EventKind {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]EventKind, len(l.got))
	for i, e := range l.got {
		out[i] = e.Kind
	}
	return out
}

// errs returns the errors of the events of a kind.
func (l *eventLog) errs(k EventKind) (out []error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.got {
		if e.Kind == k {
			out = append(out, e.Err)
		}
	}
	return out
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(p))
	return len(p), nil
}

func testLogger(t *testing.T) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (h *fakeHub) config() Config {
	return Config{Identity: testIdentity(), DialNetwork: h.dial, Logger: testLogger(h.t)}
}

// connect runs Connect in the background.
func (h *fakeHub) connect(ctx context.Context, cfg Config) func() (*Node, error) {
	var n *Node
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		n, err = Connect(ctx, "mqtt://hub.test", cfg)
	}()
	return func() (*Node, error) {
		<-done
		return n, err
	}
}
