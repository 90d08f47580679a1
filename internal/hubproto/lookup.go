package hubproto

import "fmt"

// LookupRequest asks the service `lookup` for the record of an address.
//
//	{0: 1, 1: address tstr}
type LookupRequest struct{ Address string }

type lookupRequestWire struct {
	Version uint64 `cbor:"0,keyasint"`
	Address string `cbor:"1,keyasint"`
}

// Marshal returns the encoded request.
func (r *LookupRequest) Marshal() ([]byte, error) {
	return encode(lookupRequestWire{Version, r.Address})
}

// ParseLookupRequest reads a request.
func ParseLookupRequest(b []byte) (*LookupRequest, error) {
	var w lookupRequestWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	if w.Address == "" {
		return nil, fmt.Errorf("%w: lookup of an empty address", ErrMalformed)
	}
	return &LookupRequest{Address: w.Address}, nil
}

// LookupAnswer is the answer: the address asked for, and its record or nil.
//
//	{0: 1, 1: address tstr, 2: record / null}
type LookupAnswer struct {
	Address string
	Record  *ForwarderRecord // nil: the hub has no such forwarder
}

type lookupAnswerWire struct {
	Version uint64         `cbor:"0,keyasint"`
	Address string         `cbor:"1,keyasint"`
	Record  *forwarderWire `cbor:"2,keyasint"`
}

// Marshal returns the encoded answer.
func (a *LookupAnswer) Marshal() ([]byte, error) {
	w := lookupAnswerWire{Version: Version, Address: a.Address}
	if a.Record != nil {
		r := a.Record.wire()
		w.Record = &r
	}
	return encode(w)
}

// ParseLookupAnswer reads an answer.
func ParseLookupAnswer(b []byte) (*LookupAnswer, error) {
	var w lookupAnswerWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	a := &LookupAnswer{Address: w.Address}
	if w.Record != nil {
		r, err := w.Record.record()
		if err != nil {
			return nil, err
		}
		a.Record = r
	}
	return a, nil
}
