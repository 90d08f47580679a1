package conformance

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// behaviours are tests that each server has to pass; v5 tells the version.
var behaviours = []struct {
	name   string
	v3, v5 bool
	test   func(t *testing.T, s *server, v5 bool)
}{
	{"basic", true, true, basic},
	{"retained", true, true, retained},
	{"will", true, true, will},
	{"will delay", false, true, willDelay},
	{"keepalive", true, true, keepalive},
	{"server keepalive", false, true, serverKeepalive},
	{"zero-length id", true, true, zeroLengthID},
	{"offline queueing", true, true, offlineQueueing},
	{"redelivery", true, true, redelivery},
	{"overlapping subscriptions", true, true, overlapping},
	{"shared subscriptions", true, true, shared},
	{"subscribe failure", true, true, subscribeFailure},
	{"dollar topics", true, true, dollarTopics},
	{"unsubscribe", true, true, unsubscribe},
	{"session expiry", false, true, sessionExpiry},
	{"user properties", false, true, userProperties},
	{"payload format", false, true, payloadFormat},
	{"request and response", false, true, requestResponse},
	{"publication expiry", false, true, publicationExpiry},
	{"subscribe options", false, true, subscribeOptions},
	{"subscription identifiers", false, true, subscriptionIdentifiers},
	{"topic alias of a client", false, true, clientTopicAlias},
	{"topic alias of the server", false, true, serverTopicAlias},
	{"maximum packet size", false, true, maximumPacketSize},
	{"flow control of a client", false, true, clientFlowControl},
	{"flow control of the server", false, true, serverFlowControl},
}

func TestConformance(t *testing.T) {
	for name, start := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t)
			for _, b := range behaviours {
				for _, v5 := range []bool{false, true} {
					if v5 && !b.v5 || !v5 && !b.v3 {
						continue
					}
					version := map[bool]string{false: "3.1.1", true: "5"}[v5]
					t.Run(b.name+"/"+version, func(t *testing.T) {
						t.Parallel() // most of them wait
						b.test(t, s, v5)
					})
				}
			}
		})
	}
}

// named makes a name that no other test uses.
func named(t *testing.T, s string) string {
	return strings.NewReplacer("/", "-", " ", "-", "#", "-").Replace(t.Name()) + "-" + s
}

func basic(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "a")), named(t, "t")
	if code := c.subscribe(2, topic); code != s.maxQoS {
		t.Errorf("SUBACK code %d, want %d", code, s.maxQoS)
	}
	p := s.client(t, v5, named(t, "b"))
	for qos := byte(0); qos <= s.maxQoS; qos++ {
		p.publish(qos, false, topic, fmt.Sprint(qos))
		if m := c.want(topic, fmt.Sprint(qos)); m.QoS() != qos || m.Retain() || m.Dup() {
			t.Errorf("QoS %d came as %08b", qos, m.First)
		}
	}
	if s.maxQoS < 2 {
		p.write(rawmqtt.Publish(v5, 4, topic, 99, []byte("QoS 2")))
		if code := p.gone(5 * time.Second); v5 && code != 0x9b {
			t.Errorf("QoS 2 above the maximum: DISCONNECT %#x", code)
		}
	}
	// A second CONNECT is a protocol error.
	q := s.client(t, v5, named(t, "c"))
	q.write(rawmqtt.Connect(v5, rawmqtt.Options{ID: "again"}))
	q.gone(5 * time.Second)
}

func retained(t *testing.T, s *server, v5 bool) {
	p, base := s.client(t, v5, named(t, "p")), named(t, "t")
	want := map[string]bool{}
	for qos := byte(0); qos <= s.maxQoS; qos++ {
		topic := fmt.Sprint(base, "/", qos)
		p.publish(qos, true, topic, "kept")
		want[topic] = true
	}
	p.nothing()
	c := s.client(t, v5, named(t, "c"))
	c.subscribe(2, base+"/+")
	for range len(want) {
		m := c.receive()
		if !m.Retain() || !want[m.Topic] {
			t.Errorf("%q, retain %v", m.Topic, m.Retain())
		}
		delete(want, m.Topic)
	}
	for qos := byte(0); qos <= s.maxQoS; qos++ {
		p.publish(qos, true, fmt.Sprint(base, "/", qos), "")
		c.want(fmt.Sprint(base, "/", qos), "")
	}
	d := s.client(t, v5, named(t, "d"))
	d.subscribe(2, base+"/+")
	d.silent(100 * time.Millisecond)
}

