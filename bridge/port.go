package bridge

import (
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

type portKind uint8

const (
	portDevice portKind = iota
	portStream
	portGuest
	portLocal // programs inside the hub
)

// errGone means that a port was removed while it was looked up.
var errGone = errors.New("bridge: port is gone")

// maxLinks bounds the addresses that a stream may reach by name. Past it an old
// one is forgotten.
const maxLinks = 4096

// Port is a peer's place in the router: hub address, outbox, what waits for it.
// A device's outlives its connections; that of a stream or guest does not.
type Port struct {
	b        *Bridge
	kind     portKind
	oneShot  bool
	guest    bool   // a stream that reaches only what guests and links reach
	addr     string // hub address; empty for a guest
	clientID string
	self     *worker
	stamp    route.Hops // addr
	stripe   *stripe
	meter    *meter   // nil: no limit
	counted  claimant // whose quota of ports it is in; Bridge.mu

	online atomic.Bool // attached, or taken over by a connection that will be

	mu        sync.Mutex // guards what follows
	principal Principal
	link      *Link // the current connection
	attached  bool
	gone      bool
	hasEpoch  bool
	epoch     [hubproto.EpochLen]byte // of the process that said hello last
	restored  bool                    // whether it has said hello was not kept

	box           Outbox // nil for a guest
	frames, bytes int    // in box
	cursor        uint64 // the next entry to offer
	offered       uint64 // the last entry offered to link
	everOffered   uint64 // the last entry offered to an earlier link
	lastFirst     uint64 // the last first contact in box, if it is still there
	lastTransient uint64 // the last transient entry, likewise
	acked         uint64 // the last entry released
	pumping       bool   // somebody is delivering
	blocked       bool   // link took less than it was offered
	readied       uint64 // counts Ready and Delivered, against lost wake-ups

	parked  []*waiting // in order; for an outbox that is full
	held    []*waiting // first contacts for a device that is not attached
	acks    []Ticket   // to fire in order
	bad     notes      // to be said before them
	acking  bool
	starved bool // in Bridge.starved

	parkedFrames          int
	madeRoom              int64 // when a parked packet was let in last, others staying
	heldFrames, heldBytes int

	hellos, registrations *rate.Limiter
	unsaid                []unsaid // notices, oldest first

	offlineSince int64
	cleanEnd     bool
	helloBy      int64 // when a subscribed link is attached without hello; 0: not yet

	linksMu  sync.Mutex // before the table's only
	links    map[string]struct{}
	lastLink string

	// Guarded by timers.mu, except that wake is read without it.
	timerIdx int
	wake     atomic.Int64
}

// waiting is a packet that was received and is neither stored nor acknowledged.
type waiting struct {
	ticket   Ticket
	packet   Packet
	frames   int
	bytes    int
	deadline int64 // 0: none
}

// Address returns the port's hub address. Who holds it may send to the peer.
func (p *Port) Address() string { return p.addr }

// ClientID returns the device's client id; empty for a stream.
func (p *Port) ClientID() string { return p.clientID }

// Principal returns who the port belongs to.
func (p *Port) Principal() Principal {
	if p.kind == portLocal {
		return Principal{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.principal
}

// Online reports whether the peer is attached.
func (p *Port) Online() bool { return p.online.Load() }

// Link is one live connection of a peer at its port.
type Link struct {
	port *Port
	conn Conn
	from uint64 // a hash of who is there, see sender; 0: inside the hub

	dead  atomic.Bool
	hello atomic.Bool // said hello on this connection

	waitPackets, waitBytes atomic.Int64 // unanswered
	owing                  atomic.Bool  // owed or paying

	saying sync.Mutex // one at a time writes notices; before all other locks

	mu       sync.Mutex // guards what follows
	waitAt   map[*Port]int
	notices  *rate.Limiter
	hellos   *rate.Limiter
	prepared bool
	attachOn bool // attach when prepared
	fresh    bool
	owed     []Ticket // acknowledgements that the peer's rate withholds, in order
	paying   bool     // the timer goroutine is giving some

	// Owned by the goroutine in Receive.
	packet  Packet
	views   []route.View
	run     run
	account account
}

// Port returns the connection's port.
func (l *Link) Port() *Port { return l.port }

// connect makes l the port's current connection and ends the one before.
func (p *Port) connect(l *Link, who Principal) error {
	l.port = p
	p.mu.Lock()
	switch {
	case p.gone:
		p.mu.Unlock()
		return errGone
	case p.principal.Proven && !who.Proven:
		p.mu.Unlock()
		return ErrNotProven
	}
	old := p.link
	if p.principal != who {
		p.principal = who
		p.journal(p.online.Load())
	}
	p.link = l
	p.detach()
	p.helloBy = 0
	p.mu.Unlock()
	if old != nil {
		p.b.kicked[KickTakenOver].Add(1)
		old.end()
		if old.hello.Load() {
			old.direct(&hubproto.Notice{Reason: hubproto.ReasonTakenOver, Count: 1})
		}
		old.conn.Kick(KickTakenOver)
	}
	return nil
}

// detach stops delivery to the current connection; p.mu is held.
func (p *Port) detach() {
	p.everOffered = max(p.everOffered, p.offered)
	p.blocked = false
	p.readied++
	if p.attached {
		p.attached = false
		p.offlineSince = p.b.now()
		p.b.attached.Add(-1)
	}
}

// Subscribed says that the peer listens to its inbox. Delivery begins when it
// says hello, or HelloWait from now.
func (l *Link) Subscribed() {
	l.mu.Lock()
	already, attach, fresh := l.prepared, l.attachOn, l.fresh
	l.prepared = true
	l.mu.Unlock()
	p := l.port
	switch {
	case p.kind != portDevice:
	case attach:
		l.attach(fresh)
	case !already:
		p.mu.Lock()
		if p.link == l && !p.attached {
			p.helloBy = p.b.now() + int64(p.b.cfg.HelloWait)
			p.wakeBy(p.helloBy)
		}
		p.mu.Unlock()
	}
}

// Attach begins delivery, from the first unacknowledged frame on. fresh
// discards what was queued for keys that are gone. A front need not call it for
// devices that say hello; it is there for peers that a front knows to be ready.
func (l *Link) Attach(fresh bool) {
	l.mu.Lock()
	ready := l.prepared
	l.attachOn, l.fresh = true, fresh
	l.mu.Unlock()
	if ready {
		l.attach(fresh)
	}
}

func (l *Link) attach(fresh bool) {
	p, b := l.port, l.port.b
	if p.kind != portDevice {
		return
	}
	p.mu.Lock()
	if p.link != l || p.gone || l.dead.Load() {
		p.mu.Unlock()
		return
	}
	var ns notes
	if fresh {
		ns = p.discard()
	}
	if !p.attached {
		p.attached = true
		p.helloBy = 0
		p.cleanEnd = false
		p.offered = 0
		p.cursor = 0
		b.attached.Add(1)
		if !p.online.Swap(true) {
			p.setStatus(true)
			p.journal(true)
		}
		p.admitHeld()
	}
	p.unpark()
	p.unlockAndAck()
	b.send(ns)
	b.registry.seen(p)
	p.pump()
	b.relieve()
}

// setStatus writes the device's status record; p.mu is held.
func (p *Port) setStatus(online bool) {
	r := hubproto.StatusRecord{Device: p.clientID, Online: online, Since: p.b.clock.wall()}
	p.b.records.set(RecordStatus, p.clientID, r.JSON())
}

// discard drops what is queued or waiting for keys that are gone: everything but
// first contacts, which name none. Its senders are to be told, since most of it is
// acknowledged. p.mu is held.
func (p *Port) discard() (ns notes) {
	reason, _ := DropFresh.reason()
	p.dropAll(DropFresh, func(it *Item) bool {
		if !it.First {
			ns.add(p.b.noteFor(it.Frame, it.Hop, p.addr, reason))
		}
		return !it.First
	})
	keep := p.parked[:0]
	for _, w := range p.parked {
		if w.packet.First {
			keep = append(keep, w)
			continue
		}
		ns.add(p.b.noteForPacket(&w.packet, p.addr, reason))
		p.settle(w, DropFresh)
		p.parkedFrames -= w.frames
	}
	clear(p.parked[len(keep):])
	p.parked = keep
	return ns
}

// dropAll removes the queued entries that f picks; p.mu is held.
func (p *Port) dropAll(why Drop, f func(*Item) bool) {
	p.box.Scan(func(it *Item) bool {
		if f(it) {
			p.dropEntry(it.Seq, why)
		}
		return true
	})
}

// dropEntry removes one queued entry and counts it; p.mu is held.
func (p *Port) dropEntry(seq uint64, why Drop) bool {
	size, ok := p.box.Drop(seq)
	if ok {
		p.taken(1, size)
		p.stripe.drop(why, 1)
	}
	return ok
}

// taken takes frames off the port's and the hub's totals; p.mu is held.
func (p *Port) taken(frames, bytes int) {
	p.frames -= frames
	p.bytes -= bytes
	p.b.queued.add(-frames, -bytes)
}

// Delivered says that the peer acknowledged every entry up to seq, and that the
// connection may have room again. A sequence that was never offered counts as an
// acknowledgement of the last one that was.
func (l *Link) Delivered(seq uint64) {
	p := l.port
	if p.box == nil {
		return
	}
	p.mu.Lock()
	if p.link != l || !p.attached {
		p.mu.Unlock()
		return
	}
	if seq > p.offered {
		p.stripe.badAcks.Add(1)
		seq = p.offered
	}
	if frames, bytes := p.box.Release(seq); frames > 0 {
		p.taken(frames, bytes)
		p.stripe.delivered.Add(uint64(frames))
	}
	p.cursor = max(p.cursor, seq+1)
	p.acked = max(p.acked, seq)
	p.blocked = false
	p.readied++
	p.unpark()
	p.unlockAndAck()
	p.pump()
	p.b.relieve()
}

// Undeliverable says that this peer can never take an entry that Deliver took:
// it is longer than what the peer accepts. It is dropped, counted and noticed.
func (l *Link) Undeliverable(seq uint64) {
	p := l.port
	if p.box == nil {
		return
	}
	var n notes
	p.mu.Lock()
	if p.link == l && seq <= p.offered {
		p.box.Scan(func(it *Item) bool {
			if it.Seq == seq {
				n.add(p.b.noteFor(it.Frame, it.Hop, p.addr, hubproto.ReasonTooLarge))
				p.dropEntry(seq, DropTooLarge)
			}
			return it.Seq < seq
		})
	}
	p.unpark()
	p.unlockAndAck()
	p.b.send(n)
	p.pump()
	p.b.relieve()
}

// Ready says that the connection has room again.
func (l *Link) Ready() {
	p := l.port
	if p.box == nil {
		return
	}
	p.mu.Lock()
	if p.link != l {
		p.mu.Unlock()
		return
	}
	p.blocked = false
	p.readied++
	p.mu.Unlock()
	p.pump()
}

// Close says that the connection is gone. clean means that the peer said so
// itself. What the connection sent and was not answered is forgotten: the peer
// still has it. Later calls of the Link's methods do nothing.
func (l *Link) Close(clean bool) {
	p, b := l.port, l.port.b
	l.end()
	p.mu.Lock()
	if p.link != l {
		p.mu.Unlock()
		return
	}
	p.link = nil
	p.detach()
	p.helloBy = 0
	p.cleanEnd = clean
	for i := range p.unsaid {
		p.keep(&p.unsaid[i])
	}
	if p.kind != portDevice {
		p.gone = true
		p.online.Store(false)
		notes := p.empty(DropGone)
		p.unlockAndAck()
		b.forget(p)
		b.send(notes)
		b.relieve()
		return
	}
	// What has its own recovery does not wait for a device that is away.
	if p.lastTransient > p.acked {
		p.dropAll(DropOffline, func(it *Item) bool { return it.Class == route.Transient })
		p.lastTransient = 0
	}
	if p.online.Swap(false) {
		p.setStatus(false)
		p.journal(false)
	}
	p.wakeBy(p.nextWake())
	p.unpark()
	p.unlockAndAck()
	b.registry.seen(p)
	b.relieve()
}

// empty drops everything queued and waiting at a port that is gone. p.mu is held.
func (p *Port) empty(why Drop) (ns notes) {
	reason, tell := why.reason()
	if p.box != nil {
		p.box.Scan(func(it *Item) bool {
			if tell {
				ns.add(p.b.noteFor(it.Frame, it.Hop, p.addr, reason))
			}
			return tell
		})
		p.stripe.drop(why, p.frames)
		p.taken(p.frames, p.bytes)
		p.box.Discard()
	}
	for _, list := range [][]*waiting{p.parked, p.held} {
		for _, w := range list {
			if tell {
				ns.add(p.b.noteForPacket(&w.packet, p.addr, reason))
			}
			p.settle(w, why)
		}
	}
	p.parked, p.held = nil, nil
	p.parkedFrames, p.heldFrames, p.heldBytes = 0, 0, 0
	return ns
}

// end marks the connection as dead and withdraws what it has waiting.
func (l *Link) end() {
	if l.dead.Swap(true) {
		return
	}
	l.mu.Lock()
	at := l.waitAt
	l.waitAt, l.owed = nil, nil
	l.mu.Unlock()
	for p := range at {
		p.mu.Lock()
		p.parked = p.withdraw(p.parked, l, func(w *waiting) { p.parkedFrames -= w.frames })
		p.held = p.withdraw(p.held, l, func(w *waiting) { p.heldFrames -= w.frames; p.heldBytes -= w.bytes })
		p.unpark() // others may have waited behind
		p.unlockAndAck()
		p.pump()
	}
}

// withdraw takes the packets of a dead connection off a list; p.mu is held.
func (p *Port) withdraw(list []*waiting, l *Link, out func(*waiting)) []*waiting {
	keep := list[:0]
	for _, w := range list {
		if w.ticket.link != l {
			keep = append(keep, w)
			continue
		}
		out(w)
		p.b.waiting.add(-w.frames, -w.bytes)
		p.stripe.drop(DropAbandoned, w.frames)
		l.answered(w.ticket.bytes)
	}
	clear(list[len(keep):])
	return keep
}

// answered takes one packet off the connection's window.
func (l *Link) answered(bytes int) {
	l.waitPackets.Add(-1)
	l.waitBytes.Add(int64(-bytes))
}

// allow lets a stream reach an address by name (spec routing 7.4).
func (p *Port) allow(addr string) {
	p.linksMu.Lock()
	defer p.linksMu.Unlock()
	if p.lastLink == addr || addr == "" {
		return
	}
	if _, ok := p.links[addr]; !ok {
		if p.links == nil {
			p.links = make(map[string]struct{})
		}
		if len(p.links) >= maxLinks {
			p.unlinkOne()
		}
		p.links[addr] = struct{}{}
	}
	p.lastLink = addr
}

// unlinkOne makes room for a link: those to addresses that are gone go first, as
// far as a few samples find any. p.linksMu is held.
func (p *Port) unlinkOne() {
	const samples = 32
	var one string
	n := 0
	for one = range p.links {
		if p.b.table.lookup(one) == nil {
			break
		}
		if n++; n == samples {
			break
		}
	}
	delete(p.links, one)
}

// allowed reports whether a stream may reach an address by name.
func (p *Port) allowed(addr []byte) bool {
	p.linksMu.Lock()
	defer p.linksMu.Unlock()
	_, ok := p.links[string(addr)]
	return ok
}
