package delivery

import (
	"time"
)

// Times of a sender.
const (
	// firstAsk is how long a sender waits for an acknowledgement until it asks, and
	// longAsk the longest pause between two questions; each is twice the one before.
	firstAsk = time.Second
	longAsk  = 30 * time.Second
	// firstRetry and longRetry are the pauses after a refusal.
	firstRetry = 250 * time.Millisecond
	longRetry  = 5 * time.Second
	// settleAfter is how long a sender waits, when everything is acknowledged, for
	// another message that tells the receiver so.
	settleAfter = 500 * time.Millisecond
)

// Window before the first State of a session, and for receivers that name none.
const (
	firstMessages = 64
	firstBytes    = 256 << 10
)

// SenderConfig sets up a Sender.
type SenderConfig struct {
	Outbox OutboxID
	// Session is the number before that of the first session. The sessions of an
	// outbox that several processes keep should rise; a receiver that knows a higher
	// one costs a round trip.
	Session uint64
	// Jitter varies a pause so that senders don't act in step; nil keeps it.
	Jitter func(time.Duration) time.Duration
}

// transmission is where an item stands in the present session.
type transmission uint8

const (
	unready  transmission = iota // not on disk yet
	queued                       // to be sent
	sent                         // under way
	received                     // the receiver has it
)

// item is one count of the outbox.
type item struct {
	to      string
	payload []byte
	size    int // of the payload when it was added
	serial  uint64
	tx      transmission
	void    bool // withdrawn or settled: its contents are gone
	settled bool // nobody waits for it any more: the receiver has acknowledged it
}

// Sender is one outbox.
type Sender struct {
	cfg   SenderConfig
	items []item // of the counts from base on
	base  uint64 // lowest count not acknowledged
	open  int    // items that are not settled
	voids int    // of those, the withdrawn
	bytes int    // of the payloads held
	top   uint64 // highest count that was ever transmitted
	told  uint64 // highest base that the receiver has heard of

	epoch    [16]byte // of the receiver process that top refers to
	hasEpoch bool
	mark     uint64 // counts up to here may have been seen by an earlier process
	restored bool   // session numbers of earlier processes are not known
	behind   uint64 // count that the receiver waits for, where more is behind it than was ever sent

	attached    bool
	session     uint64
	serial      uint64
	asking      bool // nothing is sent before the receiver has answered
	askDue      bool
	cursor      int // no item before it is queued
	flying      int // items sent or received, and not settled
	flyingBytes int
	maxMessages uint64
	maxBytes    uint64

	due      time.Time // when to ask; zero: nothing is outstanding
	wait     time.Duration
	refusal  Refusal
	pause    time.Duration
	paused   time.Time // nothing is sent before
	probing  bool      // one item was sent in spite of the refusal
	settleAt time.Time // when to say that all is settled; zero: need not
}

// NewSender returns an empty outbox whose next count is 1.
func NewSender(cfg SenderConfig) *Sender {
	return &Sender{cfg: cfg, base: 1, told: 1, session: cfg.Session, wait: firstAsk}
}

// Stored is a message of an earlier process.
type Stored struct {
	Count   uint64
	Void    bool
	To      string
	Payload []byte
}

// Restored is an outbox of an earlier process.
type Restored struct {
	// Next is the count of the next message.
	Next uint64
	// Epoch and Mark are what Attach returned last; HasEpoch says that it did.
	Epoch    [16]byte
	Mark     uint64
	HasEpoch bool
	// Pending are the messages that are not acknowledged, by rising count. Counts
	// that are missing are acknowledged.
	Pending []Stored
}

// RestoreSender returns an outbox with what an earlier process has left.
func RestoreSender(cfg SenderConfig, r Restored) *Sender {
	s := NewSender(cfg)
	s.base, s.restored = r.Next, true
	s.epoch, s.mark, s.hasEpoch = r.Epoch, r.Mark, r.HasEpoch
	s.top = r.Next - 1
	if len(r.Pending) > 0 {
		s.base = r.Pending[0].Count
	}
	s.told = s.base
	for _, p := range r.Pending {
		for s.next() < p.Count {
			s.items = append(s.items, item{tx: queued, void: true, settled: true})
		}
		if p.Void {
			p.To, p.Payload = "", nil
		}
		s.items = append(s.items, item{to: p.To, payload: p.Payload, size: len(p.Payload), tx: queued, void: p.Void})
		s.open++
		if p.Void {
			s.voids++
		}
		s.bytes += len(p.Payload)
	}
	for s.next() < r.Next {
		s.items = append(s.items, item{tx: queued, void: true, settled: true})
	}
	return s
}

