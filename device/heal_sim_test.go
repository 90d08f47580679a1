package device

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

var (
	healSeeds = flag.Int("heal.seeds", 200, "how many seeds the simulation of healing channels runs")
	healFirst = flag.Uint64("heal.first", 1, "the first seed")
	healTrace = flag.Bool("heal.trace", false, "log what happens")
)

// What the simulation holds channels to, once the faults have ended. A device may wait 30 s
// for its next attempt to reach the hub; then see docs/protocol-delivery.md, "Channels".
const (
	backAtHub  = 30 * time.Second
	deadAfter  = 20 * time.Second // a channel with something to say
	idleAfter  = 2*time.Minute + deadAfter
	madeAgain  = 15*time.Second + 5*time.Second // the longest pause, and the handshake
	faultsLast = 60 * time.Second
)

// healSim is two devices and a hub in one process, with a virtual clock. The nodes, their
// channels and the hub's router are the real ones; the connections between them are not:
// they lose, repeat and reorder what they carry, as the seed says.
type healSim struct {
	t    *testing.T
	seed uint64

	hubID *identity.Private
	names [2]*identity.Private // alice, who dials, and bob

	mu     sync.Mutex
	rng    *rand.Rand // of the schedule
	faults bool       // connections misbehave
	loss   float64
	repeat float64
	late   float64
	hub    *bridge.Bridge // nil: down
	key    byte
	count  map[string]int

	logger   *slog.Logger   // alice's; nil: none
	limits   streamLimits   // of each of alice's outboxes
	slow     time.Duration  // how long bob's program takes before it listens
	channels channel.Limits // bob's
	firsts   int            // first contacts that may wait for one device; 0: the default

	run    [2]*process // nil: not running
	lives  [2]int
	tasks  sync.WaitGroup
	stream bool   // alice is at the hub's TCP listener
	dials  bool   // alice dials and delivers through a channel, not an outbox
	dir    string // of alice's outbox; empty: in memory
	asked  []ForwarderOption
	to     route.Route // of bob's listener
	box    *Outbox
	posted uint64
	lost   chan time.Time // alice's channel was found to be broken
	missed chan Event     // alice's node cannot find bob

	forwarder chan *Forwarder // bob's

	ids     map[MessageID]int    // guarded by mu: the process of bob's that took it last
	taken   map[uint64]bool      // guarded by mu: kept by bob's program
	named   map[uint64]MessageID // guarded by mu: by which each came last
	acked   map[uint64]bool      // guarded by mu: as alice's program was told
	slowest time.Duration

	restored atomic.Bool  // since a test has asked
	poison   atomic.Int64 // packets of more bytes end their connection; 0: none
}

func (s *healSim) logf(format string, args ...any) {
	if *healTrace {
		s.t.Logf("%9.3f "+format, append([]any{time.Since(epoch2000).Seconds()}, args...)...)
	}
}

// epoch2000 is when every bubble's clock begins.
var epoch2000 = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func (s *healSim) fault(name string) {
	s.mu.Lock()
	s.count[name]++
	s.mu.Unlock()
	s.logf("fault: %s", name)
}

// simWay is how the process of one device reaches the hub.
type simWay struct {
	s    *healSim
	who  int
	mu   sync.Mutex
	rng  *rand.Rand
	dead bool // the process was killed
	open *simLink
	held time.Time // nothing passes before
}

// fate says what becomes of the next packet: how often it arrives, and how late.
func (w *simWay) fate() (copies int, late time.Duration) {
	w.s.mu.Lock()
	on, loss, repeat, spread := w.s.faults, w.s.loss, w.s.repeat, w.s.late
	w.s.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	a, b, c := w.rng.Float64(), w.rng.Float64(), w.rng.IntN(400)
	switch {
	case !on:
		return 1, 0
	case a < loss:
		return 0, 0
	case a < loss+repeat:
		copies = 2
	default:
		copies = 1
	}
	if b < spread {
		late = time.Duration(c) * time.Millisecond
	}
	return copies, late
}

