package device

import (
	"context"
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/route"
)

// Accepted is a secure channel that a peer dialled at a listener of this node. Most
// programs need none: they answer messages with Reply. It lives as long as the
// channel; when that breaks it is the peer who makes another one. All methods are
// safe for concurrent use.
type Accepted struct {
	n  *Node
	ch *channel.Channel
}

// Accepted returns the channels open now that peers have dialled, in no order.
func (n *Node) Accepted() []*Accepted {
	var all []*Accepted
	for _, ch := range n.endpoint.Channels() {
		if !ch.Initiator() {
			all = append(all, &Accepted{n, ch})
		}
	}
	return all
}

// Peer returns who is at the other end, with the credentials shown last.
func (a *Accepted) Peer() channel.Peer { return a.ch.Peer() }

// Listener returns the name of the listener that the peer dialled.
func (a *Accepted) Listener() string { return a.ch.Listener() }

// Address returns the channel's address on this node: what is sent or dialled along
// a route that begins with it goes through the channel.
func (a *Accepted) Address() string { return a.ch.EncryptorAddress() }

// Send sends payload to a worker of the peer, as Channel.Send does.
func (a *Accepted) Send(ctx context.Context, address string, payload []byte) error {
	return a.failure(ctx, "sending", a.ch.Send(ctx, route.To(address), a.n.answers(), payload))
}

// Request sends payload to a worker of the peer and waits for its answer, until
// ctx ends. Errors as for Channel.Request.
func (a *Accepted) Request(ctx context.Context, address string, payload []byte) (*Message, error) {
	joined, leave := a.n.join(ctx)
	defer leave(nil)
	m, _, err := a.n.requestThrough(joined, a.ch, address, payload)
	if err != nil {
		return nil, a.failure(joined, fmt.Sprintf("no answer from the peer's %q", address), err)
	}
	return m, nil
}

// RefreshCredentials shows the peer a new credential of ours.
func (a *Accepted) RefreshCredentials(ctx context.Context, credential []byte) error {
	return a.failure(ctx, "refreshing credentials", a.ch.RefreshCredentials(ctx, credential))
}

// Close ends the channel and tells the peer.
func (a *Accepted) Close() error { return a.ch.Close() }

// Done is closed when the channel has ended; Err says why.
func (a *Accepted) Done() <-chan struct{} { return a.ch.Done() }

// Err returns nil while the channel works, and afterwards why it ended: ErrClosed,
// ErrPeerClosed, or what broke it.
func (a *Accepted) Err() error {
	if err := a.ch.Err(); err != nil {
		return channelError(err)
	}
	return nil
}

// failure makes an error of this package; the end of the channel comes first.
func (a *Accepted) failure(ctx context.Context, what string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() == nil && a.Err() != nil && !errors.Is(err, channel.ErrTooLarge):
		return a.Err()
	}
	return a.n.failure(ctx, what, err)
}
