package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/route"
)

// TestCallbacksInOrder: one goroutine for each address, in order of arrival.
func TestCallbacksInOrder(t *testing.T) {
	n := newNode(t, Config{})
	const workers, messages = 4, 500
	var wg sync.WaitGroup
	wg.Add(workers * messages)
	for w := range workers {
		next, running := 0, atomic.Bool{}
		must(t, n.Handle(fmt.Sprint("w", w), Access{Forwarders: true}, func(_ context.Context, m *Message) {
			if running.Swap(true) {
				t.Error("called twice at a time")
			}
			if string(m.Payload) != fmt.Sprint(next) {
				t.Errorf("worker %d: got %s, want %d", w, m.Payload, next)
			}
			next++
			running.Store(false)
			wg.Done()
		}))
	}
	for i := range messages {
		for w := range workers {
			if d := n.Inject(fromForwarder, frame(fmt.Sprint("w", w), fmt.Sprint(i)), 0); d != 0 {
				t.Fatal(d)
			}
		}
	}
	wg.Wait()
}

// TestCallbackMayDoAnything: send, ask, open, remove itself, close the node.
func TestCallbackMayDoAnything(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.Handle("echo", Access{}, func(ctx context.Context, m *Message) {
		if err := n.Reply(ctx, m, m.Payload); err != nil {
			t.Error(err)
		}
	}))
	done := make(chan error, 1)
	must(t, n.Handle("busy", Access{}, func(ctx context.Context, m *Message) {
		answer, err := n.Request(ctx, route.To("echo"), m.Payload, 0)
		switch {
		case err != nil:
			done <- err
		case string(answer.Payload) != "ping":
			done <- fmt.Errorf("answer %q", answer.Payload)
		default:
			err = n.OpenMailbox("new", Access{})
			if err == nil && !n.Remove("busy") {
				err = errors.New("not removed")
			}
			if ctx.Err() == nil {
				err = errors.Join(err, errors.New("context goes on"))
			}
			done <- errors.Join(err, n.Close(), n.Close())
		}
	}))
	must(t, n.Send(t.Context(), frame("busy", "ping"), 0))
	must(t, <-done)
	<-n.Done()
	if err := n.Send(t.Context(), frame("echo", ""), 0); !errors.Is(err, ErrClosed) {
		t.Errorf("send after close: %v", err)
	}
}

// TestCallbackLost: a callback finds how many messages were dropped before its own.
func TestCallbackLost(t *testing.T) {
	n := newNode(t, Config{MailboxMessages: 2})
	entered, gate := make(chan uint64, 10), make(chan struct{})
	must(t, n.Handle("cb", Access{}, func(_ context.Context, m *Message) {
		entered <- m.Lost
		<-gate
	}))
	send := func() error { return n.Send(context.Background(), frame("cb", "x"), 0) }
	must(t, send())
	<-entered
	must(t, send())
	must(t, send())
	for range 3 {
		if err := send(); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
	}
	gate <- struct{}{}
	<-entered
	must(t, send())
	gate <- struct{}{}
	<-entered
	gate <- struct{}{}
	if lost := <-entered; lost != 3 {
		t.Errorf("lost %d, want 3", lost)
	}
	close(gate)
}

// TestCloseEndsEverything: waiting calls return, callbacks hear it, nothing is left.
func TestCloseEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := make(chan struct{})
		n, err := New(Config{Uplink: UplinkFunc(func(ctx context.Context, _ route.Frame, _ route.Class) error { return nil })})
		must(t, err)
		must(t, n.OpenMailbox("app", Access{}))
		heard := make(chan struct{})
		must(t, n.Handle("cb", Access{}, func(ctx context.Context, _ *Message) {
			<-ctx.Done()
			close(heard)
			<-block
		}))
		must(t, n.Send(t.Context(), frame("cb", "1"), 0))
		must(t, n.Send(t.Context(), frame("cb", "2"), 0))
		errs := make(chan error, 2)
		go func() { _, err := n.Receive(t.Context(), "app"); errs <- err }()
		go func() { _, err := n.Request(t.Context(), route.To("far"), nil, 0); errs <- err }()
		synctest.Wait()
		must(t, n.Close())
		for range 2 {
			if err := <-errs; !errors.Is(err, ErrClosed) {
				t.Errorf("waiting call: %v", err)
			}
		}
		<-heard
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("shutdown with a callback running: %v", err)
		}
		close(block)
		must(t, n.Shutdown(t.Context()))
		if n.Stats().Dropped[DropClosed] != 1 || n.Stats().Workers != 0 {
			t.Errorf("stats %+v", n.Stats())
		}
		for name, err := range map[string]error{
			"open": n.OpenMailbox("x", Access{}), "handle": n.Handle("x", Access{}, nil),
			"register": n.Register("x", nil), "alias": n.Alias("x", "y", Access{}),
			"send": n.Send(t.Context(), frame("far", ""), 0),
		} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("%s after close: %v", name, err)
			}
		}
		if _, err := n.Receive(t.Context(), "app"); !errors.Is(err, ErrClosed) {
			t.Errorf("receive after close: %v", err)
		}
		if d := n.Inject(fromForwarder, frame("app", ""), 0); d != DropUnknown {
			t.Errorf("inject after close: %v", d)
		}
	})
}

