// Command sealmq is the hub, the two ends of a channel and the tools around
// them in one binary. Run "sealmq help" for its commands.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(program()) }

// program runs the command line of this process. The first INT or TERM asks
// it to end, the second kills it.
func program() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	return run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.LookupEnv)
}

// run executes one command line and returns the exit code. Results go to
// stdout, everything else to stderr.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, env func(string) (string, bool)) int {
	a := &app{stdin: stdin, stdout: &output{w: stdout}, stderr: stderr, lookupEnv: env}
	root := a.command()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(a.stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		err = a.stdout.failed()
	}
	if err == nil {
		return exitOK
	}
	if !a.started { // cobra's own: an unknown command or flag, a missing argument
		var c *codedError
		if !errors.As(err, &c) {
			err = usage(err, "sealmq help")
		}
	}
	a.report(ctx, err)
	return codeOf(ctx, err)
}
