package device

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

// sent takes everything that may go out and returns it, one packet an element, and
// the tokens.
func takeAll(o *outbox, gen uint64) (packets []string, tokens []uint64) {
	for {
		p, ok := o.take(gen)
		if !ok {
			return packets, tokens
		}
		var text []string
		for _, f := range p.frames {
			text = append(text, string(f))
		}
		packets, tokens = append(packets, strings.Join(text, "+")), append(tokens, p.token)
	}
}

func wantPackets(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Fatalf("sent %q, want %q", got, want)
	}
}

// endSteady ends as many steady connections with the frame as it takes until that is given
// up.
func endSteady(t *testing.T, o *outbox, frame string) {
	t.Helper()
	for range maxTrials {
		gen := o.attach(8, bundleBytes)
		got, _ := takeAll(o, gen)
		wantPackets(t, got)
		time.Sleep(steadyTime - time.Second)
		got, _ = takeAll(o, gen)
		wantPackets(t, got)
		time.Sleep(steadyTime + time.Second)
		synctest.Wait()
		got, _ = takeAll(o, gen)
		wantPackets(t, got, frame)
		o.detach(gen)
	}
}

// A frame that ends three connections in a row is sent alone, then alone on connections
// that have lasted, and given up when it ends all those too. Everything else gets through.
func TestFrameThatKillsConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		o := newOutbox(64, 1<<20)
		var told []error
		o.onFail = func(err error) { told = append(told, err) }
		put := func(key, body string) {
			if err := o.put(ctx, key, []byte(body), route.Stored); err != nil {
				t.Fatal(err)
			}
		}
		put("a", "innocent")
		put("b", "killer")
		put("b", "behind")
		flushed := make(chan error, 1)
		go func() { flushed <- o.flush(ctx) }()
		synctest.Wait()
		for range maxStrikes {
			gen := o.attach(8, bundleBytes)
			got, _ := takeAll(o, gen)
			wantPackets(t, got, "innocent", "killer+behind")
			time.Sleep(time.Millisecond)
			o.detach(gen)
		}
		// One after the other, alone. The innocent one is acknowledged.
		gen := o.attach(8, bundleBytes)
		got, tokens := takeAll(o, gen)
		wantPackets(t, got, "innocent")
		o.ack(gen, tokens[0])
		got, _ = takeAll(o, gen)
		wantPackets(t, got, "killer")
		o.detach(gen)
		endSteady(t, o, "killer")
		if err := <-flushed; !errors.Is(err, ErrFrameKills) {
			t.Errorf("flush: %v", err)
		}
		if len(told) != 1 || !errors.Is(told[0], ErrFrameKills) || o.dropped[dropKills] != 1 {
			t.Errorf("told %v, counted %d", told, o.dropped[dropKills])
		}
		gen = o.attach(8, bundleBytes)
		got, tokens = takeAll(o, gen)
		wantPackets(t, got, "behind")
		o.ack(gen, tokens[0])
		if err := o.flush(ctx); err != nil { // the one who waited has been told
			t.Errorf("flush: %v", err)
		}
		got, _ = takeAll(o, gen)
		wantPackets(t, got)
		if o.frames != 0 || o.bytes != 0 || len(o.flows) != 0 || o.alone != nil {
			t.Errorf("left: %d frames, %d bytes, %d flows", o.frames, o.bytes, len(o.flows))
		}
		o.close(ErrClosed)
	})
}

// Whoever a call's frame is given up for has heard of it before the link goes on, and so
// before Close is done; and may use the outbox meanwhile.
func TestKillerToldToItsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox(64, 1<<20)
		heard := make(chan error)
		ctx := withLost(context.Background(), func(err error) {
			_, _ = o.take(0)
			heard <- err
		})
		if err := o.put(ctx, "a", []byte("killer"), route.Stored); err != nil {
			t.Fatal(err)
		}
		over := false
		go func() {
			for range maxStrikes + 1 {
				gen := o.attach(8, bundleBytes)
				takeAll(o, gen)
				o.detach(gen)
			}
			endSteady(t, o, "killer")
			over = true
		}()
		time.Sleep(4 * maxTrials * steadyTime)
		synctest.Wait()
		if over {
			t.Error("the link goes on")
		}
		if err := <-heard; !errors.Is(err, ErrFrameKills) {
			t.Errorf("told %v", err)
		}
		synctest.Wait()
		if !over {
			t.Error("the link does not go on")
		}
		o.close(ErrClosed)
	})
}

