package channel

import (
	"errors"
	"fmt"
)

// Why a handshake or a channel failed. Test with errors.Is.
var (
	// ErrRefused means that the peer refused us: it ended the channel before
	// it had said anything else. Its policy may not trust our identity.
	ErrRefused = errors.New("channel: refused by the peer")
	// ErrWrongIdentity means that our own trust policy refused the peer.
	ErrWrongIdentity = errors.New("channel: the peer is not one that the trust policy accepts")
	// ErrUndecided means that our own trust policy could not say whether it accepts the
	// peer: what it goes by cannot be read or written. Policies return errors that are
	// this one, too; the peer is then not accepted, and nothing is held against it.
	ErrUndecided = errors.New("channel: the trust policy cannot decide")
	// ErrTimeout means that the peer did not answer in time. A stock Ockam peer
	// that refuses us says nothing and ends here too.
	ErrTimeout = errors.New("channel: no answer from the peer in time")
	// ErrHandshake means that the peer's handshake messages do not verify.
	ErrHandshake = errors.New("channel: handshake failed")
	// ErrClosed means that the channel, listener or endpoint was closed here.
	ErrClosed = errors.New("channel: closed")
	// ErrPeerClosed means that the peer closed the channel.
	ErrPeerClosed = errors.New("channel: closed by the peer")
	// ErrGap means that more frames in a row were lost than the window holds.
	// The channel cannot go on; a new one can.
	ErrGap = errors.New("channel: more frames in a row were lost than the channel can bridge")
	// ErrSilent means that the peer stopped answering.
	ErrSilent = errors.New("channel: the peer stopped answering")
	// ErrSuperseded means that the peer has dialled another channel in place of
	// this one.
	ErrSuperseded = errors.New("channel: the peer continued on another channel")
	// ErrBusy means that a limit of this endpoint is reached.
	ErrBusy = errors.New("channel: too many channels or handshakes at once")
	// ErrTooLarge means that a message does not fit the frame limit.
	ErrTooLarge = errors.New("channel: message is larger than the frame limit")
	// ErrNonceExhausted means that a direction has used all its nonces.
	ErrNonceExhausted = errors.New("channel: all nonces are used")
)

// Why a transport frame was not opened.
var (
	// ErrFrameShort means that a frame is shorter than nonce and tag.
	ErrFrameShort = errors.New("channel: frame is shorter than nonce and tag")
	// ErrReplayed means that a frame with this nonce has been received.
	ErrReplayed = errors.New("channel: frame was received before")
	// ErrTooOld means that a frame is further back than the window.
	ErrTooOld = errors.New("channel: frame is older than the window")
	// ErrBeyondWindow means that a frame is further ahead than the window:
	// forged, or the frames before it are lost.
	ErrBeyondWindow = errors.New("channel: frame is ahead of the window")
	// ErrForged means that a frame does not authenticate.
	ErrForged = errors.New("channel: frame does not authenticate")
)

// PhaseError reports a handshake step taken out of turn. It is the caller's
// fault and leaves the handshake as it was.
type PhaseError struct {
	In   Phase  // where the handshake stands
	Step string // what was asked of it
}

func (e *PhaseError) Error() string {
	return fmt.Sprintf("channel: %s is out of turn: the handshake %s", e.Step, e.In)
}

// MessageError reports a handshake message that was not accepted.
type MessageError struct {
	Message int   // 1, 2 or 3
	Err     error // why
}

func (e *MessageError) Error() string {
	return fmt.Sprintf("channel: handshake message %d: %v", e.Message, e.Err)
}

// Unwrap returns the cause.
func (e *MessageError) Unwrap() error { return e.Err }

// Is reports that every MessageError is an ErrHandshake.
func (e *MessageError) Is(target error) bool { return target == ErrHandshake }
