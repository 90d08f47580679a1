package mochibridge

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// durability is what a benchmark keeps frames in.
type durability struct {
	name string
	mode store.Mode
	disk bool
}

var durabilities = []durability{
	{name: "memory"},
	{name: "interval", mode: store.SyncInterval, disk: true},
	{name: "always", mode: store.SyncAlways, disk: true},
}

// setup changes a hub to keep its frames so. The store outlives the hub.
func (d durability) setup(b testing.TB) func(*setup) {
	return func(s *setup) {
		if !d.disk {
			return
		}
		st, _, err := store.Open(b.TempDir(), store.Options{Mode: d.mode})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := st.Close(); err != nil {
				b.Error(err)
			}
		})
		s.bridge.Outboxes, s.bridge.Journal = st.Outbox, st
	}
}

// BenchmarkDurability is BenchmarkForward for the modes of durability: "x-stock" is the
// rate against stock mochi without forwarding, "x-memory" that against queues in memory.
// Each is measured in turns with what it is compared with, and is the median of the turns,
// so that a machine which is slower for a while is so for both.
func BenchmarkDurability(b *testing.B) {
	const turns = 11
	type side struct {
		unit  string
		part  int // of the messages, for one that is slow
		pairs func(b *testing.B) []*benchPair
	}
	for _, tc := range []struct{ payload, pairs int }{{64, 50}, {1024, 50}} {
		run := func(d durability, others ...side) {
			b.Run(fmt.Sprintf("qos=1/bytes=%d/pairs=%d/%s", tc.payload, tc.pairs, d.name), func(b *testing.B) {
				mine := devicePairs(b, tc.pairs, tc.payload, d.setup(b))
				all := mine
				theirs := make([][]*benchPair, len(others))
				ratios := make([][]float64, len(others))
				for i, o := range others {
					theirs[i] = o.pairs(b)
					all = append(all, theirs[i]...)
				}
				n := max(1, b.N/turns)
				var used time.Duration
				var rates []float64
				b.ResetTimer()
				for range turns {
					before := cpu()
					rate := drive(b, mine, n)
					used += cpu() - before
					rates = append(rates, rate)
					b.StopTimer()
					for i, o := range others {
						ratios[i] = append(ratios[i], rate/drive(b, theirs[i], max(1, n/o.part)))
					}
					b.StartTimer()
				}
				b.StopTimer()
				b.ReportMetric(median(rates), "msg/s")
				b.ReportMetric(float64(used)/float64(turns*n), "cpu-ns/msg")
				for i, o := range others {
					b.ReportMetric(median(ratios[i]), o.unit)
				}
				for _, c := range all {
					_ = c.pub.Close()
					_ = c.sub.Close()
				}
			})
		}
		stock := side{"x-stock", 8, func(b *testing.B) []*benchPair { return stockPairs(b, tc.pairs, tc.payload) }}
		memory := side{"x-memory", 1, func(b *testing.B) []*benchPair { return devicePairs(b, tc.pairs, tc.payload, durabilities[0].setup(b)) }}
		run(durabilities[0], stock)
		for _, d := range durabilities[1:] {
			run(d, stock, memory)
		}
	}
}

func median(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}

// BenchmarkLatency sends 2,000 messages a second, 64 bytes, QoS 1, spread over 50
// pairs: "p50-us" and "p99-us" are from the publish to the arrival, "ack-p99-us" to
// the PUBACK, which waits for the disk where there is one.
func BenchmarkLatency(b *testing.B) {
	const pairs, rate, payload = 50, 2000, 64
	run := func(name string, make func(b *testing.B) []*benchPair) {
		b.Run(name, func(b *testing.B) {
			p := make(b)
			b.ResetTimer()
			before, start := cpu(), time.Now()
			m := paced(b, p, b.N, rate)
			took := time.Since(start)
			b.StopTimer()
			b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/msg")
			b.ReportMetric(float64(b.N)/took.Seconds(), "msg/s")
			for _, q := range []struct {
				name string
				list []time.Duration
				at   float64
			}{{"p50-us", m.arrive, .5}, {"p99-us", m.arrive, .99}, {"ack-p50-us", m.ack, .5}, {"ack-p99-us", m.ack, .99}} {
				slices.Sort(q.list)
				b.ReportMetric(float64(q.list[int(float64(len(q.list)-1)*q.at)].Nanoseconds())/1000, q.name)
			}
			for _, c := range p {
				_ = c.pub.Close()
				_ = c.sub.Close()
			}
		})
	}
	run("stock", func(b *testing.B) []*benchPair { return stockPairs(b, pairs, payload) })
	for _, d := range durabilities {
		run(d.name, func(b *testing.B) []*benchPair { return devicePairs(b, pairs, payload, d.setup(b)) })
	}
}

type latencies struct{ arrive, ack []time.Duration }

