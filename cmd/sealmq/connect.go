package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/bridge/api"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/route"
	"github.com/sealmq/sealmq/topics"
)

// defaultHub is the hub of a machine where nothing else is said.
const defaultHub = "mqtt://127.0.0.1:1883"

// maxSecretFile bounds what is read of a password file or a certificate file.
const maxSecretFile = 1 << 20

// peerFlags are what listen and send have in common.
type peerFlags struct {
	hub, identity              string
	user, passwordFile, caFile string
	root                       string
	clearPassword              bool
	api                        bool
	trustFlags
}

// add defines the flags.
func (p *peerFlags) add(a *app, c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&p.hub, "hub", "", "URL of the hub: mqtt://, mqtts://, ws://, wss://, or tcp:// for any Ockam hub, with ?hub=IDENTIFIER to pin it (default $"+envHub+" or "+defaultHub+")")
	f.StringVar(&p.identity, "identity", defaultIdentity, "name of the identity to use; \"default\" is created at first use")
	p.trustFlags.add(f)
	f.StringVar(&p.user, "user", "", "MQTT user name (default $"+envUser+")")
	f.StringVar(&p.passwordFile, "password-file", "", "file with the MQTT password (default: the password is in $"+envPassword+")")
	f.BoolVar(&p.clearPassword, "insecure-password-without-tls", false, "send the password to the hub without TLS, too; whoever is in between can read it")
	f.StringVar(&p.caFile, "ca-file", "", "certificates (PEM) to trust for the hub's TLS instead of the system's")
	f.BoolVar(&p.api, "api", false, "go through the secure channel listener of the hub itself and show --credential there, for hubs with --api-authority")
	f.StringVar(&p.root, "root", string(topics.DefaultRoot), "topic root of the hub")
	a.addKeyFlags(f)
	f.SortFlags = false
	for name, complete := range map[string]cobra.CompletionFunc{
		"identity": a.completeIdentity,
		"trust":    cobra.FixedCompletions([]string{"everyone"}, cobra.ShellCompDirectiveNoFileComp),
	} {
		if err := c.RegisterFlagCompletionFunc(name, complete); err != nil {
			panic(err) // the flag is defined above
		}
	}
}

// hubURL is where to connect to.
func (p *peerFlags) hubURL(a *app) string {
	if p.hub != "" {
		return p.hub
	}
	if h := a.env(envHub); h != "" {
		return h
	}
	return defaultHub
}

// connect reads the flags and connects. The caller closes the node.
func (p *peerFlags) connect(ctx context.Context, a *app, cfg device.Config) (*device.Node, error) {
	var err error
	if cfg.Root, err = topics.ParseRoot(p.root); err != nil {
		return nil, coded(exitUsage, err, "for example --root sealmq")
	}
	cfg.Username = p.user
	if cfg.Username == "" {
		cfg.Username = a.env(envUser)
	}
	if cfg.Password, err = p.password(a); err != nil {
		return nil, err
	}
	cfg.InsecurePasswordWithoutTLS = p.clearPassword
	if cfg.TLS, err = p.tlsConfig(); err != nil {
		return nil, err
	}
	mine, err := p.apply(a, &cfg)
	if err != nil {
		return nil, err
	}
	cfg.Logger = a.quiet()
	cfg.OnEvent = a.noteHub(cfg.KnownHubs, cfg.OnEvent)
	url := p.hubURL(a)
	// Before an identity is made that nobody asked for.
	if err := device.Check(url, cfg); err != nil {
		return nil, err
	}
	if cfg.Identity, err = a.useIdentity(p.identity, mine == nil); err != nil {
		return nil, err
	}
	if err := mine.about(cfg.Identity.Identifier()); err != nil {
		return nil, err
	}
	return device.Connect(ctx, url, cfg)
}

// noteHub returns what says that a hub is remembered for having been the first at its
// address. Other events are for next, which may be nil.
func (a *app) noteHub(file string, next func(device.Event)) func(device.Event) {
	return func(e device.Event) {
		switch {
		case e.Kind == device.EventHubRemembered:
			a.note("warning: the hub is %v, remembered in %s from now on; that nobody was in between just now is not certain, so compare it with what the hub prints when it starts",
				e.Hub, printable(file))
		case next != nil:
			next(e)
		}
	}
}

// apiHint says what --api needs.
const apiHint = "--credential must name one of the hub's --api-authority; to register an alias it has to say ockam-relay=ALIAS, or ockam-relay=*"

// door opens a channel to the hub's own listener where --api asks for one; nil without.
// It ends with the node.
func (p *peerFlags) door(ctx context.Context, node *device.Node) (*device.Channel, error) {
	if !p.api {
		return nil, nil
	}
	hub, ok := node.Hub()
	if !ok {
		return nil, coded(exitProtocol, errors.New("--api: this hub does not prove who it is"), "--api is for hubs of sealmq; leave it away")
	}
	ch, err := node.Dial(ctx, route.To(api.DefaultAddress), channel.TrustIdentifiers(hub))
	switch {
	case errors.Is(err, device.ErrUnknownAddress):
		return nil, coded(exitUnavailable, fmt.Errorf("--api: the hub has no listener of its own: %w", err), "it has one with --tcp or --api-authority; leave --api away")
	case errors.Is(err, device.ErrPeerRefused):
		return nil, coded(exitNoPerm, fmt.Errorf("--api: the hub refuses: %w", err), apiHint)
	}
	return ch, err
}

// mentionAPI adds to the hint of an error that a hub on TCP gives to strangers, too, what
// they would need there.
func (p *peerFlags) mentionAPI(a *app, err error) error {
	asks := errors.Is(err, device.ErrUnknownAddress) || errors.Is(err, device.ErrHubRefused)
	if p.api || !asks || !strings.HasPrefix(p.hubURL(a), "tcp://") {
		return err
	}
	code, hint := explain(err)
	return coded(code, err, hint+"; a hub that lets in holders of a credential alone wants --api and --credential")
}

// password reads the file, or takes the variable.
func (p *peerFlags) password(a *app) (string, error) {
	if p.passwordFile == "" {
		return a.env(envPassword), nil
	}
	text, err := readSmall(p.passwordFile, "the password")
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	line = strings.TrimRight(line, "\r")
	if line == "" || !utf8.ValidString(line) {
		return "", coded(exitData, fmt.Errorf("%s holds no password on its first line", p.passwordFile), "")
	}
	return line, nil
}

func (p *peerFlags) tlsConfig() (*tls.Config, error) {
	if p.caFile == "" {
		return nil, nil
	}
	text, err := readSmall(p.caFile, "the certificates")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, coded(exitData, fmt.Errorf("%s holds no certificate", p.caFile), "it must be PEM, with BEGIN CERTIFICATE lines")
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// readSmall reads a file that a flag names.
func readSmall(name, what string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		code := exitNoInput
		if errors.Is(err, fs.ErrPermission) {
			code = exitNoPerm
		}
		return nil, coded(code, fmt.Errorf("read %s: %w", what, err), fileHint(err))
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return nil, coded(exitIO, fmt.Errorf("read %s: %w", what, err), "")
	}
	if len(text) > maxSecretFile {
		return nil, coded(exitData, fmt.Errorf("%s is larger than 1 MiB", name), "")
	}
	return bytes.TrimPrefix(text, []byte("\ufeff")), nil
}
