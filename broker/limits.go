package broker

import (
	"cmp"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/route"
)

// Limits bound what peers can make the hub do. A zero field is its default.
type Limits struct {
	// Frame is the largest frame, in bytes as received, from 4 KiB to 16 MiB.
	// Default 256 KiB.
	Frame Size `yaml:"frame"`
	// Hops is the most addresses in a route. Default 64.
	Hops int `yaml:"hops"`

	// Memory is what the hub's heap may come to, 64 MiB at least. The limits
	// below that bound memory then have defaults that fit; those that are set must
	// leave a quarter of it. Default: no ceiling.
	Memory Size `yaml:"memory"`

	// FramesPerSecond and BytesPerSecond are what one device or TCP connection
	// may send, with a burst of one second's. Beyond that acknowledgements are
	// withheld, and transient frames dropped. Defaults 100,000 and 64 MiB.
	FramesPerSecond int  `yaml:"frames_per_second"`
	BytesPerSecond  Size `yaml:"bytes_per_second"`
	// HellosPerSecond and RegistrationsPerSecond are what one device may ask for
	// over all its connections. Defaults 50 and 20.
	HellosPerSecond        int `yaml:"hellos_per_second"`
	RegistrationsPerSecond int `yaml:"registrations_per_second"`
	// GuestHellosPerAddress is how often a second devices that have not pinned their
	// hub may ask for its name from one IP address or IPv6 network of 64 bits,
	// GuestHellosPerSecond from all of them. Defaults 100 and 1,000.
	GuestHellosPerAddress int `yaml:"guest_hellos_per_address"`
	GuestHellosPerSecond  int `yaml:"guest_hellos_per_second"`
	// Unanswered and UnansweredBytes are how much a connection may send without
	// an answer before it is closed. Defaults 1,024 packets and 8 MiB.
	Unanswered      int  `yaml:"unanswered"`
	UnansweredBytes Size `yaml:"unanswered_bytes"`
	// WaitingBytes bounds what is received and not answered of all connections
	// together, OutputBytes what is written and not taken (of MQTT and of TCP
	// connections each), ArrivingBytes the long
	// packets that have begun to arrive. Defaults 256 MiB, 1 GiB and 256 MiB.
	WaitingBytes  Size `yaml:"waiting_bytes"`
	OutputBytes   Size `yaml:"output_bytes"`
	ArrivingBytes Size `yaml:"arriving_bytes"`

	// ClientsPerIdentity is how many client ids of one identity may have a queue
	// at one time. Default 1,024.
	ClientsPerIdentity int `yaml:"clients_per_identity"`
	// Peers is how many devices and connections may have a place in the router,
	// connected or not. Default 1,000,000.
	Peers int `yaml:"peers"`
	// Forwarders is how many forwarding addresses there may be. Default
	// 1,000,000.
	Forwarders int `yaml:"forwarders"`

	// Subscriptions, TopicBytes and TopicLevels bound what one ordinary client
	// may subscribe to. Defaults 1,024, 1,024 and 32.
	Subscriptions int `yaml:"subscriptions"`
	TopicBytes    int `yaml:"topic_bytes"`
	TopicLevels   int `yaml:"topic_levels"`
	// SubscriptionBytes bounds what the filters of all ordinary clients take, about
	// 640 bytes for each level that no other filter begins with. One client may have a
	// quarter of it, 8 MiB at most, one user name and one address half. Default 256 MiB.
	SubscriptionBytes Size `yaml:"subscription_bytes"`
	// Retained and RetainedBytes bound the retained messages of ordinary clients, with
	// the levels of their topics; half may be of one user name, and of one address.
	// Defaults 100,000 and 128 MiB.
	Retained      int  `yaml:"retained"`
	RetainedBytes Size `yaml:"retained_bytes"`
	// Sessions bounds the MQTT sessions, connected or kept, SessionBytes what is
	// queued in all of them; wills have a quarter as much. One user name, and one
	// address, may have half of each, of the wills a quarter. Defaults 131,072 and
	// 256 MiB.
	Sessions     int  `yaml:"sessions"`
	SessionBytes Size `yaml:"session_bytes"`
	// Observers is how many clients may watch at one time. Default 64.
	Observers int `yaml:"observers"`
	// LoginsWaiting is how many passwords may wait to be checked, and as many proofs of
	// devices; those from one address may have half of the places. Default 256.
	LoginsWaiting int `yaml:"logins_waiting"`
	// ConnectTimeout is how long a peer may take from accept to the end of its
	// CONNECT. Default 10 s.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`

	// Connections is how many MQTT connections there may be, and how many Ockam TCP
	// connections besides. Default 65,536. Where the process may open fewer files the
	// hub warns at its start and lets in what there are files for.
	Connections int `yaml:"connections"`
	// ConnectionsPerAddress is how many may come from one IP address, or one
	// IPv6 network of 64 bits. Default 16,384, and with Memory no more than half of
	// Connections.
	ConnectionsPerAddress int `yaml:"connections_per_address"`
	// ConnectionsPending is how many may be between accept and CONNECT, or the first
	// frame. Default 4,096.
	ConnectionsPending int `yaml:"connections_pending"`

	// TCPIdle closes an Ockam TCP connection that was silent for so long. Default:
	// never, since stock peers send no heartbeat; dead ones are found by keepalive.
	TCPIdle time.Duration `yaml:"tcp_idle"`
	// TCPFirstByte, TCPFirstFrame and TCPFrame are how long an Ockam TCP peer may
	// take to the first byte, from there to the first frame, and over a frame that
	// has begun, which has a second more for each 16 KiB. Defaults 10 s, 10 min, 30 s.
	TCPFirstByte  time.Duration `yaml:"tcp_first_byte"`
	TCPFirstFrame time.Duration `yaml:"tcp_first_frame"`
	TCPFrame      time.Duration `yaml:"tcp_frame"`
	// TCPStall closes an Ockam TCP connection that took no byte of its output for
	// so long. Default 30 s.
	TCPStall time.Duration `yaml:"tcp_stall"`
	// TCPWindow is how many frames of an Ockam TCP connection may wait for room
	// before the hub stops reading from it, TCPOutput the output buffered for one.
	// Defaults 128, and 1 MiB or twice the frame limit if that is more.
	TCPWindow int  `yaml:"tcp_window"`
	TCPOutput Size `yaml:"tcp_output"`

	// APIChannels is how many channels there may be with the hub's own secure channel
	// listener, APIChannelsPerAddress from one IP address or IPv6 network of 64 bits,
	// APIChannelsPerIdentity of one identity. Defaults 4,096, half of that, and 64.
	APIChannels            int `yaml:"api_channels"`
	APIChannelsPerAddress  int `yaml:"api_channels_per_address"`
	APIChannelsPerIdentity int `yaml:"api_channels_per_identity"`
	// APIHandshakes is how many handshakes there may be unfinished; a quarter of them
	// from one address. APIHandshakesPerSecond is how many may be begun from one
	// address, with a burst of four seconds', and APIHandshakeTimeout how long one may
	// take. Defaults 512, 50 and 30 s.
	APIHandshakes          int           `yaml:"api_handshakes"`
	APIHandshakesPerSecond int           `yaml:"api_handshakes_per_second"`
	APIHandshakeTimeout    time.Duration `yaml:"api_handshake_timeout"`

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

	// ForwardersPerIdentity is how many forwarding addresses an identity may have,
	// ForwardersPerConnection how many of them one client id, or one connection over
	// TCP. Defaults 256 and 64.
	ForwardersPerIdentity   int `yaml:"forwarders_per_identity"`
	ForwardersPerConnection int `yaml:"forwarders_per_connection"`
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
		{"memory", int64(l.Memory)},
		{"frames_per_second", int64(l.FramesPerSecond)},
		{"bytes_per_second", int64(l.BytesPerSecond)},
		{"hellos_per_second", int64(l.HellosPerSecond)},
		{"registrations_per_second", int64(l.RegistrationsPerSecond)},
		{"guest_hellos_per_address", int64(l.GuestHellosPerAddress)},
		{"guest_hellos_per_second", int64(l.GuestHellosPerSecond)},
		{"unanswered", int64(l.Unanswered)},
		{"unanswered_bytes", int64(l.UnansweredBytes)},
		{"waiting_bytes", int64(l.WaitingBytes)},
		{"output_bytes", int64(l.OutputBytes)},
		{"arriving_bytes", int64(l.ArrivingBytes)},
		{"clients_per_identity", int64(l.ClientsPerIdentity)},
		{"peers", int64(l.Peers)},
		{"forwarders", int64(l.Forwarders)},
		{"subscriptions", int64(l.Subscriptions)},
		{"subscription_bytes", int64(l.SubscriptionBytes)},
		{"topic_bytes", int64(l.TopicBytes)},
		{"topic_levels", int64(l.TopicLevels)},
		{"retained", int64(l.Retained)},
		{"retained_bytes", int64(l.RetainedBytes)},
		{"sessions", int64(l.Sessions)},
		{"session_bytes", int64(l.SessionBytes)},
		{"observers", int64(l.Observers)},
		{"logins_waiting", int64(l.LoginsWaiting)},
		{"connect_timeout", int64(l.ConnectTimeout)},
		{"connections", int64(l.Connections)},
		{"connections_per_address", int64(l.ConnectionsPerAddress)},
		{"connections_pending", int64(l.ConnectionsPending)},
		{"tcp_idle", int64(l.TCPIdle)},
		{"tcp_first_byte", int64(l.TCPFirstByte)},
		{"tcp_first_frame", int64(l.TCPFirstFrame)},
		{"tcp_frame", int64(l.TCPFrame)},
		{"tcp_stall", int64(l.TCPStall)},
		{"tcp_window", int64(l.TCPWindow)},
		{"tcp_output", int64(l.TCPOutput)},
		{"api_channels", int64(l.APIChannels)},
		{"api_channels_per_address", int64(l.APIChannelsPerAddress)},
		{"api_channels_per_identity", int64(l.APIChannelsPerIdentity)},
		{"api_handshakes", int64(l.APIHandshakes)},
		{"api_handshakes_per_second", int64(l.APIHandshakesPerSecond)},
		{"api_handshake_timeout", int64(l.APIHandshakeTimeout)},
		{"outbox_frames", int64(l.OutboxFrames)},
		{"outbox_bytes", int64(l.OutboxBytes)},
		{"queued_frames", int64(l.QueuedFrames)},
		{"queued_bytes", int64(l.QueuedBytes)},
		{"queued_for", int64(l.QueuedFor)},
		{"forwarders_per_identity", int64(l.ForwardersPerIdentity)},
		{"forwarders_per_connection", int64(l.ForwardersPerConnection)},
		{"forwarder_unseen", int64(l.ForwarderUnseen)},
		{"trace_lines", int64(l.TraceLines)},
	} {
		if n.value < 0 {
			return &ConfigError{Key: "limits." + n.key, Problem: "it is negative", Fix: "remove it for the default, or choose a positive number"}
		}
	}
	return l.checkMemory()
}

