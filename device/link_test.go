package device

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// online connects a node to a fake hub.
func online(t *testing.T, h *fakeHub, cfg Config, window uint64) (*Node, *fakeConn) {
	t.Helper()
	wait := h.connect(t.Context(), cfg)
	c := h.ready(window)
	n, err := wait()
	if err != nil {
		t.Fatal(err)
	}
	return n, c
}

func send(t *testing.T, n *Node, to string, i int) {
	t.Helper()
	if err := n.Send(t.Context(), route.To(to), fmt.Append(nil, i)); err != nil {
		t.Fatal(err)
	}
}

// finish closes the node while the hub goes on answering.
func finish(n *Node, c *fakeConn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.serve(nil)
	}()
	_ = n.Close()
	<-done
}

func TestUnacknowledgedIsSentAgainInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		for i := range 10 {
			send(t, n, "x", i)
			synctest.Wait() // one publish each
			p := c.publish()
			if i < 3 {
				c.puback(p.MessageID)
			}
		}
		synctest.Wait()
		_ = c.Close()

		c = h.ready(1024)
		if c.hello.Fresh {
			t.Error("the second hello of a process says fresh")
		}
		var got []string
		for len(got) < 7 {
			p := c.publish()
			for _, f := range c.frames(p) {
				got = append(got, string(f.Payload))
			}
			c.puback(p.MessageID)
		}
		if want := "3 4 5 6 7 8 9"; strings.Join(got, " ") != want {
			t.Errorf("sent again: %v, want %v", got, want)
		}
		if err := n.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if s := n.Stats(); s.Resent != 7 || s.Acknowledged != 10 || s.QueuedFrames != 0 || s.Connects != 2 {
			t.Errorf("stats: %+v", s)
		}
		finish(n, c)
	})
}

// TestHelloAfterSilence: a process whose first hello got no answer, or a late one, may have
// channels since then; it says fresh no more, so nothing is discarded that is for them.
func TestHelloAfterSilence(t *testing.T) {
	for name, late := range map[string]bool{"none": false, "late": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				wait := h.connect(t.Context(), h.config())
				c := h.subscribed()
				n, err := wait() // after HelloTimeout
				if err != nil {
					t.Fatal(err)
				}
				if !c.hello.Fresh {
					t.Error("the first hello of a process does not say fresh")
				}
				if late {
					c.answer(&hubproto.HelloAnswer{Time: time.Now(), Window: 8})
				}
				_ = c.Close()
				if c = h.subscribed(); c.hello.Fresh {
					t.Error("the second hello of a process that was online says fresh")
				}
				finish(n, c)
			})
		})
	}
}

// TestLongestReconnectPause: they grow to what the configuration says, and not beyond.
func TestLongestReconnectPause(t *testing.T) {
	for name, tt := range map[string]struct{ set, longest time.Duration }{
		"default": {0, 30 * time.Second},
		"least":   {time.Second, time.Second},
		"most":    {time.Hour, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := newFakeHub(t).config()
				cfg.KeepTrying, cfg.MaxReconnectPause = true, tt.set
				var tries []time.Time
				cfg.DialNetwork = func(context.Context, string, string) (net.Conn, error) {
					tries = append(tries, time.Now())
					return nil, errors.New("no network")
				}
				ctx, cancel := context.WithTimeout(t.Context(), 100*tt.longest)
				defer cancel()
				if _, err := Connect(ctx, "mqtt://hub.test", cfg); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatal(err)
				}
				synctest.Wait()
				var longest time.Duration
				for i := range tries[1:] {
					longest = max(longest, tries[i+1].Sub(tries[i]))
				}
				if first := tries[1].Sub(tries[0]); first > firstPause*3/2 {
					t.Errorf("the first pause is %v", first)
				}
				if longest > tt.longest || longest < tt.longest*2/3 {
					t.Errorf("the longest pause is %v, want %v", longest, tt.longest)
				}
			})
		})
	}
}

func TestPubackOfUnknownIDIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		send(t, n, "x", 1)
		p := c.publish()
		for id := range uint16(300) {
			if id != p.MessageID {
				c.puback(id)
			}
		}
		synctest.Wait()
		if s := n.Stats(); s.Acknowledged != 0 || s.QueuedFrames != 1 {
			t.Errorf("stats: %+v", s)
		}
		c.puback(p.MessageID)
		c.puback(p.MessageID)
		if err := n.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		finish(n, c)
	})
}

