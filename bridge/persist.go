package bridge

import (
	"fmt"
	"time"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// State is what a hub remembers beside its queues, so that hub addresses,
// forwarders and the ownership of aliases survive a restart. Streams are not in
// it: they end with the process.
type State struct {
	Ports      []PortState
	Forwarders []ForwarderState
}

// PortState is a device's place in the router. Its address follows from the key.
type PortState struct {
	Principal Principal
	// Seen is when the device came, left or was made known.
	Seen time.Time
	// Online says that the device was attached then. One that is restored so was
	// seen until the hub ended, which counts as now.
	Online bool
	// Unsaid are the notices that it is still to be told. A Journal hears of them apart,
	// see NoticeJournal.
	Unsaid []hubproto.Notice
}

// ForwarderState is a forwarder as it is stored.
type ForwarderState struct {
	Address     string
	Kind        hubproto.ForwarderKind
	Owner       Principal
	Route       route.Route
	Since, Seen time.Time
	// Online is as in PortState, about the owner.
	Online bool
	Claim  []byte
}

// Journal hears of each change to a State as it happens, so that a store need
// not be written whole. Its methods are called with a lock held: they must not
// call the bridge and must not wait.
type Journal interface {
	Port(PortState)
	PortGone(clientID string)
	Forwarder(ForwarderState)
	ForwarderGone(address string)
}

// SettlingJournal is a Journal that says when what it has heard of is stored.
type SettlingJournal interface {
	Journal
	// Settled calls done, on any goroutine, once everything that the journal has heard
	// of is as safe as an acknowledged frame; not at all when the store ends first. No
	// lock of the bridge is held. done does not block.
	Settled(done func())
}

// NoticeJournal is a Journal that keeps what devices which are away are still to be told.
type NoticeJournal interface {
	Journal
	// Notice keeps a notice, in place of one that differs in Count alone.
	Notice(clientID string, n hubproto.Notice)
	// NoticeGone forgets the notice that differs from n in Count at most.
	NoticeGone(clientID string, n hubproto.Notice)
}

// ClockJournal is a Journal that keeps arrivals of frames, which are in the time of the
// bridge's own clock, as times of the wall.
type ClockJournal interface {
	Journal
	// ClockSet says how far the wall clock is ahead of the bridge's from now on. No lock
	// of the bridge is held.
	ClockSet(ahead time.Duration)
}

// settled calls done once what the journal has heard of is stored.
func (b *Bridge) settled(done func()) {
	if j, ok := b.cfg.Journal.(SettlingJournal); ok {
		j.Settled(done)
		return
	}
	done()
}

func (b *Bridge) stateOf(f *forwarder) ForwarderState {
	return ForwarderState{
		Address: f.addr, Kind: f.kind, Owner: f.owner, Route: f.route.Load().full,
		Since: time.Unix(0, f.since), Seen: b.clock.toWall(f.seen), Online: f.online(), Claim: f.claim,
	}
}

func (f *forwarder) online() bool { return f.port != nil && f.port.online.Load() }

// journal notes that the device came, left or changed; p.mu is held.
func (p *Port) journal(online bool) {
	if j := p.b.cfg.Journal; j != nil && !p.oneShot {
		j.Port(PortState{Principal: p.principal, Seen: p.b.clock.wall(), Online: online})
	}
}

// keep has the journal keep a notice for a device that is away; p.mu is held.
func (p *Port) keep(u *unsaid) {
	if j, ok := p.b.cfg.Journal.(NoticeJournal); ok && p.kind == portDevice && !p.oneShot {
		u.kept = true
		j.Notice(p.clientID, u.notice)
	}
}

// unkeep has the journal forget a notice that it keeps; p.mu is held.
func (p *Port) unkeep(u *unsaid) {
	if u.kept {
		p.b.cfg.Journal.(NoticeJournal).NoticeGone(p.clientID, u.notice)
	}
}

// State returns what Restore takes.
func (b *Bridge) State() State {
	var s State
	b.mu.Lock()
	ports := make([]*Port, 0, len(b.devices))
	for _, p := range b.devices {
		ports = append(ports, p)
	}
	b.mu.Unlock()
	for _, p := range ports {
		p.mu.Lock()
		if !p.gone && !p.oneShot {
			seen := p.offlineSince
			if p.link != nil {
				seen = b.now()
			}
			st := PortState{Principal: p.principal, Seen: b.clock.toWall(seen), Online: p.attached}
			for _, u := range p.unsaid {
				st.Unsaid = append(st.Unsaid, u.notice)
			}
			s.Ports = append(s.Ports, st)
		}
		p.mu.Unlock()
	}
	b.registry.mu.Lock()
	defer b.registry.mu.Unlock()
	for _, f := range b.registry.m {
		if !f.passing() {
			s.Forwarders = append(s.Forwarders, b.stateOf(f))
		}
	}
	return s
}

// Restore brings back a state, before any front is connected. Devices are
// offline, with what their outboxes hold. It is meant for a bridge with the key
// that the state was made with: forwarders whose stored route begins with
// another hub address than their owner's are refused.
func (b *Bridge) Restore(s State) error {
	for _, ps := range s.Ports {
		if err := b.restorePort(ps); err != nil {
			return fmt.Errorf("bridge: restore %q: %w", ps.Principal.ClientID, err)
		}
	}
	for i := range s.Forwarders {
		if err := b.registry.restore(&s.Forwarders[i]); err != nil {
			return fmt.Errorf("bridge: restore %q: %w", s.Forwarders[i].Address, err)
		}
	}
	return nil
}

func (b *Bridge) restorePort(ps PortState) error {
	p, err := b.devicePort(ps.Principal, true)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if ps.Online {
		p.offlineSince = b.now()
		p.journal(false)
	} else {
		p.offlineSince = b.clock.fromWall(ps.Seen)
	}
	p.restored = true
	_, kept := b.cfg.Journal.(NoticeJournal)
	for _, n := range ps.Unsaid {
		p.unsaid = append(p.unsaid, unsaid{notice: n, kept: kept})
	}
	p.box.Scan(func(it *Item) bool {
		p.frames++
		p.bytes += len(it.Frame)
		if it.First {
			p.lastFirst = it.Seq
		}
		return true
	})
	// Whether a frame of the last process was offered is not known.
	p.everOffered = p.box.Next() - 1
	b.queued.add(p.frames, p.bytes)
	p.stripe.restored.Add(uint64(p.frames))
	p.setStatus(false)
	p.wakeBy(p.nextWake())
	return nil
}

func (r *registry) restore(s *ForwarderState) error {
	stored, err := newStoredRoute(s.Route)
	if err != nil {
		return err
	}
	var port *Port
	if s.Owner.ClientID != "" {
		r.b.mu.Lock()
		port = r.b.devices[s.Owner.ClientID]
		r.b.mu.Unlock()
		if port != nil && stored.next != port.addr {
			return fmt.Errorf("%w: made with another key", ErrRoute)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	f := &forwarder{addr: s.Address, kind: s.Kind, since: s.Since.UnixNano(), seen: r.b.clock.fromWall(s.Seen), claim: s.Claim}
	f.self = &worker{fwd: f}
	f.route.Store(stored)
	if !r.b.table.add(f.addr, f.self) {
		return ErrAddressTaken
	}
	r.m[f.addr] = f
	r.own(f, port, s.Owner)
	if s.Online {
		f.seen = r.b.now()
		r.changed(f)
		return nil
	}
	r.b.records.set(RecordForwarder, f.addr, r.record(f).JSON())
	return nil
}
