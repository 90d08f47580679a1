package hostile

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/broker"
)

// patience bounds every wait.
const patience = 20 * time.Second

// seed is of everything that attacks choose by chance.
const seed = 20240607

// hubs are the addresses behind the switchboard.
type hubs struct{ mqtt, tcp string }

// shared is the hub that all tests use: SEALMQ_HOSTILE_HUB and, for Rust,
// SEALMQ_HOSTILE_TCP, or one in this process.
var shared struct {
	sync.Mutex
	hub *broker.Hub
}

func theHub(t *testing.T) hubs {
	t.Helper()
	if given := os.Getenv("SEALMQ_HOSTILE_HUB"); given != "" {
		u, err := url.Parse(given)
		if err != nil || u.Scheme != "mqtt" || u.Port() == "" {
			t.Fatalf("SEALMQ_HOSTILE_HUB is %q, want mqtt://HOST:PORT", given)
		}
		return hubs{u.Host, os.Getenv("SEALMQ_HOSTILE_TCP")}
	}
	shared.Lock()
	defer shared.Unlock()
	if shared.hub == nil {
		h, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}, TCP: "127.0.0.1:0"})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		// Its goroutines are no test's, see watchGrowth.
		pprof.Do(context.Background(), pprof.Labels(), func(context.Context) { err = h.Start(ctx) })
		if err != nil {
			t.Fatal(err)
		}
		shared.hub = h
	}
	return hubs{shared.hub.MQTTAddr().String(), shared.hub.TCPAddr().String()}
}

func TestMain(m *testing.M) {
	fmt.Println("seed:", seed)
	growth.of = make(map[*testing.T]*watch)
	stop := make(chan struct{})
	var sampler sync.WaitGroup
	sampler.Go(func() { sampleHeap(stop) })
	code := m.Run()
	close(stop)
	sampler.Wait()
	fmt.Printf("largest heap in use: %.1f MiB\n", float64(growth.most)/(1<<20))
	if shared.hub != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := shared.hub.Shutdown(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		cancel()
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
