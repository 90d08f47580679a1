package hostile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/flynn/noise"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// soon is a context for what must not succeed.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	t.Cleanup(cancel)
	return ctx
}

func pair(t *testing.T) (alice, bob *person) {
	t.Helper()
	alice, bob = join(t, device.Config{}), join(t, device.Config{})
	return alice, bob.listen(alice.trust())
}

// TestHandshakeBytes flips every byte of every handshake message, before the
// genuine one arrives: the handshake ends with the genuine peer.
func TestHandshakeBytes(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	flip := func(p *passage, at int) []byte {
		b := bytes.Clone(p.Payload)
		if at >= len(b) {
			return nil
		}
		b[at] ^= 1 << (at % 8)
		return p.with(b)
	}
	var longest int
	tamper := func(at ...int) attack {
		var dialler route.Address // of this dial: frames of the last channel may still come
		var seen [2]bool
		return func(p *passage) [][]byte {
			mine := p.way == down && p.Onward[0] == dialler || p.way == up && len(p.Return) > 0 && p.Return[0] == dialler
			if p.way == up && len(p.Payload) == 32 && p.Onward.Equal(bob.at()) {
				dialler = p.Return[0]
				return asIs(p)
			}
			if !mine || seen[p.way] {
				return asIs(p)
			}
			seen[p.way] = true
			longest = max(longest, len(p.Payload))
			var out [][]byte
			for _, i := range at {
				if b := flip(p, i); b != nil {
					out = append(out, b)
				}
			}
			return append(out, p.body)
		}
	}
	var sent []string
	dial := func(a attack) {
		t.Helper()
		alice.end.set(a)
		ch := alice.dial(bob, device.NoHeal())
		// A message to Deliver comes back only from bob, and shows that he has got here.
		m := fmt.Sprint("dial ", len(sent))
		sent = append(sent, m)
		if err := ch.Deliver(within(t), sure, []byte(m)); err != nil {
			t.Fatalf("%s: %v", m, err)
		}
		_ = ch.Close()
	}
	for i := range 32 {
		dial(func(p *passage) [][]byte {
			if p.way == up && len(p.Payload) == 32 && p.Onward.Equal(bob.at()) {
				return [][]byte{flip(p, i), p.body}
			}
			return asIs(p)
		})
	}
	dial(tamper(0, 1))
	alice.end.mu.Lock()
	n := longest
	alice.end.mu.Unlock()
	for i := 2; i < n; i += 2 {
		dial(tamper(i, i+1))
	}
	alice.end.set(nil)
	works(t, alice, bob)
	part(t, "bob", append(sent, "all is well"), bob.received(sure), true, len(sent)+1)
}

// TestReplayedConversation plays a whole conversation, with messages both ways, again: to
// those who had it, and to them after a restart.
func TestReplayedConversation(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	ch := alice.dial(bob)
	acc := bob.accepted(t)
	sent, answers := texts("alice", 40), texts("bob", 40)
	for i, m := range sent {
		if err := ch.Deliver(within(t), sure, []byte(m)); err != nil {
			t.Fatal(err)
		}
		if err := acc.Send(within(t), plain, []byte(answers[i])); err != nil {
			t.Fatal(err)
		}
	}
	alice.awaits(t, plain, len(answers))
	if err := ch.Close(); err != nil {
		t.Fatal(err)
	}
	toBob, toAlice := bob.end.frames(down), alice.end.frames(down)
	replay := func(bob, alice *person) {
		t.Helper()
		for range 2 {
			for _, f := range toBob {
				bob.end.send(down, f)
			}
			for _, f := range toAlice {
				alice.end.send(down, f)
			}
		}
		works(t, alice, bob)
	}
	replay(bob, alice)
	part(t, "bob", append(sent, "all is well"), bob.received(sure), true, len(sent)+1)
	part(t, "alice", answers, alice.received(plain), true, len(answers))
	accepted := bob.node.Stats().Channels.Accepted
	if accepted != 2 {
		t.Errorf("bob has accepted %d channels, want 2", accepted)
	}
	_, _ = bob.node.Close(), alice.node.Close()
	again, bobAgain := joinAt(t, alice.end, device.Config{Identity: alice.id}), joinAt(t, bob.end, device.Config{Identity: bob.id})
	bobAgain.listen(again.trust())
	replay(bobAgain, again)
	if got := bobAgain.received(sure); len(got) != 1 {
		t.Errorf("after the restart bob accepted %d messages, want 1", len(got))
	}
	if got := again.received(plain); len(got) != 0 {
		t.Errorf("after the restart alice accepted %d messages", len(got))
	}
	if n := bobAgain.node.Stats().Channels.Accepted; n != 1 {
		t.Errorf("after the restart bob has accepted %d channels, want 1", n)
	}
}

