package store

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// BenchmarkQueued fills 1,000 queues with 1,000 frames each, as a hub holds them for
// devices that are away: "heap-B/frame" is what one costs in memory,
// "over-B/frame" that without its own bytes, and "open-ms" how long a restart reads.
func BenchmarkQueued(b *testing.B) {
	const queues, each, size = 1000, 1000, 180 // a 64-byte message with its routes
	frame := make([]byte, size)
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	fill := func(b *testing.B, open func(name string, durable bool) (bridge.Outbox, error)) []bridge.Outbox {
		boxes := make([]bridge.Outbox, queues)
		for i := range boxes {
			var err error
			if boxes[i], err = open(fmt.Sprint("device", i), true); err != nil {
				b.Fatal(err)
			}
			for range each {
				if _, _, err := boxes[i].Append(bridge.RoutedPacket(route.Stored, 1, false, nil, frame), bridge.Ticket{}); err != nil {
					b.Fatal(err)
				}
			}
		}
		return boxes
	}
	report := func(b *testing.B, before, after float64) {
		b.ReportMetric((after-before)/queues/each, "heap-B/frame")
		b.ReportMetric((after-before)/queues/each-size, "over-B/frame")
		b.ReportMetric(0, "ns/op")
	}
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			before := heap()
			boxes := fill(b, bridge.MemoryOutboxes())
			report(b, before, heap())
			runtime.KeepAlive(boxes)
		}
	})
	b.Run("store", func(b *testing.B) {
		for b.Loop() {
			dir := b.TempDir()
			before := heap()
			s, _, err := Open(dir, Options{Mode: SyncInterval})
			if err != nil {
				b.Fatal(err)
			}
			fill(b, s.Outbox)
			for st := s.Stats(); st.Committed < queues*each; st = s.Stats() {
				runtime.Gosched()
			}
			report(b, before, heap())
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
			s = nil //nolint:wastedassign // its memory is not to be measured
			runtime.GC()
			start := time.Now()
			s, rep, err := Open(dir, Options{Mode: SyncInterval})
			if err != nil || rep.Frames != queues*each {
				b.Fatal(err, rep)
			}
			b.ReportMetric(float64(time.Since(start).Milliseconds()), "open-ms")
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
