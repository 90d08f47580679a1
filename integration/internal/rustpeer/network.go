package rustpeer

import (
	"context"
	"time"
)

// Listen opens a TCP listener on a free loopback port and returns its
// HOST:PORT.
func (n *Node) Listen(name string) string {
	n.t.Helper()
	var out struct{ Address string }
	n.must("listen", Args{"name": name}, &out)
	return out.Address
}

// Connect opens a TCP connection to HOST:PORT.
func (n *Node) Connect(name, address string) {
	n.t.Helper()
	n.must("connect", Args{"name": name, "address": address}, nil)
}

// Disconnect closes a TCP connection or listener.
func (n *Node) Disconnect(name string) {
	n.t.Helper()
	n.must("disconnect", Args{"name": name}, nil)
}

// RelayService makes the node a relay: forwarding_service and
// static_forwarding_service for those who come through the names in open.
// Relays have the prefix forward_to_.
func (n *Node) RelayService(open ...string) {
	n.t.Helper()
	n.must("relay_service", Args{"open": open}, nil)
}

// Relay is a registered relay.
type Relay struct {
	Address string // what others route through
	Worker  string // the node's own address that registered it
}

// Relay registers a relay over a connection ("@hub"), a dynamic one unless an
// alias is given. It waits 10 s for the answer.
func (n *Node) Relay(via, alias string) (Relay, error) {
	args := Args{"via": []string{via}}
	if alias != "" {
		args["alias"] = alias
	}
	var out Relay
	err := n.Call(context.Background(), "relay", args, &out)
	return out, err
}

// Worker starts a worker at a local address, reachable through the names in
// open. Kinds: sink (see [Node.Next]), echo (raw bytes back), echoer and
// uppercase (BARE strings), digest (answers the BARE string "LENGTH SHA256").
func (n *Node) Worker(kind, address string, open ...string) {
	n.t.Helper()
	n.must("worker", Args{"kind": kind, "address": address, "open": open}, nil)
}

// Stop stops a worker, listener or relay by its local address.
func (n *Node) Stop(address string) {
	n.t.Helper()
	n.must("stop", Args{"address": address}, nil)
}

// Outlet opens a portal outlet at a local address towards HOST:PORT.
func (n *Node) Outlet(address, to string, open ...string) {
	n.t.Helper()
	n.must("outlet", Args{"address": address, "to": to, "open": open}, nil)
}

// Inlet opens a portal inlet on a free loopback port towards the outlet that
// the route ends at, and returns its HOST:PORT.
func (n *Node) Inlet(route ...string) string {
	n.t.Helper()
	var out struct{ Address string }
	n.must("inlet", Args{"route": route}, &out)
	return out.Address
}

// Message is what a sink received, or a request's answer.
type Message struct {
	At     string   // address of the sink
	N      int      // how many the sink had received before
	Len    int      // bytes of payload
	SHA256 string   // of the payload, lower-case hex
	Hex    string   // the payload when it has at most 256 bytes
	Text   string   // the payload when it is short and a BARE string
	From   string   // verified identifier of the sender; empty when it came through no channel
	Return []string // return route, ready to be a route of this node
}

// Next returns the oldest message that a sink received and that was not
// returned before, waiting for it until the context ends.
func (n *Node) Next(ctx context.Context, sink string) (Message, error) {
	for {
		n.mu.Lock()
		arrive := n.arrive
		if queue := n.inbox[sink]; len(queue) > 0 {
			n.inbox[sink] = queue[1:]
			n.mu.Unlock()
			return queue[0], nil
		}
		n.mu.Unlock()
		select {
		case <-arrive:
		case <-n.process.Exited():
			return Message{}, ErrGone
		case <-ctx.Done():
			return Message{}, ctx.Err()
		}
	}
}

// MustNext is [Node.Next] with 30 s of patience; it fails the test after that.
func (n *Node) MustNext(sink string) Message {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	msg, err := n.Next(ctx, sink)
	if err != nil {
		n.t.Fatalf("waiting for a message at %s: %v", sink, err)
	}
	return msg
}

// Pending returns how many messages a sink received that were not returned by
// [Node.Next] yet.
func (n *Node) Pending(sink string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.inbox[sink])
}
