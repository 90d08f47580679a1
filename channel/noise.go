package channel

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes of the handshake (spec secure-channel 1 and 3).
const (
	keyLen = 32 // X25519 keys, AES-256 keys, SHA-256 hashes
	tagLen = 16 // GCM tag

	// MaxHandshakeMessage is the longest handshake message in bytes, on
	// sending and on receiving (spec secure-channel 15).
	MaxHandshakeMessage = 65535

	message1Min = keyLen
	message2Min = keyLen + keyLen + tagLen + tagLen
	message3Min = keyLen + tagLen + tagLen
)

// protocolName is the whole Noise protocol name: exactly 32 bytes, used as the
// first chaining key and hash without padding or hashing (spec secure-channel 3).
var protocolName = [keyLen]byte([]byte("OCKAM_XX_25519_AES256_GCM_SHA256"))

var (
	errShort   = errors.New("shorter than this handshake message can be")
	errLong    = errors.New("longer than the 65535 bytes of a handshake message")
	errNotPeer = errors.New("is not from the peer of message 1")
	errDecrypt = errors.New("does not decrypt: made with other keys, or altered on the way")
)

// keyPair is an X25519 key that can be used but not read.
type keyPair interface {
	Public() [keyLen]byte
	DH(peer []byte) ([]byte, error)
}

// ephemeralKey is a key of one handshake.
type ephemeralKey struct{ priv *ecdh.PrivateKey }

func newEphemeral() (keyPair, error) {
	priv, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("channel: make ephemeral key: %w", err)
	}
	return ephemeralKey{priv}, nil
}

func (e ephemeralKey) Public() [keyLen]byte { return [keyLen]byte(e.priv.PublicKey().Bytes()) }

func (e ephemeralKey) DH(peer []byte) ([]byte, error) {
	pub, err := ecdh.X25519().NewPublicKey(peer)
	if err != nil {
		return nil, err
	}
	return e.priv.ECDH(pub) // refuses the all-zero result
}

// newGCM returns AES-256-GCM under key.
func newGCM(key *[keyLen]byte) cipher.AEAD {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic("channel: aes.NewCipher refused a 32-byte key: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("channel: cipher.NewGCM refused AES: " + err.Error())
	}
	return aead
}

// gcmNonce is four zero bytes and the counter, big-endian.
func gcmNonce(n uint64) (nonce [12]byte) {
	binary.BigEndian.PutUint64(nonce[4:], n)
	return nonce
}

// hkdf2 is Noise's HKDF with two outputs.
func hkdf2(ck *[keyLen]byte, ikm []byte) (a, b [keyLen]byte) {
	out, err := hkdf.Key(sha256.New, ikm, ck[:], "", 2*keyLen)
	if err != nil {
		panic("channel: hkdf refused 64 bytes of output: " + err.Error())
	}
	return [keyLen]byte(out[:keyLen]), [keyLen]byte(out[keyLen:])
}

// symmetric is Noise's symmetric state. It is a plain value: assigning it is
// the copy on which the next message is tried.
type symmetric struct {
	h, ck, k [keyLen]byte
	n        uint64
}

// newSymmetric starts a transcript: the name, then an empty prologue.
func newSymmetric(name [keyLen]byte) symmetric {
	s := symmetric{h: name, ck: name}
	s.mixHash(nil)
	return s
}

func (s *symmetric) mixHash(d []byte) {
	hash := sha256.New()
	hash.Write(s.h[:])
	hash.Write(d)
	hash.Sum(s.h[:0])
}

func (s *symmetric) mixKey(own keyPair, peer [keyLen]byte) error {
	secret, err := own.DH(peer[:])
	if err != nil {
		return fmt.Errorf("X25519: %w", err)
	}
	s.ck, s.k = hkdf2(&s.ck, secret)
	s.n = 0
	clear(secret)
	return nil
}

func (s *symmetric) encryptAndHash(dst, plain []byte) []byte {
	nonce := gcmNonce(s.n)
	start := len(dst)
	dst = newGCM(&s.k).Seal(dst, nonce[:], plain, s.h[:])
	s.mixHash(dst[start:])
	s.n++
	return dst
}

func (s *symmetric) decryptAndHash(sealed []byte) ([]byte, error) {
	nonce := gcmNonce(s.n)
	plain, err := newGCM(&s.k).Open(nil, nonce[:], sealed, s.h[:])
	if err != nil {
		return nil, errDecrypt
	}
	s.mixHash(sealed)
	s.n++
	return plain, nil
}

