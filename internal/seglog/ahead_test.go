package seglog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"
)

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
