package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
)

// noFile is what a flag for a file takes to do without.
const noFile = "none"

// trustFlags say whom to believe: peers and the hub.
type trustFlags struct {
	trust       string
	authorities []string
	attributes  []string
	knownPeers  string
	knownHubs   string
	credential  string
	insecure    bool

	peers   *device.KnownPeers // set by policy where the file is used
	unknown bool               // --trust first-use, and nobody is known yet
}

func (t *trustFlags) add(f *pflag.FlagSet) {
	f.StringVar(&t.trust, "trust", "", "whom to talk to: everyone, or identifiers separated by commas; for send also known (--known-peers) or first-use")
	f.StringSliceVar(&t.authorities, "authority", nil, "talk to peers with a credential of this authority: a file made by sealmq authority show; may be repeated; with --trust, both have to fit")
	f.StringArrayVar(&t.attributes, "attribute", nil, "NAME=VALUE that the credential has to say; may be repeated")
	f.StringVar(&t.credential, "credential", "", "file with our own credential, for peers and for the hub; read again when it changes")
	f.StringVar(&t.knownHubs, "known-hubs", "", "file that remembers the hubs' identifiers; none to do without (default $"+envHome+"/known_hubs)")
	f.StringVar(&t.knownPeers, "known-peers", "", "file that remembers who is behind a forwarding address (default $"+envHome+"/known_peers)")
	f.BoolVar(&t.insecure, "insecure-proof-without-tls", false, "prove the identity to the hub without TLS, too; whoever is in between can use it")
}

const trustHint = "--trust everyone, or --trust IDENTIFIER[,IDENTIFIER…], or --authority FILE; the peer prints its identifier with sealmq identity show"

// policy reads --trust and --authority. address is what is dialled, "" when peers
// dial us.
func (t *trustFlags) policy(a *app, address string) (channel.Policy, error) {
	var parts []channel.Policy
	byCredential, err := t.credentialPolicy()
	switch {
	case err != nil:
		return nil, err
	case byCredential != nil:
		parts = append(parts, byCredential)
	}
	switch t.trust {
	case "":
		if byCredential == nil {
			return nil, usagef(trustHint, "--trust is missing: say whom to talk to")
		}
	case "everyone":
		parts = append(parts, channel.TrustEveryone)
	case "known", "first-use":
		if address == "" {
			return nil, usagef(trustHint, "--trust %s is for whom we send to, not for who sends to us", t.trust)
		}
		if t.peers, err = t.openPeers(a); err != nil {
			return nil, err
		}
		_, known, err := t.peers.Lookup(address)
		if err != nil {
			return nil, err
		}
		t.unknown = !known && t.trust == "first-use"
		// Last, so that nobody is remembered whom the others refuse.
		parts = append(parts, t.peers.Policy(address, t.trust == "first-use"))
	default:
		var ids []identity.Identifier
		for _, part := range strings.Split(t.trust, ",") {
			id, err := identity.ParseIdentifier(strings.TrimSpace(part))
			if err != nil {
				return nil, usagef(trustHint, "--trust: %q is not an identifier", strings.TrimSpace(part))
			}
			ids = append(ids, id)
		}
		parts = append(parts, channel.TrustIdentifiers(ids...))
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return channel.And(parts...), nil
}

// credentialPolicy reads --authority and --attribute; nil without either.
func (t *trustFlags) credentialPolicy() (channel.Policy, error) {
	attrs, err := attributes(t.attributes)
	if err != nil {
		return nil, err
	}
	if len(t.authorities) == 0 {
		if len(attrs) > 0 {
			return nil, usagef("add --authority FILE", "--attribute: nobody is named who could vouch for it")
		}
		return nil, nil
	}
	var any []channel.Policy
	for _, name := range t.authorities {
		authority, err := broker.LoadAuthority(name)
		if err != nil {
			return nil, err
		}
		any = append(any, channel.TrustCredential(authority, attrs))
	}
	return channel.Or(any...), nil
}

// attributes reads NAME=VALUE pairs.
func attributes(pairs []string) (map[string]string, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	m := make(map[string]string, len(pairs))
	for _, p := range pairs {
		name, value, ok := strings.Cut(p, "=")
		if _, twice := m[name]; !ok || name == "" || twice {
			return nil, usagef("for example --attribute role=pump, each name once", "--attribute: %q", p)
		}
		m[name] = value
	}
	return m, nil
}

func (t *trustFlags) openPeers(a *app) (*device.KnownPeers, error) {
	path := t.knownPeers
	if path == "" {
		home, err := a.home()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(home, "known_peers")
	}
	return device.OpenKnownPeers(path)
}

// hubs is the file of known hubs; "" for none.
func (t *trustFlags) hubs(a *app) (string, error) {
	switch t.knownHubs {
	case noFile:
		return "", nil
	case "":
		home, err := a.home()
		if err != nil {
			return "", err
		}
		return filepath.Join(home, "known_hubs"), nil
	}
	return t.knownHubs, nil
}

// seen is the folder with the newest change history seen of identities that have
// rotated their key or that a policy names, so that an older one, of a stolen backup,
// is refused by the next program too. Where there is none and none can be made, as in a
// home that is read-only, it is nil: this program remembers for itself.
func (a *app) seen() (identity.Registry, error) {
	home, err := a.home()
	if err != nil {
		return nil, err
	}
	r, err := identity.OpenRegistry(filepath.Join(home, "seen"), 0)
	switch {
	case errors.Is(err, fs.ErrPermission) && !errors.As(err, new(*identity.PermissionError)), errors.Is(err, syscall.EROFS):
		a.note("warning: %s; the next program will not know which keys of peers this one has seen rotated", printable(message(err)))
		return nil, nil //nolint:nilnil // see above
	case err != nil:
		return nil, vaultError("", err)
	}
	return r, nil
}

// apply puts what is said about hub and credentials into a configuration. The
// credential, nil for none, is of no use before it is told whose it has to be.
func (t *trustFlags) apply(a *app, cfg *device.Config) (mine *credentialFile, err error) {
	if cfg.Registry, err = a.seen(); err != nil {
		return nil, err
	}
	if cfg.KnownHubs, err = t.hubs(a); err != nil {
		return nil, err
	}
	cfg.KnownPeers = t.peers
	cfg.InsecureProofWithoutTLS = t.insecure
	if t.credential == "" {
		return nil, nil
	}
	mine = &credentialFile{name: t.credential, warn: func(err error) {
		a.note("warning: %s; going on with the last one", printable(message(err)))
	}}
	if _, _, err := mine.read(); err != nil {
		return nil, err
	}
	cfg.Credential, cfg.HubCredential = mine.get, mine.get
	return mine, nil
}

// credentialFile is our credential as its file holds it now: whoever issues a newer
// one replaces the file, and nothing has to be started again.
type credentialFile struct {
	name    string
	subject identity.Identifier
	warn    func(error)

	mu   sync.Mutex // guards what follows
	seen fs.FileInfo
	last []byte
	bad  string // the last warning
}

// about says whose the credential has to be, and reports whether it is. f may be nil.
func (f *credentialFile) about(subject identity.Identifier) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subject = subject
	_, err := f.load()
	return err
}

