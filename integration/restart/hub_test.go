// Package restart ends real hubs, by asking and by kill -9, while devices send,
// and holds the next one to what the last one acknowledged.
package restart

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// modes are the promises that a killed process must keep.
var modes = []broker.Durability{broker.DurabilityAlways, broker.DurabilityInterval}

// hub is a data folder and an address, and at most one process that serves them.
type hub struct {
	t    *testing.T
	data string
	mqtt string // host:port
	http string
	args []string
	as   []string // the command that runs the hub's; nil: none

	process *peer.Process
}

func newHub(t *testing.T, args ...string) *hub {
	t.Helper()
	h := &hub{t: t, data: filepath.Join(t.TempDir(), "data"), args: args}
	for _, addr := range []*string{&h.mqtt, &h.http} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() // both are held until both are known
		*addr = ln.Addr().String()
	}
	return h
}

func (h *hub) url() string { return "mqtt://" + h.mqtt }

// start starts a process and returns once it listens.
func (h *hub) start() {
	h.t.Helper()
	ready := make(chan struct{})
	args := slices.Concat(h.as, []string{peer.Sealmq(h.t), "hub", "--mqtt", h.mqtt, "--http", h.http, "--data", h.data}, h.args)
	h.process = peer.Start(h.t, peer.Options{OnLine: func(line []byte) {
		if bytes.HasPrefix(line, []byte("Listening at ")) {
			close(ready)
		}
	}}, args[0], args[1:]...)
	select {
	case <-ready:
	case <-h.process.Exited():
		h.t.Fatalf("the hub ended:\n%s", h.process.Stderr())
	case <-time.After(patience):
		h.t.Fatal("the hub does not listen")
	}
}

// end ends the process by a signal and returns once it is gone.
func (h *hub) end(sig syscall.Signal) {
	h.t.Helper()
	if err := h.process.Signal(sig); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := h.process.Wait(ctx); err != nil && sig != syscall.SIGKILL {
		h.t.Fatalf("the hub ended with %v:\n%s", err, h.process.Stderr())
	}
}

// address is the hub address of a device: what live channels name.
func (h *hub) address(clientID string) string {
	h.t.Helper()
	v, err := identity.OpenVault(filepath.Join(h.data, "identity"))
	if err != nil {
		h.t.Fatal(err)
	}
	p, err := v.Load("hub")
	if err != nil {
		h.t.Fatal(err)
	}
	key := p.Secret("sealmq hub addresses/1")
	m := hmac.New(sha256.New, key[:])
	m.Write([]byte("hub-address/1" + clientID))
	return "dev_" + hex.EncodeToString(m.Sum(nil)[:16])
}

// status is what the hub says about itself.
func (h *hub) status() broker.Status {
	h.t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := c.Get("http://" + h.http + "/status")
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	var s broker.Status
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		h.t.Fatal(err)
	}
	return s
}

// counters are those that are not 0.
func (h *hub) counters() map[string]float64 {
	c := h.status().Counters
	maps.DeleteFunc(c, func(_ string, n float64) bool { return n == 0 })
	return c
}

// sums holds the hub to it that every frame has a fate, once it is quiet.
func (h *hub) sums() {
	h.t.Helper()
	h.until("every frame has a fate", func() (bool, string) {
		c := h.counters()
		lost := c["sealmq_frames_received_total"] + c["sealmq_frames_originated_total"] + c["sealmq_frames_restored_total"] -
			c["sealmq_frames_delivered_total"] - c["sealmq_frames_served_total"] - c["sealmq_frames_queued"] - c["sealmq_frames_waiting"]
		for name, n := range c {
			if strings.HasPrefix(name, "sealmq_frames_dropped_total") {
				lost -= n
			}
		}
		return lost == 0, fmt.Sprintf("%v frames without a fate: %v", lost, c)
	})
}

// until waits for something that the hub's pages will show.
func (h *hub) until(what string, f func() (bool, string)) {
	h.t.Helper()
	tick, end := time.NewTicker(20*time.Millisecond), time.After(patience)
	defer tick.Stop()
	for {
		ok, why := f()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			h.t.Fatalf("%s: not within %v: %s", what, patience, why)
		}
	}
}