// gate is a log handler that waits at the line about what was not delivered.
type gate struct {
	slog.Handler
	open chan struct{}
}

func (g gate) Enabled(context.Context, slog.Level) bool { return true }

func (g gate) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelWarn && strings.Contains(r.Message, "could not deliver") {
		<-g.open
	}
	return nil
}

// What the hub says of a packet before it acknowledges it is known when Flush
// returns, although the client library handles publishes on another goroutine.
func TestFlushHearsNoticesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		var log eventLog
		open := make(chan struct{})
		cfg := h.config()
		cfg.OnEvent, cfg.Logger = log.add, slog.New(gate{slog.DiscardHandler, open})
		n, c := online(t, h, cfg, 1024)
		send(t, n, "nobody", 1)
		p := c.publish()
		c.notice(hubproto.ReasonUnknown, "nobody")
		c.puback(p.MessageID)
		flushed := make(chan error, 1)
		go func() { flushed <- n.Flush(t.Context()) }()
		synctest.Wait()
		if len(flushed) > 0 {
			t.Error("Flush returned before the notice was handled")
		}
		close(open)
		if err := <-flushed; !errors.Is(err, ErrUnknownAddress) {
			t.Errorf("Flush: %v", err)
		}
		synctest.Wait()
		if kinds := log.kinds(); kinds[len(kinds)-1] != EventUndelivered {
			t.Errorf("events: %v", kinds)
		}
		finish(n, c)
	})
}

// TestExpiredIsNotOffline: who has not taken what expired may be connected and not read.
func TestExpiredIsNotOffline(t *testing.T) {
	for reason, want := range map[hubproto.Reason]error{hubproto.ReasonExpired: ErrExpired, hubproto.ReasonOffline: ErrPeerOffline} {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				n, c := online(t, h, h.config(), 1024)
				send(t, n, "peer", 1)
				c.puback(c.publish().MessageID)
				c.notice(reason, "peer")
				synctest.Wait()
				err := n.Flush(t.Context())
				if offline := errors.Is(err, ErrPeerOffline); !errors.Is(err, want) || offline != (want == ErrPeerOffline) {
					t.Errorf("Flush: %v", err)
				}
				finish(n, c)
			})
		})
	}
}

// A hub that withholds the acknowledgements of one target holds up a quarter of the
// window, and nobody else.
func TestWithheldAcknowledgementsStallOneTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 16)
		for i := range 20 {
			send(t, n, "full", i)
			synctest.Wait()
			if i < 4 {
				c.publish()
			}
		}
		for i := range 50 {
			send(t, n, "other", i)
			p := c.publish()
			if f := c.frames(p); f[0].Onward[0].Value != "other" {
				t.Fatalf("frame for %v beyond the share of the window", f[0].Onward)
			}
			c.puback(p.MessageID)
		}
		synctest.Wait()
		if s := n.Stats(); s.QueuedFrames != 20 {
			t.Errorf("queued: %d", s.QueuedFrames)
		}
		finish(n, c)
	})
}

func TestBacklogIsBundled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 4) // share: one packet
		send(t, n, "x", 0)
		first := c.publish()
		for i := 1; i <= 1000; i++ {
			send(t, n, "x", i)
		}
		big := bytes.Repeat([]byte{7}, 40<<10)
		if err := n.Send(t.Context(), route.To("x"), big); err != nil {
			t.Fatal(err)
		}
		send(t, n, "x", 1001)
		c.puback(first.MessageID)
		next, packetsSeen := 1, 0
		for next <= 1001 {
			p := c.publish()
			packetsSeen++
			frames := c.frames(p)
			switch {
			case len(p.Payload) > bundleBytes && len(frames) > 1, len(frames) > bundleFrames:
				t.Fatalf("a bundle of %d bytes and %d frames", len(p.Payload), len(frames))
			}
			for _, f := range frames {
				if len(f.Payload) == len(big) {
					continue
				}
				if string(f.Payload) != fmt.Sprint(next) {
					t.Fatalf("frame %q instead of %d", f.Payload, next)
				}
				next++
			}
			c.puback(p.MessageID)
		}
		if packetsSeen > 10 {
			t.Errorf("%d packets for 1,002 frames", packetsSeen)
		}
		finish(n, c)
	})
}

func TestFullOutboxMakesSendersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		cfg := h.config()
		cfg.QueuedFrames = 8
		n, c := online(t, h, cfg, 1024)
		go c.drain()       // never acknowledges
		for i := range 4 { // a first hop may fill half of what is free
			send(t, n, "x", i)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := n.Send(ctx, route.To("x"), nil)
		if !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("full outbox: %v", err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		failed := make(chan error)
		go func() { failed <- n.Send(ctx, route.To("x"), nil) }()
		synctest.Wait()
		cancel()
		if err := <-failed; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		send(t, n, "y", 0) // there is room for others
		_ = c.Close()
		_ = n.Close()
		if err := n.Send(t.Context(), route.To("x"), nil); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestSendersWaitInOrder(t *testing.T) {
	o := newOutbox(2, 1<<20)
	ctx := t.Context()
	for range 2 {
		if err := o.put(ctx, "x", []byte{0}, route.Stored); err != nil && o.frames != 1 {
			t.Fatal(err)
		}
		if o.frames == 1 {
			break
		}
	}
	done := make(chan int, 20)
	for i := range 20 {
		before := len(o.putters)
		go func() {
			if err := o.put(ctx, "x", []byte{byte(i)}, route.Stored); err != nil {
				t.Error(err)
			}
			done <- i
		}()
		for waiting := before; waiting == before; {
			o.mu.Lock()
			waiting = len(o.putters)
			o.mu.Unlock()
		}
	}
	gen := o.attach(8, bundleBytes)
	var got []byte
	for len(got) < 21 {
		p, ok := o.take(gen)
		if !ok {
			t.Fatal("nothing to send")
		}
		for _, f := range p.frames {
			got = append(got, f[0])
		}
		o.ack(gen, p.token)
	}
	for range 20 {
		<-done
	}
	if !slices.IsSorted(got) {
		t.Errorf("order: %v", got)
	}
}

func TestTransientFramesAreDroppedWithoutConnection(t *testing.T) {
	o := newOutbox(8, 1<<20)
	put := func(class route.Class, b byte) {
		t.Helper()
		if err := o.put(t.Context(), "x", []byte{b}, class); err != nil {
			t.Fatal(err)
		}
	}
	put(route.Transient, 0)
	put(route.Stored, 1)
	gen := o.attach(8, bundleBytes)
	put(route.Transient, 2)
	put(route.Stored, 3)
	var got []byte
	for {
		p, ok := o.take(gen)
		if !ok {
			break
		}
		for _, f := range p.frames {
			got = append(got, f[0])
		}
	}
	if !bytes.Equal(got, []byte{1, 2, 3}) {
		t.Errorf("sent %v", got)
	}
	put(route.Stored, 4)
	put(route.Transient, 5)
	o.detach(gen)
	gen = o.attach(8, bundleBytes)
	p, _ := o.take(gen)
	if want := [][]byte{{1}, {3}, {4}}; !slices.EqualFunc(p.frames, want, bytes.Equal) {
		t.Errorf("sent again: %v", p.frames)
	}
	if n := o.dropped[dropNoConnection]; n != 2 {
		t.Errorf("dropped %d", n)
	}
	o.ack(gen+1, p.token)
	o.ack(gen, p.token+1)
	if o.frames != 3 {
		t.Error("an acknowledgement of another connection counted")
	}
	o.ack(gen, p.token)
	if o.frames != 0 || o.bytes != 0 || len(o.flows) != 0 {
		t.Errorf("left over: %d frames, %d bytes, %d flows", o.frames, o.bytes, len(o.flows))
	}
}

func TestRefusedConnections(t *testing.T) {
	for _, tc := range []struct {
		code    byte
		want    error
		forGood bool
	}{
		{packets.ErrRefusedBadProtocolVersion, ErrHubRefused, true},
		{packets.ErrRefusedIDRejected, ErrHubRefused, true},
		{packets.ErrRefusedServerUnavailable, ErrHubBusy, false},
		{packets.ErrRefusedBadUsernameOrPassword, ErrBadCredentials, true},
		{packets.ErrRefusedNotAuthorised, ErrNotAllowed, true},
		{77, ErrHubAway, false},
	} {
		t.Run(fmt.Sprint(tc.code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				cfg := h.config()
				wait := h.connect(t.Context(), cfg)
				c := h.connected(tc.code)
				if _, err := wait(); !errors.Is(err, tc.want) || isPermanent(err) != tc.forGood {
					t.Errorf("first attempt: %v", err)
				}
				_ = c.Close()

				// With KeepTrying only what is not for good is tried again.
				cfg.KeepTrying = true
				wait = h.connect(t.Context(), cfg)
				c = h.connected(tc.code)
				if tc.forGood {
					if _, err := wait(); !errors.Is(err, tc.want) {
						t.Errorf("keep trying: %v", err)
					}
					_ = c.Close()
					return
				}
				_ = c.Close()
				c = h.ready(8)
				n, err := wait()
				if err != nil {
					t.Fatal(err)
				}
				finish(n, c)
			})
		})
	}
}

