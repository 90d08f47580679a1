package seglog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("SEGLOG_CRASH_DIR"); dir != "" {
		crashWriter(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

type rec struct {
	seg  uint64
	kind byte
	body string
}

// open opens dir and returns the log, its report and what was replayed.
func open(t *testing.T, dir string, opts Options[note]) (*Log[note], *Report, []rec) {
	t.Helper()
	var got []rec
	l, rep, err := Open(dir, noting(opts), func(at Place, kind byte, body []byte) error {
		got = append(got, rec{at.Segment, kind, string(body)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, rep, got
}

// A note says who is told of a record, and with what.
type note struct {
	w     committer
	token uint64
}

type committer interface{ Committed(token uint64) }

// noting has the log tell of what is noted.
func noting(opts Options[note]) Options[note] {
	opts.Committed = func(done []note) {
		for _, n := range done {
			n.w.Committed(n.token)
		}
	}
	opts.Early = func(n note) bool {
		_, ok := n.w.(earlyWaiter)
		return ok
	}
	return opts
}

// add appends a record; w may be nil.
func add(l *Log[note], kind byte, hold bool, w committer, token uint64, body []byte) (seg uint64, err error) {
	var n *note
	if w != nil {
		n = &note{w, token}
	}
	return l.Append(kind, hold, append(make([]byte, Room), body...), n)
}

// waiter lets a test wait for a record.
type waiter chan uint64

func (w waiter) Committed(token uint64) { w <- token }

func (w waiter) next(t *testing.T) uint64 {
	t.Helper()
	select {
	case n := <-w:
		return n
	case <-time.After(10 * time.Second):
		t.Fatal("no commit within 10 s")
		return 0
	}
}

func appendAll(t *testing.T, l *Log[note], bodies ...string) []uint64 {
	t.Helper()
	w := make(waiter, len(bodies))
	var segs []uint64
	for i, b := range bodies {
		seg, err := add(l, byte(i), true, w, uint64(i), []byte(b))
		if err != nil {
			t.Fatal(err)
		}
		segs = append(segs, seg)
	}
	for i := range bodies {
		if got := w.next(t); got != uint64(i) {
			t.Fatalf("commit %d came as number %d", got, i)
		}
	}
	return segs
}

func TestReopen(t *testing.T) {
	for _, mode := range []Mode{SyncAlways, SyncInterval} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "log")
			l, rep, got := open(t, dir, Options[note]{Mode: mode})
			if *rep != (Report{}) || got != nil {
				t.Fatalf("new folder: %+v, %v", rep, got)
			}
			appendAll(t, l, "one", "", "three")
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := add(l, 0, false, nil, 0, nil); !errors.Is(err, ErrClosed) || !errors.Is(err, fs.ErrClosed) {
				t.Fatalf("append after close: %v", err)
			}
			l, rep, got = open(t, dir, Options[note]{Mode: mode})
			if want := []rec{{1, 0, "one"}, {1, 1, ""}, {1, 2, "three"}}; fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("replay %v, want %v", got, want)
			}
			if rep.Records != 3 || rep.TornBytes != 0 || rep.Segments != 1 {
				t.Fatalf("report %+v", rep)
			}
			appendAll(t, l, "four")
			l.Close()
			if _, _, got = open(t, dir, Options[note]{}); len(got) != 4 || got[3].body != "four" {
				t.Fatalf("after the second start: %v", got)
			}
		})
	}
}

// Every cut of the newest segment behind its header opens again, as does every flipped byte in what had
// perhaps not been synced, and gives a prefix of the records. A flipped byte in what
// had been synced is damage.
func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	bodies := []string{"first", "second record", "third"}
	for _, body := range bodies {
		w := make(waiter, 1)
		if _, err := add(l, 1, true, w, 0, []byte(body)); err != nil { // each with a mark in front
			t.Fatal(err)
		}
		w.next(t)
	}
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(t *testing.T, b []byte, least, most int) {
		t.Helper()
		write(b)
		l, rep, got := open(t, dir, Options[note]{})
		for i, r := range got {
			if r.body != bodies[i] {
				t.Fatalf("record %d is %q", i, r.body)
			}
		}
		if len(got) < least || len(got) > most {
			t.Fatalf("%d records", len(got))
		}
		if rep.TornReason == "" && len(bytes.Trim(b[rep.Bytes:], "\x00")) > 0 &&
			!bytes.HasPrefix(b[rep.Bytes:], []byte(endMark)) {
			t.Fatalf("nothing reported: %+v", rep)
		}
		// The log goes on behind what was kept.
		appendAll(t, l, "more")
		l.Close()
		l, rep, again := open(t, dir, Options[note]{})
		l.Close()
		if len(again) != len(got)+1 || again[len(got)].body != "more" || rep.TornBytes != 0 {
			t.Fatalf("after the repair: %v, %+v", again, rep)
		}
	}
	damaged := func(t *testing.T, b []byte, at int) {
		t.Helper()
		write(b)
		if _, _, err := Open(dir, Options[note]{}, func(Place, byte, []byte) error { return nil }); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("byte %d flipped: %v", at, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
			t.Fatalf("byte %d flipped: the file was changed: %v", at, err)
		}
	}
	sealed := len(whole) - markLen // where the mark of Close is
	for n := headerLen; n < len(whole); n++ {
		most := 2
		if n >= sealed {
			most = 3
		}
		check(t, whole[:n], 0, most)
	}
	flip := func(b []byte, n int) []byte {
		b = bytes.Clone(b)
		b[n] ^= 0x40
		return b
	}
	last := sealed - recordHeaderLen - 1 - len(bodies[2]) - markLen // where the last write began
	for n := range whole {
		switch {
		case n >= len(magic) && n < headerLen: // version and folder id: see TestVersion
		case n < sealed:
			damaged(t, flip(whole, n), n)
		default:
			check(t, flip(whole, n), 3, 3)
		}
	}
	// Without the mark of Close, as after a crash.
	for n := headerLen; n < sealed; n++ {
		if n < last {
			damaged(t, flip(whole[:sealed], n), n)
		} else {
			check(t, flip(whole[:sealed], n), 2, 2)
		}
	}
	// In a segment that was made ahead of zeros, where either end of the last write is missing.
	zeros := make([]byte, 1000)
	check(t, append(bytes.Clone(whole[:sealed]), zeros...), 3, 3)
	for n := last; n < sealed; n += 5 {
		check(t, append(bytes.Clone(whole[:n]), zeros...), 2, 2)
		check(t, slices.Concat(whole[:last], zeros[:n-last], whole[n:sealed], zeros), 2, 3)
	}
	// Zeros where something had been synced are damage.
	damaged(t, slices.Concat(whole[:headerLen], zeros[:last-headerLen], whole[last:sealed], zeros), headerLen)
}

