package matrix

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

// rustHub is the relay service of a stock node.
type rustHub struct {
	t    *testing.T
	n    *rustpeer.Node
	addr string
}

func startRustHub(t *testing.T) hub {
	t.Helper()
	h := &rustHub{t: t, n: rustpeer.Start(t)}
	h.addr = h.n.Listen("tcp")
	h.n.RelayService("tcp")
	return h
}

func (h *rustHub) mqtt() string { return "" }
func (h *rustHub) tcp() string  { return h.addr }

func (h *rustHub) restart() {
	h.t.Helper()
	h.n.Kill()
	h.n = rustpeer.Start(h.t)
	if err := h.n.Call(h.t.Context(), "listen", rustpeer.Args{"name": "tcp", "address": h.addr}, nil); err != nil {
		h.t.Fatal(err)
	}
	h.n.RelayService("tcp")
}

const (
	me      = "me"   // name of the identity
	slot    = "mine" // where the credential to show is
	dialled = "ch"
	inner   = "inner"
	inside  = "inside" // the channel dialled to inner

	listener = "listener"
)

// rustTimeout is how long a stock node waits in a handshake that is refused.
const rustTimeout = 5 * time.Second

// rustParty is a stock node.
type rustParty struct {
	t         *testing.T
	n         *rustpeer.Node
	id        rustpeer.Identity
	authority []byte
	slot      string // empty: nothing to show

	turn      int // counts connections
	listening trust
	listens   bool
	alias     string
	route     []string
	open      string // who reaches the workers: the listener, or the channel
	served    string // the open that the workers have
	echoing   bool   // the worker has been started
	encryptor string
}

func rust(t *testing.T) party {
	t.Helper()
	p := &rustParty{t: t, n: rustpeer.Start(t)}
	p.id = p.n.Identity(me)
	return p
}

func (p *rustParty) identifier() string { return p.id.Identifier }
func (p *rustParty) history() []byte    { return p.id.History }

func (p *rustParty) rotate() {
	p.t.Helper()
	p.id = p.n.Rotate(me)
}

func (p *rustParty) issue(subject []byte, role string) []byte {
	p.t.Helper()
	return p.n.Issue(me, subject, map[string]string{"role": role}, time.Hour)
}

func (p *rustParty) require(authority []byte) { p.accept(authority) }

func (p *rustParty) accept(authority []byte) { p.authority = authority }

func (p *rustParty) show(credential []byte) {
	p.t.Helper()
	p.slot = slot
	p.n.FillSlot(slot, credential)
}

func (p *rustParty) roleOf(peer, issuer string) string {
	p.t.Helper()
	return p.n.Attributes(peer, issuer)["role"]
}

func (p *rustParty) hubName() string { return fmt.Sprint("hub", p.turn) }

func (p *rustParty) connect(h hub) {
	p.t.Helper()
	p.n.Connect(p.hubName(), h.tcp())
}

// reconnect: a stock node does nothing by itself, so its program ends what is dead,
// connects, listens and registers again.
func (p *rustParty) reconnect(h hub) {
	p.t.Helper()
	p.turn++
	p.hang()
	p.served = ""
	p.connect(h)
	if p.listens {
		p.n.Stop(listener)
		p.listen(p.listening, p.alias)
		p.serve()
	}
}

func (p *rustParty) listen(who trust, alias string) []string {
	p.t.Helper()
	p.listens, p.listening, p.alias = true, who, alias
	p.open = listener
	p.n.Listener(rustpeer.ListenerConfig{
		Address: p.open, Identity: me, Open: []string{p.hubName()}, Trust: who, Authority: p.authority, Credential: p.slot,
	})
	relay, err := p.n.Relay("@"+p.hubName(), alias)
	if err != nil {
		p.t.Fatalf("registering a relay: %v", err)
	}
	p.route = []string{relay.Address, p.open}
	return p.route
}

func (p *rustParty) again() []string { return p.route }

func (p *rustParty) dial(to []string, who trust) error {
	p.open, p.served = dialled, "" // another channel, whatever its name
	_, err := p.n.Dial(rustpeer.DialConfig{
		Name: dialled, Identity: me, Route: append([]string{"@" + p.hubName()}, to...), Trust: who,
		Authority: p.authority, Credential: p.slot, Timeout: rustTimeout,
	})
	return err
}

func (p *rustParty) up() string {
	p.t.Helper()
	ch := p.n.WaitChannels("", 1)[0]
	p.encryptor = ch.Encryptor
	p.serve()
	return ch.Peer
}

// serve opens the workers to who comes through the listener or the channel.
func (p *rustParty) serve() {
	p.t.Helper()
	if p.served == p.open {
		return
	}
	if p.echoing { // it is open to an earlier channel or listener only
		p.n.Stop(echo)
	}
	p.n.Worker("sink", app, p.open)
	p.n.Worker("echo", echo, p.open)
	p.served, p.echoing = p.open, true
}

func (p *rustParty) resumed() {
	p.t.Helper()
	p.up()
}

func (p *rustParty) channels() int {
	p.t.Helper()
	var all []rustpeer.ChannelInfo
	if err := p.n.Call(context.Background(), "channels", nil, &all); err != nil {
		p.t.Fatal(err)
	}
	return len(all)
}

func (p *rustParty) send(run rustpeer.Run) {
	if err := p.n.Flood([]string{p.encryptor, app}, []string{app}, run); err != nil {
		p.t.Errorf("sending: %v", err)
	}
}

func (p *rustParty) try() error {
	_ = p.n.Send([]string{"@" + dialled, app}, nil, []byte("refused"))
	_, err := p.n.Request([]string{"@" + dialled, echo}, []byte("refused"), moment)
	return err
}

func (p *rustParty) next() message {
	p.t.Helper()
	m := p.n.MustNext(app)
	return message{size: m.Len, digest: m.SHA256, from: m.From, answer: func(payload []byte) error {
		return p.n.Send(m.Return, nil, payload)
	}}
}

func (p *rustParty) nothing() bool {
	ctx, cancel := context.WithTimeout(context.Background(), quiet)
	defer cancel()
	_, err := p.n.Next(ctx, app)
	return err != nil
}

func (p *rustParty) request(payload []byte) error {
	m, err := p.n.Request([]string{p.encryptor, echo}, payload, patience)
	if err == nil && m.SHA256 != rustpeer.Digest(payload) {
		err = fmt.Errorf("echo of %d bytes gave %d others", len(payload), m.Len)
	}
	return err
}

func (p *rustParty) hang() {
	p.t.Helper()
	p.n.CloseEncryptor(p.encryptor)
}

func (p *rustParty) hungUp() {
	p.t.Helper()
	p.n.WaitChannels("", 0)
}

func (p *rustParty) listenInside() {
	p.t.Helper()
	p.n.Listener(rustpeer.ListenerConfig{Address: inner, Identity: me, Open: []string{p.open}})
	p.n.Worker("sink", app, inner)
}

func (p *rustParty) dialInside() error {
	_, err := p.n.Dial(rustpeer.DialConfig{Name: inside, Identity: me, Route: []string{p.encryptor, inner}, Timeout: rustTimeout})
	return err
}

func (p *rustParty) sendInside(run rustpeer.Run) {
	p.t.Helper()
	if err := p.n.Flood([]string{"@" + inside, app}, nil, run); err != nil {
		p.t.Errorf("sending inside: %v", err)
	}
}
