package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/vectors"
	"github.com/sealmq/sealmq/route"
)

// liveSession is a conversation with a running Rust node, with our private keys.
type liveSession struct {
	Name       string
	RecordedAt int64       `json:"recorded_at"`
	RustToGo   vectors.Hex `json:"rust_to_go"`
	GoToRust   vectors.Hex `json:"go_to_rust"`
	Go         struct {
		Role             string
		Identifier       string
		StaticPrivate    vectors.Hex `json:"static_private"`
		EphemeralPrivate vectors.Hex `json:"ephemeral_private"`
		DR               string      `json:"decryptor_remote"`
		Encryptor        string
	}
	Handshake struct {
		Message1, Message2, Message3 vectors.Hex
		Payload2, Payload3           vectors.Hex
		K1, K2                       vectors.Hex
		RustIdentifier               string      `json:"rust_identifier"`
		RustAuthority                vectors.Hex `json:"rust_authority_change_history"`
		RustCredentials              int         `json:"rust_credentials"`
	}
	Transport []liveFrame
}

type liveFrame struct {
	Dir, Kind        string
	Nonce            uint64
	Plaintext, Frame vectors.Hex
	InnerPayload     vectors.Hex `json:"inner_payload"`
}

func (f *liveFrame) ours() bool { return f.Dir == "go->rust" }

func loadLive(t testing.TB, file string) []liveSession {
	t.Helper()
	v := vectors.Load[struct{ Sessions []liveSession }](t, file)
	if len(v.Sessions) == 0 {
		t.Fatalf("%s: no sessions", file)
	}
	return v.Sessions
}

func (s *liveSession) initiator() bool { return s.Go.Role == "initiator" }

func (s *liveSession) clock() time.Time { return time.Unix(s.RecordedAt, 0) }

// own is our side with the recorded keys and payload.
func (s *liveSession) own(t testing.TB) local {
	payload := s.Handshake.Payload3
	if !s.initiator() {
		payload = s.Handshake.Payload2
	}
	return local{static: testKey(t, s.Go.StaticPrivate), payload: payload}
}

func (s *liveSession) authorities(t testing.TB) []*identity.Identity {
	t.Helper()
	if s.Handshake.RustAuthority == nil {
		return nil
	}
	a, err := identity.Import(s.Handshake.RustAuthority)
	if err != nil {
		t.Fatal(err)
	}
	return []*identity.Identity{a}
}

// run replays the handshake and returns our two directions and the peer.
func (s *liveSession) run(t *testing.T) (Result, *Handshake) {
	t.Helper()
	v := newVerifier(identity.NewMemoryRegistry(0), TrustEveryone, s.authorities(t), s.clock)
	ephemeral := func() (keyPair, error) { return testKey(t, s.Go.EphemeralPrivate), nil }
	var h *Handshake
	if s.initiator() {
		h = startHandshake(PhaseStart, s.own(t), v.check, ephemeral)
		m1, err := h.Start()
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 1", m1, s.Handshake.Message1)
		m3, err := h.ReadReply(s.Handshake.Message2)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 3", m3, s.Handshake.Message3)
	} else {
		h = startHandshake(PhaseAwaitFirst, s.own(t), v.check, ephemeral)
		m2, err := h.ReadFirst(s.Handshake.Message1)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 2", m2, s.Handshake.Message2)
		if err := h.ReadFinal(s.Handshake.Message3); err != nil {
			t.Fatal(err)
		}
	}
	res, err := h.Result()
	if err != nil {
		t.Fatal(err)
	}
	seals, opens := s.Handshake.K2, s.Handshake.K1
	if !s.initiator() {
		seals, opens = opens, seals
	}
	wantBytes(t, "sealing key", res.Sealer.key.raw[:], seals)
	wantBytes(t, "opening key", res.Opener.cur.raw[:], opens)
	if got := res.Peer.Identifier.String(); got != s.Handshake.RustIdentifier {
		t.Errorf("peer %s, want %s", got, s.Handshake.RustIdentifier)
	}
	if got := len(res.Peer.Credentials); s.Handshake.RustAuthority != nil && got != s.Handshake.RustCredentials {
		t.Errorf("%d credentials, want %d", got, s.Handshake.RustCredentials)
	}
	return res, h
}