// TestRemove: a reader of a removed mailbox is told, and the address is free again.
func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Config{})
		must(t, n.OpenMailbox("app", Access{}))
		errs := make(chan error, 1)
		go func() { _, err := n.Receive(t.Context(), "app"); errs <- err }()
		synctest.Wait()
		if !n.Remove("app") || n.Remove("app") {
			t.Error("remove")
		}
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Errorf("%v", err)
		}
		must(t, n.OpenMailbox("app", Access{}))
	})
}

// TestRegistered: called in place, in order, never twice at a time, also when it
// sends to itself.
func TestRegistered(t *testing.T) {
	n := newNode(t, Config{MailboxMessages: 100000, MailboxBytes: 1 << 30})
	var depth, calls int
	must(t, n.RegisterFunc("self", Access{Forwarders: true}, func(f route.Frame, _ route.Class, _ Origin) {
		if depth++; depth != 1 {
			t.Error("called from within itself")
		}
		if calls++; f.Payload[0] > 0 {
			f.Payload[0]--
			if err := n.Send(context.Background(), f, 0); err != nil {
				t.Error(err)
			}
		}
		depth--
	}))
	f := frame("self", "\x05")
	if d := n.Inject(fromForwarder, f, 0); d != 0 || calls != 6 {
		t.Errorf("%d calls, %v", calls, d)
	}

	const senders, each = 8, 2000
	var running atomic.Bool
	next := make(map[string]int)
	all := make(chan struct{})
	total := 0
	must(t, n.RegisterFunc("shared", Access{Forwarders: true}, func(f route.Frame, _ route.Class, _ Origin) {
		if running.Swap(true) {
			t.Error("called twice at a time")
		}
		who := f.Return[0].Value
		if string(f.Payload) != fmt.Sprint(next[who]) {
			t.Errorf("%s: got %s, want %d", who, f.Payload, next[who])
		}
		next[who]++
		if total++; total == senders*each {
			close(all)
		}
		running.Store(false)
	}))
	for s := range senders {
		go func() {
			for i := range each {
				f := route.Frame{Onward: route.To("shared"), Return: route.To(fmt.Sprint("s", s)), Payload: []byte(fmt.Sprint(i))}
				if d := n.Inject(fromForwarder, f, 0); d != 0 {
					t.Errorf("dropped: %v", d)
				}
			}
		}()
	}
	<-all
}

// TestRegisteredBusy: a busy function never holds up who brings it frames; its queue
// is bounded, and somebody else works it off.
func TestRegisteredBusy(t *testing.T) {
	n := newNode(t, Config{MailboxMessages: 100})
	entered, gate := make(chan struct{}), make(chan struct{})
	got := make(chan byte, 1000)
	first := true
	must(t, n.RegisterFunc("fn", Access{Forwarders: true}, func(f route.Frame, _ route.Class, _ Origin) {
		if first {
			first = false
			close(entered)
			<-gate
		}
		got <- f.Payload[0]
	}))
	back := make(chan struct{})
	go func() {
		n.Inject(fromForwarder, frame("fn", "\x00"), 0)
		close(back)
	}()
	<-entered
	full := 0
	for i := range 150 {
		if d := n.Inject(fromForwarder, frame("fn", string([]byte{byte(i + 1)})), 0); d == DropFull {
			full++
		}
	}
	if full != 50 {
		t.Errorf("%d refused, want 50", full)
	}
	close(gate)
	<-back
	for i := range 101 {
		if b := <-got; int(b) != i {
			t.Fatalf("frame %d is %d", i, b)
		}
	}
}

