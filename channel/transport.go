package channel

import (
	"crypto/cipher"
	"encoding/binary"
	"math"
)

const (
	nonceLen = 8
	// Overhead is what sealing adds to a plaintext: nonce and tag, in bytes.
	Overhead = nonceLen + tagLen
	// Window is how far, in nonces, a frame may be ahead of or behind the
	// newest one received; a key also serves this many nonces (spec
	// secure-channel 10 and 11).
	Window = 32
	// maxNonce is reserved for rekeying.
	maxNonce = math.MaxUint64
)

// rekeyNonce and rekeyZeros are the input of Noise's REKEY, never written to.
var (
	rekeyNonce = gcmNonce(maxNonce)
	rekeyZeros [keyLen]byte
)

// transportKey is one of the keys of a direction.
type transportKey struct {
	raw  [keyLen]byte
	aead cipher.AEAD // nil: there is no such key
}

func newTransportKey(raw *[keyLen]byte) transportKey {
	return transportKey{raw: *raw, aead: newGCM(raw)}
}

// next derives the key after k; scratch is overwritten.
func (k *transportKey) next(scratch *[keyLen + tagLen]byte) transportKey {
	k.aead.Seal(scratch[:0], rekeyNonce[:], rekeyZeros[:], nil) //nolint:gosec // the reserved nonce of rekeying (spec secure-channel 10); data never gets it
	raw := [keyLen]byte(scratch[:keyLen])
	clear(scratch[:])
	return newTransportKey(&raw)
}

// Sealer encrypts one direction of a channel. It counts nonces from 0 and
// changes its key by itself before nonce 32, 64 and so on (spec secure-channel
// 10). It is not safe for concurrent use.
//
// Seal does not allocate, except for the cipher of a new key every 32 frames.
type Sealer struct {
	key     transportKey
	next    uint64
	nonce   [12]byte
	scratch [keyLen + tagLen]byte
}

// NewSealer returns a Sealer at nonce 0.
func NewSealer(key [32]byte) *Sealer { return &Sealer{key: newTransportKey(&key)} }

// Next returns the nonce that the next frame will have.
func (s *Sealer) Next() uint64 { return s.next }

// Seal appends one transport frame to dst: the nonce in 8 bytes, big-endian,
// the ciphertext, and the 16-byte tag (spec secure-channel 9.1).
//
// To encrypt in place, let plaintext lie 8 bytes behind the end of dst in dst's
// own array, with 16 bytes of capacity behind it; any other overlap panics. The
// one error is [ErrNonceExhausted].
func (s *Sealer) Seal(dst, plaintext []byte) ([]byte, error) {
	n := s.next
	if n == maxNonce {
		return dst, ErrNonceExhausted
	}
	s.next++
	if n != 0 && n%Window == 0 {
		s.key = s.key.next(&s.scratch)
	}
	binary.BigEndian.PutUint64(s.nonce[4:], n)
	dst = append(dst, s.nonce[4:]...)
	return s.key.aead.Seal(dst, s.nonce[:], plaintext, nil), nil
}

// replayWindow tells which nonces have been received (spec secure-channel 11).
type replayWindow struct {
	highest uint64
	bitmap  uint64 // bit i: highest-i was received
}

// accept returns the window after n, or why n is refused. The window itself is
// unchanged.
func (w replayWindow) accept(n uint64) (replayWindow, error) {
	if n > w.highest {
		s := n - w.highest
		if s > Window {
			return w, ErrBeyondWindow
		}
		return replayWindow{highest: n, bitmap: w.bitmap<<s | 1}, nil
	}
	r := w.highest - n
	switch {
	case r > Window:
		return w, ErrTooOld
	case w.bitmap&(1<<r) != 0:
		return w, ErrReplayed
	}
	w.bitmap |= 1 << r
	return w, nil
}

// keyChoice says which key a nonce asks for.
type keyChoice uint8

const (
	keyNone keyChoice = iota
	keyPrevious
	keyCurrent
	keyNext
)

