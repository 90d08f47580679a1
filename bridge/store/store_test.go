package store

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/seglog"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openStore(t *testing.T, dir string, opts Options) (*Store, *Report) {
	t.Helper()
	s, rep, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return s, rep
}

func box(t *testing.T, s *Store, name string) bridge.Outbox {
	t.Helper()
	b, err := s.Outbox(name, true)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// await waits until ok, of what goes on inside the store.
func await(t *testing.T, s *Store, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("%s: %+v, %v", what, s.Stats(), s.Refusal())
		}
	}
}

func add(t *testing.T, b bridge.Outbox, class route.Class, frame string) {
	t.Helper()
	if _, _, err := b.Append(bridge.RoutedPacket(class, 7, true, []byte("hop"), []byte(frame)), bridge.Ticket{}); err != nil {
		t.Fatal(err)
	}
}

// content returns sequence and frame of every entry.
func content(b bridge.Outbox) (seqs []uint64, frames []string) {
	b.Scan(func(it *bridge.Item) bool {
		seqs, frames = append(seqs, it.Seq), append(frames, string(it.Frame))
		return true
	})
	return seqs, frames
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	s, _ := openStore(t, dir, Options{})
	b := box(t, s, "bob")
	add(t, b, route.Stored, "one")
	add(t, b, route.Stored, "two")
	add(t, b, route.Transient, "gone")
	add(t, b, route.Stored, "three")
	add(t, b, route.Stored, "four")
	if frames, size := b.Release(1); frames != 1 || size != 3 {
		t.Fatal(frames, size)
	}
	if size, ok := b.Drop(4); !ok || size != 5 {
		t.Fatal(size, ok)
	}
	if _, err := s.Outbox("memory", false); err != nil {
		t.Fatal(err)
	}
	gone := box(t, s, "gone")
	add(t, gone, route.Stored, "x")
	gone.Discard()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, rep := openStore(t, dir, Options{})
	defer s.Close()
	if names := s.Names(); !slices.Equal(names, []string{"bob"}) || rep.Frames != 2 || rep.Names != 1 {
		t.Fatalf("%v, %+v", names, rep)
	}
	b = box(t, s, "bob")
	seqs, frames := content(b)
	if !slices.Equal(seqs, []uint64{2, 5}) || !slices.Equal(frames, []string{"two", "four"}) || b.Next() != 6 {
		t.Fatalf("%v %v, next %d", seqs, frames, b.Next())
	}
	b.Scan(func(it *bridge.Item) bool {
		if it.Arrival != 7 || !it.First || string(it.Hop) != "hop" || it.Class != route.Stored {
			t.Errorf("%+v", it)
		}
		return true
	})
	if st := s.Stats(); st.LiveBytes == 0 {
		t.Fatalf("%+v", st)
	}
}

// TestPartOfABundle: a record goes with the last of its frames, however they go.
func TestPartOfABundle(t *testing.T) {
	for name, rest := range map[string]func(b bridge.Outbox){
		"released, dropped":  func(b bridge.Outbox) { b.Release(1); b.Drop(2); b.Drop(3) },
		"dropped, released":  func(b bridge.Outbox) { b.Drop(1); b.Release(2); b.Release(3) },
		"dropped in between": func(b bridge.Outbox) { b.Drop(2); b.Release(1); b.Drop(3) },
		"dropped behind":     func(b bridge.Outbox) { b.Drop(3); b.Drop(2); b.Release(1) },
		"one after another":  func(b bridge.Outbox) { b.Release(1); b.Release(2); b.Release(3) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, _ := openStore(t, dir, Options{})
			b := box(t, s, "bob")
			empty := s.Stats().LiveBytes
			p := bridge.RoutedPacket(route.Stored, 7, false, nil, []byte("one"), []byte("two"), []byte("three"))
			if _, _, err := b.Append(p, bridge.Ticket{}); err != nil {
				t.Fatal(err)
			}
			rest(b)
			if live := s.Stats().LiveBytes; live != empty {
				t.Errorf("%d bytes are held of an empty queue, %d before", live, empty)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, rep := openStore(t, dir, Options{})
			defer s.Close()
			if rep.Frames != 0 {
				t.Errorf("%d frames came back", rep.Frames)
			}
		})
	}
}

