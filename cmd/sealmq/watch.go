package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// seen is one message that an observer of a broker received.
type seen struct {
	topic   string
	payload []byte
}

// watcher is an ordinary MQTT client that is subscribed to everything under a
// root, as mosquitto_sub -t 'sealmq/#' is. It holds no key.
type watcher struct {
	client paho.Client

	mu      sync.Mutex
	all     []seen
	changed chan struct{} // closed and replaced at each message
}

// maxSeen bounds what a watcher keeps.
const maxSeen = 10000

// watch connects and returns once the subscription stands.
func watch(ctx context.Context, url, id string, root topics.Root) (*watcher, error) {
	w := &watcher{changed: make(chan struct{})}
	opts := paho.NewClientOptions().
		AddBroker(url).
		SetClientID(id).
		SetProtocolVersion(4).
		SetAutoReconnect(false).
		SetConnectTimeout(10 * time.Second).
		SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { w.add(m) })
	w.client = paho.NewClient(opts)
	if err := await(ctx, w.client.Connect()); err != nil {
		return nil, fmt.Errorf("the observer cannot connect: %w", err)
	}
	if err := await(ctx, w.client.Subscribe(root.All(), 0, nil)); err != nil {
		w.close()
		return nil, fmt.Errorf("the observer cannot subscribe: %w", err)
	}
	return w, nil
}

func await(ctx context.Context, t paho.Token) error {
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *watcher) add(m paho.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) < maxSeen {
		w.all = append(w.all, seen{m.Topic(), m.Payload()})
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

// until waits until enough of what it saw is there.
func (w *watcher) until(ctx context.Context, enough func([]seen) bool) ([]seen, error) {
	for {
		w.mu.Lock()
		all, changed := w.all[:len(w.all):len(w.all)], w.changed
		w.mu.Unlock()
		if enough(all) {
			return all, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errors.New("the observer did not see everything in time")
		}
	}
}

func (w *watcher) close() { w.client.Disconnect(100) }

// observed is one frame as an observer reads it: where it comes from, where it
// goes, how large it is, and bytes that mean nothing to it.
type observed struct {
	topic   string
	onward  route.Route
	back    route.Route
	payload []byte
}

// framesOn decodes what was seen on one topic.
func framesOn(all []seen, topic string) ([]observed, error) {
	var out []observed
	for _, s := range all {
		if s.topic != topic {
			continue
		}
		views, err := route.ParseBundle(s.payload, route.Limits{}, nil)
		if err != nil {
			return nil, err
		}
		for i := range views {
			f := views[i].Frame()
			out = append(out, observed{topic: s.topic, onward: f.Onward, back: f.Return, payload: f.Payload})
		}
	}
	return out, nil
}

// lastOn returns what was seen last on one topic; nil: nothing.
func lastOn(all []seen, topic string) []byte {
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].topic == topic {
			return all[i].payload
		}
	}
	return nil
}

// shortWords abbreviates the identifiers and addresses in a text, and long base64.
func shortWords(text string) string {
	return longBase64.ReplaceAllString(hexWords.ReplaceAllStringFunc(text, short), "$1…")
}

var (
	hexWords   = regexp.MustCompile(`(I|dev_|FWD_)[0-9a-f]{16,}`)
	longBase64 = regexp.MustCompile(`([0-9A-Za-z+/]{16})[0-9A-Za-z+/=]{48,}`)
)

// short abbreviates identifiers and addresses: the first and last four
// characters of what follows the prefix.
func short(text string) string {
	prefix := ""
	for _, p := range []string{"I", "dev_", "FWD_"} {
		if strings.HasPrefix(text, p) {
			prefix = p
			break
		}
	}
	rest := text[len(prefix):]
	if len(rest) < 16 || strings.Trim(rest, "0123456789abcdef") != "" {
		return text
	}
	return prefix + rest[:4] + "…" + rest[len(rest)-4:]
}

// shortRoute writes a route with abbreviated addresses.
func shortRoute(r route.Route) string {
	hops := make([]string, len(r))
	for i, h := range r {
		hops[i] = short(h.Value)
	}
	return strings.Join(hops, " → ")
}

// shortHex is the beginning of some bytes.
func shortHex(b []byte) string {
	const most = 16
	if len(b) <= most {
		return hex.EncodeToString(b)
	}
	return hex.EncodeToString(b[:most]) + "…"
}
