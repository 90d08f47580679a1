// Package device is the library of a sealmq device program: it connects to a hub,
// offers listeners, dials peers, and sends and receives messages that the hub
// carries and cannot read.
//
// # Start
//
// [Connect] gives a [Node]. A program that is to be reached calls [Node.Listen]
// and [Node.CreateForwarder], and passes the forwarding address on to its peers;
// one that reaches out calls [Node.Dial] with such an address and sends through the
// [Channel]. Messages arrive at mailboxes ([Node.Receive], by default "app") or at
// handlers ([Node.HandleFunc]), with the verified identifier of who sent them.
//
// Whoever listens or dials says whom it trusts with a [channel.Policy]; there is no
// default.
//
// # Connection
//
// A node has one connection to its hub and makes it again by itself, with
// exponential back-off, jitter, and pauses of 30 s at most
// ([Config.MaxReconnectPause]). Forwarding addresses survive that on a sealmq hub.
// [Config.OnEvent] tells of every change, [Node.State] of the present. A hub that says
// no, or has no certificate that is trusted, ends [Connect]; a node that has been online
// tells of that ([EventOffline]) and tries on. Two things end it for good: another hub
// in the place of the one that it knows (ErrWrongHub), and another connection with the
// same client id (ErrTakenOver).
//
// A tcp:// URL is for the Ockam TCP transport: the TCP port of a sealmq hub, or any
// other Ockam node that relays, which works with the same calls and promises less. It
// has no acknowledgements, so Flush waits until everything is written, and what was
// under way when a connection is lost may be gone. It keeps no addresses: forwarding
// addresses are others after a reconnect (EventForwarderChanged), except for
// aliases, and channels that peers dialled are made again by them. A hub that is none
// of ours says nothing about frames that it cannot deliver, so a wrong address is a
// timeout, and peers name the listener behind the relay's address.
//
// # What Send promises
//
// A nil error of Send means: sealed, and in the outbox of this node, in memory.
// Unless the program ends, the outbox is emptied into the hub in order, over as many
// connections as it takes. [Node.Flush] waits until the hub has acknowledged
// everything. Neither says that the peer's program took a message. What a hub has
// acknowledged and then finds that it cannot deliver (nobody has the address any
// more, an age limit) it says so of: [EventUndelivered] and the next [Channel.Flush]
// pass that on as an [UndeliveredError]. When the outbox is full, Send waits until
// its context ends.
//
// [Channel.Deliver] returns once the peer's program has acknowledged the message, and
// [Node.Outbox] keeps messages until then, on disk if [Config.OutboxDir] says so, for
// peers that are not there and for the next process. [Channel.Guarantee] says whether
// a peer can acknowledge; a stock Ockam peer cannot.
//
// A receiver that does not read loses the newest messages once its mailbox is full,
// and is told so ([LostError]). Delivered messages are never dropped like that: a
// program that does not acknowledge them ([Message.Ack]) slows their sender.
//
// # Security
//
// What goes through a channel is readable and forgeable by its two ends only. The
// hub sees who talks to whom, when, and how much. What is sent outside of channels
// ([Node.Send], [Node.Request] to a route that begins with no channel) is in plain
// sight of the hub: only its own services should get that. Answers to messages that
// came through a channel leave through that channel or not at all.
//
// # Concurrency
//
// All methods are safe for concurrent use. Every call that can block takes a
// context whose end it heeds at once. Callbacks run on goroutines of their own and
// may call anything, [Node.Close] included. After Close no goroutine is left.
package device
