// Package chaos lets real processes exchange numbered, checksummed, sealed
// messages while it kills hubs and devices, cuts and stalls connections, and
// repeats and reorders MQTT packets. Afterwards every message must have arrived,
// once, in order, unaltered. Each sender has several streams: messages of one outbox
// to one address, each kept in order. The hub's own counters must add up when all is
// quiet, and must have seen full queues.
//
// The faults follow from a seed, which each run prints; SEALMQ_CHAOS_SEED repeats
// them (the machine's timing is its own). SEALMQ_CHAOS_N is the number of messages
// of the long run, `make chaos N=…`, and SEALMQ_CHAOS_EVERY the time between two
// faults, in milliseconds. The hub's durability follows from the seed too, or from
// SEALMQ_CHAOS_SYNC.
//
// What is checked here is the promise of the delivery layer, which would also heal a
// loss at the hub; what a hub promises for itself is checked under faults in package
// restart.
//
// With SEALMQ_CHAOS_PLAIN=1 the same run, with the same faults, messages and verdict, is
// that of ordinary MQTT sessions (QoS 1, kept) at a mochi server without the forwarder:
// it shows that the harness finds the loss that it is there to find, and fails if it does
// not. The state machines of the delivery layer run
// under thousands of seeds with a virtual clock in package delivery.
package chaos
