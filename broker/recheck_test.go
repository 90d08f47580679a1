package broker

import (
	"crypto/tls"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
)

// stays connects a client whose end can be waited for.
func stays(t *testing.T, h *Hub, clientID, user, password string, tc *tls.Config) (paho.Client, <-chan struct{}) {
	t.Helper()
	lost := make(chan struct{})
	c := paho.NewClient(paho.NewClientOptions().AddBroker(h.MQTTURL()).SetClientID(clientID).SetUsername(user).SetPassword(password).
		SetProtocolVersion(4).SetAutoReconnect(false).SetTLSConfig(tc).SetConnectTimeout(10 * time.Second).
		SetConnectionLostHandler(func(paho.Client, error) { close(lost) }))
	token := c.Connect()
	if !token.WaitTimeout(20*time.Second) || token.Error() != nil {
		t.Fatalf("%s cannot connect: %v", clientID, token.Error())
	}
	t.Cleanup(func() { c.Disconnect(0) })
	return c, lost
}

func ended(t *testing.T, what string, lost <-chan struct{}) {
	t.Helper()
	select {
	case <-lost:
	case <-time.After(20 * time.Second):
		t.Errorf("%s is still connected", what)
	}
}

// goesOn makes a round trip.
func goesOn(t *testing.T, what string, c paho.Client) {
	t.Helper()
	token := c.Subscribe("plant/x", 0, nil)
	if !token.WaitTimeout(20*time.Second) || token.Error() != nil {
		t.Errorf("%s is not connected any more: %v", what, token.Error())
	}
}

func reload(t *testing.T, h *Hub, revoked uint64) {
	t.Helper()
	if err := h.Reload(); err != nil {
		t.Fatal(err)
	}
	if n := h.hooked.Count(mochibridge.Revoked); n != revoked {
		t.Errorf("%d connections were ended, want %d", n, revoked)
	}
}

func write(t *testing.T, name string, lines ...string) {
	t.Helper()
	text := ""
	for _, l := range lines {
		text += l + "\n"
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReloadEndsAccounts(t *testing.T) {
	line := func(user, password, role string) string {
		l, err := PasswordLine(user, []byte(password), role, "", 4)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	file := filepath.Join(t.TempDir(), "passwd")
	ann, ben, cas, dan := line("ann", "a", "user"), line("ben", "b", "user"), line("cas", "c", "observer"), line("dan", "d", "user")
	write(t, file, ann, ben, cas, dan)
	h := start(t, Config{PasswordFile: file})
	_, annEnds := stays(t, h, "1", "ann", "a", nil)
	benLives, _ := stays(t, h, "2", "ben", "b", nil)
	_, casEnds := stays(t, h, "3", "cas", "c", nil)
	_, danEnds := stays(t, h, "4", "dan", "d", nil)
	reload(t, h, 0)
	// Removed, as it was, another role, another password.
	write(t, file, ben, line("cas", "c", "user"), line("dan", "new", "user"))
	reload(t, h, 3)
	ended(t, "a removed account", annEnds)
	ended(t, "an account of another role", casEnds)
	ended(t, "an account with another password", danEnds)
	goesOn(t, "an account that stays", benLives)

	// What cannot be read ends nobody.
	write(t, file, "nonsense")
	if err := h.Reload(); err == nil {
		t.Error("a broken file is taken")
	}
	goesOn(t, "an account of the file before", benLives)
}

func TestReloadEndsDevices(t *testing.T) {
	first := start(t, Config{}) // devices are made for a hub
	gone, left, vouched := newDevice(t, first), newDevice(t, first), newDevice(t, first)
	authority, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	credential, err := authority.IssueCredential(vouched.id.Identity(), map[string]string{"role": "pump"}, 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	history := func(p *identity.Private) string { return hex.EncodeToString(p.Identity().ChangeHistory()) }
	dir := t.TempDir()
	list, plant := filepath.Join(dir, "devices"), filepath.Join(dir, "plant")
	write(t, list, gone.name(), left.name())
	write(t, plant, history(authority))
	h := start(t, Config{Devices: Devices{AllowFile: list, Authorities: []string{plant}, Attributes: map[string]string{"role": "pump"}}})
	connect := func(d *prover, credentials ...[]byte) <-chan struct{} {
		d.hub, d.addr = h.Identifier(), h.MQTTAddr().String()
		_, lost := stays(t, h, d.name(), hubproto.ProofUser, string(d.make(nil, credentials...)), nil)
		return lost
	}
	goneEnds, leftEnds, vouchedEnds := connect(gone), connect(left), connect(vouched, credential)
	reload(t, h, 0)
	write(t, list, left.name())
	reload(t, h, 1)
	ended(t, "a device that was removed from the list", goneEnds)
	want(t, "the removed device again", gone.fresh(), refused3)
	write(t, plant, history(gone.id)) // another authority
	reload(t, h, 2)
	ended(t, "a device whose authority is gone", vouchedEnds)
	select {
	case <-leftEnds:
		t.Error("a listed device was disconnected")
	default:
	}
}

func TestReloadEndsCertificates(t *testing.T) {
	old, next := newAuthority(t), newAuthority(t)
	cfg, pool := certified(t, old, map[string]string{"alice": "user"})
	h := start(t, cfg)
	alice, aliceEnds := stays(t, h, "1", "", "", showing(pool, old.issue("alice")))
	reload(t, h, 0)
	goesOn(t, "a certificate", alice)
	next.write(cfg.TLS.ClientCA)
	reload(t, h, 1)
	ended(t, "a certificate of an authority that is gone", aliceEnds)
}
