package identity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// chain makes an identity with one to n changes: chain[i] has i+1.
func chain(t testing.TB, n int) []*Identity {
	t.Helper()
	p := must(Create())
	out := []*Identity{p.Identity()}
	for len(out) < n {
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
		out = append(out, p.Identity())
	}
	return out
}

// fork makes another second change of an identity.
func fork(t testing.TB) (first, left, right *Identity) {
	t.Helper()
	s := seeded(1)
	first = must(makeChange(nil, nil, s, 1, 2, false))
	return first, must(makeChange(first, s, seeded(2), 1, 2, false)), must(makeChange(first, s, seeded(3), 1, 2, false))
}

// eachRegistry runs a test over both registries.
func eachRegistry(t *testing.T, f func(t *testing.T, r Keeper)) {
	t.Run("memory", func(t *testing.T) { f(t, NewMemoryRegistry(0)) })
	t.Run("files", func(t *testing.T) { f(t, must(OpenRegistry(privateDir(t), 0))) })
}

func privateDir(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "folder")
}

// TestRegistryRules is the first column of the table of spec identity 9.
func TestRegistryRules(t *testing.T) {
	eachRegistry(t, func(t *testing.T, r Keeper) {
		c := chain(t, 3)
		first, left, right := fork(t)
		if _, ok := r.Get(c[0].Identifier()); ok {
			t.Error("known before it was seen")
		}
		for _, step := range []struct {
			name string
			id   *Identity
			err  error
			want *Identity
		}{
			{"nothing stored", c[0], nil, c[0]},
			{"equal", c[0], nil, c[0]},
			{"newer", c[2], nil, c[2]},
			{"equal again", c[2], nil, c[2]},
			{"older by one", c[1], ErrOlder, c[2]},
			{"older by two", c[0], ErrOlder, c[2]},
			{"another one", first, nil, first},
			{"its left", left, nil, left},
			{"its right", right, ErrConflict, left},
			{"its beginning", first, ErrOlder, left},
		} {
			if err := r.Update(step.id); !errors.Is(err, step.err) {
				t.Errorf("%s: %v, want %v", step.name, err, step.err)
			}
			got, ok := r.Get(step.id.Identifier())
			if !ok || got.Compare(step.want) != Equal {
				t.Errorf("%s: holds %v", step.name, got)
			}
		}
	})
}

func TestRegistryImport(t *testing.T) {
	eachRegistry(t, func(t *testing.T, r Keeper) {
		im := r.(Importer)
		c := chain(t, 2)
		if err := r.Update(c[1]); err != nil {
			t.Fatal(err)
		}
		if got := must(im.Import(c[1].ChangeHistory())); got != c[1] {
			t.Error("verified again")
		}
		if got := must(im.Import(c[0].ChangeHistory())); got == c[1] || got.Compare(c[0]) != Equal {
			t.Error("another history of the same identity")
		}
		b := c[1].ChangeHistory()
		for n := range b {
			b[n] ^= 1
			if id, err := im.Import(b); err == nil {
				t.Fatalf("flipped at %d: %v", n, id)
			}
			b[n] ^= 1
		}
		if _, err := im.Import(append(b, 0)); !errors.Is(err, ErrMalformed) {
			t.Errorf("bytes after it: %v", err)
		}
		if _, err := im.Import(nil); err == nil {
			t.Error("nothing accepted")
		}
	})
}

