package seglog

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
)

// Mode says when a record counts as committed.
type Mode uint8

const (
	// SyncAlways commits a record once it is on stable storage.
	SyncAlways Mode = iota
	// SyncInterval commits a record once the operating system has it, and syncs
	// every Options.Interval.
	SyncInterval
)

// Defaults of Options.
const (
	DefaultInterval    = time.Second
	DefaultSegmentSize = 64 << 20
)

// retryWrite is the pause between tries to write when the disk refuses.
const retryWrite = 500 * time.Millisecond

// Options of a Log whose appenders wait with a T. The zero value is SyncAlways with
// the defaults.
type Options[T any] struct {
	Mode Mode
	// Interval between syncs in mode SyncInterval, which is the most that a power
	// cut loses; 0 means DefaultInterval.
	Interval time.Duration
	// SegmentSize is the length in bytes at which a new segment begins; 0 means
	// DefaultSegmentSize.
	SegmentSize int64
	// Committed takes what was given to Append with the records that a write has
	// committed, in the order of the appends. It runs on the writing goroutine, must
	// not block, and keeps nothing of done, which is valid during the call. It is not
	// called for records that Close could not write. Nil: nobody waits.
	Committed func(done []T)
	// Withheld takes what waits for records that the disk refuses, or that are written
	// into the reserve: the log tells those no more. It returns who is to hear of the
	// commit all the same, and may use the memory of waits for that. It runs on the
	// writing goroutine. Nil: all hear of it.
	Withheld func(waits []T) []T
	// Early reports whether Committed is to be called for a waiter while the reserve
	// is in use, too: for relocations. Nil: for none.
	Early func(T) bool
	// Relocate is asked to append the live records of a segment again and to
	// release the old ones once the new ones are committed. It runs on the writing
	// goroutine. Nil: old segments stay until all of their records are released.
	Relocate func(segment uint64)
	// Reserve is how many bytes of the disk are kept for the log to clean itself up
	// in when it is full; at most a quarter of what is free. It has to hold what is
	// appended without a commit, and a segment. 0 keeps none.
	Reserve int64
	// Ahead makes each segment before it is needed, of an old one's file or of zeros:
	// what is written over them is on stable storage in about half the time, for the
	// file system has nothing to note. It costs the room of two segments, and of the
	// processor's time what pays only in SyncAlways.
	Ahead bool
	// Check has the last word on what was replayed, before anything in the folder is
	// changed: its error is that of Open. Nil: all is well.
	Check func() error
	// Logger takes what goes wrong with the disk; nil discards it.
	Logger *slog.Logger

	allocate func(path string, size int64) error
	free     func(dir string) (int64, bool)

	create func(path string) (file, error) // tests fail I/O through it
	reopen func(path string) (file, error)
	note   func(path string, segment uint64) error
}

// file is what the log needs of an open segment.
type file interface {
	ReadAt(b []byte, offset int64) (int, error)
	WriteAt(b []byte, offset int64) (int, error)
	Truncate(size int64) error
	Sync() error
	Datasync() error // as Sync, but for times and the like
	StartWriting(offset, n int64)
	Close() error
}

// Report says what Open found.
type Report struct {
	Segments int
	Records  int64
	Bytes    int64
	// TornBytes is what was cut off the newest segment, TornFile its name and
	// TornReason why.
	TornBytes  int64
	TornFile   string
	TornReason string
}

// Stats is a snapshot of a log's counters since Open.
type Stats struct {
	Appended  uint64 // records
	Committed uint64 // records
	Batches   uint64 // writes
	Syncs     uint64
	Failures  uint64 // writes and syncs that the disk refused
	Segments  int
	DiskBytes int64 // of all segments
	LiveBytes int64 // held
}

