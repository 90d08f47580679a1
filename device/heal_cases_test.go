package device

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// Tests of single cases, in the simulation of heal_sim_test.go.

// TestPeerLost: the peer's dynamic address is another one at a hub that was set up anew.
// Nobody can find it at the old one; the program hears of that once, and when the address
// is good again.
func TestPeerLost(t *testing.T) {
	for name, met := range map[string]bool{"known before": true, "never met": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newHealSim(t, 2)
				s.faults, s.stream, s.dials, s.asked = false, false, false, nil
				defer s.close()
				s.startHub(nil)
				s.start(bob)
				f := <-s.forwarder
				s.to = route.To(f.Address())
				s.start(alice)
				if met {
					s.post()
					s.until(time.Second, "before")
				}
				s.restart(4, 0) // the hub's addresses change
				time.Sleep(time.Second)
				if route.To(f.Address()).Equal(s.to) {
					t.Fatal("bob has the old address")
				}
				s.post()
				e := <-s.missed
				if d := e.Time.Sub(epoch2000); d < unknownTime || d > unknownTime+deadAfter+madeAgain+15*time.Second {
					t.Errorf("said after %v", d)
				}
				if !errors.Is(e.Err, ErrUnknownAddress) || e.Outbox != s.box || e.Channel == nil || e.Kind.String() != "peer-lost" {
					t.Errorf("%+v", e)
				}
				time.Sleep(10 * time.Minute)
				if n := len(s.missed); n != 0 {
					t.Errorf("said %d times more", n)
				}
				// The new address is as good as the old one was.
				other, err := s.run[alice].node.Outbox(Destination{Route: route.To(f.Address()), Peer: s.names[bob].Identifier()}, "app")
				if err != nil {
					t.Fatal(err)
				}
				s.restored.Store(false)
				if err := other.Deliver(t.Context(), make([]byte, 8)); err != nil {
					t.Fatal(err)
				}
				s.key -= 2
				s.restart(4, 0) // back to what they were
				s.until(time.Minute, "at the old address")
				synctest.Wait()
				if !s.restored.Load() {
					t.Error("nobody said that the peer is found")
				}
			})
		})
	}
}

// TestWrongPeer: somebody else is where an outbox, or a channel, expects its peer. The
// program hears of that once, and why nothing is acknowledged; and when the peer is back.
func TestWrongPeer(t *testing.T) {
	for name, met := range map[string]bool{"known before": true, "never met": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newHealSim(t, 2)
				s.faults, s.stream, s.dials = false, false, false
				defer s.close()
				s.startHub(nil)
				genuine := s.names[bob]
				other, err := identity.Create()
				if err != nil {
					t.Fatal(err)
				}
				var through *Channel
				s.start(alice)
				if met {
					s.start(bob)
					<-s.forwarder
					s.post()
					s.until(time.Second, "before")
					if through, err = s.run[alice].node.Dial(t.Context(), s.to, channel.TrustEveryone); err != nil {
						t.Fatal(err)
					}
					s.kill(bob)
					s.stopHub()
					s.startHub(nil) // anybody can have the alias
				}
				s.names[bob] = other
				s.start(bob)
				<-s.forwarder
				s.names[bob] = genuine
				wait := func(d time.Duration) context.Context {
					ctx, cancel := context.WithTimeout(context.Background(), d)
					t.Cleanup(cancel)
					return ctx
				}
				check := func(what string, err error) {
					t.Helper()
					if !errors.Is(err, ErrTimeout) || !errors.Is(err, ErrWrongIdentity) {
						t.Errorf("%s: %v", what, err)
					}
				}
				check("Deliver", s.box.Deliver(wait(3*time.Minute), make([]byte, 8)))
				r, err := s.box.Post(t.Context(), binary.BigEndian.AppendUint64(nil, s.posted+1))
				if err != nil {
					t.Fatal(err)
				}
				err = r.Wait(wait(time.Minute))
				check("Wait", err)
				if !errors.Is(err, ErrUnacknowledged) {
					t.Errorf("Wait: %v", err)
				}
				events := 1
				if met {
					events = 2
					check("Send", through.SendString(wait(time.Minute), "app", "hello"))
				}
				if n := len(s.missed); n != events {
					t.Fatalf("said %d times", n)
				}
				for range events {
					e := <-s.missed
					about := e.Outbox == s.box || through != nil && e.Channel == through && e.Outbox == nil
					if e.Kind != EventWrongPeer || e.Kind.String() != "wrong-peer" || !errors.Is(e.Err, ErrWrongIdentity) || !about {
						t.Errorf("%+v", e)
					}
				}
				s.kill(bob)
				s.stopHub()
				s.startHub(nil)
				s.restored.Store(false)
				s.start(bob)
				if err := r.Wait(wait(time.Minute)); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if !s.restored.Load() {
					t.Error("nobody said that the peer is found")
				}
			})
		})
	}
}

