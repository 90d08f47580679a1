package bridge

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/route"
)

// sink is a connection that takes and acknowledges everything at once.
type sink struct{ link *Link }

func (s *sink) Deliver(entries []Entry) int {
	s.link.Delivered(entries[len(entries)-1].Seq)
	return len(entries)
}
func (s *sink) Direct([]byte) bool { return true }
func (s *sink) Kick(KickReason)    {}
func (s *sink) Acked(uint64)       {}
func (s *sink) AckedAll([]uint64)  {}

// hoard takes nothing.
type hoard struct{ sink }

func (h *hoard) Deliver([]Entry) int { return 0 }

func benchDevice(b *testing.B, br *Bridge, name string, c Conn) *Link {
	b.Helper()
	l, err := br.ConnectDevice(device(name), c)
	if err != nil {
		b.Fatal(err)
	}
	if s, ok := c.(*sink); ok {
		s.link = l
	}
	l.Subscribed()
	l.Attach(false)
	return l
}

// BenchmarkRoute is one frame's way through the hub: parse, look up, route, stamp
// and encode into the target's outbox. "queued" stops there and frees the outbox
// now and then; "delivered" also hands the frame to a connection that acknowledges
// it, and acknowledges it to the sender; "together" does so for twenty at a time, as a
// connection is read that has a window of that many.
func BenchmarkRoute(b *testing.B) {
	for _, size := range []int{64, 1024, 16 << 10} {
		for _, to := range []string{"hub-address", "forwarder"} {
			for _, how := range []string{"queued", "delivered", "together"} {
				b.Run(fmt.Sprintf("%s/%s/%d", how, to, size), func(b *testing.B) {
					benchmarkRoute(b, to, how, size)
				})
			}
		}
	}
}

func benchmarkRoute(b *testing.B, to, how string, size int) {
	br := newTestBridge(b, func(c *Config) { c.OutboxFrames, c.OutboxBytes = 1<<20, 1<<30 })
	sender := &sink{}
	alice := benchDevice(b, br, "alice", sender)
	var bob *Link
	if how == "queued" {
		bob = benchDevice(b, br, "bob", &hoard{})
	} else {
		bob = benchDevice(b, br, "bob", &sink{})
	}
	first := bob.Port().Address()
	hops := []string{first, "0123456789abcdef0123456789abcdef", "app"}
	if to == "forwarder" {
		addr, err := br.registry.register(bob.Port(), Registration{Owner: device("bob"), Route: route.To(first, strings.Repeat("m", 32))})
		if err != nil {
			b.Fatal(err)
		}
		hops[0] = addr
	}
	pkt := frame(route.To(hops...), route.To("fedcba9876543210fedcba9876543210"), make([]byte, size))
	b.SetBytes(int64(size))
	b.ReportAllocs()
	n := uint64(0)
	for b.Loop() {
		if n++; how == "together" {
			if _ = alice.ReceiveMore(pkt, route.Stored, sender, n); n%20 == 0 {
				alice.Flush()
			}
			continue
		}
		_ = alice.Receive(pkt, route.Stored, sender, 1)
		if how == "queued" && n%256 == 0 {
			p := bob.Port()
			p.mu.Lock()
			f, sz := p.box.Release(p.box.Next())
			p.taken(f, sz)
			p.stripe.delivered.Add(uint64(f))
			p.mu.Unlock()
		}
	}
	alice.Flush()
}

func BenchmarkRouteParallel(b *testing.B) {
	br := newTestBridge(b, nil)
	n := 0
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		br.mu.Lock()
		n++
		i := n
		br.mu.Unlock()
		sender := &sink{}
		alice := benchDevice(b, br, fmt.Sprint("alice", i), sender)
		bob := benchDevice(b, br, fmt.Sprint("bob", i), &sink{})
		pkt := frame(route.To(bob.Port().Address(), "0123456789abcdef0123456789abcdef", "app"), route.To("fedcba9876543210fedcba9876543210"), make([]byte, 64))
		for pb.Next() {
			_ = alice.Receive(pkt, route.Stored, sender, 1)
		}
	})
}

// BenchmarkQueuedMemory reports the memory of a queued frame of 64 bytes.
func BenchmarkQueuedMemory(b *testing.B) {
	for b.Loop() {
		br := newTestBridge(b, nil)
		sender := &sink{}
		alice := benchDevice(b, br, "alice", sender)
		var ports []*Port
		for i := range 100 {
			ports = append(ports, benchDevice(b, br, fmt.Sprint("bob", i), &hoard{}).Port())
		}
		for i := range 100_000 {
			pkt := frame(route.To(ports[i%100].Address(), "0123456789abcdef0123456789abcdef"), nil, make([]byte, 64))
			_ = alice.Receive(pkt, route.Stored, sender, 1)
		}
		held, frames := 0, 0
		for _, p := range ports {
			m := p.box.(*memoryOutbox)
			held += 24 * len(m.ring)
			for _, c := range m.chunks {
				held += cap(c.b) + 32
			}
			frames += p.frames
		}
		b.ReportMetric(float64(held)/float64(frames), "bytes/frame")
	}
}
