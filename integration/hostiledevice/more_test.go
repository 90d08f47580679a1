package hostiledevice

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// deepFilters has filters of many levels, each of which costs the hub most.
func deepFilters(a *arena) {
	met := a.metric(`sealmq_mqtt_events_total{event="subscriptions-full"}`)
	for n := range 6 {
		c := a.login(n%2 == 0, rawmqtt.Options{ID: fmt.Sprint("deep", n), User: "user", Password: password})
		for i := range 40 {
			var filters []string
			for j := range 25 {
				filters = append(filters, fmt.Sprintf("%d-%d-%d%s", n, i, j, strings.Repeat("/x", 31)))
			}
			if _, err := c.Sub(uint16(i+1), 1, filters...); err != nil {
				a.t.Fatal(err)
			}
		}
	}
	if a.metric(`sealmq_mqtt_events_total{event="subscriptions-full"}`)-met < 1000 {
		a.t.Error("no limit was met")
	}
}

// properties are n user properties of MQTT 5 without a name or value: five bytes each
// on the wire, and more where they are kept.
func properties(n int) []byte { return bytes.Repeat([]byte{0x26, 0, 0, 0, 0}, n) }

// propertyBomb has the hub keep messages, wills and sessions with as many properties
// as fit.
func propertyBomb(a *arena) {
	many := properties(20_000)
	o := rawmqtt.Options{ID: "props", User: "user", Password: password, Keep: true, Props: append([]byte{0x11, 0, 0, 1, 0}, properties(5000)...)}
	keeper := a.login(true, o)
	if p, err := keeper.Sub(1, 1, "props/#"); err != nil || p.Code() != 1 {
		a.t.Fatal(p, err)
	}
	_ = keeper.Close()
	pub := a.login(true, rawmqtt.Options{ID: "prop", User: "user", Password: password})
	for n := range 200 {
		write(pub, rawmqtt.Publish(true, 3, fmt.Sprint("props/", n), uint16(n+1), []byte("x"), many...))
		if _, err := pub.Expect(rawmqtt.PUBACK); err != nil {
			a.t.Fatal(err)
		}
	}
	write(pub, rawmqtt.SubscribeWith(9, many, rawmqtt.Filter{Filter: "props/0"}))
	settled(pub)
	for n := range 200 { // others may retain again
		write(pub, rawmqtt.Publish(true, 1, fmt.Sprint("props/", n), 0, nil))
	}
	settled(pub)
}

// delayedWills leaves sessions behind whose wills wait.
func delayedWills(a *arena) {
	for n := range 120 {
		c := a.open(true)
		p, err := c.Login(rawmqtt.Options{
			ID: fmt.Sprint("will", n), User: "user", Password: password, Keep: true, Props: []byte{0x11, 0, 0, 0x10, 0},
			Will: "wills/x", WillPayload: strings.Repeat("x", 60_000), WillProps: []byte{0x18, 0, 0, 0x10, 0},
		})
		if err != nil || p.Code() != 0 && p.Code() != 0x97 {
			a.t.Fatal(p, err)
		}
		_ = c.Close()
	}
	if n := a.metric(`sealmq_mqtt_events_total{event="will-refused"}`); n < 50 {
		a.t.Error("no limit was met")
	}
}

