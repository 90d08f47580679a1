package broker

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"

	"github.com/sealmq/sealmq/internal/connlimit"
)

// turnstile bounds what costs much processor time: half of the processors work on it,
// a bounded number waits, half of those from one address at most, and addresses take
// turns, so that a flood from one makes others wait for one of its turns and no more.
// It is safe for concurrent use.
type turnstile struct {
	most int // that may wait

	mu      sync.Mutex
	free    int // workers
	waiting int
	from    map[netip.Prefix][]chan struct{} // who waits, oldest first; closed when it is their turn
	order   []netip.Prefix                   // of the keys of from: whose turn it is next
}

func newTurnstile(most int) *turnstile {
	return &turnstile{most: most, free: max(1, runtime.GOMAXPROCS(0)/2), from: make(map[netip.Prefix][]chan struct{})}
}

// enter waits for a turn; done ends it. ErrLoginBusy means that too many wait, or that
// ctx ended first.
func (s *turnstile) enter(ctx context.Context, addr net.Addr) (done func(), err error) {
	key := connlimit.Network(addr)
	s.mu.Lock()
	if s.free > 0 {
		s.free--
		s.mu.Unlock()
		return s.leave, nil
	}
	mine := s.from[key]
	if s.waiting >= s.most || len(mine) >= s.most/2 {
		s.mu.Unlock()
		return nil, ErrLoginBusy
	}
	turn := make(chan struct{})
	if len(mine) == 0 {
		s.order = append(s.order, key)
	}
	s.from[key] = append(mine, turn)
	s.waiting++
	s.mu.Unlock()
	select {
	case <-turn:
		return s.leave, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.from[key], turn); i >= 0 {
		s.take(key, i)
	} else {
		s.next() // the turn came meanwhile
	}
	return nil, ErrLoginBusy
}

func (s *turnstile) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// next gives a worker that is free to who is next. s.mu is held.
func (s *turnstile) next() {
	if len(s.order) == 0 {
		s.free++
		return
	}
	key := s.order[0]
	s.order = append(s.order[1:], key)
	close(s.take(key, 0))
}

// take removes one who waits. s.mu is held.
func (s *turnstile) take(key netip.Prefix, i int) chan struct{} {
	list := s.from[key]
	turn := list[i]
	s.waiting--
	if s.from[key] = slices.Delete(list, i, i+1); len(s.from[key]) == 0 {
		delete(s.from, key)
		s.order = slices.DeleteFunc(s.order, func(p netip.Prefix) bool { return p == key })
	}
	return turn
}
