package device

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/delivery"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// deliveryRoute is where the delivery layers of two devices speak to each other,
// inside a channel.
var deliveryRoute = route.To(channel.DeliveryAddress)

// deliveries is the delivery layer of a node: one end of every outbox that it sends
// from or receives at, and the channels that they use. Lock order: mu, then those
// of the node, of channels and of the store.
type deliveries struct {
	n       *Node
	session uint64 // where the session numbers of this process begin

	mu      sync.Mutex // guards everything below, streams included
	recv    *delivery.Receiver
	pipes   map[*channel.Channel]*pipe
	byID    map[uint64]*pipe
	streams map[delivery.OutboxID]*stream
	last    uint64 // pipe id given last
	running int    // pumps
	quiet   []chan struct{}
}

// pipe is a channel in use by the delivery layer.
type pipe struct {
	id      uint64
	ch      *channel.Channel
	peer    identity.Identifier
	streams []*stream // that send through it
	turn    int
	running bool
}

// via is what a message needs of the channel that it came through.
type via struct {
	origin node.Origin
	ret    route.Route
	class  route.Class
}

func newDeliveries(n *Node) *deliveries {
	ds := &deliveries{
		n: n, session: uint64(time.Now().UnixMilli()),
		pipes: make(map[*channel.Channel]*pipe), byID: make(map[uint64]*pipe), streams: make(map[delivery.OutboxID]*stream),
	}
	ds.recv = delivery.NewReceiver(delivery.ReceiverConfig{Hand: ds.hand})
	return ds
}

// jitter varies a pause by a quarter.
func jitter(d time.Duration) time.Duration {
	return d - d/4 + rand.N(d/2) //nolint:gosec // nobody has to guess it
}

// receive takes a message of a peer's delivery layer. It does not block.
func (ds *deliveries) receive(d *channel.Delivery) {
	m, err := delivery.Parse(d.Frame.Payload)
	if err != nil {
		ds.n.in.dropped[dropMalformed].Add(1)
		return
	}
	now := time.Now()
	ds.mu.Lock()
	defer ds.mu.Unlock()
	p := ds.pipeLocked(d.Channel)
	if p == nil {
		return
	}
	switch m := m.(type) {
	case *delivery.Data:
		ds.recv.Data(p.peer, p.id, m, &via{
			origin: node.Origin{
				Via: node.Channel, Peer: p.peer, Listener: d.Listener, Encryptor: d.Channel.EncryptorAddress(),
			},
			ret: d.Frame.Return, class: d.Class,
		}, now)
	case *delivery.Ask:
		ds.recv.Ask(p.peer, p.id, m, now)
	case *delivery.Settle:
		ds.recv.Settle(p.peer, p.id, m, now)
	case *delivery.State:
		st := ds.streams[m.Outbox]
		if st == nil || st.pipe != p {
			ds.n.in.dropped[dropUnexpected].Add(1)
			return
		}
		st.receivedLocked(m, now)
	}
	ds.wakeLocked(p)
}

// hand gives a message to the worker that it is for. mu is held.
func (ds *deliveries) hand(it delivery.Item) delivery.Refusal {
	v, _ := it.Via.(*via)
	id := MessageID{Sender: it.Peer, Outbox: it.Outbox, Count: it.Count}
	f := route.Frame{Onward: route.To(it.To), Return: v.ret, Payload: it.Payload}
	switch ds.n.local.InjectMessage(v.origin, f, v.class, node.Meta{
		ID: id, Redelivered: it.Redelivered, Bounded: true,
		Ack:     func() error { return ds.ack(id) },
		Dropped: func() { ds.dropped(id) },
	}) {
	case 0:
		return delivery.RefusalNone
	case node.DropFull:
		return delivery.RefusalFull
	default:
		return delivery.RefusalUnknown
	}
}

// ack is what a program's Ack does.
func (ds *deliveries) ack(id MessageID) error {
	if err := ds.n.Err(); err != nil {
		return err // it will come again to the next process
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.wakeLocked(ds.byID[ds.recv.Ack(id.Sender, id.Outbox, id.Count)])
	return nil
}

// dropped hears of a message that its queue dropped when it was closed.
func (ds *deliveries) dropped(id MessageID) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.wakeLocked(ds.byID[ds.recv.Return(id.Sender, id.Outbox, id.Count)])
}

// pipeLocked returns the pipe of a channel; nil when the channel or the node has
// ended.
func (ds *deliveries) pipeLocked(ch *channel.Channel) *pipe {
	if p := ds.pipes[ch]; p != nil {
		return p
	}
	if ended(ch) {
		return nil
	}
	ds.last++
	p := &pipe{id: ds.last, ch: ch, peer: ch.Peer().Identifier}
	if !ds.n.spawn(func() { ds.watch(p) }) {
		return nil
	}
	ds.pipes[ch], ds.byID[p.id] = p, p
	return p
}

