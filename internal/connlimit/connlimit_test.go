package connlimit

import (
	"fmt"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func tcp(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }

func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits *Limits
		from   []string // all admitted
		next   string
		want   Verdict
	}{
		{"total", &Limits{Conns: 2}, []string{"10.0.0.1", "10.0.0.2"}, "10.0.0.3", RefusedTotal},
		{"one address", &Limits{PerAddress: 2}, []string{"10.0.0.1", "10.0.0.1", "10.0.0.2"}, "10.0.0.1", RefusedAddress},
		{"mapped address", &Limits{PerAddress: 1}, []string{"::ffff:10.0.0.1"}, "10.0.0.1", RefusedAddress},
		{"one network", &Limits{PerAddress: 1}, []string{"2001:db8::1", "2001:db8:0:1::1"}, "2001:db8::2", RefusedAddress},
		{"loopback is an address", &Limits{PerAddress: 1}, []string{"::1"}, "::2", Admitted},
		{"pending", &Limits{Pending: 2}, []string{"10.0.0.1", "10.0.0.2"}, "10.0.0.3", RefusedPending},
		{"pending of one address", &Limits{Pending: 4}, []string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}, "10.0.0.1", RefusedPending},
		{"pending of another", &Limits{Pending: 4}, []string{"10.0.0.1", "10.0.0.1", "10.0.0.1"}, "10.0.0.2", Admitted},
		{"none", &Limits{Conns: -1, PerAddress: -1, Pending: -1}, []string{"10.0.0.1", "10.0.0.1"}, "10.0.0.1", Admitted},
		{"defaults", &Limits{}, []string{"10.0.0.1"}, "10.0.0.1", Admitted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var tickets []*Ticket
			for _, from := range tt.from {
				k, v := tt.limits.Take(tcp(from))
				if v != Admitted {
					t.Fatalf("%s: %v", from, v)
				}
				tickets = append(tickets, k)
			}
			if conns, pending := tt.limits.Open(); conns != len(tt.from) || pending != len(tt.from) {
				t.Errorf("%d open, %d pending", conns, pending)
			}
			k, v := tt.limits.Take(tcp(tt.next))
			if v != tt.want || (k == nil) != (v != Admitted) {
				t.Fatalf("verdict %v, want %v", v, tt.want)
			}
			k.Release() // nil is fine
			if tt.want == RefusedPending {
				tickets[0].Settle()
				tickets[0].Settle()
				if k, v := tt.limits.Take(tcp(tt.next)); v != Admitted {
					t.Errorf("after one has settled: %v", v)
				} else {
					k.Release()
				}
			}
			for _, k := range tickets {
				k.Release()
				k.Release()
				k.Settle()
			}
			if conns, pending := tt.limits.Open(); conns != 0 || pending != 0 || len(tt.limits.from) != 0 {
				t.Errorf("left: %d open, %d pending, %d addresses", conns, pending, len(tt.limits.from))
			}
		})
	}
	// Peers without an IP address share one place.
	l := &Limits{PerAddress: 1}
	if _, v := l.Take(&net.UnixAddr{Name: "a"}); v != Admitted {
		t.Error(v)
	}
	if _, v := l.Take(&net.UnixAddr{Name: "b"}); v != RefusedAddress {
		t.Error(v)
	}
}

// TestYield: where every place of pending connections is taken a newcomer gets that
// of the oldest which yields and has had it for a while.
func TestYield(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &Limits{Pending: 4}
		var ended []string
		take := func(name, ip string, yields bool) *Ticket {
			k, v := l.Take(tcp(ip))
			if v != Admitted {
				t.Fatalf("%s: %v", name, v)
			}
			if yields {
				k.Yield(func() { ended = append(ended, name) }, nil)
			}
			return k
		}
		refused := func(ip string) {
			t.Helper()
			if _, v := l.Take(tcp(ip)); v != RefusedPending {
				t.Errorf("%s: %v", ip, v)
			}
		}
		other := take("other", "10.0.0.9", true)
		take("firm", "10.0.0.1", false)
		stays := take("stays", "10.0.0.8", true)
		stays.Stay()
		stays.Stay()
		stays.Release()
		a := take("a", "10.0.0.1", true)
		b := take("b", "10.0.0.1", true)
		refused("10.0.0.1") // its share, and nobody has been there for long
		refused("10.0.0.2") // all places
		time.Sleep(grace)
		c := take("c", "10.0.0.1", true) // not other's, although that is older
		d := take("d", "10.0.0.2", true)
		b.Settle()
		b.Settle()
		take("e", "10.0.0.2", true) // there is room
		refused("10.0.0.2")         // the others are new
		time.Sleep(grace)
		c.Release()
		take("f", "10.0.0.2", true)
		take("g", "10.0.0.3", true) // in place of d, the oldest
		if got, want := ended, []string{"a", "other", "d"}; !slices.Equal(got, want) {
			t.Errorf("ended %q, want %q", got, want)
		}
		if conns, pending := l.Open(); conns != 8 || pending != 4 {
			t.Errorf("%d open, %d pending", conns, pending)
		}
		if !other.Displaced() || !a.Displaced() || b.Displaced() || c.Displaced() {
			t.Error("who was displaced?")
		}
		for _, k := range []*Ticket{other, a, d} { // what end brings about
			k.Release()
		}
		a.Yield(nil, nil)
		if conns, pending := l.Open(); conns != 5 || pending != 4 || l.yielding.Len() != 3 {
			t.Errorf("%d open, %d pending, %d of them yield", conns, pending, l.yielding.Len())
		}
	})
}

