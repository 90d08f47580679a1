// Package tcp is the bridge's front for the Ockam TCP transport (spec routing 3
// and 4): a stock Rust node connects here and uses the hub as its relay.
//
// The usual entry point is New and Server.Serve. Every connection gets a port of
// its own in the bridge, with a random hub address that ends with it. What a
// stream peer may reach, the bridge decides: services that are open, forwarders,
// and the hub addresses that a frame it received named (spec routing 7.4). The
// server never dials.
//
// # Flow
//
// Writing never blocks the router: frames are copied into a bounded buffer of the
// connection, which a goroutine alive only while there is output writes to the
// network; what does not fit stays in the connection's outbox, and what does not
// fit there is withheld from its sender. TCP has no acknowledgement to withhold,
// so the server stops reading from a sender whose frames wait for room; the
// bridge drops and counts a frame that waited for a second in which its target took
// nothing.
//
// # Hostile peers
//
// A preamble must come within PreambleTimeout, a frame that has begun must go on
// at a least rate, a connection that never sends a frame is closed, sooner where a
// newcomer needs its place, and buffers grow with what has arrived, never with
// what a length promises. A frame above the hub's limit is read past, counted and
// dropped; a length of 0 or above 16 MiB, a body that is not a frame, or a wrong
// preamble close the connection, as a stock peer would. A frame that grew too long
// by what the hub puts in front of it is dropped and counted; the connection stays.
//
// This transport has no encryption and no authentication of its own: channels
// are end to end. Whoever can reach the port can use the hub's services and
// register dynamic forwarders.
package tcp
