package device

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/sealmq/sealmq/identity"
)

// ErrURL is wrapped by every error about a hub URL.
var ErrURL = errors.New("device: not a usable hub URL")

// hubURL is a parsed hub URL.
type hubURL struct {
	scheme   string // mqtt, mqtts, ws, wss or tcp
	host     string // without port
	address  string // host:port
	path     string // of a WebSocket, with its slash
	user     string
	password string
	hasUser  bool
	pin      identity.Identifier // zero: none
}

// schemes are the URL schemes and their default ports.
var schemes = map[string]string{
	"mqtt": "1883", "mqtts": "8883", "ws": "80", "wss": "443", "tcp": "4000",
}

// parseURL reads mqtt://, mqtts://, ws://, wss:// and tcp:// URLs with optional
// credentials and an optional pin, "?hub=I…".
func parseURL(text string) (hubURL, error) {
	fail := func(format string, args ...any) (hubURL, error) {
		return hubURL{}, fmt.Errorf("%w: %s (expected mqtt://HOST[:PORT], mqtts://, ws://, wss:// or tcp://, optionally with ?hub=IDENTIFIER)",
			ErrURL, fmt.Sprintf(format, args...))
	}
	if !strings.Contains(text, "://") {
		return fail("it has no scheme; put mqtt:// in front") // without the text, which may hold a password
	}
	u, err := url.Parse(text)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the outer error repeats the URL, password included
		}
		return fail("%v", err)
	}
	h := hubURL{scheme: strings.ToLower(u.Scheme), host: u.Hostname(), path: u.EscapedPath()}
	port, known := schemes[h.scheme]
	switch {
	case u.Scheme == "":
		return fail("%q has no scheme", u.Redacted())
	case !known:
		return fail("the scheme %q is unknown", u.Scheme)
	case h.host == "":
		return fail("%q names no host", u.Redacted())
	case u.Fragment != "":
		return fail("it has a fragment (#)")
	case !h.webSocket() && strings.Trim(h.path, "/") != "":
		return fail("a %s URL has no path", h.scheme)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return fail("%s is not a port", p)
		}
		port = p
	}
	h.address = net.JoinHostPort(h.host, port)
	if h.path == "" {
		h.path = "/"
	}
	if u.User != nil {
		h.hasUser = true
		h.user = u.User.Username()
		h.password, _ = u.User.Password()
	}
	for key, values := range u.Query() {
		if key != "hub" || len(values) != 1 {
			return fail("the only parameter is one hub=IDENTIFIER")
		}
		// Nobody has the zero identifier; as a pin it would pin nothing.
		if h.pin, err = identity.ParseIdentifier(values[0]); err != nil || h.pin.IsZero() {
			return fail("hub=%q is not an identifier", values[0])
		}
	}
	return h, nil
}

func (h hubURL) webSocket() bool { return h.scheme == "ws" || h.scheme == "wss" }
func (h hubURL) secure() bool    { return h.scheme == "mqtts" || h.scheme == "wss" }

// loopback reports whether the host certainly is this machine.
func (h hubURL) loopback() bool {
	if h.host == "localhost" {
		return true
	}
	ip := net.ParseIP(h.host)
	return ip != nil && ip.IsLoopback()
}

// String is the URL without credentials and pin, for logs and errors.
func (h hubURL) String() string {
	s := h.scheme + "://" + h.address
	if h.webSocket() && h.path != "/" {
		s += h.path
	}
	return s
}
