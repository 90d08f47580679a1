package matrix

import (
	"flag"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

func TestMain(m *testing.M) {
	// Cells wait more than they work: for what a stock node gives up in its own time.
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue && runtime.GOMAXPROCS(0) < 4 {
		_ = f.Value.Set("4")
	}
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// quiet is how long a test watches that nothing happens.
const quiet = 200 * time.Millisecond

// moment is how long it waits for an answer that should not come.
const moment = 2 * time.Second

// Addresses that every party serves behind its channels: app keeps what arrives
// for next, echo sends raw bytes back.
const (
	app  = "app"
	echo = "echo"
)

// hub is what parties meet at.
type hub interface {
	// mqtt and tcp say where parties connect to; empty: not offered.
	mqtt() string // URL
	tcp() string  // HOST:PORT
	// restart ends the hub and starts it again at the same addresses, with what it
	// keeps: a stock relay keeps nothing.
	restart()
}

// trust says whom a party talks to.
type trust []string // identifiers; nil: everyone

// message is one that arrived at app.
type message struct {
	size   int
	digest string // rustpeer.Digest of the payload
	from   string // verified identifier
	answer func(payload []byte) error
}

// party is one side of a cell: a node with an identity. It has at most one channel
// of its own at a time, whether it dialled or was dialled, and beside it perhaps
// one inside that. Methods that return no error fail the test.
type party interface {
	identifier() string
	history() []byte
	// rotate gives the identity a new key.
	rotate()

	// issue acts as an authority: a credential for the subject with that history.
	issue(subject []byte, role string) []byte
	// accept names the authority whose credentials count. Before connect.
	accept(authority []byte)
	// require has a Go device refuse peers that show no credential of the authority,
	// and a stock node accept it. Before connect.
	require(authority []byte)
	// show has the credential shown from now on; a live channel is refreshed.
	show(credential []byte)
	// roleOf is what the party knows of its peer from a credential of the issuer,
	// given by its identifier.
	roleOf(peer, issuer string) string

	connect(h hub)
	// reconnect is what the party's program does after the hub was restarted.
	reconnect(h hub)
	// listen starts a listener and a relay to it, static if alias is not empty, and
	// returns the route to it at the hub.
	listen(t trust, alias string) []string
	// again returns the route after a reconnect.
	again() []string
	// dial opens the channel; an error is a possible outcome.
	dial(to []string, t trust) error
	// up waits for the channel, serves app and echo behind it, and returns who the
	// peer is.
	up() (peer string)
	// resumed waits for the channel that its peer made again, or kept.
	resumed()
	// channels counts the channels that are up.
	channels() int
	// send sends the messages of a run to the peer's app, in order. It may be called
	// from any goroutine.
	send(run rustpeer.Run)
	// next returns the oldest message at app that was not returned before.
	next() message
	// nothing reports whether nothing arrives at app.
	nothing() bool
	// try sends something to the peer's app on a channel that may be none, and asks
	// its echo, for a moment; nil means that an answer came.
	try() error
	// request asks the peer's echo, and compares what comes back.
	request(payload []byte) error
	// hang closes the channel from this side.
	hang()
	// hungUp waits until the channel has ended.
	hungUp()

	// listenInside starts another listener behind the channel, dialInside dials that
	// of the peer through the channel, and sendInside sends to its app.
	listenInside()
	dialInside() error
	sendInside(run rustpeer.Run)
}

// cell is one row of the matrix.
type cell struct {
	name  string
	hub   func(t *testing.T) hub
	left  func(t *testing.T) party // listens
	right func(t *testing.T) party // dials
	alias bool                     // static relay
	stock bool                     // a party tells nobody that it refuses
}
