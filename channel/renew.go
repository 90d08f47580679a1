package channel

import (
	"context"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// A credential that the peer has seen is replaced by a newer one of Config.Credential
// once the last quarter of its life has begun, or its last hour.
const (
	renewLead = time.Hour // longest time before the end
	// renewPause bounds how long passes until Config.Credential is asked again that
	// had nothing newer.
	renewPause = time.Minute
	// renewLook bounds one wait: a clock can be set, a machine can sleep.
	renewLook = 10 * time.Minute
)

// lifetime is when a credential shown to the peer was issued and when it ends.
type lifetime struct{ from, until time.Time }

func lifetimeOf(credential []byte) *lifetime {
	in, err := identity.InspectCredential(credential)
	if err != nil {
		return nil // never renewed: nobody can have believed it
	}
	return &lifetime{in.CreatedAt, in.ExpiresAt}
}

// wait is how long to wait from now on, and whether a newer credential is due.
func (l *lifetime) wait(now time.Time) (d time.Duration, due bool) {
	lead := min(l.until.Sub(l.from)/4, renewLead)
	if d = l.until.Add(-lead).Sub(now); d > 0 {
		return min(d, renewLook), false
	}
	return min(max(lead/16, time.Second), renewPause), true
}

// watchCredential has the credential that the peer has seen renewed before it ends.
// Where none was shown none ever is by itself.
func (c *Channel) watchCredential(shown []byte) {
	if shown == nil || c.e.cfg.Credential == nil {
		return
	}
	l := lifetimeOf(shown)
	if c.life.Store(l); l == nil || c.hasEnded() {
		return
	}
	d, _ := l.wait(c.e.cfg.Clock())
	c.renewTimer.Reset(d)
}

// renew shows the peer a newer credential when one is due, and looks again later.
func (c *Channel) renew() {
	l := c.life.Load()
	if l == nil || c.hasEnded() {
		return
	}
	d, due := l.wait(c.e.cfg.Clock())
	c.renewTimer.Reset(d)
	if !due {
		return
	}
	credential, err := c.e.cfg.Credential()
	if err != nil {
		c.e.log.Warn("no newer credential to show", "peer", c.peerID, "until", l.until, "err", err)
		return
	}
	if next := lifetimeOf(credential); next == nil || !next.until.After(l.until) {
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, sendWait)
	defer cancel()
	if err := c.RefreshCredentials(ctx, credential); err != nil {
		c.e.log.Debug("credential not renewed", "peer", c.peerID, "err", err)
	}
}
