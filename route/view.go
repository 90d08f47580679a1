package route

import (
	"errors"
	"iter"
	"slices"

	"github.com/sealmq/sealmq/internal/cbor"
)

// The body of a frame (spec routing 3.3), as this package writes it:
//
//	84                      array of 4
//	8n address...           onward route
//	8n address...           return route
//	4n byte...              payload
//	f6                      tracing context: null
//
// and an address (spec routing 2.1):
//
//	82 tt 4n byte...        transport type, inner value
//
// with the longer heads 58, 59, 5a, 98, 99 where a length needs them. What is read
// beyond that is spec routing 3.4, column Rust: three elements, or more than four
// (extra ones skipped); a tracing context of any definite text, whose content is
// not looked at; addresses with extra elements; heads that are not the shortest;
// arrays of indefinite length. Indefinite strings, tags and maps are refused.
const (
	bodyHead    = cbor.Array | 4
	addressHead = cbor.Array | 2
)

// Hop is one address of a View, in place: Value aliases the frame.
type Hop struct {
	Transport Transport
	Value     []byte
}

// Address returns a copy as an Address.
func (h Hop) Address() Address { return Address{h.Transport, string(h.Value)} }

// Is reports whether the hop is the address a, without allocating.
func (h Hop) Is(a Address) bool { return h.Transport == a.Transport && string(h.Value) == a.Value }

// rawRoute is a route as canonical address encodings, one after the other.
type rawRoute struct {
	b    []byte
	n    int // addresses
	last int // where the last address begins in b
}

// View is a frame read in place. Its byte slices alias the body that it was
// parsed from and are valid as long as that is unchanged; only the routes of a
// body that is not canonical are copied, once, at parsing, so that whatever is
// written from a View is canonical. The zero View is a heartbeat without payload.
// Methods don't change the View and are safe for concurrent use.
type View struct {
	onward, ret rawRoute
	payload     []byte
	size        int
}

// ParseView reads one body as it travels on TCP after the length: bytes behind
// the frame are ignored, as a stock peer ignores them, but count against the frame
// limit. It does not allocate for canonical input.
func ParseView(body []byte, lim Limits) (View, error) {
	lim = lim.WithDefaults()
	var v View
	if len(body) > lim.Frame {
		return View{}, &FrameError{Reason: ReasonFrameLength}
	}
	if _, err := v.parse(body, 0, &lim); err != nil {
		return View{}, err
	}
	return v, nil
}

// NextView reads the first frame of a CBOR sequence (RFC 8742) and returns the
// bytes behind it. The frame limit applies to the frame alone. To go through the
// payload of a whole MQTT message use ParseBundle.
func NextView(seq []byte, lim Limits) (v View, rest []byte, err error) {
	lim = lim.WithDefaults()
	n, ferr := v.parse(seq, 0, &lim)
	if ferr != nil {
		return View{}, nil, ferr
	}
	return v, seq[n:], nil
}

// parse reads the frame that begins at b[at] into v and returns where it ends.
// lim has its defaults filled in.
func (v *View) parse(b []byte, at int, lim *Limits) (int, *FrameError) {
	if at >= len(b) {
		return 0, &FrameError{ReasonTruncated, at}
	}
	off := at
	count, indefinite := int(b[off]-cbor.Array), false
	if b[off] >= cbor.Array && count < 24 {
		off++
	} else {
		var err *FrameError
		if count, indefinite, off, err = arrayHead(b, off, ReasonNotArray); err != nil {
			return 0, err
		}
	}
	if !indefinite && count < 3 {
		return 0, &FrameError{ReasonTooFew, at}
	}
	var err *FrameError
	if off, err = v.onward.scan(b, off, lim); err != nil {
		return 0, earlyBreak(b, err, indefinite)
	}
	if off, err = v.ret.scan(b, off, lim); err != nil {
		return 0, earlyBreak(b, err, indefinite)
	}
	if v.payload, off, err = byteString(b, off, at, lim); err != nil {
		return 0, earlyBreak(b, err, indefinite)
	}
	if !indefinite && count == 4 && off < len(b) && b[off] == cbor.Null {
		off++
	} else if off, err = tail(b, off, count-3, indefinite); err != nil {
		return 0, err
	}
	v.size = off - at
	if v.size > lim.Frame {
		return 0, &FrameError{ReasonFrameLength, at}
	}
	return off, nil
}

// earlyBreak names an indefinite outer array that ends too soon for what it is.
func earlyBreak(b []byte, err *FrameError, indefinite bool) *FrameError {
	if indefinite && err.Offset < len(b) && b[err.Offset] == cbor.Break {
		err.Reason = ReasonTooFew
	}
	return err
}

// tail reads what follows the payload: the tracing context and extra elements,
// left of them in a definite array.
func tail(b []byte, off, left int, indefinite bool) (int, *FrameError) {
	for i := 0; ; i++ {
		if !indefinite && i == left {
			return off, nil
		}
		if off >= len(b) {
			return 0, &FrameError{ReasonTruncated, off}
		}
		if indefinite && b[off] == cbor.Break {
			return off + 1, nil
		}
		var err *FrameError
		if i == 0 {
			off, err = tracing(b, off)
		} else {
			off, err = skip(b, off)
		}
		if err != nil {
			return 0, err
		}
	}
}

// tracing reads index 3 of a body: null, or definite text that nobody looks at.
func tracing(b []byte, off int) (int, *FrameError) {
	if b[off] == cbor.Null {
		return off + 1, nil
	}
	major, n, indefinite, head, err := cbor.ReadHead(b[off:])
	switch {
	case err != nil:
		return 0, headError(err, off)
	case major != cbor.Text || indefinite:
		return 0, &FrameError{ReasonTracing, off}
	case n > uint64(len(b)-off-head):
		return 0, &FrameError{ReasonTruncated, off}
	}
	return off + head + int(n), nil
}

// byteString reads the payload of the frame that begins at b[at].
func byteString(b []byte, off, at int, lim *Limits) ([]byte, int, *FrameError) {
	major, n, indefinite, head, err := cbor.ReadHead(b[off:])
	switch {
	case err != nil:
		return nil, 0, headError(err, off)
	case major != cbor.Bytes || indefinite:
		return nil, 0, &FrameError{ReasonPayload, off}
	case n > uint64(lim.Frame-min(lim.Frame, off+head-at)):
		return nil, 0, &FrameError{ReasonFrameLength, at}
	case n > uint64(len(b)-off-head):
		return nil, 0, &FrameError{ReasonTruncated, off}
	}
	start, end := off+head, off+head+int(n)
	return b[start:end:end], end, nil
}

// arrayHead reads the head of an array of at least count elements.
func arrayHead(b []byte, off int, wrong Reason) (count int, indefinite bool, next int, ferr *FrameError) {
	major, n, indefinite, head, err := cbor.ReadHead(b[off:])
	switch {
	case err != nil:
		return 0, false, 0, headError(err, off)
	case major != cbor.Array:
		return 0, false, 0, &FrameError{wrong, off}
	case n > uint64(len(b)-off-head): // each element takes a byte at least
		return 0, false, 0, &FrameError{ReasonTruncated, off}
	}
	return int(n), indefinite, off + head, nil
}

// skip reads one item of any kind.
func skip(b []byte, off int) (int, *FrameError) {
	r := cbor.NewReader(b[off:])
	if err := r.Skip(); err != nil {
		return 0, headError(err, off)
	}
	return off + r.Offset(), nil
}

func headError(err error, off int) *FrameError {
	switch {
	case errors.Is(err, cbor.ErrTruncated):
		return &FrameError{ReasonTruncated, off}
	case errors.Is(err, cbor.ErrDepth):
		return &FrameError{ReasonDepth, off}
	default:
		return &FrameError{ReasonHead, off}
	}
}

// scan reads the route that begins at b[off] and returns where it ends.
func (r *rawRoute) scan(b []byte, off int, lim *Limits) (int, *FrameError) {
	if off >= len(b) {
		return 0, &FrameError{ReasonTruncated, off}
	}
	at := off
	count, indefinite := int(b[off]-cbor.Array), false
	if b[off] >= cbor.Array && count < 24 {
		off++
	} else {
		var err *FrameError
		if count, indefinite, off, err = arrayHead(b, off, ReasonRoute); err != nil {
			return 0, err
		}
	}
	if count > lim.Hops {
		return 0, &FrameError{ReasonHops, at}
	}
	start := off
	var fresh []byte // the canonical form, once an address is not
	last, n := off, 0
	for {
		if !indefinite {
			if n == count {
				break
			}
		} else {
			if off >= len(b) {
				return 0, &FrameError{ReasonTruncated, off}
			}
			if b[off] == cbor.Break {
				break
			}
			if n == lim.Hops {
				return 0, &FrameError{ReasonHops, at}
			}
		}
		if end, value := canonicalAddress(b, off); end > 0 && fresh == nil {
			if end-value > lim.Address {
				return 0, &FrameError{ReasonValueLength, off}
			}
			last, off = off, end
			n++
			continue
		}
		hop, next, canonical, err := scanAddress(b, off)
		if err != nil {
			return 0, err
		}
		if len(hop.Value) > lim.Address {
			return 0, &FrameError{ReasonValueLength, off}
		}
		if canonical && fresh == nil {
			last = off
		} else {
			if fresh == nil {
				fresh = append(make([]byte, 0, next-start+16), b[start:off]...)
				start = 0
			}
			last = len(fresh)
			fresh = appendHop(fresh, hop)
		}
		off = next
		n++
	}
	r.n, r.last = n, last-start
	if fresh != nil {
		r.b = fresh
	} else {
		r.b = b[start:off:off]
	}
	if indefinite {
		off++ // the break
	}
	return off, nil
}

