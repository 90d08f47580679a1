package device

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/pinfile"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// Message is what a program receives. It belongs to the receiver.
type Message = node.Message

// MessageID names a message.
type MessageID = node.MessageID

// Access says who besides this program may reach an address.
type Access = node.Access

// LostError is what Receive returns once in place of messages that a full mailbox
// dropped.
type LostError = node.LostError

// closeFlush bounds how long Close waits for the last frames to be acknowledged.
const closeFlush = time.Second

// Node is a device on a hub: it keeps itself connected, listens, dials, sends and
// receives. Make one with Connect. All methods are safe for concurrent use.
type Node struct {
	cfg      Config
	clientID string
	log      *slog.Logger
	local    *node.Node
	endpoint *channel.Endpoint
	out      *outbox
	in       inbound
	link     *uplink
	// overStream says that the hub is reached over TCP, where each connection has a hub
	// address of its own.
	overStream bool
	events     *events
	early      early
	calls      calls
	// graves are the addresses of channels that have ended. Without, what is sent along an
	// old return route would leave in plain towards the hub, since the first hop is no
	// worker of this node any more.
	graves    *addresses
	plain     *addresses    // that Send has sent to
	numbers   *pinfile.File // of claims seen; in memory
	renewing  sync.Once     // starts renewClaims
	unclaimed chan struct{} // the hub did not take a claim

	cancel context.CancelFunc // ends the uplink
	tasks  sync.WaitGroup     // goroutines; Add only under mu while not closed

	stopped context.Context // ends when the node can do nothing more; its cause says why
	stop    context.CancelCauseFunc

	mu         sync.Mutex
	closed     bool
	listeners  map[string]*Listener
	forwarders map[*Forwarder]struct{}
	byAddress  map[string][]*Forwarder // by M, the address on this device
	channels   map[*Channel]struct{}
	closeDone  chan struct{}
	lineages   map[[16]byte]struct{} // of the channels dialled here
	// redials has one for each attempt to make a channel again, waits for each of those
	// that may wait for its peer.
	redials, waits chan struct{}

	online chan struct{} // closed and replaced when the node gets online
	lost   losses        // guarded by mu: for the next Flush

	deliveries    *deliveries
	outboxes      *outboxes
	lineageSecret func(label string) [32]byte
}

// Connect connects to the hub at a URL and returns once frames can flow. It makes
// one attempt, or with Config.KeepTrying as many as ctx allows; from then on the
// node reconnects by itself. ctx bounds Connect alone.
//
// The URL is mqtt://, mqtts://, ws://, wss:// or tcp://, with optional user name and
// password, and with "?hub=I…" for the identifier that the hub has to prove.
//
// Errors: ErrURL, ErrClearPassword, ErrHubAway (ErrNotHub and ErrNoAnswer are kinds of
// it), ErrHubRefused (ErrBadCredentials, ErrNotAllowed, ErrHubBusy and others),
// ErrWrongHub, ErrTimeout, or that of ctx.
func Connect(ctx context.Context, hub string, config Config) (*Node, error) {
	u, err := parseURL(hub)
	if err != nil {
		return nil, err
	}
	cfg, err := config.resolved(u)
	if err != nil {
		return nil, err
	}
	if cfg.Identity == nil {
		return nil, errors.New("device: configuration: Identity is missing")
	}
	n, err := newNode(u, cfg)
	if err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	go n.link.run(run)
	select {
	case err = <-n.link.first:
	case <-ctx.Done():
		err = ctxError(ctx, "connecting to "+u.String())
	}
	if err != nil {
		_ = n.Close()
		return nil, err
	}
	return n, nil
}

// Check returns what [Connect] would refuse before it connects: the URL of the hub,
// settings, a file of known hubs that cannot be read. The identity may still be missing.
func Check(hub string, config Config) error {
	u, err := parseURL(hub)
	if err != nil {
		return err
	}
	cfg, err := config.resolved(u)
	if err != nil {
		return err
	}
	_, err = cfg.hubMemory(u).pinned()
	return err
}

