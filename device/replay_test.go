package device_test

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/internal/vectors"
	"github.com/sealmq/sealmq/route"
)

// conversation is a captured connection of a Go program to a stock node, frame by
// frame in the order seen.
type conversation struct {
	Name   string
	Frames []struct {
		Dir  string
		Wire vectors.Hex
		Note string
	}
}

// bodies returns the frames' bodies, and whether each is ours.
func (c conversation) bodies() (bodies [][]byte, ours []bool) {
	for _, f := range c.Frames {
		if f.Note != "preamble" {
			bodies = append(bodies, f.Wire[route.FrameHeaderLen:])
			ours = append(ours, f.Dir == "go->rust")
		}
	}
	return bodies, ours
}

func parse(t *testing.T, body []byte) route.Frame {
	t.Helper()
	f, err := route.ParseFrame(bytes.Clone(body), route.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// replay plays the stock node of a conversation to whoever connects: what comes has
// to be what the Go program said, byte for byte, except for the addresses that it made
// up for answers, and is answered as the stock node did, at the address that came.
func replay(t *testing.T, c conversation) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = conn.Write([]byte{route.Preamble})
		r := route.NewReader(conn, route.Limits{})
		var theirs, ours []byte // an address of the captured program, and this one's
		bodies, sent := c.bodies()
		for i, want := range bodies {
			if !sent[i] {
				answer := bytes.ReplaceAll(want, theirs, ours)
				_, _ = conn.Write(append(route.AppendFrameHeader(nil, len(answer)), answer...))
				continue
			}
			var got []byte
			for first := "hello"; first == "hello"; { // that a stock node does not know
				body, err := r.Next()
				if err != nil {
					t.Errorf("frame %d: %v", i, err)
					return
				}
				got = bytes.Clone(body)
				hop, _ := parse(t, got).Onward.First()
				first = hop.Value
			}
			if from, ok := parse(t, want).Return.First(); ok && len(from.Value) == 32 {
				own, _ := parse(t, got).Return.First()
				theirs, ours = []byte(from.Value), []byte(own.Value)
			}
			if want = bytes.ReplaceAll(want, theirs, ours); !bytes.Equal(got, want) {
				t.Errorf("frame %d is\n%x, want\n%x", i, got, want)
			}
		}
		// Our side ends it, in its own time.
		_, _ = r.Next()
	}()
	return ln.Addr().String()
}

// TestReplayAtStockNode has a device say what an independent Go program once said to
// stock nodes, and take what they answered.
func TestReplayAtStockNode(t *testing.T) {
	t.Run("go_dials_150", func(t *testing.T) {
		c := captured(t, "live_tcp_echo.json", "go_dials_150")
		addr := replay(t, c)
		n := over(t, addr, device.Config{HelloTimeout: 10 * time.Millisecond})
		asked := 0
		bodies, ours := c.bodies()
		for i, body := range bodies {
			if !ours[i] {
				continue
			}
			asked++
			payload := parse(t, body).Payload
			m, err := n.Request(soon(t), route.To("echoer"), payload)
			if err != nil || !bytes.Equal(m.Payload, payload) || !m.ReturnRoute.Equal(route.To("echoer")) {
				t.Fatalf("question %d: %v, %v", asked, m, err)
			}
		}
		if asked < 5 {
			t.Errorf("%d questions were replayed", asked)
		}
	})
	for _, name := range []string{"dynamic", "alice"} {
		t.Run("go_registers_at_rust_hub_"+name, func(t *testing.T) {
			c := captured(t, "live_relay_registration.json", "go_registers_at_rust_hub_"+name)
			addr := replay(t, c)
			n := over(t, addr, device.Config{HelloTimeout: 10 * time.Millisecond})
			answered := make(chan string, 1)
			if err := n.Handle("echoer", device.Access{Forwarders: true}, func(ctx context.Context, m *device.Message) {
				text, err := m.Text()
				if err == nil {
					err = n.Reply(ctx, m, m.Payload)
				}
				if err != nil {
					t.Error(err)
				}
				answered <- text
			}); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Listen("listener", channel.TrustEveryone); err != nil {
				t.Fatal(err)
			}
			var opts []device.ForwarderOption
			if name != "dynamic" {
				opts = append(opts, device.Alias(name))
			}
			f, err := n.CreateForwarder(soon(t), "listener", opts...)
			if err != nil {
				t.Fatal(err)
			}
			bodies, _ := c.bodies()
			if from, _ := parse(t, bodies[1]).Return.First(); f.Address() != from.Value || !strings.HasPrefix(from.Value, "forward_to_") {
				t.Errorf("the relay's address is %q, want %q", f.Address(), from.Value)
			}
			select {
			case text := <-answered:
				if text != "to a Go node behind a Rust hub" {
					t.Errorf("through the relay came %q", text)
				}
			case <-soon(t).Done():
				t.Fatal("nothing came through the relay")
			}
			if err := n.Flush(soon(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

func captured(t *testing.T, file, name string) conversation {
	t.Helper()
	for _, c := range vectors.Load[struct{ Sessions []conversation }](t, file).Sessions {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("%s has no session %s", file, name)
	return conversation{}
}
