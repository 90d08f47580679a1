// Package observer watches the hub with Mosquitto's own clients while devices
// talk through it.
package observer

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/mosquitto"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const root = topics.Root("site/7/sealmq")

// logs collects everything that hub and devices log, at the lowest level.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.buf.Bytes())
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug - 4}))
}

func startHub(t *testing.T, logger *slog.Logger) *broker.Hub {
	t.Helper()
	hub, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}, Root: string(root), Trace: true, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	if err := hub.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := hub.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return hub
}

// connect connects a device, and returns the file with its keys too.
func connect(t *testing.T, hub *broker.Hub, logger *slog.Logger) (n *device.Node, file string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "vault")
	vault, err := identity.OpenVault(dir)
	if err != nil {
		t.Fatal(err)
	}
	id, err := vault.Create("it")
	if err != nil {
		t.Fatal(err)
	}
	node, err := device.Connect(t.Context(), hub.MQTTURL(), device.Config{Identity: id, Root: root, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close() })
	return node, filepath.Join(dir, "it.identity")
}

// keys returns every private key in an identity file: whatever 32 bytes there are
// in its part that is not public.
func keys(t *testing.T, file string) (found []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("%s is not PEM", file)
	}
	var whole struct {
		Keys []byte `cbor:"2,keyasint"`
	}
	var private any
	if err := cbor.Unmarshal(block.Bytes, &whole); err != nil {
		t.Fatal(err)
	}
	if err := cbor.Unmarshal(whole.Keys, &private); err != nil {
		t.Fatal(err)
	}
	var collect func(v any)
	collect = func(v any) {
		switch v := v.(type) {
		case []byte:
			if len(v) == 32 {
				found = append(found, string(v), hex.EncodeToString(v), base64.StdEncoding.EncodeToString(v))
			}
		case map[any]any:
			for _, e := range v {
				collect(e)
			}
		}
	}
	collect(private)
	if len(found) < 3*3 { // the vault's secret, the identity's key, the channel key
		t.Fatalf("%s holds %d keys", file, len(found)/3)
	}
	return found
}

func subscribe(t *testing.T, hub *broker.Hub, filters ...string) *mosquitto.Subscriber {
	t.Helper()
	return mosquitto.Subscribe(t, hub.MQTTAddr().String(), mosquitto.Options{}, filters...)
}

