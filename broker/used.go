package broker

import (
	"container/heap"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
)

// How much a hub remembers of proofs that were used.
const (
	usedTotal       = 1 << 18       // in all: some 30 MiB
	usedPerNetwork  = usedTotal / 2 // that came from one network
	usedPerIdentity = 1024          // of one identity
	usedRewriteAt   = 1 << 16       // records in the file beyond those that are alive
)

// The file of used proofs: a header, and for each proof a record of
//
//	crc32 (IEEE, of the rest) 4 bytes ‖ end 8 bytes (unix s) ‖ key 16 bytes
//
// A key of zeros says that proofs which ended then are forgotten: if the clock is set back,
// they would be good once more.
const (
	usedName   = "proofs.used"
	usedHeader = "sealmq used proofs 1\n"
	usedRecord = 28
)

var (
	errUsed        = errors.New("broker: the proof has been used before")
	errBeforeStart = errors.New("broker: the proof was made before this hub started, and what was used then is not known")
	errForgotten   = errors.New("broker: the hub's clock was set back, and which proofs of that time were used is forgotten")
	errUsedFull    = errors.New("broker: too many proofs at once")
	errUnrecorded  = errors.New("broker: that the proof is used can neither be written nor, for the next start, be left open")
)

// usedKey names a proof: a hash of identifier and nonce.
type usedKey [16]byte

func usedKeyOf(id identity.Identifier, nonce [hubproto.NonceLen]byte) (k usedKey) {
	h := sha256.New()
	h.Write(id[:])
	h.Write(nonce[:])
	copy(k[:], h.Sum(nil))
	return k
}

type usedEntry struct {
	until int64 // unix seconds; it can be forgotten afterwards
	key   usedKey
	id    identity.Identifier // zero when it was read from the file
	from  netip.Prefix        // likewise
}

// usedProofs remembers the proofs that were used for as long as they could be
// shown again. Those that are bound to a TLS connection cannot be and are not in
// it: a connection has one CONNECT. The others are written to a file too, where
// there is a data folder, because the hub's identity, and with it the audience of
// a proof, outlives the process there. A record is written before the connection
// is let in, so a killed process forgets nothing; when the power fails, what the
// system had not written yet is lost.
//
// It is safe for concurrent use.
type usedProofs struct {
	logger *slog.Logger

	mu      sync.Mutex
	have    map[usedKey]struct{}
	perID   map[identity.Identifier]int
	perNet  map[netip.Prefix]int
	byEnd   usedHeap
	since   int64 // unbound proofs made at this second or earlier are refused; 0: none
	gone    int64 // as are those that end at this second or earlier: some are forgotten
	path    string
	file    *os.File // nil: memory only
	records int      // in file
	stale   bool     // at path is a file that lacks proofs, and the next start would believe it
	remove  func(path string) error
}

// usedHeap has the entry that ends first on top.
type usedHeap []usedEntry

func (h usedHeap) Len() int           { return len(h) }
func (h usedHeap) Less(i, j int) bool { return h[i].until < h[j].until }
func (h usedHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *usedHeap) Push(x any)        { *h = append(*h, x.(usedEntry)) }
func (h *usedHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

// openUsed reads what the hub before this one used. Where that is not known,
// because there is no file or it is damaged, unbound proofs made until now are
// refused. dir is the data folder, "" for none.
func openUsed(dir string, now time.Time, logger *slog.Logger) (*usedProofs, error) {
	u := &usedProofs{logger: logger, have: make(map[usedKey]struct{}), perID: make(map[identity.Identifier]int), perNet: make(map[netip.Prefix]int), since: now.Unix(), remove: os.Remove}
	if dir == "" {
		return u, nil
	}
	u.path = filepath.Join(dir, usedName)
	entries, err := readUsed(u.path)
	switch {
	case err == nil:
		u.since = 0
		for _, e := range entries {
			if e.key == (usedKey{}) {
				u.gone = max(u.gone, e.until)
			} else {
				u.keep(e)
			}
		}
		u.forget(now.Unix())
	case !errors.Is(err, fs.ErrNotExist):
		logger.Warn("the memory of used proofs cannot be read; devices that proved themselves before now do it again", "file", u.path, "err", err)
	}
	if err := u.rewrite(); err != nil {
		if !diskFull(err) {
			return nil, fmt.Errorf("broker: used proofs: %w", err)
		}
		// A hub whose queues have filled the disk must come back, to empty them.
		if gone := u.lose(err); gone != nil {
			return nil, fmt.Errorf("broker: used proofs: %w", errors.Join(err, gone))
		}
	}
	return u, nil
}

// diskFull reports whether a write failed because there is no room for it.
func diskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

func readUsed(path string) ([]usedEntry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // nothing was written
	const most = len(usedHeader) + usedRecord*(2*usedTotal+usedRewriteAt)
	b, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > most:
		return nil, errors.New("it is too long")
	}
	return parseUsed(b)
}

