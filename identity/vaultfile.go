package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"sync"

	"github.com/fxamacker/cbor/v2"

	wire "github.com/sealmq/sealmq/internal/cbor"
)

// The file of a private identity, which is also the form of a backup: a PEM
// block whose body is a deterministic CBOR map with integer keys (RFC 8949
// 4.2). The history is public and readable without a passphrase; encryption
// authenticates it with the keys.
const (
	pemPlain  = "SEALMQ IDENTITY"
	pemSealed = "SEALMQ ENCRYPTED IDENTITY"

	fileVersion = 1

	// maxFile is the longest file: a history of MaxHistory in base64, and keys.
	maxFile = 2*MaxHistory + 16<<10
)

// Errors of identity files.
var (
	// ErrFile means that a file is no identity of ours, or damaged.
	ErrFile = errors.New("not an identity file, or damaged; restore it from a backup")
	// ErrNotRegular means that a link, folder or device is where a file should be.
	ErrNotRegular = errors.New("not a regular file; put the file itself there")
	// ErrNewerFile means that a newer sealmq wrote a file.
	ErrNewerFile = errors.New("written by a newer version; upgrade this one")
	// ErrExternalKey means that an identity's key lives in a device and was not
	// given with WithSigner.
	ErrExternalKey = errors.New("identity key lives in a device: give it with WithSigner")
)

type identityFile struct {
	Version uint64      `cbor:"0,keyasint"`
	History []byte      `cbor:"1,keyasint"`
	Keys    []byte      `cbor:"2,keyasint,omitempty"` // encoded fileKeys
	Check   []byte      `cbor:"3,keyasint,omitempty"` // SHA-256 of history and keys, against bit rot
	Sealed  *sealedKeys `cbor:"4,keyasint,omitempty"` // in place of Keys and Check
}

type fileKeys struct {
	Secret  [32]byte     `cbor:"0,keyasint"`
	Kind    KeyKind      `cbor:"1,keyasint"`
	Seed    []byte       `cbor:"2,keyasint,omitempty"` // absent: the key lives in a device
	Channel *filePurpose `cbor:"3,keyasint,omitempty"`
	Issuing *filePurpose `cbor:"4,keyasint,omitempty"`
}

type filePurpose struct {
	Secret      []byte `cbor:"0,keyasint,omitempty"` // absent: the key lives in a device
	Attestation []byte `cbor:"1,keyasint"`
}

// modes are the frozen CBOR modes of files: deterministic, and refusing what
// they don't know, because the file is going to be written again.
var modes = sync.OnceValues(func() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic("identity: " + err.Error()) // constant options
	}
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden,
		TagsMd: cbor.TagsForbidden, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels: 4, MaxArrayElements: 64, MaxMapPairs: 16,
	}.DecMode()
	if err != nil {
		panic("identity: " + err.Error())
	}
	return enc, dec
})

func encodeFile(v any) ([]byte, error) {
	enc, _ := modes()
	b, err := enc.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return b, nil
}

func checksum(history, keys []byte) []byte {
	h := sha256.New()
	h.Write(history)
	h.Write(keys)
	return h.Sum(nil)
}

// additional is what encryption authenticates besides the keys.
func additional(history []byte) []byte {
	return append([]byte("sealmq identity file/1\x00"), history...)
}

// marshal writes a state as a file. earlier is how the file that it replaces was
// encrypted, or nil.
func (st *state) marshal(p Protection, earlier *sealedKeys) ([]byte, error) {
	k := fileKeys{Secret: [32]byte(st.secret()), Kind: st.signer.PublicKey().kind}
	defer func() { clear(k.Secret[:]) }()
	if s, ok := st.signer.(*softSigner); ok {
		k.Seed = s.seed()
		defer clear(k.Seed)
	}
	if st.channel != nil {
		c := st.channel.k
		k.Channel = &filePurpose{Attestation: c.encoded}
		if x, ok := c.exchanger.(*softExchanger); ok {
			k.Channel.Secret = x.secret()
			defer clear(k.Channel.Secret)
		}
	}
	if st.issuing != nil {
		k.Issuing = &filePurpose{Attestation: st.issuing.encoded}
		if s, ok := st.issuing.signer.(*softSigner); ok {
			k.Issuing.Secret = s.seed()
			defer clear(k.Issuing.Secret)
		}
	}
	keys, err := encodeFile(k)
	if err != nil {
		return nil, err
	}
	defer clear(keys)
	return marshalFile(st.identity, keys, p, earlier)
}

// marshalFile writes encoded keys as a file.
func marshalFile(id *Identity, keys []byte, p Protection, earlier *sealedKeys) ([]byte, error) {
	f := identityFile{Version: fileVersion, History: id.history}
	block := &pem.Block{Type: pemPlain, Headers: map[string]string{"Identifier": id.String()}}
	var err error
	if p.Encrypts() {
		block.Type = pemSealed
		if f.Sealed, err = p.p.seal(keys, additional(f.History), earlier); err != nil {
			return nil, err
		}
	} else {
		f.Keys, f.Check = keys, checksum(f.History, keys)
	}
	if block.Bytes, err = encodeFile(f); err != nil {
		return nil, err
	}
	defer clear(block.Bytes)
	return pem.EncodeToMemory(block), nil
}

