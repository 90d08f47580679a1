package broker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// TestLimitsTakeEffect meets limits of the configuration one by one: each holds,
// and counts where /metrics and /status show it.
func TestLimitsTakeEffect(t *testing.T) {
	h := start(t, Config{Limits: Limits{
		FramesPerSecond: 5, HellosPerSecond: 1, GuestHellosPerAddress: 1, Subscriptions: 2, TopicLevels: 3, TopicBytes: 64, Retained: 1, Sessions: 6,
		Observers: 1, ClientsPerIdentity: 2, ArrivingBytes: 100 << 10, Memory: 256 << 20,
	}})
	addr := h.MQTTAddr().String()
	open := func(o rawmqtt.Options) (*rawmqtt.Client, byte) {
		t.Helper()
		c, err := rawmqtt.Dial(addr, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		p, err := c.Login(o)
		if err != nil {
			t.Fatal(err)
		}
		return c, p.Code()
	}
	send := func(c *rawmqtt.Client, b []byte) {
		t.Helper()
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	counted := func(name string, atLeast float64) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for h.Status().Counters[name] < atLeast {
			select {
			case <-deadline:
				t.Fatalf("%s is %v, want %v", name, h.Status().Counters[name], atLeast)
			case <-time.After(5 * time.Millisecond):
			}
		}
	}

	id := "I" + strings.Repeat("ab", 32)
	d, code := open(rawmqtt.Options{ID: id})
	if code != 0 {
		t.Fatal(code)
	}
	frame := route.AppendFrame(nil, &route.Frame{Onward: route.To("nobody"), Return: route.To("x"), Payload: []byte("x")})
	for i := range uint16(10) {
		send(d, rawmqtt.Publish(false, 2, "sealmq/"+id+"/out", i+1, frame))
		send(d, rawmqtt.Publish(false, 0, "sealmq/"+id+"/out", 0, frame))
	}
	counted("sealmq_packets_throttled_total", 1)
	counted("sealmq_frames_dropped_total{reason=throttled}", 1)
	for range 10 { // all are acknowledged in the end
		if _, err := d.Expect(rawmqtt.PUBACK); err != nil {
			t.Fatal(err)
		}
	}
	if _, code := open(rawmqtt.Options{ID: id + "-b"}); code != 0 {
		t.Error("a second client id:", code)
	}
	if _, code := open(rawmqtt.Options{ID: id + "-c"}); code != 3 {
		t.Error("a third client id:", code)
	}
	counted("sealmq_topic_events_total{event=refused-full}", 1)

	c, _ := open(rawmqtt.Options{ID: "c"})
	for i, want := range []byte{0, 0, 0x80} {
		if p, err := c.Sub(uint16(i+1), 0, fmt.Sprint("f", i)); err != nil || p.Code() != want {
			t.Errorf("subscription %d: %v %v", i, p, err)
		}
	}
	counted("sealmq_mqtt_events_total{event=subscriptions-full}", 1)
	if p, err := c.Sub(9, 0, "a/b/c/d"); err != nil || p.Code() != 0x80 {
		t.Error("deep filter:", p, err)
	}
	counted("sealmq_mqtt_events_total{event=filter-refused}", 1)
	send(c, rawmqtt.Publish(false, 1, "r/1", 0, []byte("x")))
	send(c, rawmqtt.Publish(false, 1, "r/2", 0, []byte("x")))
	counted("sealmq_mqtt_events_total{event=retained-full}", 1)

	for i, want := range []byte{0, 0x80} {
		o, _ := open(rawmqtt.Options{ID: fmt.Sprint("o", i)})
		if p, err := o.Sub(1, 0, "sealmq/#"); err != nil || p.Code() != want {
			t.Errorf("observer %d: %v %v", i, p, err)
		}
	}
	counted("sealmq_topic_events_total{event=observers-full}", 1)

	for i := range 8 {
		if _, code := open(rawmqtt.Options{ID: fmt.Sprint("kept", i), Keep: true}); code != 0 && code != 3 {
			t.Error(code)
		}
	}
	counted("sealmq_mqtt_events_total{event=sessions-full}", 1)

	half, _ := open(rawmqtt.Options{ID: "half"})
	_, _ = half.Write(rawmqtt.Publish(false, 0, "h", 0, make([]byte, 150<<10))) // it may be closed before the end
	counted("sealmq_mqtt_events_total{event=input-full}", 1)

	guest := func(host byte) (answered bool) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}}
		nc, err := d.DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		g := rawmqtt.New(nc, false)
		defer g.Close()
		name := hubproto.GuestName()
		if p, err := g.Login(rawmqtt.Options{ID: name, User: hubproto.GuestUser}); err != nil || p.Code() != 0 {
			t.Fatal(p, err)
		}
		body, err := (&hubproto.HelloRequest{}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		hello := route.AppendFrame(nil, &route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: body})
		send(g, rawmqtt.Publish(false, 2, "sealmq/"+name+"/out", 1, hello))
		for {
			p, err := g.ReadPacket()
			switch {
			case err != nil:
				t.Fatal(err)
			case p.Type() == rawmqtt.PUBACK:
				return answered
			}
			answered = true
		}
	}
	throttled := h.Status().Counters["sealmq_frames_dropped_total{reason=throttled}"]
	n := 0
	for guest(1) { // on a slow machine the burst of four is not over with the fifth
		if n++; n > 100 {
			t.Fatal("guests of one address are never refused")
		}
	}
	for i := range 4 {
		if !guest(2) {
			t.Errorf("hello %d of another address is not answered", i+1)
		}
	}
	if n < 4 {
		t.Errorf("%d hellos answered", n)
	}
	counted("sealmq_frames_dropped_total{reason=throttled}", throttled+1)

	if n := debug.SetMemoryLimit(-1); n != 256<<20/10*9 {
		t.Errorf("memory limit of the runtime: %d", n)
	}
	stop(t, h)
	if n := debug.SetMemoryLimit(-1); n == 256<<20/10*9 {
		t.Error("the memory limit outlives the hub")
	}
}

// TestConnectTimeout is met by who says nothing.
func TestConnectTimeout(t *testing.T) {
	h := start(t, Config{Limits: Limits{ConnectTimeout: 50 * time.Millisecond}})
	silent, err := rawmqtt.Dial(h.MQTTAddr().String(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := silent.ReadPacket(); !errors.Is(err, io.EOF) {
		t.Errorf("the hub lets it stay: %v", err)
	}
	if n := h.Status().Counters["sealmq_mqtt_events_total{event=connect-timeout}"]; n != 1 {
		t.Errorf("counted %v times", n)
	}
}

// TestLimitsAreHandedOn to those who hold them.
func TestLimitsAreHandedOn(t *testing.T) {
	var c bridge.Config
	Limits{ForwardersPerIdentity: 5, ForwardersPerConnection: 3, GuestHellosPerAddress: 7, GuestHellosPerSecond: 9}.bridge(&c)
	got := []int{c.ForwardersPerIdentity, c.ForwardersPerPort, int(c.GuestRate), c.GuestBurst, int(c.GuestTotalRate), c.GuestTotalBurst}
	if want := []int{5, 3, 7, 28, 9, 18}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	file := filepath.Join(t.TempDir(), "passwords")
	if err := os.WriteFile(file, []byte("u:"+hashed(t, "pw")+":user\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, Config{PasswordFile: file, Limits: Limits{LoginsWaiting: 6}})
	if h.gate.turns.most != 6 || h.proofs.turns.most != 6 {
		t.Errorf("%d and %d may wait", h.gate.turns.most, h.proofs.turns.most)
	}
}
