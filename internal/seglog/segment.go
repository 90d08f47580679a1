package seglog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	magic = "SEALMQ"
	// Version is the format that this package writes, and the newest it reads. In
	// version 1 checksums have no salt.
	Version = 2

	headerLen       = 16
	recordHeaderLen = 8

	// Room is how many bytes stand before a record's body: length, checksum, kind.
	Room = recordHeaderLen + 1

	// kindMark is a record of the log's own: the folder's id, and up to which offset
	// the segment had been synced when the mark was written. One is in front of all
	// that is written at once, and one at the end of a log that was closed.
	kindMark = 0xff
	markLen  = recordHeaderLen + 1 + 8 + 8

	// endMark stands behind what is written of a segment that was made ahead, in place
	// of a record's header: what follows it stood there before.
	endMark = "\x00\x00\x00\x00\x00\x00\x00\x00"

	// MaxRecord bounds kind and body of one record, in bytes: the largest frame
	// and room for what stands around it.
	MaxRecord = 17 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	// ErrCorrupt means that a record which must be whole is not.
	ErrCorrupt = errors.New("seglog: damaged")
	// ErrNewer means that a newer version wrote the folder.
	ErrNewer = errors.New("seglog: written by a newer version")
	// ErrInUse means that another process has the folder open.
	ErrInUse = errors.New("seglog: folder is in use by another process")
	// ErrClosed means that the log has been closed. It is an fs.ErrClosed.
	ErrClosed = fmt.Errorf("seglog: %w", fs.ErrClosed)
	// ErrKind means that a kind of record is the log's own: 255.
	ErrKind = errors.New("seglog: kind of record is reserved")
	// ErrTooLarge means that a record is longer than MaxRecord.
	ErrTooLarge = errors.New("seglog: record too large")
)

// CorruptError says where a log is damaged. It is an ErrCorrupt. What to do about it is for
// whoever keeps the log to say: not every folder is one to put back from a backup.
type CorruptError struct {
	File   string
	Offset int64
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("seglog: %s is damaged at byte %d: %s", e.File, e.Offset, e.Reason)
}

// Is reports whether target is ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Place is where a record is.
type Place struct {
	Segment uint64 // for Hold
	Offset  int64  // of its first byte in that
}

// Corrupt returns the CorruptError of a record in the log in dir.
func (p Place) Corrupt(dir, reason string) error {
	return &CorruptError{File: filepath.Join(dir, segmentName(p.Segment)), Offset: p.Offset, Reason: reason}
}

func segmentName(n uint64) string { return fmt.Sprintf("%016x.seg", n) }

// segmentNumber reads a file name; false when it is not a segment's.
func segmentNumber(name string) (uint64, bool) {
	hex, ok := strings.CutSuffix(name, ".seg")
	if !ok || len(hex) != 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(hex, 16, 64)
	return n, err == nil
}

func appendHeader(dst []byte, id [8]byte) []byte {
	dst = append(dst, magic...)
	dst = binary.BigEndian.AppendUint16(dst, Version)
	return append(dst, id[:]...)
}

// salt is what the checksums of a segment are mixed with, so that what stood in its
// file when that was another segment does not pass for its own. It is 0 for none.
func salt(segment uint64) uint32 { return uint32(segment) * 0x9e3779b1 }

// appendRecord appends one record.
func appendRecord(dst []byte, salt uint32, kind byte, body []byte) []byte {
	at := len(dst)
	dst = append(append(dst, make([]byte, Room)...), body...)
	fillHead(dst[at:], kind)
	mix(dst[at:], salt)
	return dst
}

// mix mixes a record's checksum with the salt of its segment.
func mix(record []byte, salt uint32) {
	binary.BigEndian.PutUint32(record[4:], binary.BigEndian.Uint32(record[4:])^salt)
}

// fillHead fills in what stands before a record's body, without a salt.
func fillHead(record []byte, kind byte) {
	n := uint32(len(record) - recordHeaderLen)
	record[recordHeaderLen] = kind
	// The length stands in the checksum's place for a moment, right before what the
	// checksum covers besides.
	binary.BigEndian.PutUint32(record[4:], n)
	sum := crc32.Checksum(record[4:], castagnoli)
	binary.BigEndian.PutUint32(record, n)
	binary.BigEndian.PutUint32(record[4:], sum)
}

// wholeRecord returns the length of the record that b begins with; false when it is
// not there whole.
func wholeRecord(b []byte, salt uint32) (int, bool) {
	if len(b) < recordHeaderLen {
		return 0, false
	}
	n := recordHeaderLen + int64(binary.BigEndian.Uint32(b))
	if n == recordHeaderLen || n > int64(len(b)) {
		return 0, false
	}
	sum := crc32.Update(crc32.Checksum(b[:4], castagnoli), castagnoli, b[recordHeaderLen:n])
	return int(n), sum^salt == binary.BigEndian.Uint32(b[4:])
}

