// Package mosquitto runs the command-line clients and the broker of Eclipse
// Mosquitto as peers of the integration tests: programs that are not ours and
// that operators really use.
package mosquitto

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// Options say how a client connects. The zero value is an anonymous MQTT 3.1.1
// client with a random id.
type Options struct {
	ClientID string
	Username string
	Password string
	QoS      int
	Version  string   // mqttv311 when empty, or mqttv5, mqttv31
	Extra    []string // further arguments of the program
}

func (o Options) args(t testing.TB, broker string) []string {
	t.Helper()
	host, port, err := net.SplitHostPort(broker)
	if err != nil {
		t.Fatalf("mosquitto: broker %q is not HOST:PORT", broker)
	}
	args := []string{"-h", host, "-p", port, "-q", fmt.Sprint(o.QoS)}
	if o.ClientID != "" {
		args = append(args, "-i", o.ClientID)
	}
	if o.Username != "" {
		args = append(args, "-u", o.Username)
	}
	if o.Password != "" {
		args = append(args, "-P", o.Password)
	}
	if o.Version != "" {
		args = append(args, "-V", o.Version)
	}
	return append(args, o.Extra...)
}

func find(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err == nil {
		return path
	}
	if path := filepath.Join("/usr/sbin", program); program == "mosquitto" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	peer.Missing(t, program, "install Debian's mosquitto, mosquitto-clients and coreutils")
	return ""
}

// Packet is one message as mosquitto_sub saw it.
type Packet struct {
	Topic    string
	Payload  []byte
	QoS      string
	Retained bool
}

// Subscriber is a running mosquitto_sub.
type Subscriber struct {
	t       testing.TB
	process *peer.Process

	mu      sync.Mutex
	packets []Packet
	lines   [][]byte
	read    int           // packets that Next returned
	more    chan struct{} // closed and replaced when packets grows
	granted chan struct{} // closed by the first SUBACK
}

// Subscribe runs mosquitto_sub on the filters until the test ends, and returns
// once the broker has granted the subscriptions.
func Subscribe(t testing.TB, broker string, opts Options, filters ...string) *Subscriber {
	t.Helper()
	s := &Subscriber{t: t, more: make(chan struct{}), granted: make(chan struct{})}
	args := append(opts.args(t, broker), "-d", "-F", format)
	for _, f := range filters {
		args = append(args, "-t", f)
	}
	// It ends by itself should the test be killed.
	args = append(args, "-W", "1800")
	// On a pipe it would keep its log, the SUBACK line too, until a message comes.
	args = append([]string{"-oL", find(t, "mosquitto_sub")}, args...)
	s.process = peer.Start(t, peer.Options{OnLine: s.line}, find(t, "stdbuf"), args...)
	select {
	case <-s.granted:
	case <-s.process.Exited():
		t.Fatalf("mosquitto_sub %s ended before it was subscribed: %v\n%s\n%s", strings.Join(filters, " "),
			s.process.Wait(context.Background()), s.Output(), s.process.Stderr())
	case <-time.After(30 * time.Second):
		t.Fatalf("mosquitto_sub %s: no SUBACK\n%s", strings.Join(filters, " "), s.Output())
	}
	return s
}

// format makes each message one line whatever its payload: QoS, retained flag,
// payload in hex, and the topic last because it may have spaces.
const format = "packet %q %r %x %t"

func (s *Subscriber) line(line []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, line)
	fields := bytes.SplitN(line, []byte(" "), 5)
	switch {
	case len(fields) == 5 && string(fields[0]) == "packet":
		payload, err := hex.DecodeString(string(fields[3]))
		if err != nil {
			return
		}
		s.packets = append(s.packets, Packet{
			Topic: string(fields[4]), Payload: payload, QoS: string(fields[1]), Retained: string(fields[2]) == "1",
		})
		close(s.more)
		s.more = make(chan struct{})
	case bytes.HasPrefix(line, []byte("Subscribed (mid: ")):
		select {
		case <-s.granted:
		default:
			close(s.granted)
		}
	}
}

// Next returns the oldest message that it did not return before.
func (s *Subscriber) Next(ctx context.Context) (Packet, error) {
	for {
		s.mu.Lock()
		more := s.more
		if s.read < len(s.packets) {
			p := s.packets[s.read]
			s.read++
			s.mu.Unlock()
			return p, nil
		}
		s.mu.Unlock()
		select {
		case <-more:
		case <-s.process.Exited():
			return Packet{}, fmt.Errorf("mosquitto: mosquitto_sub has ended: %s", s.process.Stderr())
		case <-ctx.Done():
			return Packet{}, ctx.Err()
		}
	}
}

// Wait returns the first message, of those seen and those to come, that want
// accepts. It fails the test after 30 s.
func (s *Subscriber) Wait(what string, want func(Packet) bool) Packet {
	s.t.Helper()
	timeout := time.After(30 * time.Second)
	for i := 0; ; {
		s.mu.Lock()
		more, packets := s.more, s.packets
		s.mu.Unlock()
		for ; i < len(packets); i++ {
			if want(packets[i]) {
				return packets[i]
			}
		}
		select {
		case <-more:
		case <-timeout:
			s.t.Fatalf("mosquitto_sub did not see %s; it saw:\n%s", what, s.Output())
		}
	}
}

// Packets returns every message seen so far.
func (s *Subscriber) Packets() []Packet {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Packet(nil), s.packets...)
}

// Output returns all that mosquitto_sub printed so far, its log included.
func (s *Subscriber) Output() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Join(s.lines, []byte("\n"))
}

// Process is the mosquitto_sub process, for its log and its end.
func (s *Subscriber) Process() *peer.Process { return s.process }

// Publish runs mosquitto_pub once with a payload on its stdin. The error, if
// any, holds what it printed.
func Publish(t testing.TB, broker string, opts Options, topic string, payload []byte) error {
	t.Helper()
	args := append(opts.args(t, broker), "-t", topic, "-s")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, find(t, "mosquitto_pub"), args...)
	cmd.Stdin = bytes.NewReader(payload)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mosquitto_pub: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Broker runs a mosquitto broker on a free loopback port, open to everybody,
// until the test ends, and returns its HOST:PORT. It is what tests of clients
// compare our hub with.
func Broker(t testing.TB) string {
	t.Helper()
	program := find(t, "mosquitto")
	// The port is free when it is picked; nobody else on the machine is likely to take it at once.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(addr)
	conf := filepath.Join(t.TempDir(), "mosquitto.conf")
	text := "listener " + port + " 127.0.0.1\nallow_anonymous true\npersistence false\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := peer.Start(t, peer.Options{}, program, "-c", conf)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return addr
		}
		select {
		case <-tick.C:
		case <-p.Exited():
			t.Fatalf("mosquitto ended at once:\n%s", p.Stderr())
		case <-deadline:
			t.Fatalf("mosquitto does not listen:\n%s", p.Stderr())
		}
	}
}
