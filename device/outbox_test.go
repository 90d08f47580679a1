package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

// The outbox against a hub that acknowledges in any order across first hops,
// withholds, and loses connections at any point: every frame arrives, those of one
// first hop first arrive in order, and nothing is left over.
func TestOutboxUnderLoss(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { synctest.Test(t, func(t *testing.T) { outboxUnderLoss(t, seed) }) })
	}
}

func outboxUnderLoss(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	o := newOutbox(64, 1<<20)
	flows := 1 + r.IntN(4)
	put := make([]uint32, flows)
	arrived := make([]uint32, flows) // next expected, duplicates aside
	type inFlight struct {
		token uint64
		flow  int
	}
	var gen uint64
	var flying []inFlight
	step := func() {
		switch r.IntN(12) {
		case 0: // the connection is lost
			o.detach(gen)
			gen, flying = 0, nil
		case 1, 2:
			if gen == 0 {
				gen = o.attach(1+r.IntN(16), bundleBytes)
			}
		case 3, 4, 5, 6:
			f := r.IntN(flows)
			body := binary.BigEndian.AppendUint32([]byte{byte(f)}, put[f])
			body = append(body, make([]byte, r.IntN(8<<10))...)
			if ok := tryPut(o, fmt.Sprint(f), body); ok {
				put[f]++
			}
		case 7, 8, 9:
			p, ok := o.take(gen)
			if !ok {
				return
			}
			f := int(p.frames[0][0])
			for _, body := range p.frames {
				n := binary.BigEndian.Uint32(body[1:])
				if int(body[0]) != f || n > arrived[f] {
					t.Fatalf("flow %d: frame %d of flow %d, expected %d", f, n, body[0], arrived[f])
				}
				if n == arrived[f] {
					arrived[f]++
				}
			}
			flying = append(flying, inFlight{p.token, f})
		default: // acknowledge the oldest of some flow
			if len(flying) == 0 {
				return
			}
			f := flying[r.IntN(len(flying))].flow
			for i, x := range flying {
				if x.flow == f {
					o.ack(gen, x.token)
					o.ack(gen, x.token) // once more does nothing
					flying = append(flying[:i], flying[i+1:]...)
					return
				}
			}
		}
	}
	for range 2000 {
		step()
	}
	// A hub that answers empties it.
	if gen == 0 {
		gen = o.attach(8, bundleBytes)
	}
	for o.frames > 0 {
		if p, ok := o.take(gen); ok {
			flying = append(flying, inFlight{token: p.token})
		} else if len(flying) == 0 {
			select {
			case <-o.wake:
			case <-time.After(2 * steadyTime): // longer than suspects are held back
				t.Fatalf("%d frames left and nothing to send", o.frames)
			}
		}
		for _, x := range flying {
			o.ack(gen, x.token)
		}
		flying = flying[:0]
	}
	if o.bytes != 0 || len(o.flows) > len(o.ready) || len(o.flights) != 0 || o.airborne != 0 {
		t.Errorf("left over: %d bytes, %d flows, %d ready, %d in flight, %d bytes in flight",
			o.bytes, len(o.flows), len(o.ready), len(o.flights), o.airborne)
	}
}

// tryPut puts unless that would wait.
func tryPut(o *outbox, key string, body []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.roomLocked(o.flows[key], len(body)) {
		return false
	}
	o.insertLocked(key, body, route.Stored, nil)
	return true
}

func TestOutboxClosed(t *testing.T) {
	o := newOutbox(4, 1<<20)
	for range 2 {
		if err := o.put(t.Context(), "x", []byte{1}, route.Stored); err != nil {
			t.Fatal(err)
		}
	}
	blocked := make(chan error, 2)
	go func() { blocked <- o.put(t.Context(), "x", []byte{1}, route.Stored) }()
	go func() { blocked <- o.flush(t.Context()) }()
	for waiting := false; !waiting; {
		o.mu.Lock()
		waiting = len(o.putters) == 1 && len(o.flushers) == 1
		o.mu.Unlock()
	}
	o.close(ErrTakenOver)
	for range 2 {
		if err := <-blocked; !errors.Is(err, ErrTakenOver) {
			t.Errorf("waiting call: %v", err)
		}
	}
	if err := o.put(t.Context(), "y", nil, route.Stored); !errors.Is(err, ErrTakenOver) {
		t.Errorf("put: %v", err)
	}
	if err := o.flush(t.Context()); !errors.Is(err, ErrTakenOver) {
		t.Errorf("flush: %v", err)
	}
	if err := o.put(t.Context(), "z", make([]byte, 2<<20), route.Stored); !errors.Is(err, ErrTooLarge) {
		t.Errorf("larger than the outbox: %v", err)
	}
}
