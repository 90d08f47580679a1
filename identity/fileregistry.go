package identity

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// FileRegistry is a Registry whose memory survives restarts. It keeps a file for
// each identity that has rotated its key, for which going back matters, and for
// each that Keep names; single-change identities of strangers stay in memory,
// because forgetting them loses nothing (see MemoryRegistry). A history is on
// disk before Update returns. Several processes may share a folder.
//
// Files of strangers are bounded as the memory is: beyond the limit, the oldest
// are removed, and those that Prefer names last, then the newest first. Those of kept
// identities stay until Forget.
type FileRegistry struct {
	dir   string
	limit int
	disk  disk

	mu     sync.Mutex
	mem    *MemoryRegistry
	stamps map[Identifier]fs.FileInfo // the file last read or written
	seen   int                        // strangers' files, about: other processes write too
}

var _ Keeper = (*FileRegistry)(nil)

// The two kinds of files: I<hex> and one of these.
const (
	seenSuffix = ".seen"
	keptSuffix = ".kept"
)

// OpenRegistry opens the registry in dir, mode 0700, and creates the folder
// where it is missing. limit is the number of strangers' identities it holds at
// most, in memory and on disk (DefaultRegistrySize for 0).
func OpenRegistry(dir string, limit int) (*FileRegistry, error) {
	if err := openDir(dir); err != nil {
		return nil, err
	}
	if limit <= 0 {
		limit = DefaultRegistrySize
	}
	r := &FileRegistry{
		dir: dir, limit: limit, mem: NewMemoryRegistry(limit),
		stamps: make(map[Identifier]fs.FileInfo),
	}
	r.mem.backed = true
	r.disk.sweepNow(dir)
	files, err := r.strangers()
	if err != nil {
		return nil, err
	}
	r.seen = len(files)
	return r, nil
}

// Import is as MemoryRegistry.Import.
func (r *FileRegistry) Import(history []byte) (*Identity, error) {
	r.mu.Lock()
	id := r.mem.verified(history)
	r.mu.Unlock()
	if id != nil {
		return id, nil
	}
	return Import(history)
}

// Update implements Registry. Besides ErrOlder, ErrConflict and ErrRegistryFull
// it fails when the file cannot be read or written: a registry that might forget
// a rotation must not accept the peer.
func (r *FileRegistry) Update(id *Identity) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.load(id.Identifier()); err != nil {
		return err
	}
	learnt, err := r.mem.update(id)
	if err != nil || !learnt {
		return err
	}
	kept := r.mem.entries[id.Identifier()].keep
	if len(id.changes) == 1 && !kept {
		return nil
	}
	return r.storeOrDrop(id, kept)
}

// storeOrDrop forgets in memory what could not be written, so that the next
// Update tries again.
func (r *FileRegistry) storeOrDrop(id *Identity, kept bool) error {
	err := r.store(id, kept)
	if err != nil {
		if e := r.mem.entries[id.Identifier()]; e != nil {
			r.mem.drop(e)
		}
		delete(r.stamps, id.Identifier())
	}
	return err
}

// Get implements Registry. A file that cannot be read counts as not known here;
// Update reports it.
func (r *FileRegistry) Get(id Identifier) (*Identity, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.load(id)
	return r.mem.Get(id)
}

// Prefer is as MemoryRegistry.Prefer.
func (r *FileRegistry) Prefer(f func(Identifier) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mem.Prefer(f)
}

// Keep implements Keeper: the identity has a file that stays until Forget.
func (r *FileRegistry) Keep(id Identifier) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.load(id); err != nil {
		return err
	}
	if !r.mem.keep(id) {
		return nil // unknown, or kept already
	}
	return r.storeOrDrop(r.mem.entries[id].id, true)
}

// Forget removes what is known of an identity, in memory and on disk. From then
// on any history of it is accepted as the first one seen.
func (r *FileRegistry) Forget(id Identifier) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	unlock, err := lockDir(r.dir)
	if err != nil {
		return err
	}
	defer unlock()
	for _, suffix := range []string{keptSuffix, seenSuffix} {
		if err := os.Remove(r.path(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("identity: %w", err)
		}
	}
	if e := r.mem.entries[id]; e != nil {
		r.mem.drop(e)
	}
	delete(r.stamps, id)
	return nil
}

