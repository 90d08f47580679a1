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
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	// Which of the last life have been acknowledged, those of the store's start among
	// them: the number of a packet's first frame, and in the lowest byte how many it has.
	acked *ackLog
}

// ackLog notes acknowledgements, in their order.
type ackLog struct {
	mu   sync.Mutex
	list []uint64
}

// Acked implements bridge.Acker.
func (a *ackLog) Acked(token uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, token)
}

func (a *ackLog) all() []uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.list)
}

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
	wall  string // the disk may refuse, because of this
}

func (c *crasher) run(steps int) {
	c.s, _ = openStore(c.t, c.dir, c.opts)
	defer func() { c.s.Close() }()
	for range steps {
		name := string(rune('a' + c.rnd.IntN(4)))
		m := c.model[name]
		if m == nil {
			m = &queueModel{lives: [][]string{nil}, acked: new(ackLog)}
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
			m.now, m.lives, m.acked = nil, append(m.lives, nil), new(ackLog)
		case k < 192:
			c.crash()
		case k < 194:
			c.reopen()
		case k == 194 && c.wall == "":
			c.wall = wallUp(c.t, c.dir)
		case k == 195:
			c.wallDown()
		}
	}
	c.crash()
}

// wallUp has the disk refuse the segment after the newest, and returns in what way.
func wallUp(t *testing.T, dir string) (wall string) {
	t.Helper()
	segs, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(segs) == 0 {
		t.Fatal(segs, err)
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(slices.Max(segs)), ".seg"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	wall = filepath.Join(dir, fmt.Sprintf("%016x.seg", n+1))
	made := t.TempDir()
	if err := os.Mkdir(filepath.Join(made, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(made, wall); err != nil && !errors.Is(err, syscall.ENOTDIR) { // it has just been made
		t.Fatal(err)
	}
	return wall
}

// wallDown takes down what wallUp has made.
func wallDown(t *testing.T, wall string) {
	t.Helper()
	if st, err := os.Stat(wall); err == nil && st.IsDir() {
		if err := os.RemoveAll(wall); err != nil && !errors.Is(err, syscall.ENOTDIR) { // a segment by now
			t.Fatal(err)
		}
	}
}

func (c *crasher) wallDown() {
	wallDown(c.t, c.wall)
	c.wall = ""
}

func (c *crasher) append(b bridge.Outbox, m *queueModel, name string) {
	class := route.Class(c.rnd.IntN(5) / 4)
	n := 1
	if c.rnd.IntN(3) == 0 {
		n += c.rnd.IntN(6)
	}
	var frames [][]byte
	for range n {
		c.n++
		frames = append(frames, fmt.Appendf(nil, "%s-%d-%s", name, c.n, bytes.Repeat([]byte{'x'}, c.rnd.IntN(200))))
	}
	life := &m.lives[len(m.lives)-1]
	seq := b.Next()
	p := bridge.RoutedPacket(class, 7, true, []byte("hop"), frames[0], frames[1:]...)
	if _, _, err := b.Append(p, bridge.NewTicket(m.acked, uint64(len(*life)<<8|n))); err != nil {
		c.t.Fatal(err)
	}
	for i, f := range frames {
		m.now = append(m.now, modelEntry{seq + uint64(i), string(f), class})
		if class == route.Stored {
			*life = append(*life, string(f))
		}
	}
}

// reopen closes the store cleanly: everything stored is there again, exactly.
func (c *crasher) reopen() {
	c.wallDown()
	await(c.t, c.s, "the disk refuses still", func() bool { return !c.s.Failing() && !c.late() })
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

// late reports whether a queue has something that the disk has yet to take.
func (c *crasher) late() bool {
	for name := range c.model {
		b := box(c.t, c.s, name).(*outbox)
		b.mu.Lock()
		n := len(b.late)
		b.mu.Unlock()
		if n > 0 {
			return true
		}
	}
	return false
}

// crash goes on in a copy of the folder as it is at this moment.
func (c *crasher) crash() {
	must := make(map[string][]string)
	for name, m := range c.model {
		stored := m.lives[len(m.lives)-1]
		committed := make(map[string]bool)
		for _, token := range m.acked.all() {
			for _, f := range stored[token>>8:][:token&0xff] {
				committed[f] = true
			}
		}
		for _, e := range m.now {
			if committed[e.frame] {
				must[name] = append(must[name], e.frame)
			}
		}
	}
	dir := snapshot(c.t, c.dir)
	c.wallDown()
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
	m.acked = new(ackLog)
	for i := range frames {
		m.acked.Acked(uint64(i<<8 | 1))
	}
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
		for _, wall := range dirs(t, to) {
			if err := os.RemoveAll(wall); err != nil {
				t.Fatal(err)
			}
		}
		sums := sums(t, to)
		if maps.Equal(sums, last) {
			return to
		}
		last = sums
	}
}

// dirs returns the folders in one.
func dirs(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			list = append(list, filepath.Join(dir, e.Name()))
		}
	}
	return list
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
