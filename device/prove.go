package device

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// provingDialer makes links on which the device has proved who it is. Where it
// does not know the hub yet it asks as a guest first: a proof is good for one hub
// alone, and the hub has to say which one it is. It is used by one goroutine.
type provingDialer struct {
	mqtt       *mqttDialer
	identity   *identity.Private
	credential func() ([]byte, error) // for the hub; may be nil
	hub        *hubIdentity           // what is known of the hub; the uplink's
	proxied    bool                   // TLS ends before the hub
	patience   time.Duration          // longest wait for the answer to hello
	limits     route.Limits
	log        *slog.Logger
	memory     *hubMemory

	plain   bool  // the hub is none of ours: there is nothing to prove
	noGuest error // perhaps it is, at other topics: the ErrInboxRefused of a guest
}

// dial implements linkDialer.
func (d *provingDialer) dial(ctx context.Context, ev linkEvents) (link, error) {
	if !d.plain && d.hub.expected().IsZero() {
		switch err := d.introduce(ctx); {
		case errors.Is(err, errNoHello):
			return d.unanswered(ctx, ev)
		case err != nil:
			return nil, err
		}
	}
	if d.plain {
		l, err := d.mqtt.dial(ctx, ev)
		if errors.Is(err, ErrHubRefused) && d.noGuest != nil {
			err = fmt.Errorf("%w; and a guest before: %w", err, d.noGuest)
		}
		return l, err
	}
	l, err := d.prove(ctx, ev)
	if !errors.Is(err, ErrBadCredentials) {
		return l, err
	}
	// Why? Perhaps the hub is another one, or one of the clocks is off.
	skew, gerr := d.compare(ctx)
	switch {
	case gerr != nil:
		return nil, gerr
	case skew.Abs() > clockSkew:
		return nil, &ClockError{Ahead: skew.Round(time.Second)}
	}
	// A hub that has just started and does not know which proofs were used takes
	// those made afterwards only, and times are whole seconds.
	timer := time.NewTimer(proofPause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l, err = d.prove(ctx, ev); errors.Is(err, ErrBadCredentials) {
		return nil, refused(fmt.Errorf("%w: if this identity's key was rotated by another program or on another machine, take the new key from there; "+
			"otherwise the hub's log has the reason", ErrBadProof))
	}
	return l, err
}

// unanswered makes a link to a broker that let a guest in and did not answer it. One
// that lets the device in without a proof is none of ours; another is perhaps busy with
// others' guests, and is asked again.
func (d *provingDialer) unanswered(ctx context.Context, ev linkEvents) (link, error) {
	l, err := d.mqtt.dial(ctx, ev)
	switch {
	case err == nil:
		d.plain = true
		d.log.Info("the hub does not answer guests, so it gets no proof of identity; taking it for a plain broker", "hub", d.mqtt.cfg.hub)
	case errors.Is(err, ErrHubRefused):
		// Its text alone: the refusal is not for good.
		return nil, fmt.Errorf("%w: it did not say in time which hub it is, and lets nobody in without a proof: %s", ErrHubAway, err.Error())
	}
	return l, err
}

// proving returns a dialer that proves this device's identity where it may: with
// neither user name nor password, and over TLS or on this machine.
func (n *Node) proving(u hubURL, plain *mqttDialer, memory *hubMemory, limits route.Limits) linkDialer {
	switch {
	case n.cfg.Username != "" || n.cfg.Password != "":
		return plain
	case !u.secure() && !u.loopback() && !n.cfg.InsecureProofWithoutTLS:
		n.log.Info("this device does not prove its identity to the hub: the connection has no TLS; "+
			"use mqtts:// or wss://, or Config.InsecureProofWithoutTLS", "hub", u.String())
		return plain
	}
	return &provingDialer{
		mqtt: plain, identity: n.cfg.Identity, credential: n.cfg.HubCredential, proxied: n.cfg.InsecureTLSProxy,
		patience: n.cfg.HelloTimeout, limits: limits, log: n.log, memory: memory,
	}
}

// proofPause is how long after a refused proof another one is made.
const proofPause = 1100 * time.Millisecond

// prove makes a link with a fresh proof.
func (d *provingDialer) prove(ctx context.Context, ev linkEvents) (link, error) {
	m := *d.mqtt
	var shown [][]byte
	m.cfg.login = func(_ context.Context, state *tls.ConnectionState) (user, password string, err error) {
		b := hubproto.ProofBinding{Hub: d.hub.expected(), ClientID: m.cfg.clientID}
		if state != nil && !d.proxied {
			if b.Exporter, err = state.ExportKeyingMaterial(exporterLabel, nil, exporterLen); err != nil {
				return "", "", err
			}
		}
		shown = nil
		if d.credential != nil {
			c, err := d.credential()
			if err != nil {
				return "", "", fmt.Errorf("the credential for the hub: %w", err)
			}
			if len(c) > 0 {
				shown = append(shown, c)
			}
		}
		proof, err := hubproto.MakeProof(d.identity, b, shown...)
		if err != nil {
			return "", "", err
		}
		return hubproto.ProofUser, string(proof), nil
	}
	l, err := m.dial(ctx, ev)
	if errors.Is(err, ErrNotAllowed) && len(shown) > 0 {
		if c, cerr := identity.InspectCredential(shown[0]); cerr == nil && time.Now().After(c.ExpiresAt) {
			err = refused(fmt.Errorf("%w: the credential for it ended at %s", ErrNotAllowed, c.ExpiresAt.UTC().Format(time.RFC3339)))
		}
	}
	return l, err
}

// introduce finds out which hub this is. A hub that lets no guest in, or does not
// prove who it is, is none of ours. errNoHello: it says nothing.
func (d *provingDialer) introduce(ctx context.Context) error {
	a, err := d.visit(ctx)
	switch {
	case errors.Is(err, ErrWrongHub):
		return permanent(d.memory.explain(err))
	case errors.Is(err, ErrHubRefused) && isPermanent(err):
		d.plain = true
		if errors.Is(err, ErrInboxRefused) {
			d.noGuest = err
		}
		d.log.Info("the hub takes no guests, so it gets no proof of identity; taking it for a plain broker", "hub", d.mqtt.cfg.hub, "err", err)
		return nil
	case errors.Is(err, errUnproven):
		d.plain = true
		d.log.Warn("the hub has not proved an identity, so it gets no proof of ours", "hub", d.mqtt.cfg.hub, "err", err)
		return nil
	case err != nil:
		return err
	}
	return d.hub.remember(d.memory, a)
}

// compare returns by how much this device's clock is ahead of the hub's.
func (d *provingDialer) compare(ctx context.Context) (time.Duration, error) {
	a, err := d.visit(ctx)
	switch {
	case errors.Is(err, ErrWrongHub):
		return 0, permanent(d.memory.explain(err))
	case err != nil:
		return 0, fmt.Errorf("%w; asking why as a guest: %w", ErrBadProof, err)
	}
	return d.identity.Now().Sub(a.Time), nil
}

var (
	errNoHello  = errors.New("device: no answer to hello")
	errUnproven = errors.New("device: the hub's answer to hello proves nothing")
)

// visit says hello as a guest, and returns the answer once the hub has proved who
// it is. What it proved is in d.hub.
func (d *provingDialer) visit(ctx context.Context) (*hubproto.HelloAnswer, error) {
	m := *d.mqtt
	m.cfg.clientID = hubproto.GuestName()
	m.cfg.login = func(context.Context, *tls.ConnectionState) (string, string, error) {
		return hubproto.GuestUser, "", nil
	}
	g := newGreeting()
	answered := make(chan *hubproto.HelloAnswer, 1)
	l, err := m.dial(ctx, linkEvents{
		acked: func(uint64) {},
		frames: func(payload []byte, _ bool, _ route.Class) {
			if a := d.answer(payload, &g); a != nil {
				select {
				case answered <- a:
				default:
				}
			}
		},
	})
	if err != nil {
		return nil, err
	}
	defer l.close(true)
	body, err := g.frame([hubproto.EpochLen]byte{}, false)
	if err != nil {
		return nil, err
	}
	if err := l.send(&packet{class: route.Stored, frames: [][]byte{body}, size: len(body)}); err != nil {
		return nil, err
	}
	timer := time.NewTimer(d.patience)
	defer timer.Stop()
	var a *hubproto.HelloAnswer
	select {
	case a = <-answered:
	case <-timer.C:
		return nil, errNoHello
	case <-l.done():
		return nil, fmt.Errorf("%w: it ended the connection before it answered hello: %w", ErrNoAnswer, l.err())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := d.hub.verify(&g, a, l.info().tls); errors.Is(err, ErrWrongHub) {
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnproven, err)
	}
	return a, nil
}

// answer returns the answer to hello in a message of the hub, if there is one.
func (d *provingDialer) answer(payload []byte, g *greeting) *hubproto.HelloAnswer {
	views, err := route.ParseBundle(payload, d.limits, nil)
	if err != nil {
		return nil
	}
	for i := range views {
		v := &views[i]
		if v.FirstHop().Transport != route.LocalTransport || string(v.FirstHop().Value) != g.address {
			continue
		}
		if from, ok := fromHub(v); !ok || from != helloService {
			continue
		}
		if a, err := hubproto.ParseHelloAnswer(v.Payload()); err == nil {
			return a
		}
	}
	return nil
}

// expected is who the hub has to be; zero: not known.
func (h *hubIdentity) expected() identity.Identifier {
	if h.known != nil {
		return h.known.Identifier()
	}
	return h.pin
}

var _ linkDialer = (*provingDialer)(nil)
