// Package rawmqtt is an MQTT client for tests that says exactly what it is told
// to, wrong things included, and shows each packet that it gets.
package rawmqtt

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// Packet types.
const (
	CONNECT     = 1
	CONNACK     = 2
	PUBLISH     = 3
	PUBACK      = 4
	PUBREC      = 5
	PUBREL      = 6
	PUBCOMP     = 7
	SUBSCRIBE   = 8
	SUBACK      = 9
	UNSUBSCRIBE = 10
	UNSUBACK    = 11
	PINGREQ     = 12
	PINGRESP    = 13
	DISCONNECT  = 14
)

// Packet is one packet received. Topic, ID and Payload are set for PUBLISH, ID
// for acknowledgements.
type Packet struct {
	First   byte
	Body    []byte
	Topic   string
	ID      uint16
	Payload []byte
	Props   []byte // of a PUBLISH in MQTT 5
}

// Type returns the packet type.
func (p Packet) Type() int { return int(p.First >> 4) }

// QoS returns the QoS of a PUBLISH.
func (p Packet) QoS() byte { return p.First >> 1 & 3 }

// Dup reports the flag of a PUBLISH.
func (p Packet) Dup() bool { return p.First&8 != 0 }

// Retain reports the flag of a PUBLISH.
func (p Packet) Retain() bool { return p.First&1 != 0 }

// Code returns the code of a CONNACK, or the first of a SUBACK in MQTT 3.1.1.
func (p Packet) Code() byte {
	switch p.Type() {
	case CONNACK:
		return p.Body[1]
	case SUBACK, UNSUBACK:
		return p.Body[len(p.Body)-1]
	case PUBACK, PUBREC:
		if len(p.Body) > 2 {
			return p.Body[2]
		}
	case DISCONNECT:
		if len(p.Body) > 0 {
			return p.Body[0]
		}
	}
	return 0
}

// Client is one connection.
type Client struct {
	net.Conn
	R  *bufio.Reader
	V5 bool
	// Timeout bounds each Read; 20 s unless set.
	Timeout time.Duration
}

// New makes a client of an open connection.
func New(c net.Conn, v5 bool) *Client {
	return &Client{Conn: c, R: bufio.NewReaderSize(c, 64<<10), V5: v5, Timeout: 20 * time.Second}
}

// Dial opens a TCP connection.
func Dial(addr string, v5 bool) (*Client, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return New(c, v5), nil
}

// Read returns the next packet.
func (c *Client) ReadPacket() (Packet, error) {
	if c.Timeout > 0 {
		_ = c.SetReadDeadline(time.Now().Add(c.Timeout))
	}
	first, err := c.R.ReadByte()
	if err != nil {
		return Packet{}, err
	}
	n, err := binary.ReadUvarint(c.R)
	if err != nil {
		return Packet{}, err
	}
	p := Packet{First: first, Body: make([]byte, n)}
	if _, err := io.ReadFull(c.R, p.Body); err != nil {
		return Packet{}, err
	}
	b := p.Body
	switch p.Type() {
	case PUBLISH:
		t := int(binary.BigEndian.Uint16(b))
		p.Topic = string(b[2 : 2+t])
		b = b[2+t:]
		if p.QoS() > 0 {
			p.ID = binary.BigEndian.Uint16(b)
			b = b[2:]
		}
		if c.V5 {
			n, k := binary.Uvarint(b)
			p.Props = b[k : k+int(n)]
			b = b[k+int(n):]
		}
		p.Payload = b
	case PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK:
		p.ID = binary.BigEndian.Uint16(b)
	}
	return p, nil
}

// Expect reads packets until one has the type, and fails on others unless they
// are in skip.
func (c *Client) Expect(kind int, skip ...int) (Packet, error) {
next:
	for {
		p, err := c.ReadPacket()
		if err != nil {
			return p, fmt.Errorf("waiting for packet type %d: %w", kind, err)
		}
		if p.Type() == kind {
			return p, nil
		}
		for _, s := range skip {
			if p.Type() == s {
				continue next
			}
		}
		return p, fmt.Errorf("waiting for packet type %d: got %d (% x)", kind, p.Type(), p.Body)
	}
}

