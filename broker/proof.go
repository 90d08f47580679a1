package broker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/hubproto"
)

// deviceRegistry is the folder in a data folder that remembers devices' rotated
// keys.
const deviceRegistry = "devices"

// proofResult says how a proof at CONNECT ended, for log and counters.
type proofResult int

const (
	proofOK         proofResult = iota // admitted
	proofMalformed                     // not the bytes of a proof
	proofCleartext                     // neither TLS nor the loopback interface
	proofAudience                      // made for another hub
	proofClientID                      // made for another client id
	proofExporter                      // made for another connection
	proofExpired                       // too old, or the device's clock is behind
	proofFuture                        // made in the future: the device's clock is ahead
	proofUsed                          // used before
	proofUnknownUse                    // of a time that the hub cannot know the use of: before its start, or its clock was set back
	proofRotated                       // signed with a key since rotated away
	proofForked                        // the history contradicts the known one
	proofBad                           // anything else about history, credential or signature
	proofNotAllowed                    // the identity may not connect here
	proofBusy                          // too many at once

	numProofs
)

var proofNames = [numProofs]string{
	"ok", "malformed", "cleartext", "wrong-hub", "wrong-client-id", "wrong-connection", "expired", "from-future", "used",
	"before-start", "rotated", "forked", "bad", "not-allowed", "busy",
}

func (r proofResult) String() string { return proofNames[r] }

// proofReasons are what MQTT 5 clients are told.
var proofReasons = [numProofs]string{
	proofMalformed:  "the proof is malformed",
	proofCleartext:  "a proof needs TLS here",
	proofAudience:   "the proof is for another hub",
	proofClientID:   "the proof is for another client id",
	proofExporter:   "the proof is for another connection",
	proofExpired:    "the proof has expired: check the clock",
	proofFuture:     "the proof was made in the future: check the clock",
	proofUsed:       "the proof has been used",
	proofUnknownUse: "the proof was made before this hub started, or its clock was set back: make a new one",
	proofRotated:    "the identity's key has been rotated away",
	proofForked:     "the change history contradicts the known one",
	proofBad:        "the proof does not verify",
	proofNotAllowed: "this identity may not connect",
	proofBusy:       "too many logins at once, try again",
}

var (
	errCleartext   = errors.New("broker: a proof came without TLS from another machine")
	errNoBinding   = errors.New("broker: the TLS connection has no exporter value (RFC 9266); use TLS 1.3")
	errProofFailed = errors.New("broker: proof refused")
)

// resultOfProof classifies why a proof was refused.
func resultOfProof(err error) proofResult {
	for _, c := range [...]struct {
		is error
		r  proofResult
	}{
		{errCleartext, proofCleartext},
		{errUsed, proofUsed}, {errBeforeStart, proofUnknownUse}, {errForgotten, proofUnknownUse},
		{errUsedFull, proofBusy}, {errUnrecorded, proofBusy}, {ErrLoginBusy, proofBusy},
		{errNotListed, proofNotAllowed}, {errNoCredential, proofNotAllowed},
		{hubproto.ErrAudience, proofAudience}, {hubproto.ErrProofClientID, proofClientID},
		{hubproto.ErrExporter, proofExporter}, {errNoBinding, proofExporter},
		{hubproto.ErrMalformed, proofMalformed}, {hubproto.ErrTooLarge, proofMalformed}, {hubproto.ErrVersion, proofMalformed},
		{identity.ErrOlder, proofRotated}, {identity.ErrConflict, proofForked},
		{identity.ErrRegistryFull, proofBusy},
		{identity.ErrExpired, proofExpired}, {identity.ErrFromFuture, proofFuture},
	} {
		if errors.Is(err, c.is) {
			return c.r
		}
	}
	return proofBad
}

// refusalOf is the answer to a refused proof.
func refusalOf(r proofResult, err error) error {
	code := mochibridge.BadCredentials
	switch r {
	case proofCleartext, proofNotAllowed:
		code = mochibridge.NotAllowed
	case proofBusy:
		code = mochibridge.Full
	}
	return &mochibridge.Refusal{Code: code, Reason: proofReasons[r], Err: fmt.Errorf("%w (%v): %w", errProofFailed, r, err)}
}

// registry remembers the devices' identities.
type registry interface {
	identity.Importer
	identity.Keeper
	Prefer(func(identity.Identifier) bool)
}

// verifier checks the proofs that devices show at CONNECT. It is safe for
// concurrent use.
type verifier struct {
	hub        identity.Identifier
	cleartext  bool // Config.InsecurePlaintext
	everywhere bool // Config.MQTTOpen
	skew       time.Duration
	registry   registry
	used       *usedProofs
	now        func() time.Time
	policy     atomic.Pointer[devicePolicy]
	turns      *turnstile
	counts     [numProofs]atomic.Uint64
}

