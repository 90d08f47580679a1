package channel

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/sealmq/sealmq/internal/vectors"
)

func TestTransportRekeyVectors(t *testing.T) {
	v := vectors.Load[struct {
		StartKey vectors.Hex `json:"start_key"`
		Schedule []struct {
			First uint64 `json:"first_nonce"`
			Key   vectors.Hex
		} `json:"key_schedule"`
		Messages []struct {
			Nonce           uint64
			Plaintext, Wire vectors.Hex
		}
	}](t, "transport_rekey_derived.json")
	if len(v.Messages) == 0 || len(v.Schedule) == 0 {
		t.Fatal("no cases")
	}
	start := key32(t, v.StartKey)
	s := NewSealer(start)
	keys := map[uint64][]byte{}
	for _, k := range v.Schedule {
		keys[k.First] = k.Key
	}
	o := NewOpener(start)
	at := 0
	for n := uint64(0); at < len(v.Messages); n++ {
		m := v.Messages[at]
		plain := []byte("filler")
		if n == m.Nonce {
			plain = m.Plaintext
		}
		frame, err := s.Seal(nil, plain)
		if err != nil {
			t.Fatal(err)
		}
		if key, ok := keys[n]; ok {
			wantBytes(t, "key schedule", s.key.raw[:], key)
		}
		if n != m.Nonce {
			continue // lost: the opener follows across the holes
		}
		at++
		wantBytes(t, "frame", frame, m.Wire)
		got, nonce, err := o.Open(nil, m.Wire)
		if err != nil || nonce != n {
			t.Fatalf("open %d: nonce %d, %v", n, nonce, err)
		}
		wantBytes(t, "plaintext", got, m.Plaintext)
	}
}

func TestNonceTrackerVectors(t *testing.T) {
	v := vectors.Load[struct {
		Tracker struct{ Steps [][2]json.RawMessage } `json:"nonce_tracker"`
		Keys    map[string]json.RawMessage           `json:"key_tracker"`
	}](t, "nonce_and_key_tracker_upstream.json")
	if len(v.Tracker.Steps) == 0 {
		t.Fatal("no steps")
	}
	var w replayWindow
	for i, step := range v.Tracker.Steps {
		var n uint64
		var want string
		if json.Unmarshal(step[0], &n) != nil || json.Unmarshal(step[1], &want) != nil {
			t.Fatalf("step %d: %s", i, step)
		}
		next, err := w.accept(n)
		if (err == nil) != (want == "accept") {
			t.Errorf("step %d: nonce %d: %v, want %s", i, n, err, want)
		}
		if err == nil {
			w = next
		}
	}
	for _, name := range []string{"first_interval", "middle_interval"} {
		var c struct {
			Interval, Rekeys uint64
			Previous         bool `json:"previous_key"`
			Cases            map[string]string
		}
		if err := json.Unmarshal(v.Keys[name], &c); err != nil || len(c.Cases) == 0 {
			t.Fatalf("%s: %v", name, err)
		}
		names := map[string]keyChoice{"current": keyCurrent, "next": keyNext, "previous": keyPrevious, "error": keyNone}
		for text, want := range c.Cases {
			var n uint64
			if err := json.Unmarshal([]byte(text), &n); err != nil {
				t.Fatal(err)
			}
			if got := chooseKey(n, c.Rekeys, c.Interval, c.Previous); got != names[want] {
				t.Errorf("%s: nonce %d: key %d, want %s", name, n, got, want)
			}
		}
	}
}

// TestWindowEdges has the decision points seen on live peers (spec
// secure-channel 11).
func TestWindowEdges(t *testing.T) {
	key := [32]byte{1}
	sealed := func() [][]byte {
		s, out := NewSealer(key), [][]byte(nil)
		for range 300 {
			f, err := s.Seal(nil, []byte("x"))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, f)
		}
		return out
	}()
	open := func(o *Opener, n int) error {
		t.Helper()
		before := *o
		_, _, err := o.Open(nil, sealed[n])
		if err != nil && (o.window != before.window || o.rekeys != before.rekeys || o.cur.raw != before.cur.raw) {
			t.Errorf("nonce %d: refused, yet the state changed", n)
		}
		return err
	}
	type step struct {
		n    int
		want error
	}
	for name, steps := range map[string][]step{
		"first 32":       {{32, nil}, {0, nil}, {0, ErrReplayed}},
		"first 33":       {{33, ErrBeyondWindow}, {0, nil}},
		"jump of 33":     {{0, nil}, {1, nil}, {34, ErrBeyondWindow}, {33, nil}},
		"32 back":        {{20, nil}, {52, nil}, {20, ErrReplayed}, {19, ErrTooOld}, {21, nil}},
		"jumps of 32":    {{31, nil}, {63, nil}, {95, nil}, {127, nil}, {159, nil}},
		"over a border":  {{33, ErrBeyondWindow}, {31, nil}, {32, nil}, {30, nil}, {63, nil}, {64, nil}, {62, nil}, {32, ErrReplayed}, {33, nil}},
		"previous key":   {{31, nil}, {40, nil}, {8, nil}, {7, ErrTooOld}},
		"replay of last": {{5, nil}, {5, ErrReplayed}},
	} {
		t.Run(name, func(t *testing.T) {
			o := NewOpener(key)
			for _, s := range steps {
				if err := open(o, s.n); !errors.Is(err, s.want) {
					t.Errorf("nonce %d: %v, want %v", s.n, err, s.want)
				}
			}
		})
	}
	t.Run("forged ahead changes nothing", func(t *testing.T) {
		o := NewOpener(key)
		for n := range 10 {
			if err := open(o, n); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range []uint64{10, 30, 41, 32} {
			f := bytes.Clone(sealed[10])
			binary.BigEndian.PutUint64(f, n)
			f[len(f)-1] ^= 1
			if _, _, err := o.Open(nil, f); !errors.Is(err, ErrForged) {
				t.Fatalf("forged %d: %v", n, err)
			}
		}
		for n := 10; n < 300; n++ {
			if err := open(o, n); err != nil {
				t.Fatalf("genuine %d: %v", n, err)
			}
		}
	})
}

