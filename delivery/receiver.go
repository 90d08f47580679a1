package delivery

import (
	"maps"
	"slices"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// How long an outbox is remembered when its place is wanted for another one:
// settled, and not settled. An unsettled one may come back with a message whose
// acknowledgement was lost, and that must be recognised.
const (
	settledMemory   = 10 * time.Minute
	unsettledMemory = 24 * time.Hour
)

// ReceiverConfig sets up a Receiver. Hand is required.
type ReceiverConfig struct {
	// Hand gives a message to the program; RefusalNone means that it was taken. It
	// must not block nor call the Receiver.
	Hand func(Item) Refusal
	// Messages and Bytes are the window of each outbox. Defaults 512 and 2 MiB;
	// Messages at most MaxWindow.
	Messages, Bytes int
	// PeerBytes and TotalBytes bound what all outboxes of a peer, and all outboxes,
	// have received and not acknowledged, each message counting 256 bytes more than
	// its payload. Defaults 16 MiB and 64 MiB. A peer has a quarter, at most, of what
	// the others leave of TotalBytes; what has come early gives way to what is due.
	PeerBytes, TotalBytes int
	// PeerOutboxes and TotalOutboxes bound the outboxes remembered. Defaults 4,096
	// and 65,536.
	PeerOutboxes, TotalOutboxes int
}

// perMessage is what a message counts beside its payload.
const perMessage = 256

// Item is a message for the program. It owns its memory.
type Item struct {
	Peer        identity.Identifier
	Outbox      OutboxID
	Count       uint64
	Redelivered bool
	To          string
	Payload     []byte
	// Via is what the caller passed with the data.
	Via any
}

// Counters of a Receiver.
type Counters struct {
	Handed     uint64 // messages given to the program
	Repeated   uint64 // data that had been received before
	Early      uint64 // data held, or dropped, because an earlier one was missing
	Stale      uint64 // messages of an earlier session
	Refused    uint64 // data refused
	Outboxes   int    // remembered
	Unacked    int    // messages received and not acknowledged
	TotalBytes int    // received and not acknowledged
}

// Receiver is one process's end of all outboxes that reach it.
type Receiver struct {
	cfg   ReceiverConfig
	peers map[identity.Identifier]*peer
	due   map[uint64][]*inbox // by channel: whose State is to be sent
	count Counters
	use   use
	early row[*early] // all of it, oldest first
}

// peer is what one identity has here.
type peer struct {
	inboxes map[OutboxID]*inbox
	use     use
	early   row[*early] // oldest first
}

// use counts bytes of what is received and not acknowledged, and those of it that
// came early.
type use struct{ bytes, early int }

// due is what is not early, and so gives way to nothing.
func (u use) due() int { return u.bytes - u.early }

// inbox is the receiving end of one outbox.
type inbox struct {
	peer    *peer
	who     identity.Identifier
	id      OutboxID
	session uint64
	channel uint64 // of the session
	serial  uint64 // highest seen in the session
	base    uint64 // lowest count not acknowledged
	known   uint64 // base as the sender knows it
	next    uint64 // lowest count not handed on
	acked   map[uint64]bool
	sizes   map[uint64]int    // of what is received and not acknowledged
	held    map[uint64]*early // received ahead of next
	bytes   int               // sum of sizes
	refusal Refusal
	used    time.Time
	dueOn   uint64 // channel in whose list of Receiver.due it stands; 0: in none
	spare   bool   // not remembered: only there for an answer
}

// early is data that waits for those before it.
type early struct {
	in   *inbox
	data *Data
	via  any
	all  place[*early] // in Receiver.early
	own  place[*early] // in peer.early
}

// NewReceiver returns a receiver that knows of no outbox.
func NewReceiver(cfg ReceiverConfig) *Receiver {
	for _, d := range []struct {
		field    *int
		standard int
	}{
		{&cfg.Messages, 512}, {&cfg.Bytes, 2 << 20},
		{&cfg.PeerBytes, 16 << 20}, {&cfg.TotalBytes, 64 << 20},
		{&cfg.PeerOutboxes, 4096}, {&cfg.TotalOutboxes, 64 << 10},
	} {
		if *d.field <= 0 {
			*d.field = d.standard
		}
	}
	cfg.Messages = min(cfg.Messages, MaxWindow)
	return &Receiver{cfg: cfg, peers: make(map[identity.Identifier]*peer), due: make(map[uint64][]*inbox)}
}

// Counters returns the receiver's counters.
func (r *Receiver) Counters() Counters {
	c := r.count
	c.TotalBytes = r.use.bytes
	return c
}

// find returns the inbox of an outbox, brought to the message's session; nil when
// the message is of an earlier one.
func (r *Receiver) find(who identity.Identifier, channel uint64, h *Header, now time.Time) *inbox {
	p := r.peers[who]
	if p == nil {
		p = &peer{inboxes: make(map[OutboxID]*inbox)}
	}
	in := p.inboxes[h.Outbox]
	if in == nil {
		in = &inbox{
			peer: p, who: who, id: h.Outbox, base: h.Base, known: h.Base, next: h.Base,
			acked: make(map[uint64]bool), sizes: make(map[uint64]int), held: make(map[uint64]*early),
		}
		if r.place(p, now) {
			r.peers[who] = p
			p.inboxes[h.Outbox] = in
			r.count.Outboxes++
		} else {
			in.spare, in.refusal = true, RefusalFull
		}
	}
	if h.Session < in.session {
		r.count.Stale++
		r.answer(in, channel)
		return nil
	}
	if h.Session > in.session {
		r.undue(in)
		in.session, in.serial = h.Session, 0
	}
	in.channel = channel
	in.serial = max(in.serial, h.Serial)
	in.used = now
	if !in.spare {
		r.forget(in, h.Base)
	}
	return in
}

// place reports whether another inbox may be remembered, and forgets one for it.
func (r *Receiver) place(p *peer, now time.Time) bool {
	if len(p.inboxes) < r.cfg.PeerOutboxes && r.count.Outboxes < r.cfg.TotalOutboxes {
		return true
	}
	if r.evict(p, now) {
		return true
	}
	if len(p.inboxes) >= r.cfg.PeerOutboxes {
		return false
	}
	for who, other := range r.peers {
		if r.evict(other, now) {
			if len(other.inboxes) == 0 && other != p {
				delete(r.peers, who)
			}
			return true
		}
	}
	return false
}

// evict forgets the inbox of the peer that has been idle longest, if it may be
// forgotten.
func (r *Receiver) evict(p *peer, now time.Time) bool {
	var oldest *inbox
	for _, in := range p.inboxes {
		memory := unsettledMemory
		if in.known == in.next {
			memory = settledMemory
		}
		// What is held was never handed on, so it may be forgotten too.
		if in.base == in.next && now.Sub(in.used) >= memory &&
			(oldest == nil || in.used.Before(oldest.used)) {
			oldest = in
		}
	}
	if oldest == nil {
		return false
	}
	r.undue(oldest)
	r.dropEarly(oldest)
	delete(p.inboxes, oldest.id)
	r.count.Outboxes--
	return true
}

// forget drops what the sender no longer asks about.
func (r *Receiver) forget(in *inbox, base uint64) {
	in.known = max(in.known, base)
	if base <= in.base {
		return
	}
	for c, e := range in.held {
		if c < base {
			r.drop(e)
		}
	}
	for c := range in.sizes {
		if c < base {
			r.release(in, c)
		}
	}
	for c := range in.acked {
		if c < base {
			delete(in.acked, c)
		}
	}
	in.base = base
	in.next = max(in.next, base)
	r.advance(in)
	r.drain(in)
}

// advance moves base over what is acknowledged.
func (r *Receiver) advance(in *inbox) {
	for in.acked[in.base] {
		delete(in.acked, in.base)
		in.base++
	}
	in.next = max(in.next, in.base)
}

// take accounts for the bytes of a message.
func (r *Receiver) take(in *inbox, count uint64, n int) {
	if n == 0 || in.sizes[count] != 0 {
		return
	}
	in.sizes[count] = n
	in.bytes += n
	in.peer.use.bytes += n
	r.use.bytes += n
	r.count.Unacked++
}

func (r *Receiver) release(in *inbox, count uint64) {
	n := in.sizes[count]
	if n == 0 {
		return
	}
	delete(in.sizes, count)
	in.bytes -= n
	in.peer.use.bytes -= n
	r.use.bytes -= n
	r.count.Unacked--
}

// Ask takes a question.
func (r *Receiver) Ask(who identity.Identifier, channel uint64, a *Ask, now time.Time) {
	if in := r.find(who, channel, &a.Header, now); in != nil {
		r.answer(in, channel)
	}
}

// Settle takes a sender's word that it knows of all acknowledgements.
func (r *Receiver) Settle(who identity.Identifier, channel uint64, s *Settle, now time.Time) {
	if p := r.peers[who]; p != nil && p.inboxes[s.Outbox] != nil {
		r.find(who, channel, &s.Header, now)
	}
}

// Data takes a message. via is handed on with it. The payload is the receiver's
// from now on.
func (r *Receiver) Data(who identity.Identifier, channel uint64, d *Data, via any, now time.Time) {
	in := r.find(who, channel, &d.Header, now)
	switch {
	case in == nil:
	case in.spare:
		r.count.Refused++
		r.answer(in, channel)
	case d.Count < in.base || in.acked[d.Count]:
		r.count.Repeated++ // our acknowledgement was lost
		r.answer(in, channel)
	case d.Count < in.next:
		r.count.Repeated++
		if d.Void {
			r.ack(in, d.Count)
		}
		r.answer(in, channel)
	case d.Count == in.next:
		if r.hand(in, d, via) {
			r.drain(in)
		} else {
			r.answer(in, channel)
		}
	default:
		r.count.Early++
		r.hold(in, d, via)
		r.answer(in, channel)
	}
}

// hold keeps data that came before its predecessors, where there is room: the
// sender learns of the gap and of what is held.
func (r *Receiver) hold(in *inbox, d *Data, via any) {
	if in.refusal != RefusalNone || d.Count-in.base >= uint64(r.cfg.Messages) {
		return
	}
	if _, ok := in.held[d.Count]; ok {
		return
	}
	n := weight(d)
	if !r.inWindow(in, d) || in.peer.use.bytes+n > r.share(in.peer.use.bytes, r.use.bytes) {
		// So that the sender pauses, instead of sending it again at once.
		r.count.Refused++
		in.refusal = RefusalFull
		return
	}
	e := &early{in: in, data: d, via: via}
	e.all.of, e.own.of = e, e
	in.held[d.Count] = e
	r.early.push(&e.all)
	in.peer.early.push(&e.own)
	r.take(in, d.Count, n)
	r.use.early += n
	in.peer.use.early += n
}

// unhold takes out what is early no more. It still counts as received.
func (r *Receiver) unhold(e *early) {
	e.all.leave()
	e.own.leave()
	delete(e.in.held, e.data.Count)
	n := weight(e.data)
	r.use.early -= n
	e.in.peer.use.early -= n
}

// drop forgets what came early: its sender will be told that it is missing.
func (r *Receiver) drop(e *early) {
	r.unhold(e)
	r.release(e.in, e.data.Count)
}

// dropEarly does so with everything that an inbox holds.
func (r *Receiver) dropEarly(in *inbox) {
	for _, e := range in.held {
		r.drop(e)
	}
}

func weight(d *Data) int { return len(d.Payload) + perMessage }

// inWindow reports whether the window of the outbox admits the data. It always admits
// one message.
func (r *Receiver) inWindow(in *inbox, d *Data) bool {
	// Senders count payloads alone.
	return d.Count-in.base < uint64(r.cfg.Messages) &&
		(in.bytes == 0 || in.bytes-perMessage*len(in.sizes)+len(d.Payload) <= r.cfg.Bytes)
}

// share is how many bytes a peer may have that has so many of those that all have.
func (r *Receiver) share(own, all int) int {
	return min(r.cfg.PeerBytes, (r.cfg.TotalBytes-(all-own))/4)
}

// room reports whether there is room for data that is due, and makes it: what came
// early must not keep it out. A peer that has nothing may always have one message.
func (r *Receiver) room(in *inbox, d *Data) bool {
	n, p := weight(d), in.peer
	if in.sizes[d.Count] != 0 || d.Void {
		return true
	}
	own, all := p.use.due(), r.use.due()
	if own > 0 && own+n > r.share(own, all) || all > 0 && all+n > r.cfg.TotalBytes {
		return false
	}
	for !r.inWindow(in, d) {
		if len(in.held) == 0 {
			return false
		}
		r.drop(in.held[slices.Max(slices.Collect(maps.Keys(in.held)))]) // the last is needed last
	}
	for p.use.bytes+n > r.cfg.PeerBytes && p.early.last != nil {
		r.drop(p.early.last.of)
	}
	for r.use.bytes+n > r.cfg.TotalBytes && r.early.first != nil {
		r.drop(r.early.first.of)
	}
	return true
}

// hand gives the message due to the program; false when it is refused.
func (r *Receiver) hand(in *inbox, d *Data, via any) bool {
	if d.Void {
		r.release(in, d.Count)
		in.next++
		in.refusal = RefusalNone
		r.ack(in, d.Count)
		r.answer(in, in.channel)
		return true
	}
	refusal := RefusalFull
	if r.room(in, d) {
		refusal = r.cfg.Hand(Item{
			Peer: in.who, Outbox: in.id, Count: d.Count, Redelivered: d.Redelivered,
			To: d.To, Payload: d.Payload, Via: via,
		})
	}
	if refusal != RefusalNone {
		r.count.Refused++
		in.refusal = refusal
		r.release(in, d.Count) // it was held
		return false
	}
	in.refusal = RefusalNone
	r.count.Handed++
	r.take(in, d.Count, weight(d))
	in.next++
	return true
}

// drain hands on what waited for its turn.
func (r *Receiver) drain(in *inbox) {
	for {
		for in.acked[in.next] { // withdrawn, and one before it was returned
			in.next++
		}
		e, ok := in.held[in.next]
		if !ok {
			return
		}
		r.unhold(e)
		if !r.hand(in, e.data, e.via) {
			r.answer(in, in.channel)
			return
		}
	}
}

// Ack notes that the program has acknowledged a message. It returns the channel
// that has a State to send now; 0 when there is none, or nobody waits for the
// acknowledgement.
func (r *Receiver) Ack(who identity.Identifier, id OutboxID, count uint64) (channel uint64) {
	in := r.inbox(who, id)
	if in == nil || count < in.base || count >= in.next || in.acked[count] {
		return 0
	}
	r.ack(in, count)
	r.answer(in, in.channel)
	return in.channel
}

func (r *Receiver) inbox(who identity.Identifier, id OutboxID) *inbox {
	if p := r.peers[who]; p != nil {
		return p.inboxes[id]
	}
	return nil
}

func (r *Receiver) ack(in *inbox, count uint64) {
	r.release(in, count)
	in.acked[count] = true
	r.advance(in)
}

// Return takes back a message that was handed on and that the program will never
// see: its queue was dropped. It will be handed on again, and those behind it. The
// result is as for Ack.
func (r *Receiver) Return(who identity.Identifier, id OutboxID, count uint64) (channel uint64) {
	in := r.inbox(who, id)
	if in == nil || count < in.base || count >= in.next || in.acked[count] {
		return 0
	}
	for c := count; c < in.next; c++ {
		r.release(in, c)
	}
	in.next = count
	r.answer(in, in.channel)
	return in.channel
}

// maxDue bounds the answers that wait for one channel; senders ask again.
const maxDue = 8192

// answer sees to it that a State is sent through the channel. One that waits for
// an older channel moves here.
func (r *Receiver) answer(in *inbox, channel uint64) {
	if channel == 0 || in.dueOn == channel || in.dueOn != 0 && channel != in.channel || len(r.due[channel]) >= maxDue {
		return
	}
	r.undue(in)
	in.dueOn = channel
	r.due[channel] = append(r.due[channel], in)
}

func (r *Receiver) undue(in *inbox) {
	if in.dueOn == 0 {
		return
	}
	list := r.due[in.dueOn]
	r.due[in.dueOn] = slices.DeleteFunc(list, func(o *inbox) bool { return o == in })
	in.dueOn = 0
}

// NextState returns an answer that is to be sent through the channel; false when
// there is none. Ask again after every other call.
func (r *Receiver) NextState(channel uint64) (*State, bool) {
	list := r.due[channel]
	if len(list) == 0 {
		delete(r.due, channel)
		return nil, false
	}
	in := list[0]
	r.due[channel] = list[1:]
	in.dueOn = 0
	st := &State{
		Header: Header{Outbox: in.id, Session: in.session, Serial: in.serial, Base: in.base},
		Next:   in.next, Messages: uint64(r.cfg.Messages), Bytes: uint64(r.cfg.Bytes), Refusal: in.refusal,
	}
	for c := range in.acked {
		if c-in.base < MaxWindow {
			st.Acked = setBit(st.Acked, c-in.base)
		}
	}
	for c := range in.held {
		if c-in.next < MaxWindow {
			st.Held = setBit(st.Held, c-in.next)
		}
	}
	return st, true
}

// Gone forgets a channel that has ended.
func (r *Receiver) Gone(channel uint64) {
	for _, in := range r.due[channel] {
		in.dueOn = 0
	}
	delete(r.due, channel)
	for _, p := range r.peers {
		for _, in := range p.inboxes {
			if in.channel == channel {
				in.channel = 0
				r.dropEarly(in) // nobody may come to fill the gap
			}
		}
	}
}
