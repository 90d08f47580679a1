package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Errors of a Vault. They come wrapped, with the name or path.
var (
	// ErrName means that a name cannot be that of an identity.
	ErrName = errors.New("identity: a name has 1 to 64 of the characters A-Z a-z 0-9 _ . - and begins with none of the last two")
	// ErrExists means that the vault has an identity of that name already.
	ErrExists = errors.New("identity: there is one of that name already; choose another name or remove it first")
	// ErrNotFound means that the vault has no identity of that name.
	ErrNotFound = errors.New("identity: there is none of that name; create it first")
)

// Vault keeps private identities in a folder, one file each: NAME.identity, mode
// 0600, in a folder of mode 0700. Both are refused when they are open to other
// users. Files are replaced atomically and never overwritten by new identities.
// Several processes may use a vault at once: what one rotates, the others pick
// up.
type Vault struct {
	dir        string
	protection Protection
	disk       disk
}

// VaultOption changes how a vault is opened.
type VaultOption func(*Vault)

// WithProtection gives the passphrase or key file that opens encrypted
// identities and encrypts new ones. Identities that are not encrypted open too,
// and stay as they are; Protect changes them.
func WithProtection(p Protection) VaultOption { return func(v *Vault) { v.protection = p } }

const fileSuffix = ".identity"

// OpenVault opens the vault in dir and creates the folder where it is missing.
func OpenVault(dir string, opts ...VaultOption) (*Vault, error) {
	if err := openDir(dir); err != nil {
		return nil, err
	}
	v := &Vault{dir: dir}
	for _, o := range opts {
		o(v)
	}
	v.disk.sweepNow(dir)
	return v, nil
}

// Dir returns the folder.
func (v *Vault) Dir() string { return v.dir }

// Path returns the file of an identity, whether it exists or not.
func (v *Vault) Path(name string) string { return filepath.Join(v.dir, name+fileSuffix) }

// ValidName reports whether name can be that of an identity.
func ValidName(name string) bool {
	if len(name) == 0 || len(name) > 64 || name[0] == '.' || name[0] == '-' {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '.', c == '-':
		default:
			return false
		}
	}
	return true
}

func (v *Vault) path(name string) (string, error) {
	if !ValidName(name) {
		return "", fmt.Errorf("%w (%.80q)", ErrName, name)
	}
	return v.Path(name), nil
}

// Create makes an identity and keeps it under name. It fails with ErrExists
// rather than overwrite another.
func (v *Vault) Create(name string, opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	if _, err := v.path(name); err != nil {
		return nil, err
	}
	st, err := createState(&o)
	if err != nil {
		return nil, err
	}
	return v.add(name, st, &o)
}

// Add keeps an identity that lives in memory, such as Open makes, under name,
// and returns the kept one.
func (v *Vault) Add(name string, p *Private, opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	p.p.mu.Lock()
	st := p.p.state
	p.p.mu.Unlock()
	if _, soft := st.signer.(*softSigner); !soft {
		o.signer = st.signer
	}
	return v.add(name, st, &o)
}

func (v *Vault) add(name string, st *state, o *options) (*Private, error) {
	path, err := v.path(name)
	if err != nil {
		return nil, err
	}
	b, err := st.marshal(v.protection, nil)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	unlock, err := lockDir(v.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := v.disk.replace(path, b, true); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%w (%q in %s)", ErrExists, name, v.dir)
		}
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return newPrivate(st, o, &vaultKeeper{v, path, *o}, info), nil
}

// Load opens the identity kept under name.
func (v *Vault) Load(name string, opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	path, err := v.path(name)
	if err != nil {
		return nil, err
	}
	st, _, info, err := v.read(path, &o)
	if err != nil {
		return nil, err
	}
	return newPrivate(st, &o, &vaultKeeper{v, path, o}, info), nil
}

func (v *Vault) readFile(path string) ([]byte, fs.FileInfo, error) {
	b, info, err := readPrivate(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		name := strings.TrimSuffix(filepath.Base(path), fileSuffix)
		return nil, nil, fmt.Errorf("%w (%q in %s)", ErrNotFound, name, v.dir)
	}
	return b, info, err
}

func (v *Vault) read(path string, o *options) (*state, *sealedKeys, fs.FileInfo, error) {
	b, info, err := v.readFile(path)
	if err != nil {
		return nil, nil, nil, err
	}
	defer clear(b)
	st, sealed, err := unmarshalState(b, v.protection, o)
	if err != nil {
		return nil, nil, nil, fileError(path, err)
	}
	return st, sealed, info, nil
}

func fileError(path string, err error) error { return fmt.Errorf("identity: %s: %w", path, err) }

// Identity returns the public half of the identity kept under name. It needs no
// passphrase.
func (v *Vault) Identity(name string) (*Identity, error) {
	id, _, err := v.inspect(name)
	return id, err
}

// Encrypted reports whether the keys of an identity are encrypted.
func (v *Vault) Encrypted(name string) (bool, error) {
	_, sealed, err := v.inspect(name)
	return sealed, err
}

func (v *Vault) inspect(name string) (id *Identity, sealed bool, err error) {
	path, err := v.path(name)
	if err != nil {
		return nil, false, err
	}
	b, _, err := v.readFile(path)
	if err != nil {
		return nil, false, err
	}
	defer clear(b)
	f, id, err := parseFile(b)
	if err != nil {
		return nil, false, fileError(path, err)
	}
	clear(f.Keys)
	return id, f.Sealed != nil, nil
}

