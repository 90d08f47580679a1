package guard

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/underway"
)

// Errors of a guarded connection. They wrap net.ErrClosed where the connection
// is gone, so that callers need not tell them apart.
var (
	// ErrSlowConsumer means that the peer does not read: its output buffer is
	// full, and the connection has been closed.
	ErrSlowConsumer = &closedError{"guard: output buffer full, the client does not read fast enough; connection closed"}
	// ErrStalled means that the peer accepted no byte for Config.StallTimeout.
	ErrStalled = &closedError{"guard: the client accepts no data; connection closed"}
	// ErrConnectTimeout means that no complete CONNECT arrived in time.
	ErrConnectTimeout = &closedError{"guard: no CONNECT within the deadline; connection closed"}
	// ErrNotConnect means that the first packet is not an MQTT CONNECT.
	ErrNotConnect = &closedError{"guard: first packet is not CONNECT; connection closed"}
	// ErrConnectTooLarge means that CONNECT is longer than allowed.
	ErrConnectTooLarge = &closedError{"guard: CONNECT too large; connection closed"}
	// ErrPacketTooLarge means that a packet is longer than Config.PacketLimit.
	ErrPacketTooLarge = &closedError{"guard: packet too large; connection closed"}
)

type closedError struct{ text string }

func (e *closedError) Error() string { return e.text }
func (e *closedError) Unwrap() error { return net.ErrClosed }

// Conn is a guarded connection, what mochi holds as Client.Net.Conn. It is a
// net.Conn with these differences:
//
//   - Write never blocks. It copies into a bounded buffer that a goroutine of
//     the connection, alive only while there is output, writes to the network
//     in as few system calls as it can. If the buffer is full the connection is
//     closed and Write returns ErrSlowConsumer. One Write is one piece: calls
//     from several goroutines never interleave.
//   - SetDeadline and SetReadDeadline concern reading only, SetWriteDeadline
//     does nothing: a peer that accepts no byte for Config.StallTimeout is cut.
//   - Close lets what is buffered leave, for up to Config.Linger, and returns
//     at once.
//
// Read must be called by one goroutine at a time, as mochi does.
type Conn struct {
	nc     net.Conn // mochi's view of the peer: TCP, TLS or WebSocket
	raw    net.Conn // what lies below nc, closed when nc cannot be in time
	cfg    *Config
	state  *tls.ConnectionState
	ticket *ticket
	limit  int  // bytes the output buffer may hold
	slow   bool // closing nc may block: TLS and WebSocket say goodbye

	mu       sync.Mutex
	out      *batch // nil while there is no output
	pending  int    // bytes in out and in the batch being written
	grace    int    // how many of them do not count against limit, oldest first
	lenient  bool   // output is not limited for now, see BeginBacklog
	flushing bool   // the flusher lives
	writing  bool   // and is in a write
	closing  bool   // no output is taken any more
	cause    error  // why, if not by Close
	stallAt  time.Time
	linger   *time.Timer
	steps    int    // of Linger that are over
	hungry   bool   // the owner wants to know when output has fallen to low
	low      int    // bytes
	drained  func() // told then
	atEnd    []func()
	ended    bool

	closed atomic.Bool   // set with closing, for readers without mu
	gone   chan struct{} // closed when nc is closed

	// Input; the reader's own but for the atomics.
	lazy      bool         // Read is the only reader of nc, so deadlines may be armed late
	want      atomic.Int64 // read deadline asked for, in ticks; 0: none
	armed     atomic.Int64 // read deadline set on nc; 0: none
	interval  atomic.Int64 // length of the last deadline asked for
	settled   atomic.Bool  // the server has accepted the client
	v5        atomic.Bool  // which speaks MQTT 5
	frames    framer
	announced int    // length of a long packet that is arriving
	kept      []byte // what has come of one that mochi is to see when it is there
	charged   int    // bytes of memory that count for a long packet
	tap       *tap
	tooLong   int // length of the packet that is to end the connection

	known, stranger bool   // what SetUser said
	user            uint64 // a hash; 0: none
	arriving        underway.Holder

	exempt  atomic.Bool
	value   atomic.Pointer[any]
	session atomic.Pointer[session] // the fixes' own

	overlong atomic.Bool // Ended has counted
}

