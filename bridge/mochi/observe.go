package mochibridge

import (
	"slices"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/topics"
)

// watcher passes what the bridge shows on to the observers, on the bridge's
// observer goroutine.
type watcher struct{ h *Hook }

var _ bridge.Observer = watcher{}

// Copy implements bridge.Observer.
func (w watcher) Copy(c bridge.Copy) {
	topic := w.h.o.Root.In(c.Device)
	if c.Direction == bridge.FromDevice {
		topic = w.h.o.Root.Out(c.Device)
	}
	w.h.show(topic, c.Payload)
}

// Record implements bridge.Observer. A removed record is an empty message, as
// MQTT clears a retained one.
func (w watcher) Record(r bridge.Record) { w.h.show(w.h.recordTopic(&r), r.JSON) }

// Trace implements bridge.Observer.
func (w watcher) Trace(line []byte) { w.h.show(w.h.o.Root.Trace(), line) }

func (h *Hook) recordTopic(r *bridge.Record) string {
	if r.Kind == bridge.RecordForwarder {
		return h.o.Root.Forwarder(r.Name)
	}
	return h.o.Root.Status(r.Name)
}

// show writes a message to all observers that want its topic.
func (h *Hook) show(topic string, payload []byte) {
	h.watchMu.Lock()
	defer h.watchMu.Unlock()
	for s := range h.observers {
		if wanted(s.filters, topic) {
			delete(s.backlog, topic) // older than this
			if !s.show(topic, payload, false) {
				h.o.Counters.add(ObserverDropped)
			}
		}
	}
}

func wanted(filters []string, topic string) bool {
	for _, f := range filters {
		if topics.Match(f, topic) {
			return true
		}
	}
	return false
}

// show writes one message with QoS 0, unless the observer is slow or does not
// take packets of that size.
func (s *session) show(topic string, payload []byte, retained bool) bool {
	p := guard.Publish{Topic: topic, Retain: retained, V5: s.v5}
	size := p.Size(len(payload))
	if s.maxPacket > 0 && size > s.maxPacket {
		return false
	}
	w := s.conn.Begin()
	defer w.End()
	if n, limit := w.Buffered(); n > 0 && n+size > limit/2 || w.PublishShared(&p, payload) != nil {
		return false
	}
	s.sent(1, size)
	return true
}

// mayWatch reserves a place among the observers and reports whether s may have
// another filter.
func (h *Hook) mayWatch(s *session) bool {
	h.watchMu.Lock()
	defer h.watchMu.Unlock()
	if _, ok := h.observers[s]; !ok && len(h.observers) >= h.o.Observers {
		return false
	}
	h.observers[s] = struct{}{}
	return len(s.filters)+len(s.fresh) < observerFilters
}

// watch adds an observer's filters and sends it the records that they match. There is
// one replay for an observer at a time: what it asks for meanwhile is in the same one
// if that has not begun, and else in the next.
func (h *Hook) watch(s *session, filters []string) {
	h.watchMu.Lock()
	for s.after != nil { // taken over while the SUBACK was written
		s = s.after
	}
	asked := len(s.replay) > 0
	for _, f := range filters {
		if !slices.Contains(s.filters, f) {
			s.filters = append(s.filters, f)
		}
		if !slices.Contains(s.replay, f) {
			s.replay = append(s.replay, f)
		}
	}
	h.observers[s] = struct{}{}
	if h.unobserve == nil {
		h.unobserve = h.o.Bridge.Observe(watcher{h})
	}
	h.watchMu.Unlock()
	if asked {
		return
	}
	h.o.Bridge.Replay(func() func(bridge.Record) {
		h.watchMu.Lock()
		filters := s.replay
		s.replay = nil
		h.watchMu.Unlock()
		if len(filters) == 0 {
			return nil
		}
		return func(r bridge.Record) {
			if topic := h.recordTopic(&r); wanted(filters, topic) {
				h.retained(s, topic, r.JSON)
			}
		}
	})
}

// succeed has an observer that came back to its session see what the session's filters
// show, beginning with the records: they may have changed meanwhile. Where others have
// taken the place it goes again, since it believes that it sees.
func (h *Hook) succeed(s *session) {
	old := s.before
	s.before = nil
	h.watchMu.Lock()
	old.after = s
	delete(h.observers, old)
	filters := slices.Clone(old.filters)
	h.watchMu.Unlock()
	switch {
	case len(filters) == 0:
	case h.mayWatch(s):
		h.watch(s, filters)
	default:
		h.o.Counters.add(ObserversFull)
		s.bye(packets.ErrQuotaExceeded)
	}
}

// retained sends a retained record, now or when there is room.
func (h *Hook) retained(s *session, topic string, record []byte) {
	h.watchMu.Lock()
	defer h.watchMu.Unlock()
	if _, ok := h.observers[s]; !ok {
		return
	}
	if len(s.backlog) == 0 && s.show(topic, record, true) {
		return
	}
	if s.backlog == nil {
		s.backlog = make(map[string][]byte)
	}
	s.backlog[topic] = record
	if len(s.backlog) == 1 {
		h.catchUp(s)
	}
}

// catchUp sends what records have waited for room. h.watchMu is held.
func (h *Hook) catchUp(s *session) {
	for range 3 { // again when room was made between the two looks at it
		for topic, record := range s.backlog {
			if !s.show(topic, record, true) {
				break
			}
			delete(s.backlog, topic)
		}
		if len(s.backlog) == 0 {
			return
		}
		w := s.conn.Begin()
		_, limit := w.Buffered()
		later := w.NotifyDrained(limit / 8)
		w.End()
		if later {
			return
		}
	}
	// Not for want of room: the connection is closed, or a packet is too long.
	h.o.Counters.add(ObserverDropped)
	clear(s.backlog)
}

// drained goes on with an observer that has read.
func (s *session) drained() {
	if s.link != nil {
		s.link.Ready()
		return
	}
	s.h.watchMu.Lock()
	defer s.h.watchMu.Unlock()
	s.h.catchUp(s)
}

// forget removes one filter.
func (h *Hook) forget(s *session, filter string) {
	h.watchMu.Lock()
	same := func(f string) bool { return f == filter }
	s.filters, s.replay = slices.DeleteFunc(s.filters, same), slices.DeleteFunc(s.replay, same)
	none := len(s.filters) == 0
	h.watchMu.Unlock()
	if none {
		h.unwatch(s)
	}
}

// unwatch removes an observer; without any the bridge makes no copies.
func (h *Hook) unwatch(s *session) {
	h.watchMu.Lock()
	delete(h.observers, s)
	s.backlog, s.replay = nil, nil
	var end func()
	if len(h.observers) == 0 {
		end, h.unobserve = h.unobserve, nil
	}
	h.watchMu.Unlock()
	if end != nil {
		end()
	}
}
