package hubproto

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// ForwarderKind says how a forwarding address came to be.
type ForwarderKind uint8

const (
	// Dynamic is an address that the hub chose.
	Dynamic ForwarderKind = 1
	// Static is `forward_to_` and an alias.
	Static ForwarderKind = 2
)

// String returns the JSON name of k.
func (k ForwarderKind) String() string {
	switch k {
	case Dynamic:
		return "dynamic"
	case Static:
		return "static"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// ForwarderRecord is what the hub tells about a forwarding address: to
// observers as retained JSON, to anybody who asks `lookup` as CBOR. It holds no
// secret: no hub address and no stored route.
//
//	{0: 1, 1: address tstr, 2: kind uint, 3: identifier bstr 32 or empty,
//	 4: proven bool, 5: device tstr, 6: since uint (unix ms), 7: online bool,
//	 8: claim bstr}
type ForwarderRecord struct {
	Address string
	Kind    ForwarderKind
	// Owner is the identity that registered the address; zero for a plain TCP
	// connection.
	Owner identity.Identifier
	// Proven says whether the hub saw a proof of Owner.
	Proven bool
	// Device is the owner's client id; empty for a TCP connection.
	Device string
	// Since is when the address was first registered, in milliseconds.
	Since time.Time
	// Online says whether the owner was attached when the record was made.
	Online bool
	// Claim is the owner's signed claim to the address; empty: unsigned.
	Claim []byte
}

type forwarderWire struct {
	Version uint64 `cbor:"0,keyasint"`
	Address string `cbor:"1,keyasint"`
	Kind    uint8  `cbor:"2,keyasint"`
	Owner   []byte `cbor:"3,keyasint"`
	Proven  bool   `cbor:"4,keyasint"`
	Device  string `cbor:"5,keyasint"`
	Since   uint64 `cbor:"6,keyasint"`
	Online  bool   `cbor:"7,keyasint"`
	Claim   []byte `cbor:"8,keyasint"`
}

type forwarderJSON struct {
	Version uint64 `json:"v"`
	Address string `json:"address"`
	Kind    string `json:"kind"`
	Owner   string `json:"identifier,omitempty"`
	Proven  bool   `json:"proven"`
	Device  string `json:"device,omitempty"`
	Since   string `json:"since"`
	Online  bool   `json:"online"`
	Signed  bool   `json:"signed"`
	Claim   []byte `json:"claim,omitempty"` // base64
}

// timeForm is the one form of time in JSON records: UTC, milliseconds.
const timeForm = "2006-01-02T15:04:05.000Z"

func (r *ForwarderRecord) wire() forwarderWire {
	w := forwarderWire{
		Version: Version, Address: r.Address, Kind: uint8(r.Kind), Owner: []byte{}, Proven: r.Proven,
		Device: r.Device, Since: uint64(max(r.Since.UnixMilli(), 0)), Online: r.Online, Claim: nonNil(r.Claim),
	}
	if r.Owner != (identity.Identifier{}) {
		w.Owner = r.Owner[:]
	}
	return w
}

func (w *forwarderWire) record() (*ForwarderRecord, error) {
	if w.Version != Version {
		return nil, fmt.Errorf("%w: record %d", ErrVersion, w.Version)
	}
	if w.Since > maxMilli {
		return nil, fmt.Errorf("%w: time out of range", ErrMalformed)
	}
	r := &ForwarderRecord{
		Address: w.Address, Kind: ForwarderKind(w.Kind), Proven: w.Proven, Device: w.Device,
		Since: time.UnixMilli(int64(w.Since)), Online: w.Online, Claim: w.Claim,
	}
	if len(w.Owner) != 0 {
		id, err := fixed[[32]byte]("identifier", w.Owner)
		if err != nil {
			return nil, err
		}
		r.Owner = identity.Identifier(id)
	}
	return r, nil
}

// Marshal returns the CBOR rendering.
func (r *ForwarderRecord) Marshal() ([]byte, error) { return encode(r.wire()) }

// ParseForwarderRecord reads the CBOR rendering.
func ParseForwarderRecord(b []byte) (*ForwarderRecord, error) {
	var w forwarderWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	return w.record()
}

// JSON returns the rendering for observers.
func (r *ForwarderRecord) JSON() []byte {
	j := forwarderJSON{
		Version: Version, Address: r.Address, Kind: r.Kind.String(), Proven: r.Proven, Device: r.Device,
		Since: r.Since.UTC().Format(timeForm), Online: r.Online, Signed: len(r.Claim) != 0, Claim: r.Claim,
	}
	if r.Owner != (identity.Identifier{}) {
		j.Owner = r.Owner.String()
	}
	return mustJSON(j)
}

// StatusRecord is the retained record on a device's status topic.
type StatusRecord struct {
	Device string
	Online bool
	// Since is when the device came or went, in milliseconds.
	Since time.Time
}

// JSON returns {"v":1,"device":"…","status":"online","since":"…"}.
func (r *StatusRecord) JSON() []byte {
	s := "offline"
	if r.Online {
		s = "online"
	}
	return mustJSON(struct {
		Version uint64 `json:"v"`
		Device  string `json:"device"`
		Status  string `json:"status"`
		Since   string `json:"since"`
	}{Version, r.Device, s, r.Since.UTC().Format(timeForm)})
}

// mustJSON encodes a struct of strings, numbers and booleans, which cannot fail.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
