package tcp

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/testpipe"
	"github.com/sealmq/sealmq/route"
)

// TestSlowLoris: whoever sends too slowly is cut, whoever waits between frames is
// not.
func TestSlowLoris(t *testing.T) {
	const preamble, first, whole = 7 * time.Second, 3 * time.Minute, 20 * time.Second
	frame := framed(route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("r"), Payload: make([]byte, 1000)}))
	for _, tt := range []struct {
		name   string
		setup  func(*Config)
		act    func(p *peer)
		after  time.Duration // from the end of act
		reason Event
	}{
		{"no preamble", nil, func(*peer) {}, preamble, PreambleTimeout},
		{"no frame", nil, func(p *peer) { p.write([]byte{1}) }, first, FirstFrame},
		{"part of the first frame with the preamble", nil, func(p *peer) { p.write(append([]byte{1}, frame[:7]...)) }, whole, FrameTimeout},
		{"part of a head", nil, func(p *peer) { p.write([]byte{1}); p.write(frame[:2]) }, whole, FrameTimeout},
		{"a byte a second", nil, func(p *peer) {
			p.write(append([]byte{1}, frame...))
			begin := time.Now()
			p.SetWriteDeadline(time.Time{})
			for _, b := range frame {
				if _, err := p.Write([]byte{b}); err != nil {
					if d := time.Since(begin); d < whole || d > whole+2*time.Second {
						t.Errorf("cut after %v", d)
					}
					return
				}
				time.Sleep(time.Second) // synthetic
			}
			t.Error("a frame took 1,000 s")
		}, 0, FrameTimeout},
		{"part of a frame with the end of another", nil, func(p *peer) {
			p.write(append(append([]byte{1}, frame...), frame[:9]...))
		}, whole, FrameTimeout},
		{"idle", func(c *Config) { c.IdleTimeout = time.Hour }, func(p *peer) {
			p.write(append([]byte{1}, frame...))
			for range 3 {
				time.Sleep(50 * time.Minute) // synthetic
				p.write(frame)
			}
		}, time.Hour, Idle},
		{"idle after an oversized frame", func(c *Config) { c.IdleTimeout = time.Hour }, func(p *peer) {
			p.write(append([]byte{1}, frame...))
			p.write(append(route.AppendFrameHeader(nil, 1<<20), make([]byte, 1<<20)...))
		}, time.Hour, Idle},
		{"inside an oversized frame", nil, func(p *peer) {
			p.write(append([]byte{1}, frame...))
			p.write(append(route.AppendFrameHeader(nil, 1<<20), make([]byte, 10)...))
		}, whole, FrameTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHub(t, options{pipes: true, server: func(c *Config) {
					c.PreambleTimeout, c.FirstFrame, c.FrameTimeout = preamble, first, whole
					if tt.setup != nil {
						tt.setup(c)
					}
				}})
				p := h.raw()
				p.t = t
				read := make(chan time.Time, 1)
				go func() {
					_, _ = io.Copy(io.Discard, p.Conn)
					read <- time.Now()
				}()
				tt.act(p)
				begin := time.Now()
				// A frame that has begun gets a little longer for what has come of it.
				if d := (<-read).Sub(begin); tt.after > 0 && (d < tt.after || d > tt.after+time.Second) {
					t.Errorf("cut after %v, want %v", d, tt.after)
				}
				synctest.Wait()
				equal(t, tt.reason.String(), h.counts.Count(tt.reason), 1)
				h.stop()
			})
		})
	}
}

// TestIdleForEver: stock peers send no heartbeat.
func TestIdleForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, options{pipes: true})
		p := h.connect()
		p.alive()
		time.Sleep(30 * 24 * time.Hour) // synthetic
		p.alive()
		h.stop()
	})
}

// TestSteadyLargeFrame: a long frame at a moderate rate is no attack.
func TestSteadyLargeFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wide := route.Limits{Frame: 4 << 20}
		h := newHub(t, options{pipes: true, bridge: func(c *bridge.Config) { c.Limits = wide }, server: func(c *Config) { c.Frames = wide }})
		p := h.connect()
		p.alive()
		body := framed(route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("r"), Payload: make([]byte, 3<<20)}))
		for len(body) > 0 {
			n := min(len(body), 20<<10)
			p.write(body[:n])
			body = body[n:]
			time.Sleep(time.Second) // synthetic
		}
		if f := p.next(); len(f.Payload) != 3<<20 {
			t.Errorf("answer of %d bytes", len(f.Payload))
		}
		h.stop()
	})
}