func TestLiveSessions(t *testing.T) {
	for _, file := range []string{"live_handshake_go_initiator.json", "live_handshake_go_responder.json", "live_rekey.json"} {
		for _, s := range loadLive(t, file) {
			t.Run(file+"/"+s.Name, func(t *testing.T) {
				res, _ := s.run(t)
				peer := NewSealer(res.Opener.cur.raw) // makes what the recording left out
				for _, f := range s.Transport {
					if f.ours() {
						sealTo(t, res.Sealer, f.Nonce, nil)
						got, err := res.Sealer.Seal(nil, f.Plaintext)
						if err != nil {
							t.Fatal(err)
						}
						wantBytes(t, "our frame", got, f.Frame)
						continue
					}
					sealTo(t, peer, f.Nonce, func(filler []byte) {
						if _, _, err := res.Opener.Open(nil, filler); err != nil {
							t.Fatal(err)
						}
					})
					if _, err := peer.Seal(nil, nil); err != nil {
						t.Fatal(err)
					}
					plain, n, err := res.Opener.Open(nil, f.Frame)
					if err != nil || n != f.Nonce {
						t.Fatalf("nonce %d: %d, %v", f.Nonce, n, err)
					}
					wantBytes(t, "plaintext", plain, f.Plaintext)
				}
				for _, f := range s.Transport {
					roundTrip(t, f.Plaintext)
				}
			})
		}
	}
}

// sealTo uses up nonces before n.
func sealTo(t *testing.T, s *Sealer, n uint64, use func([]byte)) {
	t.Helper()
	for s.Next() < n {
		f, err := s.Seal(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if use != nil {
			use(f)
		}
	}
}

// roundTrip decodes a plaintext and encodes it to the same bytes.
func roundTrip(t *testing.T, plain []byte) message {
	t.Helper()
	m, err := parseMessage(plain)
	if err != nil {
		t.Fatalf("%x: %v", plain, err)
	}
	wantBytes(t, "encoded again", encodeMessage(&m), plain)
	return m
}

func encodeMessage(m *message) []byte {
	switch m.variant {
	case variantPayload:
		return appendPayload(nil, m.onward, m.ret, m.payload)
	case variantRefresh:
		return appendRefresh(nil, m.history, m.credentials...)
	default:
		return closePlaintext
	}
}

func TestDerivedTransport(t *testing.T) {
	v := vectors.Load[struct {
		Transport []struct {
			From, Meaning        string
			Nonce                uint64
			Key, Plaintext, Wire vectors.Hex
		}
	}](t, "secure_channel_derived.json")
	if len(v.Transport) == 0 {
		t.Fatal("no frames")
	}
	sealers := map[string]*Sealer{}
	for _, f := range v.Transport {
		if sealers[f.From] == nil {
			sealers[f.From] = NewSealer(key32(t, f.Key))
		}
		sealTo(t, sealers[f.From], f.Nonce, nil)
		got, err := sealers[f.From].Seal(nil, f.Plaintext)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, f.Meaning, got, f.Wire)
		roundTrip(t, f.Plaintext)
	}
}

func TestUpstreamMessages(t *testing.T) {
	v := vectors.Load[struct {
		Refresh struct {
			Plaintext vectors.Hex
			Decoded   struct {
				Presenter string `json:"presenter_identifier"`
			}
		} `json:"refresh_credentials"`
		Close struct{ Plaintext vectors.Hex }
	}](t, "secure_channel_messages_upstream.json")
	m := roundTrip(t, v.Refresh.Plaintext)
	id, err := identity.Import(m.history)
	if err != nil || id.Identifier().String() != v.Refresh.Decoded.Presenter {
		t.Errorf("presenter %v, %v", id, err)
	}
	if len(m.credentials) != 1 {
		t.Errorf("%d credentials", len(m.credentials))
	}
	if m := roundTrip(t, v.Close.Plaintext); m.variant != variantClose {
		t.Errorf("variant %d", m.variant)
	}
}

// recorder is a Router that keeps what is sent.
type recorder struct {
	*testNode
	sent chan route.Frame
}

func (r *recorder) Send(_ context.Context, f route.Frame, _ route.Class) error {
	r.sent <- packet{frame: f}.clone().frame
	return nil
}

