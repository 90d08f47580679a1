package route

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"testing/iotest"
)

func frameOf(body []byte) []byte { return append(AppendFrameHeader(nil, len(body)), body...) }

func stream(bodies ...[]byte) []byte {
	s := []byte{Preamble}
	for _, b := range bodies {
		s = append(s, frameOf(b)...)
	}
	return s
}

func TestStreamErrors(t *testing.T) {
	beat := []byte{0x84, 0x80, 0x80, 0x40, 0xf6}
	head := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	for _, c := range []struct {
		name  string
		bytes []byte
		good  int // frames before the error
		want  error
	}{
		{"nothing", nil, 0, io.EOF},
		{"preamble 00", []byte{0}, 0, ErrPreamble},
		{"preamble 02", slices.Concat([]byte{2}, frameOf(beat)), 0, ErrPreamble},
		{"HTTP", []byte("GET / HTTP/1.1\r\n\r\n"), 0, ErrPreamble},
		{"preamble alone", []byte{1}, 0, io.EOF},
		{"one frame", stream(beat), 1, io.EOF},
		{"length 0", slices.Concat(stream(beat), head(0)), 1, ErrFraming},
		{"length max + 1", slices.Concat(stream(beat), head(MaxFrame+1)), 1, ErrFraming},
		{"length 2^32-1", slices.Concat(stream(beat), head(1<<32-1), beat), 1, ErrFraming},
		{"cut header", slices.Concat(stream(beat), []byte{0, 0, 0}), 1, io.ErrUnexpectedEOF},
		{"cut body", slices.Concat(stream(beat), head(5), beat[:4]), 1, io.ErrUnexpectedEOF},
		{"no body", slices.Concat(stream(beat), head(5)), 1, io.ErrUnexpectedEOF},
		{"cut oversized body", slices.Concat(stream(beat), head(MaxFrame), beat), 1, ErrTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, in := range []io.Reader{bytes.NewReader(c.bytes), iotest.OneByteReader(bytes.NewReader(c.bytes)), iotest.DataErrReader(bytes.NewReader(c.bytes))} {
				r, n := NewReader(in, Limits{}), 0
				var err error
				for {
					if _, err = r.Next(); err != nil {
						break
					}
					n++
				}
				if !errors.Is(err, c.want) || n != c.good {
					t.Fatalf("%d frames, %v; want %d, %v", n, err, c.good, c.want)
				}
				switch {
				case errors.Is(err, ErrTooLarge):
					if !errors.Is(err, ErrLimit) {
						t.Errorf("%v is no ErrLimit", err)
					}
					if _, err = r.Next(); err != io.ErrUnexpectedEOF {
						t.Errorf("then %v", err)
					}
				default:
					if _, again := r.Next(); !errors.Is(again, c.want) {
						t.Errorf("then %v, want it to stay", again)
					}
				}
			}
		})
	}
}

// TestStreamSizes: bodies at the limits, and the stream goes on behind an
// oversized one (spec routing 3.2).
func TestStreamSizes(t *testing.T) {
	small := []byte{0x84, 0x80, 0x80, 0x40, 0xf6}
	sizes := []int{1, 2, firstBuffer - 4, firstBuffer, fullBuffer - 4, fullBuffer, fullBuffer + 1, 100 << 10, DefaultFrame - 1, DefaultFrame}
	var bodies [][]byte
	for i, n := range sizes {
		bodies = append(bodies, bytes.Repeat([]byte{byte(i + 1)}, n), small)
	}
	r := NewReader(bytes.NewReader(stream(bodies...)), Limits{})
	for i, want := range bodies {
		got, err := r.Next()
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("body %d of %d bytes: got %d, %v", i, len(want), len(got), err)
		}
	}

	over := slices.Concat(stream(small, make([]byte, DefaultFrame+1), small, make([]byte, MaxFrame)), frameOf(small))
	r = NewReader(iotest.HalfReader(bytes.NewReader(over)), Limits{})
	for i, tooLarge := range []bool{false, true, false, true, false} {
		got, err := r.Next()
		if tooLarge != errors.Is(err, ErrTooLarge) || !tooLarge && !bytes.Equal(got, small) {
			t.Fatalf("frame %d: %d bytes, %v", i, len(got), err)
		}
	}
	if len(r.buf) > fullBuffer {
		t.Errorf("dropping used a buffer of %d bytes", len(r.buf))
	}

	largest := make([]byte, MaxFrame)
	r = NewReader(bytes.NewReader(stream(largest)), Limits{Frame: MaxFrame})
	if got, err := r.Next(); err != nil || len(got) != MaxFrame {
		t.Fatalf("largest body: %d bytes, %v", len(got), err)
	}
}

