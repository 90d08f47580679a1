package pinfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sealmq/sealmq/identity"
)

var alice, bob = identity.Identifier{1}, identity.Identifier{2}

func TestPins(t *testing.T) {
	for name, f := range map[string]*File{"file": Open(filepath.Join(t.TempDir(), "home", "known")), "memory": Open("")} {
		t.Run(name, func(t *testing.T) {
			if _, ok, err := f.Lookup("hub:1883"); ok || err != nil {
				t.Fatalf("%v, %v", ok, err)
			}
			for _, step := range []struct {
				name    string
				id      identity.Identifier
				number  uint64
				number2 uint64 // remembered afterwards
				err     error
			}{
				{"hub:1883", alice, 0, 0, nil},
				{"hub:1883", alice, 5, 5, nil},
				{"hub:1883", alice, 5, 5, nil},
				{"hub:1883", alice, 0, 5, nil},
				{"hub:1883", alice, 4, 5, ErrOlder},
				{"hub:8883", bob, 0, 0, nil},
				{"hub:1883", alice, 7, 7, nil},
				{"", alice, 0, 0, ErrName},
				{"a b", alice, 0, 0, ErrName},
				{"#a", alice, 0, 0, ErrName},
				{"a", identity.Identifier{}, 0, 0, ErrName},
			} {
				if err := f.Remember(step.name, step.id, step.number); !errors.Is(err, step.err) {
					t.Errorf("%+v: %v", step, err)
				}
				if e, _, err := f.Lookup(step.name); err != nil || e.Number != step.number2 {
					t.Errorf("%+v: then %+v, %v", step, e, err)
				}
			}
			var changed *ChangedError
			err := f.Remember("hub:1883", bob, 9)
			if !errors.As(err, &changed) || changed.Have != alice || changed.Got != bob || f.path != "" && changed.Line != 1 {
				t.Errorf("%v", err)
			}
			if err := f.Forget("hub:1883"); err != nil {
				t.Error(err)
			}
			if err := f.Remember("hub:1883", bob, 0); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "known")
	text := "# my hubs\n\nold:1 " + alice.String() + "\nlast:2 " + bob.String() + " 3"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f := Open(path)
	if err := f.Remember("new:3", alice, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Remember("old:1", alice, 9); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := "# my hubs\n\nold:1 " + alice.String() + " 9\nlast:2 " + bob.String() + " 3\nnew:3 " + alice.String() + "\n"
	if string(got) != want {
		t.Errorf("%s, want %s", got, want)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}

	for name, line := range map[string]string{"one field": "x", "four": "x " + alice.String() + " 1 2", "bad identifier": "x I12", "bad number": "x " + alice.String() + " -1"} {
		if err := os.WriteFile(path, []byte("# first\n"+line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var syntax *SyntaxError
		if _, _, err := f.Lookup("y"); !errors.As(err, &syntax) || syntax.Line != 2 {
			t.Errorf("%s: %v", name, err)
		}
		if err := f.Remember("y", alice, 0); !errors.As(err, &syntax) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Chmod(path, 0o620); err != nil {
		t.Fatal(err)
	}
	var permission *PermissionError
	if _, _, err := f.Lookup("y"); !errors.As(err, &permission) || permission.Hint() == "" {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("# long\n", maxFile/7+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Lookup("y"); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
}

// TestTogether: what several write at the same time is all there.
func TestTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "known")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if err := Open(path).Remember("hub:"+string(rune('a'+i)), alice, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range 16 {
		if _, ok, err := Open(path).Lookup("hub:" + string(rune('a'+i))); !ok || err != nil {
			t.Errorf("%d: %v, %v", i, ok, err)
		}
	}
}

// TestSpacesInNames: a name with a space of any kind in it is refused, and spoils no file.
func TestSpacesInNames(t *testing.T) {
	f := Open(filepath.Join(t.TempDir(), "known"))
	for _, name := range []string{" ", "a b", "\u00a0", "a\u2003b", "a\u0085"} {
		if err := f.Remember(name, alice, 0); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
	if _, _, err := f.Lookup("a"); err != nil {
		t.Error(err)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	f := Open("")
	for i := range maxMemory + 10 {
		if err := f.Remember("n"+strings.Repeat("x", i%500)+string(rune('a'+i/500)), alice, 0); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.memory) > maxMemory || len(f.order) > maxMemory {
		t.Errorf("%d names", len(f.memory))
	}
}

func FuzzFile(f *testing.F) {
	f.Add("a "+alice.String()+"\n# c\nb "+bob.String()+" 7", "b")
	f.Add("", "a")
	f.Fuzz(func(t *testing.T, text, name string) {
		if !validName(name) {
			return
		}
		next, _, _, err := replace("", []byte(text), name, alice, 3)
		if err != nil {
			return
		}
		if _, e, ok, err := find("", next, name); err != nil || !ok || e.Identifier != alice || e.Number < 3 {
			t.Fatalf("%q: %+v, %v, %v", next, e, ok, err)
		}
	})
}
