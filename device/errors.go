package device

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Errors of this package. Test with errors.Is; the error returned usually says
// more than the sentinel: which address, what to do.
var (
	// ErrUnknownAddress: the hub knows no worker at the address. Ask the peer for
	// its present forwarding address.
	ErrUnknownAddress = errors.New("device: the hub does not know this address")
	// ErrCertificate: no authority that is trusted vouches for the hub's certificate;
	// Config.TLS names others.
	ErrCertificate = errors.New("device: the hub's certificate is not trusted")
	// ErrPeerOffline: the address belongs to a device that is not connected.
	ErrPeerOffline = errors.New("device: the peer is offline")
	// ErrExpired: the hub kept frames for as long as it keeps any, and the peer did not
	// take them: it is away, or connected and does not read.
	ErrExpired = errors.New("device: the peer did not take it in time")
	// ErrPeerRefused: the peer's trust policy does not accept this identity.
	ErrPeerRefused = errors.New("device: the peer refused this identity")
	// ErrWrongIdentity: the peer is not who this side's trust policy asks for.
	ErrWrongIdentity = errors.New("device: the peer is not an identity that the trust policy accepts")
	// ErrTimeout: nothing came back in time. errors.Is also finds
	// context.DeadlineExceeded in an error that wraps it.
	ErrTimeout error = timeoutError{}
	// ErrTakenOver: another program connected with the same client id. This node
	// has stopped for good; use a Config.Suffix of its own for each program.
	ErrTakenOver = errors.New("device: another connection with the same client id took over")
	// ErrHubRefused: the hub does not let this device in, or refused what it
	// asked for.
	ErrHubRefused = errors.New("device: the hub refused")
	// ErrBadCredentials is the ErrHubRefused of a wrong user name, password or
	// proof.
	ErrBadCredentials = fmt.Errorf("%w: bad user name or password", ErrHubRefused)
	// ErrNotAllowed is the ErrHubRefused of an identity, or account, that may not
	// connect at this hub.
	ErrNotAllowed = fmt.Errorf("%w: this identity is not allowed to connect", ErrHubRefused)
	// ErrHubBusy is the ErrHubRefused of a hub that lets nobody more in for now. A node
	// that has been connected, or has Config.KeepTrying, tries again.
	ErrHubBusy = fmt.Errorf("%w: it is full or shutting down", ErrHubRefused)
	// ErrAliasRefused is the ErrHubRefused of an alias that the hub does not give to
	// this device, most often because it belongs to another identity.
	ErrAliasRefused = fmt.Errorf("%w the alias", ErrHubRefused)
	// ErrInboxRefused is the ErrHubRefused of a hub that let this device in, but not
	// at its topics: Config.Root is not the hub's, or the account is for other topics.
	ErrInboxRefused = fmt.Errorf("%w the subscription to this device's inbox", ErrHubRefused)
	// ErrClearPassword: the password would go to another machine unencrypted; see
	// Config.InsecurePasswordWithoutTLS.
	ErrClearPassword = errors.New("device: the password is not sent in the clear")
	// ErrBadProof is the ErrHubRefused of a proof of identity that the hub does not
	// accept although clock and hub are right, as after the identity's key has been
	// rotated elsewhere.
	ErrBadProof = fmt.Errorf("%w: the proof of this device's identity is not accepted", ErrHubRefused)
	// ErrClock is the ErrHubRefused of a device whose clock is off; see ClockError.
	ErrClock = fmt.Errorf("%w: this device's clock is off", ErrHubRefused)
	// ErrWrongHub: the hub is not the one that was pinned.
	ErrWrongHub = errors.New("device: the hub is not the pinned one")
	// ErrHubAway: no connection to the hub could be made.
	ErrHubAway = errors.New("device: cannot reach the hub")
	// ErrNotHub is the ErrHubAway of something else that answers: a port of the hub
	// for another scheme of the URL, or another program.
	ErrNotHub = fmt.Errorf("%w: something else answers", ErrHubAway)
	// ErrNoAnswer is the ErrHubAway of silence: what listens there, if anything does,
	// does not answer, or ends the connection instead.
	ErrNoAnswer = fmt.Errorf("%w: no answer", ErrHubAway)
	// ErrClosed: the node or channel was closed by this program.
	ErrClosed = errors.New("device: closed")
	// ErrPeerClosed: the peer closed the channel.
	ErrPeerClosed = errors.New("device: the peer closed the channel")
	// ErrInterrupted: the channel broke while a request waited for its answer. The
	// peer may have taken the request or not.
	ErrInterrupted = errors.New("device: the channel broke while waiting for the answer")
	// ErrFrameKills: a frame was given up, because every connection on which it was
	// sent ended within two seconds: three in a row, one on which it was sent alone, and
	// three more that had lasted for at least 15 s without it.
	ErrFrameKills = errors.New("device: a message was given up: each connection ended when it was sent")
	// ErrNoDelivery: the peer cannot acknowledge messages. Send and Flush work, and
	// say that the hub has the message.
	ErrNoDelivery = errors.New("device: the peer does not acknowledge messages")
	// ErrUnacknowledged: the wait for the peer's acknowledgement ended before it
	// came. The peer's program may have taken the message or not. It wraps why the peer
	// could not be reached last, if it could not.
	ErrUnacknowledged = errors.New("device: the peer has not acknowledged the message")
	// ErrNoWorker: at the peer nobody takes messages at the address, or they are not
	// open to this device.
	ErrNoWorker = errors.New("device: the peer takes no messages at this address")
	// ErrTooLarge: the message does not fit the hub's frame limit.
	ErrTooLarge = errors.New("device: the message is larger than the hub takes")
	// ErrRoute: no frame can have the route, because of Config.Limits; it wraps the
	// error of package route that says what is too much. Nothing was sent.
	ErrRoute = errors.New("device: not a possible route")
	// ErrNoMailbox: Receive at an address that is not in Config.Mailboxes.
	ErrNoMailbox = errors.New("device: no mailbox at this address")
	// ErrNoReturnRoute: the message cannot be answered.
	ErrNoReturnRoute = errors.New("device: the message has no return route")
	// ErrBusy: a bounded number of something is in use already.
	ErrBusy = errors.New("device: busy")
)

