package guard

import (
	"hash/maphash"
	"net/netip"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/internal/connlimit"
)

// owner is whom that is charged to which mochi keeps for a client: the network that it
// came from, and its user name. The zero owner is charged nothing.
type owner struct {
	network netip.Prefix
	user    uint64 // a hash; 0: none
}

var ownerSeed = maphash.MakeSeed()

func ownerOf(cl *mqtt.Client) owner {
	if cl.Net.Conn == nil { // the server's own
		return owner{}
	}
	o := owner{network: connlimit.Network(cl.Net.Conn.RemoteAddr())}
	if len(cl.Properties.Username) > 0 {
		o.user = max(1, maphash.Bytes(ownerSeed, cl.Properties.Username))
	}
	return o
}

// shares is how much of something each network and each user name has. Its owner locks.
type shares struct {
	networks map[netip.Prefix]int64
	users    map[uint64]int64
}

// fits reports whether o may have n more, in place of what before has given up: old of
// them. most is for one network, and for one user name.
func (s *shares) fits(o owner, n int64, before owner, old, most int64) bool {
	if o == (owner{}) {
		return true
	}
	network, user := s.networks[o.network]+n, s.users[o.user]+n
	if o.network == before.network {
		network -= old
	}
	if o.user == before.user {
		user -= old
	}
	return network <= most && (o.user == 0 || user <= most)
}

// add charges n to o, or gives it back if n is negative.
func (s *shares) add(o owner, n int64) {
	if o == (owner{}) || n == 0 {
		return
	}
	if s.networks == nil {
		s.networks, s.users = make(map[netip.Prefix]int64), make(map[uint64]int64)
	}
	if s.networks[o.network] += n; s.networks[o.network] == 0 {
		delete(s.networks, o.network)
	}
	if o.user == 0 {
		return
	}
	if s.users[o.user] += n; s.users[o.user] == 0 {
		delete(s.users, o.user)
	}
}
