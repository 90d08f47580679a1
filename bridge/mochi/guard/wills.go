package guard

import (
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// wills counts the bytes of the wills that mochi keeps, one for each client id: while
// the client is connected, and as long as the will is delayed behind it.
type wills struct {
	mu    sync.Mutex
	total int64
	of    map[string]will
}

type will struct {
	cl    *mqtt.Client
	size  int64
	until time.Time // when a delayed one is sent; zero: the client is connected
}

// willSize returns what a client's will takes; 0: it has none.
func willSize(cl *mqtt.Client) int64 {
	w := &cl.Properties.Will
	if w.Flag == 0 {
		return 0
	}
	n := packetOverhead + len(w.TopicName) + len(w.Payload)
	for _, u := range w.User {
		n += propertyCost + len(u.Key) + len(u.Val)
	}
	return int64(n)
}

// fits reports whether there is room for a client's will in place of the one that is
// kept for its client id.
func (q *wills) fits(cl *mqtt.Client, limit int64) bool {
	size := willSize(cl)
	if size == 0 || limit < 0 {
		return true
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.total-q.of[cl.ID].size+size > limit {
		q.sweep()
	}
	return q.total-q.of[cl.ID].size+size <= limit
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

func (q *wills) drop(id string) {
	q.total -= q.of[id].size
	delete(q.of, id)
}

// begin counts the will of a client that has come; the one kept for its id is gone.
func (q *wills) begin(cl *mqtt.Client) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.drop(cl.ID)
	if size := willSize(cl); size > 0 {
		if q.of == nil {
			q.of = make(map[string]will)
		}
		q.of[cl.ID] = will{cl: cl, size: size}
		q.total += size
	}
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
