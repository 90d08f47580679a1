package bridge

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Addresses of the hub's services.
const (
	ServiceForwarding       = "forwarding_service"
	ServiceStaticForwarding = "static_forwarding_service"
	ServiceEcho             = "echo"
	ServiceEchoer           = "echoer"
	ServiceUppercase        = "uppercase"
	ServiceHello            = "hello"
	ServiceLookup           = "lookup"
)

// What Elixir hubs call the forwarding services (spec routing 6.1).
const (
	elixirForwarding       = "forwarding"
	elixirStaticForwarding = "static_forwarding"
)

// IsRegistration reports whether a service registers forwarders.
func IsRegistration(addr string) bool {
	switch addr {
	case ServiceForwarding, ServiceStaticForwarding, elixirForwarding, elixirStaticForwarding:
		return true
	}
	return false
}

var (
	// ErrAddressTaken means that a worker has the address already.
	ErrAddressTaken = errors.New("bridge: address is taken")
	// ErrAddress means that an address cannot be a worker's: it is empty, too
	// long, or looks like one that the bridge makes.
	ErrAddress = errors.New("bridge: not an address for a worker")
	// ErrReturnRoute means that a frame from inside the hub has another return
	// route than one address of the hub's own.
	ErrReturnRoute = errors.New("bridge: a frame of the hub returns to one service or forwarder")
)

// Handler answers requests at a service's address. It is called on the goroutine
// of whoever sent the frame, at any number of them at once; it must not block.
type Handler func(*Request)

// Request is one frame for a service.
type Request struct {
	// Frame is the frame: the first onward hop is the service, the return route
	// begins with the sender's hub address. Its payload is valid only during
	// the call.
	Frame route.Frame
	// Class is the class the frame came with.
	Class route.Class
	// From is who sent it; zero for a program inside the hub.
	From Principal
	// Source is the sender's hub address; empty for a guest or from inside.
	Source string
	// Address is the service's.
	Address string

	b       *Bridge
	link    *Link
	view    *route.View
	dropped bool
	why     Drop
	ticket  Ticket   // of the packet
	held    *holding // likewise; nil: nobody withholds it
}

// holding is a packet whose acknowledgement services withhold.
type holding struct {
	ticket Ticket
	left   atomic.Int32 // that many have yet to let go
}

func (h *holding) release() {
	if h.left.Add(-1) == 0 {
		h.ticket.link.answered(h.ticket.bytes)
		h.ticket.fire()
	}
}

// hold withholds the acknowledgement of the packet that the frame came in until
// release is called, and so holds back its sender, who may have a window of packets
// unanswered. It returns nil where nobody waits for one, and for what comes from
// inside the hub: a program there may be the one to release.
func (r *Request) hold() (release func()) {
	if r.ticket.ack == nil || r.link.port.kind == portLocal {
		return nil
	}
	if r.held == nil {
		r.held = &holding{ticket: r.ticket}
		r.held.left.Add(1) // serve's own
		r.link.waitPackets.Add(1)
		r.link.waitBytes.Add(int64(r.ticket.bytes))
	}
	r.held.left.Add(1)
	return r.held.release
}

// Reply answers along the request's return route, from the service's address.
func (r *Request) Reply(payload []byte) { r.ReplyFrom(r.Address, payload) }

// ReplyFrom answers from another address of the hub, a forwarder's for example.
func (r *Request) ReplyFrom(addr string, payload []byte) {
	r.b.originate(&route.Frame{Onward: r.Frame.Return, Return: route.To(addr), Payload: payload}, r.Class)
}

// Drop has the frame count as dropped instead of served, and its sender noticed
// where the reason is one that senders are told.
func (r *Request) Drop(why Drop) { r.dropped, r.why = true, why }

// Reach says who may name a service as the first hop of a frame.
type Reach uint8

const (
	// ReachLinked: devices, who need to know the address, and those streams that
	// a frame linked with it (spec routing 7.4).
	ReachLinked Reach = iota
	// ReachOpen: every stream that is no guest as well.
	ReachOpen
	// ReachGuests: everybody but guests without a stream, who have no hub address that
	// an answer could go to, and reach hello alone.
	ReachGuests
	// ReachPeer is ReachLinked for a worker that speaks for the hub as a peer, not
	// as the hub itself: the near end of a secure channel. Its address has the form
	// of a connection's (PeerAddress), and so devices don't take its frames for the
	// hub's own word, as they do with every other service's.
	ReachPeer
	// ReachLocal: programs inside the hub, and what is sent through a forwarder
	// that such a program registered with the address as its first hop. A peer
	// that names it is told that there is no such address.
	ReachLocal
)

// PeerAddress returns the address for a worker of ReachPeer: name is 32 lower-case
// hex digits that nobody can guess.
func PeerAddress(name string) string { return prefixStream + name }

type service struct {
	addr    string
	reach   Reach
	handler Handler
}

// RegisterService puts a handler at an address; open means ReachOpen, else
// ReachLinked.
func (b *Bridge) RegisterService(addr string, open bool, h Handler) error {
	return b.RegisterServiceFor(reachOf(open), addr, h)
}

// RegisterServiceFor puts a handler at an address.
func (b *Bridge) RegisterServiceFor(r Reach, addr string, h Handler) error {
	return b.addService(&service{addr: addr, reach: r, handler: h})
}

func reachOf(open bool) Reach {
	if open {
		return ReachOpen
	}
	return ReachLinked
}

