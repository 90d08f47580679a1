package hubproto

import "strconv"

// Reason says what became of a frame that its sender may wait for. The numbers
// are wire values of [Notice]; they are never reused.
type Reason uint8

const (
	// ReasonUnknown: no worker has the address, or the sender may not reach it.
	ReasonUnknown Reason = 1
	// ReasonWaiting: the target of a first contact is offline; the hub holds
	// the frame for a short time. Not a failure yet.
	ReasonWaiting Reason = 2
	// ReasonOffline: the target stayed offline, or is another process now, which has other
	// keys; the frame is gone.
	ReasonOffline Reason = 3
	// ReasonFull: a queue had no room and the frame could not be withheld.
	ReasonFull Reason = 4
	// ReasonTooLarge: the frame is longer than the hub's frame limit.
	ReasonTooLarge Reason = 5
	// ReasonMalformed: the packet is not a sequence of frames for one target.
	ReasonMalformed Reason = 6
	// ReasonExpired: the frame reached the hub's age limit before its target
	// took it.
	ReasonExpired Reason = 7
	// ReasonRefused: a service understood the request and said no.
	ReasonRefused Reason = 8
	// ReasonTakenOver: a newer connection of the same name took this one's
	// place; the device must not come back on its own.
	ReasonTakenOver Reason = 9
)

var reasonNames = [...]string{
	ReasonUnknown:   "unknown",
	ReasonWaiting:   "waiting",
	ReasonOffline:   "offline",
	ReasonFull:      "full",
	ReasonTooLarge:  "too-large",
	ReasonMalformed: "malformed",
	ReasonExpired:   "expired",
	ReasonRefused:   "refused",
	ReasonTakenOver: "taken-over",
}

// Known reports whether r is a reason of this version of the protocol. A
// receiver ignores a notice with any other.
func (r Reason) Known() bool { return r >= ReasonUnknown && r <= ReasonTakenOver }

// String returns the name used in logs, counters and documents.
func (r Reason) String() string {
	if r.Known() {
		return reasonNames[r]
	}
	return "reason(" + strconv.Itoa(int(r)) + ")"
}