// TestRegisteredRemoved: what waits for a removed function is dropped and counted.
func TestRegisteredRemoved(t *testing.T) {
	n := newNode(t, Config{})
	var fn func()
	must(t, n.RegisterFunc("fn", Access{Forwarders: true}, func(route.Frame, route.Class, Origin) { fn() }))
	calls := 0
	fn = func() {
		calls++
		for range 3 {
			n.Inject(fromForwarder, frame("fn", "x"), 0)
		}
		n.Remove("fn")
		if d := n.Inject(fromForwarder, frame("fn", "x"), 0); d != DropUnknown {
			t.Errorf("after removal: %v", d)
		}
	}
	n.Inject(fromForwarder, frame("fn", "x"), 0)
	if calls != 1 || n.Stats().Dropped[DropClosed] != 3 {
		t.Errorf("%d calls, %v", calls, n.Stats().Dropped)
	}
}

// TestSendKeepsNothing: the sender may reuse its payload, the function owns its own.
func TestSendKeepsNothing(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.RegisterFunc("fn", Access{}, func(f route.Frame, _ route.Class, _ Origin) { clear(f.Payload) }))
	f := frame("fn", "keep")
	must(t, n.Send(t.Context(), f, 0))
	if string(f.Payload) != "keep" {
		t.Errorf("payload changed to %q", f.Payload)
	}
}

func TestAlias(t *testing.T) {
	n := newNode(t, Config{})
	must(t, n.OpenMailbox("listener", Access{}))
	must(t, n.OpenMailbox("open", Access{Forwarders: true}))
	must(t, n.OpenMailbox("shut", Access{}))
	must(t, n.Alias("M", "listener", Access{Forwarders: true}))
	for _, c := range []struct {
		to   route.Route
		from Origin
		want Drop
		at   string
	}{
		{route.To("M"), fromForwarder, 0, "listener"},
		{route.To("M"), fromChannel, DropRefused, ""},
		{route.To("listener"), fromForwarder, DropRefused, ""},
		{route.To("M", "open"), fromForwarder, 0, "open"},
		{route.To("M", "open", "further"), fromForwarder, 0, "open"},
		{route.To("M", "shut"), fromForwarder, DropRefused, ""},
		{route.To("M", "listener"), fromForwarder, DropRefused, ""},
		{route.To("M", "nobody"), fromForwarder, DropUnknown, ""},
		{route.To("M", "M"), fromForwarder, 0, "listener"},
	} {
		f := route.Frame{Onward: c.to}
		if d := n.Inject(c.from, f, 0); d != c.want {
			t.Errorf("%v via %v: %v, want %v", c.to, c.from.Via, d, c.want)
			continue
		}
		if c.want == 0 {
			if m := receive(t, n, c.at); m.Address != c.at || len(m.Onward) != max(0, len(c.to)-2) {
				t.Errorf("%v arrived as %+v", c.to, m)
			}
		}
	}
	long := make([]string, maxAliases+1)
	for i := range long {
		long[i] = "M"
	}
	if d := n.Inject(fromForwarder, route.Frame{Onward: route.To(long...)}, 0); d != DropLoop {
		t.Errorf("a long chain of aliases: %v", d)
	}
}

// uplink records what leaves a node.
type uplink struct {
	frames chan route.Frame
	err    error
}

func (u *uplink) Send(_ context.Context, f route.Frame, _ route.Class) error {
	if u.err != nil {
		return u.err
	}
	u.frames <- f
	return nil
}

