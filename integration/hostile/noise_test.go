package hostile

import (
	"bytes"
	"crypto/sha256"
	"hash"

	"github.com/flynn/noise"
)

// ockamSuite is the cipher suite of Ockam's channels for package noise, which
// writes protocol names the standard way only (spec secure-channel 6): a name that
// is longer than a hash is hashed, and this hash gives Ockam's name instead.
func ockamSuite() noise.CipherSuite {
	return noise.NewCipherSuite(noise.DH25519, noise.CipherAESGCM, ockamHash{})
}

type ockamHash struct{}

func (ockamHash) Hash() hash.Hash  { return &namingHash{Hash: sha256.New()} }
func (ockamHash) HashName() string { return "SHA256_under_the_name_that_Ockam_uses" }

type namingHash struct {
	hash.Hash
	name bool
}

func (h *namingHash) Write(b []byte) (int, error) {
	h.name = h.name || bytes.HasPrefix(b, []byte("Noise_XX_"))
	return h.Hash.Write(b)
}

func (h *namingHash) Sum(b []byte) []byte {
	if h.name {
		return append(b, "OCKAM_XX_25519_AES256_GCM_SHA256"...)
	}
	return h.Hash.Sum(b)
}

func (h *namingHash) Reset() {
	h.name = false
	h.Hash.Reset()
}
