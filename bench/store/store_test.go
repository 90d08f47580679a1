// Package store measures what the hub's queues could be kept in, under the same
// promises: the segment log of the hub, and maintained embedded stores. It is a
// module of its own, so that the product does not depend on them.
package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"go.etcd.io/bbolt"

	"github.com/sealmq/sealmq/bridge"
	queues "github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/route"
)

// The load: so many targets, each with so many frames unacknowledged at most, in
// order for each target, and each frame deleted once it was delivered.
const (
	targets = 50
	window  = 20
	size    = 180 // a 64-byte message with its routes
)

// queue is one target. done is called once for each append, in order, when the
// frame is as safe as the store promises.
type queue interface {
	append(frame []byte, done func()) error
	release(upTo uint64) error
}

type backend interface {
	queue(i int) queue
	Close() error
}

func run(b *testing.B, open func(dir string) (backend, error)) {
	s, err := open(filepath.Join(b.TempDir(), "store"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	}()
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var before syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range targets {
		q := s.queue(i)
		wg.Go(func() {
			frame := make([]byte, size)
			slots := make(chan struct{}, window)
			n := uint64(0)
			for left.Add(-1) >= 0 {
				slots <- struct{}{}
				n++
				if err := q.append(frame, func() { <-slots }); err != nil {
					b.Error(err)
					return
				}
				if n%8 == 0 { // the target acknowledges, a few at a time
					if err := q.release(n); err != nil {
						b.Error(err)
						return
					}
				}
			}
			for range window { // wait for the last ones
				slots <- struct{}{}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	var after syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(b.N)/took.Seconds(), "frames/s")
	b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/frame")
}

func BenchmarkStore(b *testing.B) {
	for _, c := range []struct {
		name string
		open func(dir string) (backend, error)
	}{
		{"survives=power-cut/seglog", func(dir string) (backend, error) { return openLog(dir, queues.SyncAlways) }},
		{"survives=power-cut/pebble", func(dir string) (backend, error) { return openPebble(dir, pebble.Sync) }},
		{"survives=power-cut/bbolt", openBolt},
		{"survives=kill/seglog", func(dir string) (backend, error) { return openLog(dir, queues.SyncInterval) }},
		{"survives=nothing/pebble", func(dir string) (backend, error) { return openPebble(dir, pebble.NoSync) }},
	} {
		b.Run(c.name, func(b *testing.B) { run(b, c.open) })
	}
}

// The hub's own: seglog below bridge/store, memory outbox included.

type logBackend struct{ s *queues.Store }

func openLog(dir string, mode queues.Mode) (backend, error) {
	s, _, err := queues.Open(dir, queues.Options{Mode: mode})
	return &logBackend{s}, err
}

func (l *logBackend) Close() error { return l.s.Close() }

func (l *logBackend) queue(i int) queue {
	box, err := l.s.Outbox(fmt.Sprint("target", i), true)
	if err != nil {
		panic(err)
	}
	return &logQueue{box: box}
}

type logQueue struct {
	mu  sync.Mutex // the target's lock
	box bridge.Outbox
}

func (q *logQueue) append(frame []byte, done func()) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, _, err := q.box.Append(bridge.RoutedPacket(route.Stored, 1, false, nil, frame), bridge.NewTicket(acker(done), 0))
	return err
}

type acker func()

func (f acker) Acked(uint64) { f() }

func (q *logQueue) release(upTo uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.box.Release(upTo)
	return nil
}

// Pebble: a key for each frame; its own group commit.

type pebbleBackend struct {
	db   *pebble.DB
	sync *pebble.WriteOptions
}

func openPebble(dir string, sync *pebble.WriteOptions) (backend, error) {
	db, err := pebble.Open(dir, &pebble.Options{Logger: quiet{}, MemTableSize: 64 << 20})
	return &pebbleBackend{db, sync}, err
}

type quiet struct{}

func (quiet) Infof(string, ...any)           {}
func (quiet) Errorf(string, ...any)          {}
func (quiet) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func (p *pebbleBackend) Close() error { return p.db.Close() }

func (p *pebbleBackend) queue(i int) queue {
	q := &pebbleQueue{p: p, id: uint32(i), waits: make(chan wait, window)}
	go q.wait()
	return q
}

type wait struct {
	batch *pebble.Batch
	done  func()
}

type pebbleQueue struct {
	p     *pebbleBackend
	id    uint32
	n     uint64
	from  uint64
	waits chan wait
}

func (q *pebbleQueue) key(n uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, q.id), n)
}

func (q *pebbleQueue) append(frame []byte, done func()) error {
	q.n++
	batch := q.p.db.NewBatch()
	if err := batch.Set(q.key(q.n), frame, nil); err != nil {
		return err
	}
	// Applied at once, in order; the sync is waited for elsewhere, so that a target
	// has its whole window in flight.
	if q.p.sync.Sync {
		if err := q.p.db.ApplyNoSyncWait(batch, q.p.sync); err != nil {
			return err
		}
		q.waits <- wait{batch, done}
		return nil
	}
	err := errors.Join(q.p.db.Apply(batch, q.p.sync), batch.Close())
	done()
	return err
}

func (q *pebbleQueue) wait() {
	for w := range q.waits {
		if err := errors.Join(w.batch.SyncWait(), w.batch.Close()); err != nil {
			panic(err)
		}
		w.done()
	}
}

func (q *pebbleQueue) release(upTo uint64) error {
	err := q.p.db.DeleteRange(q.key(q.from), q.key(upTo+1), pebble.NoSync)
	q.from = upTo + 1
	return err
}

// bbolt: a bucket for each target; DB.Batch is its group commit.

type boltBackend struct{ db *bbolt.DB }

func openBolt(dir string) (backend, error) {
	db, err := bbolt.Open(dir, 0o600, nil)
	if err != nil {
		return nil, err
	}
	db.MaxBatchDelay = time.Millisecond
	return &boltBackend{db}, db.Update(func(tx *bbolt.Tx) error {
		for i := range targets {
			if _, err := tx.CreateBucket([]byte{byte(i)}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *boltBackend) Close() error { return s.db.Close() }

func (s *boltBackend) queue(i int) queue { return &boltQueue{db: s.db, name: []byte{byte(i)}} }

type boltQueue struct {
	db   *bbolt.DB
	name []byte
	n    uint64
	from uint64
}

func (q *boltQueue) append(frame []byte, done func()) error {
	q.n++
	key := binary.BigEndian.AppendUint64(nil, q.n)
	go func() {
		defer done()
		if err := q.db.Batch(func(tx *bbolt.Tx) error { return tx.Bucket(q.name).Put(key, frame) }); err != nil {
			panic(err)
		}
	}()
	return nil
}

func (q *boltQueue) release(upTo uint64) error {
	from := q.from
	q.from = upTo + 1
	return q.db.Batch(func(tx *bbolt.Tx) error {
		b := tx.Bucket(q.name)
		for n := from; n <= upTo; n++ {
			if err := b.Delete(binary.BigEndian.AppendUint64(nil, n)); err != nil {
				return err
			}
		}
		return nil
	})
}