// TestAtRest: once its peer has closed a channel in order, Send and Request say so at once,
// whether a message waits to be delivered or not, until the channel is made again for one.
func TestAtRest(t *testing.T) {
	for name, waiting := range map[string]bool{"nothing waits": false, "a message waits": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := firstContactSim(t, false)
				defer s.close()
				ch := s.run[alice].dial(s)
				if err := ch.Deliver(t.Context(), "app", make([]byte, 8)); err != nil {
					t.Fatal(err)
				}
				_ = s.run[bob].node.Close()
				s.kill(bob)
				synctest.Wait()
				var calls sync.WaitGroup
				if waiting {
					calls.Go(func() {
						if err := ch.Deliver(t.Context(), "app", make([]byte, 8)); err != nil {
							t.Error(err)
						}
					})
				}
				for range 3 {
					time.Sleep(3 * time.Second)
					begun := time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					if err := ch.SendString(ctx, "app", "hello"); !errors.Is(err, ErrPeerClosed) {
						t.Errorf("Send: %v", err)
					}
					if _, err := ch.Request(ctx, "app", nil); !errors.Is(err, ErrPeerClosed) {
						t.Errorf("Request: %v", err)
					}
					cancel()
					if d := time.Since(begun); d != 0 {
						t.Errorf("said after %v", d)
					}
				}
				s.start(bob)
				<-s.forwarder
				if !waiting {
					calls.Go(func() {
						if err := ch.Deliver(t.Context(), "app", make([]byte, 8)); err != nil {
							t.Error(err)
						}
					})
				}
				calls.Wait()
				if err := ch.Send(t.Context(), "app", make([]byte, 8)); err != nil {
					t.Errorf("Send, once it is made again: %v", err)
				}
			})
		})
	}
}

// TestManyPeersAway: outboxes whose peers are offline are in nobody's way, and go on when
// those are back.
func TestManyPeersAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials, s.firsts = false, false, false, 1000
		defer s.close()
		s.startHub(nil)
		away := s.names[bob]
		s.start(bob)
		<-s.forwarder
		s.kill(bob)
		time.Sleep(5 * time.Second)
		var err error
		if s.names[bob], err = identity.Create(); err != nil {
			t.Fatal(err)
		}
		s.asked = []ForwarderOption{Alias("carol")}
		s.start(bob)
		<-s.forwarder
		carol := Destination{Route: route.To("forward_to_carol"), Peer: s.names[bob].Identifier()}
		s.names[bob] = away
		s.start(alice)
		node := s.run[alice].node
		const peers = 300
		for i := range peers {
			to := Destination{Route: s.to.Append(route.Local(fmt.Sprint("listener", i))), Peer: away.Identifier()}
			box, err := node.Outbox(to, "app")
			if err == nil {
				_, err = box.Post(t.Context(), make([]byte, 8))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		s.post()
		for _, to := range []route.Route{carol.Route, carol.Route.Append(route.Local("listener"))} {
			time.Sleep(7 * time.Second)
			carol.Route = to
			begun := time.Now()
			if err := node.Deliver(t.Context(), carol, "app", make([]byte, 8)); err != nil || time.Since(begun) > 2*time.Second {
				t.Errorf("delivered after %v: %v", time.Since(begun), err)
			}
			begun = time.Now()
			ch, err := node.Dial(t.Context(), carol.Route, channel.TrustIdentifiers(carol.Peer))
			if err != nil || time.Since(begun) > time.Second {
				t.Fatalf("dialled after %v: %v", time.Since(begun), err)
			}
			_ = ch.Close()
			if n := s.hub.Counters().Waiting; n == 0 || n > 2*maxWaits { // some are ending
				t.Errorf("%d first messages wait at the hub", n)
			}
		}
		s.kill(bob)
		s.asked = []ForwarderOption{Alias("bob")}
		s.channels = channel.Limits{Rate: 1000, Burst: 1000, HalfOpenPerSource: 1000, HalfOpen: 1000}
		s.start(bob)
		<-s.forwarder
		for i := range peers {
			if _, err := s.run[bob].node.Listen(fmt.Sprint("listener", i), channel.TrustEveryone); err != nil {
				t.Fatal(err)
			}
		}
		s.until(madeAgain, "when bob is back")
		time.Sleep(redialTime + madeAgain) // where a first attempt has failed
		for _, box := range node.Outboxes() {
			if n, _ := box.Pending(); n != 0 {
				t.Errorf("%d messages wait for %s", n, box.Destination().Route)
			}
		}
	})
}

