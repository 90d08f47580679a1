package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/route"
)

var timeNow = time.Now

// listen starts bob and alice without a channel.
func listen(t testing.TB, n *testNet, change ...func(*Config)) (a, b *party) {
	t.Helper()
	a, b = n.party(t, "alice"), n.party(t, "bob", change...)
	if _, err := b.ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// TestForgedReplies: up to three forged messages 2 ahead of the genuine one are
// survived; a stock initiator is lost with the first.
func TestForgedReplies(t *testing.T) {
	for forged := range maxTries + 1 {
		t.Run(fmt.Sprint(forged), func(t *testing.T) {
			n := newTestNet()
			a, _ := listen(t, n)
			first := true
			n.onPacket(func(p packet) []packet {
				if p.from != "bob" || !first {
					return []packet{p}
				}
				first = false
				var out []packet
				for i := range forged {
					bad := p.clone()
					bad.frame.Payload[i*40] ^= 1
					out = append(out, bad)
				}
				return append(out, p)
			})
			_, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: wait})
			if forged < maxTries && err != nil {
				t.Errorf("%v", err)
			}
			if forged == maxTries && !errors.Is(err, ErrHandshake) {
				t.Errorf("%v, want ErrHandshake", err)
			}
		})
	}
}

// TestRepeatedFirst: the same message 1 from the same source is answered with
// the same message 2 while the handshake is open, then not at all, and after
// 30 s is another dial.
func TestRepeatedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, b := listen(t, n)
		e, err := newEphemeral()
		if err != nil {
			t.Fatal(err)
		}
		pub := e.Public()
		m1 := packet{from: "eve", to: "bob", frame: route.Frame{
			Onward: route.To("listener"), Return: route.To("eve", "dr"), Payload: pub[:],
		}}
		answers := func() [][]byte {
			synctest.Wait()
			var out [][]byte
			for _, p := range n.seen("bob") {
				out = append(out, p.frame.Payload)
			}
			return out
		}
		for range 3 {
			n.inject(m1)
			answers()
		}
		got := answers()
		if len(got) != 3 || !bytes.Equal(got[0], got[1]) || !bytes.Equal(got[0], got[2]) {
			t.Fatalf("%d answers, or different ones", len(got))
		}
		other := m1.clone()
		other.frame.Return = route.To("mallory", "dr")
		n.inject(other)
		if got = answers(); len(got) != 4 || bytes.Equal(got[0], got[3]) {
			t.Error("another source got the same answer")
		}
		if s := b.ep.Stats(); s.HalfOpen != 2 || s.Dropped.Of(DropFirstRepeat) != 2 {
			t.Errorf("stats %+v", s)
		}
		for range 2 * maxResends {
			n.inject(m1)
			synctest.Wait()
		}
		if got = answers(); len(got) != 4+maxResends-2 {
			t.Errorf("%d answers in all", len(got))
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if s := b.ep.Stats(); s.HalfOpen != 0 || s.Failed != 2 || b.registered() != 1 {
			t.Errorf("after the timeout: %+v, %d addresses", s, b.registered())
		}
		n.inject(m1)
		if more := answers(); len(more) != len(got)+1 || bytes.Equal(more[0], more[len(more)-1]) {
			t.Error("after 30 s it is not another dial")
		}
	})
}

