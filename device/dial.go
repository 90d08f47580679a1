package device

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

// transport opens network connections to the hub and finishes TLS, so that the
// state of the TLS connection is known before the first byte of MQTT.
type transport struct {
	url       hubURL
	tls       *tls.Config // never nil when the URL is secure; not shared
	dialNet   func(ctx context.Context, network, address string) (net.Conn, error)
	maxPacket int
}

// newTransport prepares the TLS configuration: the system's roots, TLS 1.2 at
// least and the URL's host name, unless the given configuration says otherwise.
func newTransport(u hubURL, base *tls.Config, dial func(context.Context, string, string) (net.Conn, error), maxPacket int) *transport {
	t := &transport{url: u, dialNet: dial, maxPacket: maxPacket}
	if t.dialNet == nil {
		t.dialNet = (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext
	}
	if u.secure() {
		if base == nil {
			base = &tls.Config{}
		}
		t.tls = base.Clone()
		t.tls.MinVersion = max(t.tls.MinVersion, tls.VersionTLS12)
		if t.tls.ServerName == "" {
			t.tls.ServerName = u.host
		}
		if u.webSocket() {
			t.tls.NextProtos = []string{"http/1.1"}
		}
	}
	return t
}

// open returns a connection that carries the hub's byte stream. ctx bounds the
// opening alone.
func (t *transport) open(ctx context.Context) (net.Conn, *tls.ConnectionState, error) {
	conn, err := t.dialNet(ctx, "tcp", t.url.address)
	if err != nil {
		return nil, nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetNoDelay(true)
	}
	var state *tls.ConnectionState
	if t.tls != nil {
		secure := tls.Client(conn, t.tls)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, nil, tlsError(t.url, err)
		}
		s := secure.ConnectionState()
		conn, state = secure, &s
	}
	if !t.url.webSocket() {
		return conn, state, nil
	}
	ws, err := t.upgrade(ctx, conn)
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	return ws, state, nil
}

// tlsError tells the failures of a certificate from those of the connection: whoever
// sets a device up does not get a certificate trusted by waiting.
func tlsError(u hubURL, err error) error {
	var invalid *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &invalid):
		return refused(fmt.Errorf("%w: %w", ErrCertificate, err))
	case errors.As(err, &record):
		return refused(fmt.Errorf("%w at %s, without TLS: %w", ErrNotHub, u, &strangerError{string(record.RecordHeader[:])}))
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%w at %s: the connection was taken and then ended in the TLS handshake; a port without TLS, if it is one, needs %s:// in the URL: %w",
			ErrNoAnswer, u, strings.TrimSuffix(u.scheme, "s"), err)
	default:
		return fmt.Errorf("%w at %s: TLS: %w", ErrNotHub, u, err)
	}
}

// upgrade turns an HTTP connection into a WebSocket that speaks MQTT.
func (t *transport) upgrade(ctx context.Context, conn net.Conn) (net.Conn, error) {
	given := func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	d := websocket.Dialer{
		NetDialContext: given, NetDialTLSContext: given,
		Subprotocols: []string{"mqtt"},
		Proxy:        nil,
	}
	target := t.url.scheme + "://" + t.url.address + t.url.path
	ws, resp, err := d.DialContext(ctx, target, http.Header{}) //nolint:bodyclose // the WebSocket library has read and closed it
	if err != nil {
		if resp != nil {
			return nil, fmt.Errorf("%w at %s: an HTTP server without a WebSocket for MQTT at %s (status %s); many brokers have it at /mqtt",
				ErrNotHub, t.url, t.url.path, resp.Status)
		}
		return nil, unanswered(t.url.String(), fmt.Errorf("WebSocket: %w", err))
	}
	ws.SetReadLimit(int64(t.maxPacket) * 2)
	return &wsConn{Conn: ws}, nil
}

// wsConn makes a byte stream of a WebSocket's binary messages. One goroutine may
// read while another writes.
type wsConn struct {
	*websocket.Conn
	cur io.Reader // rest of the message being read
}

func (c *wsConn) Read(p []byte) (int, error) {
	for {
		if c.cur == nil {
			kind, r, err := c.NextReader()
			if err != nil {
				var ce *websocket.CloseError
				if errors.As(err, &ce) {
					err = io.EOF
				}
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errors.New("device: the hub sent a WebSocket text message")
			}
			c.cur = r
		}
		n, err := c.cur.Read(p)
		if errors.Is(err, io.EOF) {
			c.cur, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *wsConn) Write(p []byte) (int, error) {
	w, err := c.NextWriter(websocket.BinaryMessage)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(w, bytes.NewReader(p))
	if err := errors.Join(err, w.Close()); err != nil {
		return int(n), err
	}
	return len(p), nil
}

func (c *wsConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

var _ net.Conn = (*wsConn)(nil)
