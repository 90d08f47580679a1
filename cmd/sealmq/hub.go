package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sealmq/sealmq/broker"
)

// hubInfo is the one line that a hub prints on stdout with --json.
type hubInfo struct {
	Identifier string   `json:"identifier"`
	MQTT       []string `json:"mqtt"`
	TCP        string   `json:"tcp,omitempty"`
	HTTP       string   `json:"http,omitempty"`
	Root       string   `json:"root"`
}

func (a *app) hubCommand() *cobra.Command {
	var file, logFormat string
	var check bool
	var flags broker.Config
	c := &cobra.Command{
		Use:   "hub",
		Short: "Run a hub: an MQTT broker with the forwarder",
		Long: `Runs a hub: an MQTT broker that passes sealed frames between devices, and serves
ordinary MQTT clients on all topics outside its root.

On the loopback interface a hub that is not told who may connect is open to
everybody on this machine; behind a reverse proxy on the same machine that means
everybody. Anywhere else it refuses to start until it is told.

Settings come from --config and from flags; a flag wins. A hub ends at TERM or
INT. At HUP it reads certificates, password file and lists of devices again, and
ends the connections that they no longer let in.`,
		Example: `  sealmq hub
  sealmq hub --mqtt 127.0.0.1:0 --data ./hub-data
  sealmq hub --mqtt mqtts://0.0.0.0:8883 --tls-cert hub.pem --tls-key hub.key --password-file passwd
  sealmq hub --config hub.yaml --check`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := hubConfig(file, c.Flags(), &flags)
			if err != nil {
				return err
			}
			if cfg.HTTP == "" && !c.Flags().Changed("http") {
				cfg.HTTP = a.env(envHTTP)
			}
			if cfg, err = a.hubKeys(cfg); err != nil {
				return err
			}
			if cfg.Logger, err = a.hubLogger(logFormat); err != nil {
				return err
			}
			if check {
				if err := broker.Check(cfg); err != nil {
					return err
				}
				return a.result(map[string]bool{"ok": true}, "the configuration is good")
			}
			return a.runHub(c.Context(), cfg)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "config", "", "configuration file (YAML)")
	f.BoolVar(&check, "check", false, "check the configuration and its files, and exit")
	f.StringVar(&logFormat, "log", "text", "log format on stderr: text or json")
	hubFlags(f, &flags)
	a.addKeyFlags(f)
	return c
}

// hubKeys lets a flag or a variable for the protection of keys win over the file.
func (a *app) hubKeys(cfg broker.Config) (broker.Config, error) {
	p, err := a.protection()
	if err == nil && p.Encrypts() {
		cfg.Protection, cfg.PassphraseFile, cfg.KeyFile = p, "", ""
	}
	return cfg, err
}

