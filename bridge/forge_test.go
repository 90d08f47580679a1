package bridge

import (
	"strings"
	"testing"

	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// fromHub is the rule by which a device knows the hub's own frames: the return
// route, as received, is exactly one address that is a service or forwarder.
func fromHub(f *route.Frame) bool {
	return len(f.Return) == 1 && !strings.HasPrefix(f.Return[0].Value, prefixDevice) && !strings.HasPrefix(f.Return[0].Value, prefixStream)
}

// Nobody can make a device take a frame for a registration answer or a notice of
// the hub: not another device, not a stream, by no return route, through no
// address, and not in a waiting inbox ahead of the real answer either.
func TestNobodySpeaksForTheHub(t *testing.T) {
	b := newTestBridge(t, func(c *Config) { c.StaticOverStream, c.FirstContactFrames = true, 200 })
	victim := attach(t, b, "victim", true)
	fwd := victim.register(ServiceForwarding, "register", "M")
	notice, err := hubproto.NoticeFrame(&hubproto.Notice{Reason: hubproto.ReasonUnknown, Count: 1})
	if err != nil {
		t.Fatal(err)
	}
	f, err := route.ParseFrame(notice, route.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	attack := func(p *peer, to string) {
		for _, target := range []string{hubproto.NoticeTarget, "M", "h"} {
			for _, ret := range []route.Route{nil, route.To(hubproto.NoticeSource), route.To(fwd), route.To(ServiceHello), route.To(ServiceForwarding),
				{route.Address{Transport: route.LocalTransport, Value: ""}}} {
				for _, body := range [][]byte{f.Payload, bare.AppendString(nil, fwd)} {
					p.send(route.To(to, target), ret, body)
				}
			}
		}
	}
	check := func(where string, p *peer, atLeast int) {
		t.Helper()
		seen := 0
		for _, f := range p.frames() {
			if fromHub(&f) && f.Return[0].Value != fwd {
				t.Errorf("%s: taken for the hub's: %v", where, f)
			}
			if !fromHub(&f) {
				seen++
			}
		}
		if seen < atLeast {
			t.Errorf("%s: only %d of the frames came", where, seen)
		}
	}
	mallory := attach(t, b, "mallory", true)
	tcp := stream(t, b, true)
	attack(mallory, victim.Port().Address())
	attack(mallory, fwd)
	attack(tcp, fwd)
	check("attached", victim, 3*36)

	// Through services that answer to whoever the return route names.
	for _, service := range []string{ServiceEcho, ServiceEchoer, ServiceUppercase, ServiceForwarding, ServiceStaticForwarding, ServiceLookup, ServiceHello} {
		for _, p := range []*peer{mallory, tcp} {
			before := len(victim.frames())
			p.send(route.To(service), route.To(victim.Port().Address(), "M"), bare.AppendString(nil, "register"))
			p.send(route.To(service), route.To(fwd), bare.AppendString(nil, "door"))
			if n := len(victim.frames()); n != before {
				t.Errorf("%s answers to the victim: %v", service, victim.frames()[before:])
			}
		}
	}

	// A forwarder of the attacker's that leads to the victim.
	mallory.send(route.To(ServiceForwarding), route.To(victim.Port().Address(), hubproto.NoticeTarget), bare.AppendString(nil, "register"))
	before := len(victim.frames())
	for addr := range b.registry.m {
		if addr != fwd {
			tcp.send(route.To(addr), route.To(hubproto.NoticeSource), f.Payload)
		}
	}
	if n := len(victim.frames()); n != before {
		t.Errorf("through a forwarder of the attacker's: %v", victim.frames()[before:])
	}

	// Ahead of the real answer: they wait in memory, the answer to hello passes.
	victim.Close(true)
	attack(mallory, fwd)
	attack(mallory, victim.Port().Address())
	attack(tcp, fwd)
	again := connect(t, b, device("victim"), true)
	again.sayHello(false, 2)
	check("waiting inbox", again, 2*36)
}
