// Package delivery is the acknowledged delivery between two sealmq devices: the
// two state machines and the messages that they exchange inside a secure channel,
// at the address "sealmq.delivery". It is for package device, which brings the
// channels, the disk and the clock; programs use it through Channel.Deliver and
// Node.Outbox of that package.
//
// # Promises
//
// A [Sender] is one outbox: the messages of one device to one address of one
// peer, each with a count, from 1 without holes. It gives every message again
// until the peer says that its program has acknowledged it: after a loss, on the
// next channel, and, when its owner keeps it on disk, in the next process.
//
// A [Receiver] holds what one process knows of all outboxes that reach it. It
// hands the messages of an outbox on in the order of their counts, each once as
// long as the process lives. A later process, which knows nothing, gets again what
// the sender has no acknowledgement for, under the same id and marked as
// redelivered; a program that keeps the id with its own state has exactly once.
//
// A receiver admits a window of messages and bytes that its program has not
// acknowledged, so a slow program slows the sender and fills no queue in between.
//
// # How it works
//
// Transmissions of a sender on one channel carry a serial number, and an answer
// names the highest serial seen. The channel hands on in order, so what went out
// before that and is not reported as received is lost and goes out again; nothing
// is repeated on suspicion. A timer asks when answers stay away. On a new channel
// a sender with anything outstanding asks first, so that what the receiver has
// already is not sent twice.
//
// A channel of an outbox is a session with a number of its own; what comes from an
// earlier one is dropped, whatever the network kept back.
//
// # Security
//
// The channel authenticates the peer; nothing here does. A hostile peer can lie
// about its own messages and acknowledgements alone: state is kept by verified
// identifier and outbox, and bounded for each peer and in total. A hub can delay
// and drop.
//
// # Concurrency
//
// Nothing here is safe for concurrent use, starts a goroutine or reads a clock:
// the caller locks, passes the time, and sends what [Sender.Next] and
// [Receiver.NextState] return.
package delivery