func will(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, topic)
	o := rawmqtt.Options{ID: named(t, "w"), Will: topic, WillPayload: "last words", WillQoS: 1, WillRetain: true}
	w, _ := s.login(t, v5, o)
	_ = w.Close()
	if m := c.want(topic, "last words"); m.QoS() != 1 {
		t.Errorf("will with QoS %d", m.QoS())
	}
	late := s.client(t, v5, named(t, "l"))
	late.subscribe(1, topic)
	if m := late.want(topic, "last words"); !m.Retain() {
		t.Error("will not retained")
	}
	w, _ = s.login(t, v5, o)
	w.write(rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
	w.gone(5 * time.Second)
	c.silent(100 * time.Millisecond)
	if v5 {
		w, _ = s.login(t, v5, o)
		w.write(rawmqtt.Frame(rawmqtt.DISCONNECT<<4, []byte{4, 0})) // disconnect with will message
		_ = w.Close()                                               // which the client does (3.14.4)
		c.want(topic, "last words")
	}
}

func willDelay(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, topic)
	o := rawmqtt.Options{ID: named(t, "w"), Keep: true, Will: topic, WillPayload: "late words", WillProps: seconds(24, 2), Props: seconds(17, 100)}
	w, _ := s.login(t, v5, o)
	begin := time.Now()
	_ = w.Close()
	c.Timeout = 10 * time.Second
	c.want(topic, "late words")
	if d := time.Since(begin); d < 900*time.Millisecond {
		t.Errorf("a will with a delay of 2 s came after %v", d)
	}
	w, _ = s.login(t, v5, o)
	_ = w.Close()
	c.silent(500 * time.Millisecond) // until the server has noticed
	w, _ = s.login(t, v5, o)         // back in time
	c.silent(4 * time.Second)
	w.write(rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
}

func keepalive(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, topic)
	begin := time.Now() // the server counts from the CONNECT
	w, _ := s.login(t, v5, rawmqtt.Options{ID: named(t, "w"), KeepAlive: 1, Will: topic, WillPayload: "silent"})
	w.gone(5 * time.Second)
	if d := time.Since(begin); d < time.Second {
		t.Errorf("ended after %v", d)
	}
	c.want(topic, "silent")
}

func serverKeepalive(t *testing.T, s *server, v5 bool) {
	_, ack := s.login(t, v5, rawmqtt.Options{ID: named(t, "c"), KeepAlive: 120})
	if v := connackProps(t, ack)[19]; len(v) != 0 {
		t.Errorf("a Server Keep Alive of %v, though the client's is taken", v)
	}
}

func zeroLengthID(t *testing.T, s *server, v5 bool) {
	c, ack := s.login(t, v5, rawmqtt.Options{})
	if v5 {
		id := connackProps(t, ack)[18]
		if len(id) != 1 || len(id[0]) <= 2 {
			t.Errorf("assigned client id: %v", id)
		}
	}
	c.nothing()
	if !v5 {
		kept := s.open(t, v5)
		if p, err := kept.Login(rawmqtt.Options{Keep: true}); err != nil || p.Code() == 0 {
			t.Errorf("a kept session without a name: %v %v", p, err)
		}
	}
}

// away connects, subscribes and leaves a session behind.
func away(t *testing.T, s *server, v5 bool, topic string, expiry uint32) rawmqtt.Options {
	t.Helper()
	o := rawmqtt.Options{ID: named(t, "kept"), Keep: true}
	if v5 {
		o.Props = seconds(17, expiry)
	}
	c, ack := s.login(t, v5, o)
	if ack.Body[0] != 0 {
		t.Error("session present at first")
	}
	c.subscribe(2, topic)
	c.write(rawmqtt.Frame(rawmqtt.DISCONNECT<<4, nil))
	c.gone(5 * time.Second)
	return o
}