// xx is the state of one Noise XX handshake: the transcript and what is known
// of the peer. Every step has a value receiver and returns the state after it,
// so the caller keeps the old one until the message has proved itself.
type xx struct {
	sym    symmetric
	re, rs [keyLen]byte // the peer's ephemeral and static key
}

func newXX() xx { return xx{sym: newSymmetric(protocolName)} }

func checkLen(n, least int) error {
	switch {
	case n < least:
		return errShort
	case n > MaxHandshakeMessage:
		return errLong
	}
	return nil
}

// write1 is the initiator's e.
func (x xx) write1(e keyPair, payload []byte) (xx, []byte, error) {
	if err := checkLen(message1Min+len(payload), message1Min); err != nil {
		return xx{}, nil, err
	}
	pub := e.Public()
	out := append(make([]byte, 0, keyLen+len(payload)), pub[:]...)
	x.sym.mixHash(pub[:])
	x.sym.mixHash(payload)
	return x, append(out, payload...), nil
}

// read1 is the responder's side of message 1. The payload is not authenticated.
func (x xx) read1(msg []byte) (xx, []byte, error) {
	if err := checkLen(len(msg), message1Min); err != nil {
		return xx{}, nil, err
	}
	x.re = [keyLen]byte(msg)
	x.sym.mixHash(msg[:keyLen])
	x.sym.mixHash(msg[keyLen:])
	return x, msg[keyLen:], nil
}

// write2 is the responder's e, ee, s, es.
func (x xx) write2(e, s keyPair, payload []byte) (xx, []byte, error) {
	if err := checkLen(message2Min+len(payload), message2Min); err != nil {
		return xx{}, nil, err
	}
	epub, spub := e.Public(), s.Public()
	out := append(make([]byte, 0, message2Min+len(payload)), epub[:]...)
	x.sym.mixHash(epub[:])
	if err := x.sym.mixKey(e, x.re); err != nil {
		return xx{}, nil, err
	}
	out = x.sym.encryptAndHash(out, spub[:])
	if err := x.sym.mixKey(s, x.re); err != nil {
		return xx{}, nil, err
	}
	return x, x.sym.encryptAndHash(out, payload), nil
}

// read2 is the initiator's side of message 2.
func (x xx) read2(e keyPair, msg []byte) (xx, []byte, error) {
	if err := checkLen(len(msg), message2Min); err != nil {
		return xx{}, nil, err
	}
	x.re = [keyLen]byte(msg)
	x.sym.mixHash(msg[:keyLen])
	if err := x.sym.mixKey(e, x.re); err != nil {
		return xx{}, nil, err
	}
	const split = keyLen + keyLen + tagLen
	rs, err := x.sym.decryptAndHash(msg[keyLen:split])
	if err != nil {
		return xx{}, nil, err
	}
	x.rs = [keyLen]byte(rs)
	if err := x.sym.mixKey(e, x.rs); err != nil {
		return xx{}, nil, err
	}
	payload, err := x.sym.decryptAndHash(msg[split:])
	if err != nil {
		return xx{}, nil, err
	}
	return x, payload, nil
}

// write3 is the initiator's s, se.
func (x xx) write3(s keyPair, payload []byte) (xx, []byte, error) {
	if err := checkLen(message3Min+len(payload), message3Min); err != nil {
		return xx{}, nil, err
	}
	spub := s.Public()
	out := x.sym.encryptAndHash(make([]byte, 0, message3Min+len(payload)), spub[:])
	if err := x.sym.mixKey(s, x.re); err != nil {
		return xx{}, nil, err
	}
	return x, x.sym.encryptAndHash(out, payload), nil
}

// read3 is the responder's side of message 3. What is not from the peer of
// message 1 fails before any Diffie-Hellman.
func (x xx) read3(e keyPair, msg []byte) (xx, []byte, error) {
	if checkLen(len(msg), message3Min) != nil {
		return xx{}, nil, errNotPeer
	}
	const split = keyLen + tagLen
	rs, err := x.sym.decryptAndHash(msg[:split])
	if err != nil {
		return xx{}, nil, errNotPeer
	}
	x.rs = [keyLen]byte(rs)
	if err := x.sym.mixKey(e, x.rs); err != nil {
		return xx{}, nil, err
	}
	payload, err := x.sym.decryptAndHash(msg[split:])
	if err != nil {
		return xx{}, nil, err
	}
	return x, payload, nil
}

// split returns the two transport keys. The direction is the reverse of the
// Noise specification: the initiator sends with the second and the responder
// with the first (spec secure-channel 3).
func (x xx) split() (responderSends, initiatorSends [keyLen]byte) {
	return hkdf2(&x.sym.ck, nil)
}
