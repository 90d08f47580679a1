package guard

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/connlimit"
)

// Defaults of [Config].
const (
	DefaultConnectTimeout = 10 * time.Second
	DefaultConnectSize    = 128 << 10
	DefaultStallTimeout   = 30 * time.Second
	DefaultLinger         = 100 * time.Millisecond
	DefaultBuffer         = 1 << 20
)

// Config describes a Listener. Zero fields mean the documented defaults.
type Config struct {
	// ID is the listener's name at the server, required and unique there.
	ID string
	// Address is what to listen on, e.g. "127.0.0.1:1883"; port 0 takes a free
	// one, see Listener.Address.
	Address string
	// Network is "tcp" (default), "tcp4", "tcp6" or "unix".
	Network string
	// Inherited is an open listener to use instead of Address.
	Inherited net.Listener
	// TLS switches TLS on. The listener uses a copy.
	TLS *tls.Config

	// WebSocket switches to MQTT over WebSocket (MQTT 6.1).
	WebSocket bool
	// Path is the only path that is answered; empty: every path is.
	Path string
	// CheckOrigin decides on requests of browsers. nil admits requests without
	// an Origin header and those of the same host: anything else would let any
	// web page talk to a hub on its reader's own machine.
	CheckOrigin func(*http.Request) bool

	// PacketLimit is the server's limit of one packet in bytes
	// (Capabilities.MaximumPacketSize); 0 when it has none.
	PacketLimit int
	// Buffer is the output buffer of a connection in bytes. It is memory only
	// while there is output. Default, and at least: the larger of 1 MiB and
	// twice PacketLimit.
	Buffer int
	// ConnectTimeout is how long a peer has from accept to the end of its
	// CONNECT, TLS handshake included; a WebSocket has it twice, for the
	// upgrade and for CONNECT. Default 10 s.
	ConnectTimeout time.Duration
	// ConnectSize is the longest CONNECT in bytes, its will included. Default 128 KiB.
	ConnectSize int
	// StallTimeout is how long a peer may accept no byte. Default 30 s.
	StallTimeout time.Duration
	// Linger is how long output may take to leave after Close, from when it is written on.
	// Default 100 ms.
	Linger time.Duration

	// Limits bounds connections, nil: the defaults for this listener alone.
	Limits *Limits
	// Counters counts, nil: the listener has its own.
	Counters *Counters
	// Logger gets one line for each panic and failure to accept. nil discards.
	Logger *slog.Logger
}

