package device

import (
	"errors"
	"fmt"
	"strings"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/internal/pinfile"
)

// hubMemory remembers which identity a hub at an address has proved.
type hubMemory struct {
	file *pinfile.File // nil: nothing is remembered
	name string        // host:port
	kept bool          // the file is known to hold the hub
	told bool          // the configuration says which hub it is
	line int
	met  func(identity.Identifier) // told of a hub that is remembered for having been the first; may be nil
}

func (c *Config) hubMemory(u hubURL) *hubMemory {
	m := &hubMemory{name: strings.ToLower(u.address), told: !c.Hub.IsZero()}
	if c.KnownHubs != "" {
		m.file = pinfile.Open(c.KnownHubs)
	}
	return m
}

// pinned returns what is remembered of the hub.
func (m *hubMemory) pinned() (identity.Identifier, error) {
	if m.file == nil {
		return identity.Identifier{}, nil
	}
	e, ok, err := m.file.Lookup(m.name)
	if err != nil {
		return identity.Identifier{}, fmt.Errorf("device: known hubs: %w", err)
	}
	m.kept, m.line = ok, e.Line
	return e.Identifier, nil
}

// proved remembers a hub that has just proved its identity, unless that ends with
// its process.
func (m *hubMemory) proved(a *hubproto.HelloAnswer) error {
	if m == nil || m.file == nil || m.kept || a.Features&hubproto.FeatureEphemeral != 0 {
		return nil
	}
	err := m.file.Remember(m.name, a.Hub, 0)
	var changed *pinfile.ChangedError
	switch {
	case errors.As(err, &changed) && m.told: // what is said here and now counts
		return nil
	case errors.As(err, &changed): // another program was faster, and saw another hub
		return permanent(&HubMismatchError{Pinned: changed.Have, Got: changed.Got, File: changed.File, Line: changed.Line})
	case err != nil:
		return refused(&KnownFileError{What: "known hubs", Op: "write", File: m.file.Path(), Err: err})
	}
	m.kept = true
	if !m.told && m.met != nil {
		m.met(a.Hub)
	}
	if e, ok, err := m.file.Lookup(m.name); err == nil && ok { // else the line is not known
		m.line = e.Line
	}
	return nil
}

// explain adds to an error about a wrong hub where its pin came from.
func (m *hubMemory) explain(err error) error {
	var mismatch *HubMismatchError
	if m != nil && m.file != nil && m.kept && errors.As(err, &mismatch) && mismatch.File == "" {
		mismatch.File, mismatch.Line = m.file.Path(), m.line
	}
	return err
}

// KnownPeers remembers which identity is behind a forwarding address, in a file
// like SSH's known_hosts: one line an address, "ADDRESS IDENTIFIER [NUMBER]",
// where NUMBER is that of the newest signed claim seen. Several programs may
// share a file. It is safe for concurrent use.
type KnownPeers struct{ file *pinfile.File }

// PeerChangedError is the ErrWrongIdentity of a peer that is another one than
// the remembered one.
type PeerChangedError struct {
	Address   string
	Have, Got identity.Identifier
	// File and Line are where the first one stands; empty when it was remembered
	// by this process alone.
	File string
	Line int
}

func (e *PeerChangedError) Error() string {
	where := "seen before"
	if e.File != "" {
		where = fmt.Sprintf("remembered in %s, line %d", e.File, e.Line)
	}
	return fmt.Sprintf("device: THE IDENTITY BEHIND %s HAS CHANGED: %v is %s, now it is %v; "+
		"if the peer was set up anew on purpose, remove that line, otherwise somebody is in the way", e.Address, e.Have, where, e.Got)
}

// Is makes errors.Is(err, ErrWrongIdentity) true.
func (e *PeerChangedError) Is(target error) bool { return target == ErrWrongIdentity }

// KnownFileError says that a file of known hubs or peers could not be used when somebody
// was to be looked up or remembered, who is then not accepted. It is a
// channel.ErrUndecided: nothing is wrong with who that was.
type KnownFileError struct {
	// What the file is of: "known hubs" or "known peers".
	What string
	// Op is "read" or "write".
	Op   string
	File string
	Err  error
}

func (e *KnownFileError) Error() string {
	return fmt.Sprintf("device: %s: cannot %s %s: %v", e.What, e.Op, e.File, e.Err)
}

// Unwrap returns the cause.
func (e *KnownFileError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, channel.ErrUndecided) true.
func (e *KnownFileError) Is(target error) bool { return target == channel.ErrUndecided }

// ErrUnknownPeer means that nobody is remembered at an address. It counts as
// ErrWrongIdentity.
var ErrUnknownPeer = fmt.Errorf("%w: nobody is remembered at this address", ErrWrongIdentity)

// OpenKnownPeers opens the file at path, which is made with mode 0600 when there
// is something to remember. A file that others can write to is refused. With an
// empty path what is remembered ends with the process.
func OpenKnownPeers(path string) (*KnownPeers, error) {
	k := &KnownPeers{pinfile.Open(path)}
	if _, _, err := k.file.Lookup("-"); err != nil {
		return nil, fmt.Errorf("device: known peers: %w", err)
	}
	return k, nil
}

// Lookup returns who is remembered at an address.
func (k *KnownPeers) Lookup(address string) (identity.Identifier, bool, error) {
	e, ok, err := k.file.Lookup(address)
	if err != nil {
		return identity.Identifier{}, false, fmt.Errorf("device: known peers: %w", err)
	}
	return e.Identifier, ok, nil
}

// Forget removes an address.
func (k *KnownPeers) Forget(address string) error { return k.file.Forget(address) }

// Policy accepts the peer that is remembered at address and nobody else. With
// firstUse, whoever is the first to prove an identity there is accepted and
// remembered: whoever controls the hub at that moment can be that one.
//
// Joined with others (channel.And) it comes last, so that nobody is remembered
// whom another policy refuses.
func (k *KnownPeers) Policy(address string, firstUse bool) channel.Policy {
	return knownPeer{k, address, firstUse}
}

type knownPeer struct {
	known    *KnownPeers
	address  string
	firstUse bool
}

// Check implements channel.Policy.
func (p knownPeer) Check(peer channel.Peer) error {
	if !p.firstUse {
		_, ok, err := p.known.file.Lookup(p.address)
		switch {
		case err != nil:
			return &KnownFileError{What: "known peers", Op: "read", File: p.known.file.Path(), Err: err}
		case !ok:
			return fmt.Errorf("%w: %s", ErrUnknownPeer, p.address)
		}
	}
	return p.known.remember(p.address, peer.Identifier, 0)
}

// remember notes an identity and the number of its claim.
func (k *KnownPeers) remember(address string, id identity.Identifier, number uint64) error {
	err := k.file.Remember(address, id, number)
	var changed *pinfile.ChangedError
	switch {
	case errors.As(err, &changed):
		return &PeerChangedError{Address: address, Have: changed.Have, Got: changed.Got, File: changed.File, Line: changed.Line}
	case err != nil:
		return &KnownFileError{What: "known peers", Op: "write", File: k.file.Path(), Err: err}
	}
	return nil
}

// Expected implements channel.ExpectingPolicy.
func (p knownPeer) Expected() ([]identity.Identifier, bool) {
	e, ok, err := p.known.file.Lookup(p.address)
	if err != nil || !ok {
		return nil, false
	}
	return []identity.Identifier{e.Identifier}, true
}

var _ channel.ExpectingPolicy = knownPeer{}
