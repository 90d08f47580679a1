package device

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// helloService is where a hub answers hello, and the return route of its answer.
const helloService = "hello"

// exporterLabel and exporterLen are those of the channel binding (RFC 9266).
const (
	exporterLabel = "EXPORTER-Channel-Binding"
	exporterLen   = 32
)

// clockSkew is how far this device's clock may be from the hub's before that is
// worth a warning: attestations are refused at 60 s (spec identity 10.3).
const clockSkew = 30 * time.Second

// randomAddress is a local address that nobody can guess: 32 hex digits.
func randomAddress() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// hubIdentity is what a node knows of its hub.
type hubIdentity struct {
	pin     identity.Identifier // zero: take whoever proves an identity first; see remember
	proxied bool                // TLS ends before the hub
	known   *identity.Identity  // proved; nil before
	seen    identity.Registry   // so that no hub shows a key that was rotated away; may be nil
	epoch   [hubproto.EpochLen]byte
	// passing says that known's identity ends with its process, as it said itself each
	// time, so that without a pin another one is as good after that (ADR 11). That is not
	// signed, so it is never believed of a hub that has not said so before.
	passing bool
	log     *slog.Logger // may be nil
}

// greeting is one hello in progress.
type greeting struct {
	address string // where the answer is to arrive
	nonce   [hubproto.NonceLen]byte
}

func newGreeting() greeting {
	g := greeting{address: randomAddress()}
	_, _ = rand.Read(g.nonce[:])
	return g
}

// frame returns the encoded hello.
func (g *greeting) frame(epoch [hubproto.EpochLen]byte, fresh bool) ([]byte, error) {
	req := hubproto.HelloRequest{Epoch: epoch, Fresh: fresh, Nonce: g.nonce}
	body, err := req.Marshal()
	if err != nil {
		return nil, err
	}
	f := route.Frame{Onward: route.To(helloService), Return: route.To(g.address), Payload: body}
	return route.AppendFrame(nil, &f), nil
}

// verify checks who signed the answer. A hub that proves no identity passes
// unless one is expected; one that proves another than expected does only after one
// that said that its identity ends with its process, and never where there is a pin.
func (h *hubIdentity) verify(g *greeting, a *hubproto.HelloAnswer, state *tls.ConnectionState) error {
	expected := h.pin
	if h.known != nil {
		expected = h.known.Identifier()
	}
	who, err := h.prove(g, a, state)
	switch {
	case err == nil && !expected.IsZero() && who.Identifier() != expected && !(h.passing && h.pin.IsZero()):
		return &HubMismatchError{Pinned: expected, Got: who.Identifier()}
	case err == nil:
		if !expected.IsZero() && who.Identifier() != expected && h.log != nil {
			h.log.Warn("the hub has a new identity: it keeps none over a restart; run it with a data folder, or pin it",
				"old", expected, "new", who.Identifier())
		}
		passing := a.Features&hubproto.FeatureEphemeral != 0
		if h.seen != nil {
			if err := h.seen.Update(who); errors.Is(err, identity.ErrOlder) || errors.Is(err, identity.ErrConflict) {
				return fmt.Errorf("%w: %w", ErrWrongHub, err)
			}
		}
		h.passing = passing && (h.passing || h.known == nil || h.known.Identifier() != who.Identifier())
		h.known = who
		return nil
	case !expected.IsZero():
		return fmt.Errorf("%w: it claims to be %v but its proof is bad: %w", ErrWrongHub, a.Hub, err)
	default:
		return err
	}
}

// remember has the memory of hubs hold one that has just proved its identity, and this
// node to it from now on. Of a hub that it is held to the registry forgets no rotation
// for the sake of strangers.
func (h *hubIdentity) remember(m *hubMemory, a *hubproto.HelloAnswer) error {
	if err := m.proved(a); err != nil {
		return err
	}
	if m != nil && m.kept && h.pin.IsZero() {
		h.pin = a.Hub
	}
	if k, ok := h.seen.(identity.Keeper); ok && !h.pin.IsZero() {
		if err := k.Keep(h.pin); err != nil && h.log != nil {
			h.log.Warn("cannot remember the hub's keys", "hub", h.pin, "err", err)
		}
	}
	return nil
}

var errNoHistory = errors.New("it sent no change history")

// prove returns the identity that signed the answer over our nonce, the hub's
// time and this TLS connection.
func (h *hubIdentity) prove(g *greeting, a *hubproto.HelloAnswer, state *tls.ConnectionState) (*identity.Identity, error) {
	who := h.known
	switch {
	case len(a.History) > 0:
		var err error
		if who, err = identity.ImportAs(a.Hub, a.History); err != nil {
			return nil, err
		}
		if h.known != nil && h.known.Identifier() == a.Hub {
			if c := who.Compare(h.known); c != identity.Equal && c != identity.Newer {
				return nil, fmt.Errorf("its change history is %v than the one it showed before", c)
			}
		}
	case who == nil || who.Identifier() != a.Hub:
		return nil, errNoHistory
	}
	var exporter []byte
	if state != nil && !h.proxied {
		var err error
		if exporter, err = state.ExportKeyingMaterial(exporterLabel, nil, exporterLen); err != nil {
			return nil, err
		}
	}
	if err := who.Verify(hubproto.HelloContext, hubproto.HelloSigned(g.nonce, a.Time, exporter), a.Signature); err != nil {
		return nil, err
	}
	return who, nil
}