// Log is an open log. T is what an appender hears of a commit with. Make one with Open.
type Log[T any] struct {
	dir  string
	opts Options[T]
	id   [8]byte
	lock *flock.Flock
	done chan struct{} // closed when all goroutines have returned
	stop chan struct{}

	start chan struct{} // asks for the disk to start on what is written

	refusal atomic.Pointer[error] // why the disk refuses writes at the moment; nil: it does not

	// mu guards what appenders touch.
	mu      sync.Mutex
	wake    sync.Cond
	queue   []*batch[T] // to be written, oldest first
	seg     uint64      // where the next record goes
	off     int64
	salt    uint32 // of seg
	end     int64  // length at which the segment that is appended to ends
	closed  bool
	sweep   bool              // segments may have become free
	sizes   map[uint64]int64  // bytes of each segment that has ended
	live    map[uint64]*holds // what is held of each segment
	here    *holds            // of the one that is appended to; nil: not known yet
	held    int64             // sum over live
	oldest  uint64
	moving  uint64 // segment being relocated; 0: none
	appends uint64
	spare   []*batch[T] // written, to be filled again

	// The writing goroutine alone uses these.
	f       file
	fseg    uint64
	written int64
	pending int64 // written since the disk was last asked to start on it
	reserve reserve[T]
	ahead   ahead
	stats   struct{ committed, batches, syncs, failures atomic.Uint64 }

	// syncing is held during a sync, so that who comes next knows how it went: the
	// operating system tells of a failure once.
	syncing sync.Mutex
	suspect atomic.Bool // a sync failed: what is behind synced may never reach the disk

	// syncMu guards cur, which the interval syncer uses beside the writer, and how
	// much of it is written and synced.
	syncMu     sync.Mutex
	cur        file
	dirty      bool
	curSalt    uint32
	curWritten int64
	synced     int64
}

type holds struct {
	records int64
	bytes   int64
}

// batch is what is written to one segment at once.
type batch[T any] struct {
	seg   uint64
	salt  uint32
	buf   []byte
	waits []T
}

// Open opens the log in dir, which is made if it is missing, and hands every
// record to replay, oldest segment first. body is valid during the call. Where it refuses
// what it finds, it has changed nothing. The folder stays locked until Close.
func Open[T any](dir string, opts Options[T], replay func(at Place, kind byte, body []byte) error) (*Log[T], *Report, error) {
	if opts.Interval == 0 {
		opts.Interval = DefaultInterval
	}
	if opts.SegmentSize == 0 {
		opts.SegmentSize = DefaultSegmentSize
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.create == nil {
		opts.create = func(path string) (file, error) {
			return openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		}
		opts.reopen = func(path string) (file, error) { return openFile(path, os.O_RDWR) }
	}
	if opts.note == nil {
		opts.note = writeNote
	}
	if opts.allocate == nil {
		opts.allocate, opts.free = allocate, freeSpace
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("seglog: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, nil, err
	}
	l := &Log[T]{
		dir: dir, opts: opts, lock: lock, done: make(chan struct{}), stop: make(chan struct{}), start: make(chan struct{}, 1),
		sizes: make(map[uint64]int64), live: make(map[uint64]*holds),
	}
	l.wake.L = &l.mu
	report, err := l.recover(replay)
	if err != nil {
		_ = lock.Close()
		return nil, nil, err
	}
	l.makeReserve(report.Bytes)
	l.end = l.opts.SegmentSize
	go l.run()
	return l, report, nil
}

// recover reads the segments and opens the newest one for writing.
func (l *Log[T]) recover(replay func(at Place, kind byte, body []byte) error) (*Report, error) {
	list, err := listSegments(l.dir)
	if err != nil {
		return nil, err
	}
	segs := list.segs
	rep := &Report{}
	var torn *badRecord
	var headless string // a segment that somebody crashed over
	for i, n := range segs {
		path := filepath.Join(l.dir, segmentName(n))
		newest := i == len(segs)-1
		found, err := scanSegment(path, n, &l.id, func(offset int64, kind byte, body []byte) error {
			if kind == kindMark {
				return nil
			}
			rep.Records++
			return replay(Place{n, offset}, kind, body)
		})
		if err != nil {
			return nil, fmt.Errorf("seglog: %s: %w", path, err)
		}
		if bad := found.bad; bad != nil {
			if found.good < headerLen && n <= list.newest {
				bad.damage, bad.reason = true, bad.reason+", where it had been synced"
			}
			if !newest || bad.damage {
				return nil, &CorruptError{File: path, Offset: bad.offset, Reason: bad.reason}
			}
			if !bad.end && bad.rest > 0 {
				rep.TornFile, rep.TornReason, rep.TornBytes = path, bad.reason, bad.rest
				torn = bad
			}
		}
		if found.good < headerLen { // it is the newest
			headless, segs = path, segs[:i]
			break
		}
		l.sizes[n] = found.good
		rep.Bytes += found.good
		l.salt = found.salt // of the newest, in the end
	}
	if l.opts.Check != nil {
		if err := l.opts.Check(); err != nil {
			return nil, err
		}
	}
	l.dropAhead()
	if torn != nil {
		l.opts.Logger.Warn("log ends in a torn record; the rest is cut off",
			"file", rep.TornFile, "offset", torn.offset, "bytes", rep.TornBytes, "reason", rep.TornReason)
	}
	if headless != "" {
		if err := os.Remove(headless); err != nil {
			return nil, fmt.Errorf("seglog: %w", err)
		}
	}
	for l.id == ([8]byte{}) {
		_, _ = rand.Read(l.id[:]) // crypto/rand never fails
	}
	rep.Segments = len(segs)
	if len(segs) == 0 {
		l.oldest, l.seg, l.off = 1, 1, headerLen
		l.salt = salt(1)
		l.sizes[1] = headerLen
		if err := l.startSegment(1); err != nil {
			return nil, err
		}
		_ = l.note(oldestName, 1)
		return rep, nil
	}
	l.oldest, l.seg = segs[0], segs[len(segs)-1]
	l.off = l.sizes[l.seg]
	f, err := l.opts.reopen(filepath.Join(l.dir, segmentName(l.seg)))
	if err != nil {
		return nil, fmt.Errorf("seglog: %w", err)
	}
	if err := errors.Join(f.Truncate(l.off), f.Sync(), syncDir(l.dir)); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("seglog: %w", err)
	}
	l.setFile(f, l.seg, l.salt, l.off)
	if list.newest < l.seg { // the process died before, or the disk refused
		_ = l.note(newestName, l.seg)
	}
	if list.oldest == 0 {
		_ = l.note(oldestName, l.oldest)
	}
	return rep, nil
}

// startSegment makes segment n and makes it the one that is written. What a
// failed try left behind is removed first.
func (l *Log[T]) startSegment(n uint64) error {
	path := filepath.Join(l.dir, segmentName(n))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("seglog: %w", err)
	}
	f, err := l.takeAhead(path)
	if f == nil && err == nil {
		f, err = l.opts.create(path)
	}
	if err != nil {
		return fmt.Errorf("seglog: %w", err)
	}
	_, werr := f.WriteAt(appendHeader(nil, l.id), 0)
	if err := errors.Join(werr, f.Sync(), syncDir(l.dir)); err != nil {
		_ = f.Close()
		return fmt.Errorf("seglog: %w", err)
	}
	l.setFile(f, n, salt(n), headerLen)
	_ = l.note(newestName, n) // the one before is true as well
	return nil
}

