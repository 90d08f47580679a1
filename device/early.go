package device

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

// What arrives for a listener that a program has yet to make.
const (
	// earlyTime is how long after a node is online first it is kept: as long as a hub lets
	// a first message wait.
	earlyTime = 10 * time.Second
	// earlyFrames and earlyBytes bound it; beyond them nothing more is kept.
	earlyFrames = 64
	earlyBytes  = 512 << 10
)

// early keeps what comes to a node through forwarders that it had in an earlier process,
// until the program listens again: it can only do so once it is connected, and a dialler
// whose first message is dropped waits for the whole of its handshake's time.
type early struct {
	n      *Node
	closed atomic.Bool // its time is over

	mu     sync.Mutex // guards what follows
	timer  *time.Timer
	frames []earlyFrame
	bytes  int
}

type earlyFrame struct {
	o     node.Origin
	f     route.Frame
	class route.Class
}

// begin has the time begin.
func (e *early) begin() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timer == nil && !e.closed.Load() {
		e.timer = time.AfterFunc(earlyTime, e.end)
	}
}

// keep keeps a frame for an address that a listener may have soon.
func (e *early) keep(o node.Origin, f route.Frame, class route.Class) bool {
	first, ok := f.Onward.First()
	if e.closed.Load() || !ok || !isHex32(first.Value) {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	size := f.EncodedLen()
	if e.closed.Load() || e.n.local.Has(first.Value) || len(e.frames) == earlyFrames || e.bytes+size > earlyBytes {
		return false
	}
	if slices.ContainsFunc(e.frames, func(k earlyFrame) bool {
		return bytes.Equal(k.f.Payload, f.Payload) && k.f.Onward.Equal(f.Onward) && k.f.Return.Equal(f.Return)
	}) {
		return false // a repeat
	}
	f.Payload = bytes.Clone(f.Payload) // not the whole packet
	e.frames = append(e.frames, earlyFrame{o, f, class})
	e.bytes += size
	return true
}

// listening hands on what came for an address that is there now.
func (e *early) listening(addr string) {
	e.mu.Lock()
	var mine []earlyFrame
	rest := e.frames[:0]
	for _, k := range e.frames {
		if k.f.Onward[0].Value == addr {
			e.bytes -= k.f.EncodedLen()
			mine = append(mine, k)
		} else {
			rest = append(rest, k)
		}
	}
	clear(e.frames[len(rest):])
	e.frames = rest
	e.mu.Unlock()
	e.inject(mine)
}

// end ends the time. What nobody has listened for is dropped and counted as any other
// frame for an address that is not there.
func (e *early) end() {
	e.mu.Lock()
	e.closed.Store(true)
	left := e.frames
	e.frames = nil
	if e.timer != nil {
		e.timer.Stop()
	}
	e.mu.Unlock()
	e.inject(left)
}

func (e *early) inject(frames []earlyFrame) {
	for _, k := range frames {
		e.n.local.Inject(k.o, k.f, k.class)
	}
}