// webSocket does to the WebSocket listener what its protocol forbids.
func webSocket(a *arena) {
	upgrade := "GET /mqtt HTTP/1.1\r\nHost: " + a.web + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Key: " + base64.StdEncoding.EncodeToString(make([]byte, 16)) + "\r\n"
	masked := func(first byte, n uint64, body []byte) []byte {
		b := binary.BigEndian.AppendUint64([]byte{first, 0x80 | 127}, n)
		return append(append(b, 0, 0, 0, 0), body...) // a mask of zeros
	}
	connect := rawmqtt.Connect(true, a.options("mallory", "-ws"))
	var wg sync.WaitGroup
	places := make(chan struct{}, 24)       // as many connections as may wait at the same time
	for name, b := range map[string]string{ // behind an upgrade only once that is answered
		"half a request":        upgrade[:60],
		"no request":            "\x10\x20\x00\x04MQTT",
		"endless header":        upgrade + "X: " + strings.Repeat("x", 200<<10),
		"many headers":          upgrade + strings.Repeat("X: x\r\n", 20_000),
		"another site":          upgrade + "Origin: https://evil.example\r\n\r\n" + string(masked(0x82, uint64(len(connect)), connect)),
		"text":                  upgrade + "\r\n" + string(masked(0x81, uint64(len(connect)), connect)),
		"a frame of 2^60 bytes": upgrade + "\r\n" + string(masked(0x82, 1<<60, connect[:10])),
		"a frame of 2^63 bytes": upgrade + "\r\n" + string(masked(0x82, 1<<63, nil)),
		"no mask":               upgrade + "\r\n\x82\x05" + string(connect[:5]),
		"reserved bits":         upgrade + "\r\n" + string(masked(0xf2, uint64(len(connect)), connect)),
		"a long ping":           upgrade + "\r\n" + string(masked(0x89, 4000, make([]byte, 4000))),
		"pieces without end":    upgrade + "\r\n" + string(masked(0x02, 1, connect[:1])) + strings.Repeat(string(masked(0x00, 0, nil)), 5000),
		"nothing but pings":     upgrade + "\r\n" + strings.Repeat("\x89\x80\x00\x00\x00\x00", 5000),
	} {
		for range 4 {
			places <- struct{}{}
			wg.Go(func() {
				defer func() { <-places }()
				c, err := net.Dial("tcp", a.web)
				if err != nil {
					a.t.Error(err)
					return
				}
				defer c.Close()
				_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
				rest, upgraded := strings.CutPrefix(b, upgrade+"\r\n")
				if upgraded {
					write(c, []byte(upgrade+"\r\n"))
					resp, err := http.ReadResponse(bufio.NewReader(c), nil) // no more comes before the rest is sent
					if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
						a.t.Errorf("%s: no upgrade: %v", name, err)
						return
					}
					_ = resp.Body.Close()
				}
				write(c, []byte(rest))
				n, err := io.Copy(io.Discard, c) // until the hub ends it
				if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
					a.t.Errorf("%s: the hub goes on after %d bytes", name, n)
				}
			})
		}
	}
	wg.Wait()
}

// guests does as a guest what a guest may not.
func guests(a *arena) {
	bob := a.names["bob"].id
	frame := route.AppendFrame(nil, &route.Frame{Onward: route.To("forwarding_service"), Return: route.To("x"), Payload: []byte("\x08register")})
	for n := range 60 {
		name := hubproto.GuestName()
		c := a.login(n%2 == 0, rawmqtt.Options{ID: name, User: hubproto.GuestUser})
		for _, f := range []string{"sealmq/" + bob + "/in", "sealmq/+/in", "#", "sealmq/hub/#", "elsewhere"} {
			if p, err := c.Sub(1, 1, f); err == nil && p.Code() < 0x80 {
				a.t.Errorf("a guest may read %s", f)
			}
		}
		for range 200 {
			write(c, rawmqtt.Publish(c.V5, 0, "sealmq/"+name+"/out", 0, frame))
		}
		write(c, rawmqtt.Publish(c.V5, 0, "sealmq/"+bob+"/out", 0, frame))
		write(c, rawmqtt.Publish(c.V5, 1, "elsewhere", 0, []byte("retained")))
		_ = c.Close()
	}
	u := a.login(false, rawmqtt.Options{ID: "after", User: "user", Password: password})
	if _, err := u.Sub(1, 0, "elsewhere"); err != nil {
		a.t.Fatal(err)
	}
	write(u, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	if p, err := u.ReadPacket(); err != nil || p.Type() != rawmqtt.PINGRESP {
		a.t.Errorf("a guest's message is retained: %v %v", p, err)
	}
}

// proofs floods the hub with proofs that it has to look at.
func proofs(a *arena) {
	p, err := identity.Create()
	if err != nil {
		a.t.Fatal(err)
	}
	id := p.Identifier().String()
	good, err := hubproto.MakeProof(p, hubproto.ProofBinding{Hub: p.Identifier(), ClientID: id}) // for another hub
	if err != nil {
		a.t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for n := range 100 {
				proof := bytes.Clone(good)
				switch n % 4 {
				case 1:
					proof[(worker*100+n)%len(proof)] ^= 1
				case 2:
					proof = append(proof, make([]byte, 15<<10)...)
				case 3:
					proof = proof[:n]
				}
				c, err := rawmqtt.Dial(a.addr, n%2 == 0)
				if err != nil {
					a.t.Error(err)
					return
				}
				if p, err := c.Login(rawmqtt.Options{ID: id, User: hubproto.ProofUser, Password: string(proof)}); err == nil && p.Code() == 0 {
					a.t.Errorf("proof %d is accepted", n)
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
}
