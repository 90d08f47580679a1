package device

import (
	"sync"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// State is the state of a node's connection to its hub.
type State uint8

const (
	// Connecting: no connection yet since Connect.
	Connecting State = iota
	// Online: connected; frames flow.
	Online
	// Offline: the connection is lost and is being made again. What is sent
	// meanwhile queues.
	Offline
	// Stopped: closed, or ended for good; Err says why.
	Stopped
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case Connecting:
		return "connecting"
	case Online:
		return "online"
	case Offline:
		return "offline"
	case Stopped:
		return "stopped"
	}
	return "unknown"
}

// EventKind says what an Event reports.
type EventKind uint8

const (
	// EventOnline: connected to the hub, for the first time or again.
	EventOnline EventKind = iota + 1
	// EventOffline: the connection was lost, or an attempt failed; Err says why.
	EventOffline
	// EventStopped: the node has ended for good; Err says why. The last event.
	EventStopped
	// EventForwarderChanged: the hub gave Forwarder another address than before.
	EventForwarderChanged
	// EventForwarderFailed: the hub refused to register Forwarder again.
	EventForwarderFailed
	// EventChannelLost: Channel broke for the reason Err and is being made again.
	EventChannelLost
	// EventChannelRestored: Channel works again, with the same peer.
	EventChannelRestored
	// EventChannelEnded: Channel has ended for good; Err says why.
	EventChannelEnded
	// EventSendFailed: a frame was given up although it was sent without error; Err
	// (ErrFrameKills) says why. The next Flush says so too. With Outbox: a message that an
	// earlier process posted there was given up, of which nobody has a Receipt; Err
	// (ErrTooLarge, ErrFrameKills) says why, and which.
	EventSendFailed
	// EventUndelivered: the hub says that it could not deliver frames that it had
	// acknowledged; Err is an *UndeliveredError, and Channel the channel that goes
	// there, if this node dialled it. Its next Flush says so too.
	EventUndelivered
	// EventPeerLost: for a minute the hub has known nobody at the address that Channel is
	// dialled at; Err, an ErrUnknownAddress, says what to do. Outbox is an outbox that
	// waits for it. It is tried on; EventChannelRestored says that it is found.
	EventPeerLost
	// EventWrongPeer: somebody else than the peer of Channel answers at the address that it
	// is dialled at; Err, an ErrWrongIdentity, says who, and what to do. Outbox is an outbox
	// that waits for the peer. It is tried on, since whoever carries the frames can make it
	// look so; EventChannelRestored says that the peer is found.
	EventWrongPeer
	// EventOutboxEnded: nothing more of Outbox is sent; Err (ErrOutboxBehind) says why.
	EventOutboxEnded
	// EventHubRemembered: nobody was remembered in Config.KnownHubs at the hub's address,
	// and Hub, who was the first to prove an identity there, is from now on. That nobody
	// was in between is not certain; whoever can compares it with what the hub prints.
	EventHubRemembered
)

var eventNames = [...]string{
	EventOnline: "online", EventOffline: "offline", EventStopped: "stopped",
	EventForwarderChanged: "forwarder-changed", EventForwarderFailed: "forwarder-failed",
	EventChannelLost: "channel-lost", EventChannelRestored: "channel-restored", EventChannelEnded: "channel-ended",
	EventSendFailed: "send-failed", EventUndelivered: "undelivered", EventOutboxEnded: "outbox-ended",
	EventPeerLost: "peer-lost", EventWrongPeer: "wrong-peer", EventHubRemembered: "hub-remembered",
}

// String returns the kind's name in lower case.
func (k EventKind) String() string {
	if int(k) < len(eventNames) && k > 0 {
		return eventNames[k]
	}
	return "unknown"
}

// Event is a change that a program may want to know of.
type Event struct {
	Kind EventKind
	Time time.Time
	Err  error // why, where there is a reason
	// Forwarder, Channel and Outbox are what the event is about, if it is about one.
	Forwarder *Forwarder
	Channel   *Channel
	Outbox    *Outbox
	Hub       identity.Identifier // of EventHubRemembered
}

// eventQueue bounds the events that wait for a slow callback.
const eventQueue = 256

// events calls Config.OnEvent, in order, on a goroutine of its own. When the
// callback is too slow the oldest waiting events are dropped and counted.
type events struct {
	call func(Event)

	mu      sync.Mutex
	queue   []Event
	dropped uint64
	inside  bool // the callback is running
	closed  bool
	wake    chan struct{}
	done    chan struct{}
}

func newEvents(call func(Event)) *events {
	e := &events{call: call, wake: make(chan struct{}, 1), done: make(chan struct{})}
	if call == nil {
		close(e.done)
		return e
	}
	go e.run()
	return e
}

func (e *events) emit(ev Event) {
	if e.call == nil {
		return
	}
	ev.Time = time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	if len(e.queue) == eventQueue {
		e.queue = e.queue[1:]
		e.dropped++
	}
	e.queue = append(e.queue, ev)
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *events) run() {
	defer close(e.done)
	for {
		e.mu.Lock()
		e.inside = false
		if len(e.queue) == 0 {
			if e.closed {
				e.mu.Unlock()
				return
			}
			e.mu.Unlock()
			<-e.wake
			continue
		}
		ev := e.queue[0]
		e.queue = e.queue[1:]
		e.inside = true
		e.mu.Unlock()
		e.call(ev)
	}
}

// close lets the callback see what is queued, and waits for it unless it is
// running right now: it may be the caller.
func (e *events) close() {
	e.mu.Lock()
	e.closed = true
	inside := e.inside
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}
	if !inside {
		<-e.done
	}
}

func (e *events) droppedCount() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.dropped
}
