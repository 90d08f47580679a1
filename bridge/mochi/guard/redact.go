package guard

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// Redact returns a handler for mochi's logger (mqtt.Options.Logger) that drops
// what mochi should not log: whole packets and wills, with payloads and
// passwords in them. Everything else goes to h, but for a flood: mochi has a line for
// each of many things that a peer may do as often as it likes, before it has logged
// in, too. Of what is less than an error 10 lines a second pass, after 50 at once;
// the next says how many did not. Long texts, client ids among them, are cut.
func Redact(h slog.Handler) slog.Handler {
	return redactor{h, &flood{lines: rate.NewLimiter(10, 50)}}
}

type redactor struct {
	slog.Handler
	flood *flood
}

// flood is shared by the handlers that were derived from one.
type flood struct {
	lines    *rate.Limiter
	unlogged atomic.Uint64
}

// maxLogged is how much of a text is logged, in bytes.
const maxLogged = 256

// secret lists the attribute keys under which mochi v2.7.9 logs packets and
// wills.
func secret(key string) bool {
	switch key {
	case "packet", "pk", "will", "payload":
		return true
	}
	return false
}

func clean(attrs []slog.Attr) []slog.Attr {
	kept := make([]slog.Attr, 0, len(attrs))
	for _, a := range attrs {
		if !secret(a.Key) {
			kept = append(kept, a)
		}
	}
	return kept
}

// Handle implements slog.Handler.
func (r redactor) Handle(ctx context.Context, rec slog.Record) error {
	if rec.Level < slog.LevelError && !r.flood.lines.Allow() {
		r.flood.unlogged.Add(1)
		return nil
	}
	out := slog.NewRecord(rec.Time, rec.Level, rec.Message, rec.PC)
	rec.Attrs(func(a slog.Attr) bool {
		if secret(a.Key) {
			return true
		}
		if a.Value.Kind() == slog.KindString && len(a.Value.String()) > maxLogged {
			a.Value = slog.StringValue(strings.ToValidUTF8(a.Value.String()[:maxLogged], "") + "…")
		}
		out.AddAttrs(a)
		return true
	})
	if n := r.flood.unlogged.Swap(0); n > 0 {
		out.AddAttrs(slog.Uint64("unlogged", n))
	}
	return r.Handler.Handle(ctx, out)
}

// WithAttrs implements slog.Handler.
func (r redactor) WithAttrs(attrs []slog.Attr) slog.Handler {
	return redactor{r.Handler.WithAttrs(clean(attrs)), r.flood}
}

// WithGroup implements slog.Handler.
func (r redactor) WithGroup(name string) slog.Handler {
	return redactor{r.Handler.WithGroup(name), r.flood}
}
