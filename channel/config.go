package channel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Router is what an endpoint needs of the node that it lives in.
type Router interface {
	// Register makes h the worker at the local address addr. h is called in
	// order of arrival, never concurrently for one address. It does not block,
	// so it may run on the goroutine that reads from the network. The error is
	// for an address that is taken, or a router that has ended.
	Register(addr string, h func(Inbound)) error
	// Unregister removes the worker. It may be called from within a handler,
	// and does not wait for one that is running.
	Unregister(addr string)
	// Send routes f by its first onward hop. It may wait for room until ctx
	// ends, and then returns an error that wraps ctx's. It copies what it keeps
	// of f. An error means that f was not sent.
	Send(ctx context.Context, f route.Frame, c route.Class) error
}

// LocalRouter is a Router that can keep an address to the programs of its node.
// The encryptors of channels are registered so where the router can: whatever
// reaches one is sealed and sent as this node's own words.
type LocalRouter interface {
	Router
	// RegisterLocal is Register for an address that no frame from outside reaches.
	RegisterLocal(addr string, h func(Inbound)) error
}

// Inbound is a frame for a local worker.
type Inbound struct {
	// Frame is the handler's to keep and to change: a transport frame is
	// decrypted in place.
	Frame route.Frame
	// Class is how the frame came.
	Class route.Class
	// Source names where the frame entered this node's network: the first hop
	// of the return route as the hub stamped it. Limits are counted by it.
	// Empty means the first hop of Frame.Return.
	Source string
	// FromHub says that the hub itself sent the frame. An endpoint has no use
	// for such frames and drops them.
	FromHub bool
	// MayWait says that the handler may block for a second: the sender is held
	// back meanwhile. What comes in a burst behind message 3 then waits until that
	// is verified, where it would be too much to keep.
	MayWait bool
}

// Delivery is a message that came through a channel.
type Delivery struct {
	Channel *Channel
	// Listener is the listener that the peer dialled; empty on a channel that
	// was dialled from here.
	Listener string
	// Frame is the message as it travelled inside, with the channel's encryptor
	// address in front of its return route, so that answers find their way. It
	// is the receiver's to keep.
	Frame route.Frame
	// Nonce numbers the frames of the peer: it rises, with holes for what the
	// channel kept to itself and for what was lost.
	Nonce uint64
	// Class is how the frame came.
	Class route.Class
}

// Downgrade reports a peer that has said hello in an earlier channel, so is a
// sealmq peer, but did not in this one: it runs other software now, or somebody
// on the way drops its frames.
type Downgrade struct {
	Channel *Channel
	Peer    identity.Identifier
}

// Config is what an Endpoint is made of. Identity, Registry, Router and Deliver
// are required.
type Config struct {
	// Identity is who we are.
	Identity *identity.Private
	// Registry keeps the histories of peers, to notice an older or contradicting
	// one.
	Registry identity.Registry
	// Router carries frames to and from the endpoint's addresses.
	Router Router
	// Deliver gets every message, for one channel in nonce order and never
	// concurrently. It must not block. It may call methods of the channel,
	// except for Send, Close and RefreshCredentials where its Router may wait
	// for the goroutine it is called on, and never Endpoint.Close. Which local
	// addresses a peer may reach is for Deliver to enforce.
	Deliver func(Delivery)

	// Authorities are those whose credentials are accepted from peers, on every
	// channel. Without any, credentials are ignored unless a policy names its
	// own authority.
	Authorities []*identity.Identity
	// Credential returns our own credential (CredentialAndPurposeKey bytes), or
	// nil for none, when a handshake needs it; an error stops that handshake.
	// nil shows none. It is asked again before a credential that was shown ends (in
	// the last quarter of its life, or its last hour) until it returns one that ends
	// later, which is then shown on the open channel. It is called from several
	// goroutines.
	Credential func() ([]byte, error)
	// HelloFeatures are announced to sealmq peers.
	HelloFeatures Features
	// Epoch tells one start of this process from another. Zero means random.
	Epoch [16]byte
	// OnDowngrade is told of downgrades, beside the log. It must not block.
	OnDowngrade func(Downgrade)
	// KnownHello reports whether an identity is remembered from earlier
	// processes as one that says hello. nil remembers only this process's.
	KnownHello func(identity.Identifier) bool
	// Clock tells the time for validity checks; nil means time.Now. Timers run
	// on package time.
	Clock func() time.Time
	// Logger gets what an operator wants to know; nil discards. Payloads and
	// keys are never logged.
	Logger *slog.Logger
	// Limits bound what peers can cost. Zero fields mean their defaults.
	Limits Limits

	hooks hooks
}

// hooks let tests replay captured conversations; zero means the real thing.
type hooks struct {
	ephemeral func() (keyPair, error)
	side      func(credential []byte) (local, error)
	address   func() string
	noHello   bool
}

