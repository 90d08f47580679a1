package route

import "fmt"

// Bounds of bundles. The first two are a Bundler's; a receiver takes any bundle
// that fits its packet limit and has no more than MaxReceivedFrames.
const (
	// MaxBundleBytes is the most bytes of a bundle of several frames.
	MaxBundleBytes = 16 << 10
	// MaxBundleFrames is the most frames of a bundle.
	MaxBundleFrames = 256
	// MaxReceivedFrames bounds what ParseBundle spends on one message: frames of
	// few bytes would otherwise cost many times their size.
	MaxReceivedFrames = 16 << 10
)

// ParseBundle reads the payload of an MQTT message: a CBOR sequence (RFC 8742) of
// one or more frames. The views alias payload and are appended to dst, whose
// backing array is used when it has room. All frames are parsed before any is
// returned: an error, or frames whose first hops differ (ErrMixed), refuses the
// whole bundle, and an empty payload is malformed.
func ParseBundle(payload []byte, lim Limits, dst []View) ([]View, error) {
	lim = lim.WithDefaults()
	first := len(dst)
	for off := 0; ; {
		if len(dst)-first == MaxReceivedFrames {
			return nil, &FrameError{ReasonFrames, off}
		}
		dst = append(dst, View{})
		v := &dst[len(dst)-1]
		next, err := v.parse(payload, off, &lim)
		if err != nil {
			return nil, err
		}
		if len(dst)-1 > first && !v.sameFirst(&dst[first]) {
			return nil, fmt.Errorf("%w: frame %d of the bundle at byte %d", ErrMixed, len(dst)-first, off)
		}
		if next == len(payload) {
			return dst, nil
		}
		off = next
	}
}

// Bundler gathers encoded frames into bundles: at most MaxBundleBytes and
// MaxBundleFrames, or one longer frame alone, all with the same first hop. The
// zero Bundler is ready for use; it is not safe for concurrent use. The usual
// loop adds from the front of a queue until Add says no, sends Bytes, and calls
// Reset.
type Bundler struct {
	buf   []byte
	n     int
	first Hop // aliases buf
}

// Add copies the canonical frame body into the bundle. It returns false, and
// leaves the bundle as it is, when the frame must begin the next one. An empty
// bundle takes any frame.
func (b *Bundler) Add(body []byte) bool {
	hop := firstHop(body)
	if b.n > 0 {
		if b.n == MaxBundleFrames || len(b.buf)+len(body) > MaxBundleBytes ||
			hop.Transport != b.first.Transport || string(hop.Value) != string(b.first.Value) {
			return false
		}
		b.buf = append(b.buf, body...)
		b.n++
		return true
	}
	b.buf = append(b.buf[:0], body...)
	b.n = 1
	b.first = hop
	return true
}

// Len returns how many frames the bundle holds.
func (b *Bundler) Len() int { return b.n }

// Bytes returns the bundle; the slice is valid until the next Add after Reset.
func (b *Bundler) Bytes() []byte { return b.buf }

// maxKeptBundle is the largest buffer that Reset keeps.
const maxKeptBundle = 4 * MaxBundleBytes

// Reset empties the bundle.
func (b *Bundler) Reset() {
	b.n, b.first = 0, Hop{}
	if cap(b.buf) > maxKeptBundle {
		b.buf = nil
		return
	}
	b.buf = b.buf[:0]
}

// firstHop finds the first onward hop of a frame; the zero Hop when there is none
// or body is not a frame.
func firstHop(body []byte) Hop {
	if len(body) < 2 {
		return Hop{}
	}
	count, _, off, err := arrayHead(body, 0, ReasonNotArray)
	if err != nil || count < 3 {
		return Hop{}
	}
	count, _, off, err = arrayHead(body, off, ReasonRoute)
	if err != nil || count == 0 {
		return Hop{}
	}
	h, _, _, err := scanAddress(body, off)
	if err != nil {
		return Hop{}
	}
	return h
}