// hubFlags defines a flag for each setting that a flag can override.
func hubFlags(f *pflag.FlagSet, c *broker.Config) {
	f.StringSliceVar(&c.MQTT, "mqtt", nil, "listen at host:port, mqtt://, mqtts://, ws:// or wss:// host:port; may be repeated (default "+broker.DefaultMQTT+")")
	f.BoolVar(&c.MQTTOpen, "mqtt-open", false, "let anybody connect, on every interface")
	f.StringVar(&c.PasswordFile, "password-file", "", "accounts, one user:bcrypt:role[:identifier] a line (see sealmq passwd)")
	f.StringSliceVar(&c.Devices.Allow, "allow-device", nil, "let in the device with this identifier when it proves it; may be repeated")
	f.StringVar(&c.Devices.AllowFile, "allow-devices-file", "", "file with such identifiers, one a line")
	f.StringSliceVar(&c.Devices.Authorities, "device-authority", nil, "let in devices with a credential of this authority: a file made by sealmq authority show; may be repeated")
	f.StringToStringVar(&c.Devices.Attributes, "device-attribute", nil, "NAME=VALUE that such a credential has to say; may be repeated")
	f.BoolVar(&c.Devices.AnyoneProven, "anyone-proven", false, "let in every device that proves an identity, on every interface")
	f.DurationVar(&c.Devices.ClockSkew, "clock-skew", 0, fmt.Sprintf("how far a device's clock may be off, 1s to 10m (default %v)", broker.DefaultClockSkew))
	f.BoolVar(&c.InsecurePlaintext, "insecure-plaintext", false, "let passwords and proofs travel unencrypted off this machine")
	f.StringVar(&c.TCP, "tcp", "", "listen at host:port, by convention port 4000, for peers that speak the Ockam TCP transport")
	f.BoolVar(&c.TCPOpen, "tcp-open", false, "let anybody who reaches --tcp use forwarders and register dynamic ones")
	f.BoolVar(&c.TCPAliases, "tcp-aliases", false, "let --tcp peers take aliases without proof; the newest wins, never against an identity")
	f.StringVar(&c.APIAuthority, "api-authority", "", "change history of the authority whose credentials register aliases through the listener \"api\"")
	f.StringVar(&c.TLS.Cert, "tls-cert", "", "certificate chain for mqtts and wss (PEM)")
	f.StringVar(&c.TLS.Key, "tls-key", "", "its private key (PEM)")
	f.StringVar(&c.TLS.ClientCA, "tls-client-ca", "", "authorities of client certificates (PEM)")
	f.BoolVar(&c.TLS.ClientRequired, "tls-client-required", false, "end the handshake of every client without such a certificate")
	f.StringToStringVar(&c.Certificates, "certificate", nil, "NAME=ROLE: let in whose certificate has this common name or DNS name, as user, observer or device:IDENTIFIER; may be repeated")
	f.StringVar(&c.Data, "data", "", "folder for what outlives the process (default: nothing does)")
	f.StringVar((*string)(&c.Durability), "durability", "", "when a frame is acknowledged: always (synced to disk), interval (survives a kill, default with --data) or memory")
	f.DurationVar(&c.SyncInterval, "sync-interval", 0, "most that a power cut loses with --durability interval (default 1s)")
	f.Var(&c.SegmentSize, "segment-size", "length of a file of the store, 1MiB to 1GiB (default 64MiB)")
	f.StringVar(&c.AddressKeyFile, "address-key-file", "", "64 hex digits from which hub addresses are derived (default: in the data folder)")
	f.StringVar(&c.HTTP, "http", "", "serve /healthz, /readyz, /metrics and /status at host:port (also $"+envHTTP+")")
	f.BoolVar(&c.HTTPOpen, "http-open", false, "let other machines read the status pages")
	f.StringVar(&c.Root, "root", "", "topic root (default sealmq)")
	f.BoolVar(&c.Trace, "trace", false, "publish a line for each frame to observers")
	f.Var(&c.Limits.Frame, "max-frame", "largest frame, 4KiB to 16MiB (default 256KiB)")
	f.IntVar(&c.Limits.Connections, "max-connections", 0, "most MQTT connections (default 65536)")
	f.DurationVar(&c.ShutdownTimeout, "shutdown-timeout", 0, fmt.Sprintf("how long to wait for peers at the end (default %v)", broker.DefaultShutdown))
}

