package hostile

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// everything lets frames of all sizes through the switchboard.
var everything = route.Limits{Frame: route.MaxFrame}

// way is a direction at an end.
type way int

const (
	up   way = iota // from the endpoint to the hub
	down            // from the hub to the endpoint
)

func (w way) other() way { return 1 - w }

// passage is one frame between two peers on its way through an end.
type passage struct {
	at   *end
	way  way
	n    int // how many came this way before it since the attack was set
	body []byte
	route.Frame
}

// attack decides what goes on in place of a frame. It may not block, and only call
// methods of the end whose name ends in Locked.
type attack func(p *passage) [][]byte

// asIs is the attack of an honest hub.
func asIs(p *passage) [][]byte { return [][]byte{p.body} }

func encode(f route.Frame) []byte { return route.AppendFrame(nil, &f) }

// end is the switchboard's side towards one endpoint: the hub as it sees it.
type end struct {
	t      *testing.T
	ln     net.Listener
	target string
	tcp    bool // Ockam TCP transport instead of MQTT
	wg     sync.WaitGroup

	mu      sync.Mutex // guards what follows
	closed  bool
	cur     *link
	count   [2]int
	bytes   int // in frames that have come or were sent on
	attack  attack
	service attack // the same for frames to and from the hub itself
	puback  func(id uint16) (times int)
	tape    [2][]route.Frame // what peers sent, before any attack
	told    [2][]route.Frame // what was said to and by the hub
	grown   chan struct{}    // closed and replaced when the tapes grow
}

// link is one connection of the endpoint.
type link struct {
	e     *end
	conns [2]*writer // by the way of what is written to it
	lanes [2]lane
}

// lane gives the publishes of one way packet identifiers of its own.
type lane struct {
	next  uint16
	ids   map[uint16]uint16 // what the sender called it; 0: made up here
	topic string
}

func newEnd(t *testing.T, target string, overTCP bool) *end {
	t.Helper()
	watchGrowth(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &end{t: t, ln: ln, target: target, tcp: overTCP, grown: make(chan struct{})}
	e.wg.Go(e.accept)
	t.Cleanup(e.close)
	return e
}

func (e *end) addr() string { return e.ln.Addr().String() }

func (e *end) close() {
	e.mu.Lock()
	e.closed = true
	e.cutLocked()
	e.mu.Unlock()
	_ = e.ln.Close()
	e.wg.Wait()
}

func (e *end) accept() {
	for {
		dev, err := e.ln.Accept()
		if err != nil {
			return
		}
		hub, err := net.DialTimeout("tcp", e.target, 5*time.Second)
		if err != nil {
			_ = dev.Close()
			continue
		}
		l := &link{e: e, conns: [2]*writer{newWriter(hub), newWriter(dev)}}
		for w := range l.lanes {
			l.lanes[w].ids = make(map[uint16]uint16)
		}
		e.mu.Lock()
		if e.closed {
			_ = dev.Close()
			_ = hub.Close()
		}
		e.cur = l
		e.mu.Unlock()
		for w, from := range []net.Conn{dev, hub} {
			e.wg.Go(l.conns[w].run)
			e.wg.Go(func() { l.pass(way(w), from) })
		}
	}
}

func (e *end) cutLocked() {
	if e.cur != nil {
		e.cur.conns[up].end()
		e.cur.conns[down].end()
	}
}

// set starts an attack on what peers send each other through this end, or ends it with
// nil.
func (e *end) set(a attack) {
	if a == nil {
		checkGoroutines(e.t)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.attack, e.count = a, [2]int{}
}

// onService starts an attack on what is said to and by the hub.
func (e *end) onService(a attack) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.service = a
}

// onPuback has acknowledgements towards the endpoint written as often as f says.
func (e *end) onPuback(f func(id uint16) int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.puback = f
}

// send makes a frame up and sends it.
func (e *end) send(w way, f route.Frame) { e.sendBody(w, encode(f)) }

func (e *end) sendBody(w way, bodies ...[]byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sendLocked(w, bodies...)
}

func (e *end) sendLocked(w way, bodies ...[]byte) {
	if e.cur != nil {
		e.cur.emitLocked(w, bodies, 1, 0)
	}
}

// frames returns what peers have sent one way so far.
func (e *end) frames(w way) []route.Frame {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.tape[w])
}