func TestMemoryRegistryBound(t *testing.T) {
	r := NewMemoryRegistry(8)
	friend, stranger := chain(t, 2), chain(t, 2)
	for _, id := range []*Identity{friend[1], stranger[1]} {
		if err := r.Update(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Keep(friend[1].Identifier()); err != nil {
		t.Fatal(err)
	}
	single := chain(t, 1)[0]
	if err := r.Update(single); err != nil {
		t.Fatal(err)
	}
	if err := r.Keep(single.Identifier()); err != nil {
		t.Fatal(err)
	}
	// A flood of single-change strangers pushes out only such.
	for range 20 {
		if err := r.Update(chain(t, 1)[0]); err != nil {
			t.Fatal(err)
		}
	}
	has := func(id *Identity) bool { _, ok := r.Get(id.Identifier()); return ok }
	if r.Len() != 8 || !has(friend[1]) || !has(stranger[1]) || !has(single) {
		t.Errorf("%d held, %v %v %v", r.Len(), has(friend[1]), has(stranger[1]), has(single))
	}
	// A flood of rotated ones pushes out strangers, and never the friend.
	for range 20 {
		if err := r.Update(chain(t, 2)[1]); err != nil {
			t.Fatal(err)
		}
	}
	if r.Len() != 8 || !has(friend[1]) || has(stranger[1]) {
		t.Errorf("%d held, %v %v", r.Len(), has(friend[1]), has(stranger[1]))
	}
	if err := r.Update(friend[0]); !errors.Is(err, ErrOlder) {
		t.Errorf("the friend's rotation was forgotten: %v", err)
	}
	// Full of friends.
	for range 20 {
		c := chain(t, 2)[1]
		if err := r.Update(c); err != nil {
			if !errors.Is(err, ErrRegistryFull) {
				t.Fatal(err)
			}
			break
		}
		if err := r.Keep(c.Identifier()); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Update(chain(t, 1)[0]); !errors.Is(err, ErrRegistryFull) {
		t.Errorf("full of friends: %v", err)
	}
	if err := r.Update(friend[1]); err != nil {
		t.Errorf("a friend at a full registry: %v", err)
	}
	_ = r.Keep(Identifier{1}) // unknown: nothing happens
}

func TestMemoryRegistryBytes(t *testing.T) {
	r := NewMemoryRegistry(1)
	r.maxCount, r.maxBytes = 1000, 2000
	for range 50 {
		if err := r.Update(chain(t, 1)[0]); err != nil {
			t.Fatal(err)
		}
		if r.bytes > 2000 {
			t.Fatalf("%d bytes", r.bytes)
		}
	}
	if r.Len() != 15 {
		t.Errorf("%d held", r.Len())
	}
	big := chain(t, 12)[11]
	if err := r.Update(big); !errors.Is(err, ErrRegistryFull) || r.Len() != 15 {
		t.Errorf("%v, %d held", err, r.Len())
	}
}

func TestFileRegistrySurvives(t *testing.T) {
	dir := privateDir(t)
	c, stranger, kept := chain(t, 3), chain(t, 1)[0], chain(t, 1)[0]
	r := must(OpenRegistry(dir, 0))
	for _, id := range []*Identity{c[1], stranger, kept} {
		if err := r.Update(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Keep(kept.Identifier()); err != nil {
		t.Fatal(err)
	}
	again := must(OpenRegistry(dir, 0))
	if err := again.Update(c[0]); !errors.Is(err, ErrOlder) {
		t.Errorf("after a restart: %v", err)
	}
	if _, ok := again.Get(kept.Identifier()); !ok {
		t.Error("the kept one is gone")
	}
	if _, ok := again.Get(stranger.Identifier()); ok {
		t.Error("a single-change stranger is on disk")
	}
	// What one process learns, the other knows.
	if err := again.Update(c[2]); err != nil {
		t.Fatal(err)
	}
	if err := r.Update(c[1]); !errors.Is(err, ErrOlder) {
		t.Errorf("behind another process: %v", err)
	}
	// Keeping moves the file.
	if err := r.Keep(c[0].Identifier()); err != nil {
		t.Fatal(err)
	}
	if names := dirNames(t, dir); strings.Contains(names, c[0].String()+seenSuffix) || !strings.Contains(names, c[0].String()+keptSuffix) {
		t.Error(names)
	}
	third := must(OpenRegistry(dir, 0))
	if err := third.Update(c[1]); !errors.Is(err, ErrOlder) {
		t.Errorf("kept: %v", err)
	}
	if err := third.Forget(c[0].Identifier()); err != nil {
		t.Fatal(err)
	}
	if err := third.Update(c[1]); err != nil {
		t.Errorf("after forgetting: %v", err)
	}
}

func dirNames(t testing.TB, dir string) string {
	t.Helper()
	var names []string
	for _, e := range must(os.ReadDir(dir)) {
		names = append(names, e.Name())
	}
	return strings.Join(names, "\n")
}

func TestFileRegistryFaults(t *testing.T) {
	dir := privateDir(t)
	c := chain(t, 2)
	r := must(OpenRegistry(dir, 0))
	for _, step := range []string{"create", "write", "sync", "rename", "sync folder"} {
		r.disk.fault = func(s string) error {
			if s == step {
				return errCrash
			}
			return nil
		}
		if err := r.Update(c[1]); !errors.Is(err, errCrash) {
			t.Errorf("%s: %v", step, err)
		}
	}
	r.disk.fault = nil
	// What failed is tried again, not taken as done.
	if err := r.Update(c[1]); err != nil {
		t.Fatal(err)
	}
	if err := must(OpenRegistry(dir, 0)).Update(c[0]); !errors.Is(err, ErrOlder) {
		t.Errorf("not on disk: %v", err)
	}
	if names := dirNames(t, dir); strings.Contains(names, tempPrefix) {
		t.Errorf("left behind: %s", names)
	}
	// A damaged file is an error that names it, not an opening.
	path := filepath.Join(dir, c[0].String()+seenSuffix)
	if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, id := range c {
		if err := r.Update(id); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), path) {
			t.Errorf("damaged: %v", err)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	var perm *PermissionError
	if err := r.Update(c[0]); !errors.As(err, &perm) {
		t.Errorf("too open: %v", err)
	}
}

func TestFileRegistryBound(t *testing.T) {
	dir := privateDir(t)
	r := must(OpenRegistry(dir, 8))
	friend := chain(t, 2)
	if err := r.Update(friend[1]); err != nil {
		t.Fatal(err)
	}
	if err := r.Keep(friend[1].Identifier()); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		if err := r.Update(chain(t, 2)[1]); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(dirNames(t, dir), seenSuffix); n > 8 {
		t.Errorf("%d files of strangers", n)
	}
	if err := must(OpenRegistry(dir, 8)).Update(friend[0]); !errors.Is(err, ErrOlder) {
		t.Errorf("the friend was forgotten: %v", err)
	}
	if len(r.stamps) > 17 {
		t.Errorf("%d stamps", len(r.stamps))
	}
}

func TestRegistryConcurrently(t *testing.T) {
	eachRegistry(t, func(t *testing.T, r Keeper) {
		c := chain(t, 6)
		var wg sync.WaitGroup
		for i := range c {
			wg.Go(func() {
				if err := r.Update(c[i]); err != nil && !errors.Is(err, ErrOlder) {
					t.Error(err)
				}
				r.Get(c[i].Identifier())
				if err := r.Keep(c[i].Identifier()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got, ok := r.Get(c[0].Identifier()); !ok || got.Compare(c[5]) != Equal {
			t.Error("the longest history was lost")
		}
	})
}

// TestPreferredAreForgottenLast: whoever comes with many rotated identities pushes out
// none that Prefer names, and if they are named as well, none that came before them.
func TestPreferredAreForgottenLast(t *testing.T) {
	device := chain(t, 2)
	flood := make([]*Identity, 30)
	for i := range flood {
		flood[i] = chain(t, 2)[1]
	}
	files := "" // the folder, if there is one
	for name, open := range map[string]func() (r Keeper, prefer func(func(Identifier) bool), again func() Keeper){
		"memory": func() (Keeper, func(func(Identifier) bool), func() Keeper) {
			r := NewMemoryRegistry(8)
			files = ""
			return r, r.Prefer, func() Keeper { return r }
		},
		"files": func() (Keeper, func(func(Identifier) bool), func() Keeper) {
			dir := privateDir(t)
			r := must(OpenRegistry(dir, 8))
			files = dir
			return r, r.Prefer, func() Keeper { return must(OpenRegistry(dir, 8)) }
		},
	} {
		for _, all := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " all ", all), func(t *testing.T) {
				r, prefer, again := open()
				prefer(func(id Identifier) bool { return all || id == device[0].Identifier() })
				if err := r.Update(device[1]); err != nil {
					t.Fatal(err)
				}
				if files != "" { // the clock of files ticks every few milliseconds
					hour := time.Now().Add(-time.Hour)
					if err := os.Chtimes(filepath.Join(files, device[0].Identifier().String()+seenSuffix), hour, hour); err != nil {
						t.Fatal(err)
					}
				}
				for _, id := range flood {
					if err := r.Update(id); err != nil {
						t.Fatal(err)
					}
				}
				for _, r := range []Keeper{r, again()} {
					if err := r.Update(device[0]); !errors.Is(err, ErrOlder) {
						t.Errorf("the device was forgotten: %v", err)
					}
				}
			})
		}
	}
}

// TestFileRegistryHoldsMoreThanItsMemory: kept identities are on disk, however many.
func TestFileRegistryHoldsMoreThanItsMemory(t *testing.T) {
	r := must(OpenRegistry(privateDir(t), 4))
	var all [][]*Identity
	for range 12 {
		c := chain(t, 2)
		all = append(all, c)
		if err := r.Update(c[1]); err != nil {
			t.Fatal(err)
		}
		if err := r.Keep(c[1].Identifier()); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range all {
		if err := r.Update(c[0]); !errors.Is(err, ErrOlder) {
			t.Errorf("%d was forgotten: %v", i, err)
		}
	}
	if n := r.mem.Len(); n > 4 {
		t.Errorf("%d in memory", n)
	}
}