// complete fills in the defaults.
func (c *Config) complete() error {
	switch {
	case c.PacketLimit < 0 || c.Buffer < 0 || c.ConnectSize < 0:
		return errors.New("guard: negative size")
	case c.ConnectTimeout < 0 || c.StallTimeout < 0 || c.Linger < 0:
		return errors.New("guard: negative duration")
	}
	least := max(DefaultBuffer, 2*c.PacketLimit)
	if c.Buffer == 0 {
		c.Buffer = least
	} else if c.Buffer < 2*c.PacketLimit {
		return fmt.Errorf("guard: buffer of %d bytes is less than two packets of %d", c.Buffer, c.PacketLimit)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.ConnectTimeout, DefaultConnectTimeout)
	def(&c.StallTimeout, DefaultStallTimeout)
	def(&c.Linger, DefaultLinger)
	if c.ConnectSize == 0 {
		c.ConnectSize = DefaultConnectSize
	}
	if c.Network == "" {
		c.Network = "tcp"
	}
	if c.Limits == nil {
		c.Limits = new(Limits)
	}
	if c.Counters == nil {
		c.Counters = new(Counters)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Listener is a guarded listener for mochi (listeners.Listener).
type Listener struct {
	cfg Config
	ln  net.Listener
	web *http.Server

	mu      sync.Mutex
	conns   map[*Conn]struct{}
	opening map[net.Conn]*ticket // WebSocket: accepted, not upgraded
	ended   bool
	wg      sync.WaitGroup // Serve and every connection
	stop    chan struct{}

	establish listeners.EstablishFn
}

var _ listeners.Listener = (*Listener)(nil)

// NewListener checks cfg and returns a listener for server.AddListener, which
// opens the port.
func NewListener(cfg Config) (*Listener, error) {
	if cfg.ID == "" {
		return nil, errors.New("guard: a listener needs an ID")
	}
	if cfg.Address == "" && cfg.Inherited == nil {
		return nil, fmt.Errorf("guard: listener %q needs an address", cfg.ID)
	}
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if cfg.TLS != nil {
		cfg.TLS = cfg.TLS.Clone()
		if cfg.WebSocket {
			cfg.TLS.NextProtos = []string{"http/1.1"} // no upgrade in HTTP/2
		}
	}
	return &Listener{
		cfg:     cfg,
		conns:   make(map[*Conn]struct{}),
		opening: make(map[net.Conn]*ticket),
		stop:    make(chan struct{}),
	}, nil
}

// ID returns the listener's name.
func (l *Listener) ID() string { return l.cfg.ID }

// Address returns the address listened on, with the actual port once the
// listener has been added to a server.
func (l *Listener) Address() string {
	if l.ln != nil {
		return l.ln.Addr().String()
	}
	return l.cfg.Address
}

// Protocol returns "tcp", "tls", "ws" or "wss".
func (l *Listener) Protocol() string {
	switch {
	case l.cfg.WebSocket && l.cfg.TLS != nil:
		return "wss"
	case l.cfg.WebSocket:
		return "ws"
	case l.cfg.TLS != nil:
		return "tls"
	}
	return "tcp"
}

// Counters returns the counters in use.
func (l *Listener) Counters() *Counters { return l.cfg.Counters }

// Init opens the port; mochi calls it in AddListener. mochi's logger is not
// used.
func (l *Listener) Init(*slog.Logger) error {
	l.ln = l.cfg.Inherited
	if l.ln == nil {
		ln, err := net.Listen(l.cfg.Network, l.cfg.Address)
		if err != nil {
			return fmt.Errorf("guard: listener %q: %w", l.cfg.ID, err)
		}
		l.ln = ln
	}
	if l.cfg.WebSocket {
		l.web = &http.Server{
			Handler:           http.HandlerFunc(l.upgrade),
			ReadHeaderTimeout: l.cfg.ConnectTimeout,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(l.cfg.Logger.Handler(), slog.LevelDebug),
			ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
				return context.WithValue(ctx, connKey{}, nc)
			},
			ConnState: func(nc net.Conn, s http.ConnState) {
				if s == http.StateClosed {
					l.failed(nc)
				}
			},
		}
		// A connection is for one upgrade: what is no WebSocket ends with its answer,
		// and so within the deadline.
		l.web.SetKeepAlivesEnabled(false)
	}
	return nil
}

// Serve accepts connections until Close. mochi calls it.
func (l *Listener) Serve(establish listeners.EstablishFn) {
	if !l.add() {
		return
	}
	defer l.wg.Done()
	l.mu.Lock()
	l.establish = establish
	l.mu.Unlock()
	if l.web != nil {
		_ = l.web.Serve(webListener{l})
		return
	}
	for {
		nc, t, err := l.accept()
		if err != nil {
			return
		}
		if !l.add() {
			t.Release()
			_ = nc.Close()
			return
		}
		go l.serve(nc, t)
	}
}

// add counts a goroutine in, unless the listener is closed.
func (l *Listener) add() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return false
	}
	l.wg.Add(1)
	return true
}

