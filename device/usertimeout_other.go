//go:build !linux

package device

import (
	"net"
	"time"
)

// setUserTimeout does nothing: the system's own patience with unacknowledged data
// holds.
func setUserTimeout(*net.TCPConn, time.Duration) error { return nil }
