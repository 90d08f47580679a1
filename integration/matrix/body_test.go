package matrix

import (
	"errors"
	"testing"
	"time"

	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/integration/internal/rustpeer"
)

// sizes are those of a run, cut off here and there by a block or a length's next
// byte: 0 to 200 KiB.
var sizes = []int{0, 1, 15, 16, 64, 1000, 4096, 32<<10 + 7, 200 << 10}

// run is the body: everything that a cell has to show.
func (c cell) run(t *testing.T) {
	for name, test := range map[string]func(*table){
		"messages":    (*table).messages,
		"close":       (*table).closes,
		"refusals":    (*table).refusals,
		"credentials": (*table).credentials,
		"strangers":   (*table).strangers,
		"rotated":     (*table).rotated,
		"nested":      (*table).nested,
		"restart":     (*table).restart,
	} {
		t.Run(name, func(t *testing.T) { test(c.table(t)) })
	}
}

// table is a cell set up for one test: left listens, right dials.
type table struct {
	*testing.T
	cell
	hub         hub
	left, right party
	to          []string
}

func (c cell) table(t *testing.T) *table {
	t.Helper()
	return &table{T: t, cell: c, hub: c.hub(t), left: c.left(t), right: c.right(t)}
}

// connect connects both and has left listen.
func (x *table) connect(who trust) {
	x.Helper()
	x.left.connect(x.hub)
	x.right.connect(x.hub)
	alias := ""
	if x.alias {
		alias = "matrix"
	}
	x.to = x.left.listen(who, alias)
}

// open opens the channel, and sees that each knows who the other is.
func (x *table) open() {
	x.Helper()
	if err := x.right.dial(x.to, trust{x.left.identifier()}); err != nil {
		x.Fatalf("dial: %v", err)
	}
	x.meet()
}

func (x *table) meet() {
	x.Helper()
	if got := x.right.up(); got != x.left.identifier() {
		x.Fatalf("the peer of who dialled is %s, want %s", got, x.left.identifier())
	}
	if got := x.left.up(); got != x.right.identifier() {
		x.Fatalf("the peer of who listens is %s, want %s", got, x.right.identifier())
	}
}

// pass asks each side's echo, which also shows that everything sent before on the
// channel has been handled.
func (x *table) pass() {
	x.Helper()
	for _, p := range []party{x.right, x.left} {
		for _, size := range []int{0, 7, 70_000} {
			payload := rustpeer.Content(1, uint64(size), size)
			if err := p.request(payload); err != nil {
				x.Fatalf("%s asks for an echo of %d bytes: %v", p.identifier(), size, err)
			}
		}
	}
}

// arrive checks that a run arrives whole, unchanged and in order.
func (x *table) arrive(at, from party, run rustpeer.Run) {
	x.Helper()
	for i := range run.Count {
		want := run.At(i)
		got := at.next()
		if got.size != len(want) || got.digest != rustpeer.Digest(want) || got.from != from.identifier() {
			x.Fatalf("message %d (%d bytes) arrived with %d bytes from %s", i, len(want), got.size, got.from)
		}
	}
}

// messages: 1,000 each way of 0 bytes to 200 KiB, which crosses more than thirty
// rekeys, and answers along return routes.
func (x *table) messages() {
	x.connect(nil)
	x.open()
	for _, way := range []struct{ from, to party }{{x.right, x.left}, {x.left, x.right}} {
		run := rustpeer.Run{Seed: 4, Count: 1000, Sizes: sizes}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			way.from.send(run)
		}()
		x.arrive(way.to, way.from, run)
		<-sent
	}
	x.pass()
	for _, way := range []struct{ from, to party }{{x.right, x.left}, {x.left, x.right}} {
		one := rustpeer.Run{Seed: 5, Count: 1, Sizes: []int{5000}}
		way.from.send(one)
		m := way.to.next()
		answer := []byte("answer along the return route")
		if err := m.answer(answer); err != nil {
			x.Fatalf("answering: %v", err)
		}
		if got := way.from.next(); got.digest != rustpeer.Digest(answer) || got.from != way.to.identifier() {
			x.Errorf("the answer has %d bytes, from %s", got.size, got.from)
		}
	}
}