func offlineQueueing(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	o := away(t, s, v5, topic+"/+", 100)
	p := s.client(t, v5, named(t, "p"))
	want := map[string]byte{}
	for qos := byte(0); qos <= s.maxQoS; qos++ {
		p.publish(qos, false, fmt.Sprint(topic, "/", qos), fmt.Sprint(qos))
		if qos > 0 { // those of QoS 0 may be lost
			want[fmt.Sprint(qos)] = qos
		}
	}
	p.nothing()
	c, ack := s.login(t, v5, o)
	if ack.Body[0] != 1 {
		t.Error("no session present")
	}
	for len(want) > 0 {
		m := c.receive()
		if qos, ok := want[string(m.Payload)]; ok && m.QoS() == qos {
			delete(want, string(m.Payload))
		} else if m.QoS() > 0 {
			t.Errorf("got %q with QoS %d", m.Payload, m.QoS())
		}
	}
}

func redelivery(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	o := away(t, s, v5, topic, 100)
	c, _ := s.login(t, v5, o)
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, topic, "again")
	c.expect(rawmqtt.PUBLISH) // not acknowledged
	_ = c.Close()
	c, _ = s.login(t, v5, o)
	if m := c.want(topic, "again"); !m.Dup() || m.QoS() != 1 {
		t.Errorf("repeated as %08b", m.First)
	}
	c.nothing()
	_ = c.Close()
	c, _ = s.login(t, v5, o)
	c.nothing()
}

func overlapping(t *testing.T, s *server, v5 bool) {
	c, base := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(s.maxQoS, base+"/#")
	c.subscribe(1, base+"/+/x")
	p := s.client(t, v5, named(t, "p"))
	p.publish(s.maxQoS, false, base+"/a/x", "once or twice")
	best := c.want(base+"/a/x", "once or twice").QoS()
	p.publish(0, false, base+"/b", "end")
	for {
		m := c.receive()
		if m.Topic == base+"/b" {
			break
		}
		best = max(best, m.QoS())
	}
	if best != s.maxQoS {
		t.Errorf("delivered with QoS %d at most", best)
	}
}

func shared(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	one, two, all := s.client(t, v5, named(t, "1")), s.client(t, v5, named(t, "2")), s.client(t, v5, named(t, "all"))
	one.subscribe(1, "$share/group/"+topic)
	two.subscribe(1, "$share/group/"+topic)
	all.subscribe(1, topic)
	p := s.client(t, v5, named(t, "p"))
	const n = 20
	for i := range n {
		p.publish(1, false, topic, fmt.Sprint(i))
		all.want(topic, fmt.Sprint(i))
	}
	got := 0
	for _, c := range []*client{one, two} {
		for c.Timeout = 300 * time.Millisecond; ; got++ {
			if _, err := c.Expect(rawmqtt.PUBLISH); err != nil {
				break
			}
		}
	}
	if got != n {
		t.Errorf("%d of %d messages to the group", got, n)
	}
}

func subscribeFailure(t *testing.T, s *server, v5 bool) {
	c := s.client(t, v5, named(t, "c"))
	want := byte(0x80)
	if v5 {
		want = 0x87
	}
	if code := c.subscribe(1, "sealmq/somebody/in"); code != want && s.maxQoS == 2 {
		t.Errorf("code %#x, want %#x", code, want)
	}
	if code := c.subscribe(1, "$share/g"); code < 0x80 {
		t.Errorf("a share without filter: %#x", code)
	}
	if code := c.subscribe(1, named(t, "allowed")); code != 1 {
		t.Errorf("code %#x", code)
	}
}

func dollarTopics(t *testing.T, s *server, v5 bool) {
	c, base := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, "+/"+base)
	p := s.client(t, v5, named(t, "p"))
	p.write(rawmqtt.Publish(v5, 0, "$TEST/"+base, 0, []byte("hidden")))
	p.publish(1, false, "x/"+base, "seen")
	c.want("x/"+base, "seen")
	d := s.client(t, v5, named(t, "d"))
	d.subscribe(1, "$TEST/"+base)
	p.write(rawmqtt.Publish(v5, 0, "$TEST/"+base, 0, []byte("asked for")))
	if s.sysWrites {
		d.want("$TEST/"+base, "asked for")
	} else {
		d.silent(100 * time.Millisecond)
	}
}

