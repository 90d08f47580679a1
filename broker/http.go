package broker

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sealmq/sealmq/internal/connlimit"
)

// Bounds of the status server. It serves small pages to few clients.
const (
	httpHeaderTimeout = 5 * time.Second
	httpTimeout       = 15 * time.Second
	httpIdle          = time.Minute
	httpHeaderBytes   = 16 << 10
	httpScrapes       = 4
	// httpConnections bounds the open ones. Three quarters of them may be of one
	// address; when they are used up a newcomer gets the place of the oldest.
	httpConnections = 64
)

// statusServer serves the hub's state to operators and their tools. It has no
// writing operation.
type statusServer struct {
	server *http.Server
	counts *statusCounts
	done   chan struct{} // closed when serve has returned
}

// statusCounts counts connections to the status pages that came to nothing.
type statusCounts struct {
	refused   atomic.Uint64 // no place, and none that was old enough
	displaced atomic.Uint64 // closed: a newcomer needed the place
}

// newStatusServer makes the server; serve starts it. ready says why the hub is
// not ready, nil when it is.
func newStatusServer(ready func() error, status func() Status, metrics prometheus.Gatherer, counts *statusCounts) *statusServer {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		plain(w, http.StatusOK, "alive")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			plain(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		plain(w, http.StatusOK, "ready")
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.MarshalIndent(status(), "", "  ")
		if err != nil {
			plain(w, http.StatusInternalServerError, "cannot encode the status")
			return
		}
		w.Header().Set("Content-Type", "application/json")
		safe(w)
		_, _ = w.Write(append(body, '\n')) // a reader that went away
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		MaxRequestsInFlight: httpScrapes,
		Timeout:             httpTimeout,
	}))
	return &statusServer{
		server: &http.Server{
			Handler:           mux,
			ReadHeaderTimeout: httpHeaderTimeout,
			ReadTimeout:       httpTimeout,
			WriteTimeout:      2 * httpTimeout,
			IdleTimeout:       httpIdle,
			MaxHeaderBytes:    httpHeaderBytes,
		},
		counts: counts,
		done:   make(chan struct{}),
	}
}

func plain(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	safe(w)
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text + "\n"))
}

// safe keeps browsers from making anything else of a page than it is.
func safe(w http.ResponseWriter) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
}

// statusPort lets few connections in.
type statusPort struct {
	net.Listener

	limits connlimit.Limits
	counts *statusCounts
}

func (p *statusPort) Accept() (net.Conn, error) {
	for {
		nc, err := p.Listener.Accept()
		if err != nil {
			return nil, err
		}
		ticket, verdict := p.limits.Take(nc.RemoteAddr())
		if verdict != connlimit.Admitted {
			p.counts.refused.Add(1)
			_ = nc.Close()
			continue
		}
		ticket.Yield(func() {
			p.counts.displaced.Add(1)
			_ = nc.Close()
		}, connlimit.Quiet(nc))
		return &statusConn{nc, ticket}, nil
	}
}

type statusConn struct {
	net.Conn

	ticket *connlimit.Ticket
}

func (c *statusConn) Close() error {
	defer c.ticket.Release()
	return c.Conn.Close()
}

// serve answers on ln until shutdown. It returns nil after a shutdown.
func (s *statusServer) serve(ln net.Listener) error {
	defer close(s.done)
	port := &statusPort{Listener: ln, limits: connlimit.Limits{Pending: httpConnections}, counts: s.counts}
	if err := s.server.Serve(port); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// shutdown ends the server and waits for serve to return; requests in progress
// may finish until ctx ends.
func (s *statusServer) shutdown(ctx context.Context) {
	if s.server.Shutdown(ctx) != nil {
		_ = s.server.Close()
	}
	<-s.done
}
