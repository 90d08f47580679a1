package rustpeer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"time"
)

// Run is a numbered series of messages whose contents both languages compute:
// message i has Sizes[i mod len(Sizes)] bytes, [Content](Seed, i, size).
type Run struct {
	Seed  uint64
	Count int
	Sizes []int
}

// At returns message i of the run.
func (r Run) At(i int) []byte {
	return Content(r.Seed, uint64(i), r.Sizes[i%len(r.Sizes)])
}

func (r Run) args(route []string) Args {
	return Args{"route": route, "seed": r.Seed, "count": r.Count, "sizes": r.Sizes}
}

// Content returns size bytes that depend on seed and index alone.
func Content(seed, index uint64, size int) []byte {
	state := seed ^ index*0xd6e8feb86659fd93
	out := make([]byte, 0, size+7)
	for len(out) < size {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		out = binary.LittleEndian.AppendUint64(out, z^z>>31)
	}
	return out[:size]
}

// Digest is the form that [Message.SHA256] has.
func Digest(payload []byte) string {
	sum := sha256.Sum256(payload)
	return hex.EncodeToString(sum[:])
}

// Send sends one raw payload along a route. ret is the message's return route
// at its origin and may be nil.
func (n *Node) Send(route, ret []string, payload []byte) error {
	args := Args{"route": route, "hex": hex.EncodeToString(payload)}
	if ret != nil {
		args["return"] = ret
	}
	return n.Call(context.Background(), "send", args, nil)
}

// SendString sends a BARE string, as Rust programs send a String.
func (n *Node) SendString(route, ret []string, text string) error {
	args := Args{"route": route, "text": text}
	if ret != nil {
		args["return"] = ret
	}
	return n.Call(context.Background(), "send", args, nil)
}

// Flood sends the messages of a run in order, as fast as the node takes them.
func (n *Node) Flood(route, ret []string, run Run) error {
	args := run.args(route)
	if ret != nil {
		args["return"] = ret
	}
	return n.Call(context.Background(), "flood", args, nil)
}

// Request sends a raw payload and waits for one answer.
func (n *Node) Request(route []string, payload []byte, timeout time.Duration) (Message, error) {
	var out Message
	err := n.Call(context.Background(), "request", Args{
		"route": route, "hex": hex.EncodeToString(payload), "timeout_ms": timeout.Milliseconds(),
	}, &out)
	return out, err
}

// RequestString sends a BARE string and waits for one answer, see
// [Message.Text].
func (n *Node) RequestString(route []string, text string, timeout time.Duration) (Message, error) {
	var out Message
	err := n.Call(context.Background(), "request", Args{
		"route": route, "text": text, "timeout_ms": timeout.Milliseconds(),
	}, &out)
	return out, err
}

// Requests sends the messages of a run to a worker that echoes raw bytes, one
// after the other, and compares every answer. The timeout is for each.
func (n *Node) Requests(route []string, run Run, timeout time.Duration) error {
	args := run.args(route)
	args["timeout_ms"] = timeout.Milliseconds()
	return n.Call(context.Background(), "requests", args, nil)
}