func TestConnectEndsWithItsContext(t *testing.T) {
	stages := map[string]func(h *fakeHub) *fakeConn{
		"network": func(*fakeHub) *fakeConn { return nil },
		"CONNACK": func(h *fakeHub) *fakeConn { return h.raw() },
		"SUBACK":  func(h *fakeHub) *fakeConn { return h.connected(packets.Accepted) },
		"hello":   func(h *fakeHub) *fakeConn { return h.subscribed() },
	}
	for name, stage := range stages {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				ctx, cancel := context.WithCancel(t.Context())
				cfg := h.config()
				cfg.KeepTrying = true
				wait := h.connect(ctx, cfg)
				c := stage(h)
				synctest.Wait()
				begun := time.Now()
				cancel()
				if c != nil {
					c.drain()
				}
				if _, err := wait(); !errors.Is(err, context.Canceled) {
					t.Errorf("error: %v", err)
				}
				if d := time.Since(begun); d > 2*time.Second {
					t.Errorf("took %v", d)
				}
				if c != nil {
					_ = c.Close()
				}
			})
		})
	}
}

func TestAttemptTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		wait := h.connect(t.Context(), h.config())
		c := h.raw() // never answers
		go c.drain()
		if _, err := wait(); !errors.Is(err, ErrHubAway) {
			t.Errorf("error: %v", err)
		}
		_ = c.Close()
	})
}

// Whatever a hub sends, the device does not crash: it ends the connection and makes
// another.
func TestMalformedPacketsEndTheConnection(t *testing.T) {
	publish := func(first byte, rest ...byte) []byte { return append([]byte{first, byte(len(rest))}, rest...) }
	cases := map[string][]byte{
		"SUBACK with too many codes":  {0x90, 5, 0, 1, 0, 0, 0},
		"SUBACK without a code":       {0x90, 2, 0, 1},
		"second CONNACK":              {0x20, 2, 0, 0},
		"CONNECT":                     publish(0x10, 0, 4, 'M', 'Q', 'T', 'T', 4, 0, 0, 0, 0, 0),
		"SUBSCRIBE":                   publish(0x82, 0, 1, 0, 1, 'x', 0),
		"PINGREQ":                     {0xc0, 0},
		"DISCONNECT":                  {0xe0, 0},
		"type 0":                      {0x00, 0},
		"type 15":                     {0xf0, 0},
		"PUBACK too short":            {0x40, 1, 0},
		"PUBACK too long":             {0x40, 3, 0, 1, 2},
		"PUBREC":                      {0x50, 2, 0, 1},
		"PUBREL":                      {0x62, 2, 0, 1},
		"publish of QoS 2":            publish(0x34, 0, 1, 'x', 0, 1),
		"publish of QoS 3":            publish(0x36, 0, 1, 'x', 0, 1),
		"publish with topic too long": publish(0x30, 0, 99, 'x'),
		"publish without id":          publish(0x32, 0, 1, 'x'),
		"empty publish":               publish(0x30),
		"length of five bytes":        {0x30, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"256 MiB":                     {0x30, 0xff, 0xff, 0xff, 0x7f},
		"PINGRESP with a body":        {0xd0, 1, 0},
	}
	for name, raw := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				n, c := online(t, h, h.config(), 8)
				go func() { _, _ = c.Write(raw) }()
				c.drain()
				_ = c.Close()
				c = h.ready(8)
				send(t, n, "x", 1)
				c.puback(c.publish().MessageID)
				finish(n, c)
			})
		})
	}
}