// An observer of the whole broker sees frames, status and forwarder records.
// Each frame decodes to routes and a payload, and no byte that it saw, and no
// log, holds a message or a key.
func TestObserverSeesRoutesAndCiphertext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var l logs
	hub := startHub(t, l.logger())
	watch := subscribe(t, hub, root.All())

	bob, bobFile := connect(t, hub, l.logger())
	alice, aliceFile := connect(t, hub, l.logger())
	if _, err := bob.Listen("listener", channel.TrustIdentifiers(alice.Identifier())); err != nil {
		t.Fatal(err)
	}
	fwd, err := bob.CreateForwarder(ctx, "listener")
	if err != nil {
		t.Fatal(err)
	}
	ch, err := alice.Dial(ctx, route.To(fwd.Address()), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	const there, back = "Hello Ockam! The passphrase is: xyzzy-plugh.", "Understood: plover-9431."
	if err := ch.SendString(ctx, "app", there); err != nil {
		t.Fatal(err)
	}
	m, err := bob.Receive(ctx, "app")
	if err != nil {
		t.Fatal(err)
	}
	if m.String() != there || m.From != alice.Identifier() {
		t.Fatalf("Bob received %q from %v", m.String(), m.From)
	}
	if err := bob.HandleFunc("echo-back", func(ctx context.Context, m *device.Message) {
		if err := bob.ReplyString(ctx, m, back); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if answer, err := ch.RequestString(ctx, "echo-back", "?"); err != nil || answer != back {
		t.Fatalf("the answer is %q, %v", answer, err)
	}
	alice.Close()
	bob.Close()
	for _, n := range []*device.Node{alice, bob} {
		topic := root.Status(n.ClientID())
		watch.Wait("offline status of "+n.ClientID(), func(p mosquitto.Packet) bool {
			return p.Topic == topic && bytes.Contains(p.Payload, []byte(`"offline"`))
		})
	}

	seen := watch.Packets()
	checkTopics(t, seen, alice, bob, fwd.Address())
	secrets := []string{there, "xyzzy", "plugh", back, "plover"}
	secrets = append(append(secrets, keys(t, aliceFile)...), keys(t, bobFile)...)
	for _, secret := range secrets {
		for _, p := range seen {
			if bytes.Contains(p.Payload, []byte(secret)) {
				t.Errorf("%s shows %q", p.Topic, secret)
			}
		}
		if bytes.Contains(watch.Output(), []byte(secret)) {
			t.Errorf("mosquitto_sub printed %q", secret)
		}
		if bytes.Contains(l.bytes(), []byte(secret)) {
			t.Errorf("a log holds %q", secret)
		}
	}
	if len(l.bytes()) == 0 {
		t.Error("nothing was logged: the check of the logs shows nothing")
	}
}

// checkTopics wants each kind of topic, and every frame to decode.
func checkTopics(t *testing.T, seen []mosquitto.Packet, alice, bob *device.Node, address string) {
	t.Helper()
	frames, records := map[string]int{}, map[string]int{}
	traces := 0
	for _, p := range seen {
		kind, name := root.Parse(p.Topic)
		switch kind {
		case topics.Out, topics.In:
			views, err := route.ParseBundle(p.Payload, route.Limits{}, nil)
			if err != nil {
				t.Errorf("%s: %v", p.Topic, err)
				continue
			}
			for i := range views {
				// A sealed frame needs no return route of its own; the hub adds one.
				f := views[i].Frame()
				if len(f.Onward) == 0 || kind == topics.In && len(f.Return) == 0 || len(f.Payload) == 0 {
					t.Errorf("%s: a frame from %v to %v with %d bytes", p.Topic, f.Return, f.Onward, len(f.Payload))
				}
				frames[p.Topic]++
			}
		case topics.Status, topics.Forwarder:
			if !json.Valid(p.Payload) {
				t.Errorf("%s is not JSON: %q", p.Topic, p.Payload)
			}
			records[p.Topic]++
		case topics.Trace:
			if !json.Valid(p.Payload) {
				t.Errorf("%s is not JSON: %q", p.Topic, p.Payload)
			}
			traces++
		default:
			t.Errorf("%s (%v %s) is no topic of the scheme", p.Topic, kind, name)
		}
	}
	for _, n := range []*device.Node{alice, bob} {
		// At least hello, two or one handshake messages, and sealed ones.
		if frames[root.Out(n.ClientID())] < 4 || frames[root.In(n.ClientID())] < 3 {
			t.Errorf("frames seen: %v", frames)
		}
		if records[root.Status(n.ClientID())] < 2 {
			t.Errorf("records seen: %v", records)
		}
	}
	if records[root.Forwarder(address)] == 0 {
		t.Errorf("records seen: %v", records)
	}
	if traces == 0 {
		t.Error("no trace line seen")
	}
}

// Records are retained: an observer that comes later sees them too.
func TestLateObserverSeesRecords(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	hub := startHub(t, nil)
	bob, _ := connect(t, hub, nil)
	if _, err := bob.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	fwd, err := bob.CreateForwarder(ctx, "listener")
	if err != nil {
		t.Fatal(err)
	}
	watch := subscribe(t, hub, root.All())
	for _, topic := range []string{root.Status(bob.ClientID()), root.Forwarder(fwd.Address())} {
		watch.Wait(topic, func(p mosquitto.Packet) bool { return p.Topic == topic && p.Retained })
	}
}

// Ordinary clients use the same broker on other topics and notice nothing.
func TestOrdinaryClients(t *testing.T) {
	hub := startHub(t, nil)
	addr := hub.MQTTAddr().String()
	watch := subscribe(t, hub, "plant/+/temperature")
	for i := range 10 {
		if err := mosquitto.Publish(t, addr, mosquitto.Options{}, fmt.Sprintf("plant/%d/temperature", i), []byte("21.5")); err != nil {
			t.Fatal(err)
		}
	}
	watch.Wait("the last value", func(p mosquitto.Packet) bool {
		return p.Topic == "plant/9/temperature" && string(p.Payload) == "21.5"
	})
	for _, p := range watch.Packets() {
		if !strings.HasPrefix(p.Topic, "plant/") {
			t.Errorf("it received %s", p.Topic)
		}
	}
}
