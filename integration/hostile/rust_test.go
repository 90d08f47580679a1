package hostile

import (
	"context"
	"fmt"
	"path/filepath"
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

const rustMessages = 120

// stock is a stock Rust node behind an end of its own, and somebody of ours.
type stock struct {
	n    *rustpeer.Node
	id   rustpeer.Identity
	end  *end
	ours *person
}

func meetStock(t *testing.T) *stock {
	t.Helper()
	h := theHub(t)
	if h.tcp == "" {
		t.Fatal("a stock node needs the TCP port of the hub: set SEALMQ_HOSTILE_TCP to HOST:PORT, or leave its tests out with -skip Stock")
	}
	s := &stock{n: rustpeer.Start(t), ours: join(t, device.Config{})}
	s.end = newEnd(t, h.tcp, true)
	t.Cleanup(func() { checkStockMemory(t, s.n) })
	s.id = s.n.Identity("me")
	s.n.Connect("hub", s.end.addr())
	s.n.Worker("echo", "settle", "hub")
	return s
}

// accepted waits for the channel that a peer who has dialled sees already.
func (p *person) accepted(t *testing.T) *device.Accepted {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for ctx := within(t); ctx.Err() == nil; <-tick.C {
		if all := p.node.Accepted(); len(all) == 1 {
			return all[0]
		}
	}
	t.Fatal("no channel was accepted")
	return nil
}

// listen makes the stock node reachable.
func (s *stock) listen(t *testing.T) route.Route {
	t.Helper()
	s.n.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: "me", Open: []string{"hub"}, Trust: []string{s.ours.id.Identifier().String()}})
	s.n.Worker("sink", plain, "listener")
	relay, err := s.n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	return route.To(relay.Address, "listener")
}

// toOurs is a dial to our listener.
func (s *stock) toOurs(name string) rustpeer.DialConfig {
	return rustpeer.DialConfig{
		Name: name, Identity: "me", Route: []string{"@hub", s.ours.fwd.Address(), "listener"},
		Trust: []string{s.ours.id.Identifier().String()},
	}
}

