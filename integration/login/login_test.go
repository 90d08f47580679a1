// Package login holds the tests of who gets in: hubs and devices as programs use
// them, in one process.
package login

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/testcert"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// limit bounds every step.
const limit = 30 * time.Second

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func startHub(t testing.TB, cfg broker.Config) *broker.Hub {
	t.Helper()
	if len(cfg.MQTT) == 0 {
		cfg.MQTT = []string{"127.0.0.1:0"}
	}
	h, err := broker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopHub(t, h) })
	return h
}

func stopHub(t testing.TB, h *broker.Hub) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := h.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}

func newIdentity(t testing.TB, opts ...identity.Option) *identity.Private {
	t.Helper()
	p, err := identity.Create(opts...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func connect(t testing.TB, url string, cfg device.Config) *device.Node {
	t.Helper()
	n, err := tryConnect(t, url, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func tryConnect(t testing.TB, url string, cfg device.Config) (*device.Node, error) {
	t.Helper()
	if cfg.Identity == nil {
		cfg.Identity = newIdentity(t)
	}
	n, err := device.Connect(within(t), url, cfg)
	if err == nil {
		t.Cleanup(func() { _ = n.Close() })
	}
	return n, err
}

// count reads one of the hub's counters.
func count(h *broker.Hub, key string) int { return int(h.Status().Counters[key]) }

func proofs(t testing.TB, h *broker.Hub, result string, want int) {
	t.Helper()
	if got := count(h, "sealmq_proofs_total{result="+result+"}"); got != want {
		t.Errorf("%d proofs %s, want %d", got, result, want)
	}
}

func guests(t testing.TB, h *broker.Hub, want int) {
	t.Helper()
	if got := count(h, "sealmq_logins_total{result=guest}"); got != want {
		t.Errorf("%d guests, want %d", got, want)
	}
}

func dataDir(t testing.TB) string { return filepath.Join(t.TempDir(), "data") }

func TestHubIsRememberedAndProvedTo(t *testing.T) {
	data, known := dataDir(t), filepath.Join(t.TempDir(), "sealmq", "known_hubs")
	h := startHub(t, broker.Config{Data: data})
	addr := h.MQTTAddr().String()
	n := connect(t, h.MQTTURL(), device.Config{KnownHubs: known})
	if id, ok := n.Hub(); !ok || id != h.Identifier() {
		t.Errorf("hub %v, %v", id, ok)
	}
	guests(t, h, 1)
	proofs(t, h, "ok", 1)
	text, err := os.ReadFile(known)
	if err != nil || string(text) != addr+" "+h.Identifier().String()+"\n" {
		t.Errorf("known hubs: %q, %v", text, err)
	}
	if info, err := os.Stat(known); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	// Whoever knows the hub does not ask; neither does who has its identifier.
	connect(t, h.MQTTURL(), device.Config{KnownHubs: known})
	connect(t, h.MQTTURL()+"?hub="+h.Identifier().String(), device.Config{})
	guests(t, h, 1)
	proofs(t, h, "ok", 3)

	// The same hub again: devices come back by themselves, with new proofs.
	stopHub(t, h)
	h = startHub(t, broker.Config{Data: data, MQTT: []string{addr}})
	eventually(t, "all are back", func() bool { return count(h, "sealmq_proofs_total{result=ok}") == 3 })
	guests(t, h, 0)

	// Another hub at the same address is refused, by the file and by the URL.
	old := h.Identifier()
	stopHub(t, h)
	h = startHub(t, broker.Config{Data: dataDir(t), MQTT: []string{addr}})
	_, err = tryConnect(t, h.MQTTURL(), device.Config{KnownHubs: known})
	var mismatch *device.HubMismatchError
	if !errors.Is(err, device.ErrWrongHub) || !errors.As(err, &mismatch) || mismatch.File != known || mismatch.Line != 1 ||
		mismatch.Pinned != old || mismatch.Got != h.Identifier() {
		t.Errorf("another hub: %v", err)
	}
	if _, err = tryConnect(t, h.MQTTURL()+"?hub="+old.String(), device.Config{}); !errors.Is(err, device.ErrWrongHub) {
		t.Errorf("another hub than in the URL: %v", err)
	}
	// What is said here and now counts before the file, which stays as it is.
	connect(t, h.MQTTURL(), device.Config{KnownHubs: known, Hub: h.Identifier()})
	if now, err := os.ReadFile(known); err != nil || !bytes.Equal(now, text) {
		t.Errorf("known hubs: %q, %v", now, err)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("still not: %s", what)
		}
	}
}

func TestEphemeralHubIsNotRemembered(t *testing.T) {
	known := filepath.Join(t.TempDir(), "known_hubs")
	h := startHub(t, broker.Config{})
	n := connect(t, h.MQTTURL(), device.Config{KnownHubs: known})
	if _, ok := n.Hub(); !ok {
		t.Error("the hub proved nothing")
	}
	if _, err := os.Stat(known); !os.IsNotExist(err) {
		t.Errorf("remembered: %v", err)
	}
	// A file that cannot be used is an error, not a hub without a pin.
	if err := os.WriteFile(known, []byte("?\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tryConnect(t, h.MQTTURL(), device.Config{KnownHubs: known}); err == nil || !strings.Contains(err.Error(), known) {
		t.Errorf("a broken file: %v", err)
	}
}

// TestEphemeralHubComesBack: a device without a pin goes on with the successor of a hub
// that keeps no identity, registers again, and can be reached; one with a pin stops.
func TestEphemeralHubComesBack(t *testing.T) {
	h := startHub(t, broker.Config{})
	addr, first := h.MQTTAddr().String(), h.Identifier()
	stopped, changed := make(chan error, 1), make(chan string, 8)
	connect(t, h.MQTTURL(), device.Config{Hub: first, OnEvent: func(e device.Event) {
		if e.Kind == device.EventStopped {
			stopped <- e.Err
		}
	}})
	bob := connect(t, h.MQTTURL(), device.Config{KnownHubs: filepath.Join(t.TempDir(), "known_hubs"), OnEvent: func(e device.Event) {
		if e.Kind == device.EventForwarderChanged {
			changed <- e.Forwarder.Address()
		}
	}})
	f := forwarder(t, bob)
	old := f.Address()
	stopHub(t, h)
	h = startHub(t, broker.Config{MQTT: []string{addr}})
	if h.Identifier() == first {
		t.Fatal("the hub has kept its identity")
	}
	select {
	case now := <-changed:
		if now == old || now != f.Address() {
			t.Errorf("the address is %s after %s", f.Address(), old)
		}
	case <-within(t).Done():
		t.Fatal("the device does not come back")
	}
	if id, ok := bob.Hub(); !ok || id != h.Identifier() {
		t.Errorf("connected to %v, %v", id, ok)
	}
	alice := connect(t, h.MQTTURL(), device.Config{})
	ch, err := alice.Dial(within(t), route.To(f.Address()), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	_ = ch.Close()
	select {
	case err := <-stopped:
		if !errors.Is(err, device.ErrWrongHub) {
			t.Errorf("with a pin: %v", err)
		}
	case <-within(t).Done():
		t.Error("a device with a pin goes on")
	}
}

func TestWhoMayConnect(t *testing.T) {
	authority, alice := newIdentity(t), newIdentity(t)
	file := filepath.Join(t.TempDir(), "authority")
	if err := os.WriteFile(file, []byte(hex.EncodeToString(authority.Identity().ChangeHistory())), 0o600); err != nil {
		t.Fatal(err)
	}
	h := startHub(t, broker.Config{Devices: broker.Devices{
		Allow: []string{alice.Identifier().String()}, Authorities: []string{file}, Attributes: map[string]string{"role": "pump"},
	}})
	connect(t, h.MQTTURL(), device.Config{Identity: alice})
	connect(t, h.MQTTURL(), device.Config{Identity: alice, OneShot: true})
	bob := newIdentity(t)
	if _, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: bob}); !errors.Is(err, device.ErrHubRefused) || errors.Is(err, device.ErrBadProof) {
		t.Errorf("not listed: %v", err)
	}
	for role, ok := range map[string]bool{"pump": true, "valve": false} {
		cred, err := authority.IssueCredential(bob.Identity(), map[string]string{"role": role}, 1, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tryConnect(t, h.MQTTURL(), device.Config{Identity: bob, HubCredential: func() ([]byte, error) { return cred, nil }})
		if (err == nil) != ok {
			t.Errorf("with a credential as %s: %v", role, err)
		}
	}
	_, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: bob, HubCredential: func() ([]byte, error) { return nil, errors.New("no card in the reader") }})
	if err == nil || !strings.Contains(err.Error(), "no card in the reader") {
		t.Errorf("a credential that fails: %v", err)
	}
	proofs(t, h, "not-allowed", 2)
}

// TestStolenBackup: a key that was rotated away opens nothing, whoever has it.
func TestStolenBackup(t *testing.T) {
	t.Parallel()
	h := startHub(t, broker.Config{})
	p, stolen := backedUp(t)
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	connect(t, h.MQTTURL(), device.Config{Identity: p})
	if _, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: stolen.old}); !errors.Is(err, device.ErrBadProof) {
		t.Errorf("the old key: %v", err)
	}
	proofs(t, h, "rotated", 2) // it tries once more, in case the hub has just started
}

