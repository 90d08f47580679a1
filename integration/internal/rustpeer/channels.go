package rustpeer

import (
	"context"
	"encoding/hex"
	"time"
)

// Identity is an identity of a Rust node.
type Identity struct {
	Name       string // the test's name for it
	Identifier string // I and 64 hex digits
	History    []byte // exported change history
}

func (n *Node) identity(command string, args Args) Identity {
	n.t.Helper()
	var out struct{ Identifier, History string }
	n.must(command, args, &out)
	history, err := hex.DecodeString(out.History)
	if err != nil {
		n.t.Fatal(err)
	}
	return Identity{args["name"].(string), out.Identifier, history}
}

// Identity creates an Ed25519 identity.
func (n *Node) Identity(name string) Identity {
	n.t.Helper()
	return n.identity("identity", Args{"name": name})
}

// IdentityP256 creates an identity with an ECDSA key on P-256.
func (n *Node) IdentityP256(name string) Identity {
	n.t.Helper()
	return n.identity("identity", Args{"name": name, "key": "p256"})
}

// Rotate gives an identity a new key. Channels made from then on show the
// longer history.
func (n *Node) Rotate(name string) Identity {
	n.t.Helper()
	return n.identity("rotate", Args{"name": name})
}

// Import stores a foreign change history and returns its identifier.
func (n *Node) Import(history []byte) (string, error) {
	var out struct{ Identifier string }
	err := n.Call(context.Background(), "import", Args{"history": hex.EncodeToString(history)}, &out)
	return out.Identifier, err
}

// Issue makes a credential for the subject with the given change history,
// signed by one of the node's identities: CBOR of CredentialAndPurposeKey.
func (n *Node) Issue(issuer string, subject []byte, attributes map[string]string, ttl time.Duration) []byte {
	n.t.Helper()
	var out struct{ Credential string }
	n.must("issue", Args{
		"issuer": issuer, "history": hex.EncodeToString(subject),
		"attributes": attributes, "ttl_s": int(ttl / time.Second),
	}, &out)
	credential, err := hex.DecodeString(out.Credential)
	if err != nil {
		n.t.Fatal(err)
	}
	return credential
}

// Verified is a credential that the crate accepted.
type Verified struct {
	Subject    string
	Schema     uint64
	Attributes map[string]string
	CreatedAt  int64 `json:"created_at"` // Unix seconds
	ExpiresAt  int64 `json:"expires_at"` // Unix seconds
}

// Verify has the crate verify a credential of an authority, given by its
// change history. An empty subject means any.
func (n *Node) Verify(credential []byte, subject string, authority []byte) (Verified, error) {
	args := Args{"credential": hex.EncodeToString(credential), "authority": hex.EncodeToString(authority)}
	if subject != "" {
		args["subject"] = subject
	}
	var out Verified
	err := n.Call(context.Background(), "verify", args, &out)
	return out, err
}

// FillSlot puts a credential into a named slot. Channels whose Credential is
// that slot present it from then on; those that are up send RefreshCredentials
// at once if it is a new one. It returns how many were told.
func (n *Node) FillSlot(slot string, credential []byte) int {
	n.t.Helper()
	var out struct{ Channels int }
	n.must("slot", Args{"slot": slot, "credential": hex.EncodeToString(credential)}, &out)
	return out.Channels
}

// Attributes returns what the node has stored of a peer's credentials from an
// authority, both given by their identifiers; nil when there is nothing.
func (n *Node) Attributes(subject, authority string) map[string]string {
	n.t.Helper()
	var out struct{ Attributes map[string]string }
	n.must("attributes", Args{"subject": subject, "authority": authority}, &out)
	return out.Attributes
}

// ListenerConfig describes a secure channel listener.
type ListenerConfig struct {
	Address    string   // local address; also its name in Open
	Identity   string   // name of one of the node's identities
	Open       []string // who may dial it
	Trust      []string // identifiers; empty: everyone
	Authority  []byte   // change history of the authority whose credentials are accepted; nil: none
	Credential string   // slot to present from; empty: none
}

func (c ListenerConfig) args() Args {
	return policy(Args{"address": c.Address, "identity": c.Identity, "open": c.Open}, c.Trust, c.Authority, c.Credential)
}

func policy(args Args, trust []string, authority []byte, credential string) Args {
	args["trust"] = "everyone"
	if len(trust) > 0 {
		args["trust"] = trust
	}
	if authority != nil {
		args["authority"] = hex.EncodeToString(authority)
	}
	if credential != "" {
		args["credential"] = credential
	}
	return args
}

// Listener starts a secure channel listener. Workers behind it are opened with
// its address as a name.
func (n *Node) Listener(c ListenerConfig) {
	n.t.Helper()
	n.must("listener", c.args(), nil)
}

// DialConfig describes a channel to open.
type DialConfig struct {
	Name       string        // the test's name for the channel, for "@NAME" in routes and for Open
	Identity   string        // name of one of the node's identities
	Route      []string      // to the listener: "@hub", "FWD_…", "listener"
	Trust      []string      // identifiers; empty: everyone
	Authority  []byte        // change history of the authority whose credentials are accepted; nil: none
	Credential string        // slot to present from; empty: none
	Timeout    time.Duration // of the handshake; 10 s when zero
}

// Channel is a channel that the node opened.
type Channel struct {
	Peer      string // verified identifier
	Encryptor string // local address
	Decryptor string // the address that the peer sends to
	Took      time.Duration
}

// Dial opens a secure channel. A refusal by the peer, or of the peer by the
// trust policy, comes back as an error once the timeout has passed: stock nodes
// tell nobody sooner.
func (n *Node) Dial(c DialConfig) (Channel, error) {
	args := policy(Args{"name": c.Name, "identity": c.Identity, "route": c.Route}, c.Trust, c.Authority, c.Credential)
	if c.Timeout != 0 {
		args["timeout_ms"] = c.Timeout.Milliseconds()
	}
	var out struct {
		Peer, Encryptor, Decryptor string
		Us                         int64
	}
	if err := n.Call(context.Background(), "dial", args, &out); err != nil {
		return Channel{}, err
	}
	return Channel{out.Peer, out.Encryptor, out.Decryptor, time.Duration(out.Us) * time.Microsecond}, nil
}

// Reroute tells the initiator's end of a channel to reach the peer over
// another route, given without the peer's decryptor.
func (n *Node) Reroute(channel string, route ...string) error {
	return n.Call(context.Background(), "reroute", Args{"name": channel, "route": route}, nil)
}

// Close stops a channel by the name it was dialled with; the peer gets a Close.
func (n *Node) Close(channel string) {
	n.t.Helper()
	n.must("close", Args{"name": channel}, nil)
}

// CloseEncryptor stops a channel by its encryptor's address, for channels that
// others dialled.
func (n *Node) CloseEncryptor(address string) {
	n.t.Helper()
	n.must("close", Args{"encryptor": address}, nil)
}

// ChannelInfo is a live channel as the node's registry has it.
type ChannelInfo struct {
	Role      string // initiator or responder
	Peer      string // verified identifier
	Encryptor string
	Decryptor string
}

// WaitChannels waits until exactly count channels of a role (initiator,
// responder, or empty for both) are up, and returns them.
func (n *Node) WaitChannels(role string, count int) []ChannelInfo {
	n.t.Helper()
	args := Args{"count": count, "timeout_ms": 20_000}
	if role != "" {
		args["role"] = role
	}
	var out []ChannelInfo
	n.must("wait_channels", args, &out)
	return out
}