// splice exchanges message 2 or 3 of two handshakes that are dialled at the same time,
// by whom from says: the endpoint, or somebody beyond the hub.
func splice(from way, number int) attack {
	sent := make(map[string]int) // by where its initiator is
	var first *passage
	return func(p *passage) [][]byte {
		if p.way == from {
			sent[p.Return.String()]++
		}
		if answer := p.way != from; answer != (number == 2) || len(p.Return) == 0 || !answer && sent[p.Return.String()] != 2 {
			return asIs(p)
		}
		if first == nil {
			first = p
			return nil
		}
		f, g := *first, *p
		f.Payload, g.Payload = p.Payload, first.Payload
		first = nil
		return [][]byte{encode(f.Frame), encode(g.Frame)}
	}
}

// TestSpliced mixes two handshakes between the same two devices.
func TestSpliced(t *testing.T) {
	for name, number := range map[string]int{"message 2": 2, "message 3": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			alice, bob := pair(t)
			alice.end.set(splice(up, number))
			var all sync.WaitGroup
			for range 2 {
				all.Go(func() {
					ch, err := alice.node.Dial(soon(t), bob.at(), bob.trust(), device.NoHeal())
					if err == nil {
						// Nobody has confirmed it, and nothing gets through.
						if ch.Confirmed() {
							t.Error("a spliced handshake was confirmed")
						}
						_ = ch.Send(soon(t), plain, []byte("lost"))
						_ = ch.Close()
					} else if !errors.Is(err, device.ErrTimeout) {
						t.Errorf("dial: %v", err)
					}
				})
			}
			all.Wait()
			alice.end.set(nil)
			works(t, alice, bob)
			if n := bob.node.Stats().Channels.Accepted; n != 1 || len(bob.received(plain)) != 0 {
				t.Errorf("bob has accepted %d channels and %d messages", n, len(bob.received(plain)))
			}
		})
	}
}

// TestManInTheMiddle diverts dials to somebody with an identity of its own, who
// dials on.
func TestManInTheMiddle(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	mallory := join(t, device.Config{}).listen(channel.TrustEveryone)
	alice.end.set(func(p *passage) [][]byte {
		if p.way == up && p.n == 0 {
			return [][]byte{encode(route.Frame{Onward: mallory.at(), Return: p.Return, Payload: p.Payload})}
		}
		return asIs(p)
	})
	if _, err := alice.node.Dial(within(t), bob.at(), bob.trust()); !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("alice gets %v, want ErrWrongIdentity", err)
	}
	if _, err := mallory.node.Dial(within(t), bob.at(), channel.TrustEveryone); !errors.Is(err, device.ErrPeerRefused) {
		t.Errorf("mallory gets %v, want ErrPeerRefused", err)
	}
	if n := mallory.node.Stats().Channels.Accepted + bob.node.Stats().Channels.Accepted; n != 0 {
		t.Errorf("%d channels came about", n)
	}
	alice.end.set(nil)
	works(t, alice, bob)
}

// liar is one side of a handshake with something wrong about it.
type liar interface {
	start() ([]byte, error)                                // message 1
	answer(msg1 []byte) ([]byte, error)                    // message 2
	final(msg2 []byte) (msg3 []byte, seal seal, err error) // message 3
}

type seal func(plain []byte) []byte

// honest runs the protocol as it should be, with an identity that should not be.
type honest struct{ channel.HandshakeConfig }

func (h honest) config() channel.HandshakeConfig {
	c := h.HandshakeConfig
	c.Registry, c.Policy = identity.NewMemoryRegistry(0), channel.TrustEveryone
	return c
}

type honestRun struct {
	honest
	hs *channel.Handshake
}

func (h *honestRun) start() (b []byte, err error) {
	if h.hs, err = channel.NewInitiator(h.config()); err != nil {
		return nil, err
	}
	return h.hs.Start()
}

func (h *honestRun) answer(msg1 []byte) (b []byte, err error) {
	if h.hs, err = channel.NewResponder(h.config()); err != nil {
		return nil, err
	}
	return h.hs.ReadFirst(msg1)
}

func (h *honestRun) final(msg2 []byte) ([]byte, seal, error) {
	msg3, err := h.hs.ReadReply(msg2)
	if err != nil {
		return nil, nil, err
	}
	r, err := h.hs.Result()
	return msg3, func(plain []byte) []byte {
		b, _ := r.Sealer.Seal(nil, plain)
		return b
	}, err
}

// borrowed shows what another has shown, over a handshake key of its own.
type borrowed struct {
	shown []byte
	hs    *noise.HandshakeState
}