// Options of a CONNECT.
type Options struct {
	ID, User, Password string
	Keep               bool // no clean session
	KeepAlive          uint16
	Will, WillPayload  string
	WillRetain         bool
	WillQoS            byte
	WillProps          []byte // MQTT 5
	Props              []byte // MQTT 5
	NoKeepAlive        bool   // instead of 60 s
}

// Connect builds a CONNECT packet.
func Connect(v5 bool, o Options) []byte {
	b := appendString(nil, "MQTT")
	flags := byte(0)
	if !o.Keep {
		flags |= 2
	}
	if o.Will != "" {
		flags |= 4 | o.WillQoS<<3
		if o.WillRetain {
			flags |= 32
		}
	}
	if o.User != "" {
		flags |= 128
	}
	if o.Password != "" {
		flags |= 64
	}
	version := byte(4)
	if v5 {
		version = 5
	}
	ka := o.KeepAlive
	if ka == 0 && !o.NoKeepAlive {
		ka = 60
	}
	b = append(b, version, flags, byte(ka>>8), byte(ka))
	if v5 {
		b = append(binary.AppendUvarint(b, uint64(len(o.Props))), o.Props...)
	}
	b = appendString(b, o.ID)
	if o.Will != "" {
		if v5 {
			b = append(binary.AppendUvarint(b, uint64(len(o.WillProps))), o.WillProps...)
		}
		b = appendString(b, o.Will)
		b = appendString(b, o.WillPayload)
	}
	if o.User != "" {
		b = appendString(b, o.User)
	}
	if o.Password != "" {
		b = appendString(b, o.Password)
	}
	return Frame(CONNECT<<4, b)
}

// Publish builds a PUBLISH packet; flags are the lower half of the first byte.
func Publish(v5 bool, flags byte, topic string, id uint16, payload []byte, props ...byte) []byte {
	b := appendString(nil, topic)
	if flags>>1&3 > 0 {
		b = binary.BigEndian.AppendUint16(b, id)
	}
	if v5 {
		b = append(binary.AppendUvarint(b, uint64(len(props))), props...)
	}
	return Frame(PUBLISH<<4|flags, append(b, payload...))
}

// Subscribe builds a SUBSCRIBE packet.
func Subscribe(v5 bool, id uint16, qos byte, filters ...string) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	if v5 {
		b = append(b, 0)
	}
	for _, f := range filters {
		b = append(appendString(b, f), qos)
	}
	return Frame(SUBSCRIBE<<4|2, b)
}

// Filter is one filter of a SUBSCRIBE with its options byte: QoS, and in MQTT 5
// no local (4), retain as published (8) and retain handling (16, 32).
type Filter struct {
	Filter  string
	Options byte
}

// SubscribeWith builds a SUBSCRIBE packet with MQTT 5 properties.
func SubscribeWith(id uint16, props []byte, filters ...Filter) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(binary.AppendUvarint(b, uint64(len(props))), props...)
	for _, f := range filters {
		b = append(appendString(b, f.Filter), f.Options)
	}
	return Frame(SUBSCRIBE<<4|2, b)
}

// Unsubscribe builds an UNSUBSCRIBE packet.
func Unsubscribe(v5 bool, id uint16, filters ...string) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	if v5 {
		b = append(b, 0)
	}
	for _, f := range filters {
		b = appendString(b, f)
	}
	return Frame(UNSUBSCRIBE<<4|2, b)
}

// Ack builds an acknowledgement of any kind.
func Ack(kind int, id uint16) []byte {
	first := byte(kind << 4)
	if kind == PUBREL {
		first |= 2
	}
	return Frame(first, binary.BigEndian.AppendUint16(nil, id))
}

// Frame puts a fixed header in front of a body.
func Frame(first byte, body []byte) []byte {
	return append(binary.AppendUvarint([]byte{first}, uint64(len(body))), body...)
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

// Login connects and returns the CONNACK.
func (c *Client) Login(o Options) (Packet, error) {
	if _, err := c.Write(Connect(c.V5, o)); err != nil {
		return Packet{}, err
	}
	return c.Expect(CONNACK)
}

// Sub subscribes and returns the SUBACK, skipping publishes.
func (c *Client) Sub(id uint16, qos byte, filters ...string) (Packet, error) {
	if _, err := c.Write(Subscribe(c.V5, id, qos, filters...)); err != nil {
		return Packet{}, err
	}
	return c.Expect(SUBACK, PUBLISH)
}
