package bridge

import (
	"errors"
	"hash/maphash"
	"net"
	"net/netip"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Role says what a principal may do at the hub.
type Role uint8

const (
	// RoleDevice sends and receives frames under its own client id.
	RoleDevice Role = iota
	// RoleObserver watches records and copies; it has no port.
	RoleObserver
	// RoleUser is an ordinary MQTT client outside the root; it has no port.
	RoleUser
	// RoleGuest reaches the service hello and nothing else: a device that has
	// not pinned its hub yet. As a stream it also reaches what answers it there.
	RoleGuest
)

// String returns the role's name in configuration and logs.
func (r Role) String() string {
	switch r {
	case RoleDevice:
		return "device"
	case RoleObserver:
		return "observer"
	case RoleUser:
		return "user"
	case RoleGuest:
		return "guest"
	}
	return "invalid role"
}

// Principal is who is at the other end of a connection, as the front's
// authenticator found out. Router, alias owners and quotas see nothing else.
type Principal struct {
	// Identity is the peer's identifier; zero on plain TCP.
	Identity identity.Identifier
	// ClientID is the MQTT client id; empty on TCP.
	ClientID string
	// Role decides what ConnectDevice allows.
	Role Role
	// Proven says that the peer showed a proof of Identity. An identity that
	// is only claimed (open loopback listener) gives way to a proven one.
	Proven bool
	// Account is the front's name for the account that let the peer in, which
	// owns the client id of an ordinary client; empty: there is none.
	Account string
	// Grant is the authenticator's own: why it let the peer in. The bridge does
	// not look at it.
	Grant any
}

// claimant is whose quotas something is in. Who has shown no proof of an identity uses
// up nothing of who can.
type claimant struct {
	id     identity.Identifier
	proven bool
}

func (p *Principal) claimant() claimant { return claimant{p.Identity, p.Proven} }

var senderSeed = maphash.MakeSeed()

// sender tells those apart who share room with others: identities, and where there is
// none the networks that peers come from.
func sender(p Principal, network netip.Prefix) uint64 {
	if p.Identity.IsZero() {
		return max(1, maphash.Comparable(senderSeed, network))
	}
	return max(1, maphash.Comparable(senderSeed, p.claimant()))
}

// Conn is one live connection of a peer, made by a front. The bridge calls it
// without holding a lock of its own, so its methods may call back into the
// Link. None may block.
type Conn interface {
	// Deliver writes entries in order and returns how many it took, perhaps
	// none; the rest is offered again after Link.Delivered or Link.Ready. Calls
	// don't overlap. An Entry's Frame is valid only until Deliver returns. A
	// transient entry counts as delivered once it was taken.
	//
	// An entry that this connection can never carry counts as taken; the front
	// reports it with Link.Undeliverable.
	Deliver(entries []Entry) int
	// Direct writes one frame past the outbox, as transient: a notice or the
	// answer to hello. It reports whether it did. It may run at the same time
	// as Deliver. The frame is valid only until Direct returns. It must not call
	// Link.Close.
	Direct(frame []byte) bool
	// Kick ends the connection for reason, on its own goroutine if that takes
	// time. What Direct wrote is drained first, for up to 100 ms. Calling
	// Link.Close from within is allowed. A second call does nothing.
	Kick(reason KickReason)
}

// ExporterConn is a Conn over TLS. Its exporter value (RFC 9266) is bound into
// the answer to hello.
type ExporterConn interface {
	Conn
	ExporterValue() []byte
}

// AddressConn is a Conn that says where its peer is, so that what strangers may do is
// limited for each address.
type AddressConn interface {
	Conn
	RemoteAddr() net.Addr
}

// Entry is one frame on its way to a peer: the body of a frame, routed,
// stamped, canonical.
type Entry struct {
	// Seq numbers the frames of one target, from 1 in steps of one or more.
	Seq uint64
	// Class is the class the frame is to be written with.
	Class route.Class
	// Redelivered says that an earlier connection was offered the frame.
	Redelivered bool
	// Frame is valid until Deliver returns.
	Frame []byte
}

// Acker takes the hub's acknowledgements of a peer's packets.
type Acker interface {
	// Acked is called once for each packet of stored class that the hub takes
	// responsibility for or finds undeliverable for good: never more than once,
	// and not at all when the connection ends first. Calls come in order for
	// each target, perhaps before Receive returns, perhaps on another
	// goroutine. It must not block; it may call into the Link.
	Acked(token uint64)
}

// BatchAcker is an Acker that takes several acknowledgements at once, under the same
// rules. A front uses one and the same for everything that a connection sends.
// tokens is valid during the call.
type BatchAcker interface {
	Acker
	AckedAll(tokens []uint64)
}

// KickReason says why the bridge ends a connection.
type KickReason uint8

const (
	// KickTakenOver: the same client id connected again (MQTT 5: 0x8E).
	KickTakenOver KickReason = iota + 1
	// KickWindow: more unanswered publishes than the window allows (0x93).
	KickWindow
	// KickClosing: the hub stops (0x8B).
	KickClosing
)

// String returns the reason's name for logs and counters.
func (k KickReason) String() string {
	switch k {
	case KickTakenOver:
		return "taken-over"
	case KickWindow:
		return "window-exceeded"
	case KickClosing:
		return "closing"
	}
	return "invalid kick reason"
}

// Errors of connecting and receiving.
var (
	// ErrClosed means that the bridge has been closed.
	ErrClosed = errors.New("bridge: closed")
	// ErrRole means that the principal's role has no port.
	ErrRole = errors.New("bridge: this role sends no frames")
	// ErrClientID means that a client id cannot be a device name.
	ErrClientID = errors.New("bridge: client id is not a device name (use letters, digits, '-' and '_', 128 at most)")
	// ErrNotProven means that a proven owner holds the client id and the
	// newcomer only claims it.
	ErrNotProven = errors.New("bridge: the client id belongs to a proven identity; connect with a proof")
	// ErrTooManyPorts means that the hub has as many peers as it may have.
	ErrTooManyPorts = errors.New("bridge: no room for another peer (raise the port limit)")
	// ErrPortQuota means that one identity has as many client ids as it may.
	ErrPortQuota = errors.New("bridge: too many client ids of one identity (raise the quota, or wait until old ones are forgotten)")
	// ErrMalformed means that a packet was refused whole; it has been counted,
	// acknowledged and noticed already. A stream front closes its connection
	// (spec routing 4.4, step 1); an MQTT front goes on.
	ErrMalformed = errors.New("bridge: malformed packet")
)

// The methods that a front calls, in the order of a connection's life:
//
//	link, err := b.ConnectDevice(principal, conn)  // MQTT CONNECT accepted
//	link.Subscribed()                              // SUBACK for the inbox written
//	link.Receive(payload, class, acker, token)     // each publish on /out; hello attaches
//	link.Delivered(seq)                            // PUBACK for all up to seq
//	link.Ready()                                   // room again
//	link.Close(clean)                              // connection gone
//
// and for a stream:
//
//	link, err := b.ConnectStream(principal, conn)  // attached at once
//
// Receive is called by one goroutine at a time; all other methods by any. A front that
// reads many packets at once calls ReceiveMore for each, and Flush behind the last.

// RecordKind tells the retained records apart.
type RecordKind uint8

const (
	// RecordStatus is a device's status; Name is the device name.
	RecordStatus RecordKind = iota
	// RecordForwarder is a forwarder record; Name is the forwarding address.
	RecordForwarder
)

// Record is one retained record.
type Record struct {
	Kind RecordKind
	Name string
	// JSON is the record; nil when it was removed. It is shared: don't change it.
	JSON []byte
}

// Direction says which topic a copy belongs to.
type Direction uint8

const (
	// FromDevice is a packet as a device published it.
	FromDevice Direction = iota
	// ToDevice is a frame as it was handed to a device's connection.
	ToDevice
)

// Copy is a copy of what went by, for observers.
type Copy struct {
	Direction Direction
	Device    string // the device's name
	Payload   []byte // the receiver's to keep, not to change
}

// Observer sees copies, record changes and trace lines. All calls come from one
// goroutine of the bridge. An Observer that blocks delays other observers and
// loses copies, counted; it never delays a frame.
type Observer interface {
	Copy(Copy)
	Record(Record)
	Trace(line []byte)
}
