package seglog

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// slowSync is a file whose syncs end when they are let.
type slowSync struct {
	file
	syncs *gate
}

// gate holds up each sync from open on, until enough has been appended.
type gate struct {
	held    chan struct{} // a sync is under way
	release chan struct{} // and may end
	open    atomic.Bool   // syncs are not held up
}

// Datasync is what commits.
func (f *slowSync) Datasync() error {
	if !f.syncs.open.Load() {
		f.syncs.held <- struct{}{}
		<-f.syncs.release
	}
	return f.file.Datasync()
}

// TestGroupCommit: whoever comes while a sync is under way shares the next one, however
// many they are, and hears nothing before it has ended.
func TestGroupCommit(t *testing.T) {
	const publishers, rounds = 64, 20
	g := &gate{held: make(chan struct{}, 1), release: make(chan struct{}, 1)}
	g.open.Store(true)
	opts := Options[note]{Mode: SyncAlways}
	opts.create = func(path string) (file, error) {
		f, err := openFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		return &slowSync{f, g}, err
	}
	l, _, _ := open(t, t.TempDir(), opts)
	g.open.Store(false)
	append1 := func(w committer) {
		if _, err := add(l, 1, false, w, 0, []byte("a frame")); err != nil {
			t.Error(err)
		}
	}

	first := make(waiter, 1)
	append1(first)
	<-g.held
	all := make(waiter, publishers)
	var wg sync.WaitGroup
	for range publishers {
		wg.Go(func() { append1(all) })
	}
	wg.Wait()
	if st := l.Stats(); len(first)+len(all) != 0 || st.Committed != 0 || st.Syncs != 0 {
		t.Fatalf("committed before the sync has ended: %+v", st)
	}
	g.release <- struct{}{}
	first.next(t)
	<-g.held
	if len(all) != 0 {
		t.Fatal("committed by the sync before")
	}
	g.release <- struct{}{}
	for range publishers {
		all.next(t)
	}
	if st := l.Stats(); st.Syncs != 2 || st.Batches != 2 {
		t.Fatalf("%d waited while one sync was under way: %+v", publishers, st)
	}

	// As publishers with a window of one do: each appends again once it has heard. A sync
	// takes until all of them wait, so two in a row commit what all have appended.
	var waiting, live atomic.Int64
	live.Store(publishers)
	done := make(chan struct{})
	var syncer sync.WaitGroup
	syncer.Go(func() {
		for {
			select {
			case <-g.held:
			case <-done:
				return
			}
			for waiting.Load() < live.Load() {
				runtime.Gosched()
			}
			g.release <- struct{}{}
		}
	})
	for range publishers {
		wg.Go(func() {
			defer live.Add(-1)
			heard := make(waiter, 1)
			for range rounds {
				append1(commitFunc(func(token uint64) { waiting.Add(-1); heard.Committed(token) }))
				waiting.Add(1) // no sync ends before
				heard.next(t)
			}
		})
	}
	wg.Wait()
	g.open.Store(true)
	close(done)
	syncer.Wait()
	if err := l.Close(); err != nil { // one sync more
		t.Fatal(err)
	}
	if st := l.Stats(); st.Syncs > 2+2*rounds+2+1 || st.Committed != 1+publishers+publishers*rounds {
		t.Errorf("%d syncs for %d commits", st.Syncs, st.Committed)
	}
}