// closes: Close from each side.
func (x *table) closes() {
	x.connect(nil)
	x.open()
	x.pass() // a Close before any other word would mean a refusal
	x.right.hang()
	x.left.hungUp()
	x.open()
	x.pass()
	x.left.hang()
	x.right.hungUp()
}

// refusals: a policy on each side that the other does not satisfy. Nothing is
// delivered, and no channel stays. That the same listener lets the right peer in, and
// through to app, shows that it is the policy which refuses.
func (x *table) refusals() {
	x.connect(trust{x.right.identifier()})
	x.open()
	x.pass()
	other := x.cell.right(x.T)
	other.connect(x.hub)
	x.refused(other, other.dial(x.to, trust{x.left.identifier()}))
	if !x.left.nothing() {
		x.Error("a message of a peer that was refused was delivered")
	}
	if n := x.left.channels(); n != 1 {
		x.Errorf("%d channels beside that with the right peer", n-1)
	}
	x.pass()

	y := x.cell.table(x.T)
	y.connect(nil)
	err := y.right.dial(y.to, trust{x.right.identifier()})
	if _, ours := y.right.(*goParty); err == nil || ours && !errors.Is(err, device.ErrWrongIdentity) {
		y.Errorf("dialled somebody that the policy refuses: %v", err)
	}
	if n, m := y.right.channels(), y.left.channels(); n != 0 || m != 0 {
		y.Errorf("%d and %d channels with a peer that the policy refuses", n, m)
	}
	y.open()
	y.pass()
	if n := y.left.channels(); n != 1 {
		y.Errorf("%d channels, want the one that the policy admits", n)
	}
}

// refused checks what a peer finds that the listener has refused: our listener closes
// the channel, which a dialler of ours takes for the refusal that it is; a stock one
// says nothing, and a dialler has a channel that nobody answers on.
func (x *table) refused(p party, err error) {
	x.Helper()
	_, ourListener := x.left.(*goParty)
	_, ourDialler := p.(*goParty)
	switch {
	case ourDialler && ourListener:
		if err == nil { // the Close came later than Dial waits for it
			err = p.(*goParty).ended()
		}
		if !errors.Is(err, device.ErrPeerRefused) {
			x.Errorf("who was refused is told: %v", err)
		}
		return
	case ourDialler && err != nil:
		if !errors.Is(err, device.ErrTimeout) {
			x.Errorf("who was refused in silence is told: %v", err)
		}
		return
	case err == nil && p.try() == nil:
		x.Error("a peer that was refused got an answer")
	}
	if ourListener {
		p.hungUp() // a stock dialler takes the Close for what it says
	}
}

// credentials: each side shows one of an authority of its own kind, which the other
// accepts, and later another one in a RefreshCredentials.
func (x *table) credentials() {
	ofLeft, ofRight := x.cell.left(x.T), x.cell.right(x.T)
	x.left.accept(ofRight.history())
	x.right.accept(ofLeft.history())
	x.left.show(ofLeft.issue(x.left.history(), "gateway"))
	x.right.show(ofRight.issue(x.right.history(), "sensor"))
	x.connect(nil)
	x.open()
	x.pass()
	check := func(left, right string) {
		x.Helper()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		var gotLeft, gotRight string
		for limit := time.Now().Add(patience); time.Now().Before(limit); <-tick.C {
			gotLeft = x.right.roleOf(x.left.identifier(), ofLeft.identifier())
			gotRight = x.left.roleOf(x.right.identifier(), ofRight.identifier())
			if gotLeft == left && gotRight == right {
				return
			}
		}
		x.Fatalf("roles are known as %q and %q, want %q and %q", gotLeft, gotRight, left, right)
	}
	check("gateway", "sensor")
	x.left.show(ofLeft.issue(x.left.history(), "hub"))
	x.right.show(ofRight.issue(x.right.history(), "camera"))
	x.pass()
	check("hub", "camera")
}

