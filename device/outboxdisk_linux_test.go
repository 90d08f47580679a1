package device

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sealmq/sealmq/channel"
)

// envDisk says that the test binary runs a test that changes what the whole process may do.
const envDisk = "SEALMQ_TEST_DISK"

// inChild runs the test once more, in a process of its own that the command as starts, and
// reports there that it is to go on.
func inChild(t *testing.T, as ...string) bool {
	t.Helper()
	if os.Getenv(envDisk) != "" {
		return true
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	as = append(as, exe, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd := exec.CommandContext(t.Context(), as[0], as[1:]...)
	cmd.Env = append(os.Environ(), envDisk+"=1", "GORACE=atexit_sleep_ms=0")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// noCapabilities has a process of root obey modes of files.
func noCapabilities(t *testing.T) []string {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("NOT TESTED as root without setpriv (package util-linux): ", err)
	}
	return []string{setpriv, "--bounding-set=-all", "--inh-caps=-all"}
}

// limitFiles has every write fail, in the middle if need be, that would make a file longer
// than size; 0 lifts that.
func limitFiles(t *testing.T, size uint64) {
	t.Helper()
	var l syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &l)
	if l.Cur = l.Max; size > 0 {
		l.Cur = size
	}
	if err := errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l)); err != nil {
		t.Fatal(err)
	}
}

// diskSim is alice's outbox on disk, and bob.
type diskSim struct {
	*healSim
	no                uint64
	stored, withdrawn []uint64
}

func newDiskSim(t *testing.T) *diskSim {
	s := &diskSim{healSim: newHealSim(t, 2)}
	s.faults, s.stream, s.dials, s.dir = false, false, false, filepath.Join(t.TempDir(), "outbox")
	s.startHub(nil)
	s.start(alice)
	return s
}

// message is the next one, of so many bytes.
func (s *diskSim) message(size int) []byte {
	s.no++
	return append(binary.BigEndian.AppendUint64(nil, s.no), make([]byte, size-8)...)
}

// postUntil posts messages until one is refused, for that reason, when its context ends.
func (s *diskSim) postUntil(refused error, size, most int) {
	s.t.Helper()
	const patience = 5 * time.Second
	for range most {
		begun := time.Now()
		ctx, cancel := context.WithTimeout(s.t.Context(), patience)
		_, err := s.box.Post(ctx, s.message(size))
		cancel()
		if err == nil {
			s.stored = append(s.stored, s.no)
			continue
		}
		s.withdrawn = append(s.withdrawn, s.no)
		s.refusal(err, refused)
		if d := time.Since(begun); d != patience {
			s.t.Errorf("refused after %v", d)
		}
		return
	}
	s.t.Fatalf("%d messages are kept", most)
}

// refusal wants an error to say what waited, and for what.
func (s *diskSim) refusal(err, why error) {
	s.t.Helper()
	if !errors.Is(err, why) || !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "the disk") || !strings.Contains(err.Error(), why.Error()) {
		s.t.Errorf("refused with %v", err)
	}
}

// arrived wants bob to have what is on disk, and nothing that was given up.
func (s *diskSim) arrived(what string) {
	s.t.Helper()
	time.Sleep(time.Minute)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, no := range s.stored {
		if !s.taken[no] {
			s.t.Errorf("%s: message %d is missing", what, no)
		}
	}
	for no := range s.taken {
		if slices.Contains(s.withdrawn, no) {
			s.t.Errorf("%s: message %d came, whose sender was told that it does not", what, no)
		}
	}
}

