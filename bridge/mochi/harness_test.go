package mochibridge

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type signer struct{}

func (signer) Identifier() identity.Identifier      { return identity.Identifier{1} }
func (signer) ChangeHistory() []byte                { return []byte("history") }
func (signer) SignHello(msg []byte) ([]byte, error) { return bytes.Repeat([]byte{7}, 64), nil }

// setup is what a test may change before the hub starts.
type setup struct {
	server   *mqtt.Options
	bridge   bridge.Config
	hook     Options
	listener guard.Config
	stock    bool // mochi's own listener, no fixes
	noFixes  bool
	hooks    []mqtt.Hook
}

type hub struct {
	*mqtt.Server
	b     *bridge.Bridge
	hook  *Hook
	fixes *guard.Fixes
	c     *guard.Counters
	addr  string
}

// ways runs a test for each way that frames can take.
func ways(t *testing.T, f func(t *testing.T, change func(*setup))) {
	for name, change := range map[string]func(*setup){
		"tap":   func(*setup) {},
		"read":  func(s *setup) { s.hook.noTap = true },
		"stock": func(s *setup) { s.stock = true },
	} {
		t.Run(name, func(t *testing.T) { f(t, change) })
	}
}

// newHub starts a server as an embedder would have it: with mochi's allow-all
// hook. Who a client is says its user name; without one it is not ours.
func newHub(t testing.TB, changes ...func(*setup)) *hub {
	t.Helper()
	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumPacketSize = 256<<10 + PacketHeadroom
	s := &setup{
		server:   &mqtt.Options{Capabilities: caps, Logger: slog.New(slog.DiscardHandler)},
		bridge:   bridge.Config{Key: [32]byte{9}, Identity: signer{}},
		listener: guard.Config{ID: "t", Address: "127.0.0.1:0", PacketLimit: int(caps.MaximumPacketSize), Counters: new(guard.Counters)},
	}
	for _, change := range changes {
		change(s)
	}
	h := &hub{Server: mqtt.New(s.server), c: s.listener.Counters}
	var err error
	if h.b, err = bridge.New(s.bridge); err != nil {
		t.Fatal(err)
	}
	s.hook.Server, s.hook.Bridge = h.Server, h.b
	if s.hook.Authenticate == nil {
		s.hook.Authenticate = byUserName
	}
	if h.hook, err = New(s.hook); err != nil {
		t.Fatal(err)
	}
	if h.fixes, err = guard.NewFixes(h.Server, guard.FixesConfig{Counters: h.c}); err != nil {
		t.Fatal(err)
	}
	hooks := []mqtt.Hook{new(auth.AllowHook), h.hook}
	if !s.stock && !s.noFixes {
		hooks = append(hooks, h.fixes)
	}
	for _, hk := range append(hooks, s.hooks...) {
		if err := h.AddHook(hk, nil); err != nil {
			t.Fatal(err)
		}
	}
	if s.stock {
		l := listeners.NewTCP(listeners.Config{ID: "t", Address: "127.0.0.1:0"})
		err = h.AddListener(l)
		h.addr = l.Address()
	} else {
		l, lerr := guard.NewListener(s.listener)
		if lerr != nil {
			t.Fatal(lerr)
		}
		err = h.AddListener(l)
		h.addr = l.Address()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Serve(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.stock {
			h.emptied(t)
		}
		_ = h.Close()
		if err := h.b.Close(); err != nil {
			t.Error(err)
		}
		c := h.b.Counters()
		if n := c.Lost(); n != 0 {
			t.Errorf("%d frames without a fate: %+v", n, c)
		}
		if n := h.hook.Counters().Count(HookPanicked); n != 0 {
			t.Errorf("%d panics in the hook", n)
		}
	})
	return h
}

