package seglog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// A full disk is freed by moving what is live out of old segments, and that needs
// room. So a file keeps some, which is given up when the disk is full and taken
// again, before anybody is told of a commit, once cleaning has made room. Until then
// everything that is appended is written, relocations above all, and only those who
// wait for a commit hear nothing: who bounds what waits bounds what is written into
// the reserve.

// reserveName is the file that takes the room.
const reserveName = "reserve"

// reserve is the room kept. The writing goroutine alone uses it.
type reserve[T any] struct {
	size     int64 // 0: there is none
	spent    bool
	tried    time.Time // when it was last tried to take it again
	tick     *time.Timer
	withheld []T
}

// makeReserve takes the reserve, as far as a quarter of the disk's free room goes, and
// has segments end early on a disk that few of the usual length fit on.
func (l *Log[T]) makeReserve(bytes int64) {
	path := filepath.Join(l.dir, reserveName)
	if l.opts.Reserve <= 0 {
		return
	}
	have := int64(0)
	if st, err := os.Stat(path); err == nil {
		have = st.Size()
	}
	want := l.opts.Reserve
	if free, ok := l.opts.free(l.dir); ok {
		want = max(min(want, (free+have)/4), min(want, have))
		l.opts.SegmentSize = min(l.opts.SegmentSize, max((free+have+bytes)/16, minSegment))
	}
	if want != have {
		if err := l.opts.allocate(path, want); err != nil {
			l.opts.Logger.Warn("the disk has no room for a reserve; when it is full it may not come free by itself",
				"dir", l.dir, "bytes", want, "err", err)
			_ = os.Remove(path)
			return
		}
	}
	l.reserve.size = want
}

// minSegment is the length below which no segment is ended for the sake of a small
// disk.
const minSegment = 64 << 10

// spend gives the reserve up after a write that failed for want of room, and reports
// whether it did.
func (l *Log[T]) spend(why error) bool {
	r := &l.reserve
	if r.spent || r.size == 0 || !errors.Is(why, syscall.ENOSPC) && !errors.Is(why, syscall.EDQUOT) {
		return false
	}
	if err := os.Remove(filepath.Join(l.dir, reserveName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	l.dropAhead()
	r.spent, r.tried = true, time.Now()
	if l.refusal.Swap(&why) == nil {
		l.opts.Logger.Error("the disk is full; acknowledgements wait until there is room again", "dir", l.dir, "err", why)
	}
	l.mu.Lock()
	l.sweep = true
	l.mu.Unlock()
	return true
}

// restore takes the reserve again, if there is room, and reports whether it is there.
func (l *Log[T]) restore() bool {
	r := &l.reserve
	if !r.spent {
		return true
	}
	if time.Since(r.tried) < retryWrite {
		return false
	}
	r.tried = time.Now()
	path := filepath.Join(l.dir, reserveName)
	if err := l.opts.allocate(path, r.size); err != nil {
		_ = os.Remove(path)
		return false
	}
	r.spent = false
	return true
}

// withhold notes who is to be told of a batch once the reserve is there again.
func (l *Log[T]) withhold(b *batch[T]) {
	l.handBack(b, nil)
	early := b.waits[:0]
	for _, w := range b.waits {
		if l.opts.Early != nil && l.opts.Early(w) {
			early = append(early, w)
		} else {
			l.reserve.withheld = append(l.reserve.withheld, w)
		}
	}
	l.committed(early)
}

// replenish goes on trying to restore the reserve while nothing is written, and tells
// who waits for that.
func (l *Log[T]) replenish() {
	r := &l.reserve
	switch {
	case !r.spent:
		return
	case l.restore():
		l.taken()
		l.tell(nil)
	case r.tick == nil:
		r.tick = time.AfterFunc(retryWrite, l.Clean)
	default:
		r.tick.Reset(retryWrite)
	}
}

// fill writes zeros up to a length, for file systems that cannot allocate.
func fill(f *os.File, size int64) error {
	zeros := make([]byte, 1<<20)
	for size > 0 {
		n, err := f.Write(zeros[:min(size, int64(len(zeros)))])
		if err != nil {
			return err
		}
		size -= int64(n)
	}
	return f.Sync()
}
