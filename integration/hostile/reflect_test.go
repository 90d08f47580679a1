package hostile

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// ownListener is where first messages reach the listener behind an end, as its tape
// shows: somebody has dialled it before.
func ownListener(t *testing.T, e *end) route.Route {
	t.Helper()
	for _, f := range e.frames(down) {
		if len(f.Payload) == 32 {
			return f.Onward
		}
	}
	t.Fatal("nobody has dialled it")
	return nil
}

// mirror shows message number of the next handshake to the endpoint that sends it:
// at its listener, and at its own address of this handshake, each with a way back to
// itself as the hub writes it. What the endpoint answers to itself goes back to it as
// well. Then the genuine message goes on, unless swallow is set. Messages 1 and 3 are
// the initiator's, 2 the responder's. seen is closed once it has happened.
func mirror(number int, listener route.Route, swallow bool) (a attack, seen <-chan struct{}) {
	done := make(chan struct{})
	var caller route.Route // the initiator, where the responder is mirrored
	var own route.Address  // the endpoint's own address of this handshake
	sent := 0              // messages of this handshake that the endpoint has sent
	back := func(p *passage, onward route.Route) {
		ret := append(route.Route{liarRoute[0]}, p.Return...)
		p.at.sendLocked(down, encode(route.Frame{Onward: onward, Return: ret, Payload: p.Payload}))
	}
	var kept []byte // message 1, until the endpoint has answered it: the peer is never faster
	return func(p *passage) [][]byte {
		switch {
		case p.way == down:
			if number == 2 && caller == nil && len(p.Payload) == 32 && p.Onward.Equal(listener) {
				caller = p.Return
			}
			return asIs(p)
		case len(p.Return) == 0:
			return asIs(p)
		case p.Onward[0] == liarRoute[0]:
			back(p, p.Onward[1:])
			if out := kept; out != nil {
				kept = nil
				return [][]byte{out}
			}
			return nil
		case sent > 0 && p.Return[0] == own:
			sent++
		case sent == 0 && (number == 2 && caller != nil && p.Onward.Equal(caller) || number != 2 && len(p.Payload) == 32):
			own, sent = p.Return[0], 1
		default:
			return asIs(p)
		}
		if sent != 1+number/3 { // message 3 is the initiator's second
			return asIs(p)
		}
		back(p, route.To(own.Value))
		back(p, listener)
		close(done)
		switch {
		case swallow:
			return nil
		case number == 1:
			kept = p.body
			return nil
		}
		return asIs(p)
	}, done
}

func happened(t *testing.T, seen <-chan struct{}) {
	t.Helper()
	select {
	case <-seen:
	case <-time.After(patience):
		t.Fatal("nothing was reflected")
	}
}

// TestReflectedHandshake shows devices their own handshake messages, and carries on
// the handshake with themselves that this may start. Nobody accepts anything of it.
// Beside the genuine messages it changes nothing, except that a dial may end because
// whoever answers first is not the peer; in their place the dial fails, and says why.
func TestReflectedHandshake(t *testing.T) {
	for name, tt := range map[string]struct {
		number  int
		swallow bool
		want    error // of the dial
	}{
		"message 1 ahead of the answer":     {1, false, device.ErrWrongIdentity},
		"message 1 in place of an answer":   {1, true, device.ErrWrongIdentity},
		"message 2 ahead of message 3":      {2, false, nil},
		"message 2 in place of message 3":   {2, true, device.ErrTimeout},
		"message 3 ahead of the first data": {3, false, nil},
		"message 3 in place of data":        {3, true, device.ErrTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			alice, bob := pair(t)
			alice.listen(bob.trust())
			works(t, alice, bob)
			works(t, bob, alice)
			target := alice
			if tt.number == 2 {
				target = bob
			}
			a, seen := mirror(tt.number, ownListener(t, target.end), tt.swallow)
			target.end.set(a)
			ctx := within(t)
			if errors.Is(tt.want, device.ErrTimeout) {
				ctx = briefly(t)
			}
			ch, err := alice.node.Dial(ctx, bob.at(), bob.trust(), device.NoHeal())
			t.Logf("dial: %v", err)
			want := []string{"all is well"}
			if err == nil {
				if tt.swallow && ch.Confirmed() {
					t.Error("a handshake without message 3 was confirmed")
				}
				if err = ch.Deliver(ctx, sure, []byte("inside")); err == nil {
					want = append(want, "inside")
				}
				_ = ch.Close()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("dial: %v, want %v", err, tt.want)
			}
			happened(t, seen)
			target.end.set(nil)
			works(t, alice, bob)
			works(t, bob, alice)
			if n := bob.node.Stats().Channels.Accepted; int(n) != 1+len(want) {
				t.Errorf("bob has accepted %d channels, want %d", n, 1+len(want))
			}
			if n := alice.node.Stats().Channels.Accepted; n != 2 {
				t.Errorf("alice has accepted %d channels, want those of bob", n)
			}
			if got := bob.received(sure); !slices.Equal(got, append(want, "all is well")) {
				t.Errorf("bob accepted %q", got)
			}
			if got := alice.received(sure); !slices.Equal(got, []string{"all is well", "all is well"}) {
				t.Errorf("alice accepted %q", got)
			}
		})
	}
}

