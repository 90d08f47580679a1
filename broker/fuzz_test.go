package broker

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
)

// FuzzUsedProofs: a file that is believed holds nothing but its records.
func FuzzUsedProofs(f *testing.F) {
	one := appendUsed([]byte(usedHeader), usedEntry{until: 1 << 40, key: usedKey{1}})
	f.Add([]byte(usedHeader))
	f.Add(one)
	f.Add(appendUsed(one, usedEntry{until: -1}))
	f.Add(one[:len(one)-1])
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseUsed(b)
		if err != nil {
			return
		}
		again := []byte(usedHeader)
		for _, e := range entries {
			again = appendUsed(again, e)
		}
		if !bytes.Equal(again, b) {
			t.Errorf("% x is read as % x", b, again)
		}
	})
}

// FuzzAccount: a line of a password file that is accepted says exactly what the
// account is.
func FuzzAccount(f *testing.F) {
	h := "$2a$04$" + strings.Repeat("a", 53)
	for _, role := range []string{"device:" + someID(1).String(), "observer", "user", "device", "user:x", "root"} {
		f.Add("name:" + h + ":" + role)
	}
	f.Fuzz(func(t *testing.T, line string) {
		a, cost, problem := parseAccount(line)
		if problem != "" {
			return
		}
		again := strings.Join([]string{a.User, string(a.hash), a.Role.String()}, ":")
		same := again == line
		if a.Role == bridge.RoleDevice {
			// The digits of an identifier may be of either case.
			text, ok := strings.CutPrefix(line, again+":")
			same = ok && strings.EqualFold(text, a.Identity.String())
		}
		if !same || cost > maxBcryptCost {
			t.Errorf("%q is read as %q with %v, cost %d", line, again, a.Identity, cost)
		}
	})
}

// FuzzConfig: whatever the file holds, it is a configuration that can be checked, or
// one error that says where it is wrong.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "root: a/b\nmqtt: [127.0.0.1:0, 'ws://[::1]:9001']\n", "limits: {frame: 1MiB, memory: 64MiB, queued_for: 24h}\ndata: x\n",
		"devices:\n  allow: [" + someID(1).String() + "]\n  attributes: {role: pump}\ncertificates: {a: user}\ntls: {cert: a, key: b}\n",
		"roott: x\n", "root: &a [*a]\n", "---\n---\n", "limits:\n  frame: x\n", "mqtt: {a: b}\n", "\t", "a: b: c\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseConfig(bytes.NewReader(text), "hub.yaml")
		if err == nil {
			_ = c.Validate()
			return
		}
		var ce *ConfigError
		if !errors.As(err, &ce) || ce.File != "hub.yaml" || ce.Problem == "" || strings.Contains(ce.Error(), "\n") {
			t.Errorf("%q", err)
		}
	})
}

// FuzzDeviceFiles reads a list of identifiers and an authority.
func FuzzDeviceFiles(f *testing.F) {
	p, err := identity.Create()
	if err != nil {
		f.Fatal(err)
	}
	history := hex.EncodeToString(p.Identity().ChangeHistory())
	for _, text := range []string{
		"", "# none\n", someID(1).String() + " # one\n\r\n" + someID(2).String(), "I0", history, "# plant\n" + history[:100] + "\n" + history[100:] + "\n",
		history[:len(history)-1], strings.ToUpper(history),
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		set := make(map[identity.Identifier]struct{})
		if err := parseIdentifiers(bytes.NewReader(text), "list", set); err == nil {
			for id := range set {
				if !bytes.Contains(bytes.ToLower(text), bytes.ToLower([]byte(id.String()))) { // the case of digits is free
					t.Errorf("%v is not in %q", id, text)
				}
			}
		}
		a, err := parseAuthority(text, "authority")
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q", err)
			}
			return
		}
		if again, err := parseAuthority([]byte(hex.EncodeToString(a.ChangeHistory())), "again"); err != nil || again.Identifier() != a.Identifier() {
			t.Errorf("%v is read again as %v, %v", a, again, err)
		}
	})
}
