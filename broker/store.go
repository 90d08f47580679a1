package broker

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/store"
)

// Durability says when a frame that the hub acknowledges is safe.
type Durability string

// The modes of durability. docs/durability.md says what each survives.
const (
	// DurabilityAlways: on stable storage. Nothing that was acknowledged is lost
	// by a power cut.
	DurabilityAlways Durability = "always"
	// DurabilityInterval: with the operating system, and on stable storage after
	// SyncInterval at most. A killed hub loses nothing. The default with a data
	// folder.
	DurabilityInterval Durability = "interval"
	// DurabilityMemory: in memory. A hub that ends loses what is queued. The
	// default, and the only choice, without a data folder.
	DurabilityMemory Durability = "memory"
)

var durabilities = []Durability{DurabilityAlways, DurabilityInterval, DurabilityMemory}

// storeName is the store's folder in the data folder.
const storeName = "store"

// Bounds of the store's settings.
const (
	minSync    = 10 * time.Millisecond
	maxSync    = time.Minute
	minSegment = 1 << 20
	maxSegment = 1 << 30
)

// durability is the mode that is in force.
func (c *Config) durability() Durability {
	if c.Data == "" {
		return DurabilityMemory
	}
	return cmp.Or(c.Durability, DurabilityInterval)
}

func (c *Config) checkDurability() error {
	switch {
	case c.Durability != "" && !slices.Contains(durabilities, c.Durability):
		return &ConfigError{Key: "durability", Problem: fmt.Sprintf("there is no mode %q", string(c.Durability)), Fix: "choose always, interval or memory"}
	case c.Data == "" && c.Durability != "" && c.Durability != DurabilityMemory:
		return &ConfigError{Key: "durability", Problem: fmt.Sprintf("%q needs a folder to keep frames in", string(c.Durability)), Fix: "set data (--data)"}
	case c.SyncInterval != 0 && (c.SyncInterval < minSync || c.SyncInterval > maxSync):
		return &ConfigError{Key: "sync_interval", Problem: fmt.Sprintf("%v is out of range", c.SyncInterval), Fix: "choose from 10ms to 1m"}
	case c.SegmentSize != 0 && (c.SegmentSize < minSegment || c.SegmentSize > maxSegment):
		return &ConfigError{Key: "segment_size", Problem: fmt.Sprintf("%v is out of range", c.SegmentSize), Fix: "choose from 1MiB to 1GiB"}
	}
	return nil
}

// StoreError says why the store in the data folder cannot be used. It wraps the
// cause: [store.ErrInUse], [store.ErrCorrupt], [store.ErrNewer], [store.ErrIdentity],
// [store.ErrKey] or an error of the file system.
type StoreError struct {
	// Folder is the store's.
	Folder string
	Err    error
}

func (e *StoreError) Error() string {
	return "broker: the store: " + strings.TrimPrefix(strings.TrimPrefix(e.Err.Error(), "store: "), "seglog: ")
}

// Unwrap returns the cause.
func (e *StoreError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *StoreError) Hint() string {
	switch {
	case errors.Is(e.Err, store.ErrInUse):
		return "stop the other hub, or give this one a data folder of its own"
	case errors.Is(e.Err, store.ErrNewer):
		return "run the version that wrote it, or a newer one; going back to an older version loses what is queued"
	case errors.Is(e.Err, store.ErrIdentity):
		return "bring back " + filepath.Join(filepath.Dir(e.Folder), identityFolder, identityFile) + " from a backup, or move " + e.Folder +
			" away to start as another hub, without what is queued"
	case errors.Is(e.Err, store.ErrKey), errors.Is(e.Err, bridge.ErrRoute):
		return "bring back the address key that the store was made with, or move " + e.Folder + " away and lose what is queued"
	case errors.Is(e.Err, store.ErrCorrupt):
		return "restore " + e.Folder + " from a backup, or move it away to start without queues and forwarders"
	case errors.Is(e.Err, syscall.EROFS):
		return "make " + e.Folder + " writable, or choose another data folder"
	case errors.Is(e.Err, syscall.EFBIG):
		return "let the hub's files be longer (ulimit -f, LimitFSIZE=)"
	case diskFull(e.Err):
		return "free some space; a new store needs a few kilobytes to begin with"
	case errors.Is(e.Err, syscall.EACCES), errors.Is(e.Err, syscall.EPERM):
		return "the hub's user must own " + e.Folder + " and what is in it"
	}
	return "look after " + e.Folder
}

// folderError is a data folder that cannot be made or looked at.
type folderError StoreError

func (e *folderError) Error() string { return fmt.Sprintf("broker: data folder: %v", e.Err) }
func (e *folderError) Unwrap() error { return e.Err }
func (e *folderError) Hint() string  { return (*StoreError)(e).Hint() }

// lockName is the file in a data folder that says that a hub has it.
const lockName = "lock"

// lockData takes the data folder for this hub, whatever it keeps there; unlock gives
// it free. Where files cannot be locked, on a read-only disk say, that is no reason
// not to run: the store, where there is one, says why it cannot be used.
func lockData(cfg *Config, logger *slog.Logger) (unlock func(), err error) {
	none := func() {}
	if cfg.Data == "" {
		return none, nil
	}
	lock := flock.New(filepath.Join(cfg.Data, lockName), flock.SetPermissions(0o600))
	ok, err := lock.TryLock()
	switch {
	case err != nil:
		logger.Warn("the data folder cannot be locked: see to it that no other hub uses it", "folder", cfg.Data, "err", err)
		return none, nil
	case !ok:
		return nil, &StoreError{Folder: cfg.Data, Err: fmt.Errorf("%w: %s", store.ErrInUse, cfg.Data)}
	}
	return func() {
		if err := lock.Unlock(); err != nil {
			logger.Warn("the data folder stays locked", "folder", cfg.Data, "err", err)
		}
	}, nil
}

