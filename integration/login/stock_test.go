package login

import (
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// TestStockIsUnsigned has stock Rust nodes register over TCP, where the hub does not
// learn who they are: nobody has signed a claim to their addresses, and whoever looks is
// told. A device that knows the identifier relies on the handshake; one that does not
// can only trust on first use, and notices when another node takes the alias.
func TestStockIsUnsigned(t *testing.T) {
	t.Parallel()
	h := startHub(t, broker.Config{TCP: "127.0.0.1:0", TCPAliases: true})
	log := &logged{}
	alice := connect(t, h.MQTTURL(), device.Config{Logger: slog.New(slog.NewJSONHandler(log, nil))})
	stock := func() (n *rustpeer.Node, id identity.Identifier, register func(alias string) string) {
		n = rustpeer.Start(t)
		who, err := identity.ParseIdentifier(n.Identity("me").Identifier)
		if err != nil {
			t.Fatal(err)
		}
		n.Connect("hub", h.TCPAddr().String())
		n.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: "me", Open: []string{"hub"}})
		return n, who, func(alias string) string {
			t.Helper()
			r, err := n.Relay("@hub", alias)
			if err != nil {
				t.Fatal(err)
			}
			return r.Address
		}
	}
	_, bob, register := stock()
	dynamic, alias := register(""), register("shop")
	for _, address := range []string{dynamic, alias} {
		o, err := alice.Lookup(within(t), address)
		if err != nil || o.Signed || !o.Owner.IsZero() || o.FirstUse || o.Number != 0 || !o.Until.IsZero() || !o.Online {
			t.Errorf("lookup of %s: %+v, %v", address, o, err)
		}
		var record struct {
			Signed, Proven *bool
			Identifier     string
		}
		seen := h.Bridge().Forwarder(address).JSON()
		if err := json.Unmarshal(seen, &record); err != nil || record.Signed == nil || *record.Signed || record.Proven == nil || *record.Proven || record.Identifier != "" {
			t.Errorf("what observers see: %s, %v", seen, err)
		}
	}
	const told = "nobody has signed a claim to the forwarding address"
	ch, err := alice.Dial(within(t), route.To(dynamic, "listener"), channel.TrustIdentifiers(bob))
	must(t, err)
	if who := ch.Peer().Identifier; who != bob || log.count(told, dynamic) != 1 {
		t.Errorf("alice has %v, and expects bob at an address that nobody has signed for; she is told: %s", who, log.String())
	}
	must(t, ch.Close())
	// Without a claim it is the handshake that tells.
	_, err = alice.Dial(within(t), route.To(dynamic, "listener"), channel.TrustIdentifiers(alice.Identifier()))
	if !errors.Is(err, device.ErrWrongIdentity) || errors.Is(err, device.ErrBadClaim) {
		t.Errorf("somebody else expected: %v", err)
	}

	// On first use, and when another node is given the alias.
	known, err := device.OpenKnownPeers(filepath.Join(t.TempDir(), "known_peers"))
	must(t, err)
	use := func() error {
		ch, err := alice.Dial(within(t), route.To(alias, "listener"), known.Policy(alias, true), device.NoHeal())
		if err == nil {
			err = ch.Close()
		}
		return err
	}
	must(t, use())
	if who, ok, err := known.Lookup(alias); err != nil || !ok || who != bob {
		t.Errorf("remembered: %v, %v, %v", who, ok, err)
	}
	_, eve, register := stock()
	if again := register("shop"); again != alias {
		t.Fatalf("the other node has %s", again)
	}
	var changed *device.PeerChangedError
	if err := use(); !errors.As(err, &changed) || !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("another node at the alias: %v", err)
	}
	if o, err := alice.Lookup(within(t), alias); err != nil || o.Signed || !o.Owner.IsZero() {
		t.Errorf("lookup: %+v, %v", o, err)
	}
	ch, err = alice.Dial(within(t), route.To(alias, "listener"), channel.TrustIdentifiers(eve))
	must(t, err)
	must(t, ch.Close())

	// What a device signs is told apart, at the same hub.
	if o, err := alice.Lookup(within(t), forwarder(t, connect(t, h.MQTTURL(), device.Config{})).Address()); err != nil || !o.Signed {
		t.Errorf("a device's address: %+v, %v", o, err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// logged is a log of JSON lines.
type logged struct{ lockedBuffer }

// count returns how many lines with a message are about an address.
func (l *logged) count(message, address string) (n int) {
	for line := range strings.Lines(l.String()) {
		var rec struct{ Msg, Address string }
		if json.Unmarshal([]byte(line), &rec) == nil && rec.Msg == message && rec.Address == address {
			n++
		}
	}
	return n
}