// next is the count of the next message.
func (s *Sender) next() uint64 { return s.base + uint64(len(s.items)) }

// Pending returns the next count, and how many messages and bytes wait for
// acknowledgement; those that were withdrawn too, of which the receiver is to hear.
func (s *Sender) Pending() (next uint64, messages, bytes int) { return s.next(), s.open, s.bytes }

// Waiting returns how many messages and bytes wait for acknowledgement and were not
// withdrawn.
func (s *Sender) Waiting() (messages, bytes int) { return s.open - s.voids, s.bytes }

// Behind returns the count that the receiver waits for next when it has had messages
// from this outbox that this Sender has never sent, 0 otherwise. Then what Restored
// held is older than what the receiver has seen, and counts would be given twice:
// nothing is sent any more.
func (s *Sender) Behind() uint64 { return s.behind }

// Refusal returns why the receiver does not take the oldest message at present.
func (s *Sender) Refusal() Refusal { return s.refusal }

// Add appends a message and returns its count. The payload is the sender's from now
// on. With ready unset it waits for Ready, as do those behind it.
func (s *Sender) Add(to string, payload []byte, ready bool) uint64 {
	it := item{to: to, payload: payload, size: len(payload)}
	if ready {
		it.tx = queued
	}
	s.items = append(s.items, it)
	s.open++
	s.bytes += len(payload)
	s.settleAt = time.Time{}
	return s.next() - 1
}

// Ready lets a message go.
func (s *Sender) Ready(count uint64) {
	if it := s.at(count); it != nil && it.tx == unready {
		it.tx = queued
	}
}

func (s *Sender) at(count uint64) *item {
	if count < s.base || count >= s.next() {
		return nil
	}
	return &s.items[count-s.base]
}

// Withdraw takes a message back: it is not sent any more, but its count stays taken.
// The receiver's program may have seen it nevertheless. It reports false when the
// message is acknowledged or withdrawn already.
func (s *Sender) Withdraw(count uint64) bool {
	it := s.at(count)
	if it == nil || it.void {
		return false
	}
	s.empty(it)
	s.voids++
	if it.tx == sent || it.tx == received {
		// The receiver must hear that nobody waits for it any more.
		s.land(it)
		s.requeue(int(count - s.base))
	}
	return true
}

// Sent reports whether the message may have left this process, or an earlier one.
func (s *Sender) Sent(count uint64) bool { return count <= s.top }

func (s *Sender) empty(it *item) {
	s.bytes -= len(it.payload)
	it.void, it.payload, it.to = true, nil, ""
}

// land takes an item out of flight.
func (s *Sender) land(it *item) {
	if it.tx == sent || it.tx == received {
		if !it.settled {
			s.flying--
			s.flyingBytes -= it.size
		}
		it.tx = queued
	}
}

func (s *Sender) requeue(i int) {
	s.items[i].tx = queued
	s.cursor = min(s.cursor, i)
}

// Attach begins a session on a new channel to a process of the receiver. What it
// returns is to be kept with an outbox on disk: Restored.Epoch and Restored.Mark.
func (s *Sender) Attach(epoch [16]byte) (mark uint64) {
	if s.hasEpoch && s.epoch != epoch || !s.hasEpoch && s.restored {
		s.mark = max(s.mark, s.top)
	}
	s.epoch, s.hasEpoch = epoch, true
	s.attached = true
	s.begin(s.session + 1)
	return s.mark
}

