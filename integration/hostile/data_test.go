package hostile

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/sealmq/sealmq/route"
)

// dice are the same in every run.
func dice() *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

// with returns a frame's body with another payload.
func (p *passage) with(payload []byte) []byte {
	return encode(route.Frame{Onward: p.Onward, Return: p.Return, Payload: payload})
}

// held keeps frames back, each way for itself.
type held [2][][]byte

// letGo sends what is held.
func (h *held) letGo(e *end) func() {
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		for w := range h {
			e.sendLocked(way(w), h[w]...)
			h[w] = nil
		}
	}
}

// dataAttacks are those on the frames of a channel in use. Each makes the attack, and
// what lets go of all that it holds back.
var dataAttacks = map[string]func(e *end) (a attack, ended func()){
	"drop": func(*end) (attack, func()) {
		r := dice()
		return func(p *passage) [][]byte {
			if r.IntN(4) == 0 {
				return nil
			}
			return asIs(p)
		}, nil
	},
	"drop all": func(*end) (attack, func()) {
		return func(*passage) [][]byte { return nil }, nil
	},
	"delay": func(e *end) (attack, func()) {
		var h held
		return func(p *passage) [][]byte {
			if p.n%5 == 4 {
				h[p.way] = append(h[p.way], p.body)
				return nil
			}
			out := asIs(p)
			if len(h[p.way]) > 3 {
				out, h[p.way] = append(out, h[p.way]...), nil
			}
			return out
		}, h.letGo(e)
	},
	"delay all": func(e *end) (attack, func()) {
		var h held
		return func(p *passage) [][]byte {
			h[p.way] = append(h[p.way], p.body)
			return nil
		}, h.letGo(e)
	},
	"duplicate": func(*end) (attack, func()) {
		return func(p *passage) [][]byte { return [][]byte{p.body, p.body} }, nil
	},
	"replay old frames": func(*end) (attack, func()) {
		r := dice()
		return func(p *passage) [][]byte {
			old := p.at.tape[p.way]
			return [][]byte{encode(old[r.IntN(len(old))]), p.body, encode(old[r.IntN(len(old))])}
		}, nil
	},
	"reorder within the window":   reorder(8),
	"reorder beyond the window":   reorder(80),
	"reorder around whole window": reorder(33),
	"truncate": func(*end) (attack, func()) {
		r := dice()
		return func(p *passage) [][]byte {
			out := [][]byte{p.with(p.Payload[:r.IntN(len(p.Payload)+1)])}
			if p.way == down {
				out = append(out, p.body[:1+r.IntN(len(p.body)-1)]) // a length of 0 would end a TCP link
			}
			if p.n == 0 {
				for n := range p.Payload {
					out = append(out, p.with(p.Payload[:n]))
				}
			}
			if p.n%3 != 2 {
				out = append(out, p.body)
			}
			return out
		}, nil
	},
	"flip each byte": func(*end) (attack, func()) {
		return func(p *passage) [][]byte {
			if p.n != 1 {
				return asIs(p)
			}
			var out [][]byte
			for i := range p.Payload {
				b := bytes.Clone(p.Payload)
				b[i] ^= 1 << (i % 8)
				out = append(out, p.with(b))
			}
			if p.way == down { // the frame around it too
				for i := range p.body {
					b := bytes.Clone(p.body)
					b[i] ^= 1 << (i % 8)
					out = append(out, b)
				}
			}
			return append(out, p.body)
		}, nil
	},
	"forge": forge,
	"reflect": func(*end) (attack, func()) {
		return func(p *passage) [][]byte {
			back := p.at.tape[p.way.other()]
			if len(back) > 0 { // the way that frames of the other direction take
				to := back[len(back)-1]
				p.at.sendLocked(p.way.other(), encode(route.Frame{Onward: to.Onward, Return: to.Return, Payload: p.Payload}))
			}
			return asIs(p)
		}, nil
	},
	"forged return routes": forgeReturns,
}

// leastData is how many of plainMessages arrive. All of them where the genuine frames
// pass at once and in order; where they come late it depends on how busy the machine is
// whether newer messages wait for them.
var leastData = map[string]int{
	"drop": 180, "delay": 100, "delay all": 100, "truncate": 190, "reorder within the window": 100, "reorder around whole window": 32,
	"duplicate": plainMessages, "replay old frames": plainMessages, "flip each byte": plainMessages, "forge": plainMessages,
	"reflect": plainMessages, "forged return routes": plainMessages,
}

// TestData attacks the frames of a channel in use, as the initiator and as the
// responder sees them, with Send both ways and with Deliver.
func TestData(t *testing.T) {
	for name, a := range dataAttacks {
		t.Run(name, func(t *testing.T) {
			for side, at := range map[string]func(*conversation) *end{
				"of the initiator":       func(c *conversation) *end { return c.alice.end },
				"of the responder":       func(c *conversation) *end { return c.bob.end },
				"of an initiator on TCP": func(c *conversation) *end { return c.alice.end },
			} {
				if side == "of an initiator on TCP" && theHub(t).tcp == "" {
					continue // the hub that was given has no such port
				}
				t.Run(side, func(t *testing.T) {
					t.Parallel()
					overTCP := side == "of an initiator on TCP"
					c := converse(t, overTCP)
					e := at(c)
					act, ended := a(e)
					least := leastData[name]
					if overTCP {
						least /= 3 // a busy hub drops what waits for longer than a second
					}
					c.under(t, e, act, ended, least)
				})
			}
		})
	}
}

// forge makes up frames for a channel, with nonces of its own choice.
func forge(*end) (attack, func()) {
	r := dice()
	return func(p *passage) [][]byte {
		made := make([]byte, 24+r.IntN(100))
		for i := range made {
			made[i] = byte(r.Uint32())
		}
		near := bytes.Clone(made)
		copy(near, p.Payload[:min(len(p.Payload), 8)])
		far := bytes.Repeat([]byte{0xff}, 40)
		return [][]byte{p.with(made), p.with(near), p.with(far), p.with(nil), p.body}
	}, nil
}

// forgeReturns shows another way back on frames that do not open, which moves nobody's.
func forgeReturns(*end) (attack, func()) {
	return func(p *passage) [][]byte {
		b := bytes.Clone(p.Payload)
		b[len(b)-1] ^= 1
		return [][]byte{encode(route.Frame{Onward: p.Onward, Return: route.To("nowhere", "nobody"), Payload: b}), p.body}
	}, nil
}

// reorder turns groups of size frames around.
func reorder(size int) func(e *end) (attack, func()) {
	return func(e *end) (attack, func()) {
		var h held
		return func(p *passage) [][]byte {
			h[p.way] = append([][]byte{p.body}, h[p.way]...)
			if len(h[p.way]) < size {
				return nil
			}
			out := h[p.way]
			h[p.way] = nil
			return out
		}, h.letGo(e)
	}
}