func unsubscribe(t *testing.T, s *server, v5 bool) {
	c, base := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, base+"/a")
	c.subscribe(1, base+"/b")
	c.write(rawmqtt.Unsubscribe(v5, 9, base+"/a", base+"/never"))
	ack := c.expect(rawmqtt.UNSUBACK)
	if v5 && !bytes.HasSuffix(ack.Body, []byte{0x00, 0x11}) {
		t.Errorf("codes % x", ack.Body)
	}
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, base+"/a", "no more")
	p.publish(1, false, base+"/b", "still")
	c.want(base+"/b", "still")
}

func sessionExpiry(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	o := away(t, s, v5, topic, 0)
	// mochi ends the session a moment after the connection.
	for tries := 0; ; tries++ {
		c, ack := s.login(t, v5, o)
		_ = c.Close()
		if ack.Body[0] == 0 {
			break
		}
		if tries == 20 {
			t.Fatal("a session with an expiry of 0 is kept")
		}
	}
	o.ID, o.Props = named(t, "two"), seconds(17, 1)
	c, _ := s.login(t, v5, o)
	_ = c.Close()
	c, ack := s.login(t, v5, o)
	if ack.Body[0] != 1 {
		t.Error("gone at once")
	}
	_ = c.Close()
	deadline := time.After(15 * time.Second) // mochi looks once a second
	for {
		select {
		case <-time.After(3 * time.Second):
		case <-deadline:
			t.Fatal("kept for ever")
		}
		if c, ack = s.login(t, v5, o); ack.Body[0] == 0 {
			return
		}
		_ = c.Close()
	}
}

func userProperties(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(2, topic)
	var ps []byte
	for i := range 3 {
		ps = append(ps, prop(38, append(text(fmt.Sprint("k", i%2)), text(fmt.Sprint("v", i))...)...)...)
	}
	p := s.client(t, v5, named(t, "p"))
	for qos := byte(0); qos <= s.maxQoS; qos++ {
		p.publish(qos, false, topic, "m", ps...)
		got := parseProps(t, c.want(topic, "m").Props)[38]
		if len(got) != 3 || string(got[0]) != "\x00\x02k0\x00\x02v0" || string(got[2]) != "\x00\x02k0\x00\x02v2" {
			t.Errorf("%q", got)
		}
	}
}

func payloadFormat(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(2, topic)
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, topic, "utf-8", append(prop(1, 1), prop(3, text("text/plain")...)...)...)
	got := parseProps(t, c.want(topic, "utf-8").Props)
	if len(got[1]) != 1 || got[1][0][0] != 1 || len(got[3]) != 1 || string(got[3][0][2:]) != "text/plain" {
		t.Errorf("%v", got)
	}
}

func requestResponse(t *testing.T, s *server, v5 bool) {
	topic, back := named(t, "ask"), named(t, "answer")
	server, asker := s.client(t, v5, named(t, "s")), s.client(t, v5, named(t, "a"))
	server.subscribe(1, topic)
	asker.subscribe(1, back)
	asker.publish(1, false, topic, "?", append(prop(8, text(back)...), prop(9, text("17")...)...)...)
	got := parseProps(t, server.want(topic, "?").Props)
	if len(got[8]) != 1 || len(got[9]) != 1 {
		t.Fatalf("%v", got)
	}
	server.publish(1, false, string(got[8][0][2:]), "!", prop(9, got[9][0]...)...)
	if got := parseProps(t, asker.want(back, "!").Props)[9]; len(got) != 1 || string(got[0][2:]) != "17" {
		t.Errorf("correlation %q", got)
	}
}

