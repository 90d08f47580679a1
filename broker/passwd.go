package broker

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/identity"
)

// Bounds of a password file. The cost bound keeps one line from turning every
// login into minutes of work; a cost of 14 takes about a second.
const (
	maxPasswordFile = 4 << 20
	maxAccounts     = 65536
	maxUserLen      = 128
	maxBcryptCost   = 14

	// DefaultBcryptCost is the cost of a hash unless another is asked for.
	DefaultBcryptCost = 12

	// MaxPassword is the longest password in bytes; bcrypt reads no further.
	MaxPassword = 72
)

// Account is one line of a password file.
type Account struct {
	// User is the MQTT user name.
	User string
	// Role says what the account may do.
	Role bridge.Role
	// Identity is the device's identifier; zero for every other role.
	Identity identity.Identifier

	hash []byte
}

// Admits reports whether the account may use an MQTT client id. A device's is
// its identifier, or its identifier, "-" and a suffix; other accounts may use
// any id that does not look like a device's.
func (a Account) Admits(clientID string) bool {
	owner, isDevice := deviceOf(clientID)
	if a.Role == bridge.RoleDevice {
		return isDevice && owner == a.Identity
	}
	return !isDevice
}

// deviceOf returns the identifier that a device's client id begins with.
func deviceOf(clientID string) (identity.Identifier, bool) {
	head, suffix, cut := strings.Cut(clientID, "-")
	if cut && suffix == "" {
		return identity.Identifier{}, false
	}
	id, err := identity.ParseIdentifier(head)
	if err != nil || id.String() != head {
		return identity.Identifier{}, false
	}
	return id, true
}

// PasswordError says what is wrong with a line of a password file.
type PasswordError struct {
	// File is the name of the file and Line the line in it, from 1.
	File string
	Line int
	// Problem says what is wrong, without the hash.
	Problem string
}

func (e *PasswordError) Error() string {
	return fmt.Sprintf("broker: %s:%d: %s", e.File, e.Line, e.Problem)
}

// Hint says how a line is made.
func (e *PasswordError) Hint() string {
	return "each line is user:bcrypt:role or user:bcrypt:device:identifier; `sealmq passwd USER` makes one"
}

// Passwords holds the accounts of a password file. It is immutable and safe
// for concurrent use.
type Passwords struct {
	accounts map[string]Account
	decoy    []byte // what the password of an unknown user is compared with
}

