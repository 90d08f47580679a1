package node

import (
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/route"
)

var _ channel.Router = (*Node)(nil)

// Register implements channel.Router: h is called like the function of
// RegisterFunc, and the address is open to plain frames and to channels. Those
// addresses are listeners, which are there for everybody, and unguessable ones of
// handshakes and channels; narrow a listener's with SetAccess. The address of an
// encryptor closes as soon as a message has come through its channel (see Inject)
// and is better registered with RegisterLocal in the first place.
func (n *Node) Register(addr string, h func(channel.Inbound)) error {
	return n.RegisterFunc(addr, Access{Forwarders: true, Channels: true}, inbound(h))
}

// RegisterLocal is Register for an address that only local code may reach, such as
// a channel's encryptor: whatever reaches that is sealed and sent as our own words.
func (n *Node) RegisterLocal(addr string, h func(channel.Inbound)) error {
	if err := n.RegisterFunc(addr, Access{}, inbound(h)); err != nil {
		return err
	}
	n.guard(addr)
	return nil
}

func inbound(h func(channel.Inbound)) func(route.Frame, route.Class, Origin) {
	return func(f route.Frame, c route.Class, o Origin) {
		in := channel.Inbound{Frame: f, Class: c, Source: o.Source, FromHub: o.FromHub}
		if o.Via == Channel {
			in.Source = o.Peer.String()
		}
		h(in)
	}
}

// Unregister implements channel.Router.
func (n *Node) Unregister(addr string) { n.Remove(addr) }

// Deliver takes a message that came through a channel, for channel.Config.Deliver:
// it goes to the worker at its first onward hop if that is open to the channel, and
// carries the verified identifier of the peer.
func (n *Node) Deliver(d channel.Delivery) {
	n.Inject(Origin{
		Via:       Channel,
		Peer:      d.Channel.Peer().Identifier,
		Listener:  d.Listener,
		Encryptor: d.Channel.EncryptorAddress(),
	}, d.Frame, d.Class)
}
