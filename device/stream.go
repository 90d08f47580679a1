package device

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/sealmq/sealmq/delivery"
)

// unknownGrace is how long a peer may say that nobody takes messages at an address
// until Deliver fails: a program that has just started may not have got there yet.
const unknownGrace = 3 * time.Second

// stream is one outbox of this node: the messages for one address of one peer. The
// lock of deliveries guards it.
type stream struct {
	ds      *deliveries
	ch      *Channel // that it goes through, one after the other
	id      delivery.OutboxID
	to      string
	snd     *delivery.Sender
	room    *semaphore.Weighted // the caller of post waits here, without the lock
	maxRoom int64
	least   int64 // room that a small message takes
	taken   map[uint64]int64
	waiting map[uint64]*Receipt
	pipe    *pipe         // nil: no channel
	store   *storedOutbox // nil: in memory
	timer   *time.Timer
	refused *time.Timer // runs while the peer says that the address is unknown
	err     error       // why it ended
}

// Receipt stands for a message that waits for the acknowledgement of the peer's
// program.
type Receipt struct {
	st     *stream
	id     MessageID
	done   chan struct{}
	err    error // set before done is closed
	strict bool  // fails when nobody takes messages at the address
}

// ID returns the message's id, which the peer's program sees as Message.ID.
func (r *Receipt) ID() MessageID { return r.id }

// Done is closed when the message is acknowledged, or will not be sent any more.
func (r *Receipt) Done() <-chan struct{} { return r.done }

// Err returns nil while the message waits and once it is acknowledged, else why it
// is not sent any more.
func (r *Receipt) Err() error {
	select {
	case <-r.done:
		return r.err
	default:
		return nil
	}
}

// Wait waits for the acknowledgement, until ctx ends; that ends the wait alone. The
// ErrUnacknowledged then wraps why the peer could not be reached last, if it could not:
// ErrPeerOffline, ErrUnknownAddress, ErrWrongIdentity or others.
func (r *Receipt) Wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUnacknowledged, r.st.ch.because(ctxError(ctx, "waiting for the peer's acknowledgement")))
	}
}

// streamLimits bound what an outbox holds.
type streamLimits struct{ messages, bytes int }

// newStreamLocked adds an outbox to the node; restored is what an earlier process
// has left, or nil.
func (ds *deliveries) newStreamLocked(to string, lim streamLimits, store *storedOutbox, restored *delivery.Restored) *stream {
	st := &stream{
		ds: ds, to: to, room: semaphore.NewWeighted(int64(lim.bytes)), maxRoom: int64(lim.bytes),
		least: int64(max(lim.bytes/lim.messages, 1)), taken: make(map[uint64]int64), waiting: make(map[uint64]*Receipt), store: store,
	}
	if store != nil {
		st.id = store.id
	} else {
		_, _ = rand.Read(st.id[:]) // never fails (crypto/rand)
	}
	cfg := delivery.SenderConfig{Outbox: st.id, Session: ds.session, Jitter: jitter}
	if restored == nil {
		st.snd = delivery.NewSender(cfg)
	} else {
		st.snd = delivery.RestoreSender(cfg, *restored)
		for _, p := range restored.Pending {
			if n := st.weight(len(p.Payload)); st.room.TryAcquire(n) { // fails where limits were lowered
				st.taken[p.Count] = n
			}
		}
	}
	st.timer = time.AfterFunc(time.Hour, st.wake)
	st.timer.Stop()
	st.refused = time.AfterFunc(time.Hour, st.unknown)
	st.refused.Stop()
	ds.streams[st.id] = st
	return st
}

func (st *stream) weight(n int) int64 { return min(max(int64(n), st.least), st.maxRoom) }

// wake is the timer's function.
func (st *stream) wake() {
	st.ds.mu.Lock()
	defer st.ds.mu.Unlock()
	st.ds.wakeLocked(st.pipe)
}

// armLocked sets the timer for when the sender has something to say by itself.
func (st *stream) armLocked() {
	if at := st.snd.Wake(); !at.IsZero() && st.err == nil {
		st.timer.Reset(max(time.Until(at), time.Millisecond))
	} else {
		st.timer.Stop()
	}
}

// post adds a message, once there is room. It keeps payload.
func (st *stream) post(ctx context.Context, payload []byte, strict bool) (*Receipt, error) {
	n := st.weight(len(payload))
	if err := st.room.Acquire(ctx, n); err != nil {
		return nil, st.ch.because(ctxError(ctx, "waiting for room in the outbox of the peer's "+fmt.Sprintf("%q", st.to)))
	}
	ds := st.ds
	ds.mu.Lock()
	if st.err != nil {
		defer ds.mu.Unlock()
		st.room.Release(n)
		return nil, st.err
	}
	count := st.snd.Add(st.to, payload, st.store == nil)
	r := &Receipt{
		st:   st,
		id:   MessageID{Sender: ds.n.Identifier(), Outbox: st.id, Count: count},
		done: make(chan struct{}), strict: strict,
	}
	st.taken[count], st.waiting[count] = n, r
	st.ch.signal()
	if st.store == nil {
		ds.wakeLocked(st.pipe)
		ds.mu.Unlock()
		return r, nil
	}
	kept := make(chan struct{})
	err := st.store.add(count, payload, func() {
		ds.mu.Lock()
		defer ds.mu.Unlock()
		st.snd.Ready(count)
		ds.wakeLocked(st.pipe)
		close(kept)
	})
	ds.mu.Unlock()
	if err != nil {
		st.withdraw(r, err)
		return nil, err
	}
	select {
	case <-kept:
		return r, nil
	case <-ctx.Done():
		if ending(ctx) {
			<-r.done // what is on disk by now stays there
			return nil, r.err
		}
		err := ctxError(ctx, "waiting for the disk to keep the message")
		if why := st.store.refusal(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		st.withdraw(r, err)
		return nil, err
	}
}

// ending reports whether ctx ended because the outbox does, which then settles all
// its receipts.
func ending(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errEnding) }