// LoadPasswords reads a password file. A file that everybody can write to is
// refused.
func LoadPasswords(name string) (*Passwords, error) {
	f, err := openPolicy(name, "password file", 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close() // nothing was written
	return ParsePasswords(f, name)
}

// ParsePasswords reads accounts, one a line: user:bcrypt:role[:identifier].
// Empty lines and lines that begin with # are skipped. The roles are device
// (which needs an identifier), observer and user. name is for error messages.
func ParsePasswords(r io.Reader, name string) (*Passwords, error) {
	p := &Passwords{accounts: make(map[string]Account)}
	cost := bcrypt.MinCost
	sc := bufio.NewScanner(io.LimitReader(r, maxPasswordFile+1))
	read := 0
	for line := 1; sc.Scan(); line++ {
		read += len(sc.Bytes()) + 1
		if read > maxPasswordFile {
			return nil, &PasswordError{name, line, fmt.Sprintf("the file is larger than %d bytes", maxPasswordFile)}
		}
		text := strings.TrimRight(sc.Text(), "\r")
		if strings.TrimSpace(text) == "" || strings.HasPrefix(text, "#") {
			continue
		}
		a, c, problem := parseAccount(text)
		if problem == "" {
			if _, twice := p.accounts[a.User]; twice {
				problem = fmt.Sprintf("user %q is there twice", a.User)
			} else if len(p.accounts) == maxAccounts {
				problem = fmt.Sprintf("more than %d accounts", maxAccounts)
			}
		}
		if problem != "" {
			return nil, &PasswordError{name, line, problem}
		}
		p.accounts[a.User] = a
		cost = max(cost, c)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("broker: password file %s: %w", name, err)
	}
	if len(p.accounts) == 0 {
		return nil, &PasswordError{name, 1, "no account in the file: nobody could connect"}
	}
	decoy, err := bcrypt.GenerateFromPassword([]byte(rand.Text()), cost)
	if err != nil {
		return nil, fmt.Errorf("broker: password file %s: %w", name, err)
	}
	p.decoy = decoy
	return p, nil
}

func parseAccount(text string) (a Account, cost int, problem string) {
	fields := strings.Split(text, ":")
	if len(fields) < 3 || len(fields) > 4 {
		return a, 0, fmt.Sprintf("%d fields separated by colons, not 3 or 4", len(fields))
	}
	a.User, a.hash = fields[0], []byte(fields[1])
	if problem := checkUser(a.User); problem != "" {
		return a, 0, problem
	}
	cost, err := bcrypt.Cost(a.hash)
	if err != nil || len(a.hash) != 60 {
		return a, 0, fmt.Sprintf("the password of %q is not a bcrypt hash", a.User)
	}
	if cost > maxBcryptCost {
		return a, 0, fmt.Sprintf("the bcrypt cost %d of %q is above %d, each login would take too long", cost, a.User, maxBcryptCost)
	}
	switch fields[2] {
	case "device":
		a.Role = bridge.RoleDevice
	case "observer":
		a.Role = bridge.RoleObserver
	case "user":
		a.Role = bridge.RoleUser
	default:
		return a, 0, fmt.Sprintf("unknown role %q of %q; the roles are device, observer and user", fields[2], a.User)
	}
	switch {
	case a.Role == bridge.RoleDevice && len(fields) != 4:
		return a, 0, fmt.Sprintf("device %q has no identifier", a.User)
	case a.Role != bridge.RoleDevice && len(fields) == 4:
		return a, 0, fmt.Sprintf("only a device has an identifier, and %q is of role %s", a.User, fields[2])
	case len(fields) == 4:
		if a.Identity, err = identity.ParseIdentifier(fields[3]); err != nil {
			return a, 0, fmt.Sprintf("device %q: %q is not an identifier", a.User, fields[3])
		}
	}
	return a, cost, ""
}

// reservedUser begins the user names that the hub itself gives a meaning.
const reservedUser = "sealmq-"

func checkUser(user string) (problem string) {
	switch {
	case user == "":
		return "the user name is empty"
	case len(user) > maxUserLen:
		return fmt.Sprintf("the user name is longer than %d bytes", maxUserLen)
	case strings.HasPrefix(user, reservedUser):
		return fmt.Sprintf("user %q: names that begin with %q are reserved", user, reservedUser)
	}
	for _, r := range user {
		if r <= ' ' || r == ':' || r == 0x7f || r == '\uFFFD' {
			return fmt.Sprintf("user %q: no blanks, colons or control characters", user)
		}
	}
	return ""
}

// Len returns the number of accounts.
func (p *Passwords) Len() int { return len(p.accounts) }

// compare runs one bcrypt, for an unknown user as for a known one.
func (p *Passwords) compare(user string, password []byte) (Account, bool) {
	a, known := p.accounts[user]
	hash := a.hash
	if !known {
		hash = p.decoy
	}
	// bcrypt refuses a longer password at once; what is compared here costs
	// the same and is never right.
	tooLong := len(password) > MaxPassword
	if tooLong {
		password = password[:MaxPassword]
	}
	err := bcrypt.CompareHashAndPassword(hash, password)
	if err != nil || !known || tooLong {
		return Account{}, false
	}
	return a, true
}

// HashPassword returns the bcrypt hash of a password, as it stands in a
// password file. cost is bcrypt's, from 4 to 14, and 0 for
// [DefaultBcryptCost]: each step doubles the work of a login and of a guess.
func HashPassword(password []byte, cost int) (string, error) {
	if cost == 0 {
		cost = DefaultBcryptCost
	}
	switch {
	case cost < bcrypt.MinCost || cost > maxBcryptCost:
		return "", fmt.Errorf("broker: the bcrypt cost %d is not from %d to %d", cost, bcrypt.MinCost, maxBcryptCost)
	case len(password) == 0:
		return "", errors.New("broker: the password is empty")
	case len(password) > MaxPassword:
		return "", fmt.Errorf("broker: the password is longer than %d bytes, the most bcrypt can tell apart", MaxPassword)
	case bytes.IndexByte(password, 0) >= 0:
		return "", errors.New("broker: the password holds a zero byte")
	}
	h, err := bcrypt.GenerateFromPassword(password, cost)
	if err != nil {
		return "", fmt.Errorf("broker: hash the password: %w", err)
	}
	return string(h), nil
}

// PasswordLine returns one line of a password file, without the newline. role
// is device, observer or user; only a device has an identifier, "" for the
// others. cost is as in [HashPassword].
func PasswordLine(user string, password []byte, role, identifier string, cost int) (string, error) {
	line := func(hash string) string {
		l := user + ":" + hash + ":" + role
		if identifier != "" {
			l += ":" + identifier
		}
		return l
	}
	const likeAHash = "$2a$12$0000000000000000000000000000000000000000000000000000."
	if _, _, problem := parseAccount(line(likeAHash)); problem != "" {
		return "", errors.New("broker: " + problem)
	}
	hash, err := HashPassword(password, cost)
	if err != nil {
		return "", err
	}
	return line(hash), nil
}

// remembered is a password that was right a moment ago.
type remembered struct {
	mac [sha256.Size]byte
	end time.Time
}

// memory keeps which passwords were right for a short while, so that a fleet
// that reconnects at once does not wait for a bcrypt each. It holds keyed
// hashes, never passwords, and only right ones: a wrong guess gains nothing.
// Its owner locks.
type memory struct {
	key   [32]byte
	ttl   time.Duration
	limit int
	byID  map[string]remembered
}

func newMemory(ttl time.Duration, limit int) *memory {
	m := &memory{ttl: ttl, limit: limit, byID: make(map[string]remembered)}
	rand.Read(m.key[:]) // never fails
	return m
}

func (m *memory) mac(user string, password []byte) [sha256.Size]byte {
	h := hmac.New(sha256.New, m.key[:])
	fmt.Fprintf(h, "%d:%s", len(user), user)
	h.Write(password)
	return [sha256.Size]byte(h.Sum(nil))
}

func (m *memory) knows(user string, mac [sha256.Size]byte, now time.Time) bool {
	r, ok := m.byID[user]
	return ok && now.Before(r.end) && subtle.ConstantTimeCompare(r.mac[:], mac[:]) == 1
}

func (m *memory) keep(user string, mac [sha256.Size]byte, now time.Time) {
	if _, ok := m.byID[user]; !ok && len(m.byID) >= m.limit {
		for u, r := range m.byID {
			if !now.Before(r.end) {
				delete(m.byID, u)
			}
		}
		for u := range m.byID { // still full: any one makes room
			if len(m.byID) < m.limit {
				break
			}
			delete(m.byID, u)
		}
	}
	m.byID[user] = remembered{mac, now.Add(m.ttl)}
}
