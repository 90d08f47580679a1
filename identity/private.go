package identity

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Private is an identity together with its secret keys. Make one with Create,
// Open or a Vault. It is safe for concurrent use. It never prints a secret, in
// no formatting verb, logger or encoder; what it prints is the identifier.
type Private struct{ p *private }

// private is behind a pointer so that no reflection over a parent struct
// reaches the keys.
type private struct {
	redacted
	clock func() time.Time
	id    Identifier

	mu      sync.Mutex
	state   *state        // immutable; replaced whole
	keeper  keeper        // nil: the keys live in memory only
	stamp   any           // what keeper compares to see a change
	opts    options       // external keys
	rotated chan struct{} // closed when the identity changes; nil until asked for
}

// state is everything that belongs to a private identity. It is immutable.
type state struct {
	redacted
	identity *Identity
	signer   Signer         // of the latest change
	secret   hidden         // 32 bytes
	channel  *ChannelKey    // nil until first asked for
	issuing  *credentialKey // nil until first asked for
}

// credentialKey is the purpose key that signs credentials.
type credentialKey struct {
	redacted
	signer  Signer
	att     attestation
	encoded []byte
}

// keeper stores states. Its methods are called with the identity's lock held.
type keeper interface {
	// refresh returns the stored state if it is another one than that of
	// stamp, else nil.
	refresh(stamp any) (*state, any, error)
	// update stores what change makes of the stored state; a nil result of
	// change stores nothing. It returns the state that is stored in the end.
	update(change func(*state) (*state, error)) (*state, any, error)
}

// Option changes how a private identity is made, opened or rotated.
type Option func(*options)

type options struct {
	clock     func() time.Time
	signer    Signer
	exchanger Exchanger
	validity  time.Duration
	revoke    bool
}

// WithClock makes the identity read the time from clock, for tests. It holds for
// Create, Open and a vault's Create, Load and Import.
func WithClock(clock func() time.Time) Option { return func(o *options) { o.clock = clock } }

// WithSigner gives the identity key, in place of a fresh Ed25519 key in memory.
// At Create and Rotate it becomes the new key; when loading, it is the key of
// the latest change, for an identity whose key lives in a device.
func WithSigner(s Signer) Option { return func(o *options) { o.signer = s } }

// WithExchanger gives the X25519 key for secure channels, in place of a fresh
// key in memory.
func WithExchanger(x Exchanger) Option { return func(o *options) { o.exchanger = x } }

// WithValidity says for how long the new key may attest, in place of
// KeyLifetime. It holds for Create and Rotate and is cut to whole seconds.
func WithValidity(d time.Duration) Option { return func(o *options) { o.validity = d } }

// WithRevokedPurposeKeys marks a rotation as revoking all purpose keys before
// it. (Every rotation makes them useless; the mark is for stricter peers. Spec
// identity 16.7.)
func WithRevokedPurposeKeys() Option { return func(o *options) { o.revoke = true } }

func collect(opts []Option) (options, error) {
	o := options{clock: time.Now, validity: KeyLifetime}
	for _, f := range opts {
		f(&o)
	}
	if o.clock == nil {
		return o, errors.New("identity: WithClock needs a function")
	}
	if o.validity < time.Second {
		return o, fmt.Errorf("identity: a key cannot be valid for %v: one second at least", o.validity)
	}
	return o, nil
}

// Create makes an identity with a fresh Ed25519 key (spec identity 8) that lives
// in memory only; a Vault's Create keeps it on disk.
func Create(opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	st, err := createState(&o)
	if err != nil {
		return nil, err
	}
	return newPrivate(st, &o, nil, nil), nil
}

func newPrivate(st *state, o *options, k keeper, stamp any) *Private {
	return &Private{&private{
		clock: o.clock, id: st.identity.Identifier(),
		state: st, keeper: k, stamp: stamp, opts: options{exchanger: o.exchanger},
	}}
}

func createState(o *options) (*state, error) {
	if o.signer == nil {
		o.signer = generateSigner()
	}
	from := wireTime(o.clock())
	until := addSeconds(from, uint64(o.validity/time.Second))
	id, err := makeChange(nil, nil, o.signer, from, until, o.revoke)
	if err != nil {
		return nil, err
	}
	st := &state{identity: id, signer: o.signer, secret: newSecret()}
	return st.withChannelKey(o, from)
}

