package guard

import (
	"fmt"
	"net"
	"strings"
	"testing"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/internal/rawmqtt"
)

// loginFrom connects from 127.0.0.HOST in MQTT 5, and returns the code of the CONNACK.
func (b *broker) loginFrom(t *testing.T, host byte, o rawmqtt.Options) (*rawmqtt.Client, byte) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}}
	nc, err := d.DialContext(t.Context(), "tcp", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	c := rawmqtt.New(nc, true)
	t.Cleanup(func() { _ = c.Close() })
	p, err := c.Login(o)
	if err != nil {
		t.Fatal(err)
	}
	return c, p.Code()
}

// fill has many do something, two more than there is room for, and counts who did.
func fill(t *testing.T, what string, room int, do func(i int) bool) {
	t.Helper()
	n := 0
	for i := range room + 2 {
		if do(i) {
			n++
		}
	}
	if n != room {
		t.Errorf("%s: %d, want %d", what, n, room)
	}
}

// TestKeptSessionsLeaveRoomForOthers: one address, or one user name, keeps half of the
// sessions at most.
func TestKeptSessionsLeaveRoomForOthers(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.Sessions = 12 })
	keep := func(host byte, id, user string) bool {
		c, code := b.loginFrom(t, host, rawmqtt.Options{ID: id, User: user, Keep: true, Props: []byte{17, 0, 0, 1, 0}})
		_ = c.Close()
		return code == 0
	}
	fill(t, "one address, many names", 6, func(i int) bool { return keep(1, fmt.Sprint("a", i), fmt.Sprint("user", i)) })
	fill(t, "others", 6, func(i int) bool { return keep(byte(10+i), fmt.Sprint("b", i), "") })
	if !keep(1, "a0", "user0") || !keep(20, "b0", "") {
		t.Error("a session that is kept is not come back to")
	}
	// Who gives one up, at last by DISCONNECT, may have another.
	c, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "a1", Keep: true, Props: []byte{17, 0, 0, 1, 0}})
	send(t, c, rawmqtt.Frame(rawmqtt.DISCONNECT<<4, []byte{0, 5, 17, 0, 0, 0, 0}))
	closedByPeer(t, c)
	eventually(t, "one is gone", func() bool { return b.Clients.Len() < 12 })
	if !keep(1, "again", "") || keep(1, "more", "") {
		t.Error("not one in place of the one that was given up")
	}
	b.fixes.sessions.mu.Lock()
	defer b.fixes.sessions.mu.Unlock()
	if n := len(b.fixes.sessions.of); n != 12 {
		t.Errorf("%d are counted", n)
	}
}

func TestSessionsOfOneNameLeaveRoomForOthers(t *testing.T) {
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.Sessions = 12 })
	keep := func(host byte, id, user string) bool {
		c, code := b.loginFrom(t, host, rawmqtt.Options{ID: id, User: user, Keep: true, Props: []byte{17, 0, 0, 1, 0}})
		_ = c.Close()
		return code == 0
	}
	fill(t, "one name, many addresses", 6, func(i int) bool { return keep(byte(1+i), fmt.Sprint("a", i), "same") })
	fill(t, "another name", 6, func(i int) bool { return keep(byte(1+i), fmt.Sprint("b", i), "other") })
}

