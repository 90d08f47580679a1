package identity

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// SignatureSize is the length in bytes of every signature: R‖S for Ed25519,
// r‖s big-endian for P-256.
const SignatureSize = 64

// KeySize is the length in bytes of an X25519 key, public or private.
const KeySize = 32

// KeyKind is the kind of a signing key (spec identity 2).
type KeyKind uint8

// The kinds of signing keys. We make Ed25519 keys; both kinds verify.
const (
	Ed25519 KeyKind = 0
	P256    KeyKind = 1
)

func (k KeyKind) String() string {
	switch k {
	case Ed25519:
		return "Ed25519"
	case P256:
		return "P-256"
	}
	return fmt.Sprintf("KeyKind(%d)", uint8(k))
}

func (k KeyKind) size() int {
	if k == P256 {
		return 65
	}
	return ed25519.PublicKeySize
}

// PublicKey is a public signing key: 32 bytes for Ed25519, 65 bytes (SEC 1,
// uncompressed) for P-256. It is an immutable, comparable value.
type PublicKey struct {
	kind KeyKind
	raw  string
}

// NewPublicKey makes a PublicKey of its wire bytes.
func NewPublicKey(kind KeyKind, raw []byte) (PublicKey, error) {
	if kind > P256 {
		return PublicKey{}, fmt.Errorf("identity: %v is no kind of key", kind)
	}
	if len(raw) != kind.size() {
		return PublicKey{}, fmt.Errorf("identity: a public %v key has %d bytes, not %d", kind, kind.size(), len(raw))
	}
	return PublicKey{kind, string(raw)}, nil
}

// Kind returns the kind of key.
func (k PublicKey) Kind() KeyKind { return k.kind }

// Bytes returns a copy of the wire bytes.
func (k PublicKey) Bytes() []byte { return []byte(k.raw) }

// verify checks a signature over a 32-byte digest as spec identity 6 says: the
// digest is the message, so P-256 hashes it a second time. High-S signatures
// are accepted.
func (k PublicKey) verify(digest *[HashSize]byte, sig *signature) error {
	if sig.kind != k.kind {
		return fmt.Errorf("%w: %v key, %v signature", ErrKeyKind, k.kind, sig.kind)
	}
	if k.kind == Ed25519 {
		if !ed25519.Verify(ed25519.PublicKey(k.raw), digest[:], sig.raw[:]) {
			return ErrSignature
		}
		return nil
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), []byte(k.raw))
	if err != nil {
		return fmt.Errorf("%w: the P-256 key is not a point of the curve", ErrSignature)
	}
	twice := sha256.Sum256(digest[:])
	r := new(big.Int).SetBytes(sig.raw[:32])
	s := new(big.Int).SetBytes(sig.raw[32:])
	if !ecdsa.Verify(pub, twice[:], r, s) {
		return ErrSignature
	}
	return nil
}

// Signer holds one secret signing key, in memory or in a device such as a TPM
// or a PKCS#11 token. Implementations are safe for concurrent use and never
// reveal the secret in any format. NewSigner makes one of a crypto.Signer,
// which is what most such devices offer.
type Signer interface {
	// PublicKey returns the public half; it never changes.
	PublicKey() PublicKey
	// Sign signs message: pure Ed25519, or ECDSA with SHA-256 over P-256 as
	// r‖s. (The messages of this package are 32-byte digests themselves, so
	// P-256 hashes twice; spec identity 6.) message is not kept.
	Sign(message []byte) ([SignatureSize]byte, error)
}

// Exchanger holds one secret X25519 key, in memory or in a device. It is safe
// for concurrent use and never reveals the secret in any format.
type Exchanger interface {
	// PublicKey returns the public half; it never changes.
	PublicKey() [KeySize]byte
	// DH returns the shared secret with a peer's public key, 32 bytes that
	// belong to the caller. It fails with ErrLowOrder for a key of low order.
	DH(peer []byte) ([]byte, error)
}

var (
	_ Signer    = (*softSigner)(nil)
	_ Signer    = (*wrappedSigner)(nil)
	_ Exchanger = (*softExchanger)(nil)
)

// softSigner is an Ed25519 key in memory.
type softSigner struct {
	redacted
	priv hidden // ed25519.PrivateKey
	pub  PublicKey
}

func newSoftSigner(seed []byte) *softSigner {
	priv := ed25519.NewKeyFromSeed(seed)
	return &softSigner{
		priv: hide(priv),
		pub:  PublicKey{Ed25519, string(priv.Public().(ed25519.PublicKey))},
	}
}

func generateSigner() *softSigner {
	seed := randomBytes()
	s := newSoftSigner(seed[:])
	clear(seed[:])
	return s
}

// NewEd25519Signer makes a Signer of a 32-byte seed (RFC 8032), which it
// copies.
func NewEd25519Signer(seed []byte) (Signer, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("identity: an Ed25519 seed has %d bytes, not %d", ed25519.SeedSize, len(seed))
	}
	return newSoftSigner(seed), nil
}

func (s *softSigner) PublicKey() PublicKey { return s.pub }

func (s *softSigner) Sign(message []byte) ([SignatureSize]byte, error) {
	return [SignatureSize]byte(ed25519.Sign(ed25519.PrivateKey(s.priv()), message)), nil
}

