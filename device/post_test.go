package device

import (
	"context"
	"encoding/binary"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestPostWaitsForRoom: an outbox that is full, in bytes or in messages, has Post and Deliver
// wait, in turn, until there is room or their context ends; then the message is never sent,
// and takes no room.
func TestPostWaitsForRoom(t *testing.T) {
	for name, onDisk := range map[string]bool{"memory": false, "disk": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newHealSim(t, 2)
				s.faults, s.stream, s.dials, s.dir = false, false, false, ""
				if onDisk {
					s.dir = filepath.Join(t.TempDir(), "outbox")
				}
				const unit = 64 << 10
				s.limits = streamLimits{messages: 10, bytes: 4 * unit}
				defer s.close()
				s.startHub(nil)
				s.start(alice)
				no := uint64(0)
				message := func(size int) []byte {
					no++
					return append(binary.BigEndian.AppendUint64(nil, no), make([]byte, size-8)...)
				}
				var kept, refused []uint64
				post := func(size int) {
					t.Helper()
					if _, err := s.box.Post(t.Context(), message(size)); err != nil {
						t.Fatal(err)
					}
					kept = append(kept, no)
				}
				// full wants a message of that size to be one too many.
				full := func(size int) {
					t.Helper()
					for what, f := range map[string]func(context.Context, []byte) error{
						"Post":    func(ctx context.Context, b []byte) error { _, err := s.box.Post(ctx, b); return err },
						"Deliver": s.box.Deliver,
					} {
						begun := time.Now()
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						err := f(ctx, message(size))
						cancel()
						if d := time.Since(begun); !errors.Is(err, ErrTimeout) || d != time.Second {
							t.Errorf("%s: %v after %v", what, err, d)
						}
						ctx, cancel = context.WithCancel(t.Context())
						time.AfterFunc(time.Second, cancel)
						if err := f(ctx, message(size)); !errors.Is(err, context.Canceled) {
							t.Errorf("%s: %v", what, err)
						}
						refused = append(refused, no-1, no)
					}
				}
				waiting := make(chan uint64, 10)
				wait := func(size int) {
					b := message(size)
					number := no
					go func() {
						if _, err := s.box.Post(t.Context(), b); err != nil {
							t.Errorf("message %d: %v", number, err)
						}
						waiting <- number
					}()
					synctest.Wait()
				}
				for range 4 {
					post(unit)
				}
				full(8)
				wait(unit)
				full(8) // behind the one that waits
				wait(3 * unit)
				if n, size := s.box.Pending(); n != 4 || size != 4*unit || len(waiting) != 0 {
					t.Errorf("%d messages, %d bytes, %d came in", n, size, len(waiting))
				}

				s.start(bob)
				<-s.forwarder
				time.Sleep(time.Minute)
				for range 2 {
					kept = append(kept, <-waiting)
				}
				if n, _ := s.box.Pending(); n != 0 {
					t.Errorf("%d messages wait", n)
				}
				s.kill(bob)
				for range 10 {
					post(8)
				}
				full(8)
				s.start(bob)
				<-s.forwarder
				time.Sleep(time.Minute)
				post(3 * unit) // nothing has been left behind
				time.Sleep(time.Minute)
				s.mu.Lock()
				defer s.mu.Unlock()
				for _, no := range kept {
					if !s.taken[no] {
						t.Errorf("message %d has not arrived", no)
					}
				}
				for _, no := range refused {
					if s.taken[no] {
						t.Errorf("message %d has arrived, whose Post has failed", no)
					}
				}
			})
		})
	}
}
