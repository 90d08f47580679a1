package compose

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// stages reads the Dockerfile with BuildKit's own parser.
func stages(t *testing.T) map[string]instructions.Stage {
	t.Helper()
	f, err := os.Open(filepath.Join(peer.ModuleRoot(t), "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tree, err := parser.Parse(f)
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := instructions.Parse(tree.AST, nil)
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]instructions.Stage)
	for _, s := range list {
		byName[s.Name] = s
	}
	if last := list[len(list)-1].Name; last != "sealmq" {
		t.Errorf("docker build without a target builds %q", last)
	}
	return byName
}

func TestDockerfile(t *testing.T) {
	all := stages(t)
	for name, s := range all {
		if _, ours := all[s.BaseName]; !ours && !strings.Contains(s.BaseName, ":") {
			t.Errorf("stage %s is built on %s, whatever that is on the day", name, s.BaseName)
		}
	}
	for _, name := range []string{"demo", "sealmq"} {
		if all[name].BaseName != "base" {
			t.Errorf("stage %s is not built on base", name)
		}
	}
	var user, health, entry, pages string
	for _, c := range all["base"].Commands {
		switch c := c.(type) {
		case *instructions.UserCommand:
			user = c.User
		case *instructions.HealthCheckCommand:
			health = strings.Join(c.Health.Test, " ")
		case *instructions.EnvCommand:
			for _, v := range c.Env {
				if v.Key == "SEALMQ_HTTP" {
					pages = v.Value
				}
			}
		case *instructions.EntrypointCommand:
			entry = strings.Join(c.CmdLine, " ")
		}
	}
	if user == "" || strings.HasPrefix(user, "0") || strings.HasPrefix(user, "root") {
		t.Errorf("the image runs as %q", user)
	}
	if health != "CMD sealmq health" || pages != "127.0.0.1:8080" || entry != "sealmq" {
		t.Errorf("health check %q, status pages at %q, entry point %q", health, pages, entry)
	}
	for _, name := range []string{"demo", "sealmq"} {
		for _, c := range all[name].Commands {
			if u, ok := c.(*instructions.UserCommand); ok && u.User != user {
				t.Errorf("stage %s runs as %q", name, u.User)
			}
		}
	}
}

// TestBuildCommand runs the image's own build command here and looks at what
// comes out: one file that needs no other, as it says its version.
func TestBuildCommand(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "sealmq")
	var command string
	for _, c := range stages(t)["build"].Commands {
		run, ok := c.(*instructions.RunCommand)
		if ok && slices.ContainsFunc(run.CmdLine, func(s string) bool { return strings.Contains(s, "go build") }) {
			command = strings.Join(run.CmdLine, " ")
		}
	}
	if !strings.Contains(command, "-o /sealmq ") {
		t.Fatalf("the build command is %q", command)
	}
	cmd := exec.Command("sh", "-euc", strings.Replace(command, "/sealmq ", binary+" ", 1))
	cmd.Dir = peer.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "VERSION=v0.0.0-test", "GOOS=linux")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	file, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("the binary needs %v, %v", libraries, err)
	}
	if slices.ContainsFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Error("the binary is not static")
	}
	out, err := exec.Command(binary, "version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "v0.0.0-test") {
		t.Errorf("sealmq version: %q, %v", out, err)
	}
}
