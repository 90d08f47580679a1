package guard

import (
	"hash/maphash"
	"strings"
	"sync"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// What mochi's tree takes, about, as measured: a node for each level of a filter or
// retained topic that no other one begins with, and an entry for each filter.
const (
	nodeCost   = 640
	filterCost = 640

	// maxClientFilters is what the filters of one session may take at most.
	maxClientFilters = 8 << 20
)

// paths counts the nodes of mochi's tree.
type paths struct {
	seed  maphash.Seed
	nodes map[uint64]node // of a path, by its hash
}

// node is where so many topics go through, and whose was the first of them.
type node struct {
	topics int
	by     *owner
}

func newPaths() paths { return paths{maphash.MakeSeed(), make(map[uint64]node)} }

// each calls f with the hash of every path that leads to topic, and topic itself.
func (p *paths) each(topic string, f func(node uint64)) {
	for i := 0; i < len(topic); i++ {
		if topic[i] == '/' {
			f(maphash.String(p.seed, topic[:i]))
		}
	}
	f(maphash.String(p.seed, topic))
}

// missing is how many nodes topic would add.
func (p *paths) missing(topic string) (n int) {
	p.each(topic, func(node uint64) {
		if p.nodes[node].topics == 0 {
			n++
		}
	})
	return n
}

// add counts a topic of somebody's in.
func (p *paths) add(topic string, by *owner) {
	p.each(topic, func(path uint64) {
		n, ok := p.nodes[path]
		if !ok {
			n.by = by
		}
		n.topics++
		p.nodes[path] = n
	})
}

// remove counts a topic out, and calls gone with whose each node was that goes with it.
func (p *paths) remove(topic string, gone func(by *owner)) {
	p.each(topic, func(path uint64) {
		n := p.nodes[path]
		if n.topics--; n.topics > 0 {
			p.nodes[path] = n
			return
		}
		delete(p.nodes, path)
		if n.by != nil {
			gone(n.by)
		}
	})
}

// bytes is what the nodes take.
func (p *paths) bytes() int64 { return int64(len(p.nodes)) * nodeCost }

// filters counts what the subscriptions of ordinary clients take.
type filters struct {
	mu    sync.Mutex
	paths paths
	other int64              // bytes besides the nodes
	of    map[string]*holder // by client id
	each  shares
}

// holder is a client with filters.
type holder struct {
	bytes int64 // as if it had every node for itself
	owner owner
}

// ownCost is what a filter takes besides its nodes, allCost with them.
func ownCost(filter string) int64 { return filterCost + 2*int64(len(filter)) }
func allCost(filter string) int64 {
	return ownCost(filter) + nodeCost*int64(1+strings.Count(filter, "/"))
}

// add counts a filter in, and reports whether it is within the limit for all clients,
// and those for one and for its owner; if not, it is not counted. A negative limit is none.
func (q *filters) add(id string, o owner, filter string, limit int64) bool {
	own, all := ownCost(filter), allCost(filter)
	q.mu.Lock()
	defer q.mu.Unlock()
	h := q.of[id]
	if h == nil {
		h = &holder{owner: o}
	}
	more := own + nodeCost*int64(q.paths.missing(filter))
	if limit >= 0 && (h.bytes+all > min(limit/4, maxClientFilters) || q.other+q.paths.bytes()+more > limit ||
		!q.each.fits(h.owner, more, owner{}, 0, half(limit))) {
		return false
	}
	q.paths.add(filter, &h.owner)
	q.other += own
	q.each.add(h.owner, more)
	h.bytes += all
	q.of[id] = h
	return true
}

// remove counts out a filter that was counted in.
func (q *filters) remove(id, filter string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	h := q.of[id]
	if h == nil {
		return
	}
	q.paths.remove(filter, func(by *owner) { q.each.add(*by, -nodeCost) })
	q.other -= ownCost(filter)
	q.each.add(h.owner, -ownCost(filter))
	if h.bytes -= allCost(filter); h.bytes <= 0 {
		delete(q.of, id)
	}
}

// change is a filter of the packet that is being processed.
type change struct {
	filter  string
	counted bool // in the count, and goes out of it unless mochi holds it afterwards
	refused bool // for want of room
}

// OnSubscribe replaces filters beyond the limits by one that mochi refuses
// (0x8F in MQTT 5, 0x80 in 3.1.1). From here to OnSubscribed the client holds its id's
// gate: a filter that mochi stored while another connection took the session over would
// be nobody's, and stay.
func (f *Fixes) OnSubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	defer f.recovered("OnSubscribe")
	s := f.session(cl)
	if cl.Net.Inline || s == nil {
		return pk
	}
	limit := f.cfg.FilterBytes
	if s.conn != nil && s.conn.Exempt() {
		limit = -1 // has a filter that mochi does not store, and needs it
	}
	s.changes = s.changes[:0]
	s.enter(f)
	current := s.inside.Load() && f.current(cl)
	held := cl.State.Subscriptions.Len()
	fresh := make(map[string]bool) // added by this packet
	for i := range pk.Filters {
		filter := &pk.Filters[i].Filter
		*filter = strings.Clone(*filter) // mochi keeps it, and not the rest of the packet
		c := change{filter: *filter}
		_, had := cl.State.Subscriptions.Get(*filter)
		switch {
		case !current:
			*filter = ""
		case !f.fits(*filter):
			f.cfg.Counters.add(FilterRefused)
			*filter = ""
		case had || fresh[*filter] || !mqtt.IsValidFilter(*filter, false):
		case f.cfg.Subscriptions >= 0 && held >= f.cfg.Subscriptions, !f.filters.add(cl.ID, s.owner, *filter, limit):
			f.cfg.Counters.add(SubscriptionsFull)
			*filter, c.refused = "", true
		default:
			held++
			c.counted, fresh[c.filter] = true, true
		}
		s.changes = append(s.changes, c)
	}
	return pk
}

