package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, those of sysexits.h where it has one.
const (
	exitOK          = 0
	exitUsage       = 64  // EX_USAGE
	exitData        = 65  // EX_DATAERR
	exitNoInput     = 66  // EX_NOINPUT
	exitNoUser      = 67  // EX_NOUSER
	exitNoHost      = 68  // EX_NOHOST
	exitUnavailable = 69  // EX_UNAVAILABLE
	exitSoftware    = 70  // EX_SOFTWARE
	exitOS          = 71  // EX_OSERR
	exitCantCreate  = 73  // EX_CANTCREAT
	exitIO          = 74  // EX_IOERR
	exitTempFail    = 75  // EX_TEMPFAIL
	exitProtocol    = 76  // EX_PROTOCOL
	exitNoPerm      = 77  // EX_NOPERM
	exitConfig      = 78  // EX_CONFIG
	exitInterrupted = 130 // a signal ended a command that had not finished
)

// exitTable documents the codes, for `sealmq help exit-codes`.
var exitTable = []struct {
	code    int
	meaning string
}{
	{exitOK, "done"},
	{exitUsage, "the command line is wrong: an unknown command or flag, a malformed URL, address or identifier"},
	{exitData, "the input is wrong: a message too large, a message that is no text, a malformed password, a damaged store"},
	{exitNoInput, "a file or an identity does not exist"},
	{exitNoUser, "the hub does not know the forwarding address, or the peer takes no messages at --address"},
	{exitNoHost, "the name of the hub's host does not resolve"},
	{exitUnavailable, "the hub cannot be reached, or is not ready"},
	{exitSoftware, "a fault in sealmq itself"},
	{exitOS, "the system refused something: a port or a data folder in use"},
	{exitCantCreate, "it exists already, or cannot be created; a file of known hubs or peers cannot be written"},
	{exitIO, "reading or writing failed"},
	{exitTempFail, "try again: the peer is offline, or did not answer in time"},
	{exitProtocol, "the hub or the peer answered something that is not the protocol"},
	{exitNoPerm, "refused: by the hub's login, by the peer's trust policy, by ours (the peer is not who --trust says); a file that this user may not read, or keys that others can"},
	{exitConfig, "the configuration is wrong: an unknown key, a listener without a policy, a store of a newer version"},
	{exitInterrupted, "interrupted by a signal before it was done"},
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes, as in sysexits.h:\n")
	for _, e := range exitTable {
		fmt.Fprintf(&b, "\n  %3d  %s", e.code, e.meaning)
	}
	return &cobra.Command{Use: "exit-codes", Short: "Exit codes", Long: b.String()}
}

// codedError is an error with the exit code and the hint that go with it.
type codedError struct {
	code int
	err  error
	hint string
}

func (e *codedError) Error() string { return e.err.Error() }
func (e *codedError) Unwrap() error { return e.err }
func (e *codedError) Hint() string  { return e.hint }

func coded(code int, err error, hint string) error {
	return &codedError{code: code, err: err, hint: hint}
}

// usage is an error in the command line; help is the command that explains it.
func usage(err error, help string) error {
	return coded(exitUsage, err, "see: "+help)
}

func usagef(hint, format string, args ...any) error {
	return coded(exitUsage, fmt.Errorf(format, args...), hint)
}

// codeOf returns the exit code of an error.
func codeOf(ctx context.Context, err error) int {
	var c *codedError
	var path *fs.PathError
	switch {
	case errors.As(err, &c):
		return c.code
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	if code, _ := explain(err); code != 0 {
		return code
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return exitTempFail
	case errors.Is(err, fs.ErrPermission):
		return exitNoPerm
	case errors.Is(err, fs.ErrExist), errors.Is(err, syscall.EROFS):
		return exitCantCreate
	case errors.Is(err, fs.ErrNotExist):
		return exitNoInput
	case errors.As(err, &path):
		return exitIO
	}
	return exitSoftware
}

// report writes an error and its hint to stderr, one line each.
func (a *app) report(ctx context.Context, err error) {
	if codeOf(ctx, err) == exitInterrupted {
		fmt.Fprintln(a.stderr, "sealmq: error: interrupted")
		return
	}
	fmt.Fprintf(a.stderr, "sealmq: error: %s\n", printable(message(err)))
	if hint := hintOf(err); hint != "" {
		fmt.Fprintf(a.stderr, "sealmq: hint: %s\n", printable(hint))
	}
}

// packages are the names in front of our errors, which mean nothing to the person
// at the terminal.
var packages = []string{
	"broker", "store", "seglog", "identity", "device", "channel", "route", "topics", "bridge", "node",
	"delivery", "hubproto", "pinfile", "mochibridge", "guard", "bare", "cbor",
}

// message is the error without the names of our packages, wherever it wraps
// another one.
func message(err error) string {
	parts := strings.Split(err.Error(), ": ")
	last := len(parts) - 1
	kept := slices.DeleteFunc(parts[:last:last], func(part string) bool { return slices.Contains(packages, part) })
	return strings.Join(append(kept, parts[last]), ": ")
}

func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	if code, hint := explain(err); code != 0 {
		return hint
	}
	return fileHint(err)
}

// fileHint says what to do about a file that cannot be opened or written.
func fileHint(err error) string {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "free some space on that disk"
	case errors.Is(err, syscall.EFBIG):
		return "let files be longer (ulimit -f, LimitFSIZE=)"
	case errors.Is(err, fs.ErrPermission):
		return "give it to the user who runs this, or choose another path"
	case errors.Is(err, fs.ErrNotExist):
		return "check the path; a relative one begins in the folder where this was started"
	}
	return ""
}

// printable replaces what could move a terminal's cursor or break a line.
func printable(text string) string {
	clean := func(r rune) bool {
		return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\u2028' || r == '\u2029' || bidi(r)
	}
	if !strings.ContainsFunc(text, clean) {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case clean(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// bidi reports the characters that change the direction of what follows.
func bidi(r rune) bool {
	return r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069' || r == '\u200e' || r == '\u200f'
}