// accept returns the next connection within the limits. It waits out errors
// such as a lack of file descriptors.
func (l *Listener) accept() (net.Conn, *ticket, error) {
	const shortest = 5 * time.Millisecond
	delay := shortest
	for {
		nc, err := l.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil, nil, err
			}
			l.cfg.Counters.add(AcceptFailed)
			if delay == shortest {
				l.cfg.Logger.Warn("accept failed; trying again", "listener", l.cfg.ID, "err", err)
			}
			select {
			case <-l.stop:
				return nil, nil, net.ErrClosed
			case <-time.After(delay):
			}
			delay = min(2*delay, time.Second)
			continue
		}
		delay = shortest
		t, e := l.cfg.Limits.take(nc.RemoteAddr())
		l.cfg.Counters.add(e)
		if t == nil {
			_ = nc.Close()
			continue
		}
		t.Yield(func() {
			l.cfg.Counters.add(Displaced)
			_ = nc.Close()
		}, connlimit.Quiet(nc))
		return nc, t, nil
	}
}

// serve runs one TCP or TLS connection.
func (l *Listener) serve(nc net.Conn, t *ticket) {
	defer l.wg.Done()
	deadline := time.Now().Add(l.cfg.ConnectTimeout)
	if l.cfg.TLS == nil {
		l.run(newConn(nc, nc, &l.cfg), t, deadline)
		return
	}
	tc := tls.Server(&opening{Conn: nc, ticket: t}, l.cfg.TLS)
	c := newConn(tc, nc, &l.cfg)
	c.slow = true
	l.mu.Lock()
	l.opening[nc] = t
	ended := l.ended
	l.mu.Unlock()
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	var err error
	if ended {
		err = net.ErrClosed
	} else {
		err = tc.HandshakeContext(ctx)
	}
	cancel()
	if err != nil {
		_ = nc.Close()
		l.failed(nc)
		return
	}
	l.claim(nc)
	st := tc.ConnectionState()
	c.state = &st
	l.run(c, t, deadline)
}

// run hands c to mochi until it is over. Nothing that happens on this
// goroutine, which reads and processes all that the client sends, ends the
// process.
func (l *Listener) run(c *Conn, t *ticket, deadline time.Time) {
	c.ticket = t
	_, ws := c.nc.(*wsConn)
	c.lazy = !ws // the error of a passed deadline is final in a WebSocket
	c.want.Store(ticks(deadline))
	c.armed.Store(ticks(deadline))
	_ = c.nc.SetReadDeadline(deadline)
	l.mu.Lock()
	establish := l.establish
	ended := l.ended
	if !ended {
		l.conns[c] = struct{}{}
	}
	l.mu.Unlock()
	if !ended {
		err := l.guarded(establish, c)
		l.cfg.Logger.Debug("connection closed", "listener", l.cfg.ID, "err", err)
	}
	_ = c.Close()
	c.underway(0)
	l.finish(c)
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	<-c.gone
}

