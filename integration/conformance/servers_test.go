// Package conformance holds examples/embed and the hub to what ordinary MQTT
// clients may expect, behaviour by behaviour of the conformance suite of Eclipse
// Paho (client_test.py, client_test5.py). What a server does otherwise stands in
// its row of servers, and in docs/compatibility.md with the reason.
package conformance

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/integration/internal/peer"
	"github.com/sealmq/sealmq/internal/rawmqtt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a running server and what it does otherwise than others.
type server struct {
	addr string
	// maxQoS is the highest QoS that it offers.
	maxQoS byte
	// aliasIn says that it takes topic aliases, which no server offers; aliasOut
	// that it makes them.
	aliasIn, aliasOut bool
	// receiveMaximum says that it honours a client's Receive Maximum.
	receiveMaximum bool
	// sysWrites says that clients may publish to topics that begin with $.
	sysWrites bool
	// packetLimit is the longest packet it takes, which no server says; 0: any.
	packetLimit int
}

var servers = map[string]func(t *testing.T) *server{"embed": embed, "hub": hub}

// embed runs the program examples/embed.
func embed(t *testing.T) *server {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "embed")
	build := exec.Command("go", "build", "-o", bin, "./examples/embed")
	build.Dir = peer.ModuleRoot(t)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	_ = ln.Close()
	p := peer.Start(t, peer.Options{}, bin, addr)
	deadline := time.After(30 * time.Second)
	for {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
			return &server{addr: addr, maxQoS: 2, aliasIn: true, aliasOut: true, receiveMaximum: true, sysWrites: true}
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-p.Exited():
			t.Fatalf("embed ended: %s", p.Stderr())
		case <-deadline:
			t.Fatal("embed does not listen")
		}
	}
}

// hub runs the program sealmq. A process of its own keeps what mochi reads and
// writes without a lock from the race detector, which does not see that packets
// on the wire put it in order.
func hub(t *testing.T) *server {
	t.Helper()
	lines := make(chan []byte, 1)
	var once sync.Once
	p := peer.Start(t, peer.Options{OnLine: func(l []byte) { once.Do(func() { lines <- l }) }},
		peer.Sealmq(t), "hub", "--mqtt", "127.0.0.1:0", "--json")
	var info struct {
		MQTT []string `json:"mqtt"`
	}
	select {
	case l := <-lines:
		if err := json.Unmarshal(l, &info); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
	case <-p.Exited():
		t.Fatalf("the hub ended: %s", p.Stderr())
	case <-time.After(30 * time.Second):
		t.Fatal("the hub does not start")
	}
	return &server{addr: strings.TrimPrefix(info.MQTT[0], "mqtt://"), maxQoS: 1, packetLimit: 320 << 10}
}

// client is a connection under test.
type client struct {
	*rawmqtt.Client
	t  *testing.T
	id uint16

	early []rawmqtt.Packet // messages that came while a PUBREL was waited for
}

func (s *server) open(t *testing.T, v5 bool) *client {
	t.Helper()
	c, err := rawmqtt.Dial(s.addr, v5)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &client{Client: c, t: t}
}

// login connects and returns the CONNACK too.
func (s *server) login(t *testing.T, v5 bool, o rawmqtt.Options) (*client, rawmqtt.Packet) {
	t.Helper()
	c := s.open(t, v5)
	p, err := c.Login(o)
	if err != nil || p.Code() != 0 {
		t.Fatalf("login as %q: %v %v", o.ID, p, err)
	}
	return c, p
}

