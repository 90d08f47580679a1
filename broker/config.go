package broker

import (
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/topics"
)

// Default addresses and times.
const (
	// DefaultMQTT is where a hub listens when nothing is configured.
	DefaultMQTT = "mqtt://127.0.0.1:1883"
	// DefaultShutdown is how long a hub that stops waits for its peers.
	DefaultShutdown = 5 * time.Second
)

// Config says how a hub runs. The zero value of a field is its default; see
// docs/configuration.md for the file format.
type Config struct {
	// Root is the topic root. Default "sealmq".
	Root string `yaml:"root"`

	// MQTT lists where to listen: host:port, or a URL with the scheme mqtt,
	// mqtts, ws or wss. Port 0 takes a free port. Default [DefaultMQTT].
	MQTT []string `yaml:"mqtt"`
	// MQTTOpen lets anybody connect to a listener that is not on the loopback
	// interface. A loopback listener is open anyway while there is no
	// password file.
	MQTTOpen bool `yaml:"mqtt_open"`
	// PasswordFile names the file with user:bcrypt:role[:identifier] lines.
	// With one, every connection needs a password.
	PasswordFile string `yaml:"password_file"`
	// Certificates says who may connect with a TLS client certificate of
	// TLS.ClientCA instead of a password: by the subject's common name or a DNS
	// name the role, "user", "observer" or "device:" and an identifier. Once
	// something is set, nobody connects by a client id alone.
	Certificates map[string]string `yaml:"certificates"`
	// Devices says which devices may connect with a proof of their identity.
	Devices Devices `yaml:"devices"`
	// InsecurePlaintext allows passwords and proofs on listeners that are neither
	// on the loopback interface nor TLS.
	InsecurePlaintext bool `yaml:"insecure_plaintext"`
	// TCP is the host:port for peers that speak the Ockam TCP transport, by
	// convention port 4000. Empty: none. On the loopback interface it is open.
	TCP string `yaml:"tcp"`
	// TCPOpen lets anybody who reaches TCP use services and forwarders and register
	// dynamic forwarders. Without it a TCP address that other machines reach needs
	// APIAuthority, and strangers reach only the hub's secure channel listener.
	TCPOpen bool `yaml:"tcp_open"`
	// TCPAliases lets TCP peers take aliases without proof: the newest wins, and
	// never against an identity.
	TCPAliases bool `yaml:"tcp_aliases"`
	// APIAuthority names a file with the change history (hex) of the authority whose
	// credentials let peers register forwarders through the hub's secure channel
	// listener "api": those with the attribute ockam-relay equal to "*" or the alias.
	APIAuthority string `yaml:"api_authority"`
	// TLS is the certificate of the mqtts and wss listeners.
	TLS TLS `yaml:"tls"`

	// Data is the folder that keeps what must outlive the process: the hub's
	// identity and address key, queues and forwarders. Empty: nothing is kept.
	Data string `yaml:"data"`
	// Durability says when a frame is acknowledged. Default with Data:
	// [DurabilityInterval]; without: [DurabilityMemory].
	Durability Durability `yaml:"durability"`
	// SyncInterval is the longest time between syncs, and so the most that a power
	// cut loses, with [DurabilityInterval]. Default 1 s.
	SyncInterval time.Duration `yaml:"sync_interval"`
	// SegmentSize is the length of a file of the store. Default 64 MiB.
	SegmentSize Size `yaml:"segment_size"`
	// AddressKeyFile names a file with 64 hex digits from which hub addresses
	// are derived, for hubs that share it. Default: address.key in Data, and where
	// there is none a secret that is kept with the hub's identity.
	AddressKeyFile string `yaml:"address_key_file"`
	// PassphraseFile names a file whose first line is the passphrase, KeyFile one
	// whose contents are the key (identity.CreateKeyFile) that encrypts the hub's keys
	// in Data. Keys that are there unencrypted are encrypted at the start. At most one
	// of them.
	PassphraseFile string `yaml:"passphrase_file"`
	KeyFile        string `yaml:"key_file"`
	// Protection does the same for a program that has the passphrase at hand.
	Protection identity.Protection `yaml:"-"`

	// HTTP is the host:port for /healthz, /readyz, /metrics and /status.
	// Empty: none.
	HTTP string `yaml:"http"`
	// HTTPOpen allows HTTP on an address that is not on the loopback interface.
	HTTPOpen bool `yaml:"http_open"`

	// Trace publishes one line for each frame to observers, never its payload.
	Trace bool `yaml:"trace"`

	// Limits bound what peers can make the hub do.
	Limits Limits `yaml:"limits"`

	// ShutdownTimeout is how long a hub that stops waits for its peers to take
	// what was written. Default [DefaultShutdown].
	ShutdownTimeout time.Duration `yaml:"shutdown_timeout"`

	// Logger gets the hub's log; nil discards it.
	Logger *slog.Logger `yaml:"-"`
}

