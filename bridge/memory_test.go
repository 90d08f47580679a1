package bridge

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/sealmq/sealmq/route"
)

// model is the plainest outbox there is.
type model struct {
	items []Item
	next  uint64
}

// TestMemoryOutboxAgainstModel runs random operations on both.
func TestMemoryOutboxAgainstModel(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		box, _ := newMemoryOutboxes()("x", true)
		m := &model{next: 1}
		var lent []Entry
		var want [][]byte // what lent must go on holding
		for step := range 800 {
			switch op := r.IntN(10); {
			case op < 4:
				pk := Packet{Class: route.Class(r.IntN(2)), Arrival: int64(step), First: r.IntN(4) == 0}
				if r.IntN(2) == 0 {
					pk.Hop = []byte("FWD_x")
				}
				pk.raw = []byte{}
				total := 0
				for range 1 + r.IntN(3) {
					n := r.IntN(400)
					switch r.IntN(40) {
					case 0:
						n = r.IntN(60_000)
					case 1 + r.IntN(200):
						n = hugeChunk*r.IntN(2) + 70_000
					}
					f := make([]byte, n)
					for i := 0; i < n; i += 97 {
						f[i] = byte(step + i)
					}
					pk.raw = append(pk.raw, f...)
					pk.ends = append(pk.ends, len(pk.raw))
					m.items = append(m.items, Item{Entry: Entry{Seq: m.next, Class: pk.Class, Frame: f}, Arrival: pk.Arrival, First: pk.First, Hop: pk.Hop})
					m.next++
					total += n
				}
				if n, stored, err := box.Append(&pk, Ticket{}); n != total || !stored || err != nil {
					t.Fatalf("append: %d of %d, %v, %v", n, total, stored, err)
				}
			case op < 6 && len(m.items) > 0:
				i := r.IntN(min(len(m.items), 10))
				upTo := m.items[i].Seq
				size := 0
				for _, it := range m.items[:i+1] {
					size += len(it.Frame)
				}
				if n, sz := box.Release(upTo); n != i+1 || sz != size {
					t.Fatalf("release: %d, %d; want %d, %d", n, sz, i+1, size)
				}
				m.items = m.items[i+1:]
			case op < 7 && len(m.items) > 0:
				i := r.IntN(len(m.items))
				it := m.items[i]
				if n, ok := box.Drop(it.Seq); n != len(it.Frame) || !ok {
					t.Fatalf("drop: %d, %v", n, ok)
				}
				if _, ok := box.Drop(it.Seq); ok {
					t.Fatal("dropped twice")
				}
				m.items = append(m.items[:i:i], m.items[i+1:]...)
			case op < 8 && lent == nil:
				from := uint64(0)
				if len(m.items) > 0 {
					from = m.items[r.IntN(len(m.items))].Seq
				}
				lent = box.Read(from, make([]Entry, 0, 1+r.IntN(20)))
				want = nil
				var expect []Item
				for _, it := range m.items {
					if it.Seq >= from && len(expect) < cap(lent) {
						expect = append(expect, it)
					}
				}
				if len(expect) != len(lent) {
					t.Fatalf("read %d entries, want %d", len(lent), len(expect))
				}
				for i, it := range expect {
					if lent[i].Seq != it.Seq || lent[i].Class != it.Class {
						t.Fatalf("entry %d is %d, want %d", i, lent[i].Seq, it.Seq)
					}
					want = append(want, it.Frame)
				}
			case op < 9 && lent != nil:
				box.Settle()
				lent = nil
			}
			for i := 0; i < len(lent) && step%10 == 0; i++ {
				if !bytes.Equal(lent[i].Frame, want[i]) {
					t.Fatalf("seed %d step %d: entry %d changed while it was read", seed, step, lent[i].Seq)
				}
			}
			if step%50 == 0 {
				i := 0
				box.Scan(func(it *Item) bool {
					w := m.items[i]
					if it.Seq != w.Seq || it.First != w.First || it.Arrival != w.Arrival ||
						!bytes.Equal(it.Hop, w.Hop) || !bytes.Equal(it.Frame, w.Frame) {
						t.Fatalf("seed %d step %d: item %d differs", seed, step, it.Seq)
					}
					i++
					return true
				})
				mem, k := box.(*memoryOutbox), 0
				for seq := range m.next + 2 {
					var w []byte
					if k < len(m.items) && m.items[k].Seq == seq {
						w = m.items[k].Frame
						k++
					}
					if f := mem.Frame(seq); (f == nil) != (w == nil) || !bytes.Equal(f, w) {
						t.Fatalf("seed %d step %d: frame %d differs", seed, step, seq)
					}
				}
				if i != len(m.items) || box.Next() != m.next {
					t.Fatalf("%d items, next %d; want %d, %d", i, box.Next(), len(m.items), m.next)
				}
			}
		}
		box.Settle()
		box.Discard()
		if mb := box.(*memoryOutbox); len(mb.chunks) != 0 || mb.ring != nil || mb.n != 0 {
			t.Fatalf("discarded outbox holds %d chunks", len(mb.chunks))
		}
	}
}

