package delivery

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "write testdata/vectors.json")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vector is one message of testdata/vectors.json.
type vector struct {
	Name  string `json:"name"`
	Hex   string `json:"hex"`
	Error bool   `json:"error,omitempty"` // refused
}

var vectorsFile = filepath.Join("testdata", "vectors.json")

func vectorID() (id OutboxID) {
	for i := range id {
		id[i] = byte(i)
	}
	return id
}

// samples are the messages that the accepted vectors hold.
func samples() map[string]Message {
	h := Header{Outbox: vectorID(), Session: 3, Serial: 7, Base: 40}
	return map[string]Message{
		"data":                     &Data{Header: h, Count: 42, To: "app", Payload: []byte("Hello Ockam!")},
		"data, empty payload":      &Data{Header: h, Count: 42, To: "app"},
		"data, redelivered":        &Data{Header: h, Count: 40, To: "app", Payload: []byte{0}, Redelivered: true},
		"data, withdrawn":          &Data{Header: h, Count: 41, Void: true},
		"data, last of any window": &Data{Header: h, Count: 40 + MaxWindow - 1, To: "app"},
		"ask":                      &Ask{Header: h, Last: 50},
		"ask, all acknowledged":    &Ask{Header: h, Last: 39},
		"state":                    &State{Header: h, Next: 44, Acked: []byte{0b1010}, Held: []byte{0, 1}, Messages: 512, Bytes: 2 << 20},
		"state, refused otherwise": &State{Header: h, Next: 40, Messages: 512, Bytes: 2 << 20, Refusal: 255},
		"state, refused":           &State{Header: h, Next: 40, Messages: 512, Bytes: 2 << 20, Refusal: RefusalUnknown},
		"settle":                   &Settle{Header: h},
	}
}

// refused are encodings that no receiver takes.
func refused() map[string][]byte {
	h := Header{Outbox: vectorID(), Session: 3, Serial: 7, Base: 40}
	raw := func(change func(*wire)) []byte {
		w := h.wire(KindData)
		w.Count, w.To = 42, "app"
		change(&w)
		return w.append(nil)
	}
	return map[string][]byte{
		"empty":                      {},
		"null":                       {0xf6},
		"trailing byte":              append(samples()["ask"].Append(nil), 0),
		"unknown version":            raw(func(w *wire) { w.Version = 2 }),
		"unknown kind":               raw(func(w *wire) { w.Kind = 4 }),
		"short outbox id":            raw(func(w *wire) { w.Outbox = w.Outbox[:15] }),
		"base 0":                     raw(func(w *wire) { w.Base = 0 }),
		"session 0":                  raw(func(w *wire) { w.Session = 0 }),
		"serial 0":                   raw(func(w *wire) { w.Serial = 0 }),
		"number out of range":        raw(func(w *wire) { w.Count, w.Base = 1<<63, 1<<63 }),
		"count before base":          raw(func(w *wire) { w.Count = 39 }),
		"count beyond any window":    raw(func(w *wire) { w.Count = 40 + MaxWindow }),
		"no address":                 raw(func(w *wire) { w.To = "" }),
		"address too long":           raw(func(w *wire) { w.To = string(bytes.Repeat([]byte{'a'}, 256)) }),
		"withdrawn with payload":     raw(func(w *wire) { w.Flags, w.To, w.Payload = flagVoid, "", []byte{1} }),
		"ask, last before base":      raw(func(w *wire) { w.Kind, w.Count, w.To = uint64(KindAsk), 38, "" }),
		"state, next before base":    raw(func(w *wire) { w.Kind, w.Next = uint64(KindState), 39 }),
		"state, next beyond window":  raw(func(w *wire) { w.Kind, w.Next = uint64(KindState), 41+MaxWindow }),
		"state, bitmap too long":     raw(func(w *wire) { w.Kind, w.Next, w.Acked = uint64(KindState), 40, make([]byte, maxBitmap+1) }),
		"state, refusal beyond 255":  raw(func(w *wire) { w.Kind, w.Next, w.Refusal = uint64(KindState), 40, 256+uint64(RefusalFull) }),
		"control longer than 4 KiB":  raw(func(w *wire) { w.Kind, w.Payload = uint64(KindSettle), make([]byte, maxControl) }),
		"array instead of map":       {0x80},
		"indefinite length":          {0xbf, 0xff},
		"duplicate key":              {0xa2, 0x00, 0x01, 0x00, 0x01},
		"tagged":                     {0xc0, 0xa0},
		"text where number is meant": {0xa1, 0x00, 0x61, 0x31},
	}
}

