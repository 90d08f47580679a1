package device

import "sync"

// maxTombstones bounds the addresses remembered as once those of a channel.
const maxTombstones = 16 << 10

// tombstones remembers the addresses of channels that have ended. Without, what is
// sent along an old return route would leave in plain towards the hub, since the
// first hop is no worker of this node any more.
type tombstones struct {
	mu   sync.Mutex
	set  map[string]struct{}
	ring []string
	next int
}

func (t *tombstones) add(addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.set == nil {
		t.set = make(map[string]struct{})
	}
	if _, ok := t.set[addr]; ok {
		return
	}
	t.set[addr] = struct{}{}
	if len(t.ring) < maxTombstones {
		t.ring = append(t.ring, addr)
		return
	}
	delete(t.set, t.ring[t.next])
	t.ring[t.next] = addr
	t.next = (t.next + 1) % maxTombstones
}

func (t *tombstones) has(addr string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.set[addr]
	return ok
}