func TestDamageInOldSegment(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{SegmentSize: 80})
	segs := appendAll(t, l, "0123456789", "0123456789", "0123456789", "0123456789", "0123456789", "0123456789")
	if segs[5] < segs[0]+2 {
		t.Fatalf("no new segment: %v", segs)
	}
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err = Open(dir, Options[note]{}, func(Place, byte, []byte) error { return nil })
	var ce *CorruptError
	if !errors.Is(err, ErrCorrupt) || !errors.As(err, &ce) || ce.File != path || ce.Offset == 0 {
		t.Fatalf("got %v", err)
	}
	if err := os.Remove(filepath.Join(dir, segmentName(2))); err != nil {
		t.Fatal(err)
	}
	if _, _, err = Open(dir, Options[note]{}, func(Place, byte, []byte) error { return nil }); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("missing segment: %v", err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// openCorrupt opens a log that is to be refused as damaged, and returns why.
func openCorrupt(t *testing.T, dir string) *CorruptError {
	t.Helper()
	l, _, err := Open(dir, Options[note]{}, func(Place, byte, []byte) error { return nil })
	if err == nil {
		l.Close()
	}
	var ce *CorruptError
	if !errors.As(err, &ce) {
		t.Fatalf("got %v", err)
	}
	return ce
}

// TestReplayRefuses: the error of a record that replay refuses says where that is.
func TestReplayRefuses(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	appendAll(t, l, "first", "second")
	l.Close()
	errNo := errors.New("no")
	var at Place
	_, _, err := Open(dir, Options[note]{}, func(p Place, _ byte, body []byte) error {
		if string(body) == "first" {
			return nil
		}
		at = p
		return errNo
	})
	if !errors.Is(err, errNo) || !strings.Contains(err.Error(), fmt.Sprintf("%s: at byte %d: ", filepath.Join(dir, segmentName(1)), at.Offset)) {
		t.Errorf("Open: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil || !bytes.HasPrefix(b[at.Offset+recordHeaderLen+1:], []byte("second")) {
		t.Errorf("%+v is not where it is: %v", at, err)
	}
}

// The newest segments and the oldest leave no gap in the numbers when they are gone.
func TestSegmentAtTheEndIsMissing(t *testing.T) {
	for name, c := range map[string]struct{ from, to, named uint64 }{
		"newest": {2, 4, 4}, "oldest": {1, 2, 1}, "oldest but for one": {1, 3, 1}, "all": {1, 4, 4},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, _, _ := open(t, dir, Options[note]{SegmentSize: 64})
			appendAll(t, l, "0123456789", "0123456789", "0123456789", "0123456789")
			l.Close()
			for seg := c.from; seg <= c.to; seg++ {
				if err := os.Remove(filepath.Join(dir, segmentName(seg))); err != nil {
					t.Fatal(err)
				}
			}
			if ce := openCorrupt(t, dir); ce.File != filepath.Join(dir, segmentName(c.named)) {
				t.Error(ce)
			}
		})
	}
}

// The newest segment is noted once its header is on stable storage. One that is noted and
// has none has lost what it held, and no crash did that.
func TestNewestSegmentIsEmptied(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	appendAll(t, l, "acknowledged")
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	for size := range int64(headerLen) {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		if ce := openCorrupt(t, dir); ce.File != path {
			t.Error(ce)
		}
		if st, err := os.Stat(path); err != nil || st.Size() != size {
			t.Errorf("%d bytes were changed: %v", size, err)
		}
	}
}

// A folder without notes, as one that was made before there were any, opens as it is, and has
// them from then on.
func TestNotesAreMadeGood(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{SegmentSize: 64})
	segs := appendAll(t, l, "0123456789", "0123456789", "0123456789")
	l.Release(segs[0], 1, 10)
	gone := filepath.Join(dir, segmentName(segs[0]))
	for begun := time.Now(); exists(gone); runtime.Gosched() {
		if time.Since(begun) > 10*time.Second {
			t.Fatal("the first segment stays")
		}
	}
	l.Close()
	for _, name := range []string{newestName, oldestName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	l, _, got := open(t, dir, Options[note]{})
	l.Close()
	if len(got) != 2 {
		t.Fatal(got)
	}
	for _, seg := range segs[1:] {
		path := filepath.Join(dir, segmentName(seg))
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		if ce := openCorrupt(t, dir); ce.File != path {
			t.Error(ce)
		}
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	}
}

