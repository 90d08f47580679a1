package device

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

var storeTo = Destination{Route: route.To("FWD_0123456789abcdef", "listener"), Peer: identity.Identifier{7}}

func openStore(t *testing.T, dir string) (*outboxStore, []*leftOutbox) {
	t.Helper()
	s, left, err := openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s, left
}

// addStored keeps a message and returns when it is on disk.
func addStored(t *testing.T, b *storedOutbox, count uint64, payload []byte) {
	t.Helper()
	kept := make(chan struct{})
	if err := b.add(count, payload, func() { close(kept) }); err != nil {
		t.Fatal(err)
	}
	<-kept
}

func pending(l *leftOutbox) string {
	var out []string
	for _, p := range l.restored.Pending {
		out = append(out, fmt.Sprintf("%d:%s:%v", p.Count, p.Payload, p.Void))
	}
	return fmt.Sprint(out, l.restored.Next, l.restored.Mark)
}

func segments(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	return files
}

func TestOutboxStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, left := openStore(t, dir)
	if len(left) != 0 {
		t.Fatalf("a new folder holds %v", left)
	}
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.create(storeTo, "other")
	if err != nil {
		t.Fatal(err)
	}
	for i, text := range []string{"very secret one", "two", "three", "four"} {
		addStored(t, b, uint64(i+1), []byte(text))
	}
	addStored(t, other, 1, []byte("to be forgotten"))
	b.attached([16]byte{1}, 0)
	b.attached([16]byte{2}, 2)
	b.acked([]uint64{1, 3})
	b.void(4)
	if err := other.forget(); err != nil {
		t.Fatal(err)
	}
	other.void(1)
	other.acked([]uint64{1})
	id := b.id
	s.close()

	for _, f := range segments(t, dir) {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte("secret")) || bytes.Contains(data, []byte("FWD_")) {
			t.Error("the file shows what it holds")
		}
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	for range 2 { // reading changes nothing
		s, left = openStore(t, dir)
		if len(left) != 1 || left[0].address != "app" || left[0].stored.id != id ||
			left[0].to.Peer != storeTo.Peer || !left[0].to.Route.Equal(storeTo.Route) {
			t.Fatalf("found %+v", left)
		}
		if got := pending(left[0]); got != "[2:two:false 4::true] 5 2" {
			t.Errorf("pending %s", got)
		}
		if r := left[0].restored; !r.HasEpoch || r.Epoch != [16]byte{2} {
			t.Errorf("epoch %v", r.Epoch)
		}
		s.close()
	}
}

// TestOutboxStoreWithoutItsFirstFile: that a file is missing is noticed also when it is the
// oldest; what is in the others was posted, and is not dropped without a word.
func TestOutboxStoreWithoutItsFirstFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, _ := openStore(t, dir)
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 1<<20)
	for count := uint64(1); count <= 20; count++ {
		addStored(t, b, count, payload)
	}
	s.close()
	files := segments(t, dir)
	if len(files) < 2 {
		t.Fatal(files)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	after, left, err := openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
	if err == nil {
		defer after.close()
	}
	if !errors.Is(err, ErrOutboxDamaged) {
		t.Errorf("opened with %d outboxes, though %d files full of posted messages are there: %v", len(left), len(files)-1, err)
	}
}

// A crash can leave the last record half written; everything before it counts.
func TestOutboxStoreTornEnd(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, _ := openStore(t, dir)
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	addStored(t, b, 1, []byte("one"))
	addStored(t, b, 2, []byte("two"))
	f := segments(t, dir)[0]
	data, err := os.ReadFile(f) // as a crash leaves it
	if err != nil {
		t.Fatal(err)
	}
	s.close()
	for cut := 1; cut < 40; cut++ {
		if err := os.WriteFile(f, data[:len(data)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s, left := openStore(t, dir)
		if got := pending(left[0]); got != "[1:one:false] 2 0" {
			t.Fatalf("cut by %d: %s", cut, got)
		}
		s.close()
	}
}

// Whoever changes a file, checksums and all, is found out by the seal.
func TestOutboxStoreRefusesWhatWasChanged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, _ := openStore(t, dir)
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	addStored(t, b, 1, []byte("one"))
	s.mu.Lock()
	forged := s.seal(recordAdd, b.encodeAdd(2, &storedAdd{payload: []byte("two")}))
	forged[len(forged)-1] ^= 1
	if _, err := s.writeLocked(recordAdd, forged, false, nil); err != nil {
		t.Fatal(err)
	}
	s.mu.Unlock()
	s.close()
	_, _, err = openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrOutboxDamaged) {
		t.Errorf("forged record: %v", err)
	}
	// And nothing stays locked after a refusal.
	_, _, err = openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrOutboxDamaged) {
		t.Errorf("second try: %v", err)
	}
}

// What is damaged where it had been synced is refused, with what to do: not with the advice
// to put the folder back from a backup, which would end in ErrOutboxBehind.
func TestOutboxDamagedSaysWhatToDo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, _ := openStore(t, dir)
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	addStored(t, b, 1, []byte("one"))
	addStored(t, b, 2, []byte("two"))
	s.close()
	f := segments(t, dir)[0]
	data, err := os.ReadFile(f)
	if err != nil {
		t.Fatal(err)
	}
	data[100] ^= 1
	if err := os.WriteFile(f, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err = openOutboxStore(dir, testIdentity(), slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrOutboxDamaged) || strings.Contains(err.Error(), "backup") ||
		!strings.Contains(err.Error(), f) || !strings.Contains(err.Error(), "move "+dir+" away") {
		t.Error(err)
	}
}

// Old files go although some of what they hold is still needed: that moves on, and
// counts are not given twice.
func TestOutboxStoreMovesWhatLives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	s, _ := openStore(t, dir)
	b, err := s.create(storeTo, "app")
	if err != nil {
		t.Fatal(err)
	}
	b.attached([16]byte{9}, 1)
	addStored(t, b, 1, []byte("sleeper"))
	payload := make([]byte, 1<<20)
	const last = 100 // MiB, of which one message lives
	for count := uint64(2); count <= last; count++ {
		addStored(t, b, count, payload)
		b.acked([]uint64{count})
	}
	s.close()
	if first := filepath.Base(segments(t, dir)[0]); first == "0000000000000001.seg" {
		t.Errorf("the first file is still there: %v", segments(t, dir))
	}
	s, left := openStore(t, dir)
	defer s.close()
	if len(left) != 1 || pending(left[0]) != fmt.Sprintf("[1:sleeper:false] %d 1", last+1) || left[0].restored.Epoch != [16]byte{9} {
		t.Errorf("found %v", pending(left[0]))
	}
	if _, _, err := openOutboxStore(dir, newTestIdentity(t), slog.New(slog.DiscardHandler)); !errors.Is(err, ErrOutboxInUse) {
		t.Errorf("second process: %v", err)
	}
}

func newTestIdentity(t *testing.T) *identity.Private {
	t.Helper()
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	return p
}
