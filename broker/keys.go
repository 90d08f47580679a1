package broker

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/sealmq/sealmq/identity"
)

// What lies in a data folder.
const (
	identityName   = "hub"
	identityFolder = "identity"
	addressKeyName = "address.key"
	addressKeyLen  = 32
)

// hubIdentity loads the hub's identity from the data folder, or creates it.
// Without a folder it makes one for this process. born says that it is new.
func hubIdentity(data string, logger *slog.Logger) (p *identity.Private, born bool, err error) {
	if data == "" {
		logger.Warn("no data folder: the hub has a new identity at each start, devices that pinned it will refuse it", "option", "data")
		p, err := identity.Create()
		if err != nil {
			return nil, false, fmt.Errorf("broker: create the hub's identity: %w", err)
		}
		return p, true, nil
	}
	v, err := identity.OpenVault(filepath.Join(data, identityFolder))
	if err != nil {
		return nil, false, fmt.Errorf("broker: the hub's identity: %w", err)
	}
	p, err = v.Load(identityName)
	if errors.Is(err, identity.ErrNotFound) {
		born = true
		if p, err = v.Create(identityName); err == nil {
			logger.Info("created the hub's identity", "identifier", p.Identifier().String(), "data", data)
		}
	}
	if err != nil {
		return nil, false, fmt.Errorf("broker: the hub's identity: %w", err)
	}
	return p, born, nil
}

// openData checks the data folder and, where create says so, makes it if it does
// not exist, for its owner alone.
func openData(data string, create bool) error {
	if data == "" {
		return nil
	}
	info, err := os.Stat(data)
	if errors.Is(err, fs.ErrNotExist) && create {
		if err := os.MkdirAll(data, 0o700); err != nil {
			return fmt.Errorf("broker: data folder: %w", err)
		}
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it will be made
	}
	if err != nil {
		return fmt.Errorf("broker: data folder: %w", err)
	}
	if !info.IsDir() {
		return &ConfigError{Key: "data", Problem: fmt.Sprintf("%s is not a folder", data), Fix: "choose a folder, it is made if it does not exist"}
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return &PermissionError{File: data, Mode: mode, Want: 0o700, What: "others can write to the data folder"}
	}
	return nil
}

// addressKey returns the key from which hub addresses are derived: from the
// named file, from the data folder, where it is made once, or a random one.
func addressKey(cfg *Config, logger *slog.Logger) ([]byte, error) {
	switch {
	case cfg.AddressKeyFile != "":
		return readAddressKey(cfg.AddressKeyFile)
	case cfg.Data == "":
		logger.Warn("no data folder and no address key: live channels and forwarding addresses end with the hub", "option", "data")
		key := make([]byte, addressKeyLen)
		rand.Read(key) // never fails
		return key, nil
	}
	name := filepath.Join(cfg.Data, addressKeyName)
	key, err := readAddressKey(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, addressKeyLen)
	rand.Read(key)
	if err := writeNew(name, []byte(hex.EncodeToString(key)+"\n")); err != nil {
		return nil, fmt.Errorf("broker: address key: %w", err)
	}
	return key, nil
}

// readAddressKey reads 64 hex digits from a file that only its owner can read.
func readAddressKey(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("broker: address key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("broker: address key: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, &PermissionError{File: name, Mode: mode, Want: 0o600, What: "others can read the address key"}
	}
	text, err := io.ReadAll(io.LimitReader(f, 1024))
	if err != nil {
		return nil, fmt.Errorf("broker: address key: %w", err)
	}
	key, err := hex.DecodeString(string(bytes.TrimSpace(text)))
	if err != nil || len(key) != addressKeyLen { // the cause could hold digits of the key
		return nil, &ConfigError{Key: "address_key_file", Problem: fmt.Sprintf("%s does not hold 64 hex digits", name),
			Fix: "make one with: (umask 077; openssl rand -hex 32 > " + name + ")"}
	}
	return key, nil
}

// writeNew writes a file that must not exist yet, whole or not at all, for its
// owner alone.
func writeNew(name string, content []byte) (err error) {
	dir := filepath.Dir(name)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(name)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already when all is well
	if _, err = tmp.Write(content); err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	// Unlike a rename, a link never replaces what another process just wrote.
	if err := os.Link(tmp.Name(), name); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
