package restart

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// signals are the ways in which a hub ends.
var signals = []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM}

func random(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// connect makes one MQTT connection of a device; a nil client means that the hub
// went away.
func connect(h *hub, clientID string, lost func()) paho.Client {
	c := paho.NewClient(paho.NewClientOptions().AddBroker(h.url()).SetClientID(clientID).SetProtocolVersion(4).
		SetAutoReconnect(false).SetConnectTimeout(patience).SetWriteTimeout(time.Second).SetOrderMatters(true).
		SetConnectionLostHandler(func(paho.Client, error) { lost() }))
	if token := c.Connect(); !token.WaitTimeout(patience) || token.Error() != nil {
		return nil
	}
	return c
}

func newID(t *testing.T) string {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p.Identifier().String()
}

// Whatever the hub acknowledged is there after it was killed, in order, although
// the device that it is for was away all the time.
func TestAcknowledgedIsStored(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			rnd := random(t)
			h := newHub(t, "--durability", string(mode), "--segment-size", "1MiB", "--sync-interval", "50ms")
			alice, bob := newID(t), newID(t)
			h.start()
			// Known to the hub, and then away.
			first := connect(h, bob, func() {})
			first.Disconnect(100)
			to := h.address(bob)

			var next uint64
			acked := make(map[uint64]bool)
			for range 6 {
				next = publishUntilKilled(h, alice, to, next, acked, rnd)
				h.start()
			}
			maps.DeleteFunc(acked, func(_ uint64, ok bool) bool { return !ok })
			if len(acked) == 0 {
				t.Fatal("nothing was acknowledged")
			}
			st := h.status()
			if st.Store.Found == nil || st.Store.Found.Frames < len(acked) || st.Store.Durability != mode {
				t.Fatalf("%d acknowledged, the hub found %+v", len(acked), st.Store)
			}
			t.Logf("acknowledged %d of %d; the hub found %+v", len(acked), next, *st.Store.Found)
			h.sums()
			receiveAll(h, bob, acked)
			h.sums()
		})
	}
}

// publishUntilKilled sends numbered frames until the hub has ended, and notes those
// that it acknowledged.
func publishUntilKilled(h *hub, from, to string, next uint64, acked map[uint64]bool, rnd *rand.Rand) uint64 {
	h.t.Helper()
	gone := make(chan struct{})
	c := connect(h, from, func() { close(gone) })
	if c == nil {
		h.t.Fatal("cannot connect")
	}
	killed := make(chan struct{})
	after := rnd.IntN(1500)
	sig := signals[rnd.IntN(len(signals))]
	type sent struct {
		n     uint64
		token paho.Token
	}
	window := make(chan sent, 64)
	var wg sync.WaitGroup
	wg.Go(func() {
		done := 0
		for s := range window {
			select {
			case <-s.token.Done():
				acked[s.n] = s.token.Error() == nil
			case <-gone: // the library may leave a token of a lost connection alone
			}
			if done++; done == after {
				go func() {
					defer close(killed)
					h.end(sig)
				}()
			}
		}
		if done < after {
			h.end(sig)
			close(killed)
		}
	})
	for i := 0; i < after+5000; i++ {
		select {
		case <-gone:
			i = after + 5000
			continue
		default:
		}
		f := route.Frame{Onward: route.To(to, "app"), Payload: numbered(next)}
		window <- sent{next, c.Publish("sealmq/"+from+"/out", 1, false, route.AppendFrame(nil, &f))}
		next++
	}
	close(window)
	wg.Wait()
	if after > 0 {
		<-killed
	}
	c.Disconnect(0)
	return next
}

// large is the first number of a payload of 20,000 bytes.
const large = 1 << 32

// numbered is a payload that receiveAll understands.
func numbered(n uint64) []byte {
	size := 8 + n%200
	if n >= large {
		size = 20_000
	}
	return binary.BigEndian.AppendUint64(make([]byte, 0, size), n)[:size]
}

