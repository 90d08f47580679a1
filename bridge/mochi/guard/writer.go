package guard

import "encoding/binary"

// Writer writes MQTT packets straight into a connection's output buffer, past
// mochi. It holds the connection's output lock from Begin to End, so that a
// run of packets costs one lock and mostly one system call. It must be used by
// one goroutine and ended quickly.
type Writer struct {
	c *Conn
	n int
}

// Publish is the header of a PUBLISH packet (MQTT 3.3).
type Publish struct {
	Topic    string // not empty, at most 65,535 bytes
	PacketID uint16 // with QoS 1 only
	QoS      byte   // 0 or 1
	Dup      bool
	Retain   bool
	V5       bool // MQTT 5: an empty property list is written
}

// Size returns the length of the packet with a payload of n bytes.
func (p *Publish) Size(n int) int {
	r := p.remaining(n)
	return 1 + lengthSize(r) + r
}

func (p *Publish) remaining(n int) int {
	n += 2 + len(p.Topic)
	if p.QoS > 0 {
		n += 2
	}
	if p.V5 {
		n++
	}
	return n
}

func lengthSize(n int) int {
	switch {
	case n < 1<<7:
		return 1
	case n < 1<<14:
		return 2
	case n < 1<<21:
		return 3
	}
	return 4
}

func appendLength(b []byte, n int) []byte {
	for n >= 0x80 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}

// Begin starts writing packets. End must follow.
func (c *Conn) Begin() Writer {
	c.mu.Lock()
	return Writer{c: c}
}

// Buffered returns how many bytes wait to be written, and how many may: less
// than usual while Limits.Output is reached.
func (w *Writer) Buffered() (n, limit int) {
	return w.c.pending + w.n - w.c.grace, w.c.cfg.Limits.buffer(w.c.limit)
}

// NotifyDrained has the function given to Conn.OnDrained called once, when no
// more than n bytes of output wait. It reports false, and nothing is called,
// when that is so already or the connection is closed.
func (w *Writer) NotifyDrained(n int) bool {
	if w.c.pending+w.n <= n || w.c.closing || w.c.drained == nil {
		return false
	}
	w.c.hungry, w.c.low = true, max(0, n)
	return true
}

// Publish writes a PUBLISH packet whose payload is parts one after the other,
// copied. It fails as Conn.Write does.
func (w *Writer) Publish(p *Publish, parts ...[]byte) error {
	n := 0
	for _, part := range parts {
		n += len(part)
	}
	b, err := w.header(p, n)
	if err != nil {
		return err
	}
	for _, part := range parts {
		b.copy(part)
	}
	return nil
}

// PublishShared is Publish for a payload that nobody changes any more: a long
// one is kept by reference until it is written.
func (w *Writer) PublishShared(p *Publish, payload []byte) error {
	b, err := w.header(p, len(payload))
	if err != nil {
		return err
	}
	if len(payload) >= refSize {
		b.refer(payload)
	} else {
		b.copy(payload)
	}
	return nil
}

func (w *Writer) header(p *Publish, n int) (*batch, error) {
	size := p.Size(n)
	b, err := w.room(size)
	if err != nil {
		return nil, err
	}
	var buf [5 + 2]byte
	first := byte(typePublish<<4) | p.QoS<<1
	if p.Dup {
		first |= 1 << 3
	}
	if p.Retain {
		first |= 1
	}
	h := appendLength(append(buf[:0], first), p.remaining(n))
	b.copy(binary.BigEndian.AppendUint16(h, uint16(len(p.Topic))))
	b.copyString(p.Topic)
	h = buf[:0]
	if p.QoS > 0 {
		h = binary.BigEndian.AppendUint16(h, p.PacketID)
	}
	if p.V5 {
		h = append(h, 0)
	}
	b.copy(h)
	return b, nil
}

// Puback writes a PUBACK without reason code, which means success in both
// versions (MQTT 5, 3.4.2.1).
func (w *Writer) Puback(id uint16) error {
	b, err := w.room(4)
	if err != nil {
		return err
	}
	ack := [4]byte{typePuback << 4, 2, byte(id >> 8), byte(id)}
	b.copy(ack[:])
	return nil
}

// Raw writes an encoded packet.
func (w *Writer) Raw(packet []byte) error {
	b, err := w.room(len(packet))
	if err != nil {
		return err
	}
	b.copy(packet)
	return nil
}

// room checks the limit with what was written since Begin.
func (w *Writer) room(n int) (*batch, error) {
	b, err := w.c.room(w.n + n)
	if err != nil {
		w.n = 0 // dropped with the rest
		return nil, err
	}
	w.n += n
	return b, nil
}

// End hands what was written to the network.
func (w *Writer) End() {
	if w.n > 0 {
		w.c.kick(w.n)
	}
	w.c.mu.Unlock()
}
