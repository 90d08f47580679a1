package hostile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/route"
)

// Addresses at which a person takes messages.
const (
	plain = "app"  // of Send
	sure  = "sure" // of Deliver
	echo  = "echo"
)

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func newIdentity(t *testing.T, opts ...identity.Option) *identity.Private {
	t.Helper()
	id, err := identity.Create(opts...)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// person is a program on the device library, behind an end of the switchboard.
type person struct {
	t    *testing.T
	id   *identity.Private
	node *device.Node
	end  *end
	fwd  *device.Forwarder

	mu   sync.Mutex
	got  map[string][]string
	from map[string]identity.Identifier // by message
}

// manyHandshakes are limits for tests that need more than their peers should.
var manyHandshakes = channel.Limits{Rate: 1000, Burst: 1000, HalfOpen: 4096, HalfOpenPerSource: 1024, Handshake: 10 * time.Second}

// join connects a person with what cfg says, or a new identity.
func join(t *testing.T, cfg device.Config) *person {
	t.Helper()
	return joinAt(t, newEnd(t, theHub(t).mqtt, false), cfg)
}

func joinAt(t *testing.T, e *end, cfg device.Config) *person {
	t.Helper()
	if cfg.Identity == nil {
		cfg.Identity = newIdentity(t)
	}
	p := &person{t: t, id: cfg.Identity, end: e, got: make(map[string][]string), from: make(map[string]identity.Identifier)}
	cfg.Mailboxes, cfg.MailboxMessages, cfg.MailboxBytes = []string{}, 1<<14, 64<<20
	if cfg.ChannelLimits == (channel.Limits{}) {
		cfg.ChannelLimits = manyHandshakes
	}
	scheme := "mqtt://"
	if e.tcp {
		scheme = "tcp://"
	}
	var err error
	if p.node, err = device.Connect(within(t), scheme+e.addr(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		checkGoroutines(t)
		_ = p.node.Close()
	})
	for _, addr := range []string{plain, sure} {
		p.must(p.node.HandleFunc(addr, func(_ context.Context, m *device.Message) {
			p.mu.Lock()
			p.got[addr] = append(p.got[addr], string(m.Payload))
			p.from[string(m.Payload)] = m.From
			p.mu.Unlock()
			_ = m.Ack() // its failure means that the message comes again
		}))
	}
	p.must(p.node.HandleFunc(echo, func(ctx context.Context, m *device.Message) { _ = p.node.Reply(ctx, m, m.Payload) }))
	return p
}

func (p *person) must(err error) {
	p.t.Helper()
	must(p.t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (p *person) trust() channel.Policy { return channel.TrustIdentifiers(p.id.Identifier()) }

// listen makes the person reachable.
func (p *person) listen(policy channel.Policy) *person {
	p.t.Helper()
	_, err := p.node.Listen("listener", policy)
	p.must(err)
	p.fwd, err = p.node.CreateForwarder(within(p.t), "listener")
	p.must(err)
	return p
}

func (p *person) at() route.Route { return route.To(p.fwd.Address()) }

func (p *person) received(addr string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got[addr])
}

// awaits waits until n messages have arrived.
func (p *person) awaits(t *testing.T, addr string, n int) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := within(t); len(p.received(addr)) < n; <-tick.C {
		if limit.Err() != nil {
			t.Fatalf("%d of %d messages have arrived", len(p.received(addr)), n)
		}
	}
}

// dial opens a channel to somebody who has to be who they are.
func (p *person) dial(to *person, opts ...device.DialOption) *device.Channel {
	p.t.Helper()
	ch, err := p.node.Dial(within(p.t), to.at(), to.trust(), opts...)
	if err != nil {
		p.t.Fatalf("dial: %v", err)
	}
	// On a busy machine the peer's hello comes after Dial has returned.
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := within(p.t); !ch.Confirmed(); <-tick.C {
		if limit.Err() != nil {
			p.t.Fatal("the peer does not confirm the channel")
		}
	}
	return ch
}

// works shows that messages get through between two people, once all is well.
func works(t *testing.T, from, to *person) {
	t.Helper()
	ch := from.dial(to)
	defer ch.Close()
	if err := ch.Deliver(within(t), sure, []byte("all is well")); err != nil {
		t.Fatalf("after the attack: %v", err)
	}
}

// text is message i of somebody; its length varies.
func text(who string, i int) string {
	return fmt.Sprintf("%s %d %x", who, i, rustpeer.Content(seed, uint64(i), i*37%400))
}

func texts(who string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = text(who, i)
	}
	return out
}

