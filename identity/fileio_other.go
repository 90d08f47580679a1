//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package identity

import (
	"io/fs"
	"os"
	"sync"
)

// On these systems file modes say nothing, and the lock holds within the
// process only: let one process at a time write to a folder.
const (
	checksModes = false
	noFollow    = 0
)

func foreignOwner(fs.FileInfo) (uid uint32, foreign bool) { return 0, false }

func syncDir(string) error { return nil }

var (
	locksMu sync.Mutex
	locks   = map[string]*os.File{}
)

// tryLock takes a lock that lasts until f is closed.
func tryLock(f *os.File) (bool, error) {
	locksMu.Lock()
	defer locksMu.Unlock()
	if held := locks[f.Name()]; held != nil {
		if _, err := held.Stat(); err == nil { // still open
			return false, nil
		}
	}
	locks[f.Name()] = f
	return true, nil
}