// TestNeverReads: a peer that takes nothing fills bounded queues; its sender is
// held back for a second at a time, then frames drop, counted; everybody else goes
// on; and the peer itself is cut in the end.
func TestNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const outbox = 20
		h := newHub(t, options{
			pipes:  true,
			bridge: func(c *bridge.Config) { c.OutboxFrames = outbox },
			server: func(c *Config) { c.OutputBytes = 64 << 10; c.ReadWindow = 4; c.StallTimeout = 5 * time.Minute },
		})
		connect := func() *peer {
			p := h.connect()
			p.alive()
			return p
		}
		stuck, a, other := connect(), connect(), connect()
		to := stuck.dynamic("m")
		toOther := other.dynamic("o")
		begin := time.Now()
		const frames = 60
		sent := make(chan time.Duration, 1)
		go func() {
			for range frames {
				a.send(route.To(to, "w"), nil, make([]byte, 4<<10))
			}
			a.send(route.To(toOther, "w"), nil, []byte("done"))
			sent <- time.Since(begin)
		}()
		synctest.Wait()
		// The buffer holds 15 frames, the outbox 20 more that are still unsettled,
		// and four wait: the rest is not even read.
		c := h.b.Counters()
		if c.Queued > 64 || c.Waiting > 4 || c.QueuedBytes > 1<<20 {
			t.Errorf("queued %d (%d bytes), waiting %d", c.Queued, c.QueuedBytes, c.Waiting)
		}
		equal(t, "dropped at once", h.dropped(bridge.DropFull), 0)
		if n := h.s.Buffered(); n < 48<<10 || n > 64<<10 {
			t.Errorf("%d bytes of output", n)
		}
		// Others are undisturbed meanwhile.
		third := connect()
		third.send(route.To(toOther, "w"), nil, []byte("hello"))
		if f := other.next(); string(f.Payload) != "hello" || time.Since(begin) > 0 {
			t.Errorf("others got %+v after %v", f, time.Since(begin))
		}
		if f := other.next(); string(f.Payload) != "done" {
			t.Errorf("the sender's other frames: %+v", f)
		}
		took := <-sent
		dropped := h.dropped(bridge.DropFull)
		if dropped < frames-40 || dropped > frames-outbox || took < 5*time.Second || took > 20*time.Second {
			t.Errorf("%d of %d frames dropped within %v", dropped, frames, took)
		}
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		equal(t, "stalled after four minutes", h.counts.Count(Stalled), 0)
		time.Sleep(7 * time.Minute)
		synctest.Wait()
		equal(t, "stalled", h.counts.Count(Stalled), 1)
		equal(t, "connections", h.s.Conns(), 3)
		equal(t, "queued", h.b.Counters().Queued, 0)
		h.stop()
	})
}

// TestTotalOutput: peers that don't read share one bound, and others still get
// what they read.
func TestTotalOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, most = 200 << 10, 150 << 10
		h := newHub(t, options{
			pipes:  true,
			server: func(c *Config) { c.OutputBytes, c.TotalOutput, c.StallTimeout = most, total, 5*time.Minute },
		})
		connect := func() *peer {
			p := h.connect()
			p.alive()
			return p
		}
		a, other := connect(), connect()
		toOther := other.dynamic("o")
		for i := range 4 {
			to := connect().dynamic(string(rune('k' + i)))
			for range 60 {
				a.send(route.To(to, "w"), nil, make([]byte, 4<<10))
			}
		}
		synctest.Wait()
		if n := h.s.Buffered(); n < total || n > total+most+2*fairOutput {
			t.Errorf("%d bytes buffered", n)
		}
		a.send(route.To(toOther, "w"), nil, []byte("hello"))
		if f := other.next(); string(f.Payload) != "hello" {
			t.Errorf("others got %+v", f)
		}
		h.stop()
	})
}

// TestTotalInput: what has arrived of long frames is bounded over all connections,
// and whoever exceeds it is closed, nobody else.
func TestTotalInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, frame = 200 << 10, 100 << 10
		h := newHub(t, options{
			pipes:  true,
			server: func(c *Config) { c.TotalInput, c.FrameTimeout = total, time.Hour },
		})
		other := h.connect()
		other.alive()
		for range 10 {
			p := h.connect()
			p.alive()
			begun := append(route.AppendFrameHeader(nil, 200<<10), make([]byte, frame)...)
			_, _ = p.Write(begun) // fails where it is closed meanwhile
		}
		synctest.Wait()
		if n := h.s.Arriving(); n == 0 || n > total+frame {
			t.Errorf("%d bytes are arriving", n)
		}
		if n := h.counts.Count(InputFull); n < 7 || int(n)+h.s.Conns() != 11 {
			t.Errorf("%d closed, %d left", n, h.s.Conns())
		}
		other.alive()
		h.stop()
		if n := h.s.Arriving(); n != 0 {
			t.Errorf("%d bytes are left", n)
		}
	})
}