// TestDialRepeats: a dialler that hears nothing sends message 1 again where it may, byte
// for byte and after growing pauses, whether it was lost or its answer; the responder takes
// it for one handshake.
func TestDialRepeats(t *testing.T) {
	const lost = 4
	for name, from := range map[string]string{"message 1 is lost": "alice", "message 2 is lost": "bob"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b := listen(t, n)
				left := lost
				n.onPacket(func(p packet) []packet {
					if p.from == from && left > 0 {
						left--
						return nil
					}
					return []packet{p}
				})
				var asked []time.Duration
				begun := time.Now()
				dial(t, a, "bob", DialOptions{Repeat: func() bool {
					asked = append(asked, time.Since(begun))
					return len(asked) != 2 // the pause stays as it is then
				}})
				mean := []time.Duration{time.Second, 2 * time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second}
				last := time.Duration(0)
				for i, at := range asked {
					if d := at - last; d < mean[i]/2 || d > mean[i]*3/2 {
						t.Errorf("pause %d is %v", i, d)
					}
					last = at
				}
				firsts := 0
				sent := n.seen("alice")
				for _, p := range sent {
					if p.frame.Onward.Equal(route.To("listener")) {
						firsts++
						if !bytes.Equal(p.frame.Payload, sent[0].frame.Payload) || !p.frame.Return.Equal(sent[0].frame.Return) {
							t.Error("a repeat is another message")
						}
					}
				}
				if len(asked) != lost+1 || firsts != lost+1 {
					t.Errorf("asked %d times, sent %d times", len(asked), firsts)
				}
				if s := b.ep.Stats(); s.Accepted != 1 || s.HalfOpen != 0 || s.Failed != 0 {
					t.Errorf("the responder: %+v", s)
				}
			})
		})
	}
	t.Run("not asked for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newTestNet()
			a, _ := listen(t, n)
			n.onPacket(func(packet) []packet { return nil })
			if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{}); !errors.Is(err, ErrTimeout) {
				t.Error(err)
			}
			if got := len(n.seen("alice")); got != 1 {
				t.Errorf("%d messages 1", got)
			}
		})
	})
}

// TestDataOvertakesMessage3: with message 3 late, forged ones, a repeated
// message 1 and data before it do no harm, and the data is not lost.
func TestDataOvertakesMessage3(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const burst = maxEarlyFrames / 2
		n := newTestNet()
		a, b := listen(t, n)
		var m3 *packet
		count := 0
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" {
				switch count++; count {
				case 2:
					held := p.clone()
					m3 = &held
					forged := p.clone()
					forged.frame.Payload[60] ^= 1
					return []packet{forged, {to: "bob", frame: route.Frame{Onward: p.frame.Onward, Return: p.frame.Return, Payload: make([]byte, 32)}}}
				}
			}
			return []packet{p}
		})
		c := dial(t, a, "bob", DialOptions{NoConfirm: true})
		for i := range burst {
			send(t, c, fmt.Sprint(i))
		}
		synctest.Wait()
		if len(b.got) != 0 {
			t.Fatal("data before the handshake is complete")
		}
		n.inject(*m3)
		for i := range burst {
			if d := b.next(t); string(d.Frame.Payload) != fmt.Sprint(i) {
				t.Errorf("message %d is %q", i, d.Frame.Payload)
			}
		}
		n.inject(*m3) // again: an undecryptable frame by now
		synctest.Wait()
		if !c.Confirmed() || b.ep.Stats().Channels != 1 {
			t.Error("the channel did not survive")
		}
	})
}

// slowPolicy admits everybody once it is told to.
type slowPolicy chan struct{}

func (p slowPolicy) Check(Peer) error { <-p; return nil }

// TestBurstBehindMessage3: who may be held back is, while message 3 is verified, and
// loses nothing of a burst behind it; others lose what is too much to keep, and so
// does a peer whose message 3 takes longer than a second.
func TestBurstBehindMessage3(t *testing.T) {
	const size, count = 200 << 10, 2 * maxEarlyBytes / (200 << 10)
	for _, tt := range []struct {
		name    string
		mayWait bool
		takes   time.Duration
		lost    bool
		drained time.Duration // when everything has been taken
	}{
		{"waits", true, earlyWait / 2, false, earlyWait / 2},
		{"may not wait", false, earlyWait / 2, true, 0},
		{"too slow", true, 3 * earlyWait, true, earlyWait},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b := listen(t, n)
				b.mayWait = tt.mayWait
				policy := make(slowPolicy)
				if _, err := b.ep.Listen("slow", policy, ListenOptions{}); err != nil {
					t.Fatal(err)
				}
				c, err := a.ep.Dial(t.Context(), route.To("bob", "slow"), TrustEveryone, DialOptions{NoConfirm: true})
				if err != nil {
					t.Fatal(err)
				}
				payload := bytes.Repeat([]byte("x"), size)
				for range count {
					if err := c.Send(t.Context(), route.To("app"), nil, payload); err != nil {
						t.Fatal(err)
					}
				}
				begin := time.Now()
				go func() {
					time.Sleep(tt.takes)
					close(policy)
				}()
				if err := b.Register("marker", func(Inbound) {
					if d := time.Since(begin); d != tt.drained {
						t.Errorf("everything is taken after %v, want %v", d, tt.drained)
					}
				}); err != nil {
					t.Fatal(err)
				}
				n.inject(packet{to: "bob", frame: route.Frame{Onward: route.To("marker")}})
				time.Sleep(tt.takes + time.Second)
				lost := b.ep.Stats().Dropped.Of(DropEarly)
				if lost > 0 != tt.lost || len(b.got)+int(lost) != count {
					t.Errorf("%d of %d messages are handed on, %d are lost", len(b.got), count, lost)
				}
			})
		})
	}
}