// List returns the names of all identities in alphabetical order, without
// opening them.
func (v *Vault) List() ([]string, error) {
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), fileSuffix); ok && ValidName(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Rotate gives the identity kept under name a new key; see Private.Rotate. For
// an identity whose present key lives in a device, Load it and rotate that.
func (v *Vault) Rotate(name string, opts ...Option) error {
	p, err := v.Load(name, opts...)
	if err != nil {
		return err
	}
	return p.Rotate(opts...)
}

// Remove deletes the identity kept under name. Without a backup its keys are
// gone for good.
func (v *Vault) Remove(name string) error {
	path, err := v.path(name)
	if err != nil {
		return err
	}
	unlock, err := lockDir(v.dir)
	if err != nil {
		return err
	}
	defer unlock()
	switch err := os.Remove(path); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w (%q in %s)", ErrNotFound, name, v.dir)
	case err != nil:
		return fmt.Errorf("identity: %w", err)
	}
	if err := syncDir(v.dir); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
}

// Protect changes how the identity kept under name is encrypted: another
// passphrase, a key file, or, with the zero Protection, not at all. The vault's
// own protection opens it. The file is replaced atomically: it is never without
// either protection. Other Vault values, here or in other processes, that have
// the old protection cannot open it any more.
func (v *Vault) Protect(name string, next Protection) error {
	path, err := v.path(name)
	if err != nil {
		return err
	}
	unlock, err := lockDir(v.dir)
	if err != nil {
		return err
	}
	defer unlock()
	b, _, err := v.readFile(path)
	if err != nil {
		return err
	}
	defer clear(b)
	out, err := reprotect(b, v.protection, next)
	if err != nil {
		return fileError(path, err)
	}
	defer clear(out)
	_, err = v.disk.replace(path, out, false)
	return err
}

// Export returns a backup of the identity kept under name, encrypted with
// protection, or bare with the zero Protection. It is text (PEM) and holds
// everything: history, keys and the secret that Private.Secret derives from.
// Import reads it; so does a vault into whose folder it is copied.
func (v *Vault) Export(name string, protection Protection) ([]byte, error) {
	path, err := v.path(name)
	if err != nil {
		return nil, err
	}
	b, _, err := v.readFile(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	out, err := reprotect(b, v.protection, protection)
	if err != nil {
		return nil, fileError(path, err)
	}
	return out, nil
}

// Import keeps a backup under name, encrypted as the vault encrypts. protection
// opens the backup. An identity that has been rotated since the backup was made
// is refused by peers that know the rotation.
func (v *Vault) Import(name string, backup []byte, protection Protection, opts ...Option) (*Private, error) {
	o, err := collect(opts)
	if err != nil {
		return nil, err
	}
	st, _, err := unmarshalState(backup, protection, &o)
	if err != nil {
		return nil, fmt.Errorf("identity: backup: %w", err)
	}
	return v.add(name, st, &o)
}

// reprotect encrypts a file anew without needing keys that live in devices.
func reprotect(b []byte, old, next Protection) ([]byte, error) {
	f, id, err := parseFile(b)
	if err != nil {
		return nil, err
	}
	keys := f.Keys
	if f.Sealed != nil {
		if keys, err = old.p.open(f.Sealed, additional(f.History)); err != nil {
			return nil, err
		}
	}
	defer clear(keys)
	return marshalFile(id, keys, next, nil)
}

// vaultKeeper keeps one private identity in its file.
type vaultKeeper struct {
	v    *Vault
	path string
	opts options
}

func (k *vaultKeeper) refresh(stamp any) (*state, any, error) {
	known, _ := stamp.(fs.FileInfo)
	info, err := os.Lstat(k.path)
	if err != nil {
		return nil, nil, fmt.Errorf("identity: %w", err)
	}
	if sameFile(info, known) {
		return nil, nil, nil
	}
	st, _, info, err := k.v.read(k.path, &k.opts)
	if err != nil {
		return nil, nil, err
	}
	return st, info, nil
}

func (k *vaultKeeper) update(change func(*state) (*state, error)) (*state, any, error) {
	unlock, err := lockDir(k.v.dir)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	st, sealed, info, err := k.v.read(k.path, &k.opts)
	if err != nil {
		return nil, nil, err
	}
	next, err := change(st)
	if err != nil {
		return nil, nil, err
	}
	if next == nil {
		return st, info, nil
	}
	var p Protection
	if sealed != nil {
		p = k.v.protection
	}
	b, err := next.marshal(p, sealed)
	if err != nil {
		return nil, nil, err
	}
	defer clear(b)
	committed, err := k.v.disk.replace(k.path, b, false)
	if !committed {
		return nil, nil, err
	}
	if _, soft := next.signer.(*softSigner); !soft {
		k.opts.signer = next.signer
	}
	if c := next.channel; c != nil {
		if _, soft := c.k.exchanger.(*softExchanger); !soft {
			k.opts.exchanger = c.k.exchanger
		}
	}
	info, statErr := os.Lstat(k.path)
	return next, info, errors.Join(err, statErr)
}
