package seglog

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"
)

// run is the writing goroutine, and the parent of the interval syncer.
func (l *Log[T]) run() {
	defer close(l.done)
	var wg sync.WaitGroup
	if l.opts.Mode == SyncInterval {
		wg.Go(l.syncLoop)
	}
	if l.opts.Ahead {
		l.ahead.wanted = make(chan struct{}, 1)
		wg.Go(l.aheadLoop)
	}
	defer wg.Wait()
	defer func() {
		if l.reserve.tick != nil {
			l.reserve.tick.Stop()
		}
	}()
	for {
		l.mu.Lock()
		for len(l.queue) == 0 && !l.closed && !l.sweep {
			l.wake.Wait()
		}
		l.gather()
		queue, closed, sweep := l.queue, l.closed, l.sweep
		l.queue, l.sweep = nil, false
		// What is free now may go once queue is written: what took its place was
		// appended before it was released.
		needed := l.needed()
		l.mu.Unlock()
		for i, b := range queue {
			if !l.commit(b, queue[i+1:]) {
				return // closed while the disk refused
			}
		}
		if sweep {
			l.clean(needed)
		}
		l.replenish()
		if closed && len(queue) == 0 {
			return
		}
	}
}

// gather lets those who are about to append get into the same write, as long as more
// come: fewer, larger writes when there is much to do, and no delay when there is not.
// l.mu is held.
func (l *Log[T]) gather() {
	for range gatherTimes {
		before := l.appends
		l.mu.Unlock()
		runtime.Gosched()
		l.mu.Lock()
		if l.appends == before {
			return
		}
	}
}

// gatherTimes bounds how often a write is put off.
const gatherTimes = 16

// commit writes one batch, as often as it takes, and tells its waiters; rest is to be
// written after it. It returns false when the log was closed and the disk still refused.
func (l *Log[T]) commit(b *batch[T], rest []*batch[T]) bool {
	for {
		err := l.write(b)
		if err == nil {
			break
		}
		l.stats.failures.Add(1)
		if l.spend(err) {
			continue // into the room that it took
		}
		if l.refusal.Swap(&err) == nil {
			l.opts.Logger.Error("the disk refuses the log; acknowledgements wait until it takes writes again",
				"dir", l.dir, "err", err)
		}
		l.handBack(b, rest)
		select {
		case <-l.stop:
			// One more try, then give up.
			if l.write(b) != nil {
				return false
			}
		case <-time.After(retryWrite):
			continue
		}
		break
	}
	l.stats.batches.Add(1)
	if l.restore() {
		l.taken()
		l.tell(b)
	} else {
		l.withhold(b)
	}
	l.recycle(b)
	return true
}

// handBack gives away what waits for a batch that the disk refuses, and for those behind it.
func (l *Log[T]) handBack(b *batch[T], rest []*batch[T]) {
	if l.opts.Withheld == nil {
		return
	}
	b.waits = l.opts.Withheld(b.waits)
	for _, b := range rest {
		b.waits = l.opts.Withheld(b.waits)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.queue { // who appends may hold locks that Withheld takes
		waits := b.waits
		b.waits = nil
		l.mu.Unlock()
		waits = l.opts.Withheld(waits)
		l.mu.Lock()
		b.waits = append(waits, b.waits...)
	}
}

// taken notes that the disk takes what is written, and that there is a reserve.
func (l *Log[T]) taken() {
	if l.refusal.Swap(nil) != nil {
		l.opts.Logger.Info("the disk takes the log again", "dir", l.dir)
	}
}

// tell tells the waiters of a batch, which may be nil, after those that were to be
// told later.
func (l *Log[T]) tell(b *batch[T]) {
	l.committed(l.reserve.withheld)
	l.reserve.withheld = nil
	if b != nil {
		l.committed(b.waits)
	}
}

func (l *Log[T]) committed(done []T) {
	if len(done) == 0 {
		return
	}
	if l.opts.Committed != nil {
		l.opts.Committed(done)
	}
	l.stats.committed.Add(uint64(len(done)))
}

const (
	// maxSpare is the largest buffer that is kept for the next batch.
	maxSpare = 4 << 20
	// spares is how many are: one is written while another is filled.
	spares = 2
)

func (l *Log[T]) recycle(b *batch[T]) {
	if cap(b.buf) > maxSpare {
		return
	}
	clear(b.waits)
	b.buf, b.waits = b.buf[:0], b.waits[:0]
	l.mu.Lock()
	if len(l.spare) < spares {
		l.spare = append(l.spare, b)
	}
	l.mu.Unlock()
}

// write brings b to the disk; after an error the segment is as it was.
func (l *Log[T]) write(b *batch[T]) error {
	if l.suspect.Load() {
		// Nothing more is promised before what was promised is safe.
		if err := l.sync(); err != nil {
			return err
		}
	}
	if b.seg != l.fseg {
		if err := l.rotate(b.seg); err != nil {
			return err
		}
	}
	l.mark(b)
	n := len(b.buf)
	if l.ahead.inside {
		b.buf = append(b.buf, endMark...)
	}
	_, err := l.f.WriteAt(b.buf, l.written)
	b.buf = b.buf[:n]
	if err == nil && l.opts.Mode == SyncAlways {
		err = l.f.Datasync()
		l.stats.syncs.Add(1)
	}
	if err != nil {
		// After a failed sync the pages count as clean; writing them again is what
		// makes the next sync try again.
		return errors.Join(err, l.f.Truncate(l.written))
	}
	l.written += int64(len(b.buf))
	l.lookAhead()
	if l.opts.Mode == SyncInterval {
		l.syncMu.Lock()
		l.dirty, l.curWritten = true, l.written
		l.syncMu.Unlock()
		// So that the next sync, and the end of a segment, find little left to do.
		if l.pending += int64(len(b.buf)); l.pending >= startBytes {
			l.pending = 0
			select {
			case l.start <- struct{}{}:
			default:
			}
		}
	}
	return nil
}

// mark fills in the mark at the front of a batch.
func (l *Log[T]) mark(b *batch[T]) {
	synced := l.written
	if l.opts.Mode == SyncInterval {
		l.syncMu.Lock()
		synced = l.synced
		l.syncMu.Unlock()
	}
	appendMark(b.buf[:0], b.salt, l.id, synced)
}

// startBytes is how much is written before the disk is asked to start on it, ahead of
// the sync.
const startBytes = 8 << 20

// rotate ends the current segment, durably, and starts the next.
func (l *Log[T]) rotate(seg uint64) error {
	if err := l.f.Truncate(l.written); err != nil {
		return err
	}
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if err := l.syncLocked(file.Sync); err != nil {
		return err
	}
	old := l.f
	if err := l.startSegment(seg); err != nil {
		return err
	}
	return old.Close()
}

// syncLoop syncs the current segment every interval, and has the disk start on it when
// much was written.
func (l *Log[T]) syncLoop() {
	t := time.NewTicker(l.opts.Interval)
	defer t.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-l.start:
			l.startWriting()
			continue
		case <-t.C:
		}
		l.syncMu.Lock()
		dirty := l.dirty
		l.syncMu.Unlock()
		if !dirty {
			continue
		}
		if err := l.sync(); err != nil {
			l.stats.failures.Add(1)
			l.opts.Logger.Error("the disk refused a sync; a power cut may lose more than the interval", "dir", l.dir, "err", err)
		}
	}
}

