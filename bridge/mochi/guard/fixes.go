package guard

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/mochi-mqtt/server/v2/system"
)

// Defaults of [FixesConfig].
const (
	DefaultTopicBytes    = 1024
	DefaultTopicLevels   = 32
	DefaultSubscriptions = 1024
	DefaultRetained      = 100_000
	DefaultRetainedBytes = 128 << 20
	DefaultFilterBytes   = 256 << 20
	DefaultSessions      = 131_072
	DefaultQueuedBytes   = 256 << 20
)

// FixesConfig bounds what ordinary clients may do. Zero fields mean the
// defaults, negative ones no limit.
type FixesConfig struct {
	// TopicBytes and TopicLevels bound topics and filters. mochi makes a tree
	// node for each level, and walks a topic in time that grows with the square
	// of its levels, under a lock: a filter of 65,535 slashes stalls a server
	// for seconds.
	TopicBytes  int
	TopicLevels int
	// Subscriptions is the number of filters one session may hold.
	Subscriptions int
	// FilterBytes bounds what the filters of all sessions take in mochi's tree, about
	// 640 bytes for each level that no other filter begins with. One session may have
	// a quarter of it, 8 MiB at most, without regard to what others share, and one user
	// name or network half of it, where who comes first pays for what is shared.
	FilterBytes int64
	// Retained and RetainedBytes bound the retained messages of the server, with the
	// levels of their topics as above. Beyond them a message is delivered, but not
	// retained. Half of it may be of one user name, and of one IP address or /64
	// network; so it is with Sessions and QueuedBytes.
	Retained      int
	RetainedBytes int
	// Sessions bounds the sessions that are connected or kept: beyond it nobody
	// is admitted who asks for a session that outlives the connection and has
	// none yet.
	Sessions int
	// QueuedBytes bounds what mochi keeps for all sessions together until they
	// acknowledge it, away or connected. Beyond it a message is not kept: a
	// client that is connected gets it once, one that is away not at all. Wills have
	// a quarter as much for themselves, of which one user name, and one IP address or
	// /64 network, may have a quarter; beyond it nobody is admitted who leaves one.
	QueuedBytes int64
	// AllowWill decides whether a client may leave a will on a topic, which
	// mochi asks no ACL about. nil allows every valid topic outside $SYS.
	AllowWill func(cl *mqtt.Client, topic string) bool
	// KeepReceiveMaximum leaves mochi's flow control for MQTT 5 clients on. It
	// deletes messages before they are acknowledged, so it is switched off by
	// default: a client's Receive Maximum is then not honoured.
	KeepReceiveMaximum bool

	// Counters counts, nil: the hook has its own.
	Counters *Counters
	// Logger gets one line for each recovered panic. nil discards.
	Logger *slog.Logger
}

// Fixes is a hook for a mochi server that corrects faults of v2.7.9 met by
// ordinary clients. It neither authenticates nor authorises. It works with any
// listener, and fully with [Listener], which tells it when a connection is over:
// behind one that mochi gives up while it takes a session over it cleans up at once,
// with other listeners when the next of that client id comes, or at OnSysInfoTick.
type Fixes struct {
	mqtt.HookBase
	server *mqtt.Server
	cfg    FixesConfig
	gates  gates
	alone  *mqtt.Client // publishes the wills of clients lost to a panic

	mu    sync.Mutex
	live  map[*mqtt.Client]*session // from OnSessionEstablish to the end
	sizes map[string]retained       // retained messages by topic
	bytes int                       // and the sum of their sizes
	kept  paths                     // and the way to them
	each  [2]shares                 // and whose they are: their number, and bytes

	queued   queued
	filters  filters
	wills    wills
	sessions sessions

	plain sync.Map // *mqtt.Client to *session, for connections of other listeners
}

// retained is what is known of a retained message.
type retained struct {
	size  int
	owner owner // who published it last; zero: it was there at the start
}

