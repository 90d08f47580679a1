package mochibridge

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// window is how many publishes a benchmark's publisher has unacknowledged.
const benchWindow = 20

// benchPair is a publisher and a subscriber that do nothing but count.
type benchPair struct {
	pub, sub net.Conn
	packet   []byte // one PUBLISH, its identifier at idAt
	idAt     int
	size     int // bytes of one message in a delivered payload
	topic    int // length of the delivered topic
}

// publish sends n messages with QoS 1, windowed.
func (p *benchPair) publish(n int) error {
	r := bufio.NewReaderSize(p.pub, 4096)
	var ack [4]byte
	buf := make([]byte, 0, benchWindow*len(p.packet))
	for sent, acked := 0, 0; acked < n; {
		buf = buf[:0]
		for sent < n && sent-acked < benchWindow {
			at := len(buf)
			buf = append(buf, p.packet...)
			binary.BigEndian.PutUint16(buf[at+p.idAt:], uint16(sent%60000+1))
			sent++
		}
		if _, err := p.pub.Write(buf); err != nil {
			return err
		}
		for acked < sent {
			if _, err := io.ReadFull(r, ack[:]); err != nil {
				return err
			}
			acked++
			if r.Buffered() < 4 {
				break
			}
		}
	}
	return nil
}

// receive counts n messages and acknowledges them.
func (p *benchPair) receive(n int) error {
	r := bufio.NewReaderSize(p.sub, 64<<10)
	acks := make([]byte, 0, 4096)
	for got := 0; got < n; {
		first, err := r.ReadByte()
		if err != nil {
			return err
		}
		length, err := binary.ReadUvarint(r)
		if err != nil {
			return err
		}
		head := 2 + p.topic
		if first>>4 != rawmqtt.PUBLISH {
			return fmt.Errorf("packet type %d", first>>4)
		}
		if first&6 != 0 {
			b, err := r.Peek(head + 2)
			if err != nil {
				return err
			}
			acks = append(acks, rawmqtt.PUBACK<<4, 2, b[head], b[head+1])
			head += 2
		}
		if _, err := r.Discard(int(length)); err != nil {
			return err
		}
		got += (int(length) - head) / p.size
		if len(acks) > 0 && (r.Buffered() == 0 || len(acks) > 2000) {
			if _, err := p.sub.Write(acks); err != nil {
				return err
			}
			acks = acks[:0]
		}
	}
	return nil
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// drive sends n messages through pairs and returns the rate.
func drive(b *testing.B, pairs []*benchPair, n int) float64 {
	b.Helper()
	n = max(1, n/len(pairs))
	var wg sync.WaitGroup
	var failed atomic.Bool
	start := time.Now()
	for _, p := range pairs {
		wg.Go(func() {
			if err := p.publish(n); err != nil && !failed.Swap(true) {
				b.Error("publish:", err)
			}
		})
		wg.Go(func() {
			if err := p.receive(n); err != nil && !failed.Swap(true) {
				b.Error("receive:", err)
			}
		})
	}
	wg.Wait()
	return float64(n*len(pairs)) / time.Since(start).Seconds()
}

// stockServer is a stock mochi server without forwarding.
func stockServer(b *testing.B) *hub {
	s := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	l := listeners.NewTCP(listeners.Config{ID: "t", Address: "127.0.0.1:0"})
	if err := s.AddHook(new(auth.AllowHook), nil); err != nil {
		b.Fatal(err)
	}
	if err := s.AddListener(l); err != nil {
		b.Fatal(err)
	}
	if err := s.Serve(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return &hub{Server: s, addr: l.Address()}
}

// stockPairs are ordinary clients of such a server.
func stockPairs(b *testing.B, count, payload int) []*benchPair {
	h := stockServer(b)
	pairs := make([]*benchPair, count)
	for i := range pairs {
		topic := fmt.Sprintf("bench/%02d/in", i)
		sub := h.login(b, false, rawmqtt.Options{ID: nth("s", i)})
		if _, err := sub.Sub(1, 1, topic); err != nil {
			b.Fatal(err)
		}
		pub := h.login(b, false, rawmqtt.Options{ID: nth("p", i)})
		pairs[i] = &benchPair{
			pub: pub.Conn, sub: sub.Conn, packet: rawmqtt.Publish(false, 1<<1, topic, 1, make([]byte, payload)),
			size: payload, topic: len(topic),
		}
		pairs[i].idAt = len(pairs[i].packet) - payload - 2
		_ = pub.SetDeadline(time.Time{})
		_ = sub.SetDeadline(time.Time{})
	}
	return pairs
}

// devicePairs are devices of a hub.
func devicePairs(b *testing.B, count, payload int, change func(*setup)) []*benchPair {
	return pairsOf(b, newHub(b, change), count, payload)
}

func pairsOf(b *testing.B, h *hub, count, payload int) []*benchPair {
	pairs := make([]*benchPair, count)
	for i := range pairs {
		sub, pub := h.device(b, fmt.Sprintf("s%02d", i), false), h.device(b, fmt.Sprintf("p%02d", i), false)
		f := route.Frame{Onward: route.To(h.b.HubAddress(sub.name), "app"), Payload: make([]byte, payload)}
		body := route.AppendFrame(nil, &f)
		out := route.Frame{Onward: route.To("app"), Return: route.To(h.b.HubAddress(pub.name)), Payload: f.Payload}
		pairs[i] = &benchPair{
			pub: pub.Conn, sub: sub.Conn, packet: rawmqtt.Publish(false, 1<<1, "sealmq/"+pub.name+"/out", 1, body),
			size: out.EncodedLen(), topic: len("sealmq/" + sub.name + "/in"),
		}
		pairs[i].idAt = len(pairs[i].packet) - len(body) - 2
		_ = pub.SetDeadline(time.Time{})
		_ = sub.SetDeadline(time.Time{})
	}
	return pairs
}

// BenchmarkForward sends messages from publishers to subscribers, each pair on
// its own, closed loop with a window of 20, generator and server in one process.
// "x-stock" is the rate against stock mochi without forwarding, measured in the
// same run; "cpu-ns/msg" is the whole process, generator included.
func BenchmarkForward(b *testing.B) {
	for _, tc := range []struct {
		payload, pairs int
	}{{64, 50}, {64, 1}, {1024, 50}, {16 << 10, 10}} {
		var stock float64
		run := func(name string, pairs func(b *testing.B) []*benchPair) {
			b.Run(fmt.Sprintf("qos=1/bytes=%d/pairs=%d/%s", tc.payload, tc.pairs, name), func(b *testing.B) {
				p := pairs(b)
				b.ResetTimer()
				before := cpu()
				rate := drive(b, p, b.N)
				b.StopTimer()
				if name == "stock" {
					stock = rate
				}
				b.ReportMetric(rate, "msg/s")
				b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/msg")
				if stock > 0 {
					b.ReportMetric(rate/stock, "x-stock")
				}
				for _, c := range p {
					_ = c.pub.Close()
					_ = c.sub.Close()
				}
			})
		}
		run("stock", func(b *testing.B) []*benchPair { return stockPairs(b, tc.pairs, tc.payload) })
		run("read", func(b *testing.B) []*benchPair {
			return devicePairs(b, tc.pairs, tc.payload, func(s *setup) { s.hook.noTap = true })
		})
		run("tap", func(b *testing.B) []*benchPair {
			return devicePairs(b, tc.pairs, tc.payload, func(*setup) {})
		})
	}
}
