package guard

import (
	"errors"
	"math/bits"
	"net"
	"sync"
)

// Tap sees a client's PUBLISH and PUBACK packets before the server does. first
// is the packet's first byte (type and flags), body what follows the remaining
// length; it is valid during the call only. A packet that is taken is never
// seen by mochi, its other hooks and its counters; an error ends the
// connection. Tap is called on the connection's reader goroutine and must not
// block.
type Tap func(first byte, body []byte) (taken bool, err error)

// LongTap sees the head of a client's PUBLISH that is longer than Config.PacketLimit:
// its first byte, the length of its body, and how that begins, 512 bytes at most,
// valid during the call only. Where it returns a function the rest is read past
// without being kept, and the function is called at its end, to say whether the
// connection stays. Otherwise it is closed.
type LongTap func(first byte, length int, head []byte) (passed func() (stay bool))

const longHead = 512

// errLength means that a packet's remaining length has more than four bytes.
var errLength = errors.New("guard: malformed remaining length")

const tapBuffer = 64 << 10

var tapBuffers = sync.Pool{New: func() any { b := make([]byte, tapBuffer); return &b }}

// tap is the reading side of a tapped connection.
type tap struct {
	f     Tap
	flush func()
	long  LongTap

	in    []byte  // bytes read and not handed on
	pool  *[]byte // the pooled memory that in lies in, if any
	grown int     // the size of its own memory, if it does not
	pass  int     // bytes of the current packet that mochi has yet to get
	eager bool    // the last read filled its buffer, so read into a large one

	past   int         // bytes of a long packet that are still to be read past
	length int         // of its body
	passed func() bool // called then
}

// SetTap routes PUBLISH and PUBACK packets through f, and those that are too long
// for the server past long, from the next packet on. flush is called once what f was
// given is about to go, before the connection is read from again; it may find nothing.
// It must be called on the connection's reader goroutine, in a hook; it reports
// false when the connection cannot be tapped: it was made by Wrap, or mochi's
// limit is unknown.
func (c *Conn) SetTap(f Tap, flush func(), long LongTap) bool {
	if !c.listened() || c.cfg.PacketLimit <= 0 || c.tap != nil {
		return false
	}
	c.tap = &tap{f: f, flush: flush, long: long, pass: -1}
	return true
}

// read hands mochi only what the tap leaves. mochi's buffered reader calls Read
// when it has used up what it was given, and is given whole packets or the rest
// of one, so whatever was handed on before has been processed by then.
func (t *tap) read(c *Conn, p []byte) (int, error) {
	if t.pass < 0 {
		// Handed to mochi before the tap: the rest of a packet under way.
		if c.kept != nil {
			return c.follow(p)
		}
		if !c.frames.boundary() {
			return c.follow(p[:min(len(p), max(1, c.frames.left))])
		}
		t.pass = 0
	}
	for {
		if t.past > 0 {
			if err := t.readPast(c); err != nil {
				t.drop()
				return 0, err
			}
			continue
		}
		if t.pass > 0 {
			if len(t.in) == 0 {
				n, err := c.readRaw(p[:min(len(p), t.pass)])
				t.pass -= n
				return n, err
			}
			n := copy(p, t.in[:min(len(t.in), t.pass)])
			t.pass -= n
			t.skip(n)
			return n, nil
		}
		total, err := t.step(c)
		if err != nil {
			t.drop()
			return 0, err
		}
		if total > 0 {
			t.pass = total
			continue
		}
		if t.past > 0 {
			continue
		}
		if err := t.fill(c, p); err != nil {
			t.drop()
			return 0, err
		}
	}
}

// step handles the packets at the front of t.in: it returns the length of one
// that is mochi's, or 0 when more bytes are needed.
func (t *tap) step(c *Conn) (int, error) {
	total, err := t.take(c)
	t.flush()
	return total, err
}

// take is step up to the flush.
func (t *tap) take(c *Conn) (int, error) {
	extended := false // all that is in t.in has arrived by now
	for len(t.in) >= 2 {
		length, head, err := remaining(t.in)
		if err != nil {
			return 0, err
		}
		if head == 0 {
			return 0, nil
		}
		total := head + length
		if c.exceeds(length) {
			return 0, t.oversized(c, head, length)
		}
		all := len(t.in) >= total
		if all {
			c.underway(0)
		} else {
			c.underway(total)
		}
		kind := t.in[0] >> 4
		if kind != typePublish && kind != typePuback && (all || total <= smallPacket) {
			return total, nil // see follow
		}
		if !all {
			return 0, nil
		}
		if c.closed.Load() {
			return 0, c.closeCause()
		}
		taken, err := t.f(t.in[0], t.in[head:total:total])
		if err != nil {
			return 0, err
		}
		if !taken {
			return total, nil
		}
		if !extended {
			c.extend()
			extended = true
		}
		if len(t.in) == total {
			t.flush() // before skip gives the memory back
		}
		t.skip(total)
	}
	return 0, nil
}

