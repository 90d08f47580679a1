package main

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// TestCredentialFileIsReadAgain: a newer credential in the file is used without a
// restart; one that holds none of ours leaves the last good one in use, with one warning.
func TestCredentialFileIsReadAgain(t *testing.T) {
	create := func() *identity.Private {
		p, err := identity.Create()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	authority, self, other := create(), create(), create()
	name := filepath.Join(t.TempDir(), "credential")
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	issue := func(about *identity.Private) string {
		t.Helper()
		c, err := authority.IssueCredential(about.Identity(), nil, 1, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(c)
	}
	var warnings []error
	f := &credentialFile{name: name, subject: self.Identifier(), warn: func(err error) { warnings = append(warnings, err) }}
	first, second := issue(self), issue(self)
	for _, step := range []struct {
		name, put, want string
		warnings        int
	}{
		{"first", first, first, 0},
		{"unchanged", "", first, 0},
		{"half of one", second[:len(second)/2], first, 1},
		{"still", "", first, 1},
		{"about another", issue(other), first, 2},
		{"newer", "# by hand\n" + second + "\n", second, 2},
		{"damaged again", "x", second, 3},
	} {
		if step.put != "" {
			put(step.put)
		}
		got, err := f.get()
		if err != nil || hex.EncodeToString(got) != step.want || len(warnings) != step.warnings {
			t.Errorf("%s: %v, the wanted one %v, %d warnings, want %d", step.name, err, hex.EncodeToString(got) == step.want, len(warnings), step.warnings)
		}
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if got, err := f.get(); err != nil || hex.EncodeToString(got) != second {
		t.Errorf("without a file: %v", err)
	}
}
