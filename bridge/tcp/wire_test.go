package tcp

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/iotest"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/vectors"
	"github.com/sealmq/sealmq/route"
)

type capture struct {
	Sessions []struct {
		Name     string      `json:"name"`
		RustToGo vectors.Hex `json:"rust_to_go"`
		GoToRust vectors.Hex `json:"go_to_rust"`
	} `json:"sessions"`
}

// TestReplayEcho sends what stock nodes sent, in one piece and byte by byte, and
// expects the answers that they took, byte for byte (spec routing 3.7).
func TestReplayEcho(t *testing.T) {
	h := newHub(t, options{})
	n := 0
	for _, s := range vectors.Load[capture](t, "live_tcp_echo.json").Sessions {
		if s.Name == "go_dials_150" {
			continue // the stock node listens there: package device replays that
		}
		n++
		for name, pieces := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader,
		} {
			t.Run(s.Name+"/"+name, func(t *testing.T) {
				p := h.raw()
				p.t = t
				if _, err := io.Copy(struct{ io.Writer }{p}, pieces(bytes.NewReader(s.RustToGo))); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(s.GoToRust))
				p.SetReadDeadline(time.Now().Add(patience))
				if _, err := io.ReadFull(p, got); err != nil || !bytes.Equal(got, s.GoToRust) {
					t.Errorf("answer %x (%v), want %x", got, err, []byte(s.GoToRust))
				}
			})
		}
	}
	if n < 5 {
		t.Errorf("%d sessions were replayed", n)
	}
}

// TestReplayRegistration replays what stock nodes said at an independent hub: their
// registration, its answer, a message that somebody sends through the relay, and their
// answer to that (spec routing 6.2, 6.3, 6.5). What the hub says is the same but for the
// addresses that it makes up.
func TestReplayRegistration(t *testing.T) {
	h := newHub(t, options{bridge: func(c *bridge.Config) { c.StaticOverStream = true }})
	n := 0
	for _, s := range vectors.Load[capture](t, "live_relay_registration.json").Sessions {
		said, heard := bodies(t, s.RustToGo), bodies(t, s.GoToRust)
		request := parse(t, said[0])
		service := request.Onward[0].Value
		if service != "forwarding_service" && service != "static_forwarding_service" {
			continue // Go registers at a stock hub: package device replays that
		}
		n++
		t.Run(s.Name, func(t *testing.T) {
			p := h.raw()
			p.t = t
			p.write(append([]byte{route.Preamble}, framed(said[0])...))
			answer := p.next()
			if !answer.Onward.Equal(request.Return) || len(answer.Return) != 1 {
				t.Fatalf("the answer goes to %v from %v", answer.Onward, answer.Return)
			}
			relay := answer.Return[0].Value
			if got := route.AppendFrame(nil, &answer); service == "static_forwarding_service" && !bytes.Equal(got, heard[0]) {
				t.Errorf("answer %x, want %x", got, heard[0])
			} else if service == "forwarding_service" && string(answer.Payload) != string(bare.AppendString(nil, relay)) {
				t.Errorf("answer %q from %s", answer.Payload, relay)
			}
			if len(said) == 1 {
				return // that is all there is
			}

			// The capture has whole routes in front, as this hub's relays have.
			through := parse(t, heard[1])
			asker := h.connect()
			asker.t = t
			asker.send(route.To(relay).Append(through.Onward.Rest()...), through.Return.Rest(), through.Payload)
			f := p.next()
			if len(f.Return) != len(through.Return) {
				t.Fatalf("through the relay comes %v from %v", f.Onward, f.Return)
			}
			// The hub's address of the asker, here and there.
			own := f.Return[0]
			there := through.Return[0]
			through.Return[0] = own
			if got, want := route.AppendFrame(nil, &f), route.AppendFrame(nil, &through); !bytes.Equal(got, want) {
				t.Errorf("through the relay comes %x, want %x", got, want)
			}
			back := parse(t, said[1])
			if back.Onward[0] != there {
				t.Fatalf("the stock node answers to %v", back.Onward)
			}
			back.Onward[0] = own
			p.send(back.Onward, back.Return, back.Payload)
			f = asker.next()
			if !f.Onward.Equal(back.Onward.Rest()) || len(f.Return) != 2 || f.Return[1] != back.Return[0] || !bytes.Equal(f.Payload, back.Payload) {
				t.Errorf("the answer comes as %+v", f)
			}
		})
	}
	if n < 3 {
		t.Errorf("%d registrations were replayed", n)
	}
}