func (s *stock) dialled(t *testing.T, to route.Route) *device.Channel {
	t.Helper()
	ch, err := s.ours.node.Dial(within(t), to, channel.TrustIdentifiers(s.identifier(t)), device.NoHeal())
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func (s *stock) identifier(t *testing.T) identity.Identifier {
	t.Helper()
	id, err := identity.ParseIdentifier(s.id.Identifier)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// sender is our end of a channel.
type sender interface {
	Send(ctx context.Context, address string, payload []byte) error
	Done() <-chan struct{}
}

// fence is sent after an attack.
const fence = "after the attack"

// exchange has both sides send under an attack at the stock node's end, where it and
// ours accept that many messages at least.
func (s *stock) exchange(t *testing.T, a attack, ended func(), ch sender, stockTo string, least arrivals) {
	t.Helper()
	ours, theirs := texts("ours", rustMessages), texts("theirs", rustMessages)
	s.end.set(a)
	var all sync.WaitGroup
	all.Go(func() {
		for _, m := range ours {
			if err := ch.Send(within(t), plain, []byte(m)); err != nil {
				t.Errorf("ours sends: %v", err)
				return
			}
		}
	})
	all.Go(func() {
		for _, m := range theirs {
			if err := s.n.Send([]string{stockTo, plain}, nil, []byte(m)); err != nil {
				t.Errorf("the stock node sends: %v", err)
				return
			}
		}
	})
	all.Wait()
	s.end.await("the exchange", func([2][]route.Frame, [2][]route.Frame) bool {
		return s.end.count[up] >= rustMessages && s.end.count[down] >= rustMessages
	})
	if ended != nil {
		ended()
	}
	s.end.set(nil)
	// What each hands on before the fence is all there is, unless the channel is over.
	if err := s.n.Send([]string{stockTo, sure}, nil, []byte(fence)); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := within(t); len(s.ours.received(sure)) == 0; <-tick.C {
		select {
		case <-ch.Done():
		case <-limit.Done():
			t.Fatal("neither a message nor the end of the channel arrives")
		default:
			continue
		}
		break
	}
	ours = append(ours, fence)
	_ = ch.Send(within(t), plain, []byte(fence)) // fails when the channel is over
	var got []string
	for !slices.Contains(got, rustpeer.Digest([]byte(fence))) {
		m, err := s.n.Next(soon(t), plain)
		if err != nil {
			break
		}
		got = append(got, m.SHA256)
	}
	digests := make([]string, len(ours))
	for i, m := range ours {
		digests[i] = rustpeer.Digest([]byte(m))
	}
	part(t, "stock", digests, got, false, least.stock)
	part(t, "ours", theirs, s.ours.received(plain), true, least.ours)
	if end := digests[len(digests)-1]; least.fence && !slices.Contains(got, end) {
		t.Error("the stock node does not get what is sent after the attack")
	}
}

// arrivals are how many messages of rustMessages an attack lets through, and whether the
// channel outlives it. Ours does not wait for late ones for ever, so on a busy machine
// fewer may do.
type arrivals struct {
	stock, ours int
	fence       bool
}

var leastStock = map[string]arrivals{
	"drop":                      {100, 100, true},
	"delay all":                 {110, 100, true}, // what comes while it ends is lost
	"reorder within the window": {rustMessages, 60, true},
	"reorder beyond the window": {16, 0, false},
}

// settled asks the node's plain echo worker through the hub, on the way that the
// frames under attack took.
func (s *stock) settled(t *testing.T) {
	t.Helper()
	relay, err := s.n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.ours.node.Request(within(t), route.To(relay.Address, "settle"), []byte("settled?")); err != nil {
		t.Fatal(err)
	}
}

// TestStock attacks channels between a stock node and one of ours, in both roles.
func TestStock(t *testing.T) {
	attacks := map[string]func(e *end) (attack, func()){
		"drop": func(*end) (attack, func()) {
			return func(p *passage) [][]byte {
				if p.n%7 == 3 {
					return nil
				}
				return asIs(p)
			}, nil
		},
		"delay all": func(e *end) (attack, func()) {
			var h held
			return func(p *passage) [][]byte {
				h[p.way] = append(h[p.way], p.body)
				return nil
			}, h.letGo(e)
		},
		"duplicate and replay": func(*end) (attack, func()) {
			r := dice()
			return func(p *passage) [][]byte {
				old := p.at.tape[p.way]
				return [][]byte{p.body, p.body, encode(old[r.IntN(len(old))])}
			}, nil
		},
		"reorder within the window": reorder(8),
		"reorder beyond the window": reorder(80),
		"forge":                     forge,
		"forged return routes":      forgeReturns,
		"past the channel": func(*end) (attack, func()) {
			return func(p *passage) [][]byte { // to workers of the node that are open to the channel alone
				forged := route.Frame{Onward: route.To(plain), Return: p.Return, Payload: []byte("forged")}
				return [][]byte{encode(forged), p.body}
			}, nil
		},
		"change": func(*end) (attack, func()) {
			return func(p *passage) [][]byte {
				var out [][]byte
				step := max(1, len(p.Payload)/16)
				for i := p.n % step; i < len(p.Payload); i += step {
					b := append([]byte(nil), p.Payload...)
					b[i] ^= 1 << (i % 8)
					out = append(out, p.with(b), p.with(p.Payload[:i]))
				}
				return append(out, p.body)
			}, nil
		},
		"reflect": func(*end) (attack, func()) {
			return func(p *passage) [][]byte {
				if back := p.at.tape[p.way.other()]; len(back) > 0 {
					to := back[len(back)-1]
					p.at.sendLocked(p.way.other(), encode(route.Frame{Onward: to.Onward, Return: to.Return, Payload: p.Payload}))
				}
				return asIs(p)
			}, nil
		},
	}
	for name, a := range attacks {
		least, some := leastStock[name]
		if !some {
			least = arrivals{rustMessages, rustMessages, true}
		}
		t.Run(name, func(t *testing.T) {
			t.Run("as initiator", func(t *testing.T) {
				t.Parallel()
				s := meetStock(t)
				s.ours.listen(channel.TrustIdentifiers(s.identifier(t)))
				ch, err := s.n.Dial(s.toOurs("ch"))
				if err != nil {
					t.Fatal(err)
				}
				s.n.Worker("sink", plain, "ch")
				acc := s.ours.accepted(t)
				act, ended := a(s.end)
				s.exchange(t, act, ended, acc, ch.Encryptor, least)
			})
			t.Run("as responder", func(t *testing.T) {
				t.Parallel()
				s := meetStock(t)
				ch := s.dialled(t, s.listen(t))
				act, ended := a(s.end)
				enc := s.n.WaitChannels("", 1)[0].Encryptor
				s.exchange(t, act, ended, ch, enc, least)
			})
		})
	}
}

// sealedKey is how long the initiator's key is in message 3, which is all that a stock
// responder tries without consequence.
const sealedKey = 48

// TestStockHandshakes attacks the handshakes of a stock node.
func TestStockHandshakes(t *testing.T) {
	t.Run("forged, and the conversation again", func(t *testing.T) {
		t.Parallel()
		s := meetStock(t)
		to := s.listen(t)
		ahead := 0
		s.end.set(func(p *passage) [][]byte {
			if p.way == up || p.n > 1 {
				return asIs(p)
			}
			// Ahead of the genuine one: of message 1 no more than our initiator looks at
			// answers, of message 3 one for every third byte of the sealed key; what is
			// behind that is another test's business.
			step, end := 16, len(p.Payload)
			if p.n == 1 {
				step, end = 3, sealedKey
			}
			var out [][]byte
			for i := 0; i < end; i += step {
				b := append([]byte(nil), p.Payload...)
				b[i] ^= 1 << (i % 8)
				out = append(out, p.with(b))
			}
			ahead += len(out)
			out = append(out, p.body)
			if p.n == 1 { // and afterwards
				out = append(out, p.body, out[0])
			}
			return out
		})
		ch := s.dialled(t, to)
		sent := texts("ours", 40)
		for _, m := range sent {
			if err := ch.Send(within(t), plain, []byte(m)); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for range sent {
			got = append(got, s.n.MustNext(plain).SHA256)
		}
		s.end.set(nil)
		for range 2 {
			for _, f := range s.end.frames(down) {
				s.end.send(down, f)
			}
		}
		s.settled(t)
		for s.n.Pending(plain) > 0 {
			got = append(got, s.n.MustNext(plain).SHA256)
		}
		digests := make([]string, len(sent))
		for i, m := range sent {
			digests[i] = rustpeer.Digest([]byte(m))
		}
		part(t, "stock", digests, got, false, len(sent))
		s.end.mu.Lock()
		if ahead != 2+sealedKey/3 {
			t.Errorf("%d forged messages came ahead", ahead)
		}
		s.end.mu.Unlock()
		// And it answers still.
		if again := s.dialled(t, to); again.Peer().Identifier != s.identifier(t) {
			t.Error("another peer")
		}
	})
	t.Run("forged payload of message 3", func(t *testing.T) {
		t.Parallel()
		s := meetStock(t)
		to := s.listen(t)
		s.end.set(func(p *passage) [][]byte {
			if p.way == up || p.n != 1 {
				return asIs(p)
			}
			b := slices.Clone(p.Payload)
			b[sealedKey] ^= 1
			return [][]byte{p.with(b), p.body}
		})
		// A stock responder has taken the key of the forged message, and is at a loss with
		// the genuine one: the channel comes to nothing, and the next one is good.
		ch := s.dialled(t, to)
		if err := ch.Send(within(t), plain, []byte("lost")); err != nil {
			t.Fatal(err)
		}
		s.end.await("the message", func([2][]route.Frame, [2][]route.Frame) bool { return s.end.count[down] > 2 })
		s.end.set(nil)
		if err := s.dialled(t, to).Send(within(t), plain, []byte(fence)); err != nil {
			t.Fatal(err)
		}
		if got := s.n.MustNext(plain); got.SHA256 != rustpeer.Digest([]byte(fence)) {
			t.Error("the stock node accepted another message")
		}
		if n := len(s.n.WaitChannels("", 1)); n != 1 {
			t.Errorf("the stock node has %d channels", n)
		}
	})
	t.Run("man in the middle", func(t *testing.T) {
		t.Parallel()
		s := meetStock(t)
		s.ours.listen(channel.TrustEveryone)
		mallory := join(t, device.Config{}).listen(channel.TrustEveryone)
		s.end.set(func(p *passage) [][]byte {
			if p.way == up && p.n == 0 {
				return [][]byte{encode(route.Frame{Onward: mallory.at(), Return: p.Return, Payload: p.Payload})}
			}
			return asIs(p)
		})
		dial := s.toOurs("ch")
		dial.Timeout = refusalTime
		if _, err := s.n.Dial(dial); err == nil {
			t.Error("the stock node takes mallory for another")
		}
		if n := mallory.node.Stats().Channels.Accepted; n != 0 {
			t.Error("mallory has a channel")
		}
		s.end.set(nil)
		if _, err := s.n.Dial(s.toOurs("again")); err != nil {
			t.Error(err)
		}
	})
	t.Run("forged message 2", func(t *testing.T) {
		t.Parallel()
		s := meetStock(t)
		s.ours.listen(channel.TrustIdentifiers(s.identifier(t)))
		r := dice()
		met := make(map[route.Address]bool) // what comes first to an address is message 2
		for i := range 8 {
			s.end.set(func(p *passage) [][]byte {
				if p.way == up || met[p.Onward[0]] {
					return asIs(p)
				}
				met[p.Onward[0]] = true
				b := slices.Clone(p.Payload)
				if at := r.IntN(len(b)); i%2 == 0 {
					b[at] ^= 1 << r.IntN(8)
				} else {
					b = b[:at]
				}
				return [][]byte{p.with(b)}
			})
			dial := s.toOurs(fmt.Sprint(i))
			dial.Timeout = refusalTime / 10
			if _, err := s.n.Dial(dial); err == nil {
				t.Error("the stock node has a channel of a forged handshake")
			}
		}
		s.end.set(nil)
		if _, err := s.n.Dial(s.toOurs("again")); err != nil {
			t.Error(err)
		}
		s.n.WaitChannels("", 1)
	})
	t.Run("the conversation again, as initiator", func(t *testing.T) {
		t.Parallel()
		s := meetStock(t)
		s.ours.listen(channel.TrustIdentifiers(s.identifier(t)))
		if _, err := s.n.Dial(s.toOurs("ch")); err != nil {
			t.Fatal(err)
		}
		s.n.Worker("sink", plain, "ch")
		acc := s.ours.accepted(t)
		for _, m := range texts("ours", 40) {
			if err := acc.Send(within(t), plain, []byte(m)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 40 {
			if got := s.n.MustNext(plain); got.SHA256 != rustpeer.Digest([]byte(text("ours", i))) {
				t.Errorf("message %d is another", i)
			}
		}
		frames := s.end.frames(down)
		for range 2 {
			for _, f := range frames {
				s.end.send(down, f)
			}
		}
		if err := acc.Send(within(t), plain, []byte(fence)); err != nil {
			t.Fatal(err)
		}
		if got := s.n.MustNext(plain); got.SHA256 != rustpeer.Digest([]byte(fence)) || s.n.Pending(plain) != 0 {
			t.Error("the stock node accepted a message twice")
		}
		s.n.WaitChannels("", 1)
	})
}

// TestStockSwappedChannels swaps payloads between two channels to a stock node: what
// was sealed for one opens in no other.
func TestStockSwappedChannels(t *testing.T) {
	t.Parallel()
	s := meetStock(t)
	to := s.listen(t)
	chans := map[string]*device.Channel{"one": s.dialled(t, to), "two": s.dialled(t, to)}
	var last *passage
	swaps := 0
	s.end.set(func(p *passage) [][]byte {
		if p.way == up || last == nil || last.Onward[0] == p.Onward[0] {
			if p.way == down {
				last = p
			}
			return asIs(p)
		}
		q := last
		last = nil
		swaps++
		return [][]byte{p.with(q.Payload), q.with(p.Payload), p.body}
	})
	var digests []string
	for i := range rustMessages {
		for name, ch := range chans {
			if err := ch.Send(within(t), plain, []byte(text(name, i))); err != nil {
				t.Fatal(err)
			}
			digests = append(digests, rustpeer.Digest([]byte(text(name, i))))
		}
	}
	s.end.await("the messages", func([2][]route.Frame, [2][]route.Frame) bool { return s.end.count[down] >= 2*rustMessages })
	s.end.set(nil)
	s.settled(t)
	var got []string
	for s.n.Pending(plain) > 0 {
		got = append(got, s.n.MustNext(plain).SHA256)
	}
	part(t, "stock", digests, got, false, len(digests))
	s.end.mu.Lock()
	defer s.end.mu.Unlock()
	if swaps < 10 {
		t.Errorf("only %d swaps", swaps)
	}
}

// TestStockHistories shows a stock node a history that is older than the one it has
// seen, and one that forks from it.
func TestStockHistories(t *testing.T) {
	t.Parallel()
	v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
	if err != nil {
		t.Fatal(err)
	}
	victim, err := v.Create("victim")
	if err != nil {
		t.Fatal(err)
	}
	old, fork := copyOf(t, v, "victim"), copyOf(t, v, "victim")
	for _, p := range []*identity.Private{victim, fork} {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	s := meetStock(t)
	s.n.Listener(rustpeer.ListenerConfig{Address: "listener", Identity: "me", Open: []string{"hub"}, Trust: []string{victim.Identifier().String()}})
	relay, err := s.n.Relay("@hub", "")
	if err != nil {
		t.Fatal(err)
	}
	try := func(p *identity.Private, patience time.Duration) error {
		ctx, cancel := context.WithTimeout(within(t), patience)
		defer cancel()
		// Over TCP, where the hub does not ask who that is.
		who := joinAt(t, newEnd(t, theHub(t).tcp, true), device.Config{Identity: p})
		ch, err := who.node.Dial(ctx, route.To(relay.Address, "listener"), channel.TrustIdentifiers(s.identifier(t)), device.NoHeal())
		if err != nil {
			return err
		}
		// A stock node that refuses says nothing: only an answer shows that it has not.
		_, err = ch.Request(ctx, "inside", []byte("settled?"))
		return err
	}
	s.n.Worker("echo", "inside", "listener")
	if err := try(victim, patience); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*identity.Private{"older": old, "forked": fork} {
		if err := try(p, refusalTime); err == nil {
			t.Errorf("the stock node takes the %s history", name)
		}
	}
	if err := try(victim, patience); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestStockFlood floods a stock node's listener with first messages, and its channel
// with frames of up to 16 MiB; it can be dialled and spoken to all the while.
func TestStockFlood(t *testing.T) {
	t.Parallel()
	s := meetStock(t)
	allowHeap(t, 8*route.MaxFrame)
	to := s.listen(t)
	ch := s.dialled(t, to)
	frames := s.end.frames(down)
	first, later := frames[0], frames[len(frames)-1]
	for i := range 300 {
		f := first
		f.Payload = append([]byte(nil), first.Payload...)
		if i%2 == 1 { // a key of its own
			f.Payload[i%len(f.Payload)] ^= byte(i)
		}
		s.end.send(down, f)
	}
	for _, size := range []int{256 << 10, 4 << 20, 16<<20 - 1024} {
		s.end.send(down, route.Frame{Onward: later.Onward, Return: later.Return, Payload: make([]byte, size)})
	}
	for i, c := range []*device.Channel{ch, s.dialled(t, to)} {
		m := text("flood", i)
		if err := c.Send(within(t), plain, []byte(m)); err != nil {
			t.Fatal(err)
		}
		if got := s.n.MustNext(plain); got.SHA256 != rustpeer.Digest([]byte(m)) {
			t.Errorf("channel %d: another message", i)
		}
	}
	s.settled(t)
}