// TestEarlyFramesLeaveRoomForOthers: however much comes early of some sources, others
// lose nothing of what they send right behind message 3.
func TestEarlyFramesLeaveRoomForOthers(t *testing.T) {
	for _, tt := range []struct {
		sources, handshakes int
		burst               int // bytes that are not lost
	}{
		{1, 16, 2 << 20},
		{40, 1, earlyOwn / 2},
	} {
		t.Run(fmt.Sprint(tt.sources), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b := listen(t, n)
				policy := make(slowPolicy)
				if _, err := b.ep.Listen("slow", policy, ListenOptions{}); err != nil {
					t.Fatal(err)
				}
				large := make([]byte, 250<<10)
				for s := range tt.sources {
					name := fmt.Sprint("eve", s)
					answers := make(chan route.Route, tt.handshakes)
					if err := n.node(t, name).Register("dr", func(in Inbound) { answers <- in.Frame.Return.Rest() }); err != nil {
						t.Fatal(err)
					}
					for range tt.handshakes {
						e, err := newEphemeral()
						if err != nil {
							t.Fatal(err)
						}
						pub := e.Public()
						n.inject(packet{to: "bob", frame: route.Frame{
							Onward: route.To("listener"), Return: route.To(name, "dr"), Payload: pub[:],
						}})
						to := <-answers
						for _, size := range []int{len(large), 16 << 10, 1 << 10, 24} {
							for range 20 {
								n.inject(packet{to: "bob", frame: route.Frame{Onward: to, Return: route.To(name), Payload: large[:size]}})
							}
						}
					}
				}
				synctest.Wait()
				if held := b.ep.earlyBytes.Load(); held < 3<<20 || held > maxEarlyBytesTotal+int64(tt.sources*tt.handshakes*earlyOwn) {
					t.Errorf("%d bytes are held", held)
				}
				c, err := a.ep.Dial(t.Context(), route.To("bob", "slow"), TrustEveryone, DialOptions{NoConfirm: true})
				if err != nil {
					t.Fatal(err)
				}
				const size = 1 << 10
				for range tt.burst / size {
					if err := c.Send(t.Context(), route.To("app"), nil, large[:size]); err != nil {
						t.Fatal(err)
					}
				}
				synctest.Wait()
				close(policy)
				synctest.Wait()
				if got := len(b.got); got != tt.burst/size {
					t.Errorf("%d of %d messages are handed on", got, tt.burst/size)
				}
				time.Sleep(b.ep.limits.Handshake)
				synctest.Wait()
				if all, own := b.ep.earlyBytes.Load(), b.ep.sources.known["eve0"].Value.(*source).earlyBytes.Load(); all != 0 || own != 0 {
					t.Errorf("%d bytes are held when all is over, %d of one source", all, own)
				}
			})
		})
	}
}

