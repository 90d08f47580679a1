package bridge

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Reasons why a registration is refused.
var (
	// ErrAlias means that an alias is not allowed: letters, digits, '.', '_' and
	// '-', 128 at most, not `register`, no reserved prefix, no service's name.
	ErrAlias = errors.New("bridge: alias is not allowed")
	// ErrAliasOwned means that another identity has the alias.
	ErrAliasOwned = errors.New("bridge: alias belongs to another identity")
	// ErrStaticOff means that plain TCP peers may not take aliases here.
	ErrStaticOff = errors.New("bridge: aliases over plain TCP are switched off")
	// ErrQuota means that an owner, or the hub, has as many as allowed.
	ErrQuota = errors.New("bridge: too many forwarders")
	// ErrRoute means that the route to store is empty, too long, or not local.
	ErrRoute = errors.New("bridge: not a route to forward along")
)

const (
	payloadRegister = "register"
	maxAlias        = 128
	maxStoredHops   = 16
)

// forwarder is a worker that passes frames on to its owner. Guarded by
// registry.mu, except for route and what never changes.
type forwarder struct {
	addr  string
	kind  hubproto.ForwarderKind
	self  *worker
	since int64 // of the wall
	route atomic.Pointer[storedRoute]

	owner Principal
	port  *Port // of the owner; nil: not connected any more, or inside the hub
	seen  int64
	claim []byte

	told   bool  // what changed has said last: whether the owner is online,
	toldAt int64 // and when
}

// storedRoute is the registered route, ready for use.
type storedRoute struct {
	next string // its first hop: a hub address
	rest route.Hops
	full route.Route
}

func newStoredRoute(r route.Route) (*storedRoute, error) {
	if len(r) == 0 || len(r) > maxStoredHops {
		return nil, ErrRoute
	}
	for _, a := range r {
		if !a.IsLocal() || len(a.Value) > maxHopValue {
			return nil, ErrRoute
		}
	}
	return &storedRoute{next: strings.Clone(r[0].Value), rest: route.EncodeHops(r[1:]), full: cloneRoute(r)}, nil
}

func cloneRoute(r route.Route) route.Route {
	c := r.Clone()
	for i := range c {
		c[i].Value = strings.Clone(c[i].Value)
	}
	return c
}

// registry holds the forwarders and who owns them.
type registry struct {
	b *Bridge

	mu     sync.Mutex
	m      map[string]*forwarder
	byPort map[*Port]map[string]*forwarder
	byID   map[claimant]int // the zero one is all plain TCP peers
}

func (r *registry) init(b *Bridge) {
	r.b = b
	r.m = make(map[string]*forwarder)
	r.byPort = make(map[*Port]map[string]*forwarder)
	r.byID = make(map[claimant]int)
}

func (r *registry) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.m)
}

// Registration asks for a forwarder on behalf of an owner, for programs inside
// the hub (the service behind its secure channel listener).
type Registration struct {
	// Owner is whom the forwarder will belong to.
	Owner Principal
	// Route is stored whole; its first hop is an address of the hub.
	Route route.Route
	// Alias asks for a static forwarder; empty: a dynamic one.
	Alias string
}

// Register makes or renews a forwarder and returns its address.
func (b *Bridge) Register(g Registration) (string, error) {
	return b.registry.register(nil, g)
}

// serveRegistration is the forwarding services (spec routing 6.8). The answer
// comes from the forwarder's own address, and is that address as BARE String.
func (b *Bridge) serveRegistration(r *Request, static bool) {
	text, err := bare.StringExact(r.Frame.Payload)
	if err != nil {
		r.Drop(DropRequest)
		return
	}
	g := Registration{Owner: r.From, Route: r.Frame.Return}
	// Through a peer's connection the route is its hub address and an address of
	// its own at least.
	if r.Source == "" || len(g.Route) < 2 {
		r.Drop(DropRefused)
		return
	}
	switch {
	case static:
		if g.Alias = text; text == "" {
			r.Drop(DropAlias)
			return
		}
	case text != payloadRegister:
		r.Drop(DropRequest)
		return
	}
	if !r.link.port.mayRegister() {
		r.Drop(DropThrottled)
		return
	}
	addr, err := b.registry.register(r.link.port, g)
	if err != nil {
		if unlogged, ok := b.mayLog(); ok {
			b.cfg.Logger.Info("registration refused", "device", r.From.ClientID, "alias", g.Alias, "err", err, "unlogged", unlogged)
		}
		switch {
		case errors.Is(err, ErrAlias):
			r.Drop(DropAlias)
		case errors.Is(err, ErrQuota):
			r.Drop(DropQuota)
		default:
			r.Drop(DropRefused)
		}
		return
	}
	b.settled(func() { r.ReplyFrom(addr, bare.AppendString(nil, addr)) })
}

