package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

var (
	crashSeeds = flag.Int("seeds", 24, "how many seeds TestCrash runs")
	crashSeed  = flag.Uint64("seed", 0, "the one seed that TestCrash runs, to replay a failure")
)

// queueModel is what a test knows of one name.
type queueModel struct {
	lives [][]string // every frame ever appended, by life of the name; the last is now
	now   []modelEntry
	// How many of the last life have been acknowledged, those of the store's start
	// among them.
	acked *ackCount
}

// ackCount counts acknowledgements.
type ackCount struct{ atomic.Int64 }

// Acked implements bridge.Acker.
func (a *ackCount) Acked(uint64) { a.Add(1) }

type modelEntry struct {
	seq   uint64
	frame string
	class route.Class
}

// A copy of the folder taken at any moment of a running store is what a kill at
// that moment leaves. It opens; each queue is in order; every frame that was
// committed, and neither delivered nor dropped, is there; and nothing is there
// that was never appended. The run goes on in the copy.
func TestCrash(t *testing.T) {
	first, n := rand.Uint64(), *crashSeeds
	if *crashSeed != 0 {
		first, n = *crashSeed, 1
	}
	for i := range n {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			c := &crasher{t: t, rnd: rand.New(rand.NewPCG(seed, 2)), dir: t.TempDir(), model: make(map[string]*queueModel)}
			c.opts = Options{Mode: Mode(seed % 2), SegmentSize: 512 << (seed % 5)}
			c.run(500)
		})
	}
}

type crasher struct {
	t     *testing.T
	rnd   *rand.Rand
	dir   string
	opts  Options
	s     *Store
	model map[string]*queueModel
	n     int
}

func (c *crasher) run(steps int) {
	c.s, _ = openStore(c.t, c.dir, c.opts)
	defer func() { c.s.Close() }()
	for range steps {
		name := string(rune('a' + c.rnd.IntN(4)))
		m := c.model[name]
		if m == nil {
			m = &queueModel{lives: [][]string{nil}, acked: new(ackCount)}
			c.model[name] = m
		}
		b := box(c.t, c.s, name)
		switch k := c.rnd.IntN(200); {
		case k < 110:
			c.append(b, m, name)
		case k < 170 && len(m.now) > 0:
			cut := c.rnd.IntN(min(len(m.now), 8))
			b.Release(m.now[cut].seq)
			m.now = m.now[cut+1:]
		case k < 184 && len(m.now) > 0:
			i := c.rnd.IntN(len(m.now))
			if _, ok := b.Drop(m.now[i].seq); !ok {
				c.t.Fatalf("cannot drop %d of %s", m.now[i].seq, name)
			}
			m.now = slices.Delete(slices.Clone(m.now), i, i+1)
		case k < 187:
			b.Discard()
			m.now, m.lives, m.acked = nil, append(m.lives, nil), new(ackCount)
		case k < 192:
			c.crash()
		case k < 194:
			c.reopen()
		}
	}
	c.crash()
}

func (c *crasher) append(b bridge.Outbox, m *queueModel, name string) {
	class := route.Class(c.rnd.IntN(5) / 4)
	c.n++
	frame := fmt.Sprintf("%s-%d-%s", name, c.n, bytes.Repeat([]byte{'x'}, c.rnd.IntN(200)))
	seq := b.Next()
	p := bridge.RoutedPacket(class, 7, true, []byte("hop"), []byte(frame))
	if _, _, err := b.Append(p, bridge.NewTicket(m.acked, 0)); err != nil {
		c.t.Fatal(err)
	}
	m.now = append(m.now, modelEntry{seq, frame, class})
	if class == route.Stored {
		m.lives[len(m.lives)-1] = append(m.lives[len(m.lives)-1], frame)
	}
}

// reopen closes the store cleanly: everything stored is there again, exactly.
func (c *crasher) reopen() {
	if err := c.s.Close(); err != nil {
		c.t.Fatal(err)
	}
	c.s, _ = openStore(c.t, c.dir, c.opts)
	for name, m := range c.model {
		m.now = slices.DeleteFunc(slices.Clone(m.now), func(e modelEntry) bool { return e.class == route.Transient })
		got := c.content(name)
		if !slices.Equal(got, m.now) {
			c.t.Fatalf("%s after a clean end: %v, want %v", name, got, m.now)
		}
	}
}

// crash goes on in a copy of the folder as it is at this moment.
func (c *crasher) crash() {
	must := make(map[string][]string)
	for name, m := range c.model {
		stored := m.lives[len(m.lives)-1]
		committed := make(map[string]bool)
		for _, f := range stored[:m.acked.Load()] {
			committed[f] = true
		}
		for _, e := range m.now {
			if committed[e.frame] {
				must[name] = append(must[name], e.frame)
			}
		}
	}
	dir := snapshot(c.t, c.dir)
	if err := c.s.Close(); err != nil {
		c.t.Fatal(err)
	}
	c.dir = dir
	c.s, _ = openStore(c.t, c.dir, c.opts)
	for name, m := range c.model {
		c.check(name, m, must[name])
	}
}

func (c *crasher) check(name string, m *queueModel, must []string) {
	got := c.content(name)
	frames := make([]string, len(got))
	for i, e := range got {
		if frames[i] = e.frame; i > 0 && e.seq <= got[i-1].seq {
			c.t.Fatalf("%s: sequence %d after %d", name, e.seq, got[i-1].seq)
		}
	}
	// One life of the name, and in its order.
	life := slices.IndexFunc(m.lives, func(l []string) bool { return subsequence(frames, l) })
	if life < 0 {
		c.t.Fatalf("%s holds what was never in it: %q", name, frames)
	}
	if !subsequence(must, frames) {
		c.t.Fatalf("%s lost what was committed: it holds %q, and should %q", name, frames, must)
	}
	m.now = got
	m.lives = [][]string{frames}
	m.acked = new(ackCount)
	m.acked.Store(int64(len(frames)))
}

func subsequence(sub, of []string) bool {
	for _, s := range of {
		if len(sub) > 0 && sub[0] == s {
			sub = sub[1:]
		}
	}
	return len(sub) == 0
}

func (c *crasher) content(name string) (list []modelEntry) {
	seqs, frames := content(box(c.t, c.s, name))
	for i := range seqs {
		list = append(list, modelEntry{seq: seqs[i], frame: frames[i], class: route.Stored})
	}
	return list
}

// snapshot copies a folder in which somebody writes, as it was at one moment: between
// two copies that are the same.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var last map[string][32]byte
	for {
		to := filepath.Join(t.TempDir(), "copy")
		err := os.CopyFS(to, os.DirFS(dir))
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
			continue
		case err != nil:
			t.Fatal(err)
		}
		sums := sums(t, to)
		if maps.Equal(sums, last) {
			return to
		}
		last = sums
	}
}

func sums(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string][32]byte)
	for _, e := range list {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = sha256.Sum256(b)
	}
	return out
}
