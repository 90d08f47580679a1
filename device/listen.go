package device

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/route"
)

// ListenOption changes how a Listener answers.
type ListenOption func(*channel.ListenOptions)

// HideCredential shows peers that dial none of our credentials.
func HideCredential() ListenOption {
	return func(o *channel.ListenOptions) { o.HideCredential = true }
}

// Listener answers peers that dial it. What they send through their channels
// arrives at mailboxes and handlers, with their verified identifier.
type Listener struct {
	n      *Node
	ln     *channel.Listener
	name   string
	m      string // its address at forwarders
	closed bool   // guarded by Node.mu
}

// Listen answers secure channels at the local address name, for peers that policy
// accepts. The hub reaches it once it has a forwarder (CreateForwarder); one that it has
// of an earlier process counts, and what came through that in the first 10 s of the
// connection, before Listen, is answered now.
func (n *Node) Listen(name string, policy channel.Policy, opts ...ListenOption) (*Listener, error) {
	if policy == nil {
		return nil, errors.New("device: listen: no trust policy given: pass channel.TrustEveryone to accept any identity")
	}
	if err := n.Err(); err != nil {
		return nil, err
	}
	if err := n.checkRoutes(route.To(name)); err != nil {
		return nil, err
	}
	var o channel.ListenOptions
	for _, opt := range opts {
		opt(&o)
	}
	ln, err := n.endpoint.Listen(name, policy, o)
	if err != nil {
		return nil, fmt.Errorf("device: %w", err)
	}
	l := &Listener{n: n, ln: ln, name: name, m: n.forwardedAddress(name)}
	// Plain frames to M alone go to the listener; behind M the next hop decides.
	if err := n.local.Alias(l.m, name, Access{Forwarders: true}); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("device: listen: %w", err)
	}
	n.mu.Lock()
	n.listeners[name] = l
	n.mu.Unlock()
	n.early.listening(l.m)
	return l, nil
}

// forwardedAddress is M, this device's end of a registration: it depends on the
// identity's secret and the listener's name alone, so that the hub gives a listener
// the same forwarding address after reconnects and restarts, and nobody but the hub
// knows it.
func (n *Node) forwardedAddress(listener string) string {
	secret := n.cfg.Identity.Secret("listener/1" + listener)
	return hex.EncodeToString(secret[:16])
}

// furtherAddress is M of a listener's second dynamic forwarder (place 0), its third, and
// so on.
func (n *Node) furtherAddress(listener string, place int) string {
	secret := n.cfg.Identity.Secret(fmt.Sprintf("forwarder/1/%d/%s", place, listener))
	return hex.EncodeToString(secret[:16])
}

// Name returns the listener's local address.
func (l *Listener) Name() string { return l.name }

// Close stops answering. Channels that are open, and handshakes that have begun,
// go on. Forwarders of the listener are not registered again.
func (l *Listener) Close() error {
	n := l.n
	n.mu.Lock()
	if l.closed {
		n.mu.Unlock()
		return nil
	}
	l.closed = true
	if n.listeners[l.name] == l {
		delete(n.listeners, l.name)
	}
	for f := range n.forwarders {
		if f.listener == l {
			n.dropForwarderLocked(f)
		}
	}
	n.mu.Unlock()
	n.local.Remove(l.m)
	return l.ln.Close()
}
