// Package sources limits how often something may happen: for each source, and for all
// together, so that one source does not use up what the others need.
package sources

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limiter is a token bucket for each source and one for all. Make it with New; all
// methods are safe for concurrent use.
type Limiter[K comparable] struct {
	each  bucket
	known int // buckets kept
	total *rate.Limiter

	mu sync.Mutex
	// Buckets of late and of earlier times. One that is full again, as that of a source
	// that was silent for a while, is as good as none; so those that nobody asked for
	// in the time that takes are forgotten.
	now, before map[K]*rate.Limiter
	turned      time.Time
}

type bucket struct {
	rate  rate.Limit
	burst int
}

// Limits say how often something may happen; all are positive.
type Limits struct {
	// Each and EachBurst are for one source, a second and at once.
	Each      float64
	EachBurst int
	// Total and TotalBurst are for all of them.
	Total      float64
	TotalBurst int
	// Known bounds the sources that are told apart. Beyond it those seen longest ago
	// are taken for new ones; the total holds anyway.
	Known int
}

// New returns a limiter whose buckets are full.
func New[K comparable](l Limits) *Limiter[K] {
	return &Limiter[K]{
		each: bucket{rate.Limit(l.Each), l.EachBurst}, known: max(2, l.Known),
		total: rate.NewLimiter(rate.Limit(l.Total), l.TotalBurst),
		now:   make(map[K]*rate.Limiter),
	}
}

// Allow spends one of the source's tokens and one of all. A source that has none takes
// none from the others.
func (l *Limiter[K]) Allow(source K, now time.Time) bool {
	l.mu.Lock()
	b := l.bucket(source, now)
	l.mu.Unlock()
	return b.AllowN(now, 1) && l.total.AllowN(now, 1)
}

// bucket returns a source's bucket; l.mu is held.
func (l *Limiter[K]) bucket(source K, now time.Time) *rate.Limiter {
	full := time.Duration(float64(l.each.burst) / float64(l.each.rate) * float64(time.Second))
	if now.Sub(l.turned) > full || len(l.now) >= l.known/2 {
		l.before, l.now, l.turned = l.now, make(map[K]*rate.Limiter), now
	}
	b := l.now[source]
	if b != nil {
		return b
	}
	if b = l.before[source]; b == nil {
		b = rate.NewLimiter(l.each.rate, l.each.burst)
	}
	l.now[source] = b
	return b
}

// Known returns how many sources are told apart now.
func (l *Limiter[K]) Known() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.now)
	for k := range l.before {
		if l.now[k] == nil {
			n++
		}
	}
	return n
}
