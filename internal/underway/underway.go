// Package underway bounds what long packets that have begun to arrive hold, over all
// connections, and shares it out: the hub's fronts have a Room each.
package underway

import (
	"cmp"
	"net/netip"
	"sync"
)

const (
	// strangersShare is the part, one in so many, for all connections together of whom
	// nobody knows yet who they are.
	strangersShare = 4
	// looks is how many connections are looked at for the one that has most.
	looks = 256
)

// Room is what the long packets under way hold, and who has how much of it. The zero
// value is ready for use; all methods are safe for concurrent use.
type Room struct {
	mu        sync.Mutex
	total     tally
	strangers tally
	networks  map[netip.Prefix]*tally
	users     map[uint64]*tally
	holders   map[*Holder]struct{}
}

// tally is what the connections of one network, or of one user, hold together.
type tally struct {
	bytes int64
	conns int
}

// Holder is one connection. Its fields are only changed while it holds nothing.
type Holder struct {
	// Network and User are who shares a half each; User 0 is nobody.
	Network netip.Prefix
	User    uint64
	// Stranger counts the connection among those of whom nobody knows who they are.
	Stranger bool
	// End ends the connection, whose room others need, with no lock held. It is not
	// called when Hold says so itself.
	End func()

	// Under Room.mu:
	bytes         int64
	network, user *tally // while it holds something; user: nil where there is none
	cut           bool   // others needed its room
}

// Bytes returns how much is held.
func (r *Room) Bytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total.bytes
}

// Hold has h hold n bytes from now on. One network may have half of most, and so may one
// user, and all strangers a quarter. Where that is too much, who holds most is ended; it
// returns false when that is h itself, which then holds nothing. A negative most is no limit.
func (r *Room) Hold(h *Holder, n, most int64) bool {
	ended, ok := r.hold(h, n, most)
	for _, o := range ended {
		o.End()
	}
	return ok
}

func (r *Room) hold(h *Holder, n, most int64) (ended []*Holder, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h.cut {
		return nil, true // End has been called, or will be
	}
	grows := n > h.bytes
	r.set(h, n)
	for most >= 0 && grows {
		among := r.over(h, most)
		if among == nil {
			break
		}
		o := r.worst(h, among)
		r.set(o, 0)
		o.cut = true
		if o == h {
			return ended, false
		}
		ended = append(ended, o)
	}
	return ended, true
}

// set changes what h holds; r.mu is held.
func (r *Room) set(h *Holder, n int64) {
	if h.bytes == n {
		return
	}
	if h.bytes == 0 {
		r.enter(h)
	}
	more := n - h.bytes
	h.bytes = n
	r.total.bytes += more
	h.network.bytes += more
	if h.user != nil {
		h.user.bytes += more
	}
	if h.Stranger {
		r.strangers.bytes += more
	}
	if n == 0 {
		r.leave(h)
	}
}

func (r *Room) enter(h *Holder) {
	if r.holders == nil {
		r.holders = make(map[*Holder]struct{})
		r.networks, r.users = make(map[netip.Prefix]*tally), make(map[uint64]*tally)
	}
	r.holders[h] = struct{}{}
	r.total.conns++
	h.network = count(r.networks, h.Network)
	if h.User != 0 {
		h.user = count(r.users, h.User)
	}
	if h.Stranger {
		r.strangers.conns++
	}
}

func (r *Room) leave(h *Holder) {
	delete(r.holders, h)
	r.total.conns--
	if h.Stranger {
		r.strangers.conns--
	}
	discount(r.networks, h.Network, h.network)
	if h.user != nil {
		discount(r.users, h.User, h.user)
	}
	h.network, h.user = nil, nil
}

func count[K comparable](m map[K]*tally, k K) *tally {
	t := m[k]
	if t == nil {
		t = new(tally)
		m[k] = t
	}
	t.conns++
	return t
}

func discount[K comparable](m map[K]*tally, k K, t *tally) {
	if t.conns--; t.conns == 0 {
		delete(m, k)
	}
}

// over returns what decides whether a connection is among those who have too much
// together, one of which is a's; nil: nobody has. One connection alone may have more
// than its share. r.mu is held.
func (r *Room) over(h *Holder, most int64) (among func(*Holder) bool) {
	exceeds := func(t *tally, most int64) bool { return t.bytes > most && t.conns > 1 }
	switch {
	case h.Stranger && exceeds(&r.strangers, most/strangersShare):
		return func(o *Holder) bool { return o.Stranger }
	case exceeds(h.network, most/2):
		return func(o *Holder) bool { return o.network == h.network }
	case h.user != nil && exceeds(h.user, most/2):
		return func(o *Holder) bool { return o.user == h.user }
	case r.total.bytes > most:
		return func(*Holder) bool { return true }
	}
	return nil
}

// worst returns whose network has most, or else whose user, or else who; h, if nobody
// of a number chosen at random has more. r.mu is held.
func (r *Room) worst(h *Holder, among func(*Holder) bool) *Holder {
	worst, looked := h, 0
	for o := range r.holders {
		if o != worst && among(o) && o.compare(worst) > 0 {
			worst = o
		}
		if looked++; looked == looks {
			break
		}
	}
	return worst
}

func (h *Holder) compare(o *Holder) int {
	mine, others := h.bytes, o.bytes
	if h.user != nil {
		mine = h.user.bytes
	}
	if o.user != nil {
		others = o.user.bytes
	}
	return cmp.Or(cmp.Compare(h.network.bytes, o.network.bytes), cmp.Compare(mine, others), cmp.Compare(h.bytes, o.bytes))
}
