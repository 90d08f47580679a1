package guard

import (
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// wills counts the bytes of the wills that mochi keeps, one for each client id: while
// the client is connected, and as long as the will is delayed behind it. The wills of
// one user name, and those of one network, may have a part of the whole.
type wills struct {
	mu    sync.Mutex
	total int64
	of    map[string]will
	each  shares
}

// willShare is the part of the room for wills that one network or one user name may
// have: one in so many.
const willShare = 4

type will struct {
	cl    *mqtt.Client
	size  int64
	owner owner
	until time.Time // when a delayed one is sent; zero: the client is connected
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
	return will{cl: cl, size: int64(n), owner: ownerOf(cl)}
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
	return q.total-old.size+w.size <= limit && q.each.fits(w.owner, w.size, old.owner, old.size, limit/willShare)
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
	q.each.add(w.owner, w.size)
}

func (q *wills) drop(id string) {
	w := q.of[id]
	delete(q.of, id)
	q.total -= w.size
	q.each.add(w.owner, -w.size)
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