// api are the limits of the hub's own secure channel listener.
func (l Limits) api() channel.Limits {
	return channel.Limits{
		Channels: l.APIChannels, ChannelsPerSource: l.APIChannelsPerAddress, HalfOpen: l.APIHandshakes,
		Rate: float64(l.APIHandshakesPerSecond), Handshake: l.APIHandshakeTimeout,
	}
}

// bridge puts the limits into the router's configuration.
func (l Limits) bridge(c *bridge.Config) {
	c.Limits = route.Limits{Frame: int(l.Frame), Hops: l.Hops}
	c.OutboxFrames, c.OutboxBytes = l.OutboxFrames, int(l.OutboxBytes)
	c.TotalFrames, c.TotalBytes = int64(l.QueuedFrames), int64(l.QueuedBytes)
	c.MaxAge = l.QueuedFor
	c.ForwardersPerIdentity, c.ForwardersPerPort, c.ForwarderTTL = l.ForwardersPerIdentity, l.ForwardersPerConnection, l.ForwarderUnseen
	c.TraceRate = float64(l.TraceLines)
	c.FrameRate, c.ByteRate = float64(cmp.Or(l.FramesPerSecond, defaultFrameRate)), float64(cmp.Or(l.BytesPerSecond, defaultByteRate))
	c.HelloRate, c.HelloBurst = float64(l.HellosPerSecond), 4*l.HellosPerSecond
	c.GuestRate, c.GuestBurst = float64(l.GuestHellosPerAddress), 4*l.GuestHellosPerAddress
	c.GuestTotalRate, c.GuestTotalBurst = float64(l.GuestHellosPerSecond), 2*l.GuestHellosPerSecond
	c.RegistrationRate, c.RegistrationBurst = float64(l.RegistrationsPerSecond), max(4*l.RegistrationsPerSecond, min(256, 256*l.RegistrationsPerSecond))
	c.Window, c.WindowBytes, c.WaitingBytes = l.Unanswered, int(l.UnansweredBytes), int64(l.WaitingBytes)
	c.PortsPerIdentity, c.MaxPorts, c.MaxForwarders = l.ClientsPerIdentity, l.Peers, l.Forwarders
}