// receiveAll attaches a device and takes what is queued for it until every
// acknowledged number was there; numbers may repeat but not fall back otherwise.
func receiveAll(h *hub, clientID string, acked map[uint64]bool) {
	h.t.Helper()
	got := make(chan []byte, 1<<16)
	c := connect(h, clientID, func() {})
	if c == nil {
		h.t.Fatal("cannot connect")
	}
	defer c.Disconnect(100)
	in := "sealmq/" + clientID + "/in"
	if token := c.Subscribe(in, 1, func(_ paho.Client, m paho.Message) { got <- m.Payload() }); !token.WaitTimeout(patience) || token.Error() != nil {
		h.t.Fatal("cannot subscribe")
	}
	hello, err := (&hubproto.HelloRequest{}).Marshal()
	if err != nil {
		h.t.Fatal(err)
	}
	f := route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello}
	c.Publish("sealmq/"+clientID+"/out", 1, false, route.AppendFrame(nil, &f))
	missing := len(acked)
	seen := make(map[uint64]bool)
	var last uint64
	end := time.After(patience)
	for missing > 0 {
		select {
		case payload := <-got:
			views, err := route.ParseBundle(payload, route.Limits{}, nil)
			if err != nil {
				h.t.Fatal(err)
			}
			for i := range views {
				f := views[i].Frame()
				if f.Onward[0].Value == "h" {
					continue
				}
				n := binary.BigEndian.Uint64(f.Payload)
				if n < last && !seen[n] {
					h.t.Fatalf("number %d came after %d", n, last)
				}
				if !bytes.Equal(f.Payload, numbered(n)) {
					h.t.Fatalf("number %d has other %d bytes", n, len(f.Payload))
				}
				last = max(last, n)
				if acked[n] && !seen[n] {
					missing--
				}
				seen[n] = true
			}
		case <-end:
			h.t.Fatalf("%d of %d acknowledged frames are missing; the last was %d", missing, len(acked), last)
		}
	}
	h.until("the queue is empty", func() (bool, string) {
		c := h.counters()
		return c["sealmq_frames_queued"] == 0, fmt.Sprint(c)
	})
}

// messages is how many a live channel carries.
const messages = 3000

// A live channel between two devices goes on across hubs that end in the middle:
// every message arrives, once and in order, without a new handshake, and the
// forwarding address stays the same.
func TestLiveChannel(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			rnd := random(t)
			h := newHub(t, "--durability", string(mode))
			h.start()
			ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
			defer cancel()
			alice, bob := node(t, h), node(t, h)
			if _, err := bob.Listen("bob", channel.TrustIdentifiers(alice.Identifier())); err != nil {
				t.Fatal(err)
			}
			fwd, err := bob.CreateForwarder(ctx, "bob", device.Alias("bobs-door"))
			if err != nil {
				t.Fatal(err)
			}
			address := fwd.Address()
			ch, err := alice.Dial(ctx, route.To(address), channel.TrustIdentifiers(bob.Identifier()))
			if err != nil {
				t.Fatal(err)
			}
			const restarts = 4
			var wg sync.WaitGroup
			wg.Go(func() {
				for n := range uint64(messages) {
					if err := ch.Send(ctx, "app", binary.BigEndian.AppendUint64(nil, n)); err != nil {
						t.Errorf("send %d: %v", n, err)
						return
					}
				}
			})
			due := make(map[uint64]bool)
			for len(due) < restarts {
				due[rnd.Uint64N(messages*3/4)] = true
			}
			var restarted sync.WaitGroup
			for n := range uint64(messages) {
				m, err := bob.Receive(ctx, "app")
				if err != nil {
					t.Fatalf("message %d: %v", n, err)
				}
				if got := binary.BigEndian.Uint64(m.Payload); got != n || m.From != alice.Identifier() {
					t.Fatalf("message %d from %s, want %d", got, m.From, n)
				}
				if due[n] {
					restarted.Wait() // one at a time
					sig := signals[rnd.IntN(len(signals))]
					restarted.Go(func() { h.end(sig); h.start() })
				}
			}
			restarted.Wait()
			wg.Wait()
			if err := ch.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			if n := ch.Restarts(); n != 0 || ch.Err() != nil {
				t.Errorf("the channel was made again %d times, %v", n, ch.Err())
			}
			if fwd.Address() != address {
				t.Errorf("the forwarding address is %s now, it was %s", fwd.Address(), address)
			}
			// And back.
			ch2, err := alice.Dial(ctx, route.To(address), channel.TrustIdentifiers(bob.Identifier()))
			if err != nil {
				t.Fatal(err)
			}
			_ = ch2.Close()
			h.sums()
		})
	}
}

