package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/seglog"
)

// Mode says when a frame counts as stored.
type Mode = seglog.Mode

// Modes of durability.
const (
	// SyncAlways: once it is on stable storage.
	SyncAlways = seglog.SyncAlways
	// SyncInterval: once the operating system has it.
	SyncInterval = seglog.SyncInterval
)

// DefaultSegmentSize is the length of a segment file in bytes.
const DefaultSegmentSize = seglog.DefaultSegmentSize

// Errors that Open's error wraps, for the operator's sake.
var (
	ErrCorrupt = seglog.ErrCorrupt
	ErrNewer   = seglog.ErrNewer
	ErrInUse   = seglog.ErrInUse
)

// errRecord means that a record's checksum holds and its content does not.
var errRecord = fmt.Errorf("%w: record makes no sense", ErrCorrupt)

// Options of a Store. Zero values are the defaults of package seglog.
type Options struct {
	Mode Mode
	// Interval between syncs in mode SyncInterval: what a power cut can lose.
	Interval time.Duration
	// SegmentSize is the length of a segment file in bytes.
	SegmentSize int64
	// Reserve is how many bytes of the disk the store keeps for cleaning itself up
	// when it is full: as much as the bridge lets wait for the disk, with its records,
	// and a segment. 0 keeps none.
	Reserve int64
	// Logger hears of a disk that refuses and of what was cut off; nil discards.
	Logger *slog.Logger
}

// Report says what Open found.
type Report struct {
	seglog.Report
	// Names with queues, Frames that wait in them, and entries of the tables.
	Names, Frames, Entries int
	// FrameBytes is the length of all Frames.
	FrameBytes int64
}

// Stats are the counters of the log below.
type Stats = seglog.Stats

// Store is an open data folder. Make one with Open. All methods are safe for
// concurrent use.
type Store struct {
	log    *seglog.Log[wait]
	logger *slog.Logger
	memory bridge.OutboxFactory
	ahead  atomic.Int64 // wall clock of the bridge's own, in nanoseconds

	mu     sync.Mutex
	byName map[string]*outbox
	byID   map[uint32]*outbox
	nextID uint32
	tables map[string]*entry
	late   map[string][]byte // entries to be written once the disk takes writes again; nil: gone
	asked  []func()          // by Settled, waiting for late to be written
	fences []func()          // in the log, oldest first: to be called once written

	told []bridge.Ticket // scratch of the log's goroutine

	moves chan uint64   // segments to be cleared
	moved chan struct{} // closed when runMoves has returned

	dirtyMu sync.Mutex
	dirty   []*outbox       // with something to be written
	answers []bridge.Ticket // of what needs no disk any more
	close   sync.Once
	stop    chan struct{}
	done    chan struct{} // closed when writeDone has returned
}

// entry is the current value of a table's key and where it is.
type entry struct {
	seg   uint64
	size  int64
	value []byte
}

// writeDelivered is how long a delivery may wait to be written; a crash within it
// delivers again.
const writeDelivered = 20 * time.Millisecond

// Open opens the store in dir, which is made if it is missing, checks it and says
// what it found. The folder is locked until Close.
func Open(dir string, opts Options) (*Store, *Report, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		logger: opts.Logger, memory: bridge.MemoryOutboxes(),
		byName: make(map[string]*outbox), byID: make(map[uint32]*outbox), nextID: 1,
		tables: make(map[string]*entry), late: make(map[string][]byte),
		moves: make(chan uint64, 1), moved: make(chan struct{}),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	rc := &recovery{s: s, dir: dir, boxes: make(map[uint32]*recovered), now: time.Now().UnixNano()}
	log, lrep, err := seglog.Open(dir, seglog.Options[wait]{
		Mode: opts.Mode, Interval: opts.Interval, SegmentSize: opts.SegmentSize, Reserve: opts.Reserve,
		Relocate: s.relocate, Committed: s.committed, Withheld: s.withheld, Early: moved, Ahead: opts.Mode == seglog.SyncAlways, Check: rc.check, Logger: opts.Logger,
	}, rc.record)
	if err != nil {
		return nil, nil, fmt.Errorf("store: %w", err)
	}
	s.log = log
	rep := &Report{Report: *lrep}
	if err := rc.finish(rep); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("store: %w", err), log.Close())
	}
	rep.Names, rep.Entries = len(s.byName), len(s.tables)
	go s.writeDone()
	go s.runMoves()
	s.log.Clean()
	return s, rep, nil
}

// Close writes what is left and gives the folder free. The bridge must be closed
// before. A second Close does nothing.
func (s *Store) Close() error {
	s.close.Do(func() { close(s.stop) })
	<-s.done
	<-s.moved
	return s.log.Close()
}

// Stats returns the log's counters.
func (s *Store) Stats() Stats { return s.log.Stats() }

// Failing reports whether the disk refuses writes at the moment: acknowledgements
// wait, nothing is lost.
func (s *Store) Failing() bool { return s.log.Failing() }

// Refusal returns why the disk refuses writes at the moment; nil when it does not.
func (s *Store) Refusal() error { return s.log.Refusal() }