// TestStreamMemory: a promised length costs nothing, arrived bytes at most twice
// their size.
func TestStreamMemory(t *testing.T) {
	sent := slices.Concat([]byte{Preamble}, AppendFrameHeader(nil, MaxFrame), make([]byte, 100<<10))
	r := NewReader(bytes.NewReader(sent), Limits{Frame: MaxFrame})
	if _, err := r.Next(); err != io.ErrUnexpectedEOF {
		t.Fatal(err)
	}
	if cap(r.buf) > 256<<10 {
		t.Errorf("buffer of %d bytes for %d received", cap(r.buf), len(sent))
	}

	// One large frame, then many small ones: the buffer becomes small again.
	small := []byte{0x84, 0x80, 0x80, 0x40, 0xf6}
	bodies := [][]byte{make([]byte, 200<<10)}
	for range 20000 {
		bodies = append(bodies, small)
	}
	r = NewReader(bytes.NewReader(stream(bodies...)), Limits{})
	for range bodies {
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if len(r.buf) > fullBuffer {
		t.Errorf("buffer of %d bytes after small frames", len(r.buf))
	}

	r = NewReader(bytes.NewReader([]byte{Preamble}), Limits{})
	if _, err := r.Next(); err != io.EOF || len(r.buf) > firstBuffer {
		t.Errorf("idle stream holds %d bytes, %v", len(r.buf), err)
	}
}

// interrupted fails before every read that is not the n-th.
type interrupted struct {
	r    io.Reader
	skip bool
}

func (i *interrupted) Read(p []byte) (int, error) {
	if i.skip = !i.skip; i.skip {
		return 0, os.ErrDeadlineExceeded
	}
	return i.r.Read(p[:1])
}

// TestStreamResumes: a timeout loses nothing, wherever it strikes.
func TestStreamResumes(t *testing.T) {
	a, b := []byte("first body"), bytes.Repeat([]byte("x"), 1000)
	over := make([]byte, DefaultFrame+1)
	r := NewReader(&interrupted{r: bytes.NewReader(stream(a, over, b))}, Limits{})
	var got [][]byte
	tooLarge := 0
	for {
		body, err := r.Next()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case errors.Is(err, ErrTooLarge):
			tooLarge++
			continue
		case err == io.EOF:
			if len(got) != 2 || !bytes.Equal(got[0], a) || !bytes.Equal(got[1], b) || tooLarge != 1 {
				t.Errorf("got %d bodies, %d too large", len(got), tooLarge)
			}
			return
		case err != nil:
			t.Fatal(err)
		}
		got = append(got, bytes.Clone(body))
	}
}

// failAfter fails for good at the n-th read.
type failAfter struct {
	r io.Reader
	n int
}

var errBroken = errors.New("broken")

func (f *failAfter) Read(p []byte) (int, error) {
	if f.n--; f.n < 0 {
		return 0, errBroken
	}
	return f.r.Read(p[:min(len(p), 7)])
}

func TestStreamFailsAtEachRead(t *testing.T) {
	s := stream([]byte("first body"), make([]byte, 100), []byte("last"))
	for n := range 20 {
		r := NewReader(&failAfter{bytes.NewReader(s), n}, Limits{})
		got := 0
		var err error
		for err == nil {
			if _, err = r.Next(); err == nil {
				got++
			}
		}
		if !errors.Is(err, errBroken) && err != io.EOF || err == io.EOF && got != 3 {
			t.Errorf("failing at read %d: %d frames, %v", n, got, err)
		}
	}
}

// idle returns nothing without an error, which io.Reader discourages.
type idle struct{}

func (idle) Read([]byte) (int, error) { return 0, nil }

// liar claims to have read more than it was asked for.
type liar struct{}

func (liar) Read(p []byte) (int, error) { return len(p) + 1, nil }

func TestStreamBadReaders(t *testing.T) {
	if _, err := NewReader(idle{}, Limits{}).Next(); err != io.ErrNoProgress {
		t.Errorf("idle reader: %v", err)
	}
	if _, err := NewReader(liar{}, Limits{}).Next(); err == nil {
		t.Error("lying reader accepted")
	}
}

// TestPreambleOnce: the preamble may be read by itself, once or more.
func TestPreambleOnce(t *testing.T) {
	r := NewReader(bytes.NewReader(stream([]byte("x"))), Limits{})
	for range 3 {
		if err := r.ReadPreamble(); err != nil {
			t.Fatal(err)
		}
	}
	if body, err := r.Next(); err != nil || string(body) != "x" {
		t.Errorf("%q, %v", body, err)
	}
}

func BenchmarkReader(b *testing.B) {
	body := benchBody(64)
	s := bytes.Repeat(frameOf(body), 1000)
	src := bytes.NewReader(nil)
	r := NewReader(src, Limits{})
	r.preamble = true
	b.ReportAllocs()
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if src.Len() == 0 && r.start == r.end {
			src.Reset(s)
		}
		if _, err := r.Next(); err != nil {
			b.Fatal(err)
		}
	}
}
