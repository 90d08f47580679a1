package guard

import (
	"sync"

	mqtt "github.com/mochi-mqtt/server/v2"
)

// sessions knows whose sessions are that outlive their connections, connected or away.
type sessions struct {
	mu   sync.Mutex
	of   map[string]keptSession // by client id
	each shares
}

type keptSession struct {
	cl    *mqtt.Client
	owner owner
}

// keeps reports whether a client asks for a session that outlives the connection.
func keeps(cl *mqtt.Client) bool {
	p := &cl.Properties
	return p.ProtocolVersion < 5 && !p.Clean || p.ProtocolVersion == 5 && p.Props.SessionExpiryInterval > 0
}

// half is what one owner may have of most.
func half(most int64) int64 { return max(1, most/2) }

// fits reports whether o may have a session of that id: one that is there may be come
// back to from anywhere.
func (q *sessions) fits(id string, o owner, most int64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.of[id]
	return ok || q.each.fits(o, 1, owner{}, 0, most)
}

// begin counts the session of a client that has come, in place of the one there was.
func (q *sessions) begin(cl *mqtt.Client, o owner) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.drop(cl.ID)
	if !keeps(cl) {
		return
	}
	if q.of == nil {
		q.of = make(map[string]keptSession)
	}
	q.of[cl.ID] = keptSession{cl, o}
	q.each.add(o, 1)
}

// end counts out the session of a client, unless another one has it.
func (q *sessions) end(cl *mqtt.Client) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.of[cl.ID].cl == cl {
		q.drop(cl.ID)
	}
}

func (q *sessions) drop(id string) {
	s, ok := q.of[id]
	if !ok {
		return
	}
	delete(q.of, id)
	q.each.add(s.owner, -1)
}
