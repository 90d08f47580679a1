package hubproto

import (
	"errors"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/identity"
)

const (
	// ClaimContext is the domain of the signature in a Claim.
	ClaimContext = "sealmq claim/1"
	// MaxClaim bounds a claim, in bytes, so that it fits into the answer of
	// lookup.
	MaxClaim = 3 << 10
	// ClaimTTL is how long a claim is made for, and MaxClaimTTL how far in the
	// future its end may be.
	ClaimTTL    = 7 * 24 * time.Hour
	MaxClaimTTL = 31 * 24 * time.Hour
	// ServiceClaim takes claims, ServiceRelease gives addresses up.
	ServiceClaim   = "claim"
	ServiceRelease = "release"
)

// Reasons why a claim of good form is refused.
var (
	// ErrClaimExpired means that a claim has ended, or reaches too far.
	ErrClaimExpired = errors.New("hubproto: claim is not valid now")
	// ErrClaimHistory means that the claimant's history came neither with the
	// claim nor from elsewhere.
	ErrClaimHistory = errors.New("hubproto: claim without the claimant's change history")
)

// Claim is an owner's signed word about a forwarding address: "identifier I
// claims address F until T, number N".
//
//	{0: 1, 1: identifier bstr 32, 2: address tstr, 3: until uint (unix s),
//	 4: number uint, 5: signature bstr 64, 6: change history bstr}
//
// The signature is Private.Sign in ClaimContext over the encoded map of keys 0
// to 4. The history is empty when the claim would be too long with it. Of two
// claims of one identifier to one address the one with the larger number is in
// force. A claim does not name a hub: what an address leads to is proved by the
// handshake; the claim tells early who has to be at its end.
type Claim struct {
	Claimant  identity.Identifier
	Address   string
	Until     time.Time // whole seconds
	Number    uint64
	Signature []byte
	History   []byte
}

type claimSigned struct {
	Version  uint64 `cbor:"0,keyasint"`
	Claimant []byte `cbor:"1,keyasint"`
	Address  string `cbor:"2,keyasint"`
	Until    uint64 `cbor:"3,keyasint"`
	Number   uint64 `cbor:"4,keyasint"`
}

type claimWire struct {
	Version   uint64 `cbor:"0,keyasint"`
	Claimant  []byte `cbor:"1,keyasint"`
	Address   string `cbor:"2,keyasint"`
	Until     uint64 `cbor:"3,keyasint"`
	Number    uint64 `cbor:"4,keyasint"`
	Signature []byte `cbor:"5,keyasint"`
	History   []byte `cbor:"6,keyasint"`
}

// MakeClaim signs a claim to address. number is to be larger than that of every
// earlier claim of p to it.
func MakeClaim(p *identity.Private, address string, number uint64, until time.Time) (*Claim, error) {
	c := &Claim{
		Claimant: p.Identifier(), Address: address, Number: number,
		Until: time.Unix(until.Unix(), 0), History: p.Identity().ChangeHistory(),
	}
	body, err := c.signed()
	if err != nil {
		return nil, err
	}
	if c.Signature, err = p.Sign(ClaimContext, body); err != nil {
		return nil, err
	}
	if _, err := c.Marshal(); errors.Is(err, ErrTooLarge) {
		c.History = []byte{}
	}
	return c, nil
}

func (c *Claim) signed() ([]byte, error) {
	return encode(claimSigned{Version, c.Claimant[:], c.Address, uint64(max(c.Until.Unix(), 0)), c.Number})
}

// Marshal returns the encoded claim.
func (c *Claim) Marshal() ([]byte, error) {
	return encodeUpTo(claimWire{
		Version, c.Claimant[:], c.Address, uint64(max(c.Until.Unix(), 0)), c.Number, nonNil(c.Signature), nonNil(c.History),
	}, MaxClaim)
}

// ParseClaim reads a claim. Nothing in it is verified.
func ParseClaim(b []byte) (*Claim, error) {
	var w claimWire
	if err := decodeUpTo(b, &w, MaxClaim); err != nil {
		return nil, err
	}
	id, err := fixed[[32]byte]("identifier", w.Claimant)
	switch {
	case err != nil:
		return nil, err
	case w.Address == "" || len(w.Signature) != identity.SignatureSize:
		return nil, fmt.Errorf("%w: claim without address or signature", ErrMalformed)
	case w.Until > maxMilli/1000:
		return nil, fmt.Errorf("%w: time out of range", ErrMalformed)
	}
	return &Claim{
		Claimant: id, Address: w.Address, Until: time.Unix(int64(w.Until), 0), Number: w.Number,
		Signature: w.Signature, History: nonNil(w.History),
	}, nil
}

// Verify checks that the claimant signed the claim with its latest key and that
// it holds at now. known is the claimant as it was seen before, nil if never:
// then the history in the claim counts. It returns the claimant, as known or as
// the claim shows it. An older history than known is refused with
// identity.ErrOlder, a forked one with identity.ErrConflict.
func (c *Claim) Verify(known *identity.Identity, now time.Time) (*identity.Identity, error) {
	who := known
	if len(c.History) > 0 {
		shown, err := identity.ImportAs(c.Claimant, c.History)
		if err != nil {
			return nil, err
		}
		if known != nil {
			switch shown.Compare(known) {
			case identity.Older:
				return nil, identity.ErrOlder
			case identity.Conflict:
				return nil, identity.ErrConflict
			}
		}
		who = shown
	}
	if who == nil || who.Identifier() != c.Claimant {
		return nil, ErrClaimHistory
	}
	body, err := c.signed()
	if err != nil {
		return nil, err
	}
	if err := who.Verify(ClaimContext, body, c.Signature); err != nil {
		return nil, err
	}
	switch {
	case !now.Before(c.Until):
		return nil, fmt.Errorf("%w: it ended at %v", ErrClaimExpired, c.Until.UTC().Format(time.RFC3339))
	case c.Until.Sub(now) > MaxClaimTTL+identity.ClockTolerance:
		return nil, fmt.Errorf("%w: it reaches to %v", ErrClaimExpired, c.Until.UTC().Format(time.RFC3339))
	}
	return who, nil
}

// ReleaseRequest gives a forwarding address up; only its owner's connection may.
// The answer is that of lookup, without a record.
//
//	{0: 1, 1: address tstr}
type ReleaseRequest struct{ Address string }

// Marshal returns the encoded request.
func (r *ReleaseRequest) Marshal() ([]byte, error) {
	return (&LookupRequest{r.Address}).Marshal()
}

// ParseReleaseRequest reads a request.
func ParseReleaseRequest(b []byte) (*ReleaseRequest, error) {
	l, err := ParseLookupRequest(b)
	if err != nil {
		return nil, err
	}
	return &ReleaseRequest{l.Address}, nil
}
