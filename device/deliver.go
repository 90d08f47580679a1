package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/delivery"
	"github.com/sealmq/sealmq/route"
)

// Guarantee says what is known of a message when the call that sent it has
// returned without error.
type Guarantee uint8

const (
	// GuaranteeHub is what Send and Flush give: the hub has acknowledged the frame.
	// All that a stock Ockam peer can be sent.
	GuaranteeHub Guarantee = iota
	// GuaranteePeer is what Deliver gives: the peer's program has acknowledged the
	// message with Message.Ack, and that has come back sealed.
	GuaranteePeer
)

// String returns "hub" or "peer".
func (g Guarantee) String() string {
	if g == GuaranteePeer {
		return "peer"
	}
	return "hub"
}

// helloPatience is how long Deliver waits for the hello of a peer that is expected
// to say one.
const helloPatience = 10 * time.Second

// Limits of what one outbox in memory holds: what Deliver has taken and the peer has
// not acknowledged.
var memoryLimits = streamLimits{messages: 1024, bytes: 8 << 20}

// Guarantee returns the strongest guarantee that the peer can give. It is
// GuaranteeHub as long as the peer has not said hello.
func (c *Channel) Guarantee() Guarantee {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur != nil && c.cur.Features()&channel.FeatureDelivery != 0 {
		return GuaranteePeer
	}
	return GuaranteeHub
}

// Deliver sends payload to a worker of the peer and returns once the peer's program
// has acknowledged it (Message.Ack). Until then the message is sent again as
// needed, also after the channel was made anew, which the peer's orderly end sets off
// too. Messages to one address arrive in
// the order of the calls, each once as long as the peer's process lives; after that
// an unacknowledged one comes again to the next process, marked as redelivered. Many
// calls may run at once. payload may be used again afterwards.
//
// When ctx ends first the message is withdrawn: it is not sent again, but the peer's
// program may have taken it if the error is ErrUnacknowledged. The error says too why the
// peer could not be reached, if it could not. A Channel keeps
// messages in memory only; Node.Outbox keeps them on disk.
//
// Errors: ErrNoDelivery at once when the peer cannot acknowledge, as no stock Ockam
// peer can; ErrNoWorker when nobody takes messages at the address; ErrTooLarge;
// ErrUnacknowledged with what ended the wait; and those of Send.
func (c *Channel) Deliver(ctx context.Context, address string, payload []byte) error {
	st, err := c.stream(ctx, address, len(payload))
	if err != nil {
		return err
	}
	joined, leave := c.untilEnd(ctx)
	defer leave()
	err = st.deliver(joined, bytes.Clone(payload))
	if err != nil && ctx.Err() == nil && c.Err() != nil && !errors.Is(err, ErrNoWorker) && !errors.Is(err, ErrTooLarge) {
		if errors.Is(err, ErrUnacknowledged) {
			return fmt.Errorf("%w: %w", ErrUnacknowledged, c.Err())
		}
		return c.Err()
	}
	return err
}

// DeliverString is Deliver with an Ockam String.
func (c *Channel) DeliverString(ctx context.Context, address, s string) error {
	return c.Deliver(ctx, address, EncodeString(s))
}

// errEnding is the cause of a context of untilEnd when the channel ends.
var errEnding = errors.New("device: the channel ends")

// untilEnd returns a context that ends with ctx or with the channel.
func (c *Channel) untilEnd(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(c.mend, func() { cancel(errEnding) })
	return ctx, func() {
		unhook()
		cancel(nil)
	}
}

// stream returns the channel's outbox for an address of the peer.
func (c *Channel) stream(ctx context.Context, address string, size int) (*stream, error) {
	if err := checkDelivery(c.n, address, size); err != nil {
		return nil, err
	}
	if err := c.awaitDelivery(ctx); err != nil && !errors.Is(err, errResting) {
		return nil, err
	}
	ds := c.n.deliveries
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if err := c.Err(); err != nil {
		return nil, err
	}
	if st := c.streams[address]; st != nil && st.err == nil {
		return st, nil
	}
	if len(c.streams) >= maxStreams {
		return nil, fmt.Errorf("%w: %d addresses of one peer", ErrBusy, maxStreams)
	}
	st := ds.newStreamLocked(address, memoryLimits, nil, nil)
	c.addStreamLocked(st)
	return st, nil
}

// maxStreams bounds the addresses of one peer that Deliver is used for.
const maxStreams = 1024

// addStreamLocked gives the channel another outbox. The lock of deliveries is held.
func (c *Channel) addStreamLocked(st *stream) {
	if c.streams == nil {
		c.streams = make(map[string]*stream)
	}
	c.streams[st.to], st.ch = st, c
	if c.pipe != nil && !ended(c.pipe.ch) {
		st.attachLocked(c.pipe, c.epoch)
		c.n.deliveries.wakeLocked(c.pipe)
	}
}

// checkDelivery refuses what can never be sent.
func checkDelivery(n *Node, address string, size int) error {
	if address == "" || len(address) > delivery.MaxAddress {
		return fmt.Errorf("device: deliver: the address %q must have 1 to %d bytes", address, delivery.MaxAddress)
	}
	limit := int(n.link.frameLimit.Load()) - frameOverhead
	if size > limit {
		return fmt.Errorf("%w: the message has %d bytes, %d can be delivered; send it in pieces", ErrTooLarge, size, limit)
	}
	return nil
}

// frameOverhead is what a frame of the delivery layer has beside the payload: its
// own message, the channel's, and routes.
const frameOverhead = delivery.Overhead + delivery.MaxAddress + channel.Overhead + 512

// awaitDelivery returns nil once the peer is known to acknowledge.
func (c *Channel) awaitDelivery(ctx context.Context) error {
	patience := time.NewTimer(helloPatience)
	defer patience.Stop()
	for {
		cur, err := c.present(ctx)
		if err != nil {
			return err
		}
		if cur.Confirmed() {
			if cur.Features()&channel.FeatureDelivery == 0 {
				return fmt.Errorf("%w: it is a sealmq peer without that feature", ErrNoDelivery)
			}
			c.confirmed.Store(true)
			return nil
		}
		if !c.opts.channel.NoConfirm && !c.confirmed.Load() && !cur.HelloExpected() {
			return fmt.Errorf("%w: it did not say hello, so it is a stock Ockam peer; use Send", ErrNoDelivery)
		}
		select {
		case <-cur.Greeted():
		case <-cur.Done():
			if c.opts.noHeal {
				<-c.done
			}
		case <-patience.C:
			return fmt.Errorf("%w: it does not say hello", ErrNoDelivery)
		case <-ctx.Done():
			return ctxError(ctx, "waiting for the peer's hello")
		}
	}
}

// lineage names the row of channels that this program dials along a route, of those
// that it keeps open at once. It is the same in the next process, so that the peer
// ends what this one leaves behind.
func (n *Node) takeLineage(to route.Route) [16]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := 0; ; i++ {
		secret := n.lineageSecret(fmt.Sprintf("lineage/1\x00%s\x00%s\x00%d", n.clientID, to, i))
		l := [16]byte(secret[:16])
		if _, taken := n.lineages[l]; !taken {
			n.lineages[l] = struct{}{}
			return l
		}
	}
}

func (n *Node) freeLineage(l [16]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.lineages, l)
}
