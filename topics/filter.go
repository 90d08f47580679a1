package topics

import "strings"

// sharePrefix begins a shared subscription: $share/<group>/<filter>. Brokers
// differ in whether its case matters, so StripShare ignores it.
const sharePrefix = "$share/"

// StripShare returns the filter inside a shared subscription, and whether filter
// was one. "$share/g" without a filter yields the empty filter.
func StripShare(filter string) (inner string, shared bool) {
	if len(filter) < len(sharePrefix) || !strings.EqualFold(filter[:len(sharePrefix)], sharePrefix) {
		return filter, false
	}
	_, inner, _ = strings.Cut(filter[len(sharePrefix):], "/")
	return inner, true
}

// ValidFilter reports whether filter obeys MQTT 4.7.1: not empty, no NUL, "#"
// only as the whole last level, "+" only as a whole level. It does not look into
// shared subscriptions; apply StripShare first.
func ValidFilter(filter string) bool {
	if filter == "" || strings.IndexByte(filter, 0) >= 0 {
		return false
	}
	for more := true; more; {
		var level string
		level, filter, more = strings.Cut(filter, "/")
		switch {
		case level == "#":
			if more {
				return false
			}
		case level == "+":
		case strings.ContainsAny(level, "+#"):
			return false
		}
	}
	return true
}

// Overlaps reports whether the subscription filter can match any topic under the
// root (the root itself included), and whether it can match any outside of it. A
// shared subscription counts as the filter inside it. A filter that is not valid
// counts as touching both: what a broker would make of it is unknown. Overlaps
// does not allocate.
func (r Root) Overlaps(filter string) (touchesRoot, touchesOutside bool) {
	filter, _ = StripShare(filter)
	if !ValidFilter(filter) {
		return true, true
	}
	// A topic is under the root when it begins with the root's levels. So the
	// filter stays inside when it spells them out, and touches the root when each
	// of its levels up to there agrees or is a wildcard.
	root, spelled := string(r), true
	for more := true; more; {
		var want, have string
		var filterMore bool
		want, root, more = strings.Cut(root, "/")
		have, filter, filterMore = strings.Cut(filter, "/")
		switch have {
		case "#":
			return true, true
		case "+":
			spelled = false
		case want:
		default:
			return false, true
		}
		if more && !filterMore {
			return false, true // shorter than the root
		}
	}
	return true, !spelled
}

// Match reports whether the topic name matches the filter by the rules of MQTT
// 4.7: "#" also matches the parent level, and a wildcard in the first level does
// not match a topic that begins with "$". The caller has checked both (see
// ValidFilter); an invalid filter matches nothing that a valid one would not.
// Match does not allocate.
func Match(filter, topic string) bool {
	if topic == "" || filter == "" {
		return false
	}
	if topic[0] == '$' && (filter[0] == '+' || filter[0] == '#') {
		return false
	}
	filterMore, topicMore := true, true
	for filterMore {
		var want, have string
		want, filter, filterMore = strings.Cut(filter, "/")
		if want == "#" {
			return !filterMore
		}
		if !topicMore {
			return false
		}
		have, topic, topicMore = strings.Cut(topic, "/")
		if want != "+" && want != have {
			return false
		}
	}
	return !topicMore
}
