// Package pinfile keeps which identity was found behind a name: a hub's address,
// a forwarding address. It is what SSH's known_hosts is: the first identity is
// remembered when the caller says so, and another one is refused from then on.
//
// A file is text, one entry a line, fields separated by blanks:
//
//	NAME IDENTIFIER [NUMBER]
//
// Empty lines and lines that begin with # are left alone. NUMBER is the largest
// number of a signed claim that was seen (0 when absent). Names have no blanks.
// The file has mode 0600; it is refused when others can write to it. Changes
// replace it atomically, under a lock where the system has one, so that several
// processes may share it; people may edit it while nobody writes.
//
// A File is safe for concurrent use.
package pinfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"unicode"

	"github.com/sealmq/sealmq/identity"
)

const (
	maxFile = 4 << 20
	maxName = 512
	// maxMemory bounds a File without a path; past it the oldest goes.
	maxMemory = 4096
)

// Errors of this package. They come wrapped, with the file.
var (
	// ErrName means that a name is empty, too long or has blanks.
	ErrName = errors.New("pinfile: not a name that can be remembered")
	// ErrFull means that the file has as much as it may have.
	ErrFull = errors.New("pinfile: the file is full; remove what is not needed")
	// ErrOlder means that a claim's number is smaller than one seen before.
	ErrOlder = errors.New("pinfile: a newer claim has been seen before")
)

// ChangedError says that another identity than the remembered one is behind a
// name.
type ChangedError struct {
	Name      string
	Have, Got identity.Identifier
	File      string // empty: remembered by this process only
	Line      int
}

func (e *ChangedError) Error() string {
	where := "by this process"
	if e.File != "" {
		where = fmt.Sprintf("in %s, line %d", e.File, e.Line)
	}
	return fmt.Sprintf("pinfile: the identity behind %s has changed: %v is remembered %s, now it is %v; "+
		"if that was done on purpose, remove the line, otherwise somebody is in the way", e.Name, e.Have, where, e.Got)
}

// PermissionError says that others can write to the file.
type PermissionError struct {
	File string
	Mode fs.FileMode
}

func (e *PermissionError) Error() string {
	return fmt.Sprintf("pinfile: %s has mode %04o: others could change what is remembered", e.File, e.Mode)
}

// Hint names the command that puts it right.
func (e *PermissionError) Hint() string { return "chmod 600 " + e.File }

// SyntaxError says which line cannot be read.
type SyntaxError struct {
	File string
	Line int
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("pinfile: %s:%d: want NAME IDENTIFIER [NUMBER]", e.File, e.Line)
}

// Entry is what is remembered of a name.
type Entry struct {
	Identifier identity.Identifier
	Number     uint64
	Line       int // in the file, from 1
}

// File is a file of pins. Make one with Open.
type File struct {
	path string

	mu     sync.Mutex
	memory map[string]Entry // without a path
	order  []string
}

// Open returns the file at path, which need not exist. With an empty path what
// is remembered ends with the process.
func Open(path string) *File { return &File{path: path} }

// Path returns the file's path.
func (f *File) Path() string { return f.path }

// Lookup returns what is remembered of a name.
func (f *File) Lookup(name string) (Entry, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path == "" {
		e, ok := f.memory[name]
		return e, ok, nil
	}
	text, err := read(f.path)
	if err != nil {
		return Entry{}, false, err
	}
	_, e, ok, err := find(f.path, text, name)
	return e, ok, err
}

