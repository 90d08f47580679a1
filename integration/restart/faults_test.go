package restart

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// run is one publisher and one device that end their connections all the time, while
// their hub is ended and started again. Nothing but the hub repeats a frame that it
// has acknowledged.
type run struct {
	h          *hub
	alice, bob string
	to         string
	total      uint64
	got        chan uint64 // numbers as they arrive
	hubs       int         // that were ended
	published  atomic.Int64
	received   atomic.Int64 // connections
}

// moment waits, unless ctx ends first.
func moment(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// connect makes a connection, counts it, and returns what is closed when it is lost; a
// nil client, after a moment, means that the hub is away.
func (r *run) connect(ctx context.Context, clientID string, count *atomic.Int64) (c paho.Client, lost <-chan struct{}) {
	gone := make(chan struct{})
	if c = connect(r.h, clientID, func() { close(gone) }); c == nil {
		moment(ctx, 20*time.Millisecond)
		return nil, nil
	}
	count.Add(1)
	return c, gone
}

func between(rnd *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(rnd.Int64N(int64(high-low)))
}

// publish sends every number until the hub has acknowledged it, in order.
func (r *run) publish(ctx context.Context, rnd *rand.Rand) {
	for acked := uint64(0); acked < r.total && ctx.Err() == nil; {
		c, lost := r.connect(ctx, r.alice, &r.published)
		if c == nil {
			continue
		}
		cut := time.After(between(rnd, 50*time.Millisecond, 500*time.Millisecond))
		var window []paho.Token
		for up := true; up && acked < r.total; {
			for len(window) < 64 && acked+uint64(len(window)) < r.total {
				n := acked + uint64(len(window)) + 1
				f := route.Frame{Onward: route.To(r.to, "app"), Payload: binary.BigEndian.AppendUint64(nil, n)}
				window = append(window, c.Publish("sealmq/"+r.alice+"/out", 1, false, route.AppendFrame(nil, &f)))
			}
			select {
			case <-window[0].Done():
				if up = window[0].Error() == nil; up {
					acked++
					window = window[1:]
				}
			case <-lost:
				up = false
			case <-cut:
				up = false
			case <-ctx.Done():
				up = false
			}
		}
		c.Disconnect(0)
	}
}

// receive attaches the device again and again.
func (r *run) receive(ctx context.Context, rnd *rand.Rand) {
	hello, err := (&hubproto.HelloRequest{}).Marshal()
	if err != nil {
		r.h.t.Error(err)
		return
	}
	f := route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello}
	for ctx.Err() == nil {
		c, lost := r.connect(ctx, r.bob, &r.received)
		if c == nil {
			continue
		}
		token := c.Subscribe("sealmq/"+r.bob+"/in", 1, func(_ paho.Client, m paho.Message) {
			views, err := route.ParseBundle(m.Payload(), route.Limits{}, nil)
			if err != nil {
				r.h.t.Error(err)
				return
			}
			for i := range views {
				if f := views[i].Frame(); f.Onward[0].Value == "app" {
					select {
					case r.got <- binary.BigEndian.Uint64(f.Payload):
					case <-ctx.Done():
					}
				}
			}
		})
		select {
		case <-token.Done():
			c.Publish("sealmq/"+r.bob+"/out", 1, false, route.AppendFrame(nil, &f))
			select {
			case <-lost:
			case <-time.After(between(rnd, 50*time.Millisecond, 800*time.Millisecond)):
			case <-ctx.Done():
			}
		case <-lost:
		}
		c.Disconnect(0)
	}
}

// faults ends the hub until sent is closed.
func (r *run) faults(ctx context.Context, rnd *rand.Rand, sent <-chan struct{}) {
	for {
		select {
		case <-sent:
			return
		case <-ctx.Done():
			return
		case <-time.After(between(rnd, 200*time.Millisecond, 1200*time.Millisecond)):
		}
		r.hubs++
		r.h.end(signals[rnd.IntN(len(signals))])
		moment(ctx, between(rnd, 0, 200*time.Millisecond))
		r.h.start()
	}
}

// play returns the numbers that are missing once the sender is done and nothing more
// comes, and those that came for the first time after a larger one.
func (r *run) play(t *testing.T) (missing, late uint64) {
	t.Helper()
	rnd := random(t)
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan struct{})
	var wg sync.WaitGroup
	seeds := [3]uint64{rnd.Uint64(), rnd.Uint64(), rnd.Uint64()}
	source := func(i int) *rand.Rand { return rand.New(rand.NewPCG(seeds[i], 0)) }
	wg.Go(func() { defer close(sent); r.publish(ctx, source(0)) })
	wg.Go(func() { r.receive(ctx, source(1)) })
	quiet := make(chan struct{})
	go func() { defer close(quiet); r.faults(ctx, source(2), sent) }()
	seen := make([]bool, r.total+1)
	var last, have uint64
	end := time.After(3 * patience)
	for idle := false; have < r.total && !idle; {
		wait := patience
		select {
		case <-quiet:
			wait = patience / 6 // nobody sends any more: what is queued comes at once
		default:
		}
		select {
		case n := <-r.got:
			switch {
			case n > r.total:
				t.Fatalf("number %d", n)
			case seen[n]:
				continue
			case n < last:
				late++
			}
			seen[n], last = true, max(last, n)
			have++
		case <-time.After(wait):
			idle = true
		case <-end:
			idle = true
		}
	}
	<-quiet
	cancel()
	wg.Wait()
	return r.total - have, late
}

// TestAcknowledgedUnderFaults: what the hub acknowledged arrives, in order, whatever
// happens to connections and hub meanwhile, in the modes that promise it; the same
// run loses frames in the one that does not, so it would find a loss.
func TestAcknowledgedUnderFaults(t *testing.T) {
	for _, mode := range append([]broker.Durability{broker.DurabilityMemory}, modes...) {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			h := newHub(t, "--durability", string(mode), "--segment-size", "1MiB")
			h.start()
			play := func() (missing, late uint64) {
				r := &run{h: h, alice: newID(t), bob: newID(t), total: 20_000, got: make(chan uint64, 1024)}
				first := connect(h, r.bob, func() {}) // known to the hub
				first.Disconnect(100)
				r.to = h.address(r.bob)
				missing, late = r.play(t)
				t.Logf("%d frames; %d hubs ended, %d connections of the publisher, %d of the device; %d missing, %d late",
					r.total, r.hubs, r.published.Load(), r.received.Load(), missing, late)
				return missing, late
			}
			if mode == broker.DurabilityMemory {
				for range 5 {
					if missing, _ := play(); missing > 0 {
						return
					}
				}
				t.Fatal("queues in memory lost nothing: the run finds no loss")
			}
			if missing, late := play(); missing+late > 0 {
				t.Error("what was acknowledged is not there")
			}
			h.sums()
		})
	}
}