// TestHandOverOrder: whatever the network does within the window, messages are
// handed on in order and at most once, and what arrived in time is not lost.
func TestHandOverOrder(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const total = 1000
				n := newTestNet()
				_, b, ab, _ := pair(t, n)
				rng := rand.New(rand.NewPCG(seed, 2))
				var held []packet
				lost := 0
				n.onPacket(func(p packet) (out []packet) {
					if p.from != "alice" {
						return []packet{p}
					}
					switch rng.IntN(20) {
					case 0:
						lost++
						return nil
					case 1, 2:
						held = append(held, p.clone(), p.clone())
					default:
						held = append(held, p.clone())
					}
					for len(held) > rng.IntN(8) {
						i := rng.IntN(min(len(held), 6))
						out = append(out, held[i])
						held = append(held[:i], held[i+1:]...)
					}
					return out
				})
				for i := range total {
					if err := ab.Send(t.Context(), route.To("app"), nil, binary.BigEndian.AppendUint32(nil, uint32(i))); err != nil {
						t.Fatal(err)
					}
					if i%50 == 0 {
						time.Sleep(holdTime)
					}
				}
				for _, p := range held {
					n.inject(p)
				}
				time.Sleep(time.Second)
				last, got := -1, 0
				for len(b.got) > 0 {
					i := int(binary.BigEndian.Uint32((<-b.got).Frame.Payload))
					if i <= last {
						t.Fatalf("%d after %d", i, last)
					}
					last = i
					got++
				}
				late := int(b.ep.Stats().Dropped.Of(DropLate) + b.ep.Stats().Dropped.Of(DropTooOld))
				if got+lost+late < total {
					t.Errorf("%d handed on, %d lost, %d late, of %d", got, lost, late, total)
				}
				if got < total*8/10 {
					t.Errorf("only %d of %d", got, total)
				}
			})
		})
	}
}

// TestHoldTime: an early frame waits 50 ms for the one before it, no longer.
func TestHoldTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, b, ab, _ := pair(t, n)
		var kept packet
		drop := true
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" && drop {
				drop, kept = false, p.clone()
				return nil
			}
			return []packet{p}
		})
		send(t, ab, "missing")
		start := time.Now()
		send(t, ab, "early")
		if d := b.next(t); string(d.Frame.Payload) != "early" || time.Since(start) != holdTime {
			t.Errorf("%q after %v", d.Frame.Payload, time.Since(start))
		}
		n.inject(kept)
		synctest.Wait()
		b.nothing(t)
		ba := only(t, b)
		if s := ba.Stats(); s.Dropped.Of(DropLate) != 1 || s.Skipped != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}

// TestHoldCount: more than 32 frames are not held.
func TestHoldCount(t *testing.T) {
	var o order
	var got []uint64
	hand := func(it *orderItem) { got = append(got, it.nonce) }
	now := time.Now()
	for n := uint64(1); n <= maxHeld; n++ {
		o.push(orderItem{nonce: n, arrived: now}, n, hand)
	}
	if len(got) != 0 {
		t.Fatalf("%v handed on early", got)
	}
	o.push(orderItem{nonce: maxHeld + 1, arrived: now}, maxHeld+1, hand)
	if len(got) != maxHeld+1 || o.skipped != 1 || o.next != maxHeld+2 {
		t.Errorf("%d handed on, %d skipped, next %d", len(got), o.skipped, o.next)
	}
}

// TestGap: more losses in a row than the window holds are noticed by both sides
// within a second of the next frame.
func TestGap(t *testing.T) {
	for _, both := range []bool{false, true} {
		t.Run(fmt.Sprintf("both directions %v", both), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b, ab, ba := pair(t, n)
				synctest.Wait()
				broken := true
				n.onPacket(func(p packet) []packet {
					if broken && (p.from == "alice" || both) {
						return nil
					}
					return []packet{p}
				})
				for range 50 {
					send(t, ab, "lost")
					if both {
						send(t, ba, "lost")
					}
				}
				n.onPacket(nil)
				start := time.Now()
				send(t, ab, "beyond")
				ended(t, ba, ErrGap)
				ended(t, ab, ErrGap)
				if d := time.Since(start); d > time.Second {
					t.Errorf("noticed after %v", d)
				}
				b.nothing(t)
				if a.ep.Stats().Gaps != 1 || b.ep.Stats().Gaps != 1 {
					t.Errorf("gaps counted: %d, %d", a.ep.Stats().Gaps, b.ep.Stats().Gaps)
				}
			})
		})
	}
}

