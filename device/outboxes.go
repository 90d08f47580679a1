package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Destination is a peer and the way to it.
type Destination struct {
	// Route leads to a listener of the peer, as for Dial: usually its forwarding
	// address alone.
	Route route.Route
	// Peer is the identifier that the peer has to prove.
	Peer identity.Identifier
}

func (d Destination) key() string { return string(d.Peer[:]) + d.Route.String() }

// Outbox is a queue of messages for one address of one peer, which need not be
// there: the node dials it whenever there is something to deliver, again and again,
// until the peer's program has acknowledged everything, in the order in which it was
// posted. With Config.OutboxDir it is on disk and goes on in the next process. All
// methods are safe for concurrent use.
type Outbox struct {
	n       *Node
	to      Destination
	address string
	ch      *Channel
	st      *stream
}

// outboxes are the outboxes of a node. Its fields are guarded by deliveries.mu.
type outboxes struct {
	store    *outboxStore // nil: in memory
	channels map[string]*Channel
	all      map[string]*Outbox
}

// maxOutboxes bounds the outboxes of a node.
const maxOutboxes = 4096

// openOutboxes opens the store and takes up what an earlier process has left.
func (n *Node) openOutboxes() (*outboxes, error) {
	obs := &outboxes{channels: make(map[string]*Channel), all: make(map[string]*Outbox)}
	if n.cfg.OutboxDir == "" {
		return obs, nil
	}
	store, left, err := openOutboxStore(n.cfg.OutboxDir, n.cfg.Identity, n.log)
	if err != nil {
		return obs, err
	}
	obs.store = store
	n.outboxes = obs
	n.deliveries.mu.Lock()
	defer n.deliveries.mu.Unlock()
	for _, l := range left {
		n.addOutboxLocked(l.to, l.address, l.stored, l)
	}
	return obs, nil
}

func (obs *outboxes) close() {
	if obs != nil && obs.store != nil {
		obs.store.close()
	}
}

// of returns the outbox of a stream; nil for one of Channel.Deliver.
func (obs *outboxes) of(st *stream) *Outbox {
	for _, o := range obs.all {
		if o.st == st {
			return o
		}
	}
	return nil
}

// through returns the outboxes that go through a channel.
func (obs *outboxes) through(c *Channel) (all []*Outbox) {
	c.n.deliveries.mu.Lock()
	defer c.n.deliveries.mu.Unlock()
	for _, o := range obs.all {
		if o.ch == c {
			all = append(all, o)
		}
	}
	return all
}

// Outbox returns the node's outbox for an address of a peer; always the same one
// for the same destination and address. There can be 4,096 of them.
func (n *Node) Outbox(to Destination, address string) (*Outbox, error) {
	switch {
	case len(to.Route) == 0:
		return nil, errors.New("device: outbox: the route is empty")
	case to.Peer.IsZero():
		return nil, errors.New("device: outbox: the peer's identifier is missing: messages wait for one peer, whoever answers")
	}
	if err := checkDelivery(n, address, 0); err != nil {
		return nil, err
	}
	if err := n.Err(); err != nil {
		return nil, err
	}
	ds := n.deliveries
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if o := n.outboxes.all[to.key()+"\x00"+address]; o != nil {
		return o, nil
	}
	if len(n.outboxes.all) >= maxOutboxes {
		return nil, fmt.Errorf("%w: there are %d outboxes; forget some with Outbox.Forget", ErrBusy, maxOutboxes)
	}
	to.Route = to.Route.Clone()
	var stored *storedOutbox
	if n.outboxes.store != nil {
		var err error
		if stored, err = n.outboxes.store.create(to, address); err != nil {
			return nil, err
		}
	}
	return n.addOutboxLocked(to, address, stored, nil), nil
}

// addOutboxLocked makes an outbox, and the channel that it goes through if it is
// the first with its destination.
func (n *Node) addOutboxLocked(to Destination, address string, stored *storedOutbox, left *leftOutbox) *Outbox {
	lim := streamLimits{messages: n.cfg.OutboxMessages, bytes: n.cfg.OutboxBytes}
	o := &Outbox{n: n, to: to, address: address}
	if left == nil {
		o.st = n.deliveries.newStreamLocked(address, lim, stored, nil)
	} else {
		o.st = n.deliveries.newStreamLocked(address, lim, stored, &left.restored)
	}
	o.ch = n.outboxes.channels[to.key()]
	if o.ch == nil {
		o.ch = n.openOnDemand(to)
		n.outboxes.channels[to.key()] = o.ch
	}
	o.ch.addStreamLocked(o.st)
	n.outboxes.all[to.key()+"\x00"+address] = o
	if _, waiting, _ := o.st.snd.Pending(); waiting > 0 {
		o.ch.signal()
	}
	return o
}

// openOnDemand makes a channel that is dialled when an outbox wants it.
func (n *Node) openOnDemand(to Destination) *Channel {
	c := &Channel{
		n: n, to: to.Route, who: to.Peer, policy: channel.TrustIdentifiers(to.Peer),
		persist: true, want: make(chan struct{}, 1), healing: true,
		done: make(chan struct{}), changed: make(chan struct{}), gone: make(chan struct{}, 1), remade: make(chan struct{}),
	}
	c.opts.channel.Lineage = n.takeLineage(c.to)
	c.mend, c.cancel = context.WithCancel(context.Background())
	n.mu.Lock()
	if !n.closed {
		n.channels[c] = struct{}{}
		n.tasks.Go(c.watch)
	}
	n.mu.Unlock()
	return c
}

