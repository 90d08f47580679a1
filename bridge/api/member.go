package api

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/bare"
	"github.com/sealmq/sealmq/route"
)

const (
	// relayAttribute is the credential's attribute that names the alias its holder
	// may register; anyAlias stands for all of them (spec routing 6.4).
	relayAttribute = "ockam-relay"
	anyAlias       = "*"
	// registerText asks for a dynamic forwarder.
	registerText = "register"

	// readWindow is how many frames of a peer may wait for room elsewhere before no
	// more are taken from it.
	readWindow = 128
	// outputBytes bounds what waits to be sealed for a peer. One frame always fits.
	outputBytes = 1 << 20
)

// wide are limits that everything the bridge has encoded satisfies.
var wide = route.Limits{Frame: route.MaxFrame, Hops: 4096, Address: 64 << 10}

// member is a peer behind a channel: a bridge.Conn and bridge.Acker.
type member struct {
	s    *Server
	ch   *channel.Channel
	who  identity.Identifier
	link *bridge.Link

	ctx    context.Context // ends with the channel
	cancel context.CancelFunc

	unanswered atomic.Int64
	room       chan struct{} // unanswered has become less; room for one

	mu      sync.Mutex // guards what follows
	out     []sealing
	bytes   int // of out, and of what is being sealed
	writing bool
	full    bool // Deliver took less than it was offered
	closed  bool
}

// sealing is a frame on its way into the channel.
type sealing struct {
	seq   uint64 // 0: past the outbox
	frame []byte
}

// deliver takes a message that came through a channel, in order for each.
func (s *Server) deliver(d channel.Delivery) {
	m := s.member(d.Channel)
	if m == nil {
		return
	}
	if m.ch.Confirmed() { // it is one of ours; to a stock peer a notice means nothing
		m.link.TakesNotices()
	}
	f := d.Frame
	f.Return = f.Return.Rest() // the encryptor's address: the port's stands for it
	if !m.mayAsk(&f) {
		m.link.Refuse(&f)
		s.cfg.Counters.add(RefusedRelay)
		s.refused("registration without a credential for it", d.Channel.Peer().Identifier)
		return
	}
	body := route.AppendFrame(make([]byte, 0, f.EncodedLen()), &f)
	// What came out of order may be more than awaitRoom knew of.
	if m.unanswered.Load() > 0 && !m.link.Admits(len(body)) {
		s.cfg.Counters.add(Overrun)
		return
	}
	m.unanswered.Add(1)
	if err := m.link.Receive(body, route.Stored, m, 0); err != nil {
		m.Kick(bridge.KickClosing)
	}
}

