package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// Services and texts of registration (spec routing 6.1).
const (
	dynamicService = "forwarding_service"
	staticService  = "static_forwarding_service"
	registerText   = "register"
)

// registerTime bounds one registration; a stock client waits as long (spec routing
// 6.1).
const registerTime = 30 * time.Second

// Forwarder is a worker at the hub that passes frames on to a listener of this
// device. The node registers it again on every connection, so that on a sealmq hub
// its address stays.
type Forwarder struct {
	n        *Node
	listener *Listener
	alias    string
	m        string   // its address on this device
	through  *Channel // nil: it is registered in plain

	// Guarded by Node.mu.
	address string
	pending int // registrations sent and not answered
	first   chan struct{}
	closed  bool
	// claimed is the number of the last claim that the hub took, at claimedAt, and
	// claimedBy the identity with the key that signed it.
	claimed   uint64
	claimedAt time.Time
	claimedBy *identity.Identity
}

// ForwarderOption changes how CreateForwarder asks.
type ForwarderOption func(*Forwarder)

// Alias asks for a static forwarder: its address is one that people can choose and
// remember. An alias belongs to the identity that first took it.
func Alias(alias string) ForwarderOption { return func(f *Forwarder) { f.alias = alias } }

// RegisterThrough registers through a channel that was dialled to the hub's own listener
// ("api"), as a hub over TCP wants it where plain peers may not register or take an
// alias: the credential shown there (Config.Credential) decides, with an attribute
// ockam-relay that is the alias or "*". What comes through the forwarder comes through
// the channel, and the forwarder is registered again whenever that is made again. A
// hub of sealmq says at once that it refuses, another one nothing: then the error is
// ErrTimeout.
func RegisterThrough(ch *Channel) ForwarderOption { return func(f *Forwarder) { f.through = ch } }

// CreateForwarder asks the hub for a forwarder to the listener of that name and
// waits for its address, 30 s at most. Peers dial that address:
//
//	ch, err := node.Dial(ctx, route.To(forwarder.Address()), policy)
//
// On a sealmq hub the address of a listener's dynamic forwarder is always the same
// for one client id.
//
// Errors: ErrAliasRefused (an alias of somebody else, a bad alias), ErrHubRefused (a
// quota, or a hub without forwarders), ErrTimeout (with ErrNoAnswer where a broker has
// answered no hello either), or that of ctx.
func (n *Node) CreateForwarder(ctx context.Context, listener string, opts ...ForwarderOption) (*Forwarder, error) {
	f := &Forwarder{n: n, first: make(chan struct{})}
	for _, opt := range opts {
		opt(f)
	}
	if strings.Contains(f.alias, "#") || f.alias == registerText {
		return nil, fmt.Errorf("device: forwarder: the alias %q is not possible; use letters, digits, '_', '.' and '-'", f.alias)
	}
	n.mu.Lock()
	f.listener = n.listeners[listener]
	if f.listener == nil {
		n.mu.Unlock()
		return nil, fmt.Errorf("device: forwarder: there is no listener %q; call Listen first", listener)
	}
	f.m = f.listener.m
	if f.through != nil {
		f.m = randomAddress()
	}
	n.forwarders[f] = struct{}{}
	n.byAddress[f.m] = append(n.byAddress[f.m], f)
	f.pending++
	n.mu.Unlock()

	if f.through != nil {
		if err := n.local.RegisterFunc(f.m, Access{}, f.inside); err != nil {
			f.Close()
			return nil, fmt.Errorf("device: forwarder: %w", err)
		}
	}
	if err := f.create(ctx); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *Forwarder) create(ctx context.Context) error {
	what := "registering a forwarder"
	ctx, cancel := context.WithTimeoutCause(ctx, registerTime, fmt.Errorf("%w: the hub did not answer the registration of a forwarder", ErrTimeout))
	defer cancel()
	ctx, leave := f.n.join(ctx)
	defer leave(nil)
	ctx, c := f.n.calls.begin(ctx, false, nil)
	defer c.end()
	if err := f.register(ctx); err != nil {
		return f.n.failure(ctx, what, err)
	}
	select {
	case <-f.first:
		f.claim(ctx)
		return nil
	case <-ctx.Done():
	}
	switch err := context.Cause(ctx); {
	case errors.Is(err, ErrUnknownAddress):
		return fmt.Errorf("%w: it has no %s", ErrHubRefused, f.service())
	case errors.Is(err, ErrHubRefused) && f.through != nil && f.alias != "":
		return fmt.Errorf("%w %q: the credential does not allow it, it belongs to another identity, or no forwarder can have it", ErrAliasRefused, f.alias)
	case errors.Is(err, ErrHubRefused) && f.alias != "":
		return fmt.Errorf("%w %q: it belongs to another identity, or no forwarder can have it", ErrAliasRefused, f.alias)
	case errors.Is(err, ErrHubRefused):
		return fmt.Errorf("%w a forwarder: a quota may be used up%s", ErrHubRefused, f.orCredential())
	case errors.Is(err, ErrTimeout) && f.through == nil && f.n.link.silent():
		return fmt.Errorf("%w to hello, nor to the registration of a forwarder: %s is perhaps an MQTT broker without a hub: %w",
			ErrNoAnswer, f.n.link.hubName, ErrTimeout)
	default:
		return f.n.failure(ctx, what, err)
	}
}