// scanAddress reads the address at b[off]. canonical says that b[off:next] is the
// encoding that this package writes.
func scanAddress(b []byte, off int) (hop Hop, next int, canonical bool, err *FrameError) {
	if end, value := canonicalAddress(b, off); end > 0 {
		return Hop{Transport(b[off+1]), b[value:end:end]}, end, true, nil
	}
	return scanAddressSlow(b, off)
}

// canonicalAddress recognises the common form of a canonical address at b[off]: a
// transport type below 24 and an inner value of at most 255 bytes. It returns where
// the address ends and where its value begins; end 0 means that it is something
// else, which scanAddressSlow judges.
func canonicalAddress(b []byte, off int) (end, value int) {
	if off+3 >= len(b) || b[off] != addressHead || b[off+1] > 23 {
		return 0, 0
	}
	n := int(b[off+2] ^ cbor.Bytes)
	value = off + 3
	if n > 23 {
		if n != 24 || b[off+3] < 24 {
			return 0, 0
		}
		n = int(b[off+3])
		value++
	}
	if end = value + n; end > len(b) {
		return 0, 0
	}
	return end, value
}

func scanAddressSlow(b []byte, off int) (hop Hop, next int, canonical bool, ferr *FrameError) {
	fail := func(r Reason, at int) (Hop, int, bool, *FrameError) {
		return Hop{}, 0, false, &FrameError{r, at}
	}
	at := off
	count, indefinite, off, ferr := arrayHead(b, off, ReasonAddress)
	if ferr != nil {
		return Hop{}, 0, false, ferr
	}
	if !indefinite && count < 2 {
		return fail(ReasonAddress, at)
	}
	major, tt, _, head, err := cbor.ReadHead(b[off:])
	switch {
	case err != nil:
		return Hop{}, 0, false, headError(err, off)
	case major != cbor.Uint:
		return fail(ReasonAddress, off)
	case tt > 255:
		return fail(ReasonTransport, off)
	}
	off += head
	major, n, open, head, err := cbor.ReadHead(b[off:])
	switch {
	case err != nil:
		return Hop{}, 0, false, headError(err, off)
	case major != cbor.Bytes || open:
		return fail(ReasonAddress, off)
	case n > uint64(len(b)-off-head):
		return fail(ReasonTruncated, off)
	}
	off += head
	hop = Hop{Transport(tt), b[off : off+int(n) : off+int(n)]}
	off += int(n)
	for left := count - 2; ; left-- {
		if !indefinite && left == 0 {
			break
		}
		if off >= len(b) {
			return fail(ReasonTruncated, off)
		}
		if indefinite && b[off] == cbor.Break {
			off++
			break
		}
		if off, ferr = skip(b, off); ferr != nil {
			return Hop{}, 0, false, ferr
		}
	}
	// No other encoding of the same address is as short as the canonical one.
	return hop, off, off-at == hopLen(tt, len(hop.Value)), nil
}

func hopLen(tt uint64, n int) int { return 1 + cbor.HeadLen(tt) + cbor.HeadLen(uint64(n)) + n }

func appendHop(dst []byte, h Hop) []byte {
	dst = cbor.AppendUint(append(dst, addressHead), uint64(h.Transport))
	return cbor.AppendBytes(dst, h.Value)
}

// hopAt reads the canonical address at b[off], which scan has checked.
func hopAt(b []byte, off int) (h Hop, next int) {
	h, next, _, _ = scanAddress(b, off)
	return h, next
}

// IsHeartbeat reports whether the onward route is empty: such a frame is ignored
// (spec routing 3.5).
func (v *View) IsHeartbeat() bool { return v.onward.n == 0 }

// OnwardLen returns the number of hops of the onward route.
func (v *View) OnwardLen() int { return v.onward.n }

// ReturnLen returns the number of hops of the return route.
func (v *View) ReturnLen() int { return v.ret.n }

// Payload returns the payload; it aliases the body.
func (v *View) Payload() []byte { return v.payload }

// Len returns how many bytes the frame took as received.
func (v *View) Len() int { return v.size }

// FirstHop returns the next hop; the zero Hop (local, empty value) when the onward
// route is empty.
func (v *View) FirstHop() Hop {
	if v.onward.n == 0 {
		return Hop{}
	}
	h, _ := hopAt(v.onward.b, 0)
	return h
}

// LastReturn returns the last hop of the return route, which is the frame's
// origin, and false when that is empty.
func (v *View) LastReturn() (Hop, bool) {
	if v.ret.n == 0 {
		return Hop{}, false
	}
	h, _ := hopAt(v.ret.b, v.ret.last)
	return h, true
}

