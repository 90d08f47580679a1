package mochibridge

const (
	// maxWindow is how many packets a device may have unacknowledged.
	maxWindow = 256
	// firstID begins the packet identifiers of deliveries: the upper half of the
	// space. mochi gives a device none at all; this is a second fence.
	firstID = 1 << 15
	idMask  = firstID - 1
)

// window holds the packets written to a device and not acknowledged, oldest
// first.
type window struct {
	slots      []slot // a ring, its length a power of two
	head, tail uint32 // counts of packets; tail-head are out
	bytes      int
}

type slot struct {
	seq  uint64 // of the last frame in the packet
	size int
	done bool
}

// admits reports whether a packet of size bytes may be written now. One always
// may.
func (w *window) admits(size, packets, bytes int) bool {
	n := int(w.tail - w.head)
	return n == 0 || n < packets && w.bytes+size <= bytes
}

// push notes a packet and returns its identifier.
func (w *window) push(seq uint64, size int) uint16 {
	if int(w.tail-w.head) == len(w.slots) {
		grown := make([]slot, max(8, 2*len(w.slots)))
		for i := w.head; i != w.tail; i++ {
			grown[int(i)&(len(grown)-1)] = w.slots[int(i)&(len(w.slots)-1)]
		}
		w.slots = grown
	}
	w.slots[int(w.tail)&(len(w.slots)-1)] = slot{seq: seq, size: size}
	id := firstID | uint16(w.tail&idMask)
	w.tail++
	w.bytes += size
	return id
}

// ack notes the acknowledgement of a packet. seq is the last frame of the
// longest run of acknowledged packets, 0 when that has not grown; ok is false
// when no such packet is out.
func (w *window) ack(id uint16) (seq uint64, ok bool) {
	at := (uint32(id) - w.head) & idMask
	if id < firstID || at >= w.tail-w.head {
		return 0, false
	}
	s := &w.slots[int(w.head+at)&(len(w.slots)-1)]
	if s.done {
		return 0, false
	}
	s.done = true
	for w.head != w.tail {
		s := &w.slots[int(w.head)&(len(w.slots)-1)]
		if !s.done {
			break
		}
		seq = s.seq
		w.bytes -= s.size
		w.head++
	}
	return seq, true
}
