package device

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Reconnecting: the first mean pause, by how much of the mean a pause is longer or
// shorter, and how long a connection must have lasted for the pauses to start over.
const (
	firstPause  = 300 * time.Millisecond
	pauseJitter = 0.5
	stableAfter = 10 * time.Second
)

// Windows, in packets.
const (
	plainWindow = 64  // towards a hub that did not say hello
	maxWindow   = 256 // whatever a hub allows
)

// uplinkConfig is what an uplink is made of.
type uplinkConfig struct {
	dialer    linkDialer
	hubName   string // the hub's URL, for errors
	out       *outbox
	in        *inbound
	limits    route.Limits  // of what is accepted
	sendLimit int           // of what is sent, in bytes a frame
	helloWait time.Duration // longest wait for the answer to hello
	maxPause  time.Duration // longest pause between two attempts
	persist   bool          // keep trying before the first connection too
	hub       hubIdentity   // owned by run
	memory    *hubMemory    // owned by run
	log       *slog.Logger
	now       func() time.Time // what this device signs is dated by it

	// receive takes every frame but the answer to hello. The view is valid during
	// the call only; it must not block.
	receive func(v *route.View, class route.Class)
	// noticed takes what the hub says of our frames, except taken-over.
	noticed func(*hubproto.Notice)
	// changed is called for each change of state, and each failed attempt; it must
	// not block. Queued frames are sent after it has returned for Online.
	changed func(State, error)
}

// uplink keeps a node connected to its hub: one link after the other.
type uplink struct {
	uplinkConfig
	epoch [hubproto.EpochLen]byte

	first chan error    // result of the first attempt
	ended chan struct{} // closed when run has returned

	frameLimit atomic.Int64
	stock      atomic.Bool // a TCP hub that did not answer hello: none of ours
	connects   atomic.Uint64

	mu     sync.Mutex
	state  State
	err    error                 // why Stopped
	answer *hubproto.HelloAnswer // the present hub's, nil if it gave none
	mute   bool                  // the hub did not answer: don't wait for it again
	hubID  identity.Identifier
}

func newUplink(cfg uplinkConfig) *uplink {
	u := &uplink{uplinkConfig: cfg, first: make(chan error, 1), ended: make(chan struct{})}
	_, _ = rand.Read(u.epoch[:])
	u.frameLimit.Store(int64(cfg.sendLimit))
	return u
}

