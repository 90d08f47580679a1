package guard

import (
	"context"
	"log/slog"
)

// Redact returns a handler for mochi's logger (mqtt.Options.Logger) that drops
// what mochi should not log: whole packets and wills, with payloads and
// passwords in them. Everything else goes to h.
func Redact(h slog.Handler) slog.Handler { return redactor{h} }

type redactor struct{ slog.Handler }

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
	out := slog.NewRecord(rec.Time, rec.Level, rec.Message, rec.PC)
	rec.Attrs(func(a slog.Attr) bool {
		if !secret(a.Key) {
			out.AddAttrs(a)
		}
		return true
	})
	return r.Handler.Handle(ctx, out)
}

// WithAttrs implements slog.Handler.
func (r redactor) WithAttrs(attrs []slog.Attr) slog.Handler {
	return redactor{r.Handler.WithAttrs(clean(attrs))}
}

// WithGroup implements slog.Handler.
func (r redactor) WithGroup(name string) slog.Handler {
	return redactor{r.Handler.WithGroup(name)}
}
