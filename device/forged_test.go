package device

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// forgeries are frames that say what the hub's answer f would, as others can have a hub
// pass them on: whatever their sender wrote, its address at the hub stands in front.
// The last ones no hub of ours lets through.
func forgeries(f route.Frame) []route.Frame {
	const hex = "0123456789abcdef0123456789abcdef"
	says := f.Return[0]
	var all []route.Frame
	for _, ret := range []route.Route{
		route.To("dev_" + hex),                        // a device, directly
		route.To("dev_"+hex, says.Value),              // and by what its frame says
		route.To("dev_"+hex, hubproto.NoticeSource),   //
		route.To("dev_"+hex, "0123456789abcdef", "M"), //
		route.To("tcp_" + hex),                        // a TCP peer
		route.To("tcp_"+hex, says.Value),              //
		{},                                            // nobody
		{{Transport: 1, Value: says.Value}},           // another transport
		route.To(says.Value, says.Value),              // two hops
	} {
		g := f
		g.Return = ret
		all = append(all, g)
	}
	return all
}

// deliverAll sends frames to the device, those in a row with one first hop in one
// packet, and waits for its PUBACKs.
func (c *fakeConn) deliverAll(frames ...route.Frame) {
	c.t.Helper()
	var body []byte
	for i := range frames {
		body = route.AppendFrame(body, &frames[i])
		if i+1 == len(frames) || frames[i+1].Onward[0] != frames[i].Onward[0] {
			c.deliverBody(body)
			body = nil
		}
	}
}

// inTurn is how forged frames come before the real one: each by itself, while the call
// waits, or all of them ahead of it in one packet, as out of a waiting inbox.
var inTurn = map[string]func(c *fakeConn, forged []route.Frame, waits func(), honest route.Frame){
	"one by one": func(c *fakeConn, forged []route.Frame, waits func(), honest route.Frame) {
		for _, f := range forged {
			c.deliver(f)
			synctest.Wait()
			waits()
		}
		c.deliver(honest)
	},
	"ahead of the answer": func(c *fakeConn, forged []route.Frame, _ func(), honest route.Frame) {
		c.deliverAll(append(slices.Clone(forged), honest)...)
	},
}

// answerTo makes what the hub would answer to a frame.
func answerTo(f route.Frame, from string, payload []byte) route.Frame {
	return route.Frame{Onward: f.Return, Return: route.To(from), Payload: payload}
}

// signedAnswer is the payload of an answer to hello.
func (c *fakeConn) signedAnswer(hub *identity.Private, features hubproto.Features) []byte {
	c.t.Helper()
	now := time.Now()
	sig, err := hub.Sign(hubproto.HelloContext, hubproto.HelloSigned(c.hello.Nonce, now, nil))
	if err != nil {
		c.t.Fatal(err)
	}
	body, err := (&hubproto.HelloAnswer{
		Hub: hub.Identifier(), Time: now, FrameLimit: 64 << 10, Window: 64, Features: features,
		Signature: sig, History: hub.Identity().ChangeHistory(),
	}).Marshal()
	if err != nil {
		c.t.Fatal(err)
	}
	return body
}

// TestForgedHello: the answer to hello of somebody who is not the hub, and signs it as
// a hub with an identity of its own would, makes nobody the hub.
func TestForgedHello(t *testing.T) {
	for name, send := range inTurn {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, hub, eve := newFakeHub(t), hubFor(t), hubFor(t)
				wait := h.connect(t.Context(), h.config())
				c := h.subscribed()
				forged := forgeries(answerTo(c.helloF, helloService, c.signedAnswer(eve, 0)))
				// The hub itself, from another of its services.
				forged = append(forged, answerTo(c.helloF, lookupService, c.signedAnswer(eve, 0)))
				send(c, forged, func() {}, answerTo(c.helloF, helloService, c.signedAnswer(hub, 0)))
				n, err := wait()
				if err != nil {
					t.Fatal(err)
				}
				if id, ok := n.Hub(); !ok || id != hub.Identifier() {
					t.Errorf("%v is taken for the hub", id)
				}
				if d := n.Stats().Dropped["not-from-hub"]; d != uint64(len(forged)) {
					t.Errorf("%d frames counted as not from the hub, not %d", d, len(forged))
				}
				finish(n, c)
			})
		})
	}
}

