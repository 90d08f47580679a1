package store

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/hubproto"
	"github.com/sealmq/sealmq/route"
)

// Keys of the tables: a prefix and the client id or forwarding address.
const (
	keyPort      = "port/"
	keyForwarder = "forwarder/"
	keyNotice    = "notice/" // then what of the notice is not its count, hashed, "/", client id
)

// The values are JSON, for the sake of who has to look into a broken folder.

type ownerJSON struct {
	Identity identity.Identifier `json:"identity,omitzero"`
	ClientID string              `json:"client,omitempty"`
	Role     bridge.Role         `json:"role"`
	Proven   bool                `json:"proven"`
}

func newOwner(p bridge.Principal) ownerJSON {
	return ownerJSON{Identity: p.Identity, ClientID: p.ClientID, Role: p.Role, Proven: p.Proven}
}

func (o ownerJSON) principal() bridge.Principal {
	return bridge.Principal{Identity: o.Identity, ClientID: o.ClientID, Role: o.Role, Proven: o.Proven}
}

type portJSON struct {
	Owner  ownerJSON `json:"owner"`
	Seen   time.Time `json:"seen"`
	Online bool      `json:"online,omitempty"`
}

type hopJSON struct {
	Transport route.Transport `json:"t,omitempty"`
	Value     []byte          `json:"v"`
}

type forwarderJSON struct {
	Kind   hubproto.ForwarderKind `json:"kind"`
	Owner  ownerJSON              `json:"owner"`
	Route  []hopJSON              `json:"route"`
	Since  time.Time              `json:"since"`
	Seen   time.Time              `json:"seen"`
	Online bool                   `json:"online,omitempty"`
	Claim  []byte                 `json:"claim,omitempty"`
}

func (s *Store) putJSON(key string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		s.logger.Error("cannot encode a table entry", "err", err) // no value here can fail
		return
	}
	s.put(key, b)
}

// Port implements bridge.Journal.
func (s *Store) Port(p bridge.PortState) {
	s.putJSON(keyPort+p.Principal.ClientID, portJSON{newOwner(p.Principal), p.Seen, p.Online})
}

// noticeKey is where a notice is, whatever its count.
func noticeKey(clientID string, n hubproto.Notice) string {
	n.Count = 1
	b, _ := n.Marshal() // none can fail
	sum := sha256.Sum256(b)
	return keyNotice + hex.EncodeToString(sum[:16]) + "/" + clientID
}

// Notice implements bridge.NoticeJournal.
func (s *Store) Notice(clientID string, n hubproto.Notice) {
	if b, err := n.Marshal(); err == nil { // none here can fail
		s.put(noticeKey(clientID, n), b)
	}
}

// NoticeGone implements bridge.NoticeJournal.
func (s *Store) NoticeGone(clientID string, n hubproto.Notice) { s.put(noticeKey(clientID, n), nil) }

// PortGone implements bridge.Journal.
func (s *Store) PortGone(clientID string) { s.put(keyPort+clientID, nil) }

// Forwarder implements bridge.Journal.
func (s *Store) Forwarder(f bridge.ForwarderState) {
	j := forwarderJSON{Kind: f.Kind, Owner: newOwner(f.Owner), Since: f.Since, Seen: f.Seen, Online: f.Online, Claim: f.Claim}
	for _, a := range f.Route {
		j.Route = append(j.Route, hopJSON{a.Transport, []byte(a.Value)})
	}
	s.putJSON(keyForwarder+f.Address, j)
}

// ForwarderGone implements bridge.Journal.
func (s *Store) ForwarderGone(address string) { s.put(keyForwarder+address, nil) }

// State returns what Bridge.Restore takes: what the last process left, as of
// Open. A queue whose device the tables do not know gets an unproven owner of
// that name.
func (s *Store) State() (bridge.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var st bridge.State
	known := make(map[string]bool)
	unsaid := make(map[string][]hubproto.Notice)
	for key, e := range s.tables {
		if rest, ok := strings.CutPrefix(key, keyNotice); ok {
			n, err := hubproto.ParseNotice(e.value)
			if err != nil {
				return st, fmt.Errorf("store: entry %q: %w", key, err)
			}
			_, clientID, _ := strings.Cut(rest, "/")
			unsaid[clientID] = append(unsaid[clientID], *n)
			continue
		}
		if name, ok := strings.CutPrefix(key, keyPort); ok {
			var j portJSON
			if err := json.Unmarshal(e.value, &j); err != nil {
				return st, fmt.Errorf("store: entry %q: %w", key, err)
			}
			known[name] = true
			st.Ports = append(st.Ports, bridge.PortState{Principal: j.Owner.principal(), Seen: j.Seen, Online: j.Online})
		}
		if addr, ok := strings.CutPrefix(key, keyForwarder); ok {
			var j forwarderJSON
			if err := json.Unmarshal(e.value, &j); err != nil {
				return st, fmt.Errorf("store: entry %q: %w", key, err)
			}
			f := bridge.ForwarderState{
				Address: addr, Kind: j.Kind, Owner: j.Owner.principal(), Since: j.Since, Seen: j.Seen,
				Online: j.Online, Claim: j.Claim,
			}
			for _, h := range j.Route {
				f.Route = append(f.Route, route.Address{Transport: h.Transport, Value: string(h.Value)})
			}
			st.Forwarders = append(st.Forwarders, f)
		}
	}
	for name := range s.byName {
		if !known[name] {
			st.Ports = append(st.Ports, bridge.PortState{
				Principal: bridge.Principal{ClientID: name, Role: bridge.RoleDevice}, Seen: time.Now(),
			})
		}
	}
	for i := range st.Ports {
		st.Ports[i].Unsaid = unsaid[st.Ports[i].Principal.ClientID]
	}
	return st, nil
}
