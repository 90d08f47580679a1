package delivery

import (
	"encoding/binary"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

var simStart = time.Unix(1_700_000_000, 0)

// drain returns what the sender has to say now.
func drain(s *Sender, now time.Time) (out []Message) {
	for {
		m, ok := s.Next(now)
		if !ok {
			return out
		}
		out = append(out, m)
	}
}

func counts(out []Message) (c []uint64) {
	for _, m := range out {
		if d, ok := m.(*Data); ok {
			c = append(c, d.Count)
		}
	}
	return c
}

func want[T comparable](t *testing.T, what string, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
}

func attached(n int) *Sender {
	s := NewSender(SenderConfig{})
	for range n {
		s.Add("app", []byte("0123456789"), true)
	}
	s.Attach([16]byte{1})
	return s
}

func TestSenderKeepsToWindow(t *testing.T) {
	s := attached(200)
	out := drain(s, simStart)
	if len(out) != firstMessages {
		t.Fatalf("%d sent before the first answer", len(out))
	}
	st := &State{Header: Header{Session: 1, Serial: 64, Base: 3}, Next: 65, Messages: 100, Bytes: 1000}
	want(t, "acknowledged", s.Receive(st, simStart), []uint64{1, 2})
	// 62 are under way with 620 bytes; 38 more fit.
	if got := counts(drain(s, simStart)); len(got) != 38 || got[0] != 65 {
		t.Fatalf("sent %v", got)
	}
	st = &State{Header: Header{Session: 1, Serial: 102, Base: 103}, Next: 103, Messages: 1, Bytes: 0}
	s.Receive(st, simStart)
	want(t, "with the smallest window", counts(drain(s, simStart)), []uint64{103})
}

func TestSenderResendsWhatIsLost(t *testing.T) {
	s := attached(6)
	drain(s, simStart)
	// 5 overtook 3 and 4; 6 is still under way.
	s.Receive(&State{Header: Header{Session: 1, Serial: 5, Base: 1}, Next: 3, Held: []byte{0b100}, Messages: 10, Bytes: 1000}, simStart)
	want(t, "lost", counts(drain(s, simStart)), []uint64{3, 4})
	s.Receive(&State{Header: Header{Session: 1, Serial: 8, Base: 1}, Next: 6, Messages: 10, Bytes: 1000}, simStart)
	want(t, "lost", counts(drain(s, simStart)), []uint64{6})
}

// What was withdrawn waits for nothing, though the receiver is to hear of it.
func TestWithdrawnDoesNotWait(t *testing.T) {
	s := attached(3)
	is := func(what string, waiting, bytes, open int) {
		t.Helper()
		n, b := s.Waiting()
		_, o, _ := s.Pending()
		want(t, what, []int{n, b, o}, []int{waiting, bytes, open})
	}
	is("added", 3, 30, 3)
	drain(s, simStart)
	s.Withdraw(2)
	s.Withdraw(2)
	is("withdrawn", 2, 20, 3)
	s.Receive(&State{Header: Header{Session: 1, Serial: 3, Base: 2}, Next: 4, Messages: 10, Bytes: 1000}, simStart)
	is("the first is acknowledged", 1, 10, 2)
	want(t, "told of what was withdrawn", counts(drain(s, simStart)), []uint64{2})
	s.Receive(&State{Header: Header{Session: 1, Serial: 4, Base: 4}, Next: 4, Messages: 10, Bytes: 1000}, simStart)
	is("all are acknowledged", 0, 0, 0)

	s = RestoreSender(SenderConfig{}, Restored{Next: 4, Pending: []Stored{{Count: 1, Void: true}, {Count: 3, To: "app", Payload: []byte("x")}}})
	is("restored", 1, 1, 2)
}

// A peer that lies, or an answer that is none, changes nothing.
func TestSenderIgnoresNonsense(t *testing.T) {
	for name, st := range map[string]*State{
		"another outbox":        {Header: Header{Outbox: OutboxID{1}, Session: 1, Serial: 2, Base: 3}, Next: 3},
		"an earlier session":    {Header: Header{Session: 0, Serial: 2, Base: 3}, Next: 3},
		"acknowledges unsent":   {Header: Header{Session: 1, Serial: 2, Base: 4}, Next: 4},
		"has received unsent":   {Header: Header{Session: 1, Serial: 2, Base: 1}, Next: 4},
		"serial of the future":  {Header: Header{Session: 1, Serial: 3, Base: 3}, Next: 3},
		"session of the future": {Header: Header{Session: 9, Serial: 1, Base: 3}, Next: 3},
	} {
		t.Run(name, func(t *testing.T) {
			s := attached(2)
			drain(s, simStart)
			if acked := s.Receive(st, simStart); acked != nil {
				t.Errorf("acknowledged %v", acked)
			}
			if _, n, bytes := s.Pending(); n != 2 || bytes != 20 {
				t.Errorf("%d pending, %d bytes", n, bytes)
			}
			if behind := map[string]uint64{"acknowledges unsent": 4, "has received unsent": 4}[name]; s.Behind() != behind {
				t.Errorf("behind %d, want %d", s.Behind(), behind)
			}
		})
	}
	s := attached(2)
	drain(s, simStart)
	s.Detach()
	if s.Receive(&State{Header: Header{Session: 1, Serial: 2, Base: 3}, Next: 3}, simStart) != nil {
		t.Error("an answer without a channel")
	}
}

// However much an earlier process left, an answer costs no more than a window.
func TestAnswersCostAWindow(t *testing.T) {
	const n = 200_000
	r := Restored{Next: n + 1}
	for i := range uint64(n) {
		r.Pending = append(r.Pending, Stored{Count: i + 1, To: "app"})
	}
	s := RestoreSender(SenderConfig{}, r)
	s.Attach([16]byte{1})
	drain(s, simStart)
	st := &State{Header: Header{Session: 1, Serial: 1, Base: 1}, Next: 1, Messages: 10, Bytes: 1000}
	start := time.Now()
	for range 5000 { // each took 1 ms
		s.Receive(st, simStart)
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("5,000 answers took %v", d)
	}
	// One that acknowledges far more than a window is believed.
	st.Base, st.Next = n-1, n
	if acked := s.Receive(st, simStart); len(acked) != n-2 || s.base != n-1 || s.open != 2 {
		t.Errorf("%d acknowledged, base %d, %d open", len(acked), s.base, s.open)
	}
	if got := counts(drain(s, simStart)); len(got) != 1 || got[0] != n {
		t.Errorf("sent %v", got)
	}
}

func TestSenderAsksWhenAnswersStayAway(t *testing.T) {
	s := attached(1)
	drain(s, simStart)
	now, asked := simStart, 0
	for range 12 {
		wake := s.Wake()
		if !wake.After(now) {
			t.Fatalf("wakes at %v, it is %v", wake, now)
		}
		if d := wake.Sub(now); d > longAsk {
			t.Fatalf("asks after %v", d)
		}
		now = wake
		for _, m := range drain(s, now) {
			if _, ok := m.(*Ask); !ok {
				t.Fatalf("%T instead of a question", m)
			}
			asked++
		}
	}
	if asked != 12 {
		t.Errorf("asked %d times", asked)
	}
}

func TestSenderMarksWhatAnotherProcessMayHaveSeen(t *testing.T) {
	s := attached(2)
	drain(s, simStart)
	s.Add("app", nil, true) // never sent to the first process
	s.Detach()
	if mark := s.Attach([16]byte{2}); mark != 2 {
		t.Errorf("mark %d", mark)
	}
	out := drain(s, simStart)
	if _, ok := out[0].(*Ask); !ok || len(out) != 1 {
		t.Fatalf("first %T of %d", out[0], len(out))
	}
	s.Receive(&State{Header: Header{Session: 2, Serial: 1, Base: 1}, Next: 1, Messages: 10, Bytes: 1000}, simStart)
	var marks []bool
	for _, m := range drain(s, simStart) {
		marks = append(marks, m.(*Data).Redelivered)
	}
	want(t, "marks", marks, []bool{true, true, false})
}

func TestSenderTellsThatAllIsSettled(t *testing.T) {
	s := attached(1)
	drain(s, simStart)
	if s.Finish() != nil {
		t.Error("finished with a message open")
	}
	s.Receive(&State{Header: Header{Session: 1, Serial: 1, Base: 2}, Next: 2, Messages: 10, Bytes: 1000}, simStart)
	if out := drain(s, simStart); len(out) != 0 {
		t.Fatalf("said %v at once", out)
	}
	out := drain(s, s.Wake())
	if len(out) != 1 || out[0].(*Settle).Base != 2 {
		t.Fatalf("said %v", out)
	}
	if s.Finish() != nil || !s.Wake().IsZero() {
		t.Error("says it again")
	}
}

// rig is a receiver whose program takes everything.
type rig struct {
	*Receiver
	got    []uint64
	refuse Refusal
}

func newRig(cfg ReceiverConfig) *rig {
	r := &rig{}
	cfg.Hand = func(it Item) Refusal {
		if r.refuse == RefusalNone {
			r.got = append(r.got, it.Count)
		}
		return r.refuse
	}
	r.Receiver = NewReceiver(cfg)
	return r
}

var serial uint64

func (r *rig) data(box byte, count, base uint64, n int) {
	serial++
	r.Data(simPeer, 1, &Data{
		Header: Header{Outbox: OutboxID{box}, Session: 1, Serial: serial, Base: base},
		Count:  count, To: "app", Payload: make([]byte, n),
	}, nil, simStart)
}

func (r *rig) state(t *testing.T) *State {
	t.Helper()
	st, ok := r.NextState(1)
	if !ok {
		t.Fatal("no answer")
	}
	return st
}

func TestReceiverOrdersAndRemembers(t *testing.T) {
	r := newRig(ReceiverConfig{})
	r.data(0, 1, 1, 1)
	if _, ok := r.NextState(1); ok {
		t.Error("answered what needs no answer")
	}
	r.data(0, 3, 1, 1)
	if st := r.state(t); st.Next != 2 || !bit(st.Held, 1) {
		t.Errorf("after a gap: %+v", st)
	}
	r.data(0, 2, 1, 1)
	r.data(0, 2, 1, 1)
	want(t, "handed on", r.got, []uint64{1, 2, 3})
	if ch := r.Ack(simPeer, OutboxID{0}, 2); ch != 1 {
		t.Errorf("answer on channel %d", ch)
	}
	if st := r.state(t); st.Base != 1 || !bit(st.Acked, 1) || bit(st.Acked, 0) {
		t.Errorf("after one acknowledgement: %+v", st)
	}
	if r.Ack(simPeer, OutboxID{0}, 2) != 0 || r.Ack(simPeer, OutboxID{0}, 4) != 0 || r.Ack(simPeer, OutboxID{7}, 1) != 0 {
		t.Error("acknowledged what nobody waits for")
	}
	r.Ack(simPeer, OutboxID{0}, 1)
	if st := r.state(t); st.Base != 3 || st.Acked != nil {
		t.Errorf("after the second: %+v", st)
	}
	if c := r.Counters(); c.Unacked != 1 || c.TotalBytes != 1+perMessage || c.Handed != 3 || c.Repeated != 1 {
		t.Errorf("counters %+v", c)
	}
}

// A peer that sends more than it may gets nothing by it.
func TestReceiverIsBounded(t *testing.T) {
	r := newRig(ReceiverConfig{Messages: 8, Bytes: 1000, PeerBytes: 4000, TotalBytes: 16000})
	for count := uint64(1); count <= 100; count++ {
		r.data(0, count, 1, 100)
	}
	if c := r.Counters(); c.Unacked > 8 || len(r.got) != 8 {
		t.Errorf("window of 8: %+v", c)
	}
	for box := byte(1); box < 50; box++ {
		r.data(box, 1, 1, 1000)
	}
	if c := r.Counters(); c.TotalBytes > 4000 {
		t.Errorf("one peer has %d bytes", c.TotalBytes)
	}
	// One outbox admits one message whatever its size, within the peer's share.
	r = newRig(ReceiverConfig{Bytes: 10})
	r.data(0, 1, 1, 5000)
	r.data(0, 2, 1, 5000)
	want(t, "handed on", r.got, []uint64{1})
}

// from is data of 1,000 bytes of any peer, through a channel of its own.
func (r *rig) from(who, box byte, count uint64) {
	serial++
	r.Data(identity.Identifier{who}, uint64(who), &Data{
		Header: Header{Outbox: OutboxID{who, box}, Session: 1, Serial: serial, Base: 1},
		Count:  count, To: "app", Payload: make([]byte, 1000-perMessage),
	}, nil, simStart)
}

// What comes ahead of messages that never come keeps nothing out that is due, whoever
// sends it, and goes with its channel.
func TestEarlyDataGivesWayToWhatIsDue(t *testing.T) {
	r := newRig(ReceiverConfig{PeerBytes: 16_000, TotalBytes: 64_000})
	early := func() {
		for who := byte(1); who <= 100; who++ {
			for box := range byte(4) {
				for count := uint64(2); count < 9; count++ {
					r.from(who, box, count)
				}
			}
		}
	}
	early()
	if c := r.Counters(); c.TotalBytes < 50_000 || c.TotalBytes > 64_000 || len(r.got) != 0 {
		t.Fatalf("held: %+v", c)
	}
	// All of it that there is room for, one of each peer, is handed on.
	for who := byte(101); who < 101+64; who++ {
		r.from(who, 0, 1)
		if c := r.Counters(); c.TotalBytes > 64_000 {
			t.Fatalf("%+v", c)
		}
	}
	if c := r.Counters(); len(r.got) != 64 || c.TotalBytes != 64_000 || r.early.first != nil {
		t.Errorf("%d of 64 messages were handed on: %+v", len(r.got), c)
	}
	for who := byte(101); who < 101+64; who++ {
		r.Ack(identity.Identifier{who}, OutboxID{who, 0}, 1)
	}

	early()
	// The peer's own, too: in the same outbox and in others.
	r.got = nil
	for box := range byte(4) {
		r.from(1, box, 1)
	}
	if len(r.got) < 4 {
		t.Errorf("handed on %v", r.got)
	}
	for who := byte(1); who <= 100; who++ {
		r.Gone(uint64(who))
	}
	if c := r.Counters(); c.TotalBytes != c.Unacked*1000 || c.Unacked != len(r.got) || r.use.early != 0 {
		t.Errorf("early data of channels that are gone: %+v, %d early", c, r.use.early)
	}
}

// A sender whose early data was dropped is told that it is missing.
func TestEarlyDataThatWasDroppedIsAskedFor(t *testing.T) {
	r := newRig(ReceiverConfig{PeerBytes: 4_000, TotalBytes: 16_000})
	for count := uint64(2); count < 6; count++ {
		r.from(1, 0, count)
	}
	if st, _ := r.NextState(1); st == nil || !bit(st.Held, 4) {
		t.Fatalf("held: %+v", st)
	}
	for box := byte(1); box < 4; box++ {
		r.from(1, box, 1)
	}
	r.from(1, 0, 7)
	st, _ := r.NextState(1)
	if st == nil || !bit(st.Held, 1) || bit(st.Held, 2) || bit(st.Held, 4) || st.Next != 1 {
		t.Errorf("after three due messages: %+v", st)
	}
}

// Peers whose messages nobody acknowledges leave room for those of others.
func TestPeersLeaveRoomForOthers(t *testing.T) {
	r := newRig(ReceiverConfig{PeerBytes: 64_000, TotalBytes: 64_000})
	for who := byte(1); who <= 10; who++ {
		for box := range byte(100) {
			r.from(who, box, 1)
		}
		if n := r.peers[identity.Identifier{who}].use.bytes; who == 1 && n != 16_000 || n < 1000 {
			t.Errorf("peer %d has %d bytes", who, n)
		}
	}
	if n := r.Counters().TotalBytes; n > 64_000 {
		t.Errorf("%d bytes", n)
	}
}

// take has a peer send the first message of an outbox, and the program acknowledge it.
// It reports whether the program got it.
func (r *rig) take(who int, box uint32) bool {
	id := OutboxID{byte(who), byte(who >> 8)}
	binary.BigEndian.PutUint32(id[4:], box)
	peer := identity.Identifier{byte(who), byte(who >> 8)}
	r.got = r.got[:0]
	r.Data(peer, uint64(who), &Data{
		Header: Header{Outbox: id, Session: 1, Serial: 1, Base: 1}, Count: 1, To: "app",
	}, nil, simStart)
	r.Ack(peer, id, 1)
	r.NextState(uint64(who))
	return len(r.got) == 1
}

// Questions about outboxes that nothing was received of are answered and leave nothing.
func TestQuestionsLeaveNothingBehind(t *testing.T) {
	r := newRig(ReceiverConfig{})
	for who := range 17 {
		for i := range 4096 {
			id := OutboxID{byte(who), byte(i), byte(i >> 8)}
			peer := identity.Identifier{byte(who)}
			r.Ask(peer, 7, &Ask{Header: Header{Outbox: id, Session: 3, Serial: 2, Base: 5}, Last: 9}, simStart)
			want := State{
				Header: Header{Outbox: id, Session: 3, Serial: 2, Base: 5}, Next: 5, Messages: 512, Bytes: 2 << 20,
			}
			if st, ok := r.NextState(7); !ok || !reflect.DeepEqual(*st, want) {
				t.Fatalf("answer %+v, want %+v", st, want)
			}
			r.Settle(peer, 7, &Settle{Header{Outbox: id, Session: 3, Serial: 3, Base: 10}}, simStart)
		}
	}
	if c := r.Counters(); c.Outboxes != 0 || len(r.peers) != 0 {
		t.Errorf("%+v, %d peers", c, len(r.peers))
	}
	if c := r.channels[7]; c.inboxes.first != nil || c.due != nil || c.spares != 0 {
		t.Errorf("the channel has %+v", c)
	}
	// What is withdrawn at once leaves nothing either.
	r.Data(simPeer, 7, &Data{Header: Header{Session: 1, Serial: 1, Base: 1}, Count: 1, Void: true}, nil, simStart)
	if st, ok := r.NextState(7); !ok || st.Base != 2 || r.Counters().Outboxes != 0 {
		t.Errorf("answer %+v, %+v", st, r.Counters())
	}
}

// Where all places are taken, the peer that has most makes room, and what it used last
// stays.
func TestNewcomersFindAPlace(t *testing.T) {
	r := newRig(ReceiverConfig{PeerOutboxes: 16, TotalOutboxes: 64})
	if !r.take(1, 0) || !r.take(2, 0) || !r.take(2, 1) {
		t.Fatal("not handed on")
	}
	for who := 10; who < 20; who++ {
		for box := range uint32(100) {
			r.take(who, box)
		}
	}
	if c := r.Counters(); c.Outboxes != 64 {
		t.Fatalf("%+v", c)
	}
	for who := 100; who < 120; who++ {
		if !r.take(who, 0) {
			t.Errorf("nothing is taken from newcomer %d", who)
		}
	}
	if c := r.Counters(); c.Outboxes != 64 || c.Unacked != 0 {
		t.Errorf("%+v", c)
	}
	for _, known := range []struct {
		who int
		box uint32
	}{{1, 0}, {2, 0}, {2, 1}, {100, 0}, {119, 0}} {
		if r.take(known.who, known.box) {
			t.Errorf("the message of %+v is handed on twice", known)
		}
	}
	sum, busy := 0, 0
	for _, p := range r.peers {
		sum += p.idle
		busy += p.busy
		if p.idle != len(p.inboxes) || p.idle == 0 || p.rank.row != r.ranks[p.idle] {
			t.Errorf("%d of %d are idle", p.idle, len(p.inboxes))
		}
	}
	if sum != 64 || busy != 0 || r.busy != 0 {
		t.Errorf("%d are idle and %d busy, %d in all", sum, busy, r.busy)
	}
}

// Outboxes whose messages nobody acknowledges leave places for those of others.
func TestBusyOutboxesLeavePlacesForOthers(t *testing.T) {
	r := newRig(ReceiverConfig{PeerOutboxes: 64, TotalOutboxes: 64})
	for who := byte(1); who <= 10; who++ {
		for box := range byte(64) {
			r.from(who, box, 1)
		}
		if n := r.peers[identity.Identifier{who}].busy; who == 1 && n != 16 || n < 1 {
			t.Errorf("peer %d has %d", who, n)
		}
	}
}

// However many outboxes are remembered, a new one costs little.
func TestFreshOutboxesCostLittle(t *testing.T) {
	r := newRig(ReceiverConfig{})
	for who := range 16 {
		for box := range uint32(4096) {
			r.take(who+1, box)
		}
	}
	if c := r.Counters(); c.Outboxes != 1<<16 {
		t.Fatalf("%+v", c)
	}
	start := time.Now()
	for i := range 1000 { // each took 35 ms when all were looked at
		r.take(2, uint32(4096+i)) // at its limit
		if !r.take(20, uint32(i)) {
			t.Fatal("a peer that is not at its limit is refused")
		}
	}
	r.Gone(1)
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("2,000 new outboxes took %v", d)
	}
}

