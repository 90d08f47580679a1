package hostiledevice

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// attack is one thing that a hostile client does. It may leave connections open
// behind it; they end with the test.
type attack struct {
	name string
	run  func(a *arena)
}

// What bystanders may lose under attack, on a machine that is busy with the attacker and
// with other programs as well. One attack may be short, and have the cores to itself for
// as long: then its throughput says little. Half of all attacks keep within much less.
const (
	slower, later              = 32, 400 * time.Millisecond // part of the throughput, and of p99 ten times as long and this
	usuallySlower, usuallyLate = 4, 8                       // part of the throughput, and times p99
)

// disturbance is how many times slower and later bystanders were.
type disturbance struct{ slower, later float64 }

// disturbed compares the bystanders' figures with those of quiet rounds: with the
// slowest of those before and after, since other programs come and go.
func disturbed(t *testing.T, during figures, quiet ...figures) disturbance {
	t.Helper()
	ref := quiet[0]
	for _, q := range quiet[1:] {
		ref = figures{min(ref.perSecond, q.perSecond), max(ref.p99, q.p99)}
	}
	t.Logf("bystanders, quiet: %v; during: %v", ref, during)
	if during.perSecond < ref.perSecond/slower {
		t.Errorf("throughput is less than 1/%d", slower)
	}
	if during.p99 > 10*ref.p99+later {
		t.Errorf("p99 is more than ten times as long and %v", later)
	}
	return disturbance{ref.perSecond / during.perSecond, float64(during.p99) / float64(ref.p99)}
}

