package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestReadOnlyHome: a home in which nothing can be made is enough, for one program.
func TestReadOnlyHome(t *testing.T) {
	var stderr bytes.Buffer
	a := &app{stderr: &stderr, lookupEnv: func(name string) (string, bool) {
		return "/sys/kernel", name == envHome // nobody makes folders there
	}}
	if r, err := a.seen(); r != nil || err != nil || !strings.Contains(stderr.String(), "warning: ") {
		t.Errorf("%v, %v: %s", r, err, &stderr)
	}
}
