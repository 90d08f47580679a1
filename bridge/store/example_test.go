package store_test

import (
	"fmt"
	"log"
	"os"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/identity"
)

// A hub of one's own keeps its queues, forwarders and aliases in a folder. Identity
// and key have to be the same at each start; a vault keeps them.
func Example() {
	folder, err := os.MkdirTemp("", "sealmq")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(folder) }()
	id, err := identity.Create() // in a real program: from identity.OpenVault
	if err != nil {
		log.Fatal(err)
	}
	config := bridge.Config{Identity: bridge.IdentitySigner(id), Key: [32]byte{1}} // a secret of the hub

	s, found, err := store.Open(folder, store.Options{
		Mode:    store.SyncInterval,
		Reserve: store.DefaultSegmentSize + bridge.DefaultWaitingBytes/2, // to come free from a full disk
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := s.Claim(id.Identifier(), config.Key); err != nil { // made with others: bring those back
		log.Fatal(err)
	}
	config.Outboxes, config.Journal = s.Outbox, s
	b, err := bridge.New(config)
	if err != nil {
		log.Fatal(err)
	}
	state, err := s.State()
	if err != nil {
		log.Fatal(err)
	}
	if err := b.Restore(state); err != nil {
		log.Fatal(err)
	}
	fmt.Println("frames found:", found.Frames)
	// Now the hook: mochibridge.New(mochibridge.Options{Server: server, Bridge: b, ...}).

	// At the end: the MQTT server, the bridge, the store.
	if err := b.Close(); err != nil {
		log.Fatal(err)
	}
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}
	// Output: frames found: 0
}