// OnSubscribed counts out what mochi, or another hook, did not take after all, and
// says in MQTT 5 that a filter was refused for want of room.
func (f *Fixes) OnSubscribed(cl *mqtt.Client, pk packets.Packet, codes []byte) {
	defer f.recovered("OnSubscribed")
	s := f.session(cl)
	if cl.Net.Inline || s == nil {
		return
	}
	for i, c := range s.changes {
		if c.refused && cl.Properties.ProtocolVersion == 5 && i < len(codes) && codes[i] == packets.ErrTopicFilterInvalid.Code {
			codes[i] = packets.ErrQuotaExceeded.Code
		}
	}
	f.settle(cl, s)
	s.leave(f)
}

// current reports whether a client's session is its own still.
func (f *Fixes) current(cl *mqtt.Client) bool {
	cur, ok := f.server.Clients.Get(cl.ID)
	return ok && cur == cl && !cl.IsTakenOver()
}

// settle counts out the changes whose filters mochi does not hold.
func (f *Fixes) settle(cl *mqtt.Client, s *session) {
	for _, c := range s.changes {
		if !c.counted {
			continue
		}
		if _, held := cl.State.Subscriptions.Get(c.filter); !held {
			f.filters.remove(cl.ID, c.filter)
		}
	}
	s.changes = s.changes[:0]
}

// OnUnsubscribe remembers which filters the client has. As in OnSubscribe it holds the
// gate: a session that was taken over gives up nothing of the newcomer's.
func (f *Fixes) OnUnsubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	defer f.recovered("OnUnsubscribe")
	s := f.session(cl)
	if cl.Net.Inline || s == nil {
		return pk
	}
	s.changes = s.changes[:0]
	s.enter(f)
	if !s.inside.Load() || !f.current(cl) {
		pk.Filters = nil
	}
	gone := make(map[string]bool)
	for i := range pk.Filters {
		filter := pk.Filters[i].Filter
		if _, had := cl.State.Subscriptions.Get(filter); had && !gone[filter] {
			s.changes = append(s.changes, change{filter: filter, counted: true})
			gone[filter] = true
		}
	}
	return pk
}

// OnUnsubscribed counts out what a client has given up, or what went with its
// session: mochi says so with a packet that nobody has sent.
func (f *Fixes) OnUnsubscribed(cl *mqtt.Client, pk packets.Packet) {
	defer f.recovered("OnUnsubscribed")
	if cl.Net.Inline {
		return
	}
	if pk.PacketID == 0 {
		for i := range pk.Filters {
			f.filters.remove(cl.ID, pk.Filters[i].Filter)
		}
		return
	}
	if s := f.session(cl); s != nil {
		f.settle(cl, s)
		s.leave(f)
	}
}

// FilterBytes returns about what the subscriptions of ordinary clients take.
func (f *Fixes) FilterBytes() int64 {
	f.filters.mu.Lock()
	defer f.filters.mu.Unlock()
	return f.filters.other + f.filters.paths.bytes()
}
