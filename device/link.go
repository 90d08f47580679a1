package device

import (
	"context"
	"crypto/tls"
	"errors"

	"github.com/sealmq/sealmq/route"
)

// packet is what one write to the hub carries: encoded frames with the same
// first hop and of the same class, in order.
type packet struct {
	// token is given back by linkEvents.acked; 0 when nobody waits, as for every
	// transient packet.
	token  uint64
	class  route.Class
	frames [][]byte // read-only
	size   int      // bytes of all frames
}

// linkEvents is how a link reports. The functions are called on goroutines of
// the link, frames never concurrently with itself; none of them may block. They
// are not called any more once close has returned.
type linkEvents struct {
	// frames hands over what one message of the hub held: a CBOR sequence of frame
	// bodies if sequence is set, else one body after which bytes are ignored. The
	// callee keeps payload. When it returns, the hub hears that the frames arrived.
	frames func(payload []byte, sequence bool, class route.Class)
	// acked says that the hub has taken responsibility for the packet.
	acked func(token uint64)
}

// link is one live connection to a hub. It never outlives its connection: for
// the next one the dialer makes a new link.
type link interface {
	// send writes a packet, waiting for room on the connection if need be. An
	// error means that the link is done for.
	send(p *packet) error
	// done is closed when the connection has ended, for whatever reason.
	done() <-chan struct{}
	// err says why it ended; valid after done.
	err() error
	// close ends the connection, with good-bye if asked for, and returns when no
	// goroutine of the link is left.
	close(goodbye bool)
	// info describes the connection; constant.
	info() linkInfo
}

// linkInfo describes a link.
type linkInfo struct {
	// acks: the hub acknowledges stored packets. Without, acked is called for each
	// as soon as it is written.
	acks bool
	// hello: the hub may answer a hello, so it is worth one.
	hello bool
	// tls is the state of the TLS connection, nil without.
	tls *tls.ConnectionState
	// remote is the hub's network address, for logs.
	remote string
}

// linkDialer makes links.
type linkDialer interface {
	// dial returns a link that is ready to carry frames both ways (over MQTT: the
	// inbox is subscribed to). Errors that another attempt cannot mend are
	// permanent (see permanentError).
	dial(ctx context.Context, ev linkEvents) (link, error)
}

var errLinkDown = errors.New("device: the connection to the hub is down")

// permanentError marks an error that no other attempt can mend, or, with mends, none
// that is worth making for a node that has never been online.
type permanentError struct {
	err   error
	mends bool
}

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

func permanent(err error) error { return &permanentError{err: err} }

// refused marks what ends a node that has never been online: whoever set it up sees it,
// and can put it right. Later the fault is more likely somebody else's, and passes.
func refused(err error) error { return &permanentError{err: err, mends: true} }

// isFinal reports whether err ends a node, which has been online before or has not.
func isFinal(err error, before bool) bool {
	var p *permanentError
	return errors.As(err, &p) && !(p.mends && before)
}

func isPermanent(err error) bool { return isFinal(err, false) }