func (b *borrowed) begin(initiator bool) (err error) {
	suite := ockamSuite()
	key, err := suite.GenerateKeypair(nil)
	if err != nil {
		return err
	}
	b.hs, err = noise.NewHandshakeState(noise.Config{
		CipherSuite: suite, Pattern: noise.HandshakeXX, Initiator: initiator, StaticKeypair: key,
	})
	return err
}

func (b *borrowed) start() ([]byte, error) {
	if err := b.begin(true); err != nil {
		return nil, err
	}
	msg, _, _, err := b.hs.WriteMessage(nil, nil)
	return msg, err
}

func (b *borrowed) answer(msg1 []byte) ([]byte, error) {
	if err := b.begin(false); err != nil {
		return nil, err
	}
	if _, _, _, err := b.hs.ReadMessage(nil, msg1); err != nil {
		return nil, err
	}
	msg, _, _, err := b.hs.WriteMessage(nil, b.shown)
	return msg, err
}

func (b *borrowed) final(msg2 []byte) ([]byte, seal, error) {
	if _, _, _, err := b.hs.ReadMessage(nil, msg2); err != nil {
		return nil, nil, err
	}
	msg, out, _, err := b.hs.WriteMessage(nil, b.shown)
	if err != nil {
		return nil, nil, err
	}
	return msg, func(plain []byte) []byte {
		b, _ := out.Encrypt(make([]byte, 8), nil, plain)
		return b
	}, nil
}

