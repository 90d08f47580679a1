package seglog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

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

func TestSecondOpener(t *testing.T) {
	dir := t.TempDir()
	l, _, _ := open(t, dir, Options[note]{})
	if _, _, err := Open(dir, Options[note]{}, nil); !errors.Is(err, ErrInUse) {
		t.Fatalf("got %v", err)
	}
	l.Close()
	open(t, dir, Options[note]{})
}
