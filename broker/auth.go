package broker

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// How much work logins may cause.
const (
	rememberFor   = time.Minute
	rememberCount = 8192

	// loginsWaiting is how many passwords, and how many proofs, may wait for a worker,
	// before the rest hears "busy", unless it is set.
	loginsWaiting = 256
)

// Errors of a login.
var (
	// ErrBadLogin says that user name and password do not fit. It does not say
	// which of them is wrong.
	ErrBadLogin = errors.New("broker: wrong user name or password")
	// ErrClientID says that the account may not use this client id.
	ErrClientID = errors.New("broker: the client id is not this account's")
	// ErrLoginBusy says that too many logins are waiting; the peer should come
	// back later.
	ErrLoginBusy = errors.New("broker: too many logins at once")
)

// gate checks passwords with a bounded number of bcrypts at a time, so that a
// flood of logins cannot take every processor. It is safe for concurrent use.
type gate struct {
	passwords atomic.Pointer[Passwords]
	turns     *turnstile
	now       func() time.Time

	mu     sync.Mutex
	memory *memory // guarded by mu; replaced when the file is loaded again
}

func newGate(p *Passwords, waiting int) *gate {
	g := &gate{
		turns:  newTurnstile(cmp.Or(waiting, loginsWaiting)),
		now:    time.Now,
		memory: newMemory(rememberFor, rememberCount),
	}
	g.passwords.Store(p)
	return g
}

// replace puts a newly loaded file in force. Nothing is remembered from the
// old one.
func (g *gate) replace(p *Passwords) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.passwords.Store(p)
	g.memory = newMemory(rememberFor, rememberCount)
}

// login checks one CONNECT. It blocks while other logins are being checked,
// until ctx ends.
func (g *gate) login(ctx context.Context, addr net.Addr, clientID, user string, password []byte) (Account, error) {
	g.mu.Lock()
	p, m := g.passwords.Load(), g.memory
	mac := m.mac(user, password)
	known := m.knows(user, mac, g.now())
	g.mu.Unlock()

	if known {
		return admit(p.accounts[user], clientID)
	}
	done, err := g.turns.enter(ctx, addr, user)
	if err != nil {
		return Account{}, err
	}
	// Another connection of the account may have been right meanwhile.
	g.mu.Lock()
	known = m.knows(user, mac, g.now())
	g.mu.Unlock()
	if known {
		done()
		return admit(p.accounts[user], clientID)
	}
	a, ok := p.compare(user, password)
	done()
	if !ok {
		return Account{}, ErrBadLogin
	}
	g.mu.Lock()
	m.keep(user, mac, g.now()) // of the old file, if it was replaced meanwhile
	g.mu.Unlock()
	return admit(a, clientID)
}

func admit(a Account, clientID string) (Account, error) {
	if !a.Admits(clientID) {
		return Account{}, ErrClientID
	}
	return a, nil
}

// loginResult says how a login ended, for the counters.
type loginResult int

const (
	loginOK          loginResult = iota // admitted
	loginOpen                           // admitted without a password
	loginBad                            // wrong user name or password
	loginClientID                       // right password, another's client id
	loginBusy                           // too many at once
	loginGuest                          // admitted to learn which hub this is
	loginCertificate                    // a verified certificate, of nobody who may connect
	loginProof                          // a device's proof was refused; its reason is counted apart

	numLogins
)

var loginNames = [numLogins]string{"ok", "open", "bad-password", "wrong-client-id", "busy", "guest", "certificate-not-allowed", "proof-refused"}

func (r loginResult) String() string { return loginNames[r] }

func resultOf(err error) loginResult {
	switch {
	case err == nil:
		return loginOK
	case errors.Is(err, ErrClientID):
		return loginClientID
	case errors.Is(err, ErrLoginBusy):
		return loginBusy
	case errors.Is(err, ErrCertificate):
		return loginCertificate
	}
	return loginBad
}