// Open makes a private identity of a change history and the secret key of its
// latest change; any other key is refused with ErrWrongKey. Its other secrets
// are fresh: Secret answers differently than before. It lives in memory only.
func Open(history []byte, signer Signer, opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	id, err := Import(history)
	if err != nil {
		return nil, err
	}
	if signer == nil || !sameSigner(signer, id.PublicKey()) {
		return nil, ErrWrongKey
	}
	return newPrivate(&state{identity: id, signer: signer, secret: newSecret()}, &o, nil, nil), nil
}

func newSecret() hidden {
	b := randomBytes()
	return hide(b[:])
}

// Identifier returns the name that stays for life.
func (p *Private) Identifier() Identifier { return p.p.id }

// Now returns the time that the identity reads: what it signs is dated by it.
func (p *Private) Now() time.Time { return p.p.clock() }

// Identity returns the public identity as it is now; Rotate replaces it.
func (p *Private) Identity() *Identity {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	return p.p.state.identity
}

// Rotated returns a channel that is closed when the identity next has a new key:
// rotated here, or in another process once this one has seen it (Refresh). Ask for
// the channel before Identity, and no rotation is missed.
func (p *Private) Rotated() <-chan struct{} {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	if p.p.rotated == nil {
		p.p.rotated = make(chan struct{})
	}
	return p.p.rotated
}

// Refresh reads the identity again if another process has changed it on disk:
// rotated its key or renewed a purpose key. ChannelKey does so by itself, and
// goes on with what it has when that fails; Refresh returns the error.
func (p *Private) Refresh() error {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	return p.p.refresh()
}

func (p *private) refresh() error {
	if p.keeper == nil {
		return nil
	}
	st, stamp, err := p.keeper.refresh(p.stamp)
	if err != nil {
		return err
	}
	if st != nil {
		return p.adopt(st, stamp)
	}
	return nil
}

// adopt replaces the state by one that was read; it must go on from the present
// one.
func (p *private) adopt(st *state, stamp any) error {
	switch st.identity.Compare(p.state.identity) {
	case Equal, Newer:
		p.stamp = stamp
		p.replace(st)
		return nil
	case Older:
		return fmt.Errorf("%w: the stored identity has gone back", ErrOlder)
	}
	return fmt.Errorf("%w: the stored identity is another one", ErrConflict)
}

// update replaces the state by what change makes of the latest one, stored
// first where there is a store. change returns nil to leave things alone.
func (p *private) update(change func(*state) (*state, error)) error {
	if p.keeper == nil {
		st, err := change(p.state)
		if err == nil && st != nil {
			p.replace(st)
		}
		return err
	}
	st, stamp, err := p.keeper.update(change)
	if st == nil {
		return err
	}
	return cmp.Or(err, p.adopt(st, stamp))
}

// renew is update for purpose keys, which can be made anew at any time: where
// they cannot be stored, on a read-only disk say, they live in memory.
func (p *private) renew(change func(*state) (*state, error)) error {
	err := p.update(change)
	if err == nil || p.keeper == nil {
		return err
	}
	st, err := change(p.state)
	if err == nil && st != nil {
		p.replace(st)
	}
	return err
}

// replace installs the next state, and tells those who wait for a rotation.
func (p *private) replace(st *state) {
	rotated := st.identity.latest().hash != p.state.identity.latest().hash
	if p.state = st; rotated && p.rotated != nil {
		close(p.rotated)
		p.rotated = nil
	}
}

// Rotate gives the identity a new key: a fresh Ed25519 key, or that of
// WithSigner. The identifier stays. Peers that have seen the new history refuse
// the old one from then on, attestations and credentials made with the old key
// are refused everywhere, and the old secret is forgotten. With a vault, the
// new state is on disk when Rotate returns nil, and a crash leaves the old or
// the new one. Channels that are up stay up.
func (p *Private) Rotate(opts ...Option) error {
	o, err := collect(opts)
	if err != nil {
		return err
	}
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	if o.exchanger == nil {
		o.exchanger = p.p.opts.exchanger
	}
	if o.signer == nil {
		o.signer = generateSigner()
	}
	err = p.p.update(func(st *state) (*state, error) {
		from := max(wireTime(p.p.clock()), st.identity.latest().from)
		until := addSeconds(from, uint64(o.validity/time.Second))
		id, err := makeChange(st.identity, st.signer, o.signer, from, until, o.revoke)
		if err != nil {
			return nil, err
		}
		next := &state{identity: id, signer: o.signer, secret: st.secret}
		return next.withChannelKey(&o, from)
	})
	if err == nil {
		p.p.opts.exchanger = o.exchanger
	}
	return err
}