func parseUsed(b []byte) ([]usedEntry, error) {
	switch {
	case len(b) < len(usedHeader) || string(b[:len(usedHeader)]) != usedHeader:
		return nil, errors.New("it is not a file of used proofs")
	}
	b = b[len(usedHeader):]
	if len(b)%usedRecord != 0 {
		return nil, errors.New("its last record is torn")
	}
	entries := make([]usedEntry, 0, len(b)/usedRecord)
	for ; len(b) > 0; b = b[usedRecord:] {
		if binary.BigEndian.Uint32(b) != crc32.ChecksumIEEE(b[4:usedRecord]) {
			return nil, errors.New("a record is damaged")
		}
		e := usedEntry{until: int64(binary.BigEndian.Uint64(b[4:]))}
		copy(e.key[:], b[12:])
		entries = append(entries, e)
	}
	return entries, nil
}

func appendUsed(b []byte, e usedEntry) []byte {
	var r [usedRecord]byte
	binary.BigEndian.PutUint64(r[4:], uint64(e.until))
	copy(r[12:], e.key[:])
	binary.BigEndian.PutUint32(r[:], crc32.ChecksumIEEE(r[4:]))
	return append(b, r[:]...)
}

// use takes a proof that has been verified and is not bound to a TLS connection,
// once. from is the network that it came from, until when it stops being valid for this
// hub.
func (u *usedProofs) use(id identity.Identifier, from netip.Prefix, f *hubproto.ProofFacts, until, now time.Time) error {
	e := usedEntry{until: until.Unix(), key: usedKeyOf(id, f.Nonce), id: id, from: from}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.forget(now.Unix())
	switch _, used := u.have[e.key]; {
	case used:
		return errUsed
	case f.CreatedAt.Unix() <= u.since:
		return errBeforeStart
	case e.until <= u.gone: // else it would have ended
		return errForgotten
	case len(u.byEnd) >= usedTotal || u.perNet[from] >= usedPerNetwork || u.perID[id] >= usedPerIdentity:
		return errUsedFull
	case u.stale && u.discard() != nil:
		return errUnrecorded
	}
	u.keep(e)
	if u.file != nil {
		u.write(e)
	}
	if u.stale {
		return errUnrecorded
	}
	return nil
}

func (u *usedProofs) keep(e usedEntry) {
	if _, twice := u.have[e.key]; twice {
		return
	}
	u.have[e.key] = struct{}{}
	if !e.id.IsZero() {
		u.perID[e.id]++
		u.perNet[e.from]++
	}
	heap.Push(&u.byEnd, e)
}

// forget drops what nobody could use any more.
func (u *usedProofs) forget(now int64) {
	for len(u.byEnd) > 0 && u.byEnd[0].until < now {
		e := heap.Pop(&u.byEnd).(usedEntry)
		delete(u.have, e.key)
		u.gone = max(u.gone, e.until)
		if u.perID[e.id]--; u.perID[e.id] <= 0 {
			delete(u.perID, e.id)
		}
		if u.perNet[e.from]--; u.perNet[e.from] <= 0 {
			delete(u.perNet, e.from)
		}
	}
}

// write appends to the file. A hub that cannot write goes on, if it can see to it that the
// next one knows.
func (u *usedProofs) write(e usedEntry) {
	_, err := u.file.Write(appendUsed(nil, e))
	if err == nil {
		if u.records++; u.records > 2*len(u.byEnd)+usedRewriteAt {
			err = u.rewrite()
		}
	}
	if err != nil {
		_ = u.lose(err)
	}
}

// lose has the hub go on without the file, see discard.
func (u *usedProofs) lose(why error) error {
	err := u.discard()
	u.logger.Error("used proofs cannot be written; devices without TLS may have to connect twice after the next start", "file", u.path, "err", errors.Join(why, err))
	return err
}

// discard removes the file, or empties it where its folder does not allow that: the next
// hub knows that it does not know. While neither is possible it is stale.
func (u *usedProofs) discard() error {
	if u.file != nil {
		_ = u.file.Close()
		u.file = nil
	}
	err := u.remove(u.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		if os.Truncate(u.path, 0) != nil { // without a header it is not believed
			u.stale = true
			return err
		}
	}
	u.stale = false
	return nil
}

// rewrite replaces the file by one of what is remembered now.
func (u *usedProofs) rewrite() (err error) {
	b := []byte(usedHeader)
	if u.gone > 0 {
		b = appendUsed(b, usedEntry{until: u.gone})
	}
	for _, e := range u.byEnd {
		b = appendUsed(b, e)
	}
	dir := filepath.Dir(u.path)
	f, err := os.CreateTemp(dir, "."+usedName+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(b); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), u.path); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if u.file != nil {
		_ = u.file.Close()
	}
	u.file, u.records = f, len(u.byEnd)
	return nil
}

// close ends writing.
func (u *usedProofs) close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.file == nil {
		return nil
	}
	err := u.file.Close()
	u.file = nil
	return err
}