// paced sends n messages at a rate, one after the other from pair to pair, and
// returns how long each took.
func paced(b *testing.B, pairs []*benchPair, n int, rate float64) latencies {
	b.Helper()
	sent := make([]time.Time, n)
	out := latencies{make([]time.Duration, n), make([]time.Duration, n)}
	per := func(i int) int { return (n - i + len(pairs) - 1) / len(pairs) }
	var wg sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			b.Error(err)
		}
	}
	for i, p := range pairs {
		wg.Go(func() {
			var ack [4]byte
			for k := range per(i) {
				if _, err := io.ReadFull(p.pub, ack[:]); err != nil {
					fail(err)
					return
				}
				out.ack[k*len(pairs)+i] = time.Since(sent[k*len(pairs)+i])
			}
		})
		wg.Go(func() {
			k := 0
			fail(p.each(per(i), func() {
				out.arrive[k*len(pairs)+i] = time.Since(sent[k*len(pairs)+i])
				k++
			}))
		})
	}
	start := time.Now()
	wait := time.NewTimer(0)
	defer wait.Stop()
	for k := range n {
		<-wait.C
		p := pairs[k%len(pairs)]
		binary.BigEndian.PutUint16(p.packet[p.idAt:], uint16(k/len(pairs)%60000+1))
		sent[k] = time.Now()
		if _, err := p.pub.Write(p.packet); err != nil {
			fail(err)
			break
		}
		wait.Reset(time.Until(start.Add(time.Duration(float64(k+1) / rate * float64(time.Second)))))
	}
	wg.Wait()
	return out
}

// each calls f for each of n messages, and acknowledges packet by packet.
func (p *benchPair) each(n int, f func()) error {
	r := bufio.NewReaderSize(p.sub, 64<<10)
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
		if first&6 == 0 { // the answer to hello
			if _, err := r.Discard(int(length)); err != nil {
				return err
			}
			continue
		}
		b, err := r.Peek(head + 2)
		if err != nil {
			return err
		}
		ack := []byte{0x40, 2, b[head], b[head+1]}
		head += 2
		if _, err := r.Discard(int(length)); err != nil {
			return err
		}
		for range (int(length) - head) / p.size {
			f()
			got++
		}
		if _, err := p.sub.Write(ack); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkQueued has 1,000 messages of 64 bytes wait for each of 100 devices that are away:
// "heap-B/msg" is what one of them costs in memory, its own bytes and routes included, and
// "x-stock" that against what a stock mochi keeps for offline sessions, in the same run.
func BenchmarkQueued(b *testing.B) {
	const devices, each, payload = 100, 1000, 64
	// heap waits until what servers and connections before have left behind is gone, to a
	// byte for each message.
	heap := func() float64 {
		last := int64(0)
		for range 100 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			now := int64(m.HeapAlloc)
			if now > last-devices*each && now < last+devices*each {
				break
			}
			last = now
			time.Sleep(100 * time.Millisecond)
		}
		return float64(last)
	}
	var stock float64
	// run measures what fill leaves behind, which publishes each of the messages to a device.
	run := func(name string, start func(b *testing.B) (h *hub, fill func(device int) *benchPair, queued func() int64)) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				h, fill, queued := start(b)
				before := heap()
				for i := range devices {
					if err := fill(i).publish(each); err != nil {
						b.Fatal(err)
					}
				}
				if n := queued(); n != devices*each {
					b.Fatalf("%d are queued", n)
				}
				cost := (heap() - before) / devices / each
				if name == "stock" {
					stock = cost
				}
				b.ReportMetric(cost, "heap-B/msg")
				b.ReportMetric(0, "ns/op")
				if stock > 0 {
					b.ReportMetric(cost/stock, "x-stock")
				}
				runtime.KeepAlive(h)
			}
		})
	}
	run("stock", func(b *testing.B) (*hub, func(int) *benchPair, func() int64) {
		h := stockServer(b)
		topic := func(i int) string { return fmt.Sprintf("bench/%02d/in", i) }
		for i := range devices {
			sub := h.login(b, false, rawmqtt.Options{ID: nth("s", i), Keep: true})
			if _, err := sub.Sub(1, 1, topic(i)); err != nil {
				b.Fatal(err)
			}
			h.gone(b, nth("s", i), sub)
		}
		pub := h.login(b, false, rawmqtt.Options{ID: "filler"})
		_ = pub.SetDeadline(time.Time{})
		return h, func(i int) *benchPair {
			p := &benchPair{pub: pub.Conn, packet: rawmqtt.Publish(false, 1<<1, topic(i), 1, make([]byte, payload))}
			p.idAt = len(p.packet) - payload - 2
			return p
		}, func() int64 { return atomic.LoadInt64(&h.Info.Inflight) }
	})
	for _, d := range durabilities[:2] {
		run(d.name, func(b *testing.B) (*hub, func(int) *benchPair, func() int64) {
			h := newHub(b, d.setup(b))
			for i := range devices {
				_ = h.device(b, nth("s", i), false).Close()
			}
			pub := h.device(b, "filler", false)
			_ = pub.SetDeadline(time.Time{})
			pub.auto = false
			return h, func(i int) *benchPair {
				f := route.Frame{Onward: route.To(h.b.HubAddress(nth("s", i)), "app"), Payload: make([]byte, payload)}
				body := route.AppendFrame(nil, &f)
				p := &benchPair{pub: pub.Conn, packet: rawmqtt.Publish(false, 1<<1, "sealmq/filler/out", 1, body)}
				p.idAt = len(p.packet) - len(body) - 2
				return p
			}, func() int64 { return h.b.Counters().Queued }
		})
	}
}

