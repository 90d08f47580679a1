package broker

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// Devices says which devices may connect with a proof of their identity. While
// nothing is set, any proven identity may on a hub that anybody may connect to
// (on the loopback interface, or with MQTTOpen), and none on one with a password
// file or certificates. Once something is set, no device connects without a proof or a password.
type Devices struct {
	// Allow lists identifiers.
	Allow []string `yaml:"allow"`
	// AllowFile names a file with one identifier a line; # begins a comment. It
	// is read again at [Hub.Reload].
	AllowFile string `yaml:"allow_file"`
	// Authorities names files with the change histories (hex) of authorities
	// whose credentials let devices in. A device sends its credential with the
	// proof.
	Authorities []string `yaml:"authorities"`
	// Attributes are what such a credential has to say, name by name.
	Attributes map[string]string `yaml:"attributes"`
	// AnyoneProven lets in whoever proves an identity, also from other machines.
	AnyoneProven bool `yaml:"anyone_proven"`
	// ClockSkew is how far a device's clock may be from the hub's, from 1 s to
	// 10 min. Default [DefaultClockSkew].
	ClockSkew time.Duration `yaml:"clock_skew"`
}

// DefaultClockSkew is how far a device's clock may be off. Peers refuse what was
// made more than a minute in the future, so a device that is further off has
// little use of a hub.
const DefaultClockSkew = identity.ClockTolerance

const maxClockSkew = 10 * time.Minute

// maxListFile bounds what is read of a list of identifiers, maxAuthorityFile of
// an authority's history in hex.
const (
	maxListFile      = 64 << 20
	maxAuthorityFile = 2*identity.MaxHistory + 4096
)

// set reports whether the operator has said who may connect.
func (d *Devices) set() bool {
	return len(d.Allow) > 0 || d.AllowFile != "" || len(d.Authorities) > 0 || d.AnyoneProven
}

func (d *Devices) clockSkew() time.Duration {
	if d.ClockSkew == 0 {
		return DefaultClockSkew
	}
	return d.ClockSkew
}

func (d *Devices) validate() error {
	for _, text := range d.Allow {
		if _, err := identity.ParseIdentifier(text); err != nil {
			return &ConfigError{Key: "devices.allow", Problem: fmt.Sprintf("%q is not an identifier", text), Fix: "sealmq identity show prints it"}
		}
	}
	if len(d.Attributes) > 0 && len(d.Authorities) == 0 {
		return &ConfigError{Key: "devices.attributes", Problem: "nobody is set who could vouch for them", Fix: "set devices.authorities (--device-authority)"}
	}
	if d.ClockSkew != 0 && (d.ClockSkew < time.Second || d.ClockSkew > maxClockSkew) {
		return &ConfigError{Key: "devices.clock_skew", Problem: fmt.Sprintf("%v is out of range", d.ClockSkew), Fix: "choose from 1s to 10m"}
	}
	return nil
}

// devicePolicy is a Devices with its files read. It does not change.
type devicePolicy struct {
	open        bool // nothing is set, and there are neither passwords nor certificates
	anyone      bool
	allow       map[identity.Identifier]struct{}
	authorities []*identity.Identity
	attributes  map[string]string
}

// errNotListed and errNoCredential are why a proven identity is not let in.
var (
	errNotListed    = errors.New("broker: this identity is not one of those that may connect")
	errNoCredential = errors.New("broker: no credential of a configured authority with the required attributes")
)

// loadDevices reads the policy for proofs.
func (c *Config) loadDevices() (*devicePolicy, error) {
	return c.Devices.load(c.PasswordFile == "" && len(c.Certificates) == 0)
}

