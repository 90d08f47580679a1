package device

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/iotest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// streamConn is a connection whose other side has sent a stream and ended.
type streamConn struct {
	net.Conn
	r io.Reader
}

func (c streamConn) Read(p []byte) (int, error)    { return c.r.Read(p) }
func (streamConn) Write(p []byte) (int, error)     { return len(p), nil }
func (streamConn) Close() error                    { return nil }
func (streamConn) SetReadDeadline(time.Time) error { return nil }

// FuzzGuard: whatever a hub sends, the client's parser gets whole packets of the
// kinds and lengths that it can take, in the order in which they came.
func FuzzGuard(f *testing.F) {
	connack, suback := []byte{0x20, 2, 0, 0}, []byte{0x90, 3, 0, 1, 1}
	publish := func(flags byte, rest ...byte) []byte { return append([]byte{0x30 | flags, byte(len(rest))}, rest...) }
	whole := slices.Concat(connack, suback, publish(2, 0, 1, 't', 0, 1, 'x'), []byte{0x40, 2, 0, 7}, publish(0, 0, 1, 't'), []byte{0xd0, 0}, []byte{0xb0, 2, 0, 9})
	for _, seed := range [][]byte{
		whole, nil, connack, {0x20, 2, 0, 6}, {0x20, 3, 0, 0, 0}, {0x20, 0x82, 0, 0, 0},
		[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), {0x15, 3, 1, 0, 2, 2, 0x46}, {1}, {0x40, 2, 0, 1},
		append(slices.Clone(connack), 0x30, 0xff, 0xff, 0xff, 0xff, 1),
		append(slices.Clone(connack), 0x30, 0xff, 0xff, 0xff, 0x7f),
		append(slices.Clone(connack), publish(2, 0, 4, 't')...),
		append(slices.Clone(connack), publish(4, 0, 1, 't', 0, 1)...),
		append(slices.Clone(connack), publish(2, 0xff, 0xff, 0, 1)...),
		append(slices.Clone(connack), 0x30, 1, 0), append(slices.Clone(connack), 0x90, 2, 0, 1),
		append(slices.Clone(connack), 0xe0, 0), append(slices.Clone(connack), connack...),
		slices.Concat(connack, []byte{0x30, 0xd0, 0x0f}, make([]byte, 2000)),
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, stream []byte, slowly bool) {
		const limit = 4 << 10
		var acks []uint16
		var cause error
		conn := streamConn{r: bytes.NewReader(stream)}
		if slowly {
			conn.r = iotest.OneByteReader(conn.r)
		}
		g := newGuard(conn, limit, time.Hour, time.Hour, time.Hour, func(err error) { cause = err })
		g.onPuback = func(id uint16) { acks = append(acks, id) }
		handed, err := io.ReadAll(g)
		g.abort()
		<-g.done
		if !errors.Is(err, errLinkDown) || cause == nil {
			t.Fatalf("ended with %v, because of %v", err, cause)
		}
		if !bytes.HasPrefix(stream, handed) {
			t.Fatalf("handed on %x of %x", handed, stream)
		}
		cut := errors.Is(cause, io.EOF) || errors.Is(cause, io.ErrUnexpectedEOF)
		for r := bytes.NewReader(handed); r.Len() > 0; {
			left := r.Len()
			p, err := packets.ReadPacket(r)
			if err != nil && cut && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) && r.Len() == 0 {
				break // the stream ends within it
			}
			if err != nil {
				t.Fatalf("the client cannot read %x: %v", handed[len(handed)-left:], err)
			}
			if n := left - r.Len(); n > limit {
				t.Errorf("a packet of %d bytes was handed on", n)
			}
			_, first := p.(*packets.ConnackPacket)
			if first != (left == len(handed)) {
				t.Errorf("%v out of turn", p)
			}
			if ack, ok := p.(*packets.PubackPacket); ok {
				if len(acks) == 0 || acks[0] != ack.MessageID {
					t.Fatalf("PUBACK %d was not reported", ack.MessageID)
				}
				acks = acks[1:]
			}
		}
		if len(acks) > 0 && !cut {
			t.Errorf("reported acknowledgements %v that did not come", acks)
		}
	})
}