// session is what Fixes knows about one connection.
type session struct {
	cl          *mqtt.Client
	conn        *Conn // nil: another listener's
	owner       owner
	ids         ids
	established atomic.Bool
	over        atomic.Bool // OnDisconnect was called
	inside      atomic.Bool // holds its client id's gate
	changes     []change    // the reading goroutine's, within one packet
}

// NewFixes returns a hook for server.
func NewFixes(server *mqtt.Server, cfg FixesConfig) (*Fixes, error) {
	if server == nil {
		return nil, errors.New("guard: fixes need a server")
	}
	def := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	def(&cfg.TopicBytes, DefaultTopicBytes)
	def(&cfg.TopicLevels, DefaultTopicLevels)
	def(&cfg.Subscriptions, DefaultSubscriptions)
	def(&cfg.Retained, DefaultRetained)
	def(&cfg.RetainedBytes, DefaultRetainedBytes)
	def(&cfg.Sessions, DefaultSessions)
	if cfg.QueuedBytes == 0 {
		cfg.QueuedBytes = DefaultQueuedBytes
	}
	if cfg.FilterBytes == 0 {
		cfg.FilterBytes = DefaultFilterBytes
	}
	if cfg.Counters == nil {
		cfg.Counters = new(Counters)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Fixes{
		server:  server,
		cfg:     cfg,
		alone:   server.NewClient(nil, mqtt.LocalListener, "guard", true),
		live:    make(map[*mqtt.Client]*session),
		sizes:   make(map[string]retained),
		kept:    newPaths(),
		filters: filters{paths: newPaths(), of: make(map[string]*holder)},
		wills:   wills{of: make(map[string]will)},
	}, nil
}

// Counters returns the counters in use.
func (f *Fixes) Counters() *Counters { return f.cfg.Counters }

// ID names the hook.
func (f *Fixes) ID() string { return "sealmq-fixes" }

var fixesProvides = [256]bool{
	mqtt.OnStarted:            true,
	mqtt.OnSysInfoTick:        true,
	mqtt.OnConnect:            true,
	mqtt.OnSessionEstablish:   true,
	mqtt.OnSessionEstablished: true,
	mqtt.OnDisconnect:         true,
	mqtt.OnPacketRead:         true,
	mqtt.OnPacketEncode:       true,
	mqtt.OnSubscribe:          true,
	mqtt.OnSubscribed:         true,
	mqtt.OnUnsubscribe:        true,
	mqtt.OnUnsubscribed:       true,
	mqtt.OnPublish:            true,
	mqtt.OnRetainMessage:      true,
	mqtt.OnRetainedExpired:    true,
	mqtt.OnQosPublish:         true,
	mqtt.OnQosComplete:        true,
	mqtt.OnQosDropped:         true,
	mqtt.OnWill:               true,
	mqtt.OnWillSent:           true,
	mqtt.OnClientExpired:      true,
}

// Provides reports which methods the hook has.
func (f *Fixes) Provides(b byte) bool { return fixesProvides[b] }

// recovered keeps a panic of ours from ending the process.
func (f *Fixes) recovered(method string) {
	if v := recover(); v != nil {
		f.cfg.Counters.add(HookPanicked)
		f.cfg.Logger.Error("panic in a hook", "method", method, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
	}
}

// session returns what is known about a connection, nil before it is
// established.
func (f *Fixes) session(cl *mqtt.Client) *session {
	if c, ok := cl.Net.Conn.(*Conn); ok {
		return c.session.Load()
	}
	if s, ok := f.plain.Load(cl); ok {
		return s.(*session)
	}
	return nil
}

// owner is whom that is charged to which is kept for a client, or of it.
func (f *Fixes) owner(cl *mqtt.Client) owner {
	if s := f.session(cl); s != nil {
		return s.owner
	}
	return ownerOf(cl)
}

// OnStarted takes stock of retained messages that a store brought back.
func (f *Fixes) OnStarted() {
	defer f.recovered("OnStarted")
	for topic, pk := range f.server.Topics.Retained.GetAll() {
		if !strings.HasPrefix(topic, mqtt.SysPrefix) {
			f.retain(topic, retained{size: keptRetained(&pk)})
		}
	}
}

// Errors that end a connection whose CONNACK was written.
var (
	errWill     = errors.New("guard: will refused")
	errSessions = errors.New("guard: too many kept sessions")
)

// OnConnect refuses wills that mochi would publish unchecked, and switches off
// two mechanisms for MQTT 5 clients that lose messages.
func (f *Fixes) OnConnect(cl *mqtt.Client, pk packets.Packet) (err error) {
	defer f.recovered("OnConnect")
	if pk.Connect.WillFlag && !f.willAllowed(cl, pk.Connect.WillTopic) {
		f.cfg.Counters.add(WillRefused)
		refuse(cl, packets.Err3NotAuthorized, packets.ErrNotAuthorized, "will topic not allowed")
		return errWill
	}
	if !f.wills.fits(cl, f.willRoom()) {
		f.noRoomForWill(cl)
		return errWill
	}
	if f.tooManySessions(cl) {
		f.cfg.Counters.add(SessionsFull)
		refuse(cl, packets.Err3ServerUnavailable, packets.ErrQuotaExceeded, "no room for another kept session")
		return errSessions
	}
	if !f.cfg.KeepReceiveMaximum {
		cl.Properties.Props.ReceiveMaximum = 0
		cl.State.Inflight.ResetSendQuota(0)
	}
	// Redelivered messages would go out with an alias that the new connection
	// does not know.
	cl.Properties.Props.TopicAliasMaximum = 0
	own(cl)
	// A session without expiry ends with its connection, and a will is not delayed
	// beyond its session (MQTT 5 3.1.3.2.2). mochi would keep it, for as long as 136
	// years, one for each client id that ever connected.
	if !pk.Properties.SessionExpiryIntervalFlag {
		cl.Properties.Will.WillDelayInterval = 0
	}
	return nil
}

// own copies what mochi keeps of a CONNECT for as long as the session lives: its
// strings are parts of the packet, all of which would stay for them. User properties
// of a CONNECT mean nothing to a server, and are dropped.
func own(cl *mqtt.Client) {
	p := &cl.Properties
	cl.ID = strings.Clone(cl.ID)
	p.Username = bytes.Clone(p.Username)
	p.Props.User = nil
	p.Props.AuthenticationMethod = strings.Clone(p.Props.AuthenticationMethod)
	p.Props.AuthenticationData = bytes.Clone(p.Props.AuthenticationData)
	w := &p.Will
	w.TopicName, w.Payload = strings.Clone(w.TopicName), bytes.Clone(w.Payload)
	for i := range w.User {
		w.User[i].Key, w.User[i].Val = strings.Clone(w.User[i].Key), strings.Clone(w.User[i].Val)
	}
}

// propertyCost is about what a user property takes besides its bytes.
const propertyCost = 32

// kept returns the bytes that a message takes while it is kept: its strings are parts
// of the packet that brought it, and keep all of that.
func kept(pk *packets.Packet) int {
	p := &pk.Properties
	n := len(pk.TopicName) + len(pk.Payload) + len(p.CorrelationData) + len(p.ContentType) + len(p.ResponseTopic)
	for _, u := range p.User {
		n += len(u.Key) + len(u.Val)
	}
	return max(n, pk.FixedHeader.Remaining) + propertyCost*len(p.User)
}

// keptRetained is kept for a retained message; an empty one removes what is there.
func keptRetained(pk *packets.Packet) int {
	if len(pk.Payload) == 0 {
		return 0
	}
	return kept(pk)
}

// refuse writes a CONNACK.
func refuse(cl *mqtt.Client, v3, v5 packets.Code, reason string) {
	code := v3.Code
	if cl.Properties.ProtocolVersion == 5 {
		code = v5.Code
	}
	_ = cl.WritePacket(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connack},
		ReasonCode:  code,
		Properties:  packets.Properties{ReasonString: reason},
	})
}

