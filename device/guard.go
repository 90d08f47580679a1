package device

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Types of MQTT control packets that a broker may send to a 3.1.1 client that
// subscribes with QoS 1 at most.
const (
	packetConnack  = 2
	packetPublish  = 3
	packetPuback   = 4
	packetSuback   = 9
	packetUnsuback = 11
	packetPingresp = 13

	packetDisconnect = 14 // MQTT 3.1.1 has it for clients only; some brokers send it
)

// writeMark is how much unwritten output lets a sender wait. What goes past it
// are acknowledgements and pings, which never wait.
const writeMark = 256 << 10

var errGoodbye = errors.New("device: the hub ended the connection")

var errWriteStalled = errors.New("device: the hub stopped reading and the connection's buffer is full")

// guard is the connection handed to the MQTT client. It does three things.
//
// It buffers both ways: reads through a buffer, writes through a flusher, so
// that packets share system calls and no writer waits for the network.
//
// It checks what comes in before the client's parser sees it: the type, flags
// and length of every packet. A hub is not trusted, and that parser allocates
// whatever length a packet claims and panics on some malformed ones.
//
// It sees the acknowledgements: a token of the client is not a receipt.
type guard struct {
	conn      net.Conn
	r         *bufio.Reader
	maxPacket int           // largest packet taken, its header included
	opening   time.Duration // how long the hub may take for CONNACK
	idle      time.Duration // longest silence of the hub
	writeWait time.Duration // longest time for one write

	onPuback  func(id uint16) // called on the reading goroutine
	onPublish func()          // the same
	// beforeErr is called once before a read error is handed to the client.
	beforeErr func(error)

	// Owned by the reading goroutine.
	left     int  // bytes of the current packet still to be handed out
	opened   bool // CONNACK was seen
	readErr  error
	deadline time.Duration

	mu       sync.Mutex
	buf      []byte // output not yet taken by the flusher
	spare    []byte // the flusher's other buffer
	closed   bool
	lastByte bool // no more output will come: close once it is written
	writeErr error
	room     chan struct{} // closed when output falls below the mark
	wake     chan struct{}
	done     chan struct{} // closed when the flusher has ended
}

func newGuard(conn net.Conn, maxPacket int, opening, idle, writeWait time.Duration, beforeErr func(error)) *guard {
	g := &guard{
		conn: conn, maxPacket: maxPacket, opening: opening, idle: idle, writeWait: writeWait,
		onPuback: func(uint16) {}, onPublish: func() {}, beforeErr: beforeErr, deadline: opening,
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	g.r = bufio.NewReaderSize(deadlineReader{g}, 16<<10)
	go g.flush()
	return g
}

// deadlineReader renews the read deadline before each read from the network.
type deadlineReader struct{ g *guard }

func (d deadlineReader) Read(p []byte) (int, error) {
	if err := d.g.conn.SetReadDeadline(time.Now().Add(d.g.deadline)); err != nil {
		return 0, err
	}
	return d.g.conn.Read(p)
}

// Read hands out whole, checked packets, in pieces as the caller asks.
func (g *guard) Read(p []byte) (int, error) {
	if g.readErr != nil {
		return 0, g.readErr
	}
	n, err := g.read(p)
	if err != nil {
		// The client must not see "use of closed network connection": it takes that
		// for its own doing and reports nothing.
		g.readErr = errLinkDown
		g.beforeErr(err)
		_ = g.conn.Close()
		return n, g.readErr
	}
	return n, nil
}

func (g *guard) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if g.left == 0 {
		n, err := g.next()
		if err != nil {
			return 0, err
		}
		g.left = n
	}
	n, err := g.r.Read(p[:min(len(p), g.left)])
	g.left -= n
	return n, err
}

// next looks at the packet that starts here and returns its length.
func (g *guard) next() (int, error) {
	if !g.opened {
		if err := g.checkStranger(); err != nil {
			return 0, err
		}
	}
	head, err := g.peek(2)
	if err != nil {
		return 0, err
	}
	kind, flags := head[0]>>4, head[0]&0x0f
	length, size := 0, 0
	for shift := 0; ; shift += 7 {
		if size == 4 {
			return 0, errors.New("device: the hub sent a packet whose length has five bytes")
		}
		if head, err = g.peek(2 + size); err != nil {
			return 0, err
		}
		b := head[1+size]
		size++
		length |= int(b&0x7f) << shift
		if b < 0x80 {
			break
		}
	}
	total := 1 + size + length
	if err := g.check(kind, flags, length, total); err != nil {
		return 0, err
	}
	if kind == packetPublish {
		if err := g.checkPublish(1+size, length, flags>>1&3 > 0); err != nil {
			return 0, err
		}
		g.onPublish()
	}
	if kind == packetConnack || kind == packetPuback || kind == packetSuback {
		if head, err = g.peek(total); err != nil {
			return 0, err
		}
		body := head[1+size:]
		switch {
		case kind == packetPuback:
			g.onPuback(binary.BigEndian.Uint16(body))
		case kind == packetConnack && body[1] > 5:
			return 0, fmt.Errorf("device: the hub answered CONNECT with the unknown code %d", body[1])
		case kind == packetConnack:
			g.opened, g.deadline = true, g.idle
		}
	}
	return total, nil
}