// emptied ends all connections: closing a server with a stock listener while
// clients leave hangs, because mochi then takes a read lock twice.
func (h *hub) emptied(t testing.TB) {
	for _, cl := range h.Clients.GetAll() {
		if !cl.Net.Inline {
			cl.Stop(packets.ErrServerShuttingDown)
		}
	}
	eventually(t, "no client connected", func() bool { return atomic.LoadInt64(&h.Info.ClientsConnected) == 0 })
}

func byUserName(c ConnectInfo) (bridge.Principal, error) {
	p := bridge.Principal{ClientID: c.ClientID, Proven: true}
	switch string(c.Username) {
	case "device":
		p.Role = bridge.RoleDevice
	case "unproven":
		p.Role, p.Proven = bridge.RoleDevice, false
	case "guest":
		p.Role = bridge.RoleGuest
	case "observer":
		p.Role = bridge.RoleObserver
	case "user":
		p.Role = bridge.RoleUser
	case "bad":
		return p, &Refusal{Code: BadCredentials, Reason: "bad proof"}
	case "forbidden":
		return p, &Refusal{Code: NotAllowed, Reason: "not on the list"}
	case "full":
		return p, &Refusal{Code: Full, Reason: "full"}
	case "error":
		return p, errors.New("the database said something secret")
	case "liar":
		p.ClientID = "somebody-else"
	case "panic":
		panic("authenticator")
	default:
		return p, ErrNotOurs
	}
	return p, nil
}

func (h *hub) dial(t testing.TB, v5 bool) *rawmqtt.Client {
	t.Helper()
	c, err := rawmqtt.Dial(h.addr, v5)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (h *hub) login(t testing.TB, v5 bool, o rawmqtt.Options) *rawmqtt.Client {
	t.Helper()
	c := h.dial(t, v5)
	if p, err := c.Login(o); err != nil || p.Code() != 0 {
		t.Fatalf("login as %s: %v %v", o.ID, p, err)
	}
	return c
}

// device is a device with its inbox attached.
type device struct {
	*rawmqtt.Client
	t    testing.TB
	h    *hub
	name string
	id   uint16
	auto bool // acknowledge in recv

	packets, acks []rawmqtt.Packet // read, but not yet asked for
}

func (h *hub) device(t testing.TB, name string, v5 bool, props ...byte) *device {
	t.Helper()
	d := &device{Client: h.login(t, v5, rawmqtt.Options{ID: name, User: "device", Props: props}), t: t, h: h, name: name, auto: true}
	d.attach(false)
	return d
}

func (d *device) attach(fresh bool) {
	d.t.Helper()
	if p, err := d.Sub(1, 1, "sealmq/"+d.name+"/in"); err != nil || p.Code() != 1 {
		d.t.Fatalf("inbox of %s: %v %v", d.name, p, err)
	}
	d.hello(fresh)
	p := d.recv()
	if f := d.frame(p.Payload); len(f.Return) != 1 || f.Return[0].Value != "hello" {
		d.t.Fatalf("%s: first frame is %v", d.name, f)
	}
}

var epochs atomic.Uint32

func (d *device) hello(fresh bool) {
	d.t.Helper()
	r := hubproto.HelloRequest{Fresh: fresh}
	r.Epoch[0], r.Epoch[1] = byte(epochs.Add(1)), byte(epochs.Load()>>8)
	body, err := r.Marshal()
	if err != nil {
		d.t.Fatal(err)
	}
	d.publish(0x2, &route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: body})
	d.puback()
}

func (d *device) next() uint16 {
	if d.id++; d.id == 0 {
		d.id = 1
	}
	return d.id
}

func (d *device) publish(flags byte, frames ...*route.Frame) uint16 {
	d.t.Helper()
	var b []byte
	for _, f := range frames {
		b = append(b, route.AppendFrame(nil, f)...)
	}
	id := d.next()
	send(d.t, d, rawmqtt.Publish(d.V5, flags, "sealmq/"+d.name+"/out", id, b))
	return id
}

