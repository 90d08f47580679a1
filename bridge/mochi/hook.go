package mochibridge

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/loglimit"
	"github.com/sealmq/sealmq/topics"
)

// Hook is the forwarder's hook for one mochi server. Make it with New.
type Hook struct {
	mqtt.HookBase
	o     Options
	purge sync.Once

	lines *loglimit.Lines // of refusals in the log
	moves *loglimit.Lines // of who comes and goes
	users accounts

	rechecks atomic.Uint64 // how often Recheck has begun

	mu       sync.Mutex
	live     map[string]*session   // devices and guests, by client id
	sessions map[*session]struct{} // all, with Options.Allowed

	watchMu   sync.Mutex
	observers map[*session]struct{} // observers with a filter under the root
	unobserve func()                // ends the bridge's observation
}

// Counters returns the counters in use.
func (h *Hook) Counters() *Counters { return h.o.Counters }

// ID names the hook.
func (h *Hook) ID() string { return "sealmq-forwarder" }

var provides = [256]bool{
	mqtt.OnStarted:             true,
	mqtt.OnConnect:             true,
	mqtt.OnConnectAuthenticate: true,
	mqtt.OnACLCheck:            true,
	mqtt.OnSessionEstablish:    true,
	mqtt.OnSessionEstablished:  true,
	mqtt.OnDisconnect:          true,
	mqtt.OnPacketRead:          true,
	mqtt.OnPacketProcessed:     true,
	mqtt.OnSubscribe:           true,
	mqtt.OnSubscribed:          true,
	mqtt.OnUnsubscribe:         true,
	mqtt.OnPublish:             true,
	mqtt.OnWill:                true,
}

// Provides reports which methods the hook has.
func (h *Hook) Provides(b byte) bool { return provides[b] }

