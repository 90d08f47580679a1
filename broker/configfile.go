package broker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// maxConfigFile bounds what is read of a configuration file.
const maxConfigFile = 1 << 20

// Load reads a configuration file. It accepts exactly the documented keys; an
// error names the file, the line, the key and, for a key that does not exist,
// the nearest one that does. Load does not validate the settings; [New] does,
// after the caller has set what flags override. A file that everybody can write to is
// refused.
func Load(name string) (Config, error) {
	f, err := openPolicy(name, "configuration", 0o644)
	if err != nil {
		return Config{}, err
	}
	defer f.Close() // nothing was written
	return parseConfig(f, name)
}

func parseConfig(r io.Reader, name string) (Config, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxConfigFile+1))
	if err != nil {
		return Config{}, &ConfigError{File: name, Problem: "it cannot be read: " + err.Error(), Fix: "name a YAML file"}
	}
	if len(text) > maxConfigFile {
		return Config{}, &ConfigError{File: name, Problem: "the file is larger than 1 MiB", Fix: "this is hardly a configuration file"}
	}
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict(), yaml.CustomUnmarshaler(unmarshalDuration))
	if err := decodeYAML(dec, &c); err != nil && !errors.Is(err, io.EOF) { // an empty file sets nothing
		return Config{}, explainYAML(name, text, err)
	}
	if err := decodeYAML(dec, new(Config)); !errors.Is(err, io.EOF) {
		return Config{}, &ConfigError{File: name, Problem: "there is more than one YAML document", Fix: "remove the line --- and what follows it"}
	}
	return c, nil
}

// decodeYAML is Decode without its panics: goccy/go-yaml v1.19.2 has some, for instance
// for a map that is a key.
func decodeYAML(dec *yaml.Decoder, c *Config) (err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("it is not YAML that can be read")
		}
	}()
	return dec.Decode(c)
}

// explainYAML turns the decoder's error into one line.
func explainYAML(name string, text []byte, err error) error {
	var bad *valueError
	if errors.As(err, &bad) {
		line, key := bad.locate(text)
		return &ConfigError{File: name, Line: line, Key: key, Problem: fmt.Sprintf("%q %s", bad.text, bad.problem), Fix: bad.fix}
	}
	var ye yaml.Error
	if !errors.As(err, &ye) {
		return &ConfigError{File: name, Problem: oneLine(err.Error()), Fix: "docs/configuration.md has every key"}
	}
	ce := &ConfigError{File: name, Problem: oneLine(ye.GetMessage()), Fix: "docs/configuration.md has every key"}
	tok := ye.GetToken()
	if tok == nil {
		return ce
	}
	ce.Line = tok.Position.Line
	var unknown *yaml.UnknownFieldError
	if errors.As(err, &unknown) {
		ce.Problem = fmt.Sprintf("unknown key %q", tok.Value)
		if near := nearest(tok.Value, configKeys()); near != "" {
			ce.Fix = fmt.Sprintf("did you mean %s?", near)
		}
	}
	return ce
}

// valueError is a value that its key cannot have.
type valueError struct {
	text, problem, fix string
}

func (e *valueError) Error() string {
	return fmt.Sprintf("broker: %q %s; %s", e.text, e.problem, e.fix)
}

// locate finds the line and the key of a value. The decoder does not say where
// a value stood that a type of ours refused.
func (e *valueError) locate(text []byte) (line int, key string) {
	for l := range strings.Lines(string(text)) {
		line++
		if k, v, ok := strings.Cut(l, ":"); ok && strings.Contains(v, e.text) {
			return line, strings.TrimSpace(k)
		}
	}
	return 0, ""
}

func unmarshalDuration(d *time.Duration, text []byte) (err error) {
	value := unquote(text)
	if *d, err = time.ParseDuration(value); err != nil {
		return &valueError{value, "is not a time", "write for example 5s, 10m or 24h"}
	}
	return nil
}

func unquote(text []byte) string { return strings.Trim(strings.TrimSpace(string(text)), `"'`) }

func oneLine(text string) string {
	first, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return first
}

// configKeys returns every key, with the names of the maps it stands in:
// "tls.cert".
func configKeys() []string {
	return keysOf(reflect.TypeFor[Config](), "")
}

func keysOf(t reflect.Type, prefix string) []string {
	var keys []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "" || name == "-" {
			continue
		}
		keys = append(keys, prefix+name)
		if f.Type.Kind() == reflect.Struct {
			keys = append(keys, keysOf(f.Type, prefix+name+".")...)
		}
	}
	return keys
}

// nearest returns the key whose last name is most like got, or "" when none is.
func nearest(got string, keys []string) string {
	got = strings.ReplaceAll(strings.ToLower(got), "-", "_")
	best, bestDistance := "", max(2, len(got)/3)+1
	for _, k := range keys {
		leaf := k[strings.LastIndexByte(k, '.')+1:]
		if d := distance(got, leaf); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance of two short strings.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// Size is a number of bytes. In a configuration file it is a number, or a
// number with the unit KiB, MiB or GiB.
type Size int64

// sizeUnits are the units that ParseSize takes, the largest first.
var sizeUnits = []struct {
	name  string
	bytes int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// ParseSize reads a size: "262144", "256KiB", "16 MiB".
func ParseSize(text string) (Size, error) {
	number, unit := strings.TrimSpace(text), int64(1)
	for _, u := range sizeUnits {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = strings.TrimSpace(rest), u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > (1<<62)/unit {
		return 0, &valueError{text, "is not a size", "write for example 64KiB or 1MiB"}
	}
	return Size(n * unit), nil
}

// String writes the size with the largest unit that leaves a whole number.
func (s Size) String() string {
	i := slices.IndexFunc(sizeUnits, func(u struct {
		name  string
		bytes int64
	}) bool {
		return int64(s) >= u.bytes && int64(s)%u.bytes == 0
	})
	if i < 0 || sizeUnits[i].bytes == 1 {
		return strconv.FormatInt(int64(s), 10)
	}
	return strconv.FormatInt(int64(s)/sizeUnits[i].bytes, 10) + sizeUnits[i].name
}

// Set makes a Size a flag's value.
func (s *Size) Set(text string) (err error) {
	*s, err = ParseSize(text)
	return err
}

// Type names the kind of value in a flag's help.
func (s *Size) Type() string { return "size" }

// UnmarshalYAML reads a number or a text such as 256KiB.
func (s *Size) UnmarshalYAML(text []byte) error {
	return s.Set(unquote(text))
}
