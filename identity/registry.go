package identity

import (
	"bytes"
	"cmp"
	"container/list"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/internal/cbor"
)

// Registry remembers the latest verified history of each identity it has seen.
// Implementations are safe for concurrent use.
type Registry interface {
	// Update compares id with what is known of its identifier and keeps the
	// longer history (spec identity 9, first column). It fails with ErrOlder
	// or ErrConflict, and then nothing has changed.
	Update(id *Identity) error
	// Get returns what is known of an identifier.
	Get(Identifier) (*Identity, bool)
}

// A Keeper is a Registry that can be told which identities matter. A registry
// is filled before any trust policy is asked, so a stranger can fill it; what
// Keep names is never forgotten for the sake of a stranger. Call it once a peer
// has been accepted.
type Keeper interface {
	Registry
	Keep(Identifier) error
}

// An Importer is a Registry that verifies no history twice.
type Importer interface {
	Registry
	// Import is as the function Import. A history of exactly the bytes that
	// were verified for the identity in the registry is not verified again:
	// the time plays no part in verification, so its result cannot change.
	Import(history []byte) (*Identity, error)
}

var (
	_ Importer = (*MemoryRegistry)(nil)
	_ Importer = (*FileRegistry)(nil)
)

var _ Keeper = (*MemoryRegistry)(nil)

// DefaultRegistrySize is the number of identities that registries hold unless
// told otherwise.
const DefaultRegistrySize = 4096

// MemoryRegistry is a Registry in memory with a bound.
//
// Nothing is lost when an identity with a single change is forgotten: no history
// of the same identifier can be older than that or contradict it. So when the
// registry is full, it forgets what was used longest ago, first among the
// single-change identities, then among the rotated ones, then among the
// single-change identities that Keep named. The rotated ones that Prefer names go last,
// and of those the newest first, so that no number of newcomers pushes them out. A
// rotated one that Keep named is never forgotten; when only those are left, Update of a
// stranger fails with ErrRegistryFull.
type MemoryRegistry struct {
	maxCount, maxBytes int

	mu      sync.Mutex
	entries map[Identifier]*entry
	bytes   int
	met     uint64                // how many were new to it so far
	prefer  func(Identifier) bool // see Prefer; nil: none
	// backed says that kept entries are elsewhere too, so that any may be forgotten here.
	backed bool
	// Lists of *entry, most recently used first, in the order of forgetting.
	// Kept and rotated entries are in none, unless backed.
	single      list.List
	rotated     list.List
	keptSingle  list.List
	keptRotated list.List
}

type entry struct {
	id   *Identity
	met  uint64 // the number of those that came before it
	keep bool
	home *list.List // nil when never forgotten
	elem *list.Element
}

// NewMemoryRegistry returns a registry of size identities at most
// (DefaultRegistrySize for 0) and of as many KiB of histories, 1 MiB at least.
func NewMemoryRegistry(size int) *MemoryRegistry {
	if size <= 0 {
		size = DefaultRegistrySize
	}
	return &MemoryRegistry{
		maxCount: size, maxBytes: max(1<<20, 1024*size),
		entries: make(map[Identifier]*entry),
	}
}

// Update implements Registry.
func (r *MemoryRegistry) Update(id *Identity) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.update(id)
	return err
}

// update also says whether the registry has learnt something.
func (r *MemoryRegistry) update(id *Identity) (learnt bool, err error) {
	e := r.entries[id.Identifier()]
	if e != nil {
		switch id.Compare(e.id) {
		case Equal:
			r.touch(e)
			return false, nil
		case Older:
			return false, fmt.Errorf("%w (%v: %d changes, %d known)", ErrOlder, id, len(id.changes), len(e.id.changes))
		case Conflict:
			return false, fmt.Errorf("%w (%v)", ErrConflict, id)
		}
	}
	count, size := 1, len(id.history)
	if e != nil {
		count, size = 0, size-len(e.id.history)
	}
	if err := r.makeRoom(e, count, size); err != nil {
		return false, err
	}
	if e == nil {
		e = &entry{met: r.met}
		r.met++
		r.entries[id.Identifier()] = e
	} else {
		r.unlist(e)
	}
	e.id = id
	r.bytes += size
	r.enlist(e)
	return true, nil
}

