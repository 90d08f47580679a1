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
	"sync"
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