// Remember notes that an identity is behind a name, and the number of its claim.
// Another identity than the remembered one is refused with a *ChangedError, a
// smaller number than the remembered one, unless it is 0, with ErrOlder.
func (f *File) Remember(name string, id identity.Identifier, number uint64) error {
	if !validName(name) || id.IsZero() {
		return fmt.Errorf("%w: %.80q", ErrName, name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path == "" {
		e, ok := f.memory[name]
		next, err := merge(name, f.path, e, ok, id, number)
		if err == nil {
			f.note(name, next, ok)
		}
		return err
	}
	// Most often nothing changes, and then nothing is locked or written.
	text, err := read(f.path)
	if err != nil {
		return err
	}
	if _, _, changed, err := replace(f.path, text, name, id, number); err != nil || !changed {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.path), 0o700); err != nil {
		return fmt.Errorf("pinfile: %w", err)
	}
	unlock, err := lock(f.path)
	if err != nil {
		return fmt.Errorf("pinfile: %w", err)
	}
	defer unlock()
	if text, err = read(f.path); err != nil {
		return err
	}
	next, _, changed, err := replace(f.path, text, name, id, number)
	if err != nil || !changed {
		return err
	}
	return write(f.path, next)
}

// Forget removes a name.
func (f *File) Forget(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path == "" {
		delete(f.memory, name)
		return nil
	}
	unlock, err := lock(f.path)
	if err != nil {
		return fmt.Errorf("pinfile: %w", err)
	}
	defer unlock()
	text, err := read(f.path)
	if err != nil {
		return err
	}
	lines, _, ok, err := find(f.path, text, name)
	if err != nil || !ok {
		return err
	}
	return write(f.path, append(bytes.Clone(text[:lines.from]), text[lines.to:]...))
}

func (f *File) note(name string, e Entry, known bool) {
	if f.memory == nil {
		f.memory = make(map[string]Entry)
	}
	if f.memory[name] = e; known {
		return
	}
	f.order = append(f.order, name)
	if len(f.order) > maxMemory {
		delete(f.memory, f.order[0])
		f.order = f.order[1:]
	}
}

func validName(name string) bool {
	return name != "" && len(name) <= maxName && name[0] != '#' && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || unicode.IsSpace(r) })
}

// merge decides what is remembered next.
func merge(name, path string, have Entry, known bool, id identity.Identifier, number uint64) (Entry, error) {
	switch {
	case !known:
	case have.Identifier != id:
		return have, &ChangedError{Name: name, Have: have.Identifier, Got: id, File: path, Line: have.Line}
	case number != 0 && number < have.Number:
		return have, fmt.Errorf("%w: number %d, now %d", ErrOlder, have.Number, number)
	}
	return Entry{Identifier: id, Number: max(number, have.Number), Line: have.Line}, nil
}

// span is where a line lies in the text.
type span struct{ from, to int }

// find looks for a name. A line that cannot be read is an error: it might have
// been this name's.
func find(path string, text []byte, name string) (s span, e Entry, ok bool, err error) {
	n, at := 0, 0
	for line := range bytes.Lines(text) {
		n++
		from := at
		at += len(line)
		fields := strings.Fields(string(line))
		if len(fields) == 0 || fields[0][0] == '#' {
			continue
		}
		entry := Entry{Line: n}
		bad := len(fields) < 2 || len(fields) > 3
		if !bad {
			entry.Identifier, err = identity.ParseIdentifier(fields[1])
			bad = err != nil
		}
		if !bad && len(fields) == 3 {
			entry.Number, err = strconv.ParseUint(fields[2], 10, 64)
			bad = err != nil
		}
		if bad {
			return span{}, Entry{}, false, &SyntaxError{File: path, Line: n}
		}
		if fields[0] == name && !ok {
			s, e, ok = span{from, at}, entry, true
		}
	}
	return s, e, ok, nil
}

// replace returns the text with what is to be remembered.
func replace(path string, text []byte, name string, id identity.Identifier, number uint64) (next []byte, e Entry, changed bool, err error) {
	s, have, known, err := find(path, text, name)
	if err != nil {
		return nil, Entry{}, false, err
	}
	e, err = merge(name, path, have, known, id, number)
	if err != nil || known && e == have {
		return text, e, false, err
	}
	line := name + " " + id.String()
	if e.Number > 0 {
		line += " " + strconv.FormatUint(e.Number, 10)
	}
	line += "\n"
	if known {
		next = append(append(bytes.Clone(text[:s.from]), line...), text[s.to:]...)
	} else {
		next = bytes.Clone(text)
		if len(next) > 0 && next[len(next)-1] != '\n' {
			next = append(next, '\n')
		}
		next = append(next, line...)
	}
	if len(next) > maxFile {
		return nil, e, false, fmt.Errorf("%w: %s", ErrFull, path)
	}
	return next, e, true, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("pinfile: %w", err)
	}
	defer f.Close() // nothing was written
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("pinfile: %w", err)
	}
	if mode := info.Mode().Perm(); checksModes && mode&0o022 != 0 {
		return nil, &PermissionError{File: path, Mode: mode}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("pinfile: %s: %w", path, err)
	case len(text) > maxFile:
		return nil, fmt.Errorf("%w: %s", ErrFull, path)
	}
	return text, nil
}

// write replaces the file, whole or not at all.
func write(path string, text []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return fmt.Errorf("pinfile: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
			err = fmt.Errorf("pinfile: %w", err)
		}
	}()
	if _, err = f.Write(text); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	return syncDir(dir)
}
