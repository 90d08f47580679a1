package main

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func start(t *testing.T) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	server, end, err := serve(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		end()
	})
	return address
}

func await(t *testing.T, token paho.Token) {
	t.Helper()
	if !token.WaitTimeout(patience) {
		t.Fatal("no answer")
	}
	if err := token.Error(); err != nil {
		t.Fatal(err)
	}
}

// ordinary connects an ordinary MQTT client; what it receives comes out of the
// channel.
func ordinary(t *testing.T, address, id string, change func(*paho.ClientOptions)) (paho.Client, chan paho.Message) {
	t.Helper()
	got := make(chan paho.Message, 100)
	o := paho.NewClientOptions().AddBroker("tcp://" + address).SetClientID(id).SetProtocolVersion(4).SetAutoReconnect(false).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { got <- m })
	if change != nil {
		change(o)
	}
	c := paho.NewClient(o)
	await(t, c.Connect())
	t.Cleanup(func() { c.Disconnect(0) })
	return c, got
}

func next(t *testing.T, got chan paho.Message, topic, payload string) paho.Message {
	t.Helper()
	select {
	case m := <-got:
		if m.Topic() != topic || string(m.Payload()) != payload {
			t.Fatalf("received %s %q, want %s %q", m.Topic(), m.Payload(), topic, payload)
		}
		return m
	case <-time.After(patience):
		t.Fatalf("%s %q did not arrive", topic, payload)
	}
	return nil
}

func connect(t *testing.T, address string) *device.Node {
	t.Helper()
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	n, err := device.Connect(t.Context(), "mqtt://"+address, device.Config{Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// Devices talk through the server, and a stranger can neither read nor write
// under the root, although the server has an allow-all hook.
func TestStrangerIsKeptOut(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	address := start(t)
	root := topics.DefaultRoot
	bob, alice := connect(t, address), connect(t, address)

	stranger, got := ordinary(t, address, "stranger", nil)
	for _, filter := range []string{"#", "+/+/in", root.All(), root.In(bob.ClientID()), "$share/g/" + root.All()} {
		stranger.Subscribe(filter, 1, nil).WaitTimeout(patience) // refused or not, nothing may come of it
	}
	if _, err := bob.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	fwd, err := bob.CreateForwarder(ctx, "listener")
	if err != nil {
		t.Fatal(err)
	}
	ch, err := alice.Dial(ctx, route.To(fwd.Address()), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	// The stranger's frame into Bob's inbox, and one in Alice's name.
	frame := route.AppendFrame(nil, &route.Frame{Onward: route.To("app"), Return: route.To("x"), Payload: device.EncodeString("forged")})
	for _, topic := range []string{root.In(bob.ClientID()), root.Out(alice.ClientID()), root.Status(bob.ClientID())} {
		await(t, stranger.Publish(topic, 0, true, frame))
	}
	if err := ch.SendString(ctx, "app", "Hello Ockam!"); err != nil {
		t.Fatal(err)
	}
	m, err := bob.Receive(ctx, "app")
	if err != nil {
		t.Fatal(err)
	}
	if m.String() != "Hello Ockam!" || m.From != alice.Identifier() {
		t.Errorf("Bob received %v from %v", m, m.From)
	}
	// Whatever was going to reach the stranger comes before this.
	await(t, stranger.Publish("outside/end", 1, false, "end"))
	next(t, got, "outside/end", "end")

	late, gotLate := ordinary(t, address, "late", nil)
	await(t, late.Subscribe("#", 1, nil))
	await(t, late.Publish("outside/late", 1, false, "end"))
	next(t, gotLate, "outside/late", "end") // and nothing retained before it
}

// Ordinary clients notice nothing: QoS 2, retained messages and wills work.
func TestOrdinaryClientsNoticeNothing(t *testing.T) {
	address := start(t)
	a, _ := ordinary(t, address, "a", nil)
	await(t, a.Publish("plant/state", 2, true, "kept"))
	b, got := ordinary(t, address, "b", nil)
	await(t, b.Subscribe("plant/#", 2, nil))
	if m := next(t, got, "plant/state", "kept"); !m.Retained() || m.Qos() != 2 {
		t.Errorf("retained %v, QoS %d", m.Retained(), m.Qos())
	}
	for qos := range byte(3) {
		await(t, a.Publish("plant/value", qos, false, "21"))
		if m := next(t, got, "plant/value", "21"); m.Qos() != qos {
			t.Errorf("QoS %d arrived as %d", qos, m.Qos())
		}
	}
	// A client that vanishes leaves its will.
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	connectWithWill := "\x10\x22\x00\x04MQTT\x04\x06\x00\x3c\x00\x04gone\x00\x09plant/end\x00\x05alarm"
	if _, err := conn.Write([]byte(connectWithWill)); err != nil {
		t.Fatal(err)
	}
	if answer := read(t, conn, 4); !bytes.Equal(answer, []byte{0x20, 2, 0, 0}) {
		t.Fatalf("CONNACK is %x", answer)
	}
	conn.Close()
	next(t, got, "plant/end", "alarm")
}

// MQTT 5 clients may use topic aliases.
func TestTopicAliases(t *testing.T) {
	address := start(t)
	b, got := ordinary(t, address, "b", nil)
	await(t, b.Subscribe("plant/#", 0, nil))
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	packets := "\x10\x12\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x05alias" + // CONNECT, MQTT 5
		"\x30\x0f\x00\x07plant/a\x03\x23\x00\x07x1" + // PUBLISH plant/a, alias 7
		"\x30\x08\x00\x00\x03\x23\x00\x07x2" // PUBLISH alias 7
	if _, err := conn.Write([]byte(packets)); err != nil {
		t.Fatal(err)
	}
	next(t, got, "plant/a", "x1")
	next(t, got, "plant/a", "x2")
}

func read(t *testing.T, conn net.Conn, n int) []byte {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	for i := 0; i < n; {
		k, err := conn.Read(b[i:])
		if err != nil {
			t.Fatal(err)
		}
		i += k
	}
	return b
}
