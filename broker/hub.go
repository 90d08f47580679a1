package broker

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/topics"
)

// ErrStarted means that a hub was started twice.
var ErrStarted = errors.New("broker: the hub was started before")

// Hub is a hub. Make one with [New]; start it once with [Hub.Start] or
// [Hub.Run]. All methods are safe for concurrent use.
type Hub struct {
	cfg       Config
	root      topics.Root
	endpoints []endpoint
	logger    *slog.Logger

	identity *identity.Private
	gate     *gate // nil without a password file
	devices  *devicePolicy

	certificates certificates // nil without any
	proofs       *verifier
	cert         *certificate // nil without TLS
	bridge       *bridge.Bridge
	ockam        *ockam
	protection   identity.Protection // of the keys in the data folder
	unlock       func()              // gives the data folder free
	store        *store.Store        // nil when queues are kept in memory
	found        *store.Report       // what was in it

	limits  *guard.Limits
	ports   ports // open from New on; peers wait there until Start
	files   int   // that the process may have open; negative: any number
	wanted  int   // connections as configured, which files may not allow
	pages   statusCounts
	guarded *guard.Counters
	hooked  mochibridge.Counters
	logins  [numLogins]atomic.Uint64

	mu      sync.Mutex
	state   state
	started time.Time
	server  mqttServer
	urls    []string
	addrs   []net.Addr
	status  *statusServer
	httpURL string
	memory  func()        // takes the memory limit back
	failed  chan error    // what ended a server; room for each
	stopped chan struct{} // closed when Shutdown is done
	closing error         // of the store; set before stopped is closed
}

// state is where a hub is in its life.
type state int

const (
	stateNew state = iota
	stateStarting
	stateReady
	stateStopping
	stateStopped
)

func (s state) String() string {
	return [...]string{"new", "starting", "ready", "stopping", "stopped"}[s]
}

// New checks the configuration, opens the ports and loads the files that it names:
// identity, address key, password file, certificate, store. Who connects waits until
// Start. The ports come first, so that one in use leaves nothing behind in the data
// folder. [Hub.Shutdown] frees what New made, also if the hub was never started.
//
// Errors: [*ConfigError], [*PasswordError], [*PermissionError], [*ListenError],
// [*StoreError], or what reading a file said.
func New(cfg Config) (_ *Hub, err error) {
	h, err := prepare(cfg)
	if err != nil {
		return nil, err
	}
	if err := h.openPorts(context.Background()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.ports.close()
		}
	}()
	if err := openData(h.cfg.Data, true); err != nil {
		return nil, err
	}
	if h.unlock, err = lockData(&h.cfg, h.logger); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.unlock()
		}
	}()
	if h.store, h.found, err = openStore(&h.cfg, h.logger); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && h.store != nil {
			err = errors.Join(err, h.store.Close())
		}
	}()
	var born bool
	if h.identity, born, err = hubIdentity(h.cfg.Data, h.found != nil && h.found.Records > 0, h.protection, h.logger); err != nil {
		return nil, err
	}
	key, err := addressKey(&h.cfg, h.identity, h.logger)
	if err != nil {
		return nil, err
	}
	if h.store != nil {
		if err := h.store.Claim(h.identity.Identifier(), key); err != nil {
			return nil, &StoreError{Folder: filepath.Join(h.cfg.Data, storeName), Err: err}
		}
	}
	if h.proofs, err = newVerifier(&h.cfg, h.identity.Identifier(), born, h.devices, h.logger); err != nil {
		return nil, err
	}
	bc := bridge.Config{
		Key:      key,
		Identity: bridge.IdentitySigner(h.identity),
		Trace:    h.cfg.Trace,
		Logger:   h.logger.With("part", "bridge"),
	}
	if h.cfg.Data == "" {
		bc.Identity = bridge.EphemeralIdentitySigner(h.identity)
	}
	h.cfg.Limits.bridge(&bc)
	bc.StaticOverStream = h.cfg.TCPAliases
	if h.store != nil {
		bc.Outboxes, bc.Journal = h.store.Outbox, h.store
	}
	if h.bridge, err = bridge.New(bc); err != nil {
		return nil, errors.Join(fmt.Errorf("broker: %w", err), h.proofs.close())
	}
	// Whoever may come with as many identities as he likes does not make the hub forget
	// which keys its devices have rotated away.
	h.proofs.registry.Prefer(h.bridge.HasForwarder)
	if h.store != nil {
		if err := h.restore(); err != nil {
			return nil, errors.Join(err, h.bridge.Close(), h.proofs.close())
		}
	}
	return h, nil
}

