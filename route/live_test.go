package route

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/sealmq/sealmq/internal/cbor"
)

// withTracing replaces the null that AppendFrame writes at index 3 by the tracing
// context of a stock Rust program, so that its bytes can be compared whole.
func withTracing(body []byte) []byte {
	return append(slices.Clone(body[:len(body)-1]), 0x62, '{', '}')
}

// wireLike re-encodes a frame in the manner of whoever sent the original: stock
// Rust fills index 3, we write null.
func wireLike(original, again []byte) []byte {
	if original[len(original)-1] == cbor.Null {
		return again
	}
	return withTracing(again)
}

// TestLiveStreams reads every captured TCP stream and writes it again, byte for
// byte (spec routing 3.1 to 3.3).
func TestLiveStreams(t *testing.T) {
	for _, s := range liveSessions(t) {
		t.Run(s.Name, func(t *testing.T) {
			for _, dir := range []struct {
				name   string
				stream []byte
			}{{"rust->go", s.RustToGo}, {"go->rust", s.GoToRust}} {
				for _, r := range []io.Reader{
					bytes.NewReader(dir.stream),
					iotest.OneByteReader(bytes.NewReader(dir.stream)),
					iotest.DataErrReader(bytes.NewReader(dir.stream)),
				} {
					again := []byte{Preamble}
					stream := NewReader(r, Limits{})
					var bodies [][]byte
					for {
						body, err := stream.Next()
						if err == io.EOF {
							break
						}
						if err != nil {
							t.Fatalf("%s: frame %d: %v", dir.name, len(bodies), err)
						}
						bodies = append(bodies, bytes.Clone(body))
						f, err := ParseFrame(body, Limits{})
						if err != nil {
							t.Fatalf("%s: frame %d: %v", dir.name, len(bodies), err)
						}
						out := wireLike(body, AppendFrame(nil, &f))
						again = append(AppendFrameHeader(again, len(out)), out...)
					}
					if !bytes.Equal(again, dir.stream) {
						t.Errorf("%s: stream differs after re-encoding", dir.name)
					}
					i := 0
					for _, f := range s.Frames {
						if f.Dir == dir.name && f.Note != "preamble" {
							if i < len(bodies) && !bytes.Equal(f.Wire[FrameHeaderLen:], bodies[i]) {
								t.Errorf("%s: frame %d differs from its entry", dir.name, i)
							}
							i++
						}
					}
					if i != len(bodies) {
						t.Errorf("%s: %d frames, want %d", dir.name, len(bodies), i)
					}
				}
			}
		})
	}
}

// TestLiveFrames compares the routes of each captured frame with what the capture
// says about them.
func TestLiveFrames(t *testing.T) {
	for _, s := range liveSessions(t) {
		for i, f := range s.Frames {
			if f.Note == "preamble" {
				continue
			}
			got, err := ParseFrame(f.Wire[FrameHeaderLen:], Limits{})
			if err != nil {
				t.Fatalf("%s frame %d: %v", s.Name, i, err)
			}
			if got.Onward.String() != f.Onward || got.Return.String() != f.Return {
				t.Errorf("%s frame %d: routes %q, %q, want %q, %q", s.Name, i, got.Onward, got.Return, f.Onward, f.Return)
			}
			back, err := Parse(strings.ReplaceAll(f.Onward, " ", ""))
			if err != nil || !back.Equal(got.Onward) {
				t.Errorf("%s frame %d: %q parses as %v, %v", s.Name, i, f.Onward, back, err)
			}
		}
	}
}

// TestLiveCutAnywhere cuts every captured stream at each length: whole frames come
// out, then one error that tells a clean end from a cut (spec routing 3.6).
func TestLiveCutAnywhere(t *testing.T) {
	for _, s := range liveSessions(t) {
		ends := map[int]int{1: 0} // offset of a clean end: frames before it
		for off, n := 1, 0; off < len(s.RustToGo); {
			off += FrameHeaderLen + int(uint32(s.RustToGo[off])<<24|uint32(s.RustToGo[off+1])<<16|uint32(s.RustToGo[off+2])<<8|uint32(s.RustToGo[off+3]))
			n++
			ends[off] = n
		}
		step := max(1, len(s.RustToGo)/4000)
		for cut := 0; cut <= len(s.RustToGo); cut += step {
			stream, frames := NewReader(bytes.NewReader(s.RustToGo[:cut]), Limits{}), 0
			var err error
			for err == nil {
				if _, err = stream.Next(); err == nil {
					frames++
				}
			}
			want, clean := ends[cut]
			switch {
			case clean && (err != io.EOF || frames != want):
				t.Fatalf("%s cut at %d: %d frames, %v; want %d, EOF", s.Name, cut, frames, err, want)
			case cut == 0 && err != io.EOF:
				t.Fatalf("%s cut at 0: %v", s.Name, err)
			case !clean && cut > 0 && err != io.ErrUnexpectedEOF:
				t.Fatalf("%s cut at %d: %v, want unexpected EOF", s.Name, cut, err)
			}
		}
	}
}

// TestEveryBodyCutAtEachLength: no prefix of a frame is a frame.
func TestEveryBodyCutAtEachLength(t *testing.T) {
	for i, body := range liveBodies(t) {
		if len(body) > 2000 {
			continue
		}
		for n := range body {
			if f, err := ParseFrame(body[:n], Limits{}); err == nil {
				t.Fatalf("frame %d cut at %d accepted: %+v", i, n, f)
			}
		}
	}
}
