// Package bare encodes and decodes the two BARE forms that Ockam library
// messages use (spec routing 5): a String and a byte vector, both an unsigned
// LEB128 length followed by the bytes.
package bare

import (
	"errors"
	"unicode/utf8"
)

// maxVarint is the longest LEB128 form of a 64-bit length.
const maxVarint = 10

var (
	// ErrTruncated means that the input is shorter than its length says.
	ErrTruncated = errors.New("bare: input is shorter than its length says")
	// ErrOverflow means that a length does not fit 64 bits.
	ErrOverflow = errors.New("bare: length does not fit 64 bits")
	// ErrNotUTF8 means that a String is not valid UTF-8.
	ErrNotUTF8 = errors.New("bare: string is not valid UTF-8")
	// ErrTrailing means that bytes follow a value that must use up its input.
	ErrTrailing = errors.New("bare: bytes follow the value")
)

// AppendUvarint appends v as unsigned LEB128.
func AppendUvarint(dst []byte, v uint64) []byte {
	for v >= 0x80 {
		dst = append(dst, byte(v)|0x80)
		v >>= 7
	}
	return append(dst, byte(v))
}

// Uvarint reads an unsigned LEB128 of at most ten bytes, over-long forms
// included, and returns the bytes after it.
func Uvarint(b []byte) (v uint64, rest []byte, err error) {
	for i := range min(len(b), maxVarint) {
		c := b[i]
		if i == maxVarint-1 && c > 1 {
			return 0, nil, ErrOverflow
		}
		v |= uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			return v, b[i+1:], nil
		}
	}
	return 0, nil, ErrTruncated
}

// AppendString appends s as a BARE String.
func AppendString(dst []byte, s string) []byte {
	return append(AppendUvarint(dst, uint64(len(s))), s...)
}

// Bytes reads a byte vector and returns the bytes after it. Both alias b.
func Bytes(b []byte) (v, rest []byte, err error) {
	n, rest, err := Uvarint(b)
	if err != nil {
		return nil, nil, err
	}
	if n > uint64(len(rest)) {
		return nil, nil, ErrTruncated
	}
	return rest[:n], rest[n:], nil
}

// String reads a String and ignores what follows, as a stock peer does.
func String(b []byte) (string, error) {
	v, _, err := Bytes(b)
	if err != nil {
		return "", err
	}
	if !utf8.Valid(v) {
		return "", ErrNotUTF8
	}
	return string(v), nil
}

// StringExact reads a String that must use up all of b.
func StringExact(b []byte) (string, error) {
	v, rest, err := Bytes(b)
	switch {
	case err != nil:
		return "", err
	case len(rest) != 0:
		return "", ErrTrailing
	case !utf8.Valid(v):
		return "", ErrNotUTF8
	}
	return string(v), nil
}