// note notes segment n. What cannot be noted is not noted any more: then a loss of the
// segment is not noticed, and nothing else. After an error the note of before may be there.
func (l *Log[T]) note(name string, n uint64) error {
	path := filepath.Join(l.dir, name)
	err := l.opts.note(path, n)
	if err == nil {
		return nil
	}
	l.opts.Logger.Warn("cannot note the number of a segment; its loss would not be noticed", "file", path, "segment", n, "err", err)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return syncDir(l.dir)
}

func (l *Log[T]) setFile(f file, seg uint64, salt uint32, written int64) {
	l.f, l.fseg, l.written = f, seg, written
	l.syncMu.Lock()
	l.cur, l.curSalt, l.curWritten, l.synced = f, salt, written, written // what is there has been synced
	l.syncMu.Unlock()
}

// Append queues one record and returns the segment that it goes to. record is Room
// bytes, which Append fills in, and the body; it is copied. hold says that the record
// is needed at the next Open, as Hold does with the length of the body. wait, unless
// nil, goes to Options.Committed once the record is committed. While the disk refuses
// writes, records wait in memory and nobody is told: it is for the caller to bound
// what it appends.
func (l *Log[T]) Append(kind byte, hold bool, record []byte, wait *T) (seg uint64, err error) {
	if kind == kindMark {
		return 0, ErrKind
	}
	size, body := int64(len(record)), int64(len(record)-Room)
	if size > MaxRecord {
		return 0, fmt.Errorf("%w: %d bytes, %d at most", ErrTooLarge, size, MaxRecord)
	}
	fillHead(record, kind) // before the lock: it reads the whole record
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, ErrClosed
	}
	if l.off+size > l.end && l.off > headerLen {
		l.sizes[l.seg] = l.off
		l.seg++
		l.off, l.end = headerLen, l.opts.SegmentSize
		l.salt = salt(l.seg)
		l.here = nil
		l.sweep = true
	}
	b, fresh := l.tail()
	if fresh {
		b.salt = l.salt
		b.buf = append(b.buf, make([]byte, markLen)...) // write fills it in
		l.off += markLen
	}
	at := len(b.buf)
	b.buf = append(b.buf, record...)
	mix(b.buf[at:], l.salt)
	if wait != nil {
		b.waits = append(b.waits, *wait)
	}
	l.off += size
	l.appends++
	if hold {
		if l.here == nil {
			l.here = l.holds(l.seg)
		}
		l.here.records++
		l.here.bytes += body
		l.held += body
	}
	if len(l.queue) == 1 && fresh {
		l.wake.Signal()
	}
	return l.seg, nil
}

