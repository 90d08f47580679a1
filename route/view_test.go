package route

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

func mustView(t testing.TB, body []byte) View {
	t.Helper()
	v, err := ParseView(body, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestViewAccessors(t *testing.T) {
	f := Frame{
		Onward:  Route{Local("a"), {TCP, "127.0.0.1:4000"}, {Transport(200), strings.Repeat("x", 100)}},
		Return:  Route{Local("r1"), Local(""), Local("last")},
		Payload: []byte("payload"),
	}
	body := AppendFrame(nil, &f)
	if len(body) != f.EncodedLen() {
		t.Errorf("EncodedLen %d, want %d", f.EncodedLen(), len(body))
	}
	v := mustView(t, body)
	if v.OnwardLen() != 3 || v.ReturnLen() != 3 || string(v.Payload()) != "payload" || v.Len() != len(body) || v.IsHeartbeat() {
		t.Errorf("view %d %d %q %d", v.OnwardLen(), v.ReturnLen(), v.Payload(), v.Len())
	}
	if h := v.FirstHop(); !h.Is(Local("a")) || h.Is(Address{TCP, "a"}) || h.Address() != Local("a") {
		t.Errorf("first hop %v", h)
	}
	if h, ok := v.LastReturn(); !ok || !h.Is(Local("last")) {
		t.Errorf("last return hop %v %v", h, ok)
	}
	var onward, ret Route
	for h := range v.Onward() {
		onward = append(onward, h.Address())
	}
	for h := range v.Return() {
		ret = append(ret, h.Address())
		if len(ret) == 2 {
			break
		}
	}
	if !onward.Equal(f.Onward) || !ret.Equal(f.Return[:2]) {
		t.Errorf("iterated %v, %v", onward, ret)
	}
	if got := v.OnwardHops(1); got != EncodeHops(f.Onward[1:]) || got.Len() != 2 || !got.Route().Equal(f.Onward[1:]) {
		t.Errorf("OnwardHops(1) = %v", got.Route())
	}
	if got := v.ReturnHops(); got != EncodeHops(f.Return) {
		t.Errorf("ReturnHops = %v", got.Route())
	}
	if got := v.OnwardHops(9); got != (Hops{}) || got.Route() != nil {
		t.Errorf("OnwardHops(9) = %v", got.Route())
	}
	if got := AppendEncoded(nil, v.OnwardHops(0), v.ReturnHops(), v.Payload()); !bytes.Equal(got, body) {
		t.Errorf("AppendEncoded differs")
	}

	var zero View
	if h, ok := zero.LastReturn(); ok || h.Value != nil {
		t.Errorf("last return hop of nothing: %v", h)
	}
	if h := zero.FirstHop(); h.Value != nil || !zero.IsHeartbeat() {
		t.Errorf("first hop of nothing: %v", h)
	}
	if got := zero.AppendForwarded(nil, 1, Hops{}, Hops{}); !bytes.Equal(got, []byte{0x84, 0x80, 0x80, 0x40, 0xf6}) {
		t.Errorf("zero View is %x", got)
	}
}

// TestForwardedAgreesWithFrames compares the in-place path with the obvious one for
// canonical and foreign encodings.
func TestForwardedAgreesWithFrames(t *testing.T) {
	long := strings.Repeat("n", 200)
	foreign := [][]byte{
		unhex(t, "9f 9f 9f18004161ff 83014162f6 82004163 ff 83 820058016182004162830041ff00 4170 6178 00 ff"),
		unhex(t, "83 82 82004161 8200580162 81 9802004163 42aabb"),
	}
	for _, n := range []int{0, 1, 2, 22, 23, 24, 25, 63, 64} {
		f := Frame{Payload: make([]byte, n*11)}
		for i := range n {
			f.Onward = append(f.Onward, Local(long[:i]))
			f.Return = append(f.Return, Address{Transport(i * 3), long[i:]})
		}
		foreign = append(foreign, AppendFrame(nil, &f))
	}
	for i, body := range foreign {
		v := mustView(t, body)
		f := v.Frame()
		for _, pop := range []int{-1, 0, 1, 2, 23, 64, 65} {
			for _, front := range []Route{nil, To("x"), To(strings.Repeat("m", 32), "y")} {
				for _, stamp := range []Route{nil, To("dev_0123")} {
					want := Frame{Onward: slices.Concat(front, f.Onward[min(max(pop, 0), len(f.Onward)):]), Return: slices.Concat(stamp, f.Return), Payload: f.Payload}
					got := v.AppendForwarded([]byte("keep"), pop, EncodeHops(front), EncodeHops(stamp))
					if string(got[:4]) != "keep" || !bytes.Equal(got[4:], AppendFrame(nil, &want)) {
						t.Fatalf("frame %d pop %d front %v stamp %v:\n got %x\nwant %x", i, pop, front, stamp, got[4:], AppendFrame(nil, &want))
					}
					if n := v.ForwardedLen(pop, EncodeHops(front), EncodeHops(stamp)); n != len(got)-4 {
						t.Fatalf("ForwardedLen %d, want %d", n, len(got)-4)
					}
				}
			}
		}
	}
}

func TestLimits(t *testing.T) {
	hops := func(n int) Route {
		r := make(Route, n)
		for i := range r {
			r[i] = Local("a")
		}
		return r
	}
	body := func(f Frame) []byte { return AppendFrame(nil, &f) }
	fits := body(Frame{To("a"), nil, make([]byte, 1000)})
	indefinite := append(append(unhex(t, "84 9f"), bytes.Repeat(unhex(t, "82004161"), 65)...), unhex(t, "ff 80 40 f6")...)
	trailing := append(body(Frame{To("a"), nil, nil}), make([]byte, 5000)...)
	for _, c := range []struct {
		name string
		body []byte
		lim  Limits
		want error
	}{
		{"64 hops onward", body(Frame{hops(64), nil, nil}), Limits{}, nil},
		{"65 hops onward", body(Frame{hops(65), nil, nil}), Limits{}, ErrTooManyHops},
		{"65 hops onward, indefinite", indefinite, Limits{}, ErrTooManyHops},
		{"64 hops return", body(Frame{To("a"), hops(64), nil}), Limits{}, nil},
		{"65 hops return", body(Frame{To("a"), hops(65), nil}), Limits{}, ErrTooManyHops},
		{"65 hops allowed", body(Frame{hops(65), nil, nil}), Limits{Hops: 65}, nil},
		{"address of 255", body(Frame{To(strings.Repeat("x", 255)), nil, nil}), Limits{}, nil},
		{"address of 256", body(Frame{To(strings.Repeat("x", 256)), nil, nil}), Limits{}, ErrAddressTooLong},
		{"address of 256 in return", body(Frame{nil, To(strings.Repeat("x", 256)), nil}), Limits{}, ErrAddressTooLong},
		{"address of 256 allowed", body(Frame{To(strings.Repeat("x", 256)), nil, nil}), Limits{Address: 256}, nil},
		{"exactly the limit", fits, Limits{Frame: len(fits)}, nil},
		{"one byte over", fits, Limits{Frame: len(fits) - 1}, ErrTooLarge},
		{"trailing bytes count", trailing, Limits{Frame: 4 << 10}, ErrTooLarge},
		{"default frame limit", body(Frame{To("a"), nil, make([]byte, DefaultFrame)}), Limits{}, ErrTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseFrame(c.body, c.lim)
			if !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if err != nil && (!errors.Is(err, ErrLimit) || errors.Is(err, ErrMalformed)) {
				t.Errorf("%v has the wrong class", err)
			}
			if c.name == "trailing bytes count" {
				return // in a sequence they are the next frame
			}
			if _, _, err := NextView(c.body, c.lim); !errors.Is(err, c.want) {
				t.Errorf("NextView: error %v, want %v", err, c.want)
			}
		})
	}
}

// TestCheckRoute holds the check of what is sent to that of what is received.
func TestCheckRoute(t *testing.T) {
	long := func(hops, value int) Route { return slices.Repeat(To(strings.Repeat("x", value)), hops) }
	for _, r := range []Route{nil, long(64, 255), long(65, 1), long(1, 256), long(10, 32), long(11, 32), long(10, 33)} {
		for _, lim := range []Limits{{}, {Hops: 10}, {Address: 32}} {
			body := AppendFrame(nil, &Frame{Onward: r})
			_, err := ParseFrame(body, lim)
			got := lim.CheckRoute(r)
			if (got == nil) != (err == nil) || errors.Is(got, ErrTooManyHops) != errors.Is(err, ErrTooManyHops) ||
				errors.Is(got, ErrAddressTooLong) != errors.Is(err, ErrAddressTooLong) {
				t.Errorf("%d hops, %+v: %v, but a receiver says %v", len(r), lim, got, err)
			}
		}
	}
}

func TestLimitsValidate(t *testing.T) {
	for _, ok := range []Limits{{}, {Frame: MaxFrame}, {Frame: 4096, Hops: 10, Address: 32}} {
		if err := ok.Validate(); err != nil {
			t.Errorf("%+v: %v", ok, err)
		}
	}
	for _, bad := range []Limits{{Frame: -1}, {Frame: 100}, {Frame: MaxFrame + 1}, {Hops: 9}, {Hops: 5000}, {Address: 31}, {Address: 1 << 20}} {
		if bad.Validate() == nil {
			t.Errorf("%+v accepted", bad)
		}
	}
	if got := (Limits{Frame: 1 << 30}).WithDefaults(); got.Frame != MaxFrame || got.Hops != DefaultHops || got.Address != DefaultAddress {
		t.Errorf("defaults %+v", got)
	}
}

// TestHostileLengthsDoNotAllocate: a length field alone costs nothing.
func TestHostileLengthsDoNotAllocate(t *testing.T) {
	for _, s := range []string{
		"84 9a7fffffff 80 40 f6",
		"84 81 82005a7fffffff 80 40 f6",
		"84 80 80 5a7fffffff f6",
		"9b7fffffffffffffff 80 80 40",
	} {
		body := unhex(t, s)
		if n := testing.AllocsPerRun(100, func() { _, _ = ParseView(body, Limits{}) }); n > 1 {
			t.Errorf("%s: %v allocations, want at most the error's", s, n)
		}
	}
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	body := benchBody(64)
	front, stamp := EncodeHops(To(regM)), EncodeHops(To("dev_00112233445566778899aabbccddeeff"))
	table := map[string]int{fwd: 1}
	dst := make([]byte, 0, 1024)
	n := testing.AllocsPerRun(1000, func() {
		v, err := ParseView(body, Limits{})
		if err != nil || table[string(v.FirstHop().Value)] != 1 {
			t.Fatal("no such hop", err)
		}
		if last, ok := v.LastReturn(); !ok || len(last.Value) != 32 {
			t.Fatal("wrong origin")
		}
		hops := 0
		for range v.Onward() {
			hops++
		}
		dst = v.AppendForwarded(dst[:0], 1, front, stamp)
		dst = v.AppendReply(dst[:0], stamp, front, v.Payload())
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// benchBody is a frame with a payload of n bytes and three hops: two onward, one
// back.
func benchBody(n int) []byte {
	return AppendFrame(nil, &Frame{To(fwd, "app"), To(reply), make([]byte, n)})
}

func BenchmarkForward(b *testing.B) {
	for _, c := range []struct {
		name string
		size int
	}{{"64B", 64}, {"1KiB", 1 << 10}, {"16KiB", 16 << 10}} {
		b.Run(c.name, func(b *testing.B) {
			body := benchBody(c.size)
			front, stamp := EncodeHops(To(regM)), EncodeHops(To("dev_00112233445566778899aabbccddeeff"))
			table := map[string]Hops{fwd: front}
			dst := make([]byte, 0, 2*len(body)+256)
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				v, err := ParseView(body, Limits{})
				if err != nil {
					b.Fatal(err)
				}
				to, ok := table[string(v.FirstHop().Value)]
				if !ok {
					b.Fatal("no such forwarder")
				}
				dst = v.AppendForwarded(dst[:0], 1, to, stamp)
			}
		})
	}
}

func BenchmarkParseView(b *testing.B) {
	body := benchBody(64)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseView(body, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseFrame(b *testing.B) {
	body := benchBody(64)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseFrame(body, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}