// TestOutboxOnAFullDisk: a disk that refuses a write, in the middle of it, makes Post and
// Deliver wait, or say so once their context ends. What it has is delivered, the rest of the
// node goes on, and so does the outbox once there is room, in this process and the next.
func TestOutboxOnAFullDisk(t *testing.T) {
	if !inChild(t) {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		const size = 10_000
		s := newDiskSim(t)
		defer s.close()
		limitFiles(t, 64<<10)
		defer limitFiles(t, 0)
		s.postUntil(syscall.EFBIG, size, 10)
		if n := len(s.stored); n != 6 {
			t.Errorf("%d messages are kept", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		s.refusal(s.box.Deliver(ctx, s.message(size)), syscall.EFBIG)
		cancel()
		s.withdrawn = append(s.withdrawn, s.no)
		patient := make(chan error, 1)
		waiting := s.message(size)
		first := s.no
		go func() {
			_, err := s.box.Post(t.Context(), waiting)
			patient <- err
		}()

		// The peer comes. What needs no disk goes on.
		s.start(bob)
		<-s.forwarder
		s.arrived("with a full disk")
		if s.mu.Lock(); s.taken[first] {
			t.Error("a message came that is not on disk")
		}
		s.mu.Unlock()
		node := s.run[alice].node
		ch, err := node.Dial(t.Context(), s.to, channel.TrustIdentifiers(s.names[bob].Identifier()))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(ch.Deliver(t.Context(), "app", s.message(size)), ch.Send(t.Context(), "app", s.message(size)), ch.Flush(t.Context())); err != nil {
			t.Errorf("what needs no disk: %v", err)
		}
		s.stored = append(s.stored, s.no-1, s.no)
		if len(patient) > 0 {
			t.Fatalf("not kept, and not waited for: %v", <-patient)
		}

		limitFiles(t, 0)
		time.Sleep(time.Second)
		synctest.Wait()
		if len(patient) == 0 || <-patient != nil {
			t.Fatal("the disk has room, and the message is not kept")
		}
		s.stored = append(s.stored, first)
		s.arrived("with room again")

		// Full once more, and the process ends, and starts, meanwhile.
		limitFiles(t, 1)
		s.postUntil(syscall.EFBIG, size, 1)
		go func() {
			_, err := s.box.Post(context.WithoutCancel(t.Context()), s.message(size))
			patient <- err
		}()
		synctest.Wait()
		s.withdrawn = append(s.withdrawn, s.no)
		s.kill(alice)
		if err := <-patient; err == nil {
			t.Error("kept by a disk that is full")
		}
		s.start(alice)
		s.arrived("started with a full disk")
		s.postUntil(syscall.EFBIG, size, 1)
		limitFiles(t, 0)
		if _, err := s.box.Post(t.Context(), s.message(size)); err != nil {
			t.Fatal(err)
		}
		s.stored = append(s.stored, s.no)
		s.arrived("in the next process")
		if n := s.pending(); n != 0 {
			t.Errorf("%d messages wait", n)
		}
	})
}

// TestOutboxInAReadOnlyFolder: one that cannot be opened is an error of Connect that names
// it; one that becomes read-only makes Post wait once another file is needed.
func TestOutboxInAReadOnlyFolder(t *testing.T) {
	if !inChild(t, noCapabilities(t)...) {
		return
	}
	outboxSegment = 256 << 10
	synctest.Test(t, func(t *testing.T) {
		s := newDiskSim(t)
		defer s.close()
		mode := func(m fs.FileMode) {
			t.Helper()
			if err := os.Chmod(s.dir, m); err != nil {
				t.Fatal(err)
			}
		}
		mode(0o500)
		defer mode(0o700)
		const size = 50_000
		s.postUntil(syscall.EACCES, size, int(outboxSegment/size+1))
		s.start(bob)
		<-s.forwarder
		s.arrived("in a folder that is read-only")
		mode(0o700)
		if _, err := s.box.Post(t.Context(), s.message(size)); err != nil {
			t.Fatal(err)
		}
		s.stored = append(s.stored, s.no)
		s.arrived("in one that is not")

		s.kill(alice)
		parent := t.TempDir()
		file := filepath.Join(parent, "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(parent, 0o500); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.Chmod(parent, 0o700) }()
		for _, dir := range []string{filepath.Join(parent, "new"), filepath.Join(file, "below")} {
			_, _, err := openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
			if err == nil || !errors.Is(err, fs.ErrPermission) && !errors.Is(err, syscall.ENOTDIR) || !strings.Contains(err.Error(), parent) {
				t.Errorf("%s: %v", dir, err)
			}
		}
		// One that was used before: what is in it stays.
		files := segments(t, s.dir)
		for _, f := range files {
			if err := os.Chmod(f, 0o400); err != nil {
				t.Fatal(err)
			}
		}
		mode(0o500)
		_, _, err := openOutboxStore(s.dir, s.names[alice], slog.New(slog.DiscardHandler))
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), s.dir) {
			t.Errorf("a folder that is read-only: %v", err)
		}
		mode(0o700)
		for _, f := range files {
			if err := os.Chmod(f, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s.start(alice)
		s.arrived("in the next process")
	})
}
