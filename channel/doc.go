// Package channel holds Ockam secure channels: mutually authenticated, forward
// secret, encrypted end to end, over any network of nodes that carries frames.
// It is for programs that have such a network; a program on an MQTT broker uses
// package device, which brings one.
//
// An [Endpoint] is the usual entry. It listens and dials for one identity on one
// node, whose [Router] carries its frames, and yields [Channel] values. What
// comes through a channel goes to [Config.Deliver]. Below it are pieces that work
// on bytes alone and need no node: [Handshake] for the key exchange, [Sealer] and
// [Opener] for the frames after it.
//
// # What it promises
//
// Nobody but the peer reads a message or makes one up. The peer is the identity
// in [Channel.Peer], which the trust policy has accepted. No message is handed on
// twice, and none out of order. Old keys are gone after a while: both directions
// change theirs every 32 frames and each handshake has keys of its own.
//
// Not promised: that every message arrives, or that who talks to whom, when and
// how much stays hidden. A message whose Send returned nil was given to the
// router, no more.
//
// # Failures, and when they are noticed
//
// The window of the protocol bridges 32 lost frames in a row. A gap beyond it is
// proved by the next frame that arrives, and both sides have ended with [ErrGap]
// within a second of it and the way of one frame. The one exception is a gap of
// more than 131,072 frames, which ends as silence does. Two sealmq peers also
// notice silence: who has sent something asks after 5 s without any answer and
// gives up 20 s after it sent; who has not, asks after two minutes. Both end with
// [ErrSilent] (see [Limits]). A stock peer is not asked, since it would not
// answer: towards it only a gap in what it sends is noticed.
//
// A channel that has ended does not come back; dial again.
//
// # Stock peers
//
// The wire is Ockam's, unchanged, and stock Rust nodes (crate ockam 0.128 and
// later) can be at either end. Towards them it differs in nothing that they can
// tell, except that both our peers send a hello to the address [HelloAddress]
// inside the channel, which a stock peer drops. It differs in what it survives:
// forged handshake messages, repeated ones and data that overtakes message 3.
//
// # Concurrency
//
// Endpoint, Listener and Channel are safe for concurrent use; Handshake, Sealer
// and Opener are not. Handlers registered with the Router never block. Handshakes
// of peers run on a few goroutines of the endpoint, so they cannot hold up the
// frames of channels. Everything has ended when Endpoint.Close returns.
package channel
