package bridge

import (
	"errors"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/sources"
)

// Addresses of the services for owners of forwarding addresses.
const (
	ServiceClaim   = hubproto.ServiceClaim
	ServiceRelease = hubproto.ServiceRelease
)

// How many claims are verified a second, each for a few signatures, of all identities.
// One of them may make as many as it may register forwarders.
const (
	claimRate       = 1000
	claimBurst      = 4000
	claimIdentities = 16384 // that are told apart
)

// Reasons why a claim or a release is refused.
var (
	errNotOwner = errors.New("bridge: the address does not belong to the sender")
	errOldClaim = errors.New("bridge: a newer claim is kept already")
)

// EphemeralSigner is a Signer whose identity ends with the process. Devices are
// told, so that they don't remember it.
type EphemeralSigner interface {
	Signer
	Ephemeral() bool
}

// features says what this hub can do, in the answer to hello.
func (b *Bridge) features() hubproto.Features {
	f := hubproto.FeatureClaims
	if s, ok := b.cfg.Identity.(EphemeralSigner); ok && s.Ephemeral() {
		f |= hubproto.FeatureEphemeral
	}
	return f
}

// claims keeps owners' signed claims to their addresses. The hub verifies them so
// that it does not hand out rubbish; nobody has to believe it.
type claims struct {
	b     *Bridge
	limit *sources.Limiter[claimant]
}

// registerClaimServices puts the services into an empty table.
func (b *Bridge) registerClaimServices() {
	c := &claims{b: b, limit: sources.New[claimant](sources.Limits{
		Each: b.cfg.RegistrationRate, EachBurst: b.cfg.RegistrationBurst,
		Total: claimRate, TotalBurst: claimBurst, Known: claimIdentities,
	})}
	for _, s := range []*service{
		{addr: ServiceClaim, reach: ReachOpen, handler: c.serveClaim},
		{addr: ServiceRelease, reach: ReachOpen, handler: c.serveRelease},
	} {
		b.table.put(s.addr, &worker{service: s})
	}
}

// serveClaim keeps a claim. The answer is that of lookup.
func (c *claims) serveClaim(r *Request) {
	claim, err := hubproto.ParseClaim(r.Frame.Payload)
	if err != nil {
		r.Drop(DropRequest)
		return
	}
	if !c.limit.Allow(r.From.claimant(), time.Unix(0, c.b.now())) {
		r.Drop(DropThrottled) // and not into the log either
		return
	}
	if err := c.keep(r, claim); err != nil {
		if unlogged, ok := c.b.mayLog(); ok {
			c.b.cfg.Logger.Info("claim refused", "device", r.From.ClientID, "address", claim.Address, "err", err, "unlogged", unlogged)
		}
		r.Drop(DropRefused)
		return
	}
	c.answer(r, claim.Address)
}

func (c *claims) keep(r *Request, claim *hubproto.Claim) error {
	if r.link == nil || r.link.port.kind != portDevice || r.From.Identity.IsZero() || claim.Claimant != r.From.Identity {
		return errNotOwner
	}
	before, err := c.b.registry.claimOf(r.link.port, claim)
	if err != nil {
		return err
	}
	// A key that an earlier claim shows as rotated away signs nothing any more.
	var known *identity.Identity
	if before != nil && len(before.History) > 0 {
		if known, err = identity.ImportAs(claim.Claimant, before.History); err != nil {
			known = nil
		}
	}
	if _, err := claim.Verify(known, c.b.clock.wall()); err != nil {
		return err
	}
	raw, err := claim.Marshal()
	if err != nil {
		return err
	}
	return c.b.registry.keepClaim(r.link.port, claim, raw)
}

// serveRelease removes a forwarder for its owner.
func (c *claims) serveRelease(r *Request) {
	req, err := hubproto.ParseReleaseRequest(r.Frame.Payload)
	if err != nil {
		r.Drop(DropRequest)
		return
	}
	if r.link == nil || r.link.port.kind == portLocal || !c.b.registry.release(r.link.port, r.From, req.Address) {
		r.Drop(DropRefused)
		return
	}
	c.b.cfg.Logger.Info("forwarding address released", "device", r.From.ClientID, "address", req.Address)
	c.answer(r, req.Address)
}

func (c *claims) answer(r *Request, addr string) {
	a := hubproto.LookupAnswer{Address: addr, Record: c.b.Forwarder(addr)}
	body, err := a.Marshal()
	if err != nil {
		r.Drop(DropTooLarge)
		return
	}
	c.b.settled(func() { r.Reply(body) })
}

// owned returns the forwarder at an address of p's; r.mu is held.
func (r *registry) owned(p *Port, addr string) *forwarder {
	f := r.m[addr]
	if f == nil || f.port != p {
		return nil
	}
	return f
}

// claimOf checks that a claim is newer than the one kept, which it returns.
func (r *registry) claimOf(p *Port, claim *hubproto.Claim) (before *hubproto.Claim, err error) {
	r.mu.Lock()
	f := r.owned(p, claim.Address)
	if f == nil {
		r.mu.Unlock()
		return nil, errNotOwner
	}
	raw, owner := f.claim, f.owner.Identity
	r.mu.Unlock()
	if owner != claim.Claimant {
		return nil, errNotOwner
	}
	if len(raw) == 0 {
		return nil, nil
	}
	switch before, err = hubproto.ParseClaim(raw); {
	case err != nil:
		// What was restored is not readable any more, and is as good as none.
		return nil, nil //nolint:nilerr // see above
	case claim.Number <= before.Number:
		return nil, errOldClaim
	}
	return before, nil
}

// keepClaim stores a verified claim, unless the address has changed hands or a
// newer claim has come meanwhile.
func (r *registry) keepClaim(p *Port, claim *hubproto.Claim, raw []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.owned(p, claim.Address)
	if f == nil || f.owner.Identity != claim.Claimant {
		return errNotOwner
	}
	if now, err := hubproto.ParseClaim(f.claim); err == nil && claim.Number <= now.Number {
		return errOldClaim
	}
	f.claim = raw
	r.changed(f)
	return nil
}

// release removes the forwarder at an address for its owner: the connection that
// registered it, or another one of the same identity that is as well proven.
func (r *registry) release(p *Port, who Principal, addr string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.m[addr]
	if f == nil {
		return false
	}
	same := !who.Identity.IsZero() && f.owner.Identity == who.Identity && mayTake(f.owner, who)
	if f.port != p && !same {
		return false
	}
	r.remove(f)
	return true
}
