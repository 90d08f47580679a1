package bridge

import (
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

const (
	// maxNotes bounds the notices that one event makes.
	maxNotes = 128
	// maxUnsaid bounds the notices that a peer is still to be told.
	maxUnsaid = 32
	// sayTries is how often a connection may refuse a notice.
	sayTries = 10
)

// wide are limits that everything the hub itself has encoded satisfies.
var wide = route.Limits{Frame: route.MaxFrame, Hops: 4096, Address: 64 << 10}

// note is a notice to a peer, to be sent once no lock is held.
type note struct {
	to     *Port
	notice hubproto.Notice
}

// notes are the notices that one event makes: one for all frames that differ in
// nothing which a notice says.
type notes struct {
	list []note
	at   map[note]int // without counts
}

func (ns *notes) add(n note) {
	if n.to == nil {
		return
	}
	key := n
	key.notice.Count = 0
	if i, ok := ns.at[key]; ok {
		ns.list[i].notice.Count += n.notice.Count
		return
	}
	if len(ns.list) == maxNotes {
		n.to.stripe.noticesHeld.Add(1)
		return
	}
	if ns.at == nil {
		ns.at = make(map[note]int)
	}
	ns.at[key] = len(ns.list)
	ns.list = append(ns.list, n)
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

// send tells the peers. The caller holds no lock.
func (b *Bridge) send(ns notes) {
	for i := range ns.list {
		if p := ns.list[i].to; p.kind != portLocal {
			p.tell(&ns.list[i].notice)
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
	l.port.tell(&n)
}

// TakesNotices says that the peer of a stream takes notices although it says no hello to
// the hub on this connection. It may be called often.
func (l *Link) TakesNotices() {
	if !l.hello.Swap(true) {
		l.say()
	}
}

// Refuse tells the peer that a frame of its, which the front has not handed on, is refused.
func (l *Link) Refuse(f *route.Frame) {
	n := hubproto.Notice{Reason: hubproto.ReasonRefused, Count: 1}
	n.FirstHop, n.HasFirst = f.Onward.First()
	n.LastReturn, n.HasReturn = f.Return.Last()
	l.port.tell(&n)
}

// tell tells the peer, now if the rate of its connection allows it, or once that does,
// or when it is back and says hello. What waits for that is merged with what says the
// same. The caller holds no lock.
func (p *Port) tell(n *hubproto.Notice) {
	// Hops of 64 KiB are legal, notices of more than 4 KiB are not.
	if len(n.FirstHop.Value) > maxHopValue {
		n.FirstHop, n.HasFirst = route.Address{}, false
	}
	if len(n.LastReturn.Value) > maxHopValue {
		n.LastReturn, n.HasReturn = route.Address{}, false
	}
	p.mu.Lock()
	switch l := p.link; {
	case l != nil && l.conn == nil: // inside the hub
	case p.gone, l == nil && !p.hasEpoch && !p.restored, l != nil && !l.hello.Load(), !p.unsay(n):
		p.stripe.noticesHeld.Add(1)
	}
	l := p.link
	p.mu.Unlock()
	if l != nil {
		l.say()
	}
}

// unsay adds a notice to those that the peer is still to be told, and reports whether
// there was room. p.mu is held.
func (p *Port) unsay(n *hubproto.Notice) bool {
	for i := range p.unsaid {
		if same(&p.unsaid[i].notice, n) {
			p.unsaid[i].notice.Count += n.Count
			if p.link == nil {
				p.keep(&p.unsaid[i])
			}
			return true
		}
	}
	if len(p.unsaid) == maxUnsaid {
		return false
	}
	p.unsaid = append(p.unsaid, unsaid{notice: *n})
	if p.link == nil {
		p.keep(&p.unsaid[len(p.unsaid)-1])
	}
	return true
}

// unsaid is a notice that a peer is still to be told.
type unsaid struct {
	notice hubproto.Notice
	tries  int  // refused by the connection
	kept   bool // by the journal
}

// say tells the peer what it is still to be told, as far as the rate allows. When it
// returns, all of that is written, by whomever: what is acknowledged next comes after.
// The caller holds no lock.
func (l *Link) say() {
	p := l.port
	l.saying.Lock()
	defer l.saying.Unlock()
	for {
		p.mu.Lock()
		if len(p.unsaid) == 0 || p.link != l || l.dead.Load() || !l.hello.Load() {
			p.mu.Unlock()
			return
		}
		if !l.mayNotify() {
			p.wakeBy(p.sayAt())
			p.mu.Unlock()
			return
		}
		u := p.unsaid[0]
		if p.unsaid = p.unsaid[1:]; len(p.unsaid) == 0 {
			p.unsaid = nil
		}
		p.mu.Unlock()
		said := l.direct(&u.notice)
		if said && !u.kept {
			continue
		}
		p.mu.Lock()
		if said {
			p.said(&u)
			p.mu.Unlock()
			continue
		}
		if u.tries++; u.tries < sayTries && len(p.unsaid) < maxUnsaid {
			p.unsaid = append(p.unsaid, u)
			if p.link == nil {
				p.keep(&p.unsaid[len(p.unsaid)-1])
			}
		} else {
			p.unkeep(&u)
			p.stripe.noticesHeld.Add(1)
		}
		p.wakeBy(p.sayAt())
		p.mu.Unlock()
		return
	}
}

// said has the journal forget a notice that the peer has been told, unless it is to be
// told the same again: then that takes its place. p.mu is held.
func (p *Port) said(u *unsaid) {
	for i := range p.unsaid {
		if same(&p.unsaid[i].notice, &u.notice) {
			p.keep(&p.unsaid[i])
			return
		}
	}
	p.unkeep(u)
}

// same reports whether notices differ in Count at most.
func same(a, b *hubproto.Notice) bool {
	x := *a
	x.Count = b.Count
	return x == *b
}

// sayAt is when the rate will allow another notice; 0: there is none to be sent. p.mu
// is held.
func (p *Port) sayAt() int64 {
	if len(p.unsaid) == 0 || p.link == nil || !p.link.hello.Load() {
		return 0
	}
	return p.b.now() + int64(float64(time.Second)/p.b.cfg.NoticeRate)
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
	return lim.AllowN(time.Unix(0, l.port.b.now()), 1)
}

// direct writes a notice past the outbox and reports whether it did.
func (l *Link) direct(n *hubproto.Notice) bool {
	frame, err := hubproto.NoticeFrame(n)
	ok := err == nil && l.conn.Direct(frame)
	if ok {
		l.port.stripe.notices.Add(1)
	}
	return ok
}
