package node

import (
	"context"
	"fmt"

	"github.com/sealmq/sealmq/route"
)

// OpenMailbox makes a mailbox at addr, for Receive. It exists, and fills, until
// Remove or Close.
func (n *Node) OpenMailbox(addr string, a Access) error {
	return n.add(&worker{addr: addr, access: a.clone(), box: newMailbox(&n.cfg, &n.stats), receive: true})
}

// LostError is what Receive returns once in the place of messages that were dropped
// because the mailbox was full. Receiving goes on afterwards.
type LostError struct {
	Address string
	Count   uint64 // messages
}

func (e *LostError) Error() string {
	return fmt.Sprintf("node: mailbox %q was full: %d messages dropped; receive faster or use acknowledged delivery", e.Address, e.Count)
}

// Receive returns the next message at the mailbox addr, waiting for one until ctx
// ends. It returns ErrNotMailbox when addr has not been opened, a *LostError where
// messages had to be dropped, ErrClosed when the mailbox or the node was closed.
// Several callers may wait; each message goes to one of them.
func (n *Node) Receive(ctx context.Context, addr string) (*Message, error) {
	n.mu.RLock()
	w, closed := n.workers[addr], n.closed
	n.mu.RUnlock()
	switch {
	case closed:
		return nil, ErrClosed
	case w == nil || !w.receive:
		return nil, fmt.Errorf("%w: %q", ErrNotMailbox, addr)
	}
	m, lost, err := w.box.next(ctx, true)
	switch {
	case err != nil:
		return nil, fmt.Errorf("node: receive at %q: %w", addr, err)
	case lost > 0:
		return nil, &LostError{Address: addr, Count: lost}
	}
	return m, nil
}

// Handle calls fn for each message that arrives at addr, in order, on a goroutine
// of its own. ctx ends when the node is closed or the worker removed. fn may call
// anything and take its time; messages wait in a bounded queue meanwhile.
func (n *Node) Handle(addr string, a Access, fn func(ctx context.Context, m *Message)) error {
	box := newMailbox(&n.cfg, &n.stats)
	ctx, cancel := context.WithCancel(n.ctx)
	w := &worker{addr: addr, access: a.clone(), box: box, cancel: cancel, run: func() {
		defer cancel()
		for {
			m, _, err := box.next(ctx, false)
			if err != nil {
				return
			}
			fn(ctx, m)
		}
	}}
	if err := n.add(w); err != nil {
		cancel()
		return err
	}
	return nil
}

// RegisterFunc calls fn in place for each frame that arrives at addr: in order of
// arrival, never twice at a time, on the goroutine that brings the frame or, when
// fn is busy, on the one it is busy on. fn must not block. The frame's payload is
// fn's to keep and to change; its routes may be kept but not changed. The frame is
// as it arrived: addr is still its first onward hop.
func (n *Node) RegisterFunc(addr string, a Access, fn func(f route.Frame, c route.Class, o Origin)) error {
	return n.add(&worker{addr: addr, access: a.clone(), direct: &direct{
		fn:          func(x arrival) { fn(x.frame, x.class, x.origin) },
		maxMessages: n.cfg.MailboxMessages,
		maxBytes:    n.cfg.MailboxBytes,
		stats:       &n.stats,
		start:       n.start,
	}})
}

// Alias makes addr another name of target: a frame whose onward route is addr alone
// goes to target, whatever target's own access says; in a longer one addr is
// removed and the next hop decides, by its own access. A device registers such an
// address at a forwarder, in front of a listener.
func (n *Node) Alias(addr, target string, a Access) error {
	if addr == target {
		return fmt.Errorf("%w: alias of itself", ErrBadAddress)
	}
	return n.add(&worker{addr: addr, access: a.clone(), target: target})
}