var _ net.Conn = (*Conn)(nil)

// Wrap guards the output of a connection that another listener accepted: what a
// hook can do for the connections of mochi's own listeners in OnConnect, by
// replacing Client.Net.Conn. Reading is left to the holder of nc; panics,
// CONNECT deadline and limits are not covered, and the connection
// cannot be tapped; [Conn.Ended] takes what the reader ended with. cfg's ID, Address and
// listener fields are ignored.
func Wrap(nc net.Conn, cfg Config) (*Conn, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	c := newConn(nc, nc, &cfg)
	if t, ok := nc.(*tls.Conn); ok {
		st := t.ConnectionState()
		c.state = &st
	}
	_, tcp := nc.(*net.TCPConn)
	c.slow = !tcp
	return c, nil
}

func newConn(nc, raw net.Conn, cfg *Config) *Conn {
	return &Conn{nc: nc, raw: raw, cfg: cfg, limit: cfg.Buffer, gone: make(chan struct{})}
}

// TLS returns the state of the TLS connection, with the exporter of RFC 9266,
// or nil when there is none.
func (c *Conn) TLS() *tls.ConnectionState { return c.state }

// LocalAddr returns the local address.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

// RemoteAddr returns the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// SetExempt says that another hook speaks for this client's publishes and their
// acknowledgements: Fixes leaves their packet identifiers alone.
func (c *Conn) SetExempt(on bool) { c.exempt.Store(on) }

// Exempt reports what SetExempt said.
func (c *Conn) Exempt() bool { return c.exempt.Load() }

// SetValue keeps v with the connection, for the hook that owns the client.
// Fixes and Listener don't touch it.
func (c *Conn) SetValue(v any) { c.value.Store(&v) }

// Value returns what SetValue kept, nil at first.
func (c *Conn) Value() any {
	if v := c.value.Load(); v != nil {
		return *v
	}
	return nil
}

// OnDrained has f called whenever output has drained after Writer.NotifyDrained
// asked for it. f runs on the connection's own goroutine, must not block, and
// may write. It must be set before the first NotifyDrained.
func (c *Conn) OnDrained(f func()) { c.drained = f }

// AtEnd has f called once when the server is done with the connection: its
// reader has returned or panicked. On a connection made by Wrap nobody knows
// when that is, so f is called when the connection is closed. If it is over
// already f runs at once.
func (c *Conn) AtEnd(f func()) {
	c.mu.Lock()
	if !c.ended {
		c.atEnd = append(c.atEnd, f)
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	f()
}

// end closes the connection and runs what AtEnd was given, in reverse order.
func (c *Conn) end() {
	_ = c.Close()
	c.mu.Lock()
	fs := c.atEnd
	c.atEnd, c.ended = nil, true
	c.mu.Unlock()
	for i := len(fs) - 1; i >= 0; i-- {
		fs[i]()
	}
	c.ticket.Release()
}

// Gone returns a channel that is closed once the network connection is closed,
// after Close at most Config.Linger after the rest of the output began to be written.
func (c *Conn) Gone() <-chan struct{} { return c.gone }

// Cause returns why the connection was closed by itself: ErrSlowConsumer,
// ErrStalled or a network error; nil while it is open or was closed by Close.
func (c *Conn) Cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// BeginBacklog suspends the output limit while a kept session's messages are
// sent again in one go: they are in memory anyway. EndBacklog ends it; what was
// written in between never counts against the limit.
func (c *Conn) BeginBacklog() {
	c.mu.Lock()
	c.lenient = true
	c.mu.Unlock()
}

// EndBacklog restores the output limit.
func (c *Conn) EndBacklog() {
	c.mu.Lock()
	c.lenient = false
	c.mu.Unlock()
}

// Close closes the connection. Reads fail at once; buffered output has
// Config.Linger to leave. It never blocks.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return nil
	}
	c.closing = true
	c.closed.Store(true)
	if !c.flushing && !c.slow {
		c.mu.Unlock()
		c.shut()
		return nil
	}
	// The flusher writes the rest and closes; it is cut short where it would
	// wait, in a write or in the goodbye of TLS, which has 5 s otherwise.
	if !c.flushing {
		c.flushing = true
		go c.flush()
	}
	if c.writing {
		c.hurry()
	}
	_ = c.nc.SetReadDeadline(time.Now())
	c.mu.Unlock()
	return nil
}

