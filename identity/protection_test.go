package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEncryptedVault(t *testing.T) {
	dir := t.TempDir()
	keyPath := filepath.Join(dir, "key")
	if err := CreateKeyFile(keyPath); err != nil {
		t.Fatal(err)
	}
	otherPath := filepath.Join(dir, "other")
	if err := CreateKeyFile(otherPath); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ right, wrong, kind Protection }{
		"passphrase": {cheap(t, "right"), cheap(t, "wrong"), must(KeyFile(keyPath))},
		"key file":   {must(KeyFile(keyPath)), must(KeyFile(otherPath)), cheap(t, "right")},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVault(t, WithProtection(tt.right))
			p := must(v.Create("alice"))
			if !must(v.Encrypted("alice")) {
				t.Fatal("not encrypted")
			}
			body := must(os.ReadFile(v.Path("alice")))
			block, _ := pem.Decode(body)
			if bytes.Contains(block.Bytes, p.p.state.signer.(*softSigner).seed()) || bytes.Contains(block.Bytes, p.p.state.secret()) {
				t.Error("keys in clear")
			}
			// Who it is can be read without.
			bare := must(OpenVault(v.Dir()))
			if must(bare.Identity("alice")).Identifier() != p.Identifier() {
				t.Error("another identity")
			}
			for what, o := range map[string]struct {
				p   Protection
				err error
			}{
				"none": {Protection{}, ErrSealed}, "wrong": {tt.wrong, ErrPassphrase}, "other kind": {tt.kind, ErrPassphrase}, "right": {tt.right, nil},
			} {
				q := must(OpenVault(v.Dir(), WithProtection(o.p)))
				if _, err := q.Load("alice"); !errors.Is(err, o.err) {
					t.Errorf("%s: %v", what, err)
				}
				if _, err := q.Export("alice", Protection{}); !errors.Is(err, o.err) {
					t.Errorf("export with %s: %v", what, err)
				}
			}
			// It stays encrypted when it is written again.
			if err := p.Rotate(); err != nil {
				t.Fatal(err)
			}
			if !must(v.Encrypted("alice")) || len(must(v.Load("alice")).Identity().changes) != 2 {
				t.Error("rotation took the encryption away")
			}
			// Every bit counts.
			block, _ = pem.Decode(must(os.ReadFile(v.Path("alice"))))
			o := must(collect(nil))
			for n := range block.Bytes {
				b := bytes.Clone(block.Bytes)
				b[n] ^= 0x20
				file := pem.EncodeToMemory(&pem.Block{Type: block.Type, Headers: block.Headers, Bytes: b})
				if _, _, err := unmarshalState(file, tt.right, &o); err == nil {
					t.Fatalf("flipped at %d: accepted", n)
				}
			}
		})
	}
}