// newNode puts the parts together; nothing runs but idle goroutines yet.
func newNode(u hubURL, cfg Config) (*Node, error) {
	if cfg.OneShot {
		cfg.Suffix = hubproto.OneShotName("x")[2:]
	}
	n := &Node{
		cfg: cfg, clientID: cfg.clientID(), log: cfg.Logger,
		out:           newOutbox(cfg.QueuedFrames, cfg.QueuedBytes),
		listeners:     make(map[string]*Listener),
		forwarders:    make(map[*Forwarder]struct{}),
		byAddress:     make(map[string][]*Forwarder),
		channels:      make(map[*Channel]struct{}),
		closeDone:     make(chan struct{}),
		lineages:      make(map[[16]byte]struct{}),
		lineageSecret: cfg.Identity.Secret,
		numbers:       pinfile.Open(""),
		graves:        newAddresses(),
		plain:         newAddresses(),
		unclaimed:     make(chan struct{}, 1),
	}
	n.early.n = n
	n.stopped, n.stop = context.WithCancelCause(context.Background())
	redials, waits := redialShares(cfg.ChannelLimits)
	n.redials, n.waits = make(chan struct{}, redials), make(chan struct{}, waits)
	n.deliveries = newDeliveries(n)
	if u.scheme == "tcp" {
		n.overStream = true
		// Nothing there keeps two programs from having the same name at once.
		own := rand.Text()
		n.lineageSecret = func(label string) [32]byte { return cfg.Identity.Secret(own + label) }
	}
	var err error
	n.local, err = node.New(node.Config{
		Uplink:          node.UplinkFunc(n.sendUp),
		MailboxMessages: cfg.MailboxMessages, MailboxBytes: cfg.MailboxBytes, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("device: configuration: %w", err)
	}
	for _, addr := range cfg.Mailboxes {
		if err := n.local.OpenMailbox(addr, Access{Channels: true}); err != nil {
			_ = n.local.Close()
			return nil, fmt.Errorf("device: configuration: mailbox: %w", err)
		}
	}
	up, err := n.uplinkConfig(u)
	if err != nil {
		_ = n.local.Close()
		return nil, err
	}
	n.link = newUplink(up)
	if d, ok := n.link.dialer.(*provingDialer); ok {
		d.hub = &n.link.hub
	}
	n.endpoint, err = channel.NewEndpoint(channel.Config{
		Identity: cfg.Identity, Registry: cfg.Registry, Router: router{n}, Deliver: n.deliver,
		Authorities: cfg.Authorities, Credential: cfg.Credential, Epoch: n.link.epoch,
		Logger: cfg.Logger, Limits: cfg.ChannelLimits, HelloFeatures: cfg.features,
	})
	if err != nil {
		_ = n.local.Close()
		return nil, fmt.Errorf("device: configuration: %w", err)
	}
	n.endpoint.SetOnline(false)
	n.online = make(chan struct{})
	n.events = newEvents(cfg.OnEvent)
	n.out.onFail = func(err error) {
		n.log.Warn("message given up", "err", err)
		n.events.emit(Event{Kind: EventSendFailed, Err: err})
	}
	if n.outboxes, err = n.openOutboxes(); err != nil {
		n.cancelUnstarted()
		return nil, err
	}
	return n, nil
}

// cancelUnstarted ends a node whose link has never run.
func (n *Node) cancelUnstarted() {
	n.cancel = func() {}
	n.link.stop(ErrClosed)
	close(n.link.ended)
	_ = n.Close()
}

func (n *Node) uplinkConfig(u hubURL) (uplinkConfig, error) {
	maxPacket := n.cfg.Limits.Frame + packetHeadroom
	limits := n.cfg.Limits
	limits.Frame = min(limits.Frame+packetHeadroom, route.MaxFrame) // the hub adds to return routes
	memory := n.cfg.hubMemory(u)
	memory.met = func(hub identity.Identifier) { n.events.emit(Event{Kind: EventHubRemembered, Hub: hub}) }
	pin := n.cfg.Hub
	if pin.IsZero() {
		var err error
		if pin, err = memory.pinned(); err != nil {
			return uplinkConfig{}, err
		}
	}
	plain := &mqttDialer{
		cfg: mqttConfig{
			hub: u.String(), clientID: n.clientID, root: n.cfg.Root,
			keepAlive: n.cfg.KeepAlive, opening: n.cfg.ConnectTimeout, writeWait: n.cfg.WriteTimeout,
			maxPacket: maxPacket, log: n.log,
			login: func(context.Context, *tls.ConnectionState) (string, string, error) {
				return n.cfg.Username, n.cfg.Password, nil
			},
		},
		transport: newTransport(u, n.cfg.TLS, n.cfg.DialNetwork, maxPacket),
	}
	return uplinkConfig{
		dialer:  n.overTCP(u, limits, func() linkDialer { return n.proving(u, plain, memory, limits) }),
		hubName: u.String(), out: n.out, in: &n.in, limits: limits, sendLimit: n.cfg.Limits.Frame,
		helloWait: n.cfg.HelloTimeout, maxPause: n.cfg.MaxReconnectPause, persist: n.cfg.KeepTrying,
		hub: hubIdentity{pin: pin, proxied: n.cfg.InsecureTLSProxy, seen: n.cfg.Registry, log: n.log}, memory: memory,
		log: n.log, now: n.cfg.Identity.Now, receive: n.receive, noticed: n.noticed, changed: n.changed,
	}, nil
}

// changed follows the uplink's state. It runs on the uplink's goroutine.
func (n *Node) changed(s State, err error) {
	switch s {
	case Online:
		n.endpoint.SetFrameLimit(int(n.link.frameLimit.Load()))
		n.endpoint.SetOnline(true)
		n.mu.Lock()
		close(n.online)
		n.online = make(chan struct{})
		n.mu.Unlock()
		n.early.begin()
		n.events.emit(Event{Kind: EventOnline})
		n.spawn(func() { n.reregister(nil) })
	case Offline:
		n.endpoint.SetOnline(false)
		n.events.emit(Event{Kind: EventOffline, Err: err})
	case Stopped:
		n.endpoint.SetOnline(false)
		n.stop(err)
		n.events.emit(Event{Kind: EventStopped, Err: err})
	}
}

// spawn runs fn on a goroutine that Close waits for; false once the node closes.
func (n *Node) spawn(fn func()) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.tasks.Go(fn)
	return true
}