// TestLossDuplicationReordering: inside the window each frame opens exactly
// once, whatever the order; nothing else ever opens.
func TestLossDuplicationReordering(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		key := [32]byte{byte(seed)}
		s, o := NewSealer(key), NewOpener(key)
		opened := map[uint64]int{}
		var pending [][]byte
		for n := range 2000 {
			f, err := s.Seal(nil, binary.BigEndian.AppendUint64(nil, uint64(n)))
			if err != nil {
				t.Fatal(err)
			}
			pending = append(pending, f)
			if rng.IntN(4) == 0 {
				pending = append(pending, f)
			}
			for len(pending) > 12 {
				i := rng.IntN(len(pending))
				f := pending[i]
				pending = append(pending[:i], pending[i+1:]...)
				claimed, _ := FrameNonce(f)
				if n-int(claimed) >= Window {
					continue // too far back by now: lost
				}
				p, got, err := o.Open(nil, f)
				switch {
				case errors.Is(err, ErrReplayed):
					if opened[claimed] != 1 {
						t.Fatalf("seed %d: %d called a replay after %d times", seed, claimed, opened[claimed])
					}
				case err != nil:
					t.Fatalf("seed %d: nonce %d: %v", seed, claimed, err)
				default:
					opened[got]++
					if opened[got] != 1 || binary.BigEndian.Uint64(p) != got {
						t.Fatalf("seed %d: nonce %d opened %d times as %x", seed, got, opened[got], p)
					}
				}
			}
		}
		if len(opened) < 1500 {
			t.Errorf("seed %d: only %d opened", seed, len(opened))
		}
	}
}

func TestFrameCutAndFlipped(t *testing.T) {
	key := [32]byte{7}
	good, err := NewSealer(key).Seal(nil, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	o := NewOpener(key)
	for n := range good {
		if _, _, err := o.Open(nil, good[:n]); err == nil {
			t.Errorf("cut at %d accepted", n)
		}
		bad := bytes.Clone(good)
		bad[n] ^= 0x40
		if _, _, err := o.Open(nil, bad); err == nil {
			t.Errorf("flip at %d accepted", n)
		}
	}
	if _, _, err := o.Open(nil, good); err != nil {
		t.Errorf("genuine frame after that: %v", err)
	}
}

func TestNonceExhaustion(t *testing.T) {
	s := NewSealer([32]byte{})
	s.next = maxNonce - 1
	if _, err := s.Seal(nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Seal(nil, nil); !errors.Is(err, ErrNonceExhausted) {
			t.Fatalf("%v, want ErrNonceExhausted", err)
		}
	}
}

func TestGapProof(t *testing.T) {
	key := [32]byte{3}
	s, o := NewSealer(key), NewOpener(key)
	frames := map[uint64][]byte{}
	for n := range uint64(maxGapRekeys*Window + 2*Window) {
		f, err := s.Seal(nil, []byte("m"))
		if err != nil {
			t.Fatal(err)
		}
		switch n {
		case 0, 33, 64, 1000, maxGapRekeys*Window + Window - 1, maxGapRekeys*Window + Window:
			frames[n] = f
		}
	}
	if _, _, err := o.Open(nil, frames[0]); err != nil {
		t.Fatal(err)
	}
	before := *o
	for n, f := range frames {
		want := n != 0 && n < maxGapRekeys*Window+Window
		if n == 0 {
			continue
		}
		if got := o.gapProof().proves(f); got != want {
			t.Errorf("nonce %d proves a gap: %v, want %v", n, got, want)
		}
		bad := bytes.Clone(f)
		bad[len(bad)-1]++
		if o.gapProof().proves(bad) {
			t.Errorf("forged nonce %d proves a gap", n)
		}
	}
	if o.window != before.window || o.rekeys != before.rekeys {
		t.Error("a proof changed the opener")
	}
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	key := [32]byte{9}
	s, o := NewSealer(key), NewOpener(key)
	plain := make([]byte, 1024)
	buf := make([]byte, 0, 2048)
	// 30 of 32: the key change, once in 32 frames, makes a cipher.
	if n := testing.AllocsPerRun(10, func() {
		frame, err := s.Seal(buf, plain)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := o.Open(frame[8:8], frame); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
