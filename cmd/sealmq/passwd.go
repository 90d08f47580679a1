package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/identity"
)

func (a *app) passwdCommand() *cobra.Command {
	var role, id, name string
	var cost int
	c := &cobra.Command{
		Use:   "passwd USER",
		Short: "Make a line for a hub's password file",
		Long: `Reads a password from standard input and prints the line for a hub's password
file (hub --password-file): user:bcrypt:role, and the identifier for a device.

A device may only use client ids that begin with its identifier. An observer
may watch everything under the root; it and a user may use all topics outside.`,
		Example: `  echo 'correct horse' | sealmq passwd watcher --role observer >> passwd
  sealmq passwd alice --role device --identity alice < secret >> passwd
  sealmq passwd pump7 --role device --identifier I0123… < secret >> passwd`,
		Args: exactArgs("a user name"),
		RunE: func(_ *cobra.Command, args []string) error {
			identifier, err := a.passwdIdentifier(role, id, name)
			if err != nil {
				return err
			}
			password, err := a.readPassword()
			if err != nil {
				return err
			}
			line, err := broker.PasswordLine(args[0], password, role, identifier, cost)
			if err != nil {
				return coded(exitData, err, "")
			}
			return a.result(map[string]string{"user": args[0], "role": role, "line": line}, line)
		},
	}
	c.Flags().StringVar(&role, "role", "user", "device, observer or user")
	c.Flags().StringVar(&id, "identifier", "", "identifier of the device")
	c.Flags().StringVar(&name, "identity", "", "identity of the device, from this machine's vault")
	c.Flags().IntVar(&cost, "cost", broker.DefaultBcryptCost, "bcrypt cost, 4 to 14; each step doubles the work of a login and of a guess")
	c.MarkFlagsMutuallyExclusive("identifier", "identity")
	return c
}

// passwdIdentifier returns the identifier for the line, "" for none.
func (a *app) passwdIdentifier(role, id, name string) (string, error) {
	switch role {
	case "device":
	case "observer", "user":
		if id != "" || name != "" {
			return "", usagef("leave --identifier and --identity away, or use --role device", "only a device has an identifier")
		}
		return "", nil
	default:
		return "", usagef("choose device, observer or user", "unknown role %q", role)
	}
	switch {
	case name != "":
		p, err := a.loadIdentity(name)
		if err != nil {
			return "", err
		}
		return p.Identifier().String(), nil
	case id == "":
		return "", usagef("add --identifier or --identity", "a device needs its identifier")
	}
	parsed, err := identity.ParseIdentifier(id)
	if err != nil {
		return "", usagef("sealmq identity show prints it", "%q is not an identifier", id)
	}
	return parsed.String(), nil
}

// readPassword reads the first line of standard input.
func (a *app) readPassword() ([]byte, error) {
	if isTerminal(a.stdin) {
		fmt.Fprint(a.stderr, "Password (shown as you type): ")
	}
	line, err := bufio.NewReader(io.LimitReader(a.stdin, 4096)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, coded(exitIO, fmt.Errorf("read the password: %w", err), "")
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return nil, coded(exitData, errors.New("no password on standard input"), "for example: echo 'correct horse' | sealmq passwd USER")
	}
	return []byte(line), nil
}