// pump reads one packet into the lists.
func (d *device) pump() {
	d.t.Helper()
	p, err := d.ReadPacket()
	if err != nil {
		d.t.Fatalf("%s: %v", d.name, err)
	}
	switch p.Type() {
	case rawmqtt.PUBLISH:
		d.packets = append(d.packets, p)
	case rawmqtt.PUBACK:
		d.acks = append(d.acks, p)
	default:
		d.t.Fatalf("%s: got packet type %d (% x)", d.name, p.Type(), p.Body)
	}
}

func (d *device) puback() rawmqtt.Packet {
	d.t.Helper()
	for len(d.acks) == 0 {
		d.pump()
	}
	p := d.acks[0]
	d.acks = d.acks[1:]
	if p.ID != d.id {
		d.t.Fatalf("%s: PUBACK %d, want %d", d.name, p.ID, d.id)
	}
	return p
}

// to sends a payload to another device by its hub address, and waits for the
// PUBACK.
func (d *device) to(name string, payload string) {
	d.t.Helper()
	d.publish(2, &route.Frame{Onward: route.To(d.h.b.HubAddress(name), "app"), Payload: []byte(payload)})
	d.puback()
}

func (d *device) recv() rawmqtt.Packet {
	d.t.Helper()
	for len(d.packets) == 0 {
		d.pump()
	}
	p := d.packets[0]
	d.packets = d.packets[1:]
	if p.Topic != "sealmq/"+d.name+"/in" {
		d.t.Fatalf("%s: got topic %q", d.name, p.Topic)
	}
	if p.QoS() == 1 && p.ID < 0x8000 {
		d.t.Fatalf("%s: packet id %d", d.name, p.ID)
	}
	if d.auto && p.QoS() == 1 {
		send(d.t, d, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	}
	return p
}

func (d *device) frame(b []byte) route.Frame {
	d.t.Helper()
	f, err := route.ParseFrame(b, route.Limits{})
	if err != nil {
		d.t.Fatal(err)
	}
	return f
}

// payloads returns the payloads of the frames in a packet.
func payloads(t testing.TB, p rawmqtt.Packet) (out []string) {
	t.Helper()
	views, err := route.ParseBundle(p.Payload, route.Limits{Frame: route.MaxFrame}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range views {
		out = append(out, string(views[i].Payload()))
	}
	return out
}

func (d *device) want(payload string) {
	d.t.Helper()
	if got := strings.Join(payloads(d.t, d.recv()), ","); got != payload {
		d.t.Fatalf("%s: got %q, want %q", d.name, got, payload)
	}
}

func send(t testing.TB, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, c *rawmqtt.Client, kind int, skip ...int) rawmqtt.Packet {
	t.Helper()
	p, err := c.Expect(kind, skip...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatalf("timed out: %s", what)
		case <-tick.C:
		}
	}
}

func closedByPeer(t testing.TB, c *rawmqtt.Client) {
	t.Helper()
	for {
		if _, err := c.ReadPacket(); err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				t.Fatal("connection still open")
			}
			return
		}
	}
}

// quiet checks that nothing waits for the device.
func (d *device) quiet() {
	d.t.Helper()
	if len(d.packets)+len(d.acks) > 0 {
		d.t.Fatalf("%s: not asked for: %v %v", d.name, d.packets, d.acks)
	}
	silent(d.t, d.Client)
}

// silent checks that nothing but the answer to a ping comes.
func silent(t testing.TB, c *rawmqtt.Client) {
	t.Helper()
	send(t, c, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	expect(t, c, rawmqtt.PINGRESP)
}

func count(t testing.TB, h *hub, e Event, want uint64) {
	t.Helper()
	if got := h.hook.Counters().Count(e); got != want {
		t.Errorf("%v: %d, want %d", e, got, want)
	}
}

func nth(prefix string, i int) string { return fmt.Sprintf("%s%d", prefix, i) }
