package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
)

func from(i byte) net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, i)} }

// TestTurnstile: addresses take turns, one has half of the places at most, and who
// gives up leaves nothing behind.
func TestTurnstile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTurnstile(8)
		s.free = 1
		done, err := s.enter(t.Context(), from(1))
		if err != nil {
			t.Fatal(err)
		}
		var turns []string
		wait := func(ctx context.Context, i byte) {
			go func() {
				done, err := s.enter(ctx, from(i))
				if err != nil {
					turns = append(turns, fmt.Sprint("-", i))
					return
				}
				turns = append(turns, fmt.Sprint(i))
				done()
			}()
			synctest.Wait()
		}
		for range 5 {
			wait(t.Context(), 1)
		}
		gone, cancel := context.WithCancel(t.Context())
		wait(gone, 2)
		wait(t.Context(), 2)
		wait(t.Context(), 3)
		wait(t.Context(), 4)
		if s.count() != 8 {
			t.Errorf("%d wait", s.count())
		}
		wait(t.Context(), 5) // no place is left
		cancel()
		synctest.Wait()
		done()
		synctest.Wait()
		if got, want := fmt.Sprint(turns), "[-1 -5 -2 1 2 3 4 1 1 1]"; got != want {
			t.Errorf("turns %v, want %v", got, want)
		}
		if s.free != 1 || s.count() != 0 || len(s.from)+len(s.order) != 0 {
			t.Errorf("left: %+v", s)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if done, err := s.enter(t.Context(), from(1)); err != nil {
			t.Error(err)
		} else {
			if _, err := s.enter(ended, from(2)); !errors.Is(err, ErrLoginBusy) {
				t.Errorf("after the end: %v", err)
			}
			done()
		}
	})
}

// count returns how many wait.
func (s *turnstile) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}
