package bridge

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/loglimit"
	"github.com/sealmq/sealmq/internal/sources"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// Prefixes of the hub's own addresses.
const (
	prefixDevice  = "dev_"
	prefixStream  = "tcp_"
	prefixDynamic = "FWD_"
	prefixStatic  = "forward_to_"
)

// Bridge is the router. Make one with New.
type Bridge struct {
	cfg   Config
	epoch [hubproto.EpochLen]byte
	clock clock

	table    *table
	registry registry
	records  records
	ring     ring
	timers   timers

	mu      sync.Mutex
	devices map[string]*Port // by client id
	byOwner map[claimant]int // devices of an identity
	streams map[*Port]struct{}
	closed  bool

	drains  drains
	starved struct {
		mu sync.Mutex
		m  map[*Port]struct{}
		n  atomic.Int32
	}

	ports, attached atomic.Int64
	displaced       atomic.Uint64
	portSeq         atomic.Uint32
	queued, waiting level
	storing         atomic.Int64 // bytes of packets in outboxes that are not stored yet
	kicked          [KickClosing + 1]atomic.Uint64
	stripes         [numStripes]stripe

	guests *sources.Limiter[netip.Prefix] // hellos of guests
	hub    Link                           // the sender of what services answer

	lines *loglimit.Lines // in the log, of what peers can cause as often as they like

	storeClosed sync.Once // the line about a store that was closed before the bridge

	done chan struct{}
	wg   sync.WaitGroup
}

// New returns a running bridge with the services of this package registered.
// Close ends it.
func New(cfg Config) (*Bridge, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	b := &Bridge{
		cfg:     cfg,
		table:   newTable(),
		devices: make(map[string]*Port),
		byOwner: make(map[claimant]int),
		streams: make(map[*Port]struct{}),
		guests: sources.New[netip.Prefix](sources.Limits{
			Each: cfg.GuestRate, EachBurst: cfg.GuestBurst,
			Total: cfg.GuestTotalRate, TotalBurst: cfg.GuestTotalBurst, Known: guestNetworks,
		}),
		lines: loglimit.New(logLines),
		done:  make(chan struct{}),
	}
	_, _ = rand.Read(b.epoch[:]) // never fails (crypto/rand)
	b.clock.init(cfg.Now, cfg.mono)
	b.starved.m = make(map[*Port]struct{})
	b.drains.b = b
	b.registry.init(b)
	b.records.init(&b.ring)
	b.ring.init(b)
	b.timers.kick = make(chan struct{}, 1)
	b.hub.port = &Port{b: b, kind: portLocal, stripe: &b.stripes[0]}
	b.registerServices()
	b.wg.Go(b.runTimers)
	return b, nil
}

// logLines is how many lines a second there may be in the log of what peers cause.
const logLines = 10

// mayLog reports whether something that peers can cause as often as they like, and that
// is counted besides, gets a line in the log, and how many got none since the last line.
func (b *Bridge) mayLog() (unlogged loglimit.Unlogged, ok bool) { return b.lines.Next() }

// Close kicks every connection, forgets every queue in memory and waits for the
// bridge's goroutines. Calls that come later do nothing or return ErrClosed.
func (b *Bridge) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		b.wg.Wait()
		return nil
	}
	b.closed = true
	ports := make([]*Port, 0, len(b.devices)+len(b.streams))
	for _, p := range b.devices {
		ports = append(ports, p)
	}
	for p := range b.streams {
		ports = append(ports, p)
	}
	b.mu.Unlock()
	for _, p := range ports {
		p.mu.Lock()
		l := p.link
		p.mu.Unlock()
		if l != nil {
			b.kicked[KickClosing].Add(1)
			l.conn.Kick(KickClosing)
			l.Close(true)
		}
	}
	close(b.done)
	b.ring.close()
	b.wg.Wait()
	return nil
}

// spawn runs f on a goroutine of the bridge, or not at all when it is closed.
func (b *Bridge) spawn(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.wg.Go(f)
	return true
}