// run connects, again and again, until ctx ends or the hub says no: at all before this
// node was online, and later that it is somebody else.
func (u *uplink) run(ctx context.Context) {
	defer close(u.ended)
	pauses := backoff.NewExponentialBackOff()
	pauses.MaxInterval = time.Duration(float64(u.maxPause) / (1 + pauseJitter)) // the mean
	pauses.InitialInterval = firstPause
	pauses.Multiplier, pauses.RandomizationFactor = 2, pauseJitter
	for attempt := 1; ; attempt++ {
		lasted, err := u.session(ctx)
		switch {
		case ctx.Err() != nil:
			u.stop(ErrClosed)
			return
		case isFinal(err, u.connects.Load() > 0), attempt == 1 && lasted == 0 && !u.persist:
			u.report(err)
			u.stop(err)
			return
		}
		u.setState(Offline, err)
		if lasted >= stableAfter {
			pauses.Reset()
		}
		pause := pauses.NextBackOff()
		u.log.Info("reconnecting to the hub", "after", pause, "err", err)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// session makes one connection and serves it until it ends. lasted is how long
// it was online, 0 if it never was.
func (u *uplink) session(ctx context.Context) (lasted time.Duration, err error) {
	s := &session{u: u, greeting: newGreeting(), answered: make(chan *hubproto.HelloAnswer, 1), kicked: make(chan struct{})}
	l, err := u.dialer.dial(ctx, linkEvents{frames: s.frames, acked: s.acked})
	if err != nil {
		return 0, err
	}
	goodbye := false
	sent := make(chan struct{}) // closed when nothing is being sent any more
	defer func() {
		l.close(goodbye)
		<-sent
		// Whatever the hub sent last has been handled by now.
		if why := s.why(); why != nil {
			err = permanent(why)
		}
	}()
	if err := u.hello(ctx, s, l); err != nil {
		close(sent)
		return 0, err
	}
	u.attach(s, l)
	start := time.Now()

	go func() {
		defer close(sent)
		u.sendLoop(l, s.gen.Load())
	}()
	select {
	case <-l.done():
		err = l.err()
	case <-s.kicked:
	case <-ctx.Done():
		goodbye, err = true, ctx.Err()
	}
	u.out.detach(s.gen.Load())
	return max(time.Since(start), 1), err
}

// attach lets queued frames out on the connection.
func (u *uplink) attach(s *session, l link) {
	window, bundle := plainWindow, bundleBytes
	u.mu.Lock()
	if a := u.answer; a != nil {
		if a.Window > 0 {
			window = int(min(a.Window, maxWindow))
		}
		if a.BundleLimit > 0 {
			bundle = int(min(a.BundleLimit, bundleBytes))
		}
	}
	if u.hub.known != nil {
		u.hubID = u.hub.known.Identifier()
	}
	proved := u.hubID
	u.mu.Unlock()
	s.gen.Store(u.out.attach(window, bundle))
	u.connects.Add(1)
	u.log.Info("connected to the hub", "hub", u.hubName, "remote", l.info().remote, "identifier", proved, "window", window)
	u.setState(Online, nil)
	u.report(nil)
}

// report tells Connect, if it still waits.
func (u *uplink) report(err error) {
	select {
	case u.first <- err:
	default:
	}
}

// sendLoop empties the outbox into the link until the connection ends.
func (u *uplink) sendLoop(l link, gen uint64) {
	for {
		p, ok := u.out.take(gen)
		if !ok {
			select {
			case <-u.out.wake:
				continue
			case <-l.done():
				return
			}
		}
		if err := l.send(&p); err != nil {
			return // the link ends, and says why
		}
	}
}

// hello introduces this node on a new connection and learns what the hub is. A
// hub that does not answer is a plain Ockam hub, or a broker that has one behind
// it, and works too.
func (u *uplink) hello(ctx context.Context, s *session, l link) error {
	u.mu.Lock()
	mute := u.mute
	u.mu.Unlock()
	// Once this process was online it may have keys, whatever the hub has answered.
	fresh := u.connects.Load() == 0
	pinned := !u.hub.pin.IsZero() || u.hub.known != nil
	if !l.info().hello {
		if pinned {
			return permanent(fmt.Errorf("%w: a hub cannot prove its identity on this kind of connection; remove the pin", ErrWrongHub))
		}
		return nil
	}
	body, err := s.greeting.frame(u.epoch, fresh)
	if err != nil {
		return permanent(err)
	}
	if err := l.send(&packet{class: route.Stored, frames: [][]byte{body}, size: len(body)}); err != nil {
		return err
	}
	if mute && !pinned {
		return nil
	}
	timer := time.NewTimer(u.helloWait)
	defer timer.Stop()
	var answer *hubproto.HelloAnswer
	select {
	case answer = <-s.answered:
	case <-l.done():
		return fmt.Errorf("%w: it ended the connection before it answered hello: %w", ErrNoAnswer, l.err())
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		if pinned {
			return fmt.Errorf("%w: it did not answer hello, so it has not proved to be the pinned one", ErrWrongHub)
		}
		u.log.Info("the hub does not answer hello; taking it for a plain Ockam hub", "hub", u.hubName)
	}
	return u.greet(s, answer, l)
}

// greet takes over what an answer says; nil if there was none.
func (u *uplink) greet(s *session, a *hubproto.HelloAnswer, l link) error {
	limit := u.sendLimit
	if a != nil {
		if err := u.hub.verify(&s.greeting, a, l.info().tls); errors.Is(err, ErrWrongHub) {
			return permanent(u.memory.explain(err))
		} else if err != nil {
			u.log.Warn("the hub has not proved an identity", "claims", a.Hub, "err", err)
		} else if err := u.hub.remember(u.memory, a); err != nil {
			return err
		}
		if skew := u.now().Sub(a.Time); skew.Abs() > clockSkew {
			u.log.Warn("this device's clock is off, as the hub sees it; handshakes will fail", "ahead_by", skew.Round(time.Second))
		}
		if u.hub.epoch != a.Epoch && u.hub.epoch != ([hubproto.EpochLen]byte{}) {
			u.log.Info("the hub was restarted")
		}
		u.hub.epoch = a.Epoch
		if a.FrameLimit > 0 && a.FrameLimit < uint64(limit) {
			limit = int(a.FrameLimit)
		}
	}
	u.frameLimit.Store(int64(limit))
	u.stock.Store(a == nil && !l.info().acks)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.answer = a
	u.mute = a == nil
	return nil
}

// silent reports whether the broker that this node is connected to has answered no
// hello: a plain Ockam hub may be behind it, or none at all.
func (u *uplink) silent() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.mute && !u.stock.Load()
}

// ours reports whether the hub is one of sealmq. There a forwarding address alone leads to
// no listener of a stock peer, whose name has to follow (spec routing 6.3).
func (u *uplink) ours() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.answer != nil
}

