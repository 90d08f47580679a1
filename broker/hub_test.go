package broker

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/identity"
)

// anyPort has New choose a free port.
var anyPort = []string{"127.0.0.1:0"}

func start(t *testing.T, cfg Config) *Hub {
	t.Helper()
	if len(cfg.MQTT) == 0 {
		cfg.MQTT = anyPort
	}
	if cfg.Limits.ConnectTimeout == 0 { // clients of tests are slow where the machine has much else to do
		cfg.Limits.ConnectTimeout = time.Minute
	}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, h) })
	return h
}

func stop(t *testing.T, h *Hub) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := h.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}

// login connects an ordinary MQTT client and returns what the hub said.
func login(t *testing.T, url, clientID, user, password string, tc *tls.Config) (paho.Client, error) {
	t.Helper()
	c := paho.NewClient(paho.NewClientOptions().AddBroker(url).SetClientID(clientID).SetUsername(user).SetPassword(password).
		SetProtocolVersion(4).SetAutoReconnect(false).SetTLSConfig(tc).SetConnectTimeout(10 * time.Second))
	token := c.Connect()
	if !token.WaitTimeout(20 * time.Second) {
		t.Fatal("no answer to CONNECT")
	}
	if token.Error() != nil {
		return nil, token.Error()
	}
	t.Cleanup(func() { c.Disconnect(0) })
	return c, nil
}

func page(t *testing.T, url string) (int, string) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestStatusPages(t *testing.T) {
	h := start(t, Config{HTTP: "127.0.0.1:0"})
	for path, want := range map[string]string{"/healthz": "alive", "/readyz": "ready"} {
		if code, body := page(t, h.HTTPURL()+path); code != 200 || strings.TrimSpace(body) != want {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	_, body := page(t, h.HTTPURL()+"/status")
	var s Status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatal(err)
	}
	if s.State != "ready" || s.Identifier != h.Identifier().String() || len(s.MQTT) != 1 || !s.Memory || len(s.Counters) < 20 {
		t.Errorf("status is %s", body)
	}
	_, body = page(t, h.HTTPURL()+"/metrics")
	for _, want := range []string{"sealmq_frames_received_total 0", `sealmq_frames_dropped_total{reason="unknown"} 0`, `sealmq_logins_total{result="open"}`, "go_goroutines"} {
		if !strings.Contains(body, want) {
			t.Errorf("/metrics has no %s", want)
		}
	}
	if code, _ := page(t, h.HTTPURL()+"/nothing"); code != 404 {
		t.Errorf("/nothing: %d", code)
	}
}

func TestPortInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for key, cfg := range map[string]Config{
		"mqtt": {MQTT: []string{"127.0.0.1:0", ln.Addr().String()}},
		"http": {MQTT: []string{"127.0.0.1:0"}, HTTP: ln.Addr().String()},
		"tcp":  {MQTT: []string{"127.0.0.1:0"}, HTTP: "127.0.0.1:0", TCP: ln.Addr().String()},
	} {
		for name, data := range map[string]string{"none": "", "missing": filepath.Join(t.TempDir(), "data"), "empty": t.TempDir()} {
			cfg.Data = data
			var le *ListenError
			if _, err := New(cfg); !errors.As(err, &le) || le.Key != key || !strings.Contains(le.Hint(), "--"+key) {
				t.Errorf("%s: %v", key, err)
			}
			if data == "" {
				continue
			}
			made, err := os.ReadDir(data)
			if len(made) != 0 || (name == "missing") != errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: the %s data folder: %v, %v", key, name, made, err)
			}
		}
	}
}