// tooManySessions reports whether a client wants a session kept for which there
// is no room.
func (f *Fixes) tooManySessions(cl *mqtt.Client) bool {
	if !keeps(cl) || f.cfg.Sessions < 0 {
		return false
	}
	if !f.sessions.fits(cl.ID, ownerOf(cl), half(int64(f.cfg.Sessions))) {
		return true
	}
	if f.server.Clients.Len() < f.cfg.Sessions {
		return false
	}
	_, ok := f.server.Clients.Get(cl.ID)
	return !ok
}

func (f *Fixes) willAllowed(cl *mqtt.Client, topic string) bool {
	if topic == "" || !mqtt.IsValidFilter(topic, true) || !f.fits(topic) {
		return false
	}
	return f.cfg.AllowWill == nil || f.cfg.AllowWill(cl, topic)
}

// fits reports whether a topic or filter is within the limits.
func (f *Fixes) fits(topic string) bool {
	if f.cfg.TopicBytes >= 0 && len(topic) > f.cfg.TopicBytes {
		return false
	}
	return f.cfg.TopicLevels < 0 || strings.Count(topic, "/") < f.cfg.TopicLevels
}

// OnSessionEstablish enters the client id's gate: from here to
// OnSessionEstablished mochi takes over the session of an earlier connection.
func (f *Fixes) OnSessionEstablish(cl *mqtt.Client, pk packets.Packet) {
	defer f.recovered("OnSessionEstablish")
	s := &session{cl: cl, owner: ownerOf(cl)}
	s.conn, _ = cl.Net.Conn.(*Conn)
	s.enter(f)
	if old, ok := f.server.Clients.Get(cl.ID); ok && !pk.Connect.Clean {
		if o := f.session(old); o != nil {
			s.ids.inherit(&o.ids)
		}
	}
	f.sessions.begin(cl, s.owner)
	f.mu.Lock()
	f.live[cl] = s
	f.mu.Unlock()
	if s.conn == nil {
		f.plain.Store(cl, s)
	} else {
		s.conn.session.Store(s)
		if !s.conn.known {
			s.conn.user = s.owner.user
		}
		s.conn.BeginBacklog()
		if s.listened() {
			s.conn.AtEnd(func() { f.ended(s) })
		}
	}
	if !f.wills.begin(cl, f.willRoom()) {
		f.lateWill(s)
	}
}