// gone ends a client's connection, and waits until a stock server has seen that.
func (h *hub) gone(b *testing.B, id string, c *rawmqtt.Client) {
	_ = c.Close()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if cl, ok := h.Clients.Get(id); !ok || cl.Closed() {
			return
		}
	}
	b.Fatal("a connection does not end")
}

// BenchmarkDrain fills the queues of 1,000 devices that are away with 1,000 frames
// each, connects them all, and measures what a pair beside them sees meanwhile:
// "worst-ms" is its longest round trip.
func BenchmarkDrain(b *testing.B) {
	for _, d := range durabilities {
		b.Run(d.name, func(b *testing.B) {
			for b.Loop() {
				drainOnce(b, d)
			}
		})
	}
}

func drainOnce(b *testing.B, d durability) {
	b.StopTimer()
	const devices, each, payload = 1000, 1000, 64
	h := newHub(b, d.setup(b), func(s *setup) {
		s.bridge.HelloRate, s.bridge.HelloBurst = 1e6, 1e6
	})
	names := make([]string, devices)
	for i := range names {
		names[i] = fmt.Sprintf("sleeper%04d", i)
		_ = h.device(b, names[i], false).Close()
	}
	pub := h.device(b, "filler", false)
	_ = pub.SetDeadline(time.Time{})
	pub.auto = false
	size := 0
	for _, name := range names {
		f := route.Frame{Onward: route.To(h.b.HubAddress(name), "app"), Payload: make([]byte, payload)}
		body := route.AppendFrame(nil, &f)
		out := route.Frame{Onward: route.To("app"), Return: route.To(h.b.HubAddress("filler")), Payload: f.Payload}
		size = out.EncodedLen()
		p := &benchPair{pub: pub.Conn, packet: rawmqtt.Publish(false, 1<<1, "sealmq/filler/out", 1, body)}
		p.idAt = len(p.packet) - len(body) - 2
		if err := p.publish(each); err != nil {
			b.Fatal(err)
		}
	}
	if c := h.b.Counters(); c.Queued != devices*each {
		b.Fatalf("%d queued", c.Queued)
	}
	live := pairsOf(b, h, 1, payload)[0]
	sleepers := make([]net.Conn, devices)
	for i, name := range names {
		c := h.login(b, false, rawmqtt.Options{ID: name, User: "device"})
		if _, err := c.Sub(1, 1, "sealmq/"+name+"/in"); err != nil {
			b.Fatal(err)
		}
		_ = c.SetDeadline(time.Time{})
		sleepers[i] = c.Conn
	}
	hello, err := (&hubproto.HelloRequest{}).Marshal()
	if err != nil {
		b.Fatal(err)
	}
	stop, trips := make(chan struct{}), make(chan []time.Duration)
	go func() { trips <- roundTrips(live, stop) }()
	b.StartTimer()
	start := time.Now()
	var wg sync.WaitGroup
	for i, name := range names {
		body := route.AppendFrame(nil, &route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello})
		wg.Go(func() {
			if _, err := sleepers[i].Write(rawmqtt.Publish(false, 0, "sealmq/"+name+"/out", 0, body)); err != nil {
				b.Error(err)
				return
			}
			p := &benchPair{sub: sleepers[i], size: size, topic: len("sealmq/" + name + "/in")}
			if err := p.each(each, func() {}); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	b.StopTimer()
	close(stop)
	list := <-trips
	slices.Sort(list)
	b.ReportMetric(float64(list[len(list)-1].Microseconds())/1000, "worst-ms")
	b.ReportMetric(float64(list[len(list)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(devices*each/took.Seconds(), "frames/s")
	for _, c := range sleepers {
		_ = c.Close()
	}
	b.StartTimer()
}

// roundTrips sends one message after the other, each once the one before has
// arrived and was acknowledged, until stop, and returns how long each took.
func roundTrips(p *benchPair, stop <-chan struct{}) (list []time.Duration) {
	for {
		select {
		case <-stop:
			return list
		default:
		}
		start := time.Now()
		if p.publish(1) != nil || p.each(1, func() {}) != nil {
			return list
		}
		list = append(list, time.Since(start))
	}
}