func (b *Bridge) addService(s *service) error {
	form := !reservedPrefix(s.addr)
	if s.reach == ReachPeer {
		form = strings.HasPrefix(s.addr, prefixStream)
	}
	if s.addr == "" || len(s.addr) > maxHopValue || !form || s.addr == hubproto.NoticeSource {
		return fmt.Errorf("%w: %q", ErrAddress, s.addr)
	}
	if !b.table.add(s.addr, &worker{service: s}) {
		return fmt.Errorf("%w: %q", ErrAddressTaken, s.addr)
	}
	return nil
}

// UnregisterService frees a service's address. Calls of its handler that are
// under way go on.
func (b *Bridge) UnregisterService(addr string) {
	if w := b.table.lookup(addr); w != nil && w.service != nil {
		b.table.remove(addr, w)
	}
}

// Send routes a frame of the hub's own by its first onward hop. Its return route
// is empty or exactly one address of a service or forwarder: that is how devices
// know what comes from the hub (but see ReachPeer). It returns when the frame is queued or dropped,
// counted; use Local.Send to wait for room.
func (b *Bridge) Send(f route.Frame, class route.Class) error {
	if err := b.ownReturn(f.Return); err != nil {
		return err
	}
	b.originate(&f, class)
	return nil
}

func (b *Bridge) ownReturn(r route.Route) error {
	if len(r) == 0 {
		return nil
	}
	if len(r) == 1 && r[0].IsLocal() {
		if w := b.table.lookup(r[0].Value); w != nil && w.port == nil {
			return nil
		}
	}
	return ErrReturnRoute
}

// originate routes a frame that the hub itself made.
func (b *Bridge) originate(f *route.Frame, class route.Class) {
	in := inbound{link: &b.hub, ticket: Ticket{link: &b.hub}, hub: true}
	b.sendFrom(&in, f, class)
}

func (b *Bridge) sendFrom(in *inbound, f *route.Frame, class route.Class) {
	p := in.link.port
	p.stripe.originated.Add(1)
	v, err := route.ParseView(route.AppendFrame(nil, f), wide)
	if err != nil {
		p.stripe.drop(DropOutgrown, 1)
		in.ticket.fire()
		return
	}
	pk := Packet{Class: class, Arrival: b.now(), views: []route.View{v}, pop: 1}
	b.dispatch(in, &pk)
}

// serve hands each frame of a packet to a service.
func (b *Bridge) serve(in *inbound, pk *Packet, s *service) {
	src := in.link.port
	from := src.Principal()
	var held *holding
	for i := range pk.views {
		v := &pk.views[i]
		r := Request{
			Frame: v.Frame(), Class: pk.Class, From: from, Source: src.addr, Address: s.addr,
			b: b, link: in.link, view: v, held: held, ticket: in.ticket,
		}
		if pk.First {
			rest := r.Frame.Onward.Rest()
			r.Frame.Onward = route.To(s.addr).Append(pk.front.Route()...).Append(rest...)
		}
		if src.addr != "" {
			r.Frame.Return = r.Frame.Return.Prepend(route.Local(src.addr))
		}
		s.handler(&r)
		held = r.held
		if !r.dropped {
			src.stripe.served.Add(1)
			continue
		}
		src.stripe.drop(r.why, 1)
		if reason, ok := r.why.reason(); ok {
			in.link.notify(reason, v, 1)
		}
	}
	if held != nil {
		held.release()
		return
	}
	in.ticket.fire()
}

// registerServices puts the bridge's own services into an empty table.
func (b *Bridge) registerServices() {
	dynamic := func(r *Request) { b.serveRegistration(r, false) }
	static := func(r *Request) { b.serveRegistration(r, true) }
	for _, s := range []*service{
		{addr: ServiceForwarding, reach: ReachOpen, handler: dynamic},
		{addr: ServiceStaticForwarding, reach: ReachOpen, handler: static},
		{addr: elixirForwarding, reach: ReachOpen, handler: dynamic},
		{addr: elixirStaticForwarding, reach: ReachOpen, handler: static},
		{addr: ServiceEcho, reach: ReachOpen, handler: func(r *Request) { r.Reply(r.Frame.Payload) }},
		{addr: ServiceEchoer, reach: ReachOpen, handler: stringService(func(s string) string { return s })},
		{addr: ServiceUppercase, reach: ReachOpen, handler: stringService(strings.ToUpper)},
		{addr: ServiceHello, reach: ReachGuests, handler: b.serveHello},
		{addr: ServiceLookup, reach: ReachOpen, handler: b.serveLookup},
	} {
		b.table.put(s.addr, &worker{service: s})
	}
	b.registerClaimServices()
}

// stringService answers a BARE String with another (spec routing 8.1); anything
// else gets no answer, as from a stock worker.
func stringService(f func(string) string) Handler {
	return func(r *Request) {
		s, err := bare.String(r.Frame.Payload)
		if err != nil {
			r.Drop(DropRequest)
			return
		}
		r.Reply(bare.AppendString(nil, f(s)))
	}
}

func (b *Bridge) serveLookup(r *Request) {
	req, err := hubproto.ParseLookupRequest(r.Frame.Payload)
	if err != nil {
		r.Drop(DropRequest)
		return
	}
	a := hubproto.LookupAnswer{Address: req.Address, Record: b.Forwarder(req.Address)}
	body, err := a.Marshal()
	if err != nil {
		r.Drop(DropTooLarge)
		return
	}
	r.Reply(body)
}
