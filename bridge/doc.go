// Package bridge is the forwarder: one router, one table, and one ordered outbox
// for each target. It knows neither MQTT nor TCP; a front (bridge/mochi, a TCP
// listener) brings connections to it and carries what it delivers.
//
// # Model
//
// Devices, TCP connections, forwarders and services are all workers in one
// table, found by the first hop of a frame's onward route. A frame that a peer
// sends gets the peer's hub address put in front of its return route; a
// forwarder replaces its own address by the route that was registered; a port
// drops its own address and queues the frame (spec routing 4.1, 4.4). The
// bridge never opens a connection because a frame names one, never looks into a
// payload except at its own services, and never lets one peer's queue stop
// another's frames.
//
// The usual entry points are [New], [Bridge.ConnectDevice] and
// [Bridge.ConnectStream] for fronts, [Bridge.RegisterService] and [NewLocal]
// for programs inside the hub, [Bridge.Observe] for who watches, and
// [Bridge.Counters] for metrics.
//
// # What becomes of a frame
//
// Each frame has exactly one fate: delivered, served (taken by a service),
// queued, waiting (received, but not yet stored and not acknowledged), or
// dropped for one of the reasons of [Drop]. At any quiet moment
//
//	Received + Originated + Restored = Delivered + Served + Queued + Waiting + ΣDropped
//
// A packet of stored class is acknowledged when its frames are in the outbox of
// their target, or when it is certain that they never will be. While an outbox
// is full, packets for it wait in order of arrival, unacknowledged, charged to
// the connection that sent them; a connection with more than its window
// unanswered is ended. A frame that arrives through a forwarder for a device
// that is not attached waits at most ten seconds and is not queued.
//
// A peer may send so many frames and bytes a second (Config.FrameRate, ByteRate).
// What is beyond is taken all the same, and acknowledged when it is paid for;
// transient frames beyond it are dropped. An outbox that holds more than 64 frames
// or 64 KiB takes a quarter of what the hub has left at most, so targets that do
// not read leave room for others, however many they are.
//
// # Concurrency
//
// All exported methods are safe for concurrent use, except that one connection's
// Link.Receive is called by one goroutine at a time. The bridge runs one
// goroutine for timers, one for observers while there are any, one for each
// worker of a Local, and for the moment a few that deliver backlogs, a part of
// each in turn, so that thousands of them do not delay what is live. Close ends
// them all.
//
// Locks, in the order in which they may be taken; whoever holds one may take
// only those after it:
//
//  1. Bridge.mu       ports by client id
//  2. registry.mu     forwarders, aliases and quotas
//  3. Port.mu         link, outbox, waiting packets of one target; never two at once
//  4. Link.mu         where a connection has packets waiting
//  5. Port.linksMu
//  6. leaves: table shards, records.mu, ring.mu, timers.mu, starved.mu, drains.mu
//
// No lock is held while a method of Conn, Acker or Observer, or the handler of
// a service, is called. An Outbox is called under its target's Port.mu and must
// call back only from other goroutines.
//
// # Security
//
// Holding a device's hub address is the right to send to it; it is a keyed hash
// of the device's name. A stream peer reaches services, forwarders and the
// addresses that frames it received named (spec routing 7.4). An alias belongs
// to the identity that took it first. Nothing here is encrypted or needs to be:
// channels are end to end, and the bridge sees routes and sizes only.
package bridge
