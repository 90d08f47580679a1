package chaos

import (
	"bufio"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// proxy stands between a device and its hub. It passes MQTT packets on, and can
// cut and stall connections, and repeat and reorder publishes.
type proxy struct {
	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	held   map[net.Conn]struct{} // to the hub, kept open though the device's side ends
	closed bool
	flow   chan struct{} // closed while bytes flow
	mangle bool
	rnd    *rand.Rand
	count  struct{ repeated, reordered, takenOver int }
}

func newProxy(t *testing.T, target string, seed uint64) *proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{
		ln: ln, target: target, conns: make(map[net.Conn]struct{}), held: make(map[net.Conn]struct{}), flow: make(chan struct{}),
		rnd: rand.New(rand.NewPCG(seed, 7)),
	}
	close(p.flow)
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) addr() string { return p.ln.Addr().String() }

func (p *proxy) accept() {
	for {
		down, err := p.ln.Accept()
		if err != nil {
			return
		}
		up, err := net.DialTimeout("tcp", p.target, time.Second)
		if err != nil {
			_ = down.Close()
			continue
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			_ = down.Close()
			_ = up.Close()
			return
		}
		p.conns[down], p.conns[up] = struct{}{}, struct{}{}
		p.mu.Unlock()
		p.wg.Go(func() { defer p.end(up, down); p.pass(up, down) })
		p.wg.Go(func() { defer p.end(up, down); p.pass(down, up); p.drain(up) })
	}
}

// cut closes all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
}

// stall stops all bytes until the returned function is called.
func (p *proxy) stall() (resume func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	flow := make(chan struct{})
	p.flow = flow
	return sync.OnceFunc(func() { close(flow) })
}

// hold keeps the present connections open towards the hub, whatever becomes of the
// device, until the returned function is called: the hub believes that the device is
// there.
func (p *proxy) hold() (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if c.RemoteAddr().String() == p.target {
			p.held[c] = struct{}{}
		}
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for c := range p.held {
			_ = c.Close()
			delete(p.held, c)
		}
	}
}

func (p *proxy) isHeld(up net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.held[up]
	return ok
}

// drain reads on from a held connection whose device is gone. That the hub ends it
// while it is held means that somebody took the session over.
func (p *proxy) drain(up net.Conn) {
	if !p.isHeld(up) {
		return
	}
	_, _ = io.Copy(io.Discard, up)
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.held[up]; ok {
		p.count.takenOver++
		delete(p.held, up)
	}
}

// end closes a pair of connections.
func (p *proxy) end(up, down net.Conn) {
	_ = down.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, down)
	if _, ok := p.held[up]; !ok {
		_ = up.Close()
		delete(p.conns, up)
	}
}

func (p *proxy) setMangle(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mangle = on
}

func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	select {
	case <-p.flow:
	default:
		p.flow = make(chan struct{})
		close(p.flow)
	}
	p.mu.Unlock()
	_ = p.ln.Close()
	p.cut()
	p.wg.Wait()
}

// pass hands on one direction, packet by packet.
func (p *proxy) pass(to, from net.Conn) {
	in := bufio.NewReaderSize(from, 64<<10)
	out := bufio.NewWriterSize(to, 64<<10)
	var late []byte // a publish that lets the next one pass
	for {
		if late != nil && !follows(from, in) {
			_, _ = out.Write(late)
			late = nil
			if out.Flush() != nil {
				return
			}
		}
		pk, err := packet(in)
		if err != nil {
			return
		}
		p.mu.Lock()
		flow := p.flow
		fate := 0
		if p.mangle && pk[0]>>4 == 3 {
			fate = p.rnd.IntN(20)
		}
		switch {
		case fate == 1:
			p.count.repeated++
		case fate == 2 && late == nil:
			p.count.reordered++
		}
		p.mu.Unlock()
		select {
		case <-flow:
		case <-time.After(20 * time.Second):
			return
		}
		if fate == 2 && late == nil {
			late = pk
			continue
		}
		_, _ = out.Write(pk) // its error comes with Flush
		if fate == 1 && pk[0]&6 != 0 {
			pk[0] |= 8 // DUP
			_, _ = out.Write(pk)
		}
		_, _ = out.Write(late)
		late = nil
		if in.Buffered() == 0 {
			if out.Flush() != nil {
				return
			}
		}
	}
}

// follows reports whether there is a next packet soon. The publish that waits for it
// may be the one that the receiver's window waits for.
func follows(from net.Conn, in *bufio.Reader) bool {
	_ = from.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	defer func() { _ = from.SetReadDeadline(time.Time{}) }()
	_, err := in.Peek(1)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// packet reads one MQTT packet whole.
func packet(in *bufio.Reader) ([]byte, error) {
	head, err := in.ReadByte()
	if err != nil {
		return nil, err
	}
	pk := []byte{head}
	n, shift := 0, 0
	for {
		b, err := in.ReadByte()
		if err != nil {
			return nil, err
		}
		pk = append(pk, b)
		n |= int(b&0x7f) << shift
		if shift += 7; b < 0x80 || shift > 21 {
			break
		}
	}
	at := len(pk)
	pk = append(pk, make([]byte, n)...)
	_, err = io.ReadFull(in, pk[at:])
	return pk, err
}
