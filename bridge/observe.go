package bridge

import (
	"encoding/json"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// records are the retained records: small, in memory, each with one writer.
type records struct {
	ring *ring

	mu sync.Mutex // leaf; ring.mu is taken after it
	m  map[recordKey][]byte
}

type recordKey struct {
	kind RecordKind
	name string
}

func (r *records) init(ring *ring) {
	r.ring = ring
	r.m = make(map[recordKey][]byte)
}

// set changes a record; nil removes it.
func (r *records) set(kind RecordKind, name string, body []byte) {
	k := recordKey{kind, name}
	r.mu.Lock()
	defer r.mu.Unlock()
	if body == nil {
		if _, ok := r.m[k]; !ok {
			return
		}
		delete(r.m, k)
	} else {
		r.m[k] = body
	}
	r.ring.record(k, body)
}

// Records returns all retained records, in no order.
func (b *Bridge) Records() []Record {
	b.records.mu.Lock()
	defer b.records.mu.Unlock()
	out := make([]Record, 0, len(b.records.m))
	for k, body := range b.records.m {
		out = append(out, Record{Kind: k.kind, Name: k.name, JSON: body})
	}
	return out
}

// Replay calls begin, and what that returns for every retained record, on the
// observers' goroutine, so that it and Observer.Record together always end with the
// latest state; nil ends it. Replay returns at once, and does nothing while there is
// no observer. Replays are not dropped for want of room: begin returns nil for what
// another one has done.
func (b *Bridge) Replay(begin func() func(Record)) {
	b.ring.push(item{kind: itemReplay, replay: begin}, 0)
}

type itemKind uint8

const (
	itemCopy itemKind = iota
	itemTrace
	itemReplay
)

type item struct {
	kind   itemKind
	copy   Copy
	trace  traceLine
	replay func() func(Record)
}

type traceLine struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Hops  int    `json:"hops"`
	Bytes int    `json:"bytes"`
}

// ring keeps copies for observers until one goroutine hands them out. What it
// has no room for is dropped and counted; changes of records are merged, never
// dropped.
type ring struct {
	b      *Bridge
	active atomic.Bool
	handed atomic.Uint64
	lost   atomic.Uint64
	traces *rate.Limiter

	mu        sync.Mutex
	wake      *sync.Cond
	observers []*observer
	items     []item
	bytes     int
	dirty     map[recordKey][]byte
	order     []recordKey
	running   bool
	closed    bool
}

type observer struct{ Observer }

func (r *ring) init(b *Bridge) {
	r.b = b
	r.wake = sync.NewCond(&r.mu)
	r.dirty = make(map[recordKey][]byte)
	r.traces = rate.NewLimiter(rate.Limit(b.cfg.TraceRate), max(1, int(b.cfg.TraceRate)))
}

// Observe has o see what goes by from now on, until cancel. A call of o may be
// under way when cancel returns. Use Replay for the records there are already.
func (b *Bridge) Observe(o Observer) (cancel func()) {
	r := &b.ring
	ob := &observer{o}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.observers = append(slices.Clone(r.observers), ob)
	r.active.Store(true)
	if !r.running && !r.closed {
		r.running = true
		b.wg.Go(r.run)
	}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.observers = slices.DeleteFunc(slices.Clone(r.observers), func(x *observer) bool { return x == ob })
		if len(r.observers) == 0 {
			r.active.Store(false)
			r.wake.Broadcast()
		}
	}
}

func (r *ring) close() {
	r.mu.Lock()
	r.closed = true
	r.active.Store(false)
	r.wake.Broadcast()
	r.mu.Unlock()
}

// record notes a change; records.mu is held.
func (r *ring) record(k recordKey, body []byte) {
	if !r.active.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.dirty[k]; !ok {
		r.order = append(r.order, k)
	}
	r.dirty[k] = body
	r.wake.Signal()
}

// push adds an item of some bytes if there is room.
func (r *ring) push(it item, bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.running {
		return
	}
	if it.kind != itemReplay && (len(r.items) >= r.b.cfg.RingItems || r.bytes+bytes > r.b.cfg.RingBytes) {
		r.lost.Add(1)
		return
	}
	r.items = append(r.items, it)
	r.bytes += bytes
	r.wake.Signal()
}

// run hands out until there is no observer.
func (r *ring) run() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		for len(r.observers) > 0 && !r.closed && len(r.items) == 0 && len(r.order) == 0 {
			r.wake.Wait()
		}
		if len(r.observers) == 0 || r.closed {
			r.items, r.bytes, r.order = nil, 0, nil
			clear(r.dirty)
			r.running = false
			return
		}
		items, order, dirty, to := r.items, r.order, r.dirty, r.observers
		r.items, r.bytes, r.order = nil, 0, nil
		r.dirty = make(map[recordKey][]byte)
		r.mu.Unlock()
		for _, k := range order {
			for _, o := range to {
				o.Record(Record{Kind: k.kind, Name: k.name, JSON: dirty[k]})
			}
		}
		for i := range items {
			if !r.active.Load() {
				break
			}
			r.hand(&items[i], to)
		}
		r.mu.Lock()
	}
}

func (r *ring) hand(it *item, to []*observer) {
	switch it.kind {
	case itemReplay:
		f := it.replay()
		if f == nil {
			return
		}
		for _, rec := range r.b.Records() {
			if !r.active.Load() {
				return
			}
			f(rec)
		}
		return
	case itemCopy:
		for _, o := range to {
			o.Copy(it.copy)
		}
	case itemTrace:
		line, err := json.Marshal(it.trace)
		if err != nil {
			return // strings and numbers only: cannot be
		}
		for _, o := range to {
			o.Trace(line)
		}
	}
	r.handed.Add(1)
}

// sawPacket copies a device's packet for observers.
func (b *Bridge) sawPacket(p *Port, payload []byte) {
	if !b.ring.active.Load() || p.kind != portDevice {
		return
	}
	b.ring.copy(p, FromDevice, payload)
}

// sawDelivery copies what a device's connection took.
func (b *Bridge) sawDelivery(p *Port, took []Entry) {
	if !b.ring.active.Load() || p.kind != portDevice {
		return
	}
	for i := range took {
		b.ring.copy(p, ToDevice, took[i].Frame)
	}
}

func (r *ring) copy(p *Port, d Direction, payload []byte) {
	r.push(item{copy: Copy{Direction: d, Device: p.clientID, Payload: slices.Clone(payload)}}, len(payload))
}

// trace notes where each frame of a packet goes.
func (b *Bridge) trace(in *inbound, to string, pk *Packet) {
	if !b.cfg.Trace || !b.ring.active.Load() {
		return
	}
	from := in.link.port
	line := traceLine{From: from.addr, To: to}
	if from.clientID != "" {
		line.From = from.clientID
	}
	if w := b.table.lookup(to); w != nil && w.port != nil && w.port.clientID != "" {
		line.To = w.port.clientID
	}
	for i := range pk.views {
		if !b.ring.traces.Allow() {
			return
		}
		line.Hops, line.Bytes = pk.views[i].OnwardLen(), pk.views[i].Len()
		b.ring.push(item{kind: itemTrace, trace: line}, 128)
	}
}