// What is no bundle of frames is counted and dropped whole, and acknowledged.
func TestMalformedFramesAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 8)
		a := route.AppendFrame(nil, &route.Frame{Onward: route.To("app")})
		b := route.AppendFrame(nil, &route.Frame{Onward: route.To("other")})
		for i, payload := range [][]byte{nil, {0xff}, a[:len(a)-1], append(bytes.Clone(a), b...), append(bytes.Clone(a), 0)} {
			c.write(inboxPublish(c.device, uint16(100+i), payload))
			if ack := c.read().(*packets.PubackPacket); ack.MessageID != uint16(100+i) {
				t.Fatalf("PUBACK %d", ack.MessageID)
			}
		}
		s := n.Stats()
		if s.Dropped["malformed"] < 4 || s.Local.Delivered != 0 {
			t.Errorf("stats: %+v", s)
		}
		finish(n, c)
	})
}

// A hub that stops reading is given up after the write timeout, and nothing is lost.
func TestStalledHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		for i := range 20 {
			send(t, n, "x", i)
		}
		begun := time.Now()
		c2 := h.ready(1024)
		if d := time.Since(begun); d > 15*time.Second {
			t.Errorf("noticed after %v", d)
		}
		_ = c.Close()
		next := 0
		for next < 20 {
			p := c2.publish()
			for _, f := range c2.frames(p) {
				if string(f.Payload) != fmt.Sprint(next) {
					t.Fatalf("%q instead of %d", f.Payload, next)
				}
				next++
			}
			c2.puback(p.MessageID)
		}
		finish(n, c2)
	})
}

// A hub that takes nothing more holds up whoever sends, but not Close.
func TestCloseWhileTheHubTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		for range 64 { // far more than fits into the connection's buffer
			if err := n.Send(t.Context(), route.To("x"), make([]byte, 60<<10)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait() // what sends is stuck now
		begun := time.Now()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if d := time.Since(begun); d > 2*closeFlush {
			t.Errorf("Close took %v", d)
		}
		_ = c.Close()
	})
}

// A hub that falls silent is noticed by the keep-alive.
func TestSilentHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 8)
		go c.drain() // reads, and never says a word
		begun := time.Now()
		c2 := h.ready(8)
		if d := time.Since(begun); d > 60*time.Second {
			t.Errorf("noticed after %v", d)
		}
		_ = c.Close()
		// An idle connection that answers pings stays.
		go c2.serve(nil)
		time.Sleep(10 * time.Minute)
		if n.State() != Online || n.Stats().Connects != 2 {
			t.Errorf("state %v after %d connections", n.State(), n.Stats().Connects)
		}
		_ = n.Close()
	})
}

func TestPausesGrowToHalfAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		var log eventLog
		cfg := h.config()
		cfg.OnEvent = log.add
		n, c := online(t, h, cfg, 8)
		_ = c.Close()
		var longest time.Duration
		last := time.Now()
		for range 40 {
			c := h.raw()
			longest = max(longest, time.Since(last))
			_ = c.Close()
			last = time.Now()
		}
		if longest > 30*time.Second || longest < 15*time.Second {
			t.Errorf("longest pause %v", longest)
		}
		c = h.ready(8)
		synctest.Wait() // until the device has taken the answer
		finish(n, c)
		synctest.Wait()
		kinds := log.kinds()
		if kinds[0] != EventOnline || kinds[len(kinds)-2] != EventOnline || kinds[len(kinds)-1] != EventStopped {
			t.Errorf("events: %v", kinds)
		}
	})
}

// TestRefusalsPass: a node that has been online outlives what a hub says while its lists,
// its certificate or this device's credential are being put right.
func TestRefusalsPass(t *testing.T) {
	refusals := map[string]struct {
		want error
		fail func(h *fakeHub)
	}{
		"not allowed":          {ErrNotAllowed, func(h *fakeHub) { _ = h.connected(packets.ErrRefusedNotAuthorised).Close() }},
		"bad credentials":      {ErrBadCredentials, func(h *fakeHub) { _ = h.connected(packets.ErrRefusedBadUsernameOrPassword).Close() }},
		"another server there": {ErrHubAway, func(h *fakeHub) { _ = h.raw().Close() }},
	}
	for name, tc := range refusals {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFakeHub(t)
				var log eventLog
				cfg := h.config()
				cfg.OnEvent = log.add
				n, c := online(t, h, cfg, 8)
				_ = c.Close()
				for range 3 {
					tc.fail(h)
				}
				c = h.ready(8)
				synctest.Wait()
				if n.State() != Online || n.Err() != nil {
					t.Errorf("%v: %v", n.State(), n.Err())
				}
				if seen := log.errs(EventOffline); !slices.ContainsFunc(seen, func(err error) bool { return errors.Is(err, tc.want) }) {
					t.Errorf("told %v", seen)
				}
				finish(n, c)
			})
		})
	}
}