// TestForgedBeyondWindow: frames with made-up nonces do not end a channel, and
// late arrivals that close the gap keep it.
func TestForgedBeyondWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, b, ab, ba := pair(t, n)
		dr, _ := ab.RemoteRoute().Last()
		for i := range uint64(1000) {
			forged := binary.BigEndian.AppendUint64(nil, 100+i*1000)
			n.inject(packet{to: "bob", frame: route.Frame{Onward: route.To(dr.Value), Return: route.To("alice"), Payload: append(forged, make([]byte, 64)...)}})
		}
		send(t, ab, "fine")
		b.next(t)
		time.Sleep(time.Second)
		var held []packet
		n.onPacket(func(p packet) []packet {
			if p.from == "alice" && len(held) < 40 {
				held = append(held, p.clone())
				return nil
			}
			return []packet{p}
		})
		for range 41 {
			send(t, ab, "m")
		}
		time.Sleep(gapGrace / 2)
		for _, p := range held {
			n.inject(p)
		}
		time.Sleep(time.Second)
		if ab.Err() != nil || ba.Err() != nil {
			t.Errorf("ended: %v, %v", ab.Err(), ba.Err())
		}
		if len(b.got) != 40 {
			t.Errorf("%d handed on", len(b.got))
		}
	})
}

// TestSilence: a peer that no longer answers is given up after 20 s, by who
// waits for it; by who does not, within the idle time more.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, _, ab, ba := pair(t, n)
		time.Sleep(time.Second)
		n.onPacket(func(packet) []packet { return nil })
		send(t, ab, "into the void")
		start := time.Now()
		ended(t, ab, ErrSilent)
		if d := time.Since(start); d != 20*time.Second {
			t.Errorf("the sender noticed after %v", d)
		}
		ended(t, ba, ErrSilent)
		if d := time.Since(start); d > 2*time.Minute+20*time.Second {
			t.Errorf("the receiver noticed after %v", d)
		}
	})
}

// TestSuspect: a peer that is said to have gone is asked, and given up after 2 s
// without a word from it; one that says something stays, and is watched as before.
func TestSuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, _, ab, ba := pair(t, n)
		time.Sleep(time.Second)
		for range 3 {
			ab.Suspect()
			ab.Suspect()
			time.Sleep(time.Minute)
		}
		if ab.Err() != nil {
			t.Fatal("it answered, and is given up")
		}

		n.onPacket(func(packet) []packet { return nil })
		ab.Suspect()
		a.ep.SetOnline(false) // nobody can answer us now
		time.Sleep(time.Minute)
		a.ep.SetOnline(true)
		synctest.Wait()
		if ab.Err() != nil {
			t.Fatal("it is given up for our own absence")
		}

		ab.Suspect()
		start := time.Now()
		ended(t, ab, ErrSilent)
		if d := time.Since(start); d != suspectWait {
			t.Errorf("given up after %v", d)
		}
		ba.Suspect()
		time.Sleep(suspectWait / 2)
		ba.Suspect() // does not prolong it
		start = time.Now()
		ended(t, ba, ErrSilent)
		if d := time.Since(start); d != suspectWait/2 {
			t.Errorf("given up after %v more", d)
		}
	})
}

// TestLiveChannelStays: one-way traffic and long idleness are no reason to end,
// nor is an outage of our own.
func TestLiveChannelStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, ba := pair(t, n)
		for range 100 {
			send(t, ab, "telemetry")
			time.Sleep(time.Second)
		}
		if got := ba.Stats().Sent; got < 10 || got > 40 {
			t.Errorf("the receiver sent %d frames in 100 s, want a pong every five", got)
		}
		time.Sleep(24 * time.Hour)
		a.ep.SetOnline(false)
		b.ep.SetOnline(false)
		n.onPacket(func(packet) []packet { return nil })
		send(t, ab, "lost in the outage")
		time.Sleep(time.Hour)
		n.onPacket(nil)
		a.ep.SetOnline(true)
		b.ep.SetOnline(true)
		time.Sleep(time.Minute)
		if ab.Err() != nil || ba.Err() != nil {
			t.Errorf("ended: %v, %v", ab.Err(), ba.Err())
		}
	})
}