// appendMark appends a mark.
func appendMark(dst []byte, salt uint32, id [8]byte, synced int64) []byte {
	var body [16]byte
	copy(body[:], id[:])
	binary.BigEndian.PutUint64(body[8:], uint64(synced))
	return appendRecord(dst, salt, kindMark, body[:])
}

// syncedBeyond looks for a mark behind offset from that tells that the segment had
// been synced further than that. The folder's id is in it, which is random, so that
// no body can pass for one.
func syncedBeyond(f *os.File, salt uint32, id [8]byte, from int64) (bool, error) {
	want := appendMark(nil, salt, id, 0)
	head := want[:4] // the length
	buf := make([]byte, 256<<10)
	for at, have := from, 0; ; {
		n, err := f.ReadAt(buf[have:], at+int64(have))
		if err != nil && err != io.EOF {
			return false, err
		}
		b := buf[:have+n]
		for i := 0; len(b)-i >= markLen; i++ {
			k := bytes.Index(b[i:], head)
			if i += max(k, 0); k < 0 || len(b)-i < markLen {
				break
			}
			synced := int64(binary.BigEndian.Uint64(b[i+markLen-8:]))
			if synced > from && bytes.Equal(b[i:i+markLen], appendMark(want[:0:0], salt, id, synced)) {
				return true, nil
			}
		}
		if err == io.EOF {
			return false, nil
		}
		keep := min(len(b), markLen-1)
		have = copy(buf, b[len(b)-keep:])
		at += int64(len(b) - keep)
	}
}

// A badRecord is where reading a segment had to stop.
type badRecord struct {
	offset int64
	reason string
	damage bool  // no crash leaves this behind
	end    bool  // an endMark
	rest   int64 // bytes from here, without the zeros at the end of the file
}

// scan is what reading a segment found.
type scan struct {
	good int64      // length of the good part
	salt uint32     // of the checksums
	bad  *badRecord // why reading stopped before the end of the file; nil: it did not
}

// scanSegment reads segment n at path from front to back and hands each record on; body
// is valid during the call. An error is one of the file or of visit.
func scanSegment(path string, n uint64, id *[8]byte, visit func(offset int64, kind byte, body []byte) error) (scan, error) {
	f, err := os.Open(path)
	if err != nil {
		return scan{}, err
	}
	defer f.Close()
	s := scan{salt: salt(n)}
	err = s.records(f, path, id, visit)
	bad := s.bad
	if err != nil || bad == nil || bad.damage {
		return s, err
	}
	end, err := contentEnd(f, s.good)
	if bad.rest = end - s.good; err == nil && s.good >= headerLen && bad.rest > 0 {
		if bad.damage, err = syncedBeyond(f, s.salt, *id, s.good); bad.damage {
			bad.reason += ", where it had been synced"
		}
	}
	return s, err
}

// contentEnd returns the end of f without the zeros that it ends in behind from.
func contentEnd(f *os.File, from int64) (int64, error) {
	buf := make([]byte, 256<<10)
	end := from
	for at := from; ; {
		n, err := f.ReadAt(buf, at)
		if k := len(bytes.TrimRight(buf[:n], "\x00")); k > 0 {
			end = at + int64(k)
		}
		at += int64(n)
		if err == io.EOF {
			return end, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

func (s *scan) records(f *os.File, path string, id *[8]byte, visit func(offset int64, kind byte, body []byte) error) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	r := newScanner(f, st.Size())
	stop := func(damage bool, reason string) error {
		s.bad = &badRecord{offset: s.good, reason: reason, damage: damage}
		return nil
	}
	head, err := r.take(headerLen)
	switch {
	case err != nil:
		return err
	case len(head) < headerLen:
		return stop(false, "header is cut short")
	case string(head[:len(magic)]) != magic:
		// The header is on disk before the first record is written.
		return stop(st.Size() > headerLen, "not a sealmq segment")
	}
	switch v := binary.BigEndian.Uint16(head[len(magic):]); {
	case v > Version:
		return fmt.Errorf("%w: %s has format %d, this program reads up to %d (run the newer program)", ErrNewer, path, v, Version)
	case v == 1:
		s.salt = 0
	}
	if *id == ([8]byte{}) {
		copy(id[:], head[8:])
	} else if [8]byte(head[8:]) != *id {
		s.good = 8
		return stop(true, "belongs to another folder than the files before it, or one of them does")
	}
	s.good = headerLen
	for {
		head, err := r.take(recordHeaderLen)
		switch {
		case err != nil || len(head) == 0:
			return err
		case len(head) < recordHeaderLen:
			return stop(false, "record header is cut short")
		case string(head) == endMark:
			s.bad = &badRecord{offset: s.good, reason: "ends before its end", end: true}
			return nil
		}
		n, want := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:])
		sum := crc32.Checksum(head[:4], castagnoli)
		if n == 0 || n > MaxRecord {
			return stop(false, "impossible record length")
		}
		body, err := r.take(int(n))
		switch {
		case err != nil:
			return err
		case len(body) < int(n):
			return stop(false, "record is cut short")
		case crc32.Update(sum, castagnoli, body)^s.salt != want:
			return stop(false, "checksum does not match")
		}
		if err := visit(s.good, body[0], body[1:]); err != nil {
			return fmt.Errorf("at byte %d: %w", s.good, err)
		}
		s.good += recordHeaderLen + int64(n)
	}
}

