// Package api is the hub's own secure channel listener, as a stock Ockam node has
// one at the address "api": a peer that has shown there who it is reaches the
// hub's services, forwarders and, with a credential, the registration of aliases.
//
// The usual entry point is New. Each channel that a peer opened gets a port of its
// own in the bridge, as a TCP connection has one: with a random hub address, with
// quotas, and with the links of spec routing 7.4. What the bridge delivers to that
// port travels sealed to the peer; so a forwarder that was registered through a
// channel leads through it.
//
// # Who may register
//
// A peer registers forwarders through here if it has shown a credential of
// Config.Authority that is still valid and whose attribute "ockam-relay" is "*" or
// the alias (spec routing 6.4). An alias belongs to the identity that took it
// first. A registration by anybody else gets no answer, as at a stock hub, and is
// counted.
//
// # Security
//
// The encryptor addresses of the hub's channels are local to the hub: no peer can
// name them, so nobody can have the hub seal words of his own choice as the hub's
// route says. Only frames that come to the port's address do travel, from those
// linked with it. The bridge sees, after decryption, what any hub sees: routes and
// sealed payloads.
package api
