package mochibridge

import (
	"slices"

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
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.observers {
		if s.wants(topic, s.filters) {
			s.show(topic, payload, false)
		}
	}
}

func (s *session) wants(topic string, filters []string) bool {
	for _, f := range filters {
		if topics.Match(f, topic) {
			return true
		}
	}
	return false
}

// show writes one message with QoS 0, unless the observer is slow.
func (s *session) show(topic string, payload []byte, retained bool) {
	p := guard.Publish{Topic: topic, Retain: retained, V5: s.v5}
	size := p.Size(len(payload))
	w := s.conn.Begin()
	defer w.End()
	if n, limit := w.Buffered(); n+size > limit/2 || s.maxPacket > 0 && size > s.maxPacket {
		s.h.o.Counters.add(ObserverDropped)
		return
	}
	if w.PublishShared(&p, payload) == nil {
		s.sent(1, size)
	}
}

// watch adds an observer's filters and sends it the records that they match.
func (h *Hook) watch(s *session, filters []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range filters {
		if !slices.Contains(s.filters, f) {
			s.filters = append(s.filters, f)
		}
	}
	h.observers[s] = struct{}{}
	if h.unobserve == nil {
		h.unobserve = h.o.Bridge.Observe(watcher{h})
	}
	for _, r := range h.o.Bridge.Records() {
		if topic := h.recordTopic(&r); r.JSON != nil && s.wants(topic, filters) {
			s.show(topic, r.JSON, true)
		}
	}
}

// forget removes one filter.
func (h *Hook) forget(s *session, filter string) {
	h.mu.Lock()
	s.filters = slices.DeleteFunc(s.filters, func(f string) bool { return f == filter })
	none := len(s.filters) == 0
	h.mu.Unlock()
	if none {
		h.unwatch(s)
	}
}

// unwatch removes an observer; without any the bridge makes no copies.
func (h *Hook) unwatch(s *session) {
	h.mu.Lock()
	delete(h.observers, s)
	var end func()
	if len(h.observers) == 0 {
		end, h.unobserve = h.unobserve, nil
	}
	h.mu.Unlock()
	if end != nil {
		end()
	}
}