func (w *simWay) dial(_ context.Context, ev linkEvents) (link, error) {
	time.Sleep(5 * time.Millisecond)
	w.s.mu.Lock()
	hub := w.s.hub
	w.s.mu.Unlock()
	w.mu.Lock()
	dead := w.dead
	w.mu.Unlock()
	if hub == nil || dead {
		return nil, errLinkDown
	}
	l := &simLink{w: w, ev: ev, ended: make(chan struct{})}
	l.up.wake, l.down.wake = make(chan struct{}, 1), make(chan struct{}, 1)
	id := w.s.names[w.who].Identifier()
	var port *bridge.Link
	var err error
	if l.stream = w.s.stream && w.who == alice; l.stream {
		port, err = hub.ConnectStream(bridge.Principal{Role: bridge.RoleDevice}, l)
	} else {
		port, err = hub.ConnectDevice(bridge.Principal{Identity: id, ClientID: id.String(), Role: bridge.RoleDevice, Proven: true}, l)
	}
	if err != nil {
		return nil, err
	}
	l.port.Store(port)
	w.mu.Lock()
	w.open = l
	w.mu.Unlock()
	l.tasks.Go(func() { l.up.carry(l) })
	l.tasks.Go(func() { l.down.carry(l) })
	if !l.stream {
		port.Subscribed()
	}
	return l, nil
}

// cut ends the connection; the hub hears of it later, or when the device comes again.
func (w *simWay) cut() {
	w.mu.Lock()
	l := w.open
	w.mu.Unlock()
	if l != nil {
		l.end(errLinkDown)
	}
}

// simLink is one connection, at once the device's link and the hub's.
type simLink struct {
	w        *simWay
	stream   bool // without acknowledgements, and with a hub address of its own, as over TCP
	ev       linkEvents
	port     atomic.Pointer[bridge.Link] // set by dial, when the hub may use the connection already
	up, down pipeline
	tasks    sync.WaitGroup

	once  sync.Once
	ended chan struct{}
	cause error

	toHub, toDevice sync.Mutex // one packet at a time
}

// pipeline carries packets one way, in order but for those that are late.
type pipeline struct {
	mu    sync.Mutex
	queue []simPacket
	wake  chan struct{}
}

type simPacket struct {
	at     time.Time
	arrive func()
	gone   func() // the sender is to believe that a lost packet has arrived
}

func (p *pipeline) put(arrive, gone func()) {
	p.mu.Lock()
	p.queue = append(p.queue, simPacket{time.Now().Add(3 * time.Millisecond), arrive, gone})
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *pipeline) carry(l *simLink) {
	for {
		p.mu.Lock()
		var pk simPacket
		if len(p.queue) > 0 {
			pk, p.queue = p.queue[0], p.queue[1:]
		}
		p.mu.Unlock()
		if pk.arrive == nil {
			select {
			case <-p.wake:
				continue
			case <-l.ended:
				return
			}
		}
		l.w.mu.Lock()
		until := l.w.held
		l.w.mu.Unlock()
		if pk.at.After(until) {
			until = pk.at
		}
		select {
		case <-time.After(time.Until(until)):
		case <-l.ended:
			return
		}
		copies, late := l.w.fate()
		for range copies {
			if late == 0 {
				pk.arrive()
				continue
			}
			l.tasks.Go(func() {
				select {
				case <-time.After(late):
					pk.arrive()
				case <-l.ended:
				}
			})
		}
		if copies == 0 || late != 0 {
			pk.gone()
		}
	}
}

// The device's side.

func (l *simLink) send(p *packet) error {
	if l.over() {
		return errLinkDown
	}
	packets := p.frames
	if !l.stream {
		packets = [][]byte{slices.Concat(p.frames...)} // a bundle
	}
	class, token := p.class, p.token
	for _, payload := range packets {
		if most := int(l.w.s.poison.Load()); most > 0 && len(payload) > most {
			time.AfterFunc(10*time.Millisecond, func() { l.end(errLinkDown) })
			return nil
		}
		l.up.put(func() {
			l.toHub.Lock()
			defer l.toHub.Unlock()
			_ = l.port.Load().Receive(slices.Clone(payload), class, l, token)
		}, func() { l.Acked(token) })
	}
	if l.stream {
		l.Acked(token)
	}
	return nil
}

func (l *simLink) over() bool {
	select {
	case <-l.ended:
		return true
	default:
		return false
	}
}

func (l *simLink) end(err error) {
	l.once.Do(func() {
		l.cause = err
		close(l.ended)
		time.AfterFunc(4*time.Second, func() { l.port.Load().Close(false) })
	})
}

func (l *simLink) done() <-chan struct{} { return l.ended }
func (l *simLink) err() error            { return l.cause }
func (l *simLink) info() linkInfo        { return linkInfo{acks: !l.stream, hello: true, remote: "sim"} }
func (l *simLink) close(bool) {
	l.end(ErrClosed)
	l.tasks.Wait()
}

