package broker

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/identity"
)

// certificateUser begins the account of a certificate. No user name of a
// password file holds a colon, so that neither can stand in for the other.
const certificateUser = "certificate:"

// Bounds of what says whose a client's certificate is.
const (
	maxCAFile       = 4 << 20
	maxCertificates = maxAccounts
)

// ErrCertificate says that no name in a client's certificate is one of those
// that may connect.
var ErrCertificate = errors.New("broker: no name in the certificate is one that may connect")

// certificates knows the accounts of client certificates by the names in them.
// It does not change.
type certificates map[string]Account

// loadCertificates reads the accounts of client certificates; nil when there are none.
func (c *Config) loadCertificates() (certificates, error) {
	if len(c.Certificates) == 0 {
		return nil, nil
	}
	if len(c.Certificates) > maxCertificates {
		return nil, &ConfigError{Key: "certificates", Problem: fmt.Sprintf("there are more than %d", maxCertificates), Fix: "give those that are alike one name"}
	}
	all := make(certificates, len(c.Certificates))
	for _, name := range slices.Sorted(maps.Keys(c.Certificates)) { // always the same error
		a, problem := certificateAccount(name, c.Certificates[name])
		if problem != "" {
			return nil, &ConfigError{Key: "certificates", Problem: problem,
				Fix: "write name: user, name: observer or name: device:IDENTIFIER, with the subject's common name or a DNS name of the certificate"}
		}
		all[name] = a
	}
	return all, nil
}

// certificateAccount reads one entry of Config.Certificates.
func certificateAccount(name, what string) (a Account, problem string) {
	if problem := checkName(name); problem != "" {
		return a, problem
	}
	a.User = certificateUser + name
	role, id, cut := strings.Cut(what, ":")
	switch role {
	case "device":
		a.Role = bridge.RoleDevice
	case "observer":
		a.Role = bridge.RoleObserver
	case "user":
		a.Role = bridge.RoleUser
	default:
		return a, fmt.Sprintf("unknown role %q of %q; the roles are user, observer and device", role, name)
	}
	switch {
	case a.Role == bridge.RoleDevice && !cut:
		return a, fmt.Sprintf("device %q has no identifier", name)
	case a.Role != bridge.RoleDevice && cut:
		return a, fmt.Sprintf("only a device has an identifier, and %q is of role %s", name, role)
	case cut:
		parsed, err := identity.ParseIdentifier(id)
		if err != nil {
			return a, fmt.Sprintf("device %q: %q is not an identifier", name, id)
		}
		a.Identity = parsed
	}
	return a, ""
}

func checkName(name string) (problem string) {
	if name == "" || len(name) > maxUserLen {
		return fmt.Sprintf("%.40q is not a name of 1 to %d bytes", name, maxUserLen)
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return fmt.Sprintf("%q: no control characters", name)
		}
	}
	return ""
}

// verifiedLeaf returns the certificate that a client showed and the TLS
// handshake verified, nil when there is none.
func verifiedLeaf(st *tls.ConnectionState) *x509.Certificate {
	if st == nil || len(st.VerifiedChains) == 0 || len(st.VerifiedChains[0]) == 0 {
		return nil
	}
	return st.VerifiedChains[0][0]
}

// find returns the account of a verified certificate: of its common name, or
// else of the first of its DNS names that has one. Names count as they stand in
// the certificate.
func (c certificates) find(leaf *x509.Certificate) (Account, bool) {
	if a, ok := c[leaf.Subject.CommonName]; ok {
		return a, true
	}
	for _, name := range leaf.DNSNames {
		if a, ok := c[name]; ok {
			return a, true
		}
	}
	return Account{}, false
}

// certificateLogin lets a client in by the certificate it showed.
func (h *Hub) certificateLogin(clientID string, leaf *x509.Certificate) (Account, error) {
	a, ok := h.certificates.find(leaf)
	if !ok {
		return a, ErrCertificate
	}
	return admit(a, clientID)
}

// byCertificate returns the certificate that decides about a CONNECT, nil for
// none. A password, where there are any, comes first: who has both chooses.
func (h *Hub) byCertificate(c *mochibridge.ConnectInfo) *x509.Certificate {
	if h.certificates == nil || h.gate != nil && len(c.Password) > 0 {
		return nil
	}
	return verifiedLeaf(c.TLS)
}

// loadPool reads the authorities of client certificates.
func loadPool(name string) (*x509.CertPool, error) {
	f, err := openPolicy(name, "tls.client_ca", 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close() // nothing was written
	text, err := io.ReadAll(io.LimitReader(f, maxCAFile+1))
	if err != nil {
		return nil, fmt.Errorf("broker: tls.client_ca: %s: %w", name, err)
	}
	pool := x509.NewCertPool()
	if len(text) > maxCAFile || !pool.AppendCertsFromPEM(text) {
		return nil, &ConfigError{Key: "tls.client_ca", Problem: fmt.Sprintf("%s holds no certificate in PEM", name),
			Fix: "it begins with -----BEGIN CERTIFICATE-----, and is at most 4 MiB"}
	}
	return pool, nil
}

// checkCertificates checks what client certificates are configured with.
func (c *Config) checkCertificates() error {
	t := &c.TLS
	switch {
	case t.ClientRequired && t.ClientCA == "":
		return &ConfigError{Key: "tls.client_required", Problem: "nothing says whose certificates count", Fix: "set tls.client_ca (--tls-client-ca)"}
	case len(c.Certificates) > 0 && t.ClientCA == "":
		return &ConfigError{Key: "certificates", Problem: "nothing says whose certificates count", Fix: "set tls.client_ca (--tls-client-ca)"}
	case t.ClientCA != "" && t.Cert == "":
		return &ConfigError{Key: "tls.client_ca", Problem: "clients show certificates over TLS alone, and the hub has none of its own",
			Fix: "set tls.cert (--tls-cert) and tls.key (--tls-key)"}
	case t.ClientCA != "" && len(c.Certificates) == 0 && !t.ClientRequired:
		return &ConfigError{Key: "tls.client_ca", Problem: "no name may connect with a certificate, and none is required",
			Fix: "set certificates (--certificate), or tls.client_required (--tls-client-required)"}
	case c.MQTTOpen && len(c.Certificates) > 0:
		return &ConfigError{Key: "mqtt_open", Problem: "it lets anybody in, and certificates says who may connect",
			Fix: "remove one of mqtt_open (--mqtt-open) and certificates (--certificate)"}
	}
	_, err := c.loadCertificates()
	return err
}
