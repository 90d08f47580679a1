package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/pinfile"
	"github.com/sealmq/sealmq/route"
)

// ErrBadClaim means that the hub shows a claim to a forwarding address that its
// claimant has not signed, or one older than it has shown before. It counts as
// ErrWrongIdentity: the hub, or whoever is in between, tries something.
var ErrBadClaim = fmt.Errorf("%w: the claim to the address is forged or out of date", ErrWrongIdentity)

// Ownership is what the hub says about a forwarding address, and what of it is
// proved.
type Ownership struct {
	// Address is the forwarding address.
	Address string
	// Owner is who registered it; zero for a stock Ockam node, which says not who
	// it is. Unless Signed it is the hub's word alone.
	Owner identity.Identifier
	// Device is the owner's client id, Since when the address was registered and
	// Online whether the device was connected: the hub's word.
	Device string
	Since  time.Time
	Online bool
	// Signed says that Owner has signed a claim to the address that holds now,
	// with the newest key that this node knows of it.
	Signed bool
	// Until and Number are those of the claim.
	Until  time.Time
	Number uint64
	// FirstUse says that this node has not met the owner before, so that it only
	// knows from the claim itself which key is the owner's newest.
	FirstUse bool
}

// lookupTime bounds a lookup, and the registration of a claim.
const lookupTime = 5 * time.Second

// Lookup asks the hub about a forwarding address and verifies the owner's claim.
// That an address is claimed says who has to be at its end; the handshake proves
// who is.
//
// Errors: ErrUnknownAddress, ErrBadClaim, ErrTimeout, or that of ctx.
func (n *Node) Lookup(ctx context.Context, address string) (Ownership, error) {
	o := Ownership{Address: address}
	ctx, cancel := context.WithTimeoutCause(ctx, lookupTime, fmt.Errorf("%w: no answer to the lookup of %s", ErrTimeout, address))
	defer cancel()
	r, err := n.record(ctx, (&hubproto.LookupRequest{Address: address}).Marshal, lookupService)
	switch {
	case err != nil:
		return o, err
	case r == nil:
		return o, fmt.Errorf("%w: %s", ErrUnknownAddress, address)
	case r.Address != address:
		return o, fmt.Errorf("%w: asked for %s, answered about %s", ErrBadClaim, address, r.Address)
	}
	o.Owner, o.Device, o.Since, o.Online = r.Owner, r.Device, r.Since, r.Online
	if len(r.Claim) == 0 {
		return o, nil
	}
	return o, n.verifyClaim(&o, r.Claim)
}

// verifyClaim fills in what a claim proves. One that has merely ended, or was
// signed with the key before the owner's latest, proves nothing, and is no error:
// the owner may have been away.
func (n *Node) verifyClaim(o *Ownership, raw []byte) error {
	c, err := hubproto.ParseClaim(raw)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrBadClaim, err)
	case c.Address != o.Address:
		return fmt.Errorf("%w: it is for %s", ErrBadClaim, c.Address)
	case c.Claimant != o.Owner:
		return fmt.Errorf("%w: the hub says %v and the claim %v", ErrBadClaim, o.Owner, c.Claimant)
	}
	known, met := n.cfg.Registry.Get(c.Claimant)
	if !met {
		known = nil
	}
	switch _, err := c.Verify(known, time.Now()); {
	case errors.Is(err, hubproto.ErrClaimExpired), errors.Is(err, hubproto.ErrClaimHistory):
		n.log.Info("the claim to a forwarding address proves nothing", "address", o.Address, "err", err)
		return nil
	case errors.Is(err, identity.ErrOlder):
		// Its claimant has rotated the key since and may be about to sign again.
		seen, err := n.claimSeen(c)
		if err == nil && c.Number < seen {
			err = fmt.Errorf("%w: %w: number %d after %d", ErrBadClaim, pinfile.ErrOlder, c.Number, seen)
		}
		n.log.Warn("the claim to a forwarding address is by a key that was rotated away", "address", o.Address, "identifier", c.Claimant)
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrBadClaim, err)
	}
	if err := n.seenClaim(c); err != nil {
		return err
	}
	o.Signed, o.FirstUse, o.Until, o.Number = true, !met, c.Until, c.Number
	return nil
}

