package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The byte stream of the Ockam TCP transport (spec routing 3.1, 3.2), the same in
// both directions:
//
//	01                          preamble, once: protocol version 1
//	length: u32, big endian     of the body, 1 to MaxFrame
//	body                        length bytes, then the next length
const (
	// Preamble is the one byte that each side sends first.
	Preamble = 0x01
	// FrameHeaderLen is the length of a frame's length field.
	FrameHeaderLen = 4
)

var (
	// ErrPreamble means that the peer's first byte is not Preamble: it speaks
	// another protocol.
	ErrPreamble = errors.New("route: stream does not begin with byte 01: the peer does not speak the Ockam TCP transport")
	// ErrFraming means that a length is 0 or above MaxFrame. The stream cannot go
	// on.
	ErrFraming = errors.New("route: impossible frame length in stream")
)

// AppendFrameHeader appends the length that stands before a body of bodyLen bytes.
// bodyLen must be 1 to MaxFrame: a peer closes the connection over any other.
func AppendFrameHeader(dst []byte, bodyLen int) []byte {
	return binary.BigEndian.AppendUint32(dst, uint32(bodyLen))
}

// Sizes of a Reader's buffer in bytes. It starts small, since most connections of
// a hub are idle, and grows only to hold what has arrived.
const (
	firstBuffer = 512
	fullBuffer  = 32 << 10
	// shrinkAfter is how many frames in a row must fit fullBuffer before a larger
	// buffer is given up.
	shrinkAfter = 64
)

// Reader reads bodies from a TCP stream. It is not safe for concurrent use.
//
// A Reader holds at most about twice the bytes of the frame being received, or 32
// KiB, whatever a length field promises. An error of the underlying reader that is
// not final, such as a timeout, does not lose what has arrived: the call may be
// repeated.
type Reader struct {
	r          io.Reader
	limit      int
	buf        []byte
	start, end int  // received and not yet handed out
	discard    int  // bytes of an oversized body still to be dropped
	preamble   bool // has been read
	small      int  // frames in a row that would fit fullBuffer
	full       bool // the last read filled the buffer: more is waiting
	err        error
}

// Partial reports whether part of a frame, or of an oversized body that is being
// dropped, has arrived and the rest has not: after Next has returned, or while it
// calls the underlying reader. It lets that reader tell a slow frame from an idle
// stream.
func (r *Reader) Partial() bool { return r.end > r.start || r.discard > 0 }

// Discarding returns how many bytes of an oversized body are still to be dropped: after
// Next has returned ErrTooLarge, the body's length.
func (r *Reader) Discarding() int { return r.discard }

// Held returns how many bytes the Reader holds memory for, beyond what every busy
// stream has: those of a frame that has not arrived whole, or a buffer grown for
// large ones. It may be called where Partial may.
func (r *Reader) Held() int {
	if len(r.buf) > fullBuffer {
		return len(r.buf)
	}
	return r.end - r.start
}

// NewReader returns a Reader with the frame limit of lim.
func NewReader(r io.Reader, lim Limits) *Reader {
	return &Reader{r: r, limit: lim.WithDefaults().Frame}
}

// ReadPreamble reads the peer's first byte, once; later calls do nothing. Any
// other byte than Preamble is ErrPreamble.
func (r *Reader) ReadPreamble() error {
	if r.preamble {
		return nil
	}
	if err := r.fill(1); err != nil {
		return err
	}
	if got := r.buf[r.start]; got != Preamble {
		r.err = fmt.Errorf("%w (it sent %02x)", ErrPreamble, got)
		return r.err
	}
	r.start++
	r.preamble = true
	return nil
}

// Next returns the next body, reading the preamble first if nobody has. The body
// is valid until the next call.
//
// A body above the frame limit but not above MaxFrame gives ErrTooLarge at once;
// its bytes are dropped as they arrive during the next call, and the stream stays
// usable. A length of 0 or above MaxFrame is ErrFraming and final. At the end of
// the stream Next returns io.EOF between frames and io.ErrUnexpectedEOF inside one.
func (r *Reader) Next() ([]byte, error) {
	if err := r.ReadPreamble(); err != nil {
		return nil, err
	}
	if r.err != nil {
		return nil, r.err
	}
	if err := r.drop(); err != nil {
		return nil, err
	}
	r.shrink()
	if err := r.fill(FrameHeaderLen); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(r.buf[r.start:])
	if n == 0 || n > MaxFrame {
		r.err = fmt.Errorf("%w: %d bytes, want 1 to %d", ErrFraming, n, MaxFrame)
		return nil, r.err
	}
	size := int(n)
	if size > r.limit {
		r.start += FrameHeaderLen
		r.discard = size
		return nil, &FrameError{Reason: ReasonFrameLength}
	}
	// The header stays in the buffer until the whole body is there, so that a
	// repeated call finds it again.
	if err := r.fill(FrameHeaderLen + size); err != nil {
		return nil, err
	}
	body := r.buf[r.start+FrameHeaderLen : r.start+FrameHeaderLen+size : r.start+FrameHeaderLen+size]
	r.start += FrameHeaderLen + size
	if size+FrameHeaderLen <= fullBuffer {
		r.small++
	} else {
		r.small = 0
	}
	return body, nil
}

// drop reads what is left of an oversized body.
func (r *Reader) drop() error {
	for r.discard > 0 {
		if r.start == r.end {
			if err := r.fill(1); err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		n := min(r.discard, r.end-r.start)
		r.start += n
		r.discard -= n
	}
	return nil
}

// shrink gives up a large buffer that small frames no longer need.
func (r *Reader) shrink() {
	if len(r.buf) > fullBuffer && r.small >= shrinkAfter && r.end-r.start <= fullBuffer {
		fresh := make([]byte, fullBuffer)
		r.end = copy(fresh, r.buf[r.start:r.end])
		r.buf, r.start = fresh, 0
	}
}

// fill reads until at least n bytes wait in the buffer.
func (r *Reader) fill(n int) error {
	if r.err != nil {
		return r.err
	}
	for idle := 0; r.end-r.start < n; {
		r.room(n)
		m, err := r.r.Read(r.buf[r.end:])
		if m < 0 || m > len(r.buf)-r.end {
			r.err = errors.New("route: reader returned an impossible count")
			return r.err
		}
		r.end += m
		r.full = r.end == len(r.buf)
		switch {
		case r.end-r.start >= n:
			return nil // an error comes again with the next read
		case err == io.EOF && r.end > r.start:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case m == 0:
			if idle++; idle >= 100 {
				return io.ErrNoProgress
			}
		default:
			idle = 0
		}
	}
	return nil
}

// room makes space behind end for at least one byte of an item of n bytes, growing
// the buffer only when it is full.
func (r *Reader) room(n int) {
	if r.start == r.end {
		r.start, r.end = 0, 0
		if r.full && len(r.buf) < fullBuffer {
			r.buf, r.full = make([]byte, min(8*len(r.buf), fullBuffer)), false
		}
	}
	if r.end < len(r.buf) && len(r.buf)-r.start >= n {
		return
	}
	if r.start > 0 {
		r.end = copy(r.buf, r.buf[r.start:r.end])
		r.start = 0
	}
	if r.end < len(r.buf) {
		return
	}
	size := max(firstBuffer, 2*len(r.buf))
	if size > fullBuffer {
		size = min(size, max(n, fullBuffer))
	}
	fresh := make([]byte, max(size, r.end+1))
	copy(fresh, r.buf[:r.end])
	r.buf = fresh
}
