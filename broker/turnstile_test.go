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

// TestTurnstile: addresses take turns, one has half of the places at most, where none is
// left who has most gives one to who has none, and who gives up leaves nothing behind.
func TestTurnstile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTurnstile(8)
		s.free = 1
		done, err := s.enter(t.Context(), from(1), "u")
		if err != nil {
			t.Fatal(err)
		}
		var turns []string
		wait := func(ctx context.Context, i byte) {
			go func() {
				done, err := s.enter(ctx, from(i), "u")
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
		wait(t.Context(), 5) // no place is left but that of one of 1's
		wait(t.Context(), 5)
		wait(t.Context(), 5) // and 1 has hardly more by now
		cancel()
		synctest.Wait()
		done()
		synctest.Wait()
		if got, want := fmt.Sprint(turns), "[-1 -1 -1 -5 -2 1 2 3 4 5 1 5]"; got != want {
			t.Errorf("turns %v, want %v", got, want)
		}
		if s.free != 1 || s.count() != 0 || len(s.from)+len(s.order) != 0 {
			t.Errorf("left: %+v", s)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if done, err := s.enter(t.Context(), from(1), "u"); err != nil {
			t.Error(err)
		} else {
			if _, err := s.enter(ended, from(2), "u"); !errors.Is(err, ErrLoginBusy) {
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

// TestUsersOfOneAddressTakeTurns: who guesses at one user's password neither takes the
// places of others behind the same address nor makes them wait for more than a turn.
func TestUsersOfOneAddressTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTurnstile(16)
		s.free = 1
		done, err := s.enter(t.Context(), from(1), "mallory")
		if err != nil {
			t.Fatal(err)
		}
		var turns []string
		wait := func(user string) {
			go func() {
				done, err := s.enter(t.Context(), from(1), user)
				if err != nil {
					turns = append(turns, "-"+user)
					return
				}
				turns = append(turns, user)
				done()
			}()
			synctest.Wait()
		}
		for range 9 { // one more than there are places
			wait("m")
		}
		for _, user := range []string{"alice", "bob", "alice"} {
			wait(user)
		}
		done()
		synctest.Wait()
		if got, want := fmt.Sprint(turns), "[-m -m -m -m m alice bob m alice m m m]"; got != want {
			t.Errorf("turns %v, want %v", got, want)
		}
		if s.free != 1 || s.count() != 0 || len(s.from)+len(s.order) != 0 {
			t.Errorf("left: %+v", s)
		}
	})
}
