package store

import (
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// TestReleaseOfLessThanBefore: acknowledgements may come from several goroutines, so one
// of less than was released already can come behind. It changes nothing: the record goes
// with the last of its frames.
func TestReleaseOfLessThanBefore(t *testing.T) {
	s, _ := openStore(t, t.TempDir(), Options{})
	defer s.Close()
	b := box(t, s, "bob")
	empty := s.Stats().LiveBytes
	p := bridge.RoutedPacket(route.Stored, 7, false, nil, []byte("one"), []byte("two"), []byte("three"), []byte("four"))
	if _, _, err := b.Append(p, bridge.Ticket{}); err != nil {
		t.Fatal(err)
	}
	b.Release(2)
	b.Release(1)
	b.Drop(3)
	b.Drop(4)
	if n := s.Stats().LiveBytes; n != empty {
		t.Errorf("%d bytes are held by a queue with no frames", n-empty)
	}
}

// Nor does it keep the log from being cleaned.
func TestLogAfterReleaseOfLessThanBefore(t *testing.T) {
	s, _ := openStore(t, t.TempDir(), Options{SegmentSize: 4 << 10})
	defer s.Close()
	b, other := box(t, s, "bob"), box(t, s, "carol")
	p := bridge.RoutedPacket(route.Stored, 7, false, nil, []byte("one"), []byte("two"), []byte("three"), []byte("four"))
	if _, _, err := b.Append(p, bridge.Ticket{}); err != nil {
		t.Fatal(err)
	}
	b.Release(2)
	b.Release(1)
	b.Drop(3)
	b.Drop(4)
	for range 300 { // delivered at once
		add(t, other, route.Stored, string(make([]byte, 1000)))
		other.Release(other.Next() - 1)
	}
	await(t, s, "the log of an empty hub is long", func() bool { return s.Stats().DiskBytes <= 100<<10 })
}

// A packet that takes several records is acknowledged once, with the last of them.
func TestPacketOfSeveralRecordsIsAcknowledgedOnce(t *testing.T) {
	s, _ := openStore(t, t.TempDir(), Options{})
	b := box(t, s, "bob")
	big := make([]byte, 700<<10)
	acked := new(ackLog)
	if _, _, err := b.Append(bridge.RoutedPacket(route.Stored, 7, false, nil, big, big, big, big, big), bridge.NewTicket(acked, 0)); err != nil {
		t.Fatal(err)
	}
	if n := len(b.(*outbox).recs); n < 2 {
		t.Fatalf("%d records", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(acked.all()); n != 1 {
		t.Errorf("acknowledged %d times", n)
	}
}

// What could not be stored is not in the queue.
func TestNothingIsKeptOfWhatIsNotStored(t *testing.T) {
	s, _ := openStore(t, t.TempDir(), Options{})
	b := box(t, s, "bob")
	add(t, b, route.Stored, "one")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	p := bridge.RoutedPacket(route.Stored, 7, false, nil, []byte("two"), []byte("three"))
	if _, _, err := b.Append(p, bridge.Ticket{}); err == nil {
		t.Fatal("stored in a closed store")
	}
	if _, frames := content(b); len(frames) != 1 {
		t.Errorf("%q are in the queue", frames)
	}
}