func TestVectors(t *testing.T) {
	if *update {
		var all []vector
		for _, name := range slices.Sorted(maps.Keys(samples())) {
			all = append(all, vector{Name: name, Hex: hex.EncodeToString(samples()[name].Append(nil))})
		}
		for _, name := range slices.Sorted(maps.Keys(refused())) {
			all = append(all, vector{Name: name, Hex: hex.EncodeToString(refused()[name]), Error: true})
		}
		b, err := json.MarshalIndent(all, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorsFile, append(b, '\n'), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := loadVectors(t)
	if len(all) != len(samples())+len(refused()) {
		t.Errorf("%d vectors", len(all))
	}
	for _, v := range all {
		t.Run(v.Name, func(t *testing.T) {
			b, err := hex.DecodeString(v.Hex)
			if err != nil {
				t.Fatal(err)
			}
			m, err := Parse(b)
			if v.Error {
				if !errors.Is(err, ErrMessage) {
					t.Fatalf("accepted: %+v, %v", m, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := samples()[v.Name]; !reflect.DeepEqual(m, want) {
				t.Errorf("parsed %+v, want %+v", m, want)
			}
			if again := m.Append([]byte("x")); !bytes.Equal(again[1:], b) {
				t.Errorf("encodes to %x", again[1:])
			}
			for n := range b {
				if m, err := Parse(b[:n]); err == nil {
					t.Errorf("cut at %d accepted: %+v", n, m)
				}
			}
		})
	}
}

func loadVectors(t testing.TB) (all []vector) {
	t.Helper()
	b, err := os.ReadFile(vectorsFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &all); err != nil || len(all) == 0 {
		t.Fatalf("no vectors: %v", err)
	}
	return all
}

// Unknown keys are for later versions of the same messages.
func TestUnknownKeysAreIgnored(t *testing.T) {
	b := samples()["settle"].Append(nil)
	b[0]++ // one more pair
	b = append(b, 0x18, 0x63, 0x01)
	if m, err := Parse(b); err != nil || !reflect.DeepEqual(m, samples()["settle"]) {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestOverheadIsEnough(t *testing.T) {
	d := &Data{
		Header: Header{Outbox: vectorID(), Session: maxNumber, Serial: maxNumber, Base: maxNumber},
		Count:  maxNumber, Redelivered: true, To: string(bytes.Repeat([]byte{'a'}, MaxAddress)), Payload: make([]byte, 1<<24),
	}
	if n := len(d.Append(nil)) - len(d.Payload) - len(d.To); n > Overhead {
		t.Errorf("%d bytes beside payload and address, Overhead is %d", n, Overhead)
	}
	// The longest State is within the limit of a control message.
	st := &State{
		Header: d.Header, Next: maxNumber, Messages: 1 << 62, Bytes: 1 << 62, Refusal: 255,
		Acked: bytes.Repeat([]byte{255}, maxBitmap), Held: bytes.Repeat([]byte{255}, maxBitmap),
	}
	if _, err := Parse(st.Append(nil)); err != nil {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		b, err := hex.DecodeString(v.Hex)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			if m != nil || !errors.Is(err, ErrMessage) {
				t.Errorf("%v with %v", m, err)
			}
			return
		}
		again := m.Append(nil)
		n, err := Parse(again)
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		if !bytes.Equal(n.Append(nil), again) {
			t.Errorf("encodings differ: %x and %x", again, n.Append(nil))
		}
		// Whatever a peer sends, both machines stay within their bounds.
		s := NewSender(SenderConfig{Outbox: m.head().Outbox})
		s.Add("app", []byte("payload"), true)
		s.Attach([16]byte{1})
		now := simStart
		for {
			if _, ok := s.Next(now); !ok {
				break
			}
		}
		r := NewReceiver(ReceiverConfig{Hand: func(Item) Refusal { return RefusalNone }})
		switch m := m.(type) {
		case *Data:
			r.Data(simPeer, 1, m, nil, now)
		case *Ask:
			r.Ask(simPeer, 1, m, now)
		case *Settle:
			r.Settle(simPeer, 1, m, now)
		case *State:
			if acked := s.Receive(m, now); len(acked) > 1 {
				t.Errorf("acknowledged %v of one message", acked)
			}
		}
		if _, n, _ := s.Pending(); n > 1 {
			t.Errorf("%d pending", n)
		}
		for n := 0; ; n++ {
			st, ok := r.NextState(1)
			if !ok {
				break
			}
			if _, err := Parse(st.Append(nil)); err != nil || n > 2 {
				t.Fatalf("answer %d: %v", n, err)
			}
		}
	})
}
