package bridge

import (
	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// maxNotes bounds the notices that one event makes.
const maxNotes = 128

// wide are limits that everything the hub itself has encoded satisfies.
var wide = route.Limits{Frame: route.MaxFrame, Hops: 4096, Address: 64 << 10}

// note is a notice to a peer, to be sent once no lock is held.
type note struct {
	to     *Port
	notice hubproto.Notice
}

// noteFor makes the notice about one frame as it was queued: routed, with its
// sender's hub address in front of the return route. hop is the first hop as the
// sender wrote it; empty: self. The note is empty when the sender is not a peer.
func (b *Bridge) noteFor(frame, hop []byte, self string, r hubproto.Reason) note {
	v, _, err := route.NextView(frame, wide)
	if err != nil || v.ReturnLen() == 0 {
		return note{}
	}
	var n note
	for h := range v.Return() {
		if w := b.table.get(h.Value); h.Transport == route.LocalTransport && w != nil {
			n.to = w.port
		}
		break
	}
	if n.to == nil {
		return note{}
	}
	n.notice = hubproto.Notice{Reason: r, Count: 1, HasFirst: true, FirstHop: route.Local(self)}
	if len(hop) > 0 {
		n.notice.FirstHop = route.Local(string(hop))
	}
	if v.ReturnLen() > 1 {
		h, _ := v.LastReturn()
		n.notice.LastReturn, n.notice.HasReturn = h.Address(), true
	}
	return n
}

// noteForPacket is noteFor the frames of a waiting packet.
func (b *Bridge) noteForPacket(pk *Packet, self string, r hubproto.Reason) note {
	n := b.noteFor(pk.frame(0), pk.Hop, self, r)
	n.notice.Count = uint64(pk.Frames())
	return n
}

// send sends notices to the connections that their peers have now. The caller
// holds no lock.
func (b *Bridge) send(notes []note) {
	for i := range notes {
		p := notes[i].to
		if p == nil || p.kind == portLocal {
			continue
		}
		p.mu.Lock()
		l := p.link
		p.mu.Unlock()
		if l != nil {
			l.notifyWith(&notes[i].notice)
		}
	}
}

// notify tells the connection what became of count frames like v; nil when no
// frame could be read. The caller holds no lock.
func (l *Link) notify(r hubproto.Reason, v *route.View, count int) {
	if !l.hello.Load() {
		return
	}
	n := hubproto.Notice{Reason: r, Count: uint64(count)}
	if v != nil {
		if v.OnwardLen() > 0 {
			n.FirstHop, n.HasFirst = v.FirstHop().Address(), true
		}
		if h, ok := v.LastReturn(); ok {
			n.LastReturn, n.HasReturn = h.Address(), true
		}
	}
	l.notifyWith(&n)
}

func (l *Link) notifyWith(n *hubproto.Notice) {
	if l.conn == nil {
		return
	}
	if !l.hello.Load() || l.dead.Load() || !l.mayNotify() {
		l.port.stripe.noticesHeld.Add(1)
		return
	}
	l.direct(n)
}

// mayNotify spends one token of the connection's notice budget.
func (l *Link) mayNotify() bool {
	cfg := &l.port.b.cfg
	l.mu.Lock()
	if l.notices == nil {
		l.notices = rate.NewLimiter(rate.Limit(cfg.NoticeRate), cfg.NoticeBurst)
	}
	lim := l.notices
	l.mu.Unlock()
	return lim.Allow()
}

// direct writes a notice past the outbox.
func (l *Link) direct(n *hubproto.Notice) {
	// Hops of 64 KiB are legal, notices of more than 4 KiB are not.
	if len(n.FirstHop.Value) > maxHopValue {
		n.FirstHop, n.HasFirst = route.Address{}, false
	}
	if len(n.LastReturn.Value) > maxHopValue {
		n.LastReturn, n.HasReturn = route.Address{}, false
	}
	frame, err := hubproto.NoticeFrame(n)
	if err == nil && l.conn.Direct(frame) {
		l.port.stripe.notices.Add(1)
		return
	}
	l.port.stripe.noticesHeld.Add(1)
}