func TestDataFolder(t *testing.T) {
	data := filepath.Join(t.TempDir(), "a", "b")
	h := start(t, Config{Data: data})
	id, address := h.Identifier(), h.Bridge().HubAddress("x")
	stop(t, h)
	again := start(t, Config{Data: data})
	if again.Identifier() != id || again.Bridge().HubAddress("x") != address {
		t.Error("a restart changed the identity or the addresses")
	}
	info, err := os.Stat(data)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		t.Errorf("%s has mode %v", data, info.Mode())
	}
	stop(t, again)
	if err := os.WriteFile(filepath.Join(data, addressKeyName), []byte(strings.Repeat("7f", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	if own := start(t, Config{Data: data}); own.Bridge().HubAddress("x") == address {
		t.Error("an address key in the data folder has no effect")
	}
	other := start(t, Config{})
	if other.Identifier() == id || other.Bridge().HubAddress("x") == address {
		t.Error("a hub without the folder has its identity or its addresses")
	}
}

// TestKeysAtRest: keys in the data folder are encrypted when that is asked for, also
// those of a hub that ran without; the hub stays who it is.
func TestKeysAtRest(t *testing.T) {
	dir := t.TempDir()
	data, keyFile, other, secret := filepath.Join(dir, "data"), filepath.Join(dir, "key"), filepath.Join(dir, "other"), filepath.Join(dir, "secret")
	for _, name := range []string{keyFile, other} {
		if err := identity.CreateKeyFile(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(secret, []byte("correct horse\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	plain := start(t, Config{Data: data})
	id, address := plain.Identifier(), plain.Bridge().HubAddress("x")
	stop(t, plain)
	for range 2 {
		h := start(t, Config{Data: data, KeyFile: keyFile})
		if h.Identifier() != id || h.Bridge().HubAddress("x") != address {
			t.Error("encryption changed the identity or the addresses")
		}
		stop(t, h)
		v, err := identity.OpenVault(filepath.Join(data, identityFolder))
		if err != nil {
			t.Fatal(err)
		}
		if sealed, err := v.Encrypted(identityName); err != nil || !sealed {
			t.Errorf("encrypted %v, %v", sealed, err)
		}
	}
	if _, err := os.Stat(filepath.Join(data, addressKeyName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an address key lies beside the encrypted keys: %v", err)
	}
	var open *identity.PermissionError
	if err := Check(Config{PassphraseFile: secret, Data: data}); !errors.As(err, &open) {
		t.Error(err)
	}
	if _, err := New(Config{MQTT: anyPort, Data: data}); !errors.Is(err, identity.ErrSealed) {
		t.Errorf("without the key file: %v", err)
	}
	if _, err := New(Config{MQTT: anyPort, Data: data, KeyFile: other}); !errors.Is(err, identity.ErrPassphrase) {
		t.Errorf("with another: %v", err)
	}
	for _, cfg := range []Config{{PassphraseFile: secret, KeyFile: keyFile, Data: data}, {KeyFile: keyFile}} {
		var ce *ConfigError
		if err := cfg.Validate(); !errors.As(err, &ce) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

func TestShutdownTwiceAndWithoutStart(t *testing.T) {
	h, err := New(Config{MQTT: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	at := h.ports.mqtt[0].Addr().String()
	stop(t, h)
	stop(t, h)
	if ln, err := net.Listen("tcp", at); err != nil {
		t.Errorf("its port is not free: %v", err)
	} else {
		_ = ln.Close()
	}
	if err := h.Start(t.Context()); !errors.Is(err, ErrStarted) {
		t.Errorf("start after the end: %v", err)
	}
}

func TestRunEndsWithContext(t *testing.T) {
	h, err := New(Config{MQTT: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("run: %v", err)
	}
	stop(t, h)
}

func TestAccounts(t *testing.T) {
	device, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	id := device.Identifier().String()
	file := filepath.Join(t.TempDir(), "passwd")
	text := "dev:" + hashed(t, "d") + ":device:" + id + "\nwatch:" + hashed(t, "w") + ":observer\nplant:" + hashed(t, "p") + ":user\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log lockedLog
	h := start(t, Config{PasswordFile: file, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, tc := range []struct {
		clientID, user, password string
		ok                       bool
	}{
		{id, "dev", "d", true},
		{id + "-tool", "dev", "d", true},
		{id, "dev", "x", false},
		{id, "", "", false},
		{"other", "dev", "d", false},
		{someID(0xaa).String(), "dev", "d", false},
		{"pump", "plant", "p", true},
		{id, "plant", "p", false},
		{id + "-tool", "plant", "p", false},
		{"eye", "watch", "w", true},
		{"eye", "watch", "p", false},
		{"guest", guestUser, "", false},
	} {
		if _, err := login(t, h.MQTTURL(), tc.clientID, tc.user, tc.password, nil); (err == nil) != tc.ok {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	// Another account cannot take over a client id that is in use.
	if _, err := login(t, h.MQTTURL(), "eye", "plant", "p", nil); err == nil {
		t.Error("one account takes over another's session")
	}

	// What an ordinary user may do.
	c, err := login(t, h.MQTTURL(), "pump-2", "plant", "p", nil)
	if err != nil {
		t.Fatal(err)
	}
	for filter, want := range map[string]byte{"plant/#": 0, "sealmq/#": 0x80, "sealmq/" + id + "/in": 0x80} {
		token := c.Subscribe(filter, 0, nil).(*paho.SubscribeToken)
		if !token.WaitTimeout(20*time.Second) || token.Result()[filter] != want {
			t.Errorf("subscribe %s: %v", filter, token.Result())
		}
	}

	// A new file counts at once, and a broken one changes nothing.
	if err := os.WriteFile(file, []byte("plant:"+hashed(t, "new")+":user\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := login(t, h.MQTTURL(), "pump-3", "plant", "p", nil); err == nil {
		t.Error("the old password is still right")
	}
	if err := os.WriteFile(file, []byte("broken\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(); err == nil {
		t.Error("a broken file was taken")
	}
	if _, err := login(t, h.MQTTURL(), "pump-4", "plant", "new", nil); err != nil {
		t.Errorf("after a broken file: %v", err)
	}
	stop(t, h)
	if strings.Contains(log.String(), "$2a$") {
		t.Error("a hash is in the log")
	}
}

func TestTLSAndWebSocketListeners(t *testing.T) {
	dir := t.TempDir()
	cert := TLS{Cert: filepath.Join(dir, "hub.pem"), Key: filepath.Join(dir, "hub.key")}
	pool := writeCert(t, cert.Cert, cert.Key, 1, time.Now().Add(time.Hour))
	h := start(t, Config{
		MQTT: []string{"mqtts://127.0.0.1:0", "wss://127.0.0.1:0", "ws://127.0.0.1:0", "mqtt://127.0.0.1:0"}, TLS: cert,
	})
	for _, url := range h.MQTTURLs() {
		if _, err := login(t, url, "client-of-"+url[:4], "", "", &tls.Config{RootCAs: pool}); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
	if _, err := login(t, h.MQTTURL(), "stranger", "", "", nil); err == nil {
		t.Error("a client that does not trust the certificate connects")
	}
	if _, err := login(t, h.MQTTURL(), "old", "", "", &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is taken")
	}
}
