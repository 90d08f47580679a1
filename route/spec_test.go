package route

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// unhex decodes hexadecimal digits with blanks anywhere.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	replyHex = "820058203031323334353637383961626364656630313233343536373839616263646566" // spec routing 3.7
	reply    = "0123456789abcdef0123456789abcdef"
	mHex     = "820058206130613161326133613461356136613761386139616161626163616461656166" // spec routing 6.2
	regM     = "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
	helloHex = "4d0c48656c6c6f204f636b616d21"
	hello    = "\x0cHello Ockam!"
	fwdHex   = "8200544657445f30313233343536373839616263646566"
	fwd      = "FWD_0123456789abcdef"
	connHex  = "8200565443505f485f30303131323233333434353536366666"
	conn     = "TCP_H_00112233445566ff"
	conn2Hex = "8200565443505f485f38383939616162626363646465653030"
	conn2    = "TCP_H_8899aabbccddee00"
	echoHex  = "8200466563686f6572"
)

// TestSpecExamples decodes and encodes the hand-worked frames of the spec.
func TestSpecExamples(t *testing.T) {
	for _, c := range []struct {
		name  string
		frame string // with length
		want  Frame
	}{
		{
			"routing 3.5 heartbeat", "00000005 84808040f6",
			Frame{Payload: []byte{}},
		},
		{
			"routing 3.7 request", "00000041 84 81" + echoHex + "81" + replyHex + helloHex + "627b7d",
			Frame{To("echoer"), To(reply), []byte(hello)},
		},
		{
			"routing 3.7 answer", "0000003f 84 81" + replyHex + "81" + echoHex + helloHex + "f6",
			Frame{To(reply), To("echoer"), []byte(hello)},
		},
		{
			"routing 6.2 dynamic", "00000049 84 81 820052666f7277617264696e675f73657276696365 81" + mHex + "49087265676973746572 627b7d",
			Frame{To("forwarding_service"), To(regM), []byte("\x08register")},
		},
		{
			"routing 6.2 static", "0000004e 84 81 820058197374617469635f666f7277617264696e675f73657276696365 81" + mHex + "4605616c696365 627b7d",
			Frame{To("static_forwarding_service"), To(regM), []byte("\x05alice")},
		},
		{
			"routing 6.4 dynamic, Elixir", "00000049 84 81" + mHex + "81" + fwdHex + "49087265676973746572 f6",
			Frame{To(regM), To(fwd), []byte("\x08register")},
		},
		{
			"routing 6.4 static, Rust", "0000004d 84 81" + mHex + "81 820050666f72776172645f746f5f616c696365 5110666f72776172645f746f5f616c696365 f6",
			Frame{To(regM), To("forward_to_alice"), []byte("\x10forward_to_alice")},
		},
		{
			"routing 6.4 static, Elixir", "00000042 84 81" + mHex + "81 820050666f72776172645f746f5f616c696365 4605616c696365 f6",
			Frame{To(regM), To("forward_to_alice"), []byte("\x05alice")},
		},
		{
			"routing 6.5 A to hub", "00000058 84 82" + fwdHex + echoHex + "81" + replyHex + helloHex + "627b7d",
			Frame{To(fwd, "echoer"), To(reply), []byte(hello)},
		},
		{
			"routing 6.5 hub to B, full", "0000007e 84 82" + mHex + echoHex + "82" + connHex + replyHex + helloHex + "627b7d",
			Frame{To(regM, "echoer"), To(conn, reply), []byte(hello)},
		},
		{
			"routing 6.5 hub to B, stripped", "0000005a 84 81" + echoHex + "82" + connHex + replyHex + helloHex + "627b7d",
			Frame{To("echoer"), To(conn, reply), []byte(hello)},
		},
		{
			"routing 6.5 B to hub", "0000005a 84 82" + connHex + replyHex + "81" + echoHex + helloHex + "627b7d",
			Frame{To(conn, reply), To("echoer"), []byte(hello)},
		},
		{
			"routing 6.5 hub to A", "0000005a 84 81" + replyHex + "82" + conn2Hex + echoHex + helloHex + "627b7d",
			Frame{To(reply), To(conn2, "echoer"), []byte(hello)},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			wire := unhex(t, c.frame)
			body := wire[FrameHeaderLen:]
			if got := AppendFrameHeader(nil, len(body)); !bytes.Equal(got, wire[:FrameHeaderLen]) {
				t.Errorf("header %x, want %x", got, wire[:FrameHeaderLen])
			}
			f, err := ParseFrame(body, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if !f.Onward.Equal(c.want.Onward) || !f.Return.Equal(c.want.Return) || !bytes.Equal(f.Payload, c.want.Payload) {
				t.Errorf("decoded %+v, want %+v", f, c.want)
			}
			if again := wireLike(body, AppendFrame(nil, &c.want)); !bytes.Equal(again, body) {
				t.Errorf("encoded %x, want %x", again, body)
			}
		})
	}
}