// TestBackPressure: Send waits for the router, gives up with its context, and
// costs no nonce in doing so.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, _ := pair(t, n)
		synctest.Wait()
		unblock := a.block()
		for i := range 100 { // many more than the window
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			err := ab.Send(ctx, route.To("app"), nil, []byte(fmt.Sprint(i)))
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("send %d: %v", i, err)
			}
		}
		sent := make(chan error, 1)
		go func() { sent <- ab.Send(t.Context(), route.To("app"), nil, []byte("last")) }()
		synctest.Wait()
		unblock()
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"0", "last"} {
			if d := b.next(t); string(d.Frame.Payload) != want {
				t.Errorf("%q, want %q", d.Frame.Payload, want)
			}
		}
	})
}

func TestRouterRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, ba := pair(t, n)
		synctest.Wait()
		broken := errors.New("no way")
		a.fail(broken)
		for range Window - 1 {
			if err := ab.Send(t.Context(), route.To("app"), nil, nil); !errors.Is(err, broken) {
				t.Fatal(err)
			}
		}
		a.fail(nil)
		send(t, ab, "still in the window")
		b.next(t)
		a.fail(broken)
		for range Window {
			_ = ab.Send(t.Context(), route.To("app"), nil, nil)
		}
		ended(t, ab, ErrGap)
		_ = ba
	})
}

func TestTooLarge(t *testing.T) {
	n := newTestNet()
	a, b, ab, _ := pair(t, n)
	big := make([]byte, 256<<10)
	if err := ab.Send(t.Context(), route.To("app"), nil, big); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v, want ErrTooLarge", err)
	}
	a.ep.SetFrameLimit(1 << 20)
	if err := ab.Send(t.Context(), route.To("app"), nil, big); err != nil {
		t.Error(err)
	}
	if d := b.next(t); len(d.Frame.Payload) != len(big) || d.Nonce != 1 {
		t.Errorf("%d bytes as nonce %d: the refused message used one", len(d.Frame.Payload), d.Nonce)
	}
}

// TestFloodOfFirsts: a source that floods a listener is cut down before any key
// exchange, holds a bounded number of handshakes, and shuts nobody else out.
func TestFloodOfFirsts(t *testing.T) {
	n := newTestNet()
	var exchanges atomic.Int64
	a, b := listen(t, n, func(c *Config) {
		c.hooks.ephemeral = func() (keyPair, error) { exchanges.Add(1); return newEphemeral() }
	})
	flood := func(source string, count int) {
		for i := range count {
			payload := make([]byte, 32)
			binary.BigEndian.PutUint64(payload, uint64(i)+1)
			n.inject(packet{to: "bob", frame: route.Frame{
				Onward: route.To("listener"), Return: route.To(source, "dr"), Payload: payload,
			}})
		}
	}
	flood("eve", 5000)
	dial(t, a, "bob", DialOptions{Timeout: wait})
	flood("eve", 5000)
	dial(t, a, "bob", DialOptions{Timeout: wait})
	s := b.ep.Stats()
	if s.HalfOpen > b.ep.limits.HalfOpenPerSource {
		t.Errorf("%d handshakes half-open", s.HalfOpen)
	}
	if got := exchanges.Load(); got > 2+int64(b.ep.limits.HalfOpenPerSource) {
		t.Errorf("%d key exchanges for two dials and one source", got)
	}
	if s.Dropped.Of(DropRate)+s.Dropped.Of(DropHalfOpen)+s.Dropped.Of(DropFirstRepeat) < 9000 {
		t.Errorf("drops: %v", s.Dropped)
	}
}

