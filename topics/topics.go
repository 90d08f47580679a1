// Package topics is the topic scheme of sealmq: it builds the topics of a root,
// tells what a topic name means, and decides whether a subscription filter can
// touch the root. It is pure: strings in, strings out.
//
// Below a root (by default "sealmq") there are five kinds of topic:
//
//	<root>/<device>/out              frames from a device; that device alone publishes
//	<root>/<device>/in               frames to a device: its inbox; the hub alone publishes
//	<root>/<device>/status           retained JSON: online or offline
//	<root>/hub/forwarders/<address>  retained JSON: a forwarder record
//	<root>/hub/trace                 one JSON line a frame, when switched on
//
// Everything else under the root is reserved. A device is named by its MQTT
// client id, which must satisfy [ValidDevice].
//
// Start with [ParseRoot]. To decide what a publisher or subscriber may do use
// [Root.Parse] for topic names and [Root.Overlaps] for filters: both compare
// whole levels, never string prefixes, and neither allocates, so they can run
// for each packet. All functions are safe for concurrent use.
package topics

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// DefaultRoot is the root that a hub uses unless it is configured otherwise.
const DefaultRoot Root = "sealmq"

// Limits of the scheme.
const (
	// MaxDevice is the longest device name in bytes.
	MaxDevice = 128
	// MaxRoot is the longest root in bytes.
	MaxRoot = 128
	// MaxRootLevels is how many levels a root may have. With the three levels
	// below it a topic stays inside the eight that hosted brokers carry.
	MaxRootLevels = 4
	// HubName is the reserved name under which the hub keeps its own topics. It
	// is never a device.
	HubName = "hub"
)

// ErrRoot is wrapped by every error of ParseRoot.
var ErrRoot = errors.New("topics: not a usable topic root")

// Root is the topic under which a hub lives. Make one with ParseRoot, or use
// DefaultRoot; methods of a Root made in any other way may build topics that no
// broker accepts.
type Root string

// ParseRoot checks that s can be a root: one to four levels, none of them empty,
// no wildcard, not beginning with "$", valid UTF-8 without control characters,
// and at most 128 bytes.
func ParseRoot(s string) (Root, error) {
	fail := func(why string) (Root, error) {
		return "", fmt.Errorf("%w: %q %s", ErrRoot, s, why)
	}
	switch {
	case s == "":
		return fail("is empty")
	case len(s) > MaxRoot:
		return fail("is longer than 128 bytes")
	case s[0] == '/' || s[len(s)-1] == '/':
		return fail("begins or ends with a slash")
	case s[0] == '$':
		return fail("begins with $, which brokers keep for themselves")
	case strings.Contains(s, "//"):
		return fail("has an empty level")
	case strings.ContainsAny(s, "+#"):
		return fail("holds a wildcard")
	case strings.Count(s, "/") >= MaxRootLevels:
		return fail("has more than 4 levels")
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return fail("holds control characters or is not UTF-8")
	}
	return Root(s), nil
}

// ValidDevice reports whether name can be the name of a device:
// [A-Za-z0-9_-]{1,128}, and not "hub".
func ValidDevice(name string) bool {
	if len(name) == 0 || len(name) > MaxDevice || name == HubName {
		return false
	}
	for i := range len(name) {
		if c := name[i]; !isWord(c) && c != '-' {
			return false
		}
	}
	return true
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_'
}

// Last levels of the scheme.
const (
	levelOut        = "out"
	levelIn         = "in"
	levelStatus     = "status"
	levelTrace      = "trace"
	levelForwarders = "forwarders"
)

// Out returns the topic on which the device publishes frames.
func (r Root) Out(device string) string { return string(r) + "/" + device + "/" + levelOut }

// In returns the inbox of the device.
func (r Root) In(device string) string { return string(r) + "/" + device + "/" + levelIn }

// Status returns the topic of the device's retained status record.
func (r Root) Status(device string) string { return string(r) + "/" + device + "/" + levelStatus }

// Forwarder returns the topic of the retained record of the forwarder at
// address. Bytes of the address outside [A-Za-z0-9_.-] are written as %XX, so
// that any address makes one valid level; UnescapeLevel reverses it.
func (r Root) Forwarder(address string) string {
	return string(r) + "/" + HubName + "/" + levelForwarders + "/" + EscapeLevel(address)
}

