// Package recent remembers the last strings of many, in bounded room.
package recent

// Set remembers the last strings that were added, each once; the oldest are forgotten
// first. It grows as it is used. Make it with New. It is not safe for concurrent use.
type Set struct {
	limit int
	set   map[string]struct{}
	ring  []string
	next  int
}

// New returns a set of limit strings at most, 1 at least.
func New(limit int) *Set {
	return &Set{limit: limit, set: make(map[string]struct{})}
}

// Add remembers s. One that is remembered already gets no younger.
func (r *Set) Add(s string) {
	if _, ok := r.set[s]; ok {
		return
	}
	r.set[s] = struct{}{}
	if len(r.ring) < r.limit {
		r.ring = append(r.ring, s)
		return
	}
	delete(r.set, r.ring[r.next])
	r.ring[r.next] = s
	r.next = (r.next + 1) % r.limit
}

// Has reports whether s is remembered.
func (r *Set) Has(s string) bool {
	_, ok := r.set[s]
	return ok
}