func TestTables(t *testing.T) {
	dir := t.TempDir()
	s, _ := openStore(t, dir, Options{})
	owner := bridge.Principal{ClientID: "Iabc", Role: bridge.RoleDevice, Proven: true}
	owner.Identity[0] = 9
	at := time.Unix(1700000000, 5).UTC()
	s.Port(bridge.PortState{Principal: owner, Seen: at, Online: true})
	s.Port(bridge.PortState{Principal: bridge.Principal{ClientID: "left"}, Seen: at})
	s.PortGone("left")
	f := bridge.ForwarderState{
		Address: "forward_to_x", Kind: 2, Owner: owner, Route: route.To("dev_1", "m"), Since: at, Seen: at, Online: true, Claim: []byte{1, 2},
	}
	s.Forwarder(f)
	f.Claim = []byte{3}
	s.Forwarder(f)
	s.Forwarder(bridge.ForwarderState{Address: "FWD_gone", Route: route.To("a")})
	s.ForwarderGone("FWD_gone")
	s.Close()
	s, rep := openStore(t, dir, Options{})
	defer s.Close()
	st, err := s.State()
	if err != nil {
		t.Fatal(err)
	}
	if len(st.Ports) != 1 || st.Ports[0].Principal != owner || !st.Ports[0].Seen.Equal(at) || !st.Ports[0].Online || rep.Entries != 2 {
		t.Fatalf("%+v", st)
	}
	if len(st.Forwarders) != 1 || fmt.Sprint(st.Forwarders[0]) != fmt.Sprint(f) {
		t.Fatalf("%+v, want %+v", st.Forwarders, f)
	}
}

// A queue is a model's list, whatever is done to it and however often the process
// ends, cleanly or by being copied away under its feet.
// What was put before Settled is in the log when it calls back.
func TestSettled(t *testing.T) {
	dir := t.TempDir()
	s, _ := openStore(t, dir, Options{})
	defer s.Close()
	for i := range 20 {
		s.ForwarderGone("never there")
		s.Forwarder(bridge.ForwarderState{Address: fmt.Sprint("FWD_", i)})
		settled := make(chan struct{})
		s.Settled(func() { close(settled) })
		<-settled
		after, _ := openStore(t, copyDir(t, dir), Options{})
		st, err := after.State()
		if err := errors.Join(err, after.Close()); err != nil {
			t.Fatal(err)
		}
		if len(st.Forwarders) != i+1 {
			t.Fatalf("%d entries after %d", len(st.Forwarders), i+1)
		}
	}
}

func TestModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	opts := Options{Mode: SyncInterval, SegmentSize: 2 << 10}
	s, _ := openStore(t, dir, opts)
	defer func() { s.Close() }()
	type entry struct {
		seq   uint64
		frame string
		class route.Class
	}
	names := []string{"a", "b", "c"}
	model := make(map[string][]entry)
	n := 0
	for step := range 4000 {
		name := names[rnd.IntN(len(names))]
		b := box(t, s, name)
		list := model[name]
		switch k := rnd.IntN(100); {
		case k < 55:
			n++
			class := route.Stored
			if rnd.IntN(5) == 0 {
				class = route.Transient
			}
			frame := fmt.Sprintf("%s-%d-%s", name, n, bytes.Repeat([]byte{'x'}, rnd.IntN(200)))
			seq := b.Next()
			add(t, b, class, frame)
			model[name] = append(list, entry{seq, frame, class})
		case k < 85 && len(list) > 0:
			cut := rnd.IntN(min(len(list), 8))
			b.Release(list[cut].seq)
			model[name] = list[cut+1:]
		case k < 92 && len(list) > 0:
			i := rnd.IntN(len(list))
			if _, ok := b.Drop(list[i].seq); !ok {
				t.Fatalf("step %d: cannot drop %d of %s", step, list[i].seq, name)
			}
			model[name] = slices.Delete(slices.Clone(list), i, i+1)
		case k == 92:
			b.Discard()
			delete(model, name)
		case k == 93:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if k := rnd.IntN(2); k == 0 {
				dir = copyDir(t, dir)
			}
			s, _ = openStore(t, dir, opts)
			for name, list := range model {
				model[name] = slices.DeleteFunc(slices.Clone(list), func(e entry) bool { return e.class == route.Transient })
			}
		}
		var seqs []uint64
		var frames []string
		for _, e := range model[name] {
			seqs, frames = append(seqs, e.seq), append(frames, e.frame)
		}
		gotSeqs, gotFrames := content(box(t, s, name))
		if !slices.Equal(gotSeqs, seqs) || !slices.Equal(gotFrames, frames) {
			t.Fatalf("step %d: %s holds %v, want %v", step, name, gotSeqs, seqs)
		}
	}
	// What is left is moved together by itself.
	tick, end := time.NewTicker(time.Millisecond), time.After(10*time.Second)
	defer tick.Stop()
	for s.Stats().Segments > 10 {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("segments pile up: %+v", s.Stats())
		}
	}
}

