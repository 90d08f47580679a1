package guard

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/internal/connlimit"
)

// wills counts the bytes of the wills that mochi keeps, one for each client id: while
// the client is connected, and as long as the will is delayed behind it. The wills of
// one user name, and those of one network, may have a part of the whole.
type wills struct {
	seed maphash.Seed

	mu    sync.Mutex
	total int64
	of    map[string]will
	from  map[netip.Prefix]int64 // bytes, by network
	by    map[uint64]int64       // bytes, by the hash of the user name
}

// willShare is the part of the room for wills that one network or one user name may
// have: one in so many.
const willShare = 4

type will struct {
	cl    *mqtt.Client
	size  int64
	from  netip.Prefix
	user  uint64    // 0: none
	until time.Time // when a delayed one is sent; zero: the client is connected
}

func newWills() wills {
	return wills{
		seed: maphash.MakeSeed(), of: make(map[string]will),
		from: make(map[netip.Prefix]int64), by: make(map[uint64]int64),
	}
}

// ofClient returns what a client's will takes; its size is 0 when there is none.
func (q *wills) ofClient(cl *mqtt.Client) will {
	w := &cl.Properties.Will
	if w.Flag == 0 {
		return will{}
	}
	n := packetOverhead + len(w.TopicName) + len(w.Payload)
	for _, u := range w.User {
		n += propertyCost + len(u.Key) + len(u.Val)
	}
	of := will{cl: cl, size: int64(n), from: connlimit.Network(cl.Net.Conn.RemoteAddr())}
	if len(cl.Properties.Username) > 0 {
		of.user = max(1, maphash.Bytes(q.seed, cl.Properties.Username))
	}
	return of
}

// fits reports whether there is room for a client's will in place of the one that is
// kept for its client id. Nothing is counted: who the client is may not be known yet.
func (q *wills) fits(cl *mqtt.Client, limit int64) bool {
	w := q.ofClient(cl)
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.room(cl.ID, w, limit)
}

// room reports whether there is room for w in place of what is kept for id. A
// negative limit is none. q.mu is held.
func (q *wills) room(id string, w will, limit int64) bool {
	if w.size == 0 || limit < 0 {
		return true
	}
	if q.within(id, w, limit) {
		return true
	}
	q.sweep()
	return q.within(id, w, limit)
}

func (q *wills) within(id string, w will, limit int64) bool {
	old := q.of[id]
	used := func(n int64, same bool) int64 {
		if same {
			n -= old.size
		}
		return n + w.size
	}
	return used(q.total, true) <= limit &&
		used(q.from[w.from], old.from == w.from) <= limit/willShare &&
		(w.user == 0 || used(q.by[w.user], old.user == w.user) <= limit/willShare)
}

// sweep removes what has been sent: mochi tells no hook when the session was gone by
// then. q.mu is held.
func (q *wills) sweep() {
	now := time.Now()
	for id, w := range q.of {
		if !w.until.IsZero() && now.After(w.until) {
			q.drop(id)
		}
	}
}

func (q *wills) add(id string, w will) {
	q.of[id] = w
	q.total += w.size
	q.from[w.from] += w.size
	if w.user != 0 {
		q.by[w.user] += w.size
	}
}

func (q *wills) drop(id string) {
	w, ok := q.of[id]
	if !ok {
		return
	}
	delete(q.of, id)
	q.total -= w.size
	if q.from[w.from] -= w.size; q.from[w.from] == 0 {
		delete(q.from, w.from)
	}
	if w.user == 0 {
		return
	}
	if q.by[w.user] -= w.size; q.by[w.user] == 0 {
		delete(q.by, w.user)
	}
}

// begin counts the will of a client that has come; the one kept for its id is gone. It
// reports false, and counts nothing, when others have taken the room meanwhile.
func (q *wills) begin(cl *mqtt.Client, limit int64) bool {
	w := q.ofClient(cl)
	q.mu.Lock()
	defer q.mu.Unlock()
	ok := q.room(cl.ID, w, limit)
	q.drop(cl.ID)
	if ok && w.size > 0 {
		q.add(cl.ID, w)
	}
	return ok
}

// end counts it out when the client has gone, unless mochi keeps it for later.
func (q *wills) end(cl *mqtt.Client) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w, ok := q.of[cl.ID]
	if !ok || w.cl != cl {
		return
	}
	if p := &cl.Properties.Will; p.Flag == 1 && p.WillDelayInterval > 0 {
		w.until = time.Now().Add(time.Duration(p.WillDelayInterval)*time.Second + 2*time.Second)
		q.of[cl.ID] = w
		return
	}
	q.drop(cl.ID)
}

// OnWillSent counts out a will that was delayed.
func (f *Fixes) OnWillSent(cl *mqtt.Client, _ packets.Packet) {
	defer f.recovered("OnWillSent")
	f.wills.mu.Lock()
	defer f.wills.mu.Unlock()
	f.wills.drop(cl.ID)
}

// WillBytes returns the bytes of the wills that are kept.
func (f *Fixes) WillBytes() int64 {
	f.wills.mu.Lock()
	defer f.wills.mu.Unlock()
	f.wills.sweep()
	return f.wills.total
}