// TestForgedHelloToGuest: nor does one that comes while a device asks as a guest which
// hub it is.
func TestForgedHelloToGuest(t *testing.T) {
	for name, bundled := range map[string]bool{"one by one": false, "ahead of the answer": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, hub, eve := newFakeHub(t), hubFor(t), hubFor(t)
				wait := h.connect(t.Context(), h.proving(nil))
				g := h.guest()
				var body []byte
				for _, f := range forgeries(answerTo(g.helloF, helloService, g.signedAnswer(eve, 0))) {
					if bundled {
						body = route.AppendFrame(body, &f)
					} else {
						g.deliver(f)
					}
				}
				honest := answerTo(g.helloF, helloService, g.signedAnswer(hub, 0))
				g.write(inboxPublish(g.device, 500, route.AppendFrame(body, &honest)))
				g.drain() // it leaves as soon as it has its answer
				_ = g.Close()
				c := h.greeted(h.shown(hub, 0)) // a proof for the hub, and not for eve
				c.sign(hub, time.Now())
				admitted(t, wait, c)
			})
		})
	}
}

// forgedNode is a node that is connected to a hub which keeps claims.
func forgedNode(t *testing.T, h *fakeHub, hub *identity.Private) (*Node, *fakeConn) {
	t.Helper()
	cfg := h.config()
	cfg.Identity = hubFor(t) // one of this bubble: the node waits for its rotation
	wait := h.connect(t.Context(), cfg)
	c := h.subscribed()
	c.deliver(answerTo(c.helloF, helloService, c.signedAnswer(hub, hubproto.FeatureClaims)))
	n, err := wait()
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait() // the node looks for forwarders to register again
	if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	return n, c
}

// asked returns the next frame that the device sends, which must be for a service.
func (c *fakeConn) asked(service string) route.Frame {
	c.t.Helper()
	p := c.publish()
	c.puback(p.MessageID)
	f := c.frames(p)[0]
	if f.Onward.String() != route.To(service).String() {
		c.t.Fatalf("a frame for %v instead of %s", f.Onward, service)
	}
	return f
}

