package channel

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/route"
)

// Bounds of what is held for a handshake that is not finished: frames may
// overtake message 3, or arrive while it is being verified. A stock initiator sends
// as fast as it can once it has sent message 3. Each frame counts with
// earlyOverhead bytes beside its payload. A source has a quarter, at most, of what
// the others leave of the total, which leaves every handshake its first frame that
// may be message 3 and its first earlyOwn bytes, so that nobody's early ones keep
// another's message 3 out, nor the first messages behind it.
const (
	maxEarlyFrames     = 4096
	maxEarlyBytes      = 4 << 20
	maxEarlyBytesTotal = 16 << 20
	earlyOwn           = 32 << 10
	earlyOverhead      = 256
)

// earlyWait bounds how long a frame waits for room there, see Inbound.MayWait.
const earlyWait = time.Second

// halfOpen is a handshake that a peer has begun. Its Handshake belongs to the
// worker that runs answer or work, of which there is one at a time.
type halfOpen struct {
	e     *Endpoint
	ln    *Listener
	src   *source
	key   [32]byte
	begun time.Time
	dr    string      // our address for the rest of the handshake and for data
	reply route.Route // return route of message 1

	released bool // guarded by the endpoint's lock

	hs *Handshake
	ch atomic.Pointer[Channel] // once complete

	mu      sync.Mutex // guards what follows
	timer   *time.Timer
	stopped bool
	working bool          // answer or work is queued or running
	worked  chan struct{} // closed when that has ended; nil: nobody waits for it
	tired   bool          // somebody has waited for earlyWait: nobody does again
	msg2    []byte
	resends int
	queue   []Inbound // not looked at yet
	early   []Inbound // not message 3: kept for the channel
	held    int       // costs of what is in queue and early
}

// arm starts the timeout.
func (h *halfOpen) arm() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.working = true // answer is about to be queued
	if !h.stopped {
		h.timer = h.e.after(h.e.limits.Handshake, func() {
			if h.stop() {
				h.e.failed.Add(1)
				h.e.log.Debug("handshake not finished in time", "listener", h.ln.name)
			}
		})
	}
}

// answer makes message 2. It runs on a worker.
func (h *halfOpen) answer(msg1 []byte) {
	msg2, err := h.makeReply(msg1)
	if err != nil {
		h.e.failed.Add(1)
		h.e.drops.add(DropHandshake)
		h.e.log.Debug("handshake not answered", "listener", h.ln.name, "err", err)
		h.stop()
		return
	}
	h.mu.Lock()
	h.msg2 = msg2
	h.mu.Unlock()
	h.sendReply(msg2)
	h.work()
}

func (h *halfOpen) makeReply(msg1 []byte) ([]byte, error) {
	credential, err := h.e.credential(h.ln.opts.HideCredential)
	if err != nil {
		return nil, err
	}
	own, err := h.e.cfg.hooks.side(credential)
	if err != nil {
		return nil, err
	}
	h.hs = startHandshake(PhaseAwaitFirst, own, h.ln.verifier.check, h.e.cfg.hooks.ephemeral)
	return h.hs.ReadFirst(msg1)
}

func (h *halfOpen) sendReply(msg2 []byte) {
	h.e.spawn(func() {
		h.e.send(route.Frame{Onward: h.reply, Return: route.To(h.dr), Payload: msg2})
	})
}

// again answers a repeated message 1 with the same message 2.
func (h *halfOpen) again() {
	h.mu.Lock()
	msg2 := h.msg2
	if h.stopped || msg2 == nil || h.resends >= maxResends {
		h.mu.Unlock()
		return
	}
	h.resends++
	h.mu.Unlock()
	h.sendReply(msg2)
}

// receive takes what arrives at the handshake's address: message 3, then data.
func (h *halfOpen) receive(in Inbound) {
	if c := h.ch.Load(); c != nil {
		c.receive(in)
		return
	}
	h.mu.Lock()
	size := cost(in)
	if in.MayWait && h.working && !h.tired && h.fullLocked(size) {
		h.awaitWorkLocked()
	}
	if c := h.ch.Load(); c != nil {
		h.mu.Unlock()
		c.receive(in)
		return
	}
	defer h.mu.Unlock()
	switch {
	case h.stopped:
		h.e.drops.add(DropEnded)
		return
	case len(in.Frame.Payload) < Overhead:
		h.e.drops.add(DropShort)
		return
	case h.fullLocked(size):
		h.e.drops.add(DropEarly)
		return
	}
	h.queue = append(h.queue, in)
	h.hold(size)
	if !h.working {
		h.working = true
		h.e.pool.submit(h.src, h.work)
	}
}

// longMessage is from where on a message 3 may take long to verify, in bytes: about 30
// changes of an identity. 256 take tens of milliseconds.
const longMessage = 8 << 10

// isLong reports whether a frame may be such a message 3.
func isLong(in Inbound) bool {
	n := len(in.Frame.Payload)
	return n > longMessage && n <= MaxHandshakeMessage
}

// fullLocked reports whether a frame that costs so much is too much to hold.
func (h *halfOpen) fullLocked(size int) bool {
	switch {
	case h.held == 0 && size <= MaxHandshakeMessage+earlyOverhead:
		return false
	case len(h.queue)+len(h.early) >= maxEarlyFrames, h.held+size > maxEarlyBytes:
		return true
	case h.held+size <= earlyOwn:
		return false
	}
	own, all := h.src.earlyBytes.Load(), h.e.earlyBytes.Load()
	return own+int64(size) > (maxEarlyBytesTotal-(all-own))/4
}

