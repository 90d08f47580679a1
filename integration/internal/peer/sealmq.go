package peer

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

var sealmq struct {
	once sync.Once
	path string
	err  error
}

// Sealmq returns the path of the program sealmq, built from this checkout once
// for each test process. The folder stays when the process ends: the system
// cleans its temporary files.
func Sealmq(t testing.TB) string {
	t.Helper()
	root := ModuleRoot(t)
	sealmq.once.Do(func() {
		dir, err := os.MkdirTemp("", "sealmq-test-")
		if err != nil {
			sealmq.err = err
			return
		}
		path := filepath.Join(dir, "sealmq")
		cmd := exec.Command("go", "build", "-o", path, "./cmd/sealmq")
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			sealmq.err = fmt.Errorf("go build ./cmd/sealmq: %w\n%s", err, out)
			return
		}
		sealmq.path = path
	})
	if sealmq.err != nil {
		t.Fatal(sealmq.err)
	}
	return sealmq.path
}
