//go:build unix

package broker

import (
	"math"
	"syscall"
)

// openFiles returns how many files the process may have open, -1 for any number. The
// Go runtime has raised the soft limit to the hard one by now.
func openFiles() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur > math.MaxInt32 {
		return -1
	}
	return int(r.Cur)
}