// Check reports what is wrong with a configuration and with the files it names,
// without writing anything or opening a port.
func Check(cfg Config) error {
	_, err := prepare(cfg)
	return err
}

// prepare does what New and Check have in common.
func prepare(cfg Config) (*Hub, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Limits = cfg.Limits.fit()
	wanted, files := cmp.Or(cfg.Limits.Connections, guard.DefaultConns), openFiles()
	cfg.Limits = cfg.Limits.fitFiles(files, cfg.fronts())
	h := &Hub{
		cfg:     cfg,
		logger:  cfg.logger(),
		failed:  make(chan error, 3),
		stopped: make(chan struct{}),
		guarded: new(guard.Counters),
		limits:  cfg.Limits.guard(),
		memory:  func() {},
		wanted:  wanted,
		files:   files,
	}
	var err error
	if h.root, err = cfg.root(); err != nil {
		return nil, err
	}
	if h.endpoints, err = cfg.endpoints(); err != nil {
		return nil, err
	}
	if h.protection, err = cfg.protection(); err != nil {
		return nil, err
	}
	if cfg.PasswordFile != "" {
		p, err := LoadPasswords(cfg.PasswordFile)
		if err != nil {
			return nil, err
		}
		h.gate = newGate(p, cfg.Limits.LoginsWaiting)
	}
	if h.certificates, err = cfg.loadCertificates(); err != nil {
		return nil, err
	}
	if h.devices, err = cfg.loadDevices(); err != nil {
		return nil, err
	}
	if h.ockam, err = cfg.loadOckam(); err != nil {
		return nil, err
	}
	if cfg.TLS.Cert != "" {
		if h.cert, err = loadCertificate(cfg.TLS, h.logger); err != nil {
			return nil, err
		}
	}
	if cfg.AddressKeyFile != "" {
		if _, err := readAddressKey(cfg.AddressKeyFile); err != nil {
			return nil, err
		}
	}
	if err := openData(cfg.Data, false); err != nil {
		return nil, err
	}
	return h, nil
}

