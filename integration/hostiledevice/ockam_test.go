package hostiledevice

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

// ockamPeer is a connection to the hub's Ockam TCP port, open until the test ends.
type ockamPeer struct {
	net.Conn
	r *route.Reader
}

func (a *arena) dialTCP() *ockamPeer {
	a.t.Helper()
	c, err := net.Dial("tcp", a.tcp)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = c.Close() })
	return &ockamPeer{c, route.NewReader(c, route.Limits{})}
}

// join opens a connection and says the first byte.
func (a *arena) joinTCP() *ockamPeer {
	p := a.dialTCP()
	write(p, []byte{route.Preamble})
	return p
}

// body is a frame with its length in front.
func body(b []byte) []byte { return append(route.AppendFrameHeader(nil, len(b)), b...) }

func framed(onward, ret route.Route, payload []byte) []byte {
	return body(route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload}))
}

func (p *ockamPeer) send(onward, ret route.Route, payload []byte) bool {
	return write(p, framed(onward, ret, payload))
}

// next is the next frame, or an error after a while.
func (p *ockamPeer) next(wait time.Duration) (route.Frame, error) {
	_ = p.SetReadDeadline(time.Now().Add(wait))
	b, err := p.r.Next()
	if err != nil {
		return route.Frame{}, err
	}
	return route.ParseFrame(bytes.Clone(b), route.Limits{})
}

// over reports whether the hub ends the connection within a while.
func (p *ockamPeer) over(wait time.Duration) bool {
	_ = p.SetReadDeadline(time.Now().Add(wait))
	_, err := io.Copy(io.Discard, p)
	ne := net.Error(nil)
	return !errors.As(err, &ne) || !ne.Timeout()
}

func (a *arena) tcpEvents(event string) float64 {
	a.t.Helper()
	return a.metric(fmt.Sprintf("sealmq_tcp_events_total{event=%q}", event))
}

// tcpFraming breaks each rule of the transport.
func tcpFraming(a *arena) {
	p := string([]byte{route.Preamble})
	long := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Payload: make([]byte, 1<<20)})
	var deep route.Route
	for range 1000 {
		deep = append(deep, route.Local("x"))
	}
	frame := func(f route.Frame) string { return string(body(route.AppendFrame(nil, &f))) }
	for name, tt := range map[string]struct {
		bytes string
		ends  bool
	}{
		"another protocol":    {"GET / HTTP/1.1\r\n\r\n", true},
		"another first byte":  {"\x02", true},
		"length 0":            {p + "\x00\x00\x00\x00", true},
		"length above 16 MiB": {p + "\x01\x00\x00\x01", true},
		"length of 4 GiB":     {p + "\xff\xff\xff\xff", true},
		"above the limit":     {p + string(body(long)), false},
		"no frame":            {p + string(body([]byte{0xff, 0xfe, 0xfd})), false},
		"many hops":           {p + frame(route.Frame{Onward: deep, Payload: []byte("x")}), false},
		"a long address":      {p + frame(route.Frame{Onward: route.To(strings.Repeat("x", 60_000))}), false},
		"rubbish":             {p + string(body(bytes.Repeat([]byte{0x9b, 0xff}, 4000))), false},
		"heartbeats":          {p + strings.Repeat(frame(route.Frame{}), 2000), false},
	} {
		var wg sync.WaitGroup
		for range 4 {
			c := a.dialTCP()
			wg.Go(func() {
				write(c, []byte(tt.bytes))
				if tt.ends && !c.over(10*time.Second) {
					a.t.Errorf("%s: the connection stays open", name)
				}
			})
		}
		wg.Wait()
	}
	for _, event := range []string{"preamble-wrong", "framing", "oversized", "malformed"} {
		if a.tcpEvents(event) == 0 {
			a.t.Errorf("nothing was counted as %s", event)
		}
	}
}

// tcpHalfFrames holds many long frames of which the end never comes.
func tcpHalfFrames(a *arena) {
	whole := framed(route.To("echo"), route.To("x"), make([]byte, 240<<10))
	for range 150 {
		write(a.joinTCP(), whole[:len(whole)-1])
	}
	if a.tcpEvents("input-full") == 0 {
		a.t.Error("no limit was met")
	}
}

