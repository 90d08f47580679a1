package broker

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseConfig(t *testing.T) {
	const text = `
root: site/7/sealmq
mqtt:
  - mqtt://127.0.0.1:1883
  - mqtts://0.0.0.0:8883
tls:
  cert: /etc/sealmq/hub.pem
  key: /etc/sealmq/hub.key
password_file: /etc/sealmq/passwd
data: /var/lib/sealmq
http: 127.0.0.1:8080
trace: true
shutdown_timeout: 2s
limits:
  frame: 1MiB
  connections: 500
`
	c, err := parseConfig(strings.NewReader(text), "hub.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.Root != "site/7/sealmq" || len(c.MQTT) != 2 || c.TLS.Key != "/etc/sealmq/hub.key" || !c.Trace ||
		c.ShutdownTimeout != 2*time.Second || c.Limits.Frame != 1<<20 || c.Limits.Connections != 500 {
		t.Errorf("parsed as %+v", c)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("refused: %v", err)
	}
}

func TestParseConfigErrors(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		line       int
		want, fix  string
	}{
		{"unknown key", "root: a\npasswordfile: x\n", 2, `unknown key "passwordfile"`, "did you mean password_file?"},
		{"unknown nested key", "tls:\n  crt: x\n", 2, `unknown key "crt"`, "did you mean tls.cert?"},
		{"key of another map", "cert: x\n", 1, `unknown key "cert"`, "did you mean tls.cert?"},
		{"key with dashes", "password-file: x\n", 1, `unknown key "password-file"`, "did you mean password_file?"},
		{"nothing like it", "zzzzzzzzzz: x\n", 1, `unknown key "zzzzzzzzzz"`, "docs/configuration.md has every key"},
		{"twice", "root: a\nroot: b\n", 2, "already defined", ""},
		{"wrong type", "root: a\ntrace: [1]\n", 2, "", ""},
		{"bad duration", "root: a\nshutdown_timeout: soon\n", 2, "is not a time", "5s"},
		{"bad size", "limits:\n  frame: big\n", 2, "is not a size", "64KiB"},
		{"not YAML", "root: [\n", 0, "", ""},
		{"two documents", "root: a\n---\nroot: b\n", 0, "more than one YAML document", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := parseConfig(strings.NewReader(tc.text), "hub.yaml")
			var ce *ConfigError
			if !errors.As(err, &ce) {
				t.Fatalf("error is %T %v", err, err)
			}
			if tc.line > 0 && ce.Line != tc.line {
				t.Errorf("line %d, want %d: %v", ce.Line, tc.line, err)
			}
			if !strings.Contains(ce.Problem, tc.want) || !strings.Contains(ce.Fix, tc.fix) {
				t.Errorf("got %v (%s), want %q (%s)", err, ce.Fix, tc.want, tc.fix)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err.Error())
			}
		})
	}
}

