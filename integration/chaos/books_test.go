package chaos

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// counters are the hub's own, by the name of the metric: those of its process, which begin
// at 0 with each start. There are none while it is not there.
func (h *hub) counters() (map[string]float64, error) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := c.Get("http://" + h.pages + "/status")
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var status struct {
		Counters map[string]float64 `json:"counters"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&status); err != nil {
		return nil, err
	}
	return status.Counters, nil
}

// books adds up what the hub's processes counted.
type books struct {
	full    float64 // packets that waited for a full queue, as far as it was asked before its ends
	dropped map[string]float64
}

const dropped = "sealmq_frames_dropped_total{reason="

// withheld is what the present process has counted.
func (h *hub) withheld() float64 {
	c, err := h.counters()
	if err != nil {
		return 0 // it does not listen yet, or any more
	}
	return c["sealmq_packets_withheld_total"]
}

// note adds what a process counted that is about to end.
func (b *books) note(c map[string]float64) {
	b.full += c["sealmq_packets_withheld_total"]
	for name, n := range c {
		if reason, ok := strings.CutPrefix(name, dropped); ok && n > 0 {
			b.dropped[strings.TrimSuffix(reason, "}")] += n
		}
	}
}

// fates returns how many frames have no fate: neither delivered, nor queued or waiting, nor
// dropped for a reason that has a name.
func fates(c map[string]float64) float64 {
	n := c["sealmq_frames_received_total"] + c["sealmq_frames_originated_total"] + c["sealmq_frames_restored_total"]
	for _, fate := range []string{"delivered_total", "served_total", "queued", "waiting"} {
		n -= c["sealmq_frames_"+fate]
	}
	for name, dropped := range c {
		if strings.HasPrefix(name, "sealmq_frames_dropped_total{") {
			n -= dropped
		}
	}
	return n
}

// close holds the hub, when its devices are gone, to what it counted: the sums of its last
// process agree, nobody waits any more, nothing was dropped for want of a store, and, where
// there were enough messages, queues were full in the course of the run.
func (b *books) close(t *testing.T, h *hub, enough bool) {
	t.Helper()
	var c map[string]float64
	var err error
	for end := time.Now().Add(startup); ; time.Sleep(20 * time.Millisecond) {
		if c, err = h.counters(); err == nil && fates(c) == 0 && c["sealmq_frames_waiting"] == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%v frames have no fate, %v wait, in %v: %v", fates(c), c["sealmq_frames_waiting"], c, err)
		}
	}
	if c["sealmq_frames_received_total"] == 0 {
		t.Errorf("the hub has counted nothing: %v", c)
	}
	b.note(c)
	if b.full == 0 && enough {
		t.Error("no queue was ever full")
	}
	if n := b.dropped["storage"]; n != 0 {
		t.Errorf("%v frames could not be stored", n)
	}
	t.Logf("the hub withheld %v packets, and dropped frames: %v", b.full, b)
}

// String lists what was dropped.
func (b *books) String() string {
	var all []string
	for _, reason := range slices.Sorted(maps.Keys(b.dropped)) {
		all = append(all, fmt.Sprintf("%s %v", reason, b.dropped[reason]))
	}
	return strings.Join(all, ", ")
}