// lingerSteps is in how many steps Linger goes by. A process that gets no processor for
// a while, and its peers nothing, loses one of them and not all.
const lingerSteps = 4

// hurry gives what is left of a connection that closes the time to leave. That counts
// from when it is tried: on a machine with much else to do, the flusher may come late.
// The caller holds c.mu.
func (c *Conn) hurry() {
	if c.linger == nil {
		c.linger = time.AfterFunc(c.cfg.Linger/lingerSteps, c.lingered)
	}
}

// lingered ends the time to leave, when all steps are over.
func (c *Conn) lingered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.steps++; {
	case c.steps == lingerSteps:
		_ = c.raw.Close()
	case c.steps < lingerSteps:
		c.linger.Reset(c.cfg.Linger / lingerSteps)
	}
}

// fail closes at once, for cause. The caller holds c.mu.
func (c *Conn) fail(cause error, e Event) {
	if c.cause == nil {
		c.cause = cause
	}
	if e < events && !c.closing {
		c.cfg.Counters.add(e)
	}
	c.closing = true
	c.closed.Store(true)
	c.drop()
	// A flusher that is stuck in a write comes back with an error; what lies
	// below TLS or WebSocket closes without a goodbye that could block.
	_ = c.raw.Close()
	if !c.flushing {
		c.flushing = true
		go c.flush()
	}
}

// shut closes the network connection; called once, by Close or by the flusher.
func (c *Conn) shut() {
	if c.slow {
		_ = c.nc.Close()
	}
	_ = c.raw.Close()
	c.mu.Lock()
	if c.linger != nil {
		c.linger.Stop()
		c.steps = lingerSteps
	}
	c.mu.Unlock()
	close(c.gone)
	if !c.listened() {
		c.end()
	}
}

// listened reports whether the connection came from a Listener, which reads all
// input through Read and tells when the server is done.
func (c *Conn) listened() bool { return c.ticket != nil }

// Write implements net.Conn; see Conn.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.room(len(p))
	if err != nil {
		return 0, err
	}
	b.copy(p)
	c.kick(len(p))
	return len(p), nil
}

// room returns the batch to append n bytes to. The caller holds c.mu.
func (c *Conn) room(n int) (*batch, error) {
	if c.closing {
		if c.cause != nil {
			return nil, c.cause
		}
		return nil, net.ErrClosed
	}
	if c.lenient {
		c.grace = c.pending + n
	} else if waiting := c.pending - c.grace; waiting+n > c.limit || waiting > fairOutput && waiting+n > c.cfg.Limits.buffer(c.limit) {
		c.fail(ErrSlowConsumer, SlowConsumer)
		return nil, c.cause
	}
	if c.out == nil {
		c.out = batches.Get().(*batch)
	}
	return c.out, nil
}

// kick accounts for n bytes appended and wakes the flusher. The caller holds
// c.mu.
func (c *Conn) kick(n int) {
	c.pending += n
	c.cfg.Limits.output.Add(int64(n))
	if !c.flushing {
		c.flushing = true
		go c.flush()
	}
}