func (r *FileRegistry) path(id Identifier, suffix string) string {
	return filepath.Join(r.dir, id.String()+suffix)
}

// load brings what is on disk of an identity into memory, if it is not there
// yet: written by an earlier process, or another one.
func (r *FileRegistry) load(id Identifier) error {
	for _, suffix := range []string{keptSuffix, seenSuffix} {
		path := r.path(id, suffix)
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return fmt.Errorf("identity: %w", err)
		}
		if r.mem.entries[id] != nil && sameFile(r.stamps[id], info) {
			return nil
		}
		return r.read(id, path, suffix == keptSuffix)
	}
	return nil
}

func (r *FileRegistry) read(id Identifier, path string, kept bool) error {
	b, info, err := readPrivate(path, MaxHistory)
	if err != nil {
		return err
	}
	known, err := ImportAs(id, b)
	if err != nil {
		return fmt.Errorf("identity: %s is damaged: %w; restore it, or remove it to forget what was known of this identity", path, err)
	}
	if _, err := r.mem.update(known); err != nil && !errors.Is(err, ErrOlder) {
		return err
	}
	if kept {
		r.mem.keep(id)
	}
	r.remember(id, info)
	return nil
}

// remember bounds stamps by what is in memory.
func (r *FileRegistry) remember(id Identifier, info fs.FileInfo) {
	if len(r.stamps) > 2*r.limit {
		for known := range r.stamps {
			if r.mem.entries[known] == nil {
				delete(r.stamps, known)
			}
		}
	}
	r.stamps[id] = info
}

// store writes an identity's file, unless another process has come first with
// something that this contradicts.
func (r *FileRegistry) store(id *Identity, kept bool) error {
	unlock, err := lockDir(r.dir)
	if err != nil {
		return err
	}
	defer unlock()
	self := id.Identifier()
	if err := r.load(self); err != nil {
		return err
	}
	switch e := r.mem.entries[self]; {
	case e == nil:
		return ErrRegistryFull
	case id.Compare(e.id) == Older:
		return fmt.Errorf("%w (%v)", ErrOlder, id)
	default:
		kept = kept || e.keep
	}
	suffix := seenSuffix
	if kept {
		suffix = keptSuffix
	}
	path := r.path(self, suffix)
	if !kept {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			if err := r.makeRoom(); err != nil {
				return err
			}
			r.seen++
		}
	}
	if _, err := r.disk.replace(path, id.history, false); err != nil {
		return err
	}
	if kept { // the newer name counts, so a crash in between does no harm
		_ = os.Remove(r.path(self, seenSuffix))
	}
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	r.remember(self, info)
	return nil
}

type strangerFile struct {
	path      string
	info      fs.FileInfo
	preferred bool
}

// strangers lists the files that may be removed.
func (r *FileRegistry) strangers() ([]strangerFile, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	var out []strangerFile
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), seenSuffix) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		out = append(out, strangerFile{path: filepath.Join(r.dir, e.Name()), info: info})
	}
	return out, nil
}

// makeRoom removes the oldest strangers' files once there are too many: a
// sixteenth at a time, so that a flood does not list the folder for each.
func (r *FileRegistry) makeRoom() error {
	if r.seen < r.limit {
		return nil
	}
	files, err := r.strangers()
	if err != nil {
		return err
	}
	r.seen = len(files)
	if r.seen < r.limit {
		return nil
	}
	for i := range files {
		f := &files[i]
		id, err := ParseIdentifier(strings.TrimSuffix(filepath.Base(f.path), seenSuffix))
		f.preferred = err == nil && r.mem.preferred(id)
	}
	slices.SortFunc(files, func(a, b strangerFile) int {
		age := cmp.Or(a.info.ModTime().Compare(b.info.ModTime()), strings.Compare(a.path, b.path))
		switch {
		case a.preferred && b.preferred:
			return -age
		case a.preferred:
			return 1
		case b.preferred:
			return -1
		}
		return age
	})
	for _, f := range files[:r.seen-r.limit+1+r.limit/16] {
		if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("identity: %w", err)
		}
		r.seen--
	}
	return nil
}