// last returns what a peer has sent one way at last.
func (e *end) last(w way) route.Frame {
	all := e.frames(w)
	if len(all) == 0 {
		e.t.Fatal("nothing has passed")
	}
	return all[len(all)-1]
}

// await waits until f finds what it looks for among the frames seen.
func (e *end) await(what string, f func(tape, told [2][]route.Frame) bool) {
	e.t.Helper()
	limit := time.After(patience)
	for {
		e.mu.Lock()
		found, grown := f(e.tape, e.told), e.grown
		e.mu.Unlock()
		if found {
			return
		}
		select {
		case <-grown:
		case <-limit:
			e.t.Fatalf("the switchboard waits in vain for %s", what)
		}
	}
}

// services are the hub's addresses that frames to and from the hub itself show.
var services = []string{
	"hello", "lookup", "claim", "release", "notice", "echo", "uppercase", "echoer", "api",
	"forwarding_service", "static_forwarding_service",
}

// ofHub tells what is said to or by the hub from what peers send each other.
func ofHub(w way, f *route.Frame) bool {
	if w == up {
		return len(f.Onward) == 1 && slices.Contains(services, f.Onward[0].Value)
	}
	if len(f.Onward) == 0 || len(f.Return) > 1 {
		return len(f.Onward) == 0
	}
	return len(f.Return) == 0 || slices.Contains(services, f.Return[0].Value) ||
		strings.HasPrefix(f.Return[0].Value, "FWD_") || strings.HasPrefix(f.Return[0].Value, "forward_to_")
}

// through puts one frame through the attack.
func (e *end) throughLocked(w way, body []byte) [][]byte {
	e.bytes += len(body)
	f, err := route.ParseFrame(bytes.Clone(body), everything)
	if err != nil {
		return [][]byte{body}
	}
	p := &passage{at: e, way: w, body: body, Frame: f}
	close(e.grown)
	e.grown = make(chan struct{})
	if ofHub(w, &f) {
		e.told[w] = append(e.told[w], f)
		if e.service != nil {
			return e.service(p)
		}
		return [][]byte{body}
	}
	e.tape[w] = append(e.tape[w], f)
	p.n = e.count[w]
	e.count[w]++
	if e.attack != nil {
		return e.attack(p)
	}
	return [][]byte{body}
}

// pass hands one way on until either side ends.
func (l *link) pass(w way, from net.Conn) {
	defer func() {
		l.conns[up].end()
		l.conns[down].end()
	}()
	if l.e.tcp {
		l.passTCP(w, from)
	} else {
		l.passMQTT(w, from)
	}
}

func (l *link) passTCP(w way, from net.Conn) {
	r := route.NewReader(from, everything)
	if r.ReadPreamble() != nil {
		return
	}
	l.conns[w].write([]byte{route.Preamble})
	for {
		body, err := r.Next()
		if err != nil {
			return
		}
		l.e.mu.Lock()
		l.emitLocked(w, l.e.throughLocked(w, bytes.Clone(body)), 1, 0)
		l.e.mu.Unlock()
	}
}

func (l *link) passMQTT(w way, from net.Conn) {
	c := rawmqtt.New(from, false)
	c.Timeout = 0
	for {
		p, err := c.ReadPacket()
		if err != nil {
			return
		}
		switch {
		case p.Type() == rawmqtt.PUBLISH && strings.HasSuffix(p.Topic, [2]string{"/out", "/in"}[w]):
			l.publish(w, p)
		case p.Type() == rawmqtt.PUBACK:
			l.acknowledged(w.other(), p.ID)
		default:
			l.conns[w].write(rawmqtt.Frame(p.First, p.Body))
		}
	}
}

