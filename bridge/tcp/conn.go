package tcp

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/underway"
	"github.com/sealmq/sealmq/route"
)

// conn is one connection: a bridge.Conn and bridge.Acker. Its reader runs in
// run; its writer is alive only while there is output.
type conn struct {
	s      *Server
	nc     net.Conn
	ticket *connlimit.Ticket
	link   *bridge.Link // set before anything can be delivered
	ready  chan struct{}

	mu      sync.Mutex // guards what follows
	out     []byte     // to be written
	spare   []byte     // the buffer that was written last
	inWrite int        // bytes being written
	last    uint64     // the newest sequence in out
	writing bool
	full    bool // Deliver took less than it was offered
	ending  bool // takes no more output; closes once what is there has been written
	closed  bool
	why     Event
	cause   bool // why is set
	wrote   sync.WaitGroup

	// unanswered counts frames that the bridge has not acknowledged.
	ackMu      sync.Mutex
	ackCond    sync.Cond
	unanswered int
	dead       bool
}

// RemoteAddr implements bridge.AddressConn.
func (c *conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

var _ bridge.AddressConn = (*conn)(nil)

func newConn(s *Server, nc net.Conn, ticket *connlimit.Ticket) *conn {
	c := &conn{s: s, nc: nc, ticket: ticket, ready: make(chan struct{})}
	c.ackCond.L = &c.ackMu
	return c
}

// run is the connection's life.
func (c *conn) run() {
	defer c.s.wg.Done()
	defer c.s.forget(c)
	defer c.ticket.Release()
	who := bridge.Principal{Role: bridge.RoleDevice}
	if c.s.cfg.Closed {
		who.Role = bridge.RoleGuest
	}
	link, err := c.s.cfg.Bridge.ConnectStream(who, c)
	if err != nil {
		c.end(RefusedBridge)
		c.count()
		return
	}
	c.link = link
	close(c.ready)
	c.write([]byte{route.Preamble}, 0)
	if why := c.read(); why == PreambleWrong {
		c.finish(why) // the peer is to see what it has reached
	} else {
		c.end(why)
	}
	link.Close(true)
	c.wrote.Wait()
	c.mu.Lock()
	c.s.output.Add(int64(-len(c.out)))
	c.out = nil
	c.mu.Unlock()
	c.count()
}

// count counts why the connection ended.
func (c *conn) count() {
	c.mu.Lock()
	why := c.why
	c.mu.Unlock()
	c.s.cfg.Counters.add(why)
	if why != EndedByPeer {
		c.s.cfg.Logger.Debug("connection ended", "peer", c.nc.RemoteAddr(), "reason", why.String())
	}
}

// read takes frames until the connection ends, and returns why it did.
func (c *conn) read() Event {
	cfg := &c.s.cfg
	src := &source{input: &c.s.input, nc: c.nc, cfg: cfg, deadline: time.Now().Add(cfg.PreambleTimeout)}
	src.holder.Network, src.holder.End = connlimit.Network(c.nc.RemoteAddr()), func() { c.end(InputFull) }
	src.frames = route.NewReader(src, cfg.Frames)
	defer func() { c.s.input.Hold(&src.holder, 0, cfg.TotalInput) }()
	if err := src.frames.ReadPreamble(); err != nil {
		return readEvent(err, PreambleTimeout)
	}
	src.next(cfg.FirstFrame)
	late := FirstFrame
	for {
		body, err := src.frames.Next()
		switch {
		case errors.Is(err, route.ErrTooLarge):
			cfg.Counters.add(Oversized)
			src.next(src.idle)
			n := src.frames.Discarding()
			if !c.awaitRoom(n) {
				return Kicked
			}
			c.link.Oversized(n, c, 0)
			continue
		case err != nil:
			if src.partial {
				late = FrameTimeout
			}
			return readEvent(err, late)
		}
		if late == FirstFrame {
			late = Idle
			c.ticket.Settle()
		}
		src.next(cfg.IdleTimeout)
		if !c.awaitRoom(len(body)) {
			return Kicked
		}
		if err := c.link.Receive(body, route.Stored, c, 0); err != nil {
			if errors.Is(err, bridge.ErrMalformed) {
				return Malformed
			}
			return Kicked
		}
	}
}

// readEvent says why reading ended; late is what a deadline means.
func readEvent(err error, late Event) Event {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return late
	case errors.Is(err, errInputFull):
		return InputFull
	case errors.Is(err, route.ErrPreamble):
		return PreambleWrong
	case errors.Is(err, route.ErrFraming):
		return Framing
	case errors.Is(err, io.ErrUnexpectedEOF):
		return CutShort
	case errors.Is(err, io.EOF):
		return EndedByPeer
	}
	return NetworkError
}

