// Package hostiledevice attacks a running hub as a device, an ordinary client or
// a stranger would, byte by byte, and looks at what that does to others.
package hostiledevice

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/peer"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ceiling is the configured limit of the hub's heap, in bytes.
const ceiling = 128 << 20

const password = "secret"

// account is an entry of the hub's password file.
type account struct{ name, id string }

// arena is a hub in a process of its own.
type arena struct {
	t     *testing.T
	hub   *peer.Process
	args  []string
	addr  string // host:port
	web   string // host:port of the WebSocket listener
	tcp   string // host:port for Ockam peers, with the listener "api" behind it
	pages string // URL of the status pages
	names map[string]account
}

// newArena starts a hub, with more arguments if there are any.
func newArena(t *testing.T, args ...string) *arena {
	t.Helper()
	a := &arena{t: t, names: make(map[string]account)}
	dir := t.TempDir()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	var file strings.Builder
	for _, n := range []string{"alice", "bob", "carol", "mallory"} {
		p, err := identity.Create()
		if err != nil {
			t.Fatal(err)
		}
		a.names[n] = account{n, p.Identifier().String()}
		fmt.Fprintf(&file, "%s:%s:device:%s\n", n, hash, p.Identifier())
	}
	for _, role := range []string{"user", "observer"} {
		a.names[role] = account{role, role}
		fmt.Fprintf(&file, "%s:%s:%s\n", role, hash, role)
	}
	passwords, config, authority := filepath.Join(dir, "passwd"), filepath.Join(dir, "hub.yaml"), filepath.Join(dir, "authority")
	write := func(name, text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(passwords, file.String())
	write(authority, hex.EncodeToString(newIdentity(t).Identity().ChangeHistory()))
	write(config, fmt.Sprintf("mqtt: ['127.0.0.1:0', 'ws://127.0.0.1:0']\ntcp: 127.0.0.1:0\nhttp: 127.0.0.1:0\npassword_file: %s\napi_authority: %s\n"+
		"devices:\n  anyone_proven: true\nlimits:\n  memory: %d\n  connections: 500\n  connections_per_address: 500\n  connect_timeout: 2s\n  tcp_first_byte: 2s\n", passwords, authority, ceiling))
	a.args = append([]string{"hub", "--config", config, "--json"}, args...)
	a.start()
	return a
}

// start starts the hub.
func (a *arena) start() {
	t := a.t
	t.Helper()
	lines := make(chan []byte, 1)
	var once sync.Once
	a.hub = peer.Start(t, peer.Options{OnLine: func(l []byte) { once.Do(func() { lines <- l }) }}, peer.Sealmq(t), a.args...)
	var info struct {
		MQTT []string `json:"mqtt"`
		TCP  string   `json:"tcp"`
		HTTP string   `json:"http"`
	}
	select {
	case l := <-lines:
		if err := json.Unmarshal(l, &info); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
	case <-a.hub.Exited():
		t.Fatalf("the hub ended: %s", a.hub.Stderr())
	case <-time.After(30 * time.Second):
		t.Fatal("the hub does not start")
	}
	a.web, a.tcp = strings.TrimPrefix(info.MQTT[1], "ws://"), strings.TrimPrefix(info.TCP, "tcp://")
	a.addr, a.pages = strings.TrimPrefix(info.MQTT[0], "mqtt://"), info.HTTP
}

// alive fails the test when the hub has ended.
func (a *arena) alive() {
	a.t.Helper()
	select {
	case <-a.hub.Exited():
		a.t.Fatalf("the hub ended: %s", a.hub.Stderr())
	default:
	}
}

// metric reads one number of /metrics; labels as they stand there.
func (a *arena) metric(name string) float64 {
	a.t.Helper()
	v, err := a.readMetric(&http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}, name)
	if err != nil {
		a.t.Fatal(err)
	}
	return v
}

func (a *arena) readMetric(c *http.Client, name string) (float64, error) {
	resp, err := c.Get(a.pages + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(page)) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(text), 64)
		}
	}
	return 0, fmt.Errorf("no metric %s", name)
}

// memory is what the hub has taken.
type memory struct {
	heap, resident int64 // at most, in bytes
	samples        int
}

func (m memory) String() string {
	return fmt.Sprintf("heap %.1f MiB, resident %.1f MiB at most in %d samples", float64(m.heap)/(1<<20), float64(m.resident)/(1<<20), m.samples)
}

// whileRunning samples the hub's memory while f runs, and once after it.
func (a *arena) whileRunning(f func()) (most memory) {
	a.t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	c := &http.Client{Timeout: 10 * time.Second, Transport: transport}
	look := func() error {
		heap, err := a.readMetric(c, "go_memstats_heap_alloc_bytes")
		if err != nil {
			return err
		}
		resident, err := a.hub.Memory()
		most = memory{max(most.heap, int64(heap)), max(most.resident, resident), most.samples + 1}
		return err
	}
	stop := make(chan struct{})
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for failed == nil {
			failed = look()
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	func() {
		defer wg.Wait() // also when the attack ends the test
		defer close(stop)
		f()
	}()
	if err := errors.Join(failed, look()); err != nil {
		a.alive()
		a.t.Fatal(err)
	}
	return most
}

// open opens a connection that lasts as long as the test.
func (a *arena) open(v5 bool) *rawmqtt.Client {
	a.t.Helper()
	c, err := rawmqtt.Dial(a.addr, v5)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = c.Close() })
	return c
}

