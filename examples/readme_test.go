package examples

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// readmeImports are the packages that the README's Go blocks use.
const readmeImports = `package readme

import (
	"context"
	"fmt"

	mqtt "github.com/mochi-mqtt/server/v2"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

`

// The README's Go compiles as it stands, and no part is longer than 20 lines.
func TestReadmeCompiles(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	program, blocks := readmeImports, 0
	for rest := string(text); ; blocks++ {
		_, after, ok := strings.Cut(rest, "```go\n")
		if !ok {
			break
		}
		block, end, _ := strings.Cut(after, "```")
		program, rest = program+block+"\n", end
		if n := strings.Count(block, "\n"); n > 20 {
			t.Errorf("a block has %d lines", n)
		}
	}
	if blocks != 3 {
		t.Fatalf("%d Go blocks in README.md", blocks)
	}
	dir := t.TempDir()
	source := filepath.Join(dir, "readme.go")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(here, "readme", "readme.go"): source}})
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-overlay", list, "./readme")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("README.md does not compile: %v\n%s", err, out)
	}
}