// TestLongFramesOfOneAddressLeaveRoomForOthers: they have half of TotalInput.
func TestLongFramesOfOneAddressLeaveRoomForOthers(t *testing.T) {
	h := newHub(t, options{server: func(c *Config) { c.TotalInput = 800 << 10 }})
	addr, host := "", byte(1)
	plain := h.dial
	h.dial = func() (net.Conn, error) {
		if addr == "" {
			nc, err := plain()
			if err == nil {
				addr = nc.RemoteAddr().String()
			}
			return nc, err
		}
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}}
		return d.DialContext(t.Context(), "tcp", addr)
	}
	for range 9 {
		p := h.connect()
		p.alive()
		begun := append(route.AppendFrameHeader(nil, 200<<10), make([]byte, 100<<10)...)
		_, _ = p.Write(begun) // fails where it is closed meanwhile
	}
	for end := time.Now().Add(patience); h.counts.Count(InputFull) < 5; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d closed, %d bytes arriving", h.counts.Count(InputFull), h.s.Arriving())
		}
	}
	host = 2
	other := h.connect()
	other.send(route.To("echo"), route.To("r"), make([]byte, 200<<10))
	if f := other.next(); len(f.Payload) != 200<<10 {
		t.Errorf("answer of %d bytes", len(f.Payload))
	}
}

// TestBackPressureByBytes: large frames for a slow peer hold their sender back,
// and never make it overrun the bridge's window, which would cut it.
func TestBackPressureByBytes(t *testing.T) {
	h := newHub(t, options{
		bridge: func(c *bridge.Config) {
			c.OutboxFrames, c.WindowBytes, c.StreamWait = 2, 1, time.Minute
		},
		server: func(c *Config) { c.OutputBytes = 1 },
	})
	a, b := h.connect(), h.connect()
	to := b.dynamic("m")
	const frames = 60
	go func() {
		for i := range frames {
			a.send(route.To(to), nil, append(make([]byte, 200<<10), byte(i)))
		}
	}()
	for i := range frames {
		f := b.next()
		if len(f.Payload) != 200<<10+1 || f.Payload[200<<10] != byte(i) {
			t.Fatalf("frame %d has %d bytes", i, len(f.Payload))
		}
	}
	a.alive()
	c := h.b.Counters()
	equal(t, "kicked", c.Kicked[bridge.KickWindow], 0)
	equal(t, "dropped", c.Dropped[bridge.DropFull], 0)
}

// TestOversizedFramesCost: what is read past counts as what a peer sends a second. Its
// other frames wait, and nobody else's.
func TestOversizedFramesCost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 1 << 20
		h := newHub(t, options{pipes: true, bridge: func(c *bridge.Config) { c.ByteRate = rate }})
		p, other := h.connect(), h.connect()
		p.alive()
		begin := time.Now()
		const frames = 12 // of a second's worth each, one of which it has to begin with
		sent := make(chan time.Duration, 1)
		go func() {
			defer func() { sent <- time.Since(begin) }()
			big := append(route.AppendFrameHeader(nil, rate), make([]byte, rate)...)
			for range frames {
				p.SetWriteDeadline(noDeadline)
				if _, err := p.Write(big); err != nil {
					t.Error(err)
				}
			}
		}()
		for range 5 {
			time.Sleep(time.Second)
			other.alive()
		}
		// The window of 8 MiB, and a frame more, may be owed.
		if took := <-sent; took < 2*time.Second {
			t.Errorf("%d MiB were read within %v", frames, took)
		}
		p.alive()
		equal(t, "oversized", h.counts.Count(Oversized), frames)
		h.stop()
	})
}

// TestSilentConnections opens ten thousand connections that say nothing, over
// pipes, which need no file descriptors. Their cost is bounded, and they end.
func TestSilentConnections(t *testing.T) {
	const conns, perConn = 10_000, 32 << 10
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, options{pipes: true, server: func(c *Config) {
			c.Limits = &connlimit.Limits{Conns: conns, PerAddress: -1, Pending: -1}
		}})
		before := memory()
		all := make([]*peer, conns)
		for i := range all {
			all[i] = h.raw()
			if i%2 == 1 {
				all[i].write([]byte{1})
			}
			var b [1]byte
			if _, err := io.ReadFull(all[i], b[:]); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if used := int64(memory()) - int64(before); used > conns*perConn {
			t.Errorf("%d connections take %d KiB, more than %d KiB each", conns, used>>10, perConn>>10)
		} else {
			t.Logf("%d bytes a silent connection", used/conns)
		}
		equal(t, "ports", h.b.Counters().Ports, conns)
		extra := h.raw()
		extra.closed()
		equal(t, "refused", h.counts.Count(RefusedTotal), 1)
		time.Sleep(DefaultPreambleTimeout) // synthetic
		synctest.Wait()
		equal(t, "no preamble", h.counts.Count(PreambleTimeout), conns/2)
		h.connect().alive() // there is room again
		time.Sleep(DefaultFirstFrame)
		synctest.Wait()
		equal(t, "no frame", h.counts.Count(FirstFrame), conns/2)
		equal(t, "ports", h.b.Counters().Ports, 1)
		h.stop()
	})
}

