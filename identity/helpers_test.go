package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"io"
	"math/big"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/internal/cbor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// errCrash is what a fault stops a write with.
var errCrash = errors.New("crashed")

// epoch is the time at which tests live unless they say otherwise.
var epoch = time.Unix(1_700_000_000, 0)

// testClock is a clock that tests set.
type testClock struct{ now time.Time }

func (c *testClock) Now() time.Time          { return c.now }
func (c *testClock) advance(d time.Duration) { c.now = c.now.Add(d) }
func (c *testClock) option() Option          { return WithClock(c.Now) }
func newClock() *testClock                   { return &testClock{epoch} }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// rfc6979 makes ECDSA signatures deterministic, as Rust's software vault does.
type rfc6979 struct{ *ecdsa.PrivateKey }

func (k rfc6979) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.PrivateKey.Sign(nil, digest, opts)
}

// p256Signer makes a P-256 Signer of a scalar.
func p256Signer(t testing.TB, scalar []byte) Signer {
	t.Helper()
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner(rfc6979{k})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// seeded returns an Ed25519 signer of a repeated byte.
func seeded(b byte) Signer {
	seed := make([]byte, 32)
	for i := range seed {
		seed[i] = b
	}
	return must(NewEd25519Signer(seed))
}

// rawChange is a change under construction: every field can be wrong.
type rawChange struct {
	version, typ uint64
	previous     []byte // nil: null
	key          PublicKey
	revoke       bool
	from, until  uint64
	tail         []byte // CBOR after the last known element of ChangeData
	tailItems    int
	sign, prev   Signer // prev nil: no previous_signature
	signKind     KeyKind
	forceKind    bool
}

func newRawChange(s Signer) rawChange {
	return rawChange{version: 1, typ: 1, key: s.PublicKey(), from: 100, until: 200, sign: s}
}

func (c rawChange) signed() []byte {
	data := cbor.AppendArray(nil, 5+c.tailItems)
	if c.previous == nil {
		data = cbor.AppendNull(data)
	} else {
		data = cbor.AppendBytes(data, c.previous)
	}
	data = appendKey(data, c.key)
	data = cbor.AppendBool(data, c.revoke)
	data = cbor.AppendUint(data, c.from)
	data = cbor.AppendUint(data, c.until)
	data = append(data, c.tail...)
	return envelope(c.version, c.typ, data)
}

func envelope(version, typ uint64, data []byte) []byte {
	b := cbor.AppendArray(nil, 3)
	b = cbor.AppendUint(b, version)
	b = cbor.AppendUint(b, typ)
	return cbor.AppendBytes(b, data)
}

func (c rawChange) hash() []byte {
	h := sha256.Sum256(c.signed())
	return h[:]
}

func (c rawChange) encode() []byte {
	signed := c.signed()
	digest := sha256.Sum256(signed)
	items := 2
	if c.prev != nil {
		items = 3
	}
	b := cbor.AppendArray(nil, items)
	b = cbor.AppendBytes(b, signed)
	sig := must(sign(c.sign, digest))
	if c.forceKind {
		sig.kind = c.signKind
	}
	b = appendSignature(b, sig)
	if c.prev != nil {
		b = appendSignature(b, must(sign(c.prev, digest)))
	}
	return b
}

// history joins encoded changes.
func history(changes ...[]byte) []byte {
	b := cbor.AppendArray(nil, len(changes))
	for _, c := range changes {
		b = append(b, c...)
	}
	return b
}

// flipS signs with the other root: s becomes n-s.
type flipS struct{ Signer }

func (f flipS) Sign(message []byte) ([SignatureSize]byte, error) {
	sig, err := f.Signer.Sign(message)
	s := new(big.Int).SetBytes(sig[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
	return sig, err
}