// Frames that come and go behind one that is never acknowledged leave nothing.
func TestStuckOutboxHoldsLittle(t *testing.T) {
	box, _ := newMemoryOutboxes()("x", true)
	m := box.(*memoryOutbox)
	stuck := Packet{raw: []byte("stuck")}
	for i := range 200_000 {
		if i%50_000 == 0 {
			_, _, _ = box.Append(&stuck, Ticket{})
		}
		_, _, _ = box.Append(&Packet{Class: route.Transient, raw: []byte("gone")}, Ticket{})
		seq := box.Next() - 1
		if got := box.Read(seq, make([]Entry, 0, 1)); len(got) != 1 || got[0].Seq != seq {
			t.Fatalf("read %v at %d", got, seq)
		}
		box.Settle()
		if _, ok := box.Drop(seq); !ok {
			t.Fatalf("cannot drop %d", seq)
		}
	}
	if len(m.ring) > 4*keptDropped {
		t.Errorf("%d slots for %d frames", len(m.ring), 4)
	}
	if frames, _ := box.Release(box.Next()); frames != 4 {
		t.Errorf("%d frames are left", frames)
	}
}

func TestIdleOutboxHoldsLittle(t *testing.T) {
	box, _ := newMemoryOutboxes()("x", true)
	m := box.(*memoryOutbox)
	for i := range 1000 {
		pk := Packet{raw: make([]byte, 200)}
		_, _, _ = box.Append(&pk, Ticket{})
		if i%2 == 1 {
			box.Release(box.Next())
		}
	}
	box.Release(box.Next())
	if len(m.chunks) != 0 || len(m.ring) > keptRing {
		t.Errorf("%d chunks, %d slots", len(m.chunks), len(m.ring))
	}
}

func TestRouteDoesNotAllocate(t *testing.T) {
	b := newTestBridge(t, nil)
	sender, bob := &sink{}, &sink{}
	alice := newSinkDevice(t, b, "alice", sender)
	l := newSinkDevice(t, b, "bob", bob)
	pkt := frame(route.To(l.Port().Address(), "x", "app"), route.To("me"), make([]byte, 64))
	if n := testing.AllocsPerRun(1000, func() { _ = alice.Receive(pkt, route.Stored, sender, 1) }); n > 0.1 {
		t.Errorf("%v allocations", n)
	}
}

func newSinkDevice(t testing.TB, b *Bridge, name string, s *sink) *Link {
	t.Helper()
	l, err := b.ConnectDevice(device(name), s)
	if err != nil {
		t.Fatal(err)
	}
	s.link = l
	l.Subscribed()
	l.Attach(false)
	return l
}
