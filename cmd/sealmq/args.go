package main

import (
	"io"
	"os"

	"github.com/spf13/cobra"
)

// noArgs wants none.
var noArgs = exactArgs()

// exactArgs wants as many arguments as it names.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("see: "+c.CommandPath()+" --help", "%s is missing", names[len(args)])
		}
		if len(names) == 0 && len(args) > 0 {
			return usagef("see: "+c.CommandPath()+" --help", "%s takes no arguments, but here is %q", c.CommandPath(), args[0])
		}
		if len(args) > len(names) {
			return usagef("see: "+c.CommandPath()+" --help", "one argument too many: %q", args[len(names)])
		}
		return nil
	}
}

// atMostOne wants one argument or none.
func atMostOne(c *cobra.Command, args []string) error {
	if len(args) <= 1 {
		return nil
	}
	return exactArgs("")(c, args)
}

func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err == nil && !os.SameFile(info, null)
}