// attempts is a slog.Handler that notes when a channel broke, and when each attempt to
// make it again failed.
type attempts struct {
	slog.Handler
	mu            sync.Mutex
	broke, failed []time.Time
}

func (a *attempts) Enabled(context.Context, slog.Level) bool { return true }
func (a *attempts) WithAttrs([]slog.Attr) slog.Handler       { return a }

func (a *attempts) Handle(_ context.Context, r slog.Record) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch r.Message {
	case "channel broke; making it again":
		a.broke = append(a.broke, r.Time)
	case "channel not yet made again":
		a.failed = append(a.failed, r.Time)
	}
	return nil
}

// next returns when the channel broke last, and what has failed since.
func (a *attempts) next() (broke time.Time, failed []time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	broke, failed = a.broke[len(a.broke)-1], a.failed
	a.broke, a.failed = nil, nil
	return broke, failed
}

// TestPausesBetweenAttempts: a channel that cannot be made again is tried after pauses of
// 250 ms, then of twice as much each time, up to 10 s, all of them varied by half; and of
// 250 ms again the next time that it breaks.
func TestPausesBetweenAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const attempt = 100 * time.Millisecond // how long one takes, at most
		log := new(attempts)
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials, s.asked, s.dir, s.logger = false, false, true, nil, "", slog.New(log)
		defer s.close()
		s.startHub(nil)
		s.start(bob)
		f := <-s.forwarder
		s.to = route.To(f.Address())
		s.start(alice)
		s.post()
		s.until(time.Second, "before")
		for _, lasts := range []time.Duration{15 * time.Minute, time.Minute} {
			s.restart(4, 0) // the hub's addresses change: nobody is at bob's
			s.post()
			time.Sleep(lasts)
			s.key -= 2
			s.restart(4, 0) // and change back
			s.until(time.Minute, "at the old address")
			last, failed := log.next()
			if least := int(lasts / (15*time.Second + attempt)); len(failed) < max(least, 5) {
				t.Fatalf("%d attempts in %v", len(failed), lasts)
			}
			var sum, low, high time.Duration
			n := time.Duration(0)
			for i, at := range failed {
				mean := min(firstRedial<<min(i, 10), longRedial)
				pause := at.Sub(last)
				last = at
				if pause < mean/2 || pause > mean+mean/2+attempt {
					t.Errorf("pause %d is %v, of %v on average", i, pause, mean)
				}
				if mean == longRedial {
					sum, n = sum+pause, n+1
					high = max(high, pause)
					if low == 0 || pause < low {
						low = pause
					}
				}
			}
			t.Logf("%d attempts; the long pauses were %v to %v", len(failed), low, high)
			if n < 50 {
				continue
			}
			// Uniform between half and half as much again, so that devices don't come at once.
			if mean := sum / n; mean < 17*longRedial/20 || mean > 23*longRedial/20 || low > 3*longRedial/4 || high < 5*longRedial/4 {
				t.Errorf("pauses are %v to %v, %v on average", low, high, mean)
			}
		}
	})
}

