package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/loglimit"
	"github.com/sealmq/sealmq/route"
)

// DefaultAddress is where a stock Ockam node listens for channels.
const DefaultAddress = "api"

// sealedHeadroom is what a frame may be longer for having been sealed and routed.
const sealedHeadroom = 64 << 10

// Config of a Server. Bridge and Identity are required.
type Config struct {
	// Bridge is the router.
	Bridge *bridge.Bridge
	// Identity is the hub's: who peers talk to.
	Identity *identity.Private
	// Address is the listener's. Default DefaultAddress.
	Address string
	// Authority issues the credentials that let peers register forwarders. Without
	// one nobody does.
	Authority *identity.Identity
	// MembersOnly admits only peers that show a credential of Authority, whatever
	// its attributes. For doors that are closed to strangers otherwise.
	MembersOnly bool
	// Limits are those of the bridge.
	Limits route.Limits
	// Channels bounds what peers can cost before and after the handshake. Its Frame
	// is ignored. What it says of one source is for an identity that the front has
	// proved, or else for an IP address or IPv6 network of 64 bits; there the defaults
	// are half of Channels, a quarter of HalfOpen, and a Rate of 50 with a Burst of
	// 200. Other defaults are those of package channel.
	Channels channel.Limits
	// PerIdentity is how many channels one identity may use at one time. Default 64.
	PerIdentity int
	// Registry remembers the identities of peers. Default: in memory.
	Registry identity.Registry
	// Clock tells the time for validity checks; nil means time.Now.
	Clock func() time.Time
	// Counters takes the events; nil counts nothing.
	Counters *Counters
	// Logger hears of refusals; nil discards.
	Logger *slog.Logger
}

// Server listens for secure channels at an address of the hub. Make one with New.
type Server struct {
	cfg      Config
	node     *bridge.Local
	endpoint *channel.Endpoint
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc

	mu      sync.Mutex
	members map[*channel.Channel]*member
	byID    map[identity.Identifier]int // members of an identity
	senders map[string]*member          // by the address that the peer's frames come to
	closed  bool
	wg      sync.WaitGroup

	lines *loglimit.Lines // of refusals in the log; each is counted
}

// refusalLines is how many refusals a second there may be in the log.
const refusalLines = 10

// refused logs a refusal, unless there are too many.
func (s *Server) refused(why string, who identity.Identifier) {
	if unlogged, ok := s.lines.Next(); ok {
		s.cfg.Logger.Info("refused at the hub's channel listener", "why", why, "peer", who, "unlogged", unlogged)
	}
}

// New starts listening. Close ends it, before the bridge.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Bridge == nil || cfg.Identity == nil:
		return nil, errors.New("api: Config.Bridge and Config.Identity are required")
	case cfg.PerIdentity < 0:
		return nil, errors.New("api: Config.PerIdentity is negative")
	case cfg.MembersOnly && cfg.Authority == nil:
		return nil, errors.New("api: Config.MembersOnly without an Authority would admit nobody")
	}
	if err := cfg.Limits.Validate(); err != nil {
		return nil, fmt.Errorf("api: %w", err)
	}
	cfg.Limits = cfg.Limits.WithDefaults()
	cfg.Address = cmp.Or(cfg.Address, DefaultAddress)
	cfg.PerIdentity = cmp.Or(cfg.PerIdentity, 64)
	cfg.Logger = cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler))
	if cfg.Registry == nil {
		cfg.Registry = identity.NewMemoryRegistry(0)
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	s := &Server{cfg: cfg, node: bridge.NewLocal(cfg.Bridge), members: make(map[*channel.Channel]*member), byID: make(map[identity.Identifier]int), senders: make(map[string]*member)}
	s.lines = loglimit.New(refusalLines)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	cc := channel.Config{
		Identity: cfg.Identity, Registry: cfg.Registry, Router: router{s}, Deliver: s.deliver,
		Limits: cfg.Channels, Clock: cfg.Clock, Logger: cfg.Logger,
	}
	limitSources(&cc.Limits)
	cc.Limits.Frame = min(cfg.Limits.Frame+sealedHeadroom, route.MaxFrame)
	policy := channel.TrustEveryone
	if cfg.Authority != nil {
		cc.Authorities = []*identity.Identity{cfg.Authority}
		if cfg.MembersOnly {
			policy = channel.TrustCredential(cfg.Authority, nil)
		}
	}
	var err error
	if s.endpoint, err = channel.NewEndpoint(cc); err != nil {
		s.node.Close()
		return nil, fmt.Errorf("api: %w", err)
	}
	if _, err := s.endpoint.Listen(cfg.Address, policy, channel.ListenOptions{}); err != nil {
		s.Close()
		return nil, fmt.Errorf("api: %w", err)
	}
	return s, nil
}