// TestManySources: many sources at once meet the bound in total; when their
// handshakes have grown old, they give way to a new one.
func TestManySources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b := listen(t, n, func(c *Config) { c.Limits = Limits{HalfOpen: 8, Sources: 4} })
		for i := range 100 {
			e, err := newEphemeral()
			if err != nil {
				t.Fatal(err)
			}
			pub := e.Public()
			n.inject(packet{to: "bob", frame: route.Frame{
				Onward: route.To("listener"), Return: route.To(fmt.Sprint("source", i), "dr"), Payload: pub[:],
			}})
		}
		synctest.Wait()
		if s := b.ep.Stats(); s.HalfOpen != 8 || len(b.ep.sources.known) > 4 {
			t.Errorf("%d half-open, %d sources known", s.HalfOpen, len(b.ep.sources.known))
		}
		if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: time.Second}); !errors.Is(err, ErrTimeout) {
			t.Errorf("%v, want ErrTimeout", err)
		}
		time.Sleep(halfOpenEvict)
		dial(t, a, "bob", DialOptions{})
	})
}

// TestOneSource: its handshakes are bounded, at once and over time, and each ends when its
// time is over, on both sides.
func TestOneSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		_, b := listen(t, n, func(c *Config) {
			c.Limits = Limits{HalfOpenPerSource: 3, Burst: 5, Rate: 0.001, Handshake: 7 * time.Second}
		})
		first := func(source string) {
			e, err := newEphemeral()
			if err != nil {
				t.Fatal(err)
			}
			pub := e.Public()
			n.inject(packet{to: "bob", frame: route.Frame{
				Onward: route.To("listener"), Return: route.To(source, "dr"), Payload: pub[:],
			}})
			synctest.Wait()
		}
		halfOpen := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			if s := b.ep.Stats(); s.HalfOpen != want {
				t.Errorf("%s: %d half-open, want %d", what, s.HalfOpen, want)
			}
		}
		for range 4 {
			first("one")
		}
		halfOpen("four of one source", 3)
		first("another")
		halfOpen("one of another", 4)
		time.Sleep(7*time.Second - time.Millisecond)
		halfOpen("before their time is over", 4)
		time.Sleep(time.Millisecond)
		halfOpen("when it is", 0)
		for range 3 {
			first("one")
		}
		halfOpen("of the last of five", 1)

		begin := time.Now()
		c := n.party(t, "carol", func(c *Config) { c.Limits.Handshake = 9 * time.Second })
		_, err := c.ep.Dial(t.Context(), route.To("nobody", "listener"), TrustEveryone, DialOptions{})
		if d := time.Since(begin); !errors.Is(err, ErrTimeout) || d != 9*time.Second {
			t.Errorf("%v after %v", err, d)
		}
	})
}

// TestIdleChannelGivesWay: with all places taken, or all of one source, a long idle
// channel makes room for a new peer, and a busy one does not.
func TestIdleChannelGivesWay(t *testing.T) {
	for name, limits := range map[string]Limits{
		"all":        {Channels: 1, Idle: -1},
		"one source": {ChannelsPerSource: 1, Idle: -1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b := listen(t, n, func(c *Config) { c.Limits = limits })
				other := n.party(t, "carol")
				var apart *Channel
				if limits.ChannelsPerSource > 0 { // of another source, and idle for longer
					apart = dial(t, other, "bob", DialOptions{})
				}
				time.Sleep(time.Second)
				first := dial(t, a, "bob", DialOptions{})
				if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: time.Second}); !errors.Is(err, ErrTimeout) {
					t.Errorf("%v, want ErrTimeout", err)
				}
				a.ep.SetOnline(false) // or their probes would keep them busy
				other.ep.SetOnline(false)
				time.Sleep(idleEvict)
				a.ep.SetOnline(true)
				other.ep.SetOnline(true)
				second := dial(t, a, "bob", DialOptions{})
				ended(t, first, ErrPeerClosed)
				send(t, second, "m")
				b.next(t)
				if apart != nil {
					send(t, apart, "m")
					b.next(t)
				}
			})
		})
	}
}

