package node

import (
	"slices"

	"github.com/sealmq/sealmq/identity"
)

// Access says who besides local code may reach an address. The zero Access is
// closed: nobody. The fields add up.
type Access struct {
	// Forwarders opens the address to plain frames, those that did not come
	// through a secure channel: anybody who can reach this node through the hub.
	Forwarders bool
	// Channels opens the address to the peers of all secure channels of this node,
	// dialled and accepted.
	Channels bool
	// Listeners opens the address to the peers of channels that were accepted by
	// the listeners named here.
	Listeners []string
	// Encryptors opens the address to the peers of single channels, named by their
	// encryptor addresses on this node.
	Encryptors []string

	// service opens the address to what the hub's service of that name says itself.
	service string
}

func (a Access) clone() Access {
	a.Listeners, a.Encryptors = slices.Clone(a.Listeners), slices.Clone(a.Encryptors)
	return a
}

// closed reports whether only local code may pass.
func (a *Access) closed() bool {
	return !a.Forwarders && !a.Channels && len(a.Listeners) == 0 && len(a.Encryptors) == 0 && a.service == ""
}

// admits reports whether a frame of the given origin may pass.
func (a *Access) admits(o *Origin) bool {
	switch o.Via {
	case Local:
		return true
	case Forwarded:
		return a.Forwarders || a.service != "" && o.FromHub && o.Source == a.service
	case Channel:
		return a.Channels ||
			o.Listener != "" && slices.Contains(a.Listeners, o.Listener) ||
			o.Encryptor != "" && slices.Contains(a.Encryptors, o.Encryptor)
	default:
		return false
	}
}

// Via says by what way a frame reached the node.
type Via uint8

// Ways. The zero value is none of them and is refused everywhere, so that a
// forgotten field opens nothing.
const (
	Local     Via = iota + 1 // sent by code of this process
	Forwarded                // plain frame from the hub or a TCP peer
	Channel                  // decrypted by a secure channel of this node
)

// String returns "local", "forwarded" or "channel".
func (v Via) String() string {
	switch v {
	case Local:
		return "local"
	case Forwarded:
		return "forwarded"
	case Channel:
		return "channel"
	default:
		return "unknown"
	}
}

// Origin says where a frame came from. It is local knowledge and never on the wire.
type Origin struct {
	Via Via
	// Peer is the verified identifier of the channel's other end; zero unless Via
	// is Channel.
	Peer identity.Identifier
	// Listener is the name of the listener that accepted the channel; empty for a
	// channel that this node dialled.
	Listener string
	// Encryptor is this node's address of the channel.
	Encryptor string
	// Source is, for Forwarded, the first hop of the return route: the hub's
	// address of whoever sent the frame, as stamped by the hub. Limits for each
	// sender go by it.
	Source string
	// FromHub says, for Forwarded, that the frame is the hub's own.
	FromHub bool
}
