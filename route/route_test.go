package route

import (
	"errors"
	"testing"
)

// TestParseText: spec routing 2.2.
func TestParseText(t *testing.T) {
	for _, c := range []struct {
		text string
		want Route // nil: an error
	}{
		{"app", To("app")},
		{"0#app", To("app")},
		{"1#127.0.0.1:4000", Route{{TCP, "127.0.0.1:4000"}}},
		{"255#x", Route{{255, "x"}}},
		{"FWD_0123=>listener", To("FWD_0123", "listener")},
		{" FWD_0123 =>\tlistener ", To("FWD_0123", "listener")},
		{"1#host:1=>0#a=>b", Route{{TCP, "host:1"}, Local("a"), Local("b")}},
		{"a b", To("a b")},
		{"", nil},
		{"  ", nil},
		{"=>", nil},
		{"a=>", nil},
		{"=>a", nil},
		{"a=>=>b", nil},
		{"0#", nil},
		{"#a", nil},
		{"a#b", nil},
		{"-1#a", nil},
		{"+1#a", nil},
		{"256#a", nil},
		{"0#a#b", nil},
		{"0#a#", nil},
	} {
		got, err := Parse(c.text)
		if c.want == nil {
			if !errors.Is(err, ErrSyntax) || got != nil {
				t.Errorf("%q: %v, %v, want a syntax error", c.text, got, err)
			}
			continue
		}
		if err != nil || !got.Equal(c.want) {
			t.Errorf("%q: %v, %v, want %v", c.text, got, err, c.want)
		}
		if again, err := Parse(got.String()); err != nil || !again.Equal(got) {
			t.Errorf("%q prints as %q, which parses as %v, %v", c.text, got, again, err)
		}
	}
}

func TestAddressString(t *testing.T) {
	for _, c := range []struct {
		a    Address
		want string
	}{
		{Local("app"), "0#app"},
		{Address{TCP, "h:1"}, "1#h:1"},
		{Local("größe"), "0#größe"},
		{Local("a\nERROR forged"), `0#"a\nERROR forged"`},
		{Local("\xff\xfe"), `0#"\xff\xfe"`},
		{Local("\u202e"), `0#"\u202e"`},
	} {
		if got := c.a.String(); got != c.want {
			t.Errorf("%#v prints as %s, want %s", c.a, got, c.want)
		}
	}
	if got := Route(nil).String(); got != "" {
		t.Errorf("empty route prints as %q", got)
	}
	if got := To("a", "b").String(); got != "0#a => 0#b" {
		t.Errorf("route prints as %q", got)
	}
	if Stored.String() != "stored" || Transient.String() != "transient" || Class(9).String() != "class(9)" {
		t.Error("class names")
	}
}

// TestRoutesDoNotShare: what is derived from a route never writes into it.
func TestRoutesDoNotShare(t *testing.T) {
	r := append(make(Route, 0, 10), Local("a"), Local("b"), Local("c"))
	rest := r.Rest()
	_ = append(rest[:1], Local("X"))
	_ = append(r.Rest(), Local("Y"))
	x, y := r.Append(Local("1")), r.Append(Local("2"))
	p := r.Prepend(Local("0"))
	cl := r.Clone()
	cl[0], p[1], x[0] = Local("Z"), Local("Z"), Local("Z")
	if last, _ := y.Last(); !last.IsLocal() || last.Value != "2" {
		t.Errorf("routes share memory: %v", y)
	}
	if first, ok := r.First(); !ok || first != Local("a") {
		t.Errorf("route changed: %v", r)
	}
	if r[:4][3] != (Address{}) {
		t.Errorf("appending to the rest wrote behind the route")
	}
	var none Route
	if _, ok := none.First(); ok {
		t.Error("empty route has a first address")
	}
	if _, ok := none.Last(); ok {
		t.Error("empty route has a last address")
	}
	if none.Rest() != nil || !none.Equal(Route{}) {
		t.Error("rest of nothing")
	}
}

func TestErrorTexts(t *testing.T) {
	for r := ReasonTruncated; r <= ReasonFrames; r++ {
		if r.String() == "" {
			t.Errorf("reason %d has no text", r)
		}
		e := &FrameError{Reason: r}
		if e.Error() == "" || errors.Is(e, ErrMalformed) == errors.Is(e, ErrLimit) {
			t.Errorf("reason %d has no class of its own", r)
		}
		if errors.Is(e, ErrMixed) {
			t.Errorf("reason %d is ErrMixed", r)
		}
	}
	if Reason(0).String() != "reason 0" || Reason(99).String() != "reason 99" {
		t.Error("unknown reasons")
	}
}

func TestParseRouteErrors(t *testing.T) {
	for _, s := range []string{"", "40", "81", "8182", "81820041"} {
		if r, _, err := ParseRoute(unhex(t, s), Limits{}); !errors.Is(err, ErrMalformed) || r != nil {
			t.Errorf("%q: %v, %v", s, r, err)
		}
	}
	if _, _, err := NextView(nil, Limits{}); !errors.Is(err, ErrMalformed) {
		t.Errorf("empty sequence: %v", err)
	}
}