func publicationExpiry(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	o := away(t, s, v5, topic+"/+", 100)
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, topic+"/short", "short", seconds(2, 1)...)
	p.publish(1, false, topic+"/long", "long", seconds(2, 60)...)
	select {
	case <-time.After(3 * time.Second):
	case <-t.Context().Done():
	}
	c, _ := s.login(t, v5, o)
	m := c.want(topic+"/long", "long")
	left := parseProps(t, m.Props)[2]
	if len(left) != 1 || binary.BigEndian.Uint32(left[0]) >= 60 || binary.BigEndian.Uint32(left[0]) < 50 {
		t.Errorf("expiry left: %v", left)
	}
	c.nothing()
}

func subscribeOptions(t *testing.T, s *server, v5 bool) {
	c, base := s.client(t, v5, named(t, "c")), named(t, "t")
	with := func(filter string, options byte) {
		c.write(rawmqtt.SubscribeWith(c.next(), nil, rawmqtt.Filter{Filter: filter, Options: options}))
	}
	with(base+"/nolocal", 1|4)
	c.expect(rawmqtt.SUBACK)
	with(base+"/local", 1)
	c.expect(rawmqtt.SUBACK)
	c.write(rawmqtt.Publish(v5, 0, base+"/nolocal", 0, []byte("own")))
	c.write(rawmqtt.Publish(v5, 0, base+"/local", 0, []byte("own")))
	c.want(base+"/local", "own")

	p := s.client(t, v5, named(t, "p"))
	with(base+"/published", 1|8)
	c.expect(rawmqtt.SUBACK)
	with(base+"/plain", 1)
	c.expect(rawmqtt.SUBACK)
	p.publish(1, true, base+"/published", "r")
	if m := c.want(base+"/published", "r"); !m.Retain() {
		t.Error("retain as published: cleared")
	}
	p.publish(1, true, base+"/plain", "r")
	if m := c.want(base+"/plain", "r"); m.Retain() {
		t.Error("without retain as published: kept")
	}

	p.publish(1, true, base+"/kept", "k")
	with(base+"/kept", 1|2<<4) // never send retained messages
	c.expect(rawmqtt.SUBACK)
	with(base+"/+", 1|1<<4) // a new subscription: send them
	c.expect(rawmqtt.SUBACK)
	got := map[string]bool{}
	for range 3 {
		got[c.receive().Topic] = true
	}
	if !got[base+"/kept"] || !got[base+"/plain"] || !got[base+"/published"] {
		t.Errorf("retain handling 1, new: %v", got)
	}
	with(base+"/+", 1|1<<4) // an old one: do not
	c.expect(rawmqtt.SUBACK)
	c.silent(100 * time.Millisecond)
	with(base+"/kept", 1) // always
	c.expect(rawmqtt.SUBACK)
	c.want(base+"/kept", "k")
	for _, topic := range []string{"/published", "/plain", "/kept"} {
		p.publish(1, true, base+topic, "")
	}
}

func subscriptionIdentifiers(t *testing.T, s *server, v5 bool) {
	c, base := s.client(t, v5, named(t, "c")), named(t, "t")
	c.write(rawmqtt.SubscribeWith(1, prop(11, 7), rawmqtt.Filter{Filter: base + "/a", Options: 1}))
	c.expect(rawmqtt.SUBACK)
	c.write(rawmqtt.SubscribeWith(2, prop(11, 0x82, 0x01), rawmqtt.Filter{Filter: base + "/#", Options: 1})) // 130
	c.expect(rawmqtt.SUBACK)
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, base+"/b", "one")
	if ids := parseProps(t, c.want(base+"/b", "one").Props)[11]; len(ids) != 1 || string(ids[0]) != "\x82\x01" {
		t.Errorf("identifiers %v", ids)
	}
	p.publish(1, false, base+"/a", "both")
	seen := map[string]bool{}
	for len(seen) < 2 { // in one message or in two
		for _, id := range parseProps(t, c.want(base+"/a", "both").Props)[11] {
			seen[string(id)] = true
		}
	}
}

