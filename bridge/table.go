package bridge

import (
	"hash/maphash"
	"sync"
)

// worker is what an address leads to: exactly one of the pointers is set.
type worker struct {
	port    *Port
	fwd     *forwarder
	service *service
}

// numShards is a power of two.
const numShards = 64

// table is the hub's one table of local addresses.
type table struct {
	seed   maphash.Seed
	shards [numShards]shard
}

type shard struct {
	mu sync.RWMutex
	m  map[string]*worker
	_  [32]byte
}

func newTable() *table {
	t := &table{seed: maphash.MakeSeed()}
	for i := range t.shards {
		t.shards[i].m = make(map[string]*worker)
	}
	return t
}

// get finds the worker at an address without allocating; nil when there is none.
func (t *table) get(addr []byte) *worker {
	s := &t.shards[maphash.Bytes(t.seed, addr)&(numShards-1)]
	s.mu.RLock()
	w := s.m[string(addr)]
	s.mu.RUnlock()
	return w
}

func (t *table) lookup(addr string) *worker {
	s := &t.shards[maphash.String(t.seed, addr)&(numShards-1)]
	s.mu.RLock()
	w := s.m[addr]
	s.mu.RUnlock()
	return w
}

// put sets the worker at an address, whatever was there.
func (t *table) put(addr string, w *worker) {
	s := &t.shards[maphash.String(t.seed, addr)&(numShards-1)]
	s.mu.Lock()
	s.m[addr] = w
	s.mu.Unlock()
}

// add sets the worker at an address that is free, and reports whether it was.
func (t *table) add(addr string, w *worker) bool {
	s := &t.shards[maphash.String(t.seed, addr)&(numShards-1)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[addr] != nil {
		return false
	}
	s.m[addr] = w
	return true
}

// remove frees an address if it still leads to w.
func (t *table) remove(addr string, w *worker) {
	s := &t.shards[maphash.String(t.seed, addr)&(numShards-1)]
	s.mu.Lock()
	if s.m[addr] == w {
		delete(s.m, addr)
	}
	s.mu.Unlock()
}
