package hostile

import (
	"runtime"
	"runtime/metrics"
	"sync"
	"time"
)

// heapBytes is what objects take on the heap, dead ones that are not collected yet
// included.
func heapBytes() int64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64())
}

// collected is what objects take that are in use.
func collected() int64 {
	runtime.GC()
	runtime.GC() // what the first one finalized
	return heapBytes()
}

// peakOf returns how far the heap has grown at most while f ran, and how far once it is
// over. It is about the whole process: nothing else may run meanwhile.
func peakOf(f func()) (most, after int64) {
	before := collected()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, heapBytes()-before)
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	f()
	close(stop)
	wg.Wait()
	return most, collected() - before
}
