package matrix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// ourHub is a hub in this process, with a data folder.
type ourHub struct {
	t   *testing.T
	cfg broker.Config
	h   *broker.Hub
}

func startOurHub(t *testing.T) hub {
	t.Helper()
	h := &ourHub{t: t, cfg: broker.Config{
		MQTT: []string{"127.0.0.1:0"}, TCP: "127.0.0.1:0", TCPAliases: true, Data: filepath.Join(t.TempDir(), "hub"),
	}}
	h.start()
	t.Cleanup(h.stop)
	return h
}

func (h *ourHub) start() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	if h.h, err = broker.New(h.cfg); err != nil {
		h.t.Fatal(err)
	}
	if err := h.h.Start(ctx); err != nil {
		h.t.Fatal(err)
	}
	h.cfg.MQTT, h.cfg.TCP = []string{h.h.MQTTAddr().String()}, h.h.TCPAddr().String()
}

func (h *ourHub) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := h.h.Shutdown(ctx); err != nil {
		h.t.Error(err)
	}
}

func (h *ourHub) mqtt() string { return h.h.MQTTURL() }
func (h *ourHub) tcp() string  { return h.h.TCPAddr().String() }
func (h *ourHub) restart() {
	h.t.Helper()
	h.stop()
	h.start()
}

// end is either end of a channel of the device library.
type end interface {
	Address() string
	Peer() channel.Peer
	Send(ctx context.Context, address string, payload []byte) error
	Request(ctx context.Context, address string, payload []byte) (*device.Message, error)
	RefreshCredentials(ctx context.Context, credential []byte) error
	Close() error
	Done() <-chan struct{}
	Err() error
}

var _, _ end = (*device.Channel)(nil), (*device.Accepted)(nil)

// goParty is a program on the device library.
type goParty struct {
	t           *testing.T
	id          *identity.Private
	overTCP     bool
	authorities []*identity.Identity
	required    *identity.Identity // whose credentials peers need; nil: none
	registry    identity.Registry
	credential  atomic.Pointer[[]byte]

	node    *device.Node
	online  chan struct{}
	relay   *device.Forwarder
	dialled *device.Channel
	inside  *device.Channel
	cur     end    // the channel, once up has seen it
	seen    string // the last one accepted that up has seen
}

func goOnMQTT(t *testing.T) party { return newGoParty(t, false) }
func goOnTCP(t *testing.T) party  { return newGoParty(t, true) }

func newGoParty(t *testing.T, overTCP bool) *goParty {
	t.Helper()
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return &goParty{t: t, id: id, overTCP: overTCP, online: make(chan struct{}, 16), registry: identity.NewMemoryRegistry(0)}
}

func (p *goParty) ctx() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

func (p *goParty) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *goParty) identifier() string { return p.id.Identifier().String() }
func (p *goParty) history() []byte    { return p.id.Identity().ChangeHistory() }

func (p *goParty) rotate() {
	p.t.Helper()
	p.must(p.id.Rotate())
}

func (p *goParty) issue(subject []byte, role string) []byte {
	p.t.Helper()
	who, err := identity.Import(subject)
	p.must(err)
	c, err := p.id.IssueCredential(who, map[string]string{"role": role}, 1, time.Hour)
	p.must(err)
	return c
}

func (p *goParty) accept(authority []byte) {
	p.t.Helper()
	a, err := identity.Import(authority)
	p.must(err)
	p.authorities = append(p.authorities, a)
}

func (p *goParty) require(authority []byte) {
	p.t.Helper()
	var err error
	p.required, err = identity.Import(authority)
	p.must(err)
}

// knows returns how many changes of an identity's history the party knows.
func (p *goParty) knows(identifier string) int {
	p.t.Helper()
	id, err := identity.ParseIdentifier(identifier)
	p.must(err)
	known, ok := p.registry.Get(id)
	if !ok {
		return 0
	}
	return len(known.Changes())
}