// keyed returns n bytes in hex that only the holder of the key can compute.
func (b *Bridge) keyed(n int, parts ...string) string {
	m := hmac.New(sha256.New, b.cfg.Key[:])
	for _, p := range parts {
		m.Write([]byte(p))
	}
	return hex.EncodeToString(m.Sum(nil)[:n])
}

// HubAddress returns the address that stands for a device in return routes.
func (b *Bridge) HubAddress(clientID string) string {
	return prefixDevice + b.keyed(16, "hub-address/1", clientID)
}

func randomAddress(prefix string) string {
	var r [16]byte
	_, _ = rand.Read(r[:]) // never fails (crypto/rand)
	return prefix + hex.EncodeToString(r[:])
}

func isOneShot(clientID string) bool { return hubproto.IsOneShot(clientID) }

// ConnectDevice gives an MQTT connection its place in the router, before its
// CONNACK is written. A device's port, with its queue and forwarders, outlives
// its connections; an earlier connection of the same client id is told that it
// is taken over and kicked. A guest gets a port of its own that ends with it.
//
// Errors: ErrRole, ErrClientID, ErrNotProven, ErrTooManyPorts, ErrClosed, or
// what the outbox's store says.
func (b *Bridge) ConnectDevice(p Principal, c Conn) (*Link, error) {
	p.Account, p.Grant = "", nil // the connection's; a port outlives it
	switch p.Role {
	case RoleGuest:
		port := b.newPort(portGuest, "", p)
		l := &Link{port: port, conn: c}
		if err := b.addStream(port, l); err != nil {
			return nil, err
		}
		return l, nil
	case RoleDevice:
	default:
		return nil, ErrRole
	}
	if !topics.ValidDevice(p.ClientID) {
		return nil, ErrClientID
	}
	l := &Link{conn: c}
	l.from = sender(p, l.network())
	for {
		port, err := b.devicePort(p, false)
		if errors.Is(err, ErrTooManyPorts) && b.displaceIdle() {
			port, err = b.devicePort(p, false)
		}
		if err != nil {
			return nil, err
		}
		switch err := port.connect(l, p); {
		case err == nil:
			return l, nil
		case !errors.Is(err, errGone):
			return nil, err
		}
		b.mu.Lock()
		if b.devices[p.ClientID] == port {
			delete(b.devices, p.ClientID)
			b.uncount(port)
		}
		b.mu.Unlock()
	}
}

// ConnectStream gives a stream connection (TCP) a port of its own with a random
// address. It is attached at once and ends with the connection. With RoleGuest it
// reaches only the services that are there for guests, and what frames that it
// received linked it with.
func (b *Bridge) ConnectStream(p Principal, c Conn) (*Link, error) {
	if p.Role != RoleDevice && p.Role != RoleGuest {
		return nil, ErrRole
	}
	p.Account, p.Grant = "", nil
	addr := randomAddress(prefixStream)
	port := b.newPort(portStream, addr, p)
	port.guest = p.Role == RoleGuest
	box, err := b.cfg.Outboxes(addr, false)
	if err != nil {
		return nil, err
	}
	port.box = box
	l := &Link{port: port, conn: c}
	l.from = sender(p, l.network())
	port.attached = true
	port.online.Store(true)
	port.cursor = box.Next()
	if err := b.addStream(port, l); err != nil {
		return nil, err
	}
	b.attached.Add(1)
	b.table.put(addr, port.self)
	return l, nil
}

func (b *Bridge) newPort(kind portKind, addr string, p Principal) *Port {
	port := &Port{
		b: b, kind: kind, addr: addr, clientID: p.ClientID, principal: p,
		stripe:   &b.stripes[b.portSeq.Add(1)&(numStripes-1)],
		timerIdx: -1,
		meter:    newMeter(&b.cfg),
	}
	if addr != "" {
		port.stamp = route.EncodeHops(route.To(addr))
	}
	port.self = &worker{port: port}
	return port
}

func (b *Bridge) addStream(p *Port, l *Link) error {
	p.link = l
	add := func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if err := b.roomForPort(); err != nil {
			return err
		}
		b.streams[p] = struct{}{}
		return nil
	}
	err := add()
	if errors.Is(err, ErrTooManyPorts) && b.displaceIdle() {
		err = add()
	}
	return err
}

