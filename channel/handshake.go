package channel

import (
	"errors"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// maxTries is how many messages 2, or messages 3 that begin like the genuine
// one, a handshake looks at before it gives up.
const maxTries = 4

// Phase is where a handshake stands. Every step checks it first.
type Phase uint8

// Phases. Complete and Dead are final.
const (
	PhaseStart      Phase = iota + 1 // initiator: message 1 not made yet
	PhaseAwaitFirst                  // responder: waits for message 1
	PhaseAwaitReply                  // initiator: waits for message 2
	PhaseAwaitFinal                  // responder: waits for message 3
	PhaseComplete                    // keys are there
	PhaseDead                        // failed
)

// String says what the phase is, as the end of a sentence.
func (p Phase) String() string {
	switch p {
	case PhaseStart:
		return "has not started"
	case PhaseAwaitFirst:
		return "waits for message 1"
	case PhaseAwaitReply:
		return "waits for message 2"
	case PhaseAwaitFinal:
		return "waits for message 3"
	case PhaseComplete:
		return "is complete"
	case PhaseDead:
		return "has failed"
	default:
		return fmt.Sprintf("is in phase %d", uint8(p))
	}
}

// HandshakeConfig is what one side of a handshake needs.
type HandshakeConfig struct {
	// Identity is who we are.
	Identity *identity.Private
	// Registry holds the histories of peers seen before.
	Registry identity.Registry
	// Policy decides about the peer. There is no default.
	Policy Policy
	// Authorities are those whose credentials of the peer are accepted, beside
	// the policy's own.
	Authorities []*identity.Identity
	// Credential is our own credential, shown to the peer; nil shows none.
	Credential []byte
	// Clock tells the time for validity checks; nil means time.Now.
	Clock func() time.Time
}

// Result is what a complete handshake yields.
type Result struct {
	Peer   Peer
	Sealer *Sealer
	Opener *Opener
}

// local is our own side of a handshake.
type local struct {
	static  keyPair
	payload []byte // IdentityAndCredentials
	shown   []byte // the credential in it, if any
}

// Handshake is one side of one key exchange (spec secure-channel 3, 4 and 7). It
// works on bytes alone; carrying them is the caller's business. It is not safe
// for concurrent use.
//
// A message that does not verify leaves the handshake as it was, so that the
// genuine one can still come: at most four messages 2 are tried, and at most
// four messages 3 that cost a Diffie-Hellman. What ends a handshake at once is
// our own policy's refusal, and at the responder a message 3 that is certainly
// from the peer of message 1 but does not prove an identity.
type Handshake struct {
	phase Phase
	x     xx
	e     keyPair
	own   local
	check func(payload []byte, static [keyLen]byte) (Peer, error)

	ephemeral func() (keyPair, error)
	tries     int
	lastTry   error // the last message that did not verify
	err       error // why it is dead
	refusal   []byte
	result    Result
}

func newHandshake(cfg HandshakeConfig, start Phase) (*Handshake, error) {
	switch {
	case cfg.Identity == nil:
		return nil, errors.New("channel: handshake: no identity given")
	case cfg.Registry == nil:
		return nil, errors.New("channel: handshake: no registry given")
	case cfg.Policy == nil:
		return nil, errNoPolicy
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	own, err := localSide(cfg.Identity, cfg.Credential)
	if err != nil {
		return nil, err
	}
	v := newVerifier(cfg.Registry, cfg.Policy, cfg.Authorities, cfg.Clock)
	return startHandshake(start, own, v.check, newEphemeral), nil
}

func newVerifier(r identity.Registry, p Policy, authorities []*identity.Identity, now func() time.Time) *verifier {
	all := append([]*identity.Identity(nil), authorities...)
	return &verifier{registry: r, policy: p, authorities: append(all, authoritiesOf([]Policy{p})...), now: now}
}

func startHandshake(start Phase, own local, check func([]byte, [keyLen]byte) (Peer, error),
	ephemeral func() (keyPair, error),
) *Handshake {
	return &Handshake{phase: start, x: newXX(), own: own, check: check, ephemeral: ephemeral}
}

// localSide builds what we show: our full history, the attestation of the
// handshake key, and a credential where there is one.
func localSide(id *identity.Private, credential []byte) (local, error) {
	key, err := id.ChannelKey()
	if err != nil {
		return local{}, fmt.Errorf("channel: own handshake key: %w", err)
	}
	var credentials [][]byte
	if credential != nil {
		credentials = [][]byte{credential}
	}
	payload := key.AppendPresentation(nil, credentials...)
	if len(payload)+message2Min > MaxHandshakeMessage {
		return local{}, fmt.Errorf("channel: own identity and credential take %d bytes, more than a handshake message holds", len(payload))
	}
	return local{static: key, payload: payload, shown: credential}, nil
}

// NewInitiator starts the side that dials.
func NewInitiator(cfg HandshakeConfig) (*Handshake, error) { return newHandshake(cfg, PhaseStart) }

// NewResponder starts the side that is dialled.
func NewResponder(cfg HandshakeConfig) (*Handshake, error) {
	return newHandshake(cfg, PhaseAwaitFirst)
}

// Phase returns where the handshake stands.
func (h *Handshake) Phase() Phase { return h.phase }

// Err returns why the handshake is dead; nil while it is not.
func (h *Handshake) Err() error { return h.err }

func (h *Handshake) need(p Phase, step string) error {
	switch {
	case h.phase == PhaseDead:
		return h.err
	case h.phase != p:
		return &PhaseError{In: h.phase, Step: step}
	}
	return nil
}

// kill ends the handshake and drops its secrets.
func (h *Handshake) kill(err error) error {
	h.phase, h.err = PhaseDead, err
	h.x, h.e = xx{}, nil
	return err
}

// tried counts a message that did not verify; the last try ends the handshake.
func (h *Handshake) tried(err error) error {
	h.lastTry = err
	if h.tries++; h.tries >= maxTries {
		return h.kill(err)
	}
	return err
}

// Start makes message 1. Only the initiator calls it, once.
func (h *Handshake) Start() ([]byte, error) {
	if err := h.need(PhaseStart, "making message 1"); err != nil {
		return nil, err
	}
	e, err := h.ephemeral()
	if err != nil {
		return nil, h.kill(err)
	}
	x, msg, err := h.x.write1(e, nil)
	if err != nil {
		return nil, h.kill(&MessageError{1, err})
	}
	h.x, h.e, h.phase = x, e, PhaseAwaitReply
	return msg, nil
}

// ReadFirst takes message 1 and makes message 2. Only the responder calls it. A
// message that cannot be one leaves the handshake waiting.
func (h *Handshake) ReadFirst(msg1 []byte) (msg2 []byte, err error) {
	if err := h.need(PhaseAwaitFirst, "reading message 1"); err != nil {
		return nil, err
	}
	x, _, err := h.x.read1(msg1)
	if err != nil {
		return nil, &MessageError{1, err}
	}
	e, err := h.ephemeral()
	if err != nil {
		return nil, h.kill(err)
	}
	x, msg2, err = x.write2(e, h.own.static, h.own.payload)
	if err != nil {
		return nil, &MessageError{1, err}
	}
	h.x, h.e, h.phase = x, e, PhaseAwaitFinal
	return msg2, nil
}

// ReadReply takes message 2 and makes message 3; the handshake is then complete.
// Only the initiator calls it.
func (h *Handshake) ReadReply(msg2 []byte) (msg3 []byte, err error) {
	if err := h.need(PhaseAwaitReply, "reading message 2"); err != nil {
		return nil, err
	}
	x, payload, err := h.x.read2(h.e, msg2)
	switch {
	case errors.Is(err, errShort), errors.Is(err, errLong):
		return nil, &MessageError{2, err} // cheap to find out, so not counted
	case err != nil:
		return nil, h.tried(&MessageError{2, err})
	}
	peer, err := h.check(payload, x.rs)
	if err != nil {
		return nil, h.notProved(2, peer, err)
	}
	x, msg3, err = x.write3(h.own.static, h.own.payload)
	if err != nil {
		return nil, h.tried(&MessageError{2, err})
	}
	opens, seals := x.split()
	h.complete(peer, seals, opens)
	return msg3, nil
}

// ReadFinal takes message 3; the handshake is then complete. Only the responder
// calls it. When it refuses the peer, Refusal has what tells the peer so.
func (h *Handshake) ReadFinal(msg3 []byte) error {
	if err := h.need(PhaseAwaitFinal, "reading message 3"); err != nil {
		return err
	}
	x, payload, err := h.x.read3(h.e, msg3)
	switch {
	case errors.Is(err, errNotPeer):
		return &MessageError{3, err} // cheap to find out, so not counted
	case err != nil:
		return h.tried(&MessageError{3, err})
	}
	seals, opens := x.split()
	peer, err := h.check(payload, x.rs)
	if err != nil {
		h.refusal, _ = NewSealer(seals).Seal(nil, closePlaintext)
		var refused *refusedError
		if !errors.As(err, &refused) {
			return h.kill(&MessageError{3, err})
		}
		return h.notProved(3, peer, err)
	}
	h.complete(peer, seals, opens)
	return nil
}

// notProved ends a handshake that our policy refused, or could not judge; anything else may have
// been a forgery and leaves it waiting.
func (h *Handshake) notProved(message int, peer Peer, err error) error {
	var refused *refusedError
	switch {
	case !errors.As(err, &refused):
		return h.tried(&MessageError{message, err})
	case errors.Is(refused.err, ErrUndecided):
		return h.kill(fmt.Errorf("channel: the trust policy cannot decide about %v: %w", peer.Identifier, refused.err))
	}
	return h.kill(fmt.Errorf("%w: %v: %w", ErrWrongIdentity, peer.Identifier, refused.err))
}

func (h *Handshake) complete(peer Peer, seals, opens [keyLen]byte) {
	h.result = Result{Peer: peer, Sealer: NewSealer(seals), Opener: NewOpener(opens)}
	h.phase, h.x, h.e = PhaseComplete, xx{}, nil
}

// Result returns the peer and the two directions once the handshake is complete.
// They are the caller's from then on.
func (h *Handshake) Result() (Result, error) {
	if err := h.need(PhaseComplete, "asking for the result"); err != nil {
		return Result{}, err
	}
	return h.result, nil
}

// Refusal returns a transport frame that closes the channel, for the peer that
// ReadFinal has just refused; nil when there is none. A stock responder sends
// nothing; an initiator of either kind understands it.
func (h *Handshake) Refusal() []byte { return h.refusal }