// TestReflectedToOneself has a device meet itself, where policies on both sides accept
// anybody, itself included: that is who the channel and its messages are said to be
// from, and nobody else accepts or sends anything.
func TestReflectedToOneself(t *testing.T) {
	t.Parallel()
	alice, bob := join(t, device.Config{}).listen(channel.TrustEveryone), join(t, device.Config{}).listen(channel.TrustEveryone)
	works(t, bob, alice)
	// Its dial goes to its own forwarder; the hub does the rest.
	alice.end.set(func(p *passage) [][]byte {
		if p.way == up && p.Onward.Equal(bob.at()) {
			return [][]byte{encode(route.Frame{Onward: alice.at(), Return: p.Return, Payload: p.Payload})}
		}
		return asIs(p)
	})
	ch, err := alice.node.Dial(within(t), bob.at(), channel.TrustEveryone, device.NoHeal())
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	if who := ch.Peer().Identifier; who != alice.id.Identifier() {
		t.Errorf("the peer is said to be %v", who)
	}
	must(t, ch.Deliver(within(t), sure, []byte("to bob")))
	alice.mu.Lock()
	from := alice.from["to bob"]
	alice.mu.Unlock()
	if from != alice.id.Identifier() {
		t.Errorf("the message is said to be from %v", from)
	}
	if n := bob.node.Stats().Channels.Accepted; n != 0 || len(bob.received(sure)) != 0 {
		t.Errorf("bob has accepted %d channels and %q", n, bob.received(sure))
	}
	// Whoever names the peer is not taken in.
	if _, err := alice.node.Dial(within(t), bob.at(), bob.trust()); !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("with bob's identifier: %v", err)
	}
}

// briefly is a context for what can only run out, once a handshake has had the time
// that a local one needs.
func briefly(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// TestStockReflectedHandshake shows a stock node its own handshake messages.
func TestStockReflectedHandshake(t *testing.T) {
	for name, number := range map[string]int{
		"message 1, as initiator": 1, "message 2, as responder": 2, "message 3, as initiator": 3,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := meetStock(t)
			s.ours.listen(channel.TrustIdentifiers(s.identifier(t)))
			to := s.listenFor(t, []identity.Identifier{s.ours.id.Identifier()}, nil)
			a, seen := mirror(number, ownListener(t, s.end), false)
			s.end.set(a)
			channels := 1
			switch number {
			case 1: // a stock initiator gives up at the first answer that is not one
				c := s.toOurs("reflected")
				c.Timeout = refusalTime
				if _, err := s.n.Dial(c); err == nil {
					t.Error("the stock node has a channel of a reflected handshake")
				}
			case 2:
				s.dialled(t, to)
				channels++
			case 3:
				if _, err := s.n.Dial(s.toOurs("reflected")); err != nil {
					t.Error(err)
				}
				channels++
			}
			happened(t, seen)
			s.end.set(nil)
			s.settled(t)
			ch, err := s.n.Dial(s.toOurs("afterwards"))
			if err != nil {
				t.Fatal(err)
			}
			s.n.Worker("sink", sure, "afterwards")
			if err := s.n.Send([]string{ch.Encryptor, plain}, nil, []byte(fence)); err != nil {
				t.Fatal(err)
			}
			s.ours.awaits(t, plain, 1)
			if got := s.ours.received(plain); !slices.Equal(got, []string{fence}) {
				t.Errorf("ours accepted %q", got)
			}
			if n := len(s.n.WaitChannels("", channels+1)); n != channels+1 || s.n.Pending(plain) != 0 {
				t.Errorf("the stock node has %d channels and %d messages, want %d and none", n, s.n.Pending(plain), channels+1)
			}
		})
	}
}
