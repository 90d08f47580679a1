package bridge

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Signer is the hub's identity as the bridge uses it. [IdentitySigner] makes one
// of an identity whose keys are at hand.
type Signer interface {
	// Identifier is what devices pin.
	Identifier() identity.Identifier
	// ChangeHistory is the exported identity, for devices that see it first.
	ChangeHistory() []byte
	// SignHello signs the bytes of hubproto.HelloSigned in the domain
	// hubproto.HelloContext.
	SignHello(msg []byte) ([]byte, error)
}

// Config is what New needs. Zero values mean the stated defaults; New copies it.
type Config struct {
	// Key makes hub addresses and dynamic forwarding addresses; whoever has it
	// can compute them. Required, random; the same after a restart, or live
	// channels end with the process.
	Key [32]byte
	// Identity answers hello. Required.
	Identity Signer

	// Limits bound frames as received. Defaults of package route.
	Limits route.Limits
	// BundleLimit is told to devices, in bytes. Default: route.MaxBundleBytes.
	BundleLimit int

	// OutboxFrames and OutboxBytes bound one target's outbox: it is full once
	// either is reached. Defaults 16,384 and 16 MiB.
	OutboxFrames, OutboxBytes int
	// TotalFrames and TotalBytes bound all outboxes together. The last 16th is for
	// devices that have taken everything so far, a packet at a time. Defaults
	// 4,194,304 and 1 GiB.
	TotalFrames, TotalBytes int64
	// MaxAge ends a queued frame. Default 7 days.
	MaxAge time.Duration

	// Window and WindowBytes are how much a connection may have unanswered.
	// Defaults 1,024 packets and 8 MiB, or two packets if that is more.
	Window, WindowBytes int
	// WaitingBytes bounds what all connections together have unanswered.
	// Default 256 MiB.
	WaitingBytes int64
	// FrameRate and ByteRate are how many frames, and bytes of them, a device or
	// stream may send a second, with a burst of one second's. Beyond that stored
	// packets are taken and their acknowledgements withheld, so that a peer which
	// keeps to its window slows down; transient ones are dropped. 0: no limit.
	FrameRate, ByteRate float64
	// HelloRate, HelloBurst, RegistrationRate and RegistrationBurst limit what
	// one device may ask of the services hello and forwarding_service a second,
	// over all its connections; an identity may make as many claims as registrations.
	// Defaults 50, 200, 20, 256.
	HelloRate         float64
	HelloBurst        int
	RegistrationRate  float64
	RegistrationBurst int
	// GuestRate and GuestBurst are how many hellos guests may say a second from one IP
	// address or /64 network, GuestTotalRate and GuestTotalBurst all guests together;
	// each costs a signature. Defaults 100, 400, 1,000, 2,000.
	GuestRate       float64
	GuestBurst      int
	GuestTotalRate  float64
	GuestTotalBurst int
	// StreamWait is how long a packet of a stream waits for a full outbox that
	// takes nothing in, before it is dropped. Default 1 s.
	StreamWait time.Duration

	// FirstContact is how long a frame waits that came through a forwarder for
	// a device that is not attached. Default 10 s.
	FirstContact time.Duration
	// FirstContactFrames and FirstContactBytes bound what waits so for one
	// device. Defaults 64 and 512 KiB, at least one packet.
	FirstContactFrames, FirstContactBytes int

	// HelloWait is how long a subscribed device may take to say hello before
	// it is attached as resuming. Default 5 s.
	HelloWait time.Duration
	// OneShotClean and OneShotLost are how long a one-shot name outlives a
	// clean disconnect and a lost connection. Defaults 10 s and 10 min.
	OneShotClean, OneShotLost time.Duration
	// OneShot reports whether a client id is a one-shot name. Default
	// hubproto.IsOneShot.
	OneShot func(clientID string) bool

	// ForwarderTTL is how long a forwarder, or an idle port, outlives the last
	// sight of its owner. Default 24 h.
	ForwarderTTL time.Duration
	// ForwardersPerPort and ForwardersPerIdentity are quotas. Defaults 64, 256.
	ForwardersPerPort, ForwardersPerIdentity int
	// MaxForwarders bounds all of them; those of plain TCP peers may be a quarter.
	// Default 1,000,000.
	MaxForwarders int
	// StaticOverStream lets plain TCP peers take aliases: the newest wins, and
	// never against an identity.
	StaticOverStream bool
	// PortsPerIdentity bounds the client ids of one identity (the identifier with
	// different suffixes) that have a place at one time. Default 1,024.
	PortsPerIdentity int
	// MaxPorts bounds peers, attached or not. Default 1,000,000.
	MaxPorts int

	// NoticeRate and NoticeBurst limit notices for each connection. Defaults
	// 20 a second and 100.
	NoticeRate  float64
	NoticeBurst int

	// RingItems and RingBytes bound the observers' ring. Defaults 4,096, 8 MiB.
	RingItems, RingBytes int
	// Trace makes one line for each frame while there are observers, TraceRate
	// a second at most. Default 1,000.
	Trace     bool
	TraceRate float64

	// Outboxes makes outboxes. Default: in memory.
	Outboxes OutboxFactory
	// Journal hears of changes to what a restart must restore. Optional.
	Journal Journal

	// Now is the wall clock. Default time.Now. Ages go by the monotonic readings of its
	// times, where they have them.
	Now  func() time.Time
	mono func() time.Duration // since the start; default by Now
	// Logger hears of refusals and ends of connections; nil discards.
	Logger *slog.Logger
}