// TestMessageThatKills: a message that ends each connection on which it is sent is given
// up, its sender hears of that, and those behind it go on.
func TestMessageThatKills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials = false, false, false
		defer s.close()
		s.startAll()
		s.post()
		s.until(time.Minute, "before")
		s.poison.Store(20 << 10)
		before := s.run[alice].node.Stats().Connects
		r, err := s.box.Post(t.Context(), make([]byte, 50<<10))
		if err != nil {
			t.Fatal(err)
		}
		s.post()
		select {
		case <-r.Done():
		case <-time.After(10 * time.Minute):
			t.Fatal("nobody is told")
		}
		if !errors.Is(r.Err(), ErrFrameKills) {
			t.Errorf("told %v", r.Err())
		}
		s.until(10*time.Minute, "behind it")
		time.Sleep(10 * time.Minute)
		if n := s.run[alice].node.Stats().Connects - before; n < 4 || n > 12 {
			t.Errorf("%d connections were ended", n)
		}
		s.poison.Store(0)
	})
}

// TestFlappingWhileWithheld: a peer takes nothing for a while, so that the hub withholds
// acknowledgements, and meanwhile the sender's connection ends soon after each start, or the
// hub does. That is no fault of the messages: they arrive.
func TestFlappingWhileWithheld(t *testing.T) {
	for name, lasts := range map[string]time.Duration{"every 4 s": 4 * time.Second, "at once": 100 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newHealSim(t, 10) // with queues of 4 frames at the hub
				s.faults, s.stream, s.dials = false, false, false
				defer s.close()
				s.startAll()
				s.post()
				s.until(time.Minute, "before")
				w := s.run[bob].way
				w.mu.Lock()
				w.held = time.Now().Add(10 * time.Minute)
				w.mu.Unlock()
				for range 20 {
					s.post()
					time.Sleep(20 * time.Millisecond)
				}
				node := s.run[alice].node
				before := node.Stats().Connects
				for range 20 {
					for node.State() != Online {
						time.Sleep(10 * time.Millisecond)
					}
					time.Sleep(lasts)
					s.run[alice].way.cut()
					synctest.Wait()
				}
				if n := node.Stats().Connects - before; n < 15 {
					t.Errorf("%d connections were ended", n)
				}
				w.mu.Lock()
				w.held = time.Time{}
				w.mu.Unlock()
				w.cut()
				s.until(5*time.Minute, "after")
			})
		})
	}
}

// TestToldOfWhatFreshKeysDiscard: what the hub has acknowledged and then discards, because the
// peer's next process has other keys, is told to the sender's program.
func TestToldOfWhatFreshKeysDiscard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials = false, false, true
		defer s.close()
		s.startAll()
		ch := s.run[alice].dial(s)
		s.kill(bob)
		time.Sleep(10 * time.Second)
		const n = 10
		for range n {
			if err := ch.Send(t.Context(), "app", make([]byte, 8)); err != nil {
				t.Fatal(err)
			}
		}
		if err := ch.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.start(bob)
		<-s.forwarder
		time.Sleep(time.Second)
		var u *UndeliveredError
		if err := ch.Flush(t.Context()); !errors.As(err, &u) || u.Count != n || !errors.Is(err, ErrPeerOffline) {
			t.Errorf("of %d messages that the hub acknowledged and dropped (%v) the sender is told %v", n, s.hub.Counters().Dropped, err)
		}
	})
}

// firstContactSim is a simulation without faults, whose two devices are at the hub, of which
// bob has an alias there.
func firstContactSim(t *testing.T, stream bool) *healSim {
	s := newHealSim(t, 2)
	s.faults, s.stream, s.dials = false, stream, true
	s.startAll()
	for s.run[alice].node.State() != Online {
		time.Sleep(10 * time.Millisecond)
	}
	return s
}

// dialBob is one call to Dial, and how long it took.
func (s *healSim) dialBob(to route.Route) (time.Duration, error) {
	begun := time.Now()
	ch, err := s.run[alice].node.Dial(s.t.Context(), to, channel.TrustEveryone)
	took := time.Since(begun)
	if err == nil {
		_ = ch.Close()
	}
	return took, err
}

// TestFirstContactWhileStarting: a peer that was waited for, and whose program listens only
// after earlyTime, is reached soon after that.
func TestFirstContactWhileStarting(t *testing.T) {
	for name, stream := range map[string]bool{"over MQTT": false, "over TCP": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := firstContactSim(t, stream)
				defer s.close()
				s.kill(bob)
				time.Sleep(5 * time.Second)
				s.slow = earlyTime + time.Second
				time.AfterFunc(2*time.Second, func() { s.start(bob) })
				if d, err := s.dialBob(s.to); err != nil || d > 2*time.Second+s.slow+12*time.Second {
					t.Errorf("%v, after %v", err, d)
				}
			})
		})
	}
}