// startWriting has the disk start on what is written and not synced, without waiting for
// it: a goroutine that waits in a system call keeps its processor from others, for
// milliseconds. What goes wrong is for the next sync to say.
func (l *Log[T]) startWriting() {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.syncMu.Lock()
	f, from, to := l.cur, l.synced, l.curWritten
	l.syncMu.Unlock()
	f.StartWriting(from, to-from)
}

// sync brings what is written of the current segment to stable storage. After a
// failure it writes it again first: the pages of a failed sync count as clean, so
// that the next sync succeeds without them.
func (l *Log[T]) sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	return l.syncLocked(file.Datasync)
}

// syncLocked is sync for who holds syncing; bring is how the file is synced.
func (l *Log[T]) syncLocked(bring func(file) error) error {
	l.syncMu.Lock()
	f, salt, from, to := l.cur, l.curSalt, l.synced, l.curWritten
	l.dirty = false
	l.syncMu.Unlock()
	err := error(nil)
	if l.suspect.Load() {
		err = rewrite(f, salt, from, to)
	}
	if err == nil {
		l.stats.syncs.Add(1)
		err = bring(f)
	}
	l.suspect.Store(err != nil)
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	if err != nil {
		l.dirty = true
		return err
	}
	l.synced = max(l.synced, to)
	return nil
}

// rewrite writes a part of a file over itself. What is read must be the records that
// were written, whole: a file system may have let go of them.
func rewrite(f file, salt uint32, from, to int64) error {
	b := make([]byte, to-from)
	if _, err := f.ReadAt(b, from); err != nil {
		return err
	}
	for rest := b; len(rest) > 0; {
		n, ok := wholeRecord(rest, salt)
		if !ok {
			return fmt.Errorf("%w at byte %d after a failed sync: the file system has lost what it took; "+
				"stop, and see to the disk", ErrCorrupt, to-int64(len(rest)))
		}
		rest = rest[n:]
	}
	_, err := f.WriteAt(b, from)
	return err
}

// isHeld reports whether anything of a segment is held; l.mu is held.
func (l *Log[T]) isHeld(seg uint64) bool {
	h := l.live[seg]
	return h != nil && h.records > 0
}

// needed returns the oldest segment that something holds, or that is written to.
// l.mu is held.
func (l *Log[T]) needed() uint64 {
	n := l.oldest
	for n < l.seg && !l.isHeld(n) {
		n++
	}
	return n
}

// clean removes the segments before needed, and asks for the oldest one to be
// relocated when more than half of the log is dead weight.
func (l *Log[T]) clean(needed uint64) {
	l.mu.Lock()
	first, end := l.oldest, min(needed, l.fseg)
	l.mu.Unlock()
	if first < end {
		// What stands for the removed records must not be younger than the removal, nor
		// must the note that they are not missing.
		if err := l.sync(); err != nil {
			l.stats.failures.Add(1)
			return
		}
		if err := l.note(oldestName, end); err != nil {
			l.stats.failures.Add(1)
			return
		}
	}
	for n := first; n < end; n++ {
		if err := l.removeSegment(n); err != nil && !errors.Is(err, os.ErrNotExist) {
			l.opts.Logger.Warn("cannot remove an old segment", "dir", l.dir, "segment", n, "err", err)
			return
		}
		l.mu.Lock()
		delete(l.sizes, n)
		delete(l.live, n)
		l.oldest = n + 1
		l.mu.Unlock()
	}
	if l.opts.Relocate == nil {
		return
	}
	l.mu.Lock()
	seg := l.oldest
	wasteful := l.disk() > 2*l.held+4*l.opts.SegmentSize
	if l.reserve.spent && l.isHeld(seg) {
		wasteful = l.sizes[seg]-l.live[seg].bytes > l.sizes[seg]/4
	}
	move := l.moving == 0 && seg < l.fseg && l.isHeld(seg) && wasteful
	if move {
		l.moving = seg
	}
	l.mu.Unlock()
	if move {
		l.opts.Relocate(seg)
	}
}
