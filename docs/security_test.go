package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestThreatModelNamesTests: a test that the threat model names exists, and so do the
// attacks in parentheses behind it; every row names one, or says that there is none.
func TestThreatModelNamesTests(t *testing.T) {
	have := make(map[string]bool)
	texts := make(map[string][]string) // string literals of a package's tests
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "target" || d.Name() == "testdata" || name != ".." && strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case !strings.HasSuffix(name, "_test.go"):
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		pkg := strings.TrimSuffix(f.Name.Name, "_test")
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil {
				have[pkg+"."+fn.Name.Name] = true
			}
		}
		if strings.HasPrefix(pkg, "hostile") {
			ast.Inspect(f, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					texts[pkg] = append(texts[pkg], strings.Trim(lit.Value, "\"`"))
				}
				return true
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("security.md")
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile("`([a-z]+)\\.((?:Test|Fuzz)[A-Za-z0-9]+)`(?: \\(([a-zA-Z', ]+)\\))?")
	named := name.FindAllStringSubmatch(string(text), -1)
	if len(named) < 50 {
		t.Fatalf("only %d tests are named", len(named))
	}
	for _, n := range named {
		if !have[n[1]+"."+n[2]] {
			t.Errorf("there is no test %s.%s", n[1], n[2])
		}
		for attack := range strings.SplitSeq(n[3], ", ") {
			if !slices.ContainsFunc(texts[n[1]], func(s string) bool { return strings.HasPrefix(s, attack) }) && attack != "" {
				t.Errorf("%s.%s has nothing called %q", n[1], n[2], attack)
			}
		}
	}
	rows, table := 0, false
	for row := range strings.Lines(string(text)) {
		switch cells := strings.Split(strings.TrimSpace(row), " | "); {
		case cells[0] == "| cannot":
			table = true
		case !strings.HasPrefix(row, "|"):
			table = false
		case table && !strings.HasPrefix(row, "| ---"):
			rows++
			if last := cells[len(cells)-1]; len(cells) != 3 || !name.MatchString(last) && !strings.Contains(last, "**untested**") {
				t.Errorf("a row without a test: %s", cells[0])
			}
		}
	}
	if rows < 30 {
		t.Errorf("only %d rows were found", rows)
	}
}