// parseFile decodes a file without opening its keys, and verifies its history.
func parseFile(b []byte) (*identityFile, *Identity, error) {
	if len(b) > maxFile {
		return nil, nil, ErrFile
	}
	block, rest := pem.Decode(b)
	if block == nil || (block.Type != pemPlain && block.Type != pemSealed) || len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, ErrFile
	}
	if v, ok := peekVersion(block.Bytes); ok && v > fileVersion {
		return nil, nil, ErrNewerFile
	}
	var f identityFile
	_, dec := modes()
	if err := dec.Unmarshal(block.Bytes, &f); err != nil {
		return nil, nil, ErrFile // the cause could quote keys
	}
	if f.Version != fileVersion || (f.Sealed != nil) != (block.Type == pemSealed) || (f.Sealed != nil) == (f.Keys != nil) {
		return nil, nil, ErrFile
	}
	if f.Sealed == nil && !bytes.Equal(f.Check, checksum(f.History, f.Keys)) {
		return nil, nil, ErrFile
	}
	id, err := Import(f.History)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	if name := block.Headers["Identifier"]; name != "" && name != id.String() {
		return nil, nil, fmt.Errorf("%w: its header names another identity", ErrFile)
	}
	return &f, id, nil
}

// peekVersion reads the version, which is the first pair of the map in every
// format there will be.
func peekVersion(b []byte) (uint64, bool) {
	r := wire.NewReader(b)
	if _, err := r.Map(); err != nil {
		return 0, false
	}
	if key, err := r.Uint(); err != nil || key != 0 {
		return 0, false
	}
	v, err := r.Uint()
	return v, err == nil
}

// unmarshalState opens a file whole. o has the keys that live in devices.
func unmarshalState(b []byte, p Protection, o *options) (*state, *sealedKeys, error) {
	f, id, err := parseFile(b)
	if err != nil {
		return nil, nil, err
	}
	encoded := f.Keys
	if f.Sealed != nil {
		if encoded, err = p.p.open(f.Sealed, additional(f.History)); err != nil {
			return nil, nil, err
		}
	}
	defer clear(encoded)
	var k fileKeys
	_, dec := modes()
	if err := dec.Unmarshal(encoded, &k); err != nil {
		return nil, nil, ErrFile // the cause could quote keys
	}
	defer k.clear()
	st, err := k.state(id, o)
	return st, f.Sealed, err
}

func (k *fileKeys) clear() {
	clear(k.Secret[:])
	clear(k.Seed)
	for _, p := range []*filePurpose{k.Channel, k.Issuing} {
		if p != nil {
			clear(p.Secret)
		}
	}
}

// state makes the keys usable and checks that they are those of the identity.
func (k *fileKeys) state(id *Identity, o *options) (*state, error) {
	st := &state{identity: id, secret: hide(bytes.Clone(k.Secret[:]))}
	switch {
	case k.Seed == nil:
		if o.signer == nil {
			return nil, ErrExternalKey
		}
		st.signer = o.signer
	case k.Kind != Ed25519:
		return nil, ErrFile
	default:
		s, err := NewEd25519Signer(k.Seed)
		if err != nil {
			return nil, ErrFile
		}
		st.signer = s
	}
	if !sameSigner(st.signer, id.PublicKey()) {
		return nil, ErrWrongKey
	}
	var err error
	if k.Channel != nil {
		if st.channel, err = k.Channel.channel(id, o); err != nil {
			return nil, err
		}
	}
	if k.Issuing != nil {
		if st.issuing, err = k.Issuing.issuing(); err != nil {
			return nil, err
		}
	}
	return st, nil
}

// channel returns nil when the key lives in a device that was not given: a new
// one is made when it is needed.
func (p *filePurpose) channel(id *Identity, o *options) (*ChannelKey, error) {
	a, err := parseAttestation(p.Attestation)
	if err != nil || a.purpose != purposeChannel {
		return nil, ErrFile
	}
	x := o.exchanger
	switch {
	case p.Secret != nil:
		soft, err := newSoftExchanger(p.Secret)
		if err != nil || soft.pub != a.channelKey {
			return nil, ErrFile
		}
		x = soft
	case x == nil || x.PublicKey() != a.channelKey:
		return nil, nil
	}
	return &ChannelKey{newChannelKey(id, x, a, bytes.Clone(p.Attestation))}, nil
}

func (p *filePurpose) issuing() (*credentialKey, error) {
	a, err := parseAttestation(p.Attestation)
	if err != nil || a.purpose != purposeCredentials {
		return nil, ErrFile
	}
	s, err := NewEd25519Signer(p.Secret)
	if err != nil || !sameSigner(s, a.signingKey) {
		return nil, ErrFile
	}
	return &credentialKey{signer: s, att: a, encoded: bytes.Clone(p.Attestation)}, nil
}