// publish takes a message with one or more frames.
func (l *link) publish(w way, p rawmqtt.Packet) {
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	l.lanes[w].topic = p.Topic
	views, err := route.ParseBundle(p.Payload, everything, nil)
	if err != nil {
		l.emitLocked(w, [][]byte{p.Payload}, p.QoS(), p.ID)
		return
	}
	var out [][]byte
	rest := p.Payload
	for i := range views {
		out = append(out, l.e.throughLocked(w, rest[:views[i].Len()])...)
		rest = rest[views[i].Len():]
	}
	l.emitLocked(w, out, p.QoS(), p.ID)
}

// emitLocked writes frames. The sender's packet identifier goes with the last of
// them; where nothing is left the hub lies that it has taken it.
func (l *link) emitLocked(w way, bodies [][]byte, qos byte, id uint16) {
	for _, b := range bodies {
		l.e.bytes += len(b)
	}
	if l.e.tcp {
		for _, b := range bodies {
			l.conns[w].write(append(route.AppendFrameHeader(nil, len(b)), b...))
		}
		return
	}
	lane := &l.lanes[w]
	if lane.topic == "" {
		l.e.t.Error("a frame was made up before the topic was known")
		return
	}
	messages := bundles(bodies)
	for i, m := range messages {
		var own uint16
		if qos > 0 {
			if lane.next++; lane.next == 0 {
				lane.next++
			}
			own = lane.next
			lane.ids[own] = 0
			if i == len(messages)-1 {
				lane.ids[own] = id
			}
		}
		l.conns[w].write(rawmqtt.Publish(false, qos<<1, lane.topic, own, m))
	}
	if len(messages) == 0 && qos > 0 && id != 0 {
		l.ackLocked(w, id)
	}
}

// bundles puts frames that go to the same place together, as a sender does.
func bundles(bodies [][]byte) [][]byte {
	var out [][]byte
	var b route.Bundler
	flush := func() {
		if b.Len() > 0 {
			out = append(out, bytes.Clone(b.Bytes()))
			b.Reset()
		}
	}
	for _, body := range bodies {
		if _, err := route.ParseView(body, everything); err != nil {
			flush()
			out = append(out, body) // rubbish travels alone
			continue
		}
		if !b.Add(body) {
			flush()
			b.Add(body)
		}
	}
	flush()
	return out
}

// acknowledged takes the receiver's acknowledgement of what was published one way.
func (l *link) acknowledged(w way, own uint16) {
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	id, known := l.lanes[w].ids[own]
	delete(l.lanes[w].ids, own)
	if known && id != 0 {
		l.ackLocked(w, id)
	}
}

func (l *link) ackLocked(w way, id uint16) {
	times := 1
	if w == up && l.e.puback != nil {
		times = l.e.puback(id)
	}
	for range times {
		l.conns[w.other()].write(rawmqtt.Ack(rawmqtt.PUBACK, id))
	}
}

// writer writes to a connection without ever making anybody wait.
type writer struct {
	conn net.Conn
	mu   sync.Mutex
	more *sync.Cond
	buf  []byte
	over bool
}

func newWriter(c net.Conn) *writer {
	w := &writer{conn: c}
	w.more = sync.NewCond(&w.mu)
	return w
}

func (w *writer) write(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = append(w.buf, b...)
	w.more.Signal()
}

func (w *writer) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	w.more.Signal()
	_ = w.conn.SetReadDeadline(time.Now())
}

// run writes until the end, then closes the connection.
func (w *writer) run() {
	defer w.conn.Close()
	for {
		w.mu.Lock()
		for len(w.buf) == 0 && !w.over {
			w.more.Wait()
		}
		out, over := w.buf, w.over
		w.buf = nil
		w.mu.Unlock()
		if len(out) > 0 {
			_ = w.conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
			if _, err := w.conn.Write(out); err != nil {
				if !errors.Is(err, io.ErrClosedPipe) {
					w.end()
				}
				return
			}
		}
		if over {
			return
		}
	}
}