// attestable returns the validity of a new attestation made at now: inside that
// of the identity key (spec identity 10.3, rules 5 and 6).
func (st *state) attestable(now uint64, lifetime time.Duration) (created, expires uint64, err error) {
	latest := st.identity.latest()
	created = max(now, latest.from)
	expires = min(addSeconds(created, uint64(lifetime/time.Second)), latest.until)
	if expires < now {
		return 0, 0, fmt.Errorf("%w: it could attest until %v", ErrKeyExpired, rfc3339(latest.until))
	}
	return created, expires, nil
}

// renewBefore is how long before its end a purpose key is renewed, where the
// identity key allows a later end.
const renewBefore = 30 * 24 * time.Hour

// stale reports whether an attestation made now would serve better than a.
func (st *state) stale(a *attestation, now uint64, need time.Duration) bool {
	latest := st.identity.latest()
	if a.change != latest.hash {
		return true
	}
	if a.created > addSeconds(now, uint64(ClockTolerance/time.Second)) && a.created > latest.from {
		return true // made while the clock was ahead: peers refuse it
	}
	return a.expires < addSeconds(now, uint64(need/time.Second)) && a.expires < latest.until
}

// withChannelKey returns the state with a newly attested channel key: the given
// exchanger's, or a fresh one.
func (st *state) withChannelKey(o *options, now uint64) (*state, error) {
	x := o.exchanger
	if x == nil {
		fresh, err := generateExchanger()
		if err != nil {
			return nil, err
		}
		x = fresh
	}
	a := attestation{purpose: purposeChannel, channelKey: x.PublicKey()}
	var err error
	if a.created, a.expires, err = st.attestable(now, PurposeKeyLifetime); err != nil {
		return nil, err
	}
	encoded, err := a.make(st.identity, st.signer)
	if err != nil {
		return nil, err
	}
	next := *st
	next.channel = &ChannelKey{newChannelKey(st.identity, x, a, encoded)}
	return &next, nil
}

// ChannelKey returns the X25519 key for secure channels with its attestation.
// The same pointer comes back until the key changes: after a rotation, here or
// in another process, and thirty days before it expires. Each handshake asks
// again.
func (p *Private) ChannelKey() (*ChannelKey, error) {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	_ = p.p.refresh() // the keys at hand are good until their attestation ends
	now := wireTime(p.p.clock())
	if !p.p.state.canOpen(now) {
		err := p.p.renewChannelKey(now)
		// A key that could not be renewed in time may still be valid.
		if err != nil && (p.p.state.channel == nil || p.p.state.channel.k.att.expires < now) {
			return nil, err
		}
	}
	k := p.p.state.channel
	if k.k.att.expires < now {
		return nil, ErrKeyExpired
	}
	return k, nil
}

// canOpen reports whether the channel key at hand is good for new channels.
func (st *state) canOpen(now uint64) bool {
	return st.channel != nil && !st.stale(&st.channel.k.att, now, renewBefore)
}

func (p *private) renewChannelKey(now uint64) error {
	return p.renew(func(st *state) (*state, error) {
		if st.canOpen(now) {
			return nil, nil // another process was faster
		}
		return st.withChannelKey(&p.opts, now)
	})
}

// canIssue is canOpen for credentials that live for ttl.
func (st *state) canIssue(now uint64, ttl time.Duration) bool {
	return st.issuing != nil && !st.stale(&st.issuing.att, now, ttl)
}

func (p *private) renewCredentialKey(now uint64, ttl time.Duration) error {
	return p.renew(func(st *state) (*state, error) {
		if st.canIssue(now, ttl) {
			return nil, nil
		}
		return st.withCredentialKey(now, ttl)
	})
}

// withCredentialKey returns the state with a fresh purpose key for credentials
// that live for ttl.
func (st *state) withCredentialKey(now uint64, ttl time.Duration) (*state, error) {
	s := generateSigner()
	a := attestation{purpose: purposeCredentials, signingKey: s.pub}
	var err error
	if a.created, a.expires, err = st.attestable(now, max(PurposeKeyLifetime, ttl)); err != nil {
		return nil, err
	}
	encoded, err := a.make(st.identity, st.signer)
	if err != nil {
		return nil, err
	}
	next := *st
	next.issuing = &credentialKey{signer: s, att: a, encoded: encoded}
	return &next, nil
}