// roomForPort counts one more port; b.mu is held.
func (b *Bridge) roomForPort() error {
	if b.closed {
		return ErrClosed
	}
	if b.ports.Load() >= int64(b.cfg.MaxPorts) {
		return ErrTooManyPorts
	}
	b.ports.Add(1)
	return nil
}

// displaceLook is how many devices are looked at for one that can be forgotten.
const displaceLook = 256

// displaceIdle makes room for another port where there is none: it forgets the device
// that has been away longest of a number chosen at random, with nothing waiting for it
// and no forwarder, as its time without a sight of it would. It returns false when there
// is none. So whoever comes under very many names keeps nobody out who registers.
func (b *Bridge) displaceIdle() bool {
	look := make([]*Port, 0, displaceLook)
	b.mu.Lock()
	for _, p := range b.devices {
		if look = append(look, p); len(look) == displaceLook {
			break
		}
	}
	b.mu.Unlock()
	var victim *Port
	longest := int64(0)
	for _, p := range look {
		if b.registry.registered(p) {
			continue
		}
		p.mu.Lock()
		if !p.gone && p.idle() && (victim == nil || p.offlineSince < longest) {
			victim, longest = p, p.offlineSince
		}
		p.mu.Unlock()
	}
	if victim == nil {
		return false
	}
	victim.mu.Lock()
	if victim.gone || !victim.idle() { // it is back
		victim.mu.Unlock()
		return false
	}
	b.displaced.Add(1)
	victim.end(notes{})
	return true
}

// devicePort returns the port of a client id, made if there is none. One that a
// restart restores is in no need of room in its identity's quota.
func (b *Bridge) devicePort(p Principal, restored bool) (*Port, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	owner := p.claimant()
	full := !restored && !p.Identity.IsZero() && b.byOwner[owner] >= b.cfg.PortsPerIdentity
	if port := b.devices[p.ClientID]; port != nil {
		if b.closed {
			return nil, ErrClosed
		}
		if p.Proven && port.counted != owner {
			if full {
				return nil, ErrPortQuota
			}
			b.uncount(port)
			b.count(port, owner)
		}
		return port, nil
	}
	if full {
		return nil, ErrPortQuota
	}
	if err := b.roomForPort(); err != nil {
		return nil, err
	}
	box, err := b.cfg.Outboxes(p.ClientID, !b.cfg.OneShot(p.ClientID))
	if err != nil {
		b.ports.Add(-1)
		return nil, err
	}
	port := b.newPort(portDevice, b.HubAddress(p.ClientID), p)
	port.box = box
	port.offlineSince = b.now()
	port.oneShot = b.cfg.OneShot(p.ClientID)
	port.cursor = box.Next()
	b.devices[p.ClientID] = port
	b.count(port, owner)
	b.table.put(port.addr, port.self)
	if !restored {
		port.journal(false)
	}
	return port, nil
}

// count puts a device into its identity's quota; b.mu is held.
func (b *Bridge) count(p *Port, owner claimant) {
	if p.counted = owner; !owner.id.IsZero() {
		b.byOwner[owner]++
	}
}

// uncount takes a device out of its identity's quota; b.mu is held.
func (b *Bridge) uncount(p *Port) {
	if n := b.byOwner[p.counted]; n > 1 {
		b.byOwner[p.counted] = n - 1
	} else {
		delete(b.byOwner, p.counted)
	}
}

// forget removes a port that is gone. The caller holds no lock.
func (b *Bridge) forget(p *Port) {
	if p.addr != "" {
		b.table.remove(p.addr, p.self)
	}
	b.registry.portGone(p)
	b.mu.Lock()
	if p.kind == portDevice {
		if b.devices[p.clientID] == p {
			delete(b.devices, p.clientID)
			b.uncount(p)
			if b.cfg.Journal != nil && !p.oneShot {
				b.cfg.Journal.PortGone(p.clientID)
			}
		}
	} else {
		delete(b.streams, p)
	}
	b.ports.Add(-1)
	b.mu.Unlock()
	b.timers.remove(p)
	b.unstarve(p)
}