// strangers: each side in turn shows a credential of an authority that the other
// does not know. A Go device that asks for a credential refuses the peer; a stock node
// cannot ask, and has a channel whose peer it knows nothing of.
func (x *table) strangers() {
	accepted, unknown := newGoParty(x.T, false), newGoParty(x.T, false)
	nothingOf := func(p, peer party) {
		x.Helper()
		for _, issuer := range []party{accepted, unknown} {
			if role := p.roleOf(peer.identifier(), issuer.identifier()); role != "" {
				x.Errorf("a credential of an unknown authority makes the peer a %s", role)
			}
		}
	}
	x.left.require(accepted.history())
	x.right.show(unknown.issue(x.right.history(), "sensor"))
	x.connect(nil)
	if _, ours := x.left.(*goParty); ours {
		x.refused(x.right, x.right.dial(x.to, trust{x.left.identifier()}))
		if !x.left.nothing() {
			x.Error("a message of a peer with an unknown authority's credential was delivered")
		}
		if n := x.left.channels(); n != 0 {
			x.Errorf("%d channels with a peer with an unknown authority's credential", n)
		}
	} else {
		x.open()
		x.pass()
		nothingOf(x.left, x.right)
	}

	y := x.cell.table(x.T)
	y.right.require(accepted.history())
	y.left.show(unknown.issue(y.left.history(), "gateway"))
	y.connect(nil)
	if _, ours := y.right.(*goParty); ours {
		if err := y.right.dial(y.to, trust{y.left.identifier()}); !errors.Is(err, device.ErrWrongIdentity) {
			y.Errorf("a listener with an unknown authority's credential: %v", err)
		}
		if n, m := y.right.channels(), y.left.channels(); n != 0 || m != 0 {
			y.Errorf("%d and %d channels with a listener with an unknown authority's credential", n, m)
		}
		return
	}
	y.open()
	y.pass()
	nothingOf(y.right, y.left)
}

// rotated: identities with more than one key, and keys rotated between channels.
// Each history grows by a change, and a Go peer knows the whole of it afterwards.
func (x *table) rotated() {
	changes := 1
	rotate := func() {
		x.Helper()
		changes++
		for _, p := range []party{x.left, x.right} {
			p.rotate()
			if n := historyLen(x.T, p.history()); n != changes {
				x.Fatalf("%s has a history of %d changes, want %d", p.identifier(), n, changes)
			}
		}
	}
	rotate()
	x.connect(nil)
	for range 2 {
		x.open()
		x.pass()
		for _, way := range [][2]party{{x.left, x.right}, {x.right, x.left}} {
			if p, ours := way[0].(*goParty); ours {
				if n := p.knows(way[1].identifier()); n != changes {
					x.Errorf("a history of %d changes is known as one of %d", changes, n)
				}
			}
		}
		x.right.hang()
		x.left.hungUp()
		rotate()
	}
}

// nested: channels inside the channel, one dialled from each side.
func (x *table) nested() {
	x.connect(nil)
	x.open()
	run := rustpeer.Run{Seed: 6, Count: 300, Sizes: sizes}
	for _, way := range []struct{ from, to party }{{x.right, x.left}, {x.left, x.right}} {
		way.to.listenInside()
		if err := way.from.dialInside(); err != nil {
			x.Fatalf("the inner channel: %v", err)
		}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			way.from.sendInside(run)
		}()
		x.arrive(way.to, way.from, run)
		<-sent
	}
	x.pass() // the outer one works as before
}

// restart: the hub goes and comes back in the middle. A Go device does nothing: its
// listener is there again, and the channel that it dialled is made again by itself
// where the address that it dialled is still the listener's. A stock node's program
// connects, listens and dials again, and so does a Go one whose peer has another
// address now, as a dynamic one of a TCP connection is.
func (x *table) restart() {
	x.connect(nil)
	x.open()
	x.pass()
	x.hub.restart()
	x.left.reconnect(x.hub)
	x.right.reconnect(x.hub)
	left, ourListener := x.left.(*goParty)
	right, ourDialler := x.right.(*goParty)
	resumes := ourDialler && (x.alias || ourListener && !left.overTCP)
	if ourDialler && !resumes {
		right.hang()
	}
	limit := time.Now().Add(patience)
	for {
		var err error
		if resumes {
			err = x.right.request([]byte("there?"))
		} else {
			x.to = x.left.again()
			err = x.right.dial(x.to, trust{x.left.identifier()})
		}
		if err == nil {
			break
		}
		if time.Now().After(limit) {
			x.Fatalf("after the hub was restarted: %v", err)
		}
	}
	if resumes {
		x.left.resumed()
	} else {
		x.meet()
	}
	x.pass()
}
