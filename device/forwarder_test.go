package device

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// registration takes the next packet, which is a registration, and acknowledges it.
func (c *fakeConn) registration() route.Frame {
	c.t.Helper()
	p := c.publish()
	f := c.frames(p)[0]
	if first, _ := f.Onward.First(); first != route.Local(dynamicService) {
		c.t.Fatalf("%v instead of a registration", f.Onward)
	}
	c.puback(p.MessageID)
	return f
}

// registered answers one.
func (c *fakeConn) registered(f route.Frame, address string) {
	c.t.Helper()
	c.deliver(route.Frame{Onward: f.Return, Return: route.To(address), Payload: bare.AppendString(nil, address)})
}

// TestRegistrationIsAskedForAgain: an answer to a registration that stays away, though the
// connection lives and the hub has acknowledged the question, is asked for again; the first
// time and on later connections, until it comes or the hub refuses.
func TestRegistrationIsAskedForAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const address = "FWD_0123456789abcdef"
		h := newFakeHub(t)
		cfg := h.config()
		events := &eventLog{}
		cfg.OnEvent = events.add
		n, c := online(t, h, cfg, 1024)
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		var f *Forwarder
		created := make(chan error, 1)
		go func() {
			var err error
			f, err = n.CreateForwarder(t.Context(), "listener")
			created <- err
		}()
		// asked wants the next registration after a pause.
		var last time.Time
		asked := func(low, high time.Duration) route.Frame {
			t.Helper()
			r := c.registration()
			if d := time.Since(last); !last.IsZero() && (d < low || d > high) {
				t.Errorf("asked again after %v, not between %v and %v", d, low, high)
			}
			last = time.Now()
			return r
		}
		asked(0, 0)
		asked(askAgain, askAgain)
		c.registered(asked(2*askAgain, 2*askAgain), address)
		if err := <-created; err != nil || f.Address() != address {
			t.Fatalf("%v: %v", f, err)
		}
		// An answer that is late for the first question changes nothing.
		c.registered(route.Frame{Return: route.To(f.m)}, address)

		_ = c.Close()
		c, last = h.ready(1024), time.Time{}
		asked(0, 0)
		const jittered = 5 * time.Second / 4
		asked(askAgain, askAgain+jittered)
		c.deliverNotice(asked(2*askAgain, 2*askAgain+jittered), hubproto.ReasonFull) // busy
		asked(2*askAgain, 6*askAgain)
		c.registered(asked(8*askAgain, 8*askAgain+jittered), address)
		go c.serve(func(f route.Frame) { t.Errorf("asked after the answer: %v", f) })
		time.Sleep(time.Hour)

		// Another connection asks anew, and the pauses start over.
		_ = c.Close()
		c, last = h.ready(1024), time.Time{}
		asked(0, 0)
		_ = c.Close()
		c, last = h.ready(1024), time.Time{}
		asked(0, 0)
		c.deliverNotice(asked(askAgain, askAgain+jittered), hubproto.ReasonRefused)
		synctest.Wait()
		if all := events.kinds(); all[len(all)-1] != EventForwarderFailed {
			t.Errorf("events %v", all)
		}
		f.Close()
		finish(n, c)
	})
}

// deliverNotice answers a frame with a notice.
func (c *fakeConn) deliverNotice(f route.Frame, r hubproto.Reason) {
	c.t.Helper()
	first, _ := f.Onward.First()
	last, _ := f.Return.Last()
	body, err := (&hubproto.Notice{Reason: r, HasFirst: true, FirstHop: first, HasReturn: true, LastReturn: last, Count: 1}).Marshal()
	if err != nil {
		c.t.Fatal(err)
	}
	c.deliver(route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To(hubproto.NoticeSource), Payload: body})
}

// TestRegistrationWithoutAnswer: it is given up after 30 s, and leaves nothing to send.
func TestRegistrationWithoutAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		asked := 0
		go c.serve(func(route.Frame) { asked++ })
		begun := time.Now()
		if _, err := n.CreateForwarder(t.Context(), "listener"); !errors.Is(err, ErrTimeout) {
			t.Errorf("%v", err)
		}
		synctest.Wait()
		if d := time.Since(begun); d != registerTime || asked != 3 {
			t.Errorf("asked %d times in %v", asked, d)
		}
		_ = n.Close()
		_ = c.Close()
	})
}

// TestAliasThatIsNone: an empty alias is no dynamic forwarder, and of a malformed one it is
// said that it is, not that somebody else has it.
func TestAliasThatIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		asked := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.serve(func(f route.Frame) {
				asked++
				c.deliverNotice(f, hubproto.ReasonRefused)
			})
		}()
		for _, alias := range []string{"", "a#b", registerText} {
			if _, err := n.CreateForwarder(t.Context(), "listener", Alias(alias)); err == nil || errors.Is(err, ErrAliasRefused) {
				t.Errorf("%q: %v", alias, err)
			}
		}
		if asked != 0 {
			t.Errorf("the hub was asked %d times", asked)
		}
		for alias, malformed := range map[string]bool{"pump 7": true, "pumpe/ä": true, strings.Repeat("x", 129): true, "pump-7": false, strings.Repeat("x", 128): false} {
			_, err := n.CreateForwarder(t.Context(), "listener", Alias(alias))
			if !errors.Is(err, ErrAliasRefused) || strings.Contains(err.Error(), "use letters") != malformed || strings.Contains(err.Error(), "another identity") == malformed {
				t.Errorf("%q: %v", alias, err)
			}
		}
		_ = n.Close()
		<-done
	})
}

// TestFirstContactBeforeASecondForwarder: what comes through one of an earlier process is
// answered once the program has made it again.
func TestFirstContactBeforeASecondForwarder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		c.deliver(route.Frame{Onward: route.To(n.furtherAddress("listener", 0)), Return: route.To("dev_x", "h"), Payload: make([]byte, 32)})
		synctest.Wait()
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.serve(func(f route.Frame) {
				if first, _ := f.Onward.First(); first == route.Local(dynamicService) {
					last, _ := f.Return.Last()
					c.registered(f, "FWD_"+last.Value)
				}
			})
		}()
		for _, want := range []uint64{0, 1} {
			f, err := n.CreateForwarder(t.Context(), "listener")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			synctest.Wait()
			if s := n.endpoint.Stats(); uint64(s.HalfOpen)+s.Failed != want {
				t.Errorf("%d handshakes, want %d", s.HalfOpen, want)
			}
		}
		_ = n.Close()
		<-done
	})
}
