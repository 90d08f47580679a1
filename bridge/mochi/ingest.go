package mochibridge

import (
	"encoding/binary"
	"sync/atomic"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// OnPacketRead takes frames, their acknowledgements, and whatever else is
// published under the root, before mochi processes it.
func (h *Hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (out packets.Packet, err error) {
	defer func() {
		if h.failed("OnPacketRead", recover()) {
			out, err = pk, packets.ErrRejectPacket
		}
	}()
	switch pk.FixedHeader.Type {
	case packets.Publish:
		return h.published(cl, pk)
	case packets.Puback:
		if s := sessionOf(cl); s != nil && s.link != nil {
			s.acked(pk.PacketID)
			return taken, nil
		}
	case packets.Disconnect:
		if s := sessionOf(cl); s != nil {
			s.clean.Store(true)
		}
	}
	return pk, nil
}

// taken is what mochi gets in the place of a packet that was taken: an
// acknowledgement of nothing, which it ignores.
var taken = packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}}

// published handles a PUBLISH as mochi decoded it.
func (h *Hook) published(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	s := sessionOf(cl)
	kind, name := h.o.Root.Parse(pk.TopicName)
	own := kind == topics.Out && s != nil && s.link != nil && name == s.who.ClientID
	if pk.Properties.TopicAliasFlag {
		var known bool
		if own, known = s.alias(&pk, kind, own, h.o.Server.Options.Capabilities.TopicAliasMaximum); !known && kind == topics.Outside {
			return pk, nil
		}
	} else if kind == topics.Outside {
		return pk, nil
	}
	qos := pk.FixedHeader.Qos
	switch {
	case qos > 0 && pk.PacketID == 0:
		return pk, nil // mochi ends the connection for it, and does nothing else
	case !own:
		return h.forbidden(cl, &pk)
	case qos == 2:
		h.o.Counters.add(PublishQoS2)
		s.bye(packets.ErrQosNotSupported)
		return pk, packets.ErrRejectPacket
	}
	_ = s.link.Receive(pk.Payload, classOf(qos), s, uint64(pk.PacketID))
	return taken, nil
}

// alias follows the topic aliases of an MQTT 5 client (3.3.2.3.4) that stand for
// topics under the root; mochi never learns those. own says whether the packet
// is for the session's own topic, known whether it is for one under the root.
// Only devices and guests may alias such topics.
func (s *session) alias(pk *packets.Packet, kind topics.Kind, own bool, limit uint16) (isOwn, known bool) {
	a := pk.Properties.TopicAlias
	if s == nil || s.link == nil || a == 0 || a > limit {
		return own, kind != topics.Outside
	}
	switch {
	case pk.TopicName == "":
		isOwn, known = s.aliases[a]
		return isOwn, known
	case kind == topics.Outside:
		delete(s.aliases, a)
		return false, false
	}
	if s.aliases == nil {
		s.aliases = make(map[uint16]bool)
	}
	s.aliases[a] = own
	return own, true
}

// forbidden answers a PUBLISH under the root by somebody who may not.
func (h *Hook) forbidden(cl *mqtt.Client, pk *packets.Packet) (packets.Packet, error) {
	h.o.Counters.add(PublishRefused)
	h.denied(cl, "publish", pk.TopicName)
	v5 := cl.Properties.ProtocolVersion == 5
	switch {
	case pk.Properties.TopicAliasFlag:
		// The alias would mean something else to mochi.
		_ = h.o.Server.DisconnectClient(cl, packets.ErrNotAuthorized)
		return *pk, packets.ErrRejectPacket
	case pk.FixedHeader.Qos == 0:
		return taken, nil
	case !v5:
		return *pk, packets.ErrRejectPacket
	}
	ack := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Puback},
		PacketID:    pk.PacketID,
		ReasonCode:  packets.ErrNotAuthorized.Code,
		Properties:  packets.Properties{ReasonString: "topic not allowed"},
	}
	if pk.FixedHeader.Qos == 2 {
		ack.FixedHeader.Type = packets.Pubrec
	}
	if err := cl.WritePacket(ack); err != nil {
		return *pk, packets.ErrRejectPacket
	}
	return taken, nil
}

// classOf returns the class of frames that are published with a QoS. Errors of Receive
// are the bridge's to count and to answer.
func classOf(qos byte) route.Class {
	if qos > 0 {
		return route.Stored
	}
	return route.Transient
}

