package recent

import (
	"fmt"
	"testing"
)

func TestSetIsBounded(t *testing.T) {
	const limit = 100
	s := New(limit)
	if s.Has("") {
		t.Error("an empty set has something")
	}
	for i := range 3*limit + 10 {
		s.Add(fmt.Sprint(i))
		s.Add(fmt.Sprint(i))
		if oldest := i - limit; s.Has(fmt.Sprint(oldest)) || !s.Has(fmt.Sprint(max(0, oldest+1))) || !s.Has(fmt.Sprint(i)) {
			t.Fatalf("after %d not the last %d are remembered", i, limit)
		}
	}
	if len(s.set) != limit || len(s.ring) != limit {
		t.Errorf("%d in the set, %d in the ring", len(s.set), len(s.ring))
	}
}