// lateWill refuses a client whose will had room at OnConnect and has none any more now
// that it counts. mochi then cannot send its own CONNACK, and gives the connection up.
func (f *Fixes) lateWill(s *session) {
	s.cl.Properties.Will = mqtt.Will{}
	f.noRoomForWill(s.cl)
	s.cl.Stop(errWill)
	if !s.listened() {
		s.leave(f)
		f.forget(s)
	}
}

// willRoom is how many bytes wills may take; negative: any number.
func (f *Fixes) willRoom() int64 {
	if f.cfg.QueuedBytes < 0 {
		return -1
	}
	return f.cfg.QueuedBytes / 4
}

func (f *Fixes) noRoomForWill(cl *mqtt.Client) {
	f.cfg.Counters.add(WillRefused)
	refuse(cl, packets.Err3ServerUnavailable, packets.ErrQuotaExceeded, "no room for another will")
}

// listened reports whether the connection is of a [Listener], which says when mochi is
// done with it.
func (s *session) listened() bool { return s.conn != nil && s.conn.listened() }

func (s *session) enter(f *Fixes) {
	if f.gates.enter(s, f.abandoned) {
		s.inside.Store(true)
	} else {
		f.cfg.Counters.add(GateTimeout)
	}
}

func (s *session) leave(f *Fixes) {
	if s.inside.CompareAndSwap(true, false) {
		f.gates.leave(s.cl.ID)
	}
}