// The hub's side.

func (l *simLink) Acked(token uint64) {
	if token != 0 && !l.over() {
		l.ev.acked(token)
	}
}

func (l *simLink) Deliver(entries []bridge.Entry) int {
	for _, e := range entries {
		l.hand(slices.Clone(e.Frame), e.Class, func() { l.port.Load().Delivered(e.Seq) })
	}
	return len(entries)
}

func (l *simLink) Direct(frame []byte) bool {
	l.hand(slices.Clone(frame), route.Transient, func() {})
	return true
}

func (l *simLink) hand(frame []byte, class route.Class, ack func()) {
	l.down.put(func() {
		l.toDevice.Lock()
		defer l.toDevice.Unlock()
		if !l.over() {
			l.ev.frames(slices.Clone(frame), !l.stream, class)
			ack()
		}
	}, ack)
}

func (l *simLink) Kick(bridge.KickReason) { l.end(errLinkDown) }

const (
	alice = iota
	bob
)

func newHealSim(t *testing.T, seed uint64) *healSim {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &healSim{
		t: t, seed: seed, rng: rng, faults: true,
		loss: []float64{0, 0.01, 0.1, 0.3}[rng.IntN(4)], repeat: []float64{0, 0.02, 0.2}[rng.IntN(3)],
		late: []float64{0, 0.05, 0.3}[rng.IntN(3)], count: make(map[string]int),
		ids: make(map[MessageID]int), taken: make(map[uint64]bool), acked: make(map[uint64]bool),
		lost: make(chan time.Time, 1), missed: make(chan Event, 8), forwarder: make(chan *Forwarder, 1000),
		stream: seed%3 == 0, dials: seed%2 == 0, named: make(map[uint64]MessageID), asked: []ForwarderOption{Alias("bob")}, to: route.To("forward_to_bob"),
	}
	if seed%8 == 1 {
		s.dir = filepath.Join(t.TempDir(), "outbox")
	}
	for _, p := range []**identity.Private{&s.hubID, &s.names[alice], &s.names[bob]} {
		var err error
		if *p, err = identity.Create(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *healSim) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("seed %d at %v: "+format, append([]any{s.seed, time.Since(epoch2000)}, args...)...)
}

func (s *healSim) errorf(format string, args ...any) {
	s.t.Helper()
	s.t.Errorf("seed %d at %v: "+format, append([]any{s.seed, time.Since(epoch2000)}, args...)...)
}

// startHub starts a hub that knows what state says.
func (s *healSim) startHub(state *bridge.State) {
	cfg := bridge.Config{Key: [32]byte{1, s.key}, Identity: bridge.IdentitySigner(s.hubID), FirstContactFrames: s.firsts}
	if s.seed%5 == 0 {
		cfg.OutboxFrames = 4 // full whenever a device is away
	}
	b, err := bridge.New(cfg)
	if err == nil && state != nil {
		err = b.Restore(*state)
	}
	if err != nil {
		s.fatalf("hub: %v", err)
	}
	s.mu.Lock()
	s.hub = b
	s.mu.Unlock()
}

// stopHub ends the hub and checks its books. It returns what a journal would have kept.
func (s *healSim) stopHub() *bridge.State {
	s.mu.Lock()
	b := s.hub
	s.hub = nil
	s.mu.Unlock()
	if b == nil {
		return nil
	}
	state := b.State()
	if c := b.Counters(); c.Lost() != 0 {
		s.errorf("%d frames at the hub have no fate", c.Lost())
	}
	if err := b.Close(); err != nil {
		s.errorf("hub: %v", err)
	}
	return &state
}

// process is one start of a device's program.
type process struct {
	node *Node
	way  *simWay
	live context.Context // ends when it is killed
	end  context.CancelFunc

	gone chan struct{}
	turn chan struct{}
	ch   *Channel // guarded by turn: alice's, where she dials
}

// startAll starts the hub, bob, and alice once bob has his forwarder.
func (s *healSim) startAll() {
	s.startHub(nil)
	s.start(bob)
	<-s.forwarder
	s.start(alice)
}

func (s *healSim) start(who int) {
	s.lives[who]++
	w := &simWay{s: s, who: who, rng: rand.New(rand.NewPCG(s.seed, uint64(10*s.lives[who]+who)))}
	cfg := Config{Identity: s.names[who], KeepTrying: true}
	if who == bob {
		cfg.ChannelLimits = s.channels
	}
	if who == alice {
		cfg.OutboxDir, cfg.Logger = s.dir, s.logger
		cfg.OutboxMessages, cfg.OutboxBytes = s.limits.messages, s.limits.bytes
		cfg.OnEvent = func(e Event) {
			s.logf("alice: %v %v", e.Kind, e.Err)
			switch e.Kind {
			case EventChannelLost:
				select {
				case s.lost <- e.Time:
				default:
				}
			case EventPeerLost, EventWrongPeer:
				s.missed <- e
			case EventChannelRestored:
				s.restored.Store(true)
			}
		}
	}
	url := "mqtt://sim.invalid:1883"
	if s.stream && who == alice {
		url = "tcp://sim.invalid:4000"
	}
	u, err := parseURL(url)
	if err != nil {
		s.fatalf("%v", err)
	}
	if cfg, err = cfg.resolved(u); err != nil {
		s.fatalf("%v", err)
	}
	n, err := newNode(u, cfg)
	if err != nil {
		s.fatalf("%v", err)
	}
	n.link.dialer = w
	run, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	go n.link.run(run)
	p := &process{node: n, way: w, turn: make(chan struct{}, 1), gone: make(chan struct{})}
	p.live, p.end = context.WithCancel(context.Background())
	s.run[who] = p
	if who == bob {
		s.tasks.Go(func() { s.serve(p, s.lives[bob]) })
		s.tasks.Go(func() { s.listen(p) })
		return
	}
	if !s.dials {
		var err error
		if s.box, err = p.node.Outbox(Destination{Route: s.to, Peer: s.names[bob].Identifier()}, "app"); err != nil {
			s.fatalf("%v", err)
		}
	}
	if s.dir != "" {
		return // what an earlier process has posted is there
	}
	// What an earlier process was not told of goes out again.
	for no := uint64(1); no <= s.posted; no++ {
		if !s.isAcked(no) {
			s.send(no)
		}
	}
}

// kill ends a process that can tell nobody.
func (s *healSim) kill(who int) bool {
	p := s.run[who]
	if p == nil {
		return false
	}
	s.run[who] = nil
	p.way.mu.Lock()
	p.way.dead = true
	p.way.mu.Unlock()
	p.way.cut()
	p.end()
	s.tasks.Go(func() {
		_ = p.node.Close()
		close(p.gone)
	})
	if s.dir != "" {
		<-p.gone // its folder is free
	}
	return true
}

// listen is how bob's program becomes reachable.
func (s *healSim) listen(p *process) {
	time.Sleep(s.slow)
	if _, err := p.node.Listen("listener", channel.TrustIdentifiers(s.names[alice].Identifier())); err != nil {
		s.errorf("%v", err)
		return
	}
	for p.live.Err() == nil {
		f, err := p.node.CreateForwarder(p.live, "listener", s.asked...)
		if err == nil {
			s.forwarder <- f
			return
		}
		time.Sleep(time.Second)
	}
}

// serve is bob's program: it keeps each message with its id and acknowledges it.
func (s *healSim) serve(p *process, life int) {
	last := make(map[[16]byte]uint64)
	for {
		m, err := p.node.Receive(p.live, "app")
		if err != nil {
			return
		}
		s.mu.Lock()
		before := s.ids[m.ID]
		switch {
		case m.ID.Count <= last[m.ID.Outbox]:
			s.errorf("%v handed on after %d", m.ID, last[m.ID.Outbox])
		case before != 0 && !m.Redelivered:
			s.errorf("%v came to process %d already, and is not marked", m.ID, before)
		}
		no := binary.BigEndian.Uint64(m.Payload)
		if other, ok := s.named[no]; ok && other != m.ID && s.dir != "" {
			s.errorf("message %d is %v and %v", no, other, m.ID)
		}
		last[m.ID.Outbox], s.ids[m.ID] = m.ID.Count, life
		s.taken[no], s.named[no] = true, m.ID
		s.mu.Unlock()
		_ = m.Ack() // fails when the process ends
	}
}

// dial returns alice's channel. One without hello, as of a stock peer, she gives up.
func (p *process) dial(s *healSim) *Channel {
	p.turn <- struct{}{} // not a mutex: the clock stands still while somebody waits for one
	defer func() { <-p.turn }()
	for p.live.Err() == nil {
		if p.ch != nil && p.ch.Err() == nil {
			return p.ch
		}
		p.ch, _ = p.node.Dial(p.live, s.to, channel.TrustIdentifiers(s.names[bob].Identifier()))
		if p.ch == nil {
			time.Sleep(time.Second)
		}
	}
	return nil
}

// through delivers a message through the channel, again and again.
func (s *healSim) through(p *process, no uint64) {
	for {
		ch := p.dial(s)
		if ch == nil {
			return
		}
		err := ch.Deliver(p.live, "app", binary.BigEndian.AppendUint64(nil, no))
		switch {
		case err == nil:
			s.gotAck(no)
			return
		case errors.Is(err, ErrNoDelivery):
			p.turn <- struct{}{}
			_ = ch.Close() // before another one is dialled
			<-p.turn
		case ch.Err() != nil && !errors.Is(ch.Err(), ErrClosed):
			s.errorf("the channel has ended: %v", ch.Err())
			return
		}
	}
}

func (s *healSim) gotAck(no uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.acked[no] = true; !s.taken[no] {
		s.errorf("message %d is acknowledged, and was never taken", no)
	}
}

func (s *healSim) isAcked(no uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked[no]
}

// post is alice's program posting another message, now or when it runs again.
func (s *healSim) post() uint64 {
	s.posted++
	if s.run[alice] != nil {
		s.send(s.posted)
	}
	return s.posted
}

func (s *healSim) send(no uint64) {
	p := s.run[alice]
	if s.dials {
		s.tasks.Go(func() { s.through(p, no) })
		return
	}
	r, err := s.box.Post(p.live, binary.BigEndian.AppendUint64(nil, no))
	if err != nil {
		s.fatalf("post: %v", err)
	}
	s.tasks.Go(func() {
		select {
		case <-r.Done():
		case <-p.live.Done():
			return
		}
		if r.Err() != nil {
			if p.live.Err() == nil {
				s.errorf("message %d: %v", no, r.Err())
			}
			return
		}
		s.gotAck(no)
	})
}

// trouble makes one fault. What is down comes back within ten seconds.
func (s *healSim) trouble() {
	who, lasts := s.rng.IntN(2), time.Duration(s.rng.IntN(10000))*time.Millisecond
	switch kind := s.rng.IntN(12); {
	case kind < 2:
		if p := s.run[who]; p != nil {
			s.fault("connection cut")
			p.way.cut()
		}
	case kind < 4:
		if p := s.run[who]; p != nil {
			s.fault("connection stalled")
			p.way.mu.Lock()
			p.way.held = time.Now().Add(3 * lasts)
			p.way.mu.Unlock()
		}
	case kind < 6:
		s.fault("all is lost for a while")
		s.mu.Lock()
		loss := s.loss
		s.loss = 1
		s.mu.Unlock()
		time.Sleep(2 * lasts)
		s.mu.Lock()
		s.loss = loss
		s.mu.Unlock()
	default:
		s.restart(kind-6, lasts)
	}
}

var restarts = []string{"bob restarted", "alice restarted", "hub restarted", "hub lost its memory", "hub addresses changed", "hub addresses changed"}

// restart ends a process and starts it again later.
func (s *healSim) restart(kind int, lasts time.Duration) {
	s.fault(restarts[kind])
	switch kind {
	case 0, 1:
		who := bob - kind
		s.kill(who)
		time.Sleep(lasts)
		s.start(who)
	default:
		state := s.stopHub()
		time.Sleep(lasts)
		if kind > 2 {
			state = nil
		}
		if kind > 3 {
			s.key++
		}
		s.startHub(state)
	}
}

// until waits until everything posted is acknowledged, for a time.
func (s *healSim) until(limit time.Duration, what string) {
	s.t.Helper()
	begun := time.Now()
	for time.Since(begun) <= limit {
		s.mu.Lock()
		n := len(s.acked)
		if s.dir != "" { // the process that posted a message may never hear
			if n = 0; s.pending() == 0 {
				n = len(s.taken)
			}
		}
		s.mu.Unlock()
		if uint64(n) == s.posted {
			s.slowest = max(s.slowest, time.Since(begun))
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.fatalf("%s: %d of %d messages are acknowledged after %v", what, len(s.acked), s.posted, limit)
}

func (s *healSim) pending() int {
	n, _ := s.box.Pending()
	return n
}

// single checks that each side has one channel.
func (s *healSim) single(what string) {
	s.t.Helper()
	for who, p := range s.run {
		if all := p.node.endpoint.Channels(); len(all) != 1 {
			s.errorf("%s: device %d has %d channels", what, who, len(all))
			for _, c := range all {
				s.t.Logf("dialled %v, said hello %v, %+v", c.Initiator(), c.Confirmed(), c.Stats())
			}
		}
		if st := p.node.Stats(); st.QueuedFrames != 0 || st.Channels.HalfOpen != 0 {
			s.errorf("%s: device %d has %d frames queued and %d handshakes open", what, who, st.QueuedFrames, st.Channels.HalfOpen)
		}
	}
	if c := s.hub.Counters(); c.Queued+c.Waiting != 0 || c.Lost() != 0 {
		s.errorf("%s: at the hub %d frames are queued, %d wait, %d have no fate", what, c.Queued, c.Waiting, c.Lost())
	}
}

func (s *healSim) simulate() {
	defer s.close()
	s.startHub(nil)
	s.start(bob)
	s.start(alice)
	for begun := time.Now(); time.Since(begun) < faultsLast; {
		time.Sleep(time.Duration(200+s.rng.IntN(4000)) * time.Millisecond)
		for range s.rng.IntN(4) {
			s.post()
		}
		s.trouble()
	}
	s.mu.Lock()
	s.faults = false
	s.mu.Unlock()
	for _, p := range s.run {
		p.way.mu.Lock()
		p.way.held = time.Time{}
		p.way.mu.Unlock()
		p.way.cut() // what a connection has lost is sent again on the next
	}
	s.logf("the faults have ended")
	s.post()
	s.until(backAtHub+deadAfter+madeAgain, "after the faults")
	time.Sleep(idleAfter)
	s.single("after the faults")

	// One more, with nothing else going on: how soon is it noticed?
	for len(s.lost) > 0 {
		<-s.lost
	}
	kind := s.rng.IntN(len(restarts))
	s.restart(kind, 0)
	time.Sleep(2 * time.Second) // everybody is back at the hub
	begun := time.Now()
	s.post()
	s.until(deadAfter+madeAgain, restarts[kind])
	if kind == 0 || kind > 3 { // the path is gone
		select {
		case at := <-s.lost:
			if d := at.Sub(begun); d > deadAfter+time.Second {
				s.errorf("%s: noticed after %v", restarts[kind], d)
			}
		default:
			s.errorf("%s: nobody said that the channel was lost", restarts[kind])
		}
	}
	if wait := deadAfter + 5*time.Second; s.stream && kind == 1 {
		time.Sleep(idleAfter) // a process there names channels of its own alone
	} else {
		time.Sleep(wait)
	}
	s.single(restarts[kind])
}

// close ends everything.
func (s *healSim) close() {
	s.kill(alice)
	s.kill(bob)
	s.tasks.Wait()
	s.stopHub()
}

// TestChannelsHeal runs two devices and a hub under every kind of fault, with a virtual
// clock. Afterwards everything has arrived, once and in order, and each side has one
// channel. The faults follow from the seed; which goroutine runs first does not. Repeat a
// seed with -heal.first=N -heal.seeds=1 -heal.trace.
func TestChannelsHeal(t *testing.T) {
	seeds := *healSeeds
	if testing.Short() {
		seeds = min(seeds, 30)
	}
	var mu sync.Mutex
	faults, messages, slowest := make(map[string]int), uint64(0), time.Duration(0)
	t.Run("seeds", func(t *testing.T) {
		for i := range uint64(seeds) {
			t.Run(fmt.Sprint(*healFirst+i), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					s := newHealSim(t, *healFirst+i)
					s.simulate()
					mu.Lock()
					defer mu.Unlock()
					for k, n := range s.count {
						faults[k] += n
					}
					messages += s.posted
					slowest = max(slowest, s.slowest)
				})
			})
		}
	})
	t.Logf("seeds %d to %d: %d messages, the slowest came %v after the faults; faults %v",
		*healFirst, *healFirst+uint64(seeds)-1, messages, slowest, faults)
	for _, k := range append([]string{"connection cut", "connection stalled", "all is lost for a while"}, restarts...) {
		if faults[k] == 0 && seeds > 50 {
			t.Errorf("the runs had no fault of the kind %q", k)
		}
	}
}
