package matrix

import (
	"context"
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/peer"
	"github.com/sealmq/sealmq/internal/connlimit"
	"github.com/sealmq/sealmq/route"
)

// TestSilentConnections opens ten thousand connections to a hub with the limits that
// it has by default and sends nothing on them, or the one byte that the protocol
// begins with: from one address, and from a hundred, which no limit for each address
// holds back. Who talks goes on talking, who comes gets in, from an address of theirs
// too; what they cost is bounded, and the counters say what became of each.
func TestSilentConnections(t *testing.T) {
	const silent = 10_000
	const files = silent + connlimit.DefaultPending + 1000 // theirs, the hub's, and some
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err != nil || have.Cur < files {
		peer.Missing(t, "room for the files of a test", "raise the limit (ulimit -n) to 16384")
	}
	for _, tt := range []struct {
		name      string
		addresses int
		say       string
		ends      string // the event of who is still there when its time is up; empty: we end it
	}{
		{"nothing, one address", 1, "", "preamble-timeout"},
		{"the preamble, many addresses", 100, "\x01", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := startOurHub(t).(*ourHub)
			bob, alice := goOnMQTT(t).(*goParty), goOnTCP(t).(*goParty)
			bob.connect(h)
			alice.connect(h)
			to := bob.listen(nil, "")
			bob.must(alice.dial(to, trust{bob.identifier()}))
			alice.up()
			bob.up()
			event := func(name string) int { return int(h.h.Status().Counters["sealmq_tcp_events_total{event="+name+"}"]) }
			gauge := func(name string) int { return int(h.h.Status().Counters[name]) }
			await := func(what string, ok func() bool) {
				t.Helper()
				tick := time.NewTicker(10 * time.Millisecond)
				defer tick.Stop()
				for limit := time.Now().Add(patience); !ok(); <-tick.C {
					if time.Now().After(limit) {
						t.Fatalf("%s: counters %v", what, h.h.Status().Counters)
					}
				}
			}
			heap, goroutines := h.heap(), runtime.NumGoroutine()
			stop := talk(t, alice)

			conns := flood(t, h.tcp(), silent, tt.addresses, tt.say)
			defer func() {
				for _, c := range conns {
					_ = c.Close()
				}
			}()
			// One more than what the flood has brought.
			await("not all were seen", func() bool { return event("accepted")+event("refused-pending") >= silent+1 })
			if n := gauge("sealmq_tcp_connections_pending"); n > connlimit.DefaultPending || n == 0 {
				t.Errorf("%d silent connections are open", n)
			}
			if n := runtime.NumGoroutine() - goroutines; n > connlimit.DefaultPending+100 {
				t.Errorf("%d goroutines more", n)
			}
			const each = 16 << 10 // what a silent connection may cost, both ends of it
			if n := int64(h.heap()) - int64(heap); n > silent*each {
				t.Errorf("%d KiB more on the heap", n>>10)
			} else {
				t.Logf("%d KiB more on the heap, %d goroutines more", n>>10, runtime.NumGoroutine()-goroutines)
			}

			for range 3 {
				newcomer(t, h, bob, to)
			}
			late := tt.ends != "" && event(tt.ends) > 0 // by now places come free by themselves
			if event("displaced") == 0 && !late {       // the place of one that has spoken up is free for the next
				t.Error("no silent connection made room for others")
			}
			if rounds := stop(); rounds == 0 {
				t.Error("nobody could talk meanwhile")
			} else {
				t.Logf("%d round trips meanwhile", rounds)
			}

			ends := []string{"displaced", "ended-by-peer", "network-error", tt.ends}
			if tt.ends == "" {
				for _, c := range conns {
					_ = c.Close()
				}
			}
			await("they stay", func() bool { return gauge("sealmq_tcp_connections") == 1 }) // alice
			sum := 1
			for _, name := range ends {
				sum += event(name)
			}
			if n := event("accepted"); n != sum {
				t.Errorf("%d were let in, and what became of %d is counted", n, sum)
			}
			if tt.ends != "" && event(tt.ends) < connlimit.DefaultPending/2 {
				t.Errorf("%s: %d", tt.ends, event(tt.ends))
			}
		})
	}
}

// flood opens connections from so many loopback addresses, says the same on each, and
// returns them once all are open.
func flood(t *testing.T, hub string, n, addresses int, say string) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	var wg sync.WaitGroup
	const workers = 8
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				d := net.Dialer{Timeout: patience}
				d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, byte(i%addresses), 1)}
				c, err := d.Dial("tcp", hub)
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				_, _ = io.WriteString(c, say) // fails where it was refused
				conns[i] = c
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return conns
}

// newcomer connects, has a word with bob, and leaves.
func newcomer(t *testing.T, h hub, bob *goParty, to []string) {
	t.Helper()
	id, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n, err := device.Connect(ctx, "tcp://"+h.tcp(), device.Config{Identity: id, KeepTrying: true})
	if err != nil {
		t.Fatalf("a newcomer is kept out: %v", err)
	}
	defer n.Close()
	ch, err := n.Dial(ctx, route.To(to...), channel.TrustIdentifiers(bob.id.Identifier()))
	if err != nil {
		t.Fatalf("a newcomer: %v", err)
	}
	if m, err := ch.Request(ctx, echo, []byte("new here")); err != nil || string(m.Payload) != "new here" {
		t.Errorf("a newcomer's word: %v, %v", m, err)
	}
}
