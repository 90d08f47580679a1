package mochibridge

import (
	"strings"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/topics"
)

// unstored is a filter that mochi does not store: a shared subscription without
// group. It answers 0x8F, which OnSubscribed changes.
const unstored = "$share"

// mark is what OnSubscribe made of a filter.
type mark uint8

const (
	markPass    mark = iota // not the hook's
	markInbox               // the own inbox: granted with QoS 1
	markObserve             // for an observer: granted with QoS 0
	markRefuse              // under the root, and nothing outside
)

// OnSubscribe takes filters under the root out of mochi's hands.
func (h *Hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	defer func() {
		if h.failed("OnSubscribe", recover()) {
			out = pk
			for i := range out.Filters {
				out.Filters[i].Filter = unstored
			}
		}
	}()
	if cl.Net.Inline {
		return pk
	}
	s := sessionOf(cl)
	if s != nil {
		s.marks = s.marks[:0]
		s.fresh = nil
		s.granted = false
	}
	for i := range pk.Filters {
		f := &pk.Filters[i]
		m := h.judge(s, f)
		if m == markRefuse {
			h.denied(cl, "subscription", f.Filter)
		}
		if s != nil {
			s.marks = append(s.marks, m)
			if m == markObserve {
				s.fresh = append(s.fresh, strings.Clone(f.Filter))
			}
		}
		if _, outside := h.o.Root.Overlaps(f.Filter); m != markPass && (m != markObserve || !outside) {
			f.Filter = unstored
		}
		if s != nil && s.link != nil {
			f.Qos = 0 // mochi allocates a device no packet identifiers
		}
	}
	return pk
}

// judge decides on one filter.
func (h *Hook) judge(s *session, f *packets.Subscription) mark {
	under, outside := h.o.Root.Overlaps(f.Filter)
	inner, shared := topics.StripShare(f.Filter)
	switch {
	case !under:
		return markPass
	case s != nil && s.link != nil && f.Filter == s.in && f.Qos > 0:
		return markInbox
	case s != nil && s.who.Role == bridge.RoleObserver && !shared && topics.ValidFilter(inner):
		if h.mayWatch(s) {
			return markObserve
		}
		h.o.Counters.add(ObserversFull)
		return markRefuse
	case outside:
		return markPass // shows what lies outside
	}
	return markRefuse
}

// OnSubscribed sets the SUBACK codes of filters under the root.
func (h *Hook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, codes []byte) {
	defer func() {
		if h.failed("OnSubscribed", recover()) {
			for i := range codes {
				codes[i] = packets.ErrUnspecifiedError.Code
			}
		}
	}()
	if cl.Net.Inline || len(codes) != len(pk.Filters) {
		return
	}
	s := sessionOf(cl)
	v5 := cl.Properties.ProtocolVersion == 5
	for i := range codes {
		m := markPass
		if s != nil && i < len(s.marks) {
			m = s.marks[i]
		} else if pk.Filters[i].Filter == unstored {
			m = markRefuse
		}
		switch {
		case codes[i] == packets.ErrPacketIdentifierInUse.Code:
			// mochi refuses the whole packet; the client tries again.
			if s != nil {
				s.fresh = nil
			}
		case m == markInbox:
			codes[i] = packets.CodeGrantedQos1.Code
			s.granted = true
			h.o.Counters.add(SubscribeGranted)
		case m == markObserve:
			if codes[i] >= packets.ErrUnspecifiedError.Code {
				codes[i] = packets.CodeGrantedQos0.Code
			}
			h.o.Counters.add(SubscribeGranted)
		case m == markRefuse:
			codes[i] = packets.ErrUnspecifiedError.Code
			if v5 {
				codes[i] = packets.ErrNotAuthorized.Code
			}
			h.o.Counters.add(SubscribeRefused)
		case s != nil && codes[i] >= packets.ErrUnspecifiedError.Code:
			h.denied(cl, "subscription", pk.Filters[i].Filter)
		}
	}
}

// OnPacketProcessed goes on where the SUBACK has been written: the device's
// inbox is prepared, an observer gets the retained records.
func (h *Hook) OnPacketProcessed(cl *mqtt.Client, pk packets.Packet, err error) {
	defer func() { h.failed("OnPacketProcessed", recover()) }()
	if pk.FixedHeader.Type != packets.Subscribe || err != nil {
		return
	}
	s := sessionOf(cl)
	if s == nil {
		return
	}
	if s.granted {
		s.granted = false
		s.link.Subscribed()
	}
	if len(s.fresh) > 0 {
		h.watch(s, s.fresh)
		s.fresh = nil
	}
}

// OnUnsubscribe forgets an observer's filters. A device that gives up its inbox
// is disconnected: there is nothing else to be connected for.
func (h *Hook) OnUnsubscribe(cl *mqtt.Client, pk packets.Packet) (out packets.Packet) {
	out = pk
	defer func() { h.failed("OnUnsubscribe", recover()) }()
	s := sessionOf(cl)
	if s == nil {
		return out
	}
	for i := range pk.Filters {
		switch f := pk.Filters[i].Filter; {
		case s.link != nil && f == s.in:
			h.o.Counters.add(InboxGivenUp)
			s.clean.Store(true)
			s.bye(packets.ErrImplementationSpecificError)
		case s.who.Role == bridge.RoleObserver:
			h.forget(s, f)
		}
	}
	return out
}
