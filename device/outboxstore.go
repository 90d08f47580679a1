package device

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/sealmq/sealmq/delivery"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/seglog"
	"github.com/sealmq/sealmq/route"
)

// Errors of the folder in Config.OutboxDir.
var (
	// ErrOutboxInUse: another process has the folder open.
	ErrOutboxInUse = errors.New("device: the outbox folder is in use by another process")
	// ErrOutboxIdentity: the folder belongs to another identity, whose key sealed it.
	ErrOutboxIdentity = errors.New("device: the outbox folder belongs to another identity")
	// ErrOutboxDamaged: something in the folder is not what was written.
	ErrOutboxDamaged = errors.New("device: the outbox folder is damaged")
	// ErrOutboxBehind: the peer has had messages of an outbox that the folder knows
	// nothing of, so the folder is an old copy. Nothing more of that outbox is sent: its
	// counts would name other messages than before. Outbox.Forget ends it; another one
	// can take its place.
	ErrOutboxBehind = errors.New("device: the outbox is older than what its peer has had of it")
	// ErrOutboxOpen: other users may read or change the folder.
	ErrOutboxOpen = errors.New("device: the outbox folder is open to other users")
)

// Kinds of records. Each is sealed with XChaCha20-Poly1305 under a key of the
// identity, with a random nonce in front and the kind as additional data; the owner's
// identifier alone is in the clear.
const (
	recordOwner  = 0 // identifier of the owner, in the clear, then nothing sealed
	recordOpen   = 1 // index, outbox id, next count, peer, address, route
	recordAdd    = 2 // index, count, flags, payload
	recordAcked  = 3 // index, count, …
	recordEpoch  = 4 // index, mark, epoch of the receiver
	recordForget = 5 // index
)

// flagVoid in recordAdd marks a message that was withdrawn.
const flagVoid = 1

// outboxSegment is the length of a file of the store, in bytes. Tests shorten it.
var outboxSegment int64 = 8 << 20

// outboxStore keeps outboxes in a segment log. What is live in it is in memory too.
type outboxStore struct {
	id   identity.Identifier // of the owner
	log  *seglog.Log[func()]
	aead cipher.AEAD

	logger *slog.Logger

	mu    sync.Mutex // guards what follows
	boxes map[uint64]*storedOutbox
	last  uint64 // index given last
	owner liveRecord
}

// liveRecord is where a record that is needed at the next start lies.
type liveRecord struct {
	seg  uint64
	size int64 // of the sealed body
}

// storedOutbox is an outbox in the store. The store's lock guards it.
type storedOutbox struct {
	s       *outboxStore
	index   uint64
	id      delivery.OutboxID
	to      Destination
	address string
	next    uint64
	open    liveRecord
	epoch   *storedEpoch
	adds    map[uint64]*storedAdd
	gone    bool
}

type storedEpoch struct {
	liveRecord
	epoch [16]byte
	mark  uint64
}

type storedAdd struct {
	liveRecord
	void    bool
	payload []byte // shared with the sender; never changed
}

// leftOutbox is an outbox that an earlier process left.
type leftOutbox struct {
	to       Destination
	address  string
	stored   *storedOutbox
	restored delivery.Restored
}

// openOutboxStore opens the folder and returns what is in it.
func openOutboxStore(dir string, owner *identity.Private, logger *slog.Logger) (*outboxStore, []*leftOutbox, error) {
	if err := checkOutboxDir(dir); err != nil {
		return nil, nil, err
	}
	key := owner.Secret("outbox/1")
	aead, err := chacha20poly1305.NewX(key[:])
	if err != nil {
		return nil, nil, fmt.Errorf("device: outbox: %w", err)
	}
	id := owner.Identifier()
	s := &outboxStore{id: id, aead: aead, logger: logger, boxes: make(map[uint64]*storedOutbox)}
	found := false
	s.mu.Lock() // relocate may be called as soon as the log is open
	defer s.mu.Unlock()
	s.log, _, err = seglog.Open(dir, seglog.Options[func()]{SegmentSize: outboxSegment, Committed: committed, Relocate: s.relocate, Logger: logger},
		func(at seglog.Place, kind byte, body []byte) error {
			if kind == recordOwner {
				if len(body) != len(id) || identity.Identifier(body) != id {
					return fmt.Errorf("%w; give each identity a folder of its own", ErrOutboxIdentity)
				}
				found, s.owner = true, liveRecord{at.Segment, int64(len(body))}
				return nil
			}
			return s.replay(at.Segment, kind, body)
		})
	if err != nil {
		return nil, nil, outboxError(dir, err)
	}
	left := s.leftLocked()
	if !found && len(left) == 0 {
		if s.owner, err = s.writeLocked(recordOwner, id[:], true, nil); err != nil {
			return nil, nil, outboxError(dir, err)
		}
	} else if found {
		s.log.Hold(s.owner.seg, 1, s.owner.size)
	}
	return s, left, nil
}

