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
	// its payload, and an acknowledgement whose turn has not come as a message without
	// any. Defaults 16 MiB and 64 MiB. A peer has a quarter, at most, of what
	// the others leave of TotalBytes; what has come early gives way to what is due.
	PeerBytes, TotalBytes int
	// PeerOutboxes and TotalOutboxes bound the outboxes remembered: those that a
	// message was received of. Defaults 4,096 and 65,536. For one of another peer, the
	// peer that has most gives up the one it has not used for longest. A peer has
	// messages in a quarter, at most, of what the others leave of TotalOutboxes.
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
	cfg      ReceiverConfig
	peers    map[identity.Identifier]*peer
	channels map[uint64]*conduit
	count    Counters
	use      use
	early    row[*early] // all of it, oldest first
	busy     int         // inboxes with messages that the program has not acknowledged
	ranks    []*row[*peer]
	top      int // no peer is in a higher one of ranks, which are by peer.idle
}

// conduit is what goes through one channel.
type conduit struct {
	due     []*inbox // whose State is to be sent
	spares  int      // of due
	inboxes row[*inbox]
}

// peer is what one identity has here.
type peer struct {
	who     identity.Identifier
	inboxes map[OutboxID]*inbox
	use     use
	early   row[*early] // oldest first

	busy int // inboxes with messages that the program has not acknowledged
	idle int // the others, which may be forgotten: least recently used first
	// settled are those whose senders know that all is acknowledged.
	settled, unsettled row[*inbox]
	rank               place[*peer] // in Receiver.ranks
}

// use counts bytes of what is received and not acknowledged, and those of it that
// came early.
type use struct{ bytes, early int }

// due is what is not early, and so gives way to nothing.
func (u use) due() int { return u.bytes - u.early }

// inbox is the receiving end of one outbox.
type inbox struct {
	peer    *peer
	id      OutboxID
	session uint64
	channel uint64 // of the session
	serial  uint64 // highest seen in the session
	base    uint64 // lowest count not acknowledged
	known   uint64 // base as the sender knows it
	next    uint64 // lowest count not handed on
	acked   map[uint64]bool
	sizes   map[uint64]int    // of what is received, and not acknowledged or ahead of base
	held    map[uint64]*early // received ahead of next
	bytes   int               // sum of sizes
	refusal Refusal
	used    time.Time
	dueOn   uint64        // channel in whose conduit.due it stands; 0: in none
	spare   bool          // not remembered: only there for an answer
	home    place[*inbox] // in peer.settled or peer.unsettled, or, when busy, in neither
	on      place[*inbox] // in conduit.inboxes
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
	return &Receiver{cfg: cfg, peers: make(map[identity.Identifier]*peer), channels: make(map[uint64]*conduit)}
}

// Counters returns the receiver's counters.
func (r *Receiver) Counters() Counters {
	c := r.count
	c.TotalBytes = r.use.bytes
	return c
}

