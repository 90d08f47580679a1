package underway

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// room is a Room whose holders have names, and who has been ended.
type room struct {
	Room
	t     *testing.T
	by    map[string]*Holder
	ended []string
}

func newRoom(t *testing.T) *room { return &room{t: t, by: make(map[string]*Holder)} }

func (r *room) hold(name, ip string, user uint64, stranger bool, n int64) bool {
	h := r.by[name]
	if h == nil {
		h = &Holder{Network: netip.PrefixFrom(netip.MustParseAddr(ip), 32), User: user, Stranger: stranger}
		h.End = func() { r.ended = append(r.ended, name) }
		r.by[name] = h
	}
	return r.Hold(h, n, 100)
}

func (r *room) want(bytes int64, ended ...string) {
	r.t.Helper()
	slices.Sort(r.ended)
	if r.Bytes() != bytes || !slices.Equal(r.ended, ended) {
		r.t.Errorf("%d bytes, ended %v; want %d, %v", r.Bytes(), r.ended, bytes, ended)
	}
	r.ended = nil
}

// empty has everybody let go, and nothing be left.
func (r *room) empty() {
	r.t.Helper()
	for _, h := range r.by {
		if !r.Hold(h, 0, 100) {
			r.t.Error("refused to let go")
		}
	}
	if r.total != (tally{}) || r.strangers != (tally{}) || len(r.holders)+len(r.networks)+len(r.users) > 0 {
		r.t.Errorf("left: %+v, %+v, %v, %v, %v", r.total, r.strangers, r.holders, r.networks, r.users)
	}
}

func TestWhoHoldsMostMakesRoom(t *testing.T) {
	for name, f := range map[string]func(t *testing.T, r *room){
		"one alone takes all but more": func(t *testing.T, r *room) {
			ok := r.hold("a", "10.0.0.1", 1, true, 100)
			if !ok || r.hold("a", "", 0, false, 101) {
				t.Error(ok)
			}
			r.want(0)
		},
		"network": func(t *testing.T, r *room) {
			r.hold("a", "10.0.0.1", 1, false, 30)
			r.hold("b", "10.0.0.1", 2, false, 20)
			ok := r.hold("c", "10.0.0.1", 3, false, 10)
			r.want(30, "a")
			if !ok || r.hold("c", "", 0, false, 31) { // it would have most
				t.Error(ok)
			}
			r.want(20)
		},
		"user": func(t *testing.T, r *room) {
			r.hold("a", "10.0.0.1", 1, false, 30)
			r.hold("b", "10.0.0.2", 1, false, 20)
			r.hold("c", "10.0.0.3", 1, false, 10)
			r.want(30, "a")
			r.hold("d", "10.0.0.2", 2, false, 20) // b's network, and not its user
			r.want(50)
		},
		"user before size": func(_ *testing.T, r *room) {
			r.hold("a", "10.0.0.1", 1, false, 15)
			r.hold("b", "10.0.0.1", 1, false, 15)
			r.hold("c", "10.0.0.1", 2, false, 20)
			r.hold("d", "10.0.0.1", 3, false, 1)
			if len(r.ended) != 1 || r.ended[0] == "c" {
				r.t.Error(r.ended)
			}
		},
		"strangers": func(t *testing.T, r *room) {
			r.hold("a", "10.0.0.1", 0, true, 15)
			r.hold("b", "10.0.0.1", 0, true, 10)
			ok := r.hold("c", "10.0.0.2", 0, true, 10)
			r.want(20, "a")
			if !ok || !r.hold("d", "10.0.0.1", 9, false, 40) {
				t.Error(ok)
			}
			r.want(20+40, []string(nil)...)
		},
		"all": func(t *testing.T, r *room) {
			for i := range 10 {
				r.hold(fmt.Sprint("a", i), "10.0.0.1", 0, false, 4)
			}
			for i := range 3 {
				r.hold(fmt.Sprint("b", i), fmt.Sprint("10.0.1.", i), 0, false, 20)
			}
			r.want(100)
			if !r.hold("new", "10.0.2.1", 0, false, 6) || len(r.ended) != 2 || r.ended[0][0] != 'a' || r.ended[1][0] != 'a' {
				t.Error(r.ended)
			}
			r.ended = nil
			for _, h := range r.by { // what is over is not charged again
				if h.cut {
					r.Hold(h, 50, 100)
				}
			}
			r.want(98)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoom(t)
			f(t, r)
			r.empty()
		})
	}
}