// load reads the files of the policy. everybody says that the hub has no other
// policy either.
func (d *Devices) load(everybody bool) (*devicePolicy, error) {
	p := &devicePolicy{
		open: everybody && !d.set(), anyone: d.AnyoneProven,
		allow: make(map[identity.Identifier]struct{}), attributes: maps.Clone(d.Attributes),
	}
	for _, text := range d.Allow {
		id, err := identity.ParseIdentifier(text)
		if err != nil {
			return nil, d.validate()
		}
		p.allow[id] = struct{}{}
	}
	if d.AllowFile != "" {
		if err := readIdentifiers(d.AllowFile, p.allow); err != nil {
			return nil, err
		}
	}
	for _, name := range d.Authorities {
		a, err := LoadAuthority(name)
		if err != nil {
			return nil, err
		}
		p.authorities = append(p.authorities, a)
	}
	return p, nil
}

// admits decides whether a proven identity may connect. credentials are what it
// showed, and open that anybody may connect from where it is, unless something
// else is set. named says that it may by name or credential, and so is worth
// remembering.
func (p *devicePolicy) admits(id identity.Identifier, credentials [][]byte, open bool, now time.Time) (named bool, err error) {
	if _, ok := p.allow[id]; ok {
		return true, nil
	}
	err = errNotListed
	if len(p.authorities) > 0 {
		err = errNoCredential
		for _, raw := range credentials {
			c, cerr := identity.VerifyCredential(raw, id, p.authorities, now)
			if cerr == nil && c.Has(p.attributes) {
				return true, nil
			}
			if cerr != nil {
				err = fmt.Errorf("%w: %w", errNoCredential, cerr)
			}
		}
	}
	if p.anyone || p.open && open {
		return false, nil
	}
	return false, err
}

// readIdentifiers reads one identifier a line into set.
func readIdentifiers(name string, set map[identity.Identifier]struct{}) error {
	f, err := openPolicy(name, "devices.allow_file", 0o644)
	if err != nil {
		return err
	}
	defer f.Close() // nothing was written
	return parseIdentifiers(f, name, set)
}

func parseIdentifiers(f io.Reader, name string, set map[identity.Identifier]struct{}) error {
	lines := bufio.NewScanner(io.LimitReader(f, maxListFile))
	n := 0
	for lines.Scan() {
		n++
		text, _, _ := strings.Cut(lines.Text(), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		id, err := identity.ParseIdentifier(text)
		if err != nil {
			return &ConfigError{File: name, Line: n, Problem: fmt.Sprintf("%.80q is not an identifier", text), Fix: "write one identifier a line; # begins a comment"}
		}
		set[id] = struct{}{}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("broker: devices.allow_file: %s: %w", name, err)
	}
	return nil
}

// LoadAuthority reads an authority's public identity from a file: its change
// history in hexadecimal digits, as `sealmq authority show` prints it; white
// space and lines that begin with # don't count.
func LoadAuthority(name string) (*identity.Identity, error) {
	f, err := openPolicy(name, "authority", 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close() // nothing was written
	text, err := io.ReadAll(io.LimitReader(f, maxAuthorityFile+1))
	if err != nil {
		return nil, fmt.Errorf("broker: authority: %s: %w", name, err)
	}
	return parseAuthority(text, name)
}

func parseAuthority(text []byte, name string) (*identity.Identity, error) {
	bad := func(problem string) error {
		return &ConfigError{File: name, Problem: problem, Fix: "make it with: sealmq authority show NAME > " + name}
	}
	if len(text) > maxAuthorityFile {
		return nil, bad("the file is larger than any change history")
	}
	var digits []byte
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); !bytes.HasPrefix(line, []byte("#")) {
			digits = append(digits, line...)
		}
	}
	history, err := hex.DecodeString(string(slices.DeleteFunc(digits, func(c byte) bool { return c == ' ' || c == '\t' })))
	if err != nil {
		return nil, bad("it is not a change history in hexadecimal digits")
	}
	a, err := identity.Import(history)
	if err != nil {
		return nil, bad("it is not the change history of an identity: " + err.Error())
	}
	return a, nil
}
