package identity

import (
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/internal/cbor"
)

// The signed envelope (spec identity 3):
//
//	VersionedData = array(3) [ version: u8, data_type: u8, data: bytes ]
//
// Every signed object is array [ bytes(versioned), signature, … ]; the
// signature covers SHA-256(versioned). The bytes are hashed as received and
// never encoded again.
const (
	envelopeVersion = 1

	typeChange      = 1
	typeAttestation = 2
	typeCredential  = 3
)

// Limits on received objects, checked before anything is allocated. A secure
// channel's handshake message is 65,535 bytes at most, so nothing a Rust peer
// can present is larger.
const (
	// MaxHistory is the longest change history in bytes.
	MaxHistory = 64 << 10
	// MaxChanges is the largest number of changes in a history.
	MaxChanges = 256
	// MaxAttestation is the longest attestation in bytes.
	MaxAttestation = 4 << 10
	// MaxCredential is the longest credential, with its attestation, in bytes.
	MaxCredential = 64 << 10
	// MaxAttributes is the largest number of attributes in a credential.
	MaxAttributes = 1024
	// MaxCredentials is the largest number of credentials in a Presentation.
	MaxCredentials = 16
)

var (
	errMissing        = errors.New("a required element is missing")
	errEnum           = errors.New("not a two-element array of variant and fields")
	errUnknownVariant = errors.New("unknown variant")
	errLength         = errors.New("byte string of the wrong length")
	errTrailing       = errors.New("bytes after the end")
	errRange          = errors.New("number out of range")
)

// fields walks the array of a minicbor-derived struct: indefinite arrays,
// unknown further elements and missing optional ones at the end are accepted
// (spec identity 1).
type fields struct {
	r    *cbor.Reader
	l    cbor.List
	done bool
}

func readFields(r *cbor.Reader) (fields, error) {
	l, err := r.Array()
	return fields{r: r, l: l}, err
}

// optional reports whether the next element is there and not null; the caller
// then reads it.
func (f *fields) optional() (bool, error) {
	if f.done {
		return false, nil
	}
	more, err := f.l.Next()
	if err != nil {
		return false, err
	}
	if !more {
		f.done = true
		return false, nil
	}
	return !f.r.Null(), nil
}

// need moves to an element that must be there.
func (f *fields) need() error {
	if f.done {
		return errMissing
	}
	more, err := f.l.Next()
	if err != nil {
		return err
	}
	if !more {
		f.done = true
		return errMissing
	}
	return nil
}

func (f *fields) bytes() ([]byte, error) {
	if err := f.need(); err != nil {
		return nil, err
	}
	return f.r.Bytes()
}

func (f *fields) uint() (uint64, error) {
	if err := f.need(); err != nil {
		return 0, err
	}
	return f.r.Uint()
}

func (f *fields) u8() (uint8, error) {
	v, err := f.uint()
	if err != nil {
		return 0, err
	}
	if v > 0xff {
		return 0, errRange
	}
	return uint8(v), nil
}

func (f *fields) bool() (bool, error) {
	if err := f.need(); err != nil {
		return false, err
	}
	return f.r.Bool()
}

// optionalHash reads a 32-byte string or null.
func (f *fields) optionalHash() (h [HashSize]byte, present bool, err error) {
	present, err = f.optional()
	if err != nil || !present {
		return h, false, err
	}
	b, err := f.r.Bytes()
	if err != nil {
		return h, false, err
	}
	if len(b) != HashSize {
		return h, false, errLength
	}
	return [HashSize]byte(b), true, nil
}

func (f *fields) hash() (h [HashSize]byte, err error) {
	b, err := f.bytes()
	if err != nil {
		return h, err
	}
	if len(b) != HashSize {
		return h, errLength
	}
	return [HashSize]byte(b), nil
}

// end skips elements that this version does not know.
func (f *fields) end() error {
	if f.done {
		return nil
	}
	f.done = true
	return f.l.SkipRest()
}

