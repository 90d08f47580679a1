package restart

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/integration/internal/peer"
	"github.com/sealmq/sealmq/route"
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

	data := h.data
	t.Run("read-only file system", func(t *testing.T) {
		inside := func(dir string) []string {
			return []string{"unshare", "-rm", "sh", "-c", `mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"`, dir}
		}
		if err := command(inside(h.data), "true").Run(); err == nil {
			refused(t, h, inside(h.data), 73, "read-only", "writable")
			parent := filepath.Dir(h.data)
			h.data = filepath.Join(parent, "fresh") // cannot even be made
			refused(t, h, inside(parent), 73, "read-only", "writable")
			return
		} else if h.data = readOnlyMount(); h.data == "" {
			peer.Missing(t, "a read-only file system", "let the tests mount one in a name space of their own: "+err.Error())
		}
		refused(t, h, nil, 73, "read-only", "writable")
	})
	h.data = data
	if after := contents(t, h.data); after != before {
		t.Errorf("the folder was changed:\n%s\n%s", before, after)
	}
	h.start()
}

// command is a command that others run.
func command(as []string, args ...string) *exec.Cmd {
	args = append(as, args...)
	return exec.Command(args[0], args[1:]...)
}

// readOnlyMount is a folder that cannot be made in a read-only file system of this machine,
// such as /sys in a container; empty where there is none.
func readOnlyMount() string {
	mounts, _ := os.ReadFile("/proc/self/mounts") // there are none on other systems
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		dir := filepath.Join(f[1], "sealmq-test")
		if slices.Contains(strings.Split(f[3], ","), "ro") && errors.Is(os.Mkdir(dir, 0o700), syscall.EROFS) {
			return dir
		}
	}
	return ""
}

// TestFullDiskAtStart: a hub that finds no room for a store says so, and what to do, and
// starts once there is. One that has a store starts without any, gives out what is in it,
// withholds acknowledgements, and goes on as soon as there is room.
func TestFullDiskAtStart(t *testing.T) {
	// No file may grow, or none beyond its first bytes: room for the identity, but for
	// nothing else.
	limit := func(blocks int) []string {
		return []string{"sh", "-c", fmt.Sprintf(`ulimit -S -f %d && exec "$@"`, blocks), "sh"}
	}
	t.Run("no store", func(t *testing.T) {
		h := newHub(t)
		refused(t, h, limit(0), 74, "file too large", "ulimit -f")
		h.start()
	})
	t.Run("no store, no space", func(t *testing.T) {
		h := newHub(t)
		if err := os.Mkdir(h.data, 0o700); err != nil {
			t.Fatal(err)
		}
		// The file system has one page, which is taken.
		inside := []string{"unshare", "-rm", "sh", "-c",
			`mount -t tmpfs -o size=4k,mode=700 none "$0" && echo >"$0"/full && exec "$@"`, h.data}
		if err := command(inside, "true").Run(); err != nil {
			peer.Missing(t, "a small disk", "let the tests mount one in a name space of their own: "+err.Error())
		}
		refused(t, h, inside, 74, "no space left", "free some space")
	})
	t.Run("with a store", func(t *testing.T) {
		h := newHub(t)
		h.start()
		bobID, carolID, alice := newID(t), newID(t), newID(t)
		listen(t, h, bobID).Disconnect(0)
		listen(t, h, carolID).Disconnect(0)
		const n = 20
		publish := func(c paho.Client, to string) paho.Token {
			f := route.Frame{Onward: route.To(h.address(to), "app"), Payload: make([]byte, 2000)}
			return c.Publish("sealmq/"+alice+"/out", 1, false, route.AppendFrame(nil, &f))
		}
		pub := connect(h, alice, func() {})
		for range n {
			if token := publish(pub, bobID); !token.WaitTimeout(patience) || token.Error() != nil {
				t.Fatal("not acknowledged")
			}
		}
		pub.Disconnect(0)
		h.end(syscall.SIGKILL)

		h.as = limit(0)
		h.start()
		h.as = nil
		pub = connect(h, alice, func() {})
		defer pub.Disconnect(0)
		taken, token := publish(pub, bobID), publish(pub, carolID)
		h.until("the disk refuses", func() (bool, string) {
			s := h.status().Store
			return s.Refused != "", fmt.Sprintf("%+v", s)
		})
		bob := listen(t, h, bobID)
		h.until("what is stored is delivered", func() (bool, string) {
			c := h.counters()
			return c["sealmq_frames_delivered_total"] > n, fmt.Sprint(c)
		})
		if !taken.WaitTimeout(patience) || taken.Error() != nil {
			t.Fatal("what has been delivered is not acknowledged")
		}
		select {
		case <-token.Done():
			t.Fatal("acknowledged what is not stored")
		default:
		}
		h.sums()
		bob.Disconnect(0)
		// What it could not store it says at its end, too.
		if err := h.process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		var exit *exec.ExitError
		if err := h.process.Wait(ctx); !errors.As(err, &exit) || exit.ExitCode() != 74 || !strings.Contains(h.process.Stderr(), "never acknowledged") {
			t.Errorf("ended with %v:\n%s", err, h.process.Stderr())
		}
		h.start()
		pub = connect(h, alice, func() {})
		defer pub.Disconnect(0)
		if token := publish(pub, bobID); !token.WaitTimeout(patience) || token.Error() != nil {
			t.Fatal("not acknowledged although there is room")
		}
		h.sums()
	})
}

// TestStoreOfAnotherHub: what waits in a queue names addresses of the hub's key, and devices
// know the hub by its identity. So a hub whose keys are not those that its store was made with
// is refused, with what is missing; it makes no others, and goes on once they are back.
func TestStoreOfAnotherHub(t *testing.T) {
	h := newHub(t)
	h.start()
	bobID, alice := newID(t), newID(t)
	listen(t, h, bobID).Disconnect(0)
	pub := connect(h, alice, func() {})
	f := route.Frame{Onward: route.To(h.address(bobID), "app"), Payload: make([]byte, 200)}
	token := pub.Publish("sealmq/"+alice+"/out", 1, false, route.AppendFrame(nil, &f))
	if !token.WaitTimeout(patience) || token.Error() != nil {
		t.Fatal("not acknowledged")
	}
	pub.Disconnect(0)
	h.end(syscall.SIGKILL)

	folder := filepath.Join(h.data, "identity")
	file := filepath.Join(folder, "hub.identity")
	away := folder + ".away"
	if err := os.Rename(folder, away); err != nil {
		t.Fatal(err)
	}
	refused(t, h, nil, 78, "hub.identity is missing", "bring back "+file)
	if _, err := os.Stat(folder); err == nil {
		t.Error("another identity was made in its place")
	}
	v, err := identity.OpenVault(folder)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Create("hub"); err != nil {
		t.Fatal(err)
	}
	refused(t, h, nil, 78, "another identity", "bring back "+file)

	key := filepath.Join(h.data, "address.key")
	if err := errors.Join(os.RemoveAll(folder), os.Rename(away, folder),
		os.WriteFile(key, []byte(strings.Repeat("7f", 32)), 0o600)); err != nil {
		t.Fatal(err)
	}
	refused(t, h, nil, 78, "another address key", "bring back")

	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	h.start()
	if n := h.counters()["sealmq_frames_queued"]; n != 1 {
		t.Errorf("%v frames are queued", n)
	}
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