// TestClockOff: a device whose clock is off is refused, learns from the hub by how much,
// and says so; the hub counts and logs which way it is off.
func TestClockOff(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	h := startHub(t, broker.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, tt := range []struct {
		off          time.Duration
		result, says string
	}{
		{-time.Hour, "expired", "behind the hub's"},
		{time.Hour, "from-future", "ahead of the hub's"},
	} {
		p := newIdentity(t, identity.WithClock(func() time.Time { return time.Now().Add(tt.off) }))
		_, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: p})
		var off *device.ClockError
		if !errors.Is(err, device.ErrClock) || !errors.As(err, &off) || (off.Ahead-tt.off).Abs() > 10*time.Second || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%v: %v", tt.off, err)
		}
		proofs(t, h, tt.result, 1)
		if text := log.String(); !strings.Contains(text, "("+tt.result+")") || !strings.Contains(text, p.Identifier().String()) {
			t.Errorf("%v: the hub's log says %s", tt.off, text)
		}
	}
	tolerated := startHub(t, broker.Config{Devices: broker.Devices{AnyoneProven: true, ClockSkew: 10 * time.Minute}})
	some := newIdentity(t, identity.WithClock(func() time.Time { return time.Now().Add(-9 * time.Minute) }))
	var said lockedBuffer
	connect(t, tolerated.MQTTURL(), device.Config{Identity: some, Logger: slog.New(slog.NewTextHandler(&said, nil))})
	if text := said.String(); !strings.Contains(text, "clock is off") || !strings.Contains(text, "ahead_by=-9m0s") && !strings.Contains(text, "ahead_by=-8m59s") {
		t.Errorf("a clock that the hub tolerates: %s", text)
	}
}