func (s *server) client(t *testing.T, v5 bool, id string) *client {
	t.Helper()
	c, _ := s.login(t, v5, rawmqtt.Options{ID: id})
	return c
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) expect(kind int, skip ...int) rawmqtt.Packet {
	c.t.Helper()
	p, err := c.Expect(kind, skip...)
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// subscribe returns the first filter's code.
func (c *client) subscribe(qos byte, filter string) byte {
	c.t.Helper()
	p, err := c.Sub(c.next(), qos, filter)
	if err != nil {
		c.t.Fatal(err)
	}
	return p.Code()
}

func (c *client) next() uint16 { c.id++; return c.id }

// publish publishes and finishes the exchange.
func (c *client) publish(qos byte, retain bool, topic, payload string, props ...byte) {
	c.t.Helper()
	flags := qos << 1
	if retain {
		flags |= 1
	}
	id := c.next()
	c.write(rawmqtt.Publish(c.V5, flags, topic, id, []byte(payload), props...))
	switch qos {
	case 1:
		c.expect(rawmqtt.PUBACK)
	case 2:
		c.expect(rawmqtt.PUBREC)
		c.write(rawmqtt.Ack(rawmqtt.PUBREL, id))
		c.expect(rawmqtt.PUBCOMP)
	}
}

// receive returns the next message, acknowledged as far as its QoS wants it.
func (c *client) receive() rawmqtt.Packet {
	c.t.Helper()
	var p rawmqtt.Packet
	if len(c.early) > 0 {
		p, c.early = c.early[0], c.early[1:]
	} else {
		p = c.expect(rawmqtt.PUBLISH)
	}
	switch p.QoS() {
	case 1:
		c.write(rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
	case 2:
		c.write(rawmqtt.Ack(rawmqtt.PUBREC, p.ID))
		for {
			rel, err := c.ReadPacket()
			if err != nil {
				c.t.Fatal(err)
			}
			if rel.Type() == rawmqtt.PUBREL {
				break
			}
			c.early = append(c.early, rel)
		}
		c.write(rawmqtt.Ack(rawmqtt.PUBCOMP, p.ID))
	}
	return p
}

// want receives a message with that topic and payload.
func (c *client) want(topic, payload string) rawmqtt.Packet {
	c.t.Helper()
	p := c.receive()
	if p.Topic != topic || string(p.Payload) != payload {
		c.t.Fatalf("got %q on %q, want %q on %q", p.Payload, p.Topic, payload, topic)
	}
	return p
}

// nothing checks that no message is under way: what was published before a marker
// to a topic of the client's own would have come before it.
func (c *client) nothing() {
	c.t.Helper()
	c.write(rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	c.expect(rawmqtt.PINGRESP)
}

// silent checks that nothing comes for a while.
func (c *client) silent(d time.Duration) {
	c.t.Helper()
	usual := c.Timeout
	c.Timeout = d
	defer func() { c.Timeout = usual }()
	p, err := c.ReadPacket()
	var ne net.Error
	if err == nil || !errors.As(err, &ne) || !ne.Timeout() {
		c.t.Fatalf("got %v %v, want nothing", p, err)
	}
}

// gone waits until the server ends the connection, and returns the code of its
// DISCONNECT, if any.
func (c *client) gone(within time.Duration) (code byte) {
	c.t.Helper()
	c.Timeout = within
	for {
		p, err := c.ReadPacket()
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				c.t.Fatal("the connection stays open")
			}
			return code
		}
		if p.Type() == rawmqtt.DISCONNECT {
			code = p.Code()
		}
	}
}

// props are MQTT 5 properties (2.2.2.2), each with its encoded values in order.
type props map[byte][][]byte

func parseProps(t *testing.T, b []byte) props {
	t.Helper()
	all := make(props)
	for len(b) > 0 {
		id := b[0]
		b = b[1:]
		n := 0
		switch id {
		case 1, 23, 25, 36, 37, 40, 41, 42:
			n = 1
		case 19, 33, 34, 35:
			n = 2
		case 2, 17, 24, 39:
			n = 4
		case 3, 8, 9, 18, 21, 22, 26, 28, 31:
			n = 2 + int(binary.BigEndian.Uint16(b))
		case 38:
			k := 2 + int(binary.BigEndian.Uint16(b))
			n = k + 2 + int(binary.BigEndian.Uint16(b[k:]))
		case 11:
			_, n = binary.Uvarint(b)
		default:
			t.Fatalf("property %d", id)
		}
		all[id] = append(all[id], b[:n])
		b = b[n:]
	}
	return all
}

// connackProps are the properties of a CONNACK.
func connackProps(t *testing.T, p rawmqtt.Packet) props {
	t.Helper()
	n, k := binary.Uvarint(p.Body[2:])
	return parseProps(t, p.Body[2+k:2+k+int(n)])
}

func text(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

// prop is one property.
func prop(id byte, value ...byte) []byte { return append([]byte{id}, value...) }

func seconds(id byte, n uint32) []byte { return binary.BigEndian.AppendUint32([]byte{id}, n) }
