package sources

import (
	"testing"
	"time"
)

func count(n int, f func() bool) (yes int) {
	for range n {
		if f() {
			yes++
		}
	}
	return yes
}

func TestSourcesDoNotUseUpEachOthers(t *testing.T) {
	now := time.Unix(1000, 0)
	l := New[string](Limits{Each: 10, EachBurst: 20, Total: 1000, TotalBurst: 30, Known: 8})
	from := func(who string) func() bool { return func() bool { return l.Allow(who, now) } }
	if n := count(100, from("mallory")); n != 20 {
		t.Errorf("%d of one source at once, want 20", n)
	}
	if n := count(5, from("alice")); n != 5 {
		t.Errorf("%d of 5 of another", n)
	}
	if n := count(10, from("bob")); n != 5 {
		t.Errorf("%d beyond the total, want 5", n)
	}
	now = now.Add(time.Second)
	if n := count(100, from("mallory")); n != 10 {
		t.Errorf("%d a second later, want 10", n)
	}
}

// A bucket is forgotten only when it is full again, unless there are too many.
func TestForgottenBucketsAreFull(t *testing.T) {
	now := time.Unix(1000, 0)
	l := New[int](Limits{Each: 1, EachBurst: 4, Total: 1e6, TotalBurst: 1e6, Known: 1000})
	for range 8 {
		if n := count(10, func() bool { return l.Allow(1, now) }); n > 4 {
			t.Errorf("%d at once", n)
		}
		now = now.Add(time.Second)
		if n := count(10, func() bool { return l.Allow(1, now) }); n > 1 {
			t.Errorf("%d after a second", n)
		}
		now = now.Add(5 * time.Second)
	}
	now = now.Add(time.Minute)
	l.Allow(2, now)
	now = now.Add(time.Minute)
	if l.Allow(3, now); l.Known() != 2 {
		t.Errorf("%d sources are kept, want those of two periods", l.Known())
	}
}

func TestKnownSourcesAreBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	l := New[int](Limits{Each: 1, EachBurst: 4, Total: 1e6, TotalBurst: 1e6, Known: 100})
	for i := range 10_000 {
		l.Allow(i, now)
		if n := l.Known(); n > 100 {
			t.Fatalf("%d sources are kept", n)
		}
	}
}
