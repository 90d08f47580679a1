package identity

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/sealmq/sealmq/internal/cbor"
)

// Change describes one change of an identity: one key and the time in which it
// may sign.
type Change struct {
	Hash       ChangeHash
	PublicKey  PublicKey
	RevokedAll bool      // the change revokes all purpose keys before it; no Rust verifier acts on it
	ValidFrom  time.Time // the key attests from here
	ValidUntil time.Time // the key attests until here
}

// change is a verified change. data aliases the history's bytes.
type change struct {
	data        []byte
	offset      int        // of data in the history
	hash        ChangeHash // also the digest that the signatures cover
	previous    ChangeHash
	hasPrevious bool
	key         PublicKey
	revokeAll   bool
	from, until uint64 // Unix seconds
	sig         signature
	prevSig     signature
	hasPrevSig  bool
}

// Identity is a public identity whose whole change history has been verified
// (spec identity 7). It is immutable and safe for concurrent use.
type Identity struct {
	history []byte // exactly as received
	changes []change
}

// Import verifies an encoded change history and returns its identity. It keeps
// the bytes exactly as they are and copies them: history may be reused. The
// rules are those of spec identity 7; the time plays no part in them. Bytes
// after the history are refused: on the wire a history is always an element of
// something larger (see ParsePresentation), and a stray byte would let a longer
// history pass for a shorter one by its first byte. Errors are *VerifyError.
func Import(history []byte) (*Identity, error) {
	r := cbor.NewReader(history)
	changes, err := parseHistory(r)
	if err != nil {
		return nil, err
	}
	if err := atEnd(r); err != nil {
		return nil, refuse(objHistory, err)
	}
	id := &Identity{history: bytes.Clone(history), changes: changes}
	for i := range changes { // the copy is what stays
		c := &changes[i]
		c.data = id.history[c.offset : c.offset+len(c.data)]
	}
	if err := id.verify(0); err != nil {
		return nil, err
	}
	return id, nil
}

// ImportAs is Import for a history that must be that of want: any other
// identity is refused with ErrWrongIdentifier, before its signatures are verified.
func ImportAs(want Identifier, history []byte) (*Identity, error) {
	id, err := IdentifierOf(history)
	if err != nil {
		return nil, err
	}
	if id != want {
		return nil, refuse(objHistory, fmt.Errorf("%w: it is %v's", ErrWrongIdentifier, id))
	}
	return Import(history)
}

// IdentifierOf returns whose history it would be. It verifies no signature: that the
// history is valid, Import alone says. It costs little, so whoever expects a certain
// identity need not verify those of others. Errors are *VerifyError.
func IdentifierOf(history []byte) (Identifier, error) {
	changes, err := parseHistory(cbor.NewReader(history))
	if err != nil {
		return Identifier{}, err
	}
	return sha256.Sum256(changes[0].data), nil
}

// parseHistory decodes all changes, without what they sign.
func parseHistory(r *cbor.Reader) ([]change, error) {
	start := r.Offset()
	l, err := r.Array()
	if err != nil {
		return nil, refuse(objHistory, malformed(err))
	}
	if n, definite := l.Count(); definite && n > MaxChanges {
		return nil, refuse(objHistory, fmt.Errorf("%w: %d changes, %d at most", ErrTooLarge, n, MaxChanges))
	}
	var changes []change
	for {
		more, err := l.Next()
		if err != nil {
			return nil, refuse(objHistory, malformed(err))
		}
		if !more {
			break
		}
		i := len(changes)
		if i == MaxChanges {
			return nil, refuse(objHistory, fmt.Errorf("%w: more than %d changes", ErrTooLarge, MaxChanges))
		}
		var c change
		if err := c.read(r); err != nil {
			return nil, refuseChange(i, malformed(err))
		}
		if r.Offset()-start > MaxHistory {
			return nil, refuse(objHistory, fmt.Errorf("%w: %d bytes at most", ErrTooLarge, MaxHistory))
		}
		c.offset -= start
		changes = append(changes, c)
	}
	if len(changes) == 0 {
		return nil, refuse(objHistory, ErrEmptyHistory)
	}
	return changes, nil
}

