package device

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
)

// signedHello is a hub's answer, of a connection without TLS.
func signedHello(t *testing.T, hub *identity.Private, g *greeting, f hubproto.Features) *hubproto.HelloAnswer {
	t.Helper()
	now := time.Now().Truncate(time.Millisecond)
	sig, err := hub.Sign(hubproto.HelloContext, hubproto.HelloSigned(g.nonce, now, nil))
	if err != nil {
		t.Fatal(err)
	}
	return &hubproto.HelloAnswer{Hub: hub.Identifier(), Time: now, History: hub.Identity().ChangeHistory(), Signature: sig, Features: f}
}

// TestEphemeralBitUnpinsNobody: somebody in between adds the bit, which is not signed, to
// a hub's answer, and is the hub himself at the next connection.
func TestEphemeralBitUnpinsNobody(t *testing.T) {
	const bit = hubproto.FeatureEphemeral
	hub, other := hubFor(t), hubFor(t)
	type contact struct {
		hub  *identity.Private
		says hubproto.Features
	}
	for name, c := range map[string]struct {
		file     bool
		contacts []contact
		taken    bool // the last one
		line     int
	}{
		"a hub that keeps its identity":            {false, []contact{{hub, 0}, {other, bit}}, false, 0},
		"once met without the bit":                 {false, []contact{{hub, 0}, {hub, bit}, {other, 0}}, false, 0},
		"the bit was left out once":                {false, []contact{{hub, bit}, {hub, 0}, {hub, bit}, {other, 0}}, false, 0},
		"written to the file":                      {true, []contact{{hub, 0}, {hub, bit}, {other, 0}}, false, 2},
		"written to the file at the second time":   {true, []contact{{hub, bit}, {hub, 0}, {other, bit}}, false, 2},
		"a hub that keeps none":                    {true, []contact{{hub, bit}, {hub, bit}, {other, bit}}, true, 0},
		"its successor that keeps one":             {true, []contact{{hub, bit}, {other, 0}}, true, 0},
		"the successor is held to it, in the file": {true, []contact{{hub, bit}, {other, 0}, {other, bit}, {hub, 0}}, false, 2},
		"the successor is held to it, by memory":   {false, []contact{{hub, bit}, {other, 0}, {other, bit}, {hub, 0}}, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var cfg Config
			if c.file {
				cfg.KnownHubs = filepath.Join(t.TempDir(), "known")
				other := cfg.hubMemory(hubURL{address: "elsewhere:1883"})
				if err := other.proved(&hubproto.HelloAnswer{Hub: hubFor(t).Identifier()}); err != nil {
					t.Fatal(err)
				}
			}
			m := cfg.hubMemory(hubURL{address: "hub.example:1883"})
			h := hubIdentity{seen: identity.NewMemoryRegistry(0)}
			var err error
			for i, c := range c.contacts {
				if err != nil {
					t.Fatalf("contact %d: %v", i, err)
				}
				g := newGreeting()
				a := signedHello(t, c.hub, &g, c.says)
				if err = h.verify(&g, a, nil); err == nil {
					err = h.remember(m, a)
				}
			}
			last := c.contacts[len(c.contacts)-1].hub.Identifier()
			if c.taken {
				if err != nil || h.known.Identifier() != last {
					t.Errorf("not taken: %v", err)
				}
				return
			}
			var mismatch *HubMismatchError
			if err = m.explain(err); !errors.As(err, &mismatch) || mismatch.Got != last || h.known.Identifier() == last {
				t.Fatalf("taken: %v", err)
			}
			if mismatch.File != cfg.KnownHubs || mismatch.Line != c.line {
				t.Errorf("remembered in %q, line %d", mismatch.File, mismatch.Line)
			}
		})
	}
}

// TestFirstHubIsTold: that a hub is remembered for having been the first is told once, and
// not of one that was pinned, or that keeps no identity.
func TestFirstHubIsTold(t *testing.T) {
	hub := hubFor(t).Identifier()
	for name, c := range map[string]struct {
		pin  identity.Identifier
		file bool
		says hubproto.Features
		want int
	}{
		"first":          {file: true, want: 1},
		"pinned":         {file: true, pin: hub},
		"keeps none":     {file: true, says: hubproto.FeatureEphemeral},
		"without a file": {},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Hub: c.pin}
			if c.file {
				cfg.KnownHubs = filepath.Join(t.TempDir(), "known")
			}
			var told []identity.Identifier
			for range 2 { // two programs, each of which meets it twice
				m := cfg.hubMemory(hubURL{address: "hub.example:1883"})
				m.met = func(id identity.Identifier) { told = append(told, id) }
				if cfg.Hub.IsZero() {
					if _, err := m.pinned(); err != nil {
						t.Fatal(err)
					}
				}
				for range 2 {
					if err := m.proved(&hubproto.HelloAnswer{Hub: hub, Features: c.says}); err != nil {
						t.Fatal(err)
					}
				}
			}
			if len(told) != c.want || c.want > 0 && told[0] != hub {
				t.Errorf("told of %v", told)
			}
		})
	}
}

// TestStrangersDoNotPushTheHubOut: the rotation of a hub that is pinned, by configuration
// or in the file, is remembered on disk, however many strangers come with identities that
// they have rotated.
func TestStrangersDoNotPushTheHubOut(t *testing.T) {
	vault, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
	if err != nil {
		t.Fatal(err)
	}
	hub, err := vault.Create("hub")
	if err != nil {
		t.Fatal(err)
	}
	backup, err := vault.Export("hub", identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	stolen, err := vault.Import("stolen", backup, identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	if err := hub.Rotate(); err != nil {
		t.Fatal(err)
	}
	var strangers []*identity.Private
	for range 8 {
		s := hubFor(t)
		if err := s.Rotate(); err != nil {
			t.Fatal(err)
		}
		strangers = append(strangers, s)
	}
	for name, cfg := range map[string]Config{
		"by configuration": {Hub: hub.Identifier()},
		"in the file":      {KnownHubs: filepath.Join(t.TempDir(), "known")},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "seen")
			m := cfg.hubMemory(hubURL{address: "hub.example:1883"})
			open := func() *identity.FileRegistry {
				r, err := identity.OpenRegistry(dir, len(strangers)/2)
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			meet := func(by *identity.Private, r identity.Registry, pin identity.Identifier) error {
				h := hubIdentity{pin: pin, seen: r}
				g := newGreeting()
				a := signedHello(t, by, &g, 0)
				if err := h.verify(&g, a, nil); err != nil {
					return err
				}
				return h.remember(m, a)
			}
			r := open()
			if err := meet(hub, r, cfg.Hub); err != nil {
				t.Fatal(err)
			}
			for _, s := range strangers {
				if err := r.Update(s.Identity()); err != nil {
					t.Fatal(err)
				}
			}
			if err := meet(stolen, open(), hub.Identifier()); !errors.Is(err, ErrWrongHub) || !errors.Is(err, identity.ErrOlder) {
				t.Errorf("the key that was rotated away: %v", err)
			}
			if err := meet(hub, open(), hub.Identifier()); err != nil {
				t.Errorf("the hub: %v", err)
			}
		})
	}
}
