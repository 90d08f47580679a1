package broker

import (
	"context"
	"encoding/hex"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
)

func hashed(t testing.TB, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

func someID(b byte) identity.Identifier {
	var id identity.Identifier
	for i := range id {
		id[i] = b
	}
	return id
}

func TestParsePasswords(t *testing.T) {
	h, id := hashed(t, "secret"), someID(7).String()
	text := "# accounts\n\nalice:" + h + ":device:" + id + "\r\nwatch:" + h + ":observer\nplant:" + h + ":user"
	p, err := ParsePasswords(strings.NewReader(text), "passwd")
	if err != nil {
		t.Fatal(err)
	}
	if p.Len() != 3 {
		t.Errorf("%d accounts", p.Len())
	}
	a, ok := p.compare("alice", []byte("secret"))
	if !ok || a.Role != bridge.RoleDevice || a.Identity != someID(7) {
		t.Errorf("alice is %+v, %v", a, ok)
	}
	for _, pw := range []string{"", "Secret", "secret ", strings.Repeat("x", 100)} {
		if _, ok := p.compare("alice", []byte(pw)); ok {
			t.Errorf("password %q is right", pw)
		}
	}
	if _, ok := p.compare("nobody", []byte("secret")); ok {
		t.Error("an unknown user may log in")
	}
}

func TestParsePasswordsErrors(t *testing.T) {
	h, id := hashed(t, "secret"), someID(7).String()
	good := "ok:" + h + ":user\n"
	for _, tc := range []struct{ name, text, want string }{
		{"no account", "# nothing\n", "nobody could connect"},
		{"two fields", good + "a:" + h, "2 fields"},
		{"five fields", good + "a:" + h + ":device:" + id + ":x", "5 fields"},
		{"no user", good + ":" + h + ":user", "empty"},
		{"blank in user", good + "a b:" + h + ":user", "no blanks"},
		{"reserved user", good + "sealmq-guest:" + h + ":user", "reserved"},
		{"clear password", good + "a:secret:user", "not a bcrypt hash"},
		{"expensive", good + "a:" + strings.Replace(h, "$04$", "$31$", 1) + ":user", "cost"},
		{"unknown role", good + "a:" + h + ":admin", "unknown role"},
		{"device without identifier", good + "a:" + h + ":device", "no identifier"},
		{"device with a bad identifier", good + "a:" + h + ":device:I123", "not an identifier"},
		{"user with identifier", good + "a:" + h + ":user:" + id, "only a device"},
		{"twice", good + good, "twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ParsePasswords(strings.NewReader(tc.text), "passwd")
			var pe *PasswordError
			if !errors.As(err, &pe) {
				t.Fatalf("error is %T %v", err, err)
			}
			line := 2
			if tc.name == "no account" {
				line = 1
			}
			if pe.Line != line || !strings.Contains(pe.Problem, tc.want) {
				t.Errorf("got %v, want line %d and %q", err, line, tc.want)
			}
			if strings.Contains(err.Error(), h[8:]) {
				t.Errorf("the hash is in the error: %v", err)
			}
		})
	}
}

// TestFilesWritableByAll: what says who may do what is not believed when everybody can
// change it.
func TestFilesWritableByAll(t *testing.T) {
	p, err := identity.Create()
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		text, fix string
		load      func(name string) error
	}{
		"passwords":     {"a:" + hashed(t, "x") + ":user\n", "chmod 0600", func(n string) error { _, err := LoadPasswords(n); return err }},
		"configuration": {"root: x\n", "chmod 0644", func(n string) error { _, err := Load(n); return err }},
		"authority": {hex.EncodeToString(p.Identity().ChangeHistory()), "chmod 0644", func(n string) error {
			_, err := LoadAuthority(n)
			return err
		}},
		"devices": {p.Identifier().String(), "chmod 0644", func(n string) error {
			_, err := (&Devices{AllowFile: n}).load(false)
			return err
		}},
	} {
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.load(name); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Chmod(name, 0o646); err != nil {
			t.Fatal(err)
		}
		var pe *PermissionError
		if err := c.load(name); !errors.As(err, &pe) || !strings.Contains(pe.Hint(), c.fix) {
			t.Errorf("%s that all can change: %v", what, err)
		}
	}
}

