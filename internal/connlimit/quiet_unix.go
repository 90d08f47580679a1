//go:build unix

package connlimit

import (
	"net"
	"syscall"
)

// Quiet returns a function that reports whether nothing has come over a connection
// that is not read yet. It does not block, and may be called beside a Read; nil where
// nobody can tell.
func Quiet(nc net.Conn) func() bool {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return func() bool {
		n := 0
		var b [1]byte
		if err := raw.Control(func(fd uintptr) { n, _, _ = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK) }); err != nil {
			return true
		}
		return n <= 0
	}
}
