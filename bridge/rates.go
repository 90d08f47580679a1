package bridge

import (
	"time"

	"golang.org/x/time/rate"

	"github.com/sealmq/sealmq/route"
)

// meterParts is how finely a second's allowance is charged: what a connection
// sends is added up until it is a part of that size, so that most packets cost
// no look at the clock and no lock.
const meterParts = 256

// meter is what one peer may send: token buckets for frames and for bytes, each
// as deep as one second's allowance. A device's outlives its connections.
//
// A packet is charged after it was taken, so a bucket can go below zero: the
// acknowledgements of what was taken meanwhile are withheld until it is paid
// for, and transient packets are dropped. How far below is bounded by the
// connection's window.
type meter struct {
	frames, bytes   *rate.Limiter // nil: no limit
	perFrame, perKB int           // what is charged at once
}

func newMeter(cfg *Config) *meter {
	if cfg.FrameRate == 0 && cfg.ByteRate == 0 {
		return nil
	}
	m := &meter{}
	if cfg.FrameRate > 0 {
		m.frames = rate.NewLimiter(rate.Limit(cfg.FrameRate), max(1, int(cfg.FrameRate)))
		m.perFrame = max(1, int(cfg.FrameRate)/meterParts)
	}
	if cfg.ByteRate > 0 {
		m.bytes = rate.NewLimiter(rate.Limit(cfg.ByteRate), max(1, int(cfg.ByteRate)))
		m.perKB = max(1, int(cfg.ByteRate)/meterParts)
	}
	return m
}

// reserve takes n tokens, more than the bucket holds if need be, and returns
// when they are there.
func reserve(l *rate.Limiter, now time.Time, n int) time.Duration {
	var wait time.Duration
	for n > 0 {
		part := min(n, l.Burst())
		wait = l.ReserveN(now, part).DelayFrom(now)
		n -= part
	}
	return wait
}

// account is a connection's side of its port's meter. It is owned by the
// goroutine in Receive.
type account struct {
	frames, bytes int   // not charged yet
	paid          int64 // when everything that was charged is paid for; unix nanoseconds
}

// charge takes a packet's frames and bytes off the peer's allowance and returns
// when they are paid for: 0 when they are already. A transient packet that would
// have to wait is not charged and not ok.
func (l *Link) charge(class route.Class, frames, bytes int, now int64) (due int64, ok bool) {
	m := l.port.meter
	if m == nil {
		return 0, true
	}
	a := &l.account
	if class == route.Transient && a.paid > now {
		return 0, false
	}
	a.frames += frames
	a.bytes += bytes
	at := time.Unix(0, now)
	wait := time.Duration(0)
	if m.frames != nil && a.frames >= m.perFrame {
		wait = reserve(m.frames, at, a.frames)
		a.frames = 0
	}
	if m.bytes != nil && a.bytes >= m.perKB {
		wait = max(wait, reserve(m.bytes, at, a.bytes))
		a.bytes = 0
	}
	if wait > 0 {
		a.paid = max(a.paid, now+int64(wait))
	}
	if a.paid <= now {
		return 0, true
	}
	return a.paid, true
}

// owe withholds an acknowledgement that is due later, or that comes behind one
// that is: acknowledgements keep their order. It returns false when the
// acknowledgement may be given at once. The caller holds no lock.
func (l *Link) owe(t Ticket) bool {
	if t.due == 0 && !l.owing.Load() {
		return false
	}
	now := l.port.b.now()
	l.mu.Lock()
	switch {
	case l.dead.Load():
		l.mu.Unlock()
		return true
	case len(l.owed) == 0 && !l.paying && t.due <= now:
		l.mu.Unlock()
		return false
	}
	l.owed = append(l.owed, t)
	l.owing.Store(true)
	first := l.owed[0].due
	l.mu.Unlock()
	l.waitPackets.Add(1)
	l.waitBytes.Add(int64(t.bytes))
	l.port.stripe.throttled.Add(1)
	l.port.wakeBy(max(first, 1))
	return true
}

// pay gives the acknowledgements that have become due. Only the bridge's timer
// goroutine calls it, without holding a lock.
func (l *Link) pay(now int64) {
	if !l.owing.Load() {
		return
	}
	l.mu.Lock()
	l.paying = true
	for {
		n := 0
		for n < len(l.owed) && l.owed[n].due <= now {
			n++
		}
		if n == 0 {
			break
		}
		due := l.owed[:n:n]
		l.owed = l.owed[n:]
		l.mu.Unlock()
		for _, t := range due {
			l.answered(t.bytes)
			if !l.dead.Load() {
				t.ack.Acked(t.token)
			}
		}
		l.mu.Lock()
	}
	l.paying = false
	next := int64(0)
	if len(l.owed) > 0 {
		next = l.owed[0].due
	} else {
		l.owed = nil
		l.owing.Store(false)
	}
	l.mu.Unlock()
	l.port.wakeBy(next)
}

// mayRegister spends one registration of the peer's allowance.
func (p *Port) mayRegister() bool {
	return p.allowance(&p.registrations, p.b.cfg.RegistrationRate, p.b.cfg.RegistrationBurst)
}

// mayHello spends one hello of the device's allowance, which its connections
// share.
func (p *Port) mayHello() bool {
	return p.allowance(&p.hellos, p.b.cfg.HelloRate, p.b.cfg.HelloBurst)
}

func (p *Port) allowance(l **rate.Limiter, perSecond float64, burst int) bool {
	p.mu.Lock()
	if *l == nil {
		*l = rate.NewLimiter(rate.Limit(perSecond), burst)
	}
	lim := *l
	p.mu.Unlock()
	return lim.AllowN(time.Unix(0, p.b.now()), 1)
}