// OnSessionEstablished leaves the gate.
func (f *Fixes) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	defer f.recovered("OnSessionEstablished")
	s := f.session(cl)
	if s == nil {
		return
	}
	s.established.Store(true)
	if s.conn != nil {
		s.conn.EndBacklog()
	}
	s.leave(f)
}

// OnDisconnect enters the gate again, until mochi has cleaned up behind the
// connection. A takeover that is under way is then complete, and mochi sees
// that the session is no longer this connection's.
func (f *Fixes) OnDisconnect(cl *mqtt.Client, err error, expire bool) {
	defer f.recovered("OnDisconnect")
	s := f.session(cl)
	if s == nil {
		return
	}
	if s.conn != nil {
		s.conn.Ended(err)
	} else if errors.Is(err, packets.ErrPacketTooLarge) {
		oversized(f.cfg.Counters, f.cfg.Logger, cl.Net.Remote)
	}
	s.over.Store(true)
	f.wills.end(cl)
	if expire { // a DISCONNECT of MQTT 5 may say so
		f.sessions.end(cl)
	}
	s.enter(f)
	if !s.listened() {
		// Nobody tells when another listener's connection is over.
		s.leave(f)
		f.forget(s)
	}
}

func (f *Fixes) forget(s *session) {
	f.mu.Lock()
	delete(f.live, s.cl)
	f.mu.Unlock()
	f.plain.Delete(s.cl)
}

// ended runs when mochi is done with a connection of our listener. It cleans up
// where mochi did not: after a panic, and when the CONNACK could not be sent.
func (f *Fixes) ended(s *session) {
	defer f.recovered("AtEnd")
	defer f.forget(s)
	if !s.over.Load() {
		if !s.inside.Load() {
			s.enter(f)
		}
		f.sweep(s)
		f.wills.end(s.cl)
	}
	s.leave(f)
}

// abandoned cleans up behind a connection of another listener that mochi has given up
// between OnSessionEstablish and OnSessionEstablished, because its CONNACK or what lay
// there for it could not be written: of that it tells no hook.
func (f *Fixes) abandoned(s *session) {
	if s.listened() || s.established.Load() || !s.cl.Closed() || s.over.Swap(true) {
		return
	}
	f.sweep(s)
	f.wills.end(s.cl)
	s.leave(f)
	f.forget(s)
}

func (f *Fixes) sweep(s *session) {
	cl := s.cl
	if cur, ok := f.server.Clients.Get(cl.ID); !ok || cur != cl || cl.IsTakenOver() {
		return
	}
	f.cfg.Counters.add(SessionSwept)
	if s.established.Load() && atomic.CompareAndSwapUint32(&cl.Properties.Will.Flag, 1, 0) {
		w := cl.Properties.Will
		_ = f.server.InjectPacket(f.alone, packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: w.Qos, Retain: w.Retain},
			TopicName:   w.TopicName,
			Payload:     w.Payload,
			Properties:  packets.Properties{User: w.User},
			PacketID:    uint16(w.Qos),
			Origin:      cl.ID,
		})
	}
	p := &cl.Properties
	if (p.ProtocolVersion == 5 && p.Props.SessionExpiryInterval == 0) || (p.ProtocolVersion < 5 && p.Clean) {
		cl.ClearInflights()
		f.server.UnsubscribeClient(cl)
		f.server.Clients.Delete(cl.ID)
		f.sessions.end(cl)
	}
}

// OnSysInfoTick disconnects clients that the server has lost, so that they
// connect again; there should be none. And it cleans up behind connections that
// mochi has given up without a word.
func (f *Fixes) OnSysInfoTick(*system.Info) {
	defer f.recovered("OnSysInfoTick")
	f.look(time.Now().Unix())
}