// find returns the inbox of an outbox, brought to the message's session; nil when
// the message is of an earlier one. One that is not known yet is a spare until
// something is received.
func (r *Receiver) find(who identity.Identifier, channel uint64, h *Header, now time.Time) *inbox {
	in := r.inbox(who, h.Outbox)
	if in == nil {
		p := r.peers[who]
		if p == nil {
			p = &peer{who: who}
		}
		in = &inbox{peer: p, id: h.Outbox, base: h.Base, known: h.Base, next: h.Base, spare: true}
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
	if in.channel != channel {
		in.channel = channel
		r.join(in)
	}
	in.serial = max(in.serial, h.Serial)
	in.used = now
	r.forget(in, h.Base)
	return in
}

// join has an inbox end with its channel.
func (r *Receiver) join(in *inbox) {
	if !in.spare {
		r.conduit(in.channel).inboxes.push(&in.on)
	}
}

// conduit returns that of a channel.
func (r *Receiver) conduit(channel uint64) *conduit {
	c := r.channels[channel]
	if c == nil {
		c = &conduit{}
		r.channels[channel] = c
	}
	return c
}

// place reports whether an inbox may be remembered, and forgets another one for it.
func (r *Receiver) place(in *inbox) bool {
	p := in.peer
	switch {
	case !in.spare:
		return true
	case len(p.inboxes) >= r.cfg.PeerOutboxes:
		old := p.old(in.used)
		if old == nil {
			return false
		}
		r.evict(old)
	case r.count.Outboxes >= r.cfg.TotalOutboxes:
		most := r.most()
		if most == nil {
			return false
		}
		r.evict(most.oldest())
	}
	return true
}

// old returns the inbox that its sender cannot want any more, nil if there is none.
func (p *peer) old(now time.Time) *inbox {
	if f := p.settled.first; f != nil && now.Sub(f.of.used) >= settledMemory {
		return f.of
	}
	if f := p.unsettled.first; f != nil && now.Sub(f.of.used) >= unsettledMemory {
		return f.of
	}
	return nil
}

// oldest returns the inbox that is missed least, of a peer that has one that is idle.
func (p *peer) oldest() *inbox {
	if f := p.settled.first; f != nil {
		return f.of
	}
	return p.unsettled.first.of
}

// remember keeps a spare inbox that there is a place for.
func (r *Receiver) remember(in *inbox) {
	if !in.spare {
		return
	}
	p := in.peer
	in.spare = false
	in.acked, in.sizes, in.held = make(map[uint64]bool), make(map[uint64]int), make(map[uint64]*early)
	in.home.of, in.on.of = in, in
	if p.inboxes == nil {
		p.inboxes, p.rank.of = make(map[OutboxID]*inbox), p
	}
	p.inboxes[in.id] = in
	r.peers[p.who] = p
	r.count.Outboxes++
	p.unsettled.push(&in.home)
	r.idle(p, 1)
	r.join(in)
}

// evict forgets an idle inbox. What it holds was never handed on.
func (r *Receiver) evict(in *inbox) {
	p := in.peer
	r.undue(in)
	r.dropEarly(in)
	in.on.leave()
	in.home.leave()
	r.idle(p, -1)
	delete(p.inboxes, in.id)
	if len(p.inboxes) == 0 {
		delete(r.peers, p.who)
	}
	r.count.Outboxes--
}

// file puts an inbox where it belongs. It ends every use of one.
func (r *Receiver) file(in *inbox) {
	if in == nil || in.spare {
		return
	}
	p := in.peer
	was, is := in.home.row == nil, in.base != in.next // busy
	switch {
	case is:
		in.home.leave()
	case in.known == in.next:
		p.settled.push(&in.home)
	default:
		p.unsettled.push(&in.home)
	}
	switch {
	case is && !was:
		p.busy++
		r.busy++
		r.idle(p, -1)
	case was && !is:
		p.busy--
		r.busy--
		r.idle(p, 1)
	}
}

// idle counts the idle inboxes of a peer.
func (r *Receiver) idle(p *peer, n int) {
	p.idle += n
	if p.idle == 0 {
		p.rank.leave()
		return
	}
	for len(r.ranks) <= p.idle {
		r.ranks = append(r.ranks, &row[*peer]{})
	}
	r.ranks[p.idle].push(&p.rank)
	r.top = max(r.top, p.idle)
}

// most returns the peer that has most idle inboxes; nil when none has any.
func (r *Receiver) most() *peer {
	for ; r.top > 0; r.top-- {
		if f := r.ranks[r.top].first; f != nil {
			return f.of
		}
	}
	return nil
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
		r.release(in, in.base)
		delete(in.acked, in.base)
		in.base++
	}
	in.next = max(in.next, in.base)
}

// take accounts for the bytes of a message.
func (r *Receiver) take(in *inbox, count uint64, n int) {
	if in.sizes[count] != 0 {
		return
	}
	r.resize(in, count, n)
	r.count.Unacked++
}

func (r *Receiver) release(in *inbox, count uint64) {
	if in.sizes[count] == 0 {
		return
	}
	r.resize(in, count, 0)
	if !in.acked[count] {
		r.count.Unacked--
	}
}

func (r *Receiver) resize(in *inbox, count uint64, n int) {
	more := n - in.sizes[count]
	if n == 0 {
		delete(in.sizes, count)
	} else {
		in.sizes[count] = n
	}
	in.bytes += more
	in.peer.use.bytes += more
	r.use.bytes += more
}

// Ask takes a question.
func (r *Receiver) Ask(who identity.Identifier, channel uint64, a *Ask, now time.Time) {
	in := r.find(who, channel, &a.Header, now)
	if in != nil {
		r.answer(in, channel)
	}
	r.file(in)
}

// Settle takes a sender's word that it knows of all acknowledgements.
func (r *Receiver) Settle(who identity.Identifier, channel uint64, s *Settle, now time.Time) {
	if r.inbox(who, s.Outbox) != nil {
		r.file(r.find(who, channel, &s.Header, now))
	}
}

