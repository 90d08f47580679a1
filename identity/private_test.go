package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"sync"
	"testing"
	"time"
)

func TestCreate(t *testing.T) {
	clock := newClock()
	p := must(Create(clock.option()))
	id := p.Identity()
	if len(id.history) != 128 { // spec identity 13
		t.Errorf("%d bytes, want 128", len(id.history))
	}
	c := id.Changes()
	if len(c) != 1 || !c[0].ValidFrom.Equal(epoch) || c[0].ValidUntil.Sub(c[0].ValidFrom) != KeyLifetime || c[0].RevokedAll || c[0].PublicKey.Kind() != Ed25519 {
		t.Errorf("%+v", c)
	}
	if p.Identifier() != id.Identifier() || Identifier(id.LatestChange()) != id.Identifier() {
		t.Error("identifier")
	}
	if other := must(Create()); other.Identifier() == p.Identifier() {
		t.Error("two identities are the same")
	}
	for name, o := range map[string]Option{"clock": WithClock(nil), "validity": WithValidity(0)} {
		if _, err := Create(o); err == nil {
			t.Errorf("%s: nonsense accepted", name)
		}
	}
	short := must(Create(clock.option(), WithValidity(time.Hour)))
	k := must(short.ChannelKey())
	if !k.ExpiresAt().Equal(epoch.Add(time.Hour)) {
		t.Errorf("the attestation outlives the key: %v", k.ExpiresAt())
	}
}

func TestChannelKeyIsCached(t *testing.T) {
	clock := newClock()
	p := must(Create(clock.option()))
	k := must(p.ChannelKey())
	if len(k.Attestation()) != 193 { // spec identity 13
		t.Errorf("%d bytes", len(k.Attestation()))
	}
	if k != must(p.ChannelKey()) {
		t.Error("a new key for each call")
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = p.ChannelKey() }); n > 0 {
		t.Errorf("%v allocations", n)
	}
	// Renewed thirty days before its end, under the same identity key.
	clock.advance(PurposeKeyLifetime - renewBefore)
	if k != must(p.ChannelKey()) {
		t.Error("renewed too early")
	}
	clock.advance(time.Second)
	k2 := must(p.ChannelKey())
	if k2 == k || k2.Public() == k.Public() {
		t.Error("not renewed")
	}
	if _, err := VerifyChannelAttestation(k2.Attestation(), k2.Identity(), clock.now); err != nil {
		t.Error(err)
	}
	// Near the end of the identity key nothing later can be had.
	clock.advance(PurposeKeyLifetime)
	k3 := must(p.ChannelKey())
	if k3 != must(p.ChannelKey()) {
		t.Error("renewed at each call although nothing is gained")
	}
	clock.advance(renewBefore)
	if _, err := p.ChannelKey(); !errors.Is(err, ErrKeyExpired) {
		t.Errorf("past the end: %v", err)
	}
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ChannelKey(); err != nil {
		t.Errorf("after rotation: %v", err)
	}
}

func TestClockWasAhead(t *testing.T) {
	clock := newClock()
	p := must(Create(clock.option()))
	clock.advance(365 * 24 * time.Hour)
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	// The clock is put right, behind the latest change. What is made now is
	// dated as early as the change allows, and not made again at each call.
	clock.now = epoch
	k := must(p.ChannelKey())
	if k != must(p.ChannelKey()) {
		t.Error("a new key for each call")
	}
	// A key attested ahead of time under an old change is made again.
	q := must(Create(clock.option()))
	clock.advance(PurposeKeyLifetime)
	ahead := must(q.ChannelKey())
	clock.now = epoch.Add(time.Hour)
	again := must(q.ChannelKey())
	if again == ahead {
		t.Error("peers refuse a key from the future")
	}
	if _, err := VerifyChannelAttestation(again.Attestation(), q.Identity(), clock.now); err != nil {
		t.Error(err)
	}
	// A rotation never goes back behind the change before it.
	if err := p.Rotate(); err != nil {
		t.Errorf("rotating with a clock behind: %v", err)
	}
}

