package broker

import (
	"time"
)

// StatusVersion is the version of the /status page. A field is never given
// another meaning within a version; new ones may appear.
const StatusVersion = 1

// Status is what the /status page says. It holds no secret; it names devices
// only by number.
type Status struct {
	// Version is [StatusVersion].
	Version int `json:"version"`
	// State is "starting", "ready", "stopping" or "stopped".
	State string `json:"state"`
	// Identifier is the hub's.
	Identifier string `json:"identifier"`
	// Root is the topic root.
	Root string `json:"root"`
	// MQTT lists the URLs the hub listens at.
	MQTT []string `json:"mqtt"`
	// TCP is the URL of the Ockam TCP listener; empty without one.
	TCP string `json:"tcp,omitempty"`
	// Started is when the hub started.
	Started time.Time `json:"started"`
	// Uptime is how long ago that was, in seconds.
	Uptime float64 `json:"uptime_seconds"`
	// Memory says that nothing outlives the process: no data folder.
	Memory bool `json:"memory_only"`
	// Store says how queues and forwarders are kept.
	Store StoreStatus `json:"store"`
	// Counters are the hub's counters and gauges by name, as in /metrics.
	Counters map[string]float64 `json:"counters"`
}