// Which segment is the oldest is noted before others are removed: one that is there although
// it is not needed harms nobody, as after a crash in between. Where that cannot be noted it
// is noted no more, and segments that nothing holds go all the same.
func TestOldestIsNotedFirst(t *testing.T) {
	for name, refuses := range map[string]bool{"noted": false, "refused": true} {
		t.Run(name, func(t *testing.T) {
			dir, between := t.TempDir(), t.TempDir()
			first := filepath.Join(dir, segmentName(1))
			opts := Options[note]{SegmentSize: 64}
			opts.note = func(path string, seg uint64) error {
				if filepath.Base(path) != oldestName || seg == 1 {
					return writeNote(path, seg)
				}
				if refuses {
					return syscall.EIO
				}
				if err := writeNote(path, seg); err != nil {
					t.Error(err)
				}
				// Here the process is killed.
				if err := os.CopyFS(filepath.Join(between, "log"), os.DirFS(dir)); err != nil {
					t.Error(err)
				}
				return nil
			}
			l, _, _ := open(t, dir, opts)
			segs := appendAll(t, l, "0123456789", "0123456789", "0123456789")
			l.Release(segs[0], 1, 10)
			for begun := time.Now(); exists(first); runtime.Gosched() {
				if time.Since(begun) > 10*time.Second {
					t.Fatal("the first segment stays")
				}
			}
			l.Close()
			noted, err := readNote(filepath.Join(dir, oldestName))
			if want := segs[1]; err != nil || !refuses && noted != want || refuses && noted != 0 {
				t.Errorf("segment %d is noted: %v", noted, err)
			}
			l, _, got := open(t, dir, Options[note]{})
			if l.Close(); len(got) != 2 {
				t.Error(got)
			}
			if refuses {
				return
			}
			l, _, got = open(t, filepath.Join(between, "log"), Options[note]{})
			if l.Close(); len(got) != 3 {
				t.Errorf("after a kill in between: %v", got)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	dir := t.TempDir()
	b := appendHeader(nil, [8]byte{1})
	binary.BigEndian.PutUint16(b[len(magic):], Version+1)
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(dir, Options[note]{}, nil); !errors.Is(err, ErrNewer) {
		t.Fatalf("got %v", err)
	}
}

// A folder of version 1 is read, and goes on with what is new.
func TestVersion1(t *testing.T) {
	dir := t.TempDir()
	b := appendHeader(nil, [8]byte{1})
	binary.BigEndian.PutUint16(b[len(magic):], 1)
	b = appendRecord(appendMark(b, 0, [8]byte{1}, headerLen), 0, 3, []byte("old"))
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), b, 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"old", "same file", string(make([]byte, 80)), "new file"}
	l, _, _ := open(t, dir, Options[note]{SegmentSize: 200})
	if segs := appendAll(t, l, want[1:]...); segs[0] != 1 || segs[2] != 2 {
		t.Fatalf("segments %v", segs)
	}
	l.Close()
	_, rep, got := open(t, dir, Options[note]{})
	for i, r := range got {
		if len(got) != len(want) || r.body != want[i] || rep.TornBytes != 0 {
			t.Fatalf("%v, %+v", got, rep)
		}
	}
}

// A segment that was not whole when the process died is made again, and the one before
// goes on.
func TestDiedMakingSegment(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	appendAll(t, l, "before")
	l.Close()
	if err := os.WriteFile(filepath.Join(dir, segmentName(2)), []byte(magic), 0o600); err != nil {
		t.Fatal(err)
	}
	l, _, _ = open(t, dir, Options[note]{})
	if segs := appendAll(t, l, "after"); segs[0] != 1 {
		t.Fatalf("in segment %d", segs[0])
	}
	l.Close()
	if _, _, got := open(t, dir, Options[note]{}); len(got) != 2 || got[1].body != "after" {
		t.Fatal(got)
	}
}

// A segment goes only when what took the place of its records has been written.
func TestReleaseBeforeWrite(t *testing.T) {
	dir := t.TempDir()
	fl := &faults{hit: make(chan struct{}, 1)}
	opts := Options[note]{SegmentSize: 64}
	opts.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &faulty{f, fl}, err
	}
	l, _, _ := open(t, dir, opts)
	seg := appendAll(t, l, "the old value of a table's entry")[0]
	appendAll(t, l, "something to fill a segment with")
	fl.set(true, false)
	w := make(waiter, 1)
	if _, err := add(l, 1, true, w, 0, []byte("the new value of a table's entry")); err != nil {
		t.Fatal(err)
	}
	l.Release(seg, 1, 32)
	<-fl.hit
	<-fl.hit
	if _, err := os.Stat(filepath.Join(dir, segmentName(seg))); err != nil {
		t.Fatalf("the old value is gone and the new one is not there: %v", err)
	}
	fl.set(false, false)
	w.next(t)
	l.Close()
	if _, err := os.Stat(filepath.Join(dir, segmentName(seg))); err == nil {
		t.Fatal("the old value is still there")
	}
}

func TestSecondOpener(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	if _, _, err := Open(dir, Options[note]{}, nil); !errors.Is(err, ErrInUse) {
		t.Fatalf("got %v", err)
	}
	l.Close()
	open(t, dir, Options[note]{})
}

// Old segments go once nothing holds them, and a record nobody releases is moved.
func TestCleaning(t *testing.T) {
	dir := t.TempDir()
	var l *Log[note]
	w := make(waiter, 1)
	type place struct{ seg uint64 }
	keep := &place{}
	moved := make(chan uint64, 1024)
	ready := make(chan struct{})
	var mu sync.Mutex
	opts := Options[note]{SegmentSize: 512, Relocate: func(seg uint64) {
		<-ready
		mu.Lock()
		defer mu.Unlock()
		if keep.seg != seg {
			return
		}
		old := keep.seg
		n, err := add(l, 9, true, commitFunc(func(uint64) { l.Release(old, 1, 4); moved <- old }), 0, []byte("keep"))
		if err != nil {
			t.Error(err)
		}
		keep.seg = n
	}}
	l, _, _ = open(t, dir, opts)
	close(ready)
	mu.Lock()
	seg, err := add(l, 9, true, w, 0, []byte("keep"))
	if err != nil {
		t.Fatal(err)
	}
	keep.seg = seg
	mu.Unlock()
	w.next(t)
	for range 200 {
		if _, err := add(l, 1, false, w, 0, make([]byte, 50)); err != nil {
			t.Fatal(err)
		}
		w.next(t)
	}
	select {
	case <-moved:
	case <-time.After(10 * time.Second):
		t.Fatal("the held record was never moved")
	}
	l.Close()
	if s := l.Stats(); s.Segments > 12 {
		t.Fatalf("segments pile up: %+v", s)
	}
	_, rep, got := open(t, dir, Options[note]{})
	found := 0
	for _, r := range got {
		if r.kind == 9 {
			found++
		}
	}
	if found == 0 || rep.Segments > 12 {
		t.Fatalf("%d copies of the held record in %d segments", found, rep.Segments)
	}
}

type commitFunc func(uint64)

func (f commitFunc) Committed(token uint64) { f(token) }

// faulty fails writes or syncs while it is told to, after a part of the write.
type faulty struct {
	file
	faults *faults
}

type faults struct {
	mu          sync.Mutex
	write, sync bool
	hit         chan struct{}
}

func (f *faults) set(write, sync bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write, f.sync = write, sync
}

func (f *faults) fail(which *bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if *which {
		select {
		case f.hit <- struct{}{}:
		default:
		}
	}
	return *which
}

func (f *faulty) WriteAt(b []byte, at int64) (int, error) {
	if f.faults.fail(&f.faults.write) {
		n, _ := f.file.WriteAt(b[:len(b)/2], at)
		return n, syscall.ENOSPC
	}
	return f.file.WriteAt(b, at)
}

func (f *faulty) Datasync() error { return f.Sync() }

func (f *faulty) Sync() error {
	if f.faults.fail(&f.faults.sync) {
		return syscall.EIO
	}
	return f.file.Sync()
}

// A disk that refuses delays the commits; nothing is lost or torn, and a crash in
// the middle leaves a log that opens.
func TestDiskRefuses(t *testing.T) {
	for _, c := range []struct {
		name        string
		write, sync bool
	}{{"write", true, false}, {"sync", false, true}} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			fl := &faults{hit: make(chan struct{}, 1)}
			opts := Options[note]{}
			opts.create = func(path string) (file, error) {
				f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
				return &faulty{f, fl}, err
			}
			l, _, _ := open(t, dir, opts)
			appendAll(t, l, "before")
			fl.set(c.write, c.sync)
			w := make(waiter, 1)
			if _, err := add(l, 1, true, w, 7, []byte("during")); err != nil {
				t.Fatal(err)
			}
			<-fl.hit
			<-fl.hit // a second try
			if len(w) != 0 || !l.Failing() {
				t.Fatal("committed although the disk refused")
			}
			fl.set(false, false)
			if got := w.next(t); got != 7 {
				t.Fatal(got)
			}
			l.Close()
			_, rep, got := open(t, dir, Options[note]{})
			if len(got) != 2 || got[1].body != "during" || rep.TornBytes != 0 {
				t.Fatalf("%v, %+v", got, rep)
			}
		})
	}
}