// TestYieldToAnyLimit: who yields makes room whichever limit is reached, of its own
// address where that is the one.
func TestYieldToAnyLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			name   string
			limits *Limits
			next   string
			want   string
		}{
			{"total", &Limits{Conns: 4}, "10.0.0.9", "a"},
			{"address", &Limits{PerAddress: 2}, "10.0.0.2", "b"},
			{"total and address", &Limits{Conns: 4, PerAddress: 2}, "10.0.0.2", "b"},
		} {
			var ended []string
			for _, c := range []struct{ name, ip string }{{"a", "10.0.0.1"}, {"b", "10.0.0.2"}, {"", "10.0.0.1"}, {"", "10.0.0.2"}} {
				k, v := tt.limits.Take(tcp(c.ip))
				switch {
				case v != Admitted:
					t.Fatalf("%s: %v", tt.name, v)
				case c.name == "":
					k.Settle()
				default:
					k.Yield(func() { ended = append(ended, c.name); k.Release() }, nil)
				}
			}
			if _, v := tt.limits.Take(tcp(tt.next)); v == Admitted || len(ended) != 0 {
				t.Errorf("%s: a place is taken at once", tt.name)
			}
			time.Sleep(grace) // synthetic
			if _, v := tt.limits.Take(tcp(tt.next)); v != Admitted || !slices.Equal(ended, []string{tt.want}) {
				t.Errorf("%s: %v, and %q had to go", tt.name, v, ended)
			}
			if conns, pending := tt.limits.Open(); conns != 4 || pending != 2 {
				t.Errorf("%s: %d open, %d pending", tt.name, conns, pending)
			}
		}
	})
}

// TestSilence: only whose word is waited for gives way, who has been silent longest
// first, and nobody of whom something has come that is not read yet.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &Limits{Pending: 8}
		var ended string
		unread := map[string]bool{}
		tickets := map[string]*Ticket{}
		take := func(name, ip string) {
			t.Helper()
			k, v := l.Take(tcp(ip))
			if v != Admitted {
				t.Fatalf("%s: %v", name, v)
			}
			k.Yield(func() { ended = name; tickets[name].Release() }, func() bool { return !unread[name] })
			tickets[name] = k
		}
		for i, name := range []string{"busy", "spoke", "unread", "silent", "other", "stays"} {
			take(name, "10.0.0.1")
			time.Sleep(time.Duration(i) * time.Millisecond)
		}
		take("far", "10.0.0.2")
		take("near", "10.0.0.2")
		newcomers := 0
		gone := func(want string) {
			t.Helper()
			ended = ""
			newcomers++
			_, v := l.Take(tcp(fmt.Sprintf("10.0.1.%d", newcomers)))
			if ended != want || (v == Admitted) != (want != "") {
				t.Errorf("%v, and %q had to go, want %q", v, ended, want)
			}
		}
		time.Sleep(grace / 2)
		tickets["busy"].Heard()
		tickets["busy"].Heard()
		tickets["spoke"].Heard()
		tickets["spoke"].Wait()
		tickets["spoke"].Wait()
		tickets["stays"].Stay()
		tickets["stays"].Wait()
		unread["unread"] = true
		gone("")
		time.Sleep(grace / 2)
		gone("silent")
		gone("other")
		gone("far")
		gone("near")
		gone("") // spoke has been silent for half the time
		time.Sleep(grace / 2)
		gone("spoke")
		tickets["spoke"].Wait() // too late
		gone("")
		unread["unread"] = false
		gone("unread")
		tickets["busy"].Wait()
		time.Sleep(grace)
		gone("busy")
		gone("")
		if n := l.yielding.Len(); n != 0 {
			t.Errorf("%d are left that yield", n)
		}
	})
}

// TestQuiet: what has come and is not read shows, also beside a Read that waits.
func TestQuiet(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ours, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	theirs, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	quiet := Quiet(theirs)
	if quiet == nil {
		t.Skip("nobody can tell on this system")
	}
	read := make(chan error, 1)
	next := func() {
		go func() {
			_, err := theirs.Read(make([]byte, 1))
			read <- err
		}()
	}
	next()
	if !quiet() {
		t.Error("something has come")
	}
	if _, err := ours.Write([]byte("ab")); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil || quiet() {
		t.Errorf("a byte is left, and nobody sees it: %v", err)
	}
	next()
	if err := <-read; err != nil || !quiet() {
		t.Errorf("all is read: %v", err)
	}
	_ = theirs.Close()
	if !quiet() {
		t.Error("something comes over a closed connection")
	}
	if Quiet(&net.TCPConn{}) != nil || Quiet(nil) != nil {
		t.Error("of no connection somebody can tell")
	}
}
