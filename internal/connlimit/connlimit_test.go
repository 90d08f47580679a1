package connlimit

import (
	"net"
	"testing"
)

func addr(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }

func TestLimits(t *testing.T) {
	l := &Limits{Conns: 4, PerAddress: 2, Pending: 3}
	take := func(ip string, want Verdict) *Ticket {
		t.Helper()
		ticket, got := l.Take(addr(ip))
		if got != want || (ticket != nil) != (want == Admitted) {
			t.Fatalf("%s: verdict %d, want %d", ip, got, want)
		}
		return ticket
	}
	a := take("192.0.2.1", Admitted)
	b := take("::ffff:192.0.2.1", Admitted) // the same address
	take("192.0.2.1", RefusedAddress)
	c := take("2001:db8::1", Admitted)
	take("192.0.2.9", RefusedPending)
	a.Settle()
	a.Settle()
	d := take("2001:db8::2", Admitted) // the same /64 network
	c.Settle()
	take("2001:db8::3", RefusedTotal)
	b.Release()
	b.Release()
	b.Settle()
	take("2001:db8::3", RefusedAddress)
	take("192.0.2.1", Admitted).Release()
	for _, ticket := range []*Ticket{a, c, d, nil} {
		ticket.Settle()
		ticket.Release()
	}
	if conns, pending := l.Open(); conns != 0 || pending != 0 || len(l.from) != 0 {
		t.Fatalf("%d open, %d pending, %v", conns, pending, l.from)
	}
}

func TestUnlimited(t *testing.T) {
	l := &Limits{Conns: -1, PerAddress: -1, Pending: -1}
	for range DefaultPending + 1 {
		if _, v := l.Take(&net.UnixAddr{Name: "x"}); v != Admitted {
			t.Fatal(v)
		}
	}
}