func clientTopicAlias(t *testing.T, s *server, v5 bool) {
	c, topic := s.client(t, v5, named(t, "c")), named(t, "t")
	c.subscribe(1, topic)
	p, ack := s.login(t, v5, rawmqtt.Options{ID: named(t, "p")})
	maximum := connackProps(t, ack)[34]
	if len(maximum) != 0 {
		t.Fatalf("Topic Alias Maximum %v", maximum)
	}
	if !s.aliasIn {
		p.write(rawmqtt.Publish(v5, 0, topic, 0, []byte("x"), 35, 0, 1))
		if code := p.gone(5 * time.Second); code != 0x94 {
			t.Errorf("an alias where none is offered: DISCONNECT %#x", code)
		}
		return
	}
	p.publish(1, false, topic, "sets", 35, 0, 1)
	p.publish(1, false, "", "uses", 35, 0, 1)
	p.publish(0, false, "", "again", 35, 0, 1)
	for _, m := range []string{"sets", "uses", "again"} {
		c.want(topic, m)
	}
	p.write(rawmqtt.Publish(v5, 0, topic, 0, []byte("x"), 35, 0, 0))
	p.gone(5 * time.Second)
}

func serverTopicAlias(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	c, _ := s.login(t, v5, rawmqtt.Options{ID: named(t, "c"), Props: prop(34, 0, 1)})
	c.subscribe(1, topic)
	p := s.client(t, v5, named(t, "p"))
	aliased := false
	for i := range 3 {
		p.publish(1, false, topic, fmt.Sprint(i))
		m := c.receive()
		alias := parseProps(t, m.Props)[35]
		switch {
		case m.Topic == "" && len(alias) == 1 && i > 0:
			aliased = true
		case m.Topic != topic:
			t.Errorf("message %d: topic %q, alias %v", i, m.Topic, alias)
		}
	}
	if aliased != s.aliasOut {
		t.Errorf("aliases used: %v", aliased)
	}
}

func maximumPacketSize(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	c, ack := s.login(t, v5, rawmqtt.Options{ID: named(t, "c"), Props: seconds(39, 200)})
	if limit := connackProps(t, ack)[39]; len(limit) != 0 {
		t.Errorf("the server says its maximum: %v", limit)
	}
	c.subscribe(1, topic)
	p := s.client(t, v5, named(t, "p"))
	p.publish(1, false, topic, strings.Repeat("x", 300))
	p.publish(1, false, topic, "fits")
	c.want(topic, "fits")
	if s.packetLimit > 0 {
		_, _ = p.Write(rawmqtt.Publish(v5, 0, topic, 0, make([]byte, s.packetLimit)))
		p.gone(5 * time.Second)
	}
}

// clientFlowControl: a client's Receive Maximum bounds what it has to acknowledge.
func clientFlowControl(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	c, _ := s.login(t, v5, rawmqtt.Options{ID: named(t, "c"), Props: prop(33, 0, 2)})
	c.subscribe(1, topic)
	p := s.client(t, v5, named(t, "p"))
	for i := range 5 {
		p.publish(1, false, topic, fmt.Sprint(i))
	}
	var open []uint16
	for c.Timeout = 300 * time.Millisecond; ; {
		m, err := c.Expect(rawmqtt.PUBLISH)
		if err != nil {
			break
		}
		open = append(open, m.ID)
	}
	if want := map[bool]int{true: 2, false: 5}[s.receiveMaximum]; len(open) != want {
		t.Errorf("%d messages unacknowledged, want %d", len(open), want)
	}
}

// serverFlowControl: who has more QoS 2 messages open than the server's Receive
// Maximum is disconnected.
func serverFlowControl(t *testing.T, s *server, v5 bool) {
	topic := named(t, "t")
	p, ack := s.login(t, v5, rawmqtt.Options{ID: named(t, "p")})
	maximum := connackProps(t, ack)[33]
	if len(maximum) != 1 {
		t.Fatalf("Receive Maximum %v", maximum)
	}
	if s.maxQoS < 2 {
		return // a message of QoS 1 is answered before the next is read
	}
	n := int(binary.BigEndian.Uint16(maximum[0]))
	for i := range n + 1 {
		p.write(rawmqtt.Publish(v5, 4, topic, uint16(i+1), []byte("open")))
	}
	if code := p.gone(5 * time.Second); code != 0x93 {
		t.Errorf("DISCONNECT %#x", code)
	}
}
