package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// authority issues client certificates.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "plant"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, key, cert}
}

// write puts the authority's certificate into a file.
func (a *authority) write(name string) {
	a.t.Helper()
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// client issues a certificate that ends at end.
func (a *authority) client(end time.Time, usage x509.ExtKeyUsage, name string, dns ...string) *tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: dns,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: end, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) issue(name string, dns ...string) *tls.Certificate {
	return a.client(time.Now().Add(time.Hour), x509.ExtKeyUsageClientAuth, name, dns...)
}

// showing is the TLS configuration of a client with a certificate, nil for
// none, which it shows whatever authorities the hub names.
func showing(pool *x509.CertPool, cert *tls.Certificate) *tls.Config {
	tc := &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	if cert != nil {
		tc.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return tc
}

// certified is the configuration of a hub that takes client certificates.
func certified(t testing.TB, a *authority, accounts map[string]string) (Config, *x509.CertPool) {
	t.Helper()
	dir := t.TempDir()
	files := TLS{Cert: filepath.Join(dir, "hub.pem"), Key: filepath.Join(dir, "hub.key"), ClientCA: filepath.Join(dir, "ca.pem")}
	pool := writeCert(t, files.Cert, files.Key, 1, time.Now().Add(time.Hour))
	a.write(files.ClientCA)
	return Config{MQTT: []string{"mqtts://127.0.0.1:0", "wss://127.0.0.1:0"}, TLS: files, Certificates: accounts}, pool
}

// handshake connects with TLS alone and returns what the hub made of it.
func handshake(t *testing.T, h *Hub, tc *tls.Config) error {
	t.Helper()
	conn, err := tls.Dial("tcp", h.MQTTAddr().String(), tc)
	if err != nil {
		return err
	}
	defer conn.Close()
	// In TLS 1.3 a client hears of its certificate after the handshake. The hub
	// closes a connection that sends an unknown packet, and that is no alert.
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte{0, 0}); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	if alert := (tls.AlertError(0)); errors.As(err, &alert) || err != nil && strings.Contains(err.Error(), "remote error: tls") {
		return err
	}
	return nil
}

func TestClientCertificates(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	device := id.Identifier().String()
	cfg, pool := certified(t, ca, map[string]string{
		"alice": "user", "bob": "user", "screen.plant.example": "observer", "pump": "device:" + device,
	})
	h := start(t, cfg)
	addr := h.MQTTAddr().String()
	none := func([]byte) []byte { return nil }
	for _, c := range []struct {
		name, clientID string
		cert           *tls.Certificate
		code           byte
	}{
		{"a mapped name", "a1", ca.issue("alice"), accepted},
		{"a mapped DNS name", "s1", ca.issue("whatever", "other.example", "screen.plant.example"), accepted},
		{"an unmapped name", "m1", ca.issue("mallory", "mallory.example"), refused3},
		{"no certificate", "n1", nil, refused3},
		{"the same account again", "a1", ca.issue("alice"), accepted},
		{"the client id of another account", "a1", ca.issue("bob"), refused3},
		{"a device's client id as user", device, ca.issue("alice"), refused3},
		{"a device", device, ca.issue("pump"), accepted},
		{"a device under another client id", "pump", ca.issue("pump"), refused3},
	} {
		if code := say(t, addr, showing(pool, c.cert), 4, c.clientID, "", none); code != c.code {
			t.Errorf("%s: code %d, want %d", c.name, code, c.code)
		}
	}
	// The user name is only what a client calls itself.
	if code := say(t, addr, showing(pool, ca.issue("bob")), 4, "a1", certificateUser+"alice", none); code != refused3 {
		t.Errorf("another account's client id with its user name: code %d", code)
	}
	if code := say(t, addr, showing(pool, nil), 5, "n2", certificateUser+"alice", none); code != refused5 {
		t.Errorf("a user name in place of a certificate: code %#x", code)
	}
	if n := h.logins[loginCertificate].Load(); n != 1 {
		t.Errorf("%d certificates counted as not allowed", n)
	}
	for name, cert := range map[string]*tls.Certificate{
		"a foreign authority":       foreign.issue("alice"),
		"an ended certificate":      ca.client(time.Now().Add(-time.Minute), x509.ExtKeyUsageClientAuth, "alice"),
		"a certificate of a server": ca.client(time.Now().Add(time.Hour), x509.ExtKeyUsageServerAuth, "alice"),
	} {
		if err := handshake(t, h, showing(pool, cert)); err == nil {
			t.Errorf("%s passes the handshake", name)
		}
	}
	if err := handshake(t, h, showing(pool, ca.issue("alice"))); err != nil {
		t.Errorf("our authority's certificate does not pass the handshake: %v", err)
	}
}

