package broker

import (
	"fmt"
	"runtime/debug"

	"github.com/sealmq/sealmq/bridge/mochi/guard"
)

const (
	defaultFrameRate = 100_000
	defaultByteRate  = 64 << 20

	// minMemory is the least ceiling that leaves room for anything.
	minMemory = 64 << 20
	// connectionCost is about what an idle connection takes: two goroutines'
	// stacks and mochi's buffers.
	connectionCost = 40 << 10
	// peerCost is about what a device that is away takes, without its queue.
	peerCost = 4 << 10
	// channelCost is about what a channel with the hub's own listener takes.
	channelCost = 32 << 10
)

// share is one limit that bounds memory, and its part of the ceiling in
// sixty-fourths.
type share struct {
	key   string
	value *Size
	parts Size
}

// shares are the limits that bound memory. What they leave of the ceiling is for
// connections, and what the garbage collector has yet to find.
func (l *Limits) shares() []share {
	return []share{
		{"queued_bytes", &l.QueuedBytes, 11},
		{"waiting_bytes", &l.WaitingBytes, 4},
		{"output_bytes", &l.OutputBytes, 4},
		{"arriving_bytes", &l.ArrivingBytes, 2},
		{"session_bytes", &l.SessionBytes, 4},
		{"retained_bytes", &l.RetainedBytes, 2},
		{"subscription_bytes", &l.SubscriptionBytes, 3},
	}
}

// checkMemory refuses limits that together exceed the ceiling.
func (l Limits) checkMemory() error {
	if l.Memory == 0 {
		return nil
	}
	if l.Memory < minMemory {
		return &ConfigError{Key: "limits.memory", Problem: fmt.Sprintf("%v is too little for a hub", l.Memory), Fix: "choose 64MiB or more"}
	}
	channels := l.APIChannels // the default's few are in the quarter that is left
	l = l.fit()
	sum := Size(0)
	for _, s := range l.shares() {
		if *s.value > l.Memory {
			return &ConfigError{Key: "limits." + s.key, Problem: fmt.Sprintf("%v is more than limits.memory allows altogether", *s.value),
				Fix: "remove it for a default that fits, or raise limits.memory"}
		}
		sum += *s.value
	}
	sum += l.OutputBytes + l.ArrivingBytes // once for MQTT, once for TCP
	sum += l.SessionBytes / 4              // wills
	sum += Size(min(l.Connections, 1<<30)) * connectionCost
	sum += Size(min(channels, 1<<30)) * channelCost
	if sum > l.Memory/4*3 {
		return &ConfigError{Key: "limits.memory", Problem: fmt.Sprintf("queues, buffers and connections may come to %d MiB, more than three quarters of %v", sum>>20, l.Memory),
			Fix: "raise it, or lower queued_bytes, waiting_bytes, output_bytes, arriving_bytes, session_bytes, retained_bytes, subscription_bytes, connections or api_channels"}
	}
	return nil
}

// fit returns the limits with defaults that fit the ceiling.
func (l Limits) fit() Limits {
	if l.Memory == 0 {
		return l
	}
	for _, s := range l.shares() {
		if *s.value == 0 {
			*s.value = l.Memory / 64 * s.parts
		}
	}
	def := func(n *int, most int, v Size) {
		if *n == 0 {
			*n = min(most, int(v))
		}
	}
	def(&l.Connections, guard.DefaultConns, l.Memory/8/connectionCost)
	def(&l.ConnectionsPerAddress, guard.DefaultPerAddress, max(64, Size(l.Connections)/2))
	def(&l.ConnectionsPending, guard.DefaultPending, max(64, Size(l.Connections)/8))
	def(&l.APIChannels, 4096, l.Memory/64/channelCost)
	def(&l.Peers, 1_000_000, max(1024, l.Memory/16/peerCost))
	def(&l.Sessions, guard.DefaultSessions, max(1024, 2*Size(l.Connections)))
	def(&l.Forwarders, 1_000_000, max(1024, l.Memory/32/1024))
	def(&l.Retained, guard.DefaultRetained, max(1024, l.RetainedBytes/1024))
	def(&l.QueuedFrames, 4<<20, max(1024, l.QueuedBytes/128))
	if l.OutboxBytes == 0 {
		l.OutboxBytes = min(16<<20, l.QueuedBytes/4)
	}
	return l
}

// holdMemory has the garbage collector work harder before the heap reaches the
// ceiling, and returns what undoes that.
func (l Limits) holdMemory() (release func()) {
	if l.Memory == 0 {
		return func() {}
	}
	before := debug.SetMemoryLimit(int64(l.Memory) / 10 * 9)
	return func() { debug.SetMemoryLimit(before) }
}

// fixes are the limits of ordinary clients.
func (l Limits) fixes() guard.FixesConfig {
	return guard.FixesConfig{
		TopicBytes: l.TopicBytes, TopicLevels: l.TopicLevels, Subscriptions: l.Subscriptions,
		Retained: l.Retained, RetainedBytes: int(l.RetainedBytes),
		Sessions: l.Sessions, QueuedBytes: int64(l.SessionBytes), FilterBytes: int64(l.SubscriptionBytes),
	}
}

// guard makes the limits of all listeners together.
func (l Limits) guard() *guard.Limits {
	return &guard.Limits{
		Conns: l.Connections, PerAddress: l.ConnectionsPerAddress, Pending: l.ConnectionsPending,
		Output: int64(l.OutputBytes), Input: int64(l.ArrivingBytes),
	}
}