func (u *uplink) setState(s State, err error) {
	u.mu.Lock()
	changed := u.state != s
	u.state = s
	u.mu.Unlock()
	if changed || err != nil {
		u.changed(s, err)
	}
}

// stop is the end for good.
func (u *uplink) stop(err error) {
	u.mu.Lock()
	u.err = err
	u.mu.Unlock()
	if !errors.Is(err, ErrClosed) {
		u.log.Error("stopped for good", "err", err)
	}
	u.out.close(err)
	u.setState(Stopped, err)
}

func (u *uplink) status() (State, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state, u.err
}

// session is one connection's state.
type session struct {
	u        *uplink
	greeting greeting
	answered chan *hubproto.HelloAnswer
	gen      atomic.Uint64 // 0 before attach

	kickOnce sync.Once
	kicked   chan struct{}
	kickErr  error // set before kicked is closed
}

// kick ends the connection and the node with it.
func (s *session) kick(err error) {
	s.kickOnce.Do(func() {
		s.kickErr = err
		close(s.kicked)
	})
}

func (s *session) why() error {
	select {
	case <-s.kicked:
		return s.kickErr
	default:
		return nil
	}
}

func (s *session) acked(token uint64) { s.u.out.ack(s.gen.Load(), token) }

// frames takes one message of the hub. A bundle is parsed whole before anything
// in it takes effect.
func (s *session) frames(payload []byte, sequence bool, class route.Class) {
	u := s.u
	u.in.packets.Add(1)
	var buf [8]route.View
	views := buf[:0]
	if sequence {
		var err error
		if views, err = route.ParseBundle(payload, u.limits, views); err != nil {
			u.in.dropped[dropMalformed].Add(1)
			u.log.Debug("malformed message from the hub", "bytes", len(payload), "err", err)
			return
		}
	} else {
		v, err := route.ParseView(payload, u.limits)
		if err != nil {
			u.in.dropped[dropMalformed].Add(1)
			u.log.Debug("malformed frame from the hub", "bytes", len(payload), "err", err)
			return
		}
		views = append(views, v)
	}
	for i := range views {
		v := &views[i]
		u.in.frames.Add(1)
		switch first := v.FirstHop(); {
		case v.IsHeartbeat():
			u.in.dropped[dropHeartbeat].Add(1)
		case first.Transport != route.LocalTransport:
			u.in.dropped[dropForeignHop].Add(1)
		case string(first.Value) == s.greeting.address:
			s.helloAnswer(v)
		case string(first.Value) == hubproto.NoticeTarget:
			s.notice(v, class)
		default:
			u.receive(v, class)
		}
	}
}

func (s *session) helloAnswer(v *route.View) {
	if from, ok := fromHub(v); !ok || from != helloService {
		s.u.in.dropped[dropNotFromHub].Add(1)
		return
	}
	a, err := hubproto.ParseHelloAnswer(v.Payload())
	if err != nil {
		s.u.in.dropped[dropMalformed].Add(1)
		s.u.log.Warn("the hub's answer to hello cannot be read", "err", err)
		return
	}
	// Where nobody waits for it, because an earlier connection got no answer, the
	// next one will.
	s.u.mu.Lock()
	s.u.mute = false
	s.u.mu.Unlock()
	select {
	case s.answered <- a:
	default:
		s.u.in.dropped[dropUnexpected].Add(1)
	}
}

// notice handles what the hub says about frames of ours. That another connection
// took over is believed as it comes on this, the present, connection.
func (s *session) notice(v *route.View, class route.Class) {
	u := s.u
	if from, ok := fromHub(v); !ok || from != hubproto.NoticeSource {
		u.in.dropped[dropNotFromHub].Add(1)
		return
	}
	u.in.notices.Add(1)
	n, err := hubproto.ParseNotice(v.Payload())
	switch {
	case err != nil:
		u.in.dropped[dropMalformed].Add(1)
	case n.Reason == hubproto.ReasonTakenOver:
		s.kick(ErrTakenOver)
	default:
		u.noticed(n)
	}
}