func TestCertificateRoles(t *testing.T) {
	ca := newAuthority(t)
	cfg, pool := certified(t, ca, map[string]string{"screen": "observer", "alice": "user"})
	h := start(t, cfg)
	for _, url := range h.MQTTURLs() {
		for name, want := range map[string]byte{"screen": 0, "alice": 0x80} {
			c, err := login(t, url, name+url[:3], "", "", showing(pool, ca.issue(name)))
			if err != nil {
				t.Fatalf("%s at %s: %v", name, url, err)
			}
			for filter, want := range map[string]byte{"sealmq/#": want, "plant/#": 0} {
				token := c.Subscribe(filter, 0, nil)
				if !token.WaitTimeout(20 * time.Second) {
					t.Fatal("no SUBACK")
				}
				if got := token.(interface{ Result() map[string]byte }).Result()[filter]; got != want {
					t.Errorf("%s at %s subscribes to %s: %#x, want %#x", name, url[:3], filter, got, want)
				}
			}
		}
	}
}

func TestCertificatesBesidePasswords(t *testing.T) {
	ca := newAuthority(t)
	cfg, pool := certified(t, ca, map[string]string{"alice": "user"})
	cfg.PasswordFile = filepath.Join(t.TempDir(), "passwd")
	line, err := PasswordLine("alice", []byte("battery"), "user", "", 4)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.PasswordFile, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, cfg)
	addr := h.MQTTAddr().String()
	right, wrong := func([]byte) []byte { return []byte("battery") }, func([]byte) []byte { return []byte("horse") }
	none := func([]byte) []byte { return nil }
	for _, c := range []struct {
		name, clientID string
		cert           *tls.Certificate
		password       func([]byte) []byte
		code           byte
	}{
		{"password without certificate", "p", nil, right, accepted},
		{"certificate of the same name, the account's client id", "p", ca.issue("alice"), none, refused3},
		{"certificate", "c", ca.issue("alice"), none, accepted},
		{"password for the certificate's client id", "c", nil, right, refused3},
		{"password with an unmapped certificate", "p2", ca.issue("mallory"), right, accepted},
		{"wrong password with a mapped certificate", "p3", ca.issue("alice"), wrong, bad3},
	} {
		if code := say(t, addr, showing(pool, c.cert), 4, c.clientID, "alice", c.password); code != c.code {
			t.Errorf("%s: code %d, want %d", c.name, code, c.code)
		}
	}
}

