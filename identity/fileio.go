package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// PermissionError reports a file or folder that others could read or change.
// Nothing was read from it.
type PermissionError struct {
	Path string
	Mode fs.FileMode // as found; 0 when the owner is the trouble
	Fix  string      // the command that puts it right
	why  string
}

func (e *PermissionError) Error() string {
	return fmt.Sprintf("identity: %s: %s; do: %s", e.Path, e.why, e.Fix)
}

// checkMode refuses anything that group or others may touch.
func checkMode(path string, info fs.FileInfo, want fs.FileMode) error {
	if mode := info.Mode().Perm(); checksModes && mode&0o077 != 0 {
		return &PermissionError{
			Path: path, Mode: mode, Fix: fmt.Sprintf("chmod %o %s", want, path),
			why: fmt.Sprintf("mode %04o is open to other users, keys need %04o", mode, want),
		}
	}
	if uid, foreign := foreignOwner(info); foreign {
		return &PermissionError{
			Path: path, Fix: fmt.Sprintf("chown %d %s", os.Geteuid(), path),
			why: fmt.Sprintf("belongs to user %d, who could change it", uid),
		}
	}
	return nil
}

// openDir makes sure that dir is a folder of ours with mode 0700, and creates it
// where it is missing.
func openDir(dir string) error {
	if dir == "" {
		return errors.New("identity: no folder given")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return checkMode(dir, info, 0o700)
}

// readPrivate reads a file of ours that nobody else may touch, limit bytes at
// most. The checks are made on the open file, so nobody can swap it in between.
func readPrivate(path string, limit int64) ([]byte, fs.FileInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("identity: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("identity: %s: is %v, %w", path, describe(info.Mode()), ErrNotRegular)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|noFollow, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("identity: %w", err)
	}
	defer f.Close() // nothing was written
	return readChecked(path, f, limit)
}

// readChecked reads an open file, unless it is a regular one that others may touch.
func readChecked(path string, f *os.File, limit int64) ([]byte, fs.FileInfo, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("identity: %w", err)
	}
	if info.Mode().IsRegular() {
		if err := checkMode(path, info, 0o600); err != nil {
			return nil, nil, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, nil, fmt.Errorf("identity: %w", err)
	}
	if int64(len(b)) > limit {
		return nil, nil, fmt.Errorf("identity: %s: larger than the %d bytes such a file can have: %w", path, limit, ErrFile)
	}
	return b, info, nil
}

func describe(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m.IsDir():
		return "a folder"
	}
	return "a device or pipe"
}

// sameFile reports whether two looks at a path saw the same contents: files are
// only ever replaced whole, so inode, size and time tell.
func sameFile(a, b fs.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// tempPrefix begins the names of files that are being written.
const tempPrefix = ".tmp-"

// WriteNew writes a new file, whole or not at all, that its owner alone may read: a
// backup, say. It fails with an error that wraps fs.ErrExist rather than overwrite
// another.
func WriteNew(path string, data []byte) error {
	_, err := new(disk).replace(path, data, true)
	return err
}

// disk writes files so that a crash at any point leaves the old or the new
// contents. fault, for tests, is asked before each step; an error there stops
// everything at once and leaves everything as it is, as a crash would.
type disk struct {
	fault func(step string) error
}

func (d *disk) step(name string) error {
	if d.fault == nil {
		return nil
	}
	return d.fault(name)
}

// replace writes a file: temporary file, fsync, rename, fsync of the folder.
// With exclusive it never replaces an existing one (fs.ErrExist). committed
// says whether the new contents are in place, which they can be although an
// error came after. The caller holds the folder's lock.
func (d *disk) replace(path string, data []byte, exclusive bool) (committed bool, err error) {
	dir := filepath.Dir(path)
	f, err := d.create(dir)
	if err != nil {
		return false, err
	}
	temp := f.Name()
	defer func() {
		if err != nil && !committed && d.fault == nil {
			_ = os.Remove(temp) // it holds keys; sweep tries again
		}
	}()
	if err := d.fill(f, data); err != nil {
		return false, err
	}
	if exclusive {
		err = d.link(temp, path)
	} else {
		err = d.rename(temp, path)
	}
	if err != nil {
		return false, err
	}
	if err := d.step("sync folder"); err != nil {
		return true, err
	}
	if err := syncDir(dir); err != nil {
		return true, fmt.Errorf("identity: %s is written but may not survive a power cut: %w", path, err)
	}
	return true, nil
}

func (d *disk) create(dir string) (*os.File, error) {
	if err := d.step("create"); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, tempPrefix) // 0600, exclusive
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return f, nil
}

// fill writes, syncs and closes.
func (d *disk) fill(f *os.File, data []byte) (err error) {
	defer func() {
		if e := f.Close(); err == nil && e != nil {
			err = fmt.Errorf("identity: %w", e)
		}
	}()
	half := len(data) / 2 // two writes, so that a test can tear the file
	for _, part := range [][]byte{data[:half], data[half:]} {
		if err := d.step("write"); err != nil {
			return err
		}
		if _, err := f.Write(part); err != nil {
			return fmt.Errorf("identity: %w", err)
		}
	}
	if err := d.step("sync"); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
}

func (d *disk) rename(temp, path string) error {
	if err := d.step("rename"); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
}

// link puts temp at path unless something is there.
func (d *disk) link(temp, path string) error {
	if err := d.step("link"); err != nil {
		return err
	}
	err := os.Link(temp, path)
	switch {
	case err == nil:
		if err := d.step("unlink"); err != nil {
			return err
		}
		_ = os.Remove(temp) // a second name of the same file; sweep tries again
		return nil
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("identity: %w", err)
	}
	// A file system without hard links: the lock keeps other writers away.
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("identity: %s: %w", path, fs.ErrExist)
	}
	return d.rename(temp, path)
}

// sweepNow is sweep when no other process is writing just now.
func (d *disk) sweepNow(dir string) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|noFollow, 0)
	if err != nil {
		return // nobody has ever written here, or may
	}
	defer f.Close() // unlocks
	if ok, err := tryLock(f); err == nil && ok {
		d.sweep(dir)
	}
}

// sweep removes what writers that crashed left behind. Under the folder's lock
// no other writer is at work.
func (d *disk) sweep(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // the write that follows will say so
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// lockWait is how long a writer waits for another process.
const lockWait = 10 * time.Second

// ErrLocked means that another process has held a vault's or registry's lock
// for longer than a write takes.
var ErrLocked = errors.New("identity: another process is busy writing in this folder; is one stuck?")

const lockName = ".lock"

// lockDir takes the folder's write lock, across processes and within this one.
// It is held only while a file is replaced. A process that dies gives it back.
func lockDir(dir string) (unlock func(), err error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|noFollow, 0o600)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	deadline := time.NewTimer(lockWait)
	defer deadline.Stop()
	pause := time.NewTicker(2 * time.Millisecond)
	defer pause.Stop()
	for {
		ok, err := tryLock(f)
		switch {
		case err != nil:
			_ = f.Close()
			return nil, fmt.Errorf("identity: locking %s: %w", path, err)
		case ok:
			return func() { _ = f.Close() }, nil // closing unlocks
		}
		select {
		case <-pause.C:
		case <-deadline.C:
			_ = f.Close()
			return nil, fmt.Errorf("%w (%s)", ErrLocked, path)
		}
	}
}