// With nobody waiting the next flush tells.
func TestKillerToldByNextFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox(64, 1<<20)
		if err := o.put(context.Background(), "a", []byte("killer"), route.Stored); err != nil {
			t.Fatal(err)
		}
		for range maxStrikes + 1 {
			gen := o.attach(8, bundleBytes)
			got, _ := takeAll(o, gen)
			wantPackets(t, got, "killer")
			o.detach(gen)
		}
		endSteady(t, o, "killer")
		if err := o.flush(context.Background()); !errors.Is(err, ErrFrameKills) {
			t.Errorf("flush: %v", err)
		}
		if err := o.flush(context.Background()); err != nil {
			t.Errorf("flush again: %v", err)
		}
		o.close(ErrClosed)
	})
}

// A connection that lives on for a while after the frame acquits it, and one whose
// acknowledgement the hub withholds is never suspected.
func TestSuspectAcquitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		o := newOutbox(64, 1<<20)
		for _, key := range []string{"a", "b"} {
			if err := o.put(ctx, key, []byte(key), route.Stored); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 * maxStrikes {
			gen := o.attach(8, bundleBytes)
			got, _ := takeAll(o, gen)
			wantPackets(t, got, "a", "b")
			time.Sleep(killTime)
			o.detach(gen)
		}
		for range maxStrikes {
			gen := o.attach(8, bundleBytes)
			takeAll(o, gen)
			o.detach(gen)
		}
		gen := o.attach(8, bundleBytes)
		got, _ := takeAll(o, gen)
		wantPackets(t, got, "a")
		time.Sleep(killTime)
		synctest.Wait()
		got, tokens := takeAll(o, gen) // a is still under way, and no longer suspected
		wantPackets(t, got, "b")
		o.ack(gen, tokens[0])
		o.detach(gen)
		gen = o.attach(8, bundleBytes)
		got, tokens = takeAll(o, gen)
		wantPackets(t, got, "a")
		o.ack(gen, tokens[0])
		if o.frames != 0 || o.dropped[dropKills] != 0 {
			t.Errorf("%d frames left, %d given up", o.frames, o.dropped[dropKills])
		}
		o.close(ErrClosed)
	})
}

// A suspect whose acknowledgement the hub withholds stalls nobody else, nor do frames
// of its own flow before it.
func TestSuspectWithheld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		o := newOutbox(64, 1<<20)
		put := func(key, body string) {
			t.Helper()
			if err := o.put(ctx, key, []byte(body), route.Stored); err != nil {
				t.Fatal(err)
			}
		}
		put("full", "f1")
		put("ok", "o1")
		for range maxStrikes {
			gen := o.attach(8, 1) // a packet for each frame
			takeAll(o, gen)
			time.Sleep(time.Second)
			o.detach(gen)
		}
		put("full", "f2")
		put("other", "x1")
		gen := o.attach(8, 1)
		var sent []string
		deadline := time.Now().Add(10 * killTime)
		for len(sent) < 4 && time.Now().Before(deadline) {
			got, tokens := takeAll(o, gen)
			for i, p := range got {
				sent = append(sent, p)
				if p[0] != 'f' {
					o.ack(gen, tokens[i])
				}
			}
			select {
			case <-o.wake:
			case <-time.After(time.Second):
			}
		}
		if len(sent) != 4 || sent[0] != "f1" || sent[1] != "o1" {
			t.Errorf("sent %q", sent)
		}
		o.detach(gen)
		o.close(ErrClosed)
	})
}

