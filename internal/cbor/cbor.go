// Package cbor reads and writes the few CBOR forms (RFC 8949) that the Ockam
// wire uses: unsigned integers, byte strings, text strings, arrays, maps,
// booleans and null.
//
// The writing half emits only shortest, definite heads. The reading half is as
// lenient as the decoder of a stock Rust peer (minicbor): any integer width,
// indefinite arrays and maps, but definite byte and text strings only, and no
// tags where a value is expected. It never allocates: byte strings alias the
// input.
//
// Frames on the hub's hot path are scanned by package route with the same
// heads. Our own integer-keyed maps (docs/protocol.md) use fxamacker/cbor.
package cbor

import (
	"errors"
	"fmt"
)

// Major types, as the top three bits of a head (RFC 8949, 3.1).
const (
	Uint   byte = 0 << 5
	NegInt byte = 1 << 5
	Bytes  byte = 2 << 5
	Text   byte = 3 << 5
	Array  byte = 4 << 5
	Map    byte = 5 << 5
	Tag    byte = 6 << 5
	Simple byte = 7 << 5
)

// Single-byte items.
const (
	False     byte = 0xf4
	True      byte = 0xf5
	Null      byte = 0xf6
	Undefined byte = 0xf7
	Break     byte = 0xff
)

// maxDepth bounds the nesting that Skip follows.
const maxDepth = 16

var (
	// ErrTruncated means that the input ends inside an item.
	ErrTruncated = errors.New("cbor: input ends inside an item")
	// ErrMalformed means that a head is not well-formed CBOR.
	ErrMalformed = errors.New("cbor: malformed head")
	// ErrDepth means that items nest deeper than any Ockam structure does.
	ErrDepth = errors.New("cbor: nested too deeply")
)

// TypeError reports an item of another kind than the structure asks for.
type TypeError struct {
	Want string // what the structure asks for, e.g. "byte string"
	Got  byte   // the head byte found
}

func (e *TypeError) Error() string {
	return fmt.Sprintf("cbor: want %s, found head 0x%02x", e.Want, e.Got)
}

// AppendHead appends the shortest head of the given major type and argument.
func AppendHead(dst []byte, major byte, arg uint64) []byte {
	switch {
	case arg < 24:
		return append(dst, major|byte(arg))
	case arg <= 0xff:
		return append(dst, major|24, byte(arg))
	case arg <= 0xffff:
		return append(dst, major|25, byte(arg>>8), byte(arg))
	case arg <= 0xffffffff:
		return append(dst, major|26, byte(arg>>24), byte(arg>>16), byte(arg>>8), byte(arg))
	default:
		return append(dst, major|27, byte(arg>>56), byte(arg>>48), byte(arg>>40), byte(arg>>32),
			byte(arg>>24), byte(arg>>16), byte(arg>>8), byte(arg))
	}
}

// HeadLen returns the length in bytes of the shortest head for arg.
func HeadLen(arg uint64) int {
	switch {
	case arg < 24:
		return 1
	case arg <= 0xff:
		return 2
	case arg <= 0xffff:
		return 3
	case arg <= 0xffffffff:
		return 5
	default:
		return 9
	}
}

// AppendUint appends an unsigned integer.
func AppendUint(dst []byte, v uint64) []byte { return AppendHead(dst, Uint, v) }

// AppendArray appends the head of a definite array of n items.
func AppendArray(dst []byte, n int) []byte { return AppendHead(dst, Array, uint64(n)) }

// AppendMap appends the head of a definite map of n pairs.
func AppendMap(dst []byte, n int) []byte { return AppendHead(dst, Map, uint64(n)) }

// AppendBytes appends a byte string.
func AppendBytes(dst, b []byte) []byte {
	return append(AppendHead(dst, Bytes, uint64(len(b))), b...)
}

// AppendBytesString appends the bytes of s as a byte string.
func AppendBytesString(dst []byte, s string) []byte {
	return append(AppendHead(dst, Bytes, uint64(len(s))), s...)
}

