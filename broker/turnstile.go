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

// turnstile bounds what costs much processor time: half of the processors work on it and
// a bounded number waits, half of those from one address at most. Addresses take turns,
// and of one address the users, so that a flood makes others wait for one of its turns
// and no more. Where no place is left, who has none yet takes one from whom has most.
// It is safe for concurrent use.
type turnstile struct {
	most int // that may wait

	mu      sync.Mutex
	free    int // workers
	waiting int
	from    map[netip.Prefix]*line
	order   []netip.Prefix // of the keys of from: whose turn it is next
}

// line is who waits from one address. No user's list is empty.
type line struct {
	n     int
	users map[string][]*waiter // oldest first
	order []string             // of the keys of users: whose turn it is next
}

type waiter struct {
	turn chan struct{} // closed when it is its turn, or it has lost its place
	lost bool          // written before turn is closed
}

func newTurnstile(most int) *turnstile {
	return &turnstile{most: most, free: max(1, runtime.GOMAXPROCS(0)/2), from: make(map[netip.Prefix]*line)}
}

// enter waits for a turn; done ends it. user is who the peer says it is. ErrLoginBusy
// means that too many wait, or that ctx ended first.
func (s *turnstile) enter(ctx context.Context, addr net.Addr, user string) (done func(), err error) {
	key := connlimit.Network(addr)
	s.mu.Lock()
	if s.free > 0 {
		s.free--
		s.mu.Unlock()
		return s.leave, nil
	}
	if !s.room(key, user) {
		s.mu.Unlock()
		return nil, ErrLoginBusy
	}
	w := &waiter{turn: make(chan struct{})}
	l := s.from[key]
	if l == nil {
		l = &line{users: make(map[string][]*waiter)}
		s.from[key] = l
		s.order = append(s.order, key)
	}
	if len(l.users[user]) == 0 {
		l.order = append(l.order, user)
	}
	l.users[user] = append(l.users[user], w)
	l.n++
	s.waiting++
	s.mu.Unlock()
	select {
	case <-w.turn:
		if w.lost {
			return nil, ErrLoginBusy
		}
		return s.leave, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-w.turn:
		if !w.lost {
			s.next() // the turn came meanwhile
		}
	default:
		s.take(key, user, slices.Index(s.from[key].users[user], w))
	}
	return nil, ErrLoginBusy
}

func (s *turnstile) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// room reports whether a user of an address may wait. Somebody else loses the place
// that came last where that address, or that user of the address, has at least two
// more. s.mu is held.
func (s *turnstile) room(key netip.Prefix, user string) bool {
	mine := s.from[key]
	if mine == nil {
		mine = &line{}
	}
	victim, l := key, mine
	switch {
	case mine.n >= max(1, s.most/2):
	case s.waiting >= s.most:
		for k, other := range s.from {
			if other.n > l.n {
				victim, l = k, other
			}
		}
		if l != mine && l.n < mine.n+2 {
			return false
		}
	default:
		return true
	}
	loser, most := "", 0
	for u, list := range l.users {
		if len(list) > most {
			loser, most = u, len(list)
		}
	}
	if l == mine && most < len(mine.users[user])+2 {
		return false
	}
	w := s.take(victim, loser, most-1)
	w.lost = true
	close(w.turn)
	return true
}

// next gives a worker that is free to who is next. s.mu is held.
func (s *turnstile) next() {
	if len(s.order) == 0 {
		s.free++
		return
	}
	key := s.order[0]
	s.order = append(s.order[1:], key)
	l := s.from[key]
	user := l.order[0]
	l.order = append(l.order[1:], user)
	close(s.take(key, user, 0).turn)
}

// take removes one who waits. s.mu is held.
func (s *turnstile) take(key netip.Prefix, user string, i int) *waiter {
	l := s.from[key]
	list := l.users[user]
	w := list[i]
	s.waiting--
	l.n--
	if l.users[user] = slices.Delete(list, i, i+1); len(l.users[user]) == 0 {
		delete(l.users, user)
		l.order = slices.DeleteFunc(l.order, func(u string) bool { return u == user })
	}
	if l.n == 0 {
		delete(s.from, key)
		s.order = slices.DeleteFunc(s.order, func(p netip.Prefix) bool { return p == key })
	}
	return w
}