// hubConfig reads the file and lets the flags that were given override it.
func hubConfig(file string, f *pflag.FlagSet, flags *broker.Config) (broker.Config, error) {
	var cfg broker.Config
	if file != "" {
		var err error
		if cfg, err = broker.Load(file); err != nil {
			return cfg, err
		}
	}
	override := map[string]func(){
		"mqtt":                func() { cfg.MQTT = flags.MQTT },
		"mqtt-open":           func() { cfg.MQTTOpen = flags.MQTTOpen },
		"password-file":       func() { cfg.PasswordFile = flags.PasswordFile },
		"allow-device":        func() { cfg.Devices.Allow = flags.Devices.Allow },
		"allow-devices-file":  func() { cfg.Devices.AllowFile = flags.Devices.AllowFile },
		"device-authority":    func() { cfg.Devices.Authorities = flags.Devices.Authorities },
		"device-attribute":    func() { cfg.Devices.Attributes = flags.Devices.Attributes },
		"anyone-proven":       func() { cfg.Devices.AnyoneProven = flags.Devices.AnyoneProven },
		"clock-skew":          func() { cfg.Devices.ClockSkew = flags.Devices.ClockSkew },
		"insecure-plaintext":  func() { cfg.InsecurePlaintext = flags.InsecurePlaintext },
		"tcp":                 func() { cfg.TCP = flags.TCP },
		"tcp-open":            func() { cfg.TCPOpen = flags.TCPOpen },
		"tcp-aliases":         func() { cfg.TCPAliases = flags.TCPAliases },
		"api-authority":       func() { cfg.APIAuthority = flags.APIAuthority },
		"tls-cert":            func() { cfg.TLS.Cert = flags.TLS.Cert },
		"tls-key":             func() { cfg.TLS.Key = flags.TLS.Key },
		"tls-client-ca":       func() { cfg.TLS.ClientCA = flags.TLS.ClientCA },
		"tls-client-required": func() { cfg.TLS.ClientRequired = flags.TLS.ClientRequired },
		"certificate":         func() { cfg.Certificates = flags.Certificates },
		"data":                func() { cfg.Data = flags.Data },
		"durability":          func() { cfg.Durability = flags.Durability },
		"sync-interval":       func() { cfg.SyncInterval = flags.SyncInterval },
		"segment-size":        func() { cfg.SegmentSize = flags.SegmentSize },
		"address-key-file":    func() { cfg.AddressKeyFile = flags.AddressKeyFile },
		"http":                func() { cfg.HTTP = flags.HTTP },
		"http-open":           func() { cfg.HTTPOpen = flags.HTTPOpen },
		"root":                func() { cfg.Root = flags.Root },
		"trace":               func() { cfg.Trace = flags.Trace },
		"max-frame":           func() { cfg.Limits.Frame = flags.Limits.Frame },
		"max-connections":     func() { cfg.Limits.Connections = flags.Limits.Connections },
		"shutdown-timeout":    func() { cfg.ShutdownTimeout = flags.ShutdownTimeout },
	}
	f.Visit(func(flag *pflag.Flag) {
		if set, ok := override[flag.Name]; ok {
			set()
		}
	})
	return cfg, nil
}

func (a *app) hubLogger(format string) (*slog.Logger, error) {
	switch format {
	case "text":
		return a.logger(slog.LevelInfo), nil
	case "json":
		level := slog.LevelInfo
		if a.verbose {
			level = slog.LevelDebug
		}
		return slog.New(slog.NewJSONHandler(a.stderr, &slog.HandlerOptions{Level: level})), nil
	}
	return nil, usagef("choose text or json", "unknown log format %q", format)
}

// runHub serves until ctx ends.
func (a *app) runHub(ctx context.Context, cfg broker.Config) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP) // at once: unheard, it ends the process
	defer signal.Stop(hup)
	hub, err := broker.New(cfg)
	if err != nil {
		return err
	}
	if err := hub.Start(ctx); err != nil {
		return err
	}
	stopReload := reloadOn(hup, hub, cfg.Logger)
	defer stopReload()
	info := hubInfo{Identifier: hub.Identifier().String(), Root: hub.Root(), TCP: hub.TCPURL(), HTTP: hub.HTTPURL()}
	info.MQTT = hub.MQTTURLs()
	if err := a.printHub(info); err != nil {
		return err
	}
	return hub.Wait(ctx)
}

// printHub says where the hub listens and who it is.
func (a *app) printHub(info hubInfo) error {
	if a.json {
		return a.result(info, "")
	}
	for _, u := range info.MQTT {
		if err := a.result(nil, "Listening at "+u); err != nil {
			return err
		}
	}
	if info.TCP != "" {
		if err := a.result(nil, "Listening at "+info.TCP); err != nil {
			return err
		}
	}
	if info.HTTP != "" {
		if err := a.result(nil, "Status at "+info.HTTP); err != nil {
			return err
		}
	}
	return a.result(nil, "Hub identity "+info.Identifier)
}

// reloadOn reads the files that can change again at each signal until the returned
// function is called.
func reloadOn(hup <-chan os.Signal, hub *broker.Hub, logger *slog.Logger) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-hup:
				if err := hub.Reload(); err != nil {
					logger.Warn("a file cannot be read again; what was in force stays", "err", printable(message(err)))
				}
			case <-end:
				return
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}
