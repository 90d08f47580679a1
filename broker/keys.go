package broker

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/identity"
)

// What lies in a data folder.
const (
	identityName   = "hub"
	identityFile   = identityName + ".identity"
	identityFolder = "identity"
	addressKeyName = "address.key"
)

// addressLabel names the secret of the hub's identity from which hub addresses are
// derived.
const addressLabel = "sealmq hub addresses/1"

// protection says how the hub's keys are encrypted at rest.
func (c *Config) protection() (identity.Protection, error) {
	var p identity.Protection
	var err error
	switch {
	case c.PassphraseFile != "":
		p, err = identity.PassphraseFile(c.PassphraseFile)
	case c.KeyFile != "":
		p, err = identity.KeyFile(c.KeyFile)
	default:
		p = c.Protection
	}
	if err != nil {
		return p, fmt.Errorf("broker: the hub's keys: %w", err)
	}
	return p, nil
}

// hubIdentity loads the hub's identity from the data folder, or creates it, and
// encrypts it where it is not and has to be. Without a folder it makes one for this
// process. born says that it is new. Where the store was in use the identity must be there:
// with another one it would be another hub's.
func hubIdentity(data string, inUse bool, protection identity.Protection, logger *slog.Logger) (p *identity.Private, born bool, err error) {
	if data == "" {
		logger.Warn("no data folder: the hub has a new identity at each start, devices that pinned it will refuse it", "option", "data")
		p, err := identity.Create()
		if err != nil {
			return nil, false, fmt.Errorf("broker: create the hub's identity: %w", err)
		}
		return p, true, nil
	}
	if file := filepath.Join(data, identityFolder, identityFile); inUse {
		if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
			return nil, false, &StoreError{Folder: filepath.Join(data, storeName), Err: fmt.Errorf("%w: %s is missing", store.ErrIdentity, file)}
		}
	}
	v, err := identity.OpenVault(filepath.Join(data, identityFolder), identity.WithProtection(protection))
	if err != nil {
		return nil, false, fmt.Errorf("broker: the hub's identity: %w", err)
	}
	sealed, err := v.Encrypted(identityName)
	switch {
	case errors.Is(err, identity.ErrNotFound):
		born = true
		if p, err = v.Create(identityName); err == nil {
			logger.Info("created the hub's identity", "identifier", p.Identifier().String(), "data", data)
		}
	case err != nil:
	case protection.Encrypts() && !sealed:
		if err = v.Protect(identityName, protection); err == nil {
			logger.Info("encrypted the hub's keys", "data", data)
		}
	}
	if err == nil && !born {
		p, err = v.Load(identityName)
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
			return &folderError{Folder: data, Err: err}
		}
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it will be made
	}
	if err != nil {
		return &folderError{Folder: data, Err: err}
	}
	if !info.IsDir() {
		return &ConfigError{Key: "data", Problem: fmt.Sprintf("%s is not a folder", data), Fix: "choose a folder, it is made if it does not exist"}
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return &PermissionError{File: data, Mode: mode, Want: 0o700, What: "others can write to the data folder"}
	}
	return nil
}

// addressKey returns the key from which hub addresses are derived: from the named
// file, from address.key in the data folder where somebody has put one, or from the
// secret that is kept with the hub's identity, so it is encrypted where that is.
func addressKey(cfg *Config, id *identity.Private, logger *slog.Logger) ([32]byte, error) {
	switch {
	case cfg.AddressKeyFile != "":
		return readAddressKey(cfg.AddressKeyFile)
	case cfg.Data == "":
		logger.Warn("no data folder and no address key: live channels and forwarding addresses end with the hub", "option", "data")
		return id.Secret(addressLabel), nil
	}
	key, err := readAddressKey(filepath.Join(cfg.Data, addressKeyName))
	if errors.Is(err, fs.ErrNotExist) {
		return id.Secret(addressLabel), nil
	}
	return key, err
}

// readAddressKey reads 64 hex digits from a file that only its owner can read.
func readAddressKey(name string) (key [32]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return key, fmt.Errorf("broker: address key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return key, fmt.Errorf("broker: address key: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return key, &PermissionError{File: name, Mode: mode, Want: 0o600, What: "others can read the address key"}
	}
	text, err := io.ReadAll(io.LimitReader(f, 1024))
	if err != nil {
		return key, fmt.Errorf("broker: address key: %w", err)
	}
	digits, err := hex.DecodeString(string(bytes.TrimSpace(text)))
	if err != nil || len(digits) != len(key) { // the cause could hold digits of the key
		return key, &ConfigError{Key: "address_key_file", Problem: fmt.Sprintf("%s does not hold 64 hex digits", name),
			Fix: "make one with: (umask 077; openssl rand -hex 32 > " + name + ")"}
	}
	return [32]byte(digits), nil
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