// flush writes until there is nothing left, then ends.
func (c *Conn) flush() {
	c.mu.Lock()
	for {
		b := c.out
		if b == nil {
			if !c.closing {
				c.flushing = false
				c.mu.Unlock()
				return
			}
			if c.slow {
				c.hurry() // the goodbye
			}
			c.mu.Unlock()
			c.shut()
			return
		}
		c.out = nil
		c.armWrite(false)
		if c.closing {
			c.hurry()
		}
		c.writing = true
		c.mu.Unlock()

		err := c.writeBatch(b)

		c.mu.Lock()
		c.writing = false
		c.pending -= b.size
		c.cfg.Limits.output.Add(-int64(b.size))
		c.grace = max(0, c.grace-b.size)
		b.free()
		if c.hungry && err == nil && c.pending <= c.low {
			c.hungry = false
			f := c.drained
			c.mu.Unlock()
			f()
			c.mu.Lock()
		}
		if err != nil && !c.closing {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				c.fail(ErrStalled, WriteStalled)
			} else {
				c.fail(err, events)
			}
		} else if err != nil {
			c.drop()
		}
	}
}

// drop forgets what has not been handed to the network. The caller holds c.mu.
func (c *Conn) drop() {
	if c.out != nil {
		c.pending -= c.out.size
		c.cfg.Limits.output.Add(-int64(c.out.size))
		c.out.free()
		c.out = nil
	}
}

// armWrite gives the writes to come at least StallTimeout. The caller holds
// c.mu.
func (c *Conn) armWrite(force bool) {
	if c.closing {
		return // the timer of Close ends what is left
	}
	if now := time.Now(); force || c.stallAt.Sub(now) < c.cfg.StallTimeout {
		c.stallAt = now.Add(2 * c.cfg.StallTimeout)
		_ = c.nc.SetWriteDeadline(c.stallAt)
	}
}

// writeBatch writes the whole batch, for as long as the peer accepts any of it.
func (c *Conn) writeBatch(b *batch) error {
	b.out = b.bufs
	for len(b.out) > 0 {
		var n int64
		var err error
		if c.slow {
			// One record or message at a time; a deadline that passes within
			// one has broken the stream.
			_, err = c.nc.Write(b.out[0])
			b.out = b.out[1:]
		} else {
			n, err = b.out.WriteTo(c.nc)
		}
		again := n > 0 && errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load()
		if err != nil && !again {
			return err
		}
		if len(b.out) > 0 {
			c.mu.Lock()
			c.armWrite(again)
			c.mu.Unlock()
		}
	}
	return nil
}

// SetDeadline sets the deadline of reads; see Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline does nothing; see Conn.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }

// SetReadDeadline sets the deadline of reads. mochi moves it on with every
// packet; the timer below is only touched when it has to become earlier, and
// when it fires too early.
func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if !c.settled.Load() {
		// mochi sets its first deadline when OnConnect has let the client in.
		c.settled.Store(true)
		c.v5.Store(c.frames.level == 5)
		c.ticket.Settle()
	}
	var want int64
	if !t.IsZero() {
		want = ticks(t)
		c.interval.Store(int64(time.Until(t)))
	} else {
		c.interval.Store(0)
	}
	c.want.Store(want)
	if armed := c.armed.Load(); c.lazy && armed != 0 && (want == 0 || want >= armed) {
		return nil
	}
	c.armed.Store(want)
	return c.nc.SetReadDeadline(t)
}

// begun is where ticks count from.
var begun = time.Now()

// ticks returns a time as nanoseconds of the monotonic clock, so that setting the
// wall clock moves no deadline.
func ticks(t time.Time) int64 { return int64(t.Sub(begun)) }

// extend moves the read deadline on, as mochi would have, for packets that it
// never saw.
func (c *Conn) extend() {
	if d := c.interval.Load(); d > 0 {
		c.want.Store(ticks(time.Now()) + d)
		if !c.lazy {
			_ = c.nc.SetReadDeadline(time.Now().Add(time.Duration(d)))
		}
	}
}

