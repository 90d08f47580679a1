package login

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// forgers are peers of a hub that write whatever they like: a device, a TCP peer, an
// ordinary MQTT client and an observer.
type forgers struct {
	t       *testing.T
	h       *broker.Hub
	device  *rawmqtt.Client
	name    string // the device's client id
	id      uint16
	stream  net.Conn
	reader  *route.Reader
	clients map[string]*rawmqtt.Client
}

func newForgers(t *testing.T, h *broker.Hub) *forgers {
	t.Helper()
	fs := &forgers{t: t, h: h, clients: make(map[string]*rawmqtt.Client)}
	login := func(o rawmqtt.Options) *rawmqtt.Client {
		c, err := rawmqtt.Dial(h.MQTTAddr().String(), false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if p, err := c.Login(o); err != nil || p.Code() != 0 {
			t.Fatalf("login as %s: %v, %v", o.User, p, err)
		}
		return c
	}
	eve := newIdentity(t)
	fs.name = eve.Identifier().String()
	proof, err := hubproto.MakeProof(eve, hubproto.ProofBinding{Hub: h.Identifier(), ClientID: fs.name})
	if err != nil {
		t.Fatal(err)
	}
	fs.device = login(rawmqtt.Options{ID: fs.name, User: hubproto.ProofUser, Password: string(proof)})
	for _, role := range []string{"user", "observer"} {
		fs.clients[role] = login(rawmqtt.Options{ID: "the-" + role, User: role, Password: "secret"})
	}
	if fs.stream, err = net.Dial("tcp", h.TCPAddr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fs.stream.Close() })
	if _, err := fs.stream.Write([]byte{route.Preamble}); err != nil {
		t.Fatal(err)
	}
	fs.reader = route.NewReader(fs.stream, route.Limits{})
	if err := fs.reader.ReadPreamble(); err != nil {
		t.Fatal(err)
	}
	return fs
}

