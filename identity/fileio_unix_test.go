//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
)

// ownedBy is a file that belongs to somebody.
type ownedBy struct {
	fs.FileInfo
	uid uint32
}

func (o ownedBy) Sys() any { return &syscall.Stat_t{Uid: o.uid} }

func TestForeignOwner(t *testing.T) {
	v := newVault(t)
	must(v.Create("alice"))
	path := v.Path("alice")
	info := must(os.Stat(path))
	me := uint32(os.Geteuid())
	for _, uid := range []uint32{0, me} {
		if err := checkMode(path, ownedBy{info, uid}, 0o600); err != nil {
			t.Errorf("user %d: %v", uid, err)
		}
	}
	err := checkMode(path, ownedBy{info, me + 4242}, 0o600)
	var perm *PermissionError
	if !errors.As(err, &perm) || perm.Fix != fmt.Sprintf("chown %d %s", me, path) || !strings.Contains(err.Error(), fmt.Sprint(me+4242)) {
		t.Error(err)
	}
}
