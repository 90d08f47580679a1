package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/sealmq/sealmq/route"
)

// tcpDialer makes links over the Ockam TCP transport (spec routing 3): to a sealmq
// hub's TCP port, or to any other Ockam node that relays.
type tcpDialer struct {
	hub       string // the hub's URL, for errors
	transport *transport
	limits    route.Limits  // of frames as received
	keepAlive time.Duration // longest silence before the connection is probed
	opening   time.Duration // longest wait for the connection and the hub's first byte
	writeWait time.Duration // longest time in which a write makes no progress
	log       *slog.Logger
}

// tcpLink is one connection. TCP has no acknowledgements: a packet counts as taken
// once it is written.
type tcpLink struct {
	d      *tcpDialer
	conn   net.Conn
	ev     linkEvents
	facts  linkInfo
	greets chan struct{} // closed once the hub's preamble is here

	readDone chan struct{} // closed when the reader has returned
	buf      []byte        // of send

	endOnce sync.Once
	ended   chan struct{}
	cause   error // set before ended is closed
}

// overTCP returns the dialer for a tcp:// hub, and otherwise the one for the others.
func (n *Node) overTCP(u hubURL, limits route.Limits, otherwise func() linkDialer) linkDialer {
	if u.scheme != "tcp" {
		return otherwise()
	}
	if n.cfg.Username != "" || n.cfg.Password != "" {
		n.log.Warn("a tcp:// hub asks for no user name or password; none is sent", "hub", u.String())
	}
	return &tcpDialer{
		hub: u.String(), limits: limits, keepAlive: n.cfg.KeepAlive, opening: n.cfg.ConnectTimeout,
		writeWait: n.cfg.WriteTimeout, log: n.log,
		transport: newTransport(u, nil, n.cfg.DialNetwork, limits.Frame),
	}
}

func (d *tcpDialer) dial(ctx context.Context, ev linkEvents) (link, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.opening, tooLate(d.hub, d.opening))
	defer cancel()
	conn, _, err := d.transport.open(ctx)
	if err != nil {
		return nil, openError(ctx, d.hub, err)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: d.keepAlive, Interval: max(d.keepAlive/6, time.Second), Count: 3})
		_ = setUserTimeout(tcp, d.keepAlive+d.keepAlive/2+d.writeWait)
	}
	l := &tcpLink{
		d: d, conn: conn, ev: ev, facts: linkInfo{hello: true, remote: conn.RemoteAddr().String()},
		greets: make(chan struct{}), readDone: make(chan struct{}), ended: make(chan struct{}),
	}
	go l.read()
	if err := l.write([]byte{route.Preamble}); err != nil {
		l.end(err) // unless the reader knows better
	}
	nudge := time.NewTimer(nudgeAfter)
	defer nudge.Stop()
	for {
		select {
		case <-nudge.C:
			if err := l.write(tcpNudge()); err != nil {
				l.end(err)
			}
		case <-l.greets:
			return l, nil
		case <-l.ended:
			l.close(false)
			return nil, unanswered(d.hub, l.cause)
		case <-ctx.Done():
			l.close(false)
			return nil, openError(ctx, d.hub, context.Cause(ctx))
		}
	}
}

// read hands over frames until the connection ends.
func (l *tcpLink) read() {
	defer close(l.readDone)
	in := &firstBytes{Reader: l.conn}
	r := route.NewReader(in, l.d.limits)
	if err := r.ReadPreamble(); err != nil {
		if errors.Is(err, route.ErrPreamble) {
			err = &strangerError{in.first}
		}
		l.end(err)
		return
	}
	close(l.greets)
	for {
		body, err := r.Next()
		switch {
		case errors.Is(err, route.ErrTooLarge):
			l.d.log.Warn("the hub sent a frame above the limit; it is dropped", "limit", l.d.limits.Frame)
		case err != nil:
			l.end(err)
			return
		default:
			l.ev.frames(bytes.Clone(body), false, route.Stored)
		}
	}
}

// send writes a packet, and waits for room in the network as long as the hub goes
// on taking something. Only one goroutine calls it.
func (l *tcpLink) send(p *packet) error {
	buf := l.buf[:0]
	for _, body := range p.frames {
		buf = append(route.AppendFrameHeader(buf, len(body)), body...)
	}
	if l.buf = buf[:0]; cap(buf) > bundleBytes*2 {
		l.buf = nil
	}
	if err := l.write(buf); err != nil {
		l.end(err)
		return fmt.Errorf("%w at %s: the connection has ended: %w", ErrHubAway, l.d.hub, l.cause)
	}
	if p.token != 0 {
		l.ev.acked(p.token)
	}
	return nil
}

func (l *tcpLink) write(b []byte) error {
	for {
		if err := l.conn.SetWriteDeadline(time.Now().Add(l.d.writeWait)); err != nil {
			return err
		}
		n, err := l.conn.Write(b)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case n == 0:
			return fmt.Errorf("the hub took nothing for %v", l.d.writeWait)
		}
		b = b[n:]
	}
}

// end closes the connection; the first cause stays.
func (l *tcpLink) end(err error) {
	l.endOnce.Do(func() {
		l.cause = err
		_ = l.conn.Close()
		close(l.ended)
	})
}

func (l *tcpLink) done() <-chan struct{} { return l.ended }
func (l *tcpLink) err() error            { return l.cause }
func (l *tcpLink) info() linkInfo        { return l.facts }

// close with good-bye ends the own direction first: closing everything while
// something unread has arrived would reset the connection, and take what was just
// written with it. A hub closes its side then, at once.
func (l *tcpLink) close(goodbye bool) {
	if half, ok := l.conn.(interface{ CloseWrite() error }); ok && goodbye && half.CloseWrite() == nil {
		limit := time.NewTimer(goodbyeTime)
		defer limit.Stop()
		select {
		case <-l.readDone:
		case <-limit.C:
		}
	}
	l.end(ErrClosed)
	<-l.readDone
}

var _ link = (*tcpLink)(nil)
