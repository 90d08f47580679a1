package broker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// fuzzHub is a hub for all inputs of a fuzz target, and a bystander on its TCP port.
type fuzzHub struct {
	*Hub
	web       string // host:port of the WebSocket listener
	client    string // a device's client id
	bystander net.Conn
	answers   *route.Reader
	asked     uint64
}

func newFuzzHub(f *testing.F) *fuzzHub {
	f.Helper()
	id, err := identity.Create()
	if err != nil {
		f.Fatal(err)
	}
	cfg := Config{MQTT: []string{"127.0.0.1:0", "ws://127.0.0.1:0"}, TCP: "127.0.0.1:0"}
	// One input at a time, thousands a second.
	cfg.Limits.APIHandshakesPerSecond = 100_000
	h, err := New(cfg)
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := h.Start(ctx); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := h.Shutdown(ctx); err != nil {
			f.Error(err)
		}
	})
	fh := &fuzzHub{Hub: h, web: strings.TrimPrefix(h.MQTTURLs()[1], "ws://"), client: id.Identifier().String()}
	if fh.bystander, err = net.Dial("tcp", h.TCPAddr().String()); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = fh.bystander.Close() })
	fh.answers = route.NewReader(fh.bystander, route.Limits{})
	if _, err := fh.bystander.Write([]byte{route.Preamble}); err != nil {
		f.Fatal(err)
	}
	return fh
}

func (h *fuzzHub) dial(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// upgraded is a connection to the WebSocket port with the hub's answer read: what comes
// before that would end it.
func (h *fuzzHub) upgraded(t testing.TB, upgrade string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c := h.dial(t, h.web)
	if _, err := io.WriteString(c, upgrade); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("no upgrade: %v, %v", resp, err)
	}
	_ = resp.Body.Close()
	return c, r
}

// talk writes what an input is about to a connection of its own, and reads until the hub
// ends that.
func talk(t *testing.T, c net.Conn, parts ...[]byte) {
	t.Helper()
	defer c.Close()
	for _, p := range parts {
		if _, err := c.Write(p); err != nil {
			break // the hub has had enough
		}
	}
	_ = c.(*net.TCPConn).CloseWrite()
	if _, err := io.Copy(io.Discard, c); err != nil {
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			t.Fatal("the hub goes on with a connection that has ended")
		}
	}
}

// well asks for an echo, and whether anything has panicked.
func (h *fuzzHub) well(t *testing.T) {
	t.Helper()
	h.asked++
	want := binary.BigEndian.AppendUint64(nil, h.asked)
	b := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("me"), Payload: want})
	_ = h.bystander.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := h.bystander.Write(append(route.AppendFrameHeader(nil, len(b)), b...)); err != nil {
		t.Fatal(err)
	}
	got, err := h.answers.Next()
	if err != nil {
		t.Fatalf("the bystander: %v", err)
	}
	if f, err := route.ParseFrame(got, route.Limits{}); err != nil || !bytes.Equal(f.Payload, want) {
		t.Fatalf("the bystander gets %x, %v", got, err)
	}
	for name, n := range h.Status().Counters {
		if n > 0 && strings.Contains(name, "panic") {
			t.Fatalf("%s is %v", name, n)
		}
	}
}

