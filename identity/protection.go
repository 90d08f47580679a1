package identity

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/chacha20poly1305"
)

// Errors of protected files.
var (
	// ErrSealed means that a file is encrypted and no passphrase or key file
	// was given.
	ErrSealed = errors.New("encrypted: give its passphrase or key file")
	// ErrPassphrase means that an encrypted file does not open.
	ErrPassphrase = errors.New("wrong passphrase or key file, or the file was altered")
	// ErrNoPassphrase means that a passphrase is empty.
	ErrNoPassphrase = errors.New("identity: the passphrase is empty")
)

// Protection says how secret keys are encrypted at rest. The zero value does
// not encrypt: file modes alone protect. It never prints its secret.
type Protection struct{ p *protection }

type protection struct {
	redacted
	kdf    uint8
	secret hidden
	cost   argonCost

	mu   sync.Mutex // the last derived key, which is costly to derive
	salt []byte
	used argonCost
	key  hidden
}

// Ways to derive a key.
const (
	kdfArgon2id uint8 = 1 // from a passphrase
	kdfHKDF     uint8 = 2 // from a key file: HKDF-SHA256
)

// argonCost is the cost of Argon2id (RFC 9106).
type argonCost struct {
	Passes  uint32 `cbor:"0,keyasint,omitempty"`
	Memory  uint32 `cbor:"1,keyasint,omitempty"` // KiB
	Threads uint8  `cbor:"2,keyasint,omitempty"`
}

// defaultCost is the second recommended option of RFC 9106, section 4.
var defaultCost = argonCost{Passes: 3, Memory: 64 << 10, Threads: 4}

// allowed bounds what a file can make us spend before it is authenticated.
func (c argonCost) allowed() bool {
	return c.Passes >= 1 && c.Passes <= 16 && c.Threads >= 1 && c.Threads <= 16 &&
		c.Memory >= 8*uint32(c.Threads) && c.Memory <= 1<<20
}

// Passphrase protects with a passphrase: Argon2id and XChaCha20-Poly1305. The
// passphrase is copied.
func Passphrase(passphrase []byte) (Protection, error) {
	if len(passphrase) == 0 {
		return Protection{}, ErrNoPassphrase
	}
	return Protection{&protection{kdf: kdfArgon2id, secret: hide(bytes.Clone(passphrase)), cost: defaultCost}}, nil
}

// PassphraseFile is Passphrase with the first line of a file, which nobody but its
// owner may read. It may be a pipe, and behind a symbolic link.
func PassphraseFile(path string) (Protection, error) {
	f, err := os.Open(path)
	if err != nil {
		return Protection{}, fmt.Errorf("identity: passphrase: %w", err)
	}
	defer f.Close() // nothing was written
	text, _, err := readChecked(path, f, maxKeyFile)
	if err != nil {
		return Protection{}, err
	}
	defer clear(text)
	line, _, _ := bytes.Cut(bytes.TrimPrefix(text, []byte("\ufeff")), []byte("\n"))
	return Passphrase(bytes.TrimRight(line, "\r"))
}

// Bounds of a key file, in bytes; the longest passphrase file is as long.
const (
	minKeyFile = 32
	maxKeyFile = 4096
)

// KeyFile protects with the contents of a file: 32 to 4,096 bytes, random (see
// CreateKeyFile), readable by its owner only.
func KeyFile(path string) (Protection, error) {
	b, _, err := readPrivate(path, maxKeyFile)
	if err != nil {
		return Protection{}, err
	}
	if len(b) < minKeyFile {
		return Protection{}, fmt.Errorf("identity: %s: a key file has %d bytes at least, this one %d", path, minKeyFile, len(b))
	}
	return Protection{&protection{kdf: kdfHKDF, secret: hide(b)}}, nil
}

// CreateKeyFile writes a new key file, 64 random hexadecimal digits, with mode
// 0600. It never overwrites a file.
func CreateKeyFile(path string) error {
	key := randomBytes()
	text := append(hex.AppendEncode(nil, key[:]), '\n')
	defer clear(key[:])
	defer clear(text)
	return WriteNew(path, text)
}

// Encrypts reports whether p encrypts at all.
func (p Protection) Encrypts() bool { return p.p != nil }

// String says how, and nothing of the secret.
func (p Protection) String() string {
	switch {
	case p.p == nil:
		return "identity.Protection{none}"
	case p.p.kdf == kdfHKDF:
		return "identity.Protection{key file}"
	}
	return "identity.Protection{passphrase}"
}

// Format implements fmt.Formatter: String, for every verb.
func (p Protection) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(p.String())) }

// GoString implements fmt.GoStringer.
func (p Protection) GoString() string { return p.String() }

// derive makes the key for a salt; it remembers the last one.
func (p *protection) derive(salt []byte, cost argonCost) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.key != nil && bytes.Equal(p.salt, salt) && p.used == cost {
		return p.key(), nil
	}
	var key []byte
	if p.kdf == kdfArgon2id {
		key = argon2.IDKey(p.secret(), salt, cost.Passes, cost.Memory, cost.Threads, chacha20poly1305.KeySize)
	} else {
		var err error
		if key, err = hkdf.Key(sha256.New, p.secret(), salt, "sealmq vault key/1", chacha20poly1305.KeySize); err != nil {
			return nil, fmt.Errorf("identity: %w", err)
		}
	}
	p.salt, p.used, p.key = bytes.Clone(salt), cost, hide(key)
	return key, nil
}

// sealedKeys is what an encrypted file holds in place of its keys.
type sealedKeys struct {
	KDF   uint8     `cbor:"0,keyasint"`
	Cost  argonCost `cbor:"1,keyasint"`
	Salt  []byte    `cbor:"2,keyasint"` // 16 bytes
	Nonce []byte    `cbor:"3,keyasint"` // 24 bytes
	Box   []byte    `cbor:"4,keyasint"` // XChaCha20-Poly1305
}

const saltSize = 16

// seal encrypts keys. With the salt and cost of an earlier sealing of the same
// protection nothing is derived again; nonces are random and long enough for
// that.
func (p *protection) seal(keys, additional []byte, earlier *sealedKeys) (*sealedKeys, error) {
	s := &sealedKeys{KDF: p.kdf, Cost: p.cost}
	if earlier != nil && earlier.KDF == p.kdf {
		s.Cost, s.Salt = earlier.Cost, earlier.Salt
	} else {
		salt := randomBytes()
		s.Salt = salt[:saltSize]
	}
	key, err := p.derive(s.Salt, s.Cost)
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	s.Nonce = make([]byte, aead.NonceSize())
	_, _ = rand.Read(s.Nonce) // never fails
	s.Box = aead.Seal(nil, s.Nonce, keys, additional)
	return s, nil
}

// open decrypts. The result belongs to the caller, who clears it.
func (p *protection) open(s *sealedKeys, additional []byte) ([]byte, error) {
	if p == nil {
		return nil, ErrSealed
	}
	if s.KDF != p.kdf {
		return nil, ErrPassphrase
	}
	if len(s.Salt) != saltSize || len(s.Nonce) != chacha20poly1305.NonceSizeX ||
		p.kdf == kdfArgon2id && !s.Cost.allowed() {
		return nil, fmt.Errorf("%w: encryption parameters out of range", ErrMalformed)
	}
	key, err := p.derive(s.Salt, s.Cost)
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	keys, err := aead.Open(nil, s.Nonce, s.Box, additional)
	if err != nil {
		return nil, ErrPassphrase
	}
	return keys, nil
}
