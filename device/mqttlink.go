package device

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// goodbyeTime bounds how long an orderly end of a connection may take.
const goodbyeTime = time.Second

// never is longer than any connection waits; the guard has its own clock.
const never = 365 * 24 * time.Hour

// mqttConfig is what connections to one hub have in common.
type mqttConfig struct {
	hub       string // the hub's URL, for errors
	clientID  string
	root      topics.Root
	keepAlive time.Duration // longest silence of this side
	opening   time.Duration // longest wait for CONNACK and for SUBACK
	writeWait time.Duration // longest time for one write to the network
	maxPacket int
	log       *slog.Logger
	// login makes the credentials of one attempt. It may depend on the TLS
	// connection, since that is finished first.
	login func(ctx context.Context, state *tls.ConnectionState) (user, password string, err error)
}

// mqttDialer makes MQTT links. Each has a connection and a client of its own: the
// client reconnecting by itself would complete the tokens of what it never sent.
type mqttDialer struct {
	cfg       mqttConfig
	transport *transport
}

// mqttLink is one MQTT connection.
type mqttLink struct {
	cfg     *mqttConfig
	ev      linkEvents
	client  mqtt.Client
	guard   *guard
	facts   linkInfo
	outbox  string // topic
	inbox   string // topic
	stopped chan struct{}

	// publish is held while a packet is handed to the client, and by whoever is
	// about to let the client know that its connection has ended: it would leave
	// a publisher waiting.
	publish sync.Mutex
	dead    bool

	endOnce sync.Once
	ended   chan struct{}
	cause   error // set before ended is closed

	mu      sync.Mutex
	current uint64            // token of the packet being published
	tokens  map[uint16]uint64 // packet id to token, until PUBACK
	came    uint64            // publishes read
	handled uint64            // of those
	behind  []behind          // acknowledgements that wait for publishes before them
}

// behind is an acknowledgement that was read after some publishes, which may tell
// what became of the packet. It counts once they are handled.
type behind struct{ token, after uint64 }

func (d *mqttDialer) dial(ctx context.Context, ev linkEvents) (link, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.opening, tooLate(d.cfg.hub, d.cfg.opening))
	defer cancel()
	conn, state, err := d.transport.open(ctx)
	if err != nil {
		return nil, openError(ctx, d.cfg.hub, err)
	}
	user, password, err := d.cfg.login(ctx, state)
	if err != nil {
		_ = conn.Close()
		return nil, refused(fmt.Errorf("device: credentials for the hub: %w", err))
	}
	l := &mqttLink{
		cfg: &d.cfg, ev: ev,
		facts:  linkInfo{acks: true, hello: true, tls: state, remote: conn.RemoteAddr().String()},
		outbox: d.cfg.root.Out(d.cfg.clientID), inbox: d.cfg.root.In(d.cfg.clientID),
		stopped: make(chan struct{}), ended: make(chan struct{}),
		tokens: make(map[uint16]uint64),
	}
	idle := d.cfg.keepAlive + d.cfg.keepAlive/2 + d.cfg.writeWait
	l.guard = newGuard(conn, d.cfg.maxPacket, d.cfg.opening, idle, d.cfg.writeWait, l.lost)
	l.guard.onPuback, l.guard.onPublish = l.puback, l.published
	l.client = l.newClient(user, password)
	if err := l.connect(ctx); err != nil {
		l.guard.abort()
		<-l.guard.done
		return nil, err
	}
	if err := l.subscribe(ctx); err != nil {
		l.close(false)
		return nil, err
	}
	return l, nil
}

// openError explains why no connection came about.
func openError(ctx context.Context, hub string, err error) error {
	switch cause := context.Cause(ctx); {
	case isPermanent(err), cause == nil && errors.Is(err, ErrHubAway):
		return err
	case cause == nil:
		return fmt.Errorf("%w at %s: %w", ErrHubAway, hub, err)
	case errors.Is(cause, ErrHubAway):
		return cause
	default:
		return ctxError(ctx, "connecting to "+hub)
	}
}

// connectionURL stands for the connection that is there already: the client only
// takes the scheme and credentials from a URL.
const connectionURL = "tcp://hub.invalid:1883"