// source is the network as the frame reader sees it: it gives a frame that has
// begun a deadline that allows for its length, and one between frames the idle
// time-out.
type source struct {
	input  *underway.Room // the server's
	nc     net.Conn
	cfg    *Config
	frames *route.Reader // that reads from here

	idle     time.Duration // longest silence between frames; 0: any
	partial  bool          // a frame has begun, and deadline is its own
	deadline time.Time     // of what is being waited for; zero: none
	armed    time.Time     // the deadline of nc

	held   int // bytes charged to Config.TotalInput
	holder underway.Holder
}

// smallFrame is the longest frame that is not counted while it arrives.
const smallFrame = 16 << 10

// errInputFull ends a connection that would hold more of a long frame than there is
// room for.
var errInputFull = errors.New("tcp: too many long frames under way")

// hold charges what the frame reader holds, in steps of a small frame.
func (s *source) hold() error {
	n := s.frames.Held()
	if n <= smallFrame {
		n = 0
	}
	n = (n + smallFrame - 1) &^ (smallFrame - 1)
	if n == s.held {
		return nil
	}
	s.held = n
	if !s.input.Hold(&s.holder, int64(n), s.cfg.TotalInput) {
		return errInputFull
	}
	return nil
}

// next says that the preamble, or a frame's last byte, or an oversized frame's
// head has been read.
func (s *source) next(idle time.Duration) {
	s.idle, s.partial, s.deadline = idle, false, time.Time{}
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.hold(); err != nil {
		return 0, err
	}
	switch partial := s.frames.Partial(); {
	case partial && !s.partial:
		// Some of the frame came together with the one before.
		s.deadline = time.Now().Add(s.cfg.FrameTimeout)
		s.partial = true
	case !partial && s.partial: // what is left of an oversized frame has passed
		s.next(s.idle)
	}
	if s.deadline.IsZero() && s.idle > 0 {
		s.deadline = time.Now().Add(s.idle)
	}
	if !s.deadline.Equal(s.armed) {
		if err := s.nc.SetReadDeadline(s.deadline); err != nil {
			return 0, err
		}
		s.armed = s.deadline
	}
	n, err := s.nc.Read(p)
	if s.partial {
		s.deadline = s.deadline.Add(time.Duration(n) * time.Second / slowest)
	}
	return n, err
}

// awaitRoom waits while as many frames, or bytes, as allowed are unanswered: that
// is how a sender who fills a queue is held back. The bridge answers each within
// a second or so. It returns false when the connection has ended; else one more
// frame, of n bytes, is counted.
func (c *conn) awaitRoom(n int) bool {
	c.ackMu.Lock()
	defer c.ackMu.Unlock()
	for !c.dead && c.unanswered > 0 && (c.unanswered >= c.s.cfg.ReadWindow || !c.link.Admits(n)) {
		c.ackCond.Wait()
	}
	c.unanswered++
	return !c.dead
}

// Acked implements bridge.Acker.
func (c *conn) Acked(uint64) {
	c.ackMu.Lock()
	c.unanswered--
	c.ackMu.Unlock()
	c.ackCond.Signal()
}

// Deliver implements bridge.Conn.
func (c *conn) Deliver(entries []bridge.Entry) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for i := range entries {
		e := &entries[i]
		if !c.room(len(e.Frame)) {
			break
		}
		c.append(e.Frame, e.Seq)
		n++
	}
	c.full = n < len(entries)
	return n
}