func TestProtect(t *testing.T) {
	v := newVault(t)
	p := must(v.Create("alice"))
	a, b := cheap(t, "a"), cheap(t, "b")
	secret := p.Secret("x")
	load := func(with Protection) error {
		q, err := must(OpenVault(v.Dir(), WithProtection(with))).Load("alice")
		if err == nil && q.Secret("x") != secret {
			t.Error("another secret")
		}
		return err
	}
	if err := v.Protect("alice", a); err != nil {
		t.Fatal(err)
	}
	if err := load(a); err != nil {
		t.Error(err)
	}
	if err := load(Protection{}); !errors.Is(err, ErrSealed) {
		t.Error(err)
	}
	if err := v.Protect("alice", b); !errors.Is(err, ErrSealed) {
		t.Errorf("changed without the old passphrase: %v", err)
	}
	va := must(OpenVault(v.Dir(), WithProtection(a)))
	if err := va.Protect("alice", b); err != nil {
		t.Fatal(err)
	}
	if err := load(a); !errors.Is(err, ErrPassphrase) {
		t.Error(err)
	}
	if err := load(b); err != nil {
		t.Error(err)
	}
	// A crash on the way leaves the old passphrase or the new one.
	for stop := range 6 {
		vb := must(OpenVault(v.Dir(), WithProtection(b)))
		steps := 0
		vb.disk.fault = func(string) error {
			if steps++; steps > stop {
				return errCrash
			}
			return nil
		}
		_ = vb.Protect("alice", a)
		if ea, eb := load(a), load(b); (ea == nil) == (eb == nil) {
			t.Fatalf("after step %d: %v, %v", stop, ea, eb)
		}
		if load(a) == nil {
			if err := va.Protect("alice", b); err != nil {
				t.Fatal(err)
			}
		}
	}
	// And bare again.
	if err := must(OpenVault(v.Dir(), WithProtection(b))).Protect("alice", Protection{}); err != nil {
		t.Fatal(err)
	}
	if err := load(Protection{}); err != nil {
		t.Error(err)
	}
	if err := v.Protect("nobody", a); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

func TestBackup(t *testing.T) {
	v := newVault(t, WithProtection(cheap(t, "vault")))
	p := must(v.Create("alice"))
	backupKey := cheap(t, "backup")
	backup := must(v.Export("alice", backupKey))
	if bytes.Contains(backup, []byte(base64.StdEncoding.EncodeToString(p.p.state.signer.(*softSigner).seed()[:6]))) {
		t.Error("keys in clear")
	}
	w := newVault(t)
	if _, err := w.Import("restored", backup, Protection{}); !errors.Is(err, ErrSealed) {
		t.Error(err)
	}
	if _, err := w.Import("restored", backup, cheap(t, "vault")); !errors.Is(err, ErrPassphrase) {
		t.Error(err)
	}
	q := must(w.Import("restored", backup, backupKey))
	if q.Identifier() != p.Identifier() || q.Secret("x") != p.Secret("x") || must(w.Encrypted("restored")) {
		t.Error("restored another one")
	}
	if err := q.Rotate(); err != nil {
		t.Error(err)
	}
	// A bare backup is the vault's own form: it can be copied in.
	bare := must(v.Export("alice", Protection{}))
	if err := os.WriteFile(w.Path("copied"), bare, 0o600); err != nil {
		t.Fatal(err)
	}
	if must(w.Load("copied")).Identifier() != p.Identifier() {
		t.Error("copied another one")
	}
	if _, err := w.Import("x", []byte("nonsense"), Protection{}); !errors.Is(err, ErrFile) {
		t.Error(err)
	}
}

func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	if err := CreateKeyFile(path); err != nil {
		t.Fatal(err)
	}
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 || info.Size() != 65 {
		t.Error(info.Mode(), info.Size())
	}
	before := must(os.ReadFile(path))
	if err := CreateKeyFile(path); !errors.Is(err, os.ErrExist) || !bytes.Equal(before, must(os.ReadFile(path))) {
		t.Errorf("overwritten: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	var perm *PermissionError
	if _, err := KeyFile(path); !errors.As(err, &perm) {
		t.Error(err)
	}
	for name, size := range map[string]int{"short": 31, "long": 4097} {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := KeyFile(p); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if _, err := KeyFile(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if names := dirNames(t, dir); strings.Contains(names, tempPrefix) {
		t.Errorf("left behind: %s", names)
	}
	if _, err := Passphrase(nil); !errors.Is(err, ErrNoPassphrase) {
		t.Error("empty passphrase accepted")
	}
}

func TestPassphraseFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	open := errors.New("others can read it")
	for _, c := range []struct {
		text string
		mode os.FileMode
		want error
	}{
		{"right\n", 0o600, nil},
		{"\ufeffright\r\nand a comment\n", 0o400, nil},
		{"right", 0o600, nil},
		{"right ", 0o600, ErrPassphrase},
		{"\nright", 0o600, ErrNoPassphrase},
		{strings.Repeat("x", 4097), 0o600, ErrFile},
		{"right\n", 0o640, open},
		{"right\n", 0o604, open},
		{"right\n", 0o602, open},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		p, err := PassphraseFile(path)
		if err == nil {
			var sealed *sealedKeys
			if sealed, err = cheap(t, "right").p.seal([]byte("keys"), nil, nil); err != nil {
				t.Fatal(err)
			}
			_, err = p.p.open(sealed, nil)
		}
		if perm := (*PermissionError)(nil); errors.As(err, &perm) {
			err = open
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%.10q, mode %o: %v, want %v", c.text, c.mode, err, c.want)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := PassphraseFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestCostIsBounded: a hostile file cannot make us spend without end.
func TestCostIsBounded(t *testing.T) {
	p := cheap(t, "x")
	s := must(p.p.seal([]byte("keys"), nil, nil))
	for _, c := range []argonCost{{}, {1, 64, 0}, {0, 64, 1}, {17, 64, 1}, {1, 7, 1}, {1, 1<<20 + 1, 1}, {1, 64, 17}, {1, 64, 16}, {1<<32 - 1, 1<<32 - 1, 255}} {
		bad := *s
		bad.Cost = c
		if _, err := p.p.open(&bad, nil); !errors.Is(err, ErrMalformed) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if !defaultCost.allowed() {
		t.Error("the default is not allowed")
	}
	for _, f := range []func(*sealedKeys){func(s *sealedKeys) { s.Salt = nil }, func(s *sealedKeys) { s.Nonce = s.Nonce[1:] }} {
		bad := *s
		f(&bad)
		if _, err := p.p.open(&bad, nil); !errors.Is(err, ErrMalformed) {
			t.Error(err)
		}
	}
}
