package channel

import (
	"container/list"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// sources counts what each source costs: a token bucket for first messages, and
// how much it has open. The number of sources told apart is bounded; those that
// do not fit share one allowance. The endpoint's lock guards it.
type sources struct {
	limits Limits
	known  map[string]*list.Element // of *source
	order  *list.List               // least recently seen first
	rest   *source                  // shared by those that do not fit
}

type source struct {
	name     string
	bucket   *rate.Limiter
	halfOpen int
	channels int

	earlyBytes atomic.Int64 // held by its half-open handshakes; no lock guards it
}

func newSources(l Limits) *sources {
	s := &sources{limits: l, known: make(map[string]*list.Element), order: list.New()}
	s.rest = s.fresh("")
	return s
}

func (s *sources) fresh(name string) *source {
	return &source{name: name, bucket: rate.NewLimiter(rate.Limit(s.limits.Rate), s.limits.Burst)}
}

// get finds or makes the entry of a source. To make room it forgets one that
// holds nothing and whose bucket has filled up again, so that forgetting gives
// nobody an advantage.
func (s *sources) get(name string, now time.Time) *source {
	if el, ok := s.known[name]; ok {
		s.order.MoveToBack(el)
		return el.Value.(*source)
	}
	if len(s.known) >= s.limits.Sources && !s.forgetOne(now) {
		return s.rest
	}
	src := s.fresh(name)
	s.known[name] = s.order.PushBack(src)
	return src
}

func (s *sources) forgetOne(now time.Time) bool {
	el := s.order.Front()
	for range 8 { // a bounded look: the oldest are the likeliest
		if el == nil {
			return false
		}
		src := el.Value.(*source)
		if src.halfOpen == 0 && src.channels == 0 && src.bucket.TokensAt(now) >= float64(s.limits.Burst) {
			s.order.Remove(el)
			delete(s.known, src.name)
			return true
		}
		el = el.Next()
	}
	return false
}