// AppendText appends a text string.
func AppendText(dst []byte, s string) []byte {
	return append(AppendHead(dst, Text, uint64(len(s))), s...)
}

// AppendBool appends a boolean.
func AppendBool(dst []byte, v bool) []byte {
	if v {
		return append(dst, True)
	}
	return append(dst, False)
}

// AppendNull appends null.
func AppendNull(dst []byte) []byte { return append(dst, Null) }

// ReadHead reads one head. It returns the major type, the argument, whether the
// item is of indefinite length (additional information 31), and the head's
// length in bytes. Simple values and floats come back with major Simple and the
// raw argument.
func ReadHead(b []byte) (major byte, arg uint64, indefinite bool, n int, err error) {
	if len(b) == 0 {
		return 0, 0, false, 0, ErrTruncated
	}
	major = b[0] & 0xe0
	info := b[0] & 0x1f
	switch {
	case info < 24:
		return major, uint64(info), false, 1, nil
	case info == 24:
		n = 2
	case info == 25:
		n = 3
	case info == 26:
		n = 5
	case info == 27:
		n = 9
	case info == 31:
		if major == Uint || major == NegInt || major == Tag {
			return 0, 0, false, 0, ErrMalformed
		}
		return major, 0, true, 1, nil
	default:
		return 0, 0, false, 0, ErrMalformed
	}
	if len(b) < n {
		return 0, 0, false, 0, ErrTruncated
	}
	for _, c := range b[1:n] {
		arg = arg<<8 | uint64(c)
	}
	return major, arg, false, n, nil
}

// Reader walks one input from front to back. The zero value reads nothing; make
// one with NewReader. Byte strings it returns alias the input. A Reader is not
// safe for concurrent use.
type Reader struct {
	b   []byte
	off int
}

// NewReader returns a Reader at the start of b.
func NewReader(b []byte) *Reader { return &Reader{b: b} }

// Offset returns how many bytes have been read.
func (r *Reader) Offset() int { return r.off }

// Len returns how many bytes are left.
func (r *Reader) Len() int { return len(r.b) - r.off }

// Rest returns the bytes not read yet.
func (r *Reader) Rest() []byte { return r.b[r.off:] }

// Since returns the bytes read since offset start.
func (r *Reader) Since(start int) []byte { return r.b[start:r.off] }

// Peek returns the next head byte without reading it; 0 and false at the end.
func (r *Reader) Peek() (byte, bool) {
	if r.off >= len(r.b) {
		return 0, false
	}
	return r.b[r.off], true
}

func (r *Reader) head(want string, major byte) (arg uint64, indefinite bool, err error) {
	if r.off >= len(r.b) {
		return 0, false, ErrTruncated
	}
	got, arg, indefinite, n, err := ReadHead(r.b[r.off:])
	if err != nil {
		return 0, false, err
	}
	if got != major {
		return 0, false, &TypeError{Want: want, Got: r.b[r.off]}
	}
	r.off += n
	return arg, indefinite, nil
}

// Uint reads an unsigned integer of any width.
func (r *Reader) Uint() (uint64, error) {
	v, _, err := r.head("unsigned integer", Uint)
	return v, err
}

// Bytes reads a definite byte string. The result aliases the input.
func (r *Reader) Bytes() ([]byte, error) { return r.str("byte string", Bytes) }

// Text reads a definite text string as raw bytes; the caller checks UTF-8 where
// it matters. The result aliases the input.
func (r *Reader) Text() ([]byte, error) { return r.str("text string", Text) }

func (r *Reader) str(want string, major byte) ([]byte, error) {
	start := r.off
	n, indefinite, err := r.head(want, major)
	if err != nil {
		return nil, err
	}
	if indefinite {
		got := r.b[start]
		r.off = start
		return nil, &TypeError{Want: "definite " + want, Got: got}
	}
	if n > uint64(r.Len()) {
		r.off = start
		return nil, ErrTruncated
	}
	s := r.b[r.off : r.off+int(n) : r.off+int(n)]
	r.off += int(n)
	return s, nil
}