// makeRoom forgets identities other than self until there is room, or none when
// there cannot be.
func (r *MemoryRegistry) makeRoom(self *entry, count, size int) error {
	count += len(r.entries)
	size += r.bytes
	var victims, preferred []*entry
	tooMuch := func() bool { return count > r.maxCount || size > r.maxBytes }
	forget := func(e *entry) {
		victims = append(victims, e)
		count--
		size -= len(e.id.history)
	}
	for _, l := range []*list.List{&r.single, &r.rotated, &r.keptSingle, &r.keptRotated} {
		for el := l.Back(); el != nil && tooMuch(); el = el.Prev() {
			switch e := el.Value.(*entry); {
			case e == self:
			case l == &r.rotated && r.preferred(e.id.Identifier()):
				preferred = append(preferred, e)
			default:
				forget(e)
			}
		}
	}
	slices.SortFunc(preferred, func(a, b *entry) int { return cmp.Compare(b.met, a.met) })
	for _, e := range preferred {
		if tooMuch() {
			forget(e)
		}
	}
	if tooMuch() {
		return ErrRegistryFull
	}
	for _, e := range victims {
		r.drop(e)
	}
	return nil
}

func (r *MemoryRegistry) enlist(e *entry) {
	switch single := len(e.id.changes) == 1; {
	case e.keep && !single && !r.backed:
		return
	case e.keep && !single:
		e.home = &r.keptRotated
	case e.keep:
		e.home = &r.keptSingle
	case single:
		e.home = &r.single
	default:
		e.home = &r.rotated
	}
	e.elem = e.home.PushFront(e)
}

func (r *MemoryRegistry) unlist(e *entry) {
	if e.home != nil {
		e.home.Remove(e.elem)
		e.home, e.elem = nil, nil
	}
}

func (r *MemoryRegistry) touch(e *entry) {
	if e.home != nil {
		e.home.MoveToFront(e.elem)
	}
}

func (r *MemoryRegistry) drop(e *entry) {
	r.unlist(e)
	r.bytes -= len(e.id.history)
	delete(r.entries, e.id.Identifier())
}

// Get implements Registry.
func (r *MemoryRegistry) Get(id Identifier) (*Identity, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.entries[id]
	if e == nil {
		return nil, false
	}
	r.touch(e)
	return e.id, true
}

// Prefer names the identities that are forgotten last, besides those that Keep names:
// known to the caller for something that a stranger does not have. f must not call the
// registry.
func (r *MemoryRegistry) Prefer(f func(Identifier) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.prefer = f
}

func (r *MemoryRegistry) preferred(id Identifier) bool { return r.prefer != nil && r.prefer(id) }

// Keep implements Keeper. An unknown identity is left alone.
func (r *MemoryRegistry) Keep(id Identifier) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(id)
	return nil
}

// keep reports whether that is new.
func (r *MemoryRegistry) keep(id Identifier) bool {
	e := r.entries[id]
	if e == nil || e.keep {
		return false
	}
	r.unlist(e)
	e.keep = true
	r.enlist(e)
	return true
}

// Import implements Importer. It changes nothing in the registry.
func (r *MemoryRegistry) Import(history []byte) (*Identity, error) {
	r.mu.Lock()
	id := r.verified(history)
	r.mu.Unlock()
	if id != nil {
		return id, nil
	}
	return Import(history)
}

// verified returns the identity of exactly these bytes, if it is held.
func (r *MemoryRegistry) verified(history []byte) *Identity {
	changes, err := parseHistory(cbor.NewReader(history))
	if err != nil {
		return nil
	}
	e := r.entries[Identifier(sha256.Sum256(changes[0].data))]
	if e == nil || !bytes.Equal(e.id.history, history) {
		return nil
	}
	return e.id
}

// Len returns the number of identities held.
func (r *MemoryRegistry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.entries)
}
