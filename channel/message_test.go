package channel

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/sealmq/sealmq/internal/vectors"
	"github.com/sealmq/sealmq/route"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestPlaintextLeniency has what a stock peer was seen to accept and to drop
// (spec secure-channel 9.2), and the encodings that its decoder tolerates.
func TestPlaintextLeniency(t *testing.T) {
	const body = "82008183818200446563686f81820043617070460568656c6c6f"
	for name, c := range map[string]struct {
		hex string
		ok  bool
	}{
		"plain":                        {"82" + body + "40", true},
		"padding of 100 bytes":         {"82" + body + "5864" + string(bytes.Repeat([]byte("aa"), 100)), true},
		"further element":              {"83" + body + "40f6", true},
		"bytes after it":               {"82" + body + "40ffff", true},
		"indefinite outer array":       {"9f" + body + "40ff", true},
		"long integers":                {"82" + "82180081" + body[6:] + "40", true},
		"further fields":               {"82" + "82008284" + body[8:] + "f6" + "f6" + "40", true},
		"indefinite routes":            {"82" + "820081839f8200446563686fff80" + "40" + "40", true},
		"close with a field":           {"82" + "820281f6" + "40", true},
		"no padding":                   {"81" + body, false},
		"no wrapper":                   {body, false},
		"padding is text":              {"82" + body + "60", false},
		"unknown variant":              {"82" + "82038180" + "40", false},
		"indefinite enum":              {"82" + "9f" + body[2:] + "ff" + "40", false},
		"enum of three":                {"82" + "83" + body[2:] + "f6" + "40", false},
		"address as text":              {"82" + "82008183818200646563686f8040" + "40", false},
		"transport 256":                {"82" + "8200818381821901004480808080" + "80" + "40" + "40", false},
		"payload missing":              {"82" + "820081828080" + "40", false},
		"payload in pieces":            {"82" + "82008183" + "8080" + "5f4161ff" + "40", false},
		"map":                          {"a1" + body + "40", false},
		"65 hops":                      {"82" + "82008183" + "9841" + string(bytes.Repeat([]byte("820040"), 65)) + "80" + "40" + "40", false},
		"64 hops":                      {"82" + "82008183" + "9840" + string(bytes.Repeat([]byte("820040"), 64)) + "80" + "40" + "40", true},
		"address of 256 bytes":         {"82" + "82008183" + "818200590100" + string(bytes.Repeat([]byte("00"), 256)) + "80" + "40" + "40", false},
		"a count that cannot be there": {"82" + "82008183" + "9bffffffffffffffff" + "80" + "40" + "40", false},
		"empty":                        {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parseMessage(unhex(t, c.hex)); (err == nil) != c.ok {
				t.Errorf("%v, accepted should be %v", err, c.ok)
			}
		})
	}
	good := unhex(t, "82"+body+"40")
	for n := range good {
		if _, err := parseMessage(good[:n]); err == nil {
			t.Errorf("cut at %d accepted", n)
		}
	}
}

