// Package crate holds tests of the packages identity, channel, node and route
// against the original implementation alone: a stock relay, a stock peer, and
// our endpoint on a bare TCP connection, without hub and device library. What
// fails here is the protocol, not the plumbing.
package crate

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// link is our side: a node whose uplink is one TCP connection to a stock hub,
// and an endpoint on it.
type link struct {
	t        *testing.T
	id       *identity.Private
	node     *node.Node
	endpoint *channel.Endpoint
	conn     net.Conn
	write    sync.Mutex
	read     chan struct{} // closed when the reader has ended
}

func connect(t *testing.T, hub string, cfg channel.Config) *link {
	t.Helper()
	l := &link{t: t, id: cfg.Identity, read: make(chan struct{})}
	var err error
	if l.node, err = node.New(node.Config{Uplink: l, MailboxMessages: 1 << 20, MailboxBytes: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	cfg.Registry, cfg.Router, cfg.Deliver = identity.NewMemoryRegistry(0), l.node, l.node.Deliver
	if l.endpoint, err = channel.NewEndpoint(cfg); err != nil {
		t.Fatal(err)
	}
	if l.conn, err = net.Dial("tcp", hub); err != nil {
		t.Fatal(err)
	}
	if _, err := l.conn.Write([]byte{route.Preamble}); err != nil {
		t.Fatal(err)
	}
	go l.pump()
	t.Cleanup(func() {
		l.endpoint.Close()
		l.node.Close()
		l.conn.Close()
		<-l.read
		<-l.node.Done()
	})
	// What stock peers send to ours.
	for _, addr := range []string{"app", "deep"} {
		if err := l.node.OpenMailbox(addr, node.Access{Channels: true}); err != nil {
			t.Fatal(err)
		}
	}
	err = l.node.Handle("echo", node.Access{Channels: true}, func(ctx context.Context, m *node.Message) {
		if err := l.node.Reply(ctx, m, m.Payload); err != nil && ctx.Err() == nil {
			t.Errorf("echo: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Send implements node.Uplink.
func (l *link) Send(_ context.Context, f route.Frame, _ route.Class) error {
	body := route.AppendFrame(nil, &f)
	l.write.Lock()
	defer l.write.Unlock()
	_, err := l.conn.Write(append(route.AppendFrameHeader(nil, len(body)), body...))
	return err
}

func (l *link) pump() {
	defer close(l.read)
	r := route.NewReader(l.conn, route.Limits{})
	if err := r.ReadPreamble(); err != nil {
		return
	}
	for {
		body, err := r.Next()
		if err != nil {
			return
		}
		f, err := route.ParseFrame(slices.Clone(body), route.Limits{})
		if err != nil {
			l.t.Errorf("a frame of the crate is refused: %v", err)
			continue
		}
		origin := node.Origin{Via: node.Forwarded}
		if first, ok := f.Return.First(); ok {
			origin.Source = first.Value
		}
		l.node.Inject(origin, f, route.Stored)
	}
}

// relay registers a relay at the stock hub and returns its address.
func (l *link) relay() string {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	answer, err := l.node.Request(ctx, route.To("forwarding_service"), bare.AppendString(nil, "register"), route.Stored)
	if err != nil {
		l.t.Fatalf("registering a relay: %v", err)
	}
	last, ok := answer.ReturnRoute.Last()
	if !ok {
		l.t.Fatal("the relay's answer has no return route")
	}
	return last.Value
}

func (l *link) receive(addr string) *node.Message {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	m, err := l.node.Receive(ctx, addr)
	if err != nil {
		l.t.Fatalf("waiting for a message at %s: %v", addr, err)
	}
	return m
}

func newIdentity(t *testing.T) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func imported(t *testing.T, id rustpeer.Identity) *identity.Identity {
	t.Helper()
	i, err := identity.Import(id.History)
	if err != nil {
		t.Fatalf("a history of the crate is refused: %v", err)
	}
	if i.Identifier().String() != id.Identifier {
		t.Fatalf("the crate says %s, we say %s", id.Identifier, i.Identifier())
	}
	return i
}
