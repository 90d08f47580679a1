package hubproto

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

var (
	when = time.UnixMilli(1_700_000_000_123)
	id   = identity.Identifier{0xaa, 1, 2, 3}
)

type message interface{ Marshal() ([]byte, error) }

// messages are one of each kind, with the bytes that the protocol page shows.
var messages = []struct {
	name  string
	m     message
	parse func([]byte) (any, error)
	hex   string
}{
	{
		"hello request",
		&HelloRequest{Epoch: [16]byte{1}, Fresh: true, Nonce: [16]byte{2}, Features: 5},
		func(b []byte) (any, error) { return ParseHelloRequest(b) },
		"a500010150" + "01000000000000000000000000000000" + "02f50350" + "02000000000000000000000000000000" + "0405",
	},
	{
		"hello answer",
		&HelloAnswer{
			Hub: id, Epoch: [16]byte{3}, Time: when, FrameLimit: 262144, BundleLimit: 16384, Window: 1024,
			Forwarders: []string{"FWD_00"}, ForwarderCount: 1, Features: 1, Signature: []byte{9}, History: []byte{8},
		},
		func(b []byte) (any, error) { return ParseHelloAnswer(b) },
		"ac0001015820aa010203" + strings.Repeat("00", 28) + "0250" + "03" + strings.Repeat("00", 15) +
			"031b0000018bcfe5687b" + "041a00040000" + "05194000" + "06190400" + "0781664657445f3030" + "0801" + "094109" + "0a4108" + "0b01",
	},
	{
		"notice",
		&Notice{Reason: ReasonUnknown, FirstHop: route.Local("x"), HasFirst: true, LastReturn: route.Local("y"), HasReturn: true, Count: 2},
		func(b []byte) (any, error) { return ParseNotice(b) },
		"a500010101" + "0282004178" + "0382004179" + "0402",
	},
	{
		"notice without hops",
		&Notice{Reason: ReasonTakenOver, Count: 1},
		func(b []byte) (any, error) { return ParseNotice(b) },
		"a50001010902f603f60401",
	},
	{
		"lookup request",
		&LookupRequest{Address: "FWD_00"},
		func(b []byte) (any, error) { return ParseLookupRequest(b) },
		"a2000101664657445f3030",
	},
	{
		"lookup answer, nothing",
		&LookupAnswer{Address: "FWD_00"},
		func(b []byte) (any, error) { return ParseLookupAnswer(b) },
		"a3000101664657445f303002f6",
	},
	{
		"lookup answer",
		&LookupAnswer{Address: "FWD_00", Record: &ForwarderRecord{
			Address: "FWD_00", Kind: Dynamic, Owner: id, Proven: true, Device: "d", Since: when, Online: true, Claim: []byte{},
		}},
		func(b []byte) (any, error) { return ParseLookupAnswer(b) },
		"a3000101664657445f303002" + "a90001" + "01664657445f3030" + "0201" + "035820aa010203" + strings.Repeat("00", 28) +
			"04f5" + "056164" + "061b0000018bcfe5687b" + "07f5" + "0840",
	},
	{
		"forwarder record of a stream",
		&ForwarderRecord{Address: "forward_to_a", Kind: Static, Since: when, Claim: []byte{7}},
		func(b []byte) (any, error) { return ParseForwarderRecord(b) },
		"a90001016c666f72776172645f746f5f6102020340" + "04f4" + "0560" + "061b0000018bcfe5687b" + "07f4" + "084107",
	},
}

