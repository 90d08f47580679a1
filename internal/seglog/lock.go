package seglog

import (
	"fmt"
	"path/filepath"

	"github.com/gofrs/flock"
)

// lockDir takes the folder for this process. The operating system gives it free
// at the end of the process, however it ends.
func lockDir(dir string) (*flock.Flock, error) {
	lock := flock.New(filepath.Join(dir, "lock"), flock.SetPermissions(0o600))
	ok, err := lock.TryLock()
	switch {
	case err != nil:
		return nil, fmt.Errorf("seglog: lock %s: %w", lock.Path(), err)
	case !ok:
		return nil, fmt.Errorf("%w: %s (stop the other hub, or give this one a folder of its own)", ErrInUse, dir)
	}
	return lock, nil
}
