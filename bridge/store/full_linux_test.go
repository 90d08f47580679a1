package store

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// counter counts the packets that were acknowledged.
type counter struct{ n atomic.Int64 }

func (c *counter) Acked(uint64) { c.n.Add(1) }

// A disk that the store has filled comes free by itself once queues are emptied,
// although an old name and an old frame pin the oldest segment. Nothing that was
// acknowledged is lost. package seglog tests the same with a disk of its own making.
func TestFullDiskComesFree(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Log("NOT TESTED on a real disk, since no small one can be mounted: ", err)
		return
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s, _ := openStore(t, dir, Options{Mode: SyncInterval, Reserve: 1 << 20})
	defer func() { _ = s.Close() }()
	quiet, busy := box(t, s, "quiet"), box(t, s, "busy")
	var acked counter
	sent := int64(0)
	put := func(b bridge.Outbox, frame string) {
		t.Helper()
		sent++
		p := bridge.RoutedPacket(route.Stored, 7, true, []byte("hop"), []byte(frame))
		if _, _, err := b.Append(p, bridge.NewTicket(&acked, 0)); err != nil {
			t.Fatal(err)
		}
	}
	await := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(20 * time.Second); !ok(); <-tick.C {
			if time.Now().After(end) {
				t.Fatalf("%s: %d of %d acknowledged, %+v, %v", what, acked.n.Load(), sent, s.Stats(), s.Refusal())
			}
		}
	}
	put(quiet, "still wanted")
	for range 3 {
		for i := 0; s.Refusal() == nil; i++ {
			put(busy, fmt.Sprintf("%06d%4096d", i, i))
			// As a bridge would hold back who sends.
			await("nothing is stored", func() bool { return acked.n.Load() > sent-16 || s.Refusal() != nil })
		}
		if err := s.Refusal(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if acked.n.Load() == sent {
			t.Error("what the full disk refused is acknowledged")
		}
		busy.Release(busy.Next() - 1) // the device comes back and takes all
		await("the disk stays full", func() bool { return acked.n.Load() == sent && s.Refusal() == nil })
	}
	put(busy, "after")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, _ = openStore(t, dir, Options{Mode: SyncInterval, Reserve: 1 << 20})
	for name, want := range map[string]string{"quiet": "still wanted", "busy": "after"} {
		if _, got := content(box(t, s, name)); !slices.Equal(got, []string{want}) {
			t.Errorf("%s holds %d frames", name, len(got))
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
