package readme

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// Each target of the Makefile is in its help, and none twice.
func TestMakeHelp(t *testing.T) {
	root := peer.ModuleRoot(t)
	if _, err := exec.LookPath("make"); err != nil {
		peer.Missing(t, "make", "install make")
	}
	cmd := exec.Command("make", "--no-print-directory", "help")
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make help: %v\n%s", err, out)
	}
	help := make(map[string]bool)
	for line := range strings.Lines(string(out)) {
		name, what, _ := strings.Cut(strings.TrimSpace(line), " ")
		if help[name] || strings.TrimSpace(what) == "" {
			t.Errorf("help has %q twice or without a description", name)
		}
		help[name] = true
	}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := regexp.MustCompile(`(?m)^\.PHONY: (\S+)$`).FindAllStringSubmatch(string(makefile), -1)
	for _, target := range targets {
		if !help[target[1]] {
			t.Errorf("help does not list the target %q", target[1])
		}
	}
	if len(targets) != len(help) {
		t.Errorf("%d targets, %d in the help", len(targets), len(help))
	}
}