// TestCertificatePasses is TestRefusalsPass for what the TLS handshake ends with.
func TestCertificatePasses(t *testing.T) {
	for name, err := range map[string]error{
		"certificate": &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}},
		"no TLS":      tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"},
	} {
		if err := tlsError(hubURL{}, err); !isFinal(err, false) || isFinal(err, true) {
			t.Errorf("%s: %v: final for a new node %v, for one that was online %v", name, err, isFinal(err, false), isFinal(err, true))
		}
	}
	if err := permanent(ErrWrongHub); !isFinal(err, true) {
		t.Error("another hub is accepted in the place of the first")
	}
}

func TestTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 8)
		notice := hubproto.Notice{Reason: hubproto.ReasonTakenOver}
		body, err := notice.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		// Not from the hub: stamped with a device's address, or two hops.
		c.deliver(route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To("dev_0123456789abcdef0123456789abcdef"), Payload: body})
		c.deliver(route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To("dev_0123456789abcdef0123456789abcdef", "notice"), Payload: body})
		c.deliver(route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To("echo"), Payload: body})
		synctest.Wait()
		if n.State() != Online || n.Stats().Dropped["not-from-hub"] != 3 {
			t.Fatalf("state %v, dropped %v", n.State(), n.Stats().Dropped)
		}
		waiting := make(chan error)
		go func() {
			_, err := n.Receive(t.Context(), "app")
			waiting <- err
		}()
		f := route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To(hubproto.NoticeSource), Payload: body}
		c.write(inboxPublish(c.device, 500, route.AppendFrame(nil, &f)))
		_ = c.Close() // at once, as a hub does
		if err := <-waiting; !errors.Is(err, ErrTakenOver) {
			t.Errorf("Receive: %v", err)
		}
		<-n.Done()
		if !errors.Is(n.Err(), ErrTakenOver) || n.State() != Stopped {
			t.Errorf("%v: %v", n.State(), n.Err())
		}
		if err := n.Send(t.Context(), route.To("x"), nil); !errors.Is(err, ErrTakenOver) {
			t.Errorf("Send: %v", err)
		}
		if _, err := n.Dial(t.Context(), route.To("x"), nil); err == nil {
			t.Error("Dial without a policy")
		}
		_ = n.Close()
	})
}

// TestBrokerWithoutHub: a broker that takes everything and answers nothing, as one does
// that has no hub, is said to be perhaps that when a call to the hub gets no answer.
func TestBrokerWithoutHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		wait := h.connect(t.Context(), h.config())
		c := h.subscribed()
		go c.serve(nil)
		n, err := wait()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
			t.Fatal(err)
		}
		_, err = n.CreateForwarder(t.Context(), "listener")
		if !errors.Is(err, ErrNoAnswer) || !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "without a hub") {
			t.Errorf("registration: %v", err)
		}
		_, err = n.Dial(t.Context(), route.To("FWD_1"), channel.TrustEveryone)
		if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "without a hub") {
			t.Errorf("dial: %v", err)
		}
		_ = n.Close()
		_ = c.Close()
	})
}

// Flush does not take a connection that ended for an acknowledgement.
func TestFlushOutlivesConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHub(t)
		n, c := online(t, h, h.config(), 1024)
		send(t, n, "x", 1)
		c.publish()
		flushed := make(chan error, 1)
		go func() { flushed <- n.Flush(t.Context()) }()
		synctest.Wait()
		_ = c.Close()
		c = h.ready(1024)
		p := c.publish()
		time.Sleep(time.Second)
		if len(flushed) > 0 {
			t.Fatalf("Flush returned %v before the PUBACK", <-flushed)
		}
		c.puback(p.MessageID)
		if err := <-flushed; err != nil {
			t.Error(err)
		}
		finish(n, c)
	})
}
