package device

import (
	"strings"

	"github.com/sealmq/sealmq/route"
)

// fromHub reports whether the hub itself sent the frame, and from which of its
// services or forwarders: the return route, as received, is exactly one local
// address that has not the form of a hub address. The hub stamps the frames of
// every client with one of those, so no client can send such a frame.
func fromHub(v *route.View) (from string, ok bool) {
	if v.ReturnLen() != 1 {
		return "", false
	}
	hop, ok := v.LastReturn()
	if !ok || hop.Transport != route.LocalTransport || len(hop.Value) == 0 {
		return "", false
	}
	from = string(hop.Value)
	return from, !isHubAddress(from)
}

// isHubAddress reports whether s has the form of a device's or a connection's
// address at the hub: dev_ or tcp_ and 32 hex digits.
func isHubAddress(s string) bool {
	rest, ok := strings.CutPrefix(s, "dev_")
	return ok && isHex32(rest) || isConnection(s)
}

// isConnection reports whether s has the form of a TCP connection's address at the hub.
func isConnection(s string) bool {
	rest, ok := strings.CutPrefix(s, "tcp_")
	return ok && isHex32(rest)
}

// isHex32 reports whether s is 32 lower-case hex digits.
func isHex32(s string) bool {
	if len(s) != 32 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