// orCredential is what else a hub may miss of whom it knows through a channel.
func (f *Forwarder) orCredential() string {
	if f.through == nil {
		return ""
	}
	return ", or there is no credential that allows it"
}

func (f *Forwarder) service() string {
	if f.alias != "" {
		return staticService
	}
	return dynamicService
}

// register sends the registration (spec routing 6.2).
func (f *Forwarder) register(ctx context.Context) error {
	text := registerText
	if f.alias != "" {
		text = f.alias
	}
	payload := bare.AppendString(nil, text)
	if f.through != nil {
		cur, err := f.through.present(ctx)
		if err != nil {
			return err
		}
		f.n.local.SetAccess(f.m, Access{Encryptors: []string{cur.EncryptorAddress()}})
		if c := callOf(ctx); c != nil {
			c.expect(route.Local(f.service()), route.Local(f.m))
		}
		return cur.Send(ctx, route.To(f.service()), route.To(f.m), payload)
	}
	return f.n.sendUp(ctx, route.Frame{Onward: route.To(f.service()), Return: route.To(f.m), Payload: payload}, route.Stored)
}

// inside takes what comes through the channel to the hub to this forwarder's address:
// the hub's answers to registrations, which return to the forwarder and nowhere else,
// and what others send through it, for the listener or along the rest of the route.
func (f *Forwarder) inside(in route.Frame, c route.Class, o node.Origin) {
	rest := in.Onward.Rest()
	if len(rest) > 0 {
		in.Onward = rest
		f.n.local.Inject(o, in, c)
		return
	}
	if len(in.Return) == 2 && in.Return[1].IsLocal() && !isHubAddress(in.Return[1].Value) &&
		f.n.registered(f.m, in.Return[1].Value, in.Payload, false) {
		return
	}
	in.Onward = route.To(f.listener.name)
	f.n.local.Inject(o, in, c)
}

// reregister repeats every registration that was made in plain, after a reconnect, or
// through a channel that was made again.
func (n *Node) reregister(through *Channel) {
	n.mu.Lock()
	var again []*Forwarder
	for f := range n.forwarders {
		if f.through == through && f.address != "" { // the others are still being created
			again = append(again, f)
			f.pending = 1
		}
	}
	n.mu.Unlock()
	for _, f := range again {
		n.spawn(f.renew)
	}
}