// seed returns a copy of the secret.
func (s *softSigner) seed() []byte { return ed25519.PrivateKey(s.priv()).Seed() }

// wrappedSigner signs with a crypto.Signer.
type wrappedSigner struct {
	redacted
	inner func() crypto.Signer // a closure as in hidden
	pub   PublicKey
}

// NewSigner makes a Signer of any crypto.Signer whose public key is an
// ed25519.PublicKey or an *ecdsa.PublicKey on P-256: a key in a TPM, a PKCS#11
// token, a cloud's key service. An identity that uses it cannot be exported.
func NewSigner(inner crypto.Signer) (Signer, error) {
	hiddenInner := func() crypto.Signer { return inner }
	switch pub := inner.Public().(type) {
	case ed25519.PublicKey:
		k, err := NewPublicKey(Ed25519, pub)
		if err != nil {
			return nil, err
		}
		return &wrappedSigner{inner: hiddenInner, pub: k}, nil
	case *ecdsa.PublicKey:
		if pub.Curve != elliptic.P256() {
			return nil, errors.New("identity: the only ECDSA curve for identities is P-256")
		}
		raw, err := pub.Bytes()
		if err != nil {
			return nil, fmt.Errorf("identity: P-256 key: %w", err)
		}
		k, err := NewPublicKey(P256, raw)
		if err != nil {
			return nil, err
		}
		return &wrappedSigner{inner: hiddenInner, pub: k}, nil
	default:
		return nil, fmt.Errorf("identity: cannot sign with a %T: want Ed25519 or ECDSA on P-256", pub)
	}
}

func (s *wrappedSigner) PublicKey() PublicKey { return s.pub }

func (s *wrappedSigner) Sign(message []byte) (out [SignatureSize]byte, err error) {
	if s.pub.kind == Ed25519 {
		sig, err := s.inner().Sign(rand.Reader, message, crypto.Hash(0))
		if err != nil {
			return out, fmt.Errorf("identity: signing: %w", err)
		}
		if len(sig) != SignatureSize {
			return out, fmt.Errorf("identity: signing: device returned %d bytes, not %d", len(sig), SignatureSize)
		}
		return [SignatureSize]byte(sig), nil
	}
	d := sha256.Sum256(message)
	der, err := s.inner().Sign(rand.Reader, d[:], crypto.SHA256)
	if err != nil {
		return out, fmt.Errorf("identity: signing: %w", err)
	}
	var v struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &v); err != nil || len(rest) > 0 {
		return out, errors.New("identity: signing: device returned no ASN.1 signature")
	}
	if v.R.Sign() <= 0 || v.S.Sign() <= 0 || v.R.BitLen() > 256 || v.S.BitLen() > 256 {
		return out, errors.New("identity: signing: device returned a signature out of range")
	}
	v.R.FillBytes(out[:32])
	v.S.FillBytes(out[32:])
	return out, nil
}

// softExchanger is an X25519 key in memory.
type softExchanger struct {
	redacted
	priv func() *ecdh.PrivateKey // a closure as in hidden
	pub  [KeySize]byte
}

// NewX25519Exchanger makes an Exchanger of a 32-byte secret (RFC 7748), which
// it copies.
func NewX25519Exchanger(secret []byte) (Exchanger, error) { return newSoftExchanger(secret) }

func newSoftExchanger(secret []byte) (*softExchanger, error) {
	priv, err := ecdh.X25519().NewPrivateKey(secret)
	if err != nil {
		return nil, fmt.Errorf("identity: an X25519 secret has %d bytes, not %d", KeySize, len(secret))
	}
	hiddenPriv := func() *ecdh.PrivateKey { return priv }
	return &softExchanger{priv: hiddenPriv, pub: [KeySize]byte(priv.PublicKey().Bytes())}, nil
}

func generateExchanger() (*softExchanger, error) {
	secret := randomBytes()
	defer clear(secret[:])
	return newSoftExchanger(secret[:])
}

func (x *softExchanger) PublicKey() [KeySize]byte { return x.pub }

func (x *softExchanger) DH(peer []byte) ([]byte, error) {
	pub, err := ecdh.X25519().NewPublicKey(peer)
	if err != nil {
		return nil, fmt.Errorf("identity: an X25519 public key has %d bytes, not %d", KeySize, len(peer))
	}
	shared, err := x.priv().ECDH(pub)
	if err != nil {
		return nil, ErrLowOrder
	}
	return shared, nil
}

// secret returns a copy of the secret.
func (x *softExchanger) secret() []byte { return x.priv().Bytes() }

// sign makes the wire signature over a digest.
func sign(s Signer, digest [HashSize]byte) (signature, error) {
	raw, err := s.Sign(digest[:])
	if err != nil {
		return signature{}, err
	}
	return signature{s.PublicKey().Kind(), raw}, nil
}

// randomBytes returns 32 random bytes; crypto/rand never fails.
func randomBytes() (b [32]byte) {
	_, _ = rand.Read(b[:])
	return b
}

// sameSigner reports whether s holds the key of k.
func sameSigner(s Signer, k PublicKey) bool { return s.PublicKey() == k }