// receive takes a frame from the link. It does not block.
func (n *Node) receive(v *route.View, class route.Class) {
	from, hub := fromHub(v)
	if n.link.stock.Load() {
		// Only a sealmq hub's own frames can be told by their form.
		if hub = false; n.registeredAtStock(v) {
			return
		}
	}
	if hub && v.OnwardLen() == 1 {
		// The hub's answers to registrations are told apart before the address is
		// looked up: to everybody else it is a name of the listener.
		if first := v.FirstHop(); n.registered(string(first.Value), from, v.Payload(), true) {
			return
		}
	}
	f := v.Frame()
	f.Payload = f.Payload[:len(f.Payload):len(f.Payload)]
	o := node.Origin{Via: node.Forwarded, FromHub: hub}
	if first, ok := f.Return.First(); ok {
		o.Source = first.Value
	}
	if n.early.keep(o, f, class) {
		return
	}
	n.local.Inject(o, f, class)
}

// deliver takes a message that came through a channel. It does not block.
func (n *Node) deliver(d channel.Delivery) {
	if len(d.Frame.Onward) == 1 && d.Frame.Onward[0] == deliveryRoute[0] {
		n.deliveries.receive(&d)
		return
	}
	if d.Frame.Onward.Equal(noticeRoute) && n.noticedInside(&d) {
		return
	}
	n.local.Inject(node.Origin{
		Via: node.Channel, Peer: d.Channel.Peer().Identifier,
		Listener: d.Listener, Encryptor: d.Channel.EncryptorAddress(),
	}, d.Frame, d.Class)
}

// noticeRoute is where notices go.
var noticeRoute = route.To(hubproto.NoticeTarget)

// noticedInside takes a notice that came through a channel to the hub itself. As outside,
// only what returns to the hub and nowhere else is the hub's own; false for other frames.
func (n *Node) noticedInside(d *channel.Delivery) bool {
	hub, proven := n.Hub()
	if !proven || d.Channel.Peer().Identifier != hub ||
		!d.Frame.Return.Equal(route.To(d.Channel.EncryptorAddress(), hubproto.NoticeSource)) {
		return false
	}
	n.in.notices.Add(1)
	nt, err := hubproto.ParseNotice(d.Frame.Payload)
	switch {
	case err != nil:
		n.in.dropped[dropMalformed].Add(1)
	case nt.Reason == hubproto.ReasonTakenOver: // that is about a connection
		n.in.dropped[dropUnexpected].Add(1)
	default:
		n.noticed(nt)
	}
	return true
}