// bodies cuts one direction of a captured connection into frames.
func bodies(t *testing.T, stream []byte) (all [][]byte) {
	t.Helper()
	r := route.NewReader(bytes.NewReader(stream), route.Limits{})
	for {
		body, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, bytes.Clone(body))
	}
}

func parse(t *testing.T, body []byte) route.Frame {
	t.Helper()
	f, err := route.ParseFrame(bytes.Clone(body), route.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

const (
	echoHop  = "82 00 44 6563686f"
	replyHop = "82 00 41 72"
)

// TestDecoderMatrix is spec routing 3.4, column Rust, row by row, at the running
// front: what a stock node takes is answered, what it closes over closes.
func TestDecoderMatrix(t *testing.T) {
	h := newHub(t, options{})
	closes := uint64(0)
	for _, row := range []struct {
		name, body string
		ok         bool
	}{
		{"four, text", "84 81" + echoHop + "81" + replyHop + "4178 627b7d", true},
		{"four, text that is not JSON", "84 81" + echoHop + "81" + replyHop + "4178 63fff1f2", true},
		{"four, null", "84 81" + echoHop + "81" + replyHop + "4178 f6", true},
		{"three", "83 81" + echoHop + "81" + replyHop + "4178", true},
		{"five", "85 81" + echoHop + "81" + replyHop + "4178 f6 a10102", true},
		{"seven", "87 81" + echoHop + "81" + replyHop + "4178 f6 01 820304 f5", true},
		{"two", "82 81" + echoHop + "81" + replyHop, false},
		{"none", "80", false},
		{"null payload", "84 81" + echoHop + "81" + replyHop + "f6 f6", false},
		{"null return", "84 81" + echoHop + "f6 4178 f6", false},
		{"null onward", "84 f6 81" + replyHop + "4178 f6", false},
		{"map", "a4 00 81" + echoHop + "01 81" + replyHop + "02 4178 03 f6", false},
		{"tag", "d818 84 81" + echoHop + "81" + replyHop + "4178 f6", false},
		{"undefined tracing", "84 81" + echoHop + "81" + replyHop + "4178 f7", false},
		{"bytes as tracing", "84 81" + echoHop + "81" + replyHop + "4178 427b7d", false},
		{"address of one", "84 81 81 00 81" + replyHop + "4178 f6", false},
		{"address of three", "84 81 83 00 44 6563686f 05 81" + replyHop + "4178 f6", true},
		{"text as inner", "84 81 82 00 64 6563686f 81" + replyHop + "4178 f6", false},
		{"type above 255", "84 81 82 190100 44 6563686f 81" + replyHop + "4178 f6", false},
		{"long heads", "9804 9801 9802 1800 5804 6563686f 81" + replyHop + "590001 78 f6", true},
		{"indefinite arrays", "9f 9f 9f 00 44 6563686f ff ff 9f" + replyHop + "ff 4178 f6 ff", true},
		{"indefinite payload", "84 81" + echoHop + "81" + replyHop + "5f 4178 ff f6", false},
		{"indefinite inner", "84 81 82 00 5f 44 6563686f ff 81" + replyHop + "4178 f6", false},
		{"indefinite tracing", "84 81" + echoHop + "81" + replyHop + "4178 7f ff", false},
		{"bytes behind", "84 81" + echoHop + "81" + replyHop + "4178 f6 00ff01", true},
		{"cut", "84 81" + echoHop + "81" + replyHop + "4178", false},
		{"no CBOR", "ffffffff", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := h.connect()
			p.t = t
			p.body(unhex(t, row.body))
			if !row.ok {
				p.closed()
				closes++
				return
			}
			want := route.Frame{Onward: route.To("r"), Return: route.To("echo"), Payload: []byte("x")}
			if got := p.next(); !got.Onward.Equal(want.Onward) || !got.Return.Equal(want.Return) || string(got.Payload) != "x" {
				t.Errorf("answer %+v", got)
			}
			p.alive()
		})
	}
	h.counted(Malformed, closes)
	h.wantDrops(bridge.DropMalformed, closes)
}

func TestPreamble(t *testing.T) {
	h := newHub(t, options{pipes: true})                         // in which nothing leaves before it is read
	for i, first := range []string{"00", "02", "10", "474554"} { // the last is an HTTP request
		p := h.raw()
		p.write(unhex(t, first))
		p.SetReadDeadline(time.Now().Add(patience))
		if said, err := io.ReadAll(p); err != nil || !bytes.Equal(said, []byte{route.Preamble}) {
			t.Errorf("%s is answered with %x, %v", first, said, err)
		}
		h.counted(PreambleWrong, uint64(i+1))
	}
	silent := h.raw() // the hub's byte comes to who says nothing
	silent.SetReadDeadline(time.Now().Add(patience))
	var b [1]byte
	if _, err := io.ReadFull(silent, b[:]); err != nil || b[0] != route.Preamble {
		t.Errorf("the hub opens with %x, %v", b, err)
	}
	silent.Close()
	h.counted(EndedByPeer, 1)
}

// TestLengths is the framing of spec routing 3.2.
func TestLengths(t *testing.T) {
	h := newHub(t, options{})
	for i, head := range []string{"00000000", "01000001", "ffffffff"} {
		p := h.connect()
		p.write(unhex(t, head))
		p.closed()
		h.counted(Framing, uint64(i+1))
	}
	// The protocol's maximum is legal and above this hub's limit: read past.
	p := h.connect()
	p.write(unhex(t, "01000000"))
	chunk := make([]byte, 1<<20)
	for range 16 {
		p.write(chunk)
	}
	if rest := p.alive(); len(rest) != 0 {
		t.Errorf("answered with %v", rest)
	}
	h.counted(Oversized, 1)
	h.wantDrops(bridge.DropTooLarge, 1)

	for i, cut := range []string{"00", "000000", "00000041", "0000004184818200"} {
		p := h.connect()
		p.alive()
		p.write(unhex(t, cut))
		if c, ok := p.Conn.(*net.TCPConn); ok {
			_ = c.CloseWrite() // which closes everything, as at a stock peer
		}
		p.closed()
		h.counted(CutShort, uint64(i+1))
	}
}

// TestReset: a connection that is reset, inside a frame or between two, ends alone.
func TestReset(t *testing.T) {
	h := newHub(t, options{})
	other := h.connect()
	for i, cut := range []string{"", "0000004184"} {
		p := h.connect()
		p.alive()
		p.write(unhex(t, cut))
		if c, ok := p.Conn.(*net.TCPConn); ok {
			_ = c.SetLinger(0)
		}
		_ = p.Close()
		h.counted(NetworkError, uint64(i+1))
		other.alive()
	}
}

// TestLargestFrames has the limit at the protocol's own: what grows past it by
// the hub's stamp is dropped, and nobody's connection ends for it.
func TestLargestFrames(t *testing.T) {
	wide := func(l *route.Limits) { l.Frame = route.MaxFrame }
	h := newHub(t, options{
		bridge: func(c *bridge.Config) { wide(&c.Limits); c.OutboxBytes = 64 << 20 },
		server: func(c *Config) { wide(&c.Frames) },
	})
	a, b := h.connect(), h.connect()
	to := b.dynamic("m")
	body := func(size int, onward ...string) []byte {
		f := route.Frame{Onward: route.To(onward...), Return: route.To("r")}
		f.Payload = make([]byte, size-f.EncodedLen()-4) // 5a and four bytes instead of 40
		if f.EncodedLen() != size {
			t.Fatalf("a frame of %d bytes, want %d", f.EncodedLen(), size)
		}
		return route.AppendFrame(nil, &f)
	}
	a.body(body(route.MaxFrame-64, "echo"))
	if f := a.next(); !f.Onward.Equal(route.To("r")) || len(f.Payload) < route.MaxFrame-200 {
		t.Errorf("answer to %v with %d bytes", f.Onward, len(f.Payload))
	}
	a.body(body(route.MaxFrame, "echo"))
	a.body(body(route.MaxFrame, to))
	a.alive()
	h.wantDrops(bridge.DropOutgrown, 2)
	a.body(body(route.MaxFrame-64, to))
	if f := b.next(); !f.Onward.Equal(route.To("m")) || len(f.Return) != 2 {
		t.Errorf("got %v from %v", f.Onward, f.Return)
	}
	b.alive()
	equal(t, "connections", h.s.Conns(), 2)
}

// TestEvents is spec routing 3.6: what leaves the connection open.
func TestEvents(t *testing.T) {
	h := newHub(t, options{})
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	p := h.connect()
	p.write(unhex(t, "00000005 84 80 80 40 f6")) // heartbeat
	p.send(route.To("nobody", "x"), route.To("r"), nil)
	p.send(route.To("echoer"), route.To("r"), []byte{0xff})            // not a BARE string
	p.send(route.To("uppercase"), route.To("r"), []byte{5, 'a'})       // cut short
	p.send(route.To("forwarding_service"), route.To("r"), []byte{9})   // not a string
	p.send(route.To("notice"), route.To("r"), nil)                     // where notices come from
	p.send(route.To("tcp_00112233445566778899aabbccddeeff"), nil, nil) // somebody else's form
	for _, tt := range []route.Transport{route.TCP, route.UDP, route.WebSocket, route.Unix, 77} {
		hop := route.Address{Transport: tt, Value: target.Addr().String()}
		p.body(route.AppendFrame(nil, &route.Frame{Onward: route.Route{hop, route.Local("x")}, Return: route.To("r")}))
	}
	hops := make([]string, 65)
	p.send(route.To("echo"), route.To(hops...), nil) // more hops than the limit
	p.send(route.To("echo"), route.To(string(make([]byte, 256))), nil)
	if got := p.alive(); len(got) != 0 {
		t.Errorf("answered: %v", got)
	}
	h.wantDrops(bridge.DropHeartbeat, 1)
	h.wantDrops(bridge.DropUnknown, 2)
	h.wantDrops(bridge.DropForeign, 5)
	h.wantDrops(bridge.DropRequest, 3)
	h.wantDrops(bridge.DropNotice, 1)
	h.wantDrops(bridge.DropRoute, 2)
	// A hub never dials what a frame names: nobody waits to be accepted.
	_ = target.(*net.TCPListener).SetDeadline(time.Now().Add(time.Millisecond))
	if c, err := target.Accept(); err == nil {
		c.Close()
		t.Error("the hub dialled an address out of a frame")
	}
}

func TestServices(t *testing.T) {
	h := newHub(t, options{})
	p := h.connect()
	for _, tt := range []struct{ service, in, out string }{
		{"echo", "\x1b\x00\x11\x22\x33\x44\x55\x66\x77", "\x1b\x00\x11\x22\x33\x44\x55\x66\x77"}, // a session's ping
		{"echo", "", ""},
		{"echoer", "\x0cHello Ockam!", "\x0cHello Ockam!"},
		{"uppercase", "\x05hello", "\x05HELLO"},
	} {
		p.send(route.To(tt.service), route.To("a", "b"), []byte(tt.in))
		f := p.next()
		if string(f.Payload) != tt.out || !f.Onward.Equal(route.To("a", "b")) || !f.Return.Equal(route.To(tt.service)) {
			t.Errorf("%s of %q: %+v", tt.service, tt.in, f)
		}
	}
}
