package store

import (
	"fmt"
	"slices"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// TestTakenBeforeTheDisk: while the disk refuses, who sends to a queue that is emptied is
// answered all the same, in order; who sends to one that is not hears nothing, until the
// disk takes writes again. Nothing of what was answered is missing then, after a kill.
func TestTakenBeforeTheDisk(t *testing.T) {
	for name, mode := range map[string]Mode{"always": SyncAlways, "interval": SyncInterval} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, _ := openStore(t, dir, Options{Mode: mode, SegmentSize: 4 << 10})
			defer s.Close()
			type sender struct {
				ackLog
				b    bridge.Outbox
				sent uint64
			}
			put := func(to *sender, frames ...string) {
				t.Helper()
				var more [][]byte
				for _, f := range frames[1:] {
					more = append(more, []byte(f))
				}
				p := bridge.RoutedPacket(route.Stored, 7, true, []byte("hop"), []byte(frames[0]), more...)
				if _, _, err := to.b.Append(p, bridge.NewTicket(to, to.sent)); err != nil {
					t.Fatal(err)
				}
				to.sent++
			}
			all := func(of *sender) func() bool { return func() bool { return len(of.all()) == int(of.sent) } }
			bob, carol, dave := &sender{b: box(t, s, "bob")}, &sender{b: box(t, s, "carol")}, &sender{b: box(t, s, "dave")}
			names := s.Stats().LiveBytes
			wall := wallUp(t, dir)
			put(dave, "before")
			await(t, s, "before", all(dave))
			for s.Refusal() == nil {
				put(bob, fmt.Sprintf("%03d%1000d", bob.sent, 0))
				await(t, s, "nothing is stored", func() bool { return all(bob)() || s.Refusal() != nil })
			}
			put(bob, fmt.Sprintf("%03d", bob.sent))
			n := len(bob.all())

			// In memory alone, taken by the target, whole and in parts.
			put(carol, "1", "2")
			put(carol, "3")
			carol.b.Release(carol.b.Next() - 1)
			await(t, s, "what carol has", all(carol))
			put(carol, "4", "5", "6")
			put(carol, "7")
			first := carol.b.Next() - 4
			carol.b.Release(first)
			carol.b.Drop(first + 1)
			carol.b.Drop(first + 3)
			await(t, s, "what is left of nothing", func() bool { return len(carol.all()) == 3 })
			if got := carol.all(); !slices.Equal(got, []uint64{0, 1, 3}) {
				t.Errorf("answered: %v", got)
			}
			put(dave, "kept", "as well")

			// In the log, which the disk has yet to take.
			bob.b.Release(uint64(n) + 1)
			await(t, s, "what bob has", func() bool { return len(bob.all()) == n+1 })
			put(bob, fmt.Sprintf("%03d", bob.sent))

			wallDown(t, wall)
			for _, who := range []*sender{bob, carol, dave} {
				await(t, s, "the disk takes writes again", all(who))
			}
			for _, who := range []*sender{bob, dave} {
				if got := who.all(); !slices.IsSorted(got) {
					t.Errorf("answered out of order: %v", got)
				}
			}
			after, _ := openStore(t, snapshot(t, dir), Options{Mode: mode})
			defer after.Close()
			for name, b := range map[string]bridge.Outbox{"bob": bob.b, "carol": carol.b, "dave": dave.b} {
				seqs, frames := content(b)
				gotSeqs, got := content(box(t, after, name))
				if !slices.Equal(got, frames) || !slices.Equal(gotSeqs, seqs) || len(got) == 0 {
					t.Errorf("%s: %q, want %q", name, got, frames)
				}
			}
			for _, who := range []*sender{bob, carol, dave} {
				who.b.Release(who.b.Next() - 1)
			}
			if n := s.Stats().LiveBytes; n != names {
				t.Errorf("%d bytes are held of empty queues, %d before", n, names)
			}

			// The target was faster than the disk's refusal.
			put(dave, "fast")
			last := dave.b.Next() - 1
			dave.b.Release(last)
			w := wait{ticket: bridge.NewTicket(dave, 99), b: dave.b.(*outbox), first: last, last: last}
			if rest := s.withheld([]wait{{}, w}); len(rest) != 1 || rest[0].b != nil {
				t.Errorf("left: %+v", rest)
			}
			await(t, s, "answered", func() bool { return slices.Contains(dave.all(), 99) })
		})
	}
}