func (l *mqttLink) newClient(user, password string) mqtt.Client {
	o := mqtt.NewClientOptions().
		AddBroker(connectionURL).
		SetCustomOpenConnectionFn(func(*url.URL, mqtt.ClientOptions) (net.Conn, error) { return l.guard, nil }).
		SetClientID(l.cfg.clientID).
		SetUsername(user).
		SetPassword(password).
		SetProtocolVersion(4).
		SetCleanSession(true).
		SetAutoReconnect(false).
		SetConnectRetry(false).
		SetResumeSubs(false).
		SetOrderMatters(true).
		SetStore(receipts{l}).
		SetKeepAlive(l.cfg.keepAlive).
		SetPingTimeout(never). // the guard watches for silence
		SetConnectTimeout(never).
		SetWriteTimeout(l.cfg.writeWait).
		SetDefaultPublishHandler(l.received).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) {
			l.lost(err) // known already, unless the client could not parse something
			close(l.stopped)
		})
	return mqtt.NewClient(o)
}

// connect sends CONNECT and waits for CONNACK.
func (l *mqttLink) connect(ctx context.Context) error {
	token := l.client.Connect()
	nudge := time.NewTimer(nudgeAfter)
	defer nudge.Stop()
	for waiting := true; waiting; {
		select {
		case <-nudge.C:
			_, _ = l.guard.Write(mqttNudge(l.outbox)) // never fails
		case <-token.Done():
			waiting = false
		case <-ctx.Done():
			l.guard.abort()
			<-token.Done()
			if token.Error() == nil { // answered in the same moment
				l.close(false)
			}
			return openError(ctx, l.cfg.hub, context.Cause(ctx))
		}
	}
	if token.Error() == nil {
		return nil
	}
	code := byte(packets.ErrNetworkError)
	if t, ok := token.(*mqtt.ConnectToken); ok {
		code = t.ReturnCode()
	}
	return l.refusal(code)
}

// refusal explains a CONNACK code (MQTT 3.1.1, 3.2.2.3).
func (l *mqttLink) refusal(code byte) error {
	switch code {
	case packets.ErrRefusedBadProtocolVersion:
		return permanent(fmt.Errorf("%w: it does not speak MQTT 3.1.1", ErrHubRefused))
	case packets.ErrRefusedIDRejected:
		return refused(fmt.Errorf("%w the client id %s", ErrHubRefused, l.cfg.clientID))
	case packets.ErrRefusedServerUnavailable:
		return ErrHubBusy
	case packets.ErrRefusedBadUsernameOrPassword:
		return refused(fmt.Errorf("%w (give those that the hub's operator has set up)", ErrBadCredentials))
	case packets.ErrRefusedNotAuthorised:
		// Without the suffix: lists and accounts name identifiers.
		identifier, _, _ := strings.Cut(l.cfg.clientID, "-")
		return refused(fmt.Errorf("%w; ask the hub's operator to add %s", ErrNotAllowed, identifier))
	default:
		<-l.ended
		return unanswered(l.cfg.hub, l.cause)
	}
}

// subscribe asks for the inbox.
func (l *mqttLink) subscribe(ctx context.Context) error {
	token := l.client.Subscribe(l.inbox, 1, nil)
	select {
	case <-token.Done():
	case <-l.ended:
		return fmt.Errorf("%w: it ended the connection before it answered SUBSCRIBE: %w", ErrNoAnswer, l.cause)
	case <-ctx.Done():
		return openError(ctx, l.cfg.hub, context.Cause(ctx))
	}
	if err := token.Error(); err != nil {
		return fmt.Errorf("%w: subscribing to the inbox: %w", ErrHubAway, err)
	}
	if t, ok := token.(*mqtt.SubscribeToken); ok {
		if qos, ok := t.Result()[l.inbox]; ok && qos > 2 {
			return refused(fmt.Errorf("%w, %s: the topic root %q may not be the hub's", ErrInboxRefused, l.inbox, l.cfg.root))
		}
	}
	return nil
}

