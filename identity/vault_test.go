package identity

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func newVault(t testing.TB, opts ...VaultOption) *Vault {
	t.Helper()
	return must(OpenVault(privateDir(t), opts...))
}

// cheap makes Argon2id affordable in tests.
func cheap(t testing.TB, passphrase string) Protection {
	t.Helper()
	p := must(Passphrase([]byte(passphrase)))
	p.p.cost = argonCost{1, 64, 1}
	return p
}

func TestVault(t *testing.T) {
	v := newVault(t)
	p, err := v.Create("alice")
	if err != nil {
		t.Fatal(err)
	}
	info := must(os.Stat(v.Path("alice")))
	if info.Mode().Perm() != 0o600 || must(os.Stat(v.Dir())).Mode().Perm() != 0o700 {
		t.Errorf("modes %v, %v", info.Mode(), must(os.Stat(v.Dir())).Mode())
	}
	must(v.Create("bob"))
	if names := must(v.List()); !slices.Equal(names, []string{"alice", "bob"}) {
		t.Error(names)
	}
	q, err := v.Load("alice")
	if err != nil {
		t.Fatal(err)
	}
	if q.Identifier() != p.Identifier() || q.Secret("x") != p.Secret("x") || must(q.ChannelKey()).Public() != must(p.ChannelKey()).Public() {
		t.Error("loaded another one")
	}
	if id := must(v.Identity("alice")); id.Identifier() != p.Identifier() {
		t.Error(id)
	}
	// What is renewed is kept.
	cred := must(InspectCredential(must(p.IssueCredential(p.Identity(), nil, 1, time.Hour))))
	again := must(v.Load("alice"))
	if got := must(InspectCredential(must(again.IssueCredential(p.Identity(), nil, 1, time.Hour)))); got.IssuerKey.SigningKey != cred.IssuerKey.SigningKey {
		t.Error("the credential key was not kept")
	}
	if err := v.Rotate("alice"); err != nil {
		t.Fatal(err)
	}
	if id := must(v.Identity("alice")); len(id.changes) != 2 || id.Identifier() != p.Identifier() {
		t.Error(id.Changes())
	}
	// Others pick the rotation up by themselves, here by asking for the key.
	if k := must(q.ChannelKey()); len(k.Identity().changes) != 2 {
		t.Error("still the old key")
	}
	if err := p.Refresh(); err != nil || len(p.Identity().changes) != 2 {
		t.Error(err)
	}
	if err := v.Remove("bob"); err != nil {
		t.Fatal(err)
	}
	if err := v.Remove("bob"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if names := must(v.List()); !slices.Equal(names, []string{"alice"}) {
		t.Error(names)
	}
}

func TestVaultNames(t *testing.T) {
	v := newVault(t)
	for _, name := range []string{"", ".", "..", ".hidden", "-flag", "a/b", "../x", "a b", "é", "a\x00", strings.Repeat("a", 65)} {
		if _, err := v.Create(name); !errors.Is(err, ErrName) {
			t.Errorf("Create(%q): %v", name, err)
		}
		if _, err := v.Load(name); !errors.Is(err, ErrName) {
			t.Errorf("Load(%q): %v", name, err)
		}
		if err := v.Remove(name); !errors.Is(err, ErrName) {
			t.Errorf("Remove(%q): %v", name, err)
		}
		if _, err := v.Export(name, Protection{}); !errors.Is(err, ErrName) {
			t.Errorf("Export(%q): %v", name, err)
		}
		if err := v.Protect(name, Protection{}); !errors.Is(err, ErrName) {
			t.Errorf("Protect(%q): %v", name, err)
		}
		if _, err := v.Identity(name); !errors.Is(err, ErrName) {
			t.Errorf("Identity(%q): %v", name, err)
		}
	}
	for _, name := range []string{"a", "A-b_c.d", strings.Repeat("a", 64), "_", "a..b"} {
		if _, err := v.Create(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := v.Load("nobody"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "nobody") {
		t.Error(err)
	}
}

func TestVaultNeverOverwrites(t *testing.T) {
	v := newVault(t)
	p := must(v.Create("alice"))
	if _, err := v.Create("alice"); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	backup := must(v.Export("alice", Protection{}))
	if _, err := v.Import("alice", backup, Protection{}); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	if _, err := v.Add("alice", must(Create())); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	// Not even what is no identity.
	if err := os.Mkdir(v.Path("folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere", v.Path("link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"folder", "link"} {
		if _, err := v.Create(name); !errors.Is(err, ErrExists) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if must(v.Load("alice")).Identifier() != p.Identifier() {
		t.Error("overwritten")
	}
	if strings.Contains(dirNames(t, v.Dir()), tempPrefix) {
		t.Error(dirNames(t, v.Dir()))
	}
}

func TestVaultPermissions(t *testing.T) {
	v := newVault(t)
	p := must(v.Create("alice"))
	path := v.Path("alice")
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o644, 0o620, 0o660, 0o666, 0o601, 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := v.Load("alice")
		var perm *PermissionError
		if !errors.As(err, &perm) || perm.Path != path || perm.Mode != mode || perm.Fix != "chmod 600 "+path {
			t.Fatalf("%o: %v", mode, err)
		}
		for _, part := range []string{path, fmt.Sprintf("%04o", mode), "chmod 600 " + path} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%v does not say %q", err, part)
			}
		}
		if _, err := v.Identity("alice"); !errors.As(err, &perm) {
			t.Errorf("%o: public half: %v", mode, err)
		}
		if err := p.Rotate(); !errors.As(err, &perm) {
			t.Errorf("%o: rotating: %v", mode, err)
		}
		if _, err := v.Export("alice", Protection{}); !errors.As(err, &perm) {
			t.Errorf("%o: export: %v", mode, err)
		}
	}
	for _, mode := range []fs.FileMode{0o600, 0o400} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Load("alice"); err != nil {
			t.Errorf("%o: %v", mode, err)
		}
	}
	if err := os.Chmod(v.Dir(), 0o750); err != nil {
		t.Fatal(err)
	}
	var perm *PermissionError
	if _, err := OpenVault(v.Dir()); !errors.As(err, &perm) || perm.Fix != "chmod 700 "+v.Dir() {
		t.Errorf("folder: %v", err)
	}
	if _, err := OpenRegistry(v.Dir(), 0); !errors.As(err, &perm) {
		t.Errorf("folder: %v", err)
	}
	if _, err := OpenVault(path); err == nil {
		t.Error("a file as folder")
	}
	if _, err := OpenVault(""); err == nil {
		t.Error("no folder")
	}
}

func TestVaultOddFiles(t *testing.T) {
	v := newVault(t)
	must(v.Create("real"))
	if err := os.Symlink(v.Path("real"), v.Path("link")); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Load("link"); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Error(err)
	}
	if err := os.Mkdir(v.Path("folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Load("folder"); err == nil || !strings.Contains(err.Error(), "folder") {
		t.Error(err)
	}
	good := must(os.ReadFile(v.Path("real")))
	block, _ := pem.Decode(good)
	other := must(Create()).Identifier().String()
	relabel := func(f func(*pem.Block)) []byte {
		b := &pem.Block{Type: block.Type, Headers: map[string]string{"Identifier": block.Headers["Identifier"]}, Bytes: bytes.Clone(block.Bytes)}
		f(b)
		return pem.EncodeToMemory(b)
	}
	for name, tt := range map[string]struct {
		b   []byte
		err error
	}{
		"empty":        {nil, ErrFile},
		"text":         {[]byte("hello"), ErrFile},
		"large":        {bytes.Repeat([]byte("a"), maxFile+1), nil},
		"two":          {append(bytes.Clone(good), good...), ErrFile},
		"other type":   {relabel(func(b *pem.Block) { b.Type = "PRIVATE KEY" }), ErrFile},
		"says sealed":  {relabel(func(b *pem.Block) { b.Type = pemSealed }), ErrFile},
		"other name":   {relabel(func(b *pem.Block) { b.Headers["Identifier"] = other }), ErrFile},
		"newer":        {relabel(func(b *pem.Block) { b.Bytes[2] = 2 }), ErrNewerFile},
		"version 0":    {relabel(func(b *pem.Block) { b.Bytes[2] = 0 }), ErrFile},
		"not CBOR":     {relabel(func(b *pem.Block) { b.Bytes = []byte{0xff} }), ErrFile},
		"further key":  {relabel(func(b *pem.Block) { b.Bytes[0]++; b.Bytes = append(b.Bytes, 0x09, 0x00) }), ErrFile},
		"bytes behind": {relabel(func(b *pem.Block) { b.Bytes = append(b.Bytes, 0) }), ErrFile},
	} {
		if err := os.WriteFile(v.Path("odd"), tt.b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := v.Load("odd")
		if err == nil || tt.err != nil && !errors.Is(err, tt.err) || !strings.Contains(err.Error(), v.Path("odd")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Every bit counts.
	o := must(collect(nil))
	for n := range block.Bytes {
		b := relabel(func(b *pem.Block) { b.Bytes[n] ^= 0x10 })
		if _, _, err := unmarshalState(b, Protection{}, &o); err == nil {
			t.Fatalf("flipped at %d: accepted", n)
		}
		if _, _, err := unmarshalState(relabel(func(b *pem.Block) { b.Bytes = b.Bytes[:n] }), Protection{}, &o); err == nil {
			t.Fatalf("cut at %d: accepted", n)
		}
	}
	for n := range good[:len(good)-1] { // the last byte is a newline
		if _, _, err := unmarshalState(good[:n], Protection{}, &o); err == nil {
			t.Fatalf("cut at %d: accepted", n)
		}
	}
}

// TestVaultCrash stops writing at each step, as a crash does: afterwards a fresh
// process finds the old or the new state whole, and goes on.
func TestVaultCrash(t *testing.T) {
	for _, sealed := range []bool{false, true} {
		var opts []VaultOption
		if sealed {
			opts = append(opts, WithProtection(cheap(t, "secret")))
		}
		t.Run(fmt.Sprintf("encrypted=%v", sealed), func(t *testing.T) {
			for stop := 0; ; stop++ {
				v := newVault(t, opts...)
				p := must(v.Create("alice"))
				before := p.Identity()
				steps := 0
				v.disk.fault = func(string) error {
					if steps++; steps > stop {
						return errCrash
					}
					return nil
				}
				err := p.Rotate()
				if err != nil && !errors.Is(err, errCrash) {
					t.Fatal(err)
				}
				next := must(OpenVault(v.Dir(), opts...))
				q, loadErr := next.Load("alice")
				if loadErr != nil {
					t.Fatalf("after step %d: %v", stop, loadErr)
				}
				n := len(q.Identity().changes)
				if q.Identifier() != before.Identifier() || n != 1 && n != 2 || err == nil && n != 2 {
					t.Fatalf("after step %d: %d changes, Rotate said %v", stop, n, err)
				}
				// The process that failed holds what is on disk, and both go on.
				v.disk.fault = nil
				if len(p.Identity().changes) != n {
					t.Errorf("after step %d: memory and disk differ", stop)
				}
				if err := q.Rotate(); err != nil {
					t.Fatal(err)
				}
				if k := must(p.ChannelKey()); len(k.Identity().changes) != n+1 {
					t.Errorf("after step %d: does not go on", stop)
				}
				if strings.Contains(dirNames(t, v.Dir()), tempPrefix) {
					t.Errorf("after step %d: keys left behind: %s", stop, dirNames(t, v.Dir()))
				}
				if err == nil {
					if stop < 5 {
						t.Errorf("only %d steps", stop)
					}
					return
				}
			}
		})
	}
}

func TestVaultCrashAtCreate(t *testing.T) {
	for stop := 0; ; stop++ {
		v := newVault(t)
		steps := 0
		v.disk.fault = func(string) error {
			if steps++; steps > stop {
				return errCrash
			}
			return nil
		}
		_, err := v.Create("alice")
		next := must(OpenVault(v.Dir()))
		_, loadErr := next.Load("alice")
		if loadErr != nil && !errors.Is(loadErr, ErrNotFound) {
			t.Fatalf("after step %d: %v", stop, loadErr)
		}
		if loadErr != nil {
			must(next.Create("alice"))
		}
		if strings.Contains(dirNames(t, v.Dir()), tempPrefix) {
			t.Errorf("after step %d: %s", stop, dirNames(t, v.Dir()))
		}
		if err == nil {
			return
		}
	}
}

// TestVaultThatCannotWrite: purpose keys live in memory then, rotation fails.
func TestVaultThatCannotWrite(t *testing.T) {
	clock := newClock()
	v := newVault(t)
	p := must(v.Create("alice", clock.option()))
	boom := errors.New("read-only file system")
	v.disk.fault = func(string) error { return boom }
	clock.advance(PurposeKeyLifetime - time.Hour)
	k := must(p.ChannelKey())
	if _, err := VerifyChannelAttestation(k.Attestation(), k.Identity(), clock.now.Add(2*time.Hour)); err != nil {
		t.Error(err)
	}
	if k != must(p.ChannelKey()) {
		t.Error("a new key for each call")
	}
	proof := must(p.IssueConnectProof(nil, time.Minute))
	if _, err := VerifyConnectProof(proof, p.Identity(), clock.now, 0); err != nil {
		t.Error(err)
	}
	if err := p.Rotate(); !errors.Is(err, boom) || len(p.Identity().changes) != 1 {
		t.Error(err)
	}
	// A file that is gone does not stop a process that has it open.
	if err := v.Remove("alice"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ChannelKey(); err != nil {
		t.Error(err)
	}
	if err := p.Refresh(); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestVaultGoesBack(t *testing.T) {
	v := newVault(t)
	p := must(v.Create("alice"))
	old := must(os.ReadFile(v.Path("alice")))
	if err := p.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(v.Path("alice"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Refresh(); !errors.Is(err, ErrOlder) {
		t.Error(err)
	}
	if len(must(p.ChannelKey()).Identity().changes) != 2 {
		t.Error("went back to a key that peers refuse")
	}
	b := must(newVault(t).Create("x"))
	other := must(b.p.state.marshal(Protection{}, nil))
	if err := os.WriteFile(v.Path("alice"), other, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Refresh(); !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
}

func TestVaultDeviceKeys(t *testing.T) {
	v := newVault(t)
	s := p256Signer(t, bytes.Repeat([]byte{8}, 32))
	x := must(NewX25519Exchanger(bytes.Repeat([]byte{9}, 32)))
	hsm := deviceExchanger{x}
	p := must(v.Create("hsm", WithSigner(s), WithExchanger(hsm)))
	key := must(p.ChannelKey()).Public()
	if key != x.PublicKey() {
		t.Error("another exchanger")
	}
	if _, err := v.Load("hsm"); !errors.Is(err, ErrExternalKey) {
		t.Error(err)
	}
	if _, err := v.Load("hsm", WithSigner(seeded(1))); !errors.Is(err, ErrWrongKey) {
		t.Error(err)
	}
	q := must(v.Load("hsm", WithSigner(s), WithExchanger(hsm)))
	if must(q.ChannelKey()).Public() != key {
		t.Error("another channel key")
	}
	// Without the exchanger a key in memory takes its place.
	if k := must(must(v.Load("hsm", WithSigner(s))).ChannelKey()); k.Public() == key {
		t.Error("whose key is it?")
	}
	// Into another device, and out of it.
	s2 := p256Signer(t, bytes.Repeat([]byte{7}, 32))
	if err := q.Rotate(WithSigner(s2)); err != nil {
		t.Fatal(err)
	}
	if err := q.Rotate(); err != nil {
		t.Fatal(err)
	}
	if got := must(v.Load("hsm")); len(got.Identity().changes) != 3 {
		t.Error("not kept")
	}
	// A backup holds what there is to hold.
	must(v.Create("dev", WithSigner(s)))
	backup := must(v.Export("dev", Protection{}))
	if _, err := newVault(t).Import("dev", backup, Protection{}, WithSigner(s)); err != nil {
		t.Error(err)
	}
}

type deviceExchanger struct{ Exchanger }

func TestVaultAdd(t *testing.T) {
	v := newVault(t)
	p := must(Create())
	q := must(v.Add("p", p))
	if q.Secret("x") != p.Secret("x") || must(v.Load("p")).Identifier() != p.Identifier() {
		t.Error("another one")
	}
	s := p256Signer(t, bytes.Repeat([]byte{8}, 32))
	r := must(v.Add("dev", must(Create(WithSigner(s)))))
	if err := r.Refresh(); err != nil {
		t.Error(err)
	}
	must(v.Load("dev", WithSigner(s)))
}

func TestVaultConcurrently(t *testing.T) {
	v := newVault(t)
	must(v.Create("alice"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p := must(must(OpenVault(v.Dir())).Load("alice"))
			for range 4 {
				if err := p.Rotate(); err != nil {
					t.Error(err)
				}
				k, err := p.ChannelKey()
				if err != nil {
					t.Error(err)
					continue
				}
				if _, err := VerifyChannelAttestation(k.Attestation(), k.Identity(), time.Now()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var created int
	var mu sync.Mutex
	for range 4 {
		wg.Go(func() {
			if _, err := v.Create("once"); err == nil {
				mu.Lock()
				created++
				mu.Unlock()
			} else if !errors.Is(err, ErrExists) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(must(v.Identity("alice")).changes); n != 17 {
		t.Errorf("%d changes, want 17: rotations were lost", n)
	}
	if created != 1 {
		t.Errorf("created %d times", created)
	}
}

const childVault = "SEALMQ_TEST_VAULT"

// TestVaultProcesses lets real processes rotate one identity at the same time.
func TestVaultProcesses(t *testing.T) {
	if dir := os.Getenv(childVault); dir != "" {
		p, err := must(OpenVault(dir)).Load("alice")
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := p.Rotate(); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	v := newVault(t)
	p := must(v.Create("alice"))
	var children []*exec.Cmd
	for range 3 {
		c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVaultProcesses$")
		c.Env = append(os.Environ(), childVault+"="+v.Dir())
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, c)
	}
	for range 3 {
		if err := p.Rotate(); err != nil {
			t.Error(err)
		}
	}
	for _, c := range children {
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	}
	if n := len(must(p.ChannelKey()).Identity().changes); n != 13 {
		t.Errorf("%d changes, want 13", n)
	}
}

func TestVaultLocked(t *testing.T) {
	v := newVault(t)
	unlock := must(lockDir(v.Dir()))
	f := must(os.OpenFile(filepath.Join(v.Dir(), lockName), os.O_RDWR, 0))
	if ok, err := tryLock(f); ok || err != nil {
		t.Errorf("locked twice: %v, %v", ok, err)
	}
	// Opening and reading needs no lock, and leaves another's files alone.
	temp := filepath.Join(v.Dir(), tempPrefix+"1")
	if err := os.WriteFile(temp, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	must(OpenVault(v.Dir()))
	if _, err := os.Stat(temp); err != nil {
		t.Error("removed a file that is being written")
	}
	unlock()
	if ok, err := tryLock(f); !ok || err != nil {
		t.Errorf("not unlocked: %v, %v", ok, err)
	}
	_ = f.Close()
	must(OpenVault(v.Dir()))
	if _, err := os.Stat(temp); err == nil {
		t.Error("a crashed writer's keys are still there")
	}
}