// What is withdrawn, or acknowledged, behind a message that is not acknowledged counts as
// long as it has to be remembered.
func TestAcknowledgementsAheadAreBounded(t *testing.T) {
	r := newRig(ReceiverConfig{Messages: 100, PeerBytes: 64_000, TotalBytes: 640_000})
	withdraw := func(box byte, count uint64) {
		serial++
		r.Data(identity.Identifier{1}, 1, &Data{
			Header: Header{Outbox: OutboxID{1, box}, Session: 1, Serial: serial, Base: 1}, Count: count, Void: true,
		}, nil, simStart)
	}
	ahead := func() (n int) {
		for _, in := range r.peers[identity.Identifier{1}].inboxes {
			n += len(in.acked)
		}
		return n
	}
	r.from(1, 0, 1)
	r.from(1, 0, 2)
	r.Ack(identity.Identifier{1}, OutboxID{1, 0}, 2)
	withdraw(0, 3)
	if c := r.Counters(); c.TotalBytes != 1000+2*perMessage || c.Unacked != 1 || ahead() != 2 {
		t.Errorf("%+v, %d ahead", c, ahead())
	}
	for count := uint64(4); count <= MaxWindow; count++ {
		withdraw(0, count)
	}
	if c := r.Counters(); ahead() != 99 || c.TotalBytes != 1000+99*perMessage || c.Unacked != 1 {
		t.Errorf("%+v, %d ahead", c, ahead())
	}
	for box := byte(1); box < 20; box++ {
		r.from(1, box, 1)
		for count := uint64(2); count <= 100; count++ {
			withdraw(box, count)
		}
	}
	if c := r.Counters(); c.TotalBytes > 64_000 || ahead() > 64_000/perMessage {
		t.Errorf("%+v, %d ahead", c, ahead())
	}
	for box := range byte(20) {
		r.Ack(identity.Identifier{1}, OutboxID{1, box}, 1)
	}
	if c := r.Counters(); c.TotalBytes != 0 || c.Unacked != 0 || ahead() != 0 {
		t.Errorf("when all is acknowledged: %+v, %d ahead", c, ahead())
	}
	if in := r.inbox(identity.Identifier{1}, OutboxID{1, 0}); in.base != 101 || in.bytes != 0 || len(in.sizes) != 0 {
		t.Errorf("the first has %+v", in)
	}
}

