// Package chaos lets real processes exchange numbered, checksummed, sealed
// messages while it kills hubs and devices, cuts and stalls connections, and
// repeats and reorders MQTT packets. Afterwards every message must have arrived,
// once, in order, unaltered. Each sender has several streams: messages of one outbox
// to one address, each kept in order.
//
// The faults follow from a seed, which each run prints; SEALMQ_CHAOS_SEED repeats
// them (the machine's timing is its own). SEALMQ_CHAOS_N is the number of messages
// of the long run, `make chaos N=…`, and SEALMQ_CHAOS_EVERY the time between two
// faults, in milliseconds.
//
// What is checked here is the promise of the delivery layer, which would also heal a
// loss at the hub; what a hub promises for itself is checked under faults in package
// restart.
//
// The same faults against ordinary MQTT sessions show that the harness finds the
// loss that it is there to find. The state machines of the delivery layer run
// under thousands of seeds with a virtual clock in package delivery.
package chaos