// readRaw reads from the network and keeps the deadline.
func (c *Conn) readRaw(p []byte) (int, error) {
	for {
		if c.closed.Load() {
			return 0, net.ErrClosed
		}
		first := !c.slow && !c.frames.first // else see opening
		if first {
			c.ticket.Wait()
		}
		n, err := c.nc.Read(p)
		if first {
			c.ticket.Heard()
		}
		if err == nil || n > 0 {
			return n, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || c.closed.Load() {
			return 0, err
		}
		want := c.want.Load()
		if want != 0 && want <= ticks(time.Now()) {
			if c.frames.first {
				return 0, err
			}
			c.cfg.Counters.add(ConnectTimeout)
			return 0, ErrConnectTimeout
		}
		if !c.lazy {
			return 0, err
		}
		c.armed.Store(want)
		var t time.Time
		if want != 0 {
			t = begun.Add(time.Duration(want))
		}
		if err := c.nc.SetReadDeadline(t); err != nil {
			return 0, err
		}
	}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if c.tap != nil {
		return c.tap.read(c, p)
	}
	return c.follow(p)
}

// follow reads what is all mochi's. mochi makes room for the whole of a packet when it
// has read the header, so that a few bytes from each of many connections could take all
// memory: it gets a long one when that is there.
func (c *Conn) follow(p []byte) (int, error) {
	for {
		switch {
		case c.tooLong > 0:
			return 0, c.refuse(c.tooLong)
		case c.kept == nil:
			n, err := c.readRaw(p)
			if n == 0 {
				return 0, err
			}
			whole, err := c.frames.scan(p[:n], c)
			switch {
			case errors.Is(err, ErrPacketTooLarge) && whole > 0:
				c.tooLong = c.frames.length // once what came before it is processed
				return whole, nil
			case errors.Is(err, ErrPacketTooLarge):
				return 0, c.refuse(c.frames.length)
			case err != nil:
				return 0, err
			case c.announced == 0:
				return n, nil
			}
			c.kept = append(make([]byte, 0, max(4096, n-whole)), p[whole:n]...)
			if whole > 0 {
				return whole, nil
			}
		case c.announced == 0: // it is all there
			n := copy(p, c.kept)
			if c.kept = c.kept[n:]; len(c.kept) == 0 {
				c.kept = nil
			}
			return n, nil
		default:
			if err := c.readKept(); err != nil {
				c.kept = nil
				return 0, err
			}
		}
	}
}

// readKept reads on in a long packet, in steps of twice the size so that memory
// follows what has arrived.
func (c *Conn) readKept() error {
	have := len(c.kept)
	all := have + c.frames.left
	if have == cap(c.kept) {
		c.kept = append(make([]byte, 0, min(2*have, all)), c.kept...)
	}
	if err := c.charge(cap(c.kept)); err != nil {
		return err
	}
	n, err := c.readRaw(c.kept[have:min(cap(c.kept), all)])
	if n == 0 {
		return err
	}
	c.kept = c.kept[:have+n]
	_, err = c.frames.scan(c.kept[have:], c)
	return err
}

// Ended says with what error the server has stopped reading from a connection that was
// made by Wrap, as it does in OnDisconnect, so that a packet above the server's limit is
// counted and logged as on a Listener's connections. It counts once, however often it is
// called, and does nothing on those.
func (c *Conn) Ended(err error) {
	if !c.listened() && errors.Is(err, packets.ErrPacketTooLarge) && !c.overlong.Swap(true) {
		oversized(c.cfg.Counters, c.cfg.Logger, c.RemoteAddr().String())
	}
}

// oversized counts a connection whose packet limit was not ours to enforce.
func oversized(counters *Counters, logger *slog.Logger, remote string) {
	counters.add(PacketTooLarge)
	logger.Warn("packet too large; connection closed", "remote", remote)
}

// refuse ends the connection over a packet with a body of n bytes, and says so where
// the protocol has words for it (MQTT 5, 3.14.2.1).
func (c *Conn) refuse(n int) error {
	c.cfg.Counters.add(PacketTooLarge)
	c.cfg.Logger.Warn("packet too large; connection closed",
		"listener", c.cfg.ID, "remote", c.RemoteAddr().String(), "bytes", n, "limit", c.cfg.PacketLimit)
	if c.v5.Load() {
		w := c.Begin()
		_ = w.Raw([]byte{typeDisconnect << 4, 1, codePacketTooLarge})
		w.End()
	}
	return ErrPacketTooLarge
}
