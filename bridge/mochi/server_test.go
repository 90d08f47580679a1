package mochibridge

import (
	"sync"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
)

// TestServerIsClosedTwice: a program that ends in several places closes it in each.
func TestServerIsClosedTwice(t *testing.T) {
	b, err := bridge.New(bridge.Config{Key: [32]byte{9}, Identity: signer{}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	s, err := NewServer(ServerConfig{
		Options:   Options{Bridge: b, Authenticate: byUserName},
		Listeners: []guard.Config{{ID: "t", Address: "127.0.0.1:0"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