// Direct implements bridge.Conn.
func (c *conn) Direct(frame []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.room(len(frame)) {
		return false
	}
	c.append(frame, 0)
	return true
}

// Kick implements bridge.Conn.
func (c *conn) Kick(reason bridge.KickReason) {
	if reason == bridge.KickClosing {
		c.finish(Kicked)
		return
	}
	c.end(Kicked)
}

// room reports whether the output takes a frame of n bytes; c.mu is held.
func (c *conn) room(n int) bool {
	if c.ending || c.closed {
		return false
	}
	have, most := len(c.out)+c.inWrite, c.s.cfg.OutputBytes
	if c.s.output.Load() >= c.s.cfg.TotalOutput {
		most = min(most, fairOutput)
	}
	return have == 0 || have+n+route.FrameHeaderLen <= most
}

// append adds a frame to the output; c.mu is held.
func (c *conn) append(frame []byte, seq uint64) {
	c.out = append(route.AppendFrameHeader(c.out, len(frame)), frame...)
	c.s.output.Add(int64(len(frame) + route.FrameHeaderLen))
	c.last = max(c.last, seq)
	c.kickWriter()
}

// write adds raw bytes to the output.
func (c *conn) write(b []byte, seq uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.out = append(c.out, b...)
	c.s.output.Add(int64(len(b)))
	c.last = max(c.last, seq)
	c.kickWriter()
}

func (c *conn) kickWriter() {
	if !c.writing {
		c.writing = true
		c.wrote.Add(1)
		go c.flush()
	}
}

// fairOutput is what every connection may buffer whatever the others do.
const fairOutput = 64 << 10

// keptOutput is the largest buffer that an idle connection keeps.
const keptOutput = 16 << 10

// flush writes until there is nothing left, then ends.
func (c *conn) flush() {
	defer c.wrote.Done()
	<-c.ready
	c.mu.Lock()
	for len(c.out) > 0 && !c.closed {
		b, seq := c.out, c.last
		c.out, c.spare = c.spare[:0], nil
		c.inWrite = len(b)
		c.mu.Unlock()
		err := c.send(b)
		c.s.output.Add(int64(-len(b)))
		c.mu.Lock()
		c.inWrite = 0
		c.spare = b[:0]
		if err != nil {
			c.closeLocked(Stalled, err)
			break
		}
		wasFull := c.full
		c.full = false
		c.mu.Unlock()
		if seq > 0 {
			c.link.Delivered(seq)
		} else if wasFull {
			c.link.Ready()
		}
		c.mu.Lock()
	}
	c.s.output.Add(int64(-len(c.out))) // of a connection that was closed
	c.out = c.out[:0]
	if cap(c.out) > keptOutput {
		c.out = nil
	}
	if cap(c.spare) > keptOutput {
		c.spare = nil
	}
	c.writing = false
	if c.ending {
		c.closeLocked(Kicked, nil)
	}
	c.mu.Unlock()
}

// send writes b, for as long as the peer takes some of it in each StallTimeout.
func (c *conn) send(b []byte) error {
	for {
		if err := c.nc.SetWriteDeadline(time.Now().Add(c.s.cfg.StallTimeout)); err != nil {
			return err
		}
		n, err := c.nc.Write(b)
		if err == nil || n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		b = b[n:]
	}
}

// finish lets what is buffered leave and closes.
func (c *conn) finish(why Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	c.blame(why)
	if !c.writing {
		c.closeLocked(why, nil)
	}
}

// blame notes why the connection ends; the first reason stays. c.mu is held.
func (c *conn) blame(why Event) {
	if !c.cause {
		c.why, c.cause = why, true
	}
}

// end closes at once.
func (c *conn) end(why Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked(why, nil)
}

// closeLocked closes at once. c.mu is held.
func (c *conn) closeLocked(why Event, err error) {
	if c.closed {
		return
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		why = NetworkError
	}
	c.closed = true
	c.blame(why)
	_ = c.nc.Close()
	c.ackMu.Lock()
	c.dead = true
	c.ackMu.Unlock()
	c.ackCond.Broadcast()
}