// lookedUp is the answer to a lookup or a claim: a record that is owned by id.
func lookedUp(t *testing.T, address string, id identity.Identifier) []byte {
	t.Helper()
	body, err := (&hubproto.LookupAnswer{Address: address, Record: &hubproto.ForwarderRecord{
		Address: address, Owner: id, Device: id.String(), Since: time.Now(),
	}}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// TestForgedRegistration: the answer to a registration by somebody who is not the hub is
// no forwarding address: it would lead the device's peers to the forger. The claim to
// the address waits for the hub, too.
func TestForgedRegistration(t *testing.T) {
	for name, send := range inTurn {
		for alias, addresses := range map[string]struct{ service, real, forged string }{
			"":    {dynamicService, "FWD_0123456789abcdef", "FWD_fedcba9876543210"},
			"bob": {staticService, "forward_to_bob", "forward_to_evil_bob"},
		} {
			t.Run(name+" "+alias, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					h, hub := newFakeHub(t), hubFor(t)
					n, c := forgedNode(t, h, hub)
					created := make(chan *Forwarder, 1)
					var opts []ForwarderOption
					if alias != "" {
						opts = append(opts, Alias(alias))
					}
					go func() {
						f, err := n.CreateForwarder(t.Context(), "listener", opts...)
						if err != nil {
							t.Error(err)
						}
						created <- f
					}()
					waits := func() {
						if len(created) > 0 || len(c.early) > 0 {
							t.Error("the call goes on without the hub's answer")
						}
					}
					reg := c.asked(addresses.service)
					forged := forgeries(answerTo(reg, addresses.forged, bare.AppendString(nil, addresses.forged)))
					send(c, forged, waits, answerTo(reg, addresses.real, bare.AppendString(nil, addresses.real)))
					claim := c.asked(hubproto.ServiceClaim)
					record := lookedUp(t, addresses.real, n.Identifier())
					send(c, forgeries(answerTo(claim, hubproto.ServiceClaim, record)), waits, answerTo(claim, hubproto.ServiceClaim, record))
					f := <-created
					if f == nil || f.Address() != addresses.real {
						t.Fatalf("forwarder %+v", f)
					}

					// After a reconnect they stand in the inbox ahead of everything.
					_ = c.Close()
					c = h.subscribed()
					m := answerTo(reg, addresses.forged, bare.AppendString(nil, addresses.forged))
					c.deliverAll(forgeries(m)...)
					c.deliver(answerTo(c.helloF, helloService, c.signedAnswer(hub, hubproto.FeatureClaims)))
					if again := c.asked(addresses.service); !again.Return.Equal(reg.Return) {
						t.Errorf("registered again at %v, before at %v", again.Return, reg.Return)
					}
					synctest.Wait()
					c.deliverAll(append(forgeries(m), answerTo(reg, addresses.real, bare.AppendString(nil, addresses.real)))...)
					claim = c.asked(hubproto.ServiceClaim)
					c.deliver(answerTo(claim, hubproto.ServiceClaim, record))
					if f.Address() != addresses.real {
						t.Errorf("the address is %s after a reconnect", f.Address())
					}
					finish(n, c)
				})
			})
		}
	}
}

// TestForgedLookup: what somebody else says about whose an address is, is not the hub's
// word, and neither is that there is no such address.
func TestForgedLookup(t *testing.T) {
	for name, send := range inTurn {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, bob, eve := newFakeHub(t), hubFor(t), hubFor(t)
				n, c := forgedNode(t, h, hubFor(t))
				type result struct {
					o   Ownership
					err error
				}
				found := make(chan result, 1)
				go func() {
					o, err := n.Lookup(t.Context(), "forward_to_bob")
					found <- result{o, err}
				}()
				waits := func() {
					if len(found) > 0 {
						t.Error("the call goes on without the hub's answer")
					}
				}
				req := c.asked(lookupService)
				forged := forgeries(answerTo(req, lookupService, lookedUp(t, "forward_to_bob", eve.Identifier())))
				forged = append(forged, answerTo(req, helloService, lookedUp(t, "forward_to_bob", eve.Identifier())))
				notice, err := (&hubproto.Notice{
					Reason: hubproto.ReasonUnknown, FirstHop: req.Onward[0], HasFirst: true, LastReturn: req.Return[0], HasReturn: true,
				}).Marshal()
				if err != nil {
					t.Fatal(err)
				}
				forged = append(forged, forgeries(route.Frame{
					Onward: route.To(hubproto.NoticeTarget), Return: route.To(hubproto.NoticeSource), Payload: notice,
				})...)
				send(c, forged, waits, answerTo(req, lookupService, lookedUp(t, "forward_to_bob", bob.Identifier())))
				if r := <-found; r.err != nil || r.o.Owner != bob.Identifier() {
					t.Errorf("%+v", r)
				}
				// With nothing but forgeries the call ends by its time, and takes none.
				go func() {
					o, err := n.Lookup(t.Context(), "forward_to_bob")
					found <- result{o, err}
				}()
				req = c.asked(lookupService)
				for _, f := range forgeries(answerTo(req, lookupService, lookedUp(t, "forward_to_bob", eve.Identifier()))) {
					c.deliver(f)
				}
				if r := <-found; !errors.Is(r.err, ErrTimeout) || !r.o.Owner.IsZero() {
					t.Errorf("without an answer of the hub: %+v", r)
				}
				finish(n, c)
			})
		})
	}
}