// acked handles a PUBACK.
func (s *session) acked(id uint16) {
	s.mu.Lock()
	seq, ok := s.window.ack(id)
	s.mu.Unlock()
	switch {
	case !ok:
		s.h.o.Counters.add(BadAck)
	case seq > 0:
		s.link.Delivered(seq)
	}
}

// tap takes the packets that need nothing of mochi: PUBLISH on the own topic
// with QoS 0 or 1 and without properties, and PUBACK. All others go the way
// through OnPacketRead. Both ways meet in the bridge.
func (s *session) tap(first byte, body []byte) (bool, error) {
	if first>>4 == packets.Puback {
		if first&0xf != 0 || len(body) < 2 || len(body) > 2 && !s.v5 {
			return false, nil
		}
		s.tapped(len(body), false)
		s.acked(binary.BigEndian.Uint16(body))
		return true, nil
	}
	qos, id, payload, ok := s.plain(first, body)
	if !ok {
		return false, nil
	}
	s.tapped(len(body), true)
	_ = s.link.ReceiveMore(payload, classOf(qos), s, uint64(id))
	return true, nil
}

// plain reads a PUBLISH on the own topic with QoS 0 or 1 and without properties; body
// may be cut in the payload.
func (s *session) plain(first byte, body []byte) (qos byte, id uint16, payload []byte, ok bool) {
	qos = first >> 1 & 3
	dup, retain := first&8 != 0, first&1 != 0
	if qos > 1 || retain || dup && qos == 0 || len(body) < 2 {
		return 0, 0, nil, false
	}
	n := int(binary.BigEndian.Uint16(body))
	rest := body[2:]
	if n != len(s.out) || len(rest) < n || string(rest[:n]) != s.out {
		return 0, 0, nil, false
	}
	rest = rest[n:]
	if qos == 1 {
		if len(rest) < 2 {
			return 0, 0, nil, false
		}
		if id = binary.BigEndian.Uint16(rest); id == 0 {
			return 0, 0, nil, false
		}
		rest = rest[2:]
	}
	if s.v5 {
		if len(rest) == 0 || rest[0] != 0 {
			return 0, 0, nil, false
		}
		rest = rest[1:]
	}
	return qos, id, rest, true
}

// long takes what is published on the own topic above the packet limit, up to the
// longest frame that any hub takes: as one above the frame limit it is acknowledged,
// counted and answered with a notice. A client of MQTT 5 has been told the limit, and
// has to be disconnected for it (3.2.2.3.6, 4.13.1).
func (s *session) long(first byte, length int, head []byte) func() bool {
	qos, id, _, ok := s.plain(first, head)
	if !ok || length > route.MaxFrame+PacketHeadroom {
		return nil
	}
	return func() bool {
		s.tapped(length, true)
		var ack bridge.Acker
		if qos == 1 && !s.v5 {
			ack = s
		}
		s.link.Oversized(length, ack, uint64(id))
		return !s.v5
	}
}

// tapped counts for mochi's statistics.
func (s *session) tapped(bytes int, message bool) {
	s.seen.packets++
	s.seen.bytes += int64(2 + bytes)
	if message {
		s.seen.messages++
	}
}

// flush ends what tap was given of one read: it adds that to mochi's statistics, and has
// the bridge queue what it has put off.
func (s *session) flush() {
	if s.seen.packets > 0 {
		info := s.h.o.Server.Info
		atomic.AddInt64(&info.PacketsReceived, s.seen.packets)
		atomic.AddInt64(&info.BytesReceived, s.seen.bytes)
		atomic.AddInt64(&info.MessagesReceived, s.seen.messages)
		s.seen.packets, s.seen.bytes, s.seen.messages = 0, 0, 0
	}
	s.link.Flush()
}

// OnPublish is the last fence: nothing under the root is fanned out, retained
// or stored, whoever brought it there.
func (h *Hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (out packets.Packet, err error) {
	defer func() {
		if h.failed("OnPublish", recover()) {
			out, err = pk, packets.CodeSuccessIgnore
		}
	}()
	if kind, _ := h.o.Root.Parse(pk.TopicName); kind == topics.Outside {
		return pk, nil
	}
	if cl.Net.Inline {
		h.o.Counters.add(PublishInline)
	} else {
		h.o.Counters.add(PublishLate)
	}
	return pk, packets.CodeSuccessIgnore
}