// tcpFlood has frames for nobody, more forwarders than allowed, and answers that it
// does not read.
func tcpFlood(a *arena) {
	p := a.joinTCP()
	var many []byte
	for range 100 {
		many = append(many, framed(route.To("nobody"), route.To("x"), []byte("flood"))...)
	}
	for range 200 {
		if !write(p, many) {
			break
		}
	}
	deaf := a.joinTCP()
	large := framed(route.To("echo"), route.To("x"), make([]byte, 200<<10))
	for range 150 {
		if !write(deaf, large) {
			break
		}
	}
	owner := a.joinTCP()
	for n := range 200 {
		owner.send(route.To("forwarding_service"), route.To(fmt.Sprint("m", n)), bare.AppendString(nil, "register"))
		owner.send(route.To("static_forwarding_service"), route.To(fmt.Sprint("a", n)), bare.AppendString(nil, fmt.Sprint("alias", n)))
	}
	owner.send(route.To("echo"), route.To("end"), []byte("end"))
	forwarders := 0
	for {
		f, err := owner.next(10 * time.Second)
		if err != nil {
			a.t.Errorf("after %d forwarders: %v", forwarders, err)
			return
		}
		switch at := f.Onward[0].Value; {
		case at == "end":
			if forwarders == 0 || forwarders > 64 {
				a.t.Errorf("one connection has %d forwarders", forwarders)
			}
			return
		case at[0] == 'a':
			a.t.Errorf("a stranger on TCP has the alias %s", f.Return)
		default:
			forwarders++
		}
	}
}

// sealedMessage is what channels carry (spec secure-channel 9.2).
func sealedMessage(onward, ret route.Route, payload []byte) []byte {
	b := route.AppendRoute([]byte{0x82, 0x82, 0, 0x81, 0x83}, onward)
	b = append(route.AppendRoute(b, ret), 0x59)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(payload))), payload...)
	return append(b, 0x40)
}

// apiPort attacks the hub's own secure channel listener: rubbish, handshakes that are
// begun and left, and channels of strangers, which get nothing by them.
func apiPort(a *arena) {
	stranger, authority := newIdentity(a.t), newIdentity(a.t)
	foreign, err := authority.IssueCredential(stranger.Identity(), map[string]string{"ockam-relay": "*"}, 1, time.Hour)
	if err != nil {
		a.t.Fatal(err)
	}
	for _, credential := range [][]byte{nil, foreign} {
		hs, err := channel.NewInitiator(channel.HandshakeConfig{
			Identity: stranger, Registry: identity.NewMemoryRegistry(0), Policy: channel.TrustEveryone, Credential: credential,
		})
		if err != nil {
			a.t.Fatal(err)
		}
		msg1, err := hs.Start()
		if err != nil {
			a.t.Fatal(err)
		}
		p := a.joinTCP()
		p.send(route.To("api"), route.To("me"), msg1)
		f, err := p.next(10 * time.Second)
		if err != nil {
			a.t.Fatal(err)
		}
		msg3, err := hs.ReadReply(f.Payload)
		if err != nil {
			a.t.Fatal(err)
		}
		for i := range 8 { // forged ones ahead, of the length of the genuine one
			forged := bytes.Clone(msg3)
			forged[i] ^= 1
			p.send(f.Return, route.To("me"), forged)
		}
		p.send(f.Return, route.To("me"), msg3)
		r, err := hs.Result()
		if err != nil {
			a.t.Fatal(err)
		}
		for n := range 100 {
			rubbish := make([]byte, 16<<10)
			_, _ = rand.Read(rubbish)
			p.send(f.Return, route.To("me"), rubbish)
			sealed, err := r.Sealer.Seal(nil, sealedMessage(route.To("static_forwarding_service"), route.To("me"), bare.AppendString(nil, fmt.Sprint("stolen", n))))
			if err != nil {
				a.t.Fatal(err)
			}
			p.send(f.Return, route.To("me"), sealed)
		}
	}
	a.eventually("refusal of the strangers' registrations", func() bool { return a.metric(`sealmq_api_events_total{event="refused-relay"}`) == 200 })
	for n := range 8 {
		p := a.joinTCP()
		for i := range 60 {
			msg1 := make([]byte, []int{32, 32, 32, 0, 31, 1000, 65535, 70_000}[i%8])
			_, _ = rand.Read(msg1)
			for range 2 { // and again
				p.send(route.To("api"), route.To(fmt.Sprint("me", n, i)), msg1)
			}
		}
	}
	if open := a.metric("sealmq_api_handshakes_open"); open > 128 {
		a.t.Errorf("%v handshakes of one address are open, want a quarter of 512", open)
	}
	// What the strangers asked for is still to be had.
	d := a.join("carol", "-api")
	for _, alias := range []string{"stolen0", "stolen99"} {
		if got, why := d.register("static_forwarding_service", alias); got != "forward_to_"+alias {
			a.t.Errorf("%s: %q, %v", alias, got, why)
		}
	}
	_ = d.Close()
}

func newIdentity(t testing.TB) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}