// renew registers a forwarder that had an address.
func (f *Forwarder) renew() {
	ctx, cancel := context.WithTimeout(f.n.stopped, registerTime)
	defer cancel()
	ctx, c := f.n.calls.begin(ctx, false, nil)
	defer c.end()
	answered := make(chan struct{})
	f.n.mu.Lock()
	f.first = answered
	f.n.mu.Unlock()
	if err := f.register(ctx); err == nil {
		select {
		case <-answered:
			f.claim(ctx)
			return
		case <-ctx.Done():
		}
	}
	err := context.Cause(ctx)
	if errors.Is(err, ErrHubRefused) || errors.Is(err, ErrUnknownAddress) {
		f.n.log.Warn("the hub does not register the forwarder again", "address", f.Address(), "err", err)
		f.n.events.emit(Event{Kind: EventForwarderFailed, Forwarder: f, Err: err})
	}
}

// registeredAtStock handles answers to registrations of a hub whose own frames
// cannot be told from others': what comes to an address M that a registration
// waits at, and reads as its answer (spec routing 6.3). The return route may be
// longer than one hop; its last is the relay's address.
func (n *Node) registeredAtStock(v *route.View) bool {
	last, ok := v.LastReturn()
	if !ok || v.OnwardLen() != 1 || last.Transport != route.LocalTransport || len(last.Value) == 0 {
		return false
	}
	first := v.FirstHop()
	return n.registered(string(first.Value), string(last.Value), v.Payload(), false)
}

// registered handles what the hub itself sends to an address M: the answers to
// registrations (spec routing 6.3). It reports whether addr is one, and, where it
// is not certain that the hub is the sender, also the frame an answer.
func (n *Node) registered(addr, from string, payload []byte, certain bool) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := n.byAddress[addr]
	if len(all) == 0 {
		return false
	}
	read := bare.String
	if !certain {
		read = bare.StringExact
	}
	text, err := read(payload)
	if err != nil && !certain {
		return false
	}
	var match *Forwarder
	for _, f := range all {
		switch {
		case f.pending == 0:
		case f.alias == "" && match == nil:
			match = f
		case f.alias != "" && err == nil && strings.HasSuffix(text, f.alias) && strings.HasSuffix(from, f.alias):
			match = f
		}
	}
	if match == nil && !certain {
		return false
	}
	if match == nil {
		n.in.dropped[dropUnexpected].Add(1)
		return true
	}
	old := match.address
	match.address, match.pending = from, match.pending-1
	select {
	case <-match.first:
	default:
		close(match.first)
	}
	if old != "" && old != from {
		n.log.Warn("the hub changed a forwarding address", "old", old, "new", from)
		n.events.emit(Event{Kind: EventForwarderChanged, Forwarder: match})
	}
	return true
}

// Address returns the forwarding address: what a peer dials. It only changes on
// hubs that don't keep it over a reconnect (EventForwarderChanged).
func (f *Forwarder) Address() string {
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	return f.address
}

// Alias returns the alias asked for; empty for a dynamic forwarder.
func (f *Forwarder) Alias() string { return f.alias }

// Listener returns the name of the listener behind the forwarder.
func (f *Forwarder) Listener() string { return f.listener.name }

// Close stops registering the forwarder. The hub forgets it in time; Release has it
// do so at once.
func (f *Forwarder) Close() {
	f.n.mu.Lock()
	f.n.dropForwarderLocked(f)
	f.n.mu.Unlock()
	f.leave()
}

// leave frees the address of a forwarder that is dropped.
func (f *Forwarder) leave() {
	if f.through != nil {
		f.n.local.Remove(f.m)
	}
}

func (n *Node) dropForwarderLocked(f *Forwarder) {
	if f.closed {
		return
	}
	f.closed = true
	delete(n.forwarders, f)
	m := f.m
	if left := slices.DeleteFunc(n.byAddress[m], func(o *Forwarder) bool { return o == f }); len(left) > 0 {
		n.byAddress[m] = left
	} else {
		delete(n.byAddress, m)
	}
}
