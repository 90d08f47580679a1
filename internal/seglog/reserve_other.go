//go:build !linux

package seglog

import (
	"errors"
	"os"
)

// freeSpace is not known here.
func freeSpace(string) (int64, bool) { return 0, false }

// allocate makes a file of that length, with room on the disk for all of it.
func allocate(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(fill(f, size), f.Close())
}

// datasync brings what was written of a file to stable storage.
func datasync(f *os.File) error { return f.Sync() }

// startWriting leaves the start to the system.
func startWriting(*os.File, int64, int64) {}