func node(t *testing.T, h *hub) *device.Node {
	t.Helper()
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n, err := device.Connect(ctx, h.url(), device.Config{Identity: id, MailboxMessages: messages})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// wire is a device's way to its hub.
type wire struct {
	slow atomic.Int64 // what each read takes longer, in nanoseconds

	mu   sync.Mutex
	away bool
	conn net.Conn // the last
}

func (w *wire) dial(ctx context.Context, network, address string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.away {
		return nil, errors.New("no network")
	}
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	w.conn = c
	return slowConn{c, &w.slow}, err
}

// set takes the network away, or gives it back.
func (w *wire) set(away bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.away = away; away {
		_ = w.conn.Close()
	}
}

type slowConn struct {
	net.Conn
	by *atomic.Int64
}

func (c slowConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	time.Sleep(time.Duration(c.by.Load()))
	return n, err
}

// TestSlowHelloThenRestart: the answer to a device's first hello came too late for it. What
// the hub has acknowledged for that device is there for it all the same after a restart.
func TestSlowHelloThenRestart(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	alice := node(t, h)
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	var w wire
	w.slow.Store(int64(50 * time.Millisecond))
	bob, err := device.Connect(ctx, h.url(), device.Config{Identity: id, HelloTimeout: 10 * time.Millisecond, DialNetwork: w.dial})
	if err != nil {
		t.Fatal(err)
	}
	defer bob.Close()
	w.slow.Store(0)
	ch := reach(t, ctx, alice, bob)
	w.set(true)
	h.until("bob is away", func() (bool, string) { return h.counters()["sealmq_peers_attached"] == 1, "" })
	const n = 20
	for i := range n {
		if err := ch.Send(ctx, "app", []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := ch.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	h.end(syscall.SIGKILL)
	h.start()
	w.set(false)
	for i := range n {
		short, cancel := context.WithTimeout(ctx, patience/3)
		m, err := bob.Receive(short, "app")
		cancel()
		if err != nil || m.Payload[0] != byte(i) {
			t.Fatalf("%d of %d messages arrived that the hub had acknowledged: %v; %v", i, n, err, h.counters())
		}
	}
	h.sums()
}

// reach opens a channel from alice to bob.
func reach(t *testing.T, ctx context.Context, alice, bob *device.Node) *device.Channel {
	t.Helper()
	if _, err := bob.Listen("bob", channel.TrustIdentifiers(alice.Identifier())); err != nil {
		t.Fatal(err)
	}
	fwd, err := bob.CreateForwarder(ctx, "bob")
	if err != nil {
		t.Fatal(err)
	}
	ch, err := alice.Dial(ctx, route.To(fwd.Address()), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// TestNoticesOutliveTheHub: what the hub had acknowledged and dropped while its sender was away
// is told to the sender's program when it is back, also by the hub that comes after a kill.
func TestNoticesOutliveTheHub(t *testing.T) {
	t.Parallel()
	config := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(config, []byte("limits:\n  queued_for: 1s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := newHub(t, "--config", config)
	h.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wires [2]wire
	var nodes [2]*device.Node
	for i := range nodes {
		id, err := identity.Create()
		if err != nil {
			t.Fatal(err)
		}
		if nodes[i], err = device.Connect(ctx, h.url(), device.Config{Identity: id, DialNetwork: wires[i].dial}); err != nil {
			t.Fatal(err)
		}
		defer nodes[i].Close()
	}
	alice, bob := nodes[0], nodes[1]
	ch := reach(t, ctx, alice, bob)
	wires[1].set(true)
	h.until("bob is away", func() (bool, string) { return h.counters()["sealmq_peers_attached"] == 1, "" })
	const n = 10
	for range n {
		if err := ch.Send(ctx, "app", make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	if err := ch.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	wires[0].set(true)
	h.until("they have expired", func() (bool, string) {
		c := h.counters()
		return c["sealmq_frames_dropped_total{reason=expired}"] >= n, fmt.Sprint(c)
	})
	h.end(syscall.SIGKILL)
	h.start()
	wires[0].set(false)
	told := uint64(0)
	h.until("alice is told", func() (bool, string) {
		var u *device.UndeliveredError
		if err := ch.Flush(ctx); errors.As(err, &u) {
			told += u.Count
		}
		return told >= n, fmt.Sprint(told, h.counters())
	})
	h.sums()
}

// retained is what an observer is shown of a forwarder, and of the status of its owner.
func retained(t *testing.T, h *hub, address, owner string) (forwarder, status string) {
	t.Helper()
	got := make(chan paho.Message, 16)
	c := connect(h, "observer", func() {})
	if c == nil {
		t.Fatal("cannot connect")
	}
	defer c.Disconnect(0)
	topics := []string{"sealmq/hub/forwarders/" + address, "sealmq/" + owner + "/status"}
	for _, topic := range topics {
		token := c.Subscribe(topic, 0, func(_ paho.Client, m paho.Message) { got <- m })
		if !token.WaitTimeout(patience) || token.Error() != nil {
			t.Fatal("cannot subscribe: ", token.Error())
		}
	}
	for forwarder == "" || status == "" {
		select {
		case m := <-got:
			if m.Topic() == topics[0] {
				forwarder = string(m.Payload())
			} else {
				status = string(m.Payload())
			}
		case <-time.After(patience):
			t.Fatalf("retained: %q, %q", forwarder, status)
		}
	}
	return forwarder, status
}

// A device that has not come back since the restart is offline, and an alias stays
// its owner's meanwhile. An observer is shown the same records.
func TestAbsentOwner(t *testing.T) {
	h := newHub(t)
	h.start()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	bob := node(t, h)
	if _, err := bob.Listen("bob", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	if _, err := bob.CreateForwarder(ctx, "bob", device.Alias("door")); err != nil {
		t.Fatal(err)
	}
	if err := bob.Close(); err != nil {
		t.Fatal(err)
	}
	h.until("bob is away", func() (bool, string) {
		c := h.counters()
		return c["sealmq_peers_attached"] == 0, fmt.Sprint(c)
	})
	owner := bob.Identifier().String()
	before, status := retained(t, h, "forward_to_door", owner)
	if !strings.Contains(before, owner) || !strings.Contains(status, `"offline"`) {
		t.Fatalf("records: %s %s", before, status)
	}
	h.end(syscall.SIGKILL)
	h.start()
	if after, status := retained(t, h, "forward_to_door", owner); after != before || !strings.Contains(status, `"offline"`) {
		t.Errorf("records: %s %s, before: %s", after, status, before)
	}
	if c := h.counters(); c["sealmq_peers"] != 1 || c["sealmq_peers_attached"] != 0 || c["sealmq_forwarders"] != 1 {
		t.Fatalf("%v", c)
	}
	mallory := node(t, h)
	if _, err := mallory.Listen("m", channel.TrustEveryone); err != nil {
		t.Fatal(err)
	}
	if f, err := mallory.CreateForwarder(ctx, "m", device.Alias("door")); err == nil {
		t.Fatalf("another identity took the alias: %s", f.Address())
	}
	h.sums()
}
