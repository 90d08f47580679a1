package bridge

import (
	"sync"

	"github.com/sealmq/sealmq/route"
)

// Outbox is the ordered store of the frames for one target that the next party
// has not acknowledged. The bridge decides what is appended, offered and
// dropped; an Outbox keeps bytes. It belongs to a client id (or a connection of
// a stream), never to a connection of a device.
//
// All methods are called under the target's lock: never two at once, and none
// may block on anything that needs the bridge.
type Outbox interface {
	// Append stores the frames of p after everything appended earlier, giving
	// each the next sequence, from 1 on. It copies what it keeps, and returns
	// the bytes of the frames. stored is true when they are stored as safely as
	// this outbox ever stores; false when t.Done will be called later, by
	// another goroutine, in the order of the Appends, once they are. In either
	// case Read returns them from now on. An error means that none was kept; the
	// packet is acknowledged all the same, and reported as undeliverable, unless
	// the error is fs.ErrClosed: the store has been closed before the bridge.
	Append(p *Packet, t Ticket) (bytes int, stored bool, err error)
	// Read fills dst, up to its capacity, with the entries from the sequence
	// on, oldest first, and returns it. The bytes are valid until Settle.
	Read(from uint64, dst []Entry) []Entry
	// Settle says that what Read returned is no longer in use.
	Settle()
	// Scan calls f for each entry, oldest first, until f returns false. f may
	// call Drop. The bytes are valid during the call.
	Scan(f func(*Item) bool)
	// Drop removes one entry and returns its size; 0 and false when it is not
	// there.
	Drop(seq uint64) (bytes int, ok bool)
	// Release removes all entries up to a sequence and returns how many there
	// were and their bytes.
	Release(upTo uint64) (frames, bytes int)
	// Next returns the sequence that the next frame gets.
	Next() uint64
	// Oldest returns the arrival of the oldest entry.
	Oldest() (arrival int64, ok bool)
	// Discard removes everything, for good: the name is gone.
	Discard()
}

// OutboxFactory opens the outbox of a client id; for a stream the name is its
// hub address, and nothing needs to outlive the process.
type OutboxFactory func(name string, durable bool) (Outbox, error)

// Item is an entry as Scan shows it.
type Item struct {
	Entry
	// Arrival is when the hub took the frame, in nanoseconds of the bridge's clock:
	// unix time, see ClockJournal.
	Arrival int64
	// First says that the frame came through a forwarder.
	First bool
	// Hop is the first hop as the sender wrote it; empty: the target's own
	// hub address.
	Hop []byte
}

// Packet is one packet's frames on their way into an outbox. It is encoded
// where it is stored, so that the fast path copies each byte once. It is valid
// only during Outbox.Append.
type Packet struct {
	// Class, Arrival, First and Hop go with each frame; see Item.
	Class   route.Class
	Arrival int64
	First   bool
	Hop     []byte

	views        []route.View // parsed, to be routed; or
	pop          int
	front, stamp route.Hops

	raw  []byte // routed already, back to back
	ends []int  // where each frame ends in raw; nil: one frame
}

// Frames returns the number of frames, 1 at least.
func (p *Packet) Frames() int {
	switch {
	case p.raw == nil:
		return len(p.views)
	case p.ends == nil:
		return 1
	}
	return len(p.ends)
}

// Size returns the number of bytes that AppendTo appends.
func (p *Packet) Size(i int) int {
	if p.raw == nil {
		return p.views[i].ForwardedLen(p.pop, p.front, p.stamp)
	}
	return len(p.frame(i))
}

// AppendTo appends frame i, routed and stamped.
func (p *Packet) AppendTo(dst []byte, i int) []byte {
	if p.raw == nil {
		return p.views[i].AppendForwarded(dst, p.pop, p.front, p.stamp)
	}
	return append(dst, p.frame(i)...)
}

func (p *Packet) frame(i int) []byte {
	if p.ends == nil {
		return p.raw
	}
	start := 0
	if i > 0 {
		start = p.ends[i-1]
	}
	return p.raw[start:p.ends[i]]
}

// returnHop returns the first address of the first frame's return route, which is
// whole in a packet that no port stamps; empty if there is none.
func (p *Packet) returnHop() string {
	var v route.View
	if p.raw == nil {
		v = p.views[0]
	} else {
		v, _, _ = route.NextView(p.frame(0), wide) // our own encoding
	}
	for h := range v.Return() {
		return string(h.Value)
	}
	return ""
}

// bytes returns the sum of all sizes.
func (p *Packet) bytes() int {
	if p.raw != nil {
		return len(p.raw)
	}
	n := 0
	for i := range p.views {
		n += p.Size(i)
	}
	return n
}