// openStore opens the store of a hub whose queues outlive it; nil for any other.
func openStore(cfg *Config, logger *slog.Logger) (*store.Store, *store.Report, error) {
	mode := cfg.durability()
	if mode == DurabilityMemory {
		if cfg.Data != "" {
			dir := filepath.Join(cfg.Data, storeName)
			if found, _ := filepath.Glob(filepath.Join(dir, "*.seg")); len(found) > 0 {
				// What was acknowledged would lie there until another setting brings it
				// back, and aliases would go to others meanwhile.
				return nil, nil, &ConfigError{Key: "durability", Problem: "there is a store in " + dir + ", which a hub with queues in memory does not read",
					Fix: "leave durability as it was, or move that folder away and lose what is queued"}
			}
			logger.Warn("queues and forwarders are kept in memory and end with the hub", "option", "durability")
		}
		return nil, nil, nil
	}
	o := store.Options{
		Mode: store.SyncAlways, Interval: cfg.SyncInterval, SegmentSize: int64(cfg.SegmentSize),
		Logger: logger.With("part", "store"),
	}
	// What the bridge lets wait for the disk, a quarter of what may be unanswered, with
	// as much again for records, and a segment.
	o.Reserve = cmp.Or(o.SegmentSize, store.DefaultSegmentSize) + cmp.Or(int64(cfg.Limits.WaitingBytes), bridge.DefaultWaitingBytes)/2
	if mode == DurabilityInterval {
		o.Mode = store.SyncInterval
	}
	dir := filepath.Join(cfg.Data, storeName)
	s, rep, err := store.Open(dir, o)
	if err != nil {
		return nil, nil, &StoreError{Folder: dir, Err: err}
	}
	logger.Info("the store is open", "durability", string(mode), "folder", dir, "records", rep.Records, "bytes", rep.Bytes,
		"segments", rep.Segments, "queues", rep.Names, "frames", rep.Frames, "frame_bytes", rep.FrameBytes, "torn_bytes", rep.TornBytes)
	return s, rep, nil
}

// restore gives the router what the store remembers.
func (h *Hub) restore() error {
	st, err := h.store.State()
	if err == nil {
		err = h.bridge.Restore(st)
	}
	if err != nil {
		return &StoreError{Folder: filepath.Join(h.cfg.Data, storeName), Err: err}
	}
	return nil
}

// StoreStatus is what /status says about the store.
type StoreStatus struct {
	// Durability is "always", "interval" or "memory".
	Durability Durability `json:"durability"`
	// Refused says why the disk refuses writes at this moment; empty while it takes
	// them. Meanwhile acknowledgements wait, and nothing is lost.
	Refused string `json:"refused,omitempty"`
	// Segments and Bytes are what lies on disk now.
	Segments int   `json:"segments"`
	Bytes    int64 `json:"bytes"`
	// Found is what the hub found when it started.
	Found *StoreFound `json:"found,omitempty"`
}

// StoreFound is what a hub found in its store when it started.
type StoreFound struct {
	Records    int64 `json:"records"`
	Bytes      int64 `json:"bytes"`
	Segments   int   `json:"segments"`
	Queues     int   `json:"queues"`
	Frames     int   `json:"frames"`
	FrameBytes int64 `json:"frame_bytes"`
	// TornBytes is what a crash had cut short and the hub cut off; no part of it
	// was ever acknowledged, except after a power cut in mode "interval".
	TornBytes  int64  `json:"torn_bytes"`
	TornReason string `json:"torn_reason,omitempty"`
}

func (h *Hub) storeStatus() StoreStatus {
	s := StoreStatus{Durability: h.cfg.durability()}
	if h.store == nil {
		return s
	}
	if err := h.store.Refusal(); err != nil {
		s.Refused = err.Error()
	}
	st, f := h.store.Stats(), h.found
	s.Segments, s.Bytes = st.Segments, st.DiskBytes
	s.Found = &StoreFound{
		Records: f.Records, Bytes: f.Bytes, Segments: f.Segments, Queues: f.Names, Frames: f.Frames, FrameBytes: f.FrameBytes,
		TornBytes: f.TornBytes, TornReason: f.TornReason,
	}
	return s
}

// storeSamples are the store's counters and gauges.
func (h *Hub) storeSamples() []sample {
	if h.store == nil {
		return nil
	}
	st := h.store.Stats()
	refused := 0.0
	if h.store.Failing() {
		refused = 1
	}
	return []sample{
		{name: "sealmq_store_refused", help: "1 while the disk refuses writes and acknowledgements wait.", gauge: true, n: refused},
		{name: "sealmq_store_failures_total", help: "Writes and syncs that the disk refused.", n: float64(st.Failures)},
		{name: "sealmq_store_records_total", help: "Records appended.", n: float64(st.Appended)},
		{name: "sealmq_store_writes_total", help: "Writes, each of many records.", n: float64(st.Batches)},
		{name: "sealmq_store_syncs_total", help: "Syncs.", n: float64(st.Syncs)},
		{name: "sealmq_store_segments", help: "Segment files.", gauge: true, n: float64(st.Segments)},
		{name: "sealmq_store_bytes", help: "Bytes of the segment files.", gauge: true, n: float64(st.DiskBytes)},
		{name: "sealmq_store_live_bytes", help: "Bytes of records that are still needed.", gauge: true, n: float64(st.LiveBytes)},
	}
}