// Trace returns the topic of the hub's trace lines.
func (r Root) Trace() string { return string(r) + "/" + HubName + "/" + levelTrace }

// All returns the filter that matches the root and everything below it.
func (r Root) All() string { return string(r) + "/#" }

// OutFilter returns the filter that matches the out topic of every device; a
// forwarder on a foreign broker subscribes to it.
func (r Root) OutFilter() string { return string(r) + "/+/" + levelOut }

const upperHex = "0123456789ABCDEF"

// EscapeLevel writes s as one non-empty topic level: bytes outside
// [A-Za-z0-9_.-] become %XX, and the empty string becomes "%". It is injective.
func EscapeLevel(s string) string {
	if s == "" {
		return "%"
	}
	n := 0
	for i := range len(s) {
		if !plainLevelByte(s[i]) {
			n++
		}
	}
	if n == 0 {
		return s
	}
	b := make([]byte, 0, len(s)+2*n)
	for i := range len(s) {
		if c := s[i]; plainLevelByte(c) {
			b = append(b, c)
		} else {
			b = append(b, '%', upperHex[c>>4], upperHex[c&15])
		}
	}
	return string(b)
}

func plainLevelByte(c byte) bool { return isWord(c) || c == '.' || c == '-' }

// UnescapeLevel reverses EscapeLevel. It accepts only what EscapeLevel writes.
func UnescapeLevel(level string) (s string, ok bool) {
	if level == "%" {
		return "", true
	}
	if level == "" {
		return "", false
	}
	b := make([]byte, 0, len(level))
	for i := 0; i < len(level); i++ {
		c := level[i]
		switch {
		case plainLevelByte(c):
			b = append(b, c)
		case c == '%' && i+2 < len(level):
			hi := strings.IndexByte(upperHex, level[i+1])
			lo := strings.IndexByte(upperHex, level[i+2])
			if hi < 0 || lo < 0 || plainLevelByte(byte(hi<<4|lo)) {
				return "", false
			}
			b = append(b, byte(hi<<4|lo))
			i += 2
		default:
			return "", false
		}
	}
	return string(b), true
}

// Kind says what a topic is to a root.
type Kind uint8

// Kinds of topic. The zero value is a topic that has nothing to do with the root.
const (
	Outside    Kind = iota // not under the root
	Out                    // a device publishes frames
	In                     // a device's inbox
	Status                 // a device's status record
	Forwarder              // a forwarder record
	Trace                  // the hub's trace lines
	OtherUnder             // the root itself, or anything else under it: reserved
)

var kindNames = [...]string{"outside", "out", "in", "status", "forwarder", "trace", "other"}

// String returns a short lower-case name for logs and counters.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return "unknown"
}

// Parse tells what the topic name is. name is the device for Out, In and Status,
// the level as written (see UnescapeLevel) for Forwarder, and empty otherwise; it
// aliases topic. Only the exact topics of the scheme with a valid device name are
// recognised, everything else under the root is OtherUnder. Parse does not
// allocate.
func (r Root) Parse(topic string) (kind Kind, name string) {
	rest, under := r.below(topic)
	if !under {
		return Outside, ""
	}
	first, rest, ok := strings.Cut(rest, "/")
	if !ok {
		return OtherUnder, ""
	}
	if first == HubName {
		switch second, third, deeper := strings.Cut(rest, "/"); {
		case second == levelTrace && !deeper:
			return Trace, ""
		case second == levelForwarders && deeper && third != "" && !strings.ContainsAny(third, "/+#"):
			return Forwarder, third
		}
		return OtherUnder, ""
	}
	switch rest {
	case levelOut:
		kind = Out
	case levelIn:
		kind = In
	case levelStatus:
		kind = Status
	default:
		return OtherUnder, ""
	}
	if !ValidDevice(first) {
		return OtherUnder, ""
	}
	return kind, first
}

// below reports whether topic is the root or below it, and what follows the
// root's slash.
func (r Root) below(topic string) (rest string, under bool) {
	rest, ok := strings.CutPrefix(topic, string(r))
	switch {
	case !ok:
		return "", false
	case rest == "":
		return "", true
	case rest[0] == '/':
		return rest[1:], true
	default:
		return "", false
	}
}