func historyLen(t *testing.T, history []byte) int {
	t.Helper()
	id, err := identity.Import(history)
	if err != nil {
		t.Fatal(err)
	}
	return len(id.Changes())
}

func (p *goParty) show(credential []byte) {
	p.t.Helper()
	p.credential.Store(&credential)
	if p.cur != nil {
		ctx, cancel := p.ctx()
		defer cancel()
		p.must(p.cur.RefreshCredentials(ctx, credential))
	}
}

func (p *goParty) roleOf(_, issuer string) string {
	for _, c := range p.cur.Peer().Credentials {
		if c.Issuer.String() == issuer {
			return c.Attributes["role"]
		}
	}
	return ""
}

func (p *goParty) connect(h hub) {
	p.t.Helper()
	url := h.mqtt()
	if p.overTCP {
		url = "tcp://" + h.tcp()
	}
	ctx, cancel := p.ctx()
	defer cancel()
	var err error
	p.node, err = device.Connect(ctx, url, device.Config{
		Identity: p.id, Authorities: p.authorities, Registry: p.registry, MailboxMessages: 4096, MailboxBytes: 256 << 20,
		Credential: func() ([]byte, error) {
			if c := p.credential.Load(); c != nil {
				return *c, nil
			}
			return nil, nil
		},
		OnEvent: func(e device.Event) {
			if e.Kind == device.EventOnline {
				select {
				case p.online <- struct{}{}:
				default:
				}
			}
		},
	})
	p.must(err)
	p.t.Cleanup(func() { _ = p.node.Close() })
	p.must(p.node.HandleFunc(echo, func(ctx context.Context, m *device.Message) {
		if err := p.node.Reply(ctx, m, m.Payload); err != nil && ctx.Err() == nil && !errors.Is(err, device.ErrPeerClosed) {
			p.t.Errorf("echo: %v", err)
		}
	}))
	<-p.online
}

// reconnect waits: a device comes back by itself.
func (p *goParty) reconnect(hub) {
	p.t.Helper()
	select {
	case <-p.online:
	case <-time.After(patience):
		p.t.Fatal("the device does not come back")
	}
}

func (p *goParty) policy(who trust) channel.Policy {
	p.t.Helper()
	all := []channel.Policy{channel.TrustEveryone}
	if p.required != nil {
		all = append(all, channel.TrustCredential(p.required, nil))
	}
	if who == nil {
		return channel.And(all...)
	}
	var ids []identity.Identifier
	for _, text := range who {
		id, err := identity.ParseIdentifier(text)
		p.must(err)
		ids = append(ids, id)
	}
	return channel.And(append(all, channel.TrustIdentifiers(ids...))...)
}

func (p *goParty) listen(who trust, alias string) []string {
	p.t.Helper()
	_, err := p.node.Listen("listener", p.policy(who))
	p.must(err)
	var opts []device.ForwarderOption
	if alias != "" {
		opts = append(opts, device.Alias(alias))
	}
	ctx, cancel := p.ctx()
	defer cancel()
	p.relay, err = p.node.CreateForwarder(ctx, "listener", opts...)
	p.must(err)
	return p.again()
}

func (p *goParty) again() []string { return []string{p.relay.Address(), "listener"} }

func (p *goParty) dial(to []string, who trust) error {
	ctx, cancel := p.ctx()
	defer cancel()
	var err error
	p.dialled, err = p.node.Dial(ctx, route.To(to...), p.policy(who))
	return err
}

// ended waits for the end of the channel that was dialled, and returns why.
func (p *goParty) ended() error {
	select {
	case <-p.dialled.Done():
		return p.dialled.Err()
	case <-time.After(patience):
		return errors.New("the channel stays")
	}
}