// options log in as one of the accounts, with its own client id and a suffix.
func (a *arena) options(name, suffix string) rawmqtt.Options {
	acc := a.names[name]
	return rawmqtt.Options{ID: acc.id + suffix, User: acc.name, Password: password}
}

func (a *arena) login(v5 bool, o rawmqtt.Options) *rawmqtt.Client {
	a.t.Helper()
	c := a.open(v5)
	if p, err := c.Login(o); err != nil || p.Code() != 0 {
		a.t.Fatalf("login as %s: %v %v", o.User, p, err)
	}
	return c
}

// write sends what the hub may refuse to read.
func write(c net.Conn, b []byte) bool {
	_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
	_, err := c.Write(b)
	return err == nil
}

// settled reads until the hub answers a ping or ends the connection, and reports
// whether it is still open.
func settled(c *rawmqtt.Client) bool {
	if !write(c, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil)) {
		return false
	}
	for {
		p, err := c.ReadPacket()
		if err != nil {
			return false
		}
		if p.Type() == rawmqtt.PINGRESP {
			return true
		}
	}
}

// device is a well-behaved device on the wire.
type device struct {
	*rawmqtt.Client
	a    *arena
	id   string
	wmu  sync.Mutex
	next uint16

	acked func() // hears of each PUBACK; may be nil
}

// join connects a device and attaches it.
func (a *arena) join(name, suffix string) *device {
	a.t.Helper()
	d := &device{Client: a.login(false, a.options(name, suffix)), a: a, id: a.names[name].id + suffix}
	if p, err := d.Sub(1, 1, "sealmq/"+d.id+"/in"); err != nil || p.Code() != 1 {
		a.t.Fatalf("inbox of %s: %v %v", name, p, err)
	}
	body, err := (&hubproto.HelloRequest{Epoch: [hubproto.EpochLen]byte{1}}).Marshal()
	if err != nil {
		a.t.Fatal(err)
	}
	d.send(1, route.To("hello"), route.To("h"), body)
	if f := d.frame(); f.Return.String() != route.To("hello").String() {
		a.t.Fatalf("first frame of %s is %v", name, f)
	}
	return d
}

// send publishes one frame.
func (d *device) send(qos byte, onward, ret route.Route, payload []byte) bool {
	d.wmu.Lock()
	defer d.wmu.Unlock()
	if d.next++; d.next == 0 {
		d.next = 1
	}
	body := route.AppendFrame(nil, &route.Frame{Onward: onward, Return: ret, Payload: payload})
	return write(d, rawmqtt.Publish(d.V5, qos<<1, "sealmq/"+d.id+"/out", d.next, body))
}

// frames returns the frames of the next packet, acknowledged.
func (d *device) frames() ([]route.Frame, error) {
	for {
		p, err := d.ReadPacket()
		if err != nil {
			return nil, err
		}
		if p.Type() == rawmqtt.PUBACK && d.acked != nil {
			d.acked()
		}
		if p.Type() != rawmqtt.PUBLISH {
			continue
		}
		if p.QoS() == 1 {
			d.wmu.Lock()
			ok := write(d, rawmqtt.Ack(rawmqtt.PUBACK, p.ID))
			d.wmu.Unlock()
			if !ok {
				return nil, net.ErrClosed
			}
		}
		views, err := route.ParseBundle(p.Payload, route.Limits{}, nil)
		if err != nil {
			return nil, err
		}
		var all []route.Frame
		for i := range views {
			all = append(all, views[i].Frame())
		}
		return all, nil
	}
}

// frame is the only frame of the next packet.
func (d *device) frame() route.Frame {
	d.a.t.Helper()
	f, err := d.frames()
	if err != nil || len(f) != 1 {
		d.a.t.Fatalf("%s: %v %v", d.id, f, err)
	}
	return f[0]
}

// register asks for a forwarder and returns its address, or "" and the reason of
// the notice.
func (d *device) register(service, text string) (string, hubproto.Reason) {
	d.a.t.Helper()
	d.send(1, route.To(service), route.To("M-"+text), bare.AppendString(nil, text))
	for {
		f := d.frame()
		if f.Onward.String() == route.To(hubproto.NoticeTarget).String() {
			n, err := hubproto.ParseNotice(f.Payload)
			if err != nil {
				d.a.t.Fatal(err)
			}
			return "", n.Reason
		}
		if s, err := bare.StringExact(f.Payload); err == nil && f.Return.String() == route.To(s).String() {
			return s, 0
		}
	}
}