// begin starts a session: nothing is known of what the receiver has.
func (s *Sender) begin(session uint64) {
	s.session, s.serial = session, 0
	s.flying, s.flyingBytes = 0, 0
	s.asking = s.restored
	for i := range s.items {
		it := &s.items[i]
		it.serial = 0
		if it.tx == received || it.tx == sent {
			it.tx = queued
		}
		if s.base+uint64(i) <= s.top {
			s.asking = true
		}
	}
	if s.open == 0 && s.top > 0 && !s.asking {
		// What was said about it on an earlier channel may be lost.
		s.told, s.settleAt = 0, time.Unix(1, 0)
	}
	s.cursor = 0
	s.askDue = s.asking
	s.maxMessages, s.maxBytes = firstMessages, firstBytes
	s.due, s.wait = time.Time{}, firstAsk
	s.refusal, s.pause, s.paused = RefusalNone, 0, time.Time{}
	s.probing = false
}

// Detach ends the session: the channel is gone.
func (s *Sender) Detach() { s.attached = false }

// Next returns a message to send now, through the channel of the session; false
// when there is none. Ask again after every other call, and at Wake.
func (s *Sender) Next(now time.Time) (Message, bool) {
	if !s.attached || s.behind > 0 {
		return nil, false
	}
	if !s.due.IsZero() && !now.Before(s.due) {
		s.askDue = true
		s.wait = min(2*s.wait, longAsk)
	}
	if s.askDue {
		s.askDue = false
		s.serial++
		s.due = now.Add(s.jitter(s.wait))
		return &Ask{Header: s.header(), Last: s.next() - 1}, true
	}
	if s.asking || now.Before(s.paused) {
		return nil, false
	}
	s.paused = time.Time{}
	if i := s.pick(); i >= 0 {
		return s.transmit(i, now), true
	}
	if !s.settleAt.IsZero() && !now.Before(s.settleAt) {
		s.settleAt = time.Time{}
		return s.settle(), true
	}
	return nil, false
}

func (s *Sender) header() Header {
	s.told = s.base
	return Header{Outbox: s.cfg.Outbox, Session: s.session, Serial: s.serial, Base: s.base}
}

func (s *Sender) jitter(d time.Duration) time.Duration {
	if s.cfg.Jitter != nil {
		return s.cfg.Jitter(d)
	}
	return d
}

// pick returns the index of the item to send, or -1.
func (s *Sender) pick() int {
	for ; s.cursor < len(s.items); s.cursor++ {
		it := &s.items[s.cursor]
		switch it.tx {
		case unready:
			return -1
		case sent, received:
			continue
		case queued:
		}
		size := it.size
		if it.void {
			size = 0
		}
		switch {
		case s.cursor == 0: // a window always admits the oldest
		case uint64(s.cursor) >= s.maxMessages,
			s.flying > 0 && uint64(s.flyingBytes+size) > s.maxBytes && !it.void:
			return -1
		}
		return s.cursor
	}
	return -1
}

// transmit makes the message of an item.
func (s *Sender) transmit(i int, now time.Time) *Data {
	it := &s.items[i]
	count := s.base + uint64(i)
	s.serial++
	it.tx, it.serial = sent, s.serial
	if it.void {
		it.size = 0
	}
	if !it.settled {
		s.flying++
		s.flyingBytes += it.size
	}
	s.cursor = i + 1
	s.top = max(s.top, count)
	if s.due.IsZero() {
		s.due = now.Add(s.jitter(s.wait))
	}
	if s.refusal != RefusalNone { // one at a time until the receiver takes it
		s.paused, s.probing = now.Add(s.jitter(s.pause)), true
	}
	return &Data{
		Header: s.header(), Count: count, Redelivered: !it.void && count <= s.mark,
		Void: it.void, To: it.to, Payload: it.payload,
	}
}

func (s *Sender) settle() *Settle {
	s.serial++
	return &Settle{Header: s.header()}
}

// Finish returns the last word of an outbox that is given up: what the receiver may
// forget. nil when it knows, or is not reached.
func (s *Sender) Finish() Message {
	if !s.attached || s.open > 0 || s.told == s.base {
		return nil
	}
	return s.settle()
}