func memory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

func TestConnectionLimits(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits *connlimit.Limits
		bridge func(*bridge.Config)
		reason Event
	}{
		{"total", &connlimit.Limits{Conns: 2}, nil, RefusedTotal},
		{"address", &connlimit.Limits{PerAddress: 2}, nil, RefusedAddress},
		{"pending", &connlimit.Limits{Pending: 2}, nil, RefusedPending},
		{"bridge", &connlimit.Limits{}, func(c *bridge.Config) { c.MaxPorts = 2 }, RefusedBridge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHub(t, options{bridge: tt.bridge, server: func(c *Config) { c.Limits = tt.limits }})
			a, b := h.connect(), h.connect()
			var first [1]byte
			for _, p := range []*peer{a, b} { // both are in
				p.SetReadDeadline(time.Now().Add(patience))
				if _, err := io.ReadFull(p, first[:]); err != nil {
					t.Fatal(err)
				}
			}
			refused := h.raw()
			refused.closed()
			h.counted(tt.reason, 1)
			a.r = route.NewReader(io.MultiReader(newByte(), a.Conn), route.Limits{})
			a.alive()
			if tt.reason == RefusedPending {
				h.connect().alive() // a has shown what it wants
				return
			}
			b.Close()
			h.counted(EndedByPeer, 1)
			h.connect().alive()
		})
	}
}

// TestAcceptFails: without a file for the next connection the server tries again, more
// and more seldom, says so once, and counts.
func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := newHub(t, options{pipes: true, fails: 10, server: func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) }})
		begin := time.Now()
		h.connect().alive()
		if d, want := time.Since(begin), (2*1000+5+10+20+40+80+160+320+640)*time.Millisecond; d != want {
			t.Errorf("let in after %v, want %v", d, want)
		}
		equal(t, "accept-failed", h.counts.Count(AcceptFailed), 10)
		h.stop()
		equal(t, "lines", strings.Count(log.String(), "accept failed"), 1)
	})
}

// newByte stands for a preamble that was read already.
func newByte() io.Reader { return io.LimitReader(ones{}, 1) }

type ones struct{}

func (ones) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = route.Preamble
	}
	return len(p), nil
}

// TestShutdown: what was buffered leaves, and nothing is left behind.
func TestShutdown(t *testing.T) {
	h := newHub(t, options{})
	p := h.connect()
	const n = 500
	to := p.dynamic("m")
	for range n {
		p.send(route.To(to), nil, make([]byte, 1000))
	}
	p.send(route.To("echo"), route.To("last"), nil)
	for range n / 2 {
		p.next()
	}
	// Whatever has been taken when it stops arrives; then the connection ends.
	stopped := make(chan struct{})
	go func() { defer close(stopped); h.stop() }()
	got := n / 2
	for {
		p.SetReadDeadline(time.Now().Add(patience))
		if _, err := p.r.Next(); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				var ne net.Error
				if errors.As(err, &ne) && ne.Timeout() {
					t.Error("the connection stays open")
				}
			}
			break
		}
		got++
	}
	<-stopped
	if err := h.s.Serve(testpipe.Listen()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("serving again: %v", err)
	}
	t.Logf("%d frames arrived", got)
}

func TestConfig(t *testing.T) {
	h := newHub(t, options{})
	for name, c := range map[string]Config{
		"no bridge":        {},
		"negative timeout": {Bridge: h.b, IdleTimeout: -1},
		"negative window":  {Bridge: h.b, ReadWindow: -1},
		"bad limits":       {Bridge: h.b, Frames: route.Limits{Frame: -1}},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	seen := make(map[string]bool)
	h.counts.Each(func(e Event, _ uint64) {
		if s := e.String(); s == "" || s == "unknown" || seen[s] {
			t.Errorf("event %d is called %q", e, s)
		}
		seen[e.String()] = true
	})
	var none *Counters
	none.add(Accepted)
	equal(t, "count of no counters", none.Count(Accepted), 0)
	equal(t, "no event", events.String(), "unknown")
}