// killSim is an outbox, and a hub that acknowledges some frames and cannot stand others.
type killSim struct {
	t       *testing.T
	o       *outbox
	acks    func(frame string) bool
	kills   string         // contained in each frame that ends its connection
	connect int            // connections so far
	took    time.Duration  // all of them together
	arrived map[string]int // how often
}

func newKillSim(t *testing.T, frames int) *killSim {
	return &killSim{t: t, o: newOutbox(frames, 1<<20), acks: func(string) bool { return true }, kills: "killer", arrived: make(map[string]int)}
}

func (k *killSim) put(key, body string) {
	k.t.Helper()
	if err := k.o.put(context.Background(), key, []byte(body), route.Stored); err != nil {
		k.t.Fatal(err)
	}
}

// run is one connection, which ends after a while if no frame ends it.
func (k *killSim) run(lasts time.Duration) {
	const roundTrip = 50 * time.Millisecond
	begun := time.Now()
	gen := k.o.attach(64, bundleBytes)
	end := time.NewTimer(lasts)
	defer end.Stop()
	for killed := false; ; {
		for p, ok := k.o.take(gen); ok; p, ok = k.o.take(gen) {
			acked := true
			for _, f := range p.frames {
				killed = killed || strings.Contains(string(f), k.kills)
				if !killed {
					k.arrived[string(f)]++
				}
				acked = acked && k.acks(string(f))
			}
			switch {
			case killed:
				end.Reset(2 * roundTrip)
			case acked:
				time.AfterFunc(roundTrip, func() { k.o.ack(gen, p.token) })
			}
		}
		select {
		case <-k.o.wake:
			continue
		case <-end.C:
		}
		k.o.detach(gen)
		k.connect++
		k.took += time.Since(begun)
		return
	}
}

// Whatever ends connections while the hub withholds acknowledgements, no frame is given up
// for it, and each is sent again and again; whether or not something else was just sent when
// a connection ended.
func TestFlappingKillsNothing(t *testing.T) {
	for _, mean := range []time.Duration{time.Second, 3 * time.Second, 8 * time.Second, 20 * time.Second} {
		for name, lasts := range map[string]func(*rand.Rand) time.Duration{
			"regularly":     func(*rand.Rand) time.Duration { return mean },
			"now and then":  func(rng *rand.Rand) time.Duration { return time.Duration(rng.ExpFloat64() * float64(mean)) },
			"two of a kind": func(rng *rand.Rand) time.Duration { return []time.Duration{time.Second, mean}[rng.IntN(2)] },
		} {
			for _, busy := range []bool{false, true} {
				t.Run(fmt.Sprint(mean, " ", name, " busy=", busy), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						k := newKillSim(t, 64)
						k.flap(lasts, mean, busy)
					})
				})
			}
		}
	}
}

// flap is an hour of connections that end, while one target takes nothing.
func (k *killSim) flap(lasts func(*rand.Rand) time.Duration, mean time.Duration, busy bool) {
	const full = 10
	rng := rand.New(rand.NewPCG(1, uint64(mean)))
	k.acks = func(f string) bool { return !strings.HasPrefix(f, "full") }
	for i := range full {
		k.put("full", fmt.Sprint("full", i))
	}
	for k.took < time.Hour {
		d := lasts(rng)
		late := time.AfterFunc(d-10*time.Millisecond, func() {
			if busy {
				_ = k.o.put(context.Background(), "late", []byte("late"), route.Stored)
			}
		})
		k.run(d)
		late.Stop()
		time.Sleep(time.Second)
	}
	if n := k.o.dropped[dropKills]; n != 0 {
		k.t.Errorf("%d frames given up in %d connections", n, k.connect)
	}
	for i := range full {
		if n := k.arrived[fmt.Sprint("full", i)]; n < k.connect/4 && !(busy && i > 0) {
			k.t.Errorf("frame %d sent on %d of %d connections", i, n, k.connect)
		}
	}
	if busy && k.arrived["late"] < k.connect/4 {
		k.t.Errorf("what is new was sent on %d of %d connections", k.arrived["late"], k.connect)
	}
	k.o.close(ErrClosed)
}

