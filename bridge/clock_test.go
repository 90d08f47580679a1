package bridge

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

// wallClock can be set without time passing.
type wallClock struct{ off atomic.Int64 }

func (w *wallClock) set(by time.Duration) { w.off.Add(int64(by)) }

func (w *wallClock) use(c *Config) {
	start := time.Now()
	c.Now = func() time.Time { return time.Now().Round(0).Add(time.Duration(w.off.Load())) }
	c.mono = func() time.Duration { return time.Since(start) }
}

// clockJournal hears how far the wall clock is ahead, too.
type clockJournal struct {
	testJournal
	ahead atomic.Int64
}

func (j *clockJournal) ClockSet(ahead time.Duration) { j.ahead.Store(int64(ahead)) }

// TestWallClockIsSet: by hours, forward and back. Frames, names and forwarders keep the
// ages that they have; what is stored and shown is in the wall clock's new time.
func TestWallClockIsSet(t *testing.T) {
	for name, by := range map[string]time.Duration{"forward": 300 * time.Hour, "back": -300 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var wall wallClock
				j := &clockJournal{testJournal: testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}}
				b := newTestBridge(t, func(c *Config) {
					wall.use(c)
					c.Journal, c.MaxAge, c.ForwarderTTL = j, 6*time.Hour, 24*time.Hour
				})
				bob, alice := attach(t, b, "bob", true), attach(t, b, "alice", true)
				door := bob.register(ServiceStaticForwarding, "door", "M")
				bob.Close(true)
				alice.number(bob.Port().Address(), 1)
				time.Sleep(5 * time.Hour)
				wall.set(by)
				time.Sleep(sweepEvery) // the bridge looks
				alice.number(bob.Port().Address(), 2)
				synctest.Wait()
				c := b.Counters()
				equal(t, "queued, expired after the clock was set", []int64{c.Queued, int64(c.Dropped[DropExpired])}, []int64{2, 0})
				equal(t, "told to the store", time.Duration(j.ahead.Load()).Round(time.Second), by)
				now := time.Now().Add(by)
				for _, f := range b.State().Forwarders {
					if d := now.Sub(f.Seen); d < 5*time.Hour || d > 6*time.Hour {
						t.Errorf("the forwarder is stored as seen %v ago", d)
					}
				}
				time.Sleep(time.Hour)
				synctest.Wait()
				c = b.Counters()
				equal(t, "queued, expired after its time", []int64{c.Queued, int64(c.Dropped[DropExpired])}, []int64{1, 1})
				time.Sleep(17*time.Hour + 50*time.Minute)
				equal(t, "forwarder there", b.Forwarder(door) != nil, true)
				time.Sleep(12 * time.Minute)
				equal(t, "forwarder there after its time", b.Forwarder(door) != nil, false)
			})
		})
	}
}

// TestWallClockIsSetBetweenProcesses: what comes from the future counts as of now.
func TestWallClockIsSetBetweenProcesses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &testJournal{states: map[string]ForwarderState{}, ports: map[string]PortState{}}
		j.Port(PortState{Principal: device("bob"), Seen: time.Now().Add(1000 * time.Hour)})
		j.Forwarder(ForwarderState{
			Address: "forward_to_x", Owner: Principal{ClientID: "gone"}, Route: route.To("dev_x", "M"),
			Since: time.Now(), Seen: time.Now().Add(1000 * time.Hour),
		})
		b := j.after(t, nil)
		time.Sleep(24*time.Hour + 2*sweepEvery)
		synctest.Wait()
		equal(t, "ports", b.Counters().Ports, 0)
		equal(t, "forwarders", b.Counters().Forwarders, 0)
	})
}