// signal says that an outbox has something.
func (c *Channel) signal() {
	select {
	case c.want <- struct{}{}:
	default:
	}
}

// wanted waits until an outbox of the channel has something; false when the end has
// come.
func (c *Channel) wanted() bool {
	for {
		waiting := 0
		c.n.deliveries.mu.Lock()
		for _, st := range c.streams {
			if _, messages, _ := st.snd.Pending(); st.err == nil {
				waiting += messages
			}
		}
		c.n.deliveries.mu.Unlock()
		if waiting > 0 {
			return true
		}
		c.rest()
		select {
		case <-c.want:
		case <-c.mend.Done():
			return false
		case <-c.n.stopped.Done():
			c.end(c.n.Err())
			return false
		}
	}
}

// Post adds a message and returns when it is in the outbox: with Config.OutboxDir on
// disk, so that it is delivered whatever happens to this process. It waits for room,
// and for a disk that refuses writes, which the error names, until ctx ends; then
// nothing is delivered. payload may be used again afterwards.
//
// Errors: ErrTooLarge, ErrOutboxBehind, ErrTimeout or that of ctx, what stopped the
// node.
func (o *Outbox) Post(ctx context.Context, payload []byte) (*Receipt, error) {
	return o.post(ctx, payload, false)
}

func (o *Outbox) post(ctx context.Context, payload []byte, strict bool) (*Receipt, error) {
	if err := checkDelivery(o.n, o.address, len(payload)); err != nil {
		return nil, err
	}
	joined, leave := o.ch.untilEnd(ctx)
	defer leave()
	r, err := o.st.post(joined, bytes.Clone(payload), strict)
	if err != nil {
		return nil, o.failure(ctx, err)
	}
	return r, nil
}

// failure says that the node has stopped where that is why.
func (o *Outbox) failure(ctx context.Context, err error) error {
	if end := o.ch.Err(); err != nil && ctx.Err() == nil && end != nil {
		return end
	}
	return err
}

// Deliver posts a message and waits until the peer's program has acknowledged it.
// When ctx ends first the message is withdrawn, as by Channel.Deliver; Post leaves it
// in the outbox. A process that ends meanwhile leaves it too.
//
// Errors: ErrNoDelivery, at the latest 10 s after a handshake with a peer that does
// not say hello; ErrPeerRefused; ErrNoWorker; ErrUnacknowledged with what ended the
// wait; and those of Post.
func (o *Outbox) Deliver(ctx context.Context, payload []byte) error {
	r, err := o.post(ctx, payload, true)
	if err != nil {
		return err
	}
	return o.st.await(ctx, r)
}

// Deliver delivers a message through the outbox for the destination and address, see
// Outbox.Deliver.
func (n *Node) Deliver(ctx context.Context, to Destination, address string, payload []byte) error {
	o, err := n.Outbox(to, address)
	if err != nil {
		return err
	}
	return o.Deliver(ctx, payload)
}

// Outboxes returns the node's outboxes, those left by an earlier process included,
// in no order.
func (n *Node) Outboxes() []*Outbox {
	n.deliveries.mu.Lock()
	defer n.deliveries.mu.Unlock()
	all := make([]*Outbox, 0, len(n.outboxes.all))
	for _, o := range n.outboxes.all {
		all = append(all, o)
	}
	return all
}

// Destination returns where the messages go.
func (o *Outbox) Destination() Destination {
	return Destination{Route: o.to.Route.Clone(), Peer: o.to.Peer}
}

// Address returns the address at the peer.
func (o *Outbox) Address() string { return o.address }

// Pending returns how many messages, and bytes of payload, wait for acknowledgement:
// not those that have failed, or whose sender has stopped waiting (Outbox.Deliver).
func (o *Outbox) Pending() (messages, bytes int) {
	o.n.deliveries.mu.Lock()
	defer o.n.deliveries.mu.Unlock()
	return o.st.snd.Waiting()
}

// Last returns the id of the last message that was added; its Count is 0 before the
// first. Counts rise by one, from 1, in this process and those before it, so a
// program can tell from it how many of its messages the outbox has ever taken.
func (o *Outbox) Last() MessageID {
	o.n.deliveries.mu.Lock()
	defer o.n.deliveries.mu.Unlock()
	next, _, _ := o.st.snd.Pending()
	return MessageID{Sender: o.n.Identifier(), Outbox: o.st.id, Count: next - 1}
}

// Forget ends the outbox, on disk too. What waits in it is not delivered. The channel to
// its destination ends with the last outbox that goes there.
func (o *Outbox) Forget() error {
	ds := o.n.deliveries
	ds.mu.Lock()
	defer ds.mu.Unlock()
	key := o.to.key() + "\x00" + o.address
	if o.n.outboxes.all[key] != o {
		return nil
	}
	delete(o.n.outboxes.all, key)
	delete(o.ch.streams, o.address)
	o.st.endLocked(fmt.Errorf("%w: the outbox was forgotten", ErrClosed))
	if len(o.ch.streams) == 0 && o.n.outboxes.channels[o.to.key()] == o.ch {
		delete(o.n.outboxes.channels, o.to.key())
		o.ch.end(ErrClosed)
	}
	if o.st.store != nil {
		return o.st.store.forget()
	}
	return nil
}

// sortedCounts returns counts in rising order.
func sortedCounts[V any](m map[uint64]V) []uint64 {
	out := make([]uint64, 0, len(m))
	for c := range m {
		out = append(out, c)
	}
	slices.Sort(out)
	return out
}
