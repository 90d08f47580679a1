package readme

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// Every direct dependency has its reason in docs/dependencies.md.
func TestDependenciesAreExplained(t *testing.T) {
	root := peer.ModuleRoot(t)
	gomod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	required := false
	for line := range strings.Lines(string(gomod)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "require (":
			required = true
		case line == ")":
			required = false
		case required || strings.HasPrefix(line, "require "):
			module, rest, _ := strings.Cut(strings.TrimPrefix(line, "require "), " ")
			if !strings.HasSuffix(rest, "// indirect") && !strings.Contains(string(page), "`"+module+"`") {
				t.Errorf("docs/dependencies.md does not say why %s is here", module)
			}
		}
	}
}
