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
		wait := h.connect(t.Context(), h.config())
		c := h.subscribed()
		c.answer(&hubproto.HelloAnswer{Time: time.Now(), FrameLimit: 64 << 10, Window: 1024, Features: hubproto.FeatureClaims})
		n, err := wait()
		if err != nil {
			t.Fatal(err)
		}
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