// watch takes a pipe away when its channel ends.
func (ds *deliveries) watch(p *pipe) {
	select {
	case <-p.ch.Done():
	case <-ds.n.stopped.Done():
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	delete(ds.pipes, p.ch)
	delete(ds.byID, p.id)
	for _, st := range p.streams {
		st.detachLocked()
	}
	p.streams = nil
	ds.recv.Gone(p.id)
}

// wakeLocked sees to it that what is to be sent through the pipe is sent.
func (ds *deliveries) wakeLocked(p *pipe) {
	if p == nil || p.running {
		return
	}
	if p.running = ds.n.spawn(func() { ds.pump(p) }); p.running {
		ds.running++
	}
}

// pump sends what there is to send through a pipe, and ends when there is nothing.
func (ds *deliveries) pump(p *pipe) {
	for {
		ds.mu.Lock()
		m, st := ds.nextLocked(p)
		if m == nil {
			ds.restLocked(p)
			ds.mu.Unlock()
			return
		}
		ds.mu.Unlock()
		var ret route.Route
		ctx := ds.n.stopped
		data, _ := m.(*delivery.Data)
		if data != nil {
			ret = ds.n.answers()
			ctx = withLost(ctx, func(err error) { ds.fail(st, data.Count, err) })
		}
		err := p.ch.Send(ctx, deliveryRoute, ret, m.Append(nil))
		switch {
		case err == nil:
		case errors.Is(err, channel.ErrTooLarge) && data != nil:
			ds.fail(st, data.Count, ErrTooLarge)
		default:
			// The channel has ended, or will be found to have lost it.
			ds.n.log.Debug("delivery message not sent", "peer", p.peer, "err", err)
		}
	}
}

// fail gives a message up that cannot be sent.
func (ds *deliveries) fail(st *stream, count uint64, why error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	st.failLocked(count, why)
}

// nextLocked returns the next message to send through a pipe.
func (ds *deliveries) nextLocked(p *pipe) (delivery.Message, *stream) {
	if ended(p.ch) || ds.n.Err() != nil {
		return nil, nil
	}
	if st, ok := ds.recv.NextState(p.id); ok {
		return st, nil
	}
	now := time.Now()
	for range p.streams {
		p.turn++
		st := p.streams[p.turn%len(p.streams)]
		if m, ok := st.snd.Next(now); ok {
			return m, st
		}
	}
	return nil, nil
}

// restLocked ends a pump.
func (ds *deliveries) restLocked(p *pipe) {
	p.running = false
	for _, st := range p.streams {
		st.armLocked()
	}
	if ds.running--; ds.running == 0 {
		for _, q := range ds.quiet {
			close(q)
		}
		ds.quiet = nil
	}
}

// flush waits until nothing is being sent, or ctx ends.
func (ds *deliveries) flush(ctx context.Context) {
	ds.mu.Lock()
	if ds.running == 0 {
		ds.mu.Unlock()
		return
	}
	q := make(chan struct{})
	ds.quiet = append(ds.quiet, q)
	ds.mu.Unlock()
	select {
	case <-q:
	case <-ctx.Done():
	}
}

// follow has the outboxes of c go on through cur, once its peer is known to have a
// delivery layer.
func (ds *deliveries) follow(c *Channel, cur *channel.Channel) {
	ds.n.spawn(func() {
		select {
		case <-cur.Greeted():
		case <-cur.Done():
			return
		case <-ds.n.stopped.Done():
			return
		case <-patience(c.persist || c.confirmed.Load()):
			if c.persist {
				ds.refuse(c, fmt.Errorf("%w: it does not say hello", ErrNoDelivery))
			}
			// What was posted stays. The hello may be late; or the peer's half of the
			// channel never came up, and then nothing else would end ours.
			select {
			case <-cur.Greeted():
			case <-cur.Done():
				return
			case <-ds.n.stopped.Done():
				return
			case <-time.After(helloPatience):
				select {
				case c.gone <- struct{}{}:
				default:
				}
				return
			}
		}
		epoch, _ := cur.PeerEpoch()
		ds.mu.Lock()
		defer ds.mu.Unlock()
		if cur.Features()&channel.FeatureDelivery == 0 {
			ds.refuseLocked(c, fmt.Errorf("%w: it is a sealmq peer without that feature", ErrNoDelivery))
			return
		}
		p := ds.pipeLocked(cur)
		if p == nil {
			return
		}
		c.pipe, c.epoch = p, epoch
		for _, st := range c.streams {
			st.attachLocked(p, epoch)
		}
		ds.wakeLocked(p)
	})
}

// patience is how long to wait for the hello of a peer that has to acknowledge.
func patience(limited bool) <-chan time.Time {
	if limited {
		return time.After(helloPatience)
	}
	return nil
}

// refuse fails those who wait for an acknowledgement that cannot come now. What was
// posted without waiting stays.
func (ds *deliveries) refuse(c *Channel, err error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.refuseLocked(c, err)
}

func (ds *deliveries) refuseLocked(c *Channel, err error) {
	for _, st := range c.streams {
		for count, r := range st.waiting {
			if r.strict {
				st.failLocked(count, err)
			}
		}
	}
}

// farewell tells the peer what it may forget, when the program closes a channel.
func (ds *deliveries) farewell(c *Channel, cur *channel.Channel) {
	var last []delivery.Message
	ds.mu.Lock()
	for _, st := range c.streams {
		if st.store == nil && st.pipe != nil {
			if m := st.snd.Finish(); m != nil {
				last = append(last, m)
			}
		}
	}
	ds.mu.Unlock()
	if len(last) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeFlush)
	defer cancel()
	for _, m := range last {
		if cur.Send(ctx, deliveryRoute, nil, m.Append(nil)) != nil {
			return
		}
	}
}

// ended ends the outboxes of a channel that has ended for good.
func (ds *deliveries) ended(c *Channel, err error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for _, st := range c.streams {
		st.endLocked(err)
	}
	c.streams, c.pipe = nil, nil
}
