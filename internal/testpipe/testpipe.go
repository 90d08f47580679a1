// Package testpipe is a network in memory for tests, whose listener takes connections
// as net.Listen's would. It needs no file descriptors and works in synctest.
package testpipe

import (
	"net"
	"os"
	"sync"
	"syscall"
)

// Listener is a listener of pipes. Make it with Listen. Its peers share one address,
// which is none of IP.
type Listener struct {
	// Fails is how often Accept fails first, for want of file descriptors. It is to be
	// set before the first Accept.
	Fails int

	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

var _ net.Listener = (*Listener)(nil)

// Listen returns a listener.
func Listen() *Listener {
	return &Listener{conns: make(chan net.Conn), done: make(chan struct{})}
}

// Dial connects once somebody accepts; net.ErrClosed means that the listener is closed.
func (l *Listener) Dial() (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	if l.Fails > 0 {
		l.Fails--
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. It may be called more than once.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (*Listener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }
