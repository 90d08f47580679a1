package route

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

func TestBundle(t *testing.T) {
	a1 := AppendFrame(nil, &Frame{To("a", "x"), nil, []byte("one")})
	a2 := AppendFrame(nil, &Frame{To("a"), To("r"), []byte("two")})
	aForeign := unhex(t, "9f 9f 9f1800 580161 ff ff 80 42 7468 ff")
	b1 := AppendFrame(nil, &Frame{To("b"), nil, nil})
	tcpA := AppendFrame(nil, &Frame{Route{{TCP, "a"}}, nil, nil})
	beat := []byte{0x84, 0x80, 0x80, 0x40, 0xf6}
	for _, c := range []struct {
		name string
		seq  []byte
		want int
		err  error
	}{
		{"empty", nil, 0, ErrMalformed},
		{"one", a1, 1, nil},
		{"three, one of them foreign", slices.Concat(a1, aForeign, a2), 3, nil},
		{"heartbeats", slices.Concat(beat, beat), 2, nil},
		{"mixed", slices.Concat(a1, a2, b1), 0, ErrMixed},
		{"mixed by transport", slices.Concat(a1, tcpA), 0, ErrMixed},
		{"mixed with heartbeat", slices.Concat(a1, beat), 0, ErrMixed},
		{"malformed last", slices.Concat(a1, a2, []byte{0x84}), 0, ErrMalformed},
		{"garbage behind", slices.Concat(a1, []byte{0}), 0, ErrMalformed},
		{"too many", bytes.Repeat(beat, MaxReceivedFrames+1), 0, ErrLimit},
		{"just not too many", bytes.Repeat(beat, MaxReceivedFrames), MaxReceivedFrames, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			keep := []View{mustView(t, b1)}
			views, err := ParseBundle(c.seq, Limits{}, keep)
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if err != nil {
				if views != nil {
					t.Errorf("views with an error")
				}
				return
			}
			if len(views) != c.want+1 || !views[0].FirstHop().Is(Local("b")) {
				t.Fatalf("%d views", len(views))
			}
			rest, size := c.seq, 0
			for i, v := range views[1:] {
				var w View
				if w, rest, err = NextView(rest, Limits{}); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(v.AppendForwarded(nil, 0, Hops{}, Hops{}), w.AppendForwarded(nil, 0, Hops{}, Hops{})) {
					t.Errorf("frame %d differs from NextView's", i)
				}
				size += v.Len()
			}
			if size != len(c.seq) || len(rest) != 0 {
				t.Errorf("frames have %d bytes of %d", size, len(c.seq))
			}
		})
	}
}

// TestBundleCut: a bundle cut between frames is a shorter bundle, anywhere else
// none.
func TestBundleCut(t *testing.T) {
	one := AppendFrame(nil, &Frame{To("a"), To("r"), []byte("payload")})
	all := bytes.Repeat(one, 3)
	for n := range all {
		views, err := ParseBundle(all[:n], Limits{}, nil)
		if whole := n > 0 && n%len(one) == 0; whole != (err == nil) || whole && len(views) != n/len(one) {
			t.Errorf("cut at %d: %d frames, %v", n, len(views), err)
		}
	}
}

func TestBundler(t *testing.T) {
	var b Bundler
	frame := func(to string, n int) []byte {
		return AppendFrame(nil, &Frame{To(to), To("r"), make([]byte, n)})
	}
	small := frame("a", 10)
	if b.Len() != 0 || len(b.Bytes()) != 0 {
		t.Error("new bundle is not empty")
	}
	for i := range MaxBundleFrames {
		if !b.Add(small) {
			t.Fatalf("frame %d refused", i)
		}
	}
	if b.Add(small) || b.Len() != MaxBundleFrames || len(b.Bytes()) != MaxBundleFrames*len(small) {
		t.Errorf("%d frames, %d bytes", b.Len(), len(b.Bytes()))
	}
	if views, err := ParseBundle(b.Bytes(), Limits{}, nil); err != nil || len(views) != MaxBundleFrames {
		t.Errorf("%d views, %v", len(views), err)
	}
	b.Reset()

	if !b.Add(frame("a", 10)) || b.Add(frame("b", 10)) || !b.Add(frame("a", 20)) || b.Len() != 2 {
		t.Errorf("first hops are not kept apart: %d", b.Len())
	}
	b.Reset()

	half := frame("a", MaxBundleBytes/2-10)
	if !b.Add(half) || b.Add(half) || !b.Add(small) {
		t.Errorf("bytes are not bounded: %d", len(b.Bytes()))
	}
	b.Reset()

	large := frame("a", 100<<10)
	if !b.Add(large) || b.Add(small) || !bytes.Equal(b.Bytes(), large) {
		t.Errorf("a large frame is not alone: %d frames", b.Len())
	}
	b.Reset()
	if b.buf != nil {
		t.Errorf("kept %d bytes", cap(b.buf))
	}
	if !b.Add([]byte{1, 2, 3}) || !b.Add(frame("", 1)) {
		t.Error("what is not a frame does not begin with the empty hop")
	}
	if n := testing.AllocsPerRun(100, func() {
		b.Reset()
		for range 20 {
			b.Add(small)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
