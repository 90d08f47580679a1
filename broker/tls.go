package broker

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// certLookEvery is how often a handshake looks whether the certificate's files
// have changed.
const certLookEvery = 10 * time.Second

// PermissionError says that more people can get at a file than should.
type PermissionError struct {
	// File is the file's name, Mode what it has and Want what it should have.
	File string
	Mode fs.FileMode
	Want fs.FileMode
	// What the present mode allows.
	What string
}

func (e *PermissionError) Error() string {
	return fmt.Sprintf("broker: %s has mode %04o: %s", e.File, e.Mode, e.What)
}

// Hint names the command that sets it right.
func (e *PermissionError) Hint() string {
	return fmt.Sprintf("chmod %04o %s", e.Want, e.File)
}

// openPolicy opens a file that says who may do what. One that everybody can write to is
// refused; setting is what the error calls it, want the mode it asks for.
func openPolicy(name, setting string, want fs.FileMode) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("broker: %s: %w", setting, err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o002 != 0 {
		err = &PermissionError{File: name, Mode: info.Mode().Perm(), Want: want, What: "everybody can change who may do what"}
	} else if err != nil {
		err = fmt.Errorf("broker: %s: %w", setting, err)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// certificate serves a certificate from two files and notices when they were
// replaced. Connections that exist keep theirs. It is safe for concurrent use.
type certificate struct {
	certFile, keyFile string
	caFile            string // of clients' certificates; empty: none are asked for
	required          bool   // every client has to show one
	logger            *slog.Logger
	now               func() time.Time
	turns             *turnstile    // of the signatures of handshakes
	busy              atomic.Uint64 // handshakes that got no turn

	mu     sync.Mutex
	cert   *tls.Certificate
	pool   *x509.CertPool // from caFile
	stamp  [3]fileStamp
	looked time.Time
}

// fileStamp tells one version of a file from the next.
type fileStamp struct {
	changed time.Time
	size    int64
}

func stampOf(name string) (fileStamp, error) {
	info, err := os.Stat(name)
	if err != nil {
		return fileStamp{}, err
	}
	return fileStamp{info.ModTime(), info.Size()}, nil
}

func loadCertificate(t TLS, logger *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: t.Cert, keyFile: t.Key, caFile: t.ClientCA, required: t.ClientRequired, logger: logger, now: time.Now,
		turns: newTurnstile(handshakesWaiting)}
	if err := c.reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// files are those it reads.
func (c *certificate) files() []string {
	all := []string{c.certFile, c.keyFile}
	if c.caFile != "" {
		all = append(all, c.caFile)
	}
	return all
}

// reload reads the files. On an error the certificate in use stays.
func (c *certificate) reload() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.load()
}

func (c *certificate) load() error {
	c.looked = c.now()
	var stamp [3]fileStamp
	var err error
	for i, name := range c.files() {
		if stamp[i], err = stampOf(name); err != nil {
			return fmt.Errorf("broker: tls: %w", err)
		}
	}
	info, err := os.Stat(c.keyFile)
	if err != nil {
		return fmt.Errorf("broker: tls: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return &PermissionError{File: c.keyFile, Mode: mode, Want: 0o600, What: "everybody can read the TLS key"}
	}
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("broker: tls: %s and %s: %w", c.certFile, c.keyFile, err)
	}
	if leaf := cert.Leaf; leaf != nil && c.now().After(leaf.NotAfter) {
		return &expiredError{file: c.certFile, at: leaf.NotAfter}
	}
	var pool *x509.CertPool
	if c.caFile != "" {
		if pool, err = loadPool(c.caFile); err != nil {
			return err
		}
	}
	c.cert, c.pool, c.stamp = &cert, pool, stamp
	return nil
}

// expiredError says that a certificate has ended.
type expiredError struct {
	file string
	at   time.Time
}

func (e *expiredError) Error() string {
	return fmt.Sprintf("broker: tls: the certificate in %s ended on %s", e.file, e.at.UTC().Format(time.DateOnly))
}

func (e *expiredError) Unwrap() error { return x509.CertificateInvalidError{Reason: x509.Expired} }

// handshakesWaiting is how many TLS handshakes may wait for a worker to sign for them.
const handshakesWaiting = 4096

// get is a tls.Config's GetCertificate. Its key signs in turns: a flood of handshakes
// from one address takes neither every processor nor the turns of others.
func (c *certificate) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, _, err := c.current()
	if err != nil || hello == nil {
		return cert, err
	}
	key, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return cert, nil
	}
	each := *cert
	each.PrivateKey = &turnSigner{key, c, hello.Context(), hello.Conn.RemoteAddr()}
	return &each, nil
}

// turnSigner is the key for one handshake.
type turnSigner struct {
	crypto.Signer
	c    *certificate
	ctx  context.Context // the handshake's
	addr net.Addr
}

// Sign implements crypto.Signer.
func (s *turnSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	done, err := s.c.turns.enter(s.ctx, s.addr, "")
	if err != nil {
		s.c.busy.Add(1)
		return nil, err
	}
	defer done()
	return s.Signer.Sign(rand, digest, opts)
}

// current returns what is in force, after a look whether the files changed.
func (c *certificate) current() (*tls.Certificate, *x509.CertPool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); now.Sub(c.looked) >= certLookEvery {
		c.looked = now
		if c.changed() {
			// Certificate and key are often replaced one after the other: what
			// does not fit now is tried again at the next look.
			if err := c.load(); err != nil {
				c.logger.Warn("the new TLS certificate cannot be used, the old one stays", "err", err)
			} else {
				c.logger.Info("the TLS certificate was replaced", "file", c.certFile)
			}
		}
	}
	if c.cert == nil {
		return nil, nil, errors.New("broker: tls: no certificate")
	}
	return c.cert, c.pool, nil
}

func (c *certificate) changed() bool {
	for i, name := range c.files() {
		if s, err := stampOf(name); err == nil && s != c.stamp[i] {
			return true
		}
	}
	return false
}

// tlsConfig is what the hub's TLS listeners use: TLS 1.3, or 1.2 with the
// suites that Go holds safe.
func (c *certificate) tlsConfig() *tls.Config {
	base := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: c.get,
	}
	if c.caFile == "" {
		return base
	}
	// A ticket would carry a client's certificate past a new list of authorities.
	base.SessionTicketsDisabled = true
	base.ClientAuth = tls.VerifyClientCertIfGiven
	if c.required {
		base.ClientAuth = tls.RequireAndVerifyClientCert
	}
	served := base.Clone()
	served.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		_, pool, err := c.current()
		if err != nil {
			return nil, err
		}
		each := base.Clone()
		each.ClientCAs = pool
		return each, nil
	}
	return served
}