// awaitRoom waits while as many frames, or bytes, as allowed of the peer whose frames
// come to an address wait elsewhere, before the next one, of n bytes, is opened. Its
// sender is held back meanwhile, as at a port (see bridge.Local); the bridge answers
// each frame within a second or so.
func (s *Server) awaitRoom(decryptor string, n int) {
	s.mu.Lock()
	m := s.senders[decryptor]
	s.mu.Unlock()
	if m == nil {
		return
	}
	for u := m.unanswered.Load(); u > 0 && (u >= readWindow || !m.link.Admits(n)); u = m.unanswered.Load() {
		select {
		case <-m.room:
		case <-m.ch.Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// member returns the port of a channel's peer, made at its first message; nil when
// there is no room.
func (s *Server) member(ch *channel.Channel) *member {
	s.mu.Lock()
	m, closed := s.members[ch], s.closed
	s.mu.Unlock()
	if m != nil || closed {
		return m
	}
	who := ch.Peer().Identifier
	if !s.admit(who) {
		s.cfg.Counters.add(RefusedIdentity)
		s.refused("too many channels of an identity", who)
		s.spawn(func() { _ = ch.Close() })
		return nil
	}
	m = &member{s: s, ch: ch, who: who, room: make(chan struct{}, 1)}
	m.ctx, m.cancel = context.WithCancel(s.ctx)
	link, err := s.cfg.Bridge.ConnectStream(bridge.Principal{Identity: who, Role: bridge.RoleDevice, Proven: true}, m)
	if err != nil {
		m.cancel()
		s.cfg.Counters.add(RefusedBridge)
		s.leave(who)
		return nil
	}
	s.remember(ch)
	m.link = link
	s.mu.Lock()
	closed = s.closed
	if !closed {
		s.members[ch] = m
		s.senders[ch.DecryptorAddress()] = m
		s.wg.Go(m.watch)
	}
	s.mu.Unlock()
	if closed {
		m.cancel()
		s.leave(who)
		link.Close(true)
		return nil
	}
	s.cfg.Counters.add(Joined)
	return m
}

// admit counts one channel more of an identity, unless it has as many as it may.
func (s *Server) admit(who identity.Identifier) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[who] >= s.cfg.PerIdentity {
		return false
	}
	s.byID[who]++
	return true
}

func (s *Server) leave(who identity.Identifier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[who]--; s.byID[who] == 0 {
		delete(s.byID, who)
	}
}

// remember has the registry keep a peer that has a credential for the hub: strangers,
// who come with as many identities as they like, do not push it out.
func (s *Server) remember(ch *channel.Channel) {
	k, ok := s.cfg.Registry.(identity.Keeper)
	if !ok || s.cfg.Authority == nil || s.cfg.MembersOnly { // in that case its policy does
		return
	}
	peer := ch.Peer()
	for i := range peer.Credentials {
		if peer.Credentials[i].Issuer != s.cfg.Authority.Identifier() {
			continue
		}
		if err := k.Keep(peer.Identifier); err != nil {
			s.cfg.Logger.Warn("cannot remember a peer's keys", "peer", peer.Identifier, "err", err)
		}
		return
	}
}

// watch ends the port with the channel, and what still waits for room on the way to
// the peer.
func (m *member) watch() {
	<-m.ch.Done()
	m.cancel()
	m.stop()
	m.link.Close(true)
	m.s.leave(m.who)
	m.s.mu.Lock()
	delete(m.s.members, m.ch)
	delete(m.s.senders, m.ch.DecryptorAddress())
	m.s.mu.Unlock()
}

// mayAsk reports whether the peer may send the frame: a registration needs a
// credential.
func (m *member) mayAsk(f *route.Frame) bool {
	first, ok := f.Onward.First()
	if !ok || !first.IsLocal() || !bridge.IsRegistration(first.Value) {
		return true
	}
	text, err := bare.StringExact(f.Payload)
	if err != nil || m.s.cfg.Authority == nil {
		return false
	}
	now := m.s.cfg.Clock()
	for _, c := range m.ch.Peer().Credentials {
		if c.Issuer != m.s.cfg.Authority.Identifier() || !now.Before(c.ExpiresAt) {
			continue
		}
		granted, ok := c.Attributes[relayAttribute]
		if ok && (granted == anyAlias || granted == text || text == registerText) {
			return true
		}
	}
	return false
}

// Acked implements bridge.Acker.
func (m *member) Acked(uint64) {
	m.unanswered.Add(-1)
	select {
	case m.room <- struct{}{}:
	default:
	}
}

// Deliver implements bridge.Conn.
func (m *member) Deliver(entries []bridge.Entry) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for i := range entries {
		if !m.push(entries[i].Seq, entries[i].Frame) {
			break
		}
		n++
	}
	m.full = n < len(entries)
	return n
}

// Direct implements bridge.Conn.
func (m *member) Direct(frame []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.push(0, frame)
}

// push queues a frame if there is room; m.mu is held.
func (m *member) push(seq uint64, frame []byte) bool {
	if m.closed || m.bytes > 0 && m.bytes+len(frame) > outputBytes {
		return false
	}
	if !m.writing && !m.s.spawn(m.write) {
		return false
	}
	m.writing = true
	m.out = append(m.out, sealing{seq, append([]byte(nil), frame...)})
	m.bytes += len(frame)
	return true
}

// Kick implements bridge.Conn.
func (m *member) Kick(bridge.KickReason) {
	m.s.spawn(func() { _ = m.ch.Close() })
}

// write seals what is queued and ends when there is nothing left.
func (m *member) write() {
	for {
		m.mu.Lock()
		if len(m.out) == 0 {
			m.out, m.bytes, m.writing = nil, 0, false
			m.mu.Unlock()
			return
		}
		next := m.out[0]
		m.out[0] = sealing{}
		m.out = m.out[1:]
		m.mu.Unlock()

		undeliverable, err := m.seal(next)
		if err != nil {
			m.stop()
			m.Kick(bridge.KickClosing)
			return
		}

		m.mu.Lock()
		m.bytes -= len(next.frame)
		wasFull := m.full
		m.full = false
		m.mu.Unlock()
		switch {
		case undeliverable && next.seq > 0:
			m.link.Undeliverable(next.seq)
			m.link.Delivered(next.seq)
		case next.seq > 0:
			m.link.Delivered(next.seq)
		case wasFull:
			m.link.Ready()
		}
	}
}

// stop has nothing more sealed. What is not acknowledged to the bridge by now is dropped
// there when the port ends with the channel, counted, and noticed.
func (m *member) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.out = nil
}

// seal sends one frame through the channel, waiting for room on the way to the
// peer. It reports a frame that the peer can never get. After an error the peer gets
// nothing more: its channel has ended, or is to end.
func (m *member) seal(next sealing) (undeliverable bool, err error) {
	f, err := route.ParseFrame(next.frame, wide)
	if err == nil {
		err = m.ch.Send(m.ctx, f.Onward, f.Return, f.Payload)
	}
	switch {
	case errors.Is(err, channel.ErrTooLarge):
		m.s.cfg.Counters.add(TooLarge)
		return true, nil
	case err != nil:
		m.s.cfg.Counters.add(Unsent)
	}
	return false, err
}
