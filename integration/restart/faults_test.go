package restart

import (
	"context"
	"encoding/binary"
	"fmt"
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

// A run ends when this much has happened.
const (
	hubsEnded   = 4
	connections = 8   // that the publisher, and the device, have made at least
	atStake     = 100 // frames that a hub has acknowledged before it is ended
)

// run is one publisher and one device that end their connections all the time, while
// their hub is ended and started again. Nothing but the hub repeats a frame that it
// has acknowledged.
type run struct {
	h          *hub
	alice, bob string
	to         string
	hubs       int          // that were ended
	acked      atomic.Int64 // frames that hubs have acknowledged
	published  atomic.Int64 // connections
	received   atomic.Int64

	// attached is held while the device has a connection.
	attached sync.Mutex

	mu         sync.Mutex
	seen       []bool // numbers that arrived; there is no 0
	have, last uint64
	late       uint64 // arrived for the first time after a larger one
}

func (r *run) arrived(n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for uint64(len(r.seen)) <= n {
		r.seen = append(r.seen, false)
	}
	if r.seen[n] {
		return
	}
	r.seen[n] = true
	r.have++
	if n < r.last {
		r.late++
	}
	r.last = max(r.last, n)
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

// publish sends one number after the other until enough is closed, each until the hub has
// acknowledged it, in order. It returns the last.
func (r *run) publish(ctx context.Context, rnd *rand.Rand, enough <-chan struct{}) (last uint64) {
	more := func() bool {
		select {
		case <-enough:
			return false
		default:
			return true
		}
	}
	for acked := uint64(0); (acked < last || more()) && ctx.Err() == nil; {
		c, lost := r.connect(ctx, r.alice, &r.published)
		if c == nil {
			continue
		}
		cut := time.After(between(rnd, 25*time.Millisecond, 150*time.Millisecond))
		var window []paho.Token
		for up := true; up; {
			for n := acked + uint64(len(window)) + 1; len(window) < 64 && (n <= last || more()); n++ {
				f := route.Frame{Onward: route.To(r.to, "app"), Payload: binary.BigEndian.AppendUint64(nil, n)}
				window = append(window, c.Publish("sealmq/"+r.alice+"/out", 1, false, route.AppendFrame(nil, &f)))
				last = max(last, n)
			}
			if len(window) == 0 {
				break
			}
			select {
			case <-window[0].Done():
				if up = window[0].Error() == nil; up {
					acked++
					r.acked.Add(1)
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
	return last
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
		r.attached.Lock()
		r.attach(ctx, &f, between(rnd, 25*time.Millisecond, 150*time.Millisecond))
		r.attached.Unlock()
	}
}

// attach makes one connection of the device, which ends after d.
func (r *run) attach(ctx context.Context, hello *route.Frame, d time.Duration) {
	c, lost := r.connect(ctx, r.bob, &r.received)
	if c == nil {
		return
	}
	defer c.Disconnect(0)
	token := c.Subscribe("sealmq/"+r.bob+"/in", 1, func(_ paho.Client, m paho.Message) {
		views, err := route.ParseBundle(m.Payload(), route.Limits{}, nil)
		if err != nil {
			r.h.t.Error(err)
			return
		}
		for i := range views {
			if f := views[i].Frame(); f.Onward[0].Value == "app" {
				r.arrived(binary.BigEndian.Uint64(f.Payload))
			}
		}
	})
	select {
	case <-token.Done():
	case <-lost:
		return
	}
	c.Publish("sealmq/"+r.bob+"/out", 1, false, route.AppendFrame(nil, hello))
	select {
	case <-lost:
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// faults ends one hub after the other, each once it has acknowledged something, and every
// other one while the device is away, so that what it has acknowledged is in its queue.
func (r *run) faults(ctx context.Context, rnd *rand.Rand) {
	for ; r.hubs < hubsEnded; r.hubs++ {
		away := r.hubs%2 == 0
		if away {
			r.attached.Lock()
		}
		from := r.acked.Load()
		r.wait("acknowledgements", func() bool { return r.acked.Load() >= from+atStake })
		moment(ctx, between(rnd, 0, 200*time.Millisecond))
		r.h.end(signals[rnd.IntN(len(signals))])
		moment(ctx, between(rnd, 0, 100*time.Millisecond))
		r.h.start()
		if away {
			r.attached.Unlock()
		}
	}
	r.wait("connections", func() bool { return min(r.published.Load(), r.received.Load()) >= connections })
}

func (r *run) wait(what string, ok func() bool) {
	r.h.t.Helper()
	r.h.until(what, func() (bool, string) {
		return ok(), fmt.Sprintf("%d hubs ended, %d frames acknowledged, %d connections of the publisher, %d of the device",
			r.hubs, r.acked.Load(), r.published.Load(), r.received.Load())
	})
}

// play returns the numbers that are missing once the hub has nothing left, and those that
// came for the first time after a larger one.
func (r *run) play(rnd *rand.Rand) (missing, late uint64) {
	r.h.t.Helper()
	ctx, cancel := context.WithCancel(r.h.t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	sources := [3]*rand.Rand{}
	for i := range sources {
		sources[i] = rand.New(rand.NewPCG(rnd.Uint64(), 0))
	}
	enough, sent := make(chan struct{}), make(chan uint64, 1)
	wg.Go(func() { sent <- r.publish(ctx, sources[0], enough) })
	wg.Go(func() { r.receive(ctx, sources[1]) })
	r.faults(ctx, sources[2])
	close(enough)
	var total uint64
	select {
	case total = <-sent:
	case <-time.After(patience):
		r.h.t.Fatal("the rest is not acknowledged")
	}
	// The device acknowledges a number when it has noted it.
	r.h.until("the queue is empty", func() (bool, string) {
		c := r.h.counters()
		return c["sealmq_frames_queued"]+c["sealmq_frames_waiting"] == 0, fmt.Sprint(c)
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.h.t.Logf("%d frames; %d hubs ended, %d connections of the publisher, %d of the device; %d missing, %d late",
		total, r.hubs, r.published.Load(), r.received.Load(), total-r.have, r.late)
	return total - r.have, r.late
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
			r := &run{h: h, alice: newID(t), bob: newID(t)}
			connect(h, r.bob, func() {}).Disconnect(100) // known to the hub
			r.to = h.address(r.bob)
			missing, late := r.play(random(t))
			switch lossy := mode == broker.DurabilityMemory; {
			case lossy && missing == 0:
				t.Error("queues in memory lost nothing: the run finds no loss")
			case !lossy && missing+late > 0:
				t.Error("what was acknowledged is not there")
			}
			h.sums()
		})
	}
}
