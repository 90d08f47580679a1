package tcp

import (
	"bufio"
	"fmt"
	"io"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

var benchSizes = []int{64, 1 << 10, 16 << 10, 200 << 10}

// BenchmarkTCPToTCP carries frames from one connection to another over loopback.
// The sender lets no more be under way than the receiver's outbox holds.
func BenchmarkTCPToTCP(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := newHub(b, options{})
			from, to := h.connect(), h.connect()
			fwd := to.dynamic("m")
			arrived := make(chan struct{}, 1<<20)
			go func() {
				for {
					if _, err := to.r.Next(); err != nil {
						return
					}
					arrived <- struct{}{}
				}
			}()
			to.SetReadDeadline(noDeadline)
			run(b, from, fwd, size, func() { <-arrived })
		})
	}
}

// BenchmarkTCPToMQTT carries frames from a connection to a device that takes them
// at once, so it measures this front and the router alone.
func BenchmarkTCPToMQTT(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := newHub(b, options{})
			d := &benchDevice{arrived: make(chan struct{}, 1<<20)}
			who := bridge.Principal{ClientID: "d", Role: bridge.RoleDevice, Proven: true}
			link, err := h.b.ConnectDevice(who, d)
			if err != nil {
				b.Fatal(err)
			}
			defer link.Close(true)
			d.link = link
			link.Subscribed()
			link.Attach(false)
			fwd, err := h.b.Register(bridge.Registration{Owner: who, Route: route.To(link.Port().Address(), "m")})
			if err != nil {
				b.Fatal(err)
			}
			run(b, h.connect(), fwd, size, func() { <-d.arrived })
		})
	}
}

func run(b *testing.B, from *peer, to string, size int, arrive func()) {
	go func() { _, _ = io.Copy(io.Discard, from.Conn) }()
	from.SetDeadline(noDeadline)
	body := framed(route.AppendFrame(nil, &route.Frame{Onward: route.To(to, "w"), Payload: make([]byte, size)}))
	w := bufio.NewWriterSize(from.Conn, 64<<10)
	window := min(4096, 8<<20/len(body))
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	sent, got := 0, 0
	for range b.N {
		for sent-got >= window {
			if w.Buffered() > 0 {
				_ = w.Flush()
			}
			arrive()
			got++
		}
		if _, err := w.Write(body); err != nil {
			b.Fatal(err)
		}
		sent++
	}
	_ = w.Flush()
	for ; got < sent; got++ {
		arrive()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
}

type benchDevice struct {
	device
	link    *bridge.Link
	arrived chan struct{}
}

func (d *benchDevice) Deliver(entries []bridge.Entry) int {
	last := entries[len(entries)-1].Seq
	for range entries {
		d.arrived <- struct{}{}
	}
	d.link.Delivered(last)
	return len(entries)
}