// claimSeen returns the largest number seen of the claims of a claimant to an
// address.
func (n *Node) claimSeen(c *hubproto.Claim) (uint64, error) {
	e, _, err := n.numbers.Lookup(claimName(c))
	if err != nil || n.cfg.KnownPeers == nil {
		return e.Number, err
	}
	known, ok, err := n.cfg.KnownPeers.file.Lookup(c.Address)
	if ok && known.Identifier == c.Claimant {
		return max(e.Number, known.Number), err
	}
	return e.Number, err
}

// claimName is what a claim's number is remembered under while the process lives.
func claimName(c *hubproto.Claim) string { return c.Address + "=" + c.Claimant.String() }

// seenClaim remembers the number of a claim and refuses an older one than seen.
func (n *Node) seenClaim(c *hubproto.Claim) error {
	err := n.numbers.Remember(claimName(c), c.Claimant, c.Number)
	if err == nil && n.cfg.KnownPeers != nil {
		if id, ok, lerr := n.cfg.KnownPeers.Lookup(c.Address); lerr == nil && ok && id == c.Claimant {
			err = n.cfg.KnownPeers.file.Remember(c.Address, c.Claimant, c.Number)
		}
	}
	if errors.Is(err, pinfile.ErrOlder) {
		return fmt.Errorf("%w: %w", ErrBadClaim, err)
	}
	return err
}

// lookupService is where the hub answers lookups.
const lookupService = "lookup"

// record asks one of the hub's services for a forwarder record.
func (n *Node) record(ctx context.Context, body func() ([]byte, error), service string) (*hubproto.ForwarderRecord, error) {
	b, err := body()
	if err != nil {
		return nil, err
	}
	m, err := n.requestHub(ctx, service, b)
	if err != nil {
		return nil, err
	}
	a, err := hubproto.ParseLookupAnswer(m.Payload)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadClaim, err)
	}
	return a.Record, nil
}

// hubKeepsClaims reports whether the hub keeps claims.
func (n *Node) hubKeepsClaims() bool {
	n.link.mu.Lock()
	defer n.link.mu.Unlock()
	return n.link.answer != nil && n.link.answer.Features&hubproto.FeatureClaims != 0
}

// forwarding reports whether a route begins with a forwarding address.
func forwarding(to route.Route) (string, bool) {
	first, ok := to.First()
	if !ok || !first.IsLocal() {
		return "", false
	}
	return first.Value, strings.HasPrefix(first.Value, "FWD_") || strings.HasPrefix(first.Value, "forward_to_")
}

// dialOwner is dial for a policy that names identifiers: beside the handshake it
// looks up who claims the address. A claim of somebody else, a forged one or an
// old one ends the attempt; without a claim the handshake decides alone.
func (n *Node) dialOwner(ctx context.Context, to route.Route, policy channel.Policy, opts *dialOptions) (*channel.Channel, error) {
	expected, listed := channel.Expected(policy)
	address, fwd := forwarding(to)
	if !listed || !fwd || !n.hubKeepsClaims() {
		return n.dial(ctx, to, policy, opts)
	}
	dialling, stop := context.WithCancelCause(ctx)
	looking, enough := context.WithCancel(ctx)
	defer enough()
	verdict := make(chan error, 1)
	go func() {
		err := n.judge(looking, address, policy, expected)
		if err != nil {
			stop(err)
		}
		verdict <- err
	}()
	cur, err := n.dial(dialling, to, policy, opts)
	if err != nil {
		enough() // unless it was the verdict that ended the dialling
	}
	bad := <-verdict
	stop(nil)
	switch {
	case bad != nil && cur != nil:
		_ = cur.Close()
		return nil, bad
	case bad != nil:
		return nil, bad
	}
	return cur, err
}

// judge looks up an address of which it is known whose it may be.
func (n *Node) judge(ctx context.Context, address string, policy channel.Policy, expected []identity.Identifier) error {
	o, err := n.Lookup(ctx, address)
	switch {
	case errors.Is(err, ErrBadClaim):
		n.log.Warn("the hub shows a bad claim to a forwarding address", "address", address, "err", err)
		return err
	case err != nil:
		n.log.Debug("the hub says nothing of a forwarding address", "address", address, "err", err)
		return nil // the handshake will tell
	case o.Signed && !slices.Contains(expected, o.Owner):
		// A policy that remembers who was there has more to say.
		var changed *PeerChangedError
		if errors.As(policy.Check(channel.Peer{Identifier: o.Owner}), &changed) {
			return changed
		}
		return fmt.Errorf("%w: %s is claimed by %v", ErrWrongIdentity, address, o.Owner)
	case o.Signed && o.FirstUse:
		n.log.Info("the claim to the forwarding address is the first one seen of this identity", "address", address, "identifier", o.Owner)
	case !o.Signed:
		n.log.Info("nobody has signed a claim to the forwarding address", "address", address)
	}
	return nil
}

