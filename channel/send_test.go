package channel

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

// TestParkedFrameRefused: a frame that had to wait and is then refused for good
// does not stand in the way of those behind it.
func TestParkedFrameRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, _ := pair(t, n)
		synctest.Wait()
		unblock := a.block()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := ab.Send(ctx, route.To("app"), nil, []byte("parked")); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		unblock()
		broken := errors.New("no way")
		a.fail(broken)
		if err := ab.Send(t.Context(), route.To("app"), nil, []byte("refused")); !errors.Is(err, broken) {
			t.Fatal(err)
		}
		a.fail(nil)
		send(t, ab, "through")
		if d := b.next(t); string(d.Frame.Payload) != "through" || d.Nonce != 2 {
			t.Errorf("%q as nonce %d", d.Frame.Payload, d.Nonce)
		}
	})
}

// TestWaitsForRoomEndWithTheChannel: what a channel sends by itself does not wait for a
// full queue any longer than the channel lives.
func TestWaitsForRoomEndWithTheChannel(t *testing.T) {
	for name, end := range map[string]func(ab, ba *Channel) error{
		"closed here":        func(ab, _ *Channel) error { return ab.Close() },
		"closed by the peer": func(_, ba *Channel) error { return ba.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, _, ab, ba := pair(t, newTestNet())
				synctest.Wait()
				unblock := a.block()
				defer unblock()
				ab.control(helloPing)
				synctest.Wait()
				if len(ab.turn) != 1 {
					t.Fatal("the ping does not wait")
				}
				if err := end(ab, ba); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if !ab.hasEnded() || len(ab.turn) != 0 {
					t.Errorf("ended %v, and the ping still waits", ab.hasEnded())
				}
			})
		})
	}
}

// TestGreetingEndsWithTheChannel: the same of the hello of a responder.
func TestGreetingEndsWithTheChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b := listen(t, n)
		var unblock func()
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" && unblock == nil && len(p.frame.Onward) > 0 && p.frame.Onward[0].Value != "listener" {
				unblock = b.block() // message 3: the hello waits
			}
			return []packet{p}
		})
		dial(t, a, "bob", DialOptions{NoConfirm: true})
		synctest.Wait()
		ba := only(t, b)
		if unblock == nil || len(ba.turn) != 1 {
			t.Fatal("the hello does not wait")
		}
		defer unblock()
		start := time.Now()
		ba.finish(ErrClosed)
		synctest.Wait()
		if len(ba.turn) != 0 || time.Since(start) != 0 {
			t.Errorf("the hello still waits after %v", time.Since(start))
		}
	})
}

// TestHeldFramesAreCounted: what is held back when a channel ends is a counted
// drop.
func TestHeldFramesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, b, ab, ba := pair(t, n)
		synctest.Wait()
		first := true
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" && first {
				first = false
				return nil
			}
			return []packet{p}
		})
		for range 4 {
			send(t, ab, "m")
		}
		synctest.Wait()
		if err := ba.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := ba.Stats().Dropped.Of(DropEnded); got != 3 {
			t.Errorf("%d counted, want 3", got)
		}
		b.nothing(t)
	})
}

// TestConcurrentSends: nonces leave in order however many send at once, and
// nothing is lost or mixed up.
func TestConcurrentSends(t *testing.T) {
	const senders, each = 8, 100
	n := newTestNet()
	_, b, ab, _ := pair(t, n)
	before := len(n.seen("alice"))
	errs := make(chan error, senders)
	for s := range senders {
		go func() {
			var err error
			for i := range each {
				err = errors.Join(err, ab.Send(t.Context(), route.To("app"), nil, []byte{byte(s), byte(i)}))
			}
			errs <- err
		}()
	}
	for range senders {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range n.seen("alice")[before:] {
		if nonce, _ := FrameNonce(p.frame.Payload); nonce != uint64(i+1) {
			t.Fatalf("packet %d has nonce %d", i, nonce)
		}
	}
	var next [senders]byte
	for range senders * each {
		p := b.next(t).Frame.Payload
		if p[1] != next[p[0]] {
			t.Fatalf("sender %d: message %d, want %d", p[0], p[1], next[p[0]])
		}
		next[p[0]]++
	}
}

// TestHandshakesDoNotStallChannels: while every worker is busy with a handshake,
// frames of channels are opened and handed on.
func TestHandshakesDoNotStallChannels(t *testing.T) {
	n := newTestNet()
	busy, release := make(chan struct{}, 1), make(chan struct{})
	var slow atomic.Bool
	a, b := listen(t, n, func(c *Config) {
		c.Limits.Workers = 1
		c.hooks.ephemeral = func() (keyPair, error) {
			if slow.Load() {
				busy <- struct{}{}
				<-release
			}
			return newEphemeral()
		}
	})
	c := dial(t, a, "bob", DialOptions{})
	slow.Store(true)
	dialled := make(chan error, 1)
	go func() {
		_, err := a.ep.Dial(context.Background(), route.To("bob", "listener"), TrustEveryone, DialOptions{})
		dialled <- err
	}()
	<-busy
	send(t, c, "not held up")
	if d := b.next(t); string(d.Frame.Payload) != "not held up" {
		t.Errorf("%q", d.Frame.Payload)
	}
	close(release)
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}
