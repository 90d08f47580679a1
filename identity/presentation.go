package identity

import (
	"fmt"

	"github.com/sealmq/sealmq/internal/cbor"
)

// Presentation is what a peer shows of itself in a handshake (spec
// secure-channel 4):
//
//	IdentityAndCredentials = array(3) [ change_history, purpose_key_attestation,
//	    credentials: array of CredentialAndPurposeKey ]
//
// Its fields are the encoded objects; none of them has been verified.
type Presentation struct {
	History     []byte   // for Import
	Attestation []byte   // for VerifyChannelAttestation
	Credentials [][]byte // for VerifyCredential
}

// Append appends the encoding to dst.
func (p Presentation) Append(dst []byte) []byte {
	dst = cbor.AppendArray(dst, 3)
	dst = append(dst, p.History...)
	dst = append(dst, p.Attestation...)
	dst = cbor.AppendArray(dst, len(p.Credentials))
	for _, c := range p.Credentials {
		dst = append(dst, c...)
	}
	return dst
}

// ParsePresentation splits an encoded presentation. Each object must decode,
// signed contents aside, as with a Rust peer, where one credential that does
// not decode fails the handshake; nothing is verified. The fields alias b.
// Bytes after it are ignored.
func ParsePresentation(b []byte) (Presentation, error) {
	var p Presentation
	r := cbor.NewReader(b)
	if err := p.read(r); err != nil {
		return Presentation{}, refuse(objPresentation, err)
	}
	return p, nil
}

func (p *Presentation) read(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return malformed(err)
	}
	if err := f.need(); err != nil {
		return malformed(err)
	}
	if p.History, err = splitHistory(r); err != nil {
		return err
	}
	if err := f.need(); err != nil {
		return malformed(err)
	}
	start := r.Offset()
	if _, _, err := readSigned(r); err != nil {
		return malformed(err)
	}
	p.Attestation = r.Since(start)
	if err := f.need(); err != nil {
		return malformed(err)
	}
	if p.Credentials, err = splitCredentials(r); err != nil {
		return err
	}
	if err := f.end(); err != nil {
		return malformed(err)
	}
	return nil
}

// splitHistory reads over a change history.
func splitHistory(r *cbor.Reader) ([]byte, error) {
	start := r.Offset()
	if _, err := parseHistory(r); err != nil {
		return nil, err
	}
	return r.Since(start), nil
}

// splitCredentials reads over an array of credentials.
func splitCredentials(r *cbor.Reader) ([][]byte, error) {
	l, err := r.Array()
	if err != nil {
		return nil, malformed(err)
	}
	var out [][]byte
	for {
		more, err := l.Next()
		if err != nil {
			return nil, malformed(err)
		}
		if !more {
			return out, nil
		}
		if len(out) == MaxCredentials {
			return nil, fmt.Errorf("%w: %d credentials at most", ErrTooLarge, MaxCredentials)
		}
		start := r.Offset()
		if _, err := readCredential(r); err != nil {
			return nil, malformed(err)
		}
		out = append(out, r.Since(start))
	}
}

// ParseRefresh splits what a RefreshCredentials message carries (spec
// secure-channel 13): a change history and credentials, without attestation.
// It is otherwise as ParsePresentation.
func ParseRefresh(b []byte) (history []byte, credentials [][]byte, err error) {
	r := cbor.NewReader(b)
	f, err := readFields(r)
	if err != nil {
		return nil, nil, refuse(objPresentation, malformed(err))
	}
	if err := f.need(); err != nil {
		return nil, nil, refuse(objPresentation, malformed(err))
	}
	if history, err = splitHistory(r); err != nil {
		return nil, nil, refuse(objPresentation, err)
	}
	if err := f.need(); err != nil {
		return nil, nil, refuse(objPresentation, malformed(err))
	}
	if credentials, err = splitCredentials(r); err != nil {
		return nil, nil, refuse(objPresentation, err)
	}
	if err := f.end(); err != nil {
		return nil, nil, refuse(objPresentation, malformed(err))
	}
	return history, credentials, nil
}

// AppendRefresh appends what ParseRefresh reads.
func AppendRefresh(dst, history []byte, credentials ...[]byte) []byte {
	dst = cbor.AppendArray(dst, 2)
	dst = append(dst, history...)
	dst = cbor.AppendArray(dst, len(credentials))
	for _, c := range credentials {
		dst = append(dst, c...)
	}
	return dst
}