// TestFirstContactIsKeptOnce: repeats of a message that is kept for a program which does not
// listen yet take nobody else's room.
func TestFirstContactIsKeptOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := firstContactSim(t, false)
		defer s.close()
		s.kill(bob)
		time.Sleep(5 * time.Second)
		s.slow = earlyTime - time.Second
		s.start(bob)
		if d, err := s.dialBob(s.to); err != nil || d > s.slow+2*time.Second {
			t.Errorf("%v, after %v", err, d)
		}
		st := s.run[bob].node.Stats()
		if n := st.Channels.Dropped.Of(channel.DropFirstRepeat); n != 0 || st.Local.Dropped[node.DropUnknown] < 2 {
			t.Errorf("%d repeats were kept; %+v", n, st.Local)
		}
	})
}

// TestFirstContactWaitsOnce: while a peer is away, one first message of each call waits for
// it at the hub, and no more, and it hears that the peer stays away.
func TestFirstContactWaitsOnce(t *testing.T) {
	for name, stream := range map[string]bool{"over MQTT": false, "over TCP": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := firstContactSim(t, stream)
				defer s.close()
				s.kill(bob)
				time.Sleep(5 * time.Second)
				before := s.hub.Counters().Received
				d, err := s.dialBob(s.to)
				if !errors.Is(err, ErrPeerOffline) || d < firstContact || d > firstContact+time.Second {
					t.Errorf("%v, after %v", err, d)
				}
				if n := s.hub.Counters().Received - before; n != 1 {
					t.Errorf("%d messages", n)
				}
			})
		})
	}
}

// TestBusyListener: calls that a listener has no room for at once get in when it has.
func TestBusyListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials = false, false, true
		s.channels = channel.Limits{Rate: 2, Burst: 2, HalfOpenPerSource: 1}
		defer s.close()
		s.startAll()
		var calls sync.WaitGroup
		for range 12 {
			calls.Go(func() {
				if d, err := s.dialBob(s.to); err != nil {
					t.Errorf("%v, after %v", err, d)
				}
			})
		}
		calls.Wait()
		if st := s.run[bob].node.Stats().Channels; st.Accepted != 12 || st.Dropped.Of(channel.DropRate) == 0 {
			t.Errorf("bob: %+v", st)
		}
	})
}

// TestNoRepeatToStrangers: the first message goes once to a listener that may be a stock
// one, which would begin another handshake for each, and again where the hub has waited for
// the peer, which is one of sealmq then. What is said in the end is true in both cases.
func TestNoRepeatToStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := firstContactSim(t, false)
		defer s.close()
		before := s.run[alice].node.Stats().FramesSent
		_, err := s.dialBob(s.to.Append(route.Local("nobody")))
		if !errors.Is(err, ErrTimeout) || errors.Is(err, ErrPeerOffline) || !strings.Contains(err.Error(), `named "nobody"?`) {
			t.Error(err)
		}
		if n := s.run[alice].node.Stats().FramesSent - before; n != 1 {
			t.Errorf("%d messages", n)
		}
		s.kill(bob)
		time.Sleep(5 * time.Second)
		time.AfterFunc(time.Second, func() { s.start(bob) })
		before = s.run[alice].node.Stats().FramesSent
		_, err = s.dialBob(s.to.Append(route.Local("nobody")))
		if !errors.Is(err, ErrTimeout) || errors.Is(err, ErrPeerOffline) || !strings.Contains(err.Error(), "has not said that it stayed so") {
			t.Error(err)
		}
		if n := s.run[alice].node.Stats().FramesSent - before; n < 4 {
			t.Errorf("%d messages", n)
		}
	})
}

// TestClosedAsThePathGoes: a channel that its program closes in the moment that its path
// goes leaves nothing behind.
func TestClosedAsThePathGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.dials = false, true
		defer s.close()
		s.startAll()
		p := s.run[alice]
		for range 30 {
			ch := p.dial(s)
			ch.gone <- struct{}{}
			_ = ch.Close()
			synctest.Wait()
			if n := len(p.node.endpoint.Channels()); n != 0 {
				t.Fatalf("%d channels are left", n)
			}
		}
	})
}
