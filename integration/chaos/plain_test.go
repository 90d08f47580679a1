package chaos

import (
	"context"
	"log/slog"
	"path/filepath"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"
)

// The roles of a plain run begin with plainPrefix. plainRest is how long nothing must come
// at a receiver for it to have all that comes: a client is back within that time.
const (
	plainPrefix = "plain-"
	plainRest   = 1500 * time.Millisecond
)

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

// plainReceive takes messages, and acknowledges each once it is on disk: paho sends the
// PUBACK when the handler has returned.
func (r *role) plainReceive(ctx context.Context) error {
	st, err := openState(filepath.Join(r.Home, "taken"))
	if err != nil {
		return err
	}
	topic := plainPrefix + r.Name
	subscribed := make(chan struct{}, 1)
	c, err := r.plainClient(ctx, func(c paho.Client) {
		go func() {
			c.Subscribe(topic+"/#", 1, nil).Wait()
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
	select {
	case <-subscribed:
	case <-ctx.Done():
		return nil
	}
	say(line{Event: "ready", Address: topic})
	<-ctx.Done()
	c.Disconnect(100)
	return nil
}

// plainSend publishes the messages of its streams. One counts as sent once its PUBACK is
// there, which is noted on disk for the next process.
func (r *role) plainSend(ctx context.Context) error {
	st, err := openState(filepath.Join(r.Home, "sent"))
	if err != nil {
		return err
	}
	c, err := r.plainClient(ctx, nil, nil)
	if err != nil {
		return err
	}
	say(line{Event: "ready"})
	ended := make(chan error, r.Streams)
	for i := range r.Streams {
		go func() { ended <- r.plainPost(ctx, c, r.To+"/"+app(i), streamName(r.Name, i), st) }()
	}
	for range r.Streams {
		if err := <-ended; err != nil {
			return err
		}
	}
	say(line{Event: "done"})
	<-ctx.Done()
	c.Disconnect(100)
	return nil
}

func (r *role) plainPost(ctx context.Context, c paho.Client, topic, from string, st *state) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := st.of(from).n + 1; n <= r.N; {
		t := c.Publish(topic, 1, false, content(from, n))
		select {
		case <-t.Done():
		case <-ctx.Done():
			return ctx.Err()
		}
		if t.Error() == nil { // else again: it was not acknowledged
			if err := st.take(from, n, "-"); err != nil {
				return err
			}
			n++
		}
		if r.PerTick > 0 && n%uint64(r.PerTick) == 0 {
			<-tick.C
		}
	}
	return nil
}
