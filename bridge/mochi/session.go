package mochibridge

import (
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/route"
)

// session is one connection of a principal. For devices and guests it is the
// bridge's Conn.
type session struct {
	h    *Hook
	cl   *mqtt.Client
	conn *guard.Conn
	who  bridge.Principal
	v5   bool
	out  string // the topic it publishes frames on
	in   string // its inbox

	link      *bridge.Link // nil for observers and users
	maxPacket int          // MQTT 5 Maximum Packet Size
	maxWindow int          // packets that may be unacknowledged

	kicked atomic.Bool
	clean  atomic.Bool // said DISCONNECT
	since  time.Time   // established; the reader goroutine's

	mu     sync.Mutex // guards window
	window window

	// Owned by the reader goroutine.
	marks   []mark                                   // what OnSubscribe found, for OnSubscribed
	granted bool                                     // the inbox was granted in this SUBSCRIBE
	aliases map[uint16]bool                          // MQTT 5 aliases of the own topic (true) or of another under the root
	seen    struct{ packets, bytes, messages int64 } // since the last flush

	fresh []string // an observer's filters in this SUBSCRIBE

	before *session // whose kept session an observer takes over; the reader goroutine's

	// An observer's, guarded by h.watchMu.
	after   *session          // who has taken it over
	filters []string          // under the root
	replay  []string          // filters whose records a replay that has not begun will send
	backlog map[string][]byte // records that wait for room, by topic
}

var (
	_ bridge.AddressConn = (*session)(nil)
	_ bridge.BatchAcker  = (*session)(nil)
)