// FuzzWebSocket sends whatever to the WebSocket port: from the first byte, behind a good
// upgrade, as what its messages hold, and the same of a device that has logged in. The
// hub does not panic, ends what is over, and serves others.
func FuzzWebSocket(f *testing.F) {
	h := newFuzzHub(f)
	upgrade := "GET /mqtt HTTP/1.1\r\nHost: " + h.web + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
	// A message of a client, with a mask of zeros.
	message := func(b []byte) []byte {
		head := binary.BigEndian.AppendUint64([]byte{0x82, 0x80 | 127}, uint64(len(b)))
		return append(append(head, 0, 0, 0, 0), b...)
	}
	login := rawmqtt.Connect(false, rawmqtt.Options{ID: h.client})
	inbox := rawmqtt.Subscribe(false, 1, 1, "sealmq/"+h.client+"/in")
	hello, err := (&hubproto.HelloRequest{Epoch: [hubproto.EpochLen]byte{1}}).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	greet := rawmqtt.Publish(false, 2, "sealmq/"+h.client+"/out", 2,
		route.AppendFrame(nil, &route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello}))

	// A device gets through, or the rest of this is about nothing.
	c, r := h.upgraded(f, upgrade)
	if _, err := c.Write(message(login)); err != nil {
		f.Fatal(err)
	}
	answer := make([]byte, 6)
	if _, err := io.ReadFull(r, answer); err != nil || !bytes.Equal(answer, []byte{0x82, 4, 0x20, 2, 0, 0}) {
		f.Fatalf("answer %x, %v", answer, err)
	}
	_ = c.Close()

	for how, b := range [][]byte{
		[]byte(upgrade), message(login), login, bytes.Join([][]byte{inbox, greet}, nil),
		[]byte("GET / HTTP/1.1\r\n\r\n"), []byte("\x89\x80\x00\x00\x00\x00\x8a\x80\x00\x00\x00\x00\x88\x82\x00\x00\x00\x00\x03\xe8"), {0xe0, 0}, greet,
		[]byte(strings.Replace(upgrade, "mqtt\r\n", "chat\r\n", 1)), {0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		bytes.Join([][]byte{login, inbox}, nil), rawmqtt.Publish(false, 0, "elsewhere", 0, []byte("x")),
		[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), {0x02, 0x81, 0, 0, 0, 0, 0x10, 0x80, 0x81, 0, 0, 0, 0, 0}, {0x10, 0xff, 0xff, 0xff, 0x7f}, {0x30, 0xff, 0xff, 0xff, 0xff, 0x7f},
	} {
		f.Add(byte(how), b)
	}
	f.Fuzz(func(t *testing.T, how byte, b []byte) {
		var c net.Conn
		var parts [][]byte
		if how%4 == 0 {
			c = h.dial(t, h.web)
		} else {
			c, _ = h.upgraded(t, upgrade)
		}
		switch how % 4 {
		case 0, 1:
			parts = [][]byte{b}
		case 2:
			parts = [][]byte{message(b)}
		case 3: // in pieces
			parts = [][]byte{message(login), message(inbox)}
			for size := 1 + 16*int(how/4); len(b) > 0; b = b[min(size, len(b)):] {
				parts = append(parts, message(b[:min(size, len(b))]))
			}
		}
		talk(t, c, parts...)
		h.well(t)
	})
}

// FuzzTCP sends whatever to the port for Ockam peers: from the first byte, behind it, and
// as the body of a frame, three times on one connection. The hub does not panic, ends
// what is over, and serves others.
func FuzzTCP(f *testing.F) {
	h := newFuzzHub(f)
	body := func(b []byte) []byte { return append(route.AppendFrameHeader(nil, len(b)), b...) }
	frame := func(onward, ret route.Route, payload []byte) []byte {
		return route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload})
	}
	register := frame(route.To("forwarding_service"), route.To("M"), bare.AppendString(nil, "register"))
	for how, b := range [][]byte{
		{route.Preamble}, body(frame(route.To("echo"), route.To("x"), []byte("hi"))), register,
		append([]byte{route.Preamble}, body(register)...), {0, 0, 0, 0}, frame(route.To("static_forwarding_service"), route.To("M"), bare.AppendString(nil, "a")),
		[]byte("GET / HTTP/1.1\r\n\r\n"), {0xff, 0xff, 0xff, 0xff}, frame(route.To("api"), route.To("x"), make([]byte, 32)),
		{2}, {0, 0, 0, 9, 1, 2, 3}, frame(nil, nil, nil),
		bytes.Repeat([]byte{route.Preamble}, 9), {1, 0, 0, 0}, frame(route.To("lookup"), route.To("x"), []byte{0xa2, 0, 1, 1, 0x61, 'x'}),
	} {
		f.Add(byte(how), b)
	}
	f.Fuzz(func(t *testing.T, how byte, b []byte) {
		first := []byte{route.Preamble}
		switch how % 3 {
		case 0:
			talk(t, h.dial(t, h.TCPAddr().String()), b)
		case 1:
			talk(t, h.dial(t, h.TCPAddr().String()), first, b)
		case 2:
			if len(b) > 0 {
				talk(t, h.dial(t, h.TCPAddr().String()), first, body(b), body(b), body(b))
			}
		}
		h.well(t)
	})
}