// failed is called with what recover returned, and reports whether that was a
// panic.
func (h *Hook) failed(method string, v any) bool {
	if v == nil {
		return false
	}
	h.o.Counters.add(HookPanicked)
	h.o.Logger.Error("panic in the forwarder's hook", "method", method, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
	return true
}

// Stop ends the observation of the bridge. mochi calls it when it closes.
func (h *Hook) Stop() error {
	h.watchMu.Lock()
	end := h.unobserve
	h.unobserve = nil
	clear(h.observers)
	h.watchMu.Unlock()
	if end != nil {
		end()
	}
	return nil
}

// OnStarted removes retained messages under the root that a store brought back.
func (h *Hook) OnStarted() {
	defer func() { h.failed("OnStarted", recover()) }()
	h.purge.Do(h.purgeRetained)
}

func (h *Hook) purgeRetained() {
	for topic, pk := range h.o.Server.Topics.Retained.GetAll() {
		if kind, _ := h.o.Root.Parse(topic); kind != topics.Outside {
			pk.TopicName, pk.Payload = topic, nil
			h.o.Server.Topics.RetainMessage(pk)
			h.o.Counters.add(RetainedPurged)
		}
	}
}

// errRefused ends a connection whose CONNACK the hook has written. It is not a
// packets.Code, so mochi writes nothing more.
var errRefused = errors.New("mochibridge: connection refused")

// OnConnect decides who may connect, whatever other hooks say.
func (h *Hook) OnConnect(cl *mqtt.Client, pk packets.Packet) (err error) {
	defer func() {
		if h.failed("OnConnect", recover()) {
			err = errRefused
		}
	}()
	h.purge.Do(h.purgeRetained) // listeners serve before OnStarted
	c := &pk.Connect
	if c.WillFlag && h.reaches(c.WillTopic) {
		return h.refuse(cl, RefusedWill, &Refusal{Code: NotAllowed, Reason: "will topic not allowed"})
	}
	info := ConnectInfo{
		ClientID:        strings.Clone(c.ClientIdentifier), // not the whole packet with it
		Password:        c.Password,
		RemoteAddr:      cl.Net.Conn.RemoteAddr(),
		Listener:        cl.Net.Listener,
		TLS:             tlsState(cl),
		Clean:           c.Clean,
		KeepAlive:       c.Keepalive,
		ProtocolVersion: pk.ProtocolVersion,
	}
	if c.UsernameFlag {
		info.Username = c.Username
	}
	if c.WillFlag {
		info.Will = &Will{Topic: c.WillTopic, QoS: c.WillQos, Retain: c.WillRetain}
	}
	before := h.rechecks.Load()
	who, err := h.o.Authenticate(info)
	switch {
	case errors.Is(err, ErrNotOurs):
		if h.deviceID(cl.ID) {
			return h.refuse(cl, RefusedClientID, &Refusal{Code: NotAllowed, Reason: "client id belongs to a device"})
		}
		return nil
	case err != nil:
		r := new(Refusal)
		if !errors.As(err, &r) {
			r = &Refusal{Code: NotAllowed, Reason: "not allowed", Err: err}
		}
		return h.refuse(cl, events, r)
	case who.ClientID != c.ClientIdentifier || who.ClientID == "" && who.Role != bridge.RoleUser && who.Role != bridge.RoleObserver:
		return h.refuse(cl, RefusedClientID, &Refusal{Code: BadClientID, Reason: "client id not valid"})
	}
	// mochi publishes a will without asking who may.
	if c.WillFlag && h.o.Outside != nil && !h.o.Outside(who, c.WillTopic, true) {
		return h.refuse(cl, RefusedWill, &Refusal{Code: NotAllowed, Reason: "will topic not allowed"})
	}
	return h.admit(cl, who, before)
}

// reaches reports whether a will on topic, which mochi does not check, could
// get under the root.
func (h *Hook) reaches(topic string) bool {
	if strings.ContainsAny(topic, "+#") {
		touches, _ := h.o.Root.Overlaps(topic)
		return touches
	}
	kind, _ := h.o.Root.Parse(topic)
	return kind != topics.Outside
}

// deviceID reports whether a client id is a device's: an identifier, alone or
// with a suffix, or one that a device is connected with.
func (h *Hook) deviceID(id string) bool {
	name, _, _ := strings.Cut(id, "-")
	if _, err := identity.ParseIdentifier(name); err == nil {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.live[id]
	return ok
}

// admit makes a session for a principal. before is as in enter.
func (h *Hook) admit(cl *mqtt.Client, who bridge.Principal, before uint64) error {
	sends := who.Role == bridge.RoleDevice || who.Role == bridge.RoleGuest
	switch {
	case sends && !topics.ValidDevice(who.ClientID):
		return h.refuse(cl, RefusedClientID, &Refusal{Code: BadClientID, Reason: "client id is not a device name"})
	case !sends && h.deviceID(cl.ID):
		return h.refuse(cl, RefusedClientID, &Refusal{Code: NotAllowed, Reason: "client id belongs to a device"})
	}
	conn, err := h.guarded(cl)
	if err != nil {
		return h.refuse(cl, events, &Refusal{Code: NotAllowed, Reason: "connection not usable", Err: err})
	}
	s := newSession(h, cl, conn, who)
	if !h.enter(s, before) {
		return h.refuse(cl, Revoked, &Refusal{Code: NotAllowed, Reason: "no longer allowed"})
	}
	if sends {
		if err := s.connect(); err != nil {
			r := &Refusal{Code: NotAllowed, Reason: "not allowed", Err: err}
			switch {
			case errors.Is(err, bridge.ErrTooManyPorts), errors.Is(err, bridge.ErrClosed):
				r.Code, r.Reason = Full, "no room for another device"
			case errors.Is(err, bridge.ErrPortQuota):
				r.Code, r.Reason = Full, "too many client ids of this identity"
			case errors.Is(err, bridge.ErrNotProven):
				r.Reason = "client id belongs to a proven identity"
			}
			return h.refuse(cl, events, r)
		}
	}
	if who.Account != "" {
		// The account, not what the client calls itself, also owns a kept session.
		cl.Properties.Username = []byte(who.Account)
	}
	if !sends && h.o.OneAccount && who.ClientID != "" {
		if !h.users.take(h.o.Server.Clients, cl.ID, string(cl.Properties.Username)) {
			return h.refuse(cl, RefusedClientID, &Refusal{Code: NotAllowed, Reason: "client id is in use by another user"})
		}
		conn.AtEnd(func() { h.users.drop(cl.ID) })
	}
	switch who.Role {
	case bridge.RoleDevice:
		conn.SetUser("device " + string(who.Identity[:]))
	case bridge.RoleGuest:
		conn.SetUser("")
	}
	conn.SetValue(s)
	conn.AtEnd(s.end)
	if who.Role == bridge.RoleGuest {
		timer := time.AfterFunc(cmp.Or(h.o.guestTime, guestTime), func() {
			h.o.Counters.add(GuestEnded)
			cl.Stop(errGuestTime)
		})
		conn.AtEnd(func() { timer.Stop() })
	}
	return nil
}

// guestTime is how long a guest may stay: what it is there for takes one round trip.
const guestTime = 30 * time.Second

var errGuestTime = errors.New("mochibridge: guests do not stay")

// guarded returns the client's guarded connection. One of another listener is
// wrapped: mochi reads on from its buffer and writes through the wrapper. Nobody
// else uses the field before the client is established.
func (h *Hook) guarded(cl *mqtt.Client) (*guard.Conn, error) {
	if c, ok := cl.Net.Conn.(*guard.Conn); ok {
		return c, nil
	}
	c, err := guard.Wrap(cl.Net.Conn, h.o.Guard)
	if err != nil {
		return nil, err
	}
	h.o.Counters.add(Wrapped)
	cl.Net.Conn = c
	return c, nil
}

// OnDisconnect has what ended a wrapped connection counted, and logs the end.
func (h *Hook) OnDisconnect(cl *mqtt.Client, err error, _ bool) {
	defer func() { h.failed("OnDisconnect", recover()) }()
	if c, ok := cl.Net.Conn.(*guard.Conn); ok {
		c.Ended(err)
	}
	if s := sessionOf(cl); s != nil {
		s.went(err)
	}
}

func tlsState(cl *mqtt.Client) *tls.ConnectionState {
	switch c := cl.Net.Conn.(type) {
	case *guard.Conn:
		return c.TLS()
	case *tls.Conn:
		st := c.ConnectionState()
		return &st
	}
	return nil
}

// refuse writes the CONNACK and returns the error that ends the connection.
func (h *Hook) refuse(cl *mqtt.Client, e Event, r *Refusal) error {
	if e == events {
		switch r.Code {
		case BadCredentials:
			e = RefusedBadCredentials
		case Full:
			e = RefusedFull
		case BadClientID:
			e = RefusedClientID
		default:
			e = RefusedNotAllowed
		}
	}
	h.o.Counters.add(e)
	// A flood of refusals must not become a flood of lines; each is counted.
	if unlogged, ok := h.lines.Next(); ok {
		log := h.o.Logger
		if r.Err != nil {
			log = log.With("err", r.Err)
		}
		log.Info("connection refused", "client", clip(cl.ID), "peer", cl.Net.Remote, "listener", cl.Net.Listener,
			"why", e.String(), "reason", r.Reason, "unlogged", unlogged)
	}
	_ = cl.WritePacket(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connack},
		ReasonCode:  r.Code.connack(cl.Properties.ProtocolVersion == 5),
		Properties:  packets.Properties{ReasonString: r.Reason},
	})
	return errRefused
}