func (f *Fixes) look(now int64) {
	f.mu.Lock()
	var lost []*mqtt.Client
	var left []*session
	for cl, s := range f.live {
		if !s.established.Load() || s.over.Load() || cl.Closed() {
			// A second later mochi is no more about to put it into its table.
			if at := cl.StopTime(); at > 0 && at < now-1 {
				left = append(left, s)
			}
			continue
		}
		if cur, ok := f.server.Clients.Get(cl.ID); !ok || cur != cl {
			lost = append(lost, cl)
		}
	}
	f.mu.Unlock()
	for _, s := range left {
		f.abandoned(s)
	}
	for _, cl := range lost {
		f.cfg.Counters.add(GhostStopped)
		cl.Stop(packets.ErrSessionTakenOver)
	}
}

// OnClientExpired removes the subscriptions of an expired session, which mochi
// leaves in its tree.
func (f *Fixes) OnClientExpired(cl *mqtt.Client) {
	defer f.recovered("OnClientExpired")
	f.sessions.end(cl)
	cl.ClearInflights()
	f.server.UnsubscribeClient(cl)
}

// OnPacketRead refuses publishes that mochi would mishandle, and maps packet
// identifiers.
func (f *Fixes) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (out packets.Packet, err error) {
	defer func() {
		if v := recover(); v != nil {
			f.cfg.Counters.add(HookPanicked)
			f.cfg.Logger.Error("panic in a hook", "method", "OnPacketRead", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			out, err = pk, packets.ErrRejectPacket
		}
	}()
	switch pk.FixedHeader.Type {
	case packets.Publish, packets.Pubrel, packets.Subscribe, packets.Unsubscribe:
	default:
		return pk, nil
	}
	s := f.session(cl)
	if s == nil {
		return pk, nil
	}
	if pk.FixedHeader.Type == packets.Publish {
		switch {
		case !f.fits(pk.TopicName):
			return pk, f.cut(cl, TopicRefused, packets.ErrTopicNameInvalid)
		case pk.FixedHeader.Qos > f.server.Options.Capabilities.MaximumQos:
			// mochi answers a PUBLISH with QoS 2 by PUBACK then.
			return pk, f.cut(cl, QoSRefused, packets.ErrQosNotSupported)
		}
		if pk.FixedHeader.Qos == 0 || s.conn != nil && s.conn.Exempt() {
			return pk, nil
		}
	}
	if pk.PacketID == 0 {
		return pk, nil // mochi refuses it
	}
	switch {
	case pk.FixedHeader.Type == packets.Publish && pk.FixedHeader.Qos == 2:
		pk.PacketID = s.ids.begin(cl, pk.PacketID)
	case pk.FixedHeader.Type == packets.Pubrel:
		pk.PacketID = s.ids.find(cl, pk.PacketID)
	default:
		pk.PacketID = s.ids.once(cl, pk.PacketID)
	}
	return pk, nil
}

// cut ends a connection, with a reason where the protocol has one; in the log it always
// has.
func (f *Fixes) cut(cl *mqtt.Client, e Event, code packets.Code) error {
	f.cfg.Counters.add(e)
	f.cfg.Logger.Warn("publish refused; connection closed",
		"listener", cl.Net.Listener, "remote", cl.Net.Remote, "client", cl.ID, "reason", e.String(), "maximum_qos", f.server.Options.Capabilities.MaximumQos)
	if cl.Properties.ProtocolVersion == 5 {
		_ = f.server.DisconnectClient(cl, code)
	}
	return packets.ErrRejectPacket
}

// OnPacketEncode maps packet identifiers back.
func (f *Fixes) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	switch pk.FixedHeader.Type {
	case packets.Puback, packets.Pubrec, packets.Pubcomp, packets.Suback, packets.Unsuback:
	default:
		return pk
	}
	defer f.recovered("OnPacketEncode")
	s := f.session(cl)
	if s == nil {
		return pk
	}
	switch pk.FixedHeader.Type {
	case packets.Pubrec:
		end := pk.ReasonCode >= packets.ErrUnspecifiedError.Code && pk.ReasonCode != packets.ErrPacketIdentifierInUse.Code
		pk.PacketID = s.ids.origin(pk.PacketID, end)
	case packets.Pubcomp:
		pk.PacketID = s.ids.origin(pk.PacketID, true)
	default:
		pk.PacketID = s.ids.answered(pk.PacketID)
	}
	return pk
}

