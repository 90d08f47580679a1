package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// swapper gives the payloads of some frames towards an endpoint to another channel as
// well, and those of the other to the first where both end at the same endpoint. The
// genuine frames pass.
type swapper struct {
	mu    sync.Mutex
	last  *passage
	swaps int
}

func (s *swapper) attack(p *passage) [][]byte {
	if p.way == up || p.n%3 == 0 {
		return asIs(p)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.last
	if q == nil || q.at == p.at && q.Onward[0] == p.Onward[0] {
		s.last = p
		return asIs(p)
	}
	s.last = nil
	s.swaps++
	out := [][]byte{p.with(q.Payload)}
	if q.at == p.at {
		out = append(out, q.with(p.Payload))
	}
	return append(out, p.body)
}

func (s *swapper) check(t *testing.T, what string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.swaps < 10 {
		t.Errorf("%s: only %d swaps", what, s.swaps)
	}
}

// TestSwappedChannels gives the frames of one channel to another: to the responder those
// of two channels of the same initiator, and of another one; to the initiators those of
// each other, and of two channels of one. What was sealed for one opens in no other.
func TestSwappedChannels(t *testing.T) {
	t.Parallel()
	const messages = 100
	alice, carol := join(t, device.Config{}), join(t, device.Config{})
	bob := join(t, device.Config{}).listen(channel.Or(alice.trust(), carol.trust()))
	owners := map[string]*person{"one": alice, "two": alice, "carol": carol}
	chans := make(map[string]*device.Channel)
	accepted := make(map[string]*device.Accepted)
	for name, p := range owners {
		chans[name] = p.dial(bob)
		for _, a := range bob.node.Accepted() {
			if !slices.ContainsFunc(slices.Collect(maps.Values(accepted)), func(b *device.Accepted) bool { return a.Address() == b.Address() }) {
				accepted[name] = a
			}
		}
	}
	var atBob, atInitiators swapper
	bob.end.set(atBob.attack)
	alice.end.set(atInitiators.attack)
	carol.end.set(atInitiators.attack)
	for i := range messages {
		for name := range chans {
			must(t, chans[name].Send(within(t), plain, []byte(text(name, i))))
			must(t, accepted[name].Send(within(t), plain, []byte(text("to "+name, i))))
		}
	}
	must(t, errors.Join(alice.node.Flush(within(t)), bob.node.Flush(within(t)), carol.node.Flush(within(t))))
	bob.end.await("what is for bob", func([2][]route.Frame, [2][]route.Frame) bool { return bob.end.count[down] >= 3*messages })
	alice.end.await("what is for alice", func([2][]route.Frame, [2][]route.Frame) bool { return alice.end.count[down] >= 2*messages })
	carol.end.await("what is for carol", func([2][]route.Frame, [2][]route.Frame) bool { return carol.end.count[down] >= messages })
	for _, p := range []*person{alice, bob, carol} {
		p.end.set(nil)
	}
	for name, ch := range chans {
		must(t, ch.Deliver(within(t), sure, []byte(ch.Address())))
		must(t, accepted[name].Send(within(t), sure, []byte(ch.Address())))
	}
	alice.awaits(t, sure, 2)
	carol.awaits(t, sure, 1)
	his := func(to *person, prefix string, from *person) (got []string) {
		for _, g := range to.received(plain) {
			if strings.HasPrefix(g, prefix+" ") {
				got = append(got, g)
				if who := to.from[g]; who != from.id.Identifier() {
					t.Errorf("a message of %s is said to be from %v", prefix, who)
				}
			}
		}
		return got
	}
	for name, owner := range owners {
		part(t, name, texts(name, messages), his(bob, name, owner), true, messages)
		part(t, "to "+name, texts("to "+name, messages), his(owner, "to "+name, bob), true, messages)
	}
	if n := len(bob.received(plain)) + len(alice.received(plain)) + len(carol.received(plain)); n != 6*messages {
		t.Errorf("%d messages were accepted, want %d", n, 6*messages)
	}
	atBob.check(t, "at bob's")
	atInitiators.check(t, "at alice's and carol's")
}

// TestForgedNotices tells both ends of a conversation that everything they send
// comes to nothing, which is not so.
func TestForgedNotices(t *testing.T) {
	t.Parallel()
	c := converse(t, false)
	lie := func(p *passage) [][]byte {
		if p.way == down {
			return asIs(p)
		}
		for r := hubproto.ReasonUnknown; r < hubproto.ReasonTakenOver; r++ {
			n := hubproto.Notice{Reason: r, FirstHop: p.Onward[0], HasFirst: true, Count: 1}
			if len(p.Return) > 0 {
				n.LastReturn, n.HasReturn = p.Return[len(p.Return)-1], true
			}
			body, err := n.Marshal()
			if err != nil {
				t.Error(err)
			}
			p.at.sendLocked(down, encode(route.Frame{Onward: route.To(hubproto.NoticeTarget), Return: route.To(hubproto.NoticeSource), Payload: body}))
		}
		return asIs(p)
	}
	c.bob.end.set(lie)
	c.under(t, c.alice.end, lie, func() { c.bob.end.set(nil) }, plainMessages)
}

// TestForgedRegistrations answers registrations that nobody asked for, as the hub
// and as a peer, and one that somebody did ask for with an address of its own.
func TestForgedRegistrations(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	mallory := join(t, device.Config{}).listen(channel.TrustEveryone)
	works(t, alice, bob)
	listener := bob.end.frames(down)[0].Onward
	was := bob.fwd.Address()
	for _, from := range []route.Route{mallory.at(), append(route.To(liarRoute[0].Value), mallory.at()...), mallory.at().Append(liarRoute...)} {
		for _, name := range []string{"register", listener[0].Value, "forward_to_x"} {
			bob.end.send(down, route.Frame{Onward: listener, Return: from, Payload: bare.AppendString(nil, name)})
		}
	}
	works(t, alice, bob)
	if now := bob.fwd.Address(); now != was {
		t.Errorf("bob's address is now %s", now)
	}
	// The one who asks gets an address of the hub's choice. Whoever dials it meets
	// another identity.
	dupe := join(t, device.Config{})
	dupe.end.onService(func(p *passage) [][]byte {
		if p.way == down && len(p.Return) == 1 && p.Return[0] != route.Local("hello") {
			p.Return = mallory.at()
			return [][]byte{encode(p.Frame)}
		}
		return asIs(p)
	})
	dupe.listen(channel.TrustEveryone)
	if dupe.fwd.Address() != mallory.fwd.Address() {
		t.Fatalf("the address is %s", dupe.fwd.Address())
	}
	if _, err := alice.node.Dial(within(t), dupe.at(), dupe.trust()); !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("dialling it: %v, want ErrWrongIdentity", err)
	}
}