// Start serves at the ports and returns once peers can connect. ctx bounds the
// start alone. A hub that could not start is shut down.
//
// Errors: [ErrStarted], or what a part of the hub said.
func (h *Hub) Start(ctx context.Context) error {
	h.mu.Lock()
	if h.state != stateNew {
		h.mu.Unlock()
		return ErrStarted
	}
	h.state = stateStarting
	h.memory = h.cfg.Limits.holdMemory()
	h.mu.Unlock()

	if err := h.open(); err != nil {
		_ = h.Shutdown(ctx)
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.started = stateReady, time.Now()
	for _, u := range append(h.urls[:len(h.urls):len(h.urls)], h.ockam.url) {
		if u == "" {
			continue
		}
		h.logger.Info("listening", "url", u)
	}
	h.warnFiles()
	h.logger.Info("the hub is ready", "identifier", h.identity.Identifier().String(), "root", string(h.root), "policy", h.policy())
	return nil
}

// policy names who may connect, for the log.
func (h *Hub) policy() string {
	switch {
	case h.certificates != nil:
		s := "certificates"
		if h.gate != nil {
			s = "password-file-and-" + s
		}
		if h.cfg.Devices.set() {
			s += "-and-proofs"
		}
		return s
	case h.gate != nil && h.cfg.Devices.set():
		return "password-file-and-proofs"
	case h.gate != nil:
		return "password-file"
	case h.cfg.Devices.set():
		return "proofs"
	case h.cfg.MQTTOpen:
		return "open"
	}
	return "open-on-loopback"
}

// open serves at the ports.
func (h *Hub) open() error {
	server, err := h.newServer(h.ports.mqtt)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server = server
	for i, e := range h.endpoints {
		at := h.ports.mqtt[i].Addr()
		e.addr = shown(e.addr, at)
		h.urls = append(h.urls, e.String())
		h.addrs = append(h.addrs, at)
	}
	if err := server.Serve(); err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	if err := h.openOckam(h.ports.ockam); err != nil {
		return err
	}
	if web := h.ports.web; web != nil {
		h.httpURL = "http://" + shown(h.cfg.HTTP, web.Addr())
		h.status = newStatusServer(h.ready, h.Status, h.metrics(), &h.pages)
		go func(s *statusServer) {
			if err := s.serve(web); err != nil {
				h.failed <- fmt.Errorf("broker: status pages: %w", err)
			}
		}(h.status)
	}
	return nil
}

// shown is the configured host with the port that was opened.
func shown(configured string, got net.Addr) string {
	host, _, err := net.SplitHostPort(configured)
	tcp, ok := got.(*net.TCPAddr)
	if err != nil || !ok {
		return got.String()
	}
	if host == "" {
		host = "0.0.0.0"
	}
	return net.JoinHostPort(host, fmt.Sprint(tcp.Port))
}

// Wait blocks until ctx ends, and then shuts the hub down within its shutdown
// timeout; that is no error. If a part of the hub fails first it shuts the hub
// down and returns why.
func (h *Hub) Wait(ctx context.Context) error {
	var err error
	select {
	case <-ctx.Done():
	case err = <-h.failed:
		h.logger.Error("the hub ends", "err", err)
	case <-h.stopped:
		return nil
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.cfg.shutdownTimeout())
	defer cancel()
	serr := h.Shutdown(end)
	switch {
	case serr == nil:
	case errors.Is(serr, context.DeadlineExceeded):
		h.logger.Warn("the hub did not end in time", "err", serr)
	case err == nil:
		return serr
	}
	return err
}

// Run is Start and Wait.
func (h *Hub) Run(ctx context.Context) error {
	if err := h.Start(ctx); err != nil {
		return err
	}
	return h.Wait(ctx)
}

// Shutdown stops accepting, lets connections take what was written to them,
// ends them, and returns when every goroutine of the hub has ended, or with an
// error when ctx ends first; the rest then goes on in the background. Calling it
// again waits for the first call. A [*StoreError] says that the disk refused the last
// records; their senders have no acknowledgement.
func (h *Hub) Shutdown(ctx context.Context) error {
	h.mu.Lock()
	first := h.state != stateStopping && h.state != stateStopped
	if first {
		h.state = stateStopping
	}
	h.mu.Unlock()
	if first {
		go h.stop(context.WithoutCancel(ctx))
	}
	select {
	case <-h.stopped:
		return h.closing
	case <-ctx.Done():
		return fmt.Errorf("broker: shutdown: %w", context.Cause(ctx))
	}
}

func (h *Hub) stop(ctx context.Context) {
	defer close(h.stopped)
	h.mu.Lock()
	server, status := h.server, h.status
	h.mu.Unlock()
	h.ports.closePeers() // no new connections
	h.drain()
	end, cancel := context.WithTimeout(ctx, h.cfg.shutdownTimeout()/4)
	h.ockam.close(end)
	cancel()
	if server != nil {
		if err := server.Close(); err != nil {
			h.logger.Warn("closing the MQTT server", "err", err)
		}
	}
	if err := h.bridge.Close(); err != nil {
		h.logger.Warn("closing the bridge", "err", err)
	}
	if h.store != nil { // nothing is appended any more
		if err := h.store.Close(); err != nil {
			h.logger.Error("closing the store", "err", err)
			h.closing = &StoreError{Folder: filepath.Join(h.cfg.Data, storeName), Err: err}
		}
	}
	if err := h.proofs.close(); err != nil {
		h.logger.Warn("closing the memory of used proofs", "err", err)
	}
	h.unlock()
	if status != nil { // last, so that readyz says that the hub stops
		end, cancel := context.WithTimeout(ctx, time.Second)
		status.shutdown(end)
		cancel()
	}
	h.ports.close()
	h.mu.Lock()
	h.state = stateStopped
	h.memory()
	h.mu.Unlock()
	h.logger.Info("the hub has ended")
}

// drainStep is how often a stopping hub looks whether its queues still shrink.
const drainStep = 50 * time.Millisecond

// drain waits while peers are still taking what is queued for them, for up to
// half the shutdown timeout.
func (h *Hub) drain() {
	deadline := time.NewTimer(h.cfg.shutdownTimeout() / 2)
	defer deadline.Stop()
	tick := time.NewTicker(drainStep)
	defer tick.Stop()
	c := h.bridge.Counters()
	for left := c.Queued + c.Waiting; left > 0; {
		select {
		case <-tick.C:
		case <-deadline.C:
			return
		}
		c = h.bridge.Counters()
		now := c.Queued + c.Waiting
		if now >= left {
			return
		}
		left = now
	}
}

// Reload reads password file, lists of devices and authorities, and certificate
// again. What cannot be used is reported, and what was in force stays.
// Connections that what is in force now would not let in are ended.
func (h *Hub) Reload() error {
	var errs []error
	if h.gate != nil {
		if p, err := LoadPasswords(h.cfg.PasswordFile); err != nil {
			errs = append(errs, err)
		} else {
			h.gate.replace(p)
			h.logger.Info("the password file was read again", "accounts", p.Len())
		}
	}
	if p, err := h.cfg.loadDevices(); err != nil {
		errs = append(errs, err)
	} else {
		h.proofs.policy.Store(p)
		if h.cfg.Devices.set() {
			h.logger.Info("the list of devices was read again", "devices", len(p.allow), "authorities", len(p.authorities))
		}
	}
	if h.cert != nil {
		if err := h.cert.reload(); err != nil {
			errs = append(errs, err)
		} else {
			h.logger.Info("the TLS certificate was read again")
		}
	}
	h.recheck()
	return errors.Join(errs...)
}

// ready says why the hub is not ready.
func (h *Hub) ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != stateReady {
		return fmt.Errorf("the hub is %v", h.state)
	}
	return nil
}

