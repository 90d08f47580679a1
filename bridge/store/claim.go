package store

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/identity"
)

// Errors of Claim.
var (
	// ErrIdentity means that a hub with another identity made the store.
	ErrIdentity = errors.New("store: made by a hub with another identity")
	// ErrKey means that what is in the store names addresses of another key.
	ErrKey = errors.New("store: made with another address key")
)

// keyHub is the entry that says which hub's the store is.
const keyHub = "hub"

type hubJSON struct {
	Identity  identity.Identifier `json:"identity"`
	Addresses []byte              `json:"addresses"` // tells address keys apart
}

// addressesOf tells a key from others and gives nothing of it away: it is random.
func addressesOf(key [32]byte) []byte {
	sum := sha256.Sum256(append([]byte("sealmq address key of a store/1"), key[:]...))
	return sum[:16]
}

// Claim says whose the store is: the hub's with that identity, and with the key
// (bridge.Config.Key) from which the addresses in queues and forwarders derive. The first
// claim is written down. Another identity is refused from then on (ErrIdentity), and another
// key while anything is in the store (ErrKey). It comes before State.
func (s *Store) Claim(id identity.Identifier, key [32]byte) error {
	s.mu.Lock()
	e, held := s.tables[keyHub], len(s.byName)+len(s.tables) > 1
	s.mu.Unlock()
	want := hubJSON{id, addressesOf(key)}
	if e != nil {
		var made hubJSON
		if err := json.Unmarshal(e.value, &made); err != nil {
			return fmt.Errorf("store: entry %q: %w", keyHub, err)
		}
		switch same := string(made.Addresses) == string(want.Addresses); {
		case made.Identity != id:
			return fmt.Errorf("%w: %v, this one is %v", ErrIdentity, made.Identity, id)
		case same:
			return nil
		case held:
			return ErrKey
		}
	}
	s.putJSON(keyHub, want)
	return nil
}
