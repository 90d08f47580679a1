package guard

import (
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// packetOverhead is about what mochi keeps for a queued message besides its
// bytes.
const packetOverhead = 1 << 10

// queued counts the bytes of the messages that mochi keeps for ordinary clients
// until they acknowledge them. mochi itself bounds only their number for each
// session.
type queued struct {
	mu      sync.Mutex
	total   int64
	of      map[*mqtt.Client]*backlog
	each    shares
	checked time.Time
}

// backlog is what is counted for one client: bytes by packet identifier.
type backlog struct {
	owner owner
	ids   map[uint16]int64
}

// add counts a message in and reports whether the sum is within the limit, and that for
// one owner; if not, the message is not counted. A negative limit is none.
func (q *queued) add(cl *mqtt.Client, o owner, id uint16, size, limit int64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.of[cl]
	if b == nil {
		b = &backlog{owner: o, ids: make(map[uint16]int64)}
	}
	fits := func() bool {
		old := b.ids[id]
		return limit < 0 || q.total-old+size <= limit && q.each.fits(b.owner, size, b.owner, old, half(limit))
	}
	if !fits() {
		if q.check(); !fits() {
			return false
		}
	}
	if q.of == nil {
		q.of = make(map[*mqtt.Client]*backlog)
	}
	q.of[cl] = b // check may have removed it
	q.total += size - b.ids[id]
	q.each.add(b.owner, size-b.ids[id])
	b.ids[id] = size
	return true
}

// remove counts a message out.
func (q *queued) remove(cl *mqtt.Client, id uint16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.drop(cl, id)
}

func (q *queued) drop(cl *mqtt.Client, id uint16) {
	b := q.of[cl]
	if b == nil {
		return
	}
	q.total -= b.ids[id]
	q.each.add(b.owner, -b.ids[id])
	delete(b.ids, id)
	if len(b.ids) == 0 {
		delete(q.of, cl)
	}
}

// check removes what mochi has dropped without telling its hooks, once a second
// at most. q.mu is held.
func (q *queued) check() {
	now := time.Now()
	if now.Sub(q.checked) < time.Second {
		return
	}
	q.checked = now
	for cl, b := range q.of {
		for id := range b.ids {
			if _, ok := cl.State.Inflight.Get(id); !ok {
				q.drop(cl, id)
			}
		}
	}
}

// keep counts a message that mochi has queued for a client, or takes it out of
// the queue when there is no room. A client that is connected gets it all the
// same, once.
func (f *Fixes) keep(cl *mqtt.Client, pk *packets.Packet) {
	size := int64(kept(pk) + packetOverhead)
	if f.queued.add(cl, f.owner(cl), pk.PacketID, size, f.cfg.QueuedBytes) {
		return
	}
	f.cfg.Counters.add(QueuedFull)
	if cl.State.Inflight.Delete(pk.PacketID) {
		atomic.AddInt64(&f.server.Info.Inflight, -1)
		atomic.AddInt64(&f.server.Info.InflightDropped, 1)
		cl.State.Inflight.IncreaseSendQuota()
	}
}

// OnQosComplete counts out what a client has acknowledged.
func (f *Fixes) OnQosComplete(cl *mqtt.Client, pk packets.Packet) {
	defer f.recovered("OnQosComplete")
	f.queued.remove(cl, pk.PacketID)
}

// OnQosDropped counts out what has expired, or gone with its session.
func (f *Fixes) OnQosDropped(cl *mqtt.Client, pk packets.Packet) {
	defer f.recovered("OnQosDropped")
	f.queued.remove(cl, pk.PacketID)
}

// Queued returns the bytes of the messages kept for ordinary clients.
func (f *Fixes) Queued() int64 {
	f.queued.mu.Lock()
	defer f.queued.mu.Unlock()
	return f.queued.total
}