// DefaultWaitingBytes is the default of Config.WaitingBytes.
const DefaultWaitingBytes = 256 << 20

func (c Config) withDefaults() (Config, error) {
	if c.Key == ([32]byte{}) {
		return c, errors.New("bridge: Config.Key is required: 32 random bytes, kept with the hub's data")
	}
	if c.Identity == nil {
		return c, errors.New("bridge: Config.Identity is required")
	}
	if err := c.Limits.Validate(); err != nil {
		return c, fmt.Errorf("bridge: %w", err)
	}
	c.Limits = c.Limits.WithDefaults()
	var err error
	positive(&err, "BundleLimit", &c.BundleLimit, route.MaxBundleBytes)
	positive(&err, "OutboxFrames", &c.OutboxFrames, 16<<10)
	positive(&err, "OutboxBytes", &c.OutboxBytes, 16<<20)
	positive(&err, "TotalFrames", &c.TotalFrames, 4<<20)
	positive(&err, "TotalBytes", &c.TotalBytes, 1<<30)
	positive(&err, "MaxAge", &c.MaxAge, 7*24*time.Hour)
	positive(&err, "Window", &c.Window, 1024)
	positive(&err, "WindowBytes", &c.WindowBytes, 8<<20)
	positive(&err, "WaitingBytes", &c.WaitingBytes, DefaultWaitingBytes)
	positive(&err, "FrameRate", &c.FrameRate, 0)
	positive(&err, "ByteRate", &c.ByteRate, 0)
	positive(&err, "HelloRate", &c.HelloRate, 50)
	positive(&err, "HelloBurst", &c.HelloBurst, 200)
	positive(&err, "GuestRate", &c.GuestRate, 100)
	positive(&err, "GuestBurst", &c.GuestBurst, 400)
	positive(&err, "GuestTotalRate", &c.GuestTotalRate, 1000)
	positive(&err, "GuestTotalBurst", &c.GuestTotalBurst, 2000)
	positive(&err, "RegistrationRate", &c.RegistrationRate, 20)
	positive(&err, "RegistrationBurst", &c.RegistrationBurst, 256)
	positive(&err, "PortsPerIdentity", &c.PortsPerIdentity, 1024)
	positive(&err, "StreamWait", &c.StreamWait, time.Second)
	positive(&err, "FirstContact", &c.FirstContact, 10*time.Second)
	positive(&err, "FirstContactFrames", &c.FirstContactFrames, 64)
	positive(&err, "FirstContactBytes", &c.FirstContactBytes, 512<<10)
	positive(&err, "HelloWait", &c.HelloWait, 5*time.Second)
	positive(&err, "OneShotClean", &c.OneShotClean, 10*time.Second)
	positive(&err, "OneShotLost", &c.OneShotLost, 10*time.Minute)
	positive(&err, "ForwarderTTL", &c.ForwarderTTL, 24*time.Hour)
	positive(&err, "ForwardersPerPort", &c.ForwardersPerPort, 64)
	positive(&err, "ForwardersPerIdentity", &c.ForwardersPerIdentity, 256)
	positive(&err, "MaxForwarders", &c.MaxForwarders, 1_000_000)
	positive(&err, "MaxPorts", &c.MaxPorts, 1_000_000)
	positive(&err, "NoticeRate", &c.NoticeRate, 20)
	positive(&err, "NoticeBurst", &c.NoticeBurst, 100)
	positive(&err, "RingItems", &c.RingItems, 4096)
	positive(&err, "RingBytes", &c.RingBytes, 8<<20)
	positive(&err, "TraceRate", &c.TraceRate, 1000)
	if err != nil {
		return c, err
	}
	// Two packets always fit, whatever the frame limit.
	c.WindowBytes = max(c.WindowBytes, 2*(c.Limits.Frame+packetHeadroom))
	c.FirstContactBytes = max(c.FirstContactBytes, c.Limits.Frame+packetHeadroom)
	if c.OneShot == nil {
		c.OneShot = isOneShot
	}
	if c.Outboxes == nil {
		c.Outboxes = newMemoryOutboxes()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// packetHeadroom is what an MQTT packet may be longer than one frame.
const packetHeadroom = 64 << 10

func positive[T int | int64 | float64 | time.Duration](err *error, name string, v *T, def T) {
	switch {
	case *v == 0:
		*v = def
	case *v < 0 && *err == nil:
		*err = fmt.Errorf("bridge: Config.%s is negative", name)
	}
}