func TestMessages(t *testing.T) {
	for _, tt := range messages {
		t.Run(tt.name, func(t *testing.T) {
			b, err := tt.m.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(b); got != tt.hex {
				t.Errorf("encoded\n%s, want\n%s", got, tt.hex)
			}
			back, err := tt.parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(back, tt.m) {
				t.Errorf("decoded %+v, want %+v", back, tt.m)
			}
			for n := range b {
				if got, err := tt.parse(b[:n]); err == nil {
					t.Errorf("cut at %d accepted: %+v", n, got)
				}
			}
			if _, err := tt.parse(append(bytes.Clone(b), 0)); !errors.Is(err, ErrMalformed) {
				t.Errorf("a byte more: %v", err)
			}
			// A later version is refused, whatever it holds.
			if _, err := tt.parse([]byte{0xa2, 0x00, 0x02, 0x01, 0xf6}); !errors.Is(err, ErrVersion) {
				t.Errorf("version 2: %v", err)
			}
			// Keys of the future are ignored.
			more := append(bytes.Clone(b), 0x18, 0x63, 0x82, 0x01, 0xf5)
			more[0]++
			if got, err := tt.parse(more); err != nil || !reflect.DeepEqual(got, tt.m) {
				t.Errorf("an unknown key: %+v, %v", got, err)
			}
			// The same key twice is not a map.
			twice := append(bytes.Clone(b), 0x00, 0x01)
			twice[0]++
			if _, err := tt.parse(twice); !errors.Is(err, ErrMalformed) {
				t.Errorf("key twice: %v", err)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	big := append([]byte{0xa2, 0x00, 0x01, 0x01, 0x59, 0x10, 0x00}, make([]byte, 4096)...)
	for name, b := range map[string][]byte{
		"nothing": {}, "null": {0xf6}, "array": {0x81, 0x01}, "no version": {0xa0}, "version null": {0xa1, 0x00, 0xf6},
		"tagged": {0xc1, 0xa1, 0x00, 0x01}, "indefinite": {0xbf, 0x00, 0x01, 0xff}, "text version": {0xa1, 0x00, 0x61, 0x31},
		"short epoch": {0xa3, 0x00, 0x01, 0x01, 0x41, 0x00, 0x03, 0x40},
	} {
		if _, err := ParseHelloRequest(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := ParseHelloAnswer(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseHelloRequest(big); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := (&LookupRequest{Address: strings.Repeat("x", 5000)}).Marshal(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large to encode: %v", err)
	}
	if _, err := ParseNotice([]byte{0xa5, 0, 1, 1, 0, 2, 0xf6, 3, 0xf6, 4, 1}); !errors.Is(err, ErrMalformed) {
		t.Errorf("notice without reason: %v", err)
	}
	if _, err := ParseLookupRequest([]byte{0xa2, 0, 1, 1, 0x60}); !errors.Is(err, ErrMalformed) {
		t.Errorf("lookup of nothing: %v", err)
	}
	// A reason that this version does not know is kept for the caller to ignore.
	n, err := ParseNotice([]byte{0xa5, 0, 1, 1, 10, 2, 0xf6, 3, 0xf6, 4, 1})
	if err != nil || n.Reason.Known() || n.Reason.String() != "reason(10)" {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestManyForwardersArePaged(t *testing.T) {
	a := HelloAnswer{Hub: id, Time: when, Signature: make([]byte, 64), History: make([]byte, 300), ForwarderCount: 500}
	for range 500 {
		a.Forwarders = append(a.Forwarders, "FWD_00112233445566778899aabbccddeeff")
	}
	b, err := a.Marshal()
	if err != nil || len(b) > MaxMessage || len(b) < MaxMessage-150 {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	back, err := ParseHelloAnswer(b)
	if err != nil || back.ForwarderCount != 500 || len(back.Forwarders) < 80 {
		t.Errorf("%d of %d, %v", len(back.Forwarders), back.ForwarderCount, err)
	}
	a.History = make([]byte, MaxMessage)
	if _, err := a.Marshal(); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestHelloSigned(t *testing.T) {
	got := hex.EncodeToString(HelloSigned([16]byte{1, 2}, when, []byte("exporter")))
	want := "01020000000000000000000000000000" + "0000018bcfe5687b" + hex.EncodeToString([]byte("exporter"))
	if got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestNoticeFrame(t *testing.T) {
	b, err := NoticeFrame(&Notice{Reason: ReasonOffline, Count: 3})
	if err != nil {
		t.Fatal(err)
	}
	f, err := route.ParseFrame(b, route.Limits{})
	if err != nil || !f.Onward.Equal(route.To("sealmq.notice")) || !f.Return.Equal(route.To("notice")) {
		t.Fatalf("%+v, %v", f, err)
	}
	if n, err := ParseNotice(f.Payload); err != nil || n.Reason != ReasonOffline || n.Count != 3 {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestJSON(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{
			string((&StatusRecord{Device: "bob", Online: true, Since: when}).JSON()),
			`{"v":1,"device":"bob","status":"online","since":"2023-11-14T22:13:20.123Z"}`,
		},
		{
			string((&StatusRecord{Device: "bob", Since: when}).JSON()),
			`{"v":1,"device":"bob","status":"offline","since":"2023-11-14T22:13:20.123Z"}`,
		},
		{
			string((&ForwarderRecord{Address: "forward_to_a", Kind: Static, Since: when}).JSON()),
			`{"v":1,"address":"forward_to_a","kind":"static","proven":false,"since":"2023-11-14T22:13:20.123Z","online":false,"signed":false}`,
		},
	} {
		if tt.got != tt.want {
			t.Errorf("%s, want %s", tt.got, tt.want)
		}
	}
	r := ForwarderRecord{Address: "FWD_0", Kind: Dynamic, Owner: id, Device: "bob", Since: when, Claim: []byte{1}}
	var m map[string]any
	if err := json.Unmarshal(r.JSON(), &m); err != nil || m["identifier"] != id.String() || m["signed"] != true || m["claim"] != "AQ==" {
		t.Errorf("%v, %v", m, err)
	}
}

func TestReasons(t *testing.T) {
	want := []string{"unknown", "waiting", "offline", "full", "too-large", "malformed", "expired", "refused", "taken-over"}
	for i, name := range want {
		if r := Reason(i + 1); !r.Known() || r.String() != name {
			t.Errorf("%d is %s", i+1, r)
		}
	}
	if Reason(0).Known() || Reason(10).Known() {
		t.Error("a reason too many")
	}
}

func TestOneShotNames(t *testing.T) {
	a, b := OneShotName("I00"), OneShotName("I00")
	if a == b || !IsOneShot(a) || !strings.HasPrefix(a, "I00-") {
		t.Errorf("%s, %s", a, b)
	}
	for _, s := range []string{"", "I00", "I00-gateway", "I00-0123456789ABCDEF", "I00-0123456789abcde", "-0123456789abcdef", "0123456789abcdef"} {
		if IsOneShot(s) {
			t.Errorf("%q is one-shot", s)
		}
	}
}

// fuzz checks that what is accepted is small and has a stable canonical form.
func fuzz[M message](f *testing.F, parse func([]byte) (M, error)) {
	seeds := 0
	for _, tt := range messages {
		b, err := hex.DecodeString(tt.hex)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		seeds++
	}
	if seeds == 0 {
		f.Fatal("no seeds")
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			return
		}
		if len(b) > MaxMessage {
			t.Fatal("too large and accepted")
		}
		once, err := m.Marshal()
		if errors.Is(err, ErrTooLarge) {
			return // unknown keys make room for longer lengths than ours
		}
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(once)
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		twice, err := again.Marshal()
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x then %x, %v", once, twice, err)
		}
	})
}

func FuzzHelloRequest(f *testing.F)    { fuzz(f, ParseHelloRequest) }
func FuzzHelloAnswer(f *testing.F)     { fuzz(f, ParseHelloAnswer) }
func FuzzNotice(f *testing.F)          { fuzz(f, ParseNotice) }
func FuzzLookupRequest(f *testing.F)   { fuzz(f, ParseLookupRequest) }
func FuzzLookupAnswer(f *testing.F)    { fuzz(f, ParseLookupAnswer) }
func FuzzForwarderRecord(f *testing.F) { fuzz(f, ParseForwarderRecord) }
