package hubproto

import (
	"crypto/rand"
	"encoding/hex"
	"strings"
)

// oneShotLen is the number of hex digits of a random suffix.
const oneShotLen = 16

// OneShotName returns base, '-' and 16 random lower-case hex digits: the client
// id of a command that runs once with an identity that another program may be
// using. The hub forgets such a name soon after its connection ends.
func OneShotName(base string) string {
	var b [oneShotLen / 2]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return base + "-" + hex.EncodeToString(b[:])
}

// IsOneShot reports whether a client id has the form that OneShotName makes. A
// suffix that a person chose ("I…-gateway") does not have it.
func IsOneShot(clientID string) bool {
	i := strings.LastIndexByte(clientID, '-')
	if i <= 0 || len(clientID)-i-1 != oneShotLen {
		return false
	}
	for _, c := range []byte(clientID[i+1:]) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
