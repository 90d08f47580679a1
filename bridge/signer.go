package bridge

import (
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
)

// IdentitySigner returns the [Signer] of a hub whose keys are in this process:
// the identity is the one that devices pin. It follows the identity's rotations
// and is safe for concurrent use.
func IdentitySigner(p *identity.Private) Signer { return identitySigner{p} }

// EphemeralIdentitySigner is [IdentitySigner] for an identity that ends with this
// process. Devices that do not pin it take the next one's in its place.
func EphemeralIdentitySigner(p *identity.Private) EphemeralSigner {
	return ephemeralSigner{identitySigner{p}}
}

type ephemeralSigner struct{ identitySigner }

func (ephemeralSigner) Ephemeral() bool { return true }

type identitySigner struct{ p *identity.Private }

func (s identitySigner) Identifier() identity.Identifier { return s.p.Identifier() }
func (s identitySigner) ChangeHistory() []byte           { return s.p.Identity().ChangeHistory() }
func (s identitySigner) SignHello(msg []byte) ([]byte, error) {
	return s.p.Sign(hubproto.HelloContext, msg)
}