// guarded runs establish and turns a panic into an error.
func (l *Listener) guarded(establish listeners.EstablishFn, c *Conn) (err error) {
	defer func() {
		if v := recover(); v != nil {
			l.cfg.Counters.add(Panicked)
			l.cfg.Logger.Error("panic while serving a client; its connection is closed, the server goes on",
				"listener", l.cfg.ID, "peer", c.RemoteAddr().String(), "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			err = fmt.Errorf("guard: panic: %v", v)
		}
	}()
	return establish(l.cfg.ID, c)
}

// finish runs the functions given to AtEnd, and survives them.
func (l *Listener) finish(c *Conn) {
	defer c.ticket.Release()
	defer func() {
		if v := recover(); v != nil {
			l.cfg.Counters.add(Panicked)
			l.cfg.Logger.Error("panic while closing a connection", "listener", l.cfg.ID, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		}
	}()
	c.end()
}

// Close stops accepting, says goodbye to MQTT 5 clients (0x8B), closes every
// connection, and returns when all are over: what is still buffered for them has
// Config.Linger to leave. mochi calls it; closing twice is harmless.
//
// It does not call closeClients, mochi's way to the same end: that takes a read
// lock twice, and hangs for good when a client leaves in between.
func (l *Listener) Close(listeners.CloseFn) {
	l.mu.Lock()
	already := l.ended
	l.ended = true
	l.mu.Unlock()
	if already {
		l.wg.Wait()
		return
	}
	close(l.stop)
	if l.ln != nil {
		_ = l.ln.Close()
	}
	if l.web != nil {
		_ = l.web.Close()
	}
	l.mu.Lock()
	for c := range l.conns {
		c.goodbye()
	}
	for nc := range l.opening {
		_ = nc.Close()
	}
	l.mu.Unlock()
	l.wg.Wait()
}

// goodbye closes a connection because the server stops.
func (c *Conn) goodbye() {
	if c.v5.Load() {
		w := c.Begin()
		_ = w.Raw([]byte{packets.Disconnect << 4, 1, packets.ErrServerShuttingDown.Code})
		w.End()
	}
	_ = c.Close()
}

// claim takes over an opening connection's ticket.
func (l *Listener) claim(nc net.Conn) *ticket {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.opening[nc]
	delete(l.opening, nc)
	return t
}

// failed gives back the place of an opening connection that has come to nothing.
func (l *Listener) failed(nc net.Conn) {
	t := l.claim(nc)
	if t == nil {
		return
	}
	if !t.Displaced() {
		l.cfg.Counters.add(HandshakeFailed)
	}
	t.Release()
}

// connKey is where a request's context has its connection.
type connKey struct{}

// opening is a connection below TLS or HTTP, whose peer's silence counts.
type opening struct {
	net.Conn

	ticket *ticket
}

func (o *opening) Read(p []byte) (int, error) {
	o.ticket.Wait()
	n, err := o.Conn.Read(p)
	o.ticket.Heard()
	return n, err
}

// webListener gives http.Server its connections, limited and under TLS.
type webListener struct{ l *Listener }

func (w webListener) Accept() (net.Conn, error) {
	nc, t, err := w.l.accept()
	if err != nil {
		return nil, err
	}
	nc = &opening{Conn: nc, ticket: t}
	if w.l.cfg.TLS != nil {
		nc = tls.Server(nc, w.l.cfg.TLS)
	}
	_ = nc.SetDeadline(time.Now().Add(w.l.cfg.ConnectTimeout))
	w.l.mu.Lock()
	w.l.opening[nc] = t
	w.l.mu.Unlock()
	return nc, nil
}

func (w webListener) Close() error   { return w.l.ln.Close() }
func (w webListener) Addr() net.Addr { return w.l.ln.Addr() }

// upgrade makes a WebSocket of a request and serves it.
func (l *Listener) upgrade(w http.ResponseWriter, r *http.Request) {
	if l.cfg.Path != "" && r.URL.Path != l.cfg.Path {
		http.NotFound(w, r)
		return
	}
	if !l.add() {
		http.Error(w, "closing", http.StatusServiceUnavailable)
		return
	}
	defer l.wg.Done()
	deadline := time.Now().Add(l.cfg.ConnectTimeout)
	up := websocket.Upgrader{
		HandshakeTimeout: l.cfg.ConnectTimeout,
		Subprotocols:     []string{"mqtt", "mqttv3.1"},
		CheckOrigin:      l.cfg.CheckOrigin,
		WriteBufferPool:  &webBuffers,
		WriteBufferSize:  4096,
	}
	ws, err := up.Upgrade(w, r, nil)
	if err != nil {
		// Of a request that it answers the HTTP server closes the connection.
		if answered := (websocket.HandshakeError{}); !errors.As(err, &answered) {
			nc := r.Context().Value(connKey{}).(net.Conn)
			_ = nc.Close()
			l.failed(nc)
		}
		return
	}
	nc := ws.NetConn()
	t := l.claim(nc)
	if t == nil {
		_ = nc.Close()
		return
	}
	raw := nc
	var state *tls.ConnectionState
	if tc, ok := nc.(*tls.Conn); ok {
		st := tc.ConnectionState()
		state, raw = &st, tc.NetConn()
	}
	c := newConn(&wsConn{Conn: nc, ws: ws}, raw, &l.cfg)
	c.slow, c.state = true, state
	l.run(c, t, deadline)
}