// Outbox is a bridge.OutboxFactory. What is not durable stays in memory.
func (s *Store) Outbox(name string, durable bool) (bridge.Outbox, error) {
	mem, err := s.memory(name, durable)
	if err != nil || !durable {
		return mem, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.byName[name]; b != nil {
		return b, nil
	}
	b := &outbox{memory: mem.(memory), s: s, name: name, id: s.nextID}
	if err := b.writeName(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s.nextID++
	s.byName[name], s.byID[b.id] = b, b
	return b, nil
}

// Names lists the names that have a queue, in no order.
func (s *Store) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]string, 0, len(s.byName))
	for n := range s.byName {
		out = append(out, n)
	}
	return out
}

// forget takes a discarded name off the store.
func (s *Store) forget(b *outbox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byName, b.name)
	delete(s.byID, b.id)
}

// put sets an entry of a table; nil removes it. While the disk refuses, only the
// last value of each is kept.
func (s *Store) put(key string, value []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.log.Failing() {
		s.late[key] = value
		return
	}
	delete(s.late, key)
	s.write(key, value)
}

// writeLate writes the entries that had to wait for the disk.
func (s *Store) writeLate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.late) == 0 && len(s.asked) == 0 || s.log.Failing() {
		return
	}
	for key, value := range s.late {
		s.write(key, value)
	}
	clear(s.late)
	for _, done := range s.asked {
		s.fence(done)
	}
	s.asked = nil
}

// maxAsked bounds those who wait for a disk that refuses. Who asked beyond that
// hears nothing, and has to ask again.
const maxAsked = 4096

// ClockSet implements bridge.ClockJournal.
func (s *Store) ClockSet(ahead time.Duration) { s.ahead.Store(int64(ahead)) }

// Settled implements bridge.SettlingJournal.
func (s *Store) Settled(done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.late) == 0 && !s.log.Failing():
		s.fence(done)
	case len(s.asked) < maxAsked:
		s.asked = append(s.asked, done)
	}
}

// fence writes an entry that says nothing, behind those before it. s.mu is held.
func (s *Store) fence(done func()) {
	w := wait{ticket: bridge.NewTicket(fence{s}, 0)}
	if _, err := s.log.Append(recTable, false, appendTable(nil, "", nil), &w); err == nil {
		s.fences = append(s.fences, done)
	}
}

// fence waits for the entries that fence writes.
type fence struct{ s *Store }

// Acked implements bridge.Acker.
func (f fence) Acked(uint64) {
	f.s.mu.Lock()
	done := f.s.fences[0]
	f.s.fences[0] = nil
	f.s.fences = f.s.fences[1:]
	f.s.mu.Unlock()
	done()
}

// write appends an entry of a table. s.mu is held.
func (s *Store) write(key string, value []byte) {
	old := s.tables[key]
	if old == nil && value == nil {
		return
	}
	record := appendTable(nil, key, value)
	seg, err := s.log.Append(recTable, value != nil, record, nil)
	if err != nil {
		s.logger.Error("cannot write a table entry", "err", err)
		return
	}
	if value == nil {
		delete(s.tables, key)
	} else {
		s.tables[key] = &entry{seg: seg, size: int64(len(record) - seglog.Room), value: value}
	}
	if old != nil {
		s.log.Release(old.seg, 1, old.size)
	}
}

// mark notes that b has something to be written.
func (s *Store) mark(b *outbox) {
	s.dirtyMu.Lock()
	s.dirty = append(s.dirty, b)
	s.dirtyMu.Unlock()
}

// answer has a ticket called soon, by a goroutine that holds no lock of the bridge.
func (s *Store) answer(t bridge.Ticket) {
	s.dirtyMu.Lock()
	s.answers = append(s.answers, t)
	s.dirtyMu.Unlock()
}

// writeDone writes deliveries every few milliseconds: one record for each queue,
// however many frames it covers.
func (s *Store) writeDone() {
	defer close(s.done)
	t := time.NewTicker(writeDelivered)
	defer t.Stop()
	for last := false; !last; {
		select {
		case <-t.C:
		case <-s.stop:
			last = true
		}
		s.writeLate()
		s.dirtyMu.Lock()
		due, answers := s.dirty, s.answers
		s.dirty, s.answers = nil, nil
		s.dirtyMu.Unlock()
		bridge.DoneAll(answers)
		for _, b := range due {
			b.mu.Lock()
			b.flush()
			b.mu.Unlock()
		}
	}
}

// Kinds of records.
const (
	recName byte = iota + 1
	recFrames
	recDone
	recDrop
	recDiscard
	recTable
)

const (
	flagFirst = 1 << iota
)

// newRecord appends the room that the log needs in front of a record's body.
func newRecord(dst []byte) []byte {
	var room [seglog.Room]byte
	return append(dst, room[:]...)
}

func appendTable(dst []byte, key string, value []byte) []byte {
	dst = binary.AppendUvarint(newRecord(dst), uint64(len(key)))
	dst = append(dst, key...)
	return append(dst, value...)
}
