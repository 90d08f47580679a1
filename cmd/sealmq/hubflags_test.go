package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/sealmq/sealmq/broker"
)

// flagOf returns the keys of a configuration file by the flag that overrides each, as
// docs/configuration.md has them.
func flagOf(t *testing.T) map[string]string {
	t.Helper()
	keys, name := make(map[string]string), regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(section(t, docsPage(t, "configuration.md"), "## Every key")) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 {
			continue
		}
		key, flag := name.FindAllStringSubmatch(cells[1], -1), name.FindAllStringSubmatch(cells[2], -1)
		for i := range flag {
			keys[strings.TrimPrefix(flag[i][1], "--")] = key[i][1]
		}
	}
	return keys
}

// changed are the settings in which two configurations differ, by key.
func changed(a, b reflect.Value, prefix string) (keys []string) {
	for i := range a.NumField() {
		f := a.Type().Field(i)
		switch key := f.Tag.Get("yaml"); {
		case key == "" || key == "-":
		case f.Type.Kind() == reflect.Struct:
			keys = append(keys, changed(a.Field(i), b.Field(i), prefix+key+".")...)
		case !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()):
			keys = append(keys, prefix+key)
		}
	}
	return keys
}

// Each flag of a hub overrides the setting that the page says, and no other: where a
// file says nothing, and where it says something else.
func TestHubFlagsOverrideTheirSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hub.yaml")
	text := `mqtt: [127.0.0.1:1]
password_file: f
devices: {allow: [f], allow_file: f, authorities: [f], attributes: {f: f}, clock_skew: 7s}
certificates: {f: user}
tcp: f
api_authority: f
tls: {cert: f, key: f, client_ca: f}
data: f
durability: always
sync_interval: 7s
segment_size: 7MiB
address_key_file: f
http: f
root: f
shutdown_timeout: 7s
limits: {frame: 7KiB, connections: 7}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{"bool": "true", "duration": "3s", "size": "3MiB", "int": "3", "string": "given", "stringSlice": "given", "stringToString": "given=given"}
	keys := flagOf(t)
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	hubFlags(all, new(broker.Config))
	all.VisitAll(func(flag *pflag.Flag) {
		for _, name := range []string{"", file} {
			var flags broker.Config
			f := pflag.NewFlagSet("", pflag.ContinueOnError)
			hubFlags(f, &flags)
			before, err := hubConfig(name, f, &flags)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Set(flag.Name, values[flag.Value.Type()]); err != nil {
				t.Fatalf("%s, a %s: %v", flag.Name, flag.Value.Type(), err)
			}
			cfg, err := hubConfig(name, f, &flags)
			if err != nil {
				t.Fatal(err)
			}
			if got := changed(reflect.ValueOf(before), reflect.ValueOf(cfg), ""); fmt.Sprint(got) != fmt.Sprint([]string{keys[flag.Name]}) {
				t.Errorf("with %q --%s changes %v, want %q", name, flag.Name, got, keys[flag.Name])
			}
			if got := changed(reflect.ValueOf(cfg), reflect.ValueOf(flags), ""); name == "" && len(got) != 0 {
				t.Errorf("--%s: %v are not as given", flag.Name, got)
			}
		}
	})
}