// pair is two bystanders: alice sends numbered frames, bob sends each back.
type pair struct {
	a          *arena
	alice, bob *device
	toBob      route.Route
	window     chan struct{} // messages that were not sent back
	unanswered chan struct{} // publishes that were not acknowledged
	wg         sync.WaitGroup
	stop       atomic.Bool
	stopped    chan struct{}
	failed     atomic.Pointer[string]
	answered   atomic.Uint64

	mu    sync.Mutex
	times []time.Duration
}

const (
	inFlight = 16
	// unanswered is how many publishes alice leaves unacknowledged: a frame is sent on
	// before it is on disk.
	unanswered = 128
)

func newPair(a *arena) *pair {
	a.t.Helper()
	p := &pair{a: a, alice: a.join("alice", ""), bob: a.join("bob", ""), stopped: make(chan struct{}),
		window: make(chan struct{}, inFlight), unanswered: make(chan struct{}, unanswered)}
	fwd, _ := p.bob.register("forwarding_service", "register")
	p.alice.send(1, route.To(fwd), route.To("back"), []byte("first"))
	first := p.bob.frame()
	p.bob.send(1, first.Return, route.To("echo"), []byte("first"))
	p.toBob = p.alice.frame().Return
	p.alice.Timeout, p.bob.Timeout = time.Minute, time.Minute
	p.alice.acked = func() {
		select {
		case <-p.unanswered:
		default: // of what came before
		}
	}
	p.wg.Go(p.echo)
	p.wg.Go(p.write)
	p.wg.Go(p.read)
	return p
}

func (p *pair) fail(format string, args ...any) {
	if !p.stop.Load() {
		text := fmt.Sprintf(format, args...)
		p.failed.CompareAndSwap(nil, &text)
	}
}

func (p *pair) echo() {
	for {
		all, err := p.bob.frames()
		if err != nil {
			p.fail("bob: %v", err)
			return
		}
		for _, f := range all {
			p.bob.send(1, f.Return, nil, f.Payload)
		}
	}
}

func (p *pair) write() {
	for n := uint64(0); !p.stop.Load(); n++ {
		for _, c := range []chan struct{}{p.window, p.unanswered} {
			select {
			case c <- struct{}{}:
			case <-p.stopped:
				return
			}
		}
		b := binary.BigEndian.AppendUint64(nil, n)
		p.alice.send(1, p.toBob, route.To("back"), binary.BigEndian.AppendUint64(b, uint64(time.Now().UnixNano())))
	}
}

func (p *pair) read() {
	next := uint64(0)
	for {
		all, err := p.alice.frames()
		if err != nil {
			p.fail("alice: %v", err)
			return
		}
		for _, f := range all {
			if len(f.Payload) != 16 {
				p.fail("alice got %d bytes", len(f.Payload))
				continue
			}
			if n := binary.BigEndian.Uint64(f.Payload); n != next {
				p.fail("alice got %d, not %d: lost, repeated or out of order", n, next)
			}
			next++
			p.mu.Lock()
			p.times = append(p.times, time.Since(time.Unix(0, int64(binary.BigEndian.Uint64(f.Payload[8:])))))
			p.mu.Unlock()
			p.answered.Add(1)
			<-p.window // its own place, taken when it was sent
		}
	}
}

// figures are what a pair achieved for a while.
type figures struct {
	perSecond float64
	p99       time.Duration
}

func (f figures) String() string {
	return fmt.Sprintf("%.0f round trips a second, p99 %v", f.perSecond, f.p99.Round(10*time.Microsecond))
}

func (p *pair) during(f func()) figures {
	p.mu.Lock()
	p.times = p.times[:0]
	p.mu.Unlock()
	begin := time.Now()
	f()
	took := time.Since(begin)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.times) == 0 {
		return figures{}
	}
	slices.Sort(p.times)
	return figures{float64(len(p.times)) / took.Seconds(), p.times[len(p.times)*99/100]}
}

// rounds waits until the pair has had n more answers.
func (p *pair) rounds(n uint64) {
	p.a.t.Helper()
	want := p.answered.Load() + n
	p.a.eventually("the bystanders' traffic", func() bool { return p.answered.Load() >= want || p.failed.Load() != nil })
	if why := p.failed.Load(); why != nil {
		p.a.alive()
		p.a.t.Fatalf("bystanders disturbed: %s", *why)
	}
}

func (p *pair) end() {
	p.rounds(inFlight)
	p.stop.Store(true)
	_ = p.alice.Close()
	_ = p.bob.Close()
	close(p.stopped)
	p.wg.Wait()
}

func (a *arena) eventually(what string, f func() bool) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-ctx.Done():
			a.alive()
			a.t.Fatalf("timed out: %s", what)
		case <-tick.C:
		}
	}
}

// closed reports whether the hub has ended a connection.
func closed(c *rawmqtt.Client) bool {
	for {
		if _, err := c.ReadPacket(); err != nil {
			var ne net.Error
			return !errors.As(err, &ne) || !ne.Timeout()
		}
	}
}
