// Package readme holds the README to its word: every command that it shows is
// run by a test or by CI.
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

// proof says where a command is run: file, from the top of the repository, has
// the text has. For a Go test that is the test's func line, for CI the command.
type proof struct{ file, has string }

// commands lists every command that README.md shows, as it stands there, and
// where it is run. Add a command here together with the test that runs it.
var commands = map[string]proof{
	"make test": {".ci/run", "\nexec make test\n"},
	"make help": {"integration/readme/readme_test.go", "func TestMakeHelp("},

	"go run ./cmd/sealmq demo":       {"cmd/sealmq/readme_test.go", "func TestDemoTranscript("},
	"sealmq hub":                     {"cmd/sealmq/readme_test.go", "func TestThreeTerminals("},
	"sealmq listen --trust everyone": {"cmd/sealmq/readme_test.go", "func TestThreeTerminals("},
	"sealmq send --to FWD_… --trust everyone 'Hello Ockam!'": {"cmd/sealmq/readme_test.go", "func TestThreeTerminals("},

	"mosquitto_sub -F '%t %x' -t 'sealmq/#'": {"integration/observer/observer_test.go", "func TestObserverSeesRoutesAndCiphertext("},

	"go install ./cmd/sealmq":   {"integration/readme/readme_test.go", "func TestInstall("},
	"docker compose up --build": {"integration/compose/compose_test.go", "func TestCommandsOfTheFile("},
}

// What go install puts into $GOBIN runs.
func TestInstall(t *testing.T) {
	bin := t.TempDir()
	install := exec.Command("go", "install", "./cmd/sealmq")
	install.Dir, install.Env = peer.ModuleRoot(t), append(os.Environ(), "GOBIN="+bin)
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(filepath.Join(bin, "sealmq"), "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "sealmq ") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestEveryCommandIsRunSomewhere(t *testing.T) {
	root := peer.ModuleRoot(t)
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	shown := Commands(string(text))
	if len(shown) == 0 {
		t.Fatal("README.md shows no command in a fenced sh or console block")
	}
	used := make(map[string]bool)
	for _, command := range shown {
		p, ok := commands[command]
		if !ok {
			t.Errorf("README.md shows a command that this test does not know: %q\n"+
				"write a test that runs it and add both to the table commands", command)
			continue
		}
		used[command] = true
		source, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(p.file)))
		if err != nil {
			t.Errorf("%q should be run by %s: %v", command, p.file, err)
		} else if !strings.Contains(string(source), p.has) {
			t.Errorf("%q should be run by %q in %s, which is not there", command, p.has, p.file)
		}
	}
	for command := range commands {
		if !used[command] {
			t.Errorf("README.md does not show %q any more: take it out of the table commands", command)
		}
	}
}

// Commands returns the commands in the fenced blocks of a Markdown text, in
// order: every line of an sh, bash or shell block, and what follows "$ " in a
// console block. Lines that end in a backslash go on; comments and the output
// in console blocks are left out.
func Commands(text string) []string {
	var out []string
	language, pending := "", ""
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		if mark := fence.FindStringSubmatch(line); mark != nil {
			if language == "" {
				language = mark[1]
				if language == "" {
					language = "text"
				}
			} else {
				language = ""
			}
			pending = ""
			continue
		}
		command, ok := "", false
		switch language {
		case "sh", "bash", "shell":
			command, ok = line, true
		case "console":
			if pending != "" {
				command, ok = strings.TrimPrefix(line, "> "), true
			} else {
				command, ok = strings.CutPrefix(line, "$ ")
			}
		}
		if !ok {
			continue
		}
		command = strings.TrimSpace(command)
		if begun, more := strings.CutSuffix(command, `\`); more {
			pending += strings.TrimSpace(begun) + " "
			continue
		}
		if command, pending = pending+command, ""; command != "" && !strings.HasPrefix(command, "#") {
			out = append(out, strings.TrimSpace(comment.ReplaceAllString(command, "")))
		}
	}
	return out
}

var (
	fence   = regexp.MustCompile("^ *```+ *([a-zA-Z]*)")
	comment = regexp.MustCompile(`\s+# .*$`)
)

func TestCommands(t *testing.T) {
	const text = "# A\n\n```sh\nmake test   # everything\n# a comment\nsealmq send \\\n  --to X 'hi'\n```\n\n" +
		"```go\nfunc main() {}\n```\n\n```console\n$ sealmq hub\nListening\n$ a \\\n> b\n```\n\n```\n$ not a command\n```\n"
	want := []string{"make test", "sealmq send --to X 'hi'", "sealmq hub", "a b"}
	got := Commands(text)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("commands are %q, want %q", got, want)
	}
}