// Data takes a message. via is handed on with it. The payload is the receiver's
// from now on.
func (r *Receiver) Data(who identity.Identifier, channel uint64, d *Data, via any, now time.Time) {
	in := r.find(who, channel, &d.Header, now)
	defer r.file(in)
	switch {
	case in == nil:
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
	if !r.inWindow(in, d) || in.peer.use.bytes+n > r.share(in.peer.use.bytes, r.use.bytes) || !r.place(in) {
		// So that the sender pauses, instead of sending it again at once.
		r.count.Refused++
		in.refusal = RefusalFull
		return
	}
	r.remember(in)
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
		(d.Void || in.bytes == 0 || in.bytes-perMessage*len(in.sizes)+len(d.Payload) <= r.cfg.Bytes)
}

// share is how many bytes a peer may have that has so many of those that all have.
func (r *Receiver) share(own, all int) int {
	return min(r.cfg.PeerBytes, (r.cfg.TotalBytes-(all-own))/4)
}

// room reports whether there is room for data that is due, and makes it: what came
// early must not keep it out. A peer that has nothing may always have one message.
func (r *Receiver) room(in *inbox, d *Data) bool {
	n, p := weight(d), in.peer
	if in.sizes[d.Count] != 0 {
		return true
	}
	own, all := p.use.due(), r.use.due()
	if own > 0 && own+n > r.share(own, all) || all > 0 && all+n > r.cfg.TotalBytes {
		return false
	}
	// With its first message an inbox begins to be busy.
	if in.base == in.next && p.busy > 0 && p.busy >= (r.cfg.TotalOutboxes-(r.busy-p.busy))/4 {
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
	return r.place(in)
}

// hand gives the message due to the program; false when it is refused.
func (r *Receiver) hand(in *inbox, d *Data, via any) bool {
	refusal := RefusalFull
	switch {
	case d.Void && in.base == in.next:
		refusal = RefusalNone // of which nothing stays
	case !r.room(in, d):
	case d.Void:
		refusal = RefusalNone
	default:
		r.remember(in)
		refusal = r.cfg.Hand(Item{
			Peer: in.peer.who, Outbox: in.id, Count: d.Count, Redelivered: d.Redelivered,
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
	if d.Void {
		in.next++
		r.ack(in, d.Count)
		r.answer(in, in.channel)
		return true
	}
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
	r.file(in)
	return in.channel
}

func (r *Receiver) inbox(who identity.Identifier, id OutboxID) *inbox {
	if p := r.peers[who]; p != nil {
		return p.inboxes[id]
	}
	return nil
}

func (r *Receiver) ack(in *inbox, count uint64) {
	if count == in.base {
		r.release(in, count)
		in.base++
		r.advance(in)
		return
	}
	if in.sizes[count] != 0 {
		r.count.Unacked--
	}
	in.acked[count] = true
	r.resize(in, count, perMessage)
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
		if !in.acked[c] {
			r.release(in, c)
		}
	}
	in.next = count
	r.answer(in, in.channel)
	r.file(in)
	return in.channel
}

// maxDue bounds the answers that wait for one channel, and maxSpares those of them
// about outboxes that are not remembered; senders ask again.
const (
	maxDue    = 8192
	maxSpares = 1024
)

// answer sees to it that a State is sent through the channel. One that waits for
// an older channel moves here.
func (r *Receiver) answer(in *inbox, channel uint64) {
	if channel == 0 || in.dueOn == channel || in.dueOn != 0 && channel != in.channel {
		return
	}
	c := r.conduit(channel)
	switch {
	case len(c.due) >= maxDue, in.spare && c.spares >= maxSpares:
		return
	case in.spare:
		c.spares++
	}
	r.undue(in)
	in.dueOn = channel
	c.due = append(c.due, in)
}

func (r *Receiver) undue(in *inbox) {
	if in.dueOn == 0 {
		return
	}
	c := r.channels[in.dueOn]
	c.due = slices.DeleteFunc(c.due, func(o *inbox) bool { return o == in })
	in.dueOn = 0
}

// NextState returns an answer that is to be sent through the channel; false when
// there is none. Ask again after every other call.
func (r *Receiver) NextState(channel uint64) (*State, bool) {
	c := r.channels[channel]
	if c == nil || len(c.due) == 0 {
		return nil, false
	}
	in := c.due[0]
	c.due[0] = nil
	if c.due = c.due[1:]; len(c.due) == 0 {
		c.due = nil // let the array go
	}
	in.dueOn = 0
	if in.spare {
		c.spares--
	}
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

// Gone forgets a channel that has ended. Nothing may come through it any more.
func (r *Receiver) Gone(channel uint64) {
	c := r.channels[channel]
	if c == nil {
		return
	}
	for _, in := range c.due {
		in.dueOn = 0
	}
	for c.inboxes.first != nil {
		in := c.inboxes.first.of
		in.on.leave()
		in.channel = 0
		r.dropEarly(in) // nobody may come to fill the gap
	}
	delete(r.channels, channel)
}
