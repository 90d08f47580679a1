package device

import (
	"sync"

	"github.com/sealmq/sealmq/internal/recent"
)

// maxAddresses bounds the addresses remembered: of those that were once a channel's, and
// of those that this program sent to in plain.
const maxAddresses = 16 << 10

// addresses remembers the last maxAddresses that were added, each once.
type addresses struct {
	mu  sync.Mutex
	set *recent.Set
}

func newAddresses() *addresses { return &addresses{set: recent.New(maxAddresses)} }

func (t *addresses) add(addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.set.Add(addr)
}

func (t *addresses) has(addr string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.set.Has(addr)
}