// sessionOf returns the session of a client, nil for those that are not ours.
func sessionOf(cl *mqtt.Client) *session {
	if c, ok := cl.Net.Conn.(*guard.Conn); ok {
		s, _ := c.Value().(*session)
		return s
	}
	return nil
}

// OnConnectAuthenticate lets in whom OnConnect has let in.
func (h *Hook) OnConnectAuthenticate(cl *mqtt.Client, _ packets.Packet) (ok bool) {
	defer func() {
		if h.failed("OnConnectAuthenticate", recover()) {
			ok = false
		}
	}()
	return sessionOf(cl) != nil
}

// OnACLCheck answers for what lies outside the root; under it, it is not asked.
func (h *Hook) OnACLCheck(cl *mqtt.Client, topic string, write bool) (ok bool) {
	defer func() {
		if h.failed("OnACLCheck", recover()) {
			ok = false
		}
	}()
	s := sessionOf(cl)
	if s == nil || h.o.Outside == nil {
		return false
	}
	if kind, _ := h.o.Root.Parse(topic); kind != topics.Outside {
		return false
	}
	return h.o.Outside(s.who, topic, write)
}

// OnSessionEstablish remembers which session an observer comes back to: mochi is about to
// replace it, if it keeps it.
func (h *Hook) OnSessionEstablish(cl *mqtt.Client, pk packets.Packet) {
	defer func() { h.failed("OnSessionEstablish", recover()) }()
	s := sessionOf(cl)
	if s == nil || s.who.Role != bridge.RoleObserver || pk.Connect.Clean {
		return
	}
	old, ok := h.o.Server.Clients.Get(cl.ID)
	if ok && (!old.Properties.Clean || old.Properties.ProtocolVersion == 5) {
		s.before = sessionOf(old)
	}
}

// OnSessionEstablished taps the connection: from here on frames and their
// acknowledgements do not pass through mochi. An observer that came back sees on.
func (h *Hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	defer func() { h.failed("OnSessionEstablished", recover()) }()
	s := sessionOf(cl)
	if s == nil {
		return
	}
	s.came()
	switch {
	case s.before != nil:
		h.succeed(s)
	case s.link != nil && !h.o.noTap:
		s.conn.SetTap(s.tap, s.flush, s.long)
	}
}

// OnWill drops wills under the root, which only a stored session can have.
func (h *Hook) OnWill(_ *mqtt.Client, w mqtt.Will) (out mqtt.Will, err error) {
	defer func() {
		if h.failed("OnWill", recover()) {
			out, err = mqtt.Will{}, nil
		}
	}()
	if h.reaches(w.TopicName) {
		h.o.Counters.add(WillSuppressed)
		return mqtt.Will{}, nil
	}
	return w, nil
}
