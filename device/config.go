package device

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// DefaultMailbox is the mailbox that every node has unless Config.Mailboxes says
// otherwise.
const DefaultMailbox = "app"

// Config says who a device is and how it connects. Identity is required; the zero
// value of everything else means a documented default. Connect copies it.
type Config struct {
	// Identity is who this device is. Required.
	Identity *identity.Private

	// Suffix tells programs with the same identity apart at the hub: the MQTT
	// client id is the identifier, or the identifier, "-" and this. Two connected
	// programs with the same client id throw each other off.
	Suffix string
	// OneShot uses a random suffix that the hub forgets soon after the connection
	// ends: for commands that run once, beside a program that runs for long. It
	// excludes Suffix.
	OneShot bool

	// Username and Password are what the hub's password file asks for. They
	// override those of the URL. Without them the device proves its identity to a
	// sealmq hub, over TLS or on this machine.
	Username, Password string
	// InsecurePasswordWithoutTLS sends the password to a hub on another machine also
	// without TLS, for everybody in between to read and use. Without it Connect
	// refuses.
	InsecurePasswordWithoutTLS bool
	// InsecureProofWithoutTLS proves the identity also to a hub on another machine
	// without TLS. Whoever is in between can then take over the connection, and hold
	// a proof back and use it in this device's place. Without it no proof is sent
	// there, and the hub lets the device in or not.
	InsecureProofWithoutTLS bool
	// HubCredential returns a credential for the hub, which is sent with the proof,
	// for hubs that let in devices with a credential; nil sends none. It is asked at
	// each login, so return the newest.
	HubCredential func() ([]byte, error)
	// Root is the hub's topic root. Default "sealmq".
	Root topics.Root
	// Hub is the hub's identifier, which it has to prove; "?hub=I…" in the URL
	// does the same. Zero: the first hub that proves an identity is kept to as
	// long as the node lives, or, with KnownHubs, for good.
	Hub identity.Identifier
	// KnownHubs names a file that remembers which identity the hub at a host and
	// port has proved, like SSH's known_hosts: "HOST:PORT IDENTIFIER" a line. A hub
	// that is another one than remembered is refused. Hub comes before it. Hubs
	// that say that their identity ends with their process are not remembered.
	// Programs may share the file. Empty: nothing is remembered.
	KnownHubs string
	// TLS is used for mqtts:// and wss://. Default: the system's roots, TLS 1.2 at
	// least, the URL's host as server name. It is cloned; a smaller MinVersion than
	// TLS 1.2 is raised.
	TLS *tls.Config
	// InsecureTLSProxy says that TLS ends at a proxy before the hub, so that the
	// hub's proof of identity is not bound to the TLS connection. Whoever controls
	// the proxy can then pass the hub's proof on.
	InsecureTLSProxy bool
	// DialNetwork opens network connections instead of a net.Dialer, for proxies
	// and tests.
	DialNetwork func(ctx context.Context, network, address string) (net.Conn, error)
	// KeepTrying makes Connect try until its context ends, instead of failing when
	// the first attempt does. Refusals are final in both cases.
	KeepTrying bool

	// KeepAlive is the longest silence before the connection is probed; a dead
	// one is noticed after one and a half times that and WriteTimeout. Whole
	// seconds, 5 s to 10 min. Default 30 s.
	KeepAlive time.Duration
	// ConnectTimeout bounds one attempt: network, TLS, CONNECT and SUBSCRIBE.
	// Default 15 s.
	ConnectTimeout time.Duration
	// WriteTimeout bounds one write to the network. Default 10 s.
	WriteTimeout time.Duration
	// HelloTimeout is how long to wait for the hub's answer to hello; a plain Ockam
	// hub gives none. Default 3 s, and 1 s for tcp:// hubs.
	HelloTimeout time.Duration
	// MaxReconnectPause is the longest pause between two attempts to connect; pauses
	// begin at about 0.3 s and double. After a long outage of the hub or network a
	// device is back as late as this. 1 s to 1 h. Default 30 s.
	MaxReconnectPause time.Duration

	// Limits bound what is accepted from the hub, and, with what the hub says, what
	// is sent. Zero fields mean 256 KiB a frame, 64 hops, 255 bytes an address.
	Limits route.Limits
	// QueuedFrames and QueuedBytes bound the outbox: what is sent but not yet
	// acknowledged by the hub. When it is full, sending waits. Defaults 8,192 and
	// 32 MiB, or twice the frame limit if that is more.
	QueuedFrames, QueuedBytes int

	// Mailboxes are addresses for Receive. They exist from Connect on, so nothing
	// sent before the first Receive is lost, and are open to peers of secure
	// channels only. Default: "app". MailboxMessages (default 1,024) and
	// MailboxBytes (default 4 MiB) bound each of them, and each Handle.
	Mailboxes                     []string
	MailboxMessages, MailboxBytes int

	// OutboxDir is the folder in which Node.Outbox keeps messages until the peer's
	// program has acknowledged them, sealed with a key of the identity; it is made if
	// it is missing, must be open to nobody else, and belongs to one node at a time.
	// Empty: they are kept in memory and end with the node. OutboxMessages (default
	// 4,096) and OutboxBytes (default 32 MiB) bound each outbox; when it is full,
	// posting waits.
	OutboxDir                   string
	OutboxMessages, OutboxBytes int

	// Registry keeps the identities met, and so which keys were rotated away. Default:
	// in memory, 4,096 of them; see identity.OpenRegistry for one that outlives the
	// process.
	Registry identity.Registry
	// KnownPeers remembers who is behind a forwarding address, and the newest claim
	// seen of that identity, beyond this node's life. Optional; see
	// KnownPeers.Policy.
	KnownPeers *KnownPeers
	// Authorities are those whose credentials are accepted from peers.
	Authorities []*identity.Identity
	// Credential returns our own credential for peers when a handshake needs it, and
	// again before one that was shown ends: then the newer one is shown on the open
	// channels, see channel.Config. nil shows none.
	Credential func() ([]byte, error)
	// ChannelLimits bound what peers can cost, and say when a silent one is given up:
	// by default 20 s after something was sent that nothing answers (Dead), 2 min 20 s
	// after the last sign of life with nothing to send (Idle, then Dead). Its Frame is
	// ignored.
	ChannelLimits channel.Limits

	features channel.Features // what is announced to peers; as given, what tests take away

	// OnEvent is called for each Event, in order, on a goroutine of its own; it may
	// call anything, Close included. When it is 256 events behind the oldest are
	// dropped and counted.
	OnEvent func(Event)
	// Logger gets what an operator wants to know; nil discards. Payloads and keys
	// are never logged.
	Logger *slog.Logger
}

