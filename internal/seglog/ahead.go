package seglog

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
)

// A write that makes a file longer is on stable storage only once the file system has
// noted the new length and where the bytes are, which takes as long as the bytes. So a
// busy log makes its next segment ahead, beside what it does, and writes over what is
// there: an old segment's file, made longer with zeros, or zeros alone. Salts tell what
// it has written from what stood there before, and an endMark where that begins.

const (
	// aheadName is the segment made ahead, aheadNew the one being made, aheadOld a
	// segment that nobody needs any more, to make it of.
	aheadName = "ahead"
	aheadNew  = "ahead.new"
	aheadOld  = "ahead.old"
	// aheadFirst is the part of a segment that is written before another is made, for a
	// log that has little to write does without. aheadAfter is the part if the segment
	// was made ahead itself: the one before may have become free until then.
	aheadFirst = 64
	aheadAfter = 4
	// aheadPiece is how much is made at once, for the writes and syncs in between.
	aheadPiece = 1 << 20
)

// ahead is the segment made ahead. The writing goroutine alone uses all but ready.
type ahead struct {
	wanted chan struct{} // asks for one; nil: none is made
	ready  atomic.Bool   // it is there
	old    bool          // there is an old one to make it of
	inside bool          // the segment being written was made ahead
	asked  uint64        // segment during which one was last asked for
	turned uint64        // segment that was last ended early
}

// lookAhead asks for the next segment once enough has been written to this one, and
// ends this one for it if it was not made ahead itself.
func (l *Log[T]) lookAhead() {
	a := &l.ahead
	switch {
	case a.wanted == nil || l.written < l.opts.SegmentSize/aheadFirst:
	case a.ready.Load():
		if a.inside || a.turned == l.fseg {
			return
		}
		a.turned = l.fseg
		l.mu.Lock()
		if l.seg == l.fseg {
			l.end = 0 // the next record begins a segment
		}
		l.mu.Unlock()
	case a.asked != l.fseg && !l.reserve.spent && (a.old || !a.inside || l.written >= l.opts.SegmentSize/aheadAfter):
		a.asked, a.old = l.fseg, false
		select {
		case a.wanted <- struct{}{}:
		default:
		}
	}
}

// removeSegment removes a segment that nobody needs, or keeps it to make one ahead of.
func (l *Log[T]) removeSegment(n uint64) error {
	path := filepath.Join(l.dir, segmentName(n))
	if a := &l.ahead; a.wanted != nil && !l.reserve.spent && !a.ready.Load() {
		if err := os.Rename(path, filepath.Join(l.dir, aheadOld)); err == nil {
			a.old = true
			return nil
		}
	}
	return os.Remove(path)
}

// aheadLoop makes segments ahead. Where none can be made, the log goes on without.
func (l *Log[T]) aheadLoop() {
	for {
		select {
		case <-l.stop:
			return
		case <-l.ahead.wanted:
		}
		if l.makeAhead() == nil {
			l.ahead.ready.Store(true)
		} else {
			l.dropAhead()
		}
	}
}

var errNoRoom = errors.New("seglog: no room to spare")

// makeAhead makes a segment ahead, durably, unless the disk has few more.
func (l *Log[T]) makeAhead() error {
	if free, ok := l.opts.free(l.dir); ok && free/4 < l.opts.SegmentSize {
		return errNoRoom
	}
	path := filepath.Join(l.dir, aheadNew)
	if err := os.Rename(filepath.Join(l.dir, aheadOld), path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(append(appendHeader(nil, l.id), endMark...), 0)
	size, serr := f.Seek(0, io.SeekEnd)
	err = errors.Join(err, serr)
	for zeros := make([]byte, aheadPiece); size < l.opts.SegmentSize && err == nil; {
		select {
		case <-l.stop:
			err = ErrClosed
		default:
			n, werr := f.Write(zeros[:min(l.opts.SegmentSize-size, aheadPiece)])
			err = errors.Join(werr, datasync(f))
			size += int64(n)
		}
	}
	// Its length is not noted again once it is in use.
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(path, filepath.Join(l.dir, aheadName))
}

// takeAhead gives the segment made ahead its name and opens it; nil when there is none.
func (l *Log[T]) takeAhead(path string) (file, error) {
	l.ahead.inside = false
	if !l.ahead.ready.Swap(false) {
		return nil, nil
	}
	switch err := os.Rename(filepath.Join(l.dir, aheadName), path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	f, err := l.opts.reopen(path)
	l.ahead.inside = err == nil
	return f, err
}

// dropAhead removes what was made ahead.
func (l *Log[T]) dropAhead() {
	l.ahead.ready.Store(false)
	for _, name := range []string{aheadName, aheadNew, aheadOld} {
		_ = os.Remove(filepath.Join(l.dir, name))
	}
}

// osFile is a file of the operating system.
type osFile struct{ *os.File }

func openFile(path string, flag int) (file, error) {
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Datasync is fdatasync(2), where there is one.
func (f osFile) Datasync() error { return datasync(f.File) }

// StartWriting is sync_file_range(2), where there is one.
func (f osFile) StartWriting(offset, n int64) { startWriting(f.File, offset, n) }