// Identifier is the hub's, for devices to pin.
func (h *Hub) Identifier() identity.Identifier { return h.identity.Identifier() }

// Root is the topic root.
func (h *Hub) Root() string { return string(h.root) }

// Bridge is the router, for fronts and services of the embedding program.
func (h *Hub) Bridge() *bridge.Bridge { return h.bridge }

// MQTTAddr is the address of the first MQTT listener; nil before Start.
func (h *Hub) MQTTAddr() net.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.addrs) == 0 {
		return nil
	}
	return h.addrs[0]
}

// MQTTURL is the URL of the first MQTT listener; "" before Start.
func (h *Hub) MQTTURL() string {
	if urls := h.MQTTURLs(); len(urls) > 0 {
		return urls[0]
	}
	return ""
}

// MQTTURLs are the URLs of all MQTT listeners, in the order of the
// configuration.
func (h *Hub) MQTTURLs() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.urls...)
}

// HTTPURL is the URL of the status pages; "" without them or before Start.
func (h *Hub) HTTPURL() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.httpURL
}

// Status is what the /status page says.
func (h *Hub) Status() Status {
	h.mu.Lock()
	s := Status{
		Version: StatusVersion, State: h.state.String(), Identifier: h.identity.Identifier().String(),
		Root: string(h.root), MQTT: append([]string(nil), h.urls...), TCP: h.ockam.url, Started: h.started.UTC(),
		Memory: h.cfg.Data == "", Store: h.storeStatus(), Counters: make(map[string]float64),
	}
	h.mu.Unlock()
	if !s.Started.IsZero() {
		s.Uptime = time.Since(s.Started).Seconds()
	}
	for _, m := range h.samples() {
		s.Counters[m.key()] = m.n
	}
	return s
}

// tlsFor is the TLS configuration of an endpoint, nil for none.
func (h *Hub) tlsFor(e endpoint) *tls.Config {
	if !e.secure() {
		return nil
	}
	return h.cert.tlsConfig()
}