// sendUp puts a frame into the outbox, for the local node.
func (n *Node) sendUp(ctx context.Context, f route.Frame, c route.Class) error {
	first, ok := f.Onward.First()
	if !ok || !first.IsLocal() {
		return fmt.Errorf("%w: first hop %s is not a local address of the hub", ErrUnknownAddress, first)
	}
	if err := n.checkRoutes(f.Onward, f.Return); err != nil {
		return err
	}
	size := f.EncodedLen()
	if limit := int(n.link.frameLimit.Load()); size > limit {
		return fmt.Errorf("%w: the frame has %d bytes, the limit is %d; send it in pieces", ErrTooLarge, size, limit)
	}
	if c := callOf(ctx); c != nil && c.lost == nil {
		last, _ := f.Return.Last()
		c.expect(first, last)
	}
	return n.out.put(ctx, first.Value, route.AppendFrame(make([]byte, 0, size), &f), c)
}

// checkRoutes refuses routes that the hub or the peer would refuse.
func (n *Node) checkRoutes(routes ...route.Route) error {
	for _, r := range routes {
		if err := n.cfg.Limits.CheckRoute(r); err != nil {
			return fmt.Errorf("%w: %w", ErrRoute, err)
		}
		if slices.Contains(r, route.Local("")) {
			return fmt.Errorf("%w: an address in it is empty", ErrRoute)
		}
	}
	return nil
}

// router gives the secure channels their view of the node.
type router struct{ n *Node }

// Register implements channel.Router. The addresses are those of listeners, which
// are for everybody to reach, and unguessable ones of handshakes and channels.
func (r router) Register(addr string, h func(channel.Inbound)) error {
	return r.register(addr, Access{Forwarders: true, Channels: true}, h)
}

// RegisterLocal registers an address that only this program may reach: a channel's
// encryptor, where whatever arrives is sealed as our own words.
func (r router) RegisterLocal(addr string, h func(channel.Inbound)) error {
	return r.register(addr, Access{}, h)
}

func (r router) register(addr string, access Access, h func(channel.Inbound)) error {
	return r.n.local.RegisterFunc(addr, access,
		func(f route.Frame, c route.Class, o node.Origin) {
			source := o.Source
			switch {
			case o.Via == node.Local:
				f.Payload = append([]byte(nil), f.Payload...) // it is the sender's
			case len(f.Onward) > 1 && isHex32(addr):
				// Handshakes and decryptors are where a route ends. Only this program
				// may send on through a channel.
				r.n.in.dropped[dropThrough].Add(1)
				return
			case o.Via == node.Channel:
				source = o.Peer.String()
			}
			h(channel.Inbound{Frame: f, Class: c, Source: source, FromHub: o.FromHub, MayWait: r.n.overStream})
		})
}

// Unregister implements channel.Router.
func (r router) Unregister(addr string) {
	if isHex32(addr) {
		r.n.graves.add(addr)
	}
	r.n.local.Remove(addr)
}

// Send implements channel.Router.
func (r router) Send(ctx context.Context, f route.Frame, c route.Class) error {
	return r.n.send(ctx, f, c)
}

// send routes a frame of this program. A channel as first hop makes it wait for
// room, which the worker at that address could not.
func (n *Node) send(ctx context.Context, f route.Frame, c route.Class) error {
	if c := callOf(ctx); c != nil && c.lost == nil && len(f.Onward) > 1 {
		// Through a channel to the hub: what it says of the frame inside is about the call.
		last, _ := f.Return.Last()
		c.expect(f.Onward[1], last)
	}
	if taken, err := n.endpoint.Forward(ctx, f); taken {
		return err
	}
	if first, ok := f.Onward.First(); ok && first.IsLocal() && n.graves.has(first.Value) {
		return fmt.Errorf("%w: the route leads through a channel that has ended", ErrPeerClosed)
	}
	return n.local.Send(ctx, f, c)
}

// Identifier returns who this device is.
func (n *Node) Identifier() identity.Identifier { return n.cfg.Identity.Identifier() }