// tcpFrames splits one direction of a recorded TCP stream.
func tcpFrames(t *testing.T, stream []byte) (out []route.Frame) {
	t.Helper()
	if len(stream) == 0 || stream[0] != 1 {
		t.Fatal("no preamble")
	}
	for b := stream[1:]; len(b) > 0; {
		n := binary.BigEndian.Uint32(b)
		f, err := route.ParseFrame(b[4:4+n], route.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		out, b = append(out, f), b[4+n:]
	}
	return out
}

// TestLiveConversations lets a whole endpoint take part in the recorded
// conversations: what it sends must be the recorded bytes over the recorded
// routes.
func TestLiveConversations(t *testing.T) {
	for _, file := range []string{"live_handshake_go_initiator.json", "live_handshake_go_responder.json"} {
		for _, s := range loadLive(t, file) {
			t.Run(s.Name, func(t *testing.T) { s.converse(t) })
		}
	}
}

func (s *liveSession) converse(t *testing.T) {
	net := newTestNet()
	r := &recorder{net.node(t, "go"), make(chan route.Frame, 16)}
	addresses := []string{s.Go.DR, s.Go.Encryptor}
	got := make(chan Delivery, 16)
	ep, err := NewEndpoint(Config{
		Registry: identity.NewMemoryRegistry(0), Router: r, Deliver: func(d Delivery) { got <- d },
		Authorities: s.authorities(t), Clock: s.clock,
		hooks: hooks{
			ephemeral: func() (keyPair, error) { return testKey(t, s.Go.EphemeralPrivate), nil },
			side:      func([]byte) (local, error) { return s.own(t), nil },
			address: func() string {
				a := addresses[0]
				addresses = addresses[1:]
				return a
			},
			noHello: true,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ep.Close() }()

	// Frames with our payloads on the recorded wire, and theirs, by payload.
	wire := append(tcpFrames(t, s.RustToGo), tcpFrames(t, s.GoToRust)...)
	recorded := func(payload []byte) route.Frame {
		t.Helper()
		i := slices.IndexFunc(wire, func(f route.Frame) bool { return bytes.Equal(f.Payload, payload) })
		if i < 0 {
			t.Fatalf("payload %.20x… is not on the wire", payload)
		}
		return wire[i]
	}
	feed := func(payload []byte, to string) {
		f := packet{frame: recorded(payload)}.clone().frame
		f.Onward = route.To(to) // what stands before it is the hub's
		net.inject(packet{to: "go", frame: f})
	}
	sent := func(payload []byte) {
		t.Helper()
		select {
		case f := <-r.sent:
			wantBytes(t, "sent", f.Payload, payload)
			want := recorded(payload)
			if !f.Onward.Equal(want.Onward) {
				t.Errorf("onward %v, recorded %v", f.Onward, want.Onward)
			}
			// A hub on the way has put its address in front.
			if over := len(want.Return) - len(f.Return); over < 0 || over > 1 || !want.Return[over:].Equal(f.Return) {
				t.Errorf("return %v, recorded %v", f.Return, want.Return)
			}
		case <-time.After(wait):
			t.Fatal("nothing was sent")
		}
	}
	var c *Channel
	if s.initiator() {
		type dialled struct {
			c   *Channel
			err error
		}
		done := make(chan dialled, 1)
		go func() {
			c, err := ep.Dial(t.Context(), recorded(s.Handshake.Message1).Onward, TrustEveryone, DialOptions{NoConfirm: true})
			done <- dialled{c, err}
		}()
		sent(s.Handshake.Message1)
		feed(s.Handshake.Message2, s.Go.DR)
		sent(s.Handshake.Message3)
		d := <-done
		if d.err != nil {
			t.Fatal(d.err)
		}
		c = d.c
	} else {
		if _, err := ep.Listen("listener", TrustEveryone, ListenOptions{}); err != nil {
			t.Fatal(err)
		}
		feed(s.Handshake.Message1, "listener")
		sent(s.Handshake.Message2)
		feed(s.Handshake.Message3, s.Go.DR)
		waitFor(t, func() bool { return len(ep.Channels()) == 1 })
		c = ep.Channels()[0]
	}
	for _, f := range s.Transport {
		m, err := parseMessage(f.Plaintext)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case !f.ours():
			feed(f.Frame, s.Go.DR)
			if f.Kind == "Payload" {
				d := <-got
				wantBytes(t, "delivered", d.Frame.Payload, f.InnerPayload)
				if !d.Frame.Onward.Equal(m.onward) || !d.Frame.Return.Equal(m.ret.Prepend(route.Local(s.Go.Encryptor))) {
					t.Errorf("delivered along %v, back along %v", d.Frame.Onward, d.Frame.Return)
				}
			}
		case f.Kind == "Payload":
			if err := c.Send(t.Context(), m.onward, m.ret, m.payload); err != nil {
				t.Fatal(err)
			}
			sent(f.Frame)
		case f.Kind == "Close":
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			sent(f.Frame)
		default:
			if err := c.sendTurn(t.Context(), outgoing{plain: encodeMessage(&m)}); err != nil {
				t.Fatal(err)
			}
			sent(f.Frame)
		}
	}
	if f := s.Transport[len(s.Transport)-1]; f.Kind == "Close" && !f.ours() {
		ended(t, c, ErrPeerClosed)
	}
	if n := ep.Stats().Dropped.Total(); n != 0 {
		t.Errorf("%d frames dropped: %v", n, ep.Stats().Dropped)
	}
}