func TestReceiverForgetsOnlyWhatIsSettled(t *testing.T) {
	r := newRig(ReceiverConfig{PeerOutboxes: 2})
	send := func(box byte, count, base uint64, at time.Time) *State {
		t.Helper()
		serial++
		r.Data(simPeer, 1, &Data{
			Header: Header{Outbox: OutboxID{box}, Session: 1, Serial: serial, Base: base}, Count: count, To: "app",
		}, nil, at)
		st, _ := r.NextState(1)
		return st
	}
	settle := func(box byte, base uint64, at time.Time) {
		r.Settle(simPeer, 1, &Settle{Header{Outbox: OutboxID{box}, Session: 1, Serial: 9e6, Base: base}}, at)
	}
	send(1, 1, 1, simStart)
	send(2, 1, 1, simStart)
	if st := send(3, 1, 1, simStart.Add(48*time.Hour)); st == nil || st.Refusal != RefusalFull {
		t.Errorf("a third, while two have messages open: %+v", st)
	}
	r.Ack(simPeer, OutboxID{1}, 1)
	r.state(t)
	if st := send(3, 1, 1, simStart.Add(time.Hour)); st == nil || st.Refusal != RefusalFull {
		t.Errorf("a third, while one may be asked about: %+v", st)
	}
	settle(1, 2, simStart)
	if st := send(3, 1, 1, simStart.Add(time.Minute)); st == nil || st.Refusal != RefusalFull {
		t.Errorf("a third, while frames of the first may be under way: %+v", st)
	}
	if st := send(3, 1, 1, simStart.Add(time.Hour)); st != nil {
		t.Errorf("a third: %+v", st)
	}
	if c := r.Counters(); c.Outboxes != 2 || len(r.peers) != 1 {
		t.Errorf("%+v, %d peers", c, len(r.peers))
	}
	// Who is refused leaves nothing behind.
	for i := range 20000 {
		var id OutboxID
		binary.BigEndian.PutUint32(id[:], uint32(i))
		r.Ask(identity.Identifier{5, byte(i)}, 2, &Ask{Header: Header{Outbox: id, Session: 1, Serial: 1, Base: 1}}, simStart)
	}
	if n := len(r.channels[2].due); n > maxSpares || r.Counters().Outboxes != 2 || len(r.peers) != 1 {
		t.Errorf("%d answers wait, %+v, %d peers", n, r.Counters(), len(r.peers))
	}
	r.Gone(2)
	if r.channels[2] != nil {
		t.Error("answers for a channel that is gone")
	}
}

