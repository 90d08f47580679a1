package broker

import (
	"bytes"
	"crypto/x509"
	"time"

	"github.com/sealmq/sealmq/bridge"
)

// grant is why a connection was let in, so that a reload can ask again. It does
// not change.
type grant struct {
	account     Account             // of a password, or of a certificate
	chain       []*x509.Certificate // as the client showed it, its own first; of a certificate
	proven      bool                // by a proof
	credentials [][]byte            // that came with it
	open        bool                // anybody might connect from where it came
}

// allowed reports whether what let a principal in would still do so. It is asked
// after a reload, of every connection.
func (h *Hub) allowed(p bridge.Principal) bool {
	g, ok := p.Grant.(*grant)
	switch {
	case !ok: // a guest, or a hub that is open: nothing that a reload changes
		return true
	case g.proven:
		_, err := h.proofs.policy.Load().admits(p.Identity, g.credentials, g.open, time.Now())
		return err == nil
	case g.chain != nil:
		return h.cert.trusts(g.chain)
	}
	a, ok := h.gate.passwords.Load().accounts[g.account.User]
	return ok && a.Role == g.account.Role && a.Identity == g.account.Identity && bytes.Equal(a.hash, g.account.hash)
}

// recheck ends the connections that a reload has left without a ground.
func (h *Hub) recheck() {
	h.mu.Lock()
	server := h.server
	h.mu.Unlock()
	if server == nil {
		return // not started
	}
	if n := server.Recheck(); n > 0 {
		h.logger.Info("connections ended that are no longer allowed", "connections", n)
	}
}

// trusts reports whether a client's certificate would pass the handshake now.
func (c *certificate) trusts(chain []*x509.Certificate) bool {
	c.mu.Lock()
	pool := c.pool
	c.mu.Unlock()
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err == nil
}