// TestForgedRecords shows records and claims with every byte changed, and those of
// another address.
func TestForgedRecords(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	mallory := join(t, device.Config{}).listen(channel.TrustEveryone)
	record := func(p *person) []byte {
		t.Helper()
		before := len(alice.end.told[down])
		if o, err := alice.node.Lookup(within(t), p.fwd.Address()); err != nil || !o.Signed || o.Owner != p.id.Identifier() {
			t.Fatalf("%+v, %v", o, err)
		}
		alice.end.mu.Lock()
		defer alice.end.mu.Unlock()
		return alice.end.told[down][before:][0].Payload
	}
	hers, his := record(mallory), record(bob)
	var show []byte
	alice.end.onService(func(p *passage) [][]byte {
		if p.way == down || p.Onward[0] != route.Local("lookup") {
			return asIs(p)
		}
		p.at.sendLocked(down, encode(route.Frame{Onward: p.Return, Return: route.To("lookup"), Payload: show}))
		return nil
	})
	lookup := func(answer []byte) (device.Ownership, error) {
		alice.end.mu.Lock()
		show = answer
		alice.end.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return alice.node.Lookup(ctx, bob.fwd.Address())
	}
	if _, err := lookup(hers); !errors.Is(err, device.ErrBadClaim) {
		t.Errorf("the record of another address: %v", err)
	}
	bad := 0
	for i := range his {
		forged := bytes.Clone(his)
		forged[i] ^= 1 << (i % 8)
		o, err := lookup(forged)
		if errors.Is(err, device.ErrBadClaim) {
			bad++
		}
		if err == nil && o.Signed && (o.Owner != bob.id.Identifier() || o.Address != bob.fwd.Address()) {
			t.Fatalf("byte %d: %+v", i, o)
		}
	}
	t.Logf("%d of %d changed records are known as forged claims", bad, len(his))
	if bad < 100 {
		t.Errorf("only %d of %d changed records are known as forged claims", bad, len(his))
	}
	for n := range his {
		if _, err := lookup(his[:n]); err == nil {
			t.Fatalf("a record cut at %d is accepted", n)
		}
	}
	if o, err := lookup(his); err != nil || !o.Signed {
		t.Errorf("the genuine one: %+v, %v", o, err)
	}
}