// chooseKey is the key tracker of spec secure-channel 11, for keys that serve
// interval nonces each.
func chooseKey(n, rekeys, interval uint64, hasPrevious bool) keyChoice {
	start := rekeys * interval
	if n >= start {
		switch age := n - start; {
		case age < interval:
			return keyCurrent
		case age < 2*interval:
			return keyNext
		}
		return keyNone
	}
	if start-n <= interval && hasPrevious {
		return keyPrevious
	}
	return keyNone
}

// Opener decrypts the other direction. It takes frames in any order within the
// window, each once, and follows the sender's keys (spec secure-channel 11).
// Nothing changes unless a frame authenticates, so forged frames cannot move
// the window. It is not safe for concurrent use.
//
// Open does not allocate, except for the cipher of a new key every 32 frames.
type Opener struct {
	window  replayWindow
	rekeys  uint64
	cur     transportKey
	prev    transportKey
	ahead   transportKey // the key after cur, derived when first asked for; not state
	nonce   [12]byte
	scratch [keyLen + tagLen]byte
}

// NewOpener returns an Opener that has received nothing.
func NewOpener(key [32]byte) *Opener { return &Opener{cur: newTransportKey(&key)} }

// Highest returns the highest nonce received; 0 also before the first frame.
func (o *Opener) Highest() uint64 { return o.window.highest }

// FrameNonce returns the nonce that a frame claims to have; false when the frame
// is shorter than any frame can be.
func FrameNonce(frame []byte) (uint64, bool) {
	if len(frame) < Overhead {
		return 0, false
	}
	return binary.BigEndian.Uint64(frame), true
}

// Open appends the plaintext of frame to dst and returns it with the frame's
// nonce. To decrypt in place pass frame[8:8] as dst; a frame that does not
// authenticate is then destroyed.
//
// Errors: [ErrFrameShort], [ErrReplayed], [ErrTooOld], [ErrBeyondWindow],
// [ErrForged]. None of them changes the state.
func (o *Opener) Open(dst, frame []byte) (plaintext []byte, nonce uint64, err error) {
	n, ok := FrameNonce(frame)
	if !ok {
		return dst, 0, ErrFrameShort
	}
	window, err := o.window.accept(n)
	if err != nil {
		return dst, n, err
	}
	var aead cipher.AEAD
	choice := chooseKey(n, o.rekeys, Window, o.prev.aead != nil)
	switch choice {
	case keyCurrent:
		aead = o.cur.aead
	case keyPrevious:
		aead = o.prev.aead
	case keyNext:
		if o.ahead.aead == nil {
			o.ahead = o.cur.next(&o.scratch)
		}
		aead = o.ahead.aead
	default:
		return dst, n, ErrTooOld
	}
	copy(o.nonce[4:], frame[:nonceLen])
	plaintext, err = aead.Open(dst, o.nonce[:], frame[nonceLen:], nil)
	if err != nil {
		return dst, n, ErrForged
	}
	o.window = window
	if choice == keyNext {
		o.prev, o.cur, o.ahead = o.cur, o.ahead, transportKey{}
		o.rekeys++
	}
	return plaintext, n, nil
}

// maxGapRekeys bounds the key derivations that one proof of a gap may cost: a
// few milliseconds, and gaps of up to 131,072 frames.
const maxGapRekeys = 4096

// gapProof decides whether a frame beyond the window is genuine, on a copy of
// the receiving key, so it can run beside the Opener it was taken from.
type gapProof struct {
	rekeys uint64
	key    transportKey
}

func (o *Opener) gapProof() gapProof { return gapProof{rekeys: o.rekeys, key: o.cur} }

// proves reports whether frame was made by the peer: then everything between
// the window and it is lost. It changes nothing.
func (g gapProof) proves(frame []byte) bool {
	n, ok := FrameNonce(frame)
	if !ok || n/Window < g.rekeys || n/Window-g.rekeys > maxGapRekeys {
		return false
	}
	var scratch [keyLen + tagLen]byte
	for range n/Window - g.rekeys {
		g.key = g.key.next(&scratch)
	}
	nonce := gcmNonce(n)
	_, err := g.key.aead.Open(nil, nonce[:], frame[nonceLen:], nil)
	return err == nil
}
