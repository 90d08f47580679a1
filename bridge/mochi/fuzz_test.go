package mochibridge

import (
	"bytes"
	"encoding/binary"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// hostile are packets that crashed servers, end too early, lie about lengths, or
// break a rule; and some good ones to begin from.
func hostile() [][]byte {
	echo := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("x"), Payload: []byte("hi")})
	hello, _ := (&hubproto.HelloRequest{}).Marshal()
	greet := route.AppendFrame(nil, &route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello})
	register := route.AppendFrame(nil, &route.Frame{Onward: route.To("forwarding_service"), Return: route.To("M"), Payload: []byte("\x08register")})
	in, out := "sealmq/evil/in", "sealmq/evil/out"
	return [][]byte{
		{0x82, 0x08, 0x00, 0x01, 0x00, 0x00, 0x03, 'a', '/', 'b'},
		{0x30, 0x00}, {0x32, 0x02, 0xff, 0xff}, {0x40, 0x00}, {0x40, 0x01, 0x80}, {0x4f, 0x02, 0x80, 0x00}, {0x62, 0x00}, {0x00, 0x00}, {0xf0, 0x00},
		{0x30, 0xff, 0xff, 0xff, 0xff, 0x7f}, {0x30, 0xff, 0xff, 0xff, 0x7f, 0x00}, {0xa2, 0x06, 0x00, 0x01, 0x00, 0x00, 0x05, 'a'},
		rawmqtt.Publish(true, 0, "", 0, []byte("x"), 35, 0, 9),
		append(rawmqtt.Subscribe(true, 1, 1, in), rawmqtt.Publish(true, 2, out, 1, greet)...),
		append(rawmqtt.Subscribe(false, 1, 1, in), rawmqtt.Publish(false, 2, out, 1, greet)...),
		bytes.Join([][]byte{
			rawmqtt.Subscribe(false, 1, 1, in, "sealmq/#", "#", "$share/g/sealmq/+/in"), rawmqtt.Publish(false, 2, out, 1, greet),
			rawmqtt.Publish(false, 2, out, 2, append(echo, echo...)), rawmqtt.Publish(false, 0, out, 0, register), rawmqtt.Ack(rawmqtt.PUBACK, 0x8000),
			rawmqtt.Ack(rawmqtt.PUBREC, 0x8001), rawmqtt.Unsubscribe(false, 3, in),
		}, nil),
		bytes.Join([][]byte{
			rawmqtt.Publish(true, 0, out, 0, echo, 35, 0, 1), rawmqtt.Publish(true, 2, "", 5, echo, 35, 0, 1), rawmqtt.Publish(true, 4, out, 6, echo),
			rawmqtt.Publish(true, 3, "sealmq/alice/in", 7, echo), rawmqtt.Frame(rawmqtt.DISCONNECT<<4, []byte{4}),
		}, nil),
		rawmqtt.Publish(false, 1, "sealmq/hub/forwarders/x", 0, []byte("{}")),
	}
}

// FuzzPackets sends whatever follows a CONNECT, as a device, an ordinary client
// or an observer, in MQTT 3.1.1 or 5, and before a CONNECT. The hook may not
// panic, nothing may get under the root in mochi's stores, and every frame has a
// fate. Panics of mochi's own decoder cost the attacker's connection.
func FuzzPackets(f *testing.F) {
	for _, b := range hostile() {
		for how := range byte(8) {
			f.Add(how, b)
		}
	}
	h := newHub(f, func(s *setup) { s.listener.Linger = time.Millisecond })
	bystander := h.device(f, "alice", false)
	f.Fuzz(func(t *testing.T, how byte, b []byte) {
		v5 := how&1 != 0
		user := []string{"device", "", "observer", "none"}[how>>1&3]
		c := h.dial(t, v5)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if user != "none" {
			if p, err := c.Login(rawmqtt.Options{ID: strings.TrimSuffix("evil-"+user, "-device"), User: user}); err != nil || p.Code() != 0 {
				t.Fatal(p, err)
			}
		}
		_, _ = c.Write(b)
		_ = c.Conn.(*net.TCPConn).CloseWrite()
		for buf := make([]byte, 4096); ; {
			if _, err := c.Conn.Read(buf); err != nil {
				break
			}
		}
		if n := h.hook.Counters().Count(HookPanicked) + h.c.Count(guard.HookPanicked); n != 0 {
			t.Fatal("the hook panicked")
		}
		for topic := range h.Topics.Retained.GetAll() {
			if strings.HasPrefix(topic, "sealmq/") {
				t.Fatalf("retained: %q", topic)
			}
		}
		bystander.t = t
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		bystander.to("alice", string(n[:]))
		bystander.want(string(n[:]))
	})
}