// tail returns the batch that takes the next record, and whether that is its first.
func (l *Log[T]) tail() (b *batch[T], fresh bool) {
	if n := len(l.queue); n > 0 && l.queue[n-1].seg == l.seg {
		return l.queue[n-1], false
	}
	if n := len(l.spare); n > 0 {
		b, l.spare = l.spare[n-1], l.spare[:n-1]
	} else {
		b = &batch[T]{}
	}
	b.seg = l.seg
	l.queue = append(l.queue, b)
	return b, true
}

// Hold says that n records with bodies of size bytes in all, in segment seg, are
// needed at the next Open: for what Open replayed. A segment is removed once
// nothing in it or in any older one is held.
func (l *Log[T]) Hold(seg uint64, n, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.holds(seg)
	h.records += n
	h.bytes += size
	l.held += size
}

func (l *Log[T]) holds(seg uint64) *holds {
	h := l.live[seg]
	if h == nil {
		h = &holds{}
		l.live[seg] = h
	}
	return h
}

// Release takes back n records with bodies of size bytes in all of what is held in
// segment seg.
func (l *Log[T]) Release(seg uint64, n, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.here
	if h == nil || seg != l.seg {
		h = l.live[seg]
	}
	if h == nil || h.records < n {
		panic("seglog: Release without Hold")
	}
	h.records -= n
	h.bytes -= size
	l.held -= size
	if h.records == 0 && seg != l.seg {
		delete(l.live, seg)
		if l.moving == seg {
			l.moving = 0
		}
		if seg == l.oldest && seg < l.seg {
			l.sweep = true
			l.wake.Signal()
		}
	}
}

// Clean removes segments that nothing holds, and has others relocated, as happens
// by itself whenever a segment ends: for the caller of Open, once it has said what
// it holds.
func (l *Log[T]) Clean() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep = true
	l.wake.Signal()
}

// Failing reports whether the disk refuses writes at the moment, so that records
// wait in memory.
func (l *Log[T]) Failing() bool { return l.refusal.Load() != nil }

// Refusal returns why the disk refuses writes at the moment; nil when it does not.
func (l *Log[T]) Refusal() error {
	if err := l.refusal.Load(); err != nil {
		return *err
	}
	return nil
}

// Stats returns the counters.
func (l *Log[T]) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Stats{
		Appended: l.appends, Committed: l.stats.committed.Load(), Batches: l.stats.batches.Load(),
		Syncs: l.stats.syncs.Load(), Failures: l.stats.failures.Load(), Segments: int(l.seg - l.oldest + 1), LiveBytes: l.held,
	}
	s.DiskBytes = l.disk()
	return s
}

// disk returns the length of all segments; l.mu is held.
func (l *Log[T]) disk() int64 {
	n := l.off
	for seg, size := range l.sizes {
		if seg != l.seg {
			n += size
		}
	}
	return n
}

// Close writes and syncs what is queued, and gives the folder free. While the
// disk refuses, it tries once more and then returns the error; what could not be
// written is lost, and its waiters were never told. A second Close returns nil.
func (l *Log[T]) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		<-l.done
		return nil
	}
	l.closed = true
	l.wake.Signal()
	l.mu.Unlock()
	close(l.stop)
	<-l.done
	var err error
	if why := l.Refusal(); why != nil {
		err = fmt.Errorf("seglog: the disk refused the last records, which were never acknowledged: %w", why)
	}
	l.dropAhead()
	return errors.Join(err, l.seal(err == nil), l.f.Close(), l.lock.Close())
}

// seal syncs the last segment, and marks it as synced to its end.
func (l *Log[T]) seal(mark bool) error {
	if err := errors.Join(l.f.Truncate(l.written), l.sync()); err != nil || !mark || l.stats.batches.Load() == 0 {
		return err
	}
	if _, err := l.f.WriteAt(appendMark(nil, l.curSalt, l.id, l.written), l.written); err != nil {
		return err
	}
	return l.f.Sync()
}
