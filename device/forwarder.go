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

// How long the answer to a registration may stay away until it is asked for again: the
// first time, and, since that doubles, in the end. A hub acknowledges a registration as
// it does every frame, and can lose the answer: when the device's queue there is full, or
// it forgets its memory.
const (
	askAgain = 5 * time.Second
	longAsk  = time.Minute
)

// errUnanswered means that it is to be asked for again.
var errUnanswered = errors.New("device: no answer to a registration yet")

// Forwarder is a worker at the hub that passes frames on to a listener of this
// device. The node registers it again on every connection, so that on a sealmq hub
// its address stays.
type Forwarder struct {
	n        *Node
	listener *Listener
	alias    string
	static   bool     // an alias was asked for
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
// remember. An alias belongs to the identity that first took it. An empty one is an
// error, not a dynamic forwarder. Hubs of sealmq take 128 letters, digits, '_', '.' and
// '-' at most.
func Alias(alias string) ForwarderOption {
	return func(f *Forwarder) { f.alias, f.static = alias, true }
}

// RegisterThrough registers through a channel that was dialled to the hub's own listener
// ("api"), as a hub over TCP wants it where plain peers may not register or take an
// alias: the credential shown there (Config.Credential) decides, with an attribute
// ockam-relay that is the alias or "*". What comes through the forwarder comes through
// the channel, and the forwarder is registered again whenever that is made again. A
// hub of sealmq says at once that it refuses, another one nothing: then the error is
// ErrTimeout.
func RegisterThrough(ch *Channel) ForwarderOption { return func(f *Forwarder) { f.through = ch } }

// CreateForwarder asks the hub for a forwarder to the listener of that name and
// waits for its address, 30 s at most; over MQTT it asks again for an answer that
// stays away. Peers dial that address:
//
//	ch, err := node.Dial(ctx, route.To(forwarder.Address()), policy)
//
// On a sealmq hub the address of a listener's dynamic forwarder is always the same
// for one client id. A second one beside it has another address, which is always the
// same, too, and so on; each can be released alone. What is closed leaves its place, and
// its address, to the next that is created. An alias has one forwarder at a time.
//
// Errors: ErrAliasRefused (an alias of somebody else, a bad alias), ErrHubRefused (a
// quota, or a hub without forwarders), ErrTimeout (with ErrNoAnswer where a broker has
// answered no hello either), or that of ctx.
func (n *Node) CreateForwarder(ctx context.Context, listener string, opts ...ForwarderOption) (*Forwarder, error) {
	f := &Forwarder{n: n, first: make(chan struct{})}
	for _, opt := range opts {
		opt(f)
	}
	switch {
	case f.static && f.alias == "":
		return nil, errors.New("device: forwarder: the alias is empty; without the option Alias a forwarder is dynamic")
	case strings.Contains(f.alias, "#") || f.alias == registerText:
		return nil, fmt.Errorf("device: forwarder: the alias %q is not possible; %s", f.alias, aliasRule)
	}
	n.mu.Lock()
	f.listener = n.listeners[listener]
	if f.listener == nil {
		n.mu.Unlock()
		return nil, fmt.Errorf("device: forwarder: there is no listener %q; call Listen first", listener)
	}
	err := n.addForwarderLocked(f)
	n.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("device: forwarder: %w", err)
	}
	n.early.listening(f.m)
	if err := f.create(ctx); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// addForwarderLocked gives a forwarder its address on this device. Two with the same one
// would be one at the hub.
func (n *Node) addForwarderLocked(f *Forwarder) (err error) {
	for o := range n.forwarders {
		if f.static && o.alias == f.alias && o.through == f.through {
			return fmt.Errorf("the alias %q has one already, to the listener %q; close that first", f.alias, o.listener.name)
		}
	}
	switch {
	case f.through != nil:
		f.m = randomAddress()
		err = n.local.RegisterFunc(f.m, Access{}, f.inside)
	case f.static:
		f.m = f.listener.m
	default:
		place := 0
		for f.m = f.listener.m; slices.ContainsFunc(n.byAddress[f.m], (*Forwarder).isDynamic); place++ {
			f.m = n.furtherAddress(f.listener.name, place)
		}
		if place > 0 {
			err = n.local.Alias(f.m, f.listener.name, Access{Forwarders: true})
		}
	}
	if err != nil {
		return err
	}
	n.forwarders[f] = struct{}{}
	n.byAddress[f.m] = append(n.byAddress[f.m], f)
	f.pending++
	return nil
}

func (f *Forwarder) isDynamic() bool { return !f.static }

// What hubs of sealmq take as an alias; others take more.
const (
	maxAlias  = 128
	aliasRule = "use letters, digits, '_', '.' and '-', 128 of them at most"
)

// plainAlias reports whether any hub takes an alias, as far as its characters go.
func plainAlias(a string) bool {
	for _, c := range []byte(a) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return len(a) <= maxAlias
}

func (f *Forwarder) create(ctx context.Context) error {
	what := "registering a forwarder"
	ctx, cancel := context.WithTimeoutCause(ctx, registerTime, fmt.Errorf("%w: the hub did not answer the registration of a forwarder", ErrTimeout))
	defer cancel()
	ctx, leave := f.n.join(ctx)
	defer leave(nil)
	err := errUnanswered
	for pause := askAgain; errors.Is(err, errUnanswered); pause *= 2 {
		err = f.ask(ctx, f.first, pause)
	}
	switch {
	case err == nil:
		f.claim(ctx)
		return nil
	case errors.Is(err, ErrUnknownAddress):
		return fmt.Errorf("%w: it has no %s", ErrHubRefused, f.service())
	case errors.Is(err, ErrHubRefused) && !plainAlias(f.alias):
		return fmt.Errorf("%w %q: no hub of sealmq takes it: %s", ErrAliasRefused, f.alias, aliasRule)
	case errors.Is(err, ErrHubRefused) && f.through != nil && f.alias != "":
		return fmt.Errorf("%w %q: the credential does not allow it, it belongs to another identity, or no forwarder can have it", ErrAliasRefused, f.alias)
	case errors.Is(err, ErrHubRefused) && f.alias != "":
		return fmt.Errorf("%w %q: it belongs to another identity, or no forwarder can have it", ErrAliasRefused, f.alias)
	case errors.Is(err, ErrHubRefused):
		return fmt.Errorf("%w a forwarder: a quota may be used up%s", ErrHubRefused, f.orCredential())
	case errors.Is(err, ErrTimeout) && f.through == nil && f.n.link.silent():
		return fmt.Errorf("%w to hello, nor to the registration of a forwarder: %s is perhaps an MQTT broker without a hub: %w",
			ErrNoAnswer, f.n.link.hubName, ErrTimeout)
	case ctx.Err() == nil && errors.Is(err, ErrBusy):
		return fmt.Errorf("device: %s: %w", what, err)
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

// ask registers once and waits for the answer. It returns errUnanswered once that has
// stayed away for so long, if it does no harm to ask again: where the hub gives the same
// address again, and what the connection carries can get lost.
func (f *Forwarder) ask(ctx context.Context, answered <-chan struct{}, within time.Duration) error {
	if f.through == nil && !f.n.overStream || f.through != nil && f.alias != "" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, within, errUnanswered)
		defer cancel()
	}
	ctx, c := f.n.calls.begin(ctx, false, nil)
	defer c.end()
	if err := f.register(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		c.abandon()
		return context.Cause(ctx)
	}
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

// renew registers a forwarder that had an address, on the present connection, and asks
// again until the hub has answered.
func (f *Forwarder) renew() {
	n := f.n
	answered := make(chan struct{})
	n.mu.Lock()
	f.first = answered
	n.mu.Unlock()
	over := f.path()
	for pause := askAgain; ; pause = min(2*pause, longAsk) {
		begun := time.Now()
		ctx, cancel := context.WithTimeout(n.stopped, max(registerTime, 2*pause))
		err := f.ask(ctx, answered, pause)
		cancel()
		switch {
		case err == nil:
			f.claim(n.stopped)
			return
		case errors.Is(err, ErrHubRefused), errors.Is(err, ErrUnknownAddress):
			n.log.Warn("the hub does not register the forwarder again", "address", f.Address(), "err", err)
			n.events.emit(Event{Kind: EventForwarderFailed, Forwarder: f, Err: err})
			return
		case !errors.Is(err, errUnanswered) && !errors.Is(err, ErrBusy):
			return
		}
		n.log.Info("registering a forwarder once more", "address", f.Address(), "err", err)
		timer := time.NewTimer(jitter(max(time.Second, pause-time.Since(begun)))) // longer where the hub was busy
		select {
		case <-timer.C:
		case <-n.stopped.Done():
			timer.Stop()
			return
		}
		n.mu.Lock()
		closed := f.closed
		n.mu.Unlock()
		if closed || f.path() != over {
			return // or another renew is at it
		}
	}
}

// path returns the number of what the forwarder is registered over.
func (f *Forwarder) path() uint64 {
	if f.through != nil {
		return f.through.Restarts()
	}
	return f.n.link.connects.Load()
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
	if m != f.listener.m {
		n.local.Remove(m)
	}
}