// TestRetainedMessagesLeaveRoomForOthers, in number and in bytes.
func TestRetainedMessagesLeaveRoomForOthers(t *testing.T) {
	for name, tt := range map[string]struct {
		limits FixesConfig
		size   int
	}{
		"number": {FixesConfig{Retained: 8}, 10},
		"bytes":  {FixesConfig{RetainedBytes: 2 * 4 * 10_100}, 10_000},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) {
				f.Retained, f.RetainedBytes = tt.limits.Retained, tt.limits.RetainedBytes
			})
			put := func(c *rawmqtt.Client, topic string, n int) bool {
				t.Helper()
				send(t, c, rawmqtt.Publish(true, 3, topic, 1, make([]byte, n)))
				expect(t, c, rawmqtt.PUBACK)
				_, ok := b.Topics.Retained.Get(topic)
				return ok
			}
			one, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "one", User: "u"})
			two, _ := b.loginFrom(t, 2, rawmqtt.Options{ID: "two", User: "u"}) // the same user elsewhere
			three, _ := b.loginFrom(t, 1, rawmqtt.Options{ID: "three", User: "v"})
			fill(t, "one", 4, func(i int) bool { return put(one, fmt.Sprint("one", i), tt.size) })
			if put(two, "two", tt.size) || put(three, "three", tt.size) {
				t.Error("the same user, or the same address, has more")
			}
			if put(one, "one0", 0); !put(two, "two", tt.size) || put(one, "one0", tt.size) {
				t.Error("not one in place of the one that was removed")
			}
			other, _ := b.loginFrom(t, 3, rawmqtt.Options{ID: "other", User: "w"})
			n := 0
			for i := range 4 {
				if put(other, fmt.Sprint("other", i), tt.size) {
					n++
				}
			}
			if n < 3 { // nodes take something too
				t.Errorf("others have %d", n)
			}
		})
	}
}

// TestBacklogsLeaveRoomForOthers: what waits for the sessions of one user leaves room for
// what waits for those of others.
func TestBacklogsLeaveRoomForOthers(t *testing.T) {
	const size = 10_000
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) {
		f.QueuedBytes = 2 * 4 * (size + packetOverhead + 100)
	})
	sleep := func(host byte, id, user, topic string) {
		t.Helper()
		c, _ := b.loginFrom(t, host, rawmqtt.Options{ID: id, User: user, Keep: true, Props: []byte{17, 0, 0, 1, 0}})
		if _, err := c.Sub(1, 1, topic); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		eventually(t, id+" away", func() bool { cl, ok := b.Clients.Get(id); return ok && cl.Closed() })
	}
	sleep(1, "a", "mallory", "t")
	sleep(2, "b", "mallory", "t")
	sleep(3, "c", "carol", "u")
	pub := b.login(t, false, rawmqtt.Options{ID: "pub"})
	waits := func(id string) int { cl, _ := b.Clients.Get(id); return cl.State.Inflight.Len() }
	for _, topic := range []string{"t", "u"} {
		for i := range uint16(4) {
			send(t, pub, rawmqtt.Publish(false, 2, topic, i+1, make([]byte, size)))
			expect(t, pub, rawmqtt.PUBACK)
		}
	}
	eventually(t, "four wait for each user", func() bool {
		return waits("a")+waits("b") == 4 && waits("c") == 4 && b.c.Count(QueuedFull) == 4
	})
}

// TestFiltersLeaveRoomForOthers: the filters of one user, or one address, take half of the
// room at most, whatever number of sessions they are in.
func TestFiltersLeaveRoomForOthers(t *testing.T) {
	const each = 20*nodeCost + filterCost + 100 // about, of a filter of 20 levels
	b := start(t, func(_ *Config, f *FixesConfig, _ *mqtt.Options) { f.FilterBytes = 8 * each })
	var all []*rawmqtt.Client
	sub := func(host byte, name, user string) bool {
		t.Helper()
		c, _ := b.loginFrom(t, host, rawmqtt.Options{ID: name, User: user})
		all = append(all, c)
		p, err := c.Sub(1, 0, name+strings.Repeat("/x", 19))
		if err != nil {
			t.Fatal(err)
		}
		return p.Code() == 0
	}
	fill(t, "one address, many names", 4, func(i int) bool { return sub(1, fmt.Sprint("a", i), fmt.Sprint("user", i)) })
	fill(t, "one name, many addresses", 4, func(i int) bool { return sub(byte(10+i), fmt.Sprint("b", i), "same") })
	if sub(30, "nobody's", "new") {
		t.Error("more than there is room for")
	}
	_ = all[0].Close()
	eventually(t, "room in its place", func() bool { return sub(1, "again", "") })
	for _, c := range all {
		_ = c.Close()
	}
	eventually(t, "nothing is counted", func() bool { return b.fixes.FilterBytes() == 0 })
	b.fixes.filters.mu.Lock()
	defer b.fixes.filters.mu.Unlock()
	if s := &b.fixes.filters.each; len(s.networks)+len(s.users) != 0 {
		t.Errorf("charged still: %v %v", s.networks, s.users)
	}
}