func TestRequiredCertificateAndReload(t *testing.T) {
	old, next := newAuthority(t), newAuthority(t)
	cfg, pool := certified(t, old, nil)
	cfg.TLS.ClientRequired = true
	h := start(t, cfg)
	if err := handshake(t, h, showing(pool, nil)); err == nil {
		t.Error("no certificate passes the handshake")
	}
	if code := say(t, h.MQTTAddr().String(), showing(pool, old.issue("any")), 4, "x", "", func([]byte) []byte { return nil }); code != accepted {
		t.Errorf("a certificate: code %d", code)
	}
	resumed := showing(pool, old.issue("any"))
	resumed.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	if err := handshake(t, h, resumed); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(cfg.TLS.ClientCA, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(); err == nil {
		t.Error("a file without certificates is taken")
	}
	if err := handshake(t, h, showing(pool, old.issue("any"))); err != nil {
		t.Errorf("what was in force did not stay: %v", err)
	}
	next.write(cfg.TLS.ClientCA)
	if err := h.Reload(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]*tls.Config{"the old authority's": showing(pool, old.issue("any")), "a ticket from before": resumed} {
		if err := handshake(t, h, tc); err == nil {
			t.Errorf("%s passes the handshake after the reload", name)
		}
	}
	if err := handshake(t, h, showing(pool, next.issue("any"))); err != nil {
		t.Errorf("the new authority's certificate: %v", err)
	}
}

func TestValidateCertificates(t *testing.T) {
	full := TLS{Cert: "c", Key: "k", ClientCA: "a"}
	near, far := []string{"mqtts://127.0.0.1:0"}, []string{"mqtts://0.0.0.0:8883"}
	one := map[string]string{"alice": "user"}
	for _, c := range []struct {
		name   string
		config Config
		key    string
		fix    string
	}{
		{"from elsewhere", Config{MQTT: far, TLS: full, Certificates: one}, "", ""},
		{"required alone", Config{MQTT: near, TLS: TLS{Cert: "c", Key: "k", ClientCA: "a", ClientRequired: true}}, "", ""},
		{"required, and nobody named", Config{MQTT: far, TLS: TLS{Cert: "c", Key: "k", ClientCA: "a", ClientRequired: true}}, "mqtt", "--certificate"},
		{"no authority", Config{MQTT: near, TLS: TLS{Cert: "c", Key: "k"}, Certificates: one}, "certificates", "--tls-client-ca"},
		{"required of nobody", Config{MQTT: near, TLS: TLS{Cert: "c", Key: "k", ClientRequired: true}}, "tls.client_required", "--tls-client-ca"},
		{"an authority for nothing", Config{MQTT: near, TLS: full}, "tls.client_ca", "--certificate"},
		{"no TLS", Config{TLS: TLS{ClientCA: "a"}, Certificates: one}, "tls.client_ca", "--tls-cert"},
		{"open", Config{MQTT: near, TLS: full, Certificates: one, MQTTOpen: true}, "mqtt_open", "--certificate"},
		{"a listener in the clear", Config{MQTT: append([]string{"0.0.0.0:1883"}, near...), TLS: full, Certificates: one}, "mqtt", "mqtts://"},
		{"unknown role", Config{MQTT: near, TLS: full, Certificates: map[string]string{"alice": "admin"}}, "certificates", "observer"},
		{"device without identifier", Config{MQTT: near, TLS: full, Certificates: map[string]string{"alice": "device"}}, "certificates", "IDENTIFIER"},
		{"bad identifier", Config{MQTT: near, TLS: full, Certificates: map[string]string{"alice": "device:I5"}}, "certificates", "IDENTIFIER"},
		{"user with identifier", Config{MQTT: near, TLS: full, Certificates: map[string]string{"alice": "user:I5"}}, "certificates", "IDENTIFIER"},
		{"no name", Config{MQTT: near, TLS: full, Certificates: map[string]string{"": "user"}}, "certificates", "common name"},
	} {
		err := c.config.Validate()
		var ce *ConfigError
		switch {
		case c.key == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.key != "" && (!errors.As(err, &ce) || ce.Key != c.key || !strings.Contains(ce.Fix, c.fix)):
			t.Errorf("%s: %v, want one about %s with %s", c.name, err, c.key, c.fix)
		}
	}
	c, err := parseConfig(strings.NewReader("tls:\n  client_ca: ca.pem\n  client_required: true\ncertificates:\n  alice: user\n  screen.example: observer\n"), "hub.yaml")
	if err != nil || c.TLS.ClientCA != "ca.pem" || !c.TLS.ClientRequired || c.Certificates["screen.example"] != "observer" {
		t.Errorf("parsed as %+v, %v", c, err)
	}
}