// Onward iterates over the hops of the onward route.
func (v *View) Onward() iter.Seq[Hop] {
	return func(yield func(Hop) bool) { eachHop(v.onward.b, yield) }
}

// Return iterates over the hops of the return route.
func (v *View) Return() iter.Seq[Hop] {
	return func(yield func(Hop) bool) { eachHop(v.ret.b, yield) }
}

func eachHop(b []byte, yield func(Hop) bool) {
	for off := 0; off < len(b); {
		h, next := hopAt(b, off)
		if !yield(h) {
			return
		}
		off = next
	}
}

// OnwardHops returns a copy of the onward route without its first pop hops.
func (v *View) OnwardHops(pop int) Hops { return v.onward.hops(pop) }

// ReturnHops returns a copy of the return route.
func (v *View) ReturnHops() Hops { return v.ret.hops(0) }

func (r *rawRoute) hops(pop int) Hops {
	b, n := r.without(pop)
	return Hops{n: n, enc: string(b)}
}

// without returns the encodings without the first pop addresses, and how many are
// left.
func (r *rawRoute) without(pop int) ([]byte, int) {
	if pop >= r.n {
		return nil, 0
	}
	off := 0
	for range pop {
		_, off = hopAt(r.b, off)
	}
	return r.b[off:], r.n - max(pop, 0)
}

// sameFirst reports whether both onward routes begin with the same address, or
// are both empty.
func (v *View) sameFirst(w *View) bool {
	if v.onward.n == 0 || w.onward.n == 0 {
		return v.onward.n == w.onward.n
	}
	a, b := v.FirstHop(), w.FirstHop()
	return a.Transport == b.Transport && string(a.Value) == string(b.Value)
}

// Frame returns the frame with its routes copied; the payload still aliases the
// body.
func (v *View) Frame() Frame {
	return Frame{Onward: v.onward.route(), Return: v.ret.route(), Payload: v.payload}
}

func (r *rawRoute) route() Route {
	if r.n == 0 {
		return nil
	}
	// One string for all values keeps this at two allocations a route.
	all, out := string(r.b), make(Route, 0, r.n)
	for off := 0; off < len(r.b); {
		h, next := hopAt(r.b, off)
		out = append(out, Address{h.Transport, all[next-len(h.Value) : next]})
		off = next
	}
	return out
}

// ForwardedLen returns the length of what AppendForwarded appends.
func (v *View) ForwardedLen(pop int, front, stamp Hops) int {
	rest, n := v.onward.without(pop)
	return bodyLen(front.n+n, len(front.enc)+len(rest), stamp.n+v.ret.n, len(stamp.enc)+len(v.ret.b), len(v.payload))
}

// AppendForwarded appends the frame as it leaves a hop that routes it: the onward
// route is front followed by the received one without its first pop hops (all of
// them when it has fewer), the return route is stamp followed by the received one,
// the payload is unchanged. The result is canonical. dst must not overlap the
// body; nothing is allocated when it has room (see ForwardedLen).
func (v *View) AppendForwarded(dst []byte, pop int, front, stamp Hops) []byte {
	rest, n := v.onward.without(pop)
	size := bodyLen(front.n+n, len(front.enc)+len(rest), stamp.n+v.ret.n, len(stamp.enc)+len(v.ret.b), len(v.payload))
	dst = append(slices.Grow(dst, size), bodyHead)
	dst = append(append(cbor.AppendArray(dst, front.n+n), front.enc...), rest...)
	dst = append(append(cbor.AppendArray(dst, stamp.n+v.ret.n), stamp.enc...), v.ret.b...)
	return append(cbor.AppendBytes(dst, v.payload), cbor.Null)
}

// AppendReply appends the answer of the worker at from to this frame: the onward
// route is stamp followed by the received return route, the return route is from.
func (v *View) AppendReply(dst []byte, stamp, from Hops, payload []byte) []byte {
	size := bodyLen(stamp.n+v.ret.n, len(stamp.enc)+len(v.ret.b), from.n, len(from.enc), len(payload))
	dst = append(slices.Grow(dst, size), bodyHead)
	dst = append(append(cbor.AppendArray(dst, stamp.n+v.ret.n), stamp.enc...), v.ret.b...)
	dst = append(cbor.AppendArray(dst, from.n), from.enc...)
	return append(cbor.AppendBytes(dst, payload), cbor.Null)
}

func bodyLen(onward, onwardBytes, ret, retBytes, payload int) int {
	return 2 + cbor.HeadLen(uint64(onward)) + onwardBytes + cbor.HeadLen(uint64(ret)) + retBytes +
		cbor.HeadLen(uint64(payload)) + payload
}
