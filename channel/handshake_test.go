package channel

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/sealmq/sealmq/identity"
)

// handshakes returns both sides, each with a registry of its own.
func handshakes(t testing.TB, alice, bob *identity.Private) (i, r *Handshake) {
	t.Helper()
	i, err := NewInitiator(HandshakeConfig{Identity: alice, Registry: identity.NewMemoryRegistry(0), Policy: TrustEveryone})
	if err != nil {
		t.Fatal(err)
	}
	r, err = NewResponder(HandshakeConfig{Identity: bob, Registry: identity.NewMemoryRegistry(0), Policy: TrustEveryone})
	if err != nil {
		t.Fatal(err)
	}
	return i, r
}

// step fails the test on an error.
func step[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// tampered calls f with every cut and every flip of msg, and a copy that is too
// long.
func tampered(msg []byte, f func(what string, bad []byte)) {
	for n := range msg {
		f(fmt.Sprintf("cut at %d", n), bytes.Clone(msg[:n]))
		bad := bytes.Clone(msg)
		bad[n] ^= 1 << (n % 8)
		f(fmt.Sprintf("flip at %d", n), bad)
	}
	f("one byte more", append(bytes.Clone(msg), 0))
	f("too long", append(bytes.Clone(msg), make([]byte, MaxHandshakeMessage)...))
}

func TestHandshake(t *testing.T) {
	alice, bob := newIdentity(t), newIdentity(t)
	i, r := handshakes(t, alice, bob)
	ok := step[[]byte](t)
	m3 := ok(i.ReadReply(ok(r.ReadFirst(ok(i.Start())))))
	if err := r.ReadFinal(m3); err != nil {
		t.Fatal(err)
	}
	ri, rr := step[Result](t)(i.Result()), step[Result](t)(r.Result())
	if ri.Peer.Identifier != bob.Identifier() || rr.Peer.Identifier != alice.Identifier() {
		t.Errorf("peers %v and %v", ri.Peer.Identifier, rr.Peer.Identifier)
	}
	for _, way := range []struct {
		s *Sealer
		o *Opener
	}{{ri.Sealer, rr.Opener}, {rr.Sealer, ri.Opener}} {
		frame := ok(way.s.Seal(nil, []byte("text")))
		if p, _, err := way.o.Open(nil, frame); err != nil || string(p) != "text" {
			t.Errorf("%q, %v", p, err)
		}
	}
}

func TestPhases(t *testing.T) {
	steps := map[string]func(*Handshake) error{
		"start":  func(h *Handshake) error { _, err := h.Start(); return err },
		"first":  func(h *Handshake) error { _, err := h.ReadFirst(make([]byte, 32)); return err },
		"reply":  func(h *Handshake) error { _, err := h.ReadReply(make([]byte, 200)); return err },
		"final":  func(h *Handshake) error { return h.ReadFinal(make([]byte, 200)) },
		"result": func(h *Handshake) error { _, err := h.Result(); return err },
	}
	i, r := handshakes(t, newIdentity(t), newIdentity(t))
	check := func(h *Handshake, allowed string) {
		t.Helper()
		in := h.Phase()
		for name, do := range steps {
			if name == allowed {
				continue
			}
			var phase *PhaseError
			if err := do(h); !errors.As(err, &phase) || h.Phase() != in {
				t.Errorf("%s while it %v: %v, then it %v", name, in, err, h.Phase())
			}
		}
	}
	ok := step[[]byte](t)
	check(i, "start")
	check(r, "first")
	m1 := ok(i.Start())
	check(i, "reply")
	m2 := ok(r.ReadFirst(m1))
	check(r, "final")
	m3 := ok(i.ReadReply(m2))
	check(i, "result")
	if err := r.ReadFinal(m3); err != nil {
		t.Fatal(err)
	}
	check(r, "result")
}

// TestMessage1Tampered: a message 1 that is too short or too long is refused and
// the responder waits on. One that is merely altered cannot be told from a
// genuine one; the initiator refuses the answer to it and waits on.
func TestMessage1Tampered(t *testing.T) {
	alice, bob := newIdentity(t), newIdentity(t)
	i, _ := handshakes(t, alice, bob)
	ok := step[[]byte](t)
	m1 := ok(i.Start())
	tampered(m1, func(what string, bad []byte) {
		_, r := handshakes(t, alice, bob)
		m2, err := r.ReadFirst(bad)
		if len(bad) < message1Min || len(bad) > MaxHandshakeMessage {
			if err == nil || r.Phase() != PhaseAwaitFirst {
				t.Errorf("%s: %v, then it %v", what, err, r.Phase())
			}
			return
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		h := *i
		if _, err := h.ReadReply(m2); err == nil || h.Phase() != PhaseAwaitReply {
			t.Errorf("%s: the answer: %v, then it %v", what, err, h.Phase())
		}
	})
	_, r := handshakes(t, alice, bob)
	if _, err := r.ReadFirst(make([]byte, 32)); err == nil || r.Phase() != PhaseAwaitFirst {
		t.Errorf("the zero key: %v", err)
	}
	ok(r.ReadFirst(m1))
}

// TestMessage2Tampered: every cut and flip is refused, and the genuine message
// still completes the handshake afterwards.
func TestMessage2Tampered(t *testing.T) {
	i, r := handshakes(t, newIdentity(t), newIdentity(t))
	ok := step[[]byte](t)
	m2 := ok(r.ReadFirst(ok(i.Start())))
	tampered(m2, func(what string, bad []byte) {
		h := *i
		_, err := h.ReadReply(bad)
		if !errors.Is(err, ErrHandshake) || h.Phase() != PhaseAwaitReply || h.x != i.x {
			t.Errorf("%s: %v, then it %v", what, err, h.Phase())
		}
	})
	for n := range maxTries {
		h := *i
		bad := bytes.Clone(m2)
		bad[len(bad)-1]++
		for range n {
			if _, err := h.ReadReply(bad); err == nil {
				t.Fatal("forged message accepted")
			}
		}
		if _, err := h.ReadReply(m2); err != nil {
			t.Errorf("genuine message after %d forged: %v", n, err)
		}
	}
	bad := make([]byte, len(m2))
	for range maxTries {
		_, _ = i.ReadReply(bad)
	}
	if _, err := i.ReadReply(m2); !errors.Is(err, ErrHandshake) || i.Phase() != PhaseDead {
		t.Errorf("after %d forged: %v, it %v", maxTries, err, i.Phase())
	}
}

// TestMessage3Tampered: the same for the responder. What does not begin like the
// genuine message costs no Diffie-Hellman and may come any number of times.
func TestMessage3Tampered(t *testing.T) {
	i, r := handshakes(t, newIdentity(t), newIdentity(t))
	ok := step[[]byte](t)
	m1 := ok(i.Start())
	m2 := ok(r.ReadFirst(m1))
	m3 := ok(i.ReadReply(m2))
	tampered(m3, func(what string, bad []byte) {
		h := *r
		err := h.ReadFinal(bad)
		if !errors.Is(err, ErrHandshake) || h.Phase() != PhaseAwaitFinal || h.x != r.x {
			t.Errorf("%s: %v, then it %v", what, err, h.Phase())
		}
		if h.Refusal() != nil {
			t.Errorf("%s: a forgery is answered", what)
		}
	})
	for range 100 {
		for _, other := range [][]byte{m1, m2, make([]byte, 300)} {
			if err := r.ReadFinal(other); err == nil {
				t.Fatal("another message is accepted as message 3")
			}
		}
	}
	spliced := append(bytes.Clone(m3[:keyLen+tagLen]), make([]byte, 100)...)
	for range maxTries - 1 {
		if err := r.ReadFinal(spliced); err == nil {
			t.Fatal("spliced message accepted")
		}
	}
	h := *r
	if err := h.ReadFinal(m3); err != nil {
		t.Errorf("genuine message: %v", err)
	}
	if err := r.ReadFinal(spliced); err == nil || r.Phase() != PhaseDead {
		t.Errorf("after %d spliced: it %v", maxTries, r.Phase())
	}
}

// TestIdentityProofs: payloads that decrypt but do not prove an identity.
func TestIdentityProofs(t *testing.T) {
	alice, bob, carol := newIdentity(t), newIdentity(t), newIdentity(t)
	side := func(p *identity.Private) local {
		own, err := localSide(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		return own
	}
	parts := func(p *identity.Private) identity.Presentation {
		v, err := identity.ParsePresentation(side(p).payload)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	b, c := parts(bob), parts(carol)
	forged := bytes.Clone(b.Attestation)
	forged[len(forged)-1] ^= 1
	for name, payload := range map[string][]byte{
		"empty":                    {},
		"another's identity whole": c.Append(nil),
		"another's history":        identity.Presentation{History: c.History, Attestation: b.Attestation}.Append(nil),
		"another's attestation":    identity.Presentation{History: b.History, Attestation: c.Attestation}.Append(nil),
		"forged attestation":       identity.Presentation{History: b.History, Attestation: forged}.Append(nil),
		"no credential at all": identity.Presentation{History: b.History, Attestation: b.Attestation,
			Credentials: [][]byte{{0x01}}}.Append(nil),
		"empty history": identity.Presentation{History: []byte{0x80}, Attestation: b.Attestation}.Append(nil),
	} {
		t.Run(name, func(t *testing.T) {
			reg := identity.NewMemoryRegistry(0)
			v := newVerifier(reg, TrustEveryone, nil, timeNow)
			own := local{static: side(bob).static, payload: payload}
			ok := step[[]byte](t)

			// Bob answers with it: alice waits on.
			i := startHandshake(PhaseStart, side(alice), v.check, newEphemeral)
			r := startHandshake(PhaseAwaitFirst, own, v.check, newEphemeral)
			m1 := ok(i.Start())
			if _, err := i.ReadReply(ok(r.ReadFirst(m1))); !errors.Is(err, ErrHandshake) || i.Phase() != PhaseAwaitReply {
				t.Errorf("as message 2: %v, it %v", err, i.Phase())
			}
			// Bob dials with it: alice knows that it is he who began, and refuses.
			i = startHandshake(PhaseStart, own, v.check, newEphemeral)
			r = startHandshake(PhaseAwaitFirst, side(alice), v.check, newEphemeral)
			m3 := ok(i.ReadReply(ok(r.ReadFirst(ok(i.Start())))))
			if err := r.ReadFinal(m3); !errors.Is(err, ErrHandshake) || r.Phase() != PhaseDead {
				t.Errorf("as message 3: %v, it %v", err, r.Phase())
			}
			res := step[Result](t)(i.Result())
			if p, _, err := res.Opener.Open(nil, r.Refusal()); err != nil || !bytes.Equal(p, closePlaintext) {
				t.Errorf("the refusal opens to %x, %v", p, err)
			}
			for _, id := range []identity.Identifier{bob.Identifier(), carol.Identifier()} {
				if _, known := reg.Get(id); known {
					t.Errorf("%v is in the registry", id)
				}
			}
		})
	}
}

// TestHistories: a longer history replaces the known one; a shorter one or a
// fork is refused.
func TestHistories(t *testing.T) {
	alice, bob := newIdentity(t), newIdentity(t)
	reg := identity.NewMemoryRegistry(0)
	meet := func(own local) error {
		v := newVerifier(reg, TrustEveryone, nil, timeNow)
		mine, err := localSide(alice, nil)
		if err != nil {
			t.Fatal(err)
		}
		i := startHandshake(PhaseStart, mine, v.check, newEphemeral)
		r := startHandshake(PhaseAwaitFirst, own, v.check, newEphemeral)
		ok := step[[]byte](t)
		_, err = i.ReadReply(ok(r.ReadFirst(ok(i.Start()))))
		return err
	}
	before, err := localSide(bob, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := meet(before); err != nil {
		t.Fatal(err)
	}
	if err := bob.Rotate(); err != nil {
		t.Fatal(err)
	}
	after, err := localSide(bob, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := meet(after); err != nil {
			t.Errorf("rotated: %v", err)
		}
	}
	if err := meet(before); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("older history: %v", err)
	}
}
