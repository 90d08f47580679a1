package device_test

import (
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/route"
)

// TestForgetLeavesNothing: no channel, and nobody who waits for room.
func TestForgetLeavesNothing(t *testing.T) {
	h := startHub(t, nil)
	alice := connect(t, h.url(), device.Config{OutboxMessages: 1})
	peer := newIdentity(t).Identifier()
	before := runtime.NumGoroutine()
	for i := range 30 {
		to := device.Destination{Route: route.To(fmt.Sprintf("FWD_%016x", i)), Peer: peer}
		first, err := alice.Outbox(to, "app")
		if err != nil {
			t.Fatal(err)
		}
		second, err := alice.Outbox(to, "other")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := first.Post(within(t), []byte("x")); err != nil {
			t.Fatal(err)
		}
		waits := make(chan error)
		go func() {
			_, err := first.Post(within(t), []byte("y"))
			waits <- err
		}()
		if err := first.Forget(); err != nil {
			t.Fatal(err)
		}
		if err := <-waits; !errors.Is(err, device.ErrClosed) {
			t.Fatalf("a message that waited for room: %v", err)
		}
		if _, err := second.Post(within(t), []byte("z")); err != nil {
			t.Fatalf("another outbox with the same peer: %v", err)
		}
		if err := second.Forget(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the goroutines of forgotten outboxes have ended", func() bool { return runtime.NumGoroutine() < before+15 })
	if n := len(alice.Outboxes()); n != 0 {
		t.Errorf("%d outboxes", n)
	}
}