// copyOf is what a thief has of an identity.
func copyOf(t *testing.T, v *identity.Vault, name string) *identity.Private {
	t.Helper()
	backup, err := v.Export(name, identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := elsewhere.Import(name, backup, identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestImposters shows devices identities that are not what they seem, as their
// responder and as their initiator, though the trust policy names the identity
// shown.
func TestImposters(t *testing.T) {
	t.Parallel()
	v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
	if err != nil {
		t.Fatal(err)
	}
	victim, err := v.Create("victim")
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	old, fork := copyOf(t, v, "victim"), copyOf(t, v, "victim")
	must(victim.Rotate())
	must(fork.Rotate())
	key, err := victim.ChannelKey()
	must(err)
	// An identity whose attestation has ended, and a credential that has.
	past := func() time.Time { return time.Now().Add(-48 * time.Hour) }
	lapsed := newIdentity(t, identity.WithClock(past), identity.WithValidity(time.Hour))
	authority := newIdentity(t, identity.WithClock(past))
	ended, err := authority.IssueCredential(victim.Identity(), map[string]string{"role": "gateway"}, 1, time.Hour)
	must(err)
	other := newIdentity(t)
	current := newIdentity(t)
	foreign, err := current.IssueCredential(other.Identity(), map[string]string{"role": "gateway"}, 1, time.Hour)
	must(err)

	known := identity.NewMemoryRegistry(0)
	must(known.Update(victim.Identity()))
	byName := channel.TrustIdentifiers(victim.Identifier(), lapsed.Identifier())
	asGateway := func(a *identity.Private) channel.Policy {
		return channel.And(byName, channel.TrustCredential(a.Identity(), map[string]string{"role": "gateway"}))
	}
	for name, tt := range map[string]struct {
		liar   liar
		policy channel.Policy
		want   error
	}{
		"attestation of another key":   {&borrowed{shown: key.AppendPresentation(nil)}, byName, channel.ErrHandshake},
		"old history":                  {&honestRun{honest: honest{channel.HandshakeConfig{Identity: old}}}, byName, identity.ErrOlder},
		"forked history":               {&honestRun{honest: honest{channel.HandshakeConfig{Identity: fork}}}, byName, identity.ErrConflict},
		"expired attestation":          {&honestRun{honest: honest{channel.HandshakeConfig{Identity: lapsed}}}, byName, identity.ErrExpired},
		"identity of its own":          {&honestRun{honest: honest{channel.HandshakeConfig{Identity: other}}}, byName, device.ErrWrongIdentity},
		"expired credential":           {&honestRun{honest: honest{channel.HandshakeConfig{Identity: victim, Credential: ended}}}, asGateway(authority), device.ErrWrongIdentity},
		"credential of another's name": {&honestRun{honest: honest{channel.HandshakeConfig{Identity: victim, Credential: foreign}}}, asGateway(current), device.ErrWrongIdentity},
		"no credential":                {&honestRun{honest: honest{channel.HandshakeConfig{Identity: victim}}}, asGateway(current), device.ErrWrongIdentity},
		"nothing is wrong":             {&honestRun{honest: honest{channel.HandshakeConfig{Identity: victim}}}, byName, nil},
	} {
		t.Run(name, func(t *testing.T) {
			friend := newIdentity(t)
			target := join(t, device.Config{Registry: known})
			target.listen(channel.Or(tt.policy, channel.TrustIdentifiers(friend.Identifier())))

			helper := join(t, device.Config{Identity: friend}).listen(channel.TrustEveryone)
			target.end.set(impersonate(t, tt.liar))
			// No forwarder's address, of which the hub would show a claim.
			_, err := target.node.Dial(within(t), route.To("dev_11111111111111111111111111111111", "listener"), tt.policy)
			t.Logf("dial: %v", err)
			if !errors.Is(err, tt.want) {
				t.Errorf("dial: %v, want %v", err, tt.want)
			}
			target.end.set(nil)
			works(t, helper, target)
			accepted := target.node.Stats().Channels.Accepted
			intrude(t, target.end, tt.liar)
			works(t, helper, target)
			in := 0
			if tt.want == nil {
				in = 1
				target.awaits(t, plain, 3)
			}
			if n := target.node.Stats().Channels.Accepted - accepted; int(n) != 1+in {
				t.Errorf("%d channels were accepted, want that of the friend and %d", n, in)
			}
			if n := len(target.received(plain)); n != 3*in {
				t.Errorf("%d messages were accepted, want %d", n, 3*in)
			}
		})
	}
}

// liarRoute is where frames for the liar go.
var liarRoute = route.To("dev_00000000000000000000000000000000", "liar")

// impersonate answers first messages as the liar.
func impersonate(t *testing.T, l liar) attack {
	return answering(t, l, 4) // as many as a device looks at
}

// answering answers each message 1 so many times as the liar.
func answering(t *testing.T, l liar, times int) attack {
	return func(p *passage) [][]byte {
		if p.way == down {
			return asIs(p)
		}
		if len(p.Payload) != 32 {
			return nil // message 3, which the liar has no use for
		}
		msg2, err := l.answer(p.Payload)
		if err != nil {
			t.Error(err)
			return nil
		}
		for range times {
			p.at.sendLocked(down, encode(route.Frame{Onward: p.Return, Return: liarRoute, Payload: msg2}))
		}
		return nil
	}
}

// evil is what a liar says once it is in.
const evil = "evil"

// evilMessage is that in a channel's own form (spec secure-channel 9.2).
func evilMessage() []byte {
	b := route.AppendRoute([]byte{0x82, 0x82, 0, 0x81, 0x83}, route.To(plain))
	return append(append(route.AppendRoute(b, nil), 0x40|byte(len(evil))), evil+"\x40"...)
}

// intrude dials as the liar whom an end leads to: the listener that was dialled there
// before.
func intrude(t *testing.T, e *end, l liar) {
	t.Helper()
	listener := e.frames(down)[0].Onward
	answers := make(chan route.Frame, 16)
	e.set(func(p *passage) [][]byte {
		if p.way == up && p.Onward[0] == liarRoute[0] {
			answers <- p.Frame
			return nil
		}
		return asIs(p)
	})
	defer e.set(nil)
	msg1, err := l.start()
	if err != nil {
		t.Fatal(err)
	}
	e.send(down, route.Frame{Onward: listener, Return: liarRoute, Payload: msg1})
	var msg2 route.Frame
	select {
	case msg2 = <-answers:
	case <-time.After(patience):
		t.Fatal("no message 2")
	}
	msg3, seal, err := l.final(msg2.Payload)
	if err != nil {
		t.Fatal(err)
	}
	e.send(down, route.Frame{Onward: msg2.Return, Return: liarRoute, Payload: msg3})
	for range 3 {
		e.send(down, route.Frame{Onward: msg2.Return, Return: liarRoute, Payload: seal(evilMessage())})
	}
}

// TestFlood sends first messages from one device while another dials: that one
// gets through.
func TestFlood(t *testing.T) {
	t.Parallel()
	alice := join(t, device.Config{})
	bob := join(t, device.Config{ChannelLimits: channel.Limits{Handshake: 10 * time.Second}}).listen(alice.trust())
	works(t, alice, bob)
	listener := bob.end.frames(down)[0].Onward
	bob.end.set(func(p *passage) [][]byte {
		if p.way == up && p.Onward[0] == liarRoute[0] {
			return nil
		}
		return asIs(p)
	})
	r := dice()
	flood := func() {
		var many [][]byte
		for range 200 {
			msg1 := make([]byte, 32)
			for i := range msg1 {
				msg1[i] = byte(r.Uint32())
			}
			many = append(many, encode(route.Frame{Onward: listener, Return: liarRoute, Payload: msg1}))
		}
		bob.end.sendBody(down, many...)
	}
	for range 10 {
		flood()
		works(t, alice, bob)
		flood()
	}
	s := bob.node.Stats().Channels
	if limit := 16; s.HalfOpen > limit || s.Accepted != 11 {
		t.Errorf("%d half-open handshakes and %d channels accepted, want at most %d and 11", s.HalfOpen, s.Accepted, limit)
	}
}