func (p *goParty) up() string {
	p.t.Helper()
	if p.dialled != nil {
		p.cur = p.dialled
		return p.cur.Peer().Identifier.String()
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(patience); time.Now().Before(limit); <-tick.C {
		if p.accepted() {
			return p.cur.Peer().Identifier.String()
		}
	}
	p.t.Fatalf("%d channels were accepted, want one more", len(p.node.Accepted()))
	return ""
}

// accepted takes the one channel that was accepted and that up has not seen yet.
func (p *goParty) accepted() bool {
	all := slices.DeleteFunc(p.node.Accepted(), func(a *device.Accepted) bool { return a.Address() == p.seen })
	if len(all) != 1 {
		return false
	}
	p.cur, p.seen = all[0], all[0].Address()
	return true
}

func (p *goParty) resumed() {
	p.t.Helper()
	if p.accepted() {
		return
	}
	if err := p.cur.Err(); err != nil || p.cur.Address() != p.seen {
		p.t.Fatalf("the channel has ended, and no other has come: %v", err)
	}
}

func (p *goParty) channels() int { return p.node.Stats().Channels.Channels }

func (p *goParty) send(run rustpeer.Run) {
	p.t.Helper()
	p.sendThrough(p.cur, run)
}

func (p *goParty) sendThrough(c end, run rustpeer.Run) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for i := range run.Count {
		if err := c.Send(ctx, app, run.At(i)); err != nil {
			p.t.Errorf("sending message %d: %v", i, err)
			return
		}
	}
}

func (p *goParty) next() message {
	p.t.Helper()
	ctx, cancel := p.ctx()
	defer cancel()
	m, err := p.node.Receive(ctx, app)
	if err != nil {
		p.t.Fatalf("waiting for a message: %v", err)
	}
	return message{
		size: len(m.Payload), digest: rustpeer.Digest(m.Payload), from: m.From.String(),
		answer: func(payload []byte) error {
			ctx, cancel := p.ctx()
			defer cancel()
			return p.node.Reply(ctx, m, payload)
		},
	}
}

func (p *goParty) nothing() bool {
	ctx, cancel := context.WithTimeout(context.Background(), quiet)
	defer cancel()
	_, err := p.node.Receive(ctx, app)
	return errors.Is(err, device.ErrTimeout)
}

func (p *goParty) try() error {
	p.up()
	ctx, cancel := context.WithTimeout(context.Background(), moment)
	defer cancel()
	if err := p.cur.Send(ctx, app, []byte("refused")); err != nil {
		return err
	}
	_, err := p.cur.Request(ctx, echo, []byte("refused"))
	return err
}

func (p *goParty) request(payload []byte) error {
	ctx, cancel := p.ctx()
	defer cancel()
	m, err := p.cur.Request(ctx, echo, payload)
	if err == nil && !bytes.Equal(m.Payload, payload) {
		err = fmt.Errorf("echo of %d bytes gave %d others", len(payload), len(m.Payload))
	}
	return err
}

func (p *goParty) hang() {
	p.t.Helper()
	p.must(p.cur.Close())
	p.dialled, p.cur = nil, nil
}

func (p *goParty) hungUp() {
	p.t.Helper()
	select {
	case <-p.cur.Done():
	case <-time.After(patience):
		p.t.Fatal("the channel is still up")
	}
	if err := p.cur.Err(); !errors.Is(err, device.ErrPeerClosed) {
		p.t.Errorf("the channel ended with: %v", err)
	}
	p.dialled, p.cur = nil, nil
}

func (p *goParty) listenInside() {
	p.t.Helper()
	_, err := p.node.Listen("inner", channel.TrustEveryone)
	p.must(err)
}

func (p *goParty) dialInside() error {
	ctx, cancel := p.ctx()
	defer cancel()
	var err error
	p.inside, err = p.node.Dial(ctx, route.To(p.cur.Address(), "inner"), channel.TrustEveryone)
	return err
}

func (p *goParty) sendInside(run rustpeer.Run) {
	p.t.Helper()
	p.sendThrough(p.inside, run)
}