func TestEmptyConfigIsTheDefaults(t *testing.T) {
	for _, text := range []string{"", "\n", "# nothing\n"} {
		c, err := parseConfig(strings.NewReader(text), "hub.yaml")
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if err := c.Validate(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestValidate(t *testing.T) {
	cert := TLS{Cert: "c", Key: "k"}
	for _, tc := range []struct {
		name   string
		config Config
		key    string // of the error; "" for none
		fix    string // an option it must name
	}{
		{"defaults", Config{}, "", ""},
		{"loopback v6", Config{MQTT: []string{"[::1]:0"}}, "", ""},
		{"localhost", Config{MQTT: []string{"ws://localhost:0"}}, "", ""},
		{"open to all, unsaid", Config{MQTT: []string{"0.0.0.0:1883"}}, "mqtt", "--mqtt-open"},
		{"all interfaces, unsaid", Config{MQTT: []string{":1883"}}, "mqtt", "--password-file"},
		{"one of two not loopback", Config{MQTT: []string{"127.0.0.1:1883", "10.0.0.1:1883"}}, "mqtt", "--mqtt-open"},
		{"open to all, said", Config{MQTT: []string{"0.0.0.0:1883"}, MQTTOpen: true}, "", ""},
		{"passwords in the clear", Config{MQTT: []string{"0.0.0.0:1883"}, PasswordFile: "p"}, "mqtt", "--insecure-plaintext"},
		{"passwords in the clear, said", Config{MQTT: []string{"0.0.0.0:1883"}, PasswordFile: "p", InsecurePlaintext: true}, "", ""},
		{"passwords on loopback", Config{PasswordFile: "p"}, "", ""},
		{"passwords over TLS", Config{MQTT: []string{"mqtts://0.0.0.0:8883"}, PasswordFile: "p", TLS: cert}, "", ""},
		{"open and passwords", Config{MQTTOpen: true, PasswordFile: "p"}, "mqtt_open", "--password-file"},
		{"TLS without certificate", Config{MQTT: []string{"wss://127.0.0.1:0"}}, "mqtt", "--tls-cert"},
		{"certificate without TLS", Config{TLS: cert}, "tls", "mqtts://"},
		{"half a certificate", Config{TLS: TLS{Cert: "c"}}, "tls", "--tls-key"},
		{"unknown scheme", Config{MQTT: []string{"http://127.0.0.1:80"}}, "mqtt", "mqtt://"},
		{"no port", Config{MQTT: []string{"127.0.0.1"}}, "mqtt", "host:port"},
		{"bad port", Config{MQTT: []string{"127.0.0.1:99999"}}, "mqtt", "host:port"},
		{"named port", Config{MQTT: []string{"127.0.0.1:mqtt"}}, "mqtt", "host:port"},
		{"path", Config{MQTT: []string{"ws://127.0.0.1:80/mqtt"}}, "mqtt", "host:port"},
		{"twice", Config{MQTT: []string{"127.0.0.1:1883", "mqtt://127.0.0.1:1883"}}, "mqtt", "remove"},
		{"free ports twice", Config{MQTT: []string{"127.0.0.1:0", "127.0.0.1:0"}}, "", ""},
		{"wildcard root", Config{Root: "a/+"}, "root", "sealmq"},
		{"http outside", Config{HTTP: "0.0.0.0:8080"}, "http", "--http-open"},
		{"http outside, said", Config{HTTP: "0.0.0.0:8080", HTTPOpen: true}, "", ""},
		{"http not an address", Config{HTTP: "8080"}, "http", "127.0.0.1:8080"},
		{"negative timeout", Config{ShutdownTimeout: -1}, "shutdown_timeout", "5s"},
		{"frame too large", Config{Limits: Limits{Frame: 32 << 20}}, "limits.frame", "16MiB"},
		{"frame too small", Config{Limits: Limits{Frame: 10}}, "limits.frame", "4KiB"},
		{"memory for nothing", Config{Limits: Limits{Memory: 1 << 20}}, "limits.memory", "64MiB"},
		{"memory", Config{Limits: Limits{Memory: 64 << 20}}, "", ""},
		{"memory and queues", Config{Limits: Limits{Memory: 1 << 30, QueuedBytes: 200 << 20}}, "", ""},
		{"memory less than one queue", Config{Limits: Limits{Memory: 64 << 20, QueuedBytes: 1 << 30}}, "limits.queued_bytes", "raise"},
		{"memory less than all", Config{Limits: Limits{Memory: 1 << 30, QueuedBytes: 800 << 20}}, "limits.memory", "queued_bytes"},
		{"memory and its three quarters", Config{Limits: Limits{Memory: 128 << 20, QueuedBytes: 28 << 20}}, "", ""},
		{"memory less than channels", Config{Limits: Limits{Memory: 256 << 20, APIChannels: 4096}}, "limits.memory", "api_channels"},
		{"memory less than connections", Config{Limits: Limits{Memory: 256 << 20, Connections: 100_000}}, "limits.memory", "connections"},
		{"negative rate", Config{Limits: Limits{FramesPerSecond: -1}}, "limits.frames_per_second", ""},
		{"negative connections", Config{Limits: Limits{Connections: -1}}, "limits.connections", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.config.Validate()
			if tc.key == "" {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			var ce *ConfigError
			if !errors.As(err, &ce) {
				t.Fatalf("error is %T %v", err, err)
			}
			if ce.Key != tc.key || !strings.Contains(ce.Fix, tc.fix) {
				t.Errorf("got %v (%s), want key %s and a hint with %q", err, ce.Fix, tc.key, tc.fix)
			}
		})
	}
}

// A file that is missing is said before anything is made in the data folder.
func TestMistakesLeaveNothingBehind(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	for name, c := range map[string]Config{
		"password_file":       {PasswordFile: missing},
		"devices.allow_file":  {Devices: Devices{AllowFile: missing}},
		"devices.authorities": {Devices: Devices{Authorities: []string{missing}}},
		"api_authority":       {APIAuthority: missing},
		"tls":                 {MQTT: []string{"mqtts://127.0.0.1:0"}, TLS: TLS{Cert: missing, Key: missing}},
		"address_key_file":    {AddressKeyFile: missing},
		"passphrase_file":     {PassphraseFile: missing},
	} {
		c.Data = filepath.Join(t.TempDir(), "data")
		if h, err := New(c); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				stop(t, h)
			}
		}
		if _, err := os.Stat(c.Data); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the data folder: %v", name, err)
		}
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "17": 17, "17B": 17, "256KiB": 256 << 10, "16 MiB": 16 << 20, "1GiB": 1 << 30} {
		got, err := ParseSize(text)
		if err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
		again, err := ParseSize(got.String())
		if err != nil || again != got {
			t.Errorf("%v reads back as %v, %v", got, again, err)
		}
	}
	for _, text := range []string{"", "-1", "1KB", "1.5MiB", "x", "9999999999GiB", "KiB"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q accepted as %d", text, got)
		}
	}
}