func TestUplink(t *testing.T) {
	n := newNode(t, Config{})
	if err := n.Send(t.Context(), frame("far", ""), 0); !errors.Is(err, ErrUnknownAddress) {
		t.Errorf("without an uplink: %v", err)
	}
	up := &uplink{frames: make(chan route.Frame, 1)}
	n.SetUplink(up)
	must(t, n.Send(t.Context(), frame("far", "x"), 0))
	if f := <-up.frames; !f.Onward.Equal(route.To("far")) || n.Stats().Sent != 1 {
		t.Errorf("sent %v", f)
	}
	up.err = errors.New("offline")
	if err := n.Send(t.Context(), frame("far", ""), 0); !errors.Is(err, up.err) || n.Stats().Sent != 1 {
		t.Errorf("failing uplink: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Send(ctx, frame("far", ""), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestRequest: the answer's address is fresh, open only to where the answer has to
// come from, and gone afterwards.
func TestRequest(t *testing.T) {
	up := &uplink{frames: make(chan route.Frame, 1)}
	n := newNode(t, Config{Uplink: up})
	answer := func(o Origin, to route.Route, payload string) Drop {
		return n.Inject(o, route.Frame{Onward: to, Payload: []byte(payload)}, 0)
	}
	seen := map[string]bool{}
	for range 3 {
		result := make(chan string, 1)
		go func() {
			m, err := n.Request(t.Context(), route.To("hub_service"), []byte("q"), 0)
			if err != nil {
				result <- err.Error()
				return
			}
			result <- string(m.Payload)
		}()
		f := <-up.frames
		back, _ := f.Return.First()
		if len(f.Return) != 1 || len(back.Value) != 32 || seen[back.Value] {
			t.Fatalf("return route %v", f.Return)
		}
		seen[back.Value] = true
		if d := answer(fromChannel, f.Return, "wrong way"); d != DropRefused {
			t.Errorf("answer through a channel: %v", d)
		}
		if _, err := n.Receive(t.Context(), back.Value); !errors.Is(err, ErrNotMailbox) {
			t.Errorf("receive at a request's address: %v", err)
		}
		if d := answer(fromForwarder, f.Return, "right"); d != 0 {
			t.Errorf("answer: %v", d)
		}
		if got := <-result; got != "right" {
			t.Errorf("answer %q", got)
		}
		if n.Has(back.Value) {
			t.Error("address is still there")
		}
	}

	// Through a channel: only that channel may answer.
	sealed := make(chan route.Frame, 1)
	must(t, n.RegisterFunc("enc1", Access{}, func(f route.Frame, _ route.Class, _ Origin) { sealed <- f }))
	result := make(chan error, 1)
	go func() {
		m, err := n.Request(t.Context(), route.To("enc1", "echo"), []byte("q"), 0)
		if err == nil && string(m.Payload) != "right" {
			err = fmt.Errorf("answer %q", m.Payload)
		}
		result <- err
	}()
	f := <-sealed
	for _, o := range []Origin{fromForwarder, fromDialled} {
		if d := answer(o, f.Return, "wrong"); d != DropRefused {
			t.Errorf("answer from %+v: %v", o, d)
		}
	}
	if d := answer(fromChannel, f.Return, "right"); d != 0 {
		t.Errorf("answer: %v", d)
	}
	must(t, <-result)

	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-up.frames; cancel() }()
	if _, err := n.Request(ctx, route.To("silent"), nil, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := n.Request(t.Context(), nil, nil, 0); !errors.Is(err, ErrNoRoute) {
		t.Errorf("no route: %v", err)
	}
	if w := n.Stats().Workers; w != 1 {
		t.Errorf("%d workers left", w)
	}
}

// TestReplyStaysOnItsWay: an answer leaves the way the message came, whatever the
// foreign return route says.
func TestReplyStaysOnItsWay(t *testing.T) {
	up := &uplink{frames: make(chan route.Frame, 1)}
	n := newNode(t, Config{Uplink: up})
	must(t, n.OpenMailbox("app", Access{Forwarders: true, Channels: true}))
	must(t, n.OpenMailbox("victim", Access{}))
	sealed := make(chan route.Frame, 1)
	for _, enc := range []string{"enc1", "enc2"} {
		must(t, n.RegisterFunc(enc, Access{}, func(f route.Frame, _ route.Class, _ Origin) { sealed <- f }))
	}
	for _, c := range []struct {
		name string
		from Origin
		ret  route.Route
		err  error
		out  chan route.Frame
	}{
		{"to the hub", fromForwarder, route.To("dev_1", "x"), nil, up.frames},
		{"through the channel", fromChannel, route.To("enc1", "x"), nil, sealed},
		{"nowhere", fromForwarder, nil, ErrNoRoute, nil},
		{"forged, to a worker", fromForwarder, route.To("victim"), ErrRefused, nil},
		{"forged, to itself", fromForwarder, route.To("app"), ErrRefused, nil},
		{"forged, into a channel", fromForwarder, route.To("enc1", "x"), ErrRefused, nil},
		{"forged, to be dialled", fromForwarder, route.Route{{Transport: route.TCP, Value: "h:1"}}, ErrRefused, nil},
		{"forged, into another channel", fromChannel, route.To("enc2", "x"), ErrRefused, nil},
		{"forged, out of the channel", fromChannel, route.To("dev_1", "x"), ErrRefused, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := n.Inject(c.from, route.Frame{Onward: route.To("app"), Return: c.ret}, route.Transient); d != 0 {
				t.Fatal(d)
			}
			err := n.Reply(t.Context(), receive(t, n, "app"), []byte("answer"))
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if c.out != nil {
				if f := <-c.out; !f.Onward.Equal(c.ret) || !f.Return.Equal(route.To("app")) || string(f.Payload) != "answer" {
					t.Errorf("answer %+v", f)
				}
			}
		})
	}
	if len(up.frames) != 0 || len(sealed) != 0 {
		t.Error("something else was sent")
	}
}

// TestRequestService: what is not the service's own word ends no wait, and leaves room
// for the answer.
func TestRequestService(t *testing.T) {
	up := &uplink{frames: make(chan route.Frame, 1)}
	n := newNode(t, Config{Uplink: up, MailboxMessages: 1})
	result := make(chan string, 1)
	go func() {
		m, err := n.RequestService(t.Context(), "lookup", []byte("q"), 0)
		if err != nil {
			result <- err.Error()
			return
		}
		result <- string(m.Payload)
	}()
	f := <-up.frames
	if !f.Onward.Equal(route.To("lookup")) {
		t.Errorf("a frame for %v", f.Onward)
	}
	for _, o := range []Origin{
		fromForwarder, fromChannel, {}, {Via: Forwarded, Source: "lookup"}, {Via: Forwarded, FromHub: true},
		{Via: Forwarded, FromHub: true, Source: "hello"}, {Via: Channel, FromHub: true, Source: "lookup"},
	} {
		if d := n.Inject(o, route.Frame{Onward: f.Return, Payload: []byte("forged")}, 0); d != DropRefused {
			t.Errorf("%+v: %v", o, d)
		}
	}
	if d := n.Inject(Origin{Via: Forwarded, FromHub: true, Source: "lookup"}, route.Frame{Onward: f.Return, Payload: []byte("right")}, 0); d != 0 {
		t.Error(d)
	}
	if got := <-result; got != "right" {
		t.Errorf("answer %q", got)
	}
}

func TestRouter(t *testing.T) {
	n := newNode(t, Config{})
	var got []channel.Inbound
	must(t, n.Register("dr", func(in channel.Inbound) { got = append(got, in) }))
	must(t, n.RegisterLocal("enc", func(in channel.Inbound) { got = append(got, in) }))
	hub := Origin{Via: Forwarded, Source: "dev_1", FromHub: true}
	for _, o := range []Origin{fromForwarder, hub, fromDialled} {
		if d := n.Inject(o, frame("dr", "x"), route.Transient); d != 0 {
			t.Errorf("%v", d)
		}
		if d := n.Inject(o, frame("enc", "x"), 0); d != DropRefused {
			t.Errorf("local address reached from outside: %v", d)
		}
	}
	must(t, n.Send(t.Context(), frame("enc", "x"), 0))
	if len(got) != 4 || got[0].Source != "dev_1" || got[0].FromHub || got[0].Class != route.Transient ||
		!got[1].FromHub || got[2].Source != peer.String() || got[3].Source != "" {
		t.Errorf("%+v", got)
	}
	n.Unregister("dr")
	n.Unregister("dr")
	if n.Has("dr") {
		t.Error("still registered")
	}
}

func BenchmarkInject(b *testing.B) {
	n := newNode(b, Config{})
	must(b, n.RegisterFunc("fn", Access{Forwarders: true}, func(route.Frame, route.Class, Origin) {}))
	must(b, n.OpenMailbox("app", Access{Forwarders: true}))
	b.Run("function", func(b *testing.B) {
		f := frame("fn", "0123456789abcdef")
		b.ReportAllocs()
		for b.Loop() {
			n.Inject(fromForwarder, f, 0)
		}
	})
	b.Run("mailbox", func(b *testing.B) {
		f := frame("app", "0123456789abcdef")
		b.ReportAllocs()
		for b.Loop() {
			n.Inject(fromForwarder, f, 0)
			if _, err := n.Receive(context.Background(), "app"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
