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
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// writeCert writes a certificate of its own for 127.0.0.1 and returns a pool
// that trusts it.
func writeCert(t testing.TB, certFile, keyFile string, serial int64, end time.Time) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(serial),
		Subject:               pkix.Name{CommonName: "hub"},
		NotBefore:             time.Now().Add(-48 * time.Hour),
		NotAfter:              end,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:              []string{"localhost"},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: der},
		keyFile:  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return pool
}

func serialOf(t *testing.T, c *tls.Certificate, err error) int64 {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf.SerialNumber.Int64()
}

// TestHandshakesTakeTurns: handshakes wait for a worker, addresses in turn, and fail when
// too many do.
func TestHandshakesTakeTurns(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "hub.pem"), filepath.Join(dir, "hub.key")
	pool := writeCert(t, certFile, keyFile, 1, time.Now().Add(time.Hour))
	h := start(t, Config{MQTT: []string{"mqtts://127.0.0.1:0"}, TLS: TLS{Cert: certFile, Key: keyFile}})
	turns := h.cert.turns
	turns.mu.Lock()
	turns.free, turns.most = 0, 4 // every worker is at work
	turns.mu.Unlock()
	type end struct {
		host byte
		err  error
	}
	ends := make(chan end, 8)
	shake := func(host byte) {
		d := tls.Dialer{
			NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}},
			Config:    &tls.Config{RootCAs: pool},
		}
		go func() {
			c, err := d.DialContext(t.Context(), "tcp", h.MQTTAddr().String())
			if err == nil {
				_ = c.Close()
			}
			ends <- end{host, err}
		}()
	}
	waiting := func(n int) {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); turns.count() != n; runtime.Gosched() {
			if time.Now().After(limit) {
				t.Fatalf("%d wait, want %d", turns.count(), n)
			}
		}
	}
	shake(1)
	waiting(1)
	shake(1)
	waiting(2)
	shake(1) // half of the places are taken
	if e := <-ends; e.host != 1 || e.err == nil || h.Status().Counters["sealmq_tls_handshakes_busy_total"] != 1 {
		t.Errorf("%+v, and it is not counted", e)
	}
	shake(2)
	waiting(3)
	turns.leave()
	for range 3 {
		if e := <-ends; e.err != nil {
			t.Errorf("from %d: %v", e.host, e.err)
		}
	}
	waiting(0)
	turns.mu.Lock()
	defer turns.mu.Unlock()
	if turns.free != 1 {
		t.Errorf("%d workers are free", turns.free)
	}
}

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "hub.pem"), filepath.Join(dir, "hub.key")
	writeCert(t, certFile, keyFile, 1, time.Now().Add(time.Hour))
	c, err := loadCertificate(TLS{Cert: certFile, Key: keyFile}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c.now = func() time.Time { return now }

	writeCert(t, certFile, keyFile, 22, time.Now().Add(time.Hour))
	touch(t, now.Add(time.Second), certFile, keyFile)
	got, err := c.get(nil)
	if n := serialOf(t, got, err); n != 1 {
		t.Errorf("it looked again at once: serial %d", n)
	}
	now = now.Add(certLookEvery)
	got, err = c.get(nil)
	if n := serialOf(t, got, err); n != 22 {
		t.Errorf("the new certificate is not in use: serial %d", n)
	}

	// A half-written pair changes nothing, and is tried again.
	if err := os.WriteFile(certFile, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certLookEvery)
	got, err = c.get(nil)
	if n := serialOf(t, got, err); n != 22 {
		t.Errorf("after a broken file: serial %d", n)
	}
	if err := c.reload(); err == nil {
		t.Error("reload takes a broken file")
	}
	writeCert(t, certFile, keyFile, 333, time.Now().Add(time.Hour))
	touch(t, now.Add(2*time.Second), certFile, keyFile)
	now = now.Add(certLookEvery)
	got, err = c.get(nil)
	if n := serialOf(t, got, err); n != 333 {
		t.Errorf("after the repair: serial %d", n)
	}
}

func touch(t *testing.T, at time.Time, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCertificateErrors(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "hub.pem"), filepath.Join(dir, "hub.key")
	log := slog.New(slog.DiscardHandler)
	if _, err := loadCertificate(TLS{Cert: certFile, Key: keyFile}, log); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
	writeCert(t, certFile, keyFile, 1, time.Now().Add(time.Hour))
	if err := os.Chmod(keyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	var pe *PermissionError
	if _, err := loadCertificate(TLS{Cert: certFile, Key: keyFile}, log); !errors.As(err, &pe) || !strings.Contains(pe.Hint(), keyFile) {
		t.Errorf("a key that everybody reads: %v", err)
	}
	if err := os.Chmod(keyFile, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadCertificate(TLS{Cert: keyFile, Key: keyFile}, log); err == nil {
		t.Error("a key is taken for a certificate")
	}
	writeCert(t, certFile, keyFile, 1, time.Now().Add(-time.Hour))
	if _, err := loadCertificate(TLS{Cert: certFile, Key: keyFile}, log); err == nil || !strings.Contains(err.Error(), "ended on") {
		t.Errorf("an expired certificate: %v", err)
	}
}