// timeoutError is ErrTimeout. It counts as context.DeadlineExceeded too, and
// satisfies net.Error's Timeout.
type timeoutError struct{}

func (timeoutError) Error() string   { return "device: timed out" }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }
func (timeoutError) Is(target error) bool {
	return target == context.DeadlineExceeded
}

// HubMismatchError is the ErrWrongHub of a hub that proved another identity than
// the pinned one.
type HubMismatchError struct {
	Pinned, Got identity.Identifier
	// File and Line are where the pin is remembered (Config.KnownHubs); empty when
	// it came from elsewhere.
	File string
	Line int
}

func (e *HubMismatchError) Error() string {
	if e.File != "" {
		return fmt.Sprintf("%v: THE HUB'S IDENTITY HAS CHANGED: %v is remembered in %s, line %d, it proved to be %v; "+
			"if the hub was set up anew on purpose, remove that line, otherwise somebody is in the way",
			ErrWrongHub, e.Pinned, e.File, e.Line, e.Got)
	}
	return fmt.Sprintf("%v: expected %v, it proved to be %v; if the hub was set up anew on purpose, "+
		"change the pin, otherwise somebody is in the way", ErrWrongHub, e.Pinned, e.Got)
}

// Is makes errors.Is(err, ErrWrongHub) true.
func (e *HubMismatchError) Is(target error) bool { return target == ErrWrongHub }

// ClockError is the ErrClock of a hub that refuses this device's proofs of identity
// because the two clocks are too far apart. The hub has proved its own identity, so
// its word about the time is as good as it is. The node goes on trying, since
// clocks get set; peers would refuse it as the hub does (spec identity 10.3), so the
// hub's time is not used in place of the device's.
type ClockError struct {
	// Ahead is by how much this device's clock is ahead of the hub's; negative:
	// behind.
	Ahead time.Duration
}