// awaitWorkLocked waits until a worker has looked at all that is here, with h.mu free
// meanwhile. What is no message 3 costs it little, so nobody is held up for long by a
// peer that sends none.
func (h *halfOpen) awaitWorkLocked() {
	if h.worked == nil {
		h.worked = make(chan struct{})
	}
	worked := h.worked
	h.mu.Unlock()
	limit := time.NewTimer(earlyWait)
	defer limit.Stop()
	late := false
	select {
	case <-worked:
	case <-limit.C:
		late = true
	}
	h.mu.Lock()
	h.tired = h.tired || late
}

// endWorkLocked says that no worker has anything to do here any more.
func (h *halfOpen) endWorkLocked() {
	h.working = false
	if h.worked != nil {
		close(h.worked)
		h.worked = nil
	}
}

// cost returns what a frame counts as while it is held.
func cost(in Inbound) int { return len(in.Frame.Payload) + earlyOverhead }

func (h *halfOpen) hold(n int) {
	h.held += n
	h.src.earlyBytes.Add(int64(n))
	h.e.earlyBytes.Add(int64(n))
}

// work tries what has arrived as message 3. It runs on a worker, and leaves what may take
// long to another, that keeps nobody else's handshake waiting.
func (h *halfOpen) work() { h.workOn(false) }

func (h *halfOpen) workOn(slowly bool) {
	for {
		h.mu.Lock()
		if h.stopped || len(h.queue) == 0 {
			h.endWorkLocked()
			h.mu.Unlock()
			return
		}
		in := h.queue[0]
		if isLong(in) && !slowly {
			h.mu.Unlock()
			h.e.slow.submit(h.src, func() { h.workOn(true) })
			return
		}
		h.queue = h.queue[1:]
		h.mu.Unlock()
		if over := h.try(in); over {
			return
		}
	}
}

func (h *halfOpen) try(in Inbound) (over bool) {
	err := h.hs.ReadFinal(in.Frame.Payload)
	switch {
	case err == nil:
		h.complete()
		return true
	case h.hs.Phase() == PhaseDead:
		h.fail(err)
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.stopped:
		h.e.drops.add(DropEnded)
	case errors.Is(err, errNotPeer):
		h.early = append(h.early, in) // perhaps data that overtook message 3
	default:
		h.e.drops.add(DropHandshake)
		h.hold(-cost(in))
	}
	return false
}

// fail ends a handshake that cannot complete, and tells the peer if it is known
// to be the one that began.
func (h *halfOpen) fail(err error) {
	if errors.Is(err, ErrWrongIdentity) {
		h.e.refused.Add(1)
		h.e.log.Info("peer refused", "listener", h.ln.name, "err", err)
	} else {
		h.e.failed.Add(1)
		h.e.log.Info("handshake failed", "listener", h.ln.name, "err", err)
	}
	ended := h.end()
	leave := func() {
		if ended {
			h.e.cfg.Router.Unregister(h.dr)
		}
	}
	frame := h.hs.Refusal()
	if frame == nil || !h.e.enter() {
		leave()
		return
	}
	go func() {
		defer h.e.wg.Done()
		h.e.send(route.Frame{Onward: h.reply, Payload: frame})
		// Only now: where a router tells that nobody is at an address, the peer would hear
		// that of what it has sent behind message 3, before it hears that it is refused.
		leave()
	}()
}

// complete turns the handshake into a channel and hands it what came early.
func (h *halfOpen) complete() {
	res, err := h.hs.Result()
	if err != nil {
		h.fail(err)
		return
	}
	c := newChannel(h.e, res, channelSetup{
		listener: h.ln.name, dr: h.dr, remote: h.reply, src: h.src, verifier: h.ln.verifier,
		class: h.ln.opts.Class, shown: h.hs.own.shown,
	})
	if err := h.e.adopt(c, h); err != nil {
		h.fail(err)
		return
	}
	h.mu.Lock()
	if h.stopped {
		h.mu.Unlock()
		c.release()
		c.finish(ErrClosed)
		return
	}
	h.e.accepted.Add(1)
	h.timer.Stop()
	frames := append(h.early, h.queue...)
	h.hold(-h.held)
	h.early, h.queue, h.msg2 = nil, nil, nil
	// Arrivals wait for the lock meanwhile, so they stay behind these.
	c.start()
	for _, in := range frames {
		c.receive(in)
	}
	h.ch.Store(c)
	h.endWorkLocked()
	h.mu.Unlock()
}

// stop ends the handshake; false when it was over. The peer hears nothing.
func (h *halfOpen) stop() bool {
	if !h.end() {
		return false
	}
	h.e.cfg.Router.Unregister(h.dr)
	return true
}

// end is stop, except that the address stays; what comes there is dropped.
func (h *halfOpen) end() bool {
	h.mu.Lock()
	if h.stopped || h.ch.Load() != nil {
		h.mu.Unlock()
		return false
	}
	h.stopped = true
	if h.timer != nil {
		h.timer.Stop()
	}
	for range len(h.queue) + len(h.early) {
		h.e.drops.add(DropEnded)
	}
	h.hold(-h.held)
	h.queue, h.early, h.msg2 = nil, nil, nil
	h.endWorkLocked()
	h.mu.Unlock()
	h.e.mu.Lock()
	h.e.releaseLocked(h)
	h.e.mu.Unlock()
	return true
}

// releaseLocked gives back what an unfinished handshake holds.
func (e *Endpoint) releaseLocked(h *halfOpen) {
	if h.released {
		return
	}
	h.released = true
	delete(e.halfOpen, h)
	h.src.halfOpen--
	e.firsts.over(h.key, h)
}