// readVariant reads the head of an enum, array(2) of variant index and fields,
// up to and with the head of the fields.
func readVariant(r *cbor.Reader) (uint64, fields, error) {
	l, err := r.Array()
	if err != nil {
		return 0, fields{}, err
	}
	if n, definite := l.Count(); !definite || n != 2 {
		return 0, fields{}, errEnum
	}
	idx, err := r.Uint()
	if err != nil {
		return 0, fields{}, err
	}
	if idx > 1 { // every enum here has the variants 0 and 1
		return 0, fields{}, errUnknownVariant
	}
	f, err := readFields(r)
	return idx, f, err
}

// readKey reads PrimaryPublicKey or CredentialVerifyingKey (spec identity 2).
func readKey(r *cbor.Reader) (PublicKey, error) {
	idx, f, err := readVariant(r)
	if err != nil {
		return PublicKey{}, err
	}
	b, err := f.bytes()
	if err != nil {
		return PublicKey{}, err
	}
	k := PublicKey{kind: KeyKind(idx), raw: string(b)}
	if len(b) != k.kind.size() {
		return PublicKey{}, errLength
	}
	return k, f.end()
}

type signature struct {
	kind KeyKind
	raw  [SignatureSize]byte
}

func readSignature(r *cbor.Reader) (signature, error) {
	idx, f, err := readVariant(r)
	if err != nil {
		return signature{}, err
	}
	b, err := f.bytes()
	if err != nil {
		return signature{}, err
	}
	if len(b) != SignatureSize {
		return signature{}, errLength
	}
	return signature{KeyKind(idx), [SignatureSize]byte(b)}, f.end()
}

// readEnvelope opens the signed bytes of an object: version and type must be
// the expected ones. The result aliases signed.
func readEnvelope(signed []byte, wantType uint8) ([]byte, error) {
	r := cbor.NewReader(signed)
	f, err := readFields(r)
	if err != nil {
		return nil, malformed(err)
	}
	version, err := f.u8()
	if err != nil {
		return nil, malformed(err)
	}
	typ, err := f.u8()
	if err != nil {
		return nil, malformed(err)
	}
	data, err := f.bytes()
	if err != nil {
		return nil, malformed(err)
	}
	if err := f.end(); err != nil {
		return nil, malformed(err)
	}
	if version != envelopeVersion {
		return nil, fmt.Errorf("%w: %d, want %d", ErrVersion, version, envelopeVersion)
	}
	if typ != wantType {
		return nil, fmt.Errorf("%w: type %d, want %d", ErrDataType, typ, wantType)
	}
	return data, nil
}

// atEnd refuses bytes after a whole object.
func atEnd(r *cbor.Reader) error {
	if r.Len() > 0 {
		return malformed(errTrailing)
	}
	return nil
}

func appendEnvelope(dst []byte, typ uint8, data []byte) []byte {
	dst = cbor.AppendArray(dst, 3)
	dst = cbor.AppendUint(dst, envelopeVersion)
	dst = cbor.AppendUint(dst, uint64(typ))
	return cbor.AppendBytes(dst, data)
}

// appendVariant appends array(2) of idx and the head of array(1): the one field
// follows.
func appendVariant(dst []byte, idx uint64) []byte {
	dst = cbor.AppendArray(dst, 2)
	dst = cbor.AppendUint(dst, idx)
	return cbor.AppendArray(dst, 1)
}

func appendKey(dst []byte, k PublicKey) []byte {
	return cbor.AppendBytesString(appendVariant(dst, uint64(k.kind)), k.raw)
}

func appendSignature(dst []byte, s signature) []byte {
	return cbor.AppendBytes(appendVariant(dst, uint64(s.kind)), s.raw[:])
}

func appendOptionalHash(dst []byte, h [HashSize]byte, present bool) []byte {
	if !present {
		return cbor.AppendNull(dst)
	}
	return cbor.AppendBytes(dst, h[:])
}
