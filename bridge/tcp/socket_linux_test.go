package tcp

import (
	"net"
	"syscall"
	"testing"
)

// TestSocketOptions asks the system what an accepted connection has: no delay, and
// keepalive that finds a dead peer in two minutes.
func TestSocketOptions(t *testing.T) {
	h := newHub(t, options{})
	h.connect().alive()
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for c := range h.s.conns {
		raw, err := c.nc.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			for _, o := range []struct {
				name          string
				level, option int
				want          int
			}{
				{"TCP_NODELAY", syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1},
				{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
				{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 60},
				{"TCP_KEEPINTVL", syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 15},
				{"TCP_KEEPCNT", syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 4},
			} {
				if got, err := syscall.GetsockoptInt(int(fd), o.level, o.option); err != nil || got != o.want {
					t.Errorf("%s is %d (%v), want %d", o.name, got, err, o.want)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	equal(t, "connections", len(h.s.conns), 1)
}