// limitSources fills in what one source may have. Many peers may share an address.
func limitSources(l *channel.Limits) {
	l.Channels, l.HalfOpen = cmp.Or(l.Channels, 4096), cmp.Or(l.HalfOpen, 512)
	l.ChannelsPerSource = cmp.Or(l.ChannelsPerSource, max(1, l.Channels/2))
	l.HalfOpenPerSource = cmp.Or(l.HalfOpenPerSource, max(1, l.HalfOpen/4))
	if l.Rate == 0 {
		l.Rate = 50
	}
	l.Burst = cmp.Or(l.Burst, max(1, int(4*l.Rate)))
}

// Stats returns the counters of the channels.
func (s *Server) Stats() channel.EndpointStats { return s.endpoint.Stats() }

// Members returns the number of peers that have a port.
func (s *Server) Members() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.members)
}

// Close ends the listener and every channel, and waits for the server's
// goroutines. Peers are told.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	_ = s.endpoint.Close() // never fails
	s.cancel()
	s.wg.Wait()
	s.node.Close()
}

// spawn runs f on a goroutine that Close waits for; false once it closes.
func (s *Server) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(f)
	return true
}

// router gives the channels their place in the hub. An address that a handshake or
// channel makes up for itself stands in the hub as bridge.PeerAddress makes it, in
// return routes too: to a device a bare one would be the hub's own word, and none
// of a peer's.
type router struct{ s *Server }

var _ channel.LocalRouter = router{}

// Register implements channel.Router. The listener is there for everybody; the
// addresses of handshakes and channels for those whom they answered.
func (r router) Register(addr string, h func(channel.Inbound)) error {
	if addr == r.s.cfg.Address {
		return r.s.node.RegisterFor(bridge.ReachGuests, addr, func(in bridge.Inbound) {
			h(channel.Inbound{Frame: in.Frame, Class: in.Class, Source: source(&in)})
		})
	}
	return r.register(bridge.ReachPeer, bridge.PeerAddress(addr), func(in channel.Inbound) {
		r.s.awaitRoom(addr, len(in.Frame.Payload))
		in.MayWait = true
		h(in)
	})
}

// source is what a first message is charged to: its hub address would be a new one with
// each connection of a stranger.
func source(in *bridge.Inbound) string {
	if in.From.Proven {
		return in.From.Identity.String()
	}
	if n := in.Network(); n.IsValid() {
		return n.String()
	}
	return in.Source
}

// RegisterLocal implements channel.LocalRouter.
func (r router) RegisterLocal(addr string, h func(channel.Inbound)) error {
	return r.register(bridge.ReachLocal, addr, h)
}

func (r router) register(reach bridge.Reach, addr string, h func(channel.Inbound)) error {
	return r.s.node.RegisterFor(reach, addr, func(in bridge.Inbound) {
		h(channel.Inbound{Frame: in.Frame, Class: in.Class, Source: in.Source})
	})
}

// Unregister implements channel.Router.
func (r router) Unregister(addr string) {
	r.s.node.Unregister(addr)
	r.s.node.Unregister(bridge.PeerAddress(addr))
}

// Send implements channel.Router. What an endpoint sends returns nowhere, or to an
// address that it has registered.
func (r router) Send(ctx context.Context, f route.Frame, c route.Class) error {
	if own, ok := f.Return.First(); ok {
		f.Return = route.To(bridge.PeerAddress(own.Value))
	}
	return r.s.node.Send(ctx, f, c)
}
