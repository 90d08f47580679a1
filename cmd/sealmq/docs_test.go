package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/broker"
)

// docsPage returns a page of docs/.
func docsPage(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// section is what stands under a heading, up to the next one.
func section(t *testing.T, page, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(page, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("there is no %q", heading)
	}
	text, _, _ := strings.Cut(rest, "\n## ")
	return text
}

// settings are the keys of a configuration file, as "limits.frame".
func settings(of reflect.Type, prefix string) (keys []string) {
	for f := range of.Fields() {
		switch key := f.Tag.Get("yaml"); {
		case key == "" || key == "-":
		case f.Type.Kind() == reflect.Struct:
			keys = append(keys, settings(f.Type, prefix+key+".")...)
		default:
			keys = append(keys, prefix+key)
		}
	}
	return keys
}

func sameSet(t *testing.T, what string, got, want []string) {
	t.Helper()
	for _, g := range got {
		if !slices.Contains(want, g) {
			t.Errorf("%s %q is documented and does not exist", what, g)
		}
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%s %q is not documented", what, w)
		}
	}
}

// The table of docs/configuration.md has every key and every flag of a hub, and no
// other; so has the table of the reasons for which frames are dropped.
func TestConfigurationPage(t *testing.T) {
	page := docsPage(t, "configuration.md")
	var keys, flags []string
	name := regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(section(t, page, "## Every key")) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || strings.Contains(cells[1], "---") || strings.TrimSpace(cells[1]) == "key" {
			continue
		}
		for _, m := range name.FindAllStringSubmatch(cells[1], -1) {
			keys = append(keys, m[1])
		}
		for _, m := range name.FindAllStringSubmatch(cells[2], -1) {
			flags = append(flags, strings.TrimPrefix(m[1], "--"))
		}
	}
	sameSet(t, "key", keys, settings(reflect.TypeFor[broker.Config](), ""))

	var have []string
	a := new(app)
	a.hubCommand().Flags().VisitAll(func(f *pflag.Flag) { have = append(have, f.Name) })
	// Not settings of a hub: they are about the command.
	have = slices.DeleteFunc(have, func(n string) bool { return n == "config" || n == "check" || n == "log" })
	sameSet(t, "flag", flags, have)

	var reasons, drops []string
	for line := range strings.Lines(section(t, page, "## Status pages")) {
		if cells := strings.Split(line, "|"); len(cells) == 4 && !strings.Contains(cells[1], "/") {
			for _, m := range name.FindAllStringSubmatch(cells[1], -1) {
				reasons = append(reasons, m[1])
			}
		}
	}
	for d := range bridge.NumDrops {
		drops = append(drops, d.String())
	}
	sameSet(t, "reason", reasons, drops)
}

// Each metric that a page of docs/ names is one of a hub with all its parts.
func TestDocumentedMetrics(t *testing.T) {
	hub, err := broker.New(broker.Config{
		MQTT: []string{"127.0.0.1:0"}, TCP: "127.0.0.1:0", HTTP: "127.0.0.1:0", Data: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := hub.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hub.Shutdown(context.Background()) })
	answer, err := http.Get(hub.HTTPURL() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, page := range pages {
		for _, metric := range regexp.MustCompile(`sealmq_\w+`).FindAllString(docsPage(t, filepath.Base(page)), -1) {
			if named++; !strings.Contains(string(text), "\n# TYPE "+metric+" ") {
				t.Errorf("%s names %s, which a hub does not have", filepath.Base(page), metric)
			}
		}
	}
	if named == 0 {
		t.Error("no page names a metric")
	}
}

// Each piece of a configuration file that a page shows is read as one.
func TestDocumentedConfigurations(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	read := 0
	for _, page := range pages {
		text := docsPage(t, filepath.Base(page))
		for _, block := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(text, -1) {
			file := filepath.Join(t.TempDir(), "hub.yaml")
			if err := os.WriteFile(file, []byte(block[1]), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := broker.Load(file); err != nil {
				t.Errorf("%s: %v, in\n%s", filepath.Base(page), err, block[1])
			}
			read++
		}
	}
	if read == 0 {
		t.Error("no page shows a configuration")
	}
}

// Each command line of sealmq that a page shows is one that there is, with these
// flags. Where it stands in a sentence arguments may be left away.
func TestDocumentedCommandLines(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	shown := regexp.MustCompile("(?m)^\\$ (sealmq .*)$|`(sealmq [a-z-]+(?: [^`\n]*)?)`")
	known := 0
	for _, page := range append(pages, filepath.Join("..", "..", "README.md"), filepath.Join("..", "..", "SECURITY.md")) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range shown.FindAllStringSubmatch(string(text), -1) {
			for _, words := range exampleLines(m[1] + m[2] + " ") {
				found, args, err := (&app{lookupEnv: noEnv}).command().Find(words[1:])
				if err == nil {
					err = found.ParseFlags(args)
				}
				if err == nil && m[1] != "" {
					err = found.ValidateArgs(found.Flags().Args())
				}
				if err == nil && found.HasSubCommands() {
					err = noSuchCommand(found, found.Flags().Args())
				}
				if err != nil {
					t.Errorf("%s: %q: %v", filepath.Base(page), words, err)
				}
				known++
			}
		}
	}
	if known == 0 {
		t.Error("no page shows a command line")
	}
}