// ClientID returns the MQTT client id: the device's name in the hub's topics.
func (n *Node) ClientID() string { return n.clientID }

// Hub returns the identifier that the hub has proved, and false if it has proved
// none. Remember it and give it to Config.Hub the next time.
func (n *Node) Hub() (identity.Identifier, bool) {
	n.link.mu.Lock()
	defer n.link.mu.Unlock()
	return n.link.hubID, !n.link.hubID.IsZero()
}

// State returns the state of the connection to the hub.
func (n *Node) State() State {
	s, _ := n.link.status()
	return s
}

// Done returns a channel that is closed when the node has stopped for good: by
// Close, or because the hub gave its place to another connection or refused it.
// Err says why.
func (n *Node) Done() <-chan struct{} { return n.stopped.Done() }

// Err returns nil while the node works, and afterwards why it stopped.
func (n *Node) Err() error { return context.Cause(n.stopped) }

// Stats returns the node's counters.
func (n *Node) Stats() Stats {
	s := Stats{
		State: n.State(), Connects: n.link.connects.Load(),
		Dropped: make(map[string]uint64), EventsDropped: n.events.droppedCount(),
		Delivery: n.deliveries.stats(), Local: n.local.Stats(), Channels: n.endpoint.Stats(),
	}
	n.out.addStats(&s)
	n.in.addStats(&s)
	return s
}

// Flush waits until the hub has acknowledged everything sent before. Frames of
// transient class count as acknowledged when they have been written.
//
// Errors: ErrFrameKills; *UndeliveredError once, when the hub has said since the last
// Flush that it could not deliver what Send had sent in plain (of what goes through
// a channel, Channel.Flush says so), one for each address and reason, joined where
// there are more; ErrTimeout or that of ctx; what stopped the node.
func (n *Node) Flush(ctx context.Context) error {
	if err := n.out.flush(ctx); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lost.take()
}

// Close closes every channel, tells the hub good-bye and ends the node. It waits up
// to a second for the hub to acknowledge what was sent; use Flush before to be
// sure. Where the connection takes nothing more, Close takes a few seconds. When it
// returns no goroutine of the node is left, except callbacks that are running: they
// are not waited for, so Close may be called from one. Closing again waits for the
// first Close.
func (n *Node) Close() error {
	if n.State() == Online {
		// Acknowledgements of the program first: they need the channels.
		ctx, cancel := context.WithTimeout(context.Background(), closeFlush)
		n.deliveries.flush(ctx)
		cancel()
	}
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		<-n.closeDone
		return nil
	}
	n.closed = true
	channels := make([]*Channel, 0, len(n.channels))
	for c := range n.channels {
		channels = append(channels, c)
	}
	n.mu.Unlock()
	defer close(n.closeDone)

	for _, c := range channels {
		c.end(ErrClosed)
	}
	_ = n.endpoint.Close()
	if n.State() == Online {
		ctx, cancel := context.WithTimeout(context.Background(), closeFlush)
		_ = n.out.flush(ctx)
		cancel()
	}
	n.cancel()
	<-n.link.ended
	n.stop(ErrClosed)
	n.tasks.Wait()
	n.early.end()
	_ = n.local.Close()
	n.outboxes.close()
	n.events.close()
	return nil
}

// join returns a context that ends with ctx or with the node.
func (n *Node) join(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(n.stopped, func() { cancel(context.Cause(n.stopped)) })
	return ctx, func(err error) {
		unhook()
		cancel(err)
	}
}

// failure makes an error of this package of one that a lower layer returned for a
// call whose context was ctx, joined with the node.
func (n *Node) failure(ctx context.Context, what string, err error) error {
	switch {
	case err == nil:
		return nil
	case n.Err() != nil && (ctx.Err() != nil || errors.Is(err, node.ErrClosed) || errors.Is(err, channel.ErrClosed)):
		return n.Err()
	case errors.Is(err, channel.ErrTooLarge):
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	case errors.Is(err, node.ErrNotMailbox):
		return fmt.Errorf("%w: %w", ErrNoMailbox, err)
	case ctx.Err() != nil && !errors.Is(err, ErrTimeout):
		return ctxError(ctx, what)
	}
	return err
}