// RemoteAddr implements bridge.AddressConn.
func (s *session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// secured is a session over TLS.
type secured struct {
	*session
	value []byte
}

var _ bridge.ExporterConn = (*secured)(nil)

// ExporterValue implements bridge.ExporterConn.
func (s *secured) ExporterValue() []byte { return s.value }

func newSession(h *Hook, cl *mqtt.Client, conn *guard.Conn, who bridge.Principal) *session {
	s := &session{
		h: h, cl: cl, conn: conn, who: who,
		v5:  cl.Properties.ProtocolVersion == 5,
		out: h.o.Root.Out(who.ClientID), in: h.o.Root.In(who.ClientID),
		maxWindow: maxWindow,
	}
	if s.v5 {
		s.maxPacket = int(min(cl.Properties.Props.MaximumPacketSize, math.MaxInt32))
	}
	conn.OnDrained(s.drained)
	return s
}

// connect takes the device's or guest's place in the bridge.
func (s *session) connect() error {
	props := &s.cl.Properties.Props
	if s.v5 {
		if rm := int(props.ReceiveMaximum); rm > 0 {
			s.maxWindow = min(s.maxWindow, rm)
		}
	}
	// mochi sends a device nothing that needs an identifier, a quota or an
	// alias.
	props.ReceiveMaximum = 0
	props.TopicAliasMaximum = 0
	s.cl.State.Inflight.ResetSendQuota(0)
	// Nor does it keep a session: the outbox is the bridge's, and sessions of any
	// number of client ids would outlive their connections.
	s.cl.Properties.Clean = true
	props.SessionExpiryInterval, props.SessionExpiryIntervalFlag = 0, false
	s.conn.SetExempt(true)

	var c bridge.Conn = s
	if v := exporter(s.conn.TLS()); v != nil {
		c = &secured{s, v}
	}
	link, err := s.h.o.Bridge.ConnectDevice(s.who, c)
	if err != nil {
		return err
	}
	s.link = link
	s.h.mu.Lock()
	s.h.live[s.who.ClientID] = s
	s.h.mu.Unlock()
	return nil
}

// end runs when mochi is done with the connection.
func (s *session) end() {
	if s.link != nil {
		s.link.Close(s.clean.Load())
		s.h.mu.Lock()
		if s.h.live[s.who.ClientID] == s {
			delete(s.h.live, s.who.ClientID)
		}
		s.h.mu.Unlock()
	}
	if s.who.Role == bridge.RoleObserver {
		s.h.unwatch(s)
	}
}

// Kick implements bridge.Conn: the connection is closed, what is buffered for it
// has the listener's Linger to leave.
func (s *session) Kick(reason bridge.KickReason) {
	if s.kicked.Swap(true) {
		return
	}
	code := packets.ErrServerShuttingDown
	switch reason {
	case bridge.KickTakenOver:
		code = packets.ErrSessionTakenOver
	case bridge.KickWindow:
		code = packets.ErrReceiveMaximum
	}
	s.bye(code)
}

// bye ends the connection, with a DISCONNECT where the protocol has one that a
// server sends.
func (s *session) bye(code packets.Code) {
	if s.v5 {
		w := s.conn.Begin()
		_ = w.Raw([]byte{packets.Disconnect << 4, 1, code.Code})
		w.End()
	}
	s.cl.Stop(code)
}

// Direct implements bridge.Conn.
func (s *session) Direct(frame []byte) bool {
	p := guard.Publish{Topic: s.in, V5: s.v5}
	size := p.Size(len(frame))
	if s.maxPacket > 0 && size > s.maxPacket {
		s.h.o.Counters.add(TooLargeForPeer)
		return false
	}
	w := s.conn.Begin()
	defer w.End()
	if n, limit := w.Buffered(); n+size > limit {
		return false
	}
	if w.Publish(&p, frame) != nil {
		return false
	}
	s.sent(1, size)
	return true
}

// sent keeps mochi's statistics, which do not see what is written past it.
func (s *session) sent(packets, bytes int) {
	info := s.h.o.Server.Info
	atomic.AddInt64(&info.PacketsSent, int64(packets))
	atomic.AddInt64(&info.MessagesSent, int64(packets))
	atomic.AddInt64(&info.BytesSent, int64(bytes))
}

// scratch holds the parts of a packet while it is written.
type scratch struct{ parts [route.MaxBundleFrames][]byte }

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// Deliver implements bridge.Conn. Entries that lie in a row, have one class and
// one first hop go into one packet, a bundle.
func (s *session) Deliver(entries []bridge.Entry) int {
	var tooLarge []uint64
	taken, used := 0, 0
	parts := scratches.Get().(*scratch)
	s.mu.Lock()
	w := s.conn.Begin()
	for taken < len(entries) {
		n, size, dup := bundle(entries[taken:])
		p := guard.Publish{Topic: s.in, V5: s.v5, Dup: dup}
		stored := entries[taken].Class == route.Stored
		if stored {
			p.QoS = 1
		}
		if s.maxPacket > 0 && p.Size(size) > s.maxPacket {
			if n, size = 1, len(entries[taken].Frame); p.Size(size) > s.maxPacket {
				tooLarge = append(tooLarge, entries[taken].Seq)
				taken++
				continue
			}
			dup = entries[taken].Redelivered
		}
		p.Dup = dup && stored
		whole := p.Size(size)
		buffered, limit := w.Buffered()
		if buffered > 0 && buffered+whole > limit/2 {
			w.NotifyDrained(min(limit/8, limit/2-whole))
			break
		}
		if stored && !s.window.admits(whole, s.maxWindow, limit/2) {
			break
		}
		for i := range n {
			parts.parts[i] = entries[taken+i].Frame
		}
		used = max(used, n)
		if stored {
			p.PacketID = s.window.push(entries[taken+n-1].Seq, whole)
		}
		if w.Publish(&p, parts.parts[:n]...) != nil {
			break // the connection is closed
		}
		s.sent(1, whole)
		taken += n
	}
	w.End()
	s.mu.Unlock()
	clear(parts.parts[:used])
	scratches.Put(parts)
	for _, seq := range tooLarge {
		s.h.o.Counters.add(TooLargeForPeer)
		s.link.Undeliverable(seq)
	}
	return taken
}

// bundle returns how many of the entries go into the next packet, their bytes,
// and whether one of them was sent before.
func bundle(entries []bridge.Entry) (n, size int, dup bool) {
	first := &entries[0]
	size, dup = len(first.Frame), first.Redelivered
	hop := firstHop(first.Frame)
	if hop == nil {
		return 1, size, dup
	}
	for n = 1; n < len(entries) && n < route.MaxBundleFrames; n++ {
		e := &entries[n]
		if e.Class != first.Class || size+len(e.Frame) > route.MaxBundleBytes || string(firstHop(e.Frame)) != string(hop) {
			break
		}
		size += len(e.Frame)
		dup = dup || e.Redelivered
	}
	return n, size, dup
}

// firstHop returns the encoded first onward hop of a canonical frame (spec
// routing 3.3), nil where there is none or the heads are not the short ones that
// all but the longest routes have: such a frame travels alone.
func firstHop(frame []byte) []byte {
	const (
		array4 = 0x84
		array  = 0x80
		pair   = 0x82
		bytes  = 0x40
	)
	if len(frame) < 6 || frame[0] != array4 || frame[1] <= array || frame[1] > array+23 || frame[2] != pair || frame[3] > 23 {
		return nil
	}
	b := frame[2:]
	var n int
	switch h := b[2]; {
	case h >= bytes && h <= bytes+23:
		n = 3 + int(h-bytes)
	case h == bytes+24:
		n = 4 + int(b[3])
	default:
		return nil
	}
	if n > len(b) {
		return nil
	}
	return b[:n]
}

// Acked implements bridge.Acker: the publisher gets its PUBACK.
func (s *session) Acked(token uint64) {
	w := s.conn.Begin()
	_ = w.Puback(uint16(token))
	w.End()
}

// AckedAll implements bridge.BatchAcker.
func (s *session) AckedAll(tokens []uint64) {
	w := s.conn.Begin()
	for _, token := range tokens {
		_ = w.Puback(uint16(token))
	}
	w.End()
}