// Frames that end connections are found among others, in bounded time: two in flows of their
// own, and one within a backlog that the hub acknowledges nothing of. Nothing else is given
// up, and others go on meanwhile.
func TestKillersAreFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const backlog = 600
		k := newKillSim(t, 4*backlog)
		k.acks = func(f string) bool { return !strings.HasPrefix(f, "full") }
		k.put("a", "killer 1")
		for i := range backlog {
			k.put("full", fmt.Sprint("full", i))
			if i == backlog/2 {
				k.put("full", "killer 2")
			}
		}
		for i := 0; k.o.dropped[dropKills] < 3; i++ {
			if i == 5 {
				k.put("b", "killer 3")
			}
			live := fmt.Sprint("live", i)
			k.put("live", live)
			k.run(time.Hour)
			if k.connect > 60 {
				t.Fatalf("%d frames given up after %d connections", k.o.dropped[dropKills], k.connect)
			}
		}
		t.Logf("%d connections in %v", k.connect, k.took)
		k.run(time.Hour)
		for i := range backlog {
			if k.arrived[fmt.Sprint("full", i)] == 0 {
				t.Fatalf("frame %d of the backlog was not sent", i)
			}
		}
		if n := k.o.dropped[dropKills]; n != 3 || k.o.frames != backlog {
			t.Errorf("%d frames given up, %d are left", n, k.o.frames)
		}
		k.o.close(ErrClosed)
	})
}

// While a suspect waits for a connection that lasts, others go on, and what is behind it does
// not overtake it. If the connection ends by itself, the suspect is none any more.
func TestSuspectIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKillSim(t, 64)
		k.put("a", "before")
		k.put("a", "killer")
		for range maxStrikes + 1 {
			k.run(time.Hour)
		}
		k.put("a", "behind")
		k.put("b", "other")
		k.run(steadyTime - time.Second)
		if k.arrived["before"] == 0 || k.arrived["behind"] != 0 || k.arrived["other"] == 0 || k.took < steadyTime-time.Second {
			t.Errorf("sent %v", k.arrived)
		}
		// Nothing was just sent when that one ended.
		for range maxStrikes {
			gen := k.o.attach(8, 1)
			got, _ := takeAll(k.o, gen)
			wantPackets(t, got, "killer", "behind")
			k.o.detach(gen)
		}
		k.o.close(ErrClosed)
	})
}

// Many suspects whose acknowledgements are withheld stall others for a few steps only.
func TestManySuspectsWithheld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const backlog = 1000
		k := newKillSim(t, 4*backlog)
		k.acks = func(f string) bool { return f == "other" }
		for i := range backlog {
			k.put("full", fmt.Sprint("full", i))
		}
		for range maxStrikes {
			k.run(time.Second)
		}
		k.put("other", "other")
		k.run(12 * killTime)
		if k.arrived["other"] == 0 || k.o.dropped[dropKills] != 0 {
			t.Errorf("%d frames given up", k.o.dropped[dropKills])
		}
		k.o.close(ErrClosed)
	})
}

// First messages of dials that have failed don't wait for the connection.
func TestAbandonedCallsAreNotSent(t *testing.T) {
	o := newOutbox(64, 1<<20)
	var cs calls
	put := func(body string, abandon bool) {
		ctx, c := cs.begin(context.Background(), false, nil)
		defer c.end()
		if err := o.put(ctx, "a", []byte(body), route.Stored); err != nil {
			t.Fatal(err)
		}
		if abandon {
			c.abandon()
		}
	}
	put("1", true)
	put("2", false)
	put("3", true)
	put("4", false)
	put("5", true)
	gen := o.attach(8, bundleBytes)
	got, tokens := takeAll(o, gen)
	wantPackets(t, got, "2", "4")
	for _, tok := range tokens {
		o.ack(gen, tok)
	}
	if o.frames != 0 || o.bytes != 0 || o.dropped[dropAbandoned] != 3 {
		t.Errorf("left: %d frames, %d bytes; %d abandoned", o.frames, o.bytes, o.dropped[dropAbandoned])
	}
	o.close(ErrClosed)
}
