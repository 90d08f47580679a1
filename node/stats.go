package node

import (
	"fmt"
	"sync/atomic"
)

// Drop says why a frame was not taken; 0 means that it was.
type Drop uint8

// Reasons for dropping a frame.
const (
	DropHeartbeat Drop = iota + 1 // empty onward route (spec routing 3.5)
	DropTransport                 // first hop is not of the local transport type
	DropUnknown                   // no worker at the first hop
	DropRefused                   // the address is not open to where the frame came from
	DropFull                      // the worker's queue is full
	DropLoop                      // aliases lead in a circle
	DropClosed                    // the node or the worker was closed with the frame in its queue
	drops
)

var dropNames = [drops]string{"", "heartbeat", "transport", "unknown", "refused", "full", "loop", "closed"}

// String returns the reason's name for logs and counters; "" for 0.
func (d Drop) String() string {
	if d < drops {
		return dropNames[d]
	}
	return fmt.Sprintf("drop %d", uint8(d))
}

// counters of a node.
type counters struct {
	delivered atomic.Uint64
	sent      atomic.Uint64
	dropped   [drops]atomic.Uint64
}

func (c *counters) drop(d Drop, n uint64) {
	if n > 0 && d > 0 && d < drops {
		c.dropped[d].Add(n)
	}
}

// Stats are counts since the node was made.
type Stats struct {
	// Delivered counts frames that a worker's queue or function took. Those dropped
	// later because the worker was closed are counted in Dropped as well.
	Delivered uint64
	// Sent counts frames that the uplink took.
	Sent uint64
	// Dropped counts frames that were not delivered, by reason.
	Dropped map[Drop]uint64
	// Workers is the number of addresses now.
	Workers int
}

// Stats returns the node's counts. Reasons that never happened are absent.
func (n *Node) Stats() Stats {
	s := Stats{
		Delivered: n.stats.delivered.Load(),
		Sent:      n.stats.sent.Load(),
		Dropped:   make(map[Drop]uint64),
	}
	for d := range drops {
		if c := n.stats.dropped[d].Load(); c > 0 {
			s.Dropped[d] = c
		}
	}
	n.mu.RLock()
	s.Workers = len(n.workers)
	n.mu.RUnlock()
	return s
}