// TLS names the files of a certificate. They are read again when they change.
type TLS struct {
	// Cert is a PEM file with the certificate and its chain.
	Cert string `yaml:"cert"`
	// Key is a PEM file with the private key, not readable by everybody.
	Key string `yaml:"key"`
	// ClientCA is a PEM file with the authorities of client certificates, for
	// Config.Certificates. A certificate of another authority ends the handshake.
	ClientCA string `yaml:"client_ca"`
	// ClientRequired ends the handshake of every client without a certificate of
	// ClientCA, also of devices and of who has a password.
	ClientRequired bool `yaml:"client_required"`
}

// ConfigError says which setting is wrong and what to do.
type ConfigError struct {
	// File and Line are where the setting stands; empty and 0 when it came
	// from a flag or a program.
	File string
	Line int
	// Key is the setting, as in the file: "limits.frame".
	Key string
	// Problem says what is wrong, Fix what to do about it.
	Problem string
	Fix     string
}

func (e *ConfigError) Error() string {
	var b strings.Builder
	b.WriteString("broker: ")
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			b.WriteString(":" + strconv.Itoa(e.Line))
		}
		b.WriteString(": ")
	}
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Problem)
	return b.String()
}

// Hint says what to do.
func (e *ConfigError) Hint() string { return e.Fix }

// endpoint is one address to listen at.
type endpoint struct {
	scheme string // mqtt, mqtts, ws, wss
	addr   string // host:port
}

func (e endpoint) secure() bool { return e.scheme == "mqtts" || e.scheme == "wss" }
func (e endpoint) web() bool    { return e.scheme == "ws" || e.scheme == "wss" }
func (e endpoint) String() string {
	return e.scheme + "://" + e.addr
}

// parseEndpoint takes host:port or scheme://host:port.
func parseEndpoint(text string) (endpoint, error) {
	e := endpoint{scheme: "mqtt", addr: text}
	if scheme, rest, ok := strings.Cut(text, "://"); ok {
		e.scheme, e.addr = strings.ToLower(scheme), strings.TrimSuffix(rest, "/")
	}
	bad := func(problem, fix string) (endpoint, error) {
		return endpoint{}, &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("%q: %s", text, problem), Fix: fix}
	}
	const shape = "write host:port, mqtt://host:port, mqtts://host:port, ws://host:port or wss://host:port"
	switch e.scheme {
	case "mqtt", "mqtts", "ws", "wss":
	default:
		return bad("unknown scheme "+strconv.Quote(e.scheme), shape)
	}
	if strings.ContainsAny(e.addr, "/?#@ ") {
		return bad("a path, a query or a user has no meaning here", shape)
	}
	_, port, err := net.SplitHostPort(e.addr)
	if err != nil {
		return bad("not a host and port", shape)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return bad("the port is not a number from 0 to 65535", shape)
	}
	return e, nil
}

// loopback reports whether only this machine can reach a host:port.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// Validate reports the first setting that is wrong, as a [*ConfigError]. It
// opens no file and no port.
func (c *Config) Validate() error {
	if _, err := c.root(); err != nil {
		return err
	}
	endpoints, err := c.endpoints()
	if err != nil {
		return err
	}
	if err := c.Devices.validate(); err != nil {
		return err
	}
	if err := c.checkPolicy(endpoints); err != nil {
		return err
	}
	if c.HTTP != "" {
		host, port, err := net.SplitHostPort(c.HTTP)
		if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || strings.ContainsAny(host, "/ ") {
			return &ConfigError{Key: "http", Problem: fmt.Sprintf("%q is not a host and port", c.HTTP), Fix: "write for example 127.0.0.1:8080"}
		}
		if !loopback(c.HTTP) && !c.HTTPOpen {
			return &ConfigError{Key: "http", Problem: fmt.Sprintf("%s can be reached from other machines, and the status pages ask for no password", c.HTTP),
				Fix: "listen at 127.0.0.1, or set http_open (--http-open)"}
		}
	}
	if err := c.checkDurability(); err != nil {
		return err
	}
	if err := c.checkTCP(); err != nil {
		return err
	}
	if c.PassphraseFile != "" && c.KeyFile != "" {
		return &ConfigError{Key: "key_file", Problem: "passphrase_file is there too, and keys have one protection", Fix: "remove one of them"}
	}
	if (c.PassphraseFile != "" || c.KeyFile != "") && c.Data == "" {
		return &ConfigError{Key: "data", Problem: "without a data folder there are no keys at rest to encrypt", Fix: "set data (--data), or remove passphrase_file and key_file"}
	}
	if c.ShutdownTimeout < 0 {
		return &ConfigError{Key: "shutdown_timeout", Problem: "it is negative", Fix: "write for example 5s"}
	}
	return c.Limits.validate()
}

