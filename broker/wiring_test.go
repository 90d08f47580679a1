package broker

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
)

// leaves returns the settings in v by their keys in a configuration file.
func leaves(v reflect.Value, prefix string) map[string]reflect.Value {
	all := make(map[string]reflect.Value)
	for i := range v.NumField() {
		key := v.Type().Field(i).Tag.Get("yaml")
		switch {
		case key == "" || key == "-":
		case v.Field(i).Kind() == reflect.Struct:
			maps.Copy(all, leaves(v.Field(i), prefix+key+"."))
		default:
			all[prefix+key] = v.Field(i)
		}
	}
	return all
}

// settings are those of c whose values are of one of the kinds, sorted by key.
func settings(c *Config, kinds ...reflect.Kind) (keys []string, values map[string]reflect.Value) {
	values = leaves(reflect.ValueOf(c).Elem(), "")
	for key, v := range values {
		if slices.Contains(kinds, v.Kind()) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys, values
}

var numbers = []reflect.Kind{reflect.Int, reflect.Int64, reflect.Uint, reflect.Uint64, reflect.Float64}

// enforcers are the parts of a running hub by name.
func enforcers(h *Hub) map[string]any {
	return map[string]any{
		"hub": h, "bridge": h.bridge, "mqtt": h.server, "tcp": h.ockam.front.Load(), "api": h.ockam.api.Load(),
		"store": h.store, "gate": h.gate, "proofs": h.proofs,
	}
}

// look returns what stands at a path of fields, keys and indexes in a running hub.
func look(t *testing.T, parts map[string]any, path string) reflect.Value {
	t.Helper()
	names := strings.Split(path, ".")
	v := reflect.ValueOf(parts[names[0]])
	for _, name := range names[1:] {
		for v.IsValid() && (v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface) {
			v = v.Elem()
		}
		switch v.Kind() {
		case reflect.Struct:
			v = v.FieldByName(name)
		case reflect.Map:
			v = v.MapIndex(reflect.ValueOf(name))
		case reflect.Slice:
			i, _ := strconv.Atoi(name)
			v = v.Index(i)
		}
		if !v.IsValid() {
			t.Fatalf("there is no %q in %s: the test has to say where the setting is now", name, path)
		}
	}
	return v
}

func number(t *testing.T, v reflect.Value) int64 {
	t.Helper()
	switch {
	case v.CanInt():
		return v.Int()
	case v.CanUint():
		return int64(v.Uint())
	case v.CanFloat():
		return int64(v.Float())
	}
	t.Fatalf("a %v is no number", v.Type())
	return 0
}

// place is where an enforcer looks a number up, and what is made of it on the way.
type place struct {
	path   string
	factor int64 // 0 means 1
	plus   int64
}

func at(paths ...string) (all []place) {
	for _, p := range paths {
		all = append(all, place{path: p})
	}
	return all
}

const (
	mqttServer1  = "mqtt.server.Options.Capabilities."
	mqttListener = "mqtt.server.Listeners.internal.mqtts-0.cfg."
	mqttConns    = mqttListener + "Limits."
	mqttFixes    = "mqtt.server.hooks.internal.v.0.cfg."
	apiLimits    = "api.endpoint.limits."
)

// places has every number of a configuration.
var places = map[string][]place{
	"devices.clock_skew": at("proofs.skew"),
	"sync_interval":      at("store.log.opts.Interval"),
	"segment_size":       at("store.log.opts.SegmentSize"),
	"shutdown_timeout":   at("hub.cfg.ShutdownTimeout"),

	"limits.frame": append(at("bridge.cfg.Limits.Frame", "mqtt.hook.o.FrameLimit", "tcp.cfg.Frames.Frame", "api.cfg.Limits.Frame"),
		place{mqttServer1 + "MaximumPacketSize", 1, mochibridge.PacketHeadroom}, place{mqttListener + "PacketLimit", 1, mochibridge.PacketHeadroom},
		place{apiLimits + "Frame", 1, 64 << 10}),
	"limits.hops":                     at("bridge.cfg.Limits.Hops", "tcp.cfg.Frames.Hops", "api.cfg.Limits.Hops"),
	"limits.memory":                   nil, // see the test
	"limits.frames_per_second":        at("bridge.cfg.FrameRate"),
	"limits.bytes_per_second":         at("bridge.cfg.ByteRate"),
	"limits.hellos_per_second":        {{path: "bridge.cfg.HelloRate"}, {path: "bridge.cfg.HelloBurst", factor: 4}},
	"limits.registrations_per_second": {{path: "bridge.cfg.RegistrationRate"}, {path: "bridge.cfg.RegistrationBurst", factor: 4}},
	"limits.guest_hellos_per_address": {{path: "bridge.guests.each.rate"}, {path: "bridge.guests.each.burst", factor: 4}},
	"limits.guest_hellos_per_second":  {{path: "bridge.guests.total.limit"}, {path: "bridge.guests.total.burst", factor: 2}},
	"limits.unanswered":               at("bridge.cfg.Window"),
	"limits.unanswered_bytes":         at("bridge.cfg.WindowBytes"),
	"limits.waiting_bytes":            at("bridge.cfg.WaitingBytes"),
	"limits.output_bytes":             at(mqttConns+"Output", "tcp.cfg.TotalOutput"),
	"limits.arriving_bytes":           at(mqttConns+"Input", "tcp.cfg.TotalInput"),
	"limits.clients_per_identity":     at("bridge.cfg.PortsPerIdentity"),
	"limits.peers":                    at("bridge.cfg.MaxPorts"),
	"limits.forwarders":               at("bridge.cfg.MaxForwarders"),
	"limits.subscriptions":            at(mqttFixes + "Subscriptions"),
	"limits.subscription_bytes":       at(mqttFixes + "FilterBytes"),
	"limits.topic_bytes":              at(mqttFixes + "TopicBytes"),
	"limits.topic_levels":             at(mqttFixes + "TopicLevels"),
	"limits.retained":                 at(mqttFixes + "Retained"),
	"limits.retained_bytes":           at(mqttFixes + "RetainedBytes"),
	"limits.sessions":                 at(mqttFixes + "Sessions"),
	"limits.session_bytes":            at(mqttFixes + "QueuedBytes"),
	"limits.observers":                at("mqtt.hook.o.Observers"),
	"limits.logins_waiting":           at("gate.turns.most", "proofs.turns.most"),
	"limits.connect_timeout":          at(mqttListener + "ConnectTimeout"),
	"limits.connections":              at(mqttConns+"conns.Conns", "tcp.cfg.Limits.Conns", mqttServer1+"MaximumClients"),
	"limits.connections_per_address":  at(mqttConns+"conns.PerAddress", "tcp.cfg.Limits.PerAddress"),
	"limits.connections_pending":      at(mqttConns+"conns.Pending", "tcp.cfg.Limits.Pending"),
	"limits.tcp_idle":                 at("tcp.cfg.IdleTimeout"),
	"limits.tcp_first_byte":           at("tcp.cfg.PreambleTimeout"),
	"limits.tcp_first_frame":          at("tcp.cfg.FirstFrame"),
	"limits.tcp_frame":                at("tcp.cfg.FrameTimeout"),
	"limits.tcp_stall":                at("tcp.cfg.StallTimeout"),
	"limits.tcp_window":               at("tcp.cfg.ReadWindow"),
	"limits.tcp_output":               at("tcp.cfg.OutputBytes"),

	"limits.api_channels":              at(apiLimits + "Channels"),
	"limits.api_channels_per_address":  at(apiLimits+"ChannelsPerSource", "api.endpoint.sources.limits.ChannelsPerSource"),
	"limits.api_channels_per_identity": at("api.cfg.PerIdentity"),
	"limits.api_handshakes":            at(apiLimits + "HalfOpen"),
	"limits.api_handshakes_per_second": {{path: apiLimits + "Rate"}, {path: apiLimits + "Burst", factor: 4}},
	"limits.api_handshake_timeout":     at(apiLimits + "Handshake"),

	"limits.outbox_frames":             at("bridge.cfg.OutboxFrames"),
	"limits.outbox_bytes":              at("bridge.cfg.OutboxBytes"),
	"limits.queued_frames":             at("bridge.cfg.TotalFrames"),
	"limits.queued_bytes":              at("bridge.cfg.TotalBytes"),
	"limits.queued_for":                at("bridge.cfg.MaxAge"),
	"limits.forwarders_per_identity":   at("bridge.cfg.ForwardersPerIdentity"),
	"limits.forwarders_per_connection": at("bridge.cfg.ForwardersPerPort"),
	"limits.forwarder_unseen":          at("bridge.cfg.ForwarderTTL"),
	"limits.trace_lines":               at("bridge.ring.traces.limit", "bridge.ring.traces.burst"),
}

// A hub with everything, and a number of its own for each setting that is one: each is
// where the part that enforces it looks.
func TestEveryNumberIsEnforced(t *testing.T) {
	dir := t.TempDir()
	cert, key, passwords := filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "passwords")
	writeCert(t, cert, key, 1, time.Now().Add(time.Hour))
	if err := os.WriteFile(passwords, []byte("u:"+hashed(t, "pw")+":user\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{
		MQTT: []string{"mqtts://127.0.0.1:0"}, TLS: TLS{Cert: cert, Key: key}, PasswordFile: passwords,
		TCP: "127.0.0.1:0", Data: t.TempDir(), Durability: DurabilityInterval,
	}
	special := map[string]int64{"limits.frame": 5000, "limits.memory": 64 << 30}
	keys, values := settings(&c, numbers...)
	for i, key := range keys {
		n := int64(100 + i)
		switch v := values[key]; {
		case special[key] != 0:
			n = special[key]
		case v.Type() == reflect.TypeFor[Size]():
			n = 1<<20 + int64(i)<<12
		case v.Type() == reflect.TypeFor[time.Duration]():
			n = int64(20*time.Second) + int64(i)*int64(time.Millisecond)
		}
		values[key].SetInt(n)
		if _, ok := places[key]; !ok {
			t.Errorf("%s: the test does not know who enforces it", key)
		}
	}
	for key := range places {
		if !slices.Contains(keys, key) {
			t.Errorf("there is no setting %s", key)
		}
	}

	h := start(t, c)
	h.Status() // has the connection limits made
	parts := enforcers(h)
	for _, key := range keys {
		for _, p := range places[key] {
			want := values[key].Int()*max(1, p.factor) + p.plus
			if got := number(t, look(t, parts, p.path)); got != want {
				t.Errorf("%s: %s is %d, want %d", key, p.path, got, want)
			}
		}
	}
	if got := debug.SetMemoryLimit(-1); got != int64(c.Limits.Memory)/10*9 {
		t.Errorf("limits.memory: the runtime's limit is %d", got)
	}
	// What waits for the disk has to find room on it.
	if got, want := h.cfg.shutdownTimeout(), c.ShutdownTimeout; got != want {
		t.Errorf("shutdown_timeout: %v, want %v", got, want)
	}
	if got, want := number(t, look(t, parts, "store.log.opts.Reserve")), int64(c.SegmentSize+c.Limits.WaitingBytes/2); got != want {
		t.Errorf("limits.waiting_bytes: the store keeps %d for it, want %d", got, want)
	}
	for _, e := range []struct{ of, in string }{{"mqtt.hook.o.Bridge", "bridge"}, {"tcp.cfg.Bridge", "bridge"}, {"api.cfg.Bridge", "bridge"}} {
		if look(t, parts, e.of).Pointer() != reflect.ValueOf(parts[e.in]).Pointer() {
			t.Errorf("%s is another one", e.of)
		}
	}
}

// Nothing but the zero of a number means the default: a negative one is refused by its
// name.
func TestNegativeNumbersAreRefused(t *testing.T) {
	keys, _ := settings(new(Config), numbers...)
	for _, key := range keys {
		c := Config{Data: "d"}
		leaves(reflect.ValueOf(&c).Elem(), "")[key].SetInt(-1)
		var ce *ConfigError
		if err := c.Validate(); !errors.As(err, &ce) || ce.Key != key {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// A key is called as its field is, so that no two can be swapped.
func TestKeysAreCalledAsTheirFields(t *testing.T) {
	var check func(reflect.Type)
	check = func(of reflect.Type) {
		for f := range of.Fields() {
			key := f.Tag.Get("yaml")
			if key != "-" && strings.ReplaceAll(key, "_", "") != strings.ToLower(f.Name) {
				t.Errorf("%v.%s has the key %q", of, f.Name, key)
			}
			if f.Type.Kind() == reflect.Struct && key != "-" {
				check(f.Type)
			}
		}
	}
	check(reflect.TypeFor[Config]())
}

// Each switch of a hub in which all are on, when it alone is off: either what it
// switches is off and nothing else, or the hub refuses to start without it.
func TestEverySwitchSwitches(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	cert, key, ca := filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "ca")
	writeCert(t, cert, key, 1, time.Now().Add(time.Hour))
	a.write(ca)
	switches := map[string]struct{ path, refused string }{
		"mqtt_open":             {path: "proofs.everywhere"},
		"insecure_plaintext":    {path: "proofs.cleartext"},
		"devices.anyone_proven": {path: "hub.devices.anyone"},
		"tls.client_required":   {path: "hub.cert.required", refused: "tls.client_ca"}, // there are no certificates
		"tcp_aliases":           {path: "bridge.cfg.StaticOverStream"},
		"trace":                 {path: "bridge.cfg.Trace"},
		"tcp_open":              {refused: "tcp"}, // there is no api_authority
		"http_open":             {refused: "http"},
	}
	keys, _ := settings(new(Config), reflect.Bool)
	for key := range switches {
		if !slices.Contains(keys, key) {
			t.Errorf("there is no switch %s", key)
		}
	}
	for _, off := range append(keys, "") {
		c := Config{
			MQTT: []string{"127.0.0.1:0", "mqtts://127.0.0.1:0"}, TLS: TLS{Cert: cert, Key: key, ClientCA: ca},
			TCP: "0.0.0.0:0", HTTP: "0.0.0.0:0",
		}
		values := leaves(reflect.ValueOf(&c).Elem(), "")
		for _, key := range keys {
			values[key].SetBool(key != off)
		}
		if want := switches[off].refused; want != "" {
			var ce *ConfigError
			if err := c.Validate(); !errors.As(err, &ce) || ce.Key != want {
				t.Errorf("without %s: %v", off, err)
			}
			continue
		}
		h := start(t, c)
		parts := enforcers(h)
		for key, s := range switches {
			if s.path == "" {
				continue
			}
			if on := look(t, parts, s.path).Bool(); on != (key != off) {
				t.Errorf("without %q: %s is %v", off, key, on)
			}
		}
		if _, ok := switches[off]; !ok && off != "" {
			t.Errorf("%s: the test does not know what it switches", off)
		}
		if look(t, parts, "tcp.cfg.Closed").Bool() || look(t, parts, "api.cfg.MembersOnly").Bool() {
			t.Error("with tcp_open the port is closed to strangers")
		}
		stop(t, h)
	}
}
