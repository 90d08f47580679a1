package store

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/route"
)

// counter counts the packets that were acknowledged.
type counter struct{ n atomic.Int64 }

func (c *counter) Acked(uint64) { c.n.Add(1) }

// envDisk says that the test binary runs a test that needs a process of its own.
const envDisk = "SEALMQ_TEST_DISK"

// inChild runs the test with that name in a process of its own, which the command as
// starts and which finds told in envDisk, and returns what it said.
func inChild(t *testing.T, name, told string, as ...string) (out string, err error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	as = append(as, exe, "-test.run=^"+name+"$", "-test.v")
	cmd := exec.CommandContext(t.Context(), as[0], as[1:]...)
	cmd.Env = append(os.Environ(), envDisk+"="+told, "GORACE=atexit_sleep_ms=0")
	text, err := cmd.CombinedOutput()
	return string(text), err
}

// smallDisk mounts a disk of 4 MiB, where this process may, or else in a name space of its
// own; there the test runs once more. It returns "" where that is to be the end of it.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m")
	if err == nil {
		t.Cleanup(func() {
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	if os.Getenv(envDisk) != "" {
		t.Fatal(err)
	}
	out, cerr := inChild(t, t.Name(), "mount", "unshare", "-rm")
	switch {
	case cerr == nil:
	case strings.Contains(out, "=== RUN"):
		t.Fatalf("%v\n%s", cerr, out)
	default:
		t.Skipf("NOT TESTED on a real disk, since no small one can be mounted: %v; %v\n%s", err, cerr, out)
	}
	return ""
}

// A disk that the store has filled comes free by itself once queues are emptied,
// although an old name and an old frame pin the oldest segment. Nothing that was
// acknowledged is lost. package seglog tests the same with a disk of its own making.
func TestFullDiskComesFree(t *testing.T) {
	dir := smallDisk(t)
	if dir == "" {
		return
	}
	s, _ := openStore(t, dir, Options{Mode: SyncInterval, Reserve: 1 << 20})
	defer func() { _ = s.Close() }()
	quiet, busy := box(t, s, "quiet"), box(t, s, "busy")
	var acked counter
	sent := int64(0)
	put := func(b bridge.Outbox, frame string) {
		t.Helper()
		sent++
		p := bridge.RoutedPacket(route.Stored, 7, true, []byte("hop"), []byte(frame))
		if _, _, err := b.Append(p, bridge.NewTicket(&acked, 0)); err != nil {
			t.Fatal(err)
		}
	}
	put(quiet, "still wanted")
	for range 3 {
		for i := 0; s.Refusal() == nil; i++ {
			put(busy, fmt.Sprintf("%06d%4096d", i, i))
			// As a bridge would hold back who sends.
			await(t, s, "nothing is stored", func() bool { return acked.n.Load() > sent-16 || s.Refusal() != nil })
		}
		if err := s.Refusal(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if acked.n.Load() == sent {
			t.Error("what the full disk refused is acknowledged")
		}
		busy.Release(busy.Next() - 1) // the device comes back and takes all
		await(t, s, "the disk stays full", func() bool { return acked.n.Load() == sent && s.Refusal() == nil })
	}
	put(busy, "after")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, _ = openStore(t, dir, Options{Mode: SyncInterval, Reserve: 1 << 20})
	for name, want := range map[string]string{"quiet": "still wanted", "busy": "after"} {
		if _, got := content(box(t, s, name)); !slices.Equal(got, []string{want}) {
			t.Errorf("%s holds %d frames", name, len(got))
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestWriteRefusedInTheMiddle: a disk that takes a part of a write and no more withholds
// acknowledgements, goes on once it takes all, and after a kill in between nothing is
// missing that was acknowledged. The process may not make files longer than a limit, for
// which no rights are needed.
func TestWriteRefusedInTheMiddle(t *testing.T) {
	for name, mode := range map[string]Mode{"always": SyncAlways, "interval": SyncInterval} {
		if told := os.Getenv(envDisk); told != "" {
			if dir, ok := strings.CutPrefix(told, name+" "); ok {
				refuseInTheMiddle(t, dir, mode)
			}
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "store")
			out, err := inChild(t, "TestWriteRefusedInTheMiddle", name+" "+dir)
			_, rest, ok := strings.Cut(out, "killed: ")
			var acked, appended int
			if _, serr := fmt.Sscanf(rest, "%d of %d", &acked, &appended); !ok || serr != nil {
				t.Fatalf("%v, %v\n%s", serr, err, out)
			}
			s, _ := openStore(t, dir, Options{Mode: mode, SegmentSize: 64 << 10})
			defer s.Close()
			_, got := content(box(t, s, "bob"))
			if len(got) < acked || len(got) >= appended {
				t.Errorf("%d frames are left; %d of %d were acknowledged", len(got), acked, appended)
			}
			for i, f := range got {
				if n := fmt.Sprintf("%06d", i); f[:6] != n {
					t.Fatalf("frame %s is number %s", n, f[:6])
				}
			}
		})
	}
}

// refuseInTheMiddle says what was acknowledged, and ends as if it was killed.
func refuseInTheMiddle(t *testing.T, dir string, mode Mode) {
	limit := func(size uint64) {
		var l syscall.Rlimit
		err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &l)
		if l.Cur = l.Max; size > 0 {
			l.Cur = size
		}
		if err := errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l)); err != nil {
			t.Fatal(err)
		}
	}
	s, _ := openStore(t, dir, Options{Mode: mode, SegmentSize: 64 << 10})
	defer s.Close()
	b := box(t, s, "bob")
	var acked counter
	sent := 0
	put := func(n int) {
		t.Helper()
		for range n {
			p := bridge.RoutedPacket(route.Stored, 7, false, nil, fmt.Appendf(nil, "%06d%1000d", sent, sent))
			sent++
			if _, _, err := b.Append(p, bridge.NewTicket(&acked, 0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	all := func() bool { return int(acked.n.Load()) == sent }
	limit(20_000) // within a segment, and within a record
	for s.Refusal() == nil {
		put(1)
		await(t, s, "nothing is stored", func() bool { return all() || s.Refusal() != nil })
	}
	if err := s.Refusal(); !errors.Is(err, syscall.EFBIG) || all() || sent < 15 || sent > 22 {
		t.Fatalf("%d of %d are acknowledged: %v", acked.n.Load(), sent, err)
	}
	put(100) // beyond the segment's end
	limit(0)
	await(t, s, "it takes writes again", func() bool { return all() && s.Refusal() == nil })
	limit(10_000)
	put(100)
	await(t, s, "the disk refuses", s.Failing)
	if all() {
		t.Fatal("what was refused is acknowledged")
	}
	fmt.Printf("killed: %d of %d\n", acked.n.Load(), sent)
	os.Exit(1)
}
