package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
)

// Environment variables.
const (
	envHome     = "SEALMQ_HOME"
	envHub      = "SEALMQ_HUB"
	envHTTP     = "SEALMQ_HTTP"
	envUser     = "SEALMQ_USER"
	envPassword = "SEALMQ_PASSWORD"
)

// app is one run of the program.
type app struct {
	stdin     io.Reader
	stdout    *output
	stderr    io.Writer
	lookupEnv func(string) (string, bool)

	keys    keyFlags // --passphrase-file and --key-file
	folder  string   // --vault
	json    bool     // --json
	verbose bool     // --verbose
	started bool     // the command line was accepted
}

// output is a writer that remembers its first failure, so that a full disk or
// a closed pipe behind stdout is not taken for success. It is safe for
// concurrent use.
type output struct {
	mu  sync.Mutex
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

func (o *output) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil || errors.Is(o.err, syscall.EPIPE) {
		return nil
	}
	return coded(exitIO, fmt.Errorf("write the result: %w", o.err), "")
}

func (a *app) env(name string) string {
	v, _ := a.lookupEnv(name)
	return v
}

// home is the folder with this user's identities.
func (a *app) home() (string, error) {
	if h := a.env(envHome); h != "" {
		return h, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", coded(exitConfig, fmt.Errorf("no folder for identities: %w", err), "set "+envHome)
	}
	return filepath.Join(dir, "sealmq"), nil
}

// note writes a line for people to stderr.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.stderr, "sealmq: "+format+"\n", args...)
}

// result writes one result: value as JSON with --json, else line.
func (a *app) result(value any, line string) error {
	if a.json {
		text, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("encode the result: %w", err)
		}
		line = string(text)
	}
	_, err := fmt.Fprintln(a.stdout, line)
	if err != nil {
		return coded(exitIO, fmt.Errorf("write the result: %w", err), "")
	}
	return nil
}

// quiet is the logger of a command whose errors are reported anyway: it writes
// to stderr with --verbose only.
func (a *app) quiet() *slog.Logger {
	if a.verbose {
		return a.logger(slog.LevelDebug)
	}
	return slog.New(slog.DiscardHandler)
}

// logger writes to stderr, with --verbose more of it.
func (a *app) logger(level slog.Level) *slog.Logger {
	if a.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
}

// command builds the command tree.
func (a *app) command() *cobra.Command {
	showVersion := false
	root := &cobra.Command{
		Use:   "sealmq",
		Short: "End-to-end encrypted channels through an MQTT broker that cannot read them",
		Long: `sealmq gives two devices behind NAT a mutually authenticated, end-to-end
encrypted channel through an MQTT broker. The broker routes and queues; it can
neither read nor forge a message.`,
		Example: `  sealmq demo                                     # see it work, in one process

  sealmq hub                                      # a hub on this machine
  sealmq listen --trust everyone                  # Bob: prints his forwarding address
  sealmq send --trust everyone --to FWD_… 'Hello' # Alice`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noSuchCommand,
		RunE: func(c *cobra.Command, _ []string) error {
			if showVersion {
				return a.printVersion()
			}
			return c.Help()
		},
		PersistentPreRun: func(*cobra.Command, []string) {
			a.started = true
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage(err, c.CommandPath()+" --help")
	})
	root.Flags().BoolVar(&showVersion, "version", false, "print the version, as sealmq version does")
	pf := root.PersistentFlags()
	pf.BoolVar(&a.json, "json", false, "print results as JSON, one object a line")
	pf.BoolVarP(&a.verbose, "verbose", "v", false, "say more on stderr")
	root.AddGroup(
		&cobra.Group{ID: "run", Title: "Run:"},
		&cobra.Group{ID: "manage", Title: "Manage:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("run", a.demoCommand(), a.hubCommand(), a.listenCommand(), a.sendCommand())
	add("manage", a.identityCommand(), a.authorityCommand(), a.passwdCommand(), a.healthCommand(), a.versionCommand())
	root.AddCommand(exitCodesTopic(), environmentTopic())
	root.SetHelpCommandGroupID("manage")
	root.SetCompletionCommandGroupID("manage")
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = knownTopic
			c.Example = "  sealmq help identity create"
		case "completion":
			c.Args = noSuchCommand
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
			c.Example = "  sealmq completion bash > sealmq.bash"
			for _, shell := range c.Commands() {
				shell.Example = "  sealmq completion " + shell.Name() + " > sealmq." + shell.Name()
			}
		}
	}
	return root
}

// knownTopic wants the name of a command or of a page of help.
func knownTopic(c *cobra.Command, args []string) error {
	topic, rest, err := c.Root().Find(args)
	if err != nil || !topic.HasSubCommands() {
		return err
	}
	return noSuchCommand(topic, rest)
}

// noSuchCommand names a command that does not exist, and the nearest that does.
func noSuchCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := "see: " + c.CommandPath() + " help"
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "did you mean " + c.CommandPath() + " " + near[0] + "?"
	}
	return usagef(hint, "unknown command %q", args[0])
}

// environmentTopic is the page "sealmq help environment".
func environmentTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "environment",
		Short: "Environment variables",
		Long: strings.TrimSpace(`
Environment variables

  SEALMQ_HOME      folder with the identities, authorities, and what is known of
                   hubs and peers (default: sealmq in the user's configuration
                   folder)
  SEALMQ_HUB       the hub's URL where --hub is not given
  SEALMQ_USER      MQTT user name where --user is not given
  SEALMQ_PASSWORD  its password where --password-file is not given
  SEALMQ_HTTP      host:port of the hub's status pages, for hub and health, where
                   neither --http nor the configuration file says it

  SEALMQ_PASSPHRASE       passphrase of keys at rest, SEALMQ_PASSPHRASE_FILE a
  SEALMQ_PASSPHRASE_FILE  file with it, SEALMQ_KEY_FILE a key file: one of the
  SEALMQ_KEY_FILE         three, where neither --passphrase-file nor --key-file
                          is given. New identities are encrypted with it, too`),
	}
}