func copyDir(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// A kill at any record leaves a store that opens: whatever prefix of the log is
// there, each queue is a run of what was appended, in order.
func TestEveryPrefix(t *testing.T) {
	dir := t.TempDir()
	s, _ := openStore(t, dir, Options{})
	b := box(t, s, "bob")
	for i := range 10 {
		add(t, b, route.Stored, fmt.Sprint("frame", i))
		if i%3 == 2 {
			b.Release(uint64(i - 1))
		}
	}
	s.Close()
	segs, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(segs) != 1 {
		t.Fatal(segs, err)
	}
	whole, err := os.ReadFile(segs[0])
	if err != nil {
		t.Fatal(err)
	}
	const header = 16 // bytes, which are there before the file is noted as the newest
	for n := header; n < len(whole); n++ {
		if err := os.WriteFile(segs[0], whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		s, rep := openStore(t, dir, Options{})
		if len(s.Names()) > 0 {
			seqs, _ := content(box(t, s, "bob"))
			if len(seqs) != rep.Frames {
				t.Fatalf("cut at %d: %d frames, reported %d", n, len(seqs), rep.Frames)
			}
			for i := range seqs {
				if i > 0 && seqs[i] != seqs[i-1]+1 {
					t.Fatalf("cut at %d: %v", n, seqs)
				}
			}
		}
		s.Close()
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(recName, []byte("\x00\x00\x00\x01bob"))
	f.Add(recFrames, []byte("\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x01\x01x"))
	f.Add(recDone, []byte("\x00\x00\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add(recTable, []byte("\x01kvalue"))
	f.Fuzz(func(t *testing.T, kind byte, body []byte) {
		rc := &recovery{s: &Store{tables: make(map[string]*entry)}, boxes: make(map[uint32]*recovered)}
		if rc.record(seglog.Place{Segment: 1}, kind, body) != nil {
			return
		}
		for _, b := range rc.boxes {
			for seq, fr := range b.frames {
				if len(fr.body) == 0 || seq <= b.floor {
					t.Fatalf("frame %d is no frame", seq)
				}
			}
		}
	})
}

// TestArrivalsAreOfTheWall: a wall clock that was set while the hub ran is stored with what
// arrives, or is moved, later; what comes from the future arrived now.
func TestArrivalsAreOfTheWall(t *testing.T) {
	dir := t.TempDir()
	s, _ := openStore(t, dir, Options{})
	b := box(t, s, "bob")
	add(t, b, route.Stored, "one")
	s.ClockSet(time.Hour)
	add(t, b, route.Stored, "two")
	s.ClockSet(math.MaxInt64 - 7)
	add(t, b, route.Stored, "three")
	before := time.Now().UnixNano()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, _ = openStore(t, dir, Options{})
	defer s.Close()
	var got []int64
	box(t, s, "bob").Scan(func(it *bridge.Item) bool { got = append(got, it.Arrival); return true })
	if len(got) != 3 || got[0] != 7 || got[1] != 7+int64(time.Hour) || got[2] < before || got[2] > time.Now().UnixNano() {
		t.Errorf("arrivals %v, closed at %d", got, before)
	}
}

// ackFunc is an acker.
type ackFunc func()

func (f ackFunc) Acked(uint64) { f() }

// TestDiskStaysNearWhatIsLive: the disk that a log takes is bounded by what is queued,
// also where that is a little of very many queues, beside traffic that never ends.
func TestDiskStaysNearWhatIsLive(t *testing.T) {
	const segment = 64 << 10
	s, _ := openStore(t, t.TempDir(), Options{Mode: SyncInterval, SegmentSize: segment})
	defer s.Close()
	put := func(b bridge.Outbox, n int, acked func()) {
		if _, _, err := b.Append(bridge.RoutedPacket(route.Stored, 7, false, nil, make([]byte, n)), bridge.NewTicket(ackFunc(acked), 0)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 400 {
		put(box(t, s, fmt.Sprint("away", i)), 200, func() {})
	}
	busy := box(t, s, "busy")
	window := make(chan struct{}, 16)
	most := int64(0)
	for range 6000 {
		window <- struct{}{}
		put(busy, 4<<10, func() { <-window })
		busy.Release(busy.Next() - 1)
		st := s.Stats()
		most = max(most, st.DiskBytes-2*st.LiveBytes)
	}
	// Four segments are allowed; what is written while one is cleared comes on top.
	if most > 12<<20 {
		t.Errorf("%d KiB more than twice what is queued", most>>10)
	}
	t.Logf("%d KiB more than twice what is queued", most>>10)
}

// TestQueueWithoutName: what only the whole store shows to be damaged is named by file and
// byte, too, and refused before anything is changed.
func TestQueueWithoutName(t *testing.T) {
	dir := t.TempDir()
	opts := Options{SegmentSize: 4 << 10}
	s, _ := openStore(t, dir, opts)
	bob := box(t, s, "bob") // named in the first file
	for s.Stats().Segments < 2 {
		add(t, bob, route.Stored, "one for bob")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"0000000000000001.seg", "oldest"} { // as in a folder of an earlier version
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	second, ahead := filepath.Join(dir, "0000000000000002.seg"), filepath.Join(dir, "ahead")
	whole, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	torn := append(whole, 1, 2, 3)
	for path, b := range map[string][]byte{second: torn, ahead: make([]byte, 100)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var where *seglog.CorruptError
	if _, _, err := Open(dir, opts); !errors.As(err, &where) || where.File != second || !strings.Contains(where.Reason, "without a name") {
		t.Fatalf("it says %v", err)
	}
	if kind := where.Offset + 8; kind >= int64(len(whole)) || whole[kind] != recFrames {
		t.Errorf("there is no record of frames at byte %d", where.Offset)
	}
	if after, err := os.ReadFile(second); err != nil || !bytes.Equal(after, torn) {
		t.Errorf("the file was changed: %v", err)
	}
	if _, err := os.Stat(ahead); err != nil {
		t.Error(err)
	}
}

// The loss of the oldest file is noticed as that of any other: what it held was
// acknowledged.
func TestOldestFileIsMissing(t *testing.T) {
	dir := t.TempDir()
	opts := Options{SegmentSize: 4 << 10}
	s, _ := openStore(t, dir, opts)
	bob := box(t, s, "bob") // is away, and all of his queue in the first file
	for range 3 {
		add(t, bob, route.Stored, "one for bob")
	}
	passing := box(t, s, "passing") // a device that was here for a while
	for s.Stats().Segments < 3 {
		add(t, passing, route.Stored, "and one for somebody else")
	}
	passing.Discard()
	add(t, box(t, s, "carol"), route.Stored, "one for carol")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	segs, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(segs) < 2 {
		t.Fatal(segs, err)
	}
	if err := os.Remove(segs[0]); err != nil {
		t.Fatal(err)
	}
	after, rep, err := Open(dir, opts)
	if err == nil {
		defer after.Close()
		t.Errorf("without %s of %d files: it opens with queues %v, %d frames", filepath.Base(segs[0]), len(segs), after.Names(), rep.Frames)
	} else if !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}