// TestLocalOrigin: a page of another host, whatever its name leads to, does not talk to
// a hub that is open to this machine.
func TestLocalOrigin(t *testing.T) {
	for _, c := range []struct {
		origin, host string
		want         bool
	}{
		{"", "127.0.0.1:9001", true},
		{"http://localhost:9001", "localhost:9001", true},
		{"http://127.0.0.1:9001", "127.0.0.1:9001", true},
		{"http://[::1]:9001", "[::1]:9001", true},
		{"http://evil.example:9001", "evil.example:9001", false}, // its name leads to 127.0.0.1
		{"http://evil.example", "127.0.0.1:9001", false},
		{"http://localhost:8000", "localhost:9001", false},
		{"null", "127.0.0.1:9001", false},
		{"http://192.0.2.1:9001", "192.0.2.1:9001", false},
	} {
		r := &http.Request{Header: http.Header{}, Host: c.host}
		if c.origin != "" {
			r.Header.Set("Origin", c.origin)
		}
		if got := localOrigin(r); got != c.want {
			t.Errorf("%q at %s: %v", c.origin, c.host, got)
		}
	}
}

func TestPasswordLine(t *testing.T) {
	line, err := PasswordLine("alice", []byte("secret"), "device", someID(1).String(), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePasswords(strings.NewReader(line), "line")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := p.compare("alice", []byte("secret")); !ok {
		t.Error("the password of its own line is wrong")
	}
	for _, tc := range []struct{ user, password, role, id string }{
		{"a:b", "x", "user", ""}, {"a", "", "user", ""}, {"a", strings.Repeat("x", 73), "user", ""},
		{"a", "x", "root", ""}, {"a", "x", "device", ""}, {"a", "x", "user", someID(1).String()},
	} {
		if line, err := PasswordLine(tc.user, []byte(tc.password), tc.role, tc.id, bcrypt.MinCost); err == nil {
			t.Errorf("%+v gives %q", tc, line)
		}
	}
}

func TestClientIDs(t *testing.T) {
	id := someID(0xab)
	device := Account{Role: bridge.RoleDevice, Identity: id}
	user := Account{Role: bridge.RoleUser}
	for _, tc := range []struct {
		clientID     string
		device, user bool
	}{
		{id.String(), true, false},
		{id.String() + "-1a2b", true, false},
		{id.String() + "-", false, true},
		{id.String() + "x", false, true},
		{strings.ToUpper(id.String()), false, true},
		{someID(4).String(), false, false},
		{someID(4).String() + "-" + id.String(), false, false},
		{"plant-7", false, true},
	} {
		if got := device.Admits(tc.clientID); got != tc.device {
			t.Errorf("device with %q: %v", tc.clientID, got)
		}
		if got := user.Admits(tc.clientID); got != tc.user {
			t.Errorf("user with %q: %v", tc.clientID, got)
		}
	}
}

func gateFor(t testing.TB, lines ...string) *gate {
	t.Helper()
	p, err := ParsePasswords(strings.NewReader(strings.Join(lines, "\n")), "passwd")
	if err != nil {
		t.Fatal(err)
	}
	return newGate(p, 0)
}

func TestLogin(t *testing.T) {
	ctx := context.Background()
	id := someID(9)
	g := gateFor(t, "dev:"+hashed(t, "secret")+":device:"+id.String(), "u:"+hashed(t, "pw")+":user")
	for range 2 { // the second time from memory
		if a, err := g.login(ctx, nil, id.String()+"-x", "dev", []byte("secret")); err != nil || a.Identity != id {
			t.Errorf("dev: %+v, %v", a, err)
		}
		if _, err := g.login(ctx, nil, someID(8).String(), "dev", []byte("secret")); !errors.Is(err, ErrClientID) {
			t.Errorf("another's client id: %v", err)
		}
		if _, err := g.login(ctx, nil, id.String(), "u", []byte("pw")); !errors.Is(err, ErrClientID) {
			t.Errorf("a device's client id for a user: %v", err)
		}
		if _, err := g.login(ctx, nil, "x", "u", []byte("pW")); !errors.Is(err, ErrBadLogin) {
			t.Errorf("wrong password: %v", err)
		}
		if _, err := g.login(ctx, nil, "x", "who", []byte("pw")); !errors.Is(err, ErrBadLogin) {
			t.Errorf("unknown user: %v", err)
		}
	}
}

func TestLoginRemembersForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(rememberFor, 2)
		mac := m.mac("u", []byte("pw"))
		m.keep("u", mac, time.Now())
		if !m.knows("u", mac, time.Now()) || m.knows("u", m.mac("u", []byte("px")), time.Now()) || m.knows("v", mac, time.Now()) {
			t.Error("it remembers the wrong thing")
		}
		time.Sleep(rememberFor)
		if m.knows("u", mac, time.Now()) {
			t.Error("it never forgets")
		}
		for _, u := range []string{"a", "b", "c", "d"} {
			m.keep(u, mac, time.Now())
		}
		if len(m.byID) > 2 {
			t.Errorf("it remembers %d, at most 2", len(m.byID))
		}
	})
}

