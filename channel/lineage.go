package channel

import (
	"bytes"
	"time"
)

// lineageLen is the length of a lineage in bytes.
const lineageLen = 16

// supersede leaves one channel of the lineage that the peer named in its hello on
// c: whoever dials again knows, often long before this side, that the channel
// before is of no use any more.
func (e *Endpoint) supersede(c *Channel, h *hello) {
	if c.initiator || len(h.Lineage) == 0 {
		return
	}
	var over []*Channel
	e.mu.Lock()
	for o := range e.channels {
		if o == c || o.initiator || o.peerID != c.peerID {
			continue
		}
		g := o.greeting.Load()
		switch {
		case g == nil && o.unused():
			over = append(over, o)
			continue
		case g == nil || !bytes.Equal(g.Lineage, h.Lineage):
			continue
		}
		if bytes.Equal(g.Epoch, h.Epoch) && g.Turn > h.Turn {
			over = append(over, c) // a handshake that took longer than the one after it
		} else {
			over = append(over, o)
		}
	}
	e.mu.Unlock()
	for _, o := range over {
		// Without a word: at the other end nobody is left to hear it.
		if o.finish(ErrSuperseded) {
			e.log.Debug("channel superseded", "peer", o.peerID)
		}
	}
}

// unused reports whether a peer has dialled the channel and not said one word in it, not
// even hello: the handshake was all that got through of it. Nobody here can have sent
// anything through it either.
func (c *Channel) unused() bool {
	return !c.initiator && c.rcvd.Load() == 0 && time.Since(c.live.born) >= helloGrace
}

// followed reports whether the peer has dialled again since, and said hello.
func (e *Endpoint) followed(c *Channel) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for o := range e.channels {
		if o != c && !o.initiator && o.peerID == c.peerID && o.Confirmed() && o.live.born.After(c.live.born) {
			return true
		}
	}
	return false
}
