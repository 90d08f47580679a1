package broker

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/testpipe"
)

func TestFitFiles(t *testing.T) {
	type limits struct{ all, address, pending int }
	const most, each, early = guard.DefaultConns, guard.DefaultPerAddress, guard.DefaultPending
	for _, tt := range []struct {
		name          string
		set           limits
		files, fronts int
		want          limits
	}{
		{"nobody knows", limits{}, -1, 2, limits{}},
		{"enough", limits{}, most + ownFiles, 1, limits{}},
		{"enough for two", limits{}, 2*most + ownFiles, 2, limits{}},
		{"enough for what is set", limits{all: 100}, 100 + ownFiles, 1, limits{all: 100}},
		{"one file short", limits{}, most + ownFiles - 1, 1, limits{most - 1, each, early}},
		{"not enough for two", limits{}, most + ownFiles, 2, limits{most / 2, each, early}},
		{"the others follow", limits{}, 1000 + ownFiles, 1, limits{1000, 750, 750}},
		{"what is set stays", limits{5000, 5000, 10}, 1000 + ownFiles, 1, limits{1000, 5000, 10}},
		{"half at least", limits{}, 100, 1, limits{50, 38, 38}},
		{"something", limits{}, 1, 2, limits{1, 1, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := Limits{Connections: tt.set.all, ConnectionsPerAddress: tt.set.address, ConnectionsPending: tt.set.pending}.fitFiles(tt.files, tt.fronts)
			if got := (limits{l.Connections, l.ConnectionsPerAddress, l.ConnectionsPending}); got != tt.want {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestStatusPort: idle connections to the status pages are few, and make room.
func TestStatusPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var counts statusCounts
		pages := newStatusServer(func() error { return nil }, func() Status { return Status{} }, nil, &counts)
		port := testpipe.Listen()
		go func() {
			if err := pages.serve(port); err != nil {
				t.Error(err)
			}
		}()
		dial := func() net.Conn {
			c, err := port.Dial()
			if err != nil {
				t.Error(err)
			}
			return c
		}
		const most = httpConnections - httpConnections/4 // of one address
		var idle []net.Conn
		for range most {
			idle = append(idle, dial())
		}
		if _, err := dial().Read(make([]byte, 1)); err == nil {
			t.Error("one too many is let in")
		}
		time.Sleep(time.Second) // synthetic
		c := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(), nil }}}
		r, err := c.Get("http://pipe/healthz")
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(r.Body); err != nil || string(text) != "alive\n" {
			t.Errorf("%q, %v", text, err)
		}
		_ = r.Body.Close()
		if _, err := idle[0].Read(make([]byte, 1)); err == nil {
			t.Error("the oldest is still there")
		}
		if refused, displaced := counts.refused.Load(), counts.displaced.Load(); refused != 1 || displaced != 1 {
			t.Errorf("counted: %d refused, %d displaced", refused, displaced)
		}
		for _, c := range idle {
			_ = c.Close()
		}
		synctest.Wait()
		for range most - 1 { // every place was given back but that of the one who asked
			idle = append(idle, dial())
		}
		synctest.Wait()
		last := idle[len(idle)-1]
		_ = last.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := last.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("there was a place: %v", err)
		}
		pages.shutdown(t.Context())
		for _, c := range idle {
			_ = c.Close()
		}
		c.CloseIdleConnections()
	})
}
