package matrix

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// TestServicesFromRust: the hub's plain services, as a stock node asks them.
func TestServicesFromRust(t *testing.T) {
	h := startOurHub(t)
	n := rustpeer.Start(t)
	n.Connect("hub", h.tcp())
	for _, size := range []int{0, 9, 200 << 10} {
		payload := rustpeer.Content(3, 1, size)
		if m, err := n.Request([]string{"@hub", "echo"}, payload, patience); err != nil || m.SHA256 != rustpeer.Digest(payload) {
			t.Errorf("echo of %d bytes: %d, %v", size, m.Len, err)
		}
	}
	for service, want := range map[string]string{"echoer": "Hello Öckam!", "uppercase": "HELLO ÖCKAM!"} {
		m, err := n.RequestString([]string{"@hub", service}, "Hello Öckam!", patience)
		if err != nil || m.Text != want {
			t.Errorf("%s: %q, %v", service, m.Text, err)
		}
	}
}

// apiHub is our hub with an authority for its own listener.
func apiHub(t *testing.T) (*ourHub, *identity.Private) {
	t.Helper()
	authority, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "authority.hex")
	if err := os.WriteFile(file, []byte(hex.EncodeToString(authority.Identity().ChangeHistory())), 0o600); err != nil {
		t.Fatal(err)
	}
	h := startOurHub(t).(*ourHub)
	h.stop()
	h.cfg.APIAuthority, h.cfg.TCPAliases = file, false
	h.start()
	return h, authority
}

// TestAPIFromRust: a stock node shows the hub a credential in a secure channel,
// registers an alias through it, and is dialled there by a Go device on MQTT.
func TestAPIFromRust(t *testing.T) {
	h, authority := apiHub(t)
	n := rustpeer.Start(t)
	id := n.Identity(me)
	n.Connect("hub", h.tcp())
	unanswered := func(via, alias string) {
		t.Helper()
		args := rustpeer.Args{"via": []string{via}, "alias": alias, "timeout_ms": 1000}
		if err := n.Call(t.Context(), "relay", args, nil); err == nil {
			t.Errorf("alias %s is registered at %s", alias, via)
		}
	}
	unanswered("@hub", "bob") // no credential
	subject, err := identity.Import(id.History)
	if err != nil {
		t.Fatal(err)
	}
	credential, err := authority.IssueCredential(subject, map[string]string{"ockam-relay": "bob"}, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	n.FillSlot(slot, credential)
	ch, err := n.Dial(rustpeer.DialConfig{
		Name: "api", Identity: me, Route: []string{"@hub", "api"}, Trust: []string{h.h.Identifier().String()}, Credential: slot,
	})
	if err != nil || ch.Peer != h.h.Identifier().String() {
		t.Fatalf("the hub's listener: %+v, %v", ch, err)
	}
	for _, service := range []string{"echoer", "uppercase"} {
		if m, err := n.RequestString([]string{"@api", service}, "HELLO", patience); err != nil || m.Text != "HELLO" {
			t.Errorf("%s through the channel: %+v, %v", service, m, err)
		}
	}
	unanswered("@api", "alice") // another alias than the credential's
	relay, err := n.Relay("@api", "bob")
	if err != nil || relay.Address != "forward_to_bob" {
		t.Fatalf("the alias: %+v, %v", relay, err)
	}
	n.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: me, Open: []string{"api"}})
	n.Worker("sink", app, "listener")
	n.Worker("echo", echo, "listener")

	p := goOnMQTT(t).(*goParty)
	p.connect(h)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	to, err := p.node.Dial(ctx, route.To(relay.Address, "listener"), channel.TrustIdentifiers(subject.Identifier()))
	if err != nil {
		t.Fatalf("through the hub's channel: %v", err)
	}
	p.cur = to
	run := rustpeer.Run{Seed: 9, Count: 200, Sizes: sizes}
	p.send(run)
	for i := range run.Count {
		if m := n.MustNext(app); m.SHA256 != rustpeer.Digest(run.At(i)) || m.From != p.identifier() {
			t.Fatalf("message %d arrived as %+v", i, m)
		}
	}
	for _, size := range []int{0, 70_000} {
		if err := p.request(rustpeer.Content(1, 1, size)); err != nil {
			t.Error(err)
		}
	}
}

// TestAPIFromGo: our devices reach the hub's own listener as a stock node does.
func TestAPIFromGo(t *testing.T) {
	h, authority := apiHub(t)
	for name, start := range map[string]func(*testing.T) party{"on MQTT": goOnMQTT, "on TCP": goOnTCP} {
		t.Run(name, func(t *testing.T) {
			p := start(t).(*goParty)
			credential, err := authority.IssueCredential(p.id.Identity(), map[string]string{"ockam-relay": "*"}, 1, time.Hour)
			p.must(err)
			p.show(credential)
			p.connect(h)
			p.must(p.dial([]string{"api"}, trust{h.h.Identifier().String()}))
			if got := p.up(); got != h.h.Identifier().String() {
				t.Errorf("the peer is %s", got)
			}
			for _, size := range []int{0, 9, 200 << 10} {
				if err := p.request(rustpeer.Content(2, 1, size)); err != nil {
					t.Error(err)
				}
			}
			p.hang()
			if err := p.dial([]string{"api"}, trust{p.identifier()}); !errors.Is(err, device.ErrWrongIdentity) {
				t.Errorf("the hub taken for another: %v", err)
			}
		})
	}
}
