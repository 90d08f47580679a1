package broker

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// MQTT's answers to CONNECT.
const (
	accepted = 0
	full3    = 3
	bad3     = 4
	refused3 = 5
	bad5     = 0x86
	refused5 = 0x87
	full5    = 0x97
)

// say opens a connection, sends CONNECT with what password makes of the TLS
// exporter value, and returns the code of the CONNACK. The connection ends with
// the test.
func say(t testing.TB, addr string, tc *tls.Config, version byte, clientID, user string, password func(exporter []byte) []byte) byte {
	t.Helper()
	var conn net.Conn
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	var exporter []byte
	if tc != nil {
		secure := tls.Client(conn, tc)
		if err := secure.Handshake(); err != nil {
			t.Fatal(err)
		}
		st := secure.ConnectionState()
		if exporter, err = st.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32); err != nil {
			exporter = nil
		}
		conn = secure
	}
	field := func(b []byte, s string) []byte {
		return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
	}
	secret := password(exporter)
	flags := byte(0x02)
	if user != "" {
		flags |= 0x80
	}
	if secret != nil {
		flags |= 0x40
	}
	body := append(field(nil, "MQTT"), version, flags, 0, 60)
	if version == 5 {
		body = append(body, 0)
	}
	body = field(body, clientID)
	if user != "" {
		body = field(body, user)
	}
	if secret != nil {
		body = field(body, string(secret))
	}
	packet := binary.AppendUvarint([]byte{0x10}, uint64(len(body)))
	if _, err := conn.Write(append(packet, body...)); err != nil {
		t.Fatal(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(bufio.NewReader(conn), head[:]); err != nil || head[0] != 0x20 {
		t.Fatalf("no CONNACK: %x, %v", head, err)
	}
	return head[3]
}

// prover shows proofs to one hub.
type prover struct {
	t    testing.TB
	addr string
	tls  *tls.Config
	id   *identity.Private
	hub  identity.Identifier // audience
}

func newDevice(t testing.TB, h *Hub, opts ...identity.Option) *prover {
	t.Helper()
	p, err := identity.Create(opts...)
	if err != nil {
		t.Fatal(err)
	}
	return &prover{t: t, addr: h.MQTTAddr().String(), id: p, hub: h.Identifier()}
}

func (p *prover) name() string { return p.id.Identifier().String() }

func (p *prover) make(exporter []byte, credentials ...[]byte) []byte {
	p.t.Helper()
	b, err := hubproto.MakeProof(p.id, hubproto.ProofBinding{Hub: p.hub, ClientID: p.name(), Exporter: exporter}, credentials...)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

func (p *prover) show(proof []byte) byte {
	p.t.Helper()
	return say(p.t, p.addr, p.tls, 4, p.name(), hubproto.ProofUser, func([]byte) []byte { return proof })
}

func (p *prover) fresh(credentials ...[]byte) byte {
	p.t.Helper()
	return say(p.t, p.addr, p.tls, 4, p.name(), hubproto.ProofUser, func(exporter []byte) []byte { return p.make(exporter, credentials...) })
}

func want(t testing.TB, what string, got, want byte) {
	t.Helper()
	if got != want {
		t.Errorf("%s: code %#x, want %#x", what, got, want)
	}
}

func (h *Hub) proofCount(r proofResult) uint64 { return h.proofs.counts[r].Load() }

func counted(t testing.TB, h *Hub, r proofResult, n uint64) {
	t.Helper()
	if got := h.proofCount(r); got != n {
		t.Errorf("%v proofs %v, want %d", got, r, n)
	}
}

func TestProof(t *testing.T) {
	var log lockedLog
	h := start(t, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	d := newDevice(t, h)
	proof := d.make(nil)
	want(t, "a fresh proof", d.show(proof), accepted)
	want(t, "the same proof again", d.show(proof), bad3)
	counted(t, h, proofUsed, 1)
	want(t, "a fresh proof again", d.fresh(), accepted)

	// A proven owner is not displaced by who only claims the client id.
	want(t, "unproven", say(t, d.addr, nil, 4, d.name(), "", func([]byte) []byte { return nil }), refused3)
	// An unproven one is displaced by the proven one.
	e := newDevice(t, h)
	want(t, "unproven first", say(t, e.addr, nil, 4, e.name(), "x", func([]byte) []byte { return nil }), accepted)
	want(t, "then proven", e.fresh(), accepted)
	want(t, "then unproven", say(t, e.addr, nil, 4, e.name(), "x", func([]byte) []byte { return nil }), refused3)

	for name, tt := range map[string]struct {
		clientID string
		password []byte
		result   proofResult
	}{
		"no proof":               {d.name(), nil, proofMalformed},
		"half a proof":           {d.name(), d.make(nil)[:300], proofMalformed},
		"a long one":             {d.name(), make([]byte, hubproto.MaxProof+1), proofMalformed},
		"another's client id":    {e.name(), d.make(nil), proofClientID},
		"another of its own ids": {d.name() + "-x", d.make(nil), proofClientID},
		"bound to TLS elsewhere": {d.name(), d.make(make([]byte, 32)), proofExporter},
	} {
		before := h.proofCount(tt.result)
		want(t, name, say(t, d.addr, nil, 4, tt.clientID, hubproto.ProofUser, func([]byte) []byte { return tt.password }), bad3)
		counted(t, h, tt.result, before+1)
	}
	other := *d
	other.hub = identity.Identifier{1}
	want(t, "another hub's audience", other.fresh(), bad3)
	counted(t, h, proofAudience, 1)

	// Somebody else's signature, under the own history.
	mixed, err := hubproto.ParseProof(e.make(nil))
	if err != nil {
		t.Fatal(err)
	}
	mixed.History = d.id.Identity().ChangeHistory()
	b, err := mixed.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	want(t, "a mixed proof", e.show(b), bad3)
	counted(t, h, proofBad, 1)

	for _, reason := range []string{"wrong-hub", "wrong-client-id", "used", "malformed", "wrong-connection"} {
		if !strings.Contains(log.String(), "("+reason+")") {
			t.Errorf("the log does not say %s", reason)
		}
	}
	if strings.Contains(log.String(), hex.EncodeToString(proof[:16])) {
		t.Error("the log holds a proof")
	}
}

type lockedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestProofCodesOfMQTT5(t *testing.T) {
	h := start(t, Config{Devices: Devices{Allow: []string{someID(1).String()}}})
	d := newDevice(t, h)
	v5 := func(clientID string, proof []byte) byte {
		return say(t, d.addr, nil, 5, clientID, hubproto.ProofUser, func([]byte) []byte { return proof })
	}
	want(t, "bad", v5(d.name(), []byte{1}), bad5)
	want(t, "not listed", v5(d.name(), d.make(nil)), refused5)
	setTurns := func(free, most int) {
		h.proofs.turns.mu.Lock()
		defer h.proofs.turns.mu.Unlock()
		h.proofs.turns.free, h.proofs.turns.most = free, most
	}
	setTurns(0, 0)
	want(t, "busy", v5(d.name(), d.make(nil)), full5)
	want(t, "busy, 3.1.1", d.fresh(), full3)
	setTurns(1, loginsWaiting)
	want(t, "not listed, 3.1.1", d.fresh(), refused3)
	want(t, "without proof", say(t, d.addr, nil, 4, d.name(), "", func([]byte) []byte { return nil }), refused3)
	want(t, "an ordinary client", say(t, d.addr, nil, 4, "pump", "", func([]byte) []byte { return nil }), refused3)
}

func TestProofClock(t *testing.T) {
	var offset atomic.Int64
	h, err := New(Config{MQTT: []string{"127.0.0.1:0"}, Devices: Devices{ClockSkew: 2 * time.Minute, AnyoneProven: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, h) })
	clock := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	for _, tt := range []struct {
		off    time.Duration
		code   byte
		result proofResult
	}{
		{-100 * time.Second, accepted, proofOK},
		{100 * time.Second, accepted, proofOK},
		{-200 * time.Second, bad3, proofExpired}, // valid for 60 s, and 120 s of skew
		{130 * time.Second, bad3, proofFuture},
	} {
		offset.Store(int64(tt.off))
		d := newDevice(t, h, identity.WithClock(clock))
		before := h.proofCount(tt.result)
		want(t, tt.off.String(), d.fresh(), tt.code)
		counted(t, h, tt.result, before+1)
	}
}

func TestProofAcrossRestart(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The clocks of both sides stand still but for what the test adds.
	var now atomic.Int64
	now.Store(time.Now().UnixNano())
	clock := func() time.Time { return time.Unix(0, now.Load()) }
	run := func(before func()) *Hub {
		t.Helper()
		if before != nil {
			before()
		}
		h, err := New(Config{MQTT: []string{"127.0.0.1:0"}, Data: dir})
		if err != nil {
			t.Fatal(err)
		}
		h.proofs.now = clock
		if h.proofs.used.since != 0 {
			h.proofs.used.since = clock().Unix()
		}
		if err := h.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(t, h) })
		return h
	}
	used := filepath.Join(dir, usedName)

	h := run(nil)
	d := newDevice(t, h, identity.WithClock(clock))
	first := d.make(nil)
	want(t, "the first", d.show(first), accepted)
	spare := d.make(nil)
	stop(t, h)

	h = run(nil)
	d.addr = h.MQTTAddr().String()
	want(t, "the first, after a restart", d.show(first), bad3)
	counted(t, h, proofUsed, 1)
	want(t, "one that was not used", d.show(spare), accepted)
	spare = d.make(nil)
	stop(t, h)

	for name, spoil := range map[string]func(){
		"no memory": func() {
			if err := os.Remove(used); err != nil {
				t.Fatal(err)
			}
		},
		"a torn memory": func() {
			b, err := os.ReadFile(used)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(used, b[:len(b)-1], 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"a damaged memory": func() {
			b, err := os.ReadFile(used)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)-1] ^= 1
			if err := os.WriteFile(used, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"another file": func() {
			if err := os.WriteFile(used, []byte("what is this? it is not a memory\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		h = run(spoil)
		d.addr = h.MQTTAddr().String()
		want(t, name+": used before", d.show(first), bad3)
		want(t, name+": made before", d.show(spare), bad3)
		counted(t, h, proofUnknownUse, 2)
		now.Add(int64(time.Second))
		want(t, name+": made afterwards", d.fresh(), accepted)
		first, spare = d.make(nil), d.make(nil)
		want(t, name+": the next", d.show(first), accepted)
		stop(t, h)
	}
}

func TestProofOfRotatedKey(t *testing.T) {
	for name, dir := range map[string]string{"in memory": "", "on disk": filepath.Join(t.TempDir(), "data")} {
		t.Run(name, func(t *testing.T) {
			h := start(t, Config{Data: dir})
			d := newDevice(t, h)
			folder := t.TempDir()
			v, err := identity.OpenVault(filepath.Join(folder, "vault"))
			if err != nil {
				t.Fatal(err)
			}
			if d.id, err = v.Create("d"); err != nil {
				t.Fatal(err)
			}
			backup, err := v.Export("d", identity.Protection{})
			if err != nil {
				t.Fatal(err)
			}
			want(t, "before", d.fresh(), accepted)
			if err := v.Rotate("d"); err != nil {
				t.Fatal(err)
			}
			want(t, "rotated", d.fresh(), accepted)
			other, err := identity.OpenVault(filepath.Join(folder, "other"))
			if err != nil {
				t.Fatal(err)
			}
			stolen := *d
			if stolen.id, err = other.Import("d", backup, identity.Protection{}); err != nil {
				t.Fatal(err)
			}
			want(t, "with the old key", stolen.fresh(), bad3)
			counted(t, h, proofRotated, 1)
			// A fork: the thief rotates, too.
			if err := other.Rotate("d"); err != nil {
				t.Fatal(err)
			}
			want(t, "with a forked history", stolen.fresh(), bad3)
			counted(t, h, proofForked, 1)
			if dir == "" {
				return
			}
			stop(t, h)
			h = start(t, Config{Data: dir})
			stolen.addr = h.MQTTAddr().String()
			want(t, "after a restart", stolen.fresh(), bad3)
			counted(t, h, proofForked, 1)
		})
	}
}

// TestRefusedProofsAreExplained: why a proof is refused is told to the device, where
// MQTT 5 has a place for it, and to the operator by log, counter and metric.
func TestRefusedProofsAreExplained(t *testing.T) {
	var log lockedLog
	h := start(t, Config{HTTP: "127.0.0.1:0", Logger: slog.New(slog.NewTextHandler(&log, nil))})
	clock := func(off time.Duration) identity.Option {
		return identity.WithClock(func() time.Time { return time.Now().Add(off) })
	}
	vault := func() *identity.Vault {
		v, err := identity.OpenVault(filepath.Join(t.TempDir(), "vault"))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	v := vault()
	own, err := v.Create("d")
	if err != nil {
		t.Fatal(err)
	}
	backup, err := v.Export("d", identity.Protection{})
	if err != nil {
		t.Fatal(err)
	}
	restored := func() *prover {
		d := newDevice(t, h)
		if d.id, err = vault().Import("d", backup, identity.Protection{}); err != nil {
			t.Fatal(err)
		}
		return d
	}
	old, forked := restored(), restored()
	for _, p := range []*identity.Private{own, forked.id} {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	d := newDevice(t, h)
	d.id = own
	want(t, "the newest key", d.fresh(), accepted)
	used := d.make(nil)
	want(t, "once", d.show(used), accepted)

	startedNow := func() { // and knows nothing of what was used before
		h.proofs.used.mu.Lock()
		defer h.proofs.used.mu.Unlock()
		h.proofs.used.since = time.Now().Add(time.Hour).Unix()
	}
	for i, tt := range []struct {
		result proofResult
		name   string
		says   string
		by     *prover
		proof  []byte // nil: a fresh one
		before func()
	}{
		{proofExpired, "expired", "expired: check the clock", newDevice(t, h, clock(-time.Hour)), nil, nil},
		{proofFuture, "from-future", "in the future: check the clock", newDevice(t, h, clock(time.Hour)), nil, nil},
		{proofRotated, "rotated", "rotated away", old, nil, nil},
		{proofForked, "forked", "contradicts the known one", forked, nil, nil},
		{proofUsed, "used", "has been used", d, used, nil},
		{proofUnknownUse, "before-start", "before this hub started", d, nil, startedNow},
	} {
		if tt.before != nil {
			tt.before()
		}
		if tt.proof == nil {
			tt.proof = tt.by.make(nil)
		}
		c, err := rawmqtt.Dial(tt.by.addr, true)
		if err != nil {
			t.Fatal(err)
		}
		ack, err := c.Login(rawmqtt.Options{ID: tt.by.name(), User: hubproto.ProofUser, Password: string(tt.proof)})
		_ = c.Close()
		if err != nil || ack.Code() != bad5 || !strings.Contains(string(ack.Body), tt.says) {
			t.Errorf("%s: CONNACK %q, %v", tt.name, ack.Body, err)
		}
		if got := h.Status().Counters["sealmq_proofs_total{result="+tt.name+"}"]; got != 1 {
			t.Errorf("%s: counted %v times", tt.name, got)
		}
		counted(t, h, tt.result, 1)
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		last := lines[len(lines)-1]
		if !strings.Contains(last, "refused") || !strings.Contains(last, "("+tt.name+")") || !strings.Contains(last, tt.by.name()) {
			t.Errorf("%s, the refusal %d: the log says %s", tt.name, i, last)
		}
	}
	_, metrics := page(t, h.HTTPURL()+"/metrics")
	for _, name := range []string{"expired", "from-future", "rotated", "forked", "used", "before-start"} {
		if line := `sealmq_proofs_total{result="` + name + `"} 1`; !strings.Contains(metrics, line) {
			t.Errorf("no metric %s", line)
		}
	}
}

func TestProofPolicies(t *testing.T) {
	authority, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	// An authority of an hour ago.
	late, err := identity.Create(identity.WithClock(func() time.Time { return time.Now().Add(-time.Hour) }))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	lateFile := filepath.Join(dir, "late.authority")
	if err := os.WriteFile(lateFile, []byte(hex.EncodeToString(late.Identity().ChangeHistory())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "plant.authority")
	text := "# the plant's authority\n" + hex.EncodeToString(authority.Identity().ChangeHistory()) + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "devices")
	if err := os.WriteFile(list, []byte("# none yet\n"+someID(9).String()+" # pump\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, Config{Devices: Devices{
		AllowFile: list, Authorities: []string{file, lateFile}, Attributes: map[string]string{"role": "pump"},
	}})
	issue := func(by, to *identity.Private, attrs map[string]string, ttl time.Duration) []byte {
		t.Helper()
		c, err := by.IssueCredential(to.Identity(), attrs, 1, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	pump := map[string]string{"role": "pump", "site": "7"}
	d, e := newDevice(t, h), newDevice(t, h)
	want(t, "no credential", d.fresh(), refused3)
	want(t, "with one", d.fresh(issue(authority, d.id, pump, time.Hour)), accepted)
	want(t, "among others", d.fresh(issue(stranger, d.id, pump, time.Hour), issue(authority, d.id, pump, time.Hour)), accepted)
	want(t, "another role", d.fresh(issue(authority, d.id, map[string]string{"role": "valve"}, time.Hour)), refused3)
	want(t, "a stranger's", d.fresh(issue(stranger, d.id, pump, time.Hour)), refused3)
	want(t, "a self-made one", d.fresh(issue(d.id, d.id, pump, time.Hour)), refused3)
	want(t, "about somebody else", d.fresh(issue(authority, e.id, pump, time.Hour)), refused3)
	want(t, "rubbish", d.fresh([]byte{1}), refused3)
	want(t, "one that has ended", d.fresh(issue(late, d.id, pump, time.Minute)), refused3)
	want(t, "of the same authority, in time", d.fresh(issue(late, d.id, pump, 2*time.Hour)), accepted)
	counted(t, h, proofNotAllowed, 7)

	// The list is read again on demand, and a broken one changes nothing.
	want(t, "not listed", e.fresh(), refused3)
	if err := os.WriteFile(list, []byte(e.name()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(); err != nil {
		t.Fatal(err)
	}
	want(t, "listed", e.fresh(), accepted)
	if err := os.WriteFile(list, []byte("pump\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(); err == nil {
		t.Error("a broken list was read")
	}
	want(t, "still listed", e.fresh(), accepted)
}

func TestProofWithPasswordFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(file, []byte("plant:"+hashed(t, "p")+":user\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, Config{PasswordFile: file})
	d := newDevice(t, h)
	want(t, "passwords only", d.fresh(), refused3)
	h = start(t, Config{PasswordFile: file, Devices: Devices{Allow: []string{d.name()}}})
	d.addr, d.hub = h.MQTTAddr().String(), h.Identifier()
	want(t, "listed", d.fresh(), accepted)
	want(t, "not listed", newDevice(t, h).fresh(), refused3)
	if _, err := login(t, h.MQTTURL(), "pump", "plant", "p", nil); err != nil {
		t.Error(err)
	}
}

func TestProofOverTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	pool := writeCert(t, cert, key, 1, time.Now().Add(time.Hour))
	cfg := Config{MQTT: []string{"mqtts://127.0.0.1:0"}, TLS: TLS{Cert: cert, Key: key}}
	evil, good := start(t, cfg), start(t, cfg)
	tc := &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	d := newDevice(t, good)
	d.tls = tc
	want(t, "over TLS", d.fresh(), accepted)

	// What the evil hub got on a connection to itself is of no use at the good one.
	var relayed []byte
	say(t, evil.MQTTAddr().String(), tc, 4, d.name(), hubproto.ProofUser, func(exporter []byte) []byte {
		relayed = d.make(exporter)
		return relayed
	})
	want(t, "relayed by another hub", d.show(relayed), bad3)
	counted(t, good, proofExporter, 1)
	counted(t, evil, proofAudience, 1)
	want(t, "bound to nothing", d.show(d.make(nil)), bad3)
	counted(t, good, proofExporter, 2)

	// A connection that has no exporter value proves nothing.
	old := tc.Clone()
	old.MaxVersion = tls.VersionTLS12
	d.tls = old
	want(t, "over TLS 1.2", d.fresh(), accepted) // Go offers extended master secret
}

// TestProofInTheClear: from other machines only with an option.
func TestProofInTheClear(t *testing.T) {
	far := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	for _, tt := range []struct {
		name   string
		cfg    Config
		result proofResult
	}{
		{"not by default", Config{Devices: Devices{AnyoneProven: true}}, proofCleartext},
		{"with the option", Config{Devices: Devices{AnyoneProven: true}, InsecurePlaintext: true}, proofOK},
		{"nobody is allowed from afar", Config{InsecurePlaintext: true}, proofNotAllowed},
		{"but on an open hub", Config{InsecurePlaintext: true, MQTTOpen: true}, proofOK},
	} {
		h := start(t, tt.cfg)
		d := newDevice(t, h)
		_, _, err := h.proofs.login(t.Context(), &mochibridge.ConnectInfo{ClientID: d.name(), Password: d.make(nil), RemoteAddr: far})
		if (err == nil) != (tt.result == proofOK) {
			t.Errorf("%s: %v", tt.name, err)
		}
		counted(t, h, tt.result, 1)
	}
}

func TestGuests(t *testing.T) {
	h := start(t, Config{Devices: Devices{Allow: []string{someID(1).String()}}})
	d := newDevice(t, h)
	guest := func(clientID string) byte {
		return say(t, d.addr, nil, 4, clientID, hubproto.GuestUser, func([]byte) []byte { return nil })
	}
	want(t, "a guest", guest(hubproto.GuestName()), accepted)
	want(t, "with a device's client id", guest(d.name()), refused3)
	want(t, "with a name of its own", guest("guest"), refused3)
}

// TestProofOnce: of many that show one proof at the same time, one gets in.
func TestProofOnce(t *testing.T) {
	h := start(t, Config{})
	d := newDevice(t, h)
	proof := d.make(nil)
	var ok atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			info := &mochibridge.ConnectInfo{ClientID: d.name(), Password: proof, RemoteAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
			if _, _, err := h.proofs.login(t.Context(), info); err == nil {
				ok.Add(1)
			}
		})
	}
	wg.Wait()
	if ok.Load() != 1 || h.proofCount(proofUsed) != 15 {
		t.Errorf("%d accepted, %d refused as used", ok.Load(), h.proofCount(proofUsed))
	}
}

func TestUsedProofs(t *testing.T) {
	dir := t.TempDir()
	now := time.Unix(1_800_000_000, 0)
	u, err := openUsed(dir, now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	u.since = 0
	nonce := func(i int) (n [hubproto.NonceLen]byte) {
		binary.BigEndian.PutUint64(n[:], uint64(i))
		return n
	}
	id, network := someID(1), netip.MustParsePrefix("192.0.2.1/32")
	use := func(i int) error {
		return u.use(id, network, &hubproto.ProofFacts{Nonce: nonce(i), CreatedAt: now}, now.Add(time.Minute), now)
	}
	for i := range usedPerIdentity {
		if err := use(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := use(usedPerIdentity); resultOfProof(err) != proofBusy {
		t.Errorf("one too many: %v", err)
	}
	id = someID(2)
	if err := use(0); err != nil {
		t.Errorf("another identity: %v", err)
	}
	// What has ended makes room.
	id, now = someID(1), now.Add(2*time.Minute)
	if err := use(0); err != nil {
		t.Errorf("later: %v", err)
	}
	if len(u.have) != 1 || len(u.byEnd) != 1 || len(u.perID) != 1 || u.perNet[network] != 1 {
		t.Errorf("%d, %d, %d and %v remembered", len(u.have), len(u.byEnd), len(u.perID), u.perNet)
	}
	// Many identities from one network leave room for others.
	u.perNet[network] = usedPerNetwork
	if err := use(9); resultOfProof(err) != proofBusy {
		t.Errorf("one network has more than half: %v", err)
	}
	u.perNet[network] = 1
	// The file is rewritten when most of it has ended.
	u.records = 2*(len(u.byEnd)+1) + usedRewriteAt
	if err := use(1); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(u.path); err != nil || info.Size() != int64(len(usedHeader)+3*usedRecord) || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := use(2); err != nil {
		t.Fatal(err)
	}
	// A file that cannot be written is removed, and the hub goes on.
	_ = u.file.Close()
	if err := use(3); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(u.path); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
	if err := u.close(); err != nil {
		t.Error(err)
	}
}

// TestUsedProofsBelieveNoOldFile: what is not written is not believed to be all by the
// next hub, where the file can be emptied but not removed; and where it can be neither,
// nobody is let in unwritten.
func TestUsedProofsBelieveNoOldFile(t *testing.T) {
	for _, tt := range []struct {
		name    string
		empties bool
	}{{"emptied", true}, {"neither", false}} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			now := time.Unix(1_800_000_000, 0)
			open := func() *usedProofs {
				u, err := openUsed(dir, now, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = u.close() })
				return u
			}
			u := open()
			use := func(number byte) error {
				f := &hubproto.ProofFacts{Nonce: [hubproto.NonceLen]byte{number}, CreatedAt: now}
				return u.use(someID(1), netip.MustParsePrefix("192.0.2.1/32"), f, now.Add(time.Minute), now)
			}
			u.since = 0
			if err := use(1); err != nil {
				t.Fatal(err)
			}
			aside := u.path + ".aside"
			u.remove = func(path string) error {
				if !tt.empties { // there is nothing to be emptied there either
					_ = os.Rename(path, aside)
				}
				return os.ErrPermission
			}
			_ = u.file.Close() // it cannot be written any more
			admitted := []byte{1}
			for n := range byte(3) {
				err := use(2 + n)
				if tt.empties != (err == nil) || err != nil && resultOfProof(err) != proofBusy {
					t.Errorf("number %d: %v", 2+n, err)
				}
				if err == nil {
					admitted = append(admitted, 2+n)
				}
			}
			before := u
			if !tt.empties {
				if err := os.Rename(aside, u.path); err != nil {
					t.Fatal(err)
				}
			}
			u = open()
			for _, n := range admitted {
				if err := use(n); err == nil {
					t.Errorf("number %d is taken once more after a start", n)
				}
			}
			if tt.empties {
				return
			}
			// It goes on once the file can be removed.
			u = before
			u.remove = os.Remove
			for n := range byte(2) {
				if err := use(8 + n); err != nil {
					t.Errorf("number %d: %v", 8+n, err)
				}
			}
			if _, err := os.Stat(u.path); !os.IsNotExist(err) {
				t.Errorf("the file is still there: %v", err)
			}
		})
	}
}

// TestClockSetBack: a hub whose wall clock is set back lets no proof in that was used and
// forgotten, in the memory as in the file; a step of a second changes nothing, and once the
// clock has caught up nothing is left of it.
func TestClockSetBack(t *testing.T) {
	for name, dir := range map[string]string{"memory": "", "data folder": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			const life = 2 * time.Minute
			start := time.Unix(1_800_000_000, 0)
			now := start
			u, err := openUsed(dir, now, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			u.since = 0 // the identity is new
			defer func() { _ = u.close() }()
			used := byte(0)
			use := func(number byte, made time.Time) error {
				f := &hubproto.ProofFacts{Nonce: [hubproto.NonceLen]byte{number}, CreatedAt: made}
				return u.use(someID(1), netip.MustParsePrefix("192.0.2.1/32"), f, made.Add(life), now)
			}
			fresh := func() error {
				used++
				return use(used, now)
			}
			if err := fresh(); err != nil {
				t.Fatal(err)
			}
			now = start.Add(time.Hour)
			if err := fresh(); err != nil { // the first one is forgotten
				t.Fatal(err)
			}
			now = now.Add(-time.Second)
			if err := fresh(); err != nil {
				t.Errorf("a second back: %v", err)
			}
			now = now.Add(life + 2*time.Second)
			if err := fresh(); err != nil { // so are the next two
				t.Fatal(err)
			}
			at := now
			for _, back := range []time.Duration{time.Hour + life, 10 * time.Minute} {
				now = at.Add(-back)
				for number, made := range map[byte]time.Time{1: start, 2: start.Add(time.Hour)} {
					if err := use(number, made); resultOfProof(err) != proofUnknownUse {
						t.Errorf("%v back, number %d: %v", back, number, err)
					}
				}
				if err := fresh(); !errors.Is(err, errForgotten) {
					t.Errorf("%v back: %v", back, err)
				}
			}
			if dir != "" {
				if err := u.rewrite(); err != nil {
					t.Fatal(err)
				}
				_ = u.close()
				if u, err = openUsed(dir, now, slog.New(slog.DiscardHandler)); err != nil {
					t.Fatal(err)
				}
				if err := use(2, start.Add(time.Hour)); resultOfProof(err) != proofUnknownUse {
					t.Errorf("after a start: %v", err)
				}
			}
			now = at
			if err := fresh(); err != nil {
				t.Errorf("caught up: %v", err)
			}
			if err := use(used, now); !errors.Is(err, errUsed) {
				t.Errorf("used: %v", err)
			}
		})
	}
}

func TestDevicesConfig(t *testing.T) {
	good := someID(1).String()
	far := []string{"mqtts://0.0.0.0:8883"}
	cert := TLS{Cert: "c", Key: "k"}
	for _, tt := range []struct {
		name string
		cfg  Config
		key  string // of the error; empty: fine
	}{
		{"a list", Config{MQTT: far, TLS: cert, Devices: Devices{Allow: []string{good}}}, ""},
		{"anyone", Config{MQTT: far, TLS: cert, Devices: Devices{AnyoneProven: true}}, ""},
		{"nothing", Config{MQTT: far, TLS: cert}, "mqtt"},
		{"a skew alone", Config{MQTT: far, TLS: cert, Devices: Devices{ClockSkew: time.Minute}}, "mqtt"},
		{"in the clear", Config{MQTT: []string{"0.0.0.0:1883"}, Devices: Devices{AnyoneProven: true}}, "mqtt"},
		{"insecure", Config{MQTT: []string{"0.0.0.0:1883"}, Devices: Devices{AnyoneProven: true}, InsecurePlaintext: true}, ""},
		{"bad identifier", Config{Devices: Devices{Allow: []string{"I12"}}}, "devices.allow"},
		{"attributes of nobody", Config{Devices: Devices{Attributes: map[string]string{"a": "b"}}}, "devices.attributes"},
		{"short skew", Config{Devices: Devices{ClockSkew: time.Millisecond}}, "devices.clock_skew"},
		{"long skew", Config{Devices: Devices{ClockSkew: time.Hour}}, "devices.clock_skew"},
	} {
		err := tt.cfg.Validate()
		var ce *ConfigError
		switch {
		case tt.key == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.key != "" && (!errors.As(err, &ce) || ce.Key != tt.key || ce.Fix == ""):
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	for name, text := range map[string]string{"empty": "", "not hex": "hello", "not a history": "00ff", "long": strings.Repeat("00", maxAuthorityFile)} {
		file := filepath.Join(t.TempDir(), "a")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadAuthority(file); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
}
