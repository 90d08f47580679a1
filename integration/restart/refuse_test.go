package restart

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// A disk that refuses withholds acknowledgements and nothing else: what needs no
// disk goes on, the hub says what is wrong, recovers by itself, and nothing that it
// acknowledged is missing after it was killed in the middle.
func TestDiskRefuses(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			h := newHub(t, "--durability", string(mode), "--segment-size", "1MiB")
			h.start()
			bobID, carolID := newID(t), hubproto.OneShotName(newID(t))
			alice := newID(t)
			bob, carol := listen(t, h, bobID), listen(t, h, carolID)
			defer bob.Disconnect(0)
			defer carol.Disconnect(0)
			absent := newID(t)
			listen(t, h, absent).Disconnect(100)
			pub := connect(h, alice, func() {})
			defer pub.Disconnect(0)
			send := func(to string, payload []byte, qos byte) paho.Token {
				f := route.Frame{Onward: route.To(h.address(to), "app"), Payload: payload}
				return pub.Publish("sealmq/"+alice+"/out", qos, false, route.AppendFrame(nil, &f))
			}
			// The next file cannot be made: what stands in its place cannot go.
			wall := filepath.Join(h.data, "store", "0000000000000002.seg")
			if err := os.MkdirAll(filepath.Join(wall, "x"), 0o700); err != nil {
				t.Fatal(err)
			}
			var waiting []paho.Token
			kept := make(map[uint64]bool)
			store := func() paho.Token {
				n := large + uint64(len(kept))
				kept[n] = true
				return send(absent, numbered(n), 1)
			}
			h.until("the disk refuses", func() (bool, string) {
				if len(waiting) < 100 {
					waiting = append(waiting, store())
				}
				s := h.status().Store
				return s.Refused != "", fmt.Sprintf("%+v", s)
			})
			stuck := store()
			// One that is not durable, and what is transient, go on.
			before := h.counters()["sealmq_frames_delivered_total"]
			for range 20 {
				if token := send(carolID, nil, 1); !token.WaitTimeout(patience) || token.Error() != nil {
					t.Fatal("what needs no disk was not acknowledged")
				}
				send(bobID, nil, 0)
			}
			h.until("others' frames are delivered", func() (bool, string) {
				n := h.counters()["sealmq_frames_delivered_total"] - before
				return n >= 40, fmt.Sprint(n)
			})
			select {
			case <-stuck.Done():
				t.Fatal("acknowledged what is not stored")
			default:
			}
			h.sums()

			if err := os.RemoveAll(wall); err != nil {
				t.Fatal(err)
			}
			for _, token := range append(waiting, stuck) {
				if !token.WaitTimeout(patience) || token.Error() != nil {
					t.Fatalf("not acknowledged although the disk is well: %v", token.Error())
				}
			}
			if s := h.status().Store; s.Refused != "" || s.Segments < 2 {
				t.Fatalf("%+v", s)
			}
			h.sums()
			h.end(syscall.SIGKILL)
			h.start()
			h.sums()
			receiveAll(h, absent, kept)
			h.sums()
		})
	}
}

// listen attaches a device that acknowledges what it gets.
func listen(t *testing.T, h *hub, clientID string) paho.Client {
	t.Helper()
	answered := make(chan struct{}, 1)
	c := connect(h, clientID, func() {})
	if c == nil {
		t.Fatal("cannot connect")
	}
	if token := c.Subscribe("sealmq/"+clientID+"/in", 1, func(paho.Client, paho.Message) {
		select {
		case answered <- struct{}{}:
		default:
		}
	}); !token.WaitTimeout(patience) || token.Error() != nil {
		t.Fatal("cannot subscribe")
	}
	hello, err := (&hubproto.HelloRequest{}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	f := route.Frame{Onward: route.To("hello"), Return: route.To("h"), Payload: hello}
	c.Publish("sealmq/"+clientID+"/out", 1, false, route.AppendFrame(nil, &f))
	select {
	case <-answered:
	case <-time.After(patience):
		t.Fatal("no answer to hello")
	}
	return c
}

// TestFullDiskAndBystanders: a disk that one absent device's backlog has filled is nothing to
// those whose frames are taken as they come: "everybody else's traffic goes on".
func TestFullDiskAndBystanders(t *testing.T) {
	h := newHub(t, "--durability", "always", "--segment-size", "1MiB")
	h.start()
	absent, carolID, alice, dave := newID(t), newID(t), newID(t), newID(t)
	listen(t, h, absent).Disconnect(0)
	carol := listen(t, h, carolID) // takes and acknowledges all that comes
	defer carol.Disconnect(0)
	wall := filepath.Join(h.data, "store", "0000000000000002.seg") // no file can be made any more
	if err := os.MkdirAll(filepath.Join(wall, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	a, d := connect(h, alice, func() {}), connect(h, dave, func() {})
	defer a.Disconnect(0)
	defer d.Disconnect(0)
	send := func(c paho.Client, from, to string, size int) paho.Token {
		f := route.Frame{Onward: route.To(h.address(to), "app"), Payload: make([]byte, size)}
		return c.Publish("sealmq/"+from+"/out", 1, false, route.AppendFrame(nil, &f))
	}
	sent := 0
	h.until("the disk refuses", func() (bool, string) {
		if sent++; sent < 100 {
			send(a, alice, absent, 20_000)
		}
		return h.status().Store.Refused != "", ""
	})
	before := h.counters()["sealmq_frames_delivered_total"]
	const n = 5
	var last paho.Token
	for range n {
		last = send(d, dave, carolID, 100)
	}
	h.until("carol has acknowledged them", func() (bool, string) {
		return h.counters()["sealmq_frames_delivered_total"] >= before+n, ""
	})
	if !last.WaitTimeout(5 * time.Second) {
		t.Error("carol has acknowledged all of dave's messages, and dave is not told: it stops as soon as its window is full")
	}
}
