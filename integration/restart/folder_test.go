package restart

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sealmq/sealmq/integration/internal/peer"
)

// A data folder that cannot be written: the hub says which, why and what to do, and has
// changed nothing, so that it goes on once the folder is well.
func TestDataFolderCannotBeWritten(t *testing.T) {
	h := newHub(t)
	h.start()
	h.end(syscall.SIGTERM)
	before := contents(t, h.data)
	// Root may write where the mode says no, unless it has no capabilities.
	var as []string
	if os.Getuid() == 0 {
		as = []string{"setpriv", "--bounding-set=-all", "--inh-caps=-all"}
	}
	mode(t, h.data, 0o500, 0o400)
	refused(t, h, as, 77, "permission denied", "must own")
	mode(t, h.data, 0o700, 0o600)

	mount := `mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"`
	inside := []string{"unshare", "-rm", "sh", "-c", mount}
	if err := exec.Command("unshare", "-rm", "sh", "-c", mount, h.data, "true").Run(); err != nil {
		t.Logf("NOT TESTED: a read-only file system: this system gives no name space to mount one in: %v", err)
	} else {
		refused(t, h, append(inside, h.data), 73, "read-only", "writable")
		parent := filepath.Dir(h.data)
		data := h.data
		h.data = filepath.Join(parent, "fresh") // cannot even be made
		refused(t, h, append(inside, parent), 73, "read-only", "writable")
		h.data = data
	}
	if after := contents(t, h.data); after != before {
		t.Errorf("the folder was changed:\n%s\n%s", before, after)
	}
	h.start()
}

// refused holds the hub's process to an exit code and to what it prints.
func refused(t *testing.T, h *hub, as []string, code int, problem, hint string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	args := append(as, peer.Sealmq(t), "hub", "--mqtt", h.mqtt, "--data", h.data)
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code {
		t.Errorf("ended with %v, want exit code %d:\n%s", err, code, &stderr)
	}
	for _, want := range []string{"sealmq: error: ", "sealmq: hint: ", h.data, problem, hint} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("says nothing of %q:\n%s", want, &stderr)
		}
	}
}

func mode(t *testing.T, dir string, folders, files fs.FileMode) {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			return os.Chmod(path, 0o700) // so that it can be walked
		}
		all = append(all, path)
		return err
	})
	for _, path := range all {
		err = errors.Join(err, os.Chmod(path, files))
	}
	err = errors.Join(err, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			return os.Chmod(path, folders)
		}
		return err
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// contents is every file below dir with what is in it.
func contents(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		b.WriteString(path + ": " + string(data) + "\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