func TestRotate(t *testing.T) {
	clock := newClock()
	p := must(Create(clock.option()))
	before, key, secret := p.Identity(), must(p.ChannelKey()), p.Secret("x")
	clock.advance(time.Hour)
	if err := p.Rotate(WithRevokedPurposeKeys()); err != nil {
		t.Fatal(err)
	}
	after := p.Identity()
	if after.Identifier() != before.Identifier() || p.Identifier() != before.Identifier() || after.Compare(before) != Newer {
		t.Error("the identity changed")
	}
	if c := after.Changes(); !c[1].RevokedAll || !c[1].ValidFrom.Equal(clock.now) {
		t.Errorf("%+v", c[1])
	}
	if len(after.history) != 357 { // 552-323 more than 128, spec secure-channel 4
		t.Errorf("%d bytes", len(after.history))
	}
	if p.Secret("x") != secret {
		t.Error("the secret changed")
	}
	if _, err := VerifyChannelAttestation(key.Attestation(), after, clock.now); !errors.Is(err, ErrNotLatestKey) {
		t.Errorf("old attestation: %v", err)
	}
	k := must(p.ChannelKey())
	if k.Public() == key.Public() || k.Identity() != after {
		t.Error("old channel key after rotation")
	}
	// To P-256 and back.
	if err := p.Rotate(WithSigner(p256Signer(t, bytes.Repeat([]byte{5}, 32)))); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyChannelAttestation(must(p.ChannelKey()).Attestation(), p.Identity(), clock.now); err != nil {
		t.Error(err)
	}
	cred := must(p.IssueCredential(before, nil, 1, time.Hour))
	if _, err := VerifyCredential(cred, before.Identifier(), []*Identity{p.Identity()}, clock.now); err != nil {
		t.Error(err)
	}
	if err := p.Rotate(); err != nil || p.Identity().PublicKey().Kind() != Ed25519 {
		t.Error(err)
	}
	for len(p.Identity().changes) < MaxChanges {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Rotate(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond the limit: %v", err)
	}
	if _, err := Import(p.Identity().ChangeHistory()); err != nil {
		t.Errorf("the longest history does not import: %v", err)
	}
}

func TestOpen(t *testing.T) {
	s := seeded(1)
	p := must(Create(WithSigner(s)))
	q, err := Open(p.Identity().ChangeHistory(), s)
	if err != nil || q.Identifier() != p.Identifier() {
		t.Fatal(err)
	}
	if _, err := q.ChannelKey(); err != nil {
		t.Error(err)
	}
	for name, wrong := range map[string]Signer{"another": seeded(2), "none": nil, "another kind": p256Signer(t, bytes.Repeat([]byte{1}, 32))} {
		if _, err := Open(p.Identity().ChangeHistory(), wrong); !errors.Is(err, ErrWrongKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open([]byte{0x80}, s); !errors.Is(err, ErrEmptyHistory) {
		t.Error(err)
	}
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(p.Identity().ChangeHistory(), s); !errors.Is(err, ErrWrongKey) {
		t.Errorf("key of an earlier change: %v", err)
	}
}

func TestSecret(t *testing.T) {
	p, q := must(Create()), must(Create())
	if p.Secret("a") == p.Secret("b") || p.Secret("a") == q.Secret("a") {
		t.Error("secrets must differ by label and identity")
	}
	if a := p.Secret("a"); a != p.Secret("a") {
		t.Error("secrets must be the same each time")
	}
}

// brokenSigner fails, or answers nonsense.
type brokenSigner struct {
	pub crypto.PublicKey
	sig []byte
	err error
}

func (b brokenSigner) Public() crypto.PublicKey { return b.pub }
func (b brokenSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return b.sig, b.err
}

func TestDeviceSigners(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	ec := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for name, inner := range map[string]crypto.Signer{"Ed25519": ed, "P-256": ec} {
		p, err := Create(WithSigner(must(NewSigner(inner))))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := VerifyChannelAttestation(must(p.ChannelKey()).Attestation(), p.Identity(), time.Now()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	boom := errors.New("token removed")
	for name, inner := range map[string]brokenSigner{
		"fails":          {ed.Public(), nil, boom},
		"short":          {ed.Public(), make([]byte, 63), nil},
		"wrong":          {ed.Public(), make([]byte, 64), nil},
		"EC fails":       {ec.Public(), nil, boom},
		"EC not ASN.1":   {ec.Public(), []byte{1, 2, 3}, nil},
		"EC zero":        {ec.Public(), []byte{0x30, 6, 2, 1, 0, 2, 1, 0}, nil},
		"EC negative":    {ec.Public(), []byte{0x30, 6, 2, 1, 0x80, 2, 1, 1}, nil},
		"EC wrong":       {ec.Public(), []byte{0x30, 6, 2, 1, 1, 2, 1, 1}, nil},
		"EC rest behind": {ec.Public(), []byte{0x30, 6, 2, 1, 1, 2, 1, 1, 0}, nil},
	} {
		_, err := Create(WithSigner(must(NewSigner(inner))))
		if err == nil || inner.err != nil && !errors.Is(err, boom) {
			t.Errorf("%s: %v", name, err)
		}
	}
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	for _, inner := range []crypto.Signer{rsaKey, p384, brokenSigner{pub: ed25519.PublicKey{1}}} {
		if _, err := NewSigner(inner); err == nil {
			t.Errorf("%T accepted", inner)
		}
	}
	if _, err := NewEd25519Signer(make([]byte, 31)); err == nil {
		t.Error("short seed accepted")
	}
	if _, err := NewX25519Exchanger(make([]byte, 33)); err == nil {
		t.Error("long secret accepted")
	}
	if _, err := NewPublicKey(P256, make([]byte, 32)); err == nil {
		t.Error("short key accepted")
	}
	if _, err := NewPublicKey(7, make([]byte, 32)); err == nil {
		t.Error("unknown kind accepted")
	}
}

func TestExchanger(t *testing.T) {
	a, b := must(Create()), must(Create())
	ka, kb := must(a.ChannelKey()), must(b.ChannelKey())
	pa, pb := ka.Public(), kb.Public()
	s1, err1 := ka.DH(pb[:])
	s2, err2 := kb.DH(pa[:])
	if err1 != nil || err2 != nil || !bytes.Equal(s1, s2) || len(s1) != 32 {
		t.Error(err1, err2)
	}
	if _, err := ka.DH(make([]byte, 32)); !errors.Is(err, ErrLowOrder) {
		t.Errorf("low order: %v", err)
	}
	if _, err := ka.DH(make([]byte, 31)); err == nil {
		t.Error("short key accepted")
	}
	// A device's exchanger stays through rotation.
	x := must(NewX25519Exchanger(bytes.Repeat([]byte{4}, 32)))
	p := must(Create(WithExchanger(x)))
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if must(p.ChannelKey()).Public() != x.PublicKey() {
		t.Error("another key than the device's")
	}
}

// TestPrivateConcurrently runs under the race detector.
func TestPrivateConcurrently(t *testing.T) {
	p := must(Create())
	subject := must(Create()).Identity()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 8 {
				k, err := p.ChannelKey()
				if err != nil {
					t.Error(err)
					return
				}
				// Key and history fit although others rotate.
				if _, err := VerifyChannelAttestation(k.Attestation(), k.Identity(), time.Now()); err != nil {
					t.Error(err)
				}
				if _, err := p.IssueCredential(subject, nil, 1, time.Hour); err != nil {
					t.Error(err)
				}
				p.Secret("x")
				if _, err := p.Sign("x", nil); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range 4 {
				if err := p.Rotate(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(p.Identity().changes); n != 17 {
		t.Errorf("%d changes, want 17", n)
	}
}

func TestRotated(t *testing.T) {
	v := newVault(t)
	for name, q := range map[string]*Private{"in memory": must(Create()), "here": must(v.Create("alice")), "elsewhere": must(v.Create("bob"))} {
		rotated := q.Rotated()
		told := func() bool {
			select {
			case <-rotated:
				return true
			default:
				return false
			}
		}
		if _, err := q.IssueCredential(q.Identity(), map[string]string{"a": "b"}, 1, time.Hour); err != nil {
			t.Fatal(err)
		}
		if told() {
			t.Errorf("%s: a purpose key counts as a rotation", name)
		}
		by := q
		if name == "elsewhere" {
			by = must(v.Load("bob"))
		}
		if err := by.Rotate(); err != nil {
			t.Fatal(err)
		}
		if by != q {
			if told() {
				t.Errorf("%s: known before it was looked for", name)
			}
			if _, err := q.ChannelKey(); err != nil {
				t.Fatal(err)
			}
		}
		if !told() {
			t.Errorf("%s: a rotation tells nobody", name)
		}
		if rotated = q.Rotated(); told() {
			t.Errorf("%s: told of a rotation before", name)
		}
	}
}
