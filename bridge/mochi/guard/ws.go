package guard

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// webBuffers holds the write buffers of WebSocket connections that are writing.
var webBuffers sync.Pool

// errNotBinary means that a WebSocket client sent a text message (MQTT 6.0-1).
var errNotBinary = errors.New("guard: WebSocket message is not binary")

// wsConn is the byte stream inside a WebSocket. MQTT packets may begin and end
// anywhere in its messages (MQTT 6.0-2). Only the connection's flusher writes.
type wsConn struct {
	net.Conn
	ws  *websocket.Conn
	msg io.Reader // the current message, nil between two
}

// Read returns the next bytes of the stream.
func (w *wsConn) Read(p []byte) (int, error) {
	for {
		if w.msg == nil {
			kind, r, err := w.ws.NextReader()
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errNotBinary
			}
			w.msg = r
		}
		n, err := w.msg.Read(p)
		if errors.Is(err, io.EOF) {
			w.msg, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Write sends p as one message.
func (w *wsConn) Write(p []byte) (int, error) {
	if err := w.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// SetWriteDeadline holds for the writes to come; only the flusher calls it.
func (w *wsConn) SetWriteDeadline(t time.Time) error { return w.ws.SetWriteDeadline(t) }