// Defaults of Config.
const (
	defaultKeepAlive    = 30 * time.Second
	defaultConnect      = 15 * time.Second
	defaultWrite        = 10 * time.Second
	defaultHello        = 3 * time.Second
	defaultPause        = 30 * time.Second
	stockHello          = time.Second // where a hub that does not answer is usual
	defaultQueuedFrames = 8192
	defaultQueuedBytes  = 32 << 20
	defaultKnownPeers   = 4096

	defaultOutboxMessages = 4096
	defaultOutboxBytes    = 32 << 20
)

// packetHeadroom is what a hub's packet may have beyond the frame limit: the hub
// adds to the return route, and MQTT has a header.
const packetHeadroom = 64 << 10

// resolved returns the configuration with its defaults, or says what is wrong.
func (c Config) resolved(u hubURL) (Config, error) {
	bad := func(format string, args ...any) (Config, error) {
		return Config{}, fmt.Errorf("device: configuration: "+format, args...)
	}
	if err := c.Limits.Validate(); err != nil {
		return Config{}, err
	}
	c.Limits = c.Limits.WithDefaults()
	setDefault(&c.Root, topics.DefaultRoot)
	if _, err := topics.ParseRoot(string(c.Root)); err != nil {
		return Config{}, err
	}
	if c.Username == "" && c.Password == "" && u.hasUser {
		c.Username, c.Password = u.user, u.password
	}
	if c.Password != "" && u.scheme != "tcp" && !u.secure() && !u.loopback() && !c.InsecurePasswordWithoutTLS {
		return Config{}, fmt.Errorf("%w: %s has no TLS; use mqtts:// or wss://", ErrClearPassword, u)
	}
	switch {
	case !c.Hub.IsZero() && !u.pin.IsZero() && c.Hub != u.pin:
		return bad("Hub and the URL's ?hub= pin different hubs")
	case c.Hub.IsZero():
		c.Hub = u.pin
	}
	if c.OneShot && c.Suffix != "" {
		return bad("OneShot makes a suffix of its own; leave Suffix empty")
	}
	if c.Suffix != "" && hubproto.IsOneShot(c.clientID()) {
		return bad("Suffix %q looks like a random one-shot suffix, which the hub forgets; choose another", c.Suffix)
	}
	if id := c.clientID(); !topics.ValidDevice(id) {
		return bad("Suffix %q gives a client id that is not [A-Za-z0-9_-]{1,128}", c.Suffix)
	}
	for _, d := range []struct {
		name                string
		value               *time.Duration
		low, high, standard time.Duration
	}{
		{"KeepAlive", &c.KeepAlive, 5 * time.Second, 10 * time.Minute, defaultKeepAlive},
		{"ConnectTimeout", &c.ConnectTimeout, 10 * time.Millisecond, 10 * time.Minute, defaultConnect},
		{"WriteTimeout", &c.WriteTimeout, 10 * time.Millisecond, 10 * time.Minute, defaultWrite},
		{"HelloTimeout", &c.HelloTimeout, 10 * time.Millisecond, 10 * time.Minute, defaultHello},
		{"MaxReconnectPause", &c.MaxReconnectPause, time.Second, time.Hour, defaultPause},
	} {
		if d.value == &c.HelloTimeout && u.scheme == "tcp" {
			d.standard = stockHello
		}
		setDefault(d.value, d.standard)
		if *d.value < d.low || *d.value > d.high {
			return bad("%s is %v; it must be between %v and %v", d.name, *d.value, d.low, d.high)
		}
	}
	if c.KeepAlive%time.Second != 0 {
		return bad("KeepAlive is not whole seconds")
	}
	setDefault(&c.QueuedFrames, defaultQueuedFrames)
	setDefault(&c.QueuedBytes, max(defaultQueuedBytes, 2*c.Limits.Frame))
	setDefault(&c.OutboxMessages, defaultOutboxMessages)
	setDefault(&c.OutboxBytes, max(defaultOutboxBytes, 2*c.Limits.Frame))
	switch {
	case c.OutboxMessages < 1:
		return bad("OutboxMessages must be positive")
	case c.OutboxBytes < c.Limits.Frame:
		return bad("OutboxBytes (%d) is less than one frame (Limits.Frame, %d)", c.OutboxBytes, c.Limits.Frame)
	case c.QueuedFrames < 1:
		return bad("QueuedFrames must be positive")
	case c.QueuedBytes < c.Limits.Frame:
		return bad("QueuedBytes (%d) is less than one frame (Limits.Frame, %d)", c.QueuedBytes, c.Limits.Frame)
	}
	if c.Mailboxes == nil {
		c.Mailboxes = []string{DefaultMailbox}
	}
	c.Mailboxes = slices.Clone(c.Mailboxes)
	c.features = channel.FeatureDelivery &^ c.features
	c.Authorities = slices.Clone(c.Authorities)
	if c.Registry == nil {
		c.Registry = identity.NewMemoryRegistry(defaultKnownPeers)
	}
	c.ChannelLimits.Frame = c.Limits.Frame
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// clientID is the MQTT client id, which is also the device's name in topics.
func (c *Config) clientID() string {
	var own identity.Identifier
	if c.Identity != nil { // else it is a check
		own = c.Identity.Identifier()
	}
	id := own.String()
	if c.Suffix == "" {
		return id
	}
	return id + "-" + c.Suffix
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