// register makes or renews a forwarder. p is the owner's port; nil inside the
// hub.
func (r *registry) register(p *Port, g Registration) (string, error) {
	stored, err := newStoredRoute(g.Route)
	if err != nil {
		return "", err
	}
	kind := hubproto.Dynamic
	var addr string
	switch {
	case g.Alias != "":
		if !r.validAlias(g.Alias) {
			return "", ErrAlias
		}
		kind, addr = hubproto.Static, prefixStatic+g.Alias
		if g.Owner.Identity.IsZero() && !r.b.cfg.StaticOverStream {
			return "", ErrStaticOff
		}
	case p != nil && p.kind == portDevice:
		// Idempotent for (device, last hop). The zero byte cannot be in a
		// client id, so no other device can reach the same address.
		last, _ := g.Route.Last()
		addr = prefixDynamic + r.b.keyed(16, "fwd/1", p.clientID, "\x00", last.Value)
	default:
		addr = randomAddress(prefixDynamic)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.b.now()
	f := r.m[addr]
	if f != nil && r.expired(f, now) {
		r.remove(f)
		f = nil
	}
	if f != nil && kind == hubproto.Static && !mayTake(f.owner, g.Owner) {
		return "", ErrAliasOwned
	}
	if err := r.quota(p, f, g.Owner); err != nil {
		return "", err
	}
	if f == nil {
		f = &forwarder{addr: addr, kind: kind, since: r.b.clock.wall().UnixNano()}
		f.self = &worker{fwd: f}
		f.route.Store(stored)
		if !r.b.table.add(addr, f.self) {
			return "", ErrAddressTaken
		}
		r.m[addr] = f
	} else {
		r.unown(f)
		f.route.Store(stored)
	}
	if f.owner.Identity != g.Owner.Identity {
		f.since, f.claim = r.b.clock.wall().UnixNano(), nil
	}
	f.seen = now
	r.own(f, p, g.Owner)
	r.changed(f)
	return addr, nil
}

// mayTake decides who may take a static address from its owner: the same
// identity, if it is as well proven; a proven one from one that is only claimed;
// anybody with an identity from a plain TCP peer; the newest among those.
func mayTake(old, now Principal) bool {
	switch {
	case old.Identity.IsZero():
		return true
	case now.Identity.IsZero():
		return false
	case old.Proven:
		return now.Proven && now.Identity == old.Identity
	case now.Proven:
		return true
	}
	return now.Identity == old.Identity
}

// ValidAlias reports whether a hub can take an alias: at most 128 letters, digits, '.',
// '_' and '-', that do not look like an address of another kind. A hub refuses the
// names of its own services besides.
func ValidAlias(a string) bool {
	if a == "" || len(a) > maxAlias || a == payloadRegister || a == hubproto.NoticeSource || reservedPrefix(a) {
		return false
	}
	for _, c := range []byte(a) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
		if !ok {
			return false
		}
	}
	return true
}

func (r *registry) validAlias(a string) bool {
	w := r.b.table.lookup(a)
	return ValidAlias(a) && (w == nil || w.service == nil)
}

// reservedPrefix reports whether an address looks like one that the bridge makes.
func reservedPrefix(a string) bool {
	return strings.HasPrefix(a, prefixDevice) || strings.HasPrefix(a, prefixStream) ||
		strings.HasPrefix(a, prefixDynamic) || strings.HasPrefix(a, prefixStatic)
}

// quota checks room for one forwarder more at an owner who does not have old
// already. r.mu is held, as in everything below.
func (r *registry) quota(p *Port, old *forwarder, owner Principal) error {
	cfg := &r.b.cfg
	switch {
	case old == nil && len(r.m) >= cfg.MaxForwarders:
		return ErrQuota
	case (old == nil || old.owner.claimant() != owner.claimant()) && r.byID[owner.claimant()] >= r.most(owner.Identity):
		return ErrQuota
	case p != nil && (old == nil || old.port != p) && len(r.byPort[p]) >= cfg.ForwardersPerPort && !(owner.Proven && r.displace(p)):
		return ErrQuota
	}
	return nil
}

// displace makes room at a port for a proven owner: it removes what somebody left there
// who had only claimed to be the owner.
func (r *registry) displace(p *Port) bool {
	for _, f := range r.byPort[p] {
		if !f.owner.Proven {
			r.remove(f)
			return true
		}
	}
	return false
}

// most is how many forwarders an identity may have. Peers that show none share a
// quarter of the hub's, so that strangers leave room for those who do.
func (r *registry) most(id identity.Identifier) int {
	if id.IsZero() {
		return (r.b.cfg.MaxForwarders + 3) / 4
	}
	return r.b.cfg.ForwardersPerIdentity
}