func TestReplacedFileCountsAtOnce(t *testing.T) {
	ctx := context.Background()
	g := gateFor(t, "u:"+hashed(t, "old")+":user")
	if _, err := g.login(ctx, nil, "x", "u", []byte("old")); err != nil {
		t.Fatal(err)
	}
	p, err := ParsePasswords(strings.NewReader("u:"+hashed(t, "new")+":user"), "passwd")
	if err != nil {
		t.Fatal(err)
	}
	g.replace(p)
	if _, err := g.login(ctx, nil, "x", "u", []byte("old")); !errors.Is(err, ErrBadLogin) {
		t.Errorf("the old password: %v", err)
	}
	if _, err := g.login(ctx, nil, "x", "u", []byte("new")); err != nil {
		t.Errorf("the new password: %v", err)
	}
}

// A flood of logins waits for the workers, and past a bound hears "busy".
// A fleet with one account that connects at once waits for one bcrypt, not for each.
func TestLoginAfterTheWait(t *testing.T) {
	g := gateFor(t, "u:"+hashed(t, "pw")+":user")
	g.turns.free = 0
	result := make(chan error, 1)
	go func() {
		_, err := g.login(t.Context(), from(1), "x", "u", []byte("right for another a moment ago"))
		result <- err
	}()
	for g.turns.count() == 0 {
		runtime.Gosched()
	}
	g.mu.Lock()
	g.memory.keep("u", g.memory.mac("u", []byte("right for another a moment ago")), g.now())
	g.mu.Unlock()
	g.turns.leave()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestLoginFlood(t *testing.T) {
	g := gateFor(t, "u:"+hashed(t, "pw")+":user")
	g.turns.free = 0 // every worker is at work
	ctx, cancel := context.WithCancel(context.Background())
	errs := make(chan error, loginsWaiting)
	var wg sync.WaitGroup
	for i := range loginsWaiting {
		wg.Go(func() {
			_, err := g.login(ctx, from(byte(i%2)), "x", "u", []byte("guess"))
			errs <- err
		})
	}
	for g.turns.count() < loginsWaiting {
		select {
		case err := <-errs:
			t.Fatalf("one did not wait: %v", err)
		default:
			runtime.Gosched()
		}
	}
	if _, err := g.login(ctx, from(1), "x", "u", []byte("one too many")); !errors.Is(err, ErrLoginBusy) {
		t.Errorf("one too many: %v", err)
	}
	// Another user behind the same address gets the place of one of them.
	wg.Go(func() {
		_, err := g.login(ctx, from(1), "x", "another", []byte("pw"))
		errs <- err
	})
	if err := <-errs; !errors.Is(err, ErrLoginBusy) || g.turns.count() != loginsWaiting {
		t.Errorf("%v, and %d wait", err, g.turns.count())
	}
	cancel()
	wg.Wait()
	for range loginsWaiting {
		if err := <-errs; !errors.Is(err, ErrLoginBusy) {
			t.Errorf("after the end: %v", err)
		}
	}
	if n := g.turns.count(); n != 0 {
		t.Errorf("%d still count as waiting", n)
	}
}

// Outside the root ordinary clients may do anything but write to $ topics, devices and
// guests nothing.
func TestOutside(t *testing.T) {
	for role, may := range map[bridge.Role]bool{
		bridge.RoleUser: true, bridge.RoleObserver: true, bridge.RoleDevice: false, bridge.RoleGuest: false,
	} {
		for _, topic := range []string{"plant/1", "$SYS/broker/uptime", "$share/g/plant"} {
			for _, write := range []bool{false, true} {
				want := may && !(write && topic[0] == '$')
				if got := outside(bridge.Principal{Role: role}, topic, write); got != want {
					t.Errorf("%v, %s, write %t: %t", role, topic, write, got)
				}
			}
		}
	}
}
