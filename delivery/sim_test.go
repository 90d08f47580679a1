package delivery

import (
	"container/heap"
	"encoding/binary"
	"flag"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

var (
	simSeeds = flag.Int("sim.seeds", 2000, "how many seeds the simulation runs")
	simFirst = flag.Uint64("sim.first", 1, "the first seed")
	simTrace = flag.Bool("sim.trace", false, "log every step")
)

// sim is a sender, a receiver and a network in one process, with a clock of its
// own. Everything happens in the order that the seed says.
type sim struct {
	t     *testing.T
	seed  uint64
	rng   *rand.Rand
	now   time.Time
	queue events
	order uint64

	faults  bool
	loss    float64
	repeat  float64
	spread  int // ms of latency that vary
	durable bool

	// The sender's process and its disk.
	snd      *Sender
	life     int // of the sender's process
	disk     map[uint64]*stored
	log      [][]byte // on its way to the disk
	diskNext uint64
	epoch    [16]byte // as kept on disk
	mark     uint64
	kept     bool

	// The receiver's process and what its program keeps.
	rcv      *Receiver
	rcvLife  int
	rcvEpoch [16]byte
	handed   map[uint64]bool // in this life
	lastHand uint64          // in this life
	ever     map[uint64]bool // handed in an earlier life
	taken    map[uint64]bool // kept by the program
	lastTake uint64
	refusing bool
	mailbox  []Item

	channel  uint64 // present one of the sender; 0: none
	attempt  uint64
	channels map[uint64]*simChannel

	contents  map[uint64][]byte // of accepted messages, by count
	withdrawn map[uint64]bool
	settled   map[uint64]bool // acknowledged, as the sender's program was told
	added     int
	faultsBy  map[string]int
}

type stored struct {
	payload []byte
	void    bool
}

// simChannel is one channel: the receiver's process that it leads to, and whether
// that still listens.
type simChannel struct {
	life int
	open bool // the receiver takes what comes
}

type event struct {
	at    time.Time
	order uint64
	fn    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

func (s *sim) after(d time.Duration, fn func()) {
	s.order++
	heap.Push(&s.queue, event{s.now.Add(d), s.order, fn})
}

func (s *sim) ms(low, high int) time.Duration {
	return time.Duration(low+s.rng.IntN(high-low+1)) * time.Millisecond
}

func (s *sim) chance(p float64) bool { return s.faults && s.rng.Float64() < p }

func (s *sim) logf(format string, args ...any) {
	if *simTrace {
		s.t.Logf("%8.3f "+format, append([]any{float64(s.now.UnixMilli()) / 1000}, args...)...)
	}
}

func (s *sim) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("seed %d at %v: "+format, append([]any{s.seed, s.now.Sub(time.Unix(0, 0))}, args...)...)
}

func (s *sim) fault(name string) {
	s.faultsBy[name]++
	s.logf("fault: %s", name)
}

var simOutbox = OutboxID{1, 2, 3}
var simPeer = identity.Identifier{9}

func newSim(t *testing.T, seed uint64) *sim {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &sim{
		t: t, seed: seed, rng: rng, now: time.Unix(0, 0), faults: true,
		loss: []float64{0, 0, 0.01, 0.1, 0.4}[rng.IntN(5)], repeat: []float64{0, 0.02, 0.2}[rng.IntN(3)],
		spread: []int{0, 0, 5, 60}[rng.IntN(4)], durable: rng.IntN(2) == 0,
		disk: make(map[uint64]*stored), diskNext: 1, ever: make(map[uint64]bool), taken: make(map[uint64]bool),
		channels: make(map[uint64]*simChannel), contents: make(map[uint64][]byte),
		withdrawn: make(map[uint64]bool), settled: make(map[uint64]bool), faultsBy: make(map[string]int),
	}
	s.snd = NewSender(s.senderConfig())
	s.startReceiver()
	return s
}

func (s *sim) senderConfig() SenderConfig {
	return SenderConfig{Outbox: simOutbox, Jitter: func(d time.Duration) time.Duration {
		return d/2 + time.Duration(s.rng.Int64N(int64(d)))
	}}
}

func (s *sim) startReceiver() {
	s.rcvLife++
	for c := range s.handed {
		s.ever[c] = true
	}
	s.handed, s.lastHand, s.mailbox = make(map[uint64]bool), 0, nil
	binary.BigEndian.PutUint64(s.rcvEpoch[:], uint64(s.rcvLife))
	cfg := ReceiverConfig{Hand: s.hand}
	if s.rng.IntN(2) == 0 {
		cfg.Messages, cfg.Bytes = 1+s.rng.IntN(8), 200
	}
	if s.rng.IntN(4) == 0 {
		cfg.PeerBytes, cfg.TotalBytes = 2000, 8000
	}
	s.rcv = NewReceiver(cfg)
}

// payload makes contents that name themselves.
func (s *sim) payload(life, n int) []byte {
	b := make([]byte, 12+s.rng.IntN(120))
	binary.BigEndian.PutUint32(b[4:], uint32(life))
	binary.BigEndian.PutUint32(b[8:], uint32(n))
	binary.BigEndian.PutUint32(b, crc32.ChecksumIEEE(b[4:]))
	return b
}

// add is the sender's program: it gives a message to the outbox, and perhaps takes
// it back later.
func (s *sim) add() {
	s.added++
	p := s.payload(s.life, s.added)
	own := append([]byte(nil), p...)
	count := s.snd.Add("app", own, !s.durable)
	s.logf("add %d", count)
	accept := func(count uint64, p []byte) {
		s.contents[count] = p
		s.disk[count] = &stored{payload: p}
		s.diskNext = count + 1
	}
	if !s.durable {
		accept(count, p)
	} else {
		life := s.life
		s.log = append(s.log, p) // the log commits in order
		s.after(s.ms(0, 5), func() {
			for life == s.life && s.diskNext <= count {
				c := s.diskNext
				accept(c, s.log[0])
				s.log = s.log[1:]
				s.snd.Ready(c)
			}
			s.pump()
		})
	}
	if s.chance(0.03) {
		life := s.life
		s.after(s.ms(0, 300), func() {
			if life == s.life && s.snd.Withdraw(count) {
				s.fault("withdraw")
				s.withdrawn[count] = true
				if d := s.disk[count]; d != nil {
					d.void, d.payload = true, nil
				}
				s.pump()
			}
		})
	}
	s.pump()
}

// pump sends what both ends have to say.
func (s *sim) pump() {
	for {
		m, ok := s.snd.Next(s.now)
		if !ok {
			break
		}
		s.carry(s.channel, m, true)
	}
	for _, ch := range slices.Sorted(maps.Keys(s.channels)) {
		for {
			st, ok := s.rcv.NextState(ch)
			if !ok {
				break
			}
			s.carry(ch, st, false)
		}
	}
	if wake := s.snd.Wake(); !wake.IsZero() {
		s.after(max(wake.Sub(s.now), time.Millisecond), func() {
			if w := s.snd.Wake(); !w.IsZero() && !w.After(s.now) {
				s.pump()
			}
		})
	}
}

// carry brings a message to the other end, or not.
func (s *sim) carry(ch uint64, m Message, toReceiver bool) {
	b := m.Append(nil)
	s.logf("send on %d: %T %+v", ch, m, m)
	copies := 1
	if s.chance(s.loss) {
		s.faultsBy["loss"]++
		copies = 0
	} else if s.chance(s.repeat) {
		s.faultsBy["repeat"]++
		copies = 2
	}
	life, rcvLife := s.life, s.rcvLife
	for range copies {
		d := 5 * time.Millisecond
		if s.spread > 0 && s.faults {
			d += s.ms(0, s.spread)
		}
		s.after(d, func() {
			m, err := Parse(b)
			if err != nil {
				s.fatalf("parse: %v", err)
			}
			switch {
			case toReceiver && rcvLife == s.rcvLife && s.channels[ch] != nil && s.channels[ch].open:
				s.arrive(ch, m)
			case !toReceiver && life == s.life && ch == s.channel:
				for _, c := range s.snd.Receive(m.(*State), s.now) {
					s.acknowledged(c)
				}
			}
			s.pump()
		})
	}
}

func (s *sim) acknowledged(c uint64) {
	if !s.taken[c] && !s.withdrawn[c] {
		s.fatalf("count %d acknowledged, and the program never took it", c)
	}
	s.settled[c] = true
	if s.chance(0.1) {
		s.fault("acknowledgement not kept")
		return // the record of it will be missing after a crash
	}
	delete(s.disk, c)
}

func (s *sim) arrive(ch uint64, m Message) {
	s.logf("arrives on %d: %T %+v", ch, m, m)
	switch m := m.(type) {
	case *Data:
		s.rcv.Data(simPeer, ch, m, nil, s.now)
	case *Ask:
		s.rcv.Ask(simPeer, ch, m, s.now)
	case *Settle:
		s.rcv.Settle(simPeer, ch, m, s.now)
	}
	if n := s.rcv.Counters().Unacked; n > s.rcv.cfg.Messages {
		s.fatalf("%d messages in a window of %d", n, s.rcv.cfg.Messages)
	}
}

// hand is the receiver's node.
func (s *sim) hand(it Item) Refusal {
	switch {
	case s.refusing:
		return RefusalUnknown
	case s.handed[it.Count]:
		s.fatalf("count %d handed on twice by one process", it.Count)
	case it.Count <= s.lastHand:
		s.fatalf("count %d handed on after %d", it.Count, s.lastHand)
	case string(it.Payload) != string(s.contents[it.Count]):
		s.fatalf("count %d altered", it.Count)
	case s.ever[it.Count] && !it.Redelivered:
		s.fatalf("count %d comes again and is not marked", it.Count)
	}
	s.logf("handed %d", it.Count)
	s.handed[it.Count], s.lastHand = true, it.Count
	s.mailbox = append(s.mailbox, it)
	life := s.rcvLife
	s.after(s.ms(0, 30), func() {
		if life == s.rcvLife {
			s.read(life)
		}
	})
	return RefusalNone
}

// read is the receiver's program: it takes a message, keeps its id, and
// acknowledges it, perhaps later.
func (s *sim) read(life int) {
	if len(s.mailbox) == 0 {
		return
	}
	it := s.mailbox[0]
	s.mailbox = s.mailbox[1:]
	s.after(s.ms(0, 40), func() {
		if life != s.rcvLife {
			return
		}
		if !s.taken[it.Count] && s.withdrawn[it.Count] {
			s.logf("took the withdrawn %d", it.Count)
		}
		s.taken[it.Count] = true
		s.lastTake = max(s.lastTake, it.Count)
		if s.chance(0.05) {
			s.after(s.ms(100, 3000), func() { s.ack(life, it.Count) }) // a slow one
			return
		}
		s.ack(life, it.Count)
	})
}

func (s *sim) ack(life int, count uint64) {
	if life == s.rcvLife {
		s.logf("ack %d", count)
		s.rcv.Ack(simPeer, simOutbox, count)
		s.pump()
	}
}

// dial makes a channel, if there is none, after a while.
func (s *sim) dial(d time.Duration) {
	s.attempt++
	attempt := s.attempt
	s.after(d, func() {
		if s.channel != 0 || attempt != s.attempt {
			return
		}
		s.channel = attempt
		s.channels[attempt] = &simChannel{life: s.rcvLife, open: true}
		s.logf("channel %d", attempt)
		s.mark = s.snd.Attach(s.rcvEpoch)
		s.epoch, s.kept = s.rcvEpoch, true
		s.pump()
	})
}

// hangUp ends the present channel; the receiver may hear of it much later.
func (s *sim) hangUp() {
	if s.channel == 0 {
		return
	}
	ch := s.channel
	s.channel = 0
	s.snd.Detach()
	s.after(s.ms(0, 400), func() {
		if c := s.channels[ch]; c != nil && c.open {
			c.open = false
			if c.life == s.rcvLife {
				s.rcv.Gone(ch)
			}
			delete(s.channels, ch)
		}
	})
	s.dial(s.ms(1, 200))
}

func (s *sim) trouble() {
	if !s.faults {
		return
	}
	switch s.rng.IntN(6) {
	case 0, 1:
		s.fault("channel breaks")
		s.hangUp()
	case 2:
		s.fault("receiver restarts")
		s.startReceiver()
		for ch := range s.channels {
			delete(s.channels, ch)
		}
		s.after(s.ms(0, 100), s.hangUp) // noticed later
	case 3:
		if s.durable {
			s.fault("sender restarts")
			s.restartSender()
		}
	case 4:
		s.fault("address unknown")
		s.refusing = true
		s.after(s.ms(10, 2000), func() { s.refusing = false })
	case 5:
		if n := len(s.mailbox); n > 0 {
			s.fault("mailbox dropped")
			for _, it := range s.mailbox {
				delete(s.handed, it.Count)
				s.lastHand = min(s.lastHand, it.Count-1)
			}
			for _, it := range s.mailbox {
				s.rcv.Return(simPeer, simOutbox, it.Count)
			}
			s.mailbox = nil
			s.pump()
		}
	}
	s.after(s.ms(20, 1500), s.trouble)
}

func (s *sim) restartSender() {
	s.life++
	s.channel, s.log = 0, nil
	r := Restored{Next: s.diskNext, Epoch: s.epoch, Mark: s.mark, HasEpoch: s.kept}
	for c := uint64(1); c < s.diskNext; c++ {
		if d := s.disk[c]; d != nil {
			r.Pending = append(r.Pending, Stored{Count: c, Void: d.void, To: "app", Payload: append([]byte(nil), d.payload...)})
		}
	}
	s.snd = RestoreSender(s.senderConfig(), r)
	s.dial(s.ms(1, 100))
}

func (s *sim) run() {
	const messages = 60
	s.dial(0)
	for range messages {
		s.after(s.ms(0, 4000), s.add)
	}
	s.after(s.ms(20, 1000), s.trouble)
	s.after(6*time.Second, func() {
		s.faults, s.refusing = false, false
		s.hangUp()
		s.dial(0)
	})
	for len(s.queue) > 0 {
		e := heap.Pop(&s.queue).(event)
		s.now = e.at
		if s.now.After(time.Unix(600, 0)) {
			s.fatalf("no end: %d open, %+v", s.snd.open, s.rcv.Counters())
		}
		e.fn()
	}
	if s.snd.open != 0 || len(s.snd.items) != 0 || s.snd.bytes != 0 || s.snd.flying != 0 || s.snd.flyingBytes != 0 {
		s.fatalf("left in the outbox: %d open, %d items, %d bytes, %d flying (%d bytes)",
			s.snd.open, len(s.snd.items), s.snd.bytes, s.snd.flying, s.snd.flyingBytes)
	}
	for c := range s.contents {
		if !s.taken[c] && !s.withdrawn[c] {
			s.fatalf("count %d was accepted and never arrived", c)
		}
	}
	if c := s.rcv.Counters(); c.TotalBytes != 0 || c.Unacked != 0 {
		s.fatalf("left at the receiver: %+v", c)
	}
}

// TestSimulation runs both state machines under every kind of fault at once.
// Replay a seed with -sim.first=N -sim.seeds=1 -sim.trace.
func TestSimulation(t *testing.T) {
	seeds := *simSeeds
	if testing.Short() {
		seeds = min(seeds, 300)
	}
	faults, messages := make(map[string]int), 0
	for i := range uint64(seeds) {
		s := newSim(t, *simFirst+i)
		s.run()
		messages += len(s.contents)
		for k, n := range s.faultsBy {
			faults[k] += n
		}
	}
	t.Logf("seeds %d to %d: %d messages, faults %v", *simFirst, *simFirst+uint64(seeds)-1, messages, faults)
	for _, k := range []string{
		"loss", "repeat", "withdraw", "acknowledgement not kept", "channel breaks", "receiver restarts",
		"sender restarts", "address unknown", "mailbox dropped",
	} {
		if faults[k] == 0 && seeds > 100 {
			t.Errorf("the runs had no fault of the kind %q", k)
		}
	}
}