// certificate makes one for 127.0.0.1, as files and as what a server uses.
func certificate(t testing.TB) (files broker.TLS, cert tls.Certificate, roots *x509.CertPool) {
	t.Helper()
	cert, roots = testcert.Loopback(t)
	raw, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files = broker.TLS{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	for name, b := range map[string]*pem.Block{files.Cert: {Type: "CERTIFICATE", Bytes: cert.Certificate[0]}, files.Key: {Type: "PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return files, cert, roots
}

// proxy ends TLS in front of a hub, with a certificate that devices trust.
func proxy(t testing.TB, cert tls.Certificate, target func() (net.Conn, error)) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := target()
			if err != nil {
				_ = in.Close()
				continue
			}
			wg.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			wg.Go(func() { _, _ = io.Copy(in, out); _ = in.Close() })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	return "mqtts://" + ln.Addr().String()
}

func TestOverTLS(t *testing.T) {
	files, cert, roots := certificate(t)
	h := startHub(t, broker.Config{
		MQTT: []string{"mqtts://127.0.0.1:0", "wss://127.0.0.1:0", "mqtt://127.0.0.1:0"}, TLS: files,
		Devices: broker.Devices{AnyoneProven: true},
	})
	trust := &tls.Config{RootCAs: roots}
	for _, url := range h.MQTTURLs() {
		connect(t, url, device.Config{TLS: trust})
	}
	proofs(t, h, "ok", 3)

	// Somebody whom the device's certificate authorities trust sits in between and
	// passes everything on. The hub's word is not for this connection, and neither
	// is the device's.
	secure := strings.TrimPrefix(h.MQTTURLs()[0], "mqtts://")
	url := proxy(t, cert, func() (net.Conn, error) { return tls.Dial("tcp", secure, trust) })
	if _, err := tryConnect(t, url+"?hub="+h.Identifier().String(), device.Config{TLS: trust}); !errors.Is(err, device.ErrWrongHub) {
		t.Errorf("in the middle, pinned: %v", err)
	}
	proofs(t, h, "wrong-connection", 1)
	if _, err := tryConnect(t, url, device.Config{TLS: trust}); !errors.Is(err, device.ErrHubRefused) {
		t.Errorf("in the middle: %v", err)
	}
	proofs(t, h, "wrong-connection", 1) // no proof was sent
	// A proxy that the operator put there is another matter.
	plain := strings.TrimPrefix(h.MQTTURLs()[2], "mqtt://")
	url = proxy(t, cert, func() (net.Conn, error) { return net.Dial("tcp", plain) })
	if _, err := tryConnect(t, url+"?hub="+h.Identifier().String(), device.Config{TLS: trust}); !errors.Is(err, device.ErrWrongHub) {
		t.Errorf("behind a proxy, without the option: %v", err)
	}
	connect(t, url, device.Config{TLS: trust, InsecureTLSProxy: true})
}

// TestInTheClearFromElsewhere: without TLS no proof leaves the machine, unless an
// option says so.
func TestInTheClearFromElsewhere(t *testing.T) {
	h := startHub(t, broker.Config{})
	addr := h.MQTTAddr().String()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := fmt.Sprintf("mqtt://hub.test:%s", port)
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	connect(t, elsewhere, device.Config{DialNetwork: dial})
	proofs(t, h, "ok", 0)
	connect(t, elsewhere, device.Config{DialNetwork: dial, InsecureProofWithoutTLS: true})
	proofs(t, h, "ok", 1)
}

// TestNothingSecretIsLogged: the logs of both sides hold no proof.
func TestNothingSecretIsLogged(t *testing.T) {
	var log lockedBuffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h := startHub(t, broker.Config{Logger: logger, Devices: broker.Devices{Allow: []string{newIdentity(t).Identifier().String()}}})
	p := newIdentity(t)
	_, err := tryConnect(t, h.MQTTURL(), device.Config{Identity: p, Logger: logger})
	if !errors.Is(err, device.ErrHubRefused) {
		t.Fatal(err)
	}
	text := log.String()
	if !strings.Contains(text, "not-allowed") {
		t.Errorf("the reason is not logged: %s", text)
	}
	history := p.Identity().ChangeHistory()
	for _, secret := range []string{string(history[:24]), hex.EncodeToString(history[:24]), "tls exporter"} {
		if strings.Contains(text, secret) {
			t.Error("the log holds a proof")
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