// get returns the credential in the file, or the last good one, with a warning, where
// the file holds none.
func (f *credentialFile) get() ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.load()
	switch {
	case err == nil:
		f.bad = ""
	case err.Error() != f.bad:
		f.bad = err.Error()
		f.warn(err)
	}
	return f.last, nil
}

// load reads the file when it has changed.
func (f *credentialFile) load() ([]byte, error) {
	info, err := os.Stat(f.name)
	if err == nil && f.seen != nil && os.SameFile(info, f.seen) && info.Size() == f.seen.Size() && info.ModTime().Equal(f.seen.ModTime()) {
		return f.last, nil
	}
	c, in, err := f.read()
	if err != nil {
		return nil, err
	}
	if in.Subject != f.subject {
		return nil, coded(exitData, fmt.Errorf("the credential in %s is about %v, and this is %v", f.name, in.Subject, f.subject), "choose another --identity or --credential")
	}
	f.seen, f.last = info, c
	return c, nil
}

// read reads the file, whomever the credential is about.
func (f *credentialFile) read() ([]byte, *identity.Inspection, error) {
	c, err := readHex(f.name, "the credential")
	if err != nil {
		return nil, nil, err
	}
	in, err := identity.InspectCredential(c)
	if err != nil {
		return nil, nil, coded(exitData, fmt.Errorf("%s: %w", f.name, err), "make one with: sealmq authority issue")
	}
	return c, in, nil
}

// readHex reads a file of hexadecimal digits; lines that begin with # are
// comments.
func readHex(name, what string) ([]byte, error) {
	text, err := readSmall(name, what)
	if err != nil {
		return nil, err
	}
	return decodeHex(text, name)
}

func decodeHex(text []byte, name string) ([]byte, error) {
	var digits []byte
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); !bytes.HasPrefix(line, []byte("#")) {
			digits = append(digits, line...)
		}
	}
	b, err := hex.DecodeString(string(digits))
	if err == nil && len(b) == 0 {
		err = errors.New("empty")
	}
	if err != nil {
		return nil, coded(exitData, fmt.Errorf("%s holds no hexadecimal digits, or other things too", name), "")
	}
	return b, nil
}