// newVerifier opens what the hub remembers of devices. born says that the hub's
// identity is new, so that no earlier proof can be for it.
func newVerifier(cfg *Config, hub identity.Identifier, born bool, p *devicePolicy, logger *slog.Logger) (*verifier, error) {
	v := &verifier{
		hub: hub, cleartext: cfg.InsecurePlaintext, everywhere: cfg.MQTTOpen, skew: cfg.Devices.clockSkew(), now: time.Now,
		turns: newTurnstile(cmp.Or(cfg.Limits.LoginsWaiting, loginsWaiting)),
	}
	v.policy.Store(p)
	if cfg.Data == "" {
		v.registry = identity.NewMemoryRegistry(0)
	} else {
		r, err := identity.OpenRegistry(filepath.Join(cfg.Data, deviceRegistry), 0)
		if err != nil {
			return nil, fmt.Errorf("broker: registry of devices: %w", err)
		}
		v.registry = r
	}
	var err error
	if v.used, err = openUsed(cfg.Data, v.now(), logger); err != nil {
		return nil, err
	}
	if born {
		v.used.since = 0
	}
	return v, nil
}

// login checks the proof of one CONNECT and returns whose it is and why it was let in. It blocks while
// others are being checked, until ctx ends.
func (v *verifier) login(ctx context.Context, c *mochibridge.ConnectInfo) (identity.Identifier, *grant, error) {
	id, g, err := v.check(ctx, c)
	if err != nil {
		r := resultOfProof(err)
		v.counts[r].Add(1)
		return identity.Identifier{}, nil, refusalOf(r, err)
	}
	v.counts[proofOK].Add(1)
	return id, g, nil
}

func (v *verifier) check(ctx context.Context, c *mochibridge.ConnectInfo) (identity.Identifier, *grant, error) {
	var none identity.Identifier
	want := hubproto.ProofBinding{Hub: v.hub, ClientID: c.ClientID, Exporter: c.Exporter()}
	switch {
	case c.TLS == nil && !v.cleartext && !fromLoopback(c.RemoteAddr):
		return none, nil, errCleartext
	case c.TLS != nil && len(want.Exporter) == 0:
		return none, nil, errNoBinding
	}
	// What costs nothing comes before what costs signatures.
	proof, err := hubproto.ParseProof(c.Password)
	if err != nil {
		return none, nil, err
	}
	claimed, err := proof.Check(want)
	if err != nil {
		return none, nil, err
	}
	done, err := v.turns.enter(ctx, c.RemoteAddr, claimed.String())
	if err != nil {
		return none, nil, err
	}
	defer done()
	open := v.everywhere || fromLoopback(c.RemoteAddr)
	id, err := v.verify(claimed, proof, want, open, connlimit.Network(c.RemoteAddr))
	g := &grant{proven: true, open: open}
	for _, raw := range proof.Credentials { // they lie in the packet
		g.credentials = append(g.credentials, bytes.Clone(raw))
	}
	return id, g, err
}

// verify does what takes signatures. open says that anybody may connect from
// where the device is, unless something else is configured.
func (v *verifier) verify(claimed identity.Identifier, proof *hubproto.Proof, want hubproto.ProofBinding, open bool, from netip.Prefix) (identity.Identifier, error) {
	var none identity.Identifier
	who, err := v.registry.Import(proof.History)
	if err != nil {
		return none, err
	}
	if who.Identifier() != claimed {
		return none, identity.ErrWrongIdentifier
	}
	if known, ok := v.registry.Get(claimed); ok {
		switch who.Compare(known) {
		case identity.Older:
			return none, identity.ErrOlder
		case identity.Conflict:
			return none, identity.ErrConflict
		}
	}
	now := v.now()
	facts, err := proof.Verify(who, want, now, v.skew)
	if err != nil {
		return none, err
	}
	// From here on the peer is who it says.
	named, err := v.policy.Load().admits(claimed, proof.Credentials, open, now)
	if err != nil {
		return none, err
	}
	if len(want.Exporter) == 0 { // else it is good on this connection alone
		if err := v.used.use(claimed, from, facts, facts.ExpiresAt.Add(v.skew+time.Second), now); err != nil {
			return none, err
		}
	}
	if err := v.registry.Update(who); err != nil {
		return none, err
	}
	if named {
		if err := v.registry.Keep(claimed); err != nil {
			return none, err
		}
	}
	return claimed, nil
}

func (v *verifier) close() error { return v.used.close() }

// fromLoopback reports whether a peer is on this machine. Behind a reverse proxy
// everybody is.
func fromLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// deviceLogin lets a device in by its proof.
func (h *Hub) deviceLogin(c mochibridge.ConnectInfo) (bridge.Principal, error) {
	ctx, cancel := context.WithTimeout(context.Background(), loginTimeout)
	defer cancel()
	id, g, err := h.proofs.login(ctx, &c)
	if err != nil {
		return bridge.Principal{}, err
	}
	return bridge.Principal{ClientID: c.ClientID, Role: bridge.RoleDevice, Identity: id, Proven: true, Grant: g}, nil
}

// guestLogin lets anybody in who wants to know which hub this is. The client id
// says nothing, so that no guest can take anybody's place.
func guestLogin(c mochibridge.ConnectInfo) (bridge.Principal, error) {
	switch {
	case !hubproto.IsGuestName(c.ClientID):
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a guest's client id is guest- and 32 hex digits"}
	case c.Will != nil:
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a guest has no will"}
	}
	return bridge.Principal{ClientID: c.ClientID, Role: bridge.RoleGuest}, nil
}