// TestSpecAddresses: spec routing 2.1.
func TestSpecAddresses(t *testing.T) {
	for _, c := range []struct {
		hex  string
		want Address
	}{
		{"8200466563686f6572", Local("echoer")},
		{"82014e3132372e302e302e313a34303030", Address{TCP, "127.0.0.1:4000"}},
	} {
		b := append([]byte{0x81}, unhex(t, c.hex)...)
		if got := AppendRoute(nil, Route{c.want}); !bytes.Equal(got, b) {
			t.Errorf("%v encodes as %x, want %x", c.want, got, b)
		}
		r, rest, err := ParseRoute(append(b, 0xaa), Limits{})
		if err != nil || !r.Equal(Route{c.want}) || !bytes.Equal(rest, []byte{0xaa}) {
			t.Errorf("%x decodes as %v, rest %x, %v", b, r, rest, err)
		}
	}
	if got := AppendRoute(nil, nil); !bytes.Equal(got, []byte{0x80}) {
		t.Errorf("empty route is %x", got)
	}
}

// TestSpecTwoHops follows one message and its answer through a hub (spec routing
// 4.2, 6.5): each wire frame is the previous one forwarded.
func TestSpecTwoHops(t *testing.T) {
	forward := func(body []byte, pop int, front, stamp Route) []byte {
		t.Helper()
		v, err := ParseView(body, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		f, s := EncodeHops(front), EncodeHops(stamp)
		out := v.AppendForwarded(nil, pop, f, s)
		if len(out) != v.ForwardedLen(pop, f, s) {
			t.Errorf("ForwardedLen %d, want %d", v.ForwardedLen(pop, f, s), len(out))
		}
		return out
	}
	want := func(name string, got []byte, s string) {
		t.Helper()
		if !bytes.Equal(got, unhex(t, s)) {
			t.Errorf("%s:\n got %x\nwant %s", name, got, s)
		}
	}
	sent := AppendFrame(nil, &Frame{To(fwd, "echoer"), To(reply), []byte(hello)})
	full := forward(sent, 1, To(regM), To(conn))
	want("hub to B, full", full, "84 82"+mHex+echoHex+"82"+connHex+replyHex+helloHex+"f6")
	stripped := forward(sent, 1, nil, To(conn))
	want("hub to B, stripped", stripped, "84 81"+echoHex+"82"+connHex+replyHex+helloHex+"f6")

	v, err := ParseView(stripped, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	answer := v.AppendReply(nil, Hops{}, EncodeHops(To("echoer")), v.Payload())
	want("B to hub", answer, "84 82"+connHex+replyHex+"81"+echoHex+helloHex+"f6")
	back := forward(answer, 1, nil, To(conn2))
	want("hub to A", back, "84 81"+replyHex+"82"+conn2Hex+echoHex+helloHex+"f6")
}

// TestDecoderMatrix: spec routing 3.4, column Rust, row by row.
func TestDecoderMatrix(t *testing.T) {
	const r1 = "81" + echoHex // a route of one address
	onward := func(addr string) string { return "84 81" + addr + "80 40 f6" }
	for _, c := range []struct {
		name   string
		body   string
		reason Reason // 0: accepted
	}{
		{"4 elements, index 3 text", "84" + r1 + "80 40 627b7d", 0},
		{"4 elements, index 3 text that is not JSON", "84" + r1 + "80 40 63787a79", 0},
		{"4 elements, index 3 empty text", "84" + r1 + "80 40 60", 0},
		{"4 elements, index 3 null", "84" + r1 + "80 40 f6", 0},
		{"3 elements", "83" + r1 + "80 40", 0},
		{"5 elements", "85" + r1 + "80 40 f6 00", 0},
		{"7 elements of all kinds", "87" + r1 + "80 40 627b7d a16161820102 c1fb3ff0000000000000 9fff", 0},
		{"extra elements with null tracing", "86" + r1 + "80 40 f6 f7 5f4101ff", 0},
		{"empty array", "80", ReasonTooFew},
		{"2 elements", "82" + r1 + "80", ReasonTooFew},
		{"null at 0", "84 f6 80 40 f6", ReasonRoute},
		{"null at 1", "84" + r1 + "f6 40 f6", ReasonRoute},
		{"null at 2", "84" + r1 + "80 f6 f6", ReasonPayload},
		{"map", "a3 00" + r1 + "01 80 02 40", ReasonNotArray},
		{"tag in front", "c1 84" + r1 + "80 40 f6", ReasonNotArray},
		{"tag on a route", "84 c1" + r1 + "80 40 f6", ReasonRoute},
		{"tag on the payload", "84" + r1 + "80 c1 40 f6", ReasonPayload},
		{"index 3 undefined", "84" + r1 + "80 40 f7", ReasonTracing},
		{"index 3 byte string", "84" + r1 + "80 40 40", ReasonTracing},
		{"index 3 false", "84" + r1 + "80 40 f4", ReasonTracing},
		{"index 3 integer", "84" + r1 + "80 40 00", ReasonTracing},
		{"index 3 indefinite text", "84" + r1 + "80 40 7f627b7dff", ReasonTracing},
		{"address of 0 elements", onward("80"), ReasonAddress},
		{"address of 1 element", onward("81 00"), ReasonAddress},
		{"address of 3 elements", onward("83 00 4161 00"), 0},
		{"address of 4 elements, nested", onward("84 00 4161 82a1000180 f6"), 0},
		{"address as map", onward("a2 00 00 01 4161"), ReasonAddress},
		{"inner as text", onward("82 00 6161"), ReasonAddress},
		{"inner null", onward("82 00 f6"), ReasonAddress},
		{"type as byte string", onward("82 4100 4161"), ReasonAddress},
		{"type negative", onward("82 20 4161"), ReasonAddress},
		{"type 255", onward("82 18ff 4161"), 0},
		{"type 256", onward("82 190100 4161"), ReasonTransport},
		{"type 2^64-1", onward("82 1bffffffffffffffff 4161"), ReasonTransport},
		{"empty inner value", onward("82 00 40"), 0},
		{"type not shortest", onward("82 1800 4161"), 0},
		{"type in 8 bytes", onward("82 1b0000000000000001 4161"), 0},
		{"inner length not shortest", onward("82 00 580161"), 0},
		{"inner length in 8 bytes", onward("82 00 5b000000000000000161"), 0},
		{"address head not shortest", onward("9802 00 4161"), 0},
		{"outer head not shortest", "9804" + r1 + "80 40 f6", 0},
		{"outer head in 8 bytes", "9b0000000000000004" + r1 + "80 40 f6", 0},
		{"route head not shortest", "84 9801" + echoHex + "990000 40 f6", 0},
		{"payload length not shortest", "84" + r1 + "80 5a00000001 ff f6", 0},
		{"tracing length not shortest", "84" + r1 + "80 40 7b0000000000000001 7a", 0},
		{"indefinite outer, 3", "9f" + r1 + "80 40 ff", 0},
		{"indefinite outer, 4", "9f" + r1 + "80 40 f6 ff", 0},
		{"indefinite outer, 6", "9f" + r1 + "80 40 627b7d 00 80 ff", 0},
		{"indefinite outer, 2", "9f" + r1 + "80 ff", ReasonTooFew},
		{"indefinite outer, 0", "9f ff", ReasonTooFew},
		{"indefinite outer without break", "9f" + r1 + "80 40 f6", ReasonTruncated},
		{"indefinite routes", "84 9f" + echoHex + "ff 9fff 40 f6", 0},
		{"indefinite address", onward("9f 00 4161 ff"), 0},
		{"indefinite address of 3", onward("9f 00 4161 00 ff"), 0},
		{"indefinite address of 1", onward("9f 00 ff"), ReasonAddress},
		{"indefinite inner", onward("82 00 5f4161ff"), ReasonAddress},
		{"indefinite payload", "84" + r1 + "80 5f4161ff f6", ReasonPayload},
		{"break for a route in a definite array", "84 ff 80 40 f6", ReasonRoute},
		{"bytes after the item", "84" + r1 + "80 40 f6 00ff", 0},
		{"garbage after the item", "83" + r1 + "80 40 ffffff", 0},
		{"reserved head", "9c" + r1 + "80 40 f6", ReasonHead},
		{"reserved head in a route", "84 9e", ReasonHead},
		{"empty body", "", ReasonTruncated},
		{"count beyond the input", "9bffffffffffffffff 80 80 40", ReasonTruncated},
		{"route count beyond the input", "84 9affffffff 80", ReasonTruncated},
		{"extra that nests forever", "85" + r1 + "80 40 f6" + strings.Repeat("81", 1000) + "00", ReasonDepth},
		{"extra that is broken", "85" + r1 + "80 40 f6 ff", ReasonHead},
	} {
		t.Run(c.name, func(t *testing.T) {
			body := unhex(t, c.body)
			v, err := ParseView(body, Limits{})
			if c.reason == 0 {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				again := v.AppendForwarded(nil, 0, Hops{}, Hops{})
				f := v.Frame()
				if !bytes.Equal(again, AppendFrame(nil, &f)) {
					t.Errorf("View writes %x, Frame writes %x", again, AppendFrame(nil, &f))
				}
				if again[0] != 0x84 || again[len(again)-1] != 0xf6 {
					t.Errorf("re-encoded as %x", again)
				}
				w, err := ParseView(again, Limits{})
				if err != nil || !bytes.Equal(w.AppendForwarded(nil, 0, Hops{}, Hops{}), again) || w.Len() != len(again) {
					t.Errorf("not a fixed point: %x, %v", again, err)
				}
				return
			}
			var fe *FrameError
			if !errors.As(err, &fe) || fe.Reason != c.reason {
				t.Fatalf("error %v, want reason %q", err, c.reason)
			}
			if !errors.Is(err, ErrMalformed) || errors.Is(err, ErrLimit) || errors.Is(err, ErrTooLarge) {
				t.Errorf("error %v has the wrong class", err)
			}
			if fe.Offset < 0 || fe.Offset > len(body) {
				t.Errorf("offset %d of %d", fe.Offset, len(body))
			}
		})
	}
}

// TestIndex3AnyText: the tracing context is never looked at.
func TestIndex3AnyText(t *testing.T) {
	for _, n := range []int{0, 1, 23, 24, 255, 256, 70000} {
		body := append(unhex(t, "84 80 80 40"), 0x7a, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
		body = append(body, bytes.Repeat([]byte{0xff}, n)...)
		v, err := ParseView(body, Limits{})
		if err != nil || !v.IsHeartbeat() || v.Len() != len(body) {
			t.Errorf("text of %d bytes: %v", n, err)
		}
		if _, err := ParseView(body[:len(body)-1], Limits{}); !errors.Is(err, ErrMalformed) {
			t.Errorf("cut text of %d bytes: %v", n, err)
		}
	}
}