// Who is taken away while the disk refuses hears nothing more, of what is being written and
// of what came behind; the others hear of the commit, in order.
func TestWithheld(t *testing.T) {
	fl := &faults{hit: make(chan struct{}, 1)}
	told, taken := make(chan int, 100), make(chan int, 100)
	opts := Options[int]{
		Committed: func(done []int) {
			for _, n := range done {
				told <- n
			}
		},
		Withheld: func(waits []int) []int {
			return slices.DeleteFunc(waits, func(n int) bool {
				if n%2 == 1 {
					taken <- n
				}
				return n%2 == 1
			})
		},
	}
	opts.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &faulty{f, fl}, err
	}
	l, _, err := Open(t.TempDir(), opts, func(Place, byte, []byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	next := func(c chan int, what string, want int) {
		t.Helper()
		select {
		case n := <-c:
			if n != want {
				t.Fatalf("%s: %d, want %d", what, n, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: nobody, want %d", what, want)
		}
	}
	put := func(numbers ...int) {
		t.Helper()
		for _, n := range numbers {
			if _, err := l.Append(1, false, make([]byte, Room+10), &n); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(1)
	next(told, "told", 1)
	fl.set(true, false)
	put(3)
	next(taken, "taken", 3)
	put(4, 5, 6, 7, 8)
	next(taken, "taken", 5)
	next(taken, "taken", 7)
	fl.set(false, false)
	for _, n := range []int{4, 6, 8} {
		next(told, "told", n)
	}
	put(9)
	next(told, "told", 9)
	if len(told)+len(taken) != 0 {
		t.Errorf("%d told, %d taken besides", len(told), len(taken))
	}
}

// disk is a file as a power cut would leave it: what was written since the last sync
// is not in it, and what a failed sync was to bring never will be.
type disk struct {
	file
	faults *faults

	mu    sync.Mutex
	dirty map[int64][]byte
	cut   *int64 // length that Truncate gave it
	image []byte
}

func (d *disk) note(b []byte, at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dirty[at] = bytes.Clone(b)
}

func (d *disk) WriteAt(b []byte, at int64) (int, error) {
	d.note(b, at)
	return d.file.WriteAt(b, at)
}

func (d *disk) Truncate(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = &size
	return d.file.Truncate(size)
}

// Sync brings a truncation to the disk as well.
func (d *disk) Sync() error {
	if err := d.Datasync(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut != nil {
		d.image = d.image[:min(int64(len(d.image)), *d.cut)]
	}
	d.cut = nil
	return nil
}

func (d *disk) Datasync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer clear(d.dirty)
	if d.faults.fail(&d.faults.sync) {
		return syscall.EIO
	}
	for at, b := range d.dirty {
		if grow := at + int64(len(b)) - int64(len(d.image)); grow > 0 {
			d.image = append(d.image, make([]byte, grow)...)
		}
		copy(d.image[at:], b)
	}
	return nil
}

// A sync in the background that fails loses what it was to bring, although the next
// one succeeds. It is written again, and nothing is committed before.
func TestFailedSyncIsMadeGood(t *testing.T) {
	for _, rotates := range []bool{false, true} {
		t.Run(fmt.Sprint("rotates ", rotates), func(t *testing.T) {
			dir := t.TempDir()
			fl := &faults{hit: make(chan struct{}, 1)}
			var disks []*disk
			opts := Options[note]{Mode: SyncInterval, Interval: time.Hour, SegmentSize: 1 << 10}
			opts.create = func(path string) (file, error) {
				f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
				d := &disk{file: f, faults: fl, dirty: make(map[int64][]byte)}
				disks = append(disks, d)
				return d, err
			}
			l, _, _ := open(t, dir, opts)
			appendAll(t, l, "before")
			fl.set(false, true)
			appendAll(t, l, "lost by the sync")
			if err := l.sync(); err == nil { // as the interval does
				t.Fatal("the sync did not fail")
			}
			<-fl.hit
			w := make(waiter, 1)
			body := "waits"
			if rotates {
				body = string(make([]byte, 1000))
			}
			if _, err := add(l, 2, true, w, 7, []byte(body)); err != nil {
				t.Fatal(err)
			}
			<-fl.hit
			<-fl.hit
			if len(w) != 0 {
				t.Error("committed while syncs fail")
			}
			fl.set(false, false)
			w.next(t)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			after := t.TempDir()
			for i, d := range disks {
				if err := os.WriteFile(filepath.Join(after, segmentName(uint64(i+1))), d.image, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, rep, got := open(t, after, Options[note]{})
			if len(got) != 3 || got[1].body != "lost by the sync" || got[2].body != body || rep.TornBytes != 0 {
				t.Fatalf("%v, %+v", got, rep)
			}
		})
	}
}

// What a power cut leaves: with SyncAlways everything that was committed, with
// SyncInterval what was committed an interval and a sync ago.
func TestPowerCut(t *testing.T) {
	for _, c := range []struct {
		mode  Mode
		ahead bool
	}{{SyncAlways, false}, {SyncAlways, true}, {SyncInterval, false}, {SyncInterval, true}} {
		t.Run(fmt.Sprintf("%v ahead %v", c.mode, c.ahead), func(t *testing.T) {
			fl := &faults{hit: make(chan struct{}, 1)}
			var disks []*disk
			begun := 0 // segments that were made ahead
			opts := Options[note]{Mode: c.mode, Interval: 5 * time.Millisecond, SegmentSize: 4 << 10, Ahead: c.ahead}
			opts.create = func(path string) (file, error) {
				f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
				disks = append(disks, &disk{file: f, faults: fl, dirty: make(map[int64][]byte)})
				return disks[len(disks)-1], err
			}
			opts.reopen = func(path string) (file, error) {
				image, err := os.ReadFile(path)
				if err != nil {
					return nil, err
				}
				begun++
				f, err := openFile(path, os.O_RDWR)
				disks = append(disks, &disk{file: f, faults: fl, dirty: make(map[int64][]byte), image: image})
				return disks[len(disks)-1], err
			}
			opts.note = func(path string, seg uint64) error {
				if filepath.Base(path) == newestName && len(disks[seg-1].image) < headerLen {
					t.Errorf("segment %d is noted before it is there", seg)
				}
				return writeNote(path, seg)
			}
			dir := t.TempDir()
			l, _, _ := open(t, dir, opts)
			const records = 100
			for i := range records {
				w := make(waiter, 1)
				body := append([]byte(fmt.Sprint("record ", i, " ")), make([]byte, 100)...)
				if _, err := add(l, 1, true, w, 0, body); err != nil {
					t.Fatal(err)
				}
				w.next(t)
				synced := func() (found bool) {
					for _, d := range disks {
						d.mu.Lock()
						found = found || bytes.Contains(d.image, body)
						d.mu.Unlock()
					}
					return found
				}
				for begun := time.Now(); !synced(); runtime.Gosched() {
					if c.mode == SyncAlways {
						t.Fatalf("record %d was committed before it was synced", i)
					}
					if time.Since(begun) > 10*time.Second {
						t.Fatalf("record %d is never synced", i)
					}
				}
				if c.ahead && i == records/2 {
					for wait := time.Now(); !l.ahead.ready.Load() && begun == 0; runtime.Gosched() {
						if time.Since(wait) > 10*time.Second {
							t.Fatal("no segment is made ahead")
						}
					}
				}
			}
			// Here the power goes.
			after := t.TempDir()
			for i, d := range disks {
				d.mu.Lock()
				if err := os.WriteFile(filepath.Join(after, segmentName(uint64(i+1))), d.image, 0o600); err != nil {
					t.Fatal(err)
				}
				d.mu.Unlock()
			}
			for _, name := range []string{newestName, oldestName} {
				noted, err := os.ReadFile(filepath.Join(dir, name))
				if err = errors.Join(err, os.WriteFile(filepath.Join(after, name), noted, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			l.Close()
			if (begun > 0) != c.ahead {
				t.Errorf("%d segments were made ahead", begun)
			}
			if _, rep, got := open(t, after, Options[note]{}); len(got) != records || rep.TornBytes != 0 {
				t.Errorf("%d records, %+v", len(got), rep)
			}
		})
	}
}

// A segment is made ahead of a busy log, on a disk that has room to spare, and goes
// when that is needed and when the log is closed.
func TestAhead(t *testing.T) {
	free := int64(1 << 20)
	dir := t.TempDir()
	opts := Options[note]{SegmentSize: 8 << 10, Reserve: 1 << 10, Ahead: true}
	opts.allocate, opts.free = allocate, func(string) (int64, bool) { return free, true }
	l, _, _ := open(t, dir, opts)
	there := func() bool {
		_, err := os.Stat(filepath.Join(dir, aheadName))
		return err == nil
	}
	ready := func() {
		t.Helper()
		for begun := time.Now(); !l.ahead.ready.Load(); runtime.Gosched() {
			if time.Since(begun) > 10*time.Second {
				t.Fatal("no segment is made ahead")
			}
		}
	}
	appendAll(t, l, "too little")
	if there() {
		t.Fatal("made for a log that has little to write")
	}
	body := string(make([]byte, 200))
	appendAll(t, l, body)
	ready()
	appendAll(t, l, body) // the writer sees it
	seg := appendAll(t, l, body)[0]
	if st, err := os.Stat(filepath.Join(dir, segmentName(2))); seg != 2 || err != nil || st.Size() != opts.SegmentSize {
		t.Fatalf("segment %d: %v", seg, err)
	}
	for range 10 {
		appendAll(t, l, body)
	}
	ready()
	l.dropAhead() // as when the disk is full
	if there() {
		t.Fatal("still there")
	}
	for seg < 3 { // goes on without, and begins again
		seg = appendAll(t, l, body)[0]
	}
	appendAll(t, l, body)
	ready()
	for seg < 4 {
		seg = appendAll(t, l, body)[0]
	}
	if st, err := os.Stat(filepath.Join(dir, segmentName(4))); err != nil || st.Size() != opts.SegmentSize {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil || there() {
		t.Fatalf("there after the end: %v, %v", there(), err)
	}
	free = 4*opts.SegmentSize - 1
	l, rep, got := open(t, dir, opts)
	if rep.TornBytes != 0 || rep.Segments != 4 {
		t.Fatalf("%d records, %+v", len(got), rep)
	}
	if err := l.makeAhead(); !errors.Is(err, errNoRoom) || there() {
		t.Fatalf("on a disk that is nearly full: %v", err)
	}
}

// A segment is made of an old one's file, and whatever part of a write the power leaves
// there, no record of the old one is read.
func TestAheadOfOldFile(t *testing.T) {
	dir := t.TempDir()
	opts := Options[note]{SegmentSize: 8 << 10, Ahead: true}
	l, _, _ := open(t, dir, opts)
	number := uint64(0)
	write := func() (path string, st os.FileInfo) {
		t.Helper()
		w := make(waiter, 1)
		seg, err := add(l, 1, false, w, 0, append(binary.BigEndian.AppendUint64(nil, number), make([]byte, 150)...))
		if err != nil {
			t.Fatal(err)
		}
		number++
		w.next(t)
		path = filepath.Join(dir, segmentName(seg))
		if st, err = os.Stat(path); err != nil {
			t.Fatal(err)
		}
		return path, st
	}
	var files []os.FileInfo
	used := false // the file was another segment's
	var path string
	for begun := time.Now(); !used; {
		last := path
		var st os.FileInfo
		if path, st = write(); path != last {
			used = len(files) > 2 && slices.ContainsFunc(files[2:], func(old os.FileInfo) bool { return os.SameFile(old, st) })
			files = append(files, st)
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatal("no old file is used again")
		}
	}
	for range 3 {
		write()
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if at, _ := write(); at != path {
		t.Fatal("the segment has ended")
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	const piece = 16
	var changed []int
	for i := 0; i < len(before); i += piece {
		if !bytes.Equal(before[i:i+piece], after[i:i+piece]) {
			changed = append(changed, i)
		}
	}
	check := func(which uint) (found int) {
		t.Helper()
		image := bytes.Clone(before)
		for k, i := range changed {
			if which>>k&1 != 0 {
				copy(image[i:i+piece], after[i:i+piece])
			}
		}
		name := filepath.Join(t.TempDir(), filepath.Base(path))
		if err := os.WriteFile(name, image, 0o600); err != nil {
			t.Fatal(err)
		}
		seg, _ := segmentNumber(filepath.Base(path))
		var id [8]byte
		var got []uint64
		if _, err := scanSegment(name, seg, &id, func(_ int64, kind byte, body []byte) error {
			if kind != kindMark {
				got = append(got, binary.BigEndian.Uint64(body))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for i, n := range got {
			if n != number-uint64(len(got))+uint64(i) && n != number-1-uint64(len(got))+uint64(i) {
				t.Fatalf("pieces %b: record %d is number %d, of %d", which, i, n, number)
			}
		}
		return len(got)
	}
	all := uint(1)<<len(changed) - 1
	whole := check(all)
	for which := range all {
		if got := check(which); got < whole-1 || got > whole {
			t.Fatalf("pieces %b: %d records, %d were committed", which, got, whole-1)
		}
	}
	if len(changed) < 3 {
		t.Errorf("%d pieces", len(changed))
	}
}

// What the file system has let go of cannot be made good: nothing is committed any
// more, and the reason is named.
func TestFailedSyncThatLost(t *testing.T) {
	dir := t.TempDir()
	fl := &faults{hit: make(chan struct{}, 1)}
	opts := Options[note]{Mode: SyncInterval, Interval: time.Hour}
	opts.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &faulty{f, fl}, err
	}
	l, _, _ := open(t, dir, opts)
	fl.set(false, true)
	appendAll(t, l, "gone")
	if err := l.sync(); err == nil {
		t.Fatal("the sync did not fail")
	}
	path := filepath.Join(dir, segmentName(1))
	for _, size := range []int64{headerLen + markLen, headerLen + markLen + recordHeaderLen + 5} { // zeros in its place
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	fl.set(false, false)
	w := make(waiter, 1)
	if _, err := add(l, 1, true, w, 7, []byte("after")); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); !errors.Is(l.Refusal(), ErrCorrupt); runtime.Gosched() {
		if time.Since(start) > 10*time.Second {
			t.Fatal("what is lost was not missed")
		}
	}
	if len(w) != 0 {
		t.Error("committed")
	}
	if err := l.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
}

// quota is a disk of limited size, with nothing on it but a folder.
type quota struct {
	dir   string
	limit int64
}

func (q *quota) free() int64 {
	left := q.limit
	list, _ := os.ReadDir(q.dir)
	for _, e := range list {
		if info, err := e.Info(); err == nil {
			left -= info.Size()
		}
	}
	return left
}

func (q *quota) options(o Options[note]) Options[note] {
	o.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &limited{f, q}, err
	}
	o.free = func(string) (int64, bool) { return q.free(), true }
	o.allocate = func(path string, size int64) error {
		if q.free() < size {
			return syscall.ENOSPC
		}
		return os.WriteFile(path, make([]byte, size), 0o600)
	}
	return o
}

type limited struct {
	file
	q *quota
}

func (f *limited) WriteAt(b []byte, at int64) (int, error) {
	if free := f.q.free(); int64(len(b)) > free {
		n, _ := f.file.WriteAt(b[:free], at)
		return n, syscall.ENOSPC
	}
	return f.file.WriteAt(b, at)
}

// earlyWaiter is told while the reserve is in use, too.
type earlyWaiter struct{ waiter }

// On a full disk the log writes into its reserve, so that it can clean itself up, and
// tells nobody until there is a reserve again but those who clean.
func TestReserve(t *testing.T) {
	q := &quota{dir: t.TempDir(), limit: 256 << 10}
	relocate := make(chan uint64, 100)
	l, _, _ := open(t, q.dir, q.options(Options[note]{
		SegmentSize: 1 << 10, Reserve: 16 << 10, Relocate: func(seg uint64) { relocate <- seg },
	}))
	pin := make(waiter, 1)
	first, err := add(l, 1, true, pin, 0, []byte("pins the oldest segment"))
	if err != nil {
		t.Fatal(err)
	}
	pin.next(t)
	w := make(waiter, 10000)
	body := make([]byte, 900)
	segs := make(map[uint64]int64)
	for n := uint64(0); !l.Failing(); n++ {
		seg, err := add(l, 2, true, w, n, body)
		if err != nil {
			t.Fatal(err)
		}
		segs[seg]++
		for uint64(len(w)) <= n && !l.Failing() { // what waits is bounded
			runtime.Gosched()
		}
	}
	early := earlyWaiter{make(waiter, 1)}
	moved, err := add(l, 1, true, early, 1, []byte("a copy"))
	if err != nil {
		t.Fatal(err)
	}
	early.next(t)
	told := len(w)
	if _, err := add(l, 2, false, w, 1<<32, body); err != nil {
		t.Fatal(err)
	}
	again := earlyWaiter{make(waiter, 1)}
	if _, err := add(l, 1, false, again, 2, nil); err != nil {
		t.Fatal(err)
	}
	again.next(t)
	if len(w) != told || !l.Failing() {
		t.Errorf("told %d after %d", len(w), told)
	}
	// Everything but the pin goes, then that as well.
	for seg, n := range segs {
		l.Release(seg, n, n*int64(len(body)))
	}
	for seg := uint64(0); seg != first; {
		select {
		case seg = <-relocate:
		case <-time.After(10 * time.Second):
			t.Fatal("the pinned segment is not cleared")
		}
	}
	l.Release(first, 1, int64(len("pins the oldest segment")))
	for got := uint64(0); got != 1<<32; {
		got = w.next(t)
	}
	if l.Failing() {
		t.Error("still refused")
	}
	l.Release(moved, 1, int64(len("a copy")))
	if st, err := os.Stat(filepath.Join(q.dir, reserveName)); err != nil || st.Size() == 0 {
		t.Errorf("no reserve: %v", err)
	}
}

func TestCloseWhileDiskRefuses(t *testing.T) {
	fl := &faults{hit: make(chan struct{}, 1)}
	opts := Options[note]{}
	opts.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &faulty{f, fl}, err
	}
	l, _, _ := open(t, t.TempDir(), opts)
	fl.set(true, false)
	w := make(waiter, 1)
	if _, err := add(l, 1, true, w, 0, []byte("x")); err != nil {
		t.Fatal(err)
	}
	<-fl.hit
	if err := l.Close(); err == nil || len(w) != 0 {
		t.Fatalf("close: %v, told: %d", err, len(w))
	}
}

// crashWriter runs in a child process: it appends without end, releases all but the newest
// of what is committed and prints each committed number.
func crashWriter(dir string) {
	mode := SyncAlways
	if os.Getenv("SEGLOG_CRASH_MODE") == "interval" {
		mode = SyncInterval
	}
	l, _, err := Open(dir, noting(Options[note]{Mode: mode, SegmentSize: 8 << 10, Ahead: os.Getenv("SEGLOG_CRASH_AHEAD") != ""}), func(Place, byte, []byte) error { return nil })
	if err != nil {
		fmt.Println(err)
		return
	}
	var line [9]byte
	var mu sync.Mutex
	var segs []uint64 // of the records that are held, oldest first
	released := uint64(0)
	window := make(chan struct{}, 50) // as publishers have one
	w := commitFunc(func(n uint64) {
		<-window
		mu.Lock()
		for ; released+crashHeld <= n; released++ {
			l.Release(segs[0], 1, int64(len(crashBody(released))))
			segs = segs[1:]
		}
		mu.Unlock()
		binary.BigEndian.PutUint64(line[:], n)
		line[8] = '\n'
		_, _ = os.Stdout.Write(line[:]) // the reader may be gone
	})
	for n := uint64(0); ; n++ {
		window <- struct{}{}
		seg, err := add(l, 1, true, w, n, crashBody(n))
		if err != nil {
			return
		}
		mu.Lock()
		segs = append(segs, seg)
		mu.Unlock()
	}
}

// crashBody is the body of record n.
func crashBody(n uint64) []byte {
	return append(binary.BigEndian.AppendUint64(nil, n), make([]byte, n%300)...)
}

// crashHeld is how many of the committed records crashWriter needs.
const crashHeld = 100

// What was committed before a kill -9 and not released is there afterwards, in order.
func TestKill(t *testing.T) {
	for _, c := range []struct{ mode, ahead string }{{"always", ""}, {"always", "ahead"}, {"interval", ""}, {"interval", "ahead"}} {
		t.Run(c.mode+c.ahead, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "SEGLOG_CRASH_DIR="+dir, "SEGLOG_CRASH_MODE="+c.mode, "SEGLOG_CRASH_AHEAD="+c.ahead)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var last uint64
			line := make([]byte, 9)
			read := func() bool {
				for n := 0; n < len(line); {
					m, err := out.Read(line[n:])
					if err != nil {
						return false
					}
					n += m
				}
				last = binary.BigEndian.Uint64(line)
				return true
			}
			for n := 0; n < 500 || n < 10_000 && exists(filepath.Join(dir, segmentName(1))); n++ {
				if !read() {
					t.Fatal("the writer ended")
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			for read() {
			}
			_ = cmd.Wait() // killed
			_, rep, got := open(t, dir, Options[note]{})
			number := func(i int) uint64 { return binary.BigEndian.Uint64([]byte(got[i].body)) }
			if len(got) == 0 || number(0)+crashHeld > last+2 || number(len(got)-1) < last {
				t.Fatalf("%d records after the kill, number %d was committed: %v", len(got), last, rep)
			}
			for i := range got {
				if number(i) != number(0)+uint64(i) {
					t.Fatalf("record %d is out of place", i)
				}
			}
			if number(0) == 0 {
				t.Error("no segment was removed")
			}
			t.Logf("committed %d, found %d, torn %d bytes", last+1, len(got), rep.TornBytes)
		})
	}
}

func TestConcurrentAppends(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{Mode: SyncInterval, Interval: time.Millisecond, SegmentSize: 4 << 10})
	const writers, each = 8, 500
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			w := make(waiter, each)
			for n := range each {
				if _, err := add(l, byte(i), true, w, uint64(n), []byte{byte(n >> 8), byte(n)}); err != nil {
					t.Error(err)
				}
			}
			for n := range each {
				if got := <-w; got != uint64(n) {
					t.Errorf("writer %d: commit %d as number %d", i, got, n)
					return
				}
			}
		})
	}
	wg.Wait()
	l.Close()
	_, _, got := open(t, dir, Options[note]{})
	next := make([]int, writers)
	for _, r := range got {
		if n := int(r.body[0])<<8 | int(r.body[1]); n != next[r.kind] {
			t.Fatalf("writer %d: record %d, want %d", r.kind, n, next[r.kind])
		}
		next[r.kind]++
	}
	if len(got) != writers*each {
		t.Fatalf("%d records", len(got))
	}
}

func TestTooLarge(t *testing.T) {
	l, _, _ := open(t, t.TempDir(), Options[note]{})
	if _, err := add(l, 1, false, nil, 0, make([]byte, MaxRecord)); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
}

func FuzzScan(f *testing.F) {
	good := appendHeader(nil, [8]byte{1})
	f.Add(good)
	good = appendRecord(appendRecord(good, salt(1), 1, []byte("one")), salt(1), 2, nil)
	f.Add(good)
	f.Add(good[:len(good)-3])
	path := filepath.Join(f.TempDir(), segmentName(1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var id [8]byte
		again := []byte(nil)
		salted := salt(1)
		if len(b) >= headerLen && binary.BigEndian.Uint16(b[len(magic):]) == 1 {
			salted = 0
		}
		s, err := scanSegment(path, 1, &id, func(_ int64, kind byte, body []byte) error {
			again = appendRecord(again, salted, kind, body)
			return nil
		})
		if err != nil || s.good < headerLen {
			return
		}
		if s.salt != salted || !bytes.Equal(append(bytes.Clone(b[:headerLen]), again...), b[:s.good]) {
			t.Fatalf("the good part does not encode again (%v)", s.bad)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, mode := range []Mode{SyncInterval, SyncAlways} {
		name := map[Mode]string{SyncInterval: "interval", SyncAlways: "always"}[mode]
		b.Run(name, func(b *testing.B) {
			l, _, err := Open(b.TempDir(), noting(Options[note]{Mode: mode}), nil)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			body := make([]byte, 200)
			window := make(chan struct{}, 1000) // as 50 publishers with 20 each
			w := commitFunc(func(uint64) { <-window })
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				window <- struct{}{}
				if _, err := add(l, 1, false, w, 0, body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
