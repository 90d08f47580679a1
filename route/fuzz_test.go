package route

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

// fuzzLimits make limits easy to reach.
var fuzzLimits = Limits{Frame: 4 << 10, Hops: 10, Address: 64}

// seedBodies adds the captured frames and some foreign encodings to the corpus.
func seedBodies(f *testing.F) {
	for _, b := range liveBodies(f) {
		if len(b) <= 4<<10 {
			f.Add(b)
		}
	}
	for _, s := range []string{
		"9f 9f 9f18004161ff 83014162f6 ff 83 820058016182004162830041ff00 4170 6178 00 ff",
		"84 81 82190001590001ff 80 40 7b0000000000000001 7a",
		"80", "a0", "84808040f7", "83808040ffff",
	} {
		f.Add(unhex(f, s))
	}
}

// FuzzParseFrame: no panic; a frame within the limits; what is accepted is written
// canonically and read again as the same frame.
func FuzzParseFrame(f *testing.F) {
	seedBodies(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		frame, err := ParseFrame(body, fuzzLimits)
		if err != nil {
			var fe *FrameError
			if !errors.As(err, &fe) || fe.Offset < 0 || fe.Offset > len(body) || frame.Payload != nil {
				t.Fatalf("error %#v of a body of %d bytes", err, len(body))
			}
			return
		}
		if len(frame.Onward) > fuzzLimits.Hops || len(frame.Return) > fuzzLimits.Hops {
			t.Fatalf("%d and %d hops", len(frame.Onward), len(frame.Return))
		}
		for _, a := range frame.Onward.Append(frame.Return...) {
			if len(a.Value) > fuzzLimits.Address {
				t.Fatalf("address of %d bytes", len(a.Value))
			}
		}
		out := AppendFrame(nil, &frame)
		if len(out) != frame.EncodedLen() || len(out) > len(body)+1 {
			t.Fatalf("%d bytes became %d, EncodedLen %d", len(body), len(out), frame.EncodedLen())
		}
		again, err := ParseFrame(out, Limits{Frame: MaxFrame, Hops: fuzzLimits.Hops, Address: fuzzLimits.Address})
		if err != nil || !again.Onward.Equal(frame.Onward) || !again.Return.Equal(frame.Return) || !bytes.Equal(again.Payload, frame.Payload) {
			t.Fatalf("%x is read back as %+v, %v", out, again, err)
		}
	})
}

// FuzzView: View and Frame agree, and what a View writes is a fixed point.
func FuzzView(f *testing.F) {
	seedBodies(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		kept := bytes.Clone(body)
		v, err := ParseView(body, fuzzLimits)
		frame, ferr := ParseFrame(body, fuzzLimits)
		if (err == nil) != (ferr == nil) {
			t.Fatalf("View %v, Frame %v", err, ferr)
		}
		if err != nil {
			return
		}
		w, rest, err := NextView(body, fuzzLimits)
		if err != nil || w.Len() != v.Len() || len(rest) != len(body)-v.Len() {
			t.Fatalf("NextView: %d of %d bytes, %v", w.Len(), len(body), err)
		}
		out := v.AppendForwarded(nil, 0, Hops{}, Hops{})
		if !bytes.Equal(out, AppendFrame(nil, &frame)) {
			t.Fatalf("View writes %x, Frame %x", out, AppendFrame(nil, &frame))
		}
		again, err := ParseView(out, Limits{})
		if err != nil || again.Len() != len(out) || !bytes.Equal(again.AppendForwarded(nil, 0, Hops{}, Hops{}), out) {
			t.Fatalf("%x is not a fixed point: %v", out, err)
		}
		if first, ok := frame.Onward.First(); ok != !v.IsHeartbeat() || ok && !v.FirstHop().Is(first) {
			t.Fatalf("first hop %v, want %v", v.FirstHop(), first)
		}
		last, ok := v.LastReturn()
		if want, has := frame.Return.Last(); ok != has || ok && !last.Is(want) {
			t.Fatalf("last return hop %v, want %v", last, want)
		}
		front, stamp := To("front", "x"), To("stamp")
		for pop := range len(frame.Onward) + 1 {
			want := Frame{front.Append(frame.Onward[pop:]...), stamp.Append(frame.Return...), frame.Payload}
			got := v.AppendForwarded(nil, pop, EncodeHops(front), EncodeHops(stamp))
			if !bytes.Equal(got, AppendFrame(nil, &want)) || len(got) != v.ForwardedLen(pop, EncodeHops(front), EncodeHops(stamp)) {
				t.Fatalf("forwarded with pop %d: %x", pop, got)
			}
		}
		if !bytes.Equal(body, kept) {
			t.Fatal("the input was changed")
		}
	})
}

// FuzzBundle: a bundle is accepted whole or not at all, and its frames are those
// that NextView finds.
func FuzzBundle(f *testing.F) {
	seedBodies(f)
	for _, b := range liveBodies(f)[:8] {
		f.Add(append(bytes.Clone(b), b...))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		views, err := ParseBundle(payload, fuzzLimits, nil)
		if err != nil {
			if views != nil {
				t.Fatal("views with an error")
			}
			return
		}
		rest := payload
		for i := range views {
			var v View
			if v, rest, err = NextView(rest, fuzzLimits); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(v.AppendForwarded(nil, 0, Hops{}, Hops{}), views[i].AppendForwarded(nil, 0, Hops{}, Hops{})) {
				t.Fatalf("frame %d differs", i)
			}
			if !views[i].sameFirst(&views[0]) {
				t.Fatalf("frame %d goes elsewhere", i)
			}
		}
		if len(views) == 0 || len(rest) != 0 {
			t.Fatalf("%d frames, %d bytes left", len(views), len(rest))
		}
	})
}

// FuzzStream: how a stream is cut into reads makes no difference, memory follows
// what has arrived, and bodies re-framed make the same stream.
func FuzzStream(f *testing.F) {
	for _, s := range liveSessions(f) {
		if len(s.RustToGo) <= 8<<10 {
			f.Add([]byte(s.RustToGo))
		}
	}
	f.Add([]byte{1, 0, 0, 0, 0})
	f.Add([]byte{1, 1, 0, 0, 0, 1})
	f.Add([]byte{1, 1, 0, 0, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		read := func(src io.Reader) (out []byte, frames int, err error) {
			r := NewReader(src, fuzzLimits)
			for {
				body, err := r.Next()
				switch {
				case errors.Is(err, ErrTooLarge):
					continue
				case err != nil:
					if len(r.buf) > max(fullBuffer, 4*len(in)) {
						t.Fatalf("buffer of %d bytes for %d", len(r.buf), len(in))
					}
					return out, frames, err
				case len(body) == 0 || len(body) > fuzzLimits.Frame:
					t.Fatalf("body of %d bytes", len(body))
				}
				out = append(AppendFrameHeader(out, len(body)), body...)
				frames++
			}
		}
		a, n, errA := read(bytes.NewReader(in))
		b, m, errB := read(iotest.OneByteReader(bytes.NewReader(in)))
		if !bytes.Equal(a, b) || n != m || errA.Error() != errB.Error() {
			t.Fatalf("%d frames, %v; byte by byte %d frames, %v", n, errA, m, errB)
		}
		if errA == io.EOF && len(a)+1 == len(in) && !bytes.Equal(in[1:], a) {
			t.Fatal("stream differs after re-framing")
		}
	})
}
