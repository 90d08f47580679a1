package seglog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

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