// read decodes Change without its signed data:
//
//	Change = array(2..3) [ data: bytes, signature, previous_signature ]
func (c *change) read(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return err
	}
	if c.data, err = f.bytes(); err != nil {
		return err
	}
	c.offset = r.Offset() - len(c.data)
	if err := f.need(); err != nil {
		return err
	}
	if c.sig, err = readSignature(r); err != nil {
		return err
	}
	present, err := f.optional()
	if err != nil {
		return err
	}
	if present {
		start := *r
		switch c.prevSig, err = readSignature(r); {
		case errors.Is(err, errUnknownVariant):
			*r = start // an optional enum of an unknown variant is as none
			if err := r.Skip(); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			c.hasPrevSig = true
		}
	}
	return f.end()
}

// readData decodes the signed part:
//
//	ChangeData = array(5) [ previous_change: bytes(32) / null, primary_public_key,
//	    revoke_all_purpose_keys: bool, attestations_valid_from, …_until: uint ]
func (c *change) readData() error {
	data, err := readEnvelope(c.data, typeChange)
	if err != nil {
		return err
	}
	if err := c.readChangeData(cbor.NewReader(data)); err != nil {
		return malformed(err)
	}
	return nil
}

func (c *change) readChangeData(r *cbor.Reader) error {
	f, err := readFields(r)
	if err != nil {
		return err
	}
	previous, present, err := f.optionalHash()
	if err != nil {
		return err
	}
	c.previous, c.hasPrevious = previous, present
	if err := f.need(); err != nil {
		return err
	}
	if c.key, err = readKey(r); err != nil {
		return err
	}
	if c.revokeAll, err = f.bool(); err != nil {
		return err
	}
	if c.from, err = f.uint(); err != nil {
		return err
	}
	if c.until, err = f.uint(); err != nil {
		return err
	}
	return f.end()
}

// verify runs the two passes of spec identity 7. The first n changes have been
// verified before.
func (id *Identity) verify(n int) error {
	for i := n; i < len(id.changes); i++ {
		c := &id.changes[i]
		if err := c.readData(); err != nil {
			return refuseChange(i, err)
		}
		c.hash = sha256.Sum256(c.data)
		if i == 0 {
			if c.hasPrevious {
				return refuseChange(i, ErrNotFirst)
			}
			continue
		}
		before := &id.changes[i-1]
		if !c.hasPrevious || c.previous != before.hash {
			return refuseChange(i, ErrBrokenChain)
		}
		if c.from < before.from {
			return refuseChange(i, ErrBackdated)
		}
	}
	for i := n; i < len(id.changes); i++ {
		c := &id.changes[i]
		digest := (*[HashSize]byte)(&c.hash)
		if i > 0 {
			if !c.hasPrevSig {
				return refuseChange(i, ErrNoPreviousSignature)
			}
			if err := id.changes[i-1].key.verify(digest, &c.prevSig); err != nil {
				return refuseChange(i, fmt.Errorf("previous key: %w", err))
			}
		}
		if err := c.key.verify(digest, &c.sig); err != nil {
			return refuseChange(i, err)
		}
	}
	return nil
}

// Identifier returns the name that stays for life.
func (id *Identity) Identifier() Identifier { return Identifier(id.changes[0].hash) }

// String returns the identifier's text form.
func (id *Identity) String() string { return id.Identifier().String() }

// ChangeHistory returns a copy of the encoded history, exactly as received.
func (id *Identity) ChangeHistory() []byte { return bytes.Clone(id.history) }

// AppendChangeHistory appends the encoded history to dst.
func (id *Identity) AppendChangeHistory(dst []byte) []byte { return append(dst, id.history...) }

// LatestChange returns the hash of the latest change.
func (id *Identity) LatestChange() ChangeHash { return id.latest().hash }

// PublicKey returns the key of the latest change.
func (id *Identity) PublicKey() PublicKey { return id.latest().key }

// Changes describes all changes, oldest first. The slice belongs to the caller.
func (id *Identity) Changes() []Change {
	out := make([]Change, len(id.changes))
	for i := range id.changes {
		c := &id.changes[i]
		out[i] = Change{c.hash, c.key, c.revokeAll, unixTime(c.from), unixTime(c.until)}
	}
	return out
}

