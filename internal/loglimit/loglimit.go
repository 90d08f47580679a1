// Package loglimit bounds what goes into a log of things that peers can cause as often as
// they like, and that are counted besides.
package loglimit

import (
	"log/slog"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// Lines lets so many lines a second into a log, ten times as many at once. Make it with
// New. It is safe for concurrent use.
type Lines struct {
	*rate.Limiter
	unlogged atomic.Uint64
}

// New returns a limit of so many lines a second.
func New(perSecond int) *Lines {
	return &Lines{Limiter: rate.NewLimiter(rate.Limit(perSecond), 10*perSecond)}
}

// Next reports whether there may be one more line, and how many there were not since the
// one before it: the value of the line's attribute "unlogged".
func (l *Lines) Next() (Unlogged, bool) {
	if !l.Allow() {
		l.unlogged.Add(1)
		return 0, false
	}
	return Unlogged(l.unlogged.Swap(0)), true
}

// Unlogged is a number of lines. As the value of an attribute 0 leaves it out.
type Unlogged uint64

// LogValue implements slog.LogValuer.
func (u Unlogged) LogValue() slog.Value {
	if u == 0 {
		return slog.GroupValue() // handlers ignore empty groups
	}
	return slog.Uint64Value(uint64(u))
}
