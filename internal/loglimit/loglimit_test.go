package loglimit

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/time/rate"
)

func TestUnloggedIsSaidWhereThereIsSomething(t *testing.T) {
	for name, handler := range map[string]func(io.Writer) slog.Handler{
		"text": func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
		"json": func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			log, l := slog.New(handler(&out)), New(1)
			try := func() {
				if unlogged, ok := l.Next(); ok {
					log.Info("it happened", "unlogged", unlogged)
				}
			}
			l.SetLimit(0)
			for range 30 {
				try()
			}
			l.SetLimit(rate.Inf)
			try()
			try()
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(lines) != 12 {
				t.Fatalf("%d lines", len(lines))
			}
			for i, line := range lines {
				want := i == 10
				if got := strings.Contains(line, "unlogged") && strings.Contains(line, "20"); got != want || strings.Contains(line, "unlogged") != want {
					t.Errorf("line %d: %s", i, line)
				}
			}
		})
	}
}
