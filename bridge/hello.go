package bridge

import (
	"errors"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// A connection says hello once, or again when the answer was lost.
const (
	helloRate  = 1
	helloBurst = 5
)

// guestNetworks is how many networks that guests come from are told apart.
const guestNetworks = 16384

// serveHello answers a device's hello past its outbox and attaches the
// connection to it.
func (b *Bridge) serveHello(r *Request) {
	l := r.link
	p := l.port
	if l.conn == nil {
		r.Drop(DropRefused)
		return
	}
	req, err := hubproto.ParseHelloRequest(r.Frame.Payload)
	if err != nil {
		r.Drop(DropRequest)
		return
	}
	if !l.mayHello() || p.kind == portDevice && !p.mayHello() || l.stranger() && !b.guests.Allow(l.network(), time.Unix(0, b.now())) {
		r.Drop(DropThrottled)
		return
	}
	body, err := b.helloAnswer(l, req)
	if err != nil {
		b.cfg.Logger.Error("cannot answer hello", "err", err)
		r.Drop(DropRefused)
		return
	}
	onward := r.Frame.Return
	if p.addr != "" {
		onward = onward.Rest()
	}
	l.conn.Direct(route.AppendFrame(nil, &route.Frame{Onward: onward, Return: route.To(ServiceHello), Payload: body}))
	l.hello.Store(true)
	defer l.say()
	if p.kind != portDevice {
		return
	}
	// A hello that is repeated by the same process discards nothing: what came
	// since its first one is for the keys that it has now.
	p.mu.Lock()
	fresh := req.Fresh && (!p.hasEpoch || p.epoch != req.Epoch)
	if p.link == l {
		p.hasEpoch, p.epoch = true, req.Epoch
	}
	p.mu.Unlock()
	l.Attach(fresh)
}

// stranger reports whether nobody has asked who the peer is.
func (l *Link) stranger() bool { return l.port.kind == portGuest || l.port.guest }

// network is where the peer comes from; peers whose connection does not say come from
// one place.
func (l *Link) network() netip.Prefix {
	if c, ok := l.conn.(AddressConn); ok {
		return connlimit.Network(c.RemoteAddr())
	}
	return netip.Prefix{}
}

func (l *Link) mayHello() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hellos == nil {
		l.hellos = rate.NewLimiter(helloRate, helloBurst)
	}
	return l.hellos.Allow()
}

// helloAnswer makes the signed answer for one connection.
func (b *Bridge) helloAnswer(l *Link, req *hubproto.HelloRequest) ([]byte, error) {
	now := b.clock.wall()
	var exporter []byte
	if c, ok := l.conn.(ExporterConn); ok {
		exporter = c.ExporterValue()
	}
	sig, err := b.cfg.Identity.SignHello(hubproto.HelloSigned(req.Nonce, now, exporter))
	if err != nil {
		return nil, err
	}
	a := hubproto.HelloAnswer{
		Hub: b.cfg.Identity.Identifier(), Epoch: b.epoch, Time: now,
		FrameLimit: uint64(b.cfg.Limits.Frame), BundleLimit: uint64(b.cfg.BundleLimit), Window: uint64(b.cfg.Window),
		Features:  b.features(),
		Signature: sig, History: b.cfg.Identity.ChangeHistory(),
	}
	if l.port.kind != portGuest {
		a.Forwarders = b.registry.of(l.port)
	}
	body, err := a.Marshal()
	if errors.Is(err, hubproto.ErrTooLarge) {
		a.History = nil // a device that has pinned the hub knows it
		body, err = a.Marshal()
	}
	return body, err
}
