package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"
)

// plainTopic carries what the plain sender sends.
const plainTopic = "plain/messages"

// plainHub is an MQTT server as anybody would start it, without the forwarder.
func (r *role) plainHub(ctx context.Context) error {
	s := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	if err := s.AddHook(new(auth.AllowHook), nil); err != nil {
		return err
	}
	if err := s.AddListener(listeners.NewTCP(listeners.Config{ID: "tcp", Address: r.Hub})); err != nil {
		return err
	}
	if err := s.Serve(); err != nil {
		return err
	}
	say(line{Event: "ready"})
	<-ctx.Done()
	return nil // the process ends, and the server with it
}

// plainClient connects with a session that is kept, and keeps at it.
func (r *role) plainClient(ctx context.Context, onConnect paho.OnConnectHandler, take paho.MessageHandler) (paho.Client, error) {
	o := paho.NewClientOptions().AddBroker(r.Hub).SetClientID(r.Name).SetProtocolVersion(4).SetCleanSession(false).
		SetMaxReconnectInterval(200 * time.Millisecond).SetConnectRetry(true).SetConnectRetryInterval(100 * time.Millisecond).
		SetWriteTimeout(5 * time.Second).SetOnConnectHandler(onConnect).SetDefaultPublishHandler(take)
	c := paho.NewClient(o)
	select {
	case <-c.Connect().Done():
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (r *role) plainReceive(ctx context.Context) error {
	st, err := openState(filepath.Join(r.Home, "taken"))
	if err != nil {
		return err
	}
	subscribed := make(chan struct{}, 1)
	c, err := r.plainClient(ctx, func(c paho.Client) {
		go func() {
			c.Subscribe(plainTopic, 1, nil).Wait()
			select {
			case subscribed <- struct{}{}:
			default:
			}
		}()
	}, func(_ paho.Client, m paho.Message) {
		from, n, err := parseContent(m.Payload())
		if err == nil {
			err = st.take(from, n, "-")
		}
		if err != nil {
			say(line{Event: "violation", Text: err.Error()})
		}
	})
	if err != nil {
		return err
	}
	<-subscribed
	say(line{Event: "ready"})
	<-ctx.Done()
	c.Disconnect(100)
	return nil
}

// plainSend counts a message as sent once its PUBACK is there.
func (r *role) plainSend(ctx context.Context) error {
	c, err := r.plainClient(ctx, nil, nil)
	if err != nil {
		return err
	}
	say(line{Event: "ready"})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := uint64(1); n <= r.N; n++ {
		t := c.Publish(plainTopic, 1, false, content(r.Name, n))
		select {
		case <-t.Done():
		case <-ctx.Done():
			return ctx.Err()
		}
		if t.Error() != nil {
			n-- // not acknowledged: again
		}
		if n%uint64(r.PerTick) == 0 {
			<-tick.C
		}
	}
	say(line{Event: "done"})
	<-ctx.Done()
	c.Disconnect(100)
	return nil
}

// TestHarnessFindsLoss runs ordinary MQTT sessions, QoS 1 and kept, through the same
// kinds of fault: what their server has acknowledged is lost when it is killed, so a
// harness that finds nothing here would prove nothing elsewhere.
func TestHarnessFindsLoss(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(role{Name: "server", Kind: "plain-hub", Hub: addr})
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{t: t, addr: addr, env: []string{envRole + "=" + string(text)}}
	h.start()
	const n = 1500
	to := newChild(t, role{Name: "to", Kind: "plain-receiver"}, addr, seed)
	to.start()
	to.ready()
	from := newChild(t, role{Name: "from", Kind: "plain-sender", N: n, PerTick: 2}, addr, seed+1)
	from.start()
	from.ready()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() {
		select {
		case <-from.done:
		case <-ctx.Done():
		}
		cancel()
	}()
	faults := make(map[string]int)
	for k := 0; ctx.Err() == nil; k++ {
		pause(ctx, time.Duration(rnd.Int64N(int64(400*time.Millisecond))))
		switch k % 3 {
		case 0:
			faults["connection cut"]++
			to.proxy.cut()
		case 1:
			// Messages wait for the receiver when the server is killed.
			faults["server killed"]++
			resume := to.proxy.stall()
			pause(ctx, 300*time.Millisecond)
			h.end(syscall.SIGKILL)
			h.start()
			to.proxy.cut()
			resume()
		case 2:
			faults["receiver killed"]++
			to.end(syscall.SIGKILL)
			pause(ctx, 200*time.Millisecond)
			to.start()
		}
	}
	select {
	case <-from.done:
	default:
		t.Fatal("the sender never ended: ", errors.Join(context.Cause(ctx), fmt.Errorf("%s", from.process.Stderr())))
	}
	from.end(syscall.SIGTERM)
	to.end(syscall.SIGTERM)
	seen := make(map[uint64]int)
	var last uint64
	unordered := 0
	err = eachTaken(filepath.Join(to.role.Home, "taken"), func(_ string, n uint64, _ string) error {
		if seen[n]++; n < last {
			unordered++
		}
		last = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	lost, twice := n-len(seen), 0
	for _, k := range seen {
		twice += k - 1
	}
	t.Logf("plain sessions, %d acknowledged messages, faults %v: lost %d, twice %d, out of order %d", n, faults, lost, twice, unordered)
	if lost == 0 {
		t.Error("the harness found no loss where there is some")
	}
}