// Receive takes the receiver's State and returns the counts that it newly
// acknowledges, by rising count. A State of another session changes nothing; of one
// that names what was never sent, Behind tells.
func (s *Sender) Receive(st *State, now time.Time) (acked []uint64) {
	switch {
	case !s.attached || st.Outbox != s.cfg.Outbox:
		return nil
	case st.Session > s.session, st.Session == s.session && st.Serial > s.serial:
		// Not ours: an earlier process of this device got as far. Go on behind it.
		if st.Session < maxNumber-1 {
			s.begin(st.Session + 1)
		}
		return nil
	case st.Session < s.session:
		return nil
	case st.Base > s.top+1 || st.Next > s.top+1:
		s.behind = max(st.Base, st.Next)
		return nil
	}
	s.restored = false
	progress := s.asking || s.refusal != st.Refusal
	s.asking = false
	s.maxMessages = min(max(st.Messages, 1), MaxWindow)
	s.maxBytes = st.Bytes
	// Of what is behind, nothing was sent in this session, and the State says nothing.
	end := min(s.top+1, max(s.base, st.Base, st.Next)+MaxWindow)
	for i := range s.items {
		it := &s.items[i]
		count := s.base + uint64(i)
		if count >= end {
			break
		}
		if ackedBy(st, count) && !it.settled {
			s.land(it)
			if it.void {
				s.voids--
			}
			s.empty(it)
			it.settled, it.tx = true, received
			s.open--
			acked = append(acked, count)
		}
		progress = s.follow(st, i, count) || progress
	}
	s.trim()
	s.refused(st.Refusal, now)
	s.rearm(progress || len(acked) > 0, now)
	return acked
}

func ackedBy(st *State, count uint64) bool {
	return count < st.Base || bit(st.Acked, count-st.Base)
}

// follow brings the item's transmission up to date: what the receiver has, and
// what is lost.
func (s *Sender) follow(st *State, i int, count uint64) (progress bool) {
	it := &s.items[i]
	has := count < st.Next || bit(st.Held, count-st.Next)
	if it.void && !it.settled {
		has = false // it may have what was withdrawn; that it was, only an acknowledgement shows
	}
	switch {
	case has && it.tx == sent:
		it.tx = received
		return true
	case has && it.tx == queued:
		// Sent in an earlier session.
		it.tx = received
		if !it.settled {
			s.flying++
			s.flyingBytes += it.size
		}
		return true
	case !has && (it.tx == sent || it.tx == received) && it.serial <= st.Serial:
		s.land(it)
		s.requeue(i)
		return true
	}
	return false
}

// trim forgets the settled items at the head.
func (s *Sender) trim() {
	n := 0
	for n < len(s.items) && s.items[n].settled {
		n++
	}
	if n == 0 {
		return
	}
	clear(s.items[:n])
	if s.items = s.items[n:]; len(s.items) == 0 {
		s.items = nil
	}
	s.base += uint64(n)
	s.cursor = max(s.cursor-n, 0)
}

func (s *Sender) refused(r Refusal, now time.Time) {
	if r == RefusalNone {
		s.refusal, s.pause, s.paused = r, 0, time.Time{}
		return
	}
	if s.refusal == RefusalNone || s.probing {
		s.probing = false
		s.pause = min(max(2*s.pause, firstRetry), longRetry)
		s.paused = now.Add(s.jitter(s.pause))
	}
	s.refusal = r
}

// rearm sets the timers after news.
func (s *Sender) rearm(progress bool, now time.Time) {
	if s.open == 0 {
		s.due, s.wait = time.Time{}, firstAsk
		if s.told < s.base {
			s.settleAt = now.Add(settleAfter)
		}
		return
	}
	if progress {
		s.wait = firstAsk
		s.due = time.Time{}
		if s.flying > 0 {
			s.due = now.Add(s.jitter(s.wait))
		}
	}
}

// Wake returns when Next may have something without any other call before; zero
// when never.
func (s *Sender) Wake() time.Time {
	if !s.attached || s.behind > 0 {
		return time.Time{}
	}
	wake := s.due
	for _, t := range [...]time.Time{s.settleAt, s.paused} {
		if !t.IsZero() && (wake.IsZero() || t.Before(wake)) {
			wake = t
		}
	}
	return wake
}