// TestTwoViews shows two devices different peers at one address. Who knows an
// identifier notices; who trusts on first use notices as soon as the views change.
func TestTwoViews(t *testing.T) {
	t.Parallel()
	alice, carol := join(t, device.Config{}), join(t, device.Config{})
	bob, mallory := join(t, device.Config{}).listen(channel.TrustEveryone), join(t, device.Config{}).listen(channel.TrustEveryone)
	divert := func(p *passage) [][]byte {
		if p.way == up && p.Onward[0] == bob.at()[0] {
			return [][]byte{encode(route.Frame{Onward: mallory.at(), Return: p.Return, Payload: p.Payload})}
		}
		return asIs(p)
	}
	carol.end.set(divert)
	works(t, alice, bob)
	if _, err := carol.node.Dial(within(t), bob.at(), bob.trust()); !errors.Is(err, device.ErrWrongIdentity) {
		t.Errorf("carol, who knows bob, gets %v", err)
	}
	known, err := device.OpenKnownPeers(filepath.Join(t.TempDir(), "known_peers"))
	if err != nil {
		t.Fatal(err)
	}
	first := func() error {
		ch, err := carol.node.Dial(within(t), bob.at(), known.Policy(bob.fwd.Address(), true), device.NoHeal())
		if err == nil {
			_ = ch.Close()
		}
		return err
	}
	if err := first(); err != nil {
		t.Fatalf("on first use: %v", err)
	}
	carol.end.set(nil)
	var changed *device.PeerChangedError
	if err := first(); !errors.Is(err, device.ErrWrongIdentity) || !errors.As(err, &changed) {
		t.Errorf("once carol is shown what alice is shown: %v", err)
	}
}

// TestLyingPubacks acknowledges what the hub drops, and twice, and what was never
// sent, and at last nothing.
func TestLyingPubacks(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	ch := alice.dial(bob)
	sent := texts("alice", 60)
	send := func(from, to int) {
		t.Helper()
		for _, m := range sent[from:to] {
			if err := ch.Send(within(t), plain, []byte(m)); err != nil {
				t.Fatal(err)
			}
		}
	}
	alice.end.set(func(p *passage) [][]byte {
		if p.way == up {
			return nil
		}
		return asIs(p)
	})
	send(0, 20)
	if err := ch.Flush(within(t)); err != nil {
		t.Errorf("the hub says that it has taken all: %v", err)
	}
	if err := ch.Deliver(soon(t), sure, []byte("unheard")); !errors.Is(err, device.ErrUnacknowledged) || !errors.Is(err, device.ErrTimeout) {
		t.Errorf("Deliver believes the hub: %v", err)
	}
	alice.end.set(nil)
	if err := ch.Deliver(within(t), sure, []byte("heard")); err != nil {
		t.Errorf("Deliver, once frames pass: %v", err)
	}
	alice.end.onPuback(func(uint16) int { return 3 })
	send(20, 40)
	if err := ch.Flush(within(t)); err != nil {
		t.Error(err)
	}
	alice.end.onPuback(func(uint16) int { return 0 })
	send(40, 60)
	if err := ch.Flush(soon(t)); !errors.Is(err, device.ErrTimeout) {
		t.Errorf("Flush without any acknowledgement: %v", err)
	}
	if n := alice.node.Stats().QueuedFrames; n < 20 {
		t.Errorf("%d frames are kept, want 20 at least", n)
	}
	alice.end.onPuback(nil)
	alice.end.mu.Lock()
	alice.end.cutLocked()
	alice.end.mu.Unlock()
	if err := ch.Flush(within(t)); err != nil {
		t.Errorf("on another connection: %v", err)
	}
	if err := ch.Deliver(within(t), sure, []byte("at last")); err != nil {
		t.Error(err)
	}
	part(t, "bob", sent, bob.received(plain), true, 20)
	if got := bob.received(plain); len(got) < 20 || got[len(got)-1] != sent[59] {
		t.Errorf("what was sent on a connection without acknowledgements is lost: %d arrived", len(got))
	}
}