// checkOutboxDir makes the folder, and refuses one that others may use.
func checkOutboxDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("device: outbox: %w", err)
	}
	if runtime.GOOS == "windows" {
		return nil // access lists instead of modes
	}
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("device: outbox: %w", err)
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("device: outbox: %w", err)
		}
		want := fs.FileMode(0o600)
		if e.IsDir() {
			want = 0o700
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 {
			return fmt.Errorf("%w: %s has mode %04o; do: chmod %o %s", ErrOutboxOpen, path, mode, want, path)
		}
		if path != dir && e.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

func outboxError(dir string, err error) error {
	switch {
	case errors.Is(err, seglog.ErrInUse):
		return fmt.Errorf("%w: %s; give each running program a folder of its own (Config.OutboxDir)", ErrOutboxInUse, dir)
	case errors.Is(err, seglog.ErrCorrupt):
		err = fmt.Errorf("%w: %w", ErrOutboxDamaged, err)
	}
	if errors.Is(err, ErrOutboxDamaged) {
		return fmt.Errorf("%w; move %s away to go on without what it holds", err, dir)
	}
	return fmt.Errorf("device: outbox in %s: %w", dir, err)
}

// Encoding of records: big-endian 64-bit integers, then what has a length of its
// own.

func putUints(dst []byte, v ...uint64) []byte {
	for _, u := range v {
		dst = binary.BigEndian.AppendUint64(dst, u)
	}
	return dst
}

func (b *storedOutbox) encodeOpen() []byte {
	out := putUints(nil, b.index, b.next)
	out = append(out, b.id[:]...)
	out = append(out, b.to.Peer[:]...)
	out = append(out, byte(len(b.address))) // MaxAddress is 255
	out = append(out, b.address...)
	return append(out, b.to.Route.String()...)
}

func (b *storedOutbox) encodeAdd(count uint64, a *storedAdd) []byte {
	out := putUints(make([]byte, 0, 17+len(a.payload)), b.index, count)
	flags := byte(0)
	if a.void {
		flags = flagVoid
	}
	return append(append(out, flags), a.payload...)
}

func (b *storedOutbox) encodeEpoch() []byte {
	return append(putUints(nil, b.index, b.epoch.mark), b.epoch.epoch[:]...)
}

func (s *outboxStore) seal(kind byte, plain []byte) []byte {
	nonce := make([]byte, chacha20poly1305.NonceSizeX, chacha20poly1305.NonceSizeX+len(plain)+chacha20poly1305.Overhead)
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	return s.aead.Seal(nonce, nonce, plain, []byte{kind})
}

var errRecord = fmt.Errorf("%w: a record in it cannot be read", ErrOutboxDamaged)

// replay takes a record of an earlier process. Records may come twice.
func (s *outboxStore) replay(seg uint64, kind byte, body []byte) error {
	if len(body) < chacha20poly1305.NonceSizeX {
		return errRecord
	}
	nonce, sealed := body[:chacha20poly1305.NonceSizeX], body[chacha20poly1305.NonceSizeX:]
	plain, err := s.aead.Open(nil, nonce, sealed, []byte{kind})
	if err != nil {
		return fmt.Errorf("%w: a record in it was changed, or another identity sealed it", ErrOutboxDamaged)
	}
	if len(plain) < 8 {
		return errRecord
	}
	index, rest := binary.BigEndian.Uint64(plain), plain[8:]
	at := liveRecord{seg, int64(len(body))}
	if kind == recordOpen {
		return s.replayOpen(index, rest, at)
	}
	return s.box(index).replay(kind, rest, at)
}

// box returns the outbox with that index. What is in the log of it can come before
// its recordOpen, which moves ahead with the rest of an old segment.
func (s *outboxStore) box(index uint64) *storedOutbox {
	b := s.boxes[index]
	if b == nil {
		b = &storedOutbox{s: s, index: index, adds: make(map[uint64]*storedAdd)}
		s.boxes[index] = b
		s.last = max(s.last, index)
	}
	return b
}

func (s *outboxStore) replayOpen(index uint64, p []byte, at liveRecord) error {
	const fixed = 8 + 16 + 32 + 1
	if len(p) < fixed || len(p) < fixed+int(p[fixed-1]) {
		return errRecord
	}
	b := s.box(index)
	b.open = at
	b.next = max(b.next, binary.BigEndian.Uint64(p))
	b.id = delivery.OutboxID(p[8:24])
	b.to.Peer = identity.Identifier(p[24:56])
	b.address = string(p[fixed : fixed+int(p[fixed-1])])
	r, err := route.Parse(string(p[fixed+int(p[fixed-1]):]))
	if err != nil {
		return errRecord
	}
	b.to.Route = r
	return nil
}

func (b *storedOutbox) replay(kind byte, p []byte, at liveRecord) error {
	if kind == recordForget {
		delete(b.s.boxes, b.index)
		return nil
	}
	if len(p) < 8 {
		return errRecord
	}
	first, rest := binary.BigEndian.Uint64(p), p[8:]
	switch kind {
	case recordAdd:
		if len(rest) < 1 || first == 0 {
			return errRecord
		}
		b.next = max(b.next, first+1)
		b.adds[first] = &storedAdd{liveRecord: at, void: rest[0]&flagVoid != 0, payload: slices.Clone(rest[1:])}
	case recordAcked:
		for ; len(p) >= 8; p = p[8:] {
			delete(b.adds, binary.BigEndian.Uint64(p))
		}
	case recordEpoch:
		if len(rest) != 16 {
			return errRecord
		}
		b.epoch = &storedEpoch{at, [16]byte(rest), first}
	default:
		return errRecord
	}
	return nil
}

// leftLocked returns what was found, and holds it in the log.
func (s *outboxStore) leftLocked() []*leftOutbox {
	var left []*leftOutbox
	for _, index := range sortedCounts(s.boxes) {
		b := s.boxes[index]
		if b.open.seg == 0 { // forgotten, and the record of that is gone too
			delete(s.boxes, index)
			continue
		}
		s.log.Hold(b.open.seg, 1, b.open.size)
		l := &leftOutbox{to: b.to, address: b.address, stored: b, restored: delivery.Restored{Next: b.next}}
		if b.epoch != nil {
			s.log.Hold(b.epoch.seg, 1, b.epoch.size)
			l.restored.Epoch, l.restored.Mark, l.restored.HasEpoch = b.epoch.epoch, b.epoch.mark, true
		}
		for _, count := range sortedCounts(b.adds) {
			a := b.adds[count]
			s.log.Hold(a.seg, 1, a.size)
			l.restored.Pending = append(l.restored.Pending, delivery.Stored{
				Count: count, Void: a.void, To: b.address, Payload: a.payload,
			})
		}
		left = append(left, l)
	}
	return left
}

// committed calls those who wait for what is on disk.
func committed(done []func()) {
	for _, f := range done {
		f()
	}
}

// appendLocked seals and appends a record that is held. then is called without a
// lock once it is on disk; it may be nil.
func (s *outboxStore) appendLocked(kind byte, plain []byte, hold bool, then func()) (liveRecord, error) {
	return s.writeLocked(kind, s.seal(kind, plain), hold, then)
}

func (s *outboxStore) writeLocked(kind byte, body []byte, hold bool, then func()) (liveRecord, error) {
	var wait *func()
	if then != nil {
		wait = &then
	}
	seg, err := s.log.Append(kind, hold, append(make([]byte, seglog.Room, seglog.Room+len(body)), body...), wait)
	if err != nil {
		return liveRecord{}, fmt.Errorf("device: outbox: %w", err)
	}
	return liveRecord{seg, int64(len(body))}, nil
}

func (s *outboxStore) releaseLocked(at liveRecord) {
	if at.seg != 0 {
		s.log.Release(at.seg, 1, at.size)
	}
}

// create adds an empty outbox.
func (s *outboxStore) create(to Destination, address string) (*storedOutbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	b := &storedOutbox{s: s, index: s.last, to: to, address: address, next: 1, adds: make(map[uint64]*storedAdd)}
	_, _ = rand.Read(b.id[:]) // never fails (crypto/rand)
	var err error
	if b.open, err = s.appendLocked(recordOpen, b.encodeOpen(), true, nil); err != nil {
		return nil, err
	}
	s.boxes[b.index] = b
	return b, nil
}

// add keeps a message; kept is called once it is on disk.
func (b *storedOutbox) add(count uint64, payload []byte, kept func()) error {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &storedAdd{payload: payload}
	var err error
	if a.liveRecord, err = s.appendLocked(recordAdd, b.encodeAdd(count, a), true, kept); err != nil {
		return err
	}
	b.adds[count], b.next = a, count+1
	return nil
}

// void notes that a message was withdrawn.
func (b *storedOutbox) void(count uint64) {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	a := b.adds[count]
	if a == nil || b.gone {
		return
	}
	next := &storedAdd{void: true}
	var err error
	if next.liveRecord, err = s.appendLocked(recordAdd, b.encodeAdd(count, next), true, nil); err != nil {
		return // closed: it will be sent by the next process
	}
	s.releaseLocked(a.liveRecord)
	b.adds[count] = next
}

// acked notes which messages are settled.
func (b *storedOutbox) acked(counts []uint64) {
	if len(counts) == 0 {
		return
	}
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.gone {
		return
	}
	if _, err := s.appendLocked(recordAcked, putUints(putUints(nil, b.index), counts...), false, nil); err != nil {
		return // closed: the peer will say so again
	}
	for _, c := range counts {
		if a := b.adds[c]; a != nil {
			s.releaseLocked(a.liveRecord)
			delete(b.adds, c)
		}
	}
}

// attached notes which process of the receiver the outbox is sent to.
func (b *storedOutbox) attached(epoch [16]byte, mark uint64) {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.gone || b.epoch != nil && b.epoch.epoch == epoch && b.epoch.mark == mark {
		return
	}
	old := b.epoch
	b.epoch = &storedEpoch{epoch: epoch, mark: mark}
	at, err := s.appendLocked(recordEpoch, b.encodeEpoch(), true, nil)
	if err != nil {
		b.epoch = old // closed
		return
	}
	b.epoch.liveRecord = at
	if old != nil {
		s.releaseLocked(old.liveRecord)
	}
}

// forget takes the outbox out of the store.
func (b *storedOutbox) forget() error {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.gone {
		return nil
	}
	if _, err := s.appendLocked(recordForget, putUints(nil, b.index), false, nil); err != nil {
		return err
	}
	b.gone = true
	delete(s.boxes, b.index)
	for _, a := range b.adds {
		s.releaseLocked(a.liveRecord)
	}
	if b.epoch != nil {
		s.releaseLocked(b.epoch.liveRecord)
	}
	s.releaseLocked(b.open)
	return nil
}

func (b *storedOutbox) refusal() error { return b.s.log.Refusal() }

// relocate appends what is live in a segment again, so that the segment can go.
func (s *outboxStore) relocate(seg uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	move := func(at *liveRecord, kind byte, body []byte) {
		if at.seg != seg {
			return
		}
		old := *at
		next, err := s.writeLocked(kind, body, true, func() { s.log.Release(old.seg, 1, old.size) })
		if err == nil {
			*at = next
		}
	}
	move(&s.owner, recordOwner, s.id[:])
	for _, b := range s.boxes {
		if b.open.seg == seg {
			move(&b.open, recordOpen, s.seal(recordOpen, b.encodeOpen()))
		}
		if b.epoch != nil && b.epoch.seg == seg {
			move(&b.epoch.liveRecord, recordEpoch, s.seal(recordEpoch, b.encodeEpoch()))
		}
		for count, a := range b.adds {
			if a.seg == seg {
				move(&a.liveRecord, recordAdd, s.seal(recordAdd, b.encodeAdd(count, a)))
			}
		}
	}
}

// close gives the folder free.
func (s *outboxStore) close() {
	if err := s.log.Close(); err != nil {
		s.logger.Error("the outbox could not be written out", "err", err)
	}
}