// withdraw takes a message back that nobody waits for any more, and returns whether
// the peer may have seen it. It does nothing when the message is settled.
func (st *stream) withdraw(r *Receipt, why error) (sent bool) {
	st.ds.mu.Lock()
	defer st.ds.mu.Unlock()
	sent = st.snd.Sent(r.id.Count)
	st.failLocked(r.id.Count, why)
	return sent
}

// failLocked gives a message up, unless it is settled, and says so: by its receipt, or by an
// event where an earlier process posted it and nobody has one.
func (st *stream) failLocked(count uint64, why error) {
	if !st.snd.Withdraw(count) {
		return
	}
	if st.store != nil {
		st.store.void(count)
	}
	if r := st.waiting[count]; r != nil {
		delete(st.waiting, count)
		r.err = why
		close(r.done)
	} else if st.err == nil {
		why = fmt.Errorf("%w; it was message %d of the outbox for %q, which an earlier process posted", why, count, st.to)
		st.ds.n.log.Warn("message given up", "err", why)
		st.ds.n.events.emit(Event{Kind: EventSendFailed, Err: why, Outbox: st.ds.n.outboxes.of(st)})
	}
	st.ds.wakeLocked(st.pipe)
}

// receivedLocked takes what the peer says about the outbox.
func (st *stream) receivedLocked(m *delivery.State, now time.Time) {
	before := st.snd.Refusal()
	acked := st.snd.Receive(m, now)
	if due := st.snd.Behind(); due > 0 {
		st.behindLocked(due)
		return
	}
	for _, count := range acked {
		st.room.Release(st.taken[count])
		delete(st.taken, count)
		if r := st.waiting[count]; r != nil {
			delete(st.waiting, count)
			close(r.done)
		}
	}
	if st.store != nil {
		st.store.acked(acked)
	}
	switch st.snd.Refusal() {
	case before:
	case delivery.RefusalUnknown:
		st.refused.Reset(unknownGrace)
	default:
		st.refused.Stop()
	}
}

// behindLocked ends an outbox whose peer has had more of it than it knows of.
func (st *stream) behindLocked(due uint64) {
	next, _, _ := st.snd.Pending()
	err := fmt.Errorf("%w: the next message of the outbox for %q has number %d at most, the peer waits for %d; "+
		"has its folder been put back from a backup? Outbox.Forget, then post again what is missing", ErrOutboxBehind, st.to, next, due)
	st.ds.n.log.Error("outbox ended", "peer", st.pipe.peer, "address", st.to, "err", err)
	st.ds.n.events.emit(Event{Kind: EventOutboxEnded, Err: err, Outbox: st.ds.n.outboxes.of(st)})
	st.endLocked(err)
}

// unknown fails who waits at an address where nobody takes messages.
func (st *stream) unknown() {
	st.ds.mu.Lock()
	defer st.ds.mu.Unlock()
	if st.snd.Refusal() != delivery.RefusalUnknown {
		return
	}
	for count, r := range st.waiting {
		if r.strict {
			st.failLocked(count, fmt.Errorf("%w: %q", ErrNoWorker, st.to))
		}
	}
	st.refused.Reset(unknownGrace) // for those that come later
}

func (st *stream) attachLocked(p *pipe, epoch [16]byte) {
	if st.pipe == p || st.err != nil {
		return
	}
	st.leaveLocked()
	st.pipe = p
	p.streams = append(p.streams, st)
	mark := st.snd.Attach(epoch)
	if st.store != nil {
		st.store.attached(epoch, mark)
	}
}

// leaveLocked takes the stream off its pipe.
func (st *stream) leaveLocked() {
	if st.pipe == nil {
		return
	}
	p := st.pipe
	p.streams = slices.DeleteFunc(p.streams, func(o *stream) bool { return o == st })
	st.detachLocked()
}

func (st *stream) detachLocked() {
	st.pipe = nil
	st.snd.Detach()
	st.timer.Stop()
	st.refused.Stop()
}

// endLocked ends the outbox. What waits is not sent any more; on disk it stays for
// the next process.
func (st *stream) endLocked(err error) {
	if st.err != nil {
		return
	}
	st.err = err
	st.leaveLocked()
	st.timer.Stop()
	st.refused.Stop()
	delete(st.ds.streams, st.id)
	for count, r := range st.waiting {
		r.err = err
		if st.snd.Sent(count) {
			r.err = fmt.Errorf("%w: %w", ErrUnacknowledged, err)
		}
		close(r.done)
	}
	clear(st.waiting)
	for count, n := range st.taken { // who waits for room hears of the end
		st.room.Release(n)
		delete(st.taken, count)
	}
}

// deliver posts a message and waits for its acknowledgement. When ctx ends first the
// message is withdrawn.
func (st *stream) deliver(ctx context.Context, payload []byte) error {
	r, err := st.post(ctx, payload, true)
	if err != nil {
		return err
	}
	return st.await(ctx, r)
}

// await waits for the acknowledgement of a message, or withdraws it when ctx ends.
func (st *stream) await(ctx context.Context, r *Receipt) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	if ending(ctx) {
		<-r.done
		return r.err
	}
	err := st.ch.because(ctxError(ctx, "waiting for the peer's acknowledgement"))
	sent := st.withdraw(r, err)
	if rerr := r.Err(); rerr == nil || !errors.Is(rerr, err) {
		return rerr // settled in the same moment
	}
	if sent {
		return fmt.Errorf("%w: %w", ErrUnacknowledged, err)
	}
	return err
}