// TestHeldHello keeps back the hello of a peer, which makes it look like a stock one:
// whoever knows better waits for it instead of settling for less.
func TestHeldHello(t *testing.T) {
	t.Parallel()
	alice, bob := pair(t)
	works(t, alice, bob)
	var h held
	alice.end.set(func(p *passage) [][]byte {
		if p.way == down && p.n > 0 {
			h[down] = append(h[down], p.body)
			return nil
		}
		return asIs(p)
	})
	ch, err := alice.node.Dial(within(t), bob.at(), bob.trust())
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.Deliver(soon(t), sure, []byte("too early")); !errors.Is(err, device.ErrTimeout) {
		t.Errorf("Deliver, before the hello: %v", err)
	}
	alice.end.set(nil)
	h.letGo(alice.end)()
	if err := ch.Deliver(within(t), sure, []byte("in time")); err != nil {
		t.Errorf("Deliver, after it: %v", err)
	}
	if got := bob.received(sure); len(got) != 2 || got[1] != "in time" {
		t.Errorf("bob accepted %q", got)
	}
}

// TestHugeFrames sends the largest frames that links take, and larger ones, into both
// ends of an open channel and to the address of one that has ended: to devices that
// take 256 KiB, as they do by default, and to those that take all of it, where each
// frame gets as far as the channel's key. The channel goes on.
func TestHugeFrames(t *testing.T) {
	for name, tt := range map[string]struct {
		overTCP bool
		limit   int
	}{
		"MQTT": {false, 0}, "MQTT, large frames allowed": {false, route.MaxFrame},
		"TCP": {true, 0}, "TCP, large frames allowed": {true, route.MaxFrame},
	} {
		t.Run(name, func(t *testing.T) {
			h := theHub(t)
			target := h.mqtt
			if tt.overTCP {
				if target = h.tcp; target == "" {
					return // the hub that was given has no such port
				}
			}
			limits := route.Limits{Frame: tt.limit}
			alice := joinAt(t, newEnd(t, target, tt.overTCP), device.Config{Limits: limits})
			bob := join(t, device.Config{Limits: limits}).listen(alice.trust())
			allowHeap(t, 16*route.MaxFrame)
			works(t, alice, bob)
			over := alice.end.last(up).Return
			ch := alice.dial(bob, device.NoHeal())
			acc := bob.accepted(t)
			sent, spoken := 0, 0
			speak := func() {
				t.Helper()
				if err := acc.Send(within(t), plain, []byte(text("bob", spoken))); err != nil {
					t.Fatalf("bob, after %d messages: %v", spoken, err)
				}
				spoken++
			}
			goesOn := func() {
				t.Helper()
				if err := ch.Deliver(within(t), sure, []byte(text("alice", sent))); err != nil {
					t.Fatalf("alice, after %d frames: %v", sent, err)
				}
				speak()
				sent++
				alice.awaits(t, plain, spoken)
			}
			goesOn()
			huge := make([]byte, 16<<20-1024)
			forged := func() uint64 {
				return alice.node.Stats().Channels.Dropped[channel.DropForged] + bob.node.Stats().Channels.Dropped[channel.DropForged]
			}
			before, fed := forged(), 0
			most, after := peakOf(func() {
				for _, size := range []int{256<<10 - 1024, 512 << 10, len(huge)} {
					for _, p := range []*person{alice, bob} {
						f := p.end.last(down)
						// A nonce that has not come, so that the frame is worth a look.
						nonce := binary.BigEndian.AppendUint64(nil, binary.BigEndian.Uint64(f.Payload)+2)
						f.Payload = append(nonce, huge[:size-len(nonce)]...)
						p.end.send(down, f)
						fed += size
					}
					goesOn()
				}
				if tt.limit != 0 {
					alice.end.send(down, route.Frame{Onward: over, Return: liarRoute, Payload: huge})
					goesOn()
				}
				for range 100 { // a reader gives up its large buffer
					speak()
				}
				goesOn()
			})
			runtime.KeepAlive(huge)
			t.Logf("after %d MiB in frames to open channels the heap had grown by %.1f MiB at most, and by %.1f MiB in the end",
				fed>>20, float64(most)/(1<<20), float64(after)/(1<<20))
			if most > 16*route.MaxFrame || after > route.MaxFrame/4 { // the switchboard's copies included
				t.Errorf("the heap has grown by %d bytes, and by %d in the end", most, after)
			}
			want := uint64(2) // of the first size
			if tt.limit != 0 {
				want = 6
			}
			if n := forged() - before; n != want {
				t.Errorf("%d frames were dropped as forged, want %d", n, want)
			}
			part(t, "bob", texts("alice", sent), bob.received(sure)[1:], true, sent)
			part(t, "alice", texts("bob", spoken), alice.received(plain), true, spoken)
			if err := errors.Join(alice.node.Err(), bob.node.Err()); err != nil {
				t.Errorf("a device gave up: %v", err)
			}
		})
	}
}