// oversized handles the long packet at the front of t.in, once enough of it is there.
func (t *tap) oversized(c *Conn, head, length int) error {
	c.underway(0)
	if t.in[0]>>4 != typePublish {
		return c.refuse(length)
	}
	seen := min(longHead, length)
	if len(t.in) < head+seen {
		return nil
	}
	if t.passed = t.long(t.in[0], length, t.in[head:head+seen]); t.passed == nil {
		return c.refuse(length)
	}
	t.past, t.length = head+length, length
	return nil
}

// readPast reads on in a long packet.
func (t *tap) readPast(c *Conn) error {
	n := min(len(t.in), t.past)
	if n > 0 {
		t.skip(n)
	} else {
		if t.pool == nil {
			t.pool = tapBuffers.Get().(*[]byte)
		}
		t.in = (*t.pool)[:0]
		var err error
		if n, err = c.readRaw((*t.pool)[:min(len(*t.pool), t.past)]); err != nil {
			return err
		}
	}
	if t.past -= n; t.past == 0 {
		c.extend()
		stays := t.passed()
		t.flush()
		if !stays {
			return c.refuse(t.length)
		}
	}
	return nil
}

// remaining decodes the fixed header at the front of b: the remaining length and
// the bytes the header takes, which are 0 when b ends within it.
func remaining(b []byte) (length, head int, err error) {
	for i := 1; i < len(b); i++ {
		length |= int(b[i]&0x7f) << (7 * (i - 1))
		if b[i]&0x80 == 0 {
			return length, i + 1, nil
		}
		if i == 4 {
			return 0, 0, errLength
		}
	}
	return 0, 0, nil
}

// skip drops n bytes from the front, and the memory with the last of them.
func (t *tap) skip(n int) {
	t.in = t.in[n:]
	if len(t.in) == 0 && !t.eager {
		t.drop()
	}
}

// drop gives the buffer back.
func (t *tap) drop() {
	if t.pool != nil {
		tapBuffers.Put(t.pool)
	}
	t.in, t.pool = nil, nil
}

// fill reads more. An idle connection waits in the memory of its caller, a
// busy one in a pooled buffer.
func (t *tap) fill(c *Conn, p []byte) error {
	if len(t.in) == 0 && t.pool == nil && !t.eager {
		n, err := c.readRaw(p)
		if err != nil {
			return err
		}
		t.eager = n == len(p)
		t.in = p[:n]
		total, err := t.step(c)
		if err != nil {
			return err
		}
		rest := t.in
		t.in = nil
		if len(rest) > 0 {
			t.pool = tapBuffers.Get().(*[]byte)
			t.in = append((*t.pool)[:0], rest...)
		}
		t.pass = total
		return nil
	}
	if t.pool == nil && len(t.in) == 0 {
		t.pool = tapBuffers.Get().(*[]byte)
		t.in = (*t.pool)[:0]
	}
	t.reserve(c.announced)
	if c.announced > 0 {
		if err := c.charge(min(t.size(), c.announced)); err != nil {
			return err
		}
	}
	free := t.in[len(t.in):cap(t.in)]
	n, err := c.readRaw(free)
	if err != nil {
		return err
	}
	t.eager = n == len(free) || n >= 2048
	t.in = t.in[:len(t.in)+n]
	return nil
}

// size is how much memory is held for t.in. Of pooled memory, which a connection has
// for short packets too, the part that is in use, in steps of twice the size.
func (t *tap) size() int {
	if t.pool != nil {
		return 1 << bits.Len(uint(len(t.in)))
	}
	return t.grown
}

// reserve makes room behind t.in: for the rest of the packet at its front, of the
// length total if it is long, in steps of twice the size so that memory follows what has
// arrived.
func (t *tap) reserve(total int) {
	if t.pool != nil && cap(t.in) < 4096 {
		// Near the end of the pooled buffer: move to its front.
		buf := (*t.pool)[:0]
		if len(t.in) < len(*t.pool)/2 {
			t.in = append(buf, t.in...)
			return
		}
	}
	if len(t.in) < cap(t.in) {
		return
	}
	if t.pool != nil && len(t.in) < len(*t.pool) {
		t.in = append((*t.pool)[:0], t.in...)
		return
	}
	size := 2 * max(len(t.in), tapBuffer/2)
	if total > len(t.in) {
		size = min(size, total)
	}
	grown := make([]byte, len(t.in), size)
	copy(grown, t.in)
	t.grown = size
	if t.pool != nil {
		tapBuffers.Put(t.pool)
		t.pool = nil
	}
	t.in = grown
}

// closeCause is the error for a reader that finds the connection closed.
func (c *Conn) closeCause() error {
	if err := c.Cause(); err != nil {
		return err
	}
	return net.ErrClosed
}
