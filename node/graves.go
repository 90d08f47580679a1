package node

// maxGraves bounds the addresses remembered as once those of channels.
const maxGraves = 16 << 10

// graves remembers the addresses of channels that have ended. What is sent along an
// old return route would leave in plain towards the hub, since its first hop is no
// worker of the node any more. The oldest are forgotten first.
type graves struct {
	set  map[string]struct{}
	ring []string
	next int
}

func (g *graves) add(addr string) {
	if _, ok := g.set[addr]; ok {
		return
	}
	if g.set == nil {
		g.set = make(map[string]struct{})
	}
	g.set[addr] = struct{}{}
	if len(g.ring) < maxGraves {
		g.ring = append(g.ring, addr)
		return
	}
	delete(g.set, g.ring[g.next])
	g.ring[g.next] = addr
	g.next = (g.next + 1) % maxGraves
}

func (g *graves) has(addr string) bool {
	_, ok := g.set[addr]
	return ok
}
