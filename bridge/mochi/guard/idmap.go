package guard

import (
	"sync"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"
)

// ids keeps the packet identifiers of a client apart from those that mochi
// gives to its deliveries. MQTT has one space for each direction (3.1.1 2.3.1,
// 5 2.2.1); mochi has one map for both, so that a client's own PUBLISH with the
// identifier of an unacknowledged delivery deletes that delivery. Identifiers
// of the client are moved to the other end of the space when they come in and
// back when they are answered.
type ids struct {
	last atomic.Uint32 // the last identifier mochi allocated for a delivery

	mu   sync.Mutex
	in   map[uint16]uint16 // QoS 2 flows under way: client's identifier to mochi's
	back map[uint16]uint16 // and back
	// PUBLISH with QoS 1, SUBSCRIBE and UNSUBSCRIBE are answered before the
	// next packet is read, so one place is enough for them.
	now, theirs uint16
}

// maxFlows bounds the QoS 2 flows remembered; mochi allows ReceiveMaximum, 1,024
// unless configured otherwise.
const maxFlows = 4096

// fence is how far ahead of mochi's last allocation an identifier must lie to
// be used: mochi allocates upwards from there, concurrently.
const fence = 1 << 14

// pick returns an identifier that mochi is not using and will not use soon.
// The caller holds m.mu.
func (m *ids) pick(cl *mqtt.Client) uint16 {
	id := uint16(m.last.Load()) + 1<<15
	for range 1 << 15 {
		if id != 0 && id != m.now {
			_, flow := m.back[id]
			if !flow {
				if _, used := cl.State.Inflight.Get(id); !used {
					return id
				}
			}
		}
		id++
	}
	return id
}

// once maps an identifier that is answered at once.
func (m *ids) once(cl *mqtt.Client, theirs uint16) uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = 0
	m.now = m.pick(cl)
	m.theirs = theirs
	return m.now
}

// answered undoes once.
func (m *ids) answered(id uint16) uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id != 0 && id == m.now {
		m.now = 0
		return m.theirs
	}
	return id
}

// begin maps the identifier of a PUBLISH with QoS 2; a repeated one keeps its
// mapping, so that mochi recognises it. Where there is no danger the identifier
// stays as it is, so that most flows survive a restart with stored sessions.
func (m *ids) begin(cl *mqtt.Client, theirs uint16) uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id, ok := m.in[theirs]; ok {
		return id
	}
	if len(m.in) >= maxFlows {
		for t, id := range m.in {
			if _, ok := cl.State.Inflight.Get(id); !ok {
				delete(m.in, t)
				delete(m.back, id)
			}
		}
	}
	id := theirs
	_, used := cl.State.Inflight.Get(id)
	_, flow := m.back[id]
	if ahead := id - uint16(m.last.Load()); used || flow || ahead < fence {
		id = m.pick(cl)
	}
	if m.in == nil {
		m.in, m.back = make(map[uint16]uint16), make(map[uint16]uint16)
	}
	m.in[theirs], m.back[id] = id, theirs
	return id
}

// find maps the identifier of a PUBREL.
func (m *ids) find(cl *mqtt.Client, theirs uint16) uint16 {
	m.mu.Lock()
	id, ok := m.in[theirs]
	m.mu.Unlock()
	if ok {
		return id
	}
	return m.once(cl, theirs)
}

// origin maps the identifier of a PUBREC or PUBCOMP back; end forgets the flow.
func (m *ids) origin(id uint16, end bool) uint16 {
	m.mu.Lock()
	theirs, ok := m.back[id]
	if ok && end {
		delete(m.back, id)
		delete(m.in, theirs)
	}
	m.mu.Unlock()
	if ok {
		return theirs
	}
	return m.answered(id)
}

// inherit takes over the QoS 2 flows of the session's previous connection.
func (m *ids) inherit(old *ids) {
	old.mu.Lock()
	in, back := old.in, old.back
	old.in, old.back = nil, nil
	old.mu.Unlock()
	m.mu.Lock()
	m.in, m.back = in, back
	m.mu.Unlock()
}