// checkPolicy refuses listeners that more people can reach than the settings
// account for.
func (c *Config) checkPolicy(endpoints []endpoint) error {
	if c.MQTTOpen && c.PasswordFile != "" {
		return &ConfigError{Key: "mqtt_open", Problem: "it lets anybody in, and password_file asks for passwords",
			Fix: "remove one of mqtt_open (--mqtt-open) and password_file (--password-file)"}
	}
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return &ConfigError{Key: "tls", Problem: "one of cert and key is missing", Fix: "set both tls.cert (--tls-cert) and tls.key (--tls-key)"}
	}
	if err := c.checkCertificates(); err != nil {
		return err
	}
	used := false
	for _, e := range endpoints {
		used = used || e.secure()
		if e.secure() && c.TLS.Cert == "" {
			return &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("%s needs a certificate", e), Fix: "set tls.cert (--tls-cert) and tls.key (--tls-key)"}
		}
		if loopback(e.addr) {
			continue
		}
		if !c.MQTTOpen && c.PasswordFile == "" && !c.Devices.set() && len(c.Certificates) == 0 {
			return &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("%s can be reached from other machines, and nothing says who may connect", e),
				Fix: "set devices (--allow-device, --device-authority), password_file (--password-file), certificates (--certificate), or mqtt_open (--mqtt-open) to let anybody in"}
		}
		if c.PasswordFile == "" && !c.Devices.set() && len(c.Certificates) > 0 && !e.secure() {
			return &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("nobody could connect at %s: a certificate needs TLS", e),
				Fix: "listen at mqtts:// or wss://, or set devices (--allow-device) or password_file (--password-file) too"}
		}
		if (c.PasswordFile != "" || c.Devices.set()) && !e.secure() && !c.InsecurePlaintext {
			return &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("passwords and proofs would travel to %s in the clear", e),
				Fix: "listen at mqtts:// or wss://, or set insecure_plaintext (--insecure-plaintext)"}
		}
	}
	if c.TLS.Cert != "" && !used {
		return &ConfigError{Key: "tls", Problem: "there is a certificate, and no listener uses TLS", Fix: "listen at mqtts:// or wss://, or remove tls"}
	}
	return nil
}

func (c *Config) root() (topics.Root, error) {
	if c.Root == "" {
		return topics.DefaultRoot, nil
	}
	r, err := topics.ParseRoot(c.Root)
	if err != nil {
		return "", &ConfigError{Key: "root", Problem: err.Error(), Fix: "write for example sealmq or site/7/sealmq"}
	}
	return r, nil
}

func (c *Config) endpoints() ([]endpoint, error) {
	list := c.MQTT
	if len(list) == 0 {
		list = []string{DefaultMQTT}
	}
	seen := make(map[string]bool, len(list))
	all := make([]endpoint, 0, len(list))
	for _, text := range list {
		e, err := parseEndpoint(text)
		if err != nil {
			return nil, err
		}
		if _, port, _ := net.SplitHostPort(e.addr); port != "0" && seen[e.addr] {
			return nil, &ConfigError{Key: "mqtt", Problem: fmt.Sprintf("%s is there twice", e.addr), Fix: "remove one of them"}
		}
		seen[e.addr] = true
		all = append(all, e)
	}
	return all, nil
}

func (c *Config) shutdownTimeout() time.Duration {
	if c.ShutdownTimeout == 0 {
		return DefaultShutdown
	}
	return c.ShutdownTimeout
}

func (c *Config) logger() *slog.Logger {
	if c.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Logger
}