// claim signs that the forwarder's address is ours and leaves the claim with the
// hub. A hub that does not take it serves the address all the same.
func (f *Forwarder) claim(ctx context.Context) {
	n := f.n
	if f.through != nil || !n.hubKeepsClaims() || strings.HasPrefix(n.link.hubName, "tcp:") {
		return // over plain TCP the hub does not know whose a connection is
	}
	n.mu.Lock()
	address, last, closed := f.address, f.claimed, f.closed
	n.mu.Unlock()
	if closed || address == "" {
		return
	}
	now, by := time.Now(), n.cfg.Identity.Identity()
	number := max(uint64(max(now.UnixMilli(), 0)), last+1)
	c, err := hubproto.MakeClaim(n.cfg.Identity, address, number, now.Add(hubproto.ClaimTTL))
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, lookupTime)
		defer cancel()
		_, err = n.record(ctx, c.Marshal, hubproto.ServiceClaim)
	}
	n.renewing.Do(func() { n.spawn(n.renewClaims) })
	if err != nil {
		n.log.Warn("the hub does not keep our claim to a forwarding address", "address", address, "err", err)
		n.mu.Lock()
		f.claimedBy = nil
		n.mu.Unlock()
		select {
		case n.unclaimed <- struct{}{}:
		default:
		}
		return
	}
	n.mu.Lock()
	f.claimed, f.claimedAt, f.claimedBy = number, now, by
	n.mu.Unlock()
	if n.cfg.Identity.Identity().Compare(by) != identity.Equal {
		f.claim(ctx) // rotated meanwhile
	}
}

// claimRound is how often claims are looked through for those that have run half
// their time; claimRetry the first pause after one that the hub did not take.
const (
	claimRound = hubproto.ClaimTTL / 14
	claimRetry = 10 * time.Second
)

// renewClaims signs claims again before they end, when the hub did not take one, and
// when the identity has a new key: peers that have seen it no longer count what the
// old one signed.
func (n *Node) renewClaims() {
	tick := time.NewTicker(claimRound)
	defer tick.Stop()
	again := time.NewTimer(claimRetry)
	again.Stop()
	defer again.Stop()
	ticked, retry, pause := false, false, claimRetry
	for {
		rotated, now := n.cfg.Identity.Rotated(), n.cfg.Identity.Identity()
		n.mu.Lock()
		var due []*Forwarder
		for f := range n.forwarders {
			old := f.claimedBy != nil && now.Compare(f.claimedBy) != identity.Equal
			missing := f.claimedBy == nil
			if f.address != "" && (old || missing && retry || ticked && time.Since(f.claimedAt) > hubproto.ClaimTTL/2) {
				due = append(due, f)
			}
		}
		n.mu.Unlock()
		if n.State() != Online {
			due = nil // they are signed again with the next connection
		}
		for _, f := range due {
			f.claim(n.stopped)
		}
		ticked, retry = false, false
		select {
		case <-rotated:
		case <-n.unclaimed:
			again.Reset(jitter(pause))
			pause = min(2*pause, claimRound)
		case <-again.C:
			retry = true
		case <-tick.C:
			ticked, pause = true, claimRetry
			if err := n.cfg.Identity.Refresh(); err != nil {
				n.log.Warn("the identity cannot be read again", "err", err)
			}
		case <-n.stopped.Done():
			return
		}
	}
}

// Release gives the forwarding address up and closes the forwarder: the hub
// forgets it at once, and an alias is free for others. On a hub that has no such
// service it is as Close.
//
// Errors: ErrHubRefused, ErrTimeout (also of a hub that refuses what was registered
// through a channel), that of ctx, or what ended the channel; the forwarder is closed
// in any case.
func (f *Forwarder) Release(ctx context.Context) error {
	address := f.Address()
	f.Close()
	if address == "" || !f.n.hubKeepsClaims() {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lookupTime, fmt.Errorf("%w: no answer to the release of %s", ErrTimeout, address))
	defer cancel()
	req := hubproto.ReleaseRequest{Address: address}
	if f.through == nil {
		_, err := f.n.record(ctx, req.Marshal, hubproto.ServiceRelease)
		return err
	}
	body, err := req.Marshal()
	if err != nil {
		return err
	}
	_, err = f.through.Request(ctx, hubproto.ServiceRelease, body)
	return err
}
