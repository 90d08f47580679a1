package hostile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// refusalTime is how long a stock node waits for what does not come: it is not told
// that it is refused.
const refusalTime = 250 * time.Millisecond

// TestStockSpliced mixes two handshakes between a stock node and a device of ours.
func TestStockSpliced(t *testing.T) {
	for name, number := range map[string]int{"message 2": 2, "message 3": 3} {
		t.Run(name+", as initiator", func(t *testing.T) {
			t.Parallel()
			s := meetStock(t)
			s.ours.listen(channel.TrustIdentifiers(s.identifier(t)))
			s.end.set(splice(up, number))
			var all sync.WaitGroup
			for i := range 2 {
				all.Go(func() {
					c := s.toOurs(fmt.Sprint(i))
					if number == 2 {
						c.Timeout = refusalTime
					}
					ch, err := s.n.Dial(c)
					switch {
					case number == 2 && err == nil:
						t.Error("the stock node has a channel of a spliced handshake")
					case number == 3 && err != nil: // it has nothing to wait for
						t.Errorf("dial: %v", err)
					case number == 3:
						if err := s.n.Send([]string{ch.Encryptor, plain}, nil, []byte("lost")); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
			s.end.set(nil)
			ch, err := s.n.Dial(s.toOurs("afterwards"))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.n.Send([]string{ch.Encryptor, plain}, nil, []byte(fence)); err != nil {
				t.Fatal(err)
			}
			s.ours.awaits(t, plain, 1)
			if got := s.ours.received(plain); !slices.Equal(got, []string{fence}) {
				t.Errorf("ours accepted %q", got)
			}
			if n := s.ours.node.Stats().Channels.Accepted; n != 1 {
				t.Errorf("ours has accepted %d channels, want 1", n)
			}
		})
		t.Run(name+", as responder", func(t *testing.T) {
			t.Parallel()
			s := meetStock(t)
			to := s.listen(t)
			s.end.set(splice(down, number))
			var all sync.WaitGroup
			for range 2 {
				all.Go(func() {
					limit := patience
					if number == 2 {
						limit = refusalTime
					}
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					defer cancel()
					ch, err := s.ours.node.Dial(ctx, to, channel.TrustIdentifiers(s.identifier(t)), device.NoHeal())
					switch {
					case number == 2 && err == nil:
						t.Error("ours has a channel of a spliced handshake")
					case number == 3 && err != nil: // a stock node confirms nothing
						t.Errorf("dial: %v", err)
					case number == 3:
						_ = ch.Send(soon(t), plain, []byte("lost"))
						_ = ch.Close()
					}
				})
			}
			all.Wait()
			s.end.set(nil)
			ch := s.dialled(t, to)
			if err := ch.Send(within(t), plain, []byte(fence)); err != nil {
				t.Fatal(err)
			}
			if got := s.n.MustNext(plain); got.SHA256 != rustpeer.Digest([]byte(fence)) {
				t.Error("the stock node accepted another message")
			}
			s.settled(t)
			if n := len(s.n.WaitChannels("", 1)); n != 1 || s.n.Pending(plain) != 0 {
				t.Errorf("the stock node has %d channels and %d more messages", n, s.n.Pending(plain))
			}
		})
	}
}

// dialAs has the stock node dial an address that an attack answers at.
func (s *stock) dialAs(trust []identity.Identifier, authority []byte, timeout time.Duration) error {
	c := rustpeer.DialConfig{
		Name: "ch", Identity: "me", Route: []string{"@hub", "dev_11111111111111111111111111111111", "listener"},
		Authority: authority, Timeout: timeout,
	}
	for _, id := range trust {
		c.Trust = append(c.Trust, id.String())
	}
	_, err := s.n.Dial(c)
	return err
}

// listenFor makes the stock node reachable for those whom it trusts, and shows where
// its listener is to its end. It returns the way there.
func (s *stock) listenFor(t *testing.T, trust []identity.Identifier, authority []byte) route.Route {
	t.Helper()
	c := rustpeer.ListenerConfig{Address: "listener", Identity: "me", Open: []string{"hub"}, Authority: authority}
	for _, id := range append(trust, s.ours.id.Identifier()) {
		c.Trust = append(c.Trust, id.String())
	}
	s.n.Listener(c)
	s.n.Worker("sink", plain, "listener")
	relay, err := s.n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	to := route.To(relay.Address, "listener")
	s.dialled(t, to)
	return to
}

// TestStockImposters shows a stock node identities that are not what they seem, as its
// responder and as its initiator, though it trusts the identifier shown.
func TestStockImposters(t *testing.T) {
	v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
	if err != nil {
		t.Fatal(err)
	}
	victim, err := v.Create("victim")
	if err != nil {
		t.Fatal(err)
	}
	old, fork := copyOf(t, v, "victim"), copyOf(t, v, "victim")
	for _, p := range []*identity.Private{victim, fork} {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	key, err := victim.ChannelKey()
	if err != nil {
		t.Fatal(err)
	}
	lapsed := newIdentity(t, identity.WithClock(func() time.Time { return time.Now().Add(-48 * time.Hour) }), identity.WithValidity(time.Hour))
	trust := []identity.Identifier{victim.Identifier(), lapsed.Identifier()}
	as := func(p *identity.Private) liar {
		return &honestRun{honest: honest{channel.HandshakeConfig{Identity: p}}}
	}
	for name, tt := range map[string]struct {
		liar   liar
		fooled bool
	}{
		"attestation of another key": {&borrowed{shown: key.AppendPresentation(nil)}, false},
		"old history":                {as(old), false},
		"forked history":             {as(fork), false},
		"expired attestation":        {as(lapsed), false},
		"identity of its own":        {as(newIdentity(t)), false},
		"nothing is wrong":           {as(victim), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := meetStock(t)
			if _, err := s.n.Import(victim.Identity().ChangeHistory()); err != nil {
				t.Fatal(err)
			}
			s.listenFor(t, trust, nil)
			s.end.set(impersonate(t, tt.liar))
			channels, timeout := 1, refusalTime
			if tt.fooled {
				channels, timeout = 2, patience
			}
			if err := s.dialAs(trust, nil, timeout); (err == nil) != tt.fooled {
				t.Errorf("dial: %v", err)
			}
			s.n.WaitChannels("", channels)
			intrude(t, s.end, tt.liar)
			if tt.fooled {
				channels++
				for range 3 {
					if m := s.n.MustNext(plain); m.SHA256 != rustpeer.Digest([]byte(evil)) {
						t.Error("another message")
					}
				}
			}
			s.settled(t)
			s.n.WaitChannels("", channels)
			if n := s.n.Pending(plain); n != 0 {
				t.Errorf("the stock node accepted %d messages", n)
			}
		})
	}
}

// TestStockCredentials shows a stock node credentials that do not count. It keeps such
// channels open, as it does without any credential, and knows nothing of their peers.
func TestStockCredentials(t *testing.T) {
	past := func() time.Time { return time.Now().Add(-48 * time.Hour) }
	role := map[string]string{"role": "gateway"}
	authority, earlier := newIdentity(t), newIdentity(t, identity.WithClock(past))
	peer, other := newIdentity(t), newIdentity(t)
	issue := func(by, subject *identity.Private, ttl time.Duration) []byte {
		t.Helper()
		c, err := by.IssueCredential(subject.Identity(), role, 1, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	trust := []identity.Identifier{peer.Identifier()}
	for name, tt := range map[string]struct {
		shown     []byte
		authority *identity.Private
		counts    bool
	}{
		"expired credential":           {issue(earlier, peer, time.Hour), earlier, false},
		"credential of another's name": {issue(authority, other, time.Hour), authority, false},
		"another authority's":          {issue(other, peer, time.Hour), authority, false},
		"valid credential":             {issue(authority, peer, time.Hour), authority, true},
	} {
		t.Run(name, func(t *testing.T) {
			known := func(t *testing.T, s *stock) {
				t.Helper()
				got := s.n.Attributes(peer.Identifier().String(), tt.authority.Identifier().String())
				if (got["role"] != "") != tt.counts {
					t.Errorf("the stock node knows %v", got)
				}
			}
			history := tt.authority.Identity().ChangeHistory()
			l := &honestRun{honest: honest{channel.HandshakeConfig{Identity: peer, Credential: tt.shown}}}
			t.Run("as initiator", func(t *testing.T) {
				t.Parallel()
				s := meetStock(t)
				s.end.set(answering(t, l, 1)) // others may come amid its end
				if err := s.dialAs(trust, history, patience); err != nil {
					t.Fatal(err)
				}
				known(t, s)
			})
			t.Run("as responder", func(t *testing.T) {
				t.Parallel()
				s := meetStock(t)
				s.listenFor(t, trust, history)
				intrude(t, s.end, &honestRun{honest: l.honest})
				s.n.MustNext(plain) // behind the handshake
				known(t, s)
			})
		})
	}
}

// TestStockShowsExpired has a stock node show a credential that has expired.
func TestStockShowsExpired(t *testing.T) {
	t.Parallel()
	past := func() time.Time { return time.Now().Add(-48 * time.Hour) }
	authority := newIdentity(t, identity.WithClock(past))
	s := meetStock(t)
	who, err := identity.Import(s.id.History)
	if err != nil {
		t.Fatal(err)
	}
	show := func(ttl time.Duration) {
		c, err := authority.IssueCredential(who, map[string]string{"role": "gateway"}, 1, ttl)
		if err != nil {
			t.Fatal(err)
		}
		s.n.FillSlot("mine", c)
	}
	policy := channel.And(channel.TrustIdentifiers(who.Identifier()), channel.TrustCredential(authority.Identity(), map[string]string{"role": "gateway"}))
	s.ours.listen(policy)
	s.n.Listener(rustpeer.ListenerConfig{
		Address: "listener", Identity: "me", Open: []string{"hub"}, Credential: "mine", Trust: []string{s.ours.id.Identifier().String()},
	})
	relay, err := s.n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	dial := func(name string) {
		t.Helper()
		// A stock initiator does not learn that it is refused.
		c := s.toOurs(name)
		c.Credential = "mine"
		if _, err := s.n.Dial(c); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name   string
		ttl    time.Duration
		counts bool
	}{{"expired", time.Hour, false}, {"valid", 96 * time.Hour, true}} {
		show(tt.ttl)
		refused := s.ours.node.Stats().Channels.Refused
		_, err := s.ours.node.Dial(within(t), route.To(relay.Address, "listener"), policy, device.NoHeal())
		if tt.counts && err != nil || !tt.counts && !errors.Is(err, device.ErrWrongIdentity) {
			t.Errorf("%s: dial: %v", tt.name, err)
		}
		dial(tt.name)
		if tt.counts {
			s.ours.accepted(t)
			continue
		}
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for limit := within(t); s.ours.node.Stats().Channels.Refused < refused+2; <-tick.C {
			if limit.Err() != nil {
				t.Fatal("ours has refused nobody")
			}
		}
		if n := len(s.ours.node.Accepted()); n != 0 {
			t.Errorf("ours has accepted %d channels", n)
		}
	}
}
