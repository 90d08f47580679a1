package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Each example in a command's help is a command line that there is, with these flags
// and these arguments, and one at least is of that command or of one below it. What
// examples do is tested by the scripts in testdata.
func TestHelpExamples(t *testing.T) {
	tree := func() *cobra.Command {
		return (&app{lookupEnv: noEnv}).command()
	}
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		lines := exampleLines(c.Example)
		own := !c.Runnable()
		for _, words := range lines {
			// A tree of its own: flags keep their values.
			found, args, err := tree().Find(words[1:])
			if err != nil {
				t.Errorf("%s: %q: %v", c.CommandPath(), words, err)
				continue
			}
			own = own || strings.HasPrefix(found.CommandPath()+" ", c.CommandPath()+" ")
			if err := found.ParseFlags(args); err != nil {
				t.Errorf("%s: %q: %v", c.CommandPath(), words, err)
			}
			if err := found.ValidateArgs(found.Flags().Args()); err != nil {
				t.Errorf("%s: %q: %v", c.CommandPath(), words, err)
			}
			if err := found.ValidateRequiredFlags(); err != nil {
				t.Errorf("%s: %q: %v", c.CommandPath(), words, err)
			}
		}
		if !own {
			t.Errorf("%s has no example of its own", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(tree())
}

// exampleLines returns the calls of sealmq in an example, word by word: without
// comments, redirections, and what is before sealmq in a line.
func exampleLines(text string) (lines [][]string) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, " # ")
		for part := range strings.SplitSeq(line, "|") {
			for _, redirect := range []string{" > ", " >> ", " < "} {
				part, _, _ = strings.Cut(part, redirect)
			}
			var words []string
			for i, quoted := range strings.Split(part, "'") {
				if i%2 == 1 {
					words = append(words, quoted)
				} else {
					words = append(words, strings.Fields(quoted)...)
				}
			}
			for i, w := range words {
				if w == "sealmq" {
					lines = append(lines, words[i:])
					break
				}
			}
		}
	}
	return lines
}
