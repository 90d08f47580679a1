package device

import (
	"context"
	"errors"
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

// A frame that ends three connections in a row is sent alone, and given up when it
// ends that one too. Everything else gets through.
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
			over = true
		}()
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
