package bridge

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/sealmq/sealmq/route"
)

// fullPeer is a device whose queue is full, with the test's worker "w" at the hub.
func fullPeer(t *testing.T, b *Bridge, node *Local, name string) (*peer, route.Frame) {
	t.Helper()
	d := attach(t, b, name, false)
	d.conn.limit(0)
	to := route.Frame{Onward: route.To(d.Port().Address(), "x"), Return: route.To("w")}
	for range b.cfg.OutboxFrames {
		if err := node.Send(t.Context(), to, route.Stored); err != nil {
			t.Fatal(err)
		}
	}
	return d, to
}

// reads has a peer take everything from now on.
func reads(p *peer) {
	p.conn.mu.Lock()
	p.conn.window, p.conn.auto = 1<<30, true
	p.conn.mu.Unlock()
	p.conn.ack()
}

func newTestLocal(t *testing.T, b *Bridge) *Local {
	t.Helper()
	node := NewLocal(b)
	t.Cleanup(node.Close)
	if err := node.Register("w", true, func(Inbound) {}); err != nil {
		t.Fatal(err)
	}
	return node
}

// TestLocalSharesRoom: what waits for targets that take nothing is bounded for each of
// them, and never keeps what is for another one.
func TestLocalSharesRoom(t *testing.T) {
	for name, c := range map[string]struct{ bytes, waiting int }{"frames": {1, 64}, "bytes": {100 << 10, 2}, "long": {250 << 10, 1}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newTestBridge(t, func(cfg *Config) { cfg.OutboxFrames, cfg.Window, cfg.WindowBytes = 4, 8, 64<<10 })
				node := newTestLocal(t, b)
				reader := attach(t, b, "reader", true)
				const deaf, calls = 3, 66
				ctx, cancel := context.WithCancel(t.Context())
				gave := make(chan error, deaf*calls)
				var peers []*peer
				for i := range deaf {
					d, f := fullPeer(t, b, node, fmt.Sprint("deaf", i))
					peers = append(peers, d)
					f.Payload = make([]byte, c.bytes)
					for range calls {
						go func() { gave <- node.Send(ctx, f, route.Stored) }()
					}
				}
				synctest.Wait()
				equal(t, "waiting", b.Counters().Waiting, int64(deaf*c.waiting))
				if err := node.Send(t.Context(), route.Frame{Onward: route.To(reader.Port().Address(), "x"), Payload: make([]byte, c.bytes)}, route.Stored); err != nil {
					t.Fatal(err)
				}
				equal(t, "for the one who reads", len(reader.frames()), 1)

				// The first one reads: all of its come.
				reads(peers[0])
				synctest.Wait()
				equal(t, "for the one who reads now", len(peers[0].frames()), 4+calls)
				equal(t, "sent", len(gave), calls)
				for range calls {
					if err := <-gave; err != nil {
						t.Fatal(err)
					}
				}
				// The calls for the others end, and what they sent is gone.
				cancel()
				for range (deaf - 1) * calls {
					if err := <-gave; !errors.Is(err, context.Canceled) {
						t.Fatal(err)
					}
				}
				equal(t, "waiting", b.Counters().Waiting, 0)
				reads(peers[1])
				synctest.Wait()
				equal(t, "withdrawn", len(peers[1].frames()), 4)
				equal(t, "targets remembered", len(node.targets), 0)
			})
		})
	}
}

// TestLocalCloseEndsSend: in the hub's queue of a target, and before it.
func TestLocalCloseEndsSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBridge(t, func(cfg *Config) { cfg.OutboxFrames = 4 })
		node := newTestLocal(t, b)
		_, f := fullPeer(t, b, node, "deaf")
		f.Payload = make([]byte, 250<<10)
		gave := make(chan error)
		for range 2 {
			go func() { gave <- node.Send(t.Context(), f, route.Stored) }()
		}
		synctest.Wait()
		equal(t, "waiting", b.Counters().Waiting, 1)
		go node.Close()
		for range 2 {
			if err := <-gave; !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		}
		equal(t, "waiting", b.Counters().Waiting, 0)
		for _, c := range []route.Class{route.Stored, route.Transient} {
			if err := node.Send(t.Context(), route.Frame{Onward: f.Onward}, c); !errors.Is(err, ErrClosed) {
				t.Error(c, err)
			}
		}
	})
}