func (e *ClockError) Error() string {
	how := "ahead of"
	if e.Ahead < 0 {
		how = "behind"
	}
	return fmt.Sprintf("%v: it is %v %s the hub's, so the hub refuses this device's proof of identity, and peers would too; set it (NTP)",
		ErrClock, e.Ahead.Abs(), how)
}

// Is makes errors.Is find ErrClock and ErrHubRefused.
func (e *ClockError) Is(target error) bool { return target == ErrClock || target == ErrHubRefused }

// silenceHint says what to check when nobody has answered along a route.
func (n *Node) silenceHint(to route.Route) string {
	if n.link.silent() {
		return fmt.Sprintf("%s has not answered hello either: it is perhaps an MQTT broker without a hub", n.link.hubName)
	}
	return listenerHint(to)
}

// listenerHint says what to check about the listener at the end of a route that
// nobody has answered at. A stock peer's relay needs the listener's name behind it
// (spec routing 6.3), and drops what goes to one that it does not have.
func listenerHint(to route.Route) string {
	if len(to) == 1 {
		return silentListener(to) + fmt.Sprintf(" A stock Ockam node's has to be named: %s=>LISTENER", to[0].Value)
	}
	return silentListener(to) + " A sealmq peer's forwarding address needs none behind it"
}

// silentListener says what may be wrong with the listener of a peer that is there.
func silentListener(to route.Route) string {
	if len(to) == 1 {
		return "has the peer's program its listener by now, or too much to do?"
	}
	return fmt.Sprintf("has the peer a listener named %q? Or it has too much to do.", to[len(to)-1].Value)
}

// UndeliveredError is what the hub says of frames that it had acknowledged and then
// found that it could not deliver. It wraps ErrUnknownAddress, ErrPeerOffline,
// ErrExpired, ErrTooLarge, ErrBusy or ErrHubRefused. The hub cannot tell what was in the
// frames: messages of Send, or what the channel itself sends. Messages of Deliver
// and Outbox are sent again all the same.
type UndeliveredError struct {
	// To is where the frames went first: the peer's hub address, for a channel.
	To route.Address
	// Peer is who is at the other end of the channel that goes there; zero when none
	// does now.
	Peer identity.Identifier
	// Count is the number of frames.
	Count uint64
	// Reason is the hub's word for why: "unknown", "offline" (also of a peer that is there
	// again, as a process with other keys), "expired", "full", …
	Reason string
	Err    error
}

func (e *UndeliveredError) Error() string {
	to := e.To.String()
	if !e.Peer.IsZero() {
		to = fmt.Sprintf("%v at %s", e.Peer, to)
	}
	return fmt.Sprintf("%v: undelivered (%s): %d frames for %s", e.Err, e.Reason, e.Count, to)
}

func (e *UndeliveredError) Unwrap() error { return e.Err }

// wrongIdentityError is the ErrWrongIdentity of a peer that the policy of a call to
// Dial has refused.
type wrongIdentityError struct {
	to  route.Route
	err error // a channel.ErrWrongIdentity
}

// Error says once what is wrong, and who was there.
func (e *wrongIdentityError) Error() string {
	who := strings.Replace(e.err.Error(), channel.ErrWrongIdentity.Error()+": ", "", 1)
	who = strings.Replace(who, ErrWrongIdentity.Error()+": ", "", 1)
	return fmt.Sprintf("%v: dialling %s: %s", ErrWrongIdentity, e.to, who)
}

// Unwrap has errors.Is find both errors.
func (e *wrongIdentityError) Unwrap() []error { return []error{ErrWrongIdentity, e.err} }

// callError says which call ended in err and why.
func callError(what string, to route.Route, err error, hint string) error {
	if hint != "" {
		return fmt.Errorf("%w: %s %s: %s", err, what, to, hint)
	}
	return fmt.Errorf("%w: %s %s", err, what, to)
}

// ctxError turns the end of a caller's context into this package's errors: a
// deadline into one that is both ErrTimeout and context.DeadlineExceeded, a
// cancellation into itself.
func ctxError(ctx context.Context, what string) error {
	err := context.Cause(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s", ErrTimeout, what)
	}
	return fmt.Errorf("device: %s: %w", what, err)
}