// checkStranger refuses an answer to CONNECT that does not begin as CONNACK does.
func (g *guard) checkStranger() error {
	b, err := g.peek(1)
	if err == nil && b[0] != packetConnack<<4 {
		b, _ = g.r.Peek(min(g.r.Buffered(), strangerLen))
		err = &strangerError{string(b)}
	}
	return err
}

// peek is bufio's, with an end of file inside a packet named as such.
func (g *guard) peek(n int) ([]byte, error) {
	b, err := g.r.Peek(n)
	if errors.Is(err, io.EOF) && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// check refuses what a broker has no reason to send.
func (g *guard) check(kind, flags byte, length, total int) error {
	if g.opened && kind == packetDisconnect {
		return errGoodbye
	}
	if g.opened == (kind == packetConnack) {
		return fmt.Errorf("device: the hub sent an MQTT packet of type %d out of turn", kind)
	}
	want := -1
	switch kind {
	case packetConnack, packetPuback, packetUnsuback:
		want = 2
	case packetSuback: // we subscribe to one topic at a time
		want = 3
	case packetPingresp:
		want = 0
	case packetPublish:
		if qos := flags >> 1 & 3; qos > 1 {
			return fmt.Errorf("device: the hub sent a publish of QoS %d", qos)
		}
		if total > g.maxPacket {
			return fmt.Errorf("device: the hub sent a packet of %d bytes; at most %d are taken (Config.Limits)", total, g.maxPacket)
		}
		return nil
	}
	if length != want || flags != 0 {
		return fmt.Errorf("device: the hub sent a malformed MQTT packet of type %d", kind)
	}
	return nil
}

// checkPublish makes sure that a publish has room for its topic and packet id.
func (g *guard) checkPublish(head, length int, hasID bool) error {
	need := 2
	if length >= need {
		b, err := g.peek(head + need)
		if err != nil {
			return err
		}
		need += int(binary.BigEndian.Uint16(b[head:]))
	}
	if hasID {
		need += 2
	}
	if length < need {
		return errors.New("device: the hub sent a malformed publish")
	}
	return nil
}

// Write takes one or more whole packets. It never waits: what the hub does not
// read is bounded by ending the connection.
func (g *guard) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.writeErr != nil || g.closed:
		// The reader reports how the connection ended.
		return len(p), nil
	case len(g.buf)+len(p) > g.maxPacket+2*writeMark:
		g.writeErr = errWriteStalled
		_ = g.conn.Close()
		return len(p), nil
	}
	g.buf = append(g.buf, p...)
	g.signal()
	return len(p), nil
}

func (g *guard) signal() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// waitRoom returns once there is room for another large packet, or stop is
// closed.
func (g *guard) waitRoom(stop <-chan struct{}) {
	for {
		g.mu.Lock()
		if len(g.buf) < writeMark || g.closed || g.writeErr != nil {
			g.mu.Unlock()
			return
		}
		if g.room == nil {
			g.room = make(chan struct{})
		}
		room := g.room
		g.mu.Unlock()
		select {
		case <-room:
		case <-stop:
			return
		}
	}
}

// flush writes what has gathered, again and again, until the end.
func (g *guard) flush() {
	defer close(g.done)
	for {
		g.mu.Lock()
		out := g.buf
		if len(out) == 0 {
			if g.closed || g.lastByte || g.writeErr != nil {
				g.freeRoom()
				g.mu.Unlock()
				_ = g.conn.Close()
				return
			}
			g.mu.Unlock()
			<-g.wake
			continue
		}
		g.buf, g.spare = g.spare[:0], nil
		g.mu.Unlock()

		err := g.conn.SetWriteDeadline(time.Now().Add(g.writeWait))
		if err == nil {
			_, err = g.conn.Write(out)
		}

		g.mu.Lock()
		if cap(out) <= 2*writeMark {
			g.spare = out
		}
		if err != nil {
			if g.writeErr == nil {
				g.writeErr = err
			}
			g.buf = nil
		}
		if len(g.buf) < writeMark {
			g.freeRoom()
		}
		g.mu.Unlock()
	}
}

// freeRoom lets waiting senders on; mu is held.
func (g *guard) freeRoom() {
	if g.room != nil {
		close(g.room)
		g.room = nil
	}
}

// Close ends the connection once what was written before is out, which takes
// at most the time of one write.
func (g *guard) Close() error {
	g.mu.Lock()
	g.lastByte = true
	g.signal()
	g.mu.Unlock()
	return nil
}

// abort ends the connection at once.
func (g *guard) abort() {
	g.mu.Lock()
	g.closed, g.buf = true, nil
	g.freeRoom()
	g.signal()
	g.mu.Unlock()
	_ = g.conn.Close()
}

// cause is what ended the output, if anything did.
func (g *guard) cause() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.writeErr
}

// The deadlines are the guard's own business.

func (g *guard) SetDeadline(time.Time) error      { return nil }
func (g *guard) SetReadDeadline(time.Time) error  { return nil }
func (g *guard) SetWriteDeadline(time.Time) error { return nil }
func (g *guard) LocalAddr() net.Addr              { return g.conn.LocalAddr() }
func (g *guard) RemoteAddr() net.Addr             { return g.conn.RemoteAddr() }

var _ net.Conn = (*guard)(nil)
