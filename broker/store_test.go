package broker

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/route"
)

// used is a data folder that a hub has registered a forwarder in.
func used(t *testing.T) string {
	t.Helper()
	data := filepath.Join(t.TempDir(), "data")
	h := start(t, Config{Data: data})
	if _, err := h.Bridge().ConnectDevice(bridge.Principal{ClientID: "bob", Role: bridge.RoleDevice}, deaf{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Bridge().Register(bridge.Registration{
		Owner: bridge.Principal{ClientID: "bob", Identity: [32]byte{1}, Proven: true},
		Route: route.To(h.Bridge().HubAddress("bob"), "m"), Alias: "door",
	}); err != nil {
		t.Fatal(err)
	}
	stop(t, h)
	return data
}

// deaf is a connection that takes nothing.
type deaf struct{}

func (deaf) Deliver([]bridge.Entry) int { return 0 }
func (deaf) Direct([]byte) bool         { return false }
func (deaf) Kick(bridge.KickReason)     {}

func TestStoreComesBack(t *testing.T) {
	data := used(t)
	h := start(t, Config{Data: data})
	s := h.Status()
	if s.Store.Durability != DurabilityInterval || s.Store.Refused != "" || s.Store.Found == nil || s.Store.Found.Queues != 1 || s.Store.Found.Records == 0 {
		t.Fatalf("%+v", s.Store)
	}
	if f := h.Bridge().Forwarder("forward_to_door"); f == nil || f.Device != "bob" || f.Online {
		t.Fatalf("%+v", f)
	}
	if s.Counters["sealmq_peers"] != 1 || s.Counters["sealmq_peers_attached"] != 0 || s.Counters["sealmq_store_segments"] != 1 {
		t.Fatalf("%v", s.Counters)
	}
	// A second hub has no business here, whatever it would keep.
	for _, mode := range []Durability{DurabilityInterval, DurabilityMemory} {
		_, err := New(Config{MQTT: anyPort, Data: data, Durability: mode})
		var se *StoreError
		if !errors.As(err, &se) || !errors.Is(err, store.ErrInUse) || !strings.Contains(se.Hint(), "other hub") {
			t.Fatalf("second hub, %s: %v", mode, err)
		}
	}
}

func TestStoreRefused(t *testing.T) {
	segment := func(data string) string { return filepath.Join(data, "store", "0000000000000001.seg") }
	change := func(t *testing.T, name string, f func(b []byte) []byte) {
		t.Helper()
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, f(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, data string)
		is    error
		hint  string
	}{
		{"damaged", func(t *testing.T, data string) {
			change(t, segment(data), func(b []byte) []byte { b[0]++; return b })
		}, store.ErrCorrupt, "backup"},
		{"newer", func(t *testing.T, data string) {
			change(t, segment(data), func(b []byte) []byte { b[7]++; return b })
		}, store.ErrNewer, "newer"},
		{"another folder's file", func(t *testing.T, data string) {
			change(t, segment(data), func(b []byte) []byte {
				other := append(b[:8:8], "another!"...)
				if err := os.WriteFile(filepath.Join(data, "store", "0000000000000002.seg"), other, 0o600); err != nil {
					t.Fatal(err)
				}
				return b
			})
		}, store.ErrCorrupt, "backup"},
		{"missing file", func(t *testing.T, data string) {
			if err := os.WriteFile(filepath.Join(data, "store", "0000000000000003.seg"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, store.ErrCorrupt, "backup"},
		{"another key", func(t *testing.T, data string) {
			if err := os.WriteFile(filepath.Join(data, addressKeyName), []byte(hex.EncodeToString(make([]byte, 31))+"01\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, store.ErrKey, "address key"},
		{"no identity", func(t *testing.T, data string) {
			if err := os.RemoveAll(filepath.Join(data, identityFolder)); err != nil {
				t.Fatal(err)
			}
		}, store.ErrIdentity, identityFile},
		{"another identity", func(t *testing.T, data string) {
			other := filepath.Join(t.TempDir(), "other")
			stop(t, start(t, Config{Data: other}))
			if err := os.Rename(filepath.Join(other, identityFolder, identityFile), filepath.Join(data, identityFolder, identityFile)); err != nil {
				t.Fatal(err)
			}
		}, store.ErrIdentity, identityFile},
		{"no folder", func(t *testing.T, data string) {
			if err := os.RemoveAll(filepath.Join(data, "store")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(data, "store"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, syscall.ENOTDIR, "look after"},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := used(t)
			c.spoil(t, data)
			_, err := New(Config{MQTT: anyPort, Data: data})
			var se *StoreError
			if !errors.As(err, &se) || !errors.Is(err, c.is) || !strings.Contains(se.Hint(), c.hint) {
				t.Fatalf("%v (%v)", err, se)
			}
			t.Log(err)
			// What New took is free again.
			if lock, _, err := store.Open(filepath.Join(t.TempDir(), "x"), store.Options{}); err == nil {
				_ = lock.Close()
			}
			if _, again := New(Config{MQTT: anyPort, Data: data}); errors.Is(again, store.ErrInUse) {
				t.Error("the folder stayed locked")
			}
		})
	}
}

func TestStoreHints(t *testing.T) {
	for err, hint := range map[error]string{
		&fs.PathError{Op: "open", Path: "x", Err: syscall.EROFS}:   "writable",
		&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}: "space",
		&fs.PathError{Op: "write", Path: "x", Err: syscall.EDQUOT}: "space",
		&fs.PathError{Op: "write", Path: "x", Err: syscall.EFBIG}:  "ulimit -f",
		&fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES}:  "own",
	} {
		if e := (&StoreError{Folder: "d/store", Err: fmt.Errorf("store: %w", err)}); !strings.Contains(e.Hint(), hint) {
			t.Errorf("%v: %s", e, e.Hint())
		}
	}
}

func TestDurabilitySettings(t *testing.T) {
	for _, c := range []struct {
		cfg Config
		key string
	}{
		{Config{Durability: "sometimes", Data: "x"}, "durability"},
		{Config{Durability: DurabilityAlways}, "durability"},
		{Config{Durability: DurabilityInterval}, "durability"},
		{Config{Data: "x", SyncInterval: time.Millisecond}, "sync_interval"},
		{Config{Data: "x", SyncInterval: time.Hour}, "sync_interval"},
		{Config{Data: "x", SegmentSize: 1}, "segment_size"},
		{Config{Durability: DurabilityMemory}, ""},
		{Config{Data: "x", Durability: DurabilityMemory}, ""},
		{Config{Data: "x", Durability: DurabilityAlways, SyncInterval: time.Second, SegmentSize: 8 << 20}, ""},
	} {
		err := c.cfg.Validate()
		var ce *ConfigError
		if c.key == "" && err == nil || errors.As(err, &ce) && ce.Key == c.key && ce.Fix != "" {
			continue
		}
		t.Errorf("%+v: %v, want %q", c.cfg, err, c.key)
	}
	for want, cfg := range map[Durability]Config{
		DurabilityMemory: {}, DurabilityInterval: {Data: "x"}, DurabilityAlways: {Data: "x", Durability: DurabilityAlways},
	} {
		if got := cfg.durability(); got != want {
			t.Errorf("%+v: %s", cfg, got)
		}
	}
	// In memory nothing of the queues is on disk.
	data := filepath.Join(t.TempDir(), "data")
	h := start(t, Config{Data: data, Durability: DurabilityMemory})
	if s := h.Status().Store; s.Durability != DurabilityMemory || s.Found != nil {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(filepath.Join(data, "store")); err == nil {
		t.Error("there is a store")
	}
	var ce *ConfigError
	if _, err := New(Config{MQTT: anyPort, Data: used(t), Durability: DurabilityMemory}); !errors.As(err, &ce) || ce.Key != "durability" {
		t.Errorf("with a store there: %v", err)
	}
}