// IssueCredential says, as an authority, that subject has the attributes, for
// ttl from now (cut to whole seconds), and returns the encoded credential with
// the attestation that verifiers need (CredentialAndPurposeKey). It works
// offline. The purpose key that signs is renewed when it has less left than
// ttl; ErrKeyExpired means that the identity key itself has. Rotating the
// authority ends all credentials that it has issued.
func (p *Private) IssueCredential(subject *Identity, attributes map[string]string, schema uint64, ttl time.Duration) ([]byte, error) {
	if reservedSchema(schema) {
		return nil, fmt.Errorf("identity: issuing: %w (%#x)", ErrReservedSchema, schema)
	}
	return p.issue(subject, attributes, schema, ttl)
}

// IssueConnectProof issues a credential about the identity itself, with schema
// SchemaConnectProof: the proof that a device shows to a hub at CONNECT. The
// attributes bind it to one hub, client id and connection.
func (p *Private) IssueConnectProof(attributes map[string]string, ttl time.Duration) ([]byte, error) {
	return p.issue(nil, attributes, SchemaConnectProof, ttl)
}

// issue issues to subject, or to the identity itself when that is nil.
func (p *Private) issue(subject *Identity, attributes map[string]string, schema uint64, ttl time.Duration) ([]byte, error) {
	if ttl < time.Second {
		return nil, fmt.Errorf("identity: issuing: a credential cannot be valid for %v: one second at least", ttl)
	}
	if len(attributes) > MaxAttributes {
		return nil, fmt.Errorf("identity: issuing: %w: %d attributes at most", ErrTooLarge, MaxAttributes)
	}
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	_ = p.p.refresh() // as in ChannelKey
	now := wireTime(p.p.clock())
	if !p.p.state.canIssue(now, ttl) {
		if err := p.p.renewCredentialKey(now, ttl); err != nil {
			return nil, err
		}
	}
	st := p.p.state
	key := st.issuing
	if subject == nil {
		subject = st.identity
	}
	created := max(now, key.att.created)
	expires := addSeconds(created, uint64(ttl/time.Second))
	if expires > key.att.expires {
		return nil, fmt.Errorf("%w: no credential can outlive %v", ErrKeyExpired, rfc3339(key.att.expires))
	}
	d := credentialData{
		subject: subject.Identifier(), hasSubject: true,
		change: subject.LatestChange(), hasChange: true,
		schema: schema, attributes: attributes, created: created, expires: expires,
	}
	out, err := d.make(key)
	if err == nil && len(out) > MaxCredential {
		return nil, fmt.Errorf("identity: issuing: %w: %d bytes at most", ErrTooLarge, MaxCredential)
	}
	return out, err
}

// Secret derives a secret from the 32 random bytes that are kept with the
// identity: HMAC-SHA256 of label. It is the same in every process that opens
// the identity, survives rotation, and says nothing about other labels.
func (p *Private) Secret(label string) [32]byte {
	p.p.mu.Lock()
	secret := p.p.state.secret
	p.p.mu.Unlock()
	m := hmac.New(sha256.New, secret())
	m.Write([]byte(label))
	return [32]byte(m.Sum(nil))
}

// Format implements fmt.Formatter: the identifier, for every verb.
func (p Private) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(p.String())) }

// String returns "identity.Private{I…}".
func (p Private) String() string {
	if p.p == nil {
		return "identity.Private{}"
	}
	return "identity.Private{" + p.p.id.String() + "}"
}

// GoString implements fmt.GoStringer.
func (p Private) GoString() string { return p.String() }

// LogValue implements slog.LogValuer: the identifier.
func (p Private) LogValue() slog.Value { return slog.StringValue(p.String()) }

// Format implements fmt.Formatter: the public key, for every verb.
func (c ChannelKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(c.String())) }

// String returns "identity.ChannelKey{…}" with the public key.
func (c ChannelKey) String() string {
	if c.k == nil {
		return "identity.ChannelKey{}"
	}
	return fmt.Sprintf("identity.ChannelKey{%x}", c.k.att.channelKey)
}

// GoString implements fmt.GoStringer.
func (c ChannelKey) GoString() string { return c.String() }

// LogValue implements slog.LogValuer: the public key.
func (c ChannelKey) LogValue() slog.Value { return slog.StringValue(c.String()) }