// Bool reads a boolean.
func (r *Reader) Bool() (bool, error) {
	c, ok := r.Peek()
	if !ok {
		return false, ErrTruncated
	}
	if c != True && c != False {
		return false, &TypeError{Want: "boolean", Got: c}
	}
	r.off++
	return c == True, nil
}

// Null reads a null if one is next, and reports whether it did.
func (r *Reader) Null() bool {
	if c, ok := r.Peek(); ok && c == Null {
		r.off++
		return true
	}
	return false
}

// List is an array or map being read: call Next before each item.
type List struct {
	r          *Reader
	left       uint64
	indefinite bool
	definiteN  uint64
}

// Array reads an array head, definite or not.
func (r *Reader) Array() (List, error) { return r.list("array", Array) }

// Map reads a map head, definite or not; Next precedes each pair.
func (r *Reader) Map() (List, error) { return r.list("map", Map) }

func (r *Reader) list(want string, major byte) (List, error) {
	n, indefinite, err := r.head(want, major)
	if err != nil {
		return List{}, err
	}
	// Each item takes a byte at least: a longer count cannot be honest.
	if !indefinite && n > uint64(r.Len()) {
		return List{}, ErrTruncated
	}
	return List{r: r, left: n, definiteN: n, indefinite: indefinite}, nil
}

// Count returns the number of items of a definite list, and false for an
// indefinite one.
func (l *List) Count() (int, bool) { return int(l.definiteN), !l.indefinite }

// Next reports whether another item follows; it reads the break of an
// indefinite list.
func (l *List) Next() (bool, error) {
	if !l.indefinite {
		if l.left == 0 {
			return false, nil
		}
		l.left--
		return true, nil
	}
	c, ok := l.r.Peek()
	if !ok {
		return false, ErrTruncated
	}
	if c == Break {
		l.r.off++
		return false, nil
	}
	return true, nil
}

// SkipRest skips the items that are left, as a stock peer does with array
// elements it does not know.
func (l *List) SkipRest() error {
	for {
		more, err := l.Next()
		if err != nil || !more {
			return err
		}
		if err := l.r.Skip(); err != nil {
			return err
		}
	}
}

// Skip reads one whole item of any kind.
func (r *Reader) Skip() error { return r.skip(maxDepth) }

func (r *Reader) skip(depth int) error {
	if depth == 0 {
		return ErrDepth
	}
	major, arg, indefinite, n, err := ReadHead(r.Rest())
	if err != nil {
		return err
	}
	switch major {
	case Uint, NegInt:
		r.off += n
	case Bytes, Text:
		r.off += n
		if indefinite {
			return r.skipUntilBreak(depth, 1)
		}
		if arg > uint64(r.Len()) {
			return ErrTruncated
		}
		r.off += int(arg)
	case Tag:
		r.off += n
		return r.skip(depth - 1)
	case Array, Map:
		per := 1
		if major == Map {
			per = 2
		}
		r.off += n
		if indefinite {
			return r.skipUntilBreak(depth, per)
		}
		if arg > uint64(r.Len()) {
			return ErrTruncated
		}
		for range arg * uint64(per) {
			if err := r.skip(depth - 1); err != nil {
				return err
			}
		}
	default:
		if indefinite {
			return ErrMalformed // a break where an item is due
		}
		r.off += n
	}
	return nil
}

func (r *Reader) skipUntilBreak(depth, per int) error {
	for {
		c, ok := r.Peek()
		if !ok {
			return ErrTruncated
		}
		if c == Break {
			r.off++
			return nil
		}
		for range per {
			if err := r.skip(depth - 1); err != nil {
				return err
			}
		}
	}
}
