package broker

import (
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// TestPeerRegistry: what the hub knows of its devices counts at its secure channel
// listener; of those whom it meets there it remembers for good whom it keeps, and
// strangers in memory alone.
func TestPeerRegistry(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "devices")
	open := func() peerRegistry {
		t.Helper()
		r, err := identity.OpenRegistry(dir, 0)
		if err != nil {
			t.Fatal(err)
		}
		return peerRegistry{r, identity.NewMemoryRegistry(0)}
	}
	rotated := func() (before, after *identity.Identity) {
		t.Helper()
		p, err := identity.Create()
		if err != nil {
			t.Fatal(err)
		}
		before = p.Identity()
		if err := p.Rotate(); err != nil {
			t.Fatal(err)
		}
		return before, p.Identity()
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	r := open()
	oldDevice, device := rotated()
	must(r.devices.Update(device))
	oldMember, member := rotated()
	must(r.Update(oldMember))
	must(r.Keep(member.Identifier()))
	must(r.Update(member))
	oldStranger, stranger := rotated()
	must(r.Update(stranger))
	refused := func(who *identity.Identity) bool { return errors.Is(r.Update(who), identity.ErrOlder) }
	if !refused(oldDevice) || !refused(oldMember) || !refused(oldStranger) {
		t.Error("an old history is taken")
	}
	if _, known := r.devices.Get(stranger.Identifier()); known {
		t.Error("the hub keeps a stranger among its devices")
	}
	if again, err := r.Import(member.ChangeHistory()); err != nil || again.Compare(member) != identity.Equal {
		t.Errorf("%v, %v", again, err)
	}
	r = open() // after a restart
	if !refused(oldDevice) || !refused(oldMember) {
		t.Error("after a restart an old history is taken")
	}
	if got, ok := r.Get(member.Identifier()); !ok || got.Compare(member) != identity.Equal {
		t.Error("the member is forgotten")
	}
	must(r.Update(oldStranger))
}

// TestAPILimits: what is set for the hub's secure channel listener holds, and counts.
func TestAPILimits(t *testing.T) {
	h := start(t, Config{TCP: "127.0.0.1:0", Limits: Limits{APIHandshakesPerSecond: 1, APIHandshakes: 8, APIHandshakeTimeout: time.Hour}})
	for i := range 6 {
		c, err := net.Dial("tcp", h.TCPAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		body := route.AppendFrame(nil, &route.Frame{Onward: route.To("api"), Return: route.To("me"), Payload: append(make([]byte, 31), byte(9+i))})
		if _, err := c.Write(append(route.AppendFrameHeader([]byte{route.Preamble}, len(body)), body...)); err != nil {
			t.Fatal(err)
		}
	}
	// Two of them are a quarter; the burst is four.
	for name, want := range map[string]float64{
		"sealmq_api_handshakes_open":                 2,
		"sealmq_api_dropped_total{reason=half-open}": 2,
		"sealmq_api_dropped_total{reason=rate}":      2,
	} {
		for limit := time.Now().Add(20 * time.Second); h.Status().Counters[name] != want; runtime.Gosched() {
			if time.Now().After(limit) {
				t.Fatalf("%s is %v, want %v", name, h.Status().Counters[name], want)
			}
		}
	}
}