// part checks that got is part of sent, without repeats, and in order if that is
// promised, and has as many as the attack cannot prevent.
func part(t *testing.T, what string, sent, got []string, ordered bool, least int) {
	t.Helper()
	place := make(map[string]int, len(sent))
	for i, s := range sent {
		place[s] = i
	}
	last := -1
	seen := make(map[int]bool, len(got))
	for _, g := range got {
		i, ok := place[g]
		switch {
		case !ok:
			t.Errorf("%s: accepted %d bytes that nobody sent", what, len(g))
		case seen[i]:
			t.Errorf("%s: accepted message %d twice", what, i)
		case ordered && i < last:
			t.Errorf("%s: accepted message %d after %d", what, i, last)
		}
		seen[i], last = true, max(last, i)
	}
	if len(got) < least {
		t.Errorf("%s: accepted %d messages, want %d at least", what, len(got), least)
	}
	t.Logf("%s: %d of %d accepted", what, len(got), len(sent))
}

// conversation is two people who talk both ways during an attack.
type conversation struct {
	alice, bob *person
	ch         *device.Channel
}

func converse(t *testing.T, overTCP bool) *conversation {
	t.Helper()
	h := theHub(t)
	at := newEnd(t, h.mqtt, false)
	if overTCP {
		at = newEnd(t, h.tcp, true)
	}
	c := &conversation{alice: joinAt(t, at, device.Config{}), bob: join(t, device.Config{})}
	c.bob.listen(c.alice.trust())
	c.ch = c.alice.dial(c.bob)
	return c
}

const (
	plainMessages = 300
	sureMessages  = 60
)

// under runs the whole conversation under an attack, and after it. ended lets go of
// what the attack holds. At least so many messages of each Send arrive.
func (c *conversation) under(t *testing.T, at *end, a attack, ended func(), least int) {
	t.Helper()
	toBob, toAlice, delivered := texts("alice", plainMessages), texts("bob", plainMessages), texts("sure", sureMessages)
	at.set(a)
	var all sync.WaitGroup
	all.Go(func() {
		for _, m := range toBob {
			if err := c.ch.Send(within(t), plain, []byte(m)); err != nil {
				t.Errorf("alice sends: %v", err)
				return
			}
		}
	})
	fromBob := 0
	all.Go(func() {
		for _, m := range toAlice {
			// The channel may end, and alice make another one.
			if open := c.bob.node.Accepted(); len(open) > 0 && open[len(open)-1].Send(within(t), plain, []byte(m)) == nil {
				fromBob++
			}
		}
	})
	var sureDone sync.WaitGroup
	results := make([]error, len(delivered))
	all.Go(func() {
		for i, m := range delivered {
			started := make(chan struct{})
			sureDone.Go(func() {
				close(started)
				results[i] = c.ch.Deliver(within(t), sure, []byte(m))
			})
			<-started
		}
	})
	all.Wait()
	// All of it has been under attack before the attack ends.
	want := [2]int{up: len(toBob), down: fromBob}
	if at == c.bob.end {
		want = [2]int{up: fromBob, down: len(toBob)}
	}
	at.await("the conversation", func([2][]route.Frame, [2][]route.Frame) bool {
		return at.count[up] >= want[up] && at.count[down] >= want[down]
	})
	if ended != nil {
		ended()
	}
	at.set(nil)
	sureDone.Wait()
	c.settle(t)
	for i, err := range results {
		if err != nil {
			t.Errorf("delivery %d: %v", i, err)
		}
	}
	part(t, "alice to bob", toBob, c.bob.received(plain), true, least)
	part(t, "bob to alice", toAlice, c.alice.received(plain), true, min(least, fromBob))
	got := c.bob.received(sure)
	slices.Sort(got)
	slices.Sort(delivered)
	if !slices.Equal(got, delivered) {
		t.Errorf("%d of %d deliveries accepted, want each once", len(got), len(delivered))
	}
}

// settle asks for an echo, behind everything that was sent before.
func (c *conversation) settle(t *testing.T) {
	t.Helper()
	ctx := within(t)
	for {
		_, err := c.ch.Request(ctx, echo, []byte("settled?"))
		if err == nil {
			return
		}
		if !errors.Is(err, device.ErrInterrupted) {
			t.Fatalf("after the attack: %v", err)
		}
	}
}