// TestHelloVectors pins the bytes of our own messages.
func TestHelloVectors(t *testing.T) {
	epoch := unhex(t, "000102030405060708090a0b0c0d0e0f")
	for name, c := range map[string]struct {
		h   hello
		hex string
	}{
		"greeting": {hello{Version: 1, Epoch: epoch}, "a2000101" + "50000102030405060708090a0b0c0d0e0f"},
		"features": {hello{Version: 1, Epoch: epoch, Features: 5}, "a3000101" + "50000102030405060708090a0b0c0d0e0f" + "0205"},
		"ping":     {hello{Version: 1, Epoch: epoch, Kind: helloPing}, "a3000101" + "50000102030405060708090a0b0c0d0e0f" + "0301"},
		"pong":     {hello{Version: 1, Epoch: epoch, Kind: helloPong}, "a3000101" + "50000102030405060708090a0b0c0d0e0f" + "0302"},
		"greeting of a lineage": {hello{Version: 1, Epoch: epoch, Lineage: epoch, Turn: 7},
			"a4000101" + "50000102030405060708090a0b0c0d0e0f" + "0550000102030405060708090a0b0c0d0e0f" + "0607"},
		"ping of a lineage": {hello{Version: 1, Epoch: epoch, Kind: helloPing, Lineage: epoch, Turn: 7},
			"a5000101" + "50000102030405060708090a0b0c0d0e0f" + "0301" + "0550000102030405060708090a0b0c0d0e0f" + "0607"},
		"bye": {hello{Version: 1, Epoch: epoch, Kind: helloBye, Reason: byeGap},
			"a4000101" + "50000102030405060708090a0b0c0d0e0f" + "0303" + "0401"},
	} {
		t.Run(name, func(t *testing.T) {
			wantBytes(t, "encoded", c.h.encode(), unhex(t, c.hex))
			h, err := parseHello(unhex(t, c.hex))
			if err != nil || !bytes.Equal(h.encode(), c.h.encode()) {
				t.Errorf("%+v, %v", h, err)
			}
		})
	}
	if h, err := parseHello(unhex(t, "a3000101"+"50000102030405060708090a0b0c0d0e0f"+"186382f5f6")); err != nil || h.Kind != helloGreeting {
		t.Errorf("an unknown key: %v", err)
	}
	for name, text := range map[string]string{
		"version 2":    "a2000201" + "50000102030405060708090a0b0c0d0e0f",
		"no version":   "a101" + "50000102030405060708090a0b0c0d0e0f",
		"short epoch":  "a2000101" + "4f000102030405060708090a0b0c0d0e",
		"no epoch":     "a10001",
		"repeated key": "a3000101" + "50000102030405060708090a0b0c0d0e0f" + "0001",
		"bytes after":  "a2000101" + "50000102030405060708090a0b0c0d0e0f" + "00",
		"array":        "80", "empty": "",
	} {
		if _, err := parseHello(unhex(t, text)); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if _, err := parseHello(make([]byte, maxHello+1)); err == nil {
		t.Error("longer than 4 KiB accepted")
	}
}

func seedPlaintexts(f *testing.F) {
	f.Helper()
	n := 0
	for _, file := range []string{"live_handshake_go_initiator.json", "live_handshake_go_responder.json"} {
		for _, s := range loadLive(f, file) {
			for _, frame := range s.Transport {
				f.Add([]byte(frame.Plaintext))
				n++
			}
		}
	}
	if n == 0 {
		f.Fatal("no seeds")
	}
}

// FuzzPlaintext: no panic, what is accepted encodes to something that decodes to
// the same, and is never larger than its input by more than a constant.
func FuzzPlaintext(f *testing.F) {
	seedPlaintexts(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMessage(b)
		if err != nil {
			return
		}
		again := encodeMessage(&m)
		m2, err := parseMessage(again)
		if err != nil {
			t.Fatalf("%x encodes to %x, which is refused: %v", b, again, err)
		}
		if !bytes.Equal(encodeMessage(&m2), again) || !m.onward.Equal(m2.onward) || !m.ret.Equal(m2.ret) ||
			!bytes.Equal(m.payload, m2.payload) {
			t.Fatalf("%x changes on the way", b)
		}
		if len(m.onward) > maxInnerHops || len(m.ret) > maxInnerHops {
			t.Fatal("too many hops")
		}
		if m.variant == variantPayload && len(again) != payloadLen(m.onward, m.ret, m.payload) {
			t.Fatalf("payloadLen says %d, it is %d", payloadLen(m.onward, m.ret, m.payload), len(again))
		}
	})
}