// TestChannelsLeaveRoomForOthers: where all places are taken, the source or identity that
// has most makes room for who has less, and for nobody else.
func TestChannelsLeaveRoomForOthers(t *testing.T) {
	for _, oneIdentity := range []bool{true, false} {
		t.Run(fmt.Sprint("one identity ", oneIdentity), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newTestNet()
				a, b := listen(t, n, func(c *Config) { c.Limits = Limits{Channels: 16, ChannelsPerSource: 4} })
				first := dial(t, a, "bob", DialOptions{})
				id := newIdentity(t)
				var eves []*party
				var open []*Channel
				refused := 0
				enter := func(p *party) {
					c, err := p.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: time.Second})
					switch {
					case err == nil:
						open = append(open, c)
					case errors.Is(err, ErrTimeout):
						refused++
					default:
						t.Fatal(err)
					}
				}
				for i := range 5 {
					eve := n.party(t, fmt.Sprint("eve", i), func(c *Config) {
						if oneIdentity {
							c.Identity = id
						}
					})
					eves = append(eves, eve)
					for range 4 {
						enter(eve)
					}
				}
				if s := b.ep.Stats(); s.Channels != 16 {
					t.Fatalf("%+v", s)
				}
				if refused > 0 == oneIdentity { // one that has most makes room for itself
					t.Errorf("%d are refused", refused)
				}
				second := dial(t, n.party(t, "carol"), "bob", DialOptions{})
				dave := n.party(t, "dave")
				if !oneIdentity { // refused, and remembered for a moment
					n.inject(packet{to: "bob", frame: route.Frame{
						Onward: route.To("listener"), Return: route.To("eve4", "dr"), Payload: make([]byte, 32),
					}})
					synctest.Wait()
					if !b.ep.crowd.until.After(time.Now()) || b.ep.crowd.most != 3 {
						t.Errorf("crowd %+v", b.ep.crowd)
					}
				}
				third := dial(t, dave, "bob", DialOptions{})
				for range 3 {
					for _, eve := range eves {
						enter(eve)
					}
				}
				synctest.Wait()
				for _, c := range []*Channel{first, second, third} {
					send(t, c, "still here")
					b.next(t)
				}
				ended, s := 0, b.ep.Stats()
				for _, c := range open {
					if c.hasEnded() {
						ended++
					}
				}
				if s.Channels != 16 || len(open)-ended != 13 {
					t.Errorf("%d channels, %d are eve's of %d", s.Channels, len(open)-ended, len(open))
				}
				b.ep.mu.Lock()
				defer b.ep.mu.Unlock()
				sum := 0
				for who, of := range b.ep.identities {
					sum += of.channels
					if of.channels == 0 || oneIdentity && who == id.Identifier() && of.channels != 13 {
						t.Errorf("an identity has %d channels", of.channels)
					}
				}
				if sum != 16 {
					t.Errorf("identities have %d channels", sum)
				}
			})
		})
	}
}

// TestHandshakesLeaveRoomForOthers: where two sources have begun all that may be
// unfinished, another gets in at once.
func TestHandshakesLeaveRoomForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b := listen(t, n, func(c *Config) { c.Limits = Limits{HalfOpen: 8, HalfOpenPerSource: 4} })
		flood := func() {
			for i := range 8 {
				e, err := newEphemeral()
				if err != nil {
					t.Fatal(err)
				}
				pub := e.Public()
				n.inject(packet{to: "bob", frame: route.Frame{
					Onward: route.To("listener"), Return: route.To(fmt.Sprint("eve", i%2), "dr"), Payload: pub[:],
				}})
			}
			synctest.Wait()
			if s := b.ep.Stats(); s.HalfOpen != 8 {
				t.Errorf("%d half-open", s.HalfOpen)
			}
		}
		for range 3 {
			flood()
			if _, err := a.ep.Dial(t.Context(), route.To("bob", "listener"), TrustEveryone, DialOptions{Timeout: time.Second}); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestEncryptorQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		a, b, ab, _ := pair(t, n)
		synctest.Wait()
		unblock := a.block()
		for range 3 * maxOutFrames {
			if err := a.Send(t.Context(), route.Frame{Onward: route.To(ab.EncryptorAddress(), "app"), Payload: []byte("m")}, route.Stored); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		unblock()
		synctest.Wait()
		if got, dropped := len(b.got), ab.Stats().Dropped.Of(DropQueue); got+int(dropped) != 3*maxOutFrames || got < maxOutFrames {
			t.Errorf("%d delivered, %d dropped", got, dropped)
		}
	})
}
