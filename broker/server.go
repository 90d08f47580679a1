package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// guestUser is the MQTT user name of a device that has not pinned its hub.
const guestUser = hubproto.GuestUser

// loginTimeout bounds how long a login may wait for its turn.
const loginTimeout = 8 * time.Second

// mqttServer is what the hub needs of its MQTT server.
type mqttServer interface {
	Serve() error
	Close() error
	Recheck() (ended int)
}

// newServer makes the MQTT server on ports that are open, one for each
// endpoint. Nothing but the guarded listeners ever reaches it.
func (h *Hub) newServer(open []net.Listener) (mqttServer, error) {
	cfg := mochibridge.ServerConfig{
		Options: mochibridge.Options{
			Bridge: h.bridge, Root: h.root,
			FrameLimit:   route.Limits{Frame: int(h.cfg.Limits.Frame)}.WithDefaults().Frame,
			Authenticate: h.authenticate,
			Allowed:      h.allowed,
			Outside:      outside,
			OneAccount:   h.gate != nil || h.certificates != nil,
			Observers:    h.cfg.Limits.Observers,
			Counters:     &h.hooked,
			Logger:       h.logger.With("part", "mqtt"),
		},
		Limits:  h.limits,
		Guarded: h.guarded,
		Fixes:   h.cfg.Limits.fixes(),
	}
	for i, e := range h.endpoints {
		l := guard.Config{
			ID: fmt.Sprintf("%s-%d", e.scheme, i), Inherited: open[i], TLS: h.tlsFor(e), WebSocket: e.web(),
			ConnectTimeout: h.cfg.Limits.ConnectTimeout,
		}
		if h.devices.open && loopback(e.addr) {
			l.CheckOrigin = localOrigin
		}
		cfg.Listeners = append(cfg.Listeners, l)
	}
	server, err := mochibridge.NewServer(cfg)
	if err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	return server, nil
}

// authenticate says who a connecting client is.
func (h *Hub) authenticate(c mochibridge.ConnectInfo) (bridge.Principal, error) {
	p, result, err := h.principal(c)
	h.logins[result].Add(1)
	if err != nil {
		return bridge.Principal{}, err
	}
	if p.Role == bridge.RoleDevice && c.Will != nil {
		return bridge.Principal{}, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a device has no will"}
	}
	return p, nil
}

func (h *Hub) principal(c mochibridge.ConnectInfo) (bridge.Principal, loginResult, error) {
	p := bridge.Principal{ClientID: c.ClientID}
	switch string(c.Username) {
	case hubproto.ProofUser:
		p, err := h.deviceLogin(c)
		if err != nil {
			return p, loginProof, err
		}
		return p, loginOK, nil
	case hubproto.GuestUser:
		p, err := guestLogin(c)
		if err != nil {
			return p, loginBad, err
		}
		return p, loginGuest, nil
	}
	if leaf := h.byCertificate(&c); leaf != nil {
		a, err := h.certificateLogin(c.ClientID, leaf)
		if err != nil {
			return p, resultOf(err), refusal(err)
		}
		return a.principal(c.ClientID, &grant{account: a, chain: c.TLS.PeerCertificates}), loginOK, nil
	}
	if h.gate == nil {
		p = openPrincipal(p)
		switch {
		case p.Role == bridge.RoleDevice && h.cfg.Devices.set():
			return p, loginBad, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a device proves its identity here"}
		case h.certificates != nil:
			return p, loginBad, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "a client shows its certificate here"}
		case !h.cfg.MQTTOpen && (h.cfg.Devices.set() || !fromLoopback(c.RemoteAddr)):
			return p, loginBad, &mochibridge.Refusal{Code: mochibridge.NotAllowed, Reason: "not open to everybody"}
		}
		return p, loginOpen, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), loginTimeout)
	defer cancel()
	a, err := h.gate.login(ctx, c.RemoteAddr, c.ClientID, string(c.Username), c.Password)
	if err != nil {
		return p, resultOf(err), refusal(err)
	}
	return a.principal(c.ClientID, &grant{account: a}), loginOK, nil
}

// principal is who an account is under a client id. The operator vouches for the
// identity by the account.
func (a *Account) principal(clientID string, g *grant) bridge.Principal {
	return bridge.Principal{ClientID: clientID, Role: a.Role, Identity: a.Identity, Proven: a.Role == bridge.RoleDevice, Account: a.User, Grant: g}
}

// openPrincipal believes what a client says about itself. Who does not claim to
// be a device may observe.
func openPrincipal(p bridge.Principal) bridge.Principal {
	if id, ok := deviceOf(p.ClientID); ok {
		p.Role, p.Identity = bridge.RoleDevice, id
		return p
	}
	p.Role = bridge.RoleObserver
	return p
}

// refusal picks the answer to a login that failed.
func refusal(err error) error {
	r := &mochibridge.Refusal{Code: mochibridge.BadCredentials, Reason: "wrong user name or password", Err: err}
	switch {
	case errors.Is(err, ErrClientID):
		r.Code, r.Reason = mochibridge.NotAllowed, "this account may not use this client id"
	case errors.Is(err, ErrCertificate):
		r.Code, r.Reason = mochibridge.NotAllowed, "this certificate may not connect"
	case errors.Is(err, ErrLoginBusy):
		r.Code, r.Reason = mochibridge.Full, "too many logins at once, try again"
	}
	return r
}

// localOrigin admits a browser's request to a hub that is open to everybody on this
// machine when its page is from this machine: the name of any other page's host can be
// made to lead here, and then it is the same host.
func localOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true // no browser
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host) && loopback(net.JoinHostPort(u.Hostname(), "0"))
}

// outside decides about topics that are not under the root: ordinary clients
// may use all of them, except that nobody writes to $ topics; devices and guests
// none.
func outside(p bridge.Principal, topic string, write bool) bool {
	switch p.Role {
	case bridge.RoleUser, bridge.RoleObserver:
		return !write || !strings.HasPrefix(topic, "$")
	}
	return false
}