// freeze copies the packet, routed and stamped, so that it can outlive the call
// that brought it.
func (p *Packet) freeze() Packet {
	f := Packet{Class: p.Class, Arrival: p.Arrival, First: p.First}
	if len(p.Hop) > 0 {
		f.Hop = append([]byte(nil), p.Hop...)
	}
	n := p.Frames()
	f.raw = make([]byte, 0, p.bytes())
	if n > 1 {
		f.ends = make([]int, 0, n)
	}
	for i := range n {
		f.raw = p.AppendTo(f.raw, i)
		if n > 1 {
			f.ends = append(f.ends, len(f.raw))
		}
	}
	return f
}

// Ticket is the claim to an acknowledgement of a packet, or of several in a row.
type Ticket struct {
	link  *Link
	ack   Acker
	token uint64
	bytes int   // charged to the link's window while it waits, and to what is being stored
	more  int   // packets that follow this one, with the tokens that follow
	paid  bool  // answered already: only charged to what is being stored
	due   int64 // not before; unix nanoseconds, 0: at once
}

// each yields one ticket for each packet. The first has the bytes of all.
func (t Ticket) each(yield func(Ticket) bool) {
	more := t.more
	for t.more = 0; yield(t) && more > 0; more-- {
		t.token++
		t.bytes = 0
	}
}

// Done acknowledges the packet, or packets. An Outbox calls it at most once, and only
// after Append returned false.
func (t Ticket) Done() {
	if t.link == nil {
		if t.ack != nil {
			t.ack.Acked(t.token)
		}
		return
	}
	b := t.link.port.b
	b.storing.Add(int64(-t.bytes))
	for one := range t.each {
		if !one.paid {
			one.link.answered(one.bytes)
			one.fire()
		}
	}
	b.stored()
}

// stored lets those in that wait for room, once there is some.
func (b *Bridge) stored() {
	if b.starved.n.Load() == 0 {
		return
	}
	if n, most, all := b.storingRoom(); n <= most/2 || n > most && n <= (most+all)/2 {
		b.relieve()
	}
}

// DoneAll is Done for many packets at once. Those of one connection with a
// BatchAcker are answered together and in their order, which spares it a wake-up
// and a system call for each; tickets is only read.
func DoneAll(tickets []Ticket) {
	a := answersPool.Get().(*answers)
	var last *Link // packets of one connection come in runs
	var g *answer
	for _, t := range tickets {
		if t.link != last || last == nil {
			ack, ok := t.ack.(BatchAcker)
			if !ok || t.link == nil || t.paid {
				t.Done()
				continue
			}
			last, g = t.link, a.of(t.link, ack)
		}
		g.packets += int64(t.more) + 1
		g.bytes += int64(t.bytes)
		if t.ack == nil || t.link.dead.Load() {
			continue
		}
		for one := range t.each {
			if !one.link.owe(one) {
				g.tokens = append(g.tokens, one.token)
			}
		}
	}
	for i := range a.list {
		g := &a.list[i]
		b := g.link.port.b
		b.storing.Add(-g.bytes)
		g.link.waitPackets.Add(-g.packets)
		g.link.waitBytes.Add(-g.bytes)
		if len(g.tokens) > 0 {
			g.ack.AckedAll(g.tokens)
		}
		b.stored()
		*g = answer{tokens: g.tokens[:0]}
	}
	a.list = a.list[:0]
	clear(a.at)
	answersPool.Put(a)
}

// answers is what DoneAll has to answer, by connection.
type answers struct {
	at   map[*Link]int // index in list
	list []answer
}

type answer struct {
	link    *Link
	ack     BatchAcker
	tokens  []uint64
	packets int64
	bytes   int64
}

// of returns a connection's answer. It is valid until the next call.
func (a *answers) of(l *Link, ack BatchAcker) *answer {
	i, ok := a.at[l]
	if !ok {
		i = len(a.list)
		a.at[l] = i
		if i < cap(a.list) {
			a.list = a.list[:i+1] // with tokens to be used again
		} else {
			a.list = append(a.list, answer{})
		}
		a.list[i].link, a.list[i].ack = l, ack
	}
	return &a.list[i]
}

var answersPool = sync.Pool{New: func() any { return &answers{at: make(map[*Link]int)} }}

// fire calls the acknowledgement; the caller holds no lock.
func (t Ticket) fire() {
	if t.ack == nil || t.link.dead.Load() {
		return
	}
	if t.more == 0 {
		if !t.link.owe(t) {
			t.ack.Acked(t.token)
		}
		return
	}
	tokens := tokensPool.Get().(*[]uint64)
	for one := range t.each {
		if !one.link.owe(one) {
			*tokens = append(*tokens, one.token)
		}
	}
	if batch, ok := t.ack.(BatchAcker); ok && len(*tokens) > 0 {
		batch.AckedAll(*tokens)
	} else {
		for _, token := range *tokens {
			t.ack.Acked(token)
		}
	}
	*tokens = (*tokens)[:0]
	tokensPool.Put(tokens)
}

var tokensPool = sync.Pool{New: func() any { return new([]uint64) }}