func TestReceiverRefusesAndGoesOn(t *testing.T) {
	r := newRig(ReceiverConfig{})
	r.refuse = RefusalUnknown
	r.data(0, 1, 1, 1)
	if st := r.state(t); st.Refusal != RefusalUnknown || st.Next != 1 {
		t.Errorf("refused: %+v", st)
	}
	r.refuse = RefusalNone
	r.data(0, 1, 1, 1)
	r.data(0, 2, 1, 1)
	want(t, "handed on", r.got, []uint64{1, 2})
	// The program's queue was closed with both in it.
	for _, c := range []uint64{1, 2} {
		r.Return(simPeer, OutboxID{0}, c)
	}
	if st := r.state(t); st.Next != 1 {
		t.Errorf("returned: %+v", st)
	}
	if r.Ack(simPeer, OutboxID{0}, 1) != 0 {
		t.Error("acknowledged what is to be handed on again")
	}
	r.data(0, 1, 1, 1)
	r.data(0, 2, 1, 1)
	want(t, "handed on again", r.got, []uint64{1, 2, 1, 2})
	if c := r.Counters(); c.Unacked != 2 {
		t.Errorf("%+v", c)
	}
}

// What an earlier channel still brings is dropped, and the sender of a later process
// that numbers its sessions anew learns where to go on.
func TestReceiverDropsEarlierSessions(t *testing.T) {
	r := newRig(ReceiverConfig{})
	d := &Data{Header: Header{Session: 5, Serial: 1, Base: 1}, Count: 1, To: "app"}
	r.Data(simPeer, 1, d, nil, simStart)
	late := *d
	late.Session, late.Count = 4, 2
	r.Data(simPeer, 2, &late, nil, simStart)
	want(t, "handed on", r.got, []uint64{1})
	if st, ok := r.NextState(2); !ok || st.Session != 5 {
		t.Errorf("answer %+v", st)
	}
	if c := r.Counters(); c.Stale != 1 {
		t.Errorf("%+v", c)
	}
}

