// Package docs holds the documentation to the code.
package docs

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

var update = flag.Bool("update", false, "write vectors.json")

func fill[A [16]byte | [32]byte](b byte) (a A) {
	for i := range len(a) {
		a[i] = b + byte(i)
	}
	return a
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// witness is a device's connection and an observer of the hub.
type witness struct {
	link    *bridge.Link
	answers chan []byte
	traces  chan []byte
}

func (w *witness) Deliver(entries []bridge.Entry) int {
	for _, e := range entries {
		w.answers <- bytes.Clone(e.Frame)
		w.link.Delivered(e.Seq)
	}
	return len(entries)
}
func (w *witness) Direct([]byte) bool     { return true }
func (w *witness) Kick(bridge.KickReason) {}
func (w *witness) Copy(bridge.Copy)       {}
func (w *witness) Record(bridge.Record)   {}
func (w *witness) Trace(line []byte)      { w.traces <- bytes.Clone(line) }

// send has a device send a frame to the hub, and returns what observers see of it
// and what the hub answers.
func send(t *testing.T, b *bridge.Bridge, who bridge.Principal, frame []byte) (trace, answer []byte) {
	t.Helper()
	w := &witness{answers: make(chan []byte, 8), traces: make(chan []byte, 8)}
	defer b.Observe(w)()
	w.link = must(b.ConnectDevice(who, w))
	defer w.link.Close(true)
	w.link.Subscribed()
	w.link.Attach(true)
	if err := w.link.Receive(frame, route.Stored, nil, 0); err != nil {
		t.Fatal(err)
	}
	got := func(c chan []byte) []byte {
		select {
		case b := <-c:
			return b
		case <-time.After(10 * time.Second):
			t.Fatal("the hub did not answer")
			return nil
		}
	}
	return got(w.traces), got(w.answers)
}

// vectors computes every value of vectors.json.
func vectors(t *testing.T) map[string]string {
	id := identity.Identifier(fill[[32]byte](0x40))
	clientID := id.String() + "-pump"
	const escaped = "forward_to_a b/+#%é"
	const m = "000102030405060708090a0b0c0d0e0f"
	at := time.UnixMilli(1767323045006)
	nonce := fill[[16]byte](0x30)

	hubID := must(identity.Create())
	b := must(bridge.New(bridge.Config{Key: fill[[32]byte](1), Identity: bridge.IdentitySigner(hubID), Trace: true}))
	defer b.Close()
	key := fill[[32]byte](1)
	forwarder := hmac.New(sha256.New, key[:])
	forwarder.Write([]byte("fwd/1" + clientID + "\x00" + m))

	record := hubproto.ForwarderRecord{
		Address: "FWD_" + hex.EncodeToString(forwarder.Sum(nil)[:16]), Kind: hubproto.Dynamic,
		Owner: id, Proven: true, Device: clientID, Since: at, Online: true,
	}
	status := hubproto.StatusRecord{Device: clientID, Online: true, Since: at}
	request := hubproto.HelloRequest{Epoch: fill[[16]byte](0x20), Fresh: true, Nonce: nonce}
	answer := hubproto.HelloAnswer{
		Hub: id, Epoch: fill[[16]byte](0x60), Time: at, FrameLimit: 262144, BundleLimit: 16384, Window: 1024,
		Forwarders: []string{record.Address}, Signature: bytes.Repeat([]byte{9}, 64),
	}
	notice := hubproto.Notice{
		Reason: hubproto.ReasonUnknown, FirstHop: route.Local("FWD_x"), HasFirst: true, Count: 1,
	}
	first := route.AppendFrame(nil, &route.Frame{Onward: route.To("FWD_x"), Return: route.To(m), Payload: []byte("one")})
	bundle := route.AppendFrame(first, &route.Frame{Onward: route.To("FWD_x", "app"), Payload: []byte("two")})
	if views, err := route.ParseBundle(bundle, route.Limits{}, nil); err != nil || len(views) != 2 {
		t.Fatalf("the bundle does not parse: %v", err)
	}
	registration := route.AppendFrame(nil, &route.Frame{
		Onward: route.To("static_forwarding_service"), Return: route.To(m), Payload: device.EncodeString("pump"),
	})
	trace, registered := send(t, b, bridge.Principal{Identity: id, ClientID: clientID, Role: bridge.RoleDevice, Proven: true}, registration)
	h := hex.EncodeToString
	return map[string]string{
		"address key":          h(key[:]),
		"client id":            clientID,
		"M":                    m,
		"hub address":          b.HubAddress(clientID),
		"forwarding address":   record.Address,
		"bundle of two frames": h(bundle),
		"hello request":        h(must(request.Marshal())),
		"hello answer":         h(must(answer.Marshal())),
		"hello signed bytes":   h(hubproto.HelloSigned(nonce, at, nil)),
		"notice unknown":       h(must(notice.Marshal())),
		"notice frame":         h(must(hubproto.NoticeFrame(&notice))),
		"lookup request":       h(must((&hubproto.LookupRequest{Address: record.Address}).Marshal())),
		"lookup answer":        h(must((&hubproto.LookupAnswer{Address: record.Address, Record: &record}).Marshal())),
		"lookup answer null":   h(must((&hubproto.LookupAnswer{Address: "FWD_x"}).Marshal())),
		"registration static":  h(registration),
		"registration answer":  h(registered),
		"trace line":           string(trace),
		"topic out":            topics.DefaultRoot.Out(clientID),
		"topic forwarder":      topics.DefaultRoot.Forwarder("forward_to_pump"),
		"topic escaped of":     escaped,
		"topic escaped":        topics.DefaultRoot.Forwarder(escaped),
		"forwarder record":     h(must(record.Marshal())),
		"forwarder JSON":       string(record.JSON()),
		"status JSON":          string(status.JSON()),
	}
}

// The published vectors are what the code writes.
func TestVectors(t *testing.T) {
	got := vectors(t)
	if *update {
		text := must(json.MarshalIndent(got, "", "  "))
		if err := os.WriteFile("vectors.json", append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile("vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]string
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	for name, value := range got {
		if want[name] != value {
			t.Errorf("%s is %s, published is %s", name, value, want[name])
		}
	}
	if len(want) != len(got) {
		t.Errorf("%d vectors published, %d checked", len(want), len(got))
	}
}

// The published messages read back.
func TestVectorsParse(t *testing.T) {
	v := vectors(t)
	raw := func(name string) []byte { return must(hex.DecodeString(v[name])) }
	if _, err := hubproto.ParseHelloRequest(raw("hello request")); err != nil {
		t.Error(err)
	}
	if _, err := hubproto.ParseHelloAnswer(raw("hello answer")); err != nil {
		t.Error(err)
	}
	if n, err := hubproto.ParseNotice(raw("notice unknown")); err != nil || n.Reason != hubproto.ReasonUnknown {
		t.Errorf("%+v, %v", n, err)
	}
	if r, err := hubproto.ParseForwarderRecord(raw("forwarder record")); err != nil || r.Address != v["forwarding address"] {
		t.Errorf("%+v, %v", r, err)
	}
	if a, err := hubproto.ParseLookupAnswer(raw("lookup answer")); err != nil || a.Record == nil || a.Record.Address != v["forwarding address"] {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := hubproto.ParseLookupAnswer(raw("lookup answer null")); err != nil || a.Record != nil {
		t.Errorf("%+v, %v", a, err)
	}
	// The hub answers as the service whose address was given, which ends with the alias.
	f, err := route.ParseFrame(raw("registration answer"), route.Limits{})
	if err != nil || f.Onward.String() != "0#"+v["M"] || f.Return.String() != "0#forward_to_pump" {
		t.Errorf("%+v, %v", f, err)
	}
	kind, level := topics.DefaultRoot.Parse(v["topic escaped"])
	if address, ok := topics.UnescapeLevel(level); !ok || kind != topics.Forwarder || address != v["topic escaped of"] {
		t.Errorf("%s is topic %v of %q", v["topic escaped"], kind, address)
	}
}
