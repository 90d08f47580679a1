package device

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// A claim that gets no answer is made again, on the same connection.
func TestClaimIsMadeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		cfg := h.config()
		cfg.Identity = hubFor(t) // one of this bubble: the node waits for its rotation
		wait := h.connect(t.Context(), cfg)
		c := h.subscribed()
		c.answer(&hubproto.HelloAnswer{Time: time.Now(), FrameLimit: 64 << 10, Window: 1024, Features: hubproto.FeatureClaims})
		n, err := wait()
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the node looks for forwarders to register again
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		created := make(chan error, 1)
		go func() {
			_, err := n.CreateForwarder(t.Context(), "listener")
			created <- err
		}()
		next := func() route.Frame {
			p := c.publish()
			c.puback(p.MessageID)
			return c.frames(p)[0]
		}
		reg := next()
		c.deliver(route.Frame{Onward: reg.Return, Return: route.To("FWD_0123456789abcdef"), Payload: bare.AppendString(nil, "FWD_0123456789abcdef")})
		var numbers []uint64
		for range 3 {
			f := next()
			if f.Onward.String() != "0#"+hubproto.ServiceClaim {
				t.Fatalf("a frame for %v", f.Onward)
			}
			claim, err := hubproto.ParseClaim(f.Payload)
			if err != nil {
				t.Fatal(err)
			}
			numbers = append(numbers, claim.Number)
		}
		if numbers[0] >= numbers[1] || numbers[1] >= numbers[2] {
			t.Errorf("numbers %v", numbers)
		}
		if err := <-created; err != nil {
			t.Error(err)
		}
		finish(n, c)
	})
}

// TestClaimIsRenewed: a claim is signed again once half of its time has run, and not
// before, and the hub takes it, so that at every moment it proves the owner for half of
// that time and more; also when the device was away at the moment that it was due.
func TestClaimIsRenewed(t *testing.T) {
	const round = 12 * time.Hour // how much later than at its half
	synctest.Test(t, func(t *testing.T) {
		s := newHealSim(t, 2)
		s.faults, s.stream, s.dials = false, false, true
		defer s.close()
		s.startHub(nil)
		s.start(bob)
		f := <-s.forwarder
		s.start(alice)
		time.Sleep(time.Second)
		kept := func() *hubproto.Claim {
			t.Helper()
			c, err := hubproto.ParseClaim(s.hub.Forwarder(f.Address()).Claim)
			if err != nil {
				t.Fatalf("the hub's claim: %v", err)
			}
			o, err := s.run[alice].node.Lookup(t.Context(), f.Address())
			if err != nil || !o.Signed || o.Number != c.Number || !o.Until.Equal(c.Until) || o.Owner != s.names[bob].Identifier() {
				t.Fatalf("after %v: %+v, %v", time.Since(epoch2000), o, err)
			}
			return c
		}
		first := kept()
		made := first.Until.Add(-hubproto.ClaimTTL)
		if d := time.Since(made); d < 0 || d > 5*time.Second {
			t.Fatalf("made %v ago", d)
		}
		time.Sleep(time.Until(made.Add(hubproto.ClaimTTL/2 - time.Minute)))
		if c := kept(); c.Number != first.Number {
			t.Errorf("signed again after %v", time.Since(made))
		}
		time.Sleep(time.Minute + round + time.Minute)
		second := kept()
		if again := second.Until.Sub(first.Until); second.Number <= first.Number || again < hubproto.ClaimTTL/2 || again > hubproto.ClaimTTL/2+round {
			t.Errorf("number %d after %d, %v later", second.Number, first.Number, again)
		}

		// And so on: never short of time, and never for nothing.
		signed, last, begun := 0, second.Number, time.Now()
		for time.Since(begun) < 8*hubproto.ClaimTTL {
			time.Sleep(round / 2)
			c := kept()
			if left := time.Until(c.Until); left < hubproto.ClaimTTL/2-round {
				t.Fatalf("only %v left after %v", left, time.Since(begun))
			}
			if c.Number != last {
				signed, last = signed+1, c.Number
			}
		}
		if signed < 8 || signed > 16 {
			t.Errorf("signed %d times in %v", signed, time.Since(begun))
		}

		// Away when it is due, and back after its end.
		s.run[bob].way.mu.Lock()
		s.run[bob].way.dead = true
		s.run[bob].way.mu.Unlock()
		s.run[bob].way.cut()
		time.Sleep(hubproto.ClaimTTL + time.Hour)
		if o, err := s.run[alice].node.Lookup(t.Context(), f.Address()); err == nil && o.Signed {
			t.Errorf("a claim that has ended counts as signed: %+v", o)
		}
		s.run[bob].way.mu.Lock()
		s.run[bob].way.dead = false
		s.run[bob].way.mu.Unlock()
		time.Sleep(time.Minute) // the longest pause between attempts is half of that
		if c := kept(); time.Until(c.Until) < hubproto.ClaimTTL-2*time.Minute {
			t.Errorf("only %v left after it came back", time.Until(c.Until))
		}
	})
}