// FuzzHello: no panic, and what is accepted encodes canonically.
func FuzzHello(f *testing.F) {
	h := hello{Version: 1, Epoch: make([]byte, epochLen), Features: 3, Kind: helloBye, Reason: byeGap}
	f.Add(h.encode())
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b)
		if err != nil {
			return
		}
		again, err := parseHello(h.encode())
		if err != nil || !bytes.Equal(again.encode(), h.encode()) {
			t.Fatalf("%x: %v", b, err)
		}
	})
}

// FuzzOpener: whatever comes, only frames of the sealer open, each once, and the
// state changes for no other.
func FuzzOpener(f *testing.F) {
	key := [32]byte{5}
	s := NewSealer(key)
	for range 70 {
		frame, err := s.Seal(nil, []byte("seed"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame, uint16(0))
	}
	v := vectors.Load[struct{ Messages []struct{ Wire vectors.Hex } }](f, "transport_rekey_derived.json")
	for _, m := range v.Messages {
		f.Add([]byte(m.Wire), uint16(7))
	}
	f.Fuzz(func(t *testing.T, frame []byte, received uint16) {
		s, o := NewSealer(key), NewOpener(key)
		for range received % 100 {
			good, _ := s.Seal(nil, []byte("seed"))
			if _, _, err := o.Open(nil, good); err != nil {
				t.Fatal(err)
			}
		}
		before := *o
		p, n, err := o.Open(nil, frame)
		if err != nil {
			if o.window != before.window || o.rekeys != before.rekeys || o.cur.raw != before.cur.raw {
				t.Fatal("a refused frame changed the state")
			}
			return
		}
		if string(p) != "seed" || n < uint64(received%100) {
			t.Fatalf("opened %q as nonce %d", p, n)
		}
		if _, _, err := o.Open(nil, frame); err == nil {
			t.Fatal("opened twice")
		}
	})
}

// FuzzHandshakePayload: no panic, and nothing but the genuine payload proves the
// identity that the static key belongs to.
func FuzzHandshakePayload(f *testing.F) {
	s := loadLive(f, "live_handshake_go_initiator.json")[2] // with credentials
	v := newVerifier(newCountingRegistry(), TrustEveryone, s.authorities(f), s.clock)
	static := [32]byte{1}
	for _, s := range loadLive(f, "live_handshake_go_initiator.json") {
		f.Add([]byte(s.Handshake.Payload2))
		f.Add([]byte(s.Handshake.Payload3))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if p, err := v.check(payload, static); err == nil {
			t.Fatalf("%v proved with a key it has not attested", p.Identifier)
		}
		if n := v.registry.(*countingRegistry).updates; n != 0 {
			t.Fatal("the registry was written to")
		}
	})
}

// FuzzHandshakeMessages: arbitrary bytes in every phase are refused without a
// panic, and the genuine message still completes.
func FuzzHandshakeMessages(f *testing.F) {
	alice, bob := newIdentity(f), newIdentity(f)
	ok := step[[]byte](f)
	i, r := handshakes(f, alice, bob)
	m1 := ok(i.Start())
	m2 := ok(r.ReadFirst(m1))
	initiator := *i
	m3 := ok(i.ReadReply(m2))
	for _, m := range [][]byte{m1, m2, m3} {
		f.Add(m)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.Equal(b, m2) || bytes.Equal(b, m3) {
			return
		}
		i, r := initiator, *r
		if _, err := i.ReadReply(b); err == nil {
			t.Fatal("accepted as message 2")
		}
		if err := r.ReadFinal(b); err == nil {
			t.Fatal("accepted as message 3")
		}
		if i.x != initiator.x || i.Phase() != PhaseAwaitReply || r.Phase() != PhaseAwaitFinal {
			t.Fatal("a refused message changed the state")
		}
	})
}

func TestPrependUsesSpareRoom(t *testing.T) {
	for _, r := range []route.Route{nil, route.To("a"), append(make(route.Route, 0, 4), route.To("a", "b")...)} {
		want := r.Prepend(route.Local("x"))
		if got := prepend(route.Local("x"), r); !got.Equal(want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
}