// received runs on the client's router goroutine. The client acknowledges when
// it returns.
func (l *mqttLink) received(_ mqtt.Client, m mqtt.Message) {
	defer l.caughtUp()
	if m.Topic() != l.inbox {
		l.cfg.log.Debug("message on a foreign topic ignored", "topic", m.Topic())
		return
	}
	class := route.Stored
	if m.Qos() == 0 {
		class = route.Transient
	}
	l.ev.frames(m.Payload(), true, class)
}

func (l *mqttLink) send(p *packet) error {
	l.guard.waitRoom(l.ended)
	payload := p.frames[0]
	if len(p.frames) > 1 {
		payload = bytes.Join(p.frames, nil)
	}
	qos := byte(1)
	if p.class == route.Transient {
		qos = 0
	}
	l.publish.Lock()
	defer l.publish.Unlock()
	if l.dead {
		return errLinkDown
	}
	l.mu.Lock()
	l.current = p.token
	l.mu.Unlock()
	token := l.client.Publish(l.outbox, qos, false, payload)
	select {
	case <-token.Done():
		return token.Error()
	default:
		return nil
	}
}

// receipts stands in for the client's message store, which is told the id of each
// packet before that is written. It stores nothing: what is unacknowledged is the
// outbox's to know.
type receipts struct{ l *mqttLink }

func (r receipts) Put(_ string, p packets.ControlPacket) {
	pub, ok := p.(*packets.PublishPacket)
	if !ok || pub.Qos == 0 || pub.TopicName != r.l.outbox {
		return
	}
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	if r.l.current != 0 {
		r.l.tokens[pub.MessageID] = r.l.current
		r.l.current = 0
	}
}

func (receipts) Open()                            {}
func (receipts) Get(string) packets.ControlPacket { return nil }
func (receipts) All() []string                    { return nil }
func (receipts) Del(string)                       {}
func (receipts) Close()                           {}
func (receipts) Reset()                           {}

// takeToken returns the token of an acknowledged packet, if it counts already.
func (l *mqttLink) takeToken(id uint16) (uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	token, ok := l.tokens[id]
	delete(l.tokens, id)
	if ok && l.handled < l.came {
		l.behind = append(l.behind, behind{token, l.came})
		ok = false
	}
	return token, ok
}

// puback runs on the reading goroutine. An id that nobody waits for is ignored.
func (l *mqttLink) puback(id uint16) {
	if token, ok := l.takeToken(id); ok {
		l.ev.acked(token)
	}
}

// published runs on the reading goroutine for each publish.
func (l *mqttLink) published() {
	l.mu.Lock()
	l.came++
	l.mu.Unlock()
}

// caughtUp counts a publish as handled, on the client's router goroutine.
func (l *mqttLink) caughtUp() {
	l.mu.Lock()
	l.handled++
	n := 0
	for n < len(l.behind) && l.behind[n].after <= l.handled {
		n++
	}
	due := l.behind[:n:n]
	l.behind = l.behind[n:]
	l.mu.Unlock()
	for _, b := range due {
		l.ev.acked(b.token)
	}
}

// lost runs on the reading goroutine before the client hears of the end of the
// connection, and again when the client has ended.
func (l *mqttLink) lost(err error) {
	l.publish.Lock()
	l.dead = true
	l.publish.Unlock()
	if cause := l.guard.cause(); cause != nil {
		err = cause
	}
	l.end(err)
}

func (l *mqttLink) end(err error) {
	l.endOnce.Do(func() {
		l.cause = err
		close(l.ended)
	})
}

func (l *mqttLink) done() <-chan struct{} { return l.ended }
func (l *mqttLink) err() error            { return l.cause }
func (l *mqttLink) info() linkInfo        { return l.facts }

func (l *mqttLink) close(goodbye bool) {
	l.publish.Lock()
	lost := l.dead
	l.dead = true
	l.publish.Unlock()
	if goodbye && !lost {
		l.client.Disconnect(uint(goodbyeTime.Milliseconds()))
		l.guard.abort()
	} else {
		l.guard.abort()
		limit := time.NewTimer(goodbyeTime)
		defer limit.Stop()
		select {
		case <-l.stopped:
		case <-limit.C:
		}
	}
	l.end(ErrClosed)
	<-l.guard.done
}

var _ link = (*mqttLink)(nil)
