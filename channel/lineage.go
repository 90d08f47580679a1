package channel

import (
	"bytes"
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
		if g == nil || !bytes.Equal(g.Lineage, h.Lineage) {
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