// The word that all is settled can be lost; a receiver then holds what overtook the
// last message for as long as it remembers the outbox (simulation, seed 100404).
func TestSettleIsSaidAgainOnTheNextChannel(t *testing.T) {
	s := attached(1)
	drain(s, simStart)
	s.Receive(&State{Header: Header{Session: 1, Serial: 1, Base: 2}, Next: 2, Messages: 10, Bytes: 1000}, simStart)
	drain(s, s.Wake())
	s.Detach()
	s.Attach([16]byte{1})
	out := drain(s, simStart)
	if len(out) != 1 || out[0].(*Settle).Base != 2 || out[0].(*Settle).Session != 2 {
		t.Fatalf("said %v", out)
	}

	r := newRig(ReceiverConfig{PeerOutboxes: 1})
	r.data(0, 2, 1, 100) // 1 is settled and its place was lost
	r.data(1, 1, 1, 1)
	if c := r.Counters(); c.Outboxes != 1 || c.Unacked != 1 {
		t.Fatalf("%+v", c)
	}
	serial++
	r.Data(simPeer, 1, &Data{Header: Header{Outbox: OutboxID{1}, Session: 1, Serial: serial, Base: 1}, Count: 1, To: "app"},
		nil, simStart.Add(unsettledMemory))
	if c := r.Counters(); c.Outboxes != 1 || c.TotalBytes != perMessage {
		t.Errorf("what was held stays: %+v", c)
	}
}