// scanner reads a file in large pieces. What take returns is valid until the next
// call, and shorter than asked for only at the end of the file; it never
// allocates more than the file has left.
type scanner struct {
	f          *os.File
	left       int64 // bytes of the file not read yet
	buf        []byte
	start, end int
}

func newScanner(f *os.File, size int64) *scanner { return &scanner{f: f, left: size} }

func (s *scanner) take(n int) ([]byte, error) {
	if have := s.end - s.start; have < n {
		n = int(min(int64(n), int64(have)+s.left))
		if n > len(s.buf) {
			fresh := make([]byte, max(n, 256<<10))
			s.end = copy(fresh, s.buf[s.start:s.end])
			s.buf, s.start = fresh, 0
		} else if s.start+n > len(s.buf) {
			s.end = copy(s.buf, s.buf[s.start:s.end])
			s.start = 0
		}
		for s.end-s.start < n {
			m, err := s.f.Read(s.buf[s.end:])
			s.end += m
			s.left -= int64(m)
			if err == io.EOF {
				n = s.end - s.start
				break
			}
			if err != nil {
				return nil, err
			}
		}
	}
	b := s.buf[s.start : s.start+n]
	s.start += n
	return b, nil
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Notes are files with the number of a segment, so that its loss is noticed. Each is true
// of the folder at any moment, also of one that somebody copies in order while the log is
// written: the newest is copied before the segments, the oldest behind them.
const (
	newestName = ".newest" // this segment is there, and its header
	oldestName = "oldest"  // all from this segment on are there, or were until one was noted anew
)

// writeNote notes segment n, on stable storage. It writes over what stood there, all of
// which is in one sector: that needs no room on a full disk, and no sync of the folder.
func writeNote(path string, n uint64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%016x\n", n), 0)
	if err == nil {
		err = datasync(f)
	}
	return errors.Join(err, f.Close())
}

// readNote returns what writeNote noted; 0 when there is no whole note.
func readNote(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	hex, ok := strings.CutSuffix(string(b), "\n")
	if !ok || len(hex) != 16 {
		return 0, nil
	}
	n, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		return 0, nil //nolint:nilerr // no note is as good
	}
	return n, nil
}

// listed is what a folder says of its segments without a look into them.
type listed struct {
	segs           []uint64 // there, ascending
	newest, oldest uint64   // noted; 0: not
}

// listSegments lists the segments in dir, and refuses it when one is missing.
func listSegments(dir string) (l listed, err error) {
	entries, err := os.ReadDir(dir) // sorted by name, so by number
	if err != nil {
		return l, err
	}
	for _, e := range entries {
		if n, ok := segmentNumber(e.Name()); ok && e.Type().IsRegular() {
			l.segs = append(l.segs, n)
		}
	}
	for i := 1; i < len(l.segs); i++ {
		if l.segs[i] != l.segs[i-1]+1 {
			return l, missing(dir, l.segs[i-1]+1)
		}
	}
	if l.newest, err = readNote(filepath.Join(dir, newestName)); err != nil {
		return l, err
	}
	if l.oldest, err = readNote(filepath.Join(dir, oldestName)); err != nil {
		return l, err
	}
	n := len(l.segs)
	switch noted := max(l.newest, l.oldest); {
	case n == 0 && noted > 0, n > 0 && noted > l.segs[n-1]:
		return l, missing(dir, noted)
	case n > 0 && l.oldest > 0 && l.oldest < l.segs[0]:
		return l, missing(dir, l.oldest)
	}
	return l, nil
}

func missing(dir string, n uint64) error {
	return &CorruptError{File: filepath.Join(dir, segmentName(n)), Reason: "segment is missing"}
}
