package broker

import (
	"fmt"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// Limits bound what peers can make the hub do. A zero field is its default.
type Limits struct {
	// Frame is the largest frame, in bytes as received, from 4 KiB to 16 MiB.
	// Default 256 KiB.
	Frame Size `yaml:"frame"`
	// Hops is the most addresses in a route. Default 64.
	Hops int `yaml:"hops"`

	// Connections is how many MQTT connections there may be. Default 65,536.
	Connections int `yaml:"connections"`
	// ConnectionsPerAddress is how many may come from one IP address, or one
	// IPv6 network of 64 bits. Default 16,384.
	ConnectionsPerAddress int `yaml:"connections_per_address"`
	// ConnectionsPending is how many may be between accept and CONNECT.
	// Default 4,096.
	ConnectionsPending int `yaml:"connections_pending"`

	// OutboxFrames and OutboxBytes are when one device's queue is full: then
	// acknowledgements are withheld. Defaults 16,384 frames and 16 MiB.
	OutboxFrames int  `yaml:"outbox_frames"`
	OutboxBytes  Size `yaml:"outbox_bytes"`
	// QueuedFrames and QueuedBytes bound all queues together. Defaults
	// 4,194,304 frames and 1 GiB.
	QueuedFrames int  `yaml:"queued_frames"`
	QueuedBytes  Size `yaml:"queued_bytes"`
	// QueuedFor is how long a frame may wait. Default 7 days.
	QueuedFor time.Duration `yaml:"queued_for"`

	// ForwardersPerIdentity is how many forwarding addresses a device may have.
	// Default 256.
	ForwardersPerIdentity int `yaml:"forwarders_per_identity"`
	// ForwarderUnseen is how long a forwarder outlives the last sight of its
	// device. Default 24 hours.
	ForwarderUnseen time.Duration `yaml:"forwarder_unseen"`

	// TraceLines is how many trace lines there may be a second. Default 1,000.
	TraceLines int `yaml:"trace_lines"`
}

func (l Limits) validate() error {
	if l.Frame != 0 && (l.Frame < 4<<10 || l.Frame > route.MaxFrame) {
		return &ConfigError{Key: "limits.frame", Problem: fmt.Sprintf("%v is out of range", l.Frame), Fix: "choose from 4KiB to 16MiB"}
	}
	if l.Hops != 0 && (l.Hops < 10 || l.Hops > 4096) {
		return &ConfigError{Key: "limits.hops", Problem: fmt.Sprintf("%d is out of range", l.Hops), Fix: "choose from 10 to 4096"}
	}
	for _, n := range []struct {
		key   string
		value int64
	}{
		{"connections", int64(l.Connections)},
		{"connections_per_address", int64(l.ConnectionsPerAddress)},
		{"connections_pending", int64(l.ConnectionsPending)},
		{"outbox_frames", int64(l.OutboxFrames)},
		{"outbox_bytes", int64(l.OutboxBytes)},
		{"queued_frames", int64(l.QueuedFrames)},
		{"queued_bytes", int64(l.QueuedBytes)},
		{"queued_for", int64(l.QueuedFor)},
		{"forwarders_per_identity", int64(l.ForwardersPerIdentity)},
		{"forwarder_unseen", int64(l.ForwarderUnseen)},
		{"trace_lines", int64(l.TraceLines)},
	} {
		if n.value < 0 {
			return &ConfigError{Key: "limits." + n.key, Problem: "it is negative", Fix: "remove it for the default, or choose a positive number"}
		}
	}
	return nil
}

// bridge puts the limits into the router's configuration.
func (l Limits) bridge(c *bridge.Config) {
	c.Limits = route.Limits{Frame: int(l.Frame), Hops: l.Hops}
	c.OutboxFrames, c.OutboxBytes = l.OutboxFrames, int(l.OutboxBytes)
	c.TotalFrames, c.TotalBytes = int64(l.QueuedFrames), int64(l.QueuedBytes)
	c.MaxAge = l.QueuedFor
	c.ForwardersPerIdentity, c.ForwarderTTL = l.ForwardersPerIdentity, l.ForwarderUnseen
	c.TraceRate = float64(l.TraceLines)
}
