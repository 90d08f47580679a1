package device

import "sync"

// maxAddresses bounds the addresses remembered: of those that were once a channel's, and
// of those that this program sent to in plain.
const maxAddresses = 16 << 10

// addresses remembers the last addresses that were added, each once.
type addresses struct {
	mu   sync.Mutex
	set  map[string]struct{}
	ring []string
	next int
}

func (t *addresses) add(addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.set == nil {
		t.set = make(map[string]struct{})
	}
	if _, ok := t.set[addr]; ok {
		return
	}
	t.set[addr] = struct{}{}
	if len(t.ring) < maxAddresses {
		t.ring = append(t.ring, addr)
		return
	}
	delete(t.set, t.ring[t.next])
	t.ring[t.next] = addr
	t.next = (t.next + 1) % maxAddresses
}

func (t *addresses) has(addr string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.set[addr]
	return ok
}
