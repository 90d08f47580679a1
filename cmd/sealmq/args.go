package main

import (
	"io"
	"os"

	"github.com/spf13/cobra"
)

// exactArgs wants as many arguments as it names.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("see: "+c.CommandPath()+" --help", "%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return usagef("see: "+c.CommandPath()+" --help", "one argument too many: %q", args[len(names)])
		}
		return nil
	}
}

func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && f.Name() != os.DevNull
}