// passwords is a password file with the ordinary clients of newForgers.
func passwords(t *testing.T) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(file, fmt.Appendf(nil, "user:%s:user\nobserver:%s:observer\n", hash, hash), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// forge has each of them say payload where the hub's answer of from is waited for, at
// the end of a route to the victim, by every way that it has. When it returns the hub
// has dealt with all of it.
func (fs *forgers) forge(victim string, ways []route.Route, from string, payload []byte) {
	t := fs.t
	t.Helper()
	for _, to := range ways {
		for _, ret := range []route.Route{route.To(from), nil, route.To(hubproto.NoticeSource), route.To(from, from)} {
			body := route.AppendFrame(nil, &route.Frame{Onward: to, Return: ret, Payload: payload})
			fs.id++
			write(t, fs.device, rawmqtt.Publish(false, 2, "sealmq/"+fs.name+"/out", fs.id, body))
			write(t, fs.stream, append(route.AppendFrameHeader(nil, len(body)), body...))
			for _, c := range fs.clients {
				for _, topic := range []string{"sealmq/" + victim + "/in", "sealmq/" + victim + "/out", "sealmq/" + fs.name + "/out"} {
					_, _ = c.Write(rawmqtt.Publish(false, 1, topic, 0, body)) // retained; the hub may end the connection
				}
			}
		}
	}
	echo := route.AppendFrame(nil, &route.Frame{Onward: route.To(bridge.ServiceEcho), Return: route.To("x"), Payload: []byte("there?")})
	write(t, fs.stream, append(route.AppendFrameHeader(nil, len(echo)), echo...))
	for {
		_ = fs.stream.SetReadDeadline(time.Now().Add(limit))
		body, err := fs.reader.Next()
		if err != nil {
			t.Fatal(err)
		}
		f, err := route.ParseFrame(body, route.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if string(f.Payload) == "there?" {
			break // else it is a notice
		}
	}
	write(t, fs.device, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	if _, err := fs.device.Expect(rawmqtt.PINGRESP, rawmqtt.PUBACK, rawmqtt.PUBLISH); err != nil {
		t.Fatal(err)
	}
	for _, c := range fs.clients {
		if _, err := c.Write(rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil)); err == nil {
			_, _ = c.Expect(rawmqtt.PINGRESP, rawmqtt.PUBLISH, rawmqtt.PUBACK)
		}
	}
}

func write(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

// cable is a device's way to the hub, which a test can cut.
type cable struct {
	mu   sync.Mutex
	conn net.Conn
	down bool
}

func (c *cable) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return nil, errors.New("the cable is cut")
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	c.conn = conn
	return conn, err
}

func (c *cable) cut(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down = down; down {
		_ = c.conn.Close()
	}
}

// TestForgedAnswers: while a device waits for the hub's answer to a registration and to
// a lookup, a device, a TCP peer and ordinary clients say something else there, and it
// stands in the device's inbox ahead of the real answer. The device knows the hub's.
func TestForgedAnswers(t *testing.T) {
	h := startHub(t, broker.Config{TCP: "127.0.0.1:0", PasswordFile: passwords(t), Devices: broker.Devices{AnyoneProven: true}})
	fs := newForgers(t, h)
	var wire cable
	changed := make(chan string, 8)
	alice := connect(t, h.MQTTURL(), device.Config{DialNetwork: wire.dial, OnEvent: func(e device.Event) {
		if e.Kind == device.EventForwarderChanged || e.Kind == device.EventForwarderFailed {
			changed <- e.Forwarder.Address()
		}
	}})
	dynamic := forwarder(t, alice)
	real := dynamic.Address()

	// The hub holds its answers back until the forgers are done.
	asked := make(chan route.Route, 1)
	hold := func(service string) {
		t.Helper()
		h.Bridge().UnregisterService(service)
		err := h.Bridge().RegisterService(service, true, func(r *bridge.Request) { asked <- r.Frame.Return.Clone() })
		if err != nil {
			t.Fatal(err)
		}
	}
	say := func(to route.Route, from string, payload []byte) {
		t.Helper()
		if err := h.Bridge().Send(route.Frame{Onward: to, Return: route.To(from), Payload: payload}, route.Stored); err != nil {
			t.Fatal(err)
		}
	}
	waiting := func() route.Route {
		t.Helper()
		select {
		case back := <-asked:
			return back
		case <-within(t).Done():
			t.Fatal("the device does not ask")
			return nil
		}
	}
	// ways lead to the address at the end of back: by the device's address at the hub,
	// and through its forwarder.
	ways := func(back route.Route) []route.Route {
		last, _ := back.Last()
		return []route.Route{back, route.To(real, last.Value), route.To(real)}
	}
	const evil = "forward_to_evil_alice"
	register := func(back route.Route) string {
		t.Helper()
		addr, err := h.Bridge().Register(bridge.Registration{
			Owner: bridge.Principal{Identity: alice.Identifier(), ClientID: alice.ClientID(), Role: bridge.RoleDevice, Proven: true},
			Route: back, Alias: "alice",
		})
		if err != nil {
			t.Fatal(err)
		}
		return addr
	}

	hold(bridge.ServiceStaticForwarding)
	created := make(chan *device.Forwarder, 1)
	go func() {
		f, err := alice.CreateForwarder(within(t), "listener", device.Alias("alice"))
		if err != nil {
			t.Error(err)
		}
		created <- f
	}()
	back := waiting()
	fs.forge(alice.ClientID(), ways(back), evil, bare.AppendString(nil, evil))
	addr := register(back)
	say(back, addr, bare.AppendString(nil, addr))
	static := <-created
	if static == nil || static.Address() != "forward_to_alice" {
		t.Fatalf("registered at %v", static)
	}

	// A waiting inbox: while alice is away they say it again.
	wire.cut(true)
	eventually(t, "alice is away", func() bool { return alice.State() == device.Offline })
	fs.forge(alice.ClientID(), ways(back), evil, bare.AppendString(nil, evil))
	before := alice.Stats().FramesReceived
	wire.cut(false)
	again := waiting()
	say(again, addr, bare.AppendString(nil, addr))
	eventually(t, "the inbox is empty", func() bool { return alice.Stats().FramesReceived-before > 8 })
	if err := alice.Flush(within(t)); err != nil {
		t.Error(err)
	}

	hold(bridge.ServiceLookup)
	eve := newIdentity(t).Identifier()
	record := func(owner func(*hubproto.ForwarderRecord)) []byte {
		t.Helper()
		r := *h.Bridge().Forwarder(addr)
		owner(&r)
		body, err := (&hubproto.LookupAnswer{Address: addr, Record: &r}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	found := make(chan device.Ownership, 1)
	go func() {
		o, err := alice.Lookup(within(t), addr)
		if err != nil {
			t.Error(err)
		}
		found <- o
	}()
	back = waiting()
	fs.forge(alice.ClientID(), ways(back), bridge.ServiceLookup, record(func(r *hubproto.ForwarderRecord) { r.Owner, r.Claim = eve, nil }))
	say(back, bridge.ServiceLookup, record(func(*hubproto.ForwarderRecord) {}))
	if o := <-found; o.Owner != alice.Identifier() {
		t.Errorf("looked up: %+v", o)
	}

	if static.Address() != addr || dynamic.Address() != real || len(changed) != 0 {
		t.Errorf("addresses %s and %s, %d changes", static.Address(), dynamic.Address(), len(changed))
	}
	ch, err := connect(t, h.MQTTURL(), device.Config{}).Dial(within(t), route.To(real), channel.TrustEveryone)
	if err != nil {
		t.Fatal(err)
	}
	if ch.Peer().Identifier != alice.Identifier() {
		t.Errorf("%v is at alice's address", ch.Peer().Identifier)
	}
	_ = ch.Close()
}
