package guard

// Packet types of MQTT (3.1.1 and 5, 2.1.2), in the upper half of the first
// byte.
const (
	typeConnect = 1
	typePublish = 3
	typePuback  = 4

	typeDisconnect     = 14
	codePacketTooLarge = 0x95 // MQTT 5, 2.4
)

// framer follows the packet boundaries of a byte stream without keeping any of
// it (MQTT 2.1: type and flags, then the remaining length in one to four bytes).
type framer struct {
	left   int  // bytes left of the current packet's body
	length int  // remaining length decoded so far
	shift  uint // bits of it
	header bool // inside a fixed header
	first  bool // the first packet is complete
	kind   byte // type of the current packet
	read   int  // bytes of the CONNECT's body seen so far
	name   byte // length of its protocol name
	level  byte // its protocol level: 5 in MQTT 5
}

// boundary reports whether the stream is between two packets.
func (f *framer) boundary() bool { return f.left == 0 && !f.header }

// scan follows p. The first packet must be a CONNECT within its limit, and the others
// must be within that of all packets; whole bytes of p lie before one that is not, or
// that is long and has not come whole.
func (f *framer) scan(p []byte, c *Conn) (whole int, err error) {
	for all := len(p); len(p) > 0; {
		if f.boundary() {
			whole = all - len(p)
		}
		if f.left > 0 {
			n := min(f.left, len(p))
			if !f.first {
				f.connect(p[:n])
			}
			f.left -= n
			p = p[n:]
			if f.left == 0 {
				f.end(c)
				c.underway(0)
			}
			continue
		}
		b := p[0]
		p = p[1:]
		if !f.header {
			f.header, f.length, f.shift, f.kind = true, 0, 0, b>>4
			if !f.first && b != typeConnect<<4 {
				c.cfg.Counters.add(ConnectMalformed)
				return 0, ErrNotConnect
			}
			continue
		}
		f.length |= int(b&0x7f) << f.shift
		f.shift += 7
		if b&0x80 != 0 {
			if f.shift > 21 {
				return 0, errLength
			}
			continue
		}
		f.header = false
		f.left = f.length
		if !f.first && f.length > c.cfg.ConnectSize {
			c.cfg.Counters.add(ConnectTooLarge)
			return 0, ErrConnectTooLarge
		}
		if f.first && c.exceeds(f.length) {
			return whole, ErrPacketTooLarge
		}
		if f.left == 0 {
			f.end(c)
		} else if f.left > len(p) {
			c.underway(f.length)
		}
	}
	return whole, nil
}

// end notes the end of a packet. Who has sent the first is silent no longer.
func (f *framer) end(c *Conn) {
	if !f.first {
		f.first = true
		c.ticket.Stay()
	}
}

// exceeds reports whether a packet with a body of n bytes is longer than the server
// takes; as mochi does, it counts one byte for the header.
func (c *Conn) exceeds(n int) bool { return c.cfg.PacketLimit > 0 && n >= c.cfg.PacketLimit }

// connect notes the protocol level of the CONNECT (MQTT 3.1.2.2).
func (f *framer) connect(p []byte) {
	for _, b := range p {
		switch f.read {
		case 1:
			f.name = b
		case 2 + int(f.name):
			f.level = b
			f.read = 1 << 20
			return
		}
		f.read++
	}
}