// registered reports whether a port has a forwarder.
func (r *registry) registered(p *Port) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.byPort[p]) > 0
}

// HasForwarder reports whether an identity owns a forwarding address.
func (b *Bridge) HasForwarder(id identity.Identifier) bool {
	r := &b.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	return !id.IsZero() && r.byID[claimant{id, true}]+r.byID[claimant{id, false}] > 0
}

func (r *registry) own(f *forwarder, p *Port, owner Principal) {
	f.owner, f.port = owner, p
	r.byID[owner.claimant()]++
	if p != nil {
		if r.byPort[p] == nil {
			r.byPort[p] = make(map[string]*forwarder)
		}
		r.byPort[p][f.addr] = f
	}
}

func (r *registry) unown(f *forwarder) {
	owner := f.owner.claimant()
	if r.byID[owner]--; r.byID[owner] <= 0 {
		delete(r.byID, owner)
	}
	r.leave(f)
}

// leave takes a forwarder off its owner's port.
func (r *registry) leave(f *forwarder) {
	if m := r.byPort[f.port]; m != nil {
		if delete(m, f.addr); len(m) == 0 {
			delete(r.byPort, f.port)
		}
	}
	f.port = nil
}

func (r *registry) remove(f *forwarder) {
	passing := f.passing()
	r.unown(f)
	delete(r.m, f.addr)
	r.b.table.remove(f.addr, f.self)
	r.b.records.set(RecordForwarder, f.addr, nil)
	if j := r.b.cfg.Journal; j != nil && !passing {
		j.ForwarderGone(f.addr)
	}
}

// passing reports whether a forwarder ends with a stream, and so with the process.
func (f *forwarder) passing() bool {
	return f.kind == hubproto.Dynamic && f.port != nil && f.port.kind == portStream
}

func (r *registry) expired(f *forwarder, now int64) bool {
	return !f.online() && f.seen+int64(r.b.cfg.ForwarderTTL) <= now
}

// sweep removes what nobody has seen for too long.
func (r *registry) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.b.now()
	for _, f := range r.m {
		if r.expired(f, now) {
			r.remove(f)
		}
	}
}

// seenEvery is how old what is published and stored of a forwarder may be, besides
// whether its owner is online.
const seenEvery = time.Minute

// seen notes that a port came or went. A connection that comes to nothing, or one of
// many in a row, is not worth a record for each of its forwarders.
func (r *registry) seen(p *Port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.b.now()
	for _, f := range r.byPort[p] {
		f.seen = now
		if f.online() != f.told || now-f.toldAt >= int64(seenEvery) {
			r.changed(f)
		}
	}
}

// portGone drops a port's dynamic forwarders; its aliases stay reserved, and
// lead nowhere until their owner comes back or they expire.
func (r *registry) portGone(p *Port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.b.now()
	for _, f := range r.byPort[p] {
		if f.kind == hubproto.Dynamic {
			r.remove(f)
			continue
		}
		if p.kind != portDevice {
			f.seen = now // a device's was noted when it went
		}
		r.leave(f)
		r.changed(f)
	}
}

// of lists a port's addresses.
func (r *registry) of(p *Port) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]string, 0, len(r.byPort[p]))
	for addr := range r.byPort[p] {
		out = append(out, addr)
	}
	slices.Sort(out)
	return out
}

func (r *registry) record(f *forwarder) *hubproto.ForwarderRecord {
	return &hubproto.ForwarderRecord{
		Address: f.addr, Kind: f.kind, Owner: f.owner.Identity, Proven: f.owner.Proven, Device: f.owner.ClientID,
		Since: time.Unix(0, f.since), Online: f.online(), Claim: f.claim,
	}
}

// changed publishes and journals a forwarder.
func (r *registry) changed(f *forwarder) {
	f.told, f.toldAt = f.online(), r.b.now()
	r.b.records.set(RecordForwarder, f.addr, r.record(f).JSON())
	if j := r.b.cfg.Journal; j != nil && !f.passing() {
		j.Forwarder(r.b.stateOf(f))
	}
}

// Forwarder returns the record of a forwarding address; nil when there is none.
func (b *Bridge) Forwarder(addr string) *hubproto.ForwarderRecord {
	b.registry.mu.Lock()
	defer b.registry.mu.Unlock()
	f := b.registry.m[addr]
	if f == nil {
		return nil
	}
	return b.registry.record(f)
}

// TouchForwarder says that the owner of a forwarder inside the hub is still
// there, so that it does not expire.
func (b *Bridge) TouchForwarder(addr string) {
	b.registry.mu.Lock()
	defer b.registry.mu.Unlock()
	if f := b.registry.m[addr]; f != nil {
		f.seen = b.now()
	}
}
