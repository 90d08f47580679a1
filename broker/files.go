package broker

import (
	"cmp"

	"github.com/sealmq/sealmq/bridge/mochi/guard"
)

// ownFiles is how many open files are kept for what is no connection of a peer: the
// store, keys and lists that are read again, ports, and the status pages.
const ownFiles = 64 + httpConnections

// fitFiles returns the limits with no more connections at each of so many fronts
// than there are files for. files is how many the process may have open, or negative
// where nobody knows.
func (l Limits) fitFiles(files, fronts int) Limits {
	if files < 0 {
		return l
	}
	room := max(1, (files-min(ownFiles, files/2))/fronts)
	if room >= cmp.Or(l.Connections, guard.DefaultConns) {
		return l
	}
	l.Connections = room
	l.ConnectionsPerAddress = cmp.Or(l.ConnectionsPerAddress, min(guard.DefaultPerAddress, room-room/4))
	l.ConnectionsPending = cmp.Or(l.ConnectionsPending, min(guard.DefaultPending, room-room/4))
	return l
}

// fronts is how many ports for peers have connections of their own to count.
func (c *Config) fronts() int {
	if c.TCP != "" {
		return 2
	}
	return 1
}

// warnFiles says that there are fewer connections than the configuration wants.
func (h *Hub) warnFiles() {
	if h.files < 0 || h.cfg.Limits.Connections == 0 || h.cfg.Limits.Connections >= h.wanted {
		return
	}
	h.logger.Warn("the limit of open files allows fewer connections than configured; raise it (ulimit -n, LimitNOFILE=), or lower limits.connections",
		"files", h.files, "needed", h.wanted*h.cfg.fronts()+ownFiles, "connections", h.cfg.Limits.Connections, "configured", h.wanted)
}
