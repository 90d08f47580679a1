package channel

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/sealmq/sealmq/identity"
)

// Nobody's many tasks keep another's waiting, and each one's are done in order.
func TestPoolTakesTurns(t *testing.T) {
	p := newPool(1)
	defer p.close()
	var done []string
	begun, gate, end := make(chan struct{}), make(chan struct{}), make(chan struct{})
	p.submit("eve", func() { close(begun); <-gate })
	<-begun
	for _, name := range []string{"eve 1", "eve 2", "eve 3", "eve 4", "alice 1", "bob 1", "alice 2"} {
		who, _, _ := strings.Cut(name, " ")
		p.submit(who, func() { done = append(done, name) })
	}
	p.submit("carol", func() { p.submit("eve", func() { close(end) }) }) // behind all of them
	close(gate)
	<-end
	want := []string{"eve 1", "alice 1", "bob 1", "eve 2", "alice 2", "eve 3", "eve 4"}
	if !slices.Equal(done, want) {
		t.Errorf("done %q, want %q", done, want)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queues) != 0 || p.turns != nil {
		t.Errorf("%d queues and %d turns are left", len(p.queues), len(p.turns))
	}
}

// watchedRegistry tells what is verified, and waits with it.
type watchedRegistry struct {
	*identity.MemoryRegistry
	verify func(history []byte)
}

func (r *watchedRegistry) Import(history []byte) (*identity.Identity, error) {
	r.verify(history)
	return r.MemoryRegistry.Import(history)
}

// showAnew sends histories as RefreshCredentials.
func showAnew(t *testing.T, c *Channel, histories ...[]byte) {
	t.Helper()
	for _, h := range histories {
		if err := c.sendTurn(t.Context(), outgoing{plain: appendRefresh(nil, h)}); err != nil {
			t.Fatal(err)
		}
	}
}

// The history of another identity is not verified, which would cost much; a peer's own
// newer one is.
func TestHistoryOfAnotherIsNotVerified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		verified := make(chan string, 16)
		reg := &watchedRegistry{MemoryRegistry: identity.NewMemoryRegistry(0)}
		reg.verify = func(h []byte) { verified <- string(h) }
		_, b := listen(t, n, func(c *Config) { c.Registry = reg })
		eve := n.party(t, "eve")
		c := dial(t, eve, "bob", DialOptions{})
		<-verified // in the handshake

		other := newIdentity(t).Identity().ChangeHistory()
		if err := eve.id.Rotate(); err != nil {
			t.Fatal(err)
		}
		own := eve.id.Identity().ChangeHistory()
		showAnew(t, c, other)
		synctest.Wait()
		if dropped := b.ep.Stats().Dropped.Of(DropRefresh); dropped != 1 {
			t.Errorf("%d histories are refused", dropped)
		}
		showAnew(t, c, own)
		synctest.Wait()
		if h := <-verified; h != string(own) {
			t.Error("the history of another identity was verified")
		}
		if known, ok := reg.Get(eve.id.Identifier()); !ok || known.Compare(eve.id.Identity()) != identity.Equal {
			t.Error("the newer history is not known")
		}
	})
}

// However long it takes to verify what peers show anew, others get in.
func TestRefreshesLeaveHandshakesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		gate, held := make(chan struct{}), make(chan struct{}, 16)
		var anew sync.Map
		reg := &watchedRegistry{MemoryRegistry: identity.NewMemoryRegistry(0)}
		reg.verify = func(h []byte) {
			if _, ok := anew.Load(string(h)); ok {
				held <- struct{}{}
				<-gate
			}
		}
		a, _ := listen(t, n, func(c *Config) {
			c.Registry = reg
			c.Limits.Workers = 1
		})
		defer close(gate)
		for _, name := range []string{"eve", "mallory"} {
			p := n.party(t, name)
			c := dial(t, p, "bob", DialOptions{})
			if err := p.id.Rotate(); err != nil {
				t.Fatal(err)
			}
			h := p.id.Identity().ChangeHistory()
			anew.Store(string(h), true)
			showAnew(t, c, h)
		}
		<-held
		_ = dial(t, a, "bob", DialOptions{})
	})
}

// However long it takes to verify long histories, others get in; and so does who has one.
func TestLongHistoriesLeaveHandshakesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNet()
		gate, held := make(chan struct{}), make(chan struct{}, 16)
		reg := &watchedRegistry{MemoryRegistry: identity.NewMemoryRegistry(0)}
		reg.verify = func(h []byte) {
			if len(h) > longMessage {
				held <- struct{}{}
				<-gate
			}
		}
		a, b := listen(t, n, func(c *Config) {
			c.Registry = reg
			c.Limits.Workers = 1
		})
		eve := newIdentity(t)
		for len(eve.Identity().ChangeHistory()) <= longMessage {
			if err := eve.Rotate(); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3 {
			p := n.party(t, fmt.Sprint("eve", i), func(c *Config) { c.Identity = eve })
			c := dial(t, p, "bob", DialOptions{NoConfirm: true})
			send(t, c, "right behind message 3")
		}
		<-held
		_ = dial(t, a, "bob", DialOptions{})
		close(gate)
		for range 3 {
			b.next(t)
		}
	})
}