// usually checks what half of the attacks keep within.
func usually(t *testing.T, all []disturbance) {
	t.Helper()
	if len(all) < len(attacks) {
		return // some were left out
	}
	median := func(of func(disturbance) float64) float64 {
		var v []float64
		for _, d := range all {
			v = append(v, of(d))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	slow, late := median(func(d disturbance) float64 { return d.slower }), median(func(d disturbance) float64 { return d.later })
	t.Logf("half of the attacks left the bystanders 1/%.1f of their throughput or more, and p99 %.1f times as long or less", slow, late)
	if slow > usuallySlower || late > usuallyLate {
		t.Errorf("want 1/%d and %d times", usuallySlower, usuallyLate)
	}
}

// TestHostileDevice runs every attack against one hub while two bystanders talk
// through it: nothing of theirs may be lost, repeated, reordered or much slower than
// beside it, the hub may not end, and its heap stays below the configured ceiling all
// the while.
func TestHostileDevice(t *testing.T) {
	a := newArena(t)
	p := newPair(a)
	quiet := func() figures { return p.during(func() { p.rounds(500) }) }
	quiet()
	first := quiet()
	last := first
	var most memory
	var all []disturbance
	for _, at := range attacks {
		t.Run(at.name, func(t *testing.T) {
			outer := a.t
			a.t = t
			defer func() { a.t = outer }()
			var during figures
			taken := a.whileRunning(func() {
				during = p.during(func() {
					at.run(a)
					p.rounds(200)
				})
			})
			a.alive()
			after := quiet()
			all = append(all, disturbed(t, during, last, after))
			last = after
			t.Log(taken)
			most = memory{max(most.heap, taken.heap), max(most.resident, taken.resident), most.samples + taken.samples}
			if taken.heap > ceiling {
				t.Errorf("the heap has %d bytes, %d allowed", taken.heap, ceiling)
			}
			if taken.samples < 2 {
				t.Error("nobody has looked")
			}
		})
	}
	disturbed(t, quiet(), first) // nothing stays behind
	usually(t, all)
	t.Log("all in all: ", most)
	p.end()
	if n := a.metric(`sealmq_topic_events_total{event="hook-panicked"}`); n != 0 {
		t.Errorf("%v panics in the hook", n)
	}
}

// TestHostileDeviceAndStore runs the attacks on queues against hubs that keep them on
// disk, too: the bystanders notice nothing, and what was acknowledged of the attacker's
// own is there after a kill.
func TestHostileDeviceAndStore(t *testing.T) {
	for _, durability := range []string{"interval", "always"} {
		t.Run(durability, func(t *testing.T) {
			a := newArena(t, "--data", filepath.Join(t.TempDir(), "data"), "--durability", durability)
			p := newPair(a)
			quiet := func() figures { return p.during(func() { p.rounds(200) }) }
			quiet()
			before := quiet()
			acked := 0
			during := p.during(func() {
				falseAcks(a)
				windowIgnored(a)
				acked = falseAcksOfABacklog(a)
				p.rounds(200)
			})
			disturbed(t, during, before)
			p.end()
			_ = a.hub.Signal(syscall.SIGKILL)
			<-a.hub.Exited()
			a.start()
			carol := a.join("carol", "-b")
			for n := 0; n < acked; {
				all, err := carol.frames()
				if err != nil {
					t.Fatalf("%d of %d acknowledged frames came: %v", n, acked, err)
				}
				for _, f := range all {
					if got := binary.BigEndian.Uint32(f.Payload); got != uint32(n) {
						t.Fatalf("carol got %d, not %d", got, n)
					}
					n++
				}
			}
		})
	}
}

// falseAcksOfABacklog has a device acknowledge everything but what it was sent, while
// another ignores its window. It returns how many frames the hub has acknowledged.
func falseAcksOfABacklog(a *arena) (acked int) {
	carol := a.join("carol", "-b")
	mallory := a.join("mallory", "-b")
	fwd, _ := carol.register("forwarding_service", "register")
	mallory.send(1, route.To(fwd), route.To("x"), []byte("first"))
	carol.send(1, carol.frame().Return, route.To("me"), []byte("carol's address"))
	toCarol := mallory.frame().Return
	mallory.Timeout = time.Minute
	before := mallory.next // identifiers up to it
	acks := make(chan struct{}, 3000)
	go func() {
		defer close(acks)
		for {
			p, err := mallory.ReadPacket()
			if err != nil {
				return
			}
			if p.Type() == rawmqtt.PUBACK && p.ID > before {
				acks <- struct{}{}
			}
		}
	}()
	bad := a.metric(`sealmq_topic_events_total{event="bad-ack"}`)
	for n := range uint32(3000) { // a queue takes 256 of them, the window 128
		if !mallory.send(1, toCarol, route.To("x"), append(binary.BigEndian.AppendUint32(nil, n), make([]byte, 64<<10)...)) {
			break
		}
		// The hub's own identifiers are in the upper half.
		write(carol, rawmqtt.Ack(rawmqtt.PUBACK, uint16(n+1)))
		if n < 20 { // the window is kept at first
			<-acks
			acked++
		}
	}
	for range acks {
		acked++
	}
	if acked >= 3000 {
		a.t.Errorf("%d frames were acknowledged", acked)
	}
	if a.metric(`sealmq_topic_events_total{event="bad-ack"}`) == bad {
		a.t.Error("no false acknowledgement was counted")
	}
	_ = carol.Close()
	return acked
}

var attacks = []attack{
	{"malformed packets of a stranger", malformedOf("")},
	{"malformed packets of a device", malformedOf("mallory")},
	{"malformed packets of a user", malformedOf("user")},
	{"no CONNECT", noConnect},
	{"wills", wills},
	{"another's client id", othersClientID},
	{"packet identifiers", packetIDs},
	{"acknowledgements of what was never sent", falseAcks},
	{"stalled readers", stalledReaders},
	{"subscription bomb", subscriptionBomb},
	{"retained bomb", retainedBomb},
	{"properties of MQTT 5", propertyBomb},
	{"delayed wills", delayedWills},
	{"session bomb", sessionBomb},
	{"half packets", halfPackets},
	{"window ignored", windowIgnored},
	{"transient flood", transientFlood},
	{"logins", logins},
	{"alias theft", aliasTheft},
	{"forged notices and answers", forged},
	{"deep filters", deepFilters},
	{"WebSocket", webSocket},
	{"guests", guests},
	{"proofs", proofs},
	{"framing on TCP", tcpFraming},
	{"half frames on TCP", tcpHalfFrames},
	{"flood on TCP", tcpFlood},
	{"api", apiPort},
}

// malformed are packets that no client sends: those that have crashed servers,
// and those that end too early, lie about their length or break a rule.
var malformed = [][]byte{
	{0x82, 0x08, 0x00, 0x01, 0x00, 0x00, 0x03, 'a', '/', 'b'}, // ends within a filter's options: ends mochi's process
	{0x30, 0x00},
	{0x32, 0x02, 0xff, 0xff},
	{0x32, 0x04, 0x00, 0x01, 'a', 0x00},
	{0x36, 0x04, 0x00, 0x01, 'a', 0x00},
	{0x40, 0x00},
	{0x40, 0x01, 0x80},
	{0x4f, 0x02, 0x80, 0x00},
	{0x62, 0x00},
	{0x62, 0x02, 0x00, 0x00},
	{0x70, 0x00},
	{0x82, 0x02, 0x00, 0x01},
	{0x82, 0x03, 0x00, 0x01, 0x00},
	{0x82, 0x05, 0x00, 0x01, 0xff, 0xff, 0x00},
	{0xa2, 0x02, 0x00, 0x01},
	{0xa2, 0x06, 0x00, 0x01, 0x00, 0x00, 0x05, 'a'},
	{0xe0, 0x02, 0x00, 0xff},
	{0xf0, 0x00},
	{0x00, 0x00},
	{0x10, 0x00},
	{0x30, 0xff, 0xff, 0xff, 0xff, 0x7f},
	{0x30, 0x80, 0x80, 0x80, 0x80, 0x00},
	{0x30, 0xff, 0xff, 0xff, 0x7f, 0x00},
	{0x38, 0x02, 0x00, 0x00},
	rawmqtt.Publish(true, 0, "", 0, []byte("unknown alias"), 35, 0, 9),
	rawmqtt.Publish(true, 0, "a", 0, []byte("alias 0"), 35, 0, 0),
	rawmqtt.Publish(true, 0, "a", 0, []byte("property twice"), 35, 0, 1, 35, 0, 2),
	rawmqtt.Publish(true, 2, "sealmq/x/out", 0, []byte("no id")),
	rawmqtt.Publish(false, 0, "a\x00b", 0, []byte("NUL")),
	rawmqtt.Publish(false, 0, "\xff\xfe", 0, []byte("not UTF-8")),
	rawmqtt.Publish(false, 0, "#", 0, []byte("wildcard")),
	append(rawmqtt.Connect(false, rawmqtt.Options{ID: "again"}), rawmqtt.Connect(true, rawmqtt.Options{ID: "again"})...),
	bytes.Repeat([]byte{0x82}, 100),
}

func malformedOf(name string) func(*arena) {
	return func(a *arena) {
		for i, b := range malformed {
			for _, v5 := range []bool{false, true} {
				c := a.open(v5)
				c.Timeout = time.Second
				if name != "" {
					if _, err := c.Login(a.options(name, fmt.Sprint("-m", i))); err != nil {
						a.t.Fatal(err)
					}
				}
				write(c, b)
				if open := settled(c); open && name == "" {
					a.t.Errorf("packet %d: the hub goes on with a client that said no CONNECT", i)
				}
				_ = c.Close()
			}
		}
	}
}

// noConnect opens connections and says nothing, little, or too much.
func noConnect(a *arena) {
	var open []*rawmqtt.Client
	for i := range 150 {
		c := a.open(false)
		switch i % 3 {
		case 1:
			write(c, []byte{0x10, 0xff, 0x7f, 0, 4, 'M'})
		case 2:
			write(c, rawmqtt.Frame(0x10, make([]byte, 200<<10)))
		}
		open = append(open, c)
	}
	for _, c := range open { // the deadline ends each
		c.Timeout = 10 * time.Second
		if !closed(c) {
			a.t.Error("a silent connection stays open")
		}
	}
}

func wills(a *arena) {
	bob := a.names["bob"].id
	for _, topic := range []string{
		"sealmq/" + bob + "/in", "sealmq/" + bob + "/out", "sealmq/" + bob + "/status", "sealmq/hub/forwarders/forward_to_x",
		"sealmq/+/in", "sealmq", "$SYS/broker/version", "#", strings.Repeat("/", 60_000),
	} {
		for _, v5 := range []bool{false, true} {
			for _, who := range []string{"user", "observer", "mallory"} {
				o := a.options(who, "-w")
				if who != "mallory" {
					o.ID = "w"
				}
				o.Will, o.WillPayload, o.WillRetain = topic, "forged", true
				c := a.open(v5)
				if p, err := c.Login(o); err == nil && p.Code() == 0 {
					a.t.Errorf("%s may leave a will at %.40q", who, topic)
				}
				_ = c.Close()
			}
		}
	}
}

// othersClientID tries to take bob's place; the bystanders' traffic shows that he
// keeps it. The observer sees that he stays online.
func othersClientID(a *arena) {
	bob := a.names["bob"].id
	watch := a.login(false, rawmqtt.Options{ID: "watch", User: "observer", Password: password})
	if p, err := watch.Sub(1, 0, "sealmq/+/status"); err != nil || p.Code() != 0 {
		a.t.Fatal(p, err)
	}
	for _, v5 := range []bool{false, true} {
		for _, o := range []rawmqtt.Options{
			{ID: bob, User: "mallory", Password: password},
			{ID: bob, User: "user", Password: password},
			{ID: bob, User: "observer", Password: password},
			{ID: bob, User: "bob", Password: "guess"},
			{ID: bob, User: "bob"},
			{ID: bob},
			{ID: bob, User: "sealmq-guest"},
			{ID: bob, User: "sealmq-proof-1", Password: "not a proof"},
			{ID: bob, Keep: true},
		} {
			c := a.open(v5)
			if p, err := c.Login(o); err == nil && p.Code() == 0 {
				a.t.Errorf("user %q got in with bob's client id", o.User)
			}
			_ = c.Close()
		}
	}
	for n := range 20 { // an identity takes over from itself only
		c := a.login(n%2 == 0, a.options("mallory", ""))
		if !settled(c) {
			a.t.Error("mallory's own connection")
		}
	}
	watch.Timeout = 200 * time.Millisecond
	for {
		p, err := watch.ReadPacket()
		if err != nil {
			break
		}
		if p.Type() == rawmqtt.PUBLISH && strings.Contains(p.Topic, bob) && bytes.Contains(p.Payload, []byte(`"status":"offline"`)) {
			a.t.Errorf("bob's status: %s", p.Payload)
		}
	}
}

// packetIDs plays with packet identifiers in both directions.
func packetIDs(a *arena) {
	d := a.join("mallory", "")
	self := route.AppendFrame(nil, &route.Frame{Onward: route.To("echo"), Return: route.To("x"), Payload: []byte("hi")})
	topic := "sealmq/" + d.id + "/out"
	for i := range 300 {
		id := []uint16{1, 1, 0x8000, 0xffff, uint16(i + 1)}[i%5]
		flags := []byte{2, 2 | 8}[i%2] // some marked as repeated
		write(d, rawmqtt.Publish(false, flags, topic, id, self))
		write(d, rawmqtt.Ack([]int{rawmqtt.PUBREC, rawmqtt.PUBREL, rawmqtt.PUBCOMP}[i%3], id))
		write(d, rawmqtt.Subscribe(false, id, 1, "sealmq/"+d.id+"/in"))
	}
	if !settled(d.Client) {
		d = a.join("mallory", "")
	}
	write(d, rawmqtt.Publish(false, 4, topic, 7, self)) // QoS 2
	if settled(d.Client) {
		a.t.Error("QoS 2 on a device's topic is accepted")
	}
	u := a.login(false, rawmqtt.Options{ID: "ids", User: "user", Password: password})
	if _, err := u.Sub(1, 1, "ids/#"); err != nil {
		a.t.Fatal(err)
	}
	for i := range 300 {
		write(u, rawmqtt.Publish(false, 2, "ids/x", uint16(i%3+1), []byte("x")))
		write(u, rawmqtt.Ack(rawmqtt.PUBREL, uint16(i+1)))
	}
	settled(u)
}

func falseAcks(a *arena) {
	for _, who := range []string{"mallory", "user"} {
		o := a.options(who, "")
		var c *rawmqtt.Client
		if who == "mallory" {
			c = a.join("mallory", "").Client
		} else {
			c = a.login(false, o)
		}
		for id := 0; id <= 0xffff; id += 64 {
			var b []byte
			for i := range 64 {
				b = append(b, rawmqtt.Ack(rawmqtt.PUBACK, uint16(id+i))...)
			}
			if !write(c, b) {
				break
			}
		}
		settled(c)
	}
	if n := a.metric(`sealmq_topic_events_total{event="bad-ack"}`); n < 60_000 {
		a.t.Errorf("%v counted", n)
	}
}

// stalledReaders ask for much and read nothing.
func stalledReaders(a *arena) {
	for n := range 5 {
		d := a.join("mallory", fmt.Sprint("-s", n))
		payload := make([]byte, 100<<10)
		for range 200 {
			if !d.send(1, route.To("echo"), route.To("x"), payload) {
				break
			}
		}
		u := a.login(true, rawmqtt.Options{ID: fmt.Sprint("stall", n), User: "user", Password: password})
		if _, err := u.Sub(1, 1, "stall"); err != nil {
			a.t.Fatal(err)
		}
	}
	pub := a.login(false, rawmqtt.Options{ID: "pub", User: "user", Password: password})
	for range 50 {
		if !write(pub, rawmqtt.Publish(false, 0, "stall", 0, make([]byte, 200<<10))) {
			break
		}
	}
	settled(pub)
}

func subscriptionBomb(a *arena) {
	for _, who := range []string{"user", "observer", "mallory"} {
		o := a.options(who, "-sub")
		if who != "mallory" {
			o.ID = who + "-sub"
		}
		c := a.login(false, o)
		for n := range 200 {
			var filters []string
			for i := range 50 {
				filters = append(filters, fmt.Sprintf("%d/%d/+/#", n, i))
			}
			if !write(c, rawmqtt.Subscribe(false, uint16(n+1), 1, filters...)) {
				break
			}
			for {
				p, err := c.ReadPacket()
				if err != nil || p.Type() == rawmqtt.SUBACK {
					break
				}
			}
		}
		for _, f := range []string{strings.Repeat("/", 65_000), strings.Repeat("+/", 30_000) + "#", "$share/g/" + strings.Repeat("x/", 20_000), "$share", "$share/", "$share//", "$share/g", "$SHARE/g/sealmq/+/in"} {
			if p, err := c.Sub(9, 1, f); err == nil && p.Code() < 0x80 {
				a.t.Errorf("%s: filter %.20q of %d bytes granted", who, f, len(f))
			}
		}
		_ = c.Close()
	}
	if n := a.metric(`sealmq_mqtt_events_total{event="subscriptions-full"}`); n == 0 {
		a.t.Error("no limit was met")
	}
}

func retainedBomb(a *arena) {
	c := a.login(false, rawmqtt.Options{ID: "bomber", User: "user", Password: password})
	payload := make([]byte, 20<<10)
	for n := range 1500 {
		if !write(c, rawmqtt.Publish(false, 1, fmt.Sprint("bomb/", n), 0, payload)) {
			a.t.Fatal("cut off")
		}
	}
	if !settled(c) {
		a.t.Fatal("cut off")
	}
	if n := a.metric(`sealmq_mqtt_events_total{event="retained-full"}`); n == 0 {
		a.t.Error("no limit was met")
	}
	for n := range 1500 { // others may retain again
		write(c, rawmqtt.Publish(false, 1, fmt.Sprint("bomb/", n), 0, nil))
	}
	settled(c)
}

// sessionBomb leaves kept sessions behind and has messages queued in them.
func sessionBomb(a *arena) {
	full := false
	for n := range 1500 {
		c, err := rawmqtt.Dial(a.addr, false)
		if err != nil {
			a.t.Fatal(err)
		}
		p, err := c.Login(rawmqtt.Options{ID: fmt.Sprint("kept", n), User: "user", Password: password, Keep: true})
		if err == nil && p.Code() == 0 && n < 20 {
			_, err = c.Sub(1, 1, "kept")
		}
		_ = c.Close()
		if err == nil && p.Code() == 3 {
			full = true
			break
		}
		if err != nil {
			a.t.Fatal(err)
		}
	}
	if !full {
		a.t.Error("any number of sessions is kept")
	}
	pub := a.login(false, rawmqtt.Options{ID: "keeper", User: "user", Password: password})
	for n := range 100 {
		write(pub, rawmqtt.Publish(false, 2, "kept", uint16(n+1), make([]byte, 100<<10)))
		if _, err := pub.Expect(rawmqtt.PUBACK); err != nil {
			a.t.Fatal(err)
		}
	}
	if n := a.metric(`sealmq_mqtt_events_total{event="queued-full"}`); n == 0 {
		a.t.Error("no limit was met")
	}
}

// halfPackets announces long packets and does not send them.
func halfPackets(a *arena) {
	long := rawmqtt.Publish(false, 2, "half", 1, make([]byte, 300<<10))
	for n := range 60 {
		o := rawmqtt.Options{ID: fmt.Sprint("half", n), User: "user", Password: password}
		part := long[:16]
		if n%2 == 1 {
			o = a.options("mallory", fmt.Sprint("-h", n))
			part = rawmqtt.Publish(false, 2, "sealmq/"+o.ID+"/out", 1, make([]byte, 300<<10))[:200<<10]
		}
		c := a.login(false, o)
		write(c, part)
	}
	if n := a.metric(`sealmq_mqtt_events_total{event="input-full"}`); n == 0 {
		a.t.Error("no limit was met")
	}
}

// windowIgnored sends stored frames for a device that does not read, and does not
// wait for acknowledgements.
func windowIgnored(a *arena) {
	const ended = `sealmq_connections_ended_total{reason="window-exceeded"}`
	before := a.metric(ended)
	deaf := a.join("carol", "")
	fwd, _ := deaf.register("forwarding_service", "register")
	d := a.join("mallory", "-wi")
	payload := make([]byte, 64<<10)
	for range 3000 {
		if !d.send(1, route.To(fwd), route.To("x"), payload) {
			break
		}
	}
	d.Timeout = 5 * time.Second
	if !closed(d.Client) {
		a.t.Error("a publisher that ignores its window stays connected")
	}
	if a.metric(ended) == before {
		a.t.Error("its end is not counted")
	}
}

func transientFlood(a *arena) {
	d := a.join("mallory", "-tf")
	go func() { // ends with the connection
		for {
			if _, err := d.ReadPacket(); err != nil {
				return
			}
		}
	}()
	for range 20_000 {
		if !d.send(0, route.To("nobody"), route.To("x"), []byte("flood")) {
			break
		}
	}
	_ = d.Close()
}

func logins(a *arena) {
	for n := range 200 {
		c := a.open(n%2 == 0)
		write(c, rawmqtt.Connect(n%2 == 0, rawmqtt.Options{ID: fmt.Sprint("l", n), User: fmt.Sprint("nobody", n), Password: strings.Repeat("x", n*100)}))
		if n%4 == 3 {
			_ = c.Close()
		}
	}
}

// aliasTheft tries to get another identity's alias in each order of arrival.
func aliasTheft(a *arena) {
	const service = "static_forwarding_service"
	owner, thief := a.join("carol", "-a"), a.join("mallory", "-a")
	refused := func(what, alias string) {
		a.t.Helper()
		if got, why := thief.register(service, alias); got != "" {
			a.t.Errorf("%s: the thief has %s", what, got)
		} else if why.String() != "refused" {
			a.t.Errorf("%s: %v", what, why)
		}
	}
	if got, _ := owner.register(service, "door"); got != "forward_to_door" {
		a.t.Fatalf("the owner got %q", got)
	}
	refused("owner online", "door")
	_ = owner.Close()
	refused("owner away", "door")
	owner = a.join("carol", "-a")
	if got, _ := owner.register(service, "door"); got != "forward_to_door" {
		a.t.Errorf("back, the owner got %q", got)
	}
	second := a.join("carol", "-a2") // another connection of the owner's
	if got, _ := second.register(service, "door"); got != "forward_to_door" {
		a.t.Errorf("the owner's second connection got %q", got)
	}
	refused("owner moved", "door")
	// Who comes first has it; the other learns at once that it has not.
	if got, _ := thief.register(service, "window"); got != "forward_to_window" {
		a.t.Fatal(got)
	}
	if got, why := owner.register(service, "window"); got != "" || why.String() != "refused" {
		a.t.Errorf("late: %q, %v", got, why)
	}
	for _, alias := range []string{"", "forward_to_door", "FWD_0", "dev_0", "tcp_0", "echo", "hello", "lookup", "notice", "a#b", strings.Repeat("x", 200)} {
		if got, _ := thief.register(service, alias); got != "" {
			a.t.Errorf("alias %.20q gives %q", alias, got)
		}
	}
	// Both at once, many times over: one has it, and keeps it.
	for n := range 20 {
		alias := fmt.Sprint("race", n)
		type answer struct{ who, got string }
		answers := make(chan answer, 2)
		for who, d := range map[string]*device{"owner": owner, "thief": thief} {
			go func() {
				got, _ := d.register(service, alias)
				answers <- answer{who, got}
			}()
		}
		x, y := <-answers, <-answers
		if (x.got == "") == (y.got == "") {
			a.t.Fatalf("race: %v and %v", x, y)
		}
	}
}

// forged sends carol what could be taken for the hub's own answers and notices,
// ahead of a real answer. On the wire, only a return route of exactly one address
// that is a service or forwarder is the hub's.
func forged(a *arena) {
	carol := a.join("carol", "-f")
	mallory := a.join("mallory", "-f")
	u := a.login(true, rawmqtt.Options{ID: "forger", User: "user", Password: password})
	fwd, _ := carol.register("forwarding_service", "register")
	mallory.send(1, route.To(fwd), route.To("x"), []byte("mallory's address"))
	at := carol.frame().Return // where carol would answer
	carol.send(1, at, route.To("me"), []byte("carol's address"))
	toCarol := route.Route{mallory.frame().Return[0]}
	notice := []byte{0xa1, 0x00, 0x01}
	sent := 0
	for _, onward := range []route.Route{toCarol, route.To(fwd)} {
		for _, target := range []string{"sealmq.notice", "M-register", "h", "back"} {
			for _, ret := range []route.Route{nil, route.To("notice"), route.To(fwd), route.To("hello"), route.To("forwarding_service")} {
				for _, payload := range [][]byte{notice, append([]byte{byte(len(fwd))}, fwd...)} {
					if mallory.send(1, onward.Append(route.To(target)...), ret, payload) {
						sent++
					}
				}
			}
		}
	}
	inbox := "sealmq/" + carol.id + "/in"
	body := route.AppendFrame(nil, &route.Frame{Onward: route.To("sealmq.notice"), Return: route.To("notice"), Payload: notice})
	write(u, rawmqtt.Publish(true, 0, inbox, 0, body))
	write(u, rawmqtt.Publish(true, 3, inbox, 5, body))
	write(mallory, rawmqtt.Publish(false, 0, inbox, 0, body))
	write(u, binary.BigEndian.AppendUint16([]byte{0x30, 3, 0, 1, 'x'}, 0))
	if !settled(mallory.Client) { // all of it has been taken
		a.t.Error("mallory was cut off")
	}
	// The answer to carol's own request comes last, and is the only one like it.
	carol.send(1, route.To("forwarding_service"), route.To("M-last"), []byte("\x08register"))
	genuine := 0
	for genuine == 0 {
		all, err := carol.frames()
		if err != nil {
			a.t.Fatal(err)
		}
		for _, f := range all {
			if len(f.Return) != 1 || strings.HasPrefix(f.Return[0].Value, "dev_") || strings.HasPrefix(f.Return[0].Value, "tcp_") {
				sent--
				continue
			}
			if f.Onward.String() != route.To("M-last").String() {
				a.t.Errorf("carol takes for the hub's: %v", f)
			}
			genuine++
		}
	}
	if sent != 0 {
		a.t.Errorf("%d frames of mallory's did not come, or not in order", sent)
	}
}