// Limits bound what an endpoint spends on its peers. Zero fields mean defaults;
// negative ones are errors, except where a field says otherwise.
type Limits struct {
	// Frame is the longest frame body sent, in bytes, routes included. It must
	// not exceed the hub's. Default 256 KiB. See Endpoint.SetFrameLimit.
	Frame int
	// Channels bounds the channels that peers have open here. When it is
	// reached, the one that has been idle longest is closed if that is more than
	// ten minutes; otherwise one of the source or identity that has most, as long as
	// that has more than the source of the newcomer. Default 4,096.
	Channels int
	// ChannelsPerSource bounds them for one source. When it is reached, the one of
	// the source that has been idle longest is closed if that is more than ten
	// minutes; otherwise new ones are refused. Default 512.
	ChannelsPerSource int
	// HalfOpen bounds handshakes that peers have begun and not finished. When it
	// is reached, the oldest gives way if it is older than two seconds, otherwise
	// one of the source that has most, as for Channels. Default 256.
	HalfOpen int
	// HalfOpenPerSource bounds them for one source. Default 16.
	HalfOpenPerSource int
	// Rate is how many first messages a second one source may send for long,
	// and Burst how many at once; more are dropped before they cost a
	// Diffie-Hellman. Defaults 10 and 32.
	Rate  float64
	Burst int
	// Sources is how many sources are told apart; the rest share one allowance.
	// Default 4,096.
	Sources int
	// Dials bounds the handshakes begun here and not finished. Default DefaultDials.
	Dials int
	// Workers is how many goroutines do the handshakes of peers, whose sources take
	// turns. Default: half of GOMAXPROCS, one at least. One more does handshakes with
	// long change histories and looks at the credentials that peers show anew.
	Workers int
	// Handshake is how long a handshake may take, in both roles. Default 30 s.
	Handshake time.Duration
	// Probe is how long a sealmq peer may be silent after we sent something
	// until it is asked whether it is there; Dead is when it is given up,
	// counted from the same message. Defaults 5 s and 20 s. Dead negative: never.
	Probe, Dead time.Duration
	// Idle is how long nothing may come from a sealmq peer before it is asked,
	// even if nothing was sent. It is given up Dead after that. Default 2 minutes;
	// negative: never.
	Idle time.Duration
}

// Validate reports settings that cannot work.
func (l Limits) Validate() error {
	for _, f := range []struct {
		name  string
		value int64
	}{
		{"Frame", int64(l.Frame)}, {"Channels", int64(l.Channels)},
		{"ChannelsPerSource", int64(l.ChannelsPerSource)}, {"HalfOpen", int64(l.HalfOpen)},
		{"HalfOpenPerSource", int64(l.HalfOpenPerSource)}, {"Burst", int64(l.Burst)},
		{"Sources", int64(l.Sources)}, {"Dials", int64(l.Dials)}, {"Workers", int64(l.Workers)},
		{"Handshake", int64(l.Handshake)}, {"Probe", int64(l.Probe)},
	} {
		if f.value < 0 {
			return fmt.Errorf("channel: limit %s is negative", f.name)
		}
	}
	l = l.withDefaults()
	switch {
	case !(l.Rate > 0):
		return errors.New("channel: limit Rate is not a positive number")
	case l.Frame < minFrame || l.Frame > route.MaxFrame:
		return fmt.Errorf("channel: limit Frame is %d, want %d to %d", l.Frame, minFrame, route.MaxFrame)
	case l.Dead > 0 && l.Dead <= l.Probe:
		return fmt.Errorf("channel: limit Dead (%v) is not longer than Probe (%v)", l.Dead, l.Probe)
	}
	return nil
}

// minFrame leaves room for a handshake.
const minFrame = 4 << 10

// DefaultDials is the default of Limits.Dials.
const DefaultDials = 256

func (l Limits) withDefaults() Limits {
	set(&l.Frame, route.DefaultFrame)
	set(&l.Channels, 4096)
	set(&l.ChannelsPerSource, 512)
	set(&l.HalfOpen, 256)
	set(&l.HalfOpenPerSource, 16)
	set(&l.Rate, 10)
	set(&l.Burst, 32)
	set(&l.Sources, 4096)
	set(&l.Dials, DefaultDials)
	set(&l.Workers, max(1, runtime.GOMAXPROCS(0)/2))
	set(&l.Handshake, 30*time.Second)
	set(&l.Probe, 5*time.Second)
	set(&l.Dead, 20*time.Second)
	set(&l.Idle, 2*time.Minute)
	return l
}

func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) validate() error {
	switch {
	case c.Identity == nil && c.hooks.side == nil:
		return errors.New("channel: Config.Identity is missing")
	case c.Registry == nil:
		return errors.New("channel: Config.Registry is missing")
	case c.Router == nil:
		return errors.New("channel: Config.Router is missing")
	case c.Deliver == nil:
		return errors.New("channel: Config.Deliver is missing")
	}
	return c.Limits.Validate()
}
