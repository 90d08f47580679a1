package device

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/route"
)

// What listens at the hub's address may be something else: a port for another scheme
// of the URL, or another program. This file says what it is.

// nudgeAfter is how long the other side may be silent on a new connection before it
// is sent something more that the protocol allows. It holds the end of a line: a
// server of a text protocol waits for one, and then says what it is.
const nudgeAfter = 2 * time.Second

// mqttNudge is an UNSUBSCRIBE with the packet id 0D 0A: a client need not wait for
// CONNACK (MQTT 3.1.1, 3.1.4), and the client library ignores the answer.
func mqttNudge(topic string) []byte {
	p := packets.NewControlPacket(packets.Unsubscribe).(*packets.UnsubscribePacket)
	p.MessageID, p.Topics = 0x0d0a, []string{topic}
	var b bytes.Buffer
	_ = p.Write(&b) // never fails (bytes.Buffer)
	return b.Bytes()
}

// tcpNudge is a heartbeat, which everybody ignores (spec routing 3.5). A broker that
// has taken the preamble for the start of a packet finds that malformed.
func tcpNudge() []byte {
	f := route.Frame{Payload: []byte("\r\n\r\n")}
	return route.AppendFrame(route.AppendFrameHeader(nil, f.EncodedLen()), &f)
}

// strangerError is an answer that does not begin as the protocol's does.
type strangerError struct {
	first string // its first bytes, strangerLen at most
}

// strangerLen is how much of an answer tells what it is.
const strangerLen = 16

func (e *strangerError) Error() string {
	switch first := e.first; {
	case strings.HasPrefix(first, "HTTP/"):
		return "an HTTP server (MQTT over WebSocket needs ws:// or wss:// in the URL)"
	case strings.HasPrefix(first, "\x15\x03"): // an alert
		return "a TLS port, which needs mqtts:// or wss:// in the URL"
	case first == string(rune(route.Preamble)):
		return "an Ockam TCP port, which needs tcp:// in the URL"
	default:
		return fmt.Sprintf("its first bytes are %q", first)
	}
}

// unanswered says why nothing that fits came back on a new connection.
func unanswered(hub string, err error) error {
	var stranger *strangerError
	var network net.Error
	switch {
	case errors.As(err, &stranger):
		return fmt.Errorf("%w at %s: %w", ErrNotHub, hub, stranger)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &network):
		return fmt.Errorf("%w at %s: the connection was taken and then ended%s: %w", ErrNoAnswer, hub, otherScheme(hub), err)
	default:
		return fmt.Errorf("%w at %s: %w", ErrNotHub, hub, err)
	}
}

// otherScheme says which scheme a silent port may want.
func otherScheme(hub string) string {
	scheme, _, _ := strings.Cut(hub, "://")
	switch scheme {
	case "mqtt":
		return "; a TLS port, if it is one, needs mqtts:// in the URL, an Ockam TCP port tcp://"
	case "ws":
		return "; a TLS port, if it is one, needs wss:// in the URL"
	case "tcp":
		return "; an MQTT port, if it is one, needs mqtt:// in the URL"
	default:
		return ""
	}
}

// tooLate is the cause of a wait for the hub that ended by itself.
func tooLate(hub string, after time.Duration) error {
	return fmt.Errorf("%w at %s within %v", ErrNoAnswer, hub, after)
}

// firstBytes remembers how a stream began, until a read after the first.
type firstBytes struct {
	io.Reader
	first string
}

func (r *firstBytes) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if r.first == "" && n > 0 {
		r.first = string(p[:min(n, strangerLen)])
	}
	return n, err
}