// OnQosPublish follows the identifiers that mochi allocates.
func (f *Fixes) OnQosPublish(cl *mqtt.Client, pk packets.Packet, _ int64, _ int) {
	if pk.FixedHeader.Type != packets.Publish {
		return
	}
	defer f.recovered("OnQosPublish")
	if s := f.session(cl); s != nil {
		s.ids.last.Store(uint32(pk.PacketID))
	}
	f.keep(cl, &pk)
}

// OnPublish drops the retain flag where the store is full.
func (f *Fixes) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	defer f.recovered("OnPublish")
	if pk.FixedHeader.Retain && !cl.Net.Inline && !f.mayRetain(pk.TopicName, retained{keptRetained(&pk), f.owner(cl)}) {
		pk.FixedHeader.Retain = false
	}
	return pk, nil
}

// OnWill does the same for wills, which pass OnPublish by.
func (f *Fixes) OnWill(cl *mqtt.Client, w mqtt.Will) (mqtt.Will, error) {
	defer f.recovered("OnWill")
	pk := packets.Packet{TopicName: w.TopicName, Payload: w.Payload, Properties: packets.Properties{User: w.User}}
	if w.Retain && !f.mayRetain(w.TopicName, retained{keptRetained(&pk), f.owner(cl)}) {
		w.Retain = false
	}
	return w, nil
}

func (f *Fixes) mayRetain(topic string, m retained) bool {
	if m.size == 0 {
		return true // removes one
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	old, ok := f.sizes[topic]
	before := 0
	if ok {
		before = 1
	}
	if (ok || f.cfg.Retained < 0 || len(f.sizes) < f.cfg.Retained) &&
		(f.cfg.Retained < 0 || f.each[0].fits(m.owner, 1, old.owner, int64(before), half(int64(f.cfg.Retained)))) &&
		(f.cfg.RetainedBytes < 0 || f.bytes-old.size+m.size+int(f.kept.bytes())+nodeCost*f.kept.missing(topic) <= f.cfg.RetainedBytes &&
			f.each[1].fits(m.owner, int64(m.size), old.owner, int64(old.size), half(int64(f.cfg.RetainedBytes)))) {
		return true
	}
	f.cfg.Counters.add(RetainedFull)
	return false
}

// OnRetainMessage keeps count of retained messages.
func (f *Fixes) OnRetainMessage(cl *mqtt.Client, pk packets.Packet, _ int64) {
	defer f.recovered("OnRetainMessage")
	f.retain(pk.TopicName, retained{keptRetained(&pk), f.owner(cl)})
}

// OnRetainedExpired keeps count of retained messages.
func (f *Fixes) OnRetainedExpired(topic string) {
	defer f.recovered("OnRetainedExpired")
	f.retain(topic, retained{})
}

// retain counts a message in, in place of what was there, or out if it has no size.
func (f *Fixes) retain(topic string, m retained) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, ok := f.sizes[topic]
	f.bytes += m.size - old.size
	if ok {
		f.each[0].add(old.owner, -1)
		f.each[1].add(old.owner, -int64(old.size))
	}
	switch {
	case m.size == 0 && ok:
		f.kept.remove(topic, nil)
		delete(f.sizes, topic)
	case m.size != 0 && !ok:
		f.kept.add(topic, nil)
	}
	if m.size == 0 {
		return
	}
	f.each[0].add(m.owner, 1)
	f.each[1].add(m.owner, int64(m.size))
	f.sizes[strings.Clone(topic)] = m
}
