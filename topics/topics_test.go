package topics

import (
	"errors"
	"strings"
	"testing"
)

func TestParseRoot(t *testing.T) {
	for _, ok := range []string{"sealmq", "a", "a/b/c/d", "Plant 7/größe", strings.Repeat("x", 128)} {
		if r, err := ParseRoot(ok); err != nil || string(r) != ok {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{
		"", "/", "/a", "a/", "a//b", "a/b/c/d/e", "+", "a/+", "#", "a/#", "a#", "$SYS", "$share/g/a", "$",
		"a\x00b", "a\nb", "a\x7f", "\xff", strings.Repeat("x", 129),
	} {
		if r, err := ParseRoot(bad); !errors.Is(err, ErrRoot) || r != "" {
			t.Errorf("%q: %q, %v", bad, r, err)
		}
	}
}

func TestValidDevice(t *testing.T) {
	for _, ok := range []string{"a", "_", "-", "HUB", "hub-1", "I" + strings.Repeat("0f", 32), strings.Repeat("z", 128)} {
		if !ValidDevice(ok) {
			t.Errorf("%q refused", ok)
		}
	}
	for _, bad := range []string{"", "hub", "a b", "a/b", "a.b", "+", "#", "$SYS", "ä", "a\x00", strings.Repeat("z", 129)} {
		if ValidDevice(bad) {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestParseTopic(t *testing.T) {
	for _, root := range []Root{"sealmq", "plant/7/sealmq", "a"} {
		r := string(root)
		for _, c := range []struct {
			topic string
			kind  Kind
			name  string
		}{
			{root.Out("dev-1"), Out, "dev-1"},
			{root.In("dev-1"), In, "dev-1"},
			{root.Status("dev-1"), Status, "dev-1"},
			{root.Forwarder("FWD_0123456789abcdef"), Forwarder, "FWD_0123456789abcdef"},
			{root.Forwarder("a/b#+%"), Forwarder, "a%2Fb%23%2B%25"},
			{root.Forwarder(""), Forwarder, "%"},
			{root.Trace(), Trace, ""},
			{r, OtherUnder, ""},
			{r + "/", OtherUnder, ""},
			{r + "//", OtherUnder, ""},
			{r + "/dev-1", OtherUnder, ""},
			{r + "/dev-1/", OtherUnder, ""},
			{r + "/dev-1/OUT", OtherUnder, ""},
			{r + "/dev-1/out/", OtherUnder, ""},
			{r + "/dev-1/out/x", OtherUnder, ""},
			{r + "/dev-1/outx", OtherUnder, ""},
			{r + "//out", OtherUnder, ""},
			{r + "/dev 1/out", OtherUnder, ""},
			{r + "/+/out", OtherUnder, ""},
			{r + "/#", OtherUnder, ""},
			{r + "/hub", OtherUnder, ""},
			{r + "/hub/out", OtherUnder, ""},
			{r + "/hub/in", OtherUnder, ""},
			{r + "/hub/status", OtherUnder, ""},
			{r + "/hub/trace/x", OtherUnder, ""},
			{r + "/hub/forwarders", OtherUnder, ""},
			{r + "/hub/forwarders/", OtherUnder, ""},
			{r + "/hub/forwarders/a/b", OtherUnder, ""},
			{r + "/hub/forwarders/+", OtherUnder, ""},
			{r + "/hub/forwarders/#", OtherUnder, ""},
			{r + "/dev-1/status/x", OtherUnder, ""},
			{r + "x", Outside, ""},
			{r + "x/dev-1/out", Outside, ""},
			{"/" + r + "/dev-1/out", Outside, ""},
			{"x/" + r + "/dev-1/out", Outside, ""},
			{strings.ToUpper(r) + "/dev-1/out", Outside, ""},
			{"$share/g/" + r + "/dev-1/out", Outside, ""},
			{"$SYS/broker/version", Outside, ""},
			{"", Outside, ""},
			{"/", Outside, ""},
			{"+/dev-1/out", Outside, ""},
			{"#", Outside, ""},
		} {
			if kind, name := root.Parse(c.topic); kind != c.kind || name != c.name {
				t.Errorf("root %q: Parse(%q) = %v, %q, want %v, %q", root, c.topic, kind, name, c.kind, c.name)
			}
		}
	}
	if k, _ := Root("a/b").Parse("a"); k != Outside {
		t.Errorf("parent of the root is %v", k)
	}
	if k, _ := Root("a/b").Parse("a/bc/d/out"); k != Outside {
		t.Errorf("sibling of the root is %v", k)
	}
}

func TestKindString(t *testing.T) {
	seen := map[string]bool{}
	for k := Outside; k <= OtherUnder+1; k++ {
		if s := k.String(); s == "" || seen[s] {
			t.Errorf("kind %d is %q", k, s)
		} else {
			seen[s] = true
		}
	}
}

func TestEscapeLevel(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"FWD_0123", "FWD_0123"}, {"a.b-c_D9", "a.b-c_D9"}, {"", "%"}, {"%", "%25"},
		{"a/b", "a%2Fb"}, {"+#", "%2B%23"}, {"\x00\xff", "%00%FF"}, {"ä", "%C3%A4"},
	} {
		if got := EscapeLevel(c.in); got != c.want {
			t.Errorf("EscapeLevel(%q) = %q, want %q", c.in, got, c.want)
		}
		if back, ok := UnescapeLevel(c.want); !ok || back != c.in {
			t.Errorf("UnescapeLevel(%q) = %q, %v", c.want, back, ok)
		}
	}
	for _, bad := range []string{"", "a/b", "%2", "%2f", "%41", "a%", "%%", "a b", "%G0"} {
		if s, ok := UnescapeLevel(bad); ok {
			t.Errorf("UnescapeLevel(%q) = %q", bad, s)
		}
	}
}

func TestOverlaps(t *testing.T) {
	for _, c := range []struct {
		root          Root
		filter        string
		root1, beyond bool
	}{
		{"sealmq", "#", true, true},
		{"sealmq", "+", true, true},
		{"sealmq", "+/#", true, true},
		{"sealmq", "+/+/in", true, true},
		{"sealmq", "sealmq", true, false},
		{"sealmq", "sealmq/#", true, false},
		{"sealmq", "sealmq/+/in", true, false},
		{"sealmq", "sealmq/", true, false},
		{"sealmq", "sealmq/a/b/c/d/e", true, false},
		{"sealmq", "sealmqx/#", false, true},
		{"sealmq", "SEALMQ/#", false, true},
		{"sealmq", "other/#", false, true},
		{"sealmq", "/#", false, true},
		{"sealmq", "/+/in", false, true},
		{"sealmq", "/sealmq/#", false, true},
		{"sealmq", "$SYS/#", false, true},
		{"sealmq", "$SYS/+/sealmq", false, true},
		{"sealmq", "$share/g/sealmq/+/in", true, false},
		{"sealmq", "$SHARE/g/sealmq/+/in", true, false},
		{"sealmq", "$sHaRe/g/#", true, true},
		{"sealmq", "$share/sealmq/other", false, true},
		{"sealmq", "$share/g/$share/g/sealmq/#", false, true},
		{"sealmq", "$sharex/g/sealmq/#", false, true},
		{"sealmq", "$share/g", true, true}, // not valid: who knows
		{"sealmq", "$share/", true, true},
		{"sealmq", "", true, true},
		{"sealmq", "a/#/b", true, true},
		{"sealmq", "a#", true, true},
		{"sealmq", "a+/b", true, true},
		{"sealmq", "a\x00", true, true},
		{"a/b/c", "a/b/c/#", true, false},
		{"a/b/c", "a/b/c", true, false},
		{"a/b/c", "a/b/#", true, true},
		{"a/b/c", "a/#", true, true},
		{"a/b/c", "a/b", false, true},
		{"a/b/c", "a/+", false, true},
		{"a/b/c", "a/+/c", true, true},
		{"a/b/c", "+/+/+", true, true},
		{"a/b/c", "+/+", false, true},
		{"a/b/c", "+/+/d", false, true},
		{"a/b/c", "a/b/+/x/in", true, true},
		{"a/b/c", "a/b/d/#", false, true},
		{"a/b/c", "a//c/#", false, true},
	} {
		a, b := c.root.Overlaps(c.filter)
		if a != c.root1 || b != c.beyond {
			t.Errorf("root %q, filter %q: %v, %v, want %v, %v", c.root, c.filter, a, b, c.root1, c.beyond)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		filter, topic string
		want          bool
	}{
		{"a/b", "a/b", true},
		{"a/b", "a/b/", false},
		{"a/b", "A/b", false},
		{"#", "a", true},
		{"#", "/", true},
		{"#", "a/b/c", true},
		{"#", "$SYS/x", false},
		{"+/x", "$SYS/x", false},
		{"$SYS/#", "$SYS/x", true},
		{"$SYS/+", "$SYS/x", true},
		{"$SYS/#", "$SYS", true},
		{"a/#", "a", true},
		{"a/#", "a/", true},
		{"a/#", "a/b/c", true},
		{"a/#", "ab", false},
		{"a/+", "a", false},
		{"a/+", "a/", true},
		{"a/+", "a/b", true},
		{"a/+", "a/b/c", false},
		{"+", "/a", false},
		{"+/+", "/a", true},
		{"/+", "/a", true},
		{"+/a/+", "/a/", true},
		{"a/+/c/#", "a/b/c", true},
		{"a/+/c/#", "a/b/d", false},
		{"a/#/b", "a/x/b", false},
		{"", "a", false},
		{"a", "", false},
		{"#", "", false},
	} {
		if got := Match(c.filter, c.topic); got != c.want {
			t.Errorf("Match(%q, %q) = %v", c.filter, c.topic, got)
		}
	}
}

func TestFiltersOfTheScheme(t *testing.T) {
	r := Root("plant/sealmq")
	if !Match(r.OutFilter(), r.Out("d")) || Match(r.OutFilter(), r.In("d")) || !ValidFilter(r.OutFilter()) {
		t.Error("OutFilter")
	}
	for _, topic := range []string{r.Out("d"), r.Forwarder("x"), r.Trace(), string(r)} {
		if !Match(r.All(), topic) {
			t.Errorf("All does not match %q", topic)
		}
	}
	// Five levels below the root are the most that hosted brokers carry.
	for _, topic := range []string{r.Out("d"), r.Forwarder("a/b/c"), r.Trace()} {
		if n := strings.Count(strings.TrimPrefix(topic, string(r)), "/"); n > 5 {
			t.Errorf("%q has %d levels below the root", topic, n)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	r := Root("plant/7/sealmq")
	topics := []string{r.Out("device-1"), r.In("device-1"), r.Forwarder("FWD_0123"), r.Trace(), "other/topic", "$SYS/x", string(r)}
	filters := []string{"#", "+/+/+/+/in", r.All(), "$share/group/" + r.OutFilter(), "other/#"}
	if n := testing.AllocsPerRun(100, func() {
		for _, topic := range topics {
			r.Parse(topic)
			for _, f := range filters {
				r.Overlaps(f)
				Match(f, topic)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// slowMatch is MQTT 4.7 in the plainest form.
func slowMatch(filter, topic []string) bool {
	switch {
	case len(filter) == 0:
		return len(topic) == 0
	case filter[0] == "#":
		return true
	case len(topic) == 0:
		return false
	}
	return (filter[0] == "+" || filter[0] == topic[0]) && slowMatch(filter[1:], topic[1:])
}

// FuzzTopics: kinds, names and the answers about filters agree with each other and
// with the plainest form of the rules.
func FuzzTopics(f *testing.F) {
	for _, s := range []string{"sealmq/d/out", "sealmq/hub/forwarders/FWD_1", "sealmq", "other/x", "$SYS/a", "/", "a//b"} {
		for _, g := range []string{"#", "+/+/in", "sealmq/#", "$share/g/sealmq/+/out", "a/b", "/+", "$SYS/#", "a#"} {
			f.Add("sealmq", s, g)
			f.Add("a/b", s, g)
		}
	}
	f.Fuzz(func(t *testing.T, rootText, topic, filter string) {
		root, err := ParseRoot(rootText)
		if err != nil {
			return
		}
		kind, name := root.Parse(topic)
		under := topic == rootText || strings.HasPrefix(topic, rootText+"/")
		if under != (kind != Outside) {
			t.Fatalf("Parse(%q) = %v", topic, kind)
		}
		again := topic
		switch kind {
		case Out:
			again = root.Out(name)
		case In:
			again = root.In(name)
		case Status:
			again = root.Status(name)
		case Forwarder:
			if addr, ok := UnescapeLevel(name); ok {
				again = root.Forwarder(addr)
			}
		case Trace:
			again = root.Trace()
		}
		if again != topic {
			t.Fatalf("Parse(%q) = %v, %q, which builds %q", topic, kind, name, again)
		}
		if kind == Out || kind == In || kind == Status {
			if !ValidDevice(name) {
				t.Fatalf("device %q", name)
			}
		}
		if addr, ok := UnescapeLevel(EscapeLevel(topic)); !ok || addr != topic || strings.ContainsAny(EscapeLevel(topic), "/+#\x00") {
			t.Fatalf("EscapeLevel(%q) = %q", topic, EscapeLevel(topic))
		}

		inner, _ := StripShare(filter)
		if !ValidFilter(inner) || topic == "" || strings.ContainsAny(topic, "+#\x00") {
			return
		}
		want := slowMatch(strings.Split(inner, "/"), strings.Split(topic, "/"))
		if topic[0] == '$' && (inner[0] == '+' || inner[0] == '#') {
			want = false
		}
		if got := Match(inner, topic); got != want {
			t.Fatalf("Match(%q, %q) = %v", inner, topic, got)
		}
		touches, outside := root.Overlaps(filter)
		if want && under && !touches || want && !under && !outside {
			t.Fatalf("%q matches %q, but Overlaps of root %q says %v, %v", filter, topic, root, touches, outside)
		}
		if !touches && !outside {
			t.Fatalf("%q touches nothing", filter)
		}
	})
}