func (id *Identity) latest() *change { return &id.changes[len(id.changes)-1] }

// Comparison is how one history of an identity relates to another.
type Comparison uint8

// The results of Compare.
const (
	Equal    Comparison = iota // the same changes
	Newer                      // the known changes and more
	Older                      // a part of the known changes
	Conflict                   // a fork, or another identity
)

func (c Comparison) String() string {
	switch c {
	case Equal:
		return "Equal"
	case Newer:
		return "Newer"
	case Older:
		return "Older"
	case Conflict:
		return "Conflict"
	}
	return fmt.Sprintf("Comparison(%d)", uint8(c))
}

// Compare says what id is, seen from known (spec identity 9): Newer means that
// id goes on where known ends. Only the hashes of the changes count.
func (id *Identity) Compare(known *Identity) Comparison {
	for i := range min(len(id.changes), len(known.changes)) {
		if id.changes[i].hash != known.changes[i].hash {
			return Conflict
		}
	}
	switch {
	case len(id.changes) < len(known.changes):
		return Older
	case len(id.changes) > len(known.changes):
		return Newer
	}
	return Equal
}

// makeChange signs the change that follows history, whose last change is known
// to be valid; previous is nil for the first one.
func makeChange(known *Identity, previous, next Signer, from, until uint64, revokeAll bool) (*Identity, error) {
	var prevHash ChangeHash
	if known != nil {
		prevHash = known.LatestChange()
	}
	data := cbor.AppendArray(nil, 5)
	data = appendOptionalHash(data, prevHash, known != nil)
	data = appendKey(data, next.PublicKey())
	data = cbor.AppendBool(data, revokeAll)
	data = cbor.AppendUint(data, from)
	data = cbor.AppendUint(data, until)
	signed := appendEnvelope(nil, typeChange, data)
	digest := sha256.Sum256(signed)

	added := change{data: signed}
	var err error
	if added.sig, err = sign(next, digest); err != nil {
		return nil, err
	}
	id := &Identity{}
	items := 2
	if known != nil {
		items = 3
		id.changes = slices.Clip(known.changes)
		if added.prevSig, err = sign(previous, digest); err != nil {
			return nil, err
		}
		added.hasPrevSig = true
	}
	count := len(id.changes) + 1
	if count > MaxChanges {
		return nil, refuse(objHistory, fmt.Errorf("%w: %d changes are the most there can be", ErrTooLarge, MaxChanges))
	}
	out := cbor.AppendArray(nil, count)
	if known != nil {
		out = append(out, known.items()...)
	}
	out = cbor.AppendArray(out, items)
	out = cbor.AppendBytes(out, signed)
	out = appendSignature(out, added.sig)
	if known != nil {
		out = appendSignature(out, added.prevSig)
	}
	if len(out) > MaxHistory {
		return nil, refuse(objHistory, fmt.Errorf("%w: %d bytes at most", ErrTooLarge, MaxHistory))
	}
	id.history, id.changes = out, append(id.changes, added)
	// A faulty device must not put a change into a history that peers refuse.
	if err := id.verify(count - 1); err != nil {
		return nil, err
	}
	return id, nil
}

// items returns the encoded changes without the head of the array around them.
func (id *Identity) items() []byte {
	_, _, indefinite, n, err := cbor.ReadHead(id.history)
	if err != nil {
		panic("identity: verified history does not parse") // cannot happen: it was parsed
	}
	b := id.history[n:]
	if indefinite {
		b = b[:len(b)-1] // the break
	}
	return slices.Clip(b)
}

// maxUnix is the last second of the year 9999: later times cannot be written
// in RFC 3339, so JSON could not hold them.
const maxUnix = 253402300799

// unixTime turns wire seconds into a time in UTC; times after the year 9999
// become its last second.
func unixTime(s uint64) time.Time {
	return time.Unix(int64(min(s, maxUnix)), 0).UTC()
}

// wireTime turns a time into wire seconds; times before 1970 become 0.
func wireTime(t time.Time) uint64 { return uint64(max(t.Unix(), 0)) }

// addSeconds adds a lifetime without wrapping around.
func addSeconds(t, d uint64) uint64 {
	if t > math.MaxUint64-d {
		return math.MaxUint64
	}
	return t + d
}
